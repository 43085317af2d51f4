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
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdcache.evaluate.bootstrap import CONFIDENCE, FloatArray, deviation, resampled_means, with_interval
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
    means = (sums.sum(0) / sizes.sum())[None]
    if len(sizes) >= FEWEST_DOCUMENTS:
        means = np.concatenate([means, resampled_means(sums, sizes, num_resamples)])

    def value(role: str, metric: str) -> FloatArray:
        """``[1 + R]``: as measured, then of each resample."""
        first = roles.index(role) * len(MEASURED)
        own = dict(zip(MEASURED, means[:, first : first + len(MEASURED)].T, strict=True))
        own["perplexity"] = np.exp(np.minimum(own["cross_entropy"], 700.0))
        own["overconfidence"] = own["confidence"] - own["accuracy"]
        found: FloatArray = own[metric]
        return found

    out: dict[str, Any] = {
        "num_documents": len(sizes),
        "num_resamples": num_resamples,
        "confidence": CONFIDENCE,
        "spread": {role: spread for role in roles if (spread := _spread([m for r, m in rows if r == role]))},
        "differences": {},
        "gap": None,
        "kept": {
            metric: with_interval(share(value("student", metric), chance, value("teacher", metric)))
            for metric, chance in (("accuracy", 1 / vocab_size), ("cross_entropy", math.log(vocab_size)))
        },
    }
    if "baseline" in roles:
        end = "full" if "full" in roles else "teacher"
        out["differences"] = {
            metric: with_interval(value("student", metric) - value("baseline", metric)) for metric in COMPARED
        }
        out["gap"] = {"far_end": end} | {
            metric: with_interval(share(value("student", metric), value("baseline", metric), value(end, metric)))
            for metric in GAPS
        }
    return out


def share(of: FloatArray, start: FloatArray | float, end: FloatArray) -> FloatArray:
    """How far ``of`` is on the way from start to end; not a number where there is no way to go."""
    whole = end - start
    going = np.abs(whole) > 1e-9
    return np.where(going, (of - start) / np.where(going, whole, 1.0), np.nan)


def _spread(seeds: Sequence[Metrics]) -> dict[str, Any] | None:
    """Mean and standard deviation over seeds, where there are several; of perplexity the geometric mean."""
    if len(seeds) < 2:
        return None
    values = {metric: [float(getattr(one, metric)) for one in seeds] for metric in SPREAD}
    mean = {metric: statistics.fmean(some) for metric, some in values.items()}
    return {
        "seeds": len(seeds),
        "mean": mean | {"perplexity": math.exp(min(mean["cross_entropy"], 700.0))},
        "deviation": {metric: deviation(some) for metric, some in values.items()},
    }
