from functools import cache

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.cache.codec import Codec
from kdcache.cache.tables import MAX_RANK, IdTables, ascending, sorted_by
from kdcache.errors import CacheCorruptError
from tests.strategies import sparse_targets, targets_from_logits

pytestmark = pytest.mark.usefixtures("codec_form")

VOCABULARIES = [300, 49_152, 128_256, 151_936, 262_144]


@cache
def pilot(vocab_size=300, sequences=6, n=50, k=8, seed=0):
    """Targets whose likely tokens depend on the token before."""
    rng = np.random.default_rng(seed)
    likely = np.random.default_rng(99).permutation(vocab_size)
    base = -2.0 * np.log(np.arange(vocab_size) + 1)
    found = []
    for _ in range(sequences):
        contexts = rng.integers(0, 40, n).astype(np.uint32)
        logits = np.empty((n, vocab_size))
        for row, context in enumerate(contexts):
            # a favourite hundred after each token, a common order for the rest
            order = np.concatenate([likely[100 + 5 * int(context) :][:100], likely])
            logits[row, order[::-1]] = base[np.arange(len(order))[::-1].clip(max=vocab_size - 1)]
        logits += rng.normal(0, 0.5, logits.shape)
        found.append((contexts, targets_from_logits(logits, rng.integers(0, vocab_size, n), k, (1.0,))))
    return found


def codec_of(tables, vocab_size=300, **changes):
    return Codec("packed", vocab_size, (1.0,), 64, id_tables=tables, **changes)


def assert_same(a, b):
    assert (a.num_entries == b.num_entries).all()
    assert (a.token_ids == b.token_ids).all()
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-6)
    assert (a.tail_logprobs == b.tail_logprobs).all()


@pytest.mark.parametrize(("num_contexts", "length"), [(0, 0), (0, 100), (5, 3), (40, 300), (100, 20)])
def test_ids_and_logprobs_come_back(num_contexts, length):
    """As without tables: to the same levels, in the same order."""
    tables = IdTables.count(pilot(), 300, num_contexts, length)
    plain = codec_of(None)
    for contexts, targets in pilot(seed=1):
        frames = codec_of(tables).encode(targets, contexts)
        found = codec_of(tables).decode(frames, len(targets), "x", contexts).expand((1.0,))
        assert_same(found, plain.decode(plain.encode(targets), len(targets), "x").expand((1.0,)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_targets_come_back(data):
    """Other tokens than the pilot's, ragged positions, positions without entries, counts."""
    targets = data.draw(sparse_targets(vocab_size=300))
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    contexts = rng.integers(0, 300, len(targets)).astype(np.uint32)
    tables = IdTables.count(pilot(), 300, data.draw(st.integers(0, 50)), data.draw(st.integers(0, 300)))
    recoded = sorted_by(targets, tables.codes(targets.token_ids, targets.num_entries, contexts))
    ids = tables.token_ids(recoded.token_ids.astype(np.int64), recoded.num_entries, contexts, "x")
    position = np.repeat(np.arange(len(targets)), targets.num_entries)
    gaps = np.diff(recoded.token_ids.astype(np.int64))[np.diff(position) == 0]
    assert (gaps > 0).all(), "codes ascend and do not repeat"
    order = np.lexsort((ids, position))
    assert (ids[order] == targets.token_ids).all()
    assert (recoded.logprobs[order] == targets.logprobs).all()


def test_counts_travel_with_their_ids():
    rng = np.random.default_rng(0)
    (contexts, targets), *_ = pilot()
    import dataclasses

    counts = rng.integers(1, 5, (len(targets.token_ids), 1)).astype(np.uint16)
    drawn = dataclasses.replace(targets, counts=counts)
    codec = codec_of(IdTables.count(pilot(), 300, 20, 50), num_draws=20)
    found = codec.decode(codec.encode(drawn, contexts), len(drawn), "x", contexts).expand((1.0,))
    assert (found.counts == counts).all()
    assert (found.token_ids == drawn.token_ids).all()


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_vocabularies(vocab_size):
    """From SmolLM2's to Gemma's, with and without tables: ids are exact."""
    some = pilot(vocab_size, sequences=2, n=20)
    tables = IdTables.count(some, vocab_size, 10, 64)
    edges = np.zeros((2, vocab_size))
    edges[0, 0] = edges[1, vocab_size - 1] = 9
    edge = targets_from_logits(edges, np.zeros(2, int), 8, (1.0,))
    for contexts, targets in [*some, (np.array([vocab_size - 1, 0], np.uint32), edge)]:
        for codec in (codec_of(None, vocab_size), codec_of(tables, vocab_size)):
            found = codec.decode(codec.encode(targets, contexts), len(targets), "x", contexts).expand((1.0,))
            assert (found.token_ids == targets.token_ids).all()
    again = IdTables.from_bytes(tables.to_bytes(), vocab_size, "x")
    assert again.to_bytes() == tables.to_bytes()


def test_what_is_likely_is_small():
    """Fewer bytes by rank, fewer still by the token before."""
    train, test = pilot(8192, 8, 100, k=32), pilot(8192, 2, 100, k=32, seed=1)

    def size(tables):
        codec = codec_of(tables, 8192)
        frames = [codec.encode(targets, contexts) for contexts, targets in test]
        return sum(len(f["id_symbols"]) + len(f["id_low"]) + len(f["id_escapes"]) for f in frames)

    none, by_rank = size(None), size(IdTables.count(train, 8192, 0, 0))
    by_context = size(IdTables.count(train, 8192, 40, 200))
    assert by_context < 0.9 * by_rank < 0.9 * none


def good():
    return {
        "order": np.arange(300, dtype=np.uint32)[::-1].copy(),
        "contexts": np.array([3, 9], np.uint32),
        "lists": np.array([[1, 2, 3], [0, 5, 4]], np.uint16),
    }


def test_good_tables_are_taken():
    IdTables.from_bytes(safetensors.numpy.save(good()), 300, "x")


@pytest.mark.parametrize(
    "change",
    [
        {"order": np.zeros(300, np.uint32)},
        {"order": np.arange(299, dtype=np.uint32)},
        {"order": np.arange(300, dtype=np.uint64)},
        {"order": np.arange(1, 301, dtype=np.uint32)},
        {"contexts": np.array([9, 3], np.uint32)},
        {"contexts": np.array([3, 3], np.uint32)},
        {"contexts": np.array([3, 300], np.uint32)},
        {"contexts": np.array([3], np.uint32)},
        {"lists": np.array([[1, 1, 3], [0, 5, 4]], np.uint16)},
        {"lists": np.array([[1, 2, 300], [0, 5, 4]], np.uint16)},
        {"lists": np.zeros((2, 0, 3), np.uint16)},
        {"more": np.zeros(3, np.uint32)},
    ],
    ids=str,
)
def test_hostile_tables_are_refused(change):
    with pytest.raises(CacheCorruptError, match="here: "):
        IdTables.from_bytes(safetensors.numpy.save(good() | change), 300, "here")


def test_lists_for_more_tokens_than_can_be_held_at_work():
    """A few hundred KB on disk that would take a GiB and more once something is encoded."""
    order, contexts = np.arange(70_000, dtype=np.uint32), np.arange(66_000, dtype=np.uint32)
    arrays = {"order": order, "contexts": contexts, "lists": np.zeros((66_000, 0), np.uint16)}
    with pytest.raises(CacheCorruptError, match="for at most 65535 tokens"):
        IdTables.from_bytes(safetensors.numpy.save(arrays), 70_000, "here")


@pytest.mark.parametrize("data", [b"", b"x" * 100, b"\xff" * 8 + b"{}", safetensors.numpy.save({})])
def test_junk_is_refused(data):
    with pytest.raises(CacheCorruptError):
        IdTables.from_bytes(data, 300, "x")


def test_codes_that_no_id_has():
    tables = IdTables.from_bytes(safetensors.numpy.save(good()), 300, "x")
    contexts, ones = np.array([3], np.uint32), np.array([1], np.uint32)
    assert tables.token_ids(np.array([302]), ones, contexts, "x") == [0]
    with pytest.raises(CacheCorruptError, match="code 303 of 303"):
        tables.token_ids(np.array([303]), ones, contexts, "x")


def test_an_id_under_two_codes_is_found():
    """A listed rank also has the code that it would have unlisted; no writer writes that."""
    tables = IdTables.from_bytes(safetensors.numpy.save(good()), 300, "x")
    contexts = np.array([3], np.uint32)
    (_, targets), *_ = pilot(n=1, k=2)
    import dataclasses

    codec = codec_of(tables)
    forged = dataclasses.replace(targets, token_ids=np.array([0, 4], np.uint32))  # rank 1 by its place, and as itself
    # Tables that change nothing: codes go in as ids.
    nothing = IdTables(np.arange(303, dtype=np.uint32), np.zeros(0, np.uint32), np.zeros((0, 0), np.uint16))
    frames = codec_of(nothing, 303).encode(forged, contexts)
    assert set(codec.decode(frames, 1, "x", contexts).token_ids) == {298}
    with pytest.raises(CacheCorruptError, match="twice"):
        codec.decode(frames, 1, "x", contexts).expand((1.0,))


def test_ranks_past_the_table():
    """Tokens rarer than MAX_RANK of them keep their rank."""
    vocab_size = MAX_RANK + 5000
    tables = IdTables.count(pilot(), vocab_size, 10, 16)
    (contexts, targets), *_ = pilot(vocab_size, n=30, seed=3)
    recoded = sorted_by(targets, tables.codes(targets.token_ids, targets.num_entries, contexts))
    assert int(recoded.token_ids.max()) >= MAX_RANK
    ids = tables.token_ids(recoded.token_ids.astype(np.int64), recoded.num_entries, contexts, "x")
    import dataclasses

    assert (ascending(dataclasses.replace(recoded, token_ids=ids)).token_ids == targets.token_ids).all()
