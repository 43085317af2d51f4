"""One shard by one worker: batches, back-off, what is not finite, padding, packing, and a writer that fails."""

import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdcache.cache.commit import committed_shards, publish_plan
from kdcache.cache.store import LocalStore
from kdcache.corpus import _join, make_sequences
from kdcache.dump.engines.transformers import TransformersEngine, is_out_of_memory, pad_batch
from kdcache.dump.launch import make_worker
from kdcache.dump.options import DumpOptions
from kdcache.dump.plan import make_plan
from kdcache.dump.worker import plan_batches
from kdcache.errors import ModelError, StoreError, TeacherOutputError
from kdcache.heads import head_of
from kdcache.model_files import find_model
from kdcache.models import load_model
from kdcache.specs import TargetSpec
from kdcache.targets import SparseTargets, TokenSequence
from tests.conftest import VOCAB_SIZE, make_llama


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return load_model(find_model(tiny_teacher), dtype=torch.float32)


def make_engine(model, **changes):
    targets = {"scheme": "top_k", "k": 8, "temperatures": (1.0, 2.0)}
    targets |= {name: changes.pop(name) for name in list(changes) if name in TargetSpec.model_fields}
    given = {"vocab_size": VOCAB_SIZE, "chunk_positions": 16}
    return TransformersEngine(model, targets=TargetSpec(**targets), **(given | changes))


def make_sequence(length, seed, starts=(0,)):
    rng = np.random.default_rng(seed)
    mask = rng.random(length) < 0.9
    mask[list(starts)] = False
    mask[-1] = True
    return TokenSequence(rng.integers(3, VOCAB_SIZE, length).astype(np.uint32), mask, np.array(starts, dtype=np.uint32))


def assert_close(one: SparseTargets, two: SparseTargets, atol=2e-5):
    np.testing.assert_array_equal(one.token_ids, two.token_ids)
    for name in ("logprobs", "tail_logprobs", "logz", "label_logprobs", "entropy"):
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), rtol=0, atol=atol, err_msg=name)


# --- batches ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 400))
def test_batches_hold_every_sequence_once_within_the_budget(lengths, batch_tokens):
    batches = plan_batches(lengths, batch_tokens)
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= batch_tokens
    widths = [max(lengths[i] for i in batch) for batch in batches]
    assert widths == sorted(widths, reverse=True), "the largest first: memory runs out at the start or not at all"


def test_padding_is_on_the_right_and_positions_run_on():
    ids, positions = pad_batch([make_sequence(5, 0, (0, 3)), make_sequence(7, 1)])
    assert ids.shape == (2, 7)
    assert positions.tolist() == [[0, 1, 2, 0, 1, 2, 3], list(range(7))]


# --- what the teacher says does not depend on its company --------------------------------------------------------------


def test_padding_not_masked(teacher):
    """A short sequence beside a long one says what it says alone."""
    engine, short, long = make_engine(teacher), make_sequence(9, 0), make_sequence(60, 1)
    assert_close(engine.run([short, long])[0], engine.run([short])[0])


def test_packing_equals_unpacked(teacher):
    """Documents packed into one sequence say what each says in a sequence of its own."""
    from kdcache.corpus import Document

    engine = make_engine(teacher)
    parts = [make_sequence(n, n) for n in (12, 5, 20)]
    packed = _join([Document(p.input_ids, p.loss_mask) for p in parts])
    (together,) = engine.run([packed])
    alone = [targets for part in parts for targets in engine.run([part])]
    assert len(together) == sum(len(targets) for targets in alone)
    joined = {
        field.name: np.concatenate([getattr(t, field.name) for t in alone])
        for field in dataclasses.fields(SparseTargets)
        if field.name not in ("temperatures", "hidden", "counts", "frequencies")
    }
    assert_close(together, SparseTargets(temperatures=(1.0, 2.0), **joined))


def test_teacher_student_shift(teacher):
    """Target t is the distribution after token t, and its label is token t + 1."""
    sequence = make_sequence(20, 3)
    (targets,) = make_engine(teacher, k=VOCAB_SIZE).run([sequence])
    with torch.no_grad():
        logp = torch.log_softmax(
            teacher(torch.tensor(sequence.input_ids.astype(np.int64))[None]).logits[0].double(), -1
        )
    where = np.flatnonzero(sequence.target_mask)
    labels = sequence.input_ids[where + 1].astype(np.int64)
    np.testing.assert_allclose(targets.label_logprobs, logp[where, labels], atol=2e-5)
    np.testing.assert_allclose(targets.logprobs.reshape(len(where), -1), logp[where], atol=2e-5)


def test_teacher_left_in_train_mode(tmp_path):
    """Dropout in a teacher that someone left in train mode is off."""
    model = load_model(find_model(make_llama(tmp_path / "m", attention_dropout=0.5)), dtype=torch.float32)
    sequence = make_sequence(30, 0)
    (expected,) = make_engine(model).run([sequence])
    (found,) = make_engine(model.train()).run([sequence])
    assert_close(found, expected, atol=0)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_change_nothing(teacher, chunk):
    sequence = make_sequence(40, 0)
    (expected,) = make_engine(teacher).run([sequence])
    (found,) = make_engine(teacher, chunk_positions=chunk).run([sequence])
    assert_close(found, expected, atol=1e-5)


def test_padded_vocabulary_rows_get_no_mass(tmp_path):
    """A teacher with more rows than tokens: the rest of its rows is left out before anything is selected."""
    model = load_model(find_model(make_llama(tmp_path / "m", vocab_size=VOCAB_SIZE + 64)), dtype=torch.float32)
    sequence = make_sequence(30, 0)
    (targets,) = make_engine(model, k=VOCAB_SIZE).run([sequence])
    assert targets.token_ids.max() < VOCAB_SIZE
    np.testing.assert_allclose(np.exp(targets.logprobs).reshape(-1, VOCAB_SIZE).sum(1), 1, atol=1e-5)


def test_a_head_that_is_not_understood_costs_time_not_truth(tmp_path, tiny_teacher, caplog):
    """The model's own logits are used then, whatever it does to them; hidden states alone are refused."""
    model = load_model(find_model(tiny_teacher), dtype=torch.float32)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * 1.5)
    engine = make_engine(model, k=VOCAB_SIZE)
    assert "not understood" in caplog.text
    sequences = [make_sequence(20, 0), make_sequence(31, 1)]
    for sequence, targets in zip(sequences, engine.run(sequences), strict=True):
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor(sequence.input_ids.astype(np.int64))[None]).logits[0], -1)
        expected = logp[np.flatnonzero(sequence.target_mask)]
        np.testing.assert_allclose(targets.logprobs.reshape(len(targets), -1), expected, atol=2e-5)
    with pytest.raises(ModelError, match="not understood"):
        make_engine(model, k=0, scheme="hidden")


def test_hidden_states_reproduce_the_distribution(teacher):
    sequence = make_sequence(25, 0)
    (targets,) = make_engine(teacher, k=0, scheme="hidden").run([sequence])
    logits = head_of(teacher).logits(torch.from_numpy(targets.hidden))
    np.testing.assert_allclose(targets.logz, logits.logsumexp(1).detach(), atol=1e-5)


# --- memory -----------------------------------------------------------------------------------------------------------


def fail_above(engine, limit, error):
    """The engine's memory, made smaller: more than ``limit`` sequences at once do not fit."""

    class Small(TransformersEngine):
        __slots__ = ()

        def _run(self, batch, sequence_ids):
            if len(batch) > limit:
                raise error
            return super()._run(batch, sequence_ids)

    engine.__class__ = Small
    return engine


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError(),
    ],
)
def test_when_memory_runs_out_batches_are_halved(teacher, error):
    sequences = [make_sequence(10 + n, n) for n in range(7)]
    expected = make_engine(teacher).run(sequences)
    engine = fail_above(make_engine(teacher), 2, error)
    for found, wanted in zip(engine.run(sequences), expected, strict=True):
        assert_close(found, wanted)
    assert engine.num_splits == 3  # 7 -> 3 + 4 -> (1 + 2) + (2 + 2)


def test_one_sequence_that_does_not_fit_is_said(teacher):
    engine = fail_above(make_engine(teacher), 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(ModelError, match="a sequence of 10 tokens does not fit into memory") as caught:
        engine.run([make_sequence(10, 0)])
    assert "--seq-len" in caught.value.hint


def test_other_errors_are_not_taken_for_memory(teacher):
    engine = fail_above(make_engine(teacher), 0, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="multiplied"):
        engine.run([make_sequence(10, 0), make_sequence(10, 1)])
    assert not is_out_of_memory(RuntimeError("device-side assert triggered"))


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def worker(tmp_path, tiny_teacher, corpus_file):
    """A worker with its plan published, nothing dumped."""
    options = DumpOptions(
        teacher=tiny_teacher, dataset=corpus_file, output=str(tmp_path / "cache"), seq_len=64, threads=1,
        batch_tokens=256, shard_positions=700, top_k=8, device="cpu",
    )  # fmt: skip
    store = LocalStore(options.output)
    plan, rows = make_plan(store, options)
    return make_worker(store, options, publish_plan(store, plan), rows, 0, 1)


def files(worker):
    return [name for kind in ("shards", "commits") for name in worker.store.names_in(kind)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_names_shard_and_sequence_and_commits_nothing(worker, value):
    """A teacher whose arithmetic breaks at one token of the corpus stops the dump and says where."""
    sequences = make_sequences(
        [worker.rows[i] for i in worker.plan.spec.rows(0)], worker.plan.spec.corpus, worker.tokenizer
    )
    tokens = [set(map(int, sequence.input_ids)) for sequence in sequences]
    token, culprit = next(
        (token, index)
        for index, own in enumerate(tokens)
        for token in sorted(own)
        if sum(token in other for other in tokens) == 1
    )
    with torch.no_grad():
        worker.engine.model.get_input_embeddings().weight[token] = value
    with pytest.raises(TeacherOutputError, match=f"shard 00000, sequence {culprit} ") as caught:
        worker.work()
    assert "NaN or Inf" in caught.value.message
    assert "--dtype" in caught.value.hint
    assert files(worker) == []


def test_silent_writer_threads(worker):
    """A disk that is full when the second shard is published: the dump stops there with the error, and keeps the first."""

    class FullDisk(LocalStore):
        puts = 0

        def put_if_absent(self, name, data):
            if name.startswith("shards/"):
                FullDisk.puts += 1
                if FullDisk.puts == 2:
                    raise StoreError(f"{name}: no space left on device")
            return super().put_if_absent(name, data)

    worker.store = FullDisk(worker.store.root)
    with pytest.raises(StoreError, match="no space left"):
        worker.work()
    assert len(committed_shards(worker.store)) == 1
    assert FullDisk.puts == 2, "it did not go on past the failure"


def test_a_failing_encoder_stops_the_dump(worker, monkeypatch):
    from kdcache.dump import worker as module

    def broken(*_):
        raise ValueError("encoder broke")

    monkeypatch.setattr(module, "check_alignment", broken)
    with pytest.raises(ValueError, match="encoder broke"):
        worker.work()
    assert files(worker) == []


def test_a_stop_is_heeded_between_shards_and_what_is_done_stays(worker):
    worker.should_stop = lambda: bool(committed_shards(worker.store))
    worker.work()
    done = committed_shards(worker.store)
    assert 1 <= len(done) < worker.plan.spec.num_shards
    worker.should_stop = lambda: False
    dataclasses.replace(worker, _executor=ThreadPoolExecutor(1)).work()
    assert len(committed_shards(worker.store)) == worker.plan.spec.num_shards


def test_a_worker_that_fails_leaves_no_lease(tmp_path, tiny_teacher, corpus_file, monkeypatch):
    """Whenever it fails after taking one: the next run in this very process need not wait for it."""
    from kdcache.cache import lease

    options = DumpOptions(teacher=tiny_teacher, dataset=corpus_file, split="train[:4]", output=str(tmp_path / "c"),
                          seq_len=64, top_k=8, shard_positions=200, device="cpu", threads=1)  # fmt: skip
    store = LocalStore(options.output)
    plan, rows = make_plan(store, options)
    real, held = LocalStore.exists, set(lease._HELD)
    for number in range(1, 6):
        calls = itertools.count(1)

        def failing(store, name, calls=calls, number=number):
            if name.startswith("commits/") and next(calls) == number:
                raise StoreError("gone")
            return real(store, name)

        monkeypatch.setattr(LocalStore, "exists", failing)
        with pytest.raises(StoreError, match="gone"):
            make_worker(store, options, plan, rows, 0, 1).work()
        assert store.names_in("leases") == []
        assert held == lease._HELD
