"""Phase 2 as a whole: offline equals online (P2), controls (P3), resume, normalisation over ranks and accumulation."""

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdcache.cache.commit import publish_plan, seal
from kdcache.cache.reader import open_cache
from kdcache.cache.store import LocalStore
from kdcache.dump.launch import dump
from kdcache.dump.options import DumpOptions
from kdcache.errors import CacheIncompleteError, CacheMismatchError, ConfigError, ModelError
from kdcache.model_files import find_model
from kdcache.models import load_model
from kdcache.train.forward import extend_forward, run_objective
from kdcache.train.objective import Objective
from kdcache.train.options import TrainOptions
from kdcache.train.resume import last_checkpoint
from kdcache.train.run import train, training_arguments
from kdcache.train.stream import CacheDataset, TargetDecoder, collate
from kdcache.train.trainer import KDTrainer
from tests.conftest import VOCAB_SIZE, make_llama, texts
from tests.online import live_distillation

# transformers 4 rounds the losses it logs to four decimals.
LOG_ROUNDING = 5e-5 if transformers.__version__.startswith("4.") else 0.0


def make_cache(folder, teacher, corpus, **options):
    given = {"seq_len": 64, "threads": 1, "batch_tokens": 512, "codec": "exact", "temperatures": (1.0, 2.0)}
    dump(DumpOptions(teacher=teacher, dataset=corpus, output=str(folder), **(given | options)))
    return str(folder)


@pytest.fixture(scope="module")
def full_cache(tmp_path_factory, tiny_teacher, corpus_file):
    """Every token of the vocabulary kept: k = V."""
    return make_cache(tmp_path_factory.mktemp("caches") / "full", tiny_teacher, corpus_file, top_k=VOCAB_SIZE)


@pytest.fixture(scope="module")
def hidden_cache(tmp_path_factory, tiny_teacher, corpus_file):
    return make_cache(tmp_path_factory.mktemp("caches") / "hidden", tiny_teacher, corpus_file, targets="hidden")


@pytest.fixture(scope="module")
def top_cache(tmp_path_factory, tiny_teacher, corpus_file):
    return make_cache(tmp_path_factory.mktemp("caches") / "top", tiny_teacher, corpus_file, top_k=16, codec="packed")


def run(cache, student, output, **options):
    given = {
        "learning_rate": 3e-3, "lr_scheduler_type": "constant", "per_device_train_batch_size": 4, "max_steps": 6,
        "logging_steps": 1, "training": {"optim": "adamw_torch", "dataloader_pin_memory": False},
    }  # fmt: skip
    merged = given | options
    return train(TrainOptions(cache=cache, student=student, output=str(output), **merged))


def losses(output):
    return [
        r["loss"] for r in map(json.loads, (Path(output) / "metrics.jsonl").read_text().splitlines()) if "loss" in r
    ]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("which", ["hidden_cache", "full_cache"])
@pytest.mark.parametrize(("alpha", "temperature"), [(0.7, 1.0), (1.0, 2.0)])
def test_offline_equals_online(request, tmp_path, tiny_teacher, tiny_student, which, alpha, temperature):
    """P2: 50 steps from the cache follow 50 steps beside the live teacher."""
    cache = request.getfixturevalue(which)
    live, student = live_distillation(
        tiny_teacher, tiny_student, open_cache(cache),
        steps=50, alpha=alpha, temperature=temperature, batch_size=4, learning_rate=3e-3,
    )  # fmt: skip
    run(cache, tiny_student, tmp_path / "out", max_steps=50, alpha=alpha, temperature=temperature)
    np.testing.assert_allclose(losses(tmp_path / "out"), live, rtol=0, atol=1e-5 + LOG_ROUNDING)
    assert live[-1] < 0.9 * live[0], "it learned"
    trained = weights(tmp_path / "out")
    for name, value in student.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-4)


def test_targets_rolled_by_one_are_refused(tmp_path, full_cache, tiny_student):
    """P3: the label's logprob is the witness, before a single step is trained."""
    broken = rewrite(full_cache, tmp_path / "rolled", lambda sequence, targets: (sequence, roll(targets)))
    with pytest.raises(CacheMismatchError, match="not aligned"):
        run(broken, tiny_student, tmp_path / "out")


def test_targets_of_another_sequence_are_refused(tmp_path, full_cache, tiny_student):
    """P3: sequences shuffled against their targets."""
    reader = open_cache(full_cache)
    sizes = [len(reader[i].targets) for i in range(len(reader))]
    same = next(n for n in sizes if sizes.count(n) > 1)
    a, b = [i for i, n in enumerate(sizes) if n == same][:2]
    swapped = {a: b, b: a}
    rows = iter(range(len(reader)))

    def other(sequence, targets):
        i = next(rows)
        return sequence, reader[swapped.get(i, i)].targets

    broken = rewrite(full_cache, tmp_path / "shuffled", other)
    with pytest.raises(CacheMismatchError, match="not aligned"):
        run(broken, tiny_student, tmp_path / "out")


def rewrite(cache, folder, change):
    """The cache again, committed like any other, with its rows changed."""
    from kdcache.cache.commit import commit_shard, read_commits, read_plan
    from kdcache.cache.shard import ShardBuilder

    reader, store = open_cache(cache), LocalStore(folder)
    plan = read_plan(reader.store)
    publish_plan(store, plan)
    for position, commit in enumerate(read_commits(reader.store)):
        shard, builder = reader.open_shard(position), ShardBuilder(reader.codec, plan.fingerprint, commit.shard)
        for row in range(len(shard)):
            sequence = shard.sequence(row)
            targets = shard.targets(row, sequence).expand(reader.temperatures)
            builder.add(*change(sequence, targets))
        commit_shard(store, plan, commit.shard, memoryview(builder.finish()), commit.stats, worker="t", seconds=0.0)
    seal(store)
    return str(folder)


def roll(targets):
    """Everything the teacher said, one position late."""
    import dataclasses

    k = int(targets.num_entries[0])
    moved = {
        name: np.roll(getattr(targets, name), 1, axis=0)
        for name in ("tail_logprobs", "logz", "label_logprobs", "entropy")
    }
    entries = {n: np.roll(getattr(targets, n).reshape(-1, k), 1, axis=0).ravel() for n in ("token_ids", "logprobs")}
    return dataclasses.replace(targets, **moved, **entries)


def test_another_tokenizer_is_refused(tmp_path, top_cache, tiny_student):
    other = tmp_path / "other"
    shutil.copytree(tiny_student, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(CacheMismatchError, match=r"different tokenizers.*1 token more") as caught:
        run(top_cache, str(other), tmp_path / "out")
    assert "init-student" in caught.value.hint


def test_swapped_tokens_are_same_size_different_map(tmp_path, top_cache, tiny_student):
    other = tmp_path / "other"
    shutil.copytree(tiny_student, other)
    raw = json.loads((other / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    a, b = "the", "cat"
    a, b = (a, b) if a in vocab and b in vocab else list(vocab)[300:302]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (other / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(CacheMismatchError, match="same size, different map"):
        run(top_cache, str(other), tmp_path / "out")


def test_padded_vocabulary_rows(tmp_path, top_cache):
    """A student with more embedding rows than tokens trains; its padded rows are masked and keep their values."""
    padded = make_llama(tmp_path / "padded", vocab_size=VOCAB_SIZE + 64, seed=3, hidden_size=16, num_hidden_layers=1)
    before = weights(padded)["lm_head.weight"][VOCAB_SIZE:]
    run(top_cache, padded, tmp_path / "out")
    after = weights(tmp_path / "out")["lm_head.weight"]
    torch.testing.assert_close(after[VOCAB_SIZE:], before, rtol=0, atol=0)
    assert not torch.equal(after[:VOCAB_SIZE], weights(padded)["lm_head.weight"][:VOCAB_SIZE])


def test_too_few_embedding_rows_are_refused(tmp_path, top_cache):
    small = make_llama(tmp_path / "small", vocab_size=VOCAB_SIZE - 10, seed=3, hidden_size=16, num_hidden_layers=1)
    with pytest.raises(CacheMismatchError, match=f"{VOCAB_SIZE} tokens"):
        run(top_cache, small, tmp_path / "out")


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, tiny_teacher, corpus_file):
    """Caches that ask other things of a student: packed or not, of sequences up to 64 or 200 tokens, of a token more."""
    folder = tmp_path_factory.mktemp("uneven")
    other = make_llama(folder / "teacher", vocab_size=VOCAB_SIZE + 1)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(other)
    asked = {
        "plain": {"packing": False},
        "packed": {"packing": True},
        "long": {"packing": False, "seq_len": 200},
        "other": {"packing": False, "teacher": other},
    }
    given = {"teacher": tiny_teacher, "corpus": corpus_file, "top_k": 16}
    return {name: make_cache(folder / name, **(given | one)) for name, one in asked.items()}


@pytest.mark.parametrize(
    "where",
    [
        lambda one, other: {"cache": [one, other], "mix": f"{one}:1,{other}:1"},
        lambda one, other: {"cache": one, "student_cache": other, "loss": "contrastive"},
        lambda one, other: {"cache": one, "eval_cache": other},
        lambda one, other: {"cache": one, "then": [{"alpha": 0.0}, {"cache": other}]},
    ],
    ids=["cache", "student_cache", "eval_cache", "third stage"],
)
def test_every_cache_is_held_against_the_student(tmp_path, uneven, tiny_student, monkeypatch, where):
    """A later one that is longer than its context, or packed where the first is not, is refused before anything is trained."""
    short = make_llama(tmp_path / "short", seed=3, hidden_size=16, num_hidden_layers=1, max_position_embeddings=64)

    def leaks(model):
        raise ModelError("it lets packed documents see each other")

    monkeypatch.setattr("kdcache.train.run.check_packing", leaks)
    for student, other, error, says in (
        (short, "long", CacheMismatchError, f"{uneven['long']}: .* up to 200 tokens, the student's context is 64"),
        (tiny_student, "packed", ModelError, "lets packed documents see each other"),
    ):
        options = where(uneven["plain"], uneven[other])
        with pytest.raises(error, match=says):
            run(options.pop("cache"), student, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_caches_of_all_stages_have_the_students_tokens(tmp_path, uneven, tiny_student):
    with pytest.raises(CacheMismatchError, match=rf"{uneven['other']}: .*different tokenizers.*1 token more"):
        run(uneven["plain"], tiny_student, tmp_path / "out", then=[{"cache": uneven["other"]}])
    assert not (tmp_path / "out").exists()


def test_undeclared_temperature_is_refused_with_the_list(tmp_path, top_cache, tiny_student):
    with pytest.raises(ConfigError, match=r"temperature 3 is not declared.*1, 2"):
        run(top_cache, tiny_student, tmp_path / "out", temperature=3.0)


def test_an_unfinished_cache_is_refused(tmp_path, top_cache, tiny_student):
    part = tmp_path / "part"
    shutil.copytree(top_cache, part)
    (part / "manifest.json").unlink()
    sorted((part / "commits").iterdir())[-1].unlink()
    with pytest.raises(CacheIncompleteError, match="shards are committed"):
        run(str(part), tiny_student, tmp_path / "out")
    run(str(part), tiny_student, tmp_path / "out", allow_incomplete=True, max_steps=1)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 8), (2, 4), (4, 2)])
def test_normalisation_under_accumulation(
    tmp_path_factory, tmp_path, top_cache, tiny_student, batch_size, accumulation
):
    """1 x 8 = 2 x 4 = 4 x 2 = 8 x 1, though micro-batches hold different numbers of targets."""
    run(top_cache, tiny_student, tmp_path / "whole", per_device_train_batch_size=8)
    run(
        top_cache, tiny_student, tmp_path / "cut",
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    np.testing.assert_allclose(losses(tmp_path / "cut"), losses(tmp_path / "whole"), rtol=0, atol=2e-5)


def test_normalisation_over_ranks(tmp_path, top_cache, tiny_student):
    """Two ranks under torchrun follow one process with the same global batch."""
    settings = {"per_device_train_batch_size": 8, "save_steps": 3}
    one = run(top_cache, tiny_student, tmp_path / "one", **settings)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"train-student: {{cache: {top_cache}, student: {tiny_student}, output: {tmp_path / 'two'}, learning_rate: 0.003, "
        "lr_scheduler_type: constant, per_device_train_batch_size: 4, max_steps: 6, logging_steps: 1, save_steps: 3, "
        "training: {optim: adamw_torch, dataloader_pin_memory: false}}"
    )
    done = on_two_ranks("-m", "kdcache", "train-student", "--config", str(config))
    assert done.stdout.count("6 steps") == 1, "the first rank speaks for all"
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=2e-5)
    two = json.loads((tmp_path / "two" / "train_results.json").read_text())
    assert two["train_tokens"] == one.results["train_tokens"]
    # Cut off after three steps, and taken up by one process.
    (tmp_path / "two" / "train_results.json").unlink()
    shutil.rmtree(tmp_path / "two" / "checkpoint-6")
    with pytest.raises(
        CacheMismatchError, match=r"of a step: begun with 8 \(on 2 ranks\), this run asks for 4 \(on 1\)"
    ):
        run(top_cache, tiny_student, tmp_path / "two", **settings | {"per_device_train_batch_size": 4})
    dealt = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    again = run(top_cache, tiny_student, tmp_path / "two", **settings | dealt)
    assert again.results["resumed"] and again.results["train_tokens"] == one.results["train_tokens"]
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=2e-5)


def test_ranks_wait_for_the_student_of_the_stage_before(tmp_path, top_cache, tiny_student):
    """The first rank writes slowly; the other finds a whole student all the same."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import time\nfrom kdcache.train import trainer\nfrom kdcache.train.options import TrainOptions\nfrom kdcache.train.run import train\n"
        "save = trainer.KDTrainer.save_model\n"
        "def slowly(self, *args, **kwargs):\n    time.sleep(3 * self.is_world_process_zero())\n    save(self, *args, **kwargs)\n"
        "trainer.KDTrainer.save_model = slowly\n"
        f"train(TrainOptions(cache={top_cache!r}, student={tiny_student!r}, output={str(tmp_path / 'out')!r}, max_steps=1, "
        "then=[{'alpha': 0.0}], training={'dataloader_pin_memory': False}))\n"
    )
    on_two_ranks(str(script))
    assert (tmp_path / "out" / "train_results.json").is_file()


def on_two_ranks(*command):
    """Run it under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
        "--master_port", str(port),
    ]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *command], capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_packed_loss_equals_the_sum_of_unpacked_losses(tmp_path, tiny_teacher, tiny_student, corpus_file):
    """Every part of the loss, over a cache of packed sequences and over one of a document a sequence."""
    found = []
    for packing in (True, False):
        options = {"packing": packing, "seq_len": 256, "top_k": 16}
        reader = open_cache(make_cache(tmp_path / str(packing), tiny_teacher, corpus_file, **options))
        student, data = load_model(find_model(tiny_student), dtype=torch.float32), CacheDataset(reader)
        extend_forward(student, reader.vocab_size)
        decoder = TargetDecoder.for_cache(reader, 2.0, torch.device("cpu"))
        batch = collate([data[i] for i in range(len(reader))])
        sums = run_objective(student, batch, Objective(0.7, 2.0), [(1.0, decoder)])
        sums.loss.backward()
        found.append((len(reader), int(batch["target_mask"].sum()), sums.flat(), student.lm_head.weight.grad))
    (packed, first_count, *first), (alone, second_count, *second) = found
    assert packed < alone
    assert first_count == second_count
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-4)


def test_resume_is_exact(tmp_path, top_cache, tiny_student):
    """Stopped after 5 of 9 steps and taken up again: the same losses, the same weights, bit for bit."""
    settings = {
        "max_steps": 9,
        "save_steps": 3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "training": {"optim": "adamw_torch", "dataloader_pin_memory": False, "save_total_limit": 3},
    }
    whole = run(top_cache, tiny_student, tmp_path / "whole", **settings)
    run(top_cache, tiny_student, tmp_path / "cut", **settings)
    cut = tmp_path / "cut"
    for name in ("train_results.json", "model.safetensors"):
        (cut / name).unlink()
    shutil.rmtree(cut / "checkpoint-9")
    (cut / "checkpoint-6" / "trainer_state.json").write_text("{half a fi")  # killed while writing it
    assert last_checkpoint(cut) == str(cut / "checkpoint-3")
    again = run(top_cache, tiny_student, cut, **settings)
    assert again.results["resumed"]
    assert again.results["train_tokens"] == whole.results["train_tokens"], "those before the resume too"
    assert losses(cut) == losses(tmp_path / "whole")
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(cut)[name], value), name


def test_checkpoints_unless_told_otherwise(tmp_path, top_cache, tiny_student):
    asked = {"cache": str(top_cache), "student": str(tiny_student), "output": str(tmp_path)}
    arguments = training_arguments(TrainOptions.model_validate(asked))
    assert (arguments.save_strategy, arguments.save_steps, arguments.save_total_limit) == ("steps", 500, 2)
    assert training_arguments(TrainOptions.model_validate(asked | {"save_steps": 0})).save_strategy == "no"


class KilledError(Exception):
    """As if the process had ended here."""


def kill(*args, **kwargs):
    raise KilledError


def killed_at(step, monkeypatch):
    """Training ends with an error before that step."""
    training_step = KDTrainer.training_step

    def step_or_end(self, *args, **kwargs):
        return kill() if self.state.global_step == step else training_step(self, *args, **kwargs)

    monkeypatch.setattr(KDTrainer, "training_step", step_or_end)


def test_a_cache_that_has_grown_since_is_not_gone_on_with(tmp_path, top_cache, tiny_student, monkeypatch):
    """More sequences have another order: those that were seen would not be those that are passed over."""
    cache = str(shutil.copytree(top_cache, tmp_path / "cache"))
    whole = Path(cache)
    hidden = {path: path.read_bytes() for path in (whole / "manifest.json", max((whole / "commits").iterdir()))}
    for path in hidden:
        path.unlink()
    settings = {"max_steps": 6, "save_steps": 2, "allow_incomplete": True}
    for name, step in (("early", 1), ("out", 3)):
        with monkeypatch.context() as killed:
            killed_at(step, killed)
            with pytest.raises(KilledError):
                run(cache, tiny_student, tmp_path / name, **settings)
    before = len(open_cache(cache, allow_incomplete=True))
    for path, data in hidden.items():
        path.write_bytes(data)
    says = rf"--cache {cache}: num_sequences was {before}, is {len(open_cache(cache))}"
    with pytest.raises(CacheMismatchError, match=says) as error:
        run(cache, tiny_student, tmp_path / "out", **settings)
    assert "--no-resume" in error.value.hint
    assert not run(cache, tiny_student, tmp_path / "out", **settings, resume=False).results["resumed"]
    assert run(cache, tiny_student, tmp_path / "early", **settings).results["steps"] == 6, "no checkpoint to go on from"


def test_a_cache_made_anew_in_its_place_is_another_run(tmp_path, top_cache, tiny_student, tiny_teacher, corpus_file):
    cache, out = tmp_path / "cache", tmp_path / "out"
    shutil.copytree(top_cache, cache)
    run(str(cache), tiny_student, out, max_steps=2)
    assert run(str(cache), tiny_student, out, max_steps=2).already_done
    shutil.rmtree(cache)
    assert run(str(cache), tiny_student, out, max_steps=2).already_done, "a trained student needs no cache"
    make_cache(cache, tiny_teacher, corpus_file, top_k=8)
    with pytest.raises(CacheMismatchError, match=rf"--cache {cache}: fingerprint was \w+, is"):
        run(str(cache), tiny_student, out, max_steps=2)
    shutil.rmtree(cache)
    rewrite(top_cache, cache, lambda sequence, targets: (sequence, roll(targets)))
    with pytest.raises(
        CacheMismatchError, match=rf"held something else:\n  --cache {cache}: content_digest was \w+, is"
    ):
        run(str(cache), tiny_student, out, max_steps=2)
    told = json.loads((out / "train-student.provenance.json").read_text())
    del told["contents"]
    (out / "train-student.provenance.json").write_text(json.dumps(told))
    assert run(str(cache), tiny_student, out, max_steps=2).already_done, "of an earlier kdcache"


def test_what_was_done_before_a_run_began_anew_is_not_taken_up(tmp_path, top_cache, tiny_student, monkeypatch):
    """Two stages are done; --no-resume is killed in the first, and told to resume: neither results nor checkpoints are the old ones."""
    settings = {"max_steps": 3, "save_steps": 1, "then": [{"alpha": 0.0}]}
    run(top_cache, tiny_student, tmp_path / "out", **settings)
    before = weights(tmp_path / "out")
    with monkeypatch.context() as killed:
        killed.setattr(KDTrainer, "training_step", kill)
        with pytest.raises(KilledError):
            run(top_cache, tiny_student, tmp_path / "out", seed=7, resume=False, **settings)
    assert last_checkpoint(tmp_path / "out") is last_checkpoint(tmp_path / "out" / "stage-1") is None
    again = run(top_cache, tiny_student, tmp_path / "out", seed=7, **settings)
    assert not again.already_done and not again.results["resumed"]
    assert any(not torch.equal(value, before[name]) for name, value in weights(tmp_path / "out").items())


def test_a_student_that_beginning_anew_would_remove_is_refused(tmp_path, top_cache, tiny_student):
    """A checkpoint of the output, or of any stage's."""
    settings = {"max_steps": 2, "save_steps": 1, "then": [{"alpha": 0.0}]}
    out = tmp_path / "out"
    run(top_cache, tiny_student, out, **settings)
    for then, folder in ((settings["then"], out), (settings["then"], out / "stage-1"), ([], out)):
        student = str(folder / "checkpoint-1")
        with pytest.raises(ConfigError, match=f"{student} is a checkpoint in {folder}, which --no-resume removes"):
            run(top_cache, student, out, **settings | {"then": then}, resume=False)
        assert (folder / "checkpoint-1" / "model.safetensors").is_file() and (out / "train_results.json").is_file()
    run(top_cache, str(out / "checkpoint-1"), tmp_path / "next", **settings, resume=False)


@pytest.mark.parametrize("killed_in_it", [False, True], ids=["done", "has checkpoints"])
def test_a_stage_is_not_gone_on_with_when_its_student_is_trained_again(
    tmp_path, top_cache, full_cache, tiny_student, monkeypatch, killed_in_it
):
    """The first stage was removed, and its cache is another; the second is done with the old one's student, or on its way."""
    settings = {"max_steps": 3, "save_steps": 1, "then": [{"alpha": 0.0, "cache": top_cache}]}
    out = tmp_path / "out"
    run(top_cache, tiny_student, out, **settings)
    if killed_in_it:
        (out / "train_results.json").unlink()
        assert run(top_cache, tiny_student, out, **settings).results["resumed"], "the first is done: as ever"
        (out / "train_results.json").unlink()
    shutil.rmtree(out / "stage-1")
    with pytest.raises(CacheMismatchError, match=rf"{out / 'stage-1'} holds no results.*, and {out} holds") as error:
        run(full_cache, tiny_student, out, **settings)
    assert "--no-resume" in error.value.hint and not (out / "stage-1").exists()
    run(full_cache, tiny_student, out, **settings, resume=False)
    with monkeypatch.context() as killed:
        killed_at(2, killed)
        with pytest.raises(KilledError):
            run(full_cache, tiny_student, out, **settings, resume=False)
    run(full_cache, tiny_student, out, **settings)
    first, second = (json.loads((one / "train_results.json").read_text()) for one in (out / "stage-1", out))
    assert first["resumed"] and not second["resumed"], "killed in the first, there is nothing later"


def test_checkpoints_that_nobody_asked_for_go_when_there_is_no_more_to_do(
    tmp_path, top_cache, tiny_student, monkeypatch
):
    """And no run makes one at its last step, beside the student itself."""
    seen = []
    save = KDTrainer._save_checkpoint
    monkeypatch.setattr(
        KDTrainer, "_save_checkpoint", lambda self, *a, **k: seen.append(self.state.global_step) or save(self, *a, **k)
    )
    run(top_cache, tiny_student, tmp_path / "asked", max_steps=5, save_steps=2)
    assert seen == [2, 4] and last_checkpoint(tmp_path / "asked") == str(tmp_path / "asked" / "checkpoint-4")
    monkeypatch.setattr("kdcache.train.run.training_arguments", every_second)
    run(top_cache, tiny_student, tmp_path / "own", max_steps=5)
    assert seen == [2, 4, 2, 4] and not list((tmp_path / "own").glob("checkpoint-*"))
    by_epoch = {"optim": "adamw_torch", "dataloader_pin_memory": False, "save_strategy": "epoch"}
    monkeypatch.undo()
    run(top_cache, tiny_student, tmp_path / "epoch", max_steps=-1, num_train_epochs=1, training=by_epoch)
    assert last_checkpoint(tmp_path / "epoch") is not None


def test_ranks_that_found_a_growing_cache_at_different_times(tmp_path, top_cache, tiny_student, monkeypatch):
    def gather_object(mine):
        (contents,) = mine
        later = copy.deepcopy(contents)
        later["cache"][str(top_cache)] |= {"num_sequences": 1_000, "content_digest": "another"}
        return [contents, contents, later]

    monkeypatch.setattr("accelerate.utils.gather_object", gather_object)
    with pytest.raises(
        CacheMismatchError, match=r"rank 0 found \d+ sequences, rank 2 1000: the cache is being written"
    ):
        run(top_cache, tiny_student, tmp_path / "out", max_steps=2)


def test_a_folder_that_looks_like_a_checkpoint_is_not_put_at_risk(tmp_path, top_cache, tiny_student):
    best = tmp_path / "out" / "checkpoint-best"
    best.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"checkpoint-best is no checkpoint of a run .*would remove it") as error:
        run(top_cache, tiny_student, tmp_path / "out", max_steps=2)
    assert "another --output" in error.value.hint and list((tmp_path / "out").iterdir()) == [best]
    best.rename(tmp_path / "out" / "best")
    (tmp_path / "stages" / "checkpoint-best").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"stage 2: .*checkpoint-best is no checkpoint of a run"):
        run(top_cache, tiny_student, tmp_path / "stages", max_steps=2, then=[{"alpha": 0.0}])
    assert not (tmp_path / "stages" / "stage-1").exists()
    run(top_cache, tiny_student, tmp_path / "out", max_steps=2)
    assert (tmp_path / "out" / "best").is_dir()


@pytest.mark.parametrize(
    "settings",
    [{"save_steps": 0}, {"save_steps": 1, "training": {"dataloader_pin_memory": False, "save_total_limit": None}}],
    ids=["none are made", "all are kept"],
)
def test_it_is_no_hindrance_where_nothing_is_removed(tmp_path, top_cache, tiny_student, settings):
    best = tmp_path / "checkpoint-best"
    best.mkdir()
    run(top_cache, tiny_student, tmp_path, max_steps=4, **settings)
    run(top_cache, tiny_student, tmp_path, max_steps=4, then=[{"alpha": 0.0}], resume=False, **settings)
    assert best.is_dir()


def every_second(options):
    """As the default would be, had it been 2."""
    arguments = training_arguments(options)
    arguments.save_steps = 2
    return arguments


def test_a_finished_run_with_steps_of_another_size_is_another_run(tmp_path, top_cache, tiny_student):
    run(top_cache, tiny_student, tmp_path / "out", max_steps=2, per_device_train_batch_size=4)
    dealt = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert run(top_cache, tiny_student, tmp_path / "out", max_steps=2, **dealt).already_done
    with pytest.raises(CacheMismatchError, match="per_device_train_batch_size: begun with 4, this run asks for 8"):
        run(top_cache, tiny_student, tmp_path / "out", max_steps=2, per_device_train_batch_size=8)
    (tmp_path / "out" / "train-student.provenance.json").unlink()
    with pytest.raises(CacheMismatchError, match="gradient_accumulation_steps: begun with 1, this run asks for 2"):
        run(top_cache, tiny_student, tmp_path / "out", max_steps=2, **dealt)


def test_tokens_are_those_of_the_sequences(tmp_path, tiny_teacher, tiny_student, corpus_file):
    """Two epochs of sequences of uneven lengths: neither padding nor what fills up the last step counts."""
    cache = make_cache(tmp_path / "cache", tiny_teacher, corpus_file, packing=False, seq_len=200, top_k=16)
    reader = open_cache(cache)
    assert len(reader) % 8, "the last step is filled up"
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": -1,
        "num_train_epochs": 2,
    }
    results = run(cache, tiny_student, tmp_path / "out", **settings).results
    assert results["train_tokens"] == 2 * reader.manifest.stats.num_positions
    told = results["train_tokens"] / results["train_seconds"]
    assert results["tokens_per_second"] == pytest.approx(told, rel=0.02)


def test_a_second_run_says_done_and_other_settings_are_refused(tmp_path, top_cache, tiny_student):
    run(top_cache, tiny_student, tmp_path / "out", max_steps=2)
    assert run(top_cache, tiny_student, tmp_path / "out", max_steps=2).already_done
    with pytest.raises(CacheMismatchError, match=r"alpha: begun with 0.7, this run asks for 0.2"):
        run(top_cache, tiny_student, tmp_path / "out", max_steps=2, alpha=0.2)


def test_many_runs_from_one_cache(tmp_path, top_cache, tiny_student):
    """Another T, alpha or seed starts from the same cache; each is another student."""
    first = run(top_cache, tiny_student, tmp_path / "a", max_steps=3)
    for name, change in {"t": {"temperature": 2.0}, "alpha": {"alpha": 0.1}, "seed": {"seed": 5}}.items():
        other = run(top_cache, tiny_student, tmp_path / name, max_steps=3, **change)
        assert other.results["train_loss"] != first.results["train_loss"]
        assert other.results["cache"]["fingerprint"] == first.results["cache"]["fingerprint"]


def test_what_a_student_folder_holds(tmp_path, top_cache, hidden_cache, tiny_student):
    """It loads like any model, carries a card and its records; loggers and held-out evaluation work."""
    out = tmp_path / "out"
    result = run(
        top_cache, tiny_student, out, eval_cache=hidden_cache, eval_steps=3, report_to="tensorboard",
        gradient_checkpointing=True, bf16=True, training={"dataloader_pin_memory": False, "max_grad_norm": 0.5},
    )  # fmt: skip
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == VOCAB_SIZE
    assert AutoTokenizer.from_pretrained(out).decode([65])
    card = (out / "README.md").read_text()
    assert result.results["cache"]["fingerprint"] in card
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    trained = next(r for r in records if "loss" in r)
    assert {"cross_entropy", "forward_kl", "top1_agreement", "grad_norm"} <= trained.keys()
    evaluated = [r for r in records if "eval_loss" in r]
    assert len(evaluated) >= 2
    assert evaluated[-1]["eval_forward_kl"] < evaluated[0]["eval_forward_kl"]
    assert list(out.rglob("events.out.tfevents*"))
    assert (out / "train-student.yaml").is_file()
    assert (out / "train-student.provenance.json").is_file()


def test_unknown_training_argument_is_named(tmp_path, top_cache, tiny_student):
    with pytest.raises(ConfigError, match="learning_rat"):
        run(top_cache, tiny_student, tmp_path / "out", training={"learning_rat": 1})


def test_remove_unused_columns(tmp_path, top_cache, tiny_student):
    """The Trainer's habit of dropping columns that forward does not name cannot drop the targets."""
    result = run(top_cache, tiny_student, tmp_path / "out", max_steps=1, training={"remove_unused_columns": True})
    assert "forward_kl" in json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert result.results["steps"] == 1


def test_labels_only_needs_no_targets(tmp_path, top_cache, tiny_student):
    run(top_cache, tiny_student, tmp_path / "out", alpha=0.0, max_steps=2)
    assert "forward_kl" not in (tmp_path / "out" / "metrics.jsonl").read_text()


def test_rows_that_count_are_not_trained_on_labels_for_want_of_targets(top_cache, tiny_student):
    """Only a micro-batch that fills up the last step of an epoch may be without."""
    reader = open_cache(top_cache)
    data, student = CacheDataset(reader, with_targets=False), load_model(find_model(tiny_student), dtype=torch.float32)
    extend_forward(student, reader.vocab_size)
    decoders = [(1.0, TargetDecoder.for_cache(reader, 1.0, torch.device("cpu")))]
    assert run_objective(student, collate([data[-1], data[-2]]), Objective(0.7), decoders).loss == 0
    with pytest.raises(ConfigError, match=r"alpha 0.7 needs targets"):
        run_objective(student, collate([data[0], data[-2]]), Objective(0.7), decoders)


def test_texts_fixture_has_uneven_lengths():
    assert len({len(text) for text in texts()}) > 20
