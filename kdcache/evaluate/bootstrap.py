"""How far a difference between two models is a matter of which documents were measured: the paired bootstrap.

Documents are drawn with replacement, the same for all models, and every mean is taken again. Positions of one document hang
together, so that it is documents that are drawn. The draws depend on the seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
CONFIDENCE = 0.95


def resampled_means(sums: FloatArray, sizes: npt.NDArray[np.int64], num_resamples: int, seed: int = 0) -> FloatArray:
    """Means over positions, of documents drawn with replacement. Efron, Annals of Statistics 7 (1979).

    Args:
        sums: ``[D, C]``, sums over the positions of each document, a column a quantity.
        sizes: ``[D]``, positions of each document.
        num_resamples: R.
        seed: Of the draws.

    Returns:
        ``[R, C]``.
    """
    rng = np.random.default_rng(seed)
    out = np.empty((num_resamples, sums.shape[1]))
    for row in range(num_resamples):
        weights = np.bincount(rng.integers(len(sums), size=len(sums)), minlength=len(sums)).astype(np.float64)
        out[row] = weights @ sums / (weights @ sizes)
    return out


def deviation(values: Sequence[float]) -> float:
    """The sample standard deviation of two values or more; not a number where one of them is none, which ``statistics`` does not take."""
    with np.errstate(invalid="ignore"):  # of an infinite one
        return float(np.std(values, ddof=1))


def interval(values: FloatArray) -> tuple[float, float] | None:
    """The middle 95 % of resampled values; None where one of them is not a number."""
    if not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def with_interval(values: FloatArray) -> dict[str, float | None]:
    """A statistic as measured, ``values[0]``, and where it lies over the resamples, the others, where there are any.

    Returns:
        ``value``, ``low``, ``high``; None each where it is not known.
    """
    if not np.isfinite(values[0]):
        return {"value": None, "low": None, "high": None}
    found = interval(values[1:]) if len(values) > 1 else None
    low, high = found if found else (None, None)
    return {"value": float(values[0]), "low": low, "high": high}
