"""What a student wrote, and with which probabilities: rollouts, found again by their content.

``kdcache generate`` with the student as the model leaves a cache whose label logprobs are those of the policy that wrote the text; a dump
of that cache by the teacher holds what the teacher thinks of the same tokens. Training pairs the two: the difference of the two
logprobs is the reward of a token (MiniLLM, 2306.08543), and what the first differs from the student's own logprob now is how stale the
rollout has become.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kdcache.cache.compact import CompactTargets
from kdcache.cache.reader import CacheReader
from kdcache.cache.shard import content_hash
from kdcache.targets import FloatArray, TokenSequence


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One sequence's part of :class:`~kdcache.train.objective.Rollouts`, numpy.

    Attributes:
        logprobs: ``[N]``, of the labels by the student that wrote them; NaN where nobody knows.
        advantages: ``[N]``.
    """

    logprobs: FloatArray
    advantages: FloatArray

    @staticmethod
    def unknown(num_targets: int) -> Rollout:
        """Of text that no student wrote."""
        return Rollout(np.full(num_targets, np.nan, dtype=np.float32), np.zeros(num_targets, dtype=np.float32))


def asked_in_turn(text: CacheReader, written: Sequence[CacheReader]) -> tuple[CacheReader, ...]:
    """Caches of rollouts in the order in which they are asked about a text: those that it was dumped from, then from the last named.

    What a student wrote in two rounds stands in two caches, with another probability in each.
    """
    sources = (text.spec.corpus.digest, text.manifest.content_digest)
    return tuple(sorted(reversed(written), key=lambda one: one.manifest.content_digest not in sources))


def find_rollout(sequence: TokenSequence, targets: CompactTargets | None, written: Sequence[CacheReader]) -> Rollout:
    """What the caches of rollouts know of a sequence.

    Args:
        sequence: Of any cache.
        targets: What the teacher said of it; without them there are no advantages.
        written: Caches that ``kdcache generate`` made with the student; the first that has the sequence counts.
    """
    name = content_hash(sequence)
    for reader in written:
        index = reader.index_of(name)
        if index is not None:
            logprobs = reader.compact(index)[1].label_logprobs
            if targets is None:
                return Rollout(logprobs, np.zeros_like(logprobs))
            starts = sequence.document_starts
            documents = np.searchsorted(starts, np.flatnonzero(sequence.target_mask), side="right")
            return Rollout(logprobs, advantages(targets.label_logprobs - logprobs, documents))
    return Rollout.unknown(int(sequence.target_mask.sum()))


def advantages(rewards: FloatArray, documents: np.ndarray[tuple[int], np.dtype[np.integer]]) -> FloatArray:
    """The mean reward of what comes after each token, 0 after the last: MiniLLM's length-normalised return (2306.08543 eq. 9).

    Equals, in each document, ``[rewards[t + 1:].mean() for t in ...]``.

    Args:
        rewards: ``[N]``, ``log t(label) - log p_rollout(label)``.
        documents: ``[N]``, the number of each token's document, ascending.
    """
    out = np.zeros(len(rewards), dtype=np.float64)
    for document in np.unique(documents):
        (places,) = np.nonzero(documents == document)
        after = np.cumsum(rewards[places][::-1].astype(np.float64))[::-1] - rewards[places]
        out[places] = after / np.maximum(np.arange(len(places))[::-1], 1)
    return out.astype(np.float32)
