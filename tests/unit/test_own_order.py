"""The order that a row carries for itself, against plain counting and the two ways there and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.cache.codec import Codec
from kdcache.cache.frames import compress
from kdcache.cache.own_order import HALF_OCTAVES, LEAST_COUNT, MAX_FREQUENT, OwnOrder, most_gap_bytes
from kdcache.cache.tables import MAX_VOCAB
from kdcache.errors import CacheCorruptError
from tests.strategies import targets_from_logits

pytestmark = pytest.mark.usefixtures("codec_form")


def drawn(size=5000, num_numbers=600, seed=0):
    rng = np.random.default_rng(seed)
    return rng.permutation(num_numbers)[np.minimum(rng.geometric(0.01, size), num_numbers) - 1]


def test_what_comes_up_often_comes_first():
    numbers = drawn()
    order = OwnOrder.count(numbers.astype(np.uint32), 0, 600)
    counts = np.bincount(numbers)
    assert set(order.numbers) == set(np.flatnonzero(counts >= LEAST_COUNT))
    placed = counts[order.by_frequency]
    assert (placed[1:] <= placed[:-1] * np.sqrt(2) + 1e-9).all(), "half octaves"
    assert order.renumber(numbers.astype(np.uint32), 0, 600).mean() < 0.8 * numbers.mean()


def test_half_octaves_are_those_of_a_logarithm():
    counts = np.arange(1, 100_000)
    assert (np.searchsorted(HALF_OCTAVES, counts, side="right") == np.floor(np.log2(counts) * 2 + 1e-12)).all()


@given(st.lists(st.integers(0, 3000), max_size=400), st.integers(0, 50), st.integers(1, 20))
def test_there_and_back(numbers, start, times):
    entries = np.repeat(np.array(numbers, dtype=np.uint32), times)
    entries = np.concatenate([entries + np.uint32(start), np.arange(start, dtype=np.uint32)])  # and some of lists
    order = OwnOrder.count(entries, start, 3001)
    assert set(order.numbers) == set(np.flatnonzero(np.bincount(entries)[start:] >= LEAST_COUNT))
    before = np.arange(start + 3001, dtype=np.uint32)
    codes = order.renumber(before, start, 3001)
    assert len(np.unique(codes)) == start + 3001
    assert (order.undo(codes, start, 3001, "x") == before).all()
    beyond = np.array([start + 3001 + len(order.numbers)], dtype=np.uint32)
    with pytest.raises(CacheCorruptError, match=f"x: code {beyond[0]} of {beyond[0]} stands for no token id"):
        order.undo(beyond, start, 3001, "x")
    gaps = order.gaps()
    assert len(gaps) <= most_gap_bytes(3001)
    again = OwnOrder.of(gaps, order.steps, 3001, "x")
    assert (again.numbers == order.numbers).all()
    assert (again.by_frequency == order.by_frequency).all()


def test_never_more_than_a_row_may_name():
    numbers = np.repeat(np.arange(MAX_FREQUENT + 50, dtype=np.uint32), LEAST_COUNT)
    order = OwnOrder.count(numbers, 0, MAX_FREQUENT + 50)
    assert len(order.numbers) == MAX_FREQUENT
    assert (order.numbers == np.arange(MAX_FREQUENT)).all(), "of equally frequent ones the lower"


def test_nothing_is_frequent():
    for numbers in (np.zeros(0, np.uint32), np.arange(13, dtype=np.uint32)):
        order = OwnOrder.count(numbers, 3, 10)
        assert len(order.numbers) == len(order.gaps()) == 0
        assert (order.renumber(numbers, 3, 10) == numbers).all()


def example(vocab_size=500):
    """A teacher that says much the same everywhere, of tokens far apart."""
    rng = np.random.default_rng(0)
    logits = -np.log(1.0 + rng.permutation(vocab_size)) + rng.normal(0, 1, (100, vocab_size))
    targets = targets_from_logits(logits, rng.integers(0, vocab_size, 100), 16, (1.0,))
    return Codec("packed", vocab_size, (1.0,), 16), targets


def test_fewer_bytes_of_ids():
    """Beside the same codec in a vocabulary for which no row names its order."""
    codec, targets = example(20_000)
    with_order, without = codec.encode(targets), Codec("packed", MAX_VOCAB + 1, (1.0,), 16).encode(targets)
    assert "frequent_gaps" not in without
    of_ids = [name for name in with_order if name.startswith(("id_", "frequent_"))]
    assert sum(len(with_order[name]) for name in of_ids) < 0.9 * sum(len(without.get(name, b"")) for name in of_ids)


@pytest.mark.parametrize(
    ("gaps", "steps", "message"),
    [
        ([255, 255], [], "stands for no token id"),
        ([254] * 2, [0, 0], "number 509 of 500"),
        ([1, 2], [0], "frequent_steps"),
        ([0] * 5000, [0] * 5000, "frequent_gaps"),
    ],
)
def test_orders_that_cannot_be_are_refused(gaps, steps, message):
    codec, targets = example()
    frames = codec.encode(targets)
    frames |= {
        "frequent_gaps": compress(np.array(gaps, np.uint8)),
        "frequent_steps": compress(np.array(steps, np.uint8)),
    }
    with pytest.raises(CacheCorruptError, match=message):
        codec.decode(frames, 100, "x")


def test_codes_past_the_last_are_refused():
    codec, targets = example()
    frames = codec.encode(targets)
    smaller = Codec("packed", int(targets.token_ids.max()), (1.0,), 16)
    with pytest.raises(CacheCorruptError, match="stands for no token id|number"):
        smaller.decode(frames, 100, "x")
