"""Intervals against every possible resample, and what shares mean."""

import itertools

import numpy as np
import pytest

from kdcache.evaluate.bootstrap import interval, resampled_means, with_interval
from kdcache.evaluate.metrics import MEASURED, Metrics
from kdcache.evaluate.summary import share, summarise

KL, CE = MEASURED.index("forward_kl"), MEASURED.index("cross_entropy")


def metrics(sums, sizes, **known):
    means = sums.sum(0) / sizes.sum()
    named = {name: float(value) for name, value in zip(MEASURED, means, strict=True) if name != "confidence"}
    return Metrics("m", 1, document_sums=sums, document_sizes=sizes, **named | known)


def test_resampling_finds_what_all_resamples_give():
    rng = np.random.default_rng(3)
    sizes = np.array([3, 40, 7, 12, 25])
    sums = rng.gamma(2.0, size=(5, 2)) * sizes[:, None]
    every = np.array([
        sums[list(drawn)].sum(0) / sizes[list(drawn)].sum() for drawn in itertools.product(range(5), repeat=5)
    ])  # fmt: skip
    found = resampled_means(sums, sizes, 40_000)
    difference, wanted = found[:, 0] - found[:, 1], every[:, 0] - every[:, 1]
    assert difference.mean() == pytest.approx(wanted.mean(), abs=0.02 * wanted.std())
    assert difference.std() == pytest.approx(wanted.std(), rel=0.02)
    assert interval(difference) == pytest.approx(np.quantile(wanted, [0.025, 0.975]), abs=0.05 * wanted.std())
    # Pairing is what makes it narrow: models drawn apart spread more where documents move them together.
    together = np.stack([sums[:, 0], sums[:, 0] + 0.1 * sizes], axis=1)
    paired = resampled_means(together, sizes, 200)
    assert np.ptp(paired[:, 1] - paired[:, 0]) < 1e-12 < paired[:, 0].std()


def test_the_same_seed_draws_the_same():
    sums, sizes = np.arange(20.0).reshape(10, 2), np.full(10, 2)
    assert (resampled_means(sums, sizes, 50) == resampled_means(sums, sizes, 50)).all()
    assert (resampled_means(sums, sizes, 50) != resampled_means(sums, sizes, 50, seed=1)).any()


def test_what_is_not_a_number_is_none():
    assert with_interval(np.array([np.nan, 1.0])) == {"value": None, "low": None, "high": None}
    assert with_interval(np.array([0.5])) == {"value": 0.5, "low": None, "high": None}
    assert with_interval(np.array([0.5, np.nan, 1.0])) == {"value": 0.5, "low": None, "high": None}


@pytest.mark.parametrize(("of", "start", "end", "wanted"), [(2, 3, 1, 0.5), (4, 3, 1, -0.5), (1, 3, 1, 1), (0.3, 0.1, 0.5, 0.5)])  # fmt: skip
def test_share(of, start, end, wanted):
    assert share(np.array([of]), start, np.array([end]))[0] == pytest.approx(wanted)


def test_no_share_without_a_way_to_go():
    assert np.isnan(share(np.array([2.0]), 1.0, np.array([1.0]))[0])


def simple(cross_entropy, kl, accuracy, sizes, wobble=0.0):
    sums = np.zeros((len(sizes), len(MEASURED)))
    values = {"cross_entropy": cross_entropy, "forward_kl": kl, "accuracy": accuracy, "confidence": accuracy}
    for name, value in values.items():
        sums[:, MEASURED.index(name)] = value * sizes * (1 + wobble * np.linspace(-1, 1, len(sizes)))
    return metrics(sums, sizes)


def test_summary_of_known_numbers():
    sizes = np.full(8, 10)
    rows = [
        ("teacher", simple(1.0, 0.0, 0.6, sizes)),
        ("student", simple(1.9, 0.5, 0.41, sizes)),
        ("student", simple(2.1, 0.7, 0.39, sizes)),
        ("baseline", simple(3.0, 2.0, 0.2, sizes)),
    ]
    found = summarise(rows, 100, 200)
    assert found["gap"]["far_end"] == "teacher"
    assert found["gap"]["cross_entropy"]["value"] == pytest.approx((2.0 - 3.0) / (1.0 - 3.0))
    assert found["gap"]["forward_kl"]["value"] == pytest.approx(1 - 0.6 / 2.0)
    assert found["kept"]["accuracy"]["value"] == pytest.approx((0.4 - 0.01) / (0.6 - 0.01))
    assert found["kept"]["cross_entropy"]["value"] == pytest.approx((np.log(100) - 2.0) / (np.log(100) - 1.0))
    told = found["differences"]["perplexity"]
    assert told["value"] == pytest.approx(np.exp(2.0) - np.exp(3.0))
    assert told["low"] == pytest.approx(told["high"]), "all documents alike"
    assert found["spread"]["student"]["mean"]["cross_entropy"] == pytest.approx(2.0)
    assert found["spread"]["student"]["deviation"]["cross_entropy"] == pytest.approx(0.2 / np.sqrt(2))
    assert "baseline" not in found["spread"]
    full = summarise([*rows, ("full", simple(1.5, 0.2, 0.5, sizes))], 100, 200)
    assert full["gap"]["far_end"] == "full"
    assert full["gap"]["cross_entropy"]["value"] == pytest.approx((2.0 - 3.0) / (1.5 - 3.0))


def test_few_documents_have_no_interval_and_no_baseline_no_gap():
    found = summarise([("teacher", simple(1.0, 0.0, 0.6, np.full(3, 10))), ("student", simple(2.0, 1.0, 0.4, np.full(3, 10)))], 100, 200)  # fmt: skip
    assert found["gap"] is None
    assert found["differences"] == {}
    assert found["kept"]["accuracy"]["low"] is None


def test_an_interval_holds_its_value_where_documents_differ():
    sizes = np.arange(5, 35)
    rows = [("teacher", simple(1.0, 0.0, 0.6, sizes)), ("student", simple(2.0, 0.5, 0.4, sizes, 0.3)), ("baseline", simple(3.0, 1.0, 0.3, sizes, -0.3))]  # fmt: skip
    told = summarise(rows, 100, 500)["differences"]["cross_entropy"]
    assert told["low"] < told["value"] < told["high"]
