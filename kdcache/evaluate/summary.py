"""What several measured models say together: spread over seeds, differences with intervals, shares of the gap and of the teacher.

**Share of the gap** from a student of labels alone (the baseline) to the far end: ``(student - baseline) / (far end - baseline)``, in held-out
cross-entropy as in 2503.16870, and likewise in other metrics. The far end is the student of ``--full`` where there is one, else
the teacher. 0 is what labels alone give, 1 is all there is to win. Below 0 the student is worse than its baseline.

**Share of the teacher kept**: ``(student - chance) / (teacher - chance)``. Chance is a uniform guess over the V tokens: ``1 / V`` right, and
``log V`` nats of cross-entropy.

Intervals are of 95 %, over which documents were measured, the models as they are (the paired bootstrap); the spread over seeds is told apart.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kdcache.evaluate.bootstrap import CONFIDENCE, FloatArray, resampled_means, with_interval
from kdcache.evaluate.metrics import MEASURED, Metrics

GAPS = ("cross_entropy", "forward_kl", "top1_agreement", "accuracy")
COMPARED = ("perplexity", *MEASURED[:-1], "overconfidence")
SPREAD = (*COMPARED, "calibration_error")
FEWEST_DOCUMENTS = 5
Rows = Sequence[tuple[str, Metrics]]


def summarise(rows: Rows, vocab_size: int, num_resamples: int) -> dict[str, Any]:
    """Everything that needs more than one model.

    Args:
        rows: Role and metrics; several of one role are seeds of one recipe. All measured on the same documents.
        vocab_size: V.
        num_resamples: Of the bootstrap.

    Returns:
        ``num_documents``, ``num_resamples``, ``confidence``; ``spread`` by role; ``differences`` by metric, student minus baseline (empty
        without one); ``gap`` (``far_end`` and a share by metric) or None; ``kept``, a share by metric.
    """
    roles = list(dict.fromkeys(role for role, _ in rows))
    sums = np.concatenate(
        [np.mean([metrics.document_sums for role, metrics in rows if role == wanted], axis=0) for wanted in roles],
        axis=1,
    )
    sizes = rows[0][1].document_sizes
    means = sums.sum(0) / sizes.sum()
    resampled = resampled_means(sums, sizes, num_resamples) if len(sizes) >= FEWEST_DOCUMENTS else None

    def value(role: str, metric: str) -> Callable[[FloatArray], FloatArray]:
        first = roles.index(role) * len(MEASURED)

        def of(all_means: FloatArray) -> FloatArray:
            own = all_means[..., first : first + len(MEASURED)]
            if metric == "perplexity":
                return np.exp(np.minimum(own[..., 0], 700.0))
            if metric == "overconfidence":
                return own[..., MEASURED.index("confidence")] - own[..., MEASURED.index("accuracy")]
            found: FloatArray = own[..., MEASURED.index(metric)]
            return found

        return of

    def told(statistic: Callable[[FloatArray], FloatArray]) -> dict[str, Any]:
        return with_interval(statistic, means, resampled)

    found: dict[str, Any] = {
        "num_documents": len(sizes),
        "num_resamples": num_resamples,
        "confidence": CONFIDENCE,
        "spread": {role: spread for role in roles if (spread := _spread([m for r, m in rows if r == role]))},
        "differences": {},
        "gap": None,
        "kept": {
            metric: told(_share(value("student", metric), lambda m, c=chance: np.full(m.shape[:-1], c), value("teacher", metric)))
            for metric, chance in (("accuracy", 1 / vocab_size), ("cross_entropy", math.log(vocab_size)))
        },
    }  # fmt: skip
    if "baseline" in roles:
        far_end = "full" if "full" in roles else "teacher"
        found["differences"] = {
            metric: told(lambda m, s=value("student", metric), b=value("baseline", metric): s(m) - b(m))
            for metric in COMPARED
        }
        found["gap"] = {
            "far_end": far_end,
            **{
                metric: told(_share(value("student", metric), value("baseline", metric), value(far_end, metric)))
                for metric in GAPS
            },
        }
    return found


def _share(
    of: Callable[[FloatArray], FloatArray], start: Callable[[FloatArray], FloatArray], end: Callable[[FloatArray], FloatArray]
) -> Callable[[FloatArray], FloatArray]:  # fmt: skip
    """How far from start to end; not a number where there is no way to go."""

    def share(means: FloatArray) -> FloatArray:
        whole = end(means) - start(means)
        return np.where(np.abs(whole) > 1e-9, (of(means) - start(means)) / whole, np.nan)

    return share


def _spread(seeds: Sequence[Metrics]) -> dict[str, Any] | None:
    """Mean and standard deviation over seeds, where there are several."""
    if len(seeds) < 2:
        return None
    values = {metric: [float(getattr(one, metric)) for one in seeds] for metric in SPREAD}
    return {
        "seeds": len(seeds),
        "mean": {metric: statistics.fmean(some) for metric, some in values.items()},
        "deviation": {metric: statistics.stdev(some) for metric, some in values.items()},
    }
