"""Compiled loops beside the numpy forms that define them: the same bytes, the same arrays, the same refusals."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.cache import jit
from kdcache.cache.codec import Codec
from kdcache.cache.frames import compress, decompress
from kdcache.cache.tables import IdTables
from kdcache.errors import KDCacheError
from kdcache.targets import SparseTargets
from tests.strategies import VOCAB_SIZES, frequencies_of, sparse_targets

pytest.importorskip("numba")


@pytest.fixture(autouse=True, scope="module")
def at_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "WARM_UP_POSITIONS", 0)
        yield


def with_numpy(call):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "WARM_UP_POSITIONS", 1 << 62)
        return call()


def outcome(call):
    """What comes of it, with types; or the refusal, whose message may tell of any one of several faults."""
    try:
        found = call()
    except KDCacheError as error:
        return type(error).__name__
    if isinstance(found, dict):
        return found
    fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    return {name: (x.dtype.str, x.shape, x.tolist()) if isinstance(x, np.ndarray) else x for name, x in fields.items()}


def assert_forms_agree(call):
    assert outcome(call) == outcome(lambda: with_numpy(call))


def tables_for(targets: SparseTargets, contexts: np.ndarray, vocab_size: int, num_contexts: int) -> IdTables:
    return IdTables.count([(contexts, targets)], vocab_size, num_contexts, 12)


@given(st.data())
def test_bytes_and_arrays_are_the_same(data):
    """Any number of entries a position, ties, gaps of every size; with and without tables, drawn or not."""
    vocab_size = data.draw(st.sampled_from([*VOCAB_SIZES, 1 << 32]))
    targets = data.draw(sparse_targets(vocab_size))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    contexts = rng.integers(0, min(vocab_size, 20), len(targets)).astype(np.uint32)
    codec = Codec("packed", vocab_size, targets.temperatures, 70)
    kind = data.draw(st.sampled_from(["plain", "counts", "tables", "ranks"]))
    if kind == "counts":
        drawn = rng.integers(1, 40, (len(targets.token_ids), len(targets.temperatures))).astype(np.uint16)
        targets, codec = dataclasses.replace(targets, counts=drawn), dataclasses.replace(codec, num_draws=300)
    if kind in ("tables", "ranks") and vocab_size <= 70_000:
        tables = tables_for(targets, contexts, vocab_size, 8 if kind == "tables" else 0)
        codec = dataclasses.replace(codec, id_tables=tables)
    assert_forms_agree(lambda: codec.encode(targets, contexts))
    frames = codec.encode(targets, contexts)
    assert_forms_agree(lambda: codec.decode(frames, len(targets), "x", contexts))


@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 1000))
def test_frequencies_are_the_same(num_draws, n, seed):
    drawn = np.random.default_rng(seed).zipf(1.4, (n, num_draws)).clip(1, 299)
    targets = frequencies_of(drawn, 2.0)
    codec = Codec("packed", 300, (1.0,), num_draws, num_draws=num_draws, frequencies=True)
    assert_forms_agree(lambda: codec.encode(targets))
    frames = codec.encode(targets)
    assert_forms_agree(lambda: codec.decode(frames, n, "x"))


@given(st.data())
def test_what_was_tampered_with_is_refused_alike(data):
    """Frames that are whole, of contents that were changed anywhere: refused by both forms, or read alike."""
    contexts = np.arange(9, dtype=np.uint32)
    kind = data.draw(st.sampled_from(["plain", "tables", "counts", "frequencies"]))
    if kind == "frequencies":
        targets = frequencies_of(
            np.random.default_rng(data.draw(st.integers(0, 99))).zipf(1.4, (9, 30)).clip(1, 299), 2.0
        )
    else:
        targets = data.draw(sparse_targets(300, num_targets=9))
    codec = Codec("packed", 300, targets.temperatures, 70)
    if kind == "tables":
        codec = dataclasses.replace(codec, id_tables=tables_for(targets, contexts, 300, 5))
    if kind == "counts":
        drawn = np.resize(np.arange(1, 30, dtype=np.uint16), (len(targets.token_ids), len(targets.temperatures)))
        targets, codec = dataclasses.replace(targets, counts=drawn), dataclasses.replace(codec, num_draws=40)
    if kind == "frequencies":
        codec = dataclasses.replace(codec, num_draws=30, frequencies=True)
    frames = codec.encode(targets, contexts)
    name = data.draw(st.sampled_from(sorted(frames)))
    content = bytearray(decompress(frames[name], max_bytes=1 << 20, what="x"))
    for place in data.draw(st.lists(st.integers(0, max(len(content) - 1, 0)), max_size=6)) if content else ():
        content[place] = data.draw(st.sampled_from([0, 1, 59, 60, 128, 254, 255]))
    frames |= {name: compress(bytes(content))}
    assert_forms_agree(lambda: codec.decode(frames, 9, "x", contexts))


@pytest.mark.parametrize("ids", [[0, 2**32 - 1], [2**32 - 1], [2**31, 2**31 + 1]])
def test_ids_at_the_end_of_32_bits(ids):
    targets = SparseTargets(
        (1.0,), np.array([len(ids)], np.uint32), np.array(ids, np.uint32), np.full(len(ids), -1, np.float32),
        np.full((1, 1), -1, np.float32), *(np.full(1, -1, np.float32) for _ in range(3)),
    )  # fmt: skip
    codec = Codec("packed", 1 << 32, (1.0,), 2)
    assert_forms_agree(lambda: codec.encode(targets))
    assert codec.decode(codec.encode(targets), 1, "x").token_ids.tolist() == ids


def repeated(token: int) -> SparseTargets:
    return SparseTargets(
        (1.0,), np.array([2], np.uint32), np.array([token, token], np.uint32), np.full(2, -1, np.float32),
        np.full((1, 1), -1, np.float32), *(np.full(1, -1, np.float32) for _ in range(3)),
    )  # fmt: skip


@pytest.mark.parametrize("with_tables", [False, True])
@pytest.mark.parametrize("token", [7, 250])
def test_repeated_ids_are_a_mistake_of_the_caller(token, with_tables):
    before = np.zeros(1, np.uint32)
    tables = tables_for(dataclasses.replace(repeated(7), token_ids=np.array([7, 8], np.uint32)), before, 300, 0)
    codec = Codec("packed", 300, (1.0,), 2, id_tables=tables if with_tables else None)
    for call in (
        lambda: codec.encode(repeated(token), before),
        lambda: with_numpy(lambda: codec.encode(repeated(token), before)),
    ):
        with pytest.raises(AssertionError, match="ascend"):
            call()


def test_a_token_before_each_position_or_none_is_read():
    """Compiled loops do not look where an array ends."""
    targets = dataclasses.replace(repeated(7), token_ids=np.array([7, 8], np.uint32))
    codec = Codec("packed", 300, (1.0,), 2, id_tables=tables_for(targets, np.zeros(1, np.uint32), 300, 1))
    frames = codec.encode(targets, np.zeros(1, np.uint32))
    for contexts in (np.zeros(0, np.uint32), np.zeros(2, np.uint32)):
        with pytest.raises(ValueError, match="1 positions and"):
            codec.encode(targets, contexts)
        with pytest.raises(ValueError, match="1 positions and"):
            codec.decode(frames, 1, "x", contexts)


def test_nothing_is_cached_where_nothing_may_be_written(monkeypatch):
    """A read-only installation in a home that is not there."""
    import numba

    def njit(function, **options):
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return numba.njit(function, **options)

    class Numba:
        pass

    Numba.njit = staticmethod(njit)
    assert jit._compiled(Numba, lambda x: x + 1)(1) == 2


def test_a_full_disk_does_not_end_a_dump():
    """What was compiled cannot be kept: it is used all the same."""
    import numba

    calls = []

    def njit(function, **options):
        calls.append(options.pop("cache", False))
        if not calls[-1]:
            return numba.njit(function, **options)

        def full(*arguments):
            raise OSError(28, "No space left on device")

        return full

    class Numba:
        pass

    Numba.njit = staticmethod(njit)
    double = jit._compiled(Numba, lambda x: x + x)
    assert double(1) == 2 and double(2) == 4
    assert calls == [True, False]


def test_without_numba_there_is_nothing_compiled(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "numba", None)
    assert jit._functions.__wrapped__() is None


def test_little_is_left_to_numpy(monkeypatch):
    """A glance at a cache does not wait for a compiler."""
    monkeypatch.setattr(jit, "WARM_UP_POSITIONS", jit._positions + 10)
    for num_targets, wanted in ((4, False), (5, False), (1, True), (0, True)):
        jit.note(num_targets)
        assert (jit.compiled() is not None) == wanted


def test_no_position_and_no_entry():
    for counts in ([], [0], [0, 0, 3, 0]):
        n, total = len(counts), sum(counts)
        targets = SparseTargets(
            (1.0,), np.array(counts, np.uint32), np.arange(total, dtype=np.uint32), np.full(total, -2, np.float32),
            np.full((n, 1), -1, np.float32), *(np.full(n, -1, np.float32) for _ in range(3)),
        )  # fmt: skip
        codec = Codec("packed", 300, (1.0,), 3)
        assert_forms_agree(lambda codec=codec, targets=targets: codec.encode(targets))
        frames = codec.encode(targets)
        assert_forms_agree(lambda codec=codec, frames=frames, n=n: codec.decode(frames, n, "x"))
