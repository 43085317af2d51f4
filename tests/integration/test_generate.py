"""A teacher that writes: its answers are transformers' own, and what is kept of them is what it said."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdcache.cache.commit import read_commits
from kdcache.cache.layout import commit_name
from kdcache.cache.reader import open_cache
from kdcache.cache.store import LocalStore
from kdcache.cache.verify import verify_cache
from kdcache.cli import main
from kdcache.dump.audit import against_teacher
from kdcache.dump.engines.generate import Answer, AnsweringEngine
from kdcache.dump.generate import keep_answers, repetition
from kdcache.dump.launch import dump
from kdcache.dump.options import DumpOptions, GenerateOptions
from kdcache.errors import CacheMismatchError, ConfigError, CorpusError, ModelError
from kdcache.evaluate.generations import answer_prompts, read_prompts
from kdcache.targets import TokenSequence
from tests.abuse.crashes import assert_same, contents
from tests.conftest import VOCAB_SIZE, make_llama, texts
from tests.integration.test_dump import own_logits
from tests.integration.test_train import run
from tests.strategies import log_softmax

PROMPTS = 14


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory):
    """Prompts of different lengths, two of them the same, one empty, one that leaves no room."""
    asked = [" ".join(text.split()[: 2 + number]) for number, text in enumerate(texts(PROMPTS - 3))]
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [*asked, asked[0], "", " ".join(["grass"] * 200)]
    path.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    return str(path)


def asked(teacher, prompts, output, **changes):
    given = {
        "seq_len": 64, "threads": 1, "top_k": 8, "temperatures": (1.0, 2.0), "shard_positions": 150, "device": "cpu", "dtype": "float32",
        "max_new_tokens": 12, "batch_tokens": 200,
    }  # fmt: skip
    return GenerateOptions(teacher=teacher, dataset=prompts, output=str(output), **(given | changes))


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tiny_teacher, prompts_file):
    folder = tmp_path_factory.mktemp("generate") / "cache"
    dump(asked(tiny_teacher, prompts_file, folder))
    return folder


SCHEMES = [{}, {"targets": "top_p", "top_p": 0.3, "top_k": 60}, {"targets": "sampled", "num_draws": 10, "entry_logprobs": True},
           {"targets": "hybrid", "top_k": 4, "num_draws": 6}]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.get("targets", "top_k"))
def test_what_is_kept_is_what_the_model_says_of_the_finished_text(tmp_path, tiny_teacher, prompts_file, scheme):
    """Out of a key-value cache and left padding, against one forward over prompt and answer."""
    dump(asked(tiny_teacher, prompts_file, tmp_path / "c", codec="exact", **scheme))
    found = open_cache(tmp_path / "c")
    assert len(found) > PROMPTS / 2
    for row in found:
        logprobs = log_softmax(own_logits(tiny_teacher, row.sequence))
        position = np.repeat(np.arange(len(row.targets)), row.targets.num_entries)
        np.testing.assert_allclose(row.targets.logprobs, logprobs[position, row.targets.token_ids], atol=5e-5)
        labels = row.sequence.input_ids[row.sequence.loss_mask]
        np.testing.assert_allclose(row.targets.label_logprobs, logprobs[np.arange(len(labels)), labels], atol=5e-5)
        if not scheme:
            assert (np.sort(logprobs, 1)[:, -8] <= row.targets.logprobs.reshape(-1, 8).min(1) + 1e-4).all()


def test_greedy_answers_are_those_of_transformers(tmp_path, tiny_teacher, prompts_file):
    dump(asked(tiny_teacher, prompts_file, tmp_path / "c", sample_temperature=0.0))
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32).eval()
    for row in open_cache(tmp_path / "c"):
        ids, mask = row.sequence.input_ids.astype(np.int64), row.sequence.loss_mask
        written = model.generate(torch.tensor(ids[~mask])[None], max_new_tokens=12, do_sample=False)[0, (~mask).sum() :]
        assert written.tolist()[: mask.sum()] == ids[mask].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_of_the_head_that_are_no_tokens_are_never_written(tmp_path, prompts_file, temperature):
    """A teacher with 64 rows more than tokens, and more mass on these than on any token."""
    teacher = padded_llama(tmp_path / "padded")
    dump(asked(teacher, prompts_file, tmp_path / "c", codec="exact", sample_temperature=temperature))
    found = open_cache(tmp_path / "c")
    assert len(found) > PROMPTS / 2 and verify_cache(LocalStore(tmp_path / "c")).intact
    for row in found:
        logprobs = log_softmax(own_logits(teacher, row.sequence)[:, :VOCAB_SIZE])
        labels = row.sequence.input_ids[row.sequence.loss_mask]
        np.testing.assert_allclose(row.targets.label_logprobs, logprobs[np.arange(len(labels)), labels], atol=5e-5)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher), AutoTokenizer.from_pretrained(teacher)
    prompts = read_prompts(prompts_file, 3, max_new_tokens=8, chat=False, has_teacher=True)
    assert all(answer_prompts(model, tokenizer, prompts, teacher)), "not one is empty, as text of no tokens would be"


def padded_llama(folder):
    make_llama(folder, vocab_size=VOCAB_SIZE + 64)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[VOCAB_SIZE:] *= 6
    model.save_pretrained(folder)
    return str(folder)


def test_the_same_bytes_however_it_was_divided(tmp_path, tiny_teacher, prompts_file, cache):
    dump(asked(tiny_teacher, prompts_file, tmp_path / "two", workers=2))
    assert_same(tmp_path / "two", contents(cache))
    again = tmp_path / "again"
    dump(asked(tiny_teacher, prompts_file, again))
    assert len(read_commits(LocalStore(again))) > 2
    for shard in (1, 2):
        (again / commit_name(shard)).unlink()
    (again / "manifest.json").unlink()
    dump(asked(tiny_teacher, prompts_file, again))
    assert_same(again, contents(cache))
    assert dump(asked(tiny_teacher, prompts_file, again)).already_done


def test_a_batch_that_does_not_fit_is_halved(tmp_path, tiny_teacher, prompts_file, monkeypatch):
    """Every prompt is answered all the same, and the commits say how often; one that does not fit alone is an error."""
    whole, room = AnsweringEngine._answer, 2

    def in_little_memory(self, prompts, names, longest):
        if len(prompts) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, prompts, names, longest)

    monkeypatch.setattr(AnsweringEngine, "_answer", in_little_memory)
    dump(asked(tiny_teacher, prompts_file, tmp_path / "c", shard_positions=10_000, keep_duplicates=True, num_answers=4))
    made = open_cache(tmp_path / "c")
    assert made.manifest.stats.num_sequences == 4 * (PROMPTS - 2)
    assert sum(commit.batch_splits for commit in read_commits(made.store)) > 0
    room = 0
    with pytest.raises(ModelError, match="a prompt of .* and its answer do not fit") as error:
        dump(asked(tiny_teacher, prompts_file, tmp_path / "d"))
    assert "--max-new-tokens" in error.value.hint


def test_sampling_is_the_seeds(tmp_path, tiny_teacher, prompts_file, cache):
    dump(asked(tiny_teacher, prompts_file, tmp_path / "other", sample_seed=1))
    first, second = (
        [row.sequence.input_ids.tolist() for row in open_cache(path)] for path in (cache, tmp_path / "other")
    )
    assert first != second
    with pytest.raises(CacheMismatchError, match=r"generation\.seed: the cache has 0, this run asks for 2"):
        dump(asked(tiny_teacher, prompts_file, cache, sample_seed=2))


def test_it_is_a_cache_like_any_other(tmp_path, cache, tiny_student):
    assert verify_cache(LocalStore(cache), deep=True).intact
    audit = against_teacher(open_cache(cache), 5)
    assert audit.agrees
    done = run(str(cache), tiny_student, tmp_path / "student", max_steps=3)
    assert done.results["steps"] == 3


def test_rows_and_answers_are_counted(tmp_path, tiny_teacher, prompts_file):
    """Two prompts are refused; asked greedily, the same prompt has the same answer in its shard."""
    dump(
        asked(tiny_teacher, prompts_file, tmp_path / "c", sample_temperature=0.0, num_answers=2, shard_positions=10_000)
    )
    stats = open_cache(tmp_path / "c").manifest.stats
    assert (stats.num_rows, stats.num_rows_skipped) == (PROMPTS, 2)
    # Shards are as small as that a few are made; a second answer is always there already, the doubled prompt only in one shard.
    assert stats.num_answers_duplicate >= PROMPTS - 2
    assert stats.num_sequences + stats.num_answers_duplicate == 2 * (PROMPTS - 2)
    dump(asked(tiny_teacher, prompts_file, tmp_path / "d", sample_temperature=0.0, num_answers=2, keep_duplicates=True))
    assert open_cache(tmp_path / "d").manifest.stats.num_sequences == 2 * (PROMPTS - 2)


def test_answers_are_dropped_for_their_first_reason():
    def answer(said, *, finished=True):
        ids = np.array([1, 2, *said], np.uint32)
        return Answer(TokenSequence(ids, np.arange(len(ids)) > 1, np.zeros(1, np.uint32)), None, finished)

    spec = asked("t", "d", "o", min_tokens=2, max_repetition=0.5, keep_unfinished=False).generation
    good, other = answer([3, 4, 5]), answer([3, 4, 6])
    cases = [good, answer([3]), answer([3, 4, 7], finished=False), answer([5] * 20), answer([3, 4, 5]), other]
    dropped = Counter()
    assert list(keep_answers(cases, spec, dropped)) == [good, other]
    assert dropped == {
        "num_answers_short": 1,
        "num_answers_unfinished": 1,
        "num_answers_repetitive": 1,
        "num_answers_duplicate": 1,
    }


def test_an_answer_of_its_end_alone_is_empty():
    """By default; that of one token more is not, nor is one token that was cut off before its end."""
    end = 2
    empty, short, cut = (
        Answer(
            TokenSequence(np.array([1, *said], np.uint32), np.arange(1 + len(said)) > 0, np.zeros(1, np.uint32)),
            None,
            finished,
        )
        for said, finished in (([end], True), ([3, end], True), ([3], False))
    )
    for min_tokens, kept in ((0, [empty, short, cut]), (1, [short, cut]), (2, [])):
        dropped = Counter()
        spec = asked("t", "d", "o", min_tokens=min_tokens).generation
        assert list(keep_answers([empty, short, cut], spec, dropped)) == kept
        assert dropped["num_answers_short"] == 3 - len(kept)
    assert asked("t", "d", "o").generation.min_tokens == 1


def test_empty_answers_are_dropped_and_the_others_stay(tmp_path, tiny_teacher, prompts_file):
    """A teacher that ends at once where it would have begun with a certain token; taken up again, the same bytes."""
    greedy = {"sample_temperature": 0.0, "keep_duplicates": True}
    dump(asked(tiny_teacher, prompts_file, tmp_path / "whole", **greedy))
    answers = [row.sequence.input_ids[row.sequence.loss_mask].tolist() for row in open_cache(tmp_path / "whole")]
    end, _ = Counter(said[0] for said in answers).most_common()[-1]
    num_empty = sum(said[0] == end for said in answers)
    assert 0 < num_empty < len(answers)
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    (tmp_path / "teacher" / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    given = asked(str(tmp_path / "teacher"), prompts_file, tmp_path / "c", **greedy)
    dump(given)
    found = open_cache(tmp_path / "c")
    assert found.manifest.stats.num_answers_short == num_empty
    kept = [row.sequence.input_ids[row.sequence.loss_mask].tolist() for row in found]
    assert kept == [[*said[: said.index(end)], end] if end in said else said for said in answers if said[0] != end]
    before = contents(tmp_path / "c")
    (tmp_path / "c" / commit_name(1)).unlink()
    (tmp_path / "c" / "manifest.json").unlink()
    dump(given)
    assert_same(tmp_path / "c", before)
    dump(asked(str(tmp_path / "teacher"), prompts_file, tmp_path / "all", min_tokens=0, **greedy))
    assert open_cache(tmp_path / "all").manifest.stats.num_sequences == len(answers)


def test_repetition_is_a_share_of_4_grams():
    assert repetition([1, 2, 3]) == repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([7] * 13) == 1 - 1 / 10
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == 1 - 4 / 5


def test_the_text_is_a_dataset_that_can_be_dumped(tmp_path, tiny_teacher, prompts_file, cache):
    flags = ["--teacher", tiny_teacher, "--dataset", prompts_file, "--seq-len", "64", "--max-new-tokens", "12", "--threads", "1",
             "--device", "cpu", "--dtype", "float32", "--output", str(tmp_path / "c"), "--shard-positions", "150", "--no-keep-unfinished"]  # fmt: skip
    done = CliRunner().invoke(main, ["generate", *flags])
    assert done.exit_code == 0, done.output
    assert "left no room for an answer" in done.output and "cut off" in done.output
    lines = [json.loads(line) for line in (tmp_path / "c" / "answers.jsonl").read_text().splitlines()]
    made = open_cache(tmp_path / "c")
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    assert len(lines) == len(made)
    for line, row in zip(lines, made, strict=True):
        assert tokenizer(line["prompt"])["input_ids"] == row.sequence.input_ids[~row.sequence.loss_mask].tolist()
        said = row.sequence.input_ids[row.sequence.loss_mask]
        assert line["completion"] == tokenizer.decode(said, skip_special_tokens=True)
    again = CliRunner().invoke(main, ["generate", *flags])
    assert again.exit_code == 0 and "all done" in again.output
    written = (tmp_path / "c" / "answers.jsonl").read_bytes()
    (tmp_path / "c" / "answers.jsonl").unlink()
    assert CliRunner().invoke(main, ["generate", *flags]).exit_code == 0, "as after a crash between cache and text"
    assert (tmp_path / "c" / "answers.jsonl").read_bytes() == written
    changed = CliRunner().invoke(main, ["dump-teacher", *flags[:4], "--output", str(tmp_path / "c")])
    assert changed.exit_code == 1 and "was made by kdcache generate" in changed.output


def test_another_text_is_never_taken_for_the_answers(tmp_path, tiny_teacher, prompts_file):
    """Nor written over; before there is work, where that can be known."""
    cache, text = tmp_path / "c", tmp_path / "a.jsonl"
    flags = ["--teacher", tiny_teacher, "--dataset", prompts_file, "--split", "train[:3]", "--seq-len", "64", "--max-new-tokens", "8",
             "--threads", "1", "--device", "cpu", "--output", str(cache), "--answers", str(text)]  # fmt: skip
    text.write_text("mine\n")
    refused = CliRunner().invoke(main, ["generate", *flags])
    assert refused.exit_code == 1 and "is there already" in refused.output and "another file" in refused.output
    assert not cache.exists() and text.read_text() == "mine\n"
    text.unlink()
    assert CliRunner().invoke(main, ["generate", *flags]).exit_code == 0
    written = text.read_bytes()
    assert CliRunner().invoke(main, ["generate", *flags]).exit_code == 0 and text.read_bytes() == written
    text.write_bytes(written[:-1])
    refused = CliRunner().invoke(main, ["generate", *flags])
    assert refused.exit_code == 1 and "is not the text of" in refused.output and "remove it" in refused.output
    assert text.read_bytes() == written[:-1]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_chats_are_answered_by_chats(tmp_path, tiny_teacher):
    chats = tmp_path / "chats.jsonl"
    asks, told = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}
    rows = [[asks], [asks, told], [asks, told, {"role": "user", "content": "a dog"}]]
    chats.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    options = asked(tiny_teacher, str(chats), tmp_path / "c", answers=str(tmp_path / "a.jsonl"), system="rain fell")
    dump(options)
    from kdcache.cli.generate import write_text

    write_text(options, options.answers)
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [[message["role"] for message in line["prompt"]] for line in lines][-1] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    assert all(line["completion"][0]["role"] == "assistant" for line in lines)
    again = tmp_path / "again"
    dump(
        DumpOptions(
            teacher=tiny_teacher,
            dataset=str(tmp_path / "a.jsonl"),
            output=str(again),
            seq_len=64,
            threads=1,
            device="cpu",
        )
    )
    assert len(open_cache(again)) > 0


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"targets": "hidden"}, ValueError, "hidden states are not kept"),
        ({"packing": True}, ValueError, "neither packed"),
        ({"text_column": "question"}, CorpusError, "a column prompt"),
        ({"chat": True, "seq_len": 8}, ConfigError, "nothing|anything"),
    ],
)
def test_bad_input_is_told_apart(tmp_path, tiny_teacher, prompts_file, changes, error, says):
    with pytest.raises(error, match=says):
        dump(asked(tiny_teacher, prompts_file, tmp_path / "c", **changes))
    assert not (tmp_path / "c" / "plan.json").exists()
