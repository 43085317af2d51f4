"""Order, dealing to ranks, collation, and decoding on the device."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdcache.cache.codec import Codec
from kdcache.targets import SparseTargets, TokenSequence, in_rectangle
from kdcache.train.stream import (
    IGNORED,
    Item,
    KDBatchSampler,
    TargetDecoder,
    collate,
    decode_all,
    epoch_order,
    in_slots,
)

FINGERPRINT = "0123456789abcdef0123456789abcdef"


def sampler(n=23, batch_size=2, **kwargs):
    return KDBatchSampler(n, batch_size, fingerprint=FINGERPRINT, **kwargs)


def steps(n, batch_size, accumulation, world_size, epoch=0):
    """What each optimiser step sees, over all ranks: a multiset of sequences, fillers left out."""
    ranks = []
    for rank in range(world_size):
        one = sampler(n, batch_size, accumulation=accumulation, rank=rank, world_size=world_size)
        one.set_epoch(epoch)
        ranks.append(list(one))
    assert len({len(batches) for batches in ranks}) == 1, "every rank does the same number of micro-batches"
    count = len(ranks[0]) // accumulation
    return [
        sorted(i for r in ranks for b in r[s * accumulation : (s + 1) * accumulation] for i in b if i >= 0)
        for s in range(count)
    ]


def test_order_depends_on_fingerprint_seed_and_epoch_alone():
    base = epoch_order(50, FINGERPRINT, 0, 0)
    assert (base == epoch_order(50, FINGERPRINT, 0, 0)).all()
    for other in (("f" * 32, 0, 0), (FINGERPRINT, 1, 0), (FINGERPRINT, 0, 1)):
        assert (base != epoch_order(50, *other)).any()
    assert sorted(base) == list(range(50))


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "world_size"), [(8, 1, 1), (1, 8, 1), (2, 2, 2), (2, 4, 1), (1, 2, 4)]
)
def test_same_steps_for_every_cut_of_the_global_batch(batch_size, accumulation, world_size):
    assert steps(23, batch_size, accumulation, world_size) == steps(23, 8, 1, 1)


@pytest.mark.parametrize("n", [1, 3, 8, 23])
def test_every_sequence_once_an_epoch(n):
    seen = Counter(i for step in steps(n, 2, 2, 2, epoch=3) for i in step)
    assert seen == Counter(range(n))


def test_length_is_the_number_of_batches():
    one = sampler(23, 2, accumulation=2, world_size=2)
    assert len(one) == len(list(one)) == 6


def test_evaluation_reads_in_order():
    assert [i for batch in sampler(6, 2, shuffle=False) for i in batch] == list(range(6))


def make_item(num_tokens, documents=(0,), k=3, seed=0, vocab=50, codec="packed"):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, num_tokens).astype(np.uint32)
    mask = np.ones(num_tokens, dtype=bool)
    mask[list(documents)] = False
    sequence = TokenSequence(ids, mask, np.array(documents, dtype=np.uint32))
    n = int(sequence.target_mask.sum())
    logits = rng.normal(size=(n, vocab)) * 2
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    kept = np.sort(np.argsort(-logp, axis=1)[:, :k], axis=1)
    tails = []
    for temperature in (1.0, 2.0):
        scaled = logits / temperature
        rest = np.exp(scaled) / np.exp(scaled).sum(1, keepdims=True)
        np.put_along_axis(rest, kept, 0, axis=1)
        tails.append(np.log(rest.sum(1)))
    labels = ids[1:][sequence.target_mask[:-1]]
    targets = SparseTargets(
        (1.0, 2.0), np.full(n, k, np.uint32), kept.astype(np.uint32).ravel(),
        np.take_along_axis(logp, kept, 1).astype(np.float32).ravel(), np.stack(tails, 1).astype(np.float32),
        np.zeros(n, np.float32), logp[np.arange(n), labels].astype(np.float32), np.ones(n, np.float32),
    )  # fmt: skip
    made = Codec(codec, vocab, (1.0, 2.0), k)
    return sequence, made.decode(made.encode(targets), n, "item"), targets, made


def decoder_of(codec, temperature=1.0):
    """What TargetDecoder.for_cache makes of a cache with this codec."""
    values, tails = codec.tables()
    column = codec.temperatures.index(temperature)
    return TargetDecoder(
        temperature, column,
        None if values is None else torch.from_numpy(values), None if tails is None else torch.tensor(tails[column]),
    )  # fmt: skip


def test_padding_not_masked():
    """Padding is neither label nor target, and positions run on, so that it is no document of its own."""
    long, short = make_item(9), make_item(5, seed=1)
    batch = collate([Item(long[0], (long[1],)), Item(short[0], (short[1],))])
    assert batch["input_ids"].shape == (2, 9)
    assert (batch["labels"][1, 5:] == IGNORED).all()
    assert not batch["target_mask"][1, 4:].any()
    assert batch["position_ids"][1].tolist() == list(range(9))
    assert int(batch["target_mask"].sum()) == len(long[2]) + len(short[2]) == len(batch["kd0_tails"])


def test_off_by_one_mask():
    """Row t has a target exactly where the label t + 1 is learned; labels stay unshifted, as transformers has them."""
    sequence, compact, _, _ = make_item(10, documents=(0, 6))
    batch = collate([Item(sequence, (compact,))])
    mask, labels = batch["target_mask"][0], batch["labels"][0]
    assert mask[:-1].tolist() == (labels[1:] != IGNORED).tolist()
    assert not mask[5]
    assert not mask[9]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]


def test_a_filler_counts_nothing():
    sequence, compact, _, _ = make_item(8)
    batch = collate([Item(sequence, (compact,)), Item(sequence, counts=False)])
    assert not batch["target_mask"][1].any()
    assert (batch["labels"][1] == IGNORED).all()


@pytest.mark.parametrize("codec", ["packed", "exact"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_device_decode_equals_its_numpy_twin(codec, temperature):
    items = [make_item(9, seed=s, codec=codec) for s in range(3)]
    batch = collate([Item(sequence, (compact,)) for sequence, compact, _, _ in items])
    ours = decoder_of(items[0][3], temperature).decode(batch)
    twins = [compact.expand((1.0, 2.0)).at_temperature(temperature) for _, compact, _, _ in items]
    np.testing.assert_allclose(ours.logprobs.numpy().ravel(), np.concatenate([t[0] for t in twins]), atol=2e-6)
    np.testing.assert_allclose(ours.tail_logprobs.numpy(), np.concatenate([t[1] for t in twins]), atol=1e-6)
    mass = ours.logprobs.exp().sum(1) + ours.tail_logprobs.exp()
    np.testing.assert_allclose(mass.numpy(), 1, atol=1e-6)


def test_ragged_positions_share_a_rectangle():
    """Positions with fewer entries repeat their first id in the slots they do not use."""
    sequence, _, targets, _ = make_item(6, k=3)
    counts = np.array([3, 1, 2, 3, 1], dtype=np.uint32)
    keep = np.concatenate([np.arange(c) + 3 * i for i, c in enumerate(counts)])
    ragged = SparseTargets(
        (1.0, 2.0), counts, targets.token_ids[keep], targets.logprobs[keep], targets.tail_logprobs, targets.logz,
        targets.label_logprobs, targets.entropy,
    )  # fmt: skip
    codec = Codec("exact", 50, (1.0, 2.0), 3)
    batch = collate([Item(sequence, (codec.decode(codec.encode(ragged), 5, "x"),))])
    decoded = TargetDecoder(1.0, 0, None, None).decode(batch)
    assert (decoded.logprobs > -torch.inf).sum(1).tolist() == counts.tolist()
    assert (decoded.token_ids[1] == decoded.token_ids[1, 0]).all()
    assert (decoded.logprobs[1, 1:] == -torch.inf).all()


@given(st.lists(st.integers(0, 6), max_size=12), st.sampled_from([np.uint8, np.int16, np.int32, np.float32]))
def test_a_rectangle_is_its_numpy_twin(sizes, dtype):
    """Every used slot, and in unused ones the first entry; positions without entries may hold anything."""
    sizes, width = np.array(sizes, dtype=np.int32), max([1, *sizes])
    entries = np.arange(1, sizes.sum() + 1).astype(dtype)
    pairs = np.stack([entries, 2 * entries], axis=1)
    given_sizes = None if (sizes == width).all() else torch.from_numpy(sizes)
    slots = torch.arange(width, dtype=torch.int32)
    (found, doubled), used = in_slots(
        given_sizes, slots, len(sizes), [torch.from_numpy(entries), torch.from_numpy(pairs)]
    )
    wanted_used, wanted = in_rectangle(sizes)
    assert found.shape == doubled.shape[:2] == wanted.shape and found.numpy().dtype == dtype
    assert wanted_used.all() if used is None else np.array_equal(used.numpy(), wanted_used)
    some = sizes > 0
    np.testing.assert_array_equal(found.numpy()[some], entries[wanted[some]])
    np.testing.assert_array_equal(doubled.numpy()[some], pairs[wanted[some]])


def drawn_item(codec, seed=0, scheme="hybrid"):
    """Drawn targets at two temperatures, ragged, through a codec."""
    rng = np.random.default_rng(seed)
    sequence, _, top, _ = make_item(9, k=20, seed=seed)
    n = len(top)
    num_entries = rng.integers(2, 6, n).astype(np.uint32)
    keep = np.concatenate([np.sort(rng.choice(20, c, replace=False)) + 20 * i for i, c in enumerate(num_entries)])
    probabilities = np.exp(top.logprobs[keep].astype(np.float64))
    position = np.repeat(np.arange(n), num_entries)
    tail = np.log(1 - np.bincount(position, probabilities, n))
    counts = rng.integers(0, 3, (len(keep), 2)).astype(np.uint16)
    counts[np.cumsum(num_entries) - 1] = 1
    first = np.cumsum(num_entries) - num_entries
    counts[first] = 0 if scheme == "hybrid" else 2
    targets = SparseTargets(
        (1.0, 2.0), num_entries, top.token_ids[keep], top.logprobs[keep],
        np.stack([tail, tail / 2], 1).astype(np.float32), top.logz, top.label_logprobs, top.entropy, counts=counts,
    )  # fmt: skip
    made = Codec(codec, 50, (1.0, 2.0), 20, num_draws=20)
    return sequence, made.decode(made.encode(targets), n, "item"), targets, made


@pytest.mark.parametrize("codec", ["packed", "exact"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("scheme", ["hybrid", "sampled"])
def test_weights_of_draws_equal_their_numpy_twin(codec, temperature, scheme):
    items = [drawn_item(codec, seed, scheme) for seed in range(3)]
    for _, compact, targets, _ in items:
        np.testing.assert_array_equal(compact.counts, targets.counts)
        np.testing.assert_array_equal(compact.token_ids, targets.token_ids)
    batch = collate([Item(sequence, (compact,)) for sequence, compact, _, _ in items])
    ours = decoder_of(items[0][3], temperature).decode(batch)
    used = ours.logprobs > -torch.inf
    weights = (ours.ratios * ours.logprobs.exp())[used].numpy()
    twins = [compact.expand((1.0, 2.0)).weights_at(temperature) for _, compact, _, _ in items]
    np.testing.assert_allclose(weights, np.concatenate(twins), rtol=2e-5, atol=1e-7)
    assert (ours.ratios[~used] == 0).all()


def test_several_teachers_side_by_side():
    """The targets of each teacher travel under its number, and are mixed by weight."""
    first, second = make_item(9, seed=0), make_item(9, seed=0, k=7)
    batch = collate([Item(first[0], (first[1], second[1]))])
    mixed = decode_all([(0.7, decoder_of(first[3])), (0.3, decoder_of(second[3]))], batch)
    assert [(weight, part.token_ids.shape[1]) for weight, part in mixed.parts] == [(0.7, 3), (0.3, 7)]
    assert decode_all([], batch) is None
