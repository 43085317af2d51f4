"""How far a difference between two models is a matter of which documents were measured: the paired bootstrap.

Documents are drawn with replacement, the same for all models, and every mean is taken again. Positions of one document hang
together, so that it is documents that are drawn. The draws depend on the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def interval(values: FloatArray) -> tuple[float, float] | None:
    """The middle 95 % of resampled values; None where one of them is not a number."""
    if not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def with_interval(
    statistic: Callable[[FloatArray], FloatArray], means: FloatArray, resampled: FloatArray | None
) -> dict[str, Any]:
    """A statistic of means, and where it lies over the resamples.

    Args:
        statistic: ``[..., C]`` to ``[...]``.
        means: ``[C]``, of what was measured.
        resampled: ``[R, C]``, or None where there are too few documents.

    Returns:
        ``value``, ``low``, ``high``; None each where it is not known.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(means))
        found = None if resampled is None else interval(statistic(resampled))
    if not np.isfinite(value):
        return {"value": None, "low": None, "high": None}
    return {"value": value, "low": found[0] if found else None, "high": found[1] if found else None}
