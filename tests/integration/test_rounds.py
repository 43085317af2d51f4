"""On-policy rounds: the student writes, the teacher scores the very tokens, the student trains; and what the same parts serve besides."""

import json

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from kdcache.cache.reader import open_cache
from kdcache.cli import main
from kdcache.config import check_options
from kdcache.train.mix import kind_of_text
from kdcache.train.objective import BucketTargets
from kdcache.train.options import TrainOptions
from kdcache.train.recipe import Recipe
from kdcache.train.rollouts import asked_in_turn
from kdcache.train.run import stages_of
from kdcache.train.stream import CacheDataset, TargetDecoder, collate
from tests.object_stores import FaultyMemory, faulty_memory

PROMPTS = ["the cat", "a dog runs", "once upon", "the sea is", "in the house", "seven birds", "a long way", "he said"]


def kdcache(*arguments, code=0):
    done = CliRunner().invoke(main, [str(part) for part in arguments])
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_teacher, tiny_student, corpus_file):
    """Real text, the student's rollouts and the teacher's answers, each a cache of the teacher's ``top_k`` targets."""
    folder = tmp_path_factory.mktemp("rounds")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    common = ["--top-k", 16, "--temperatures", 1, "--dtype", "float32", "--seq-len", 64]
    answers = ["--dataset", folder / "prompts.jsonl", "--max-new-tokens", 12, "--num-answers", 3]
    kdcache("dump-teacher", "--teacher", tiny_teacher, "--dataset", corpus_file, "--output", folder / "real", *common)
    kdcache("generate", "--teacher", tiny_teacher, *answers, "--output", folder / "answers", *common)
    kdcache(
        "generate", "--teacher", tiny_student, *answers, "--output", folder / "rollouts", *common, "--codec", "exact"
    )
    kdcache(
        "dump-teacher",
        "--teacher",
        tiny_teacher,
        "--dataset",
        folder / "rollouts",
        "--output",
        folder / "scored",
        *common,
    )
    return folder


def train(folder, student, output, *more, code=0):
    return kdcache(
        "train-student", "--student", student, "--output", output, "--per-device-train-batch-size", 4, "--logging-steps", 1, *more, code=code
    )  # fmt: skip


def logs(output):
    return [r for r in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()) if "loss" in r]


def test_a_cache_in_another_store_is_read_too(folder, tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("KDCACHE_COPIES", str(tmp_path / "copies"))
    faulty_memory()
    FaultyMemory.disarm()
    kdcache("transcode", "--cache", folder / "rollouts", "--output", "faulty://bucket/rollouts")
    asked = ["--teacher", tiny_teacher, "--top-k", 16, "--temperatures", 1, "--dtype", "float32", "--seq-len", 64]
    kdcache("dump-teacher", *asked, "--dataset", "faulty://bucket/rollouts", "--output", tmp_path / "scored")
    ours, theirs = open_cache(tmp_path / "scored"), open_cache(folder / "scored")
    assert ours.content_hashes() == theirs.content_hashes()
    assert ours.spec.corpus.model_copy(update={"dataset": str(folder / "rollouts")}) == theirs.spec.corpus
    again = kdcache("dump-teacher", *asked, "--dataset", "faulty://bucket/rollouts", "--output", tmp_path / "scored")
    assert "all done" in again
    told = kdcache(
        "dump-teacher", *asked, "--dataset", "faulty://bucket/text.jsonl", "--output", tmp_path / "c", code=1
    )
    assert "no cache lies there" in told and "of URLs, caches" in told


def test_a_cache_is_read_token_for_token(folder, tiny_teacher, tmp_path):
    rollouts, scored = open_cache(folder / "rollouts"), open_cache(folder / "scored")
    assert scored.content_hashes() == rollouts.content_hashes()
    assert scored.spec.corpus.written_by == rollouts.spec.teacher.digest != scored.spec.teacher.digest
    assert [kind_of_text(open_cache(folder / name)) for name in ("real", "answers", "rollouts", "scored")] == [
        "real", "teacher", "teacher", "student",
    ]  # fmt: skip
    kdcache("dump-teacher", "--teacher", tiny_teacher, "--dataset", folder / "real", "--output", tmp_path / "again",
            "--top-k", 16, "--temperatures", 1, "--dtype", "float32", "--id-tables", "none")  # fmt: skip
    real, again = open_cache(folder / "real"), open_cache(tmp_path / "again")
    assert again.spec.corpus.packing, "packed documents stay apart"
    assert again.spec.corpus.written_by is None
    for a, b in zip(real, again, strict=True):
        assert (a.sequence.document_starts == b.sequence.document_starts).all()
        assert a.targets.label_logprobs == pytest.approx(b.targets.label_logprobs, abs=0.1)
    assert "all done" in kdcache(
        "dump-teacher", "--teacher", tiny_teacher, "--dataset", folder / "real", "--output", tmp_path / "again",
        "--top-k", 16, "--temperatures", 1, "--dtype", "float32", "--id-tables", "none",
    )  # fmt: skip


def test_a_round_of_minillm_starts_on_policy(folder, tiny_student, tmp_path):
    """Before the first step the student is the one that wrote the rollouts; after some it no longer is."""
    out = tmp_path / "student"
    train(folder, tiny_student, out, "--cache", folder / "real", "--student-cache", folder / "scored", "--rollout-cache", folder / "rollouts",
          "--loss", "minillm", "--alpha", 0.5, "--mix", "student:0.5,real:0.5", "--max-steps", 6, "--learning-rate", 1e-2)  # fmt: skip
    said = logs(out)
    assert said[0]["staleness"] == pytest.approx(0, abs=1e-4)
    assert abs(said[-1]["staleness"]) > 1e-3
    assert all(0 < record["rollout_share"] <= 1 for record in said)
    assert min(record["rollout_share"] for record in said) < 1
    results = json.loads((out / "train_results.json").read_text())
    assert results["staleness"] == said[-1]["staleness"]
    assert results["mix"] == {"student": 0.5, "real": 0.5}


def test_staleness_is_told_of_any_loss(folder, tiny_student, tmp_path):
    out = tmp_path / "student"
    train(
        folder,
        tiny_student,
        out,
        "--cache",
        folder / "scored",
        "--rollout-cache",
        folder / "rollouts",
        "--max-steps",
        3,
        "--alpha",
        1,
    )
    assert logs(out)[0]["staleness"] == pytest.approx(0, abs=1e-4)
    assert logs(out)[0]["rollout_share"] == 1
    labels = tmp_path / "labels"
    train(
        folder,
        tiny_student,
        labels,
        "--cache",
        folder / "scored",
        "--rollout-cache",
        folder / "rollouts",
        "--max-steps",
        3,
        "--alpha",
        0,
    )
    assert logs(labels)[0]["staleness"] == pytest.approx(0, abs=1e-4)


def test_mixed_tokens_have_their_shares(folder, tiny_student, tmp_path):
    """Counted from the batches that training saw."""
    from kdcache.train.stream import KDBatchSampler
    from kdcache.train.trainer import make_mix

    texts = [open_cache(folder / "answers"), open_cache(folder / "real")]
    mix = make_mix({"teacher": 0.7, "real": 0.3}, texts, 0)
    sampler = KDBatchSampler(0, 2, fingerprint="0", mix=mix)
    indices = [i for batch in sampler for i in batch if i >= 0]
    counts = [int(texts[0].tokens(i).target_mask.sum()) if i < len(texts[0]) else 0 for i in indices]
    others = [0 if i < len(texts[0]) else int(texts[1].tokens(i - len(texts[0])).target_mask.sum()) for i in indices]
    longest = max(max(counts), max(others))
    assert abs(sum(counts) - 0.7 * (sum(counts) + sum(others))) <= longest
    train(
        folder,
        tiny_student,
        tmp_path / "mixed",
        "--cache",
        folder / "answers",
        "--cache",
        folder / "real",
        "--mix",
        "teacher:0.7,real:0.3",
    )
    assert len(logs(tmp_path / "mixed")) == -(-mix.epoch_length // 4)


def test_a_cache_can_be_named_by_its_path(folder, tiny_student, tmp_path):
    train(folder, tiny_student, tmp_path / "s", "--cache", folder / "answers", "--cache", folder / "scored", "--mix",
          f"{folder}/answers:1,student:1", "--max-steps", 2)  # fmt: skip
    assert json.loads((tmp_path / "s" / "train_results.json").read_text())["mix"] == {
        f"{folder}/answers": 1,
        "student": 1,
    }


DRAWN = ["--targets", "sampled", "--num-draws"]
DUMPS = {
    "k16": ["--top-k", 16], "k64": ["--top-k", 64], "k128": ["--top-k", 128], "high": ["--top-k", 16, "--quality", "high"],
    "exact": ["--top-k", 16, "--codec", "exact"], "drawn": [*DRAWN, 20], "drawn40": [*DRAWN, 40], "drawn300": [*DRAWN, 300],
    "known": [*DRAWN, 20, "--entry-logprobs"], "known40": [*DRAWN, 40, "--entry-logprobs"],
}  # fmt: skip


@pytest.fixture(scope="module")
def dumped(folder, tiny_teacher, corpus_file):
    """Caches of the same text, each dumped in its own way, made when they are first asked for."""

    def dump(name):
        output = folder / f"dumped-{name}"
        if not output.exists():
            kdcache("dump-teacher", "--teacher", tiny_teacher, "--dataset", corpus_file, "--split", "train[:6]", "--temperatures", 1, "--dtype", "float32",
                    "--seq-len", 64, "--output", output, *DUMPS[name])  # fmt: skip
        return output

    return dump


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ("k64", "k128", "levels of 0.05424 nats growing by 0.3, and of 0.0645 nats"),
        ("k16", "high", "levels of 0.018 nats"),
        ("k16", "exact", "codec exact, and packed"),
        ("drawn", "known", "entry logprobs yes, and no"),
        ("drawn", "drawn300", "levels counts in uint16, and counts in uint8"),
    ],
)
def test_texts_that_are_not_decoded_alike_are_refused(folder, dumped, tiny_student, tmp_path, first, second, says):
    """A batch is decoded with the levels of one cache; the other's would be read as other numbers."""
    caches = [dumped(first), dumped(second)]
    mix = ",".join(f"{cache}:1" for cache in caches)
    given = [part for cache in caches for part in ("--cache", cache)]
    output = " ".join(train(folder, tiny_student, tmp_path / "s", *given, "--mix", mix, code=1).split())
    assert "not decoded alike" in output
    assert says in output
    assert "kdcache transcode" in output


def test_the_students_text_is_decoded_as_the_teachers(folder, dumped, tiny_student, tmp_path):
    caches = [dumped("k16"), dumped("high")]
    output = train(folder, tiny_student, tmp_path / "s", "--cache", caches[0], "--loss", "contrastive", "--student-cache", caches[1], code=1)  # fmt: skip
    assert "not decoded alike" in output


def test_what_the_error_advises_makes_them_alike(dumped, tiny_student, tmp_path, folder):
    cut = tmp_path / "cut"
    kdcache("transcode", "--cache", dumped("k128"), "--output", cut, "--top-k", 64, "--quality", "standard")
    train(folder, tiny_student, tmp_path / "s", "--cache", dumped("k64"), "--cache", cut, "--mix", f"{dumped('k64')}:1,{cut}:1", "--max-steps", 1)  # fmt: skip


@pytest.mark.parametrize(("first", "second"), [("k16", "k64"), ("drawn", "drawn40"), ("known", "known40")])
def test_texts_that_are_taken_are_decoded_each_as_it_was_stored(folder, dumped, tiny_student, tmp_path, first, second):
    readers = [open_cache(dumped(name)) for name in (first, second)]
    Recipe.of(1.0, 1.0, "forward_kl", None).check([(reader, 0.5) for reader in readers], [], mixed=True)
    data = CacheDataset(readers[0], more=(readers[1],))
    places = [(0, 0), (1, 0), (1, 3), (0, 2)]
    batch = collate([data[number * len(readers[0]) + row] for number, row in places])
    decoded = TargetDecoder.for_cache(readers[0], 1.0, torch.device("cpu")).decode(batch)
    stored = BucketTargets.of([readers[number][row].targets for number, row in places], 1.0)
    for name in ("logprobs", "ratios"):
        dense = [_dense(getattr(targets, name), targets, readers[0].vocab_size) for targets in (decoded, stored)]
        torch.testing.assert_close(*dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoded.tail_logprobs, stored.tail_logprobs, rtol=0, atol=1e-5)


def _dense(values, targets, vocab_size):
    """``[N, V]``, entries in whatever order."""
    if values is None:
        return torch.zeros(())
    values = torch.where(targets.logprobs > -torch.inf, values, 0.0)
    return torch.zeros(len(targets), vocab_size).scatter_add(1, targets.token_ids, values)


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        (["--sample-temperature", 0.7], "temperature 0.7"),
        (["--sample-temperature", 0], "temperature 0,"),
        (["--sample-top-p", 0.9, "--sample-top-k", 5], "top_p 0.9, top_k 5"),
        (["--repetition-penalty", 1.2], "repetition_penalty 1.2"),
    ],
)
def test_minillm_refuses_rollouts_that_were_not_plainly_sampled(folder, tiny_student, tmp_path, sampling, says):
    """The stored probabilities are not those with which such text is written."""
    kdcache("generate", "--teacher", tiny_student, "--dataset", folder / "prompts.jsonl", "--max-new-tokens", 6, "--output", tmp_path / "rollouts",
            "--top-k", 1, "--temperatures", 1, "--dtype", "float32", "--seq-len", 64, "--codec", "exact", *sampling)  # fmt: skip
    output = train(folder, tiny_student, tmp_path / "s", "--cache", folder / "real", "--student-cache", folder / "scored", "--loss", "minillm",
                   "--rollout-cache", folder / "rollouts", "--rollout-cache", tmp_path / "rollouts", code=1)  # fmt: skip
    output = " ".join(output.split())
    assert f"was sampled with {says}" in output
    assert "--sample-temperature 1 --sample-top-p 1 --sample-top-k 0 --repetition-penalty 1" in output


def test_what_was_written_in_two_rounds_has_the_probability_of_its_own(folder, tiny_teacher, tmp_path):
    """The same answers from two students, as if the first had become the second, in either order of the caches."""
    asked = ["--teacher", tiny_teacher, "--temperatures", 1, "--dtype", "float32", "--seq-len", 64]
    kdcache(
        "dump-teacher",
        *asked,
        "--top-k",
        1,
        "--codec",
        "exact",
        "--dataset",
        folder / "rollouts",
        "--output",
        tmp_path / "rollouts",
    )
    kdcache("dump-teacher", *asked, "--top-k", 16, "--dataset", tmp_path / "rollouts", "--output", tmp_path / "scored")
    rounds = [[open_cache(root / name) for name in ("scored", "rollouts")] for root in (folder, tmp_path)]
    written = [rollouts for _, rollouts in rounds]
    size = len(written[0])
    for given in (written, written[::-1]):
        data = CacheDataset(rounds[0][0], more=(rounds[1][0],), rollouts=tuple(given))
        for index in (0, size - 1, size, 2 * size - 1):
            expected = written[index // size][index % size].targets.label_logprobs
            np.testing.assert_array_equal(data[index].rollout.logprobs, expected)
        assert asked_in_turn(open_cache(folder / "real"), given) == tuple(reversed(given))
    labels = [reader[0].targets.label_logprobs for reader in written]
    assert np.abs(labels[0] - labels[1]).max() > 1e-3, "they differ"


def test_minillm_says_once_which_rollouts_were_dropped(folder, caplog):
    real, scored, rollouts = (open_cache(folder / name) for name in ("real", "scored", "rollouts"))
    recipe = Recipe.of(0.5, 1.0, "minillm", None)

    def said(filters, dropped):
        rollouts.spec = rollouts.manifest.spec.model_copy(
            update={"generation": rollouts.manifest.spec.generation.model_copy(update=filters)}
        )
        stats = rollouts.manifest.stats.model_copy(update=dropped)
        rollouts.manifest = rollouts.manifest.model_copy(update={"stats": stats})
        caplog.clear()
        for _ in range(2):
            recipe.check([(real, 1.0)], [], [scored], [rollouts])
        return [record.message for record in caplog.records]

    nothing = dict.fromkeys(
        ("num_answers_short", "num_answers_repetitive", "num_answers_unfinished", "num_answers_duplicate"), 0
    )
    assert said({"min_tokens": 1}, nothing) == said({"min_tokens": 0}, nothing) == []
    (warning,) = said({"min_tokens": 1}, nothing | {"num_answers_short": 3})
    assert "sampled: 3 by --min-tokens 1." in warning, "an answer that ends at once has a target, its end"
    (warning,) = said(
        {"min_tokens": 5, "max_repetition": 0.5}, nothing | {"num_answers_short": 3, "num_answers_repetitive": 2}
    )
    assert "dropped after they were sampled: 3 by --min-tokens 5, 2 by --max-repetition 0.5." in warning
    (warning,) = said({"keep_unfinished": False}, nothing | {"num_answers_unfinished": 4, "num_answers_duplicate": 1})
    assert "4 by --no-keep-unfinished, 1 by --no-keep-duplicates of 3 answers a prompt." in warning


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--cache", "{}/answers", "--cache", "{}/real", "--mix", "teacher:1"], "gives no share to"),
        (["--cache", "{}/answers", "--mix", "teacher:1,real:1"], "no cache of that name or kind"),
        (["--cache", "{}/answers:0.5", "--cache", "{}/real:0.5", "--mix", "teacher:1,real:1"], "belongs to several teachers"),
        (["--cache", "{}/answers", "--cache", "{}/real"], "say how much of each, as --mix"),
        (["--cache", "{}/real", "--mix", "real"], "as teacher:0.7,real:0.3"),
        (["--cache", "{}/real", "--loss", "minillm"], "--student-cache STUDENT_TEXT"),
        (["--cache", "{}/real", "--loss", "minillm", "--student-cache", "{}/scored"], "--rollout-cache names"),
        (["--cache", "{}/real", "--loss", "minillm", "--student-cache", "{}/scored", "--rollout-cache", "{}/rollouts", "--loss-args", "clip=-1"],
         "clip is at least 0"),
        (["--cache", "{}/real", "--loss", "minillm", "--student-cache", "{}/scored", "--rollout-cache", "{}/rollouts", "--alpha", "0"],
         "for labels alone, --alpha 0 with another loss"),
        (["--cache", "{}/real", "--then", "output=there"], "output is not for a stage to choose"),
        (["--cache", "{}/real", "--then", "alhpa=0"], "did you mean 'alpha'"),
        (["--cache", "{}/real", "--then", "cache={}/no-such"], "stage 2: {}/no-such is not a kdcache cache"),
        (["--cache", "{}/real", "--then", "max_steps=1", "--then", "temperature=3"], "stage 3: temperature 3 is not declared"),
        (["--cache", "{}/real", "--then", "loss=jsd loss_args='{bta: 0.3}'"], "stage 2: loss jsd has no argument 'bta'"),
        (["--cache", "{}/real", "--then", "cache=[{}/real,{}/answers]"], "stage 2: {}/answers and {}/real hold different sequences"),
        (["--cache", "{}/real", "--then", "cache=[{}/real,{}/real]"], "train-student: cache: {}/real is named twice"),
        (["--cache", "{}/real", "--cache", "{}/real"], "train-student: cache: {}/real is named twice"),
        (["--cache", "{}/real", "--then", "cache=[{}/real,{}/answers] mix=real:1"], "stage 2: --mix gives no share to {}/answers"),
        (["--cache", "{}/real", "--then", "lr_scheduler_type=cosin"], "stage 2: training: "),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(folder, tiny_student, tmp_path, arguments, says):
    filled = [str(a).replace("{}", str(folder)) for a in arguments]
    output = train(folder, tiny_student, tmp_path / "s", *filled, code=1)
    assert says.replace("{}", str(folder)) in " ".join(output.split())
    assert "Traceback" not in output
    assert not (tmp_path / "s").exists(), "nothing was trained"


def test_two_stages_are_two_runs(folder, tiny_student, tmp_path):
    """One command line gives what two give: the second goes on with the student of the first."""
    both, first, second = (tmp_path / name for name in ("both", "first", "second"))
    train(folder, tiny_student, both, "--cache", folder / "real", "--max-steps", 3,
          "--then", f"cache={folder}/answers alpha=0 max_steps=2 learning_rate=1e-3")  # fmt: skip
    train(folder, tiny_student, first, "--cache", folder / "real", "--max-steps", 3)
    train(folder, first, second, "--cache", folder / "answers", "--alpha", 0, "--max-steps", 2, "--learning-rate", 1e-3)
    weights = "model.safetensors"
    assert (both / "stage-1" / weights).read_bytes() == (first / weights).read_bytes()
    assert (both / weights).read_bytes() == (second / weights).read_bytes()
    assert "all done" in train(folder, tiny_student, both, "--cache", folder / "real", "--max-steps", 3,
          "--then", f"cache={folder}/answers alpha=0 max_steps=2 learning_rate=1e-3")  # fmt: skip
    said = yaml.safe_load((both / "train-student.yaml").read_text())["train-student"]
    assert said["student"] == str(both / "stage-1")
    recorded = [json.loads((where / "train_results.json").read_text()) for where in (both / "stage-1", both)]
    stages = recorded[1]["stages"]
    assert [stage["objective"]["alpha"] for stage in stages] == [0.7, 0]
    assert [stage["cache"]["path"] for stage in stages] == [str(folder / "real"), str(folder / "answers")]
    for name in ("train_tokens", "train_seconds", "steps"):
        assert [stage[name] for stage in stages] == [one[name] for one in recorded]
    card = (both / "README.md").read_text()
    assert "| loss, stage 1 | (1 - alpha) CE + alpha T² forward_kl, alpha = 0.7, T = 1.0 |" in card
    assert "| loss, stage 2 | (1 - alpha) CE + alpha T² forward_kl, alpha = 0.0, T = 1.0 |" in card


def test_a_finished_run_says_which_held_out_text_its_results_are_of(folder, tiny_student, tmp_path):
    asked = ["--cache", folder / "real", "--max-steps", 1]
    train(folder, tiny_student, tmp_path / "s", *asked, "--eval-cache", folder / "real")
    again = train(folder, tiny_student, tmp_path / "s", *asked, "--eval-cache", folder / "real")
    assert again.strip().endswith("was trained with these very options")
    other = train(folder, tiny_student, tmp_path / "s", *asked, "--eval-cache", folder / "answers")
    says = f"results are of other held-out text: --eval-cache: was {folder}/real:1, this asks for {folder}/answers:1"
    assert says in " ".join(other.split())


def test_what_belonged_to_the_loss_and_the_caches_of_a_stage_ends_with_it(folder, tiny_student, tmp_path):
    """Arguments, shares and the student's text; unless the next stage names them itself."""
    first = {
        "cache": ["real"], "student_cache": ["scored"], "rollout_cache": ["rollouts"], "mix": "student:1,real:1",
        "loss": "minillm", "loss_args": {"clip": 0.3}, "student": "s", "output": "o",
    }  # fmt: skip

    def second(**changed):
        stage = stages_of(check_options(TrainOptions, "train-student", first | {"then": [changed]}))[1]
        names = ("loss_args", "mix", "student_cache", "rollout_cache")
        return {name for name in names if getattr(stage, name)}

    assert (
        second(max_steps=1)
        == second(cache="real", loss="minillm")
        == {"loss_args", "mix", "student_cache", "rollout_cache"}
    )
    assert second(cache="task") == {"loss_args", "student_cache", "rollout_cache"}
    assert second(cache="task", mix="real:1,student:2") == {"loss_args", "mix", "student_cache", "rollout_cache"}
    assert second(loss="contrastive") == {"mix", "student_cache", "rollout_cache"}
    assert second(loss="forward_kl") == set()
    assert second(loss="jsd", loss_args={"beta": 0.3}, rollout_cache="rollouts") == {"loss_args", "rollout_cache"}
    out = tmp_path / "out"
    train(folder, tiny_student, out, "--cache", folder / "answers", "--cache", folder / "real", "--mix", "teacher:0.7,real:0.3", "--loss", "jsd",
          "--loss-args", "beta=0.5", "--max-steps", 1, "--then", f"cache={folder}/real loss=forward_kl")  # fmt: skip
    results = json.loads((out / "train_results.json").read_text())
    assert "mix" not in results and results["objective"]["loss_args"] == {}


def test_a_stage_that_counts_epochs_does_not_stop_at_the_steps_of_the_one_before():
    first = {"cache": ["real"], "student": "s", "output": "o", "max_steps": 1000}

    def steps(**changed):
        return [one.max_steps for one in stages_of(check_options(TrainOptions, "train-student", first | changed))]

    assert steps(then=[{"num_train_epochs": 3}, {"alpha": 0}]) == [1000, -1, -1]
    assert steps(then=[{"num_train_epochs": 3, "max_steps": 5}, {"alpha": 0}]) == [1000, 5, 5]
    assert steps(then=[{"alpha": 0}], num_train_epochs=3) == [1000, 1000], "neither is the next stage's own"


def test_a_folder_with_another_run_is_refused_before_the_first_stage(folder, tiny_student, tmp_path):
    train(folder, tiny_student, tmp_path / "s", "--cache", folder / "real", "--max-steps", 1)
    asked = ["--cache", folder / "real", "--max-steps", 1, "--then", "alpha=0"]
    output = train(folder, tiny_student, tmp_path / "s", *asked, code=1)
    assert "holds a run with other settings" in output
    assert not (tmp_path / "s" / "stage-1").exists()


def test_the_config_file_holds_stages(folder, tiny_student, tmp_path):
    config = {
        "train-student": {"cache": str(folder / "real"), "max_steps": 2, "then": [{"alpha": 0.0, "max_steps": 1}]}
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    train(folder, tiny_student, tmp_path / "s", "--config", tmp_path / "run.yaml")
    assert json.loads((tmp_path / "s" / "train_results.json").read_text())["steps"] == 1
    assert json.loads((tmp_path / "s" / "stage-1" / "train_results.json").read_text())["steps"] == 2


def test_another_vocabulary_cannot_read_a_cache(folder, tmp_path, smollm2):
    output = kdcache(
        "dump-teacher", "--teacher", smollm2, "--dataset", folder / "real", "--output", tmp_path / "c", code=1
    )
    assert "another vocabulary" in output
    output = kdcache(
        "dump-teacher",
        "--teacher",
        smollm2,
        "--dataset",
        folder / "real",
        "--split",
        "test",
        "--output",
        tmp_path / "c",
        code=1,
    )
    assert "has no splits" in " ".join(output.split())
    assert np.all([not (tmp_path / "c" / "plan.json").exists()])
