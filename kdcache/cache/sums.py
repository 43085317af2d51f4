"""What a commit says of its shard, summed while the shard is made; the same bits whatever the order of batches."""

from __future__ import annotations

import logging

import numpy as np

from kdcache.cache.codec import Codec
from kdcache.cache.columns import Frames
from kdcache.cache.manifest import ShardStats
from kdcache.targets import SparseTargets, TokenSequence, kl_of_stored

logger = logging.getLogger(__name__)

# The codec's error is measured on every eighth sequence.
KL_EVERY = 8


class ShardSums:
    """Statistics of a shard, summed in the order of its sequences whatever the order in which they come."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[int, int, int, float, float, float]] = {}
        self._errors: dict[int, tuple[int, float]] = {}

    def add(self, index: int, sequence: TokenSequence, targets: SparseTargets) -> None:
        """Count a sequence in."""
        self._rows[index] = (
            len(sequence),
            len(targets),
            len(targets.token_ids),
            float(np.exp(targets.tail_logprobs[:, 0].astype(np.float64)).sum()),
            float(targets.entropy.sum(dtype=np.float64)),
            float(-targets.label_logprobs.sum(dtype=np.float64)),
        )

    def add_error(
        self, index: int, sequence: TokenSequence, targets: SparseTargets, codec: Codec, frames: Frames
    ) -> None:
        """Measure what storing a sequence costs, if it is one of the sample. Counts of draws lose nothing."""
        contexts = sequence.contexts
        if index % KL_EVERY == 0 and codec.name != "exact" and not codec.frequencies:
            stored = codec.decode(frames, len(targets), f"sequence {index}", contexts).expand(codec.temperatures)
            self._errors[index] = (len(targets), float(kl_of_stored(targets, stored).sum()))

    def total(
        self, *, num_rows: int, num_skipped: int, num_truncated: int, num_split: int, **dropped: int
    ) -> ShardStats:
        """Statistics for the commit, with what became of the corpus rows, and of answers (``num_answers_*``)."""
        columns = list(zip(*(self._rows[index] for index in sorted(self._rows)), strict=True)) or [()] * 6
        errors = [self._errors[index] for index in sorted(self._errors)]
        return ShardStats(
            num_rows=num_rows,
            num_rows_skipped=num_skipped,
            num_rows_truncated=num_truncated,
            num_rows_split=num_split,
            num_sequences=len(self._rows),
            num_positions=sum(columns[0]),
            num_targets=sum(columns[1]),
            num_entries=sum(columns[2]),
            sum_tail_mass=sum(columns[3]),
            sum_entropy=sum(columns[4]),
            sum_label_nll=sum(columns[5]),
            num_kl_targets=sum(number for number, _ in errors),
            sum_codec_kl=sum(kl for _, kl in errors),
            **dropped,
        )


# The declared error is a mean over the cache; a shard alone may lie a little above it.
SHARD_FACTOR = 1.5


def warn_about_error(stats: ShardStats, max_kl: float, where: str, *, factor: float = 1.0) -> None:
    """Say so where stored targets are, on average, further from what the teacher said than ``factor`` times what is declared."""
    mean = stats.sum_codec_kl / max(stats.num_kl_targets, 1)
    if mean > factor * max_kl:
        logger.warning(
            "%s: storing costs %.1e nats a position, the codec declares %.0e; --quality high or --codec exact costs less",
            where, mean, max_kl,
        )  # fmt: skip
