"""What goes into a codec comes out of it: ids and counts exactly, logprobs within the declared bound; and through a shard's bytes."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.cache import packed
from kdcache.cache.codec import Codec
from kdcache.cache.shard import ShardBuilder, ShardReader
from kdcache.cache.tables import IdTables
from tests.strategies import VOCAB_SIZES, frequencies_of, sparse_targets, token_sequences

pytestmark = pytest.mark.usefixtures("codec_form")

MAX_ENTRIES = 70


def draw_codec(data, targets, contexts, vocab_size):
    """Of either name, with tables of both kinds or none, drawn or not."""
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    codec = Codec(data.draw(st.sampled_from(["exact", "packed"])), vocab_size, targets.temperatures, MAX_ENTRIES)
    if data.draw(st.booleans()):
        num_draws = data.draw(st.sampled_from([39, 300]))
        drawn = rng.integers(0, num_draws, (len(targets.token_ids), len(targets.temperatures))).astype(np.uint16)
        targets, codec = dataclasses.replace(targets, counts=drawn), dataclasses.replace(codec, num_draws=num_draws)
    kind = data.draw(st.sampled_from(["none", "global", "context"]))
    if codec.name == "packed" and kind != "none" and vocab_size <= 70_000:
        tables = IdTables.count([(contexts, targets)], vocab_size, 8 if kind == "context" else 0, 12)
        codec = dataclasses.replace(codec, id_tables=tables)
    return targets, codec


def log_odds(logprobs):
    with np.errstate(divide="ignore"):
        return logprobs - np.log(-np.expm1(np.minimum(logprobs.astype(float), -1e-12)))


def assert_same(found, targets, codec):
    for name in ("num_entries", "token_ids", "counts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(targets, name), err_msg=name)
    row = np.repeat(np.arange(len(targets)), targets.num_entries)
    if codec.name == "exact":
        for name in ("tail_logprobs", "logz", "label_logprobs", "entropy"):
            np.testing.assert_array_equal(getattr(found, name), getattr(targets, name), err_msg=name)
    else:
        some = targets.num_entries > 0  # without entries there is nothing that the tail could be less than
        stored, told = (log_odds(one.tail_logprobs[some]) for one in (found, targets))
        assert ((stored == -np.inf) == (told == -np.inf)).all()
        within = told.clip(packed.TAIL_LOG_ODDS[0], packed.TAIL_LOG_ODDS[-1])  # the ends stand for all beyond
        finite = told > -np.inf
        assert (np.abs(stored[finite] - within[finite]) <= 1 / 8 + 1e-2).all()
        assert (np.abs(found.logz - targets.logz) <= 1 / 16 + 1e-6).all()
    if not targets.frequencies:
        bound = codec.logprob_error_bound(targets.logprobs)
        assert (np.abs(found.logprobs - targets.logprobs) <= bound).all()
        mass = np.bincount(row, np.exp(found.logprobs.astype(float)), len(targets)) + np.exp(found.tail_logprobs[:, 0])
        np.testing.assert_allclose(mass[targets.num_entries > 0], 1, atol=2e-5)


@given(st.data())
def test_targets(data):
    """Any number of entries a position, ties, gaps of every size, tails from nothing to nearly everything."""
    vocab_size = data.draw(st.sampled_from([*VOCAB_SIZES, 1 << 32]))
    targets = data.draw(sparse_targets(vocab_size, max_entries=MAX_ENTRIES))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    contexts = rng.integers(0, min(vocab_size, 20), len(targets)).astype(np.uint32)
    targets, codec = draw_codec(data, targets, contexts, vocab_size)
    found = codec.decode(codec.encode(targets, contexts), len(targets), "x", contexts).expand(targets.temperatures)
    assert_same(found, targets, codec)


@given(st.integers(1, 400), st.integers(0, 30), st.integers(0, 1000), st.sampled_from(["exact", "packed"]))
def test_frequencies(num_draws, n, seed, name):
    drawn = np.random.default_rng(seed).zipf(1.4, (n, num_draws)).clip(1, 299)
    targets = frequencies_of(drawn, 2.0) if n else frequencies_of(np.ones((1, num_draws), int), 2.0)
    codec = Codec(name, 300, (1.0,), num_draws, num_draws=num_draws, frequencies=True)
    found = codec.decode(codec.encode(targets), len(targets), "x").expand((1.0,))
    for field in ("num_entries", "token_ids", "counts"):
        np.testing.assert_array_equal(getattr(found, field), getattr(targets, field), err_msg=field)
    np.testing.assert_allclose(found.logprobs, targets.logprobs, rtol=1e-6)


@given(st.data())
def test_sequences_through_the_bytes_of_a_shard(data):
    sequences = data.draw(st.lists(token_sequences(), max_size=4))
    codec = Codec("packed", 300, (1.0, 2.0), MAX_ENTRIES)
    builder, rows = ShardBuilder(codec, "0" * 32, 5), []
    for sequence in sequences:
        targets = data.draw(sparse_targets(300, num_targets=int(sequence.target_mask.sum())))
        targets = dataclasses.replace(
            targets,
            temperatures=(1.0, 2.0),
            tail_logprobs=np.repeat(targets.tail_logprobs[:, :1], 2, axis=1),
        )
        builder.add(sequence, targets)
        rows.append((sequence, targets))
    reader = ShardReader(builder.finish(), codec, plan="0" * 32, shard=5, max_positions=64)
    assert len(reader) == len(rows)
    for number, (sequence, targets) in enumerate(rows):
        read = reader.sequence(number)
        for name in ("input_ids", "loss_mask", "document_starts"):
            np.testing.assert_array_equal(getattr(read, name), getattr(sequence, name), err_msg=name)
        assert reader.sequence_id(number) == 5 << 32 | number
        assert_same(reader.targets(number, read).expand((1.0, 2.0)), targets, codec)
