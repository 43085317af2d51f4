"""Drawing against one float64 cumulative sum, its unbiasedness, and what the random numbers depend on."""

import numpy as np
import pytest
import torch

from kdcache.dump.draw import BLOCK, count_draws, draw, position_uniforms
from kdcache.dump.select import select
from kdcache.specs import TargetSpec
from kdcache.targets import SparseTargets


def none(n):
    return torch.empty(n, 0, dtype=torch.int64)


def spec(scheme="sampled", num_draws=7, k=0, temperatures=(1.0,), seed=0):
    return TargetSpec(scheme=scheme, k=k, temperatures=temperatures, num_draws=num_draws, seed=seed)


def logits(n, vocab_size, seed=0, spread=3.0):
    return torch.randn(n, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def uniforms(n, width, seed=0):
    return torch.rand(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(z, points, temperature=1.0, exact=()):
    """What draw equals: the first token whose cumulative probability is above the point."""
    t = torch.softmax(z.double() / temperature, dim=1)
    for row, ids in enumerate(exact):
        t[row, ids] = 0
    ends = t.cumsum(1)
    return torch.searchsorted(ends, points * ends[:, -1:], right=True)


@pytest.mark.parametrize("vocab_size", [3, BLOCK, BLOCK + 1, 5000])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_equals_one_cumulative_sum(vocab_size, temperature):
    z, u = logits(100, vocab_size), uniforms(100, 7)
    found = draw(z, u, spec(), temperature, none(100))
    assert (found == plain(z, u, temperature)).float().mean() > 0.999  # a point on a border may fall to either side


def test_systematic_draws_are_the_points_of_a_comb():
    z, u = logits(50, 900), uniforms(50, 1)
    found = draw(z, u, spec("systematic", 25), 1.0, none(50))
    comb = (u + torch.arange(25)) / 25
    assert (found == plain(z, comb)).float().mean() > 0.999


def test_systematic_counts_are_floor_or_ceiling():
    z = logits(200, 700)
    found = draw(z, uniforms(200, 1), spec("systematic", 40), 1.0, none(200))
    counts = torch.zeros(200, 700, dtype=torch.float64).scatter_add_(1, found, torch.ones(200, 40, dtype=torch.float64))
    expected = 40 * torch.softmax(z.double(), 1)
    assert (counts >= (expected - 1e-4).floor()).all()
    assert (counts <= (expected + 1e-4).ceil()).all()


@pytest.mark.parametrize("edge", [0.0, 1.0 - 2**-53])
def test_the_ends_of_the_unit_interval_fall_on_tokens_with_mass(edge):
    z = torch.full((4, 1000), -torch.inf)
    z[:, [3, 500]] = 0.0
    found = draw(z, torch.full((4, 2), edge, dtype=torch.float64), spec(num_draws=2), 1.0, none(4))
    assert set(found.flatten().tolist()) == ({3} if edge == 0 else {500})


def test_exact_tokens_are_never_drawn():
    z = logits(60, 300)
    exact = z.topk(20).indices
    found = draw(z, uniforms(60, 1), spec("hybrid", 30, k=20), 1.0, exact)
    assert not (found[:, :, None] == exact[:, None, :]).any()
    comb = (uniforms(60, 1) + torch.arange(30)) / 30
    assert (found == plain(z, comb, exact=exact)).float().mean() > 0.999


def test_nothing_left_to_draw_is_said():
    z = torch.full((2, 10), -torch.inf)
    z[:, 1] = 0.0
    found = draw(z, uniforms(2, 1), spec("hybrid", 5, k=1), 1.0, torch.tensor([[1], [1]]))
    assert (found == -1).all()
    number, ids, counts = count_draws(torch.tensor([[1], [1]]), found[:, None])
    assert number.tolist() == [1, 1]
    assert ids.tolist() == [[1], [1]]
    assert counts.sum() == 0


def test_count_draws_by_hand():
    exact = torch.tensor([[5], [9]])
    drawn = torch.tensor([[[7, 2, 7], [2, 2, 8]], [[1, 1, 1], [1, 1, 1]]])
    number, ids, counts = count_draws(exact, drawn)
    assert number.tolist() == [4, 2]
    assert ids[0].tolist() == [2, 5, 7, 8]
    assert counts[0].tolist() == [[1, 2], [0, 0], [2, 0], [0, 1]]
    assert ids[1, :2].tolist() == [1, 9]
    assert counts[1, :2].tolist() == [[3, 3], [0, 0]]
    assert (ids[1, 2:] == 1).all(), "free slots repeat the first id"


# --- through select ---------------------------------------------------------------------------------------------------


def targets_of(z, spec, seed=0):
    n = len(z)
    width = spec.num_draws if spec.scheme == "sampled" else 1
    u = uniforms(n * len(spec.temperatures), width, seed).view(n, len(spec.temperatures), width)
    found = select(z, z.argmax(1), spec, u)
    used = torch.arange(found.token_ids.shape[1]) < found.num_entries[:, None]
    return SparseTargets(
        spec.temperatures,
        found.num_entries.numpy().astype(np.uint32),
        found.token_ids[used].numpy().astype(np.uint32),
        found.logprobs[used].numpy(),
        found.tail_logprobs.numpy(),
        found.logz.numpy(),
        found.label_logprobs.numpy(),
        found.entropy.numpy(),
        counts=found.counts[used].numpy().astype(np.uint16),
    )


SCHEMES = [spec("sampled", 12, 0, (1.0, 2.0)), spec("systematic", 12, 0, (1.0, 2.0)), spec("hybrid", 8, 5, (1.0, 2.0))]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.scheme)
def test_entries_and_tails_are_exact_at_every_temperature(scheme):
    z = logits(40, 400)
    targets = targets_of(z, scheme)
    position = np.repeat(np.arange(40), targets.num_entries)
    for temperature in scheme.temperatures:
        logp = torch.log_softmax(z.double() / temperature, 1).numpy()
        entries, tail = targets.at_temperature(temperature)
        np.testing.assert_allclose(entries, logp[position, targets.token_ids], atol=2e-5)
        np.testing.assert_allclose(np.exp(tail) + np.bincount(position, np.exp(entries.astype(float))), 1, atol=1e-5)
    np.testing.assert_allclose(
        targets.entropy, -(np.exp(lp := torch.log_softmax(z.double(), 1).numpy()) * lp).sum(1), atol=1e-4
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.scheme)
def test_weights_are_unbiased(scheme):
    """E[tau] = t over the whole vocabulary, at every declared temperature: within 5 standard errors of the mean."""
    z = logits(1, 30, spread=1.5).repeat(20_000, 1)
    targets = targets_of(z, scheme)
    for temperature in scheme.temperatures:
        weights = targets.weights_at(temperature).astype(np.float64)
        sums = np.bincount(targets.token_ids, weights, 30)
        squares = np.bincount(targets.token_ids, weights**2, 30)
        mean = sums / 20_000
        error = np.sqrt(np.maximum(squares / 20_000 - mean**2, 1e-12) / 20_000)
        t = torch.softmax(z[0].double() / temperature, 0).numpy()
        assert (np.abs(mean - t) < 5 * error + 1e-5).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.scheme)
def test_weights_of_a_position(scheme):
    targets = targets_of(logits(30, 400), scheme)
    position = np.repeat(np.arange(30), targets.num_entries)
    for column, temperature in enumerate(scheme.temperatures):
        weights = targets.weights_at(temperature)
        np.testing.assert_allclose(np.bincount(position, weights), 1, atol=2e-5)
        if scheme.scheme != "hybrid":
            np.testing.assert_allclose(weights, targets.counts[:, column] / scheme.num_draws, atol=1e-6)
        else:
            exact = ~targets.counts.any(1)
            assert exact.sum() == 5 * 30
            np.testing.assert_allclose(weights[exact], np.exp(targets.at_temperature(temperature)[0][exact]), rtol=1e-5)


def test_systematic_has_a_fraction_of_the_variance():
    """Mean squared error of tau against t: at most 0.4 of independent draws, on peaked distributions with long tails."""
    z = logits(2000, 500, spread=2.5)
    t = torch.softmax(z.double(), 1).numpy()

    def error(scheme):
        targets = targets_of(z, scheme)
        dense = np.zeros_like(t)
        dense[np.repeat(np.arange(2000), targets.num_entries), targets.token_ids] = targets.weights_at(1.0)
        return ((dense - t) ** 2).sum()

    assert error(spec("systematic", 50)) < 0.4 * error(spec("sampled", 50))


# --- random numbers ---------------------------------------------------------------------------------------------------


def test_sampling_seeded_per_sequence():
    """The numbers of a position depend on seed, sequence and position, and on nothing else."""
    one = spec("sampled", 5, temperatures=(1.0, 2.0))
    everywhere = np.ones(20, dtype=bool)
    some = np.zeros(20, dtype=bool)
    some[[3, 17]] = True
    whole = position_uniforms(one, 7, everywhere)
    assert whole.shape == (20, 2, 5)
    np.testing.assert_array_equal(position_uniforms(one, 7, some), whole[[3, 17]])
    np.testing.assert_array_equal(position_uniforms(one, 7, everywhere[:11]), whole[:11])
    assert not np.isin(position_uniforms(one, 8, everywhere), whole).any()
    assert not np.isin(
        position_uniforms(spec("sampled", 5, temperatures=(1.0, 2.0), seed=1), 7, everywhere), whole
    ).any()
    assert len(np.unique(whole)) == whole.size
