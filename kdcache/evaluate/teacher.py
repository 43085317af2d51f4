"""The teacher's side of an evaluation: distributions over buckets, out of a cache.

In a ``hidden`` cache a bucket is a token, and everything is exact. In one of kept entries (top_k, top_p) the buckets are
the entries and the tail: a divergence over them is a lower bound of the true one, and an overlap an upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kdcache.cache.reader import CacheReader
from kdcache.errors import CacheMismatchError
from kdcache.heads import OutputHead
from kdcache.targets import SparseTargets, TokenSequence, in_rectangle

CPU_CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS = 1 << 24, 1 << 27


@dataclass(frozen=True, slots=True, eq=False)
class Buckets:
    """What the teacher said at N positions.

    Attributes:
        logprobs: ``[N, W]``. ``-inf`` in buckets that are not used.
        token_ids: ``[N, W - 1]``, tokens of the buckets, the last bucket being all other tokens; None where bucket i is token i.
        used: ``[N, W - 1]`` bool, which of them there are.
    """

    logprobs: torch.Tensor
    token_ids: torch.Tensor | None = None
    used: torch.Tensor | None = None

    def of(self, logprobs: torch.Tensor) -> torch.Tensor:
        """``[N, V]`` logprobs of a model, summed into the same buckets: ``[N, W]``."""
        if self.token_ids is None or self.used is None:
            return logprobs
        entries = logprobs.gather(1, self.token_ids).masked_fill(~self.used, -torch.inf)
        # Unused slots repeat an entry, so that all of them can be struck out.
        tail = logprobs.scatter(1, self.token_ids, -torch.inf).logsumexp(1, keepdim=True)
        return torch.cat([entries, tail], dim=1)

    def top(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logprobs and ids ``[N, number]`` of the most probable tokens."""
        if self.token_ids is None:
            return self.logprobs.topk(number)
        values, slots = self.logprobs[:, :-1].topk(min(number, self.token_ids.shape[1]))
        return values, self.token_ids.gather(1, slots)


@dataclass(frozen=True, slots=True, eq=False)
class Said:
    """One sequence and what the teacher said about it; N positions with a label.

    Attributes:
        sequence: The tokens.
        labels: ``[N]`` int64.
        targets: As the cache has them.
        hidden: ``[N, D]`` on the device, or None.
    """

    sequence: TokenSequence
    labels: torch.Tensor
    targets: SparseTargets
    hidden: torch.Tensor | None


def check_measurable(reader: CacheReader) -> None:
    """Refuse a cache that nothing can be held against.

    Raises:
        CacheMismatchError: The cache is empty, or holds draws: what was not drawn is unknown, and no divergence can be measured.
    """
    if reader.spec.targets.estimator != "buckets":
        raise CacheMismatchError(
            f"{reader.store} holds {reader.spec.targets.scheme} targets: enough to learn from, not to measure a divergence",
            hint="dump the held-out text with --targets hidden, which is exact; top_k and top_p give lower bounds",
        )
    if not len(reader):
        raise CacheMismatchError(f"{reader.store}: the cache holds no sequences", hint="dump a larger --split")


class TeacherStates:
    """A cache, read for evaluation.

    Raises:
        CacheMismatchError: See :func:`check_measurable`.
    """

    def __init__(self, reader: CacheReader, device: str) -> None:
        check_measurable(reader)
        self.reader = reader
        self.device = device
        self.exact = reader.spec.targets.scheme == "hidden"
        self.head = (
            OutputHead.from_bytes(reader.head_bytes(), reader.spec.teacher.head_shape).to(device)
            if self.exact
            else None
        )
        elements = CPU_CHUNK_ELEMENTS if device == "cpu" else GPU_CHUNK_ELEMENTS
        self.chunk = max(16, elements // reader.vocab_size)

    def read(self, index: int) -> Said:
        """A sequence, on the device."""
        row = self.reader[index]
        labels = row.sequence.input_ids[1:][row.sequence.target_mask[:-1]].astype(np.int64)
        hidden = None if row.targets.hidden is None else torch.tensor(row.targets.hidden).to(self.device)
        return Said(row.sequence, torch.from_numpy(labels).to(self.device), row.targets, hidden)

    def buckets(self, said: Said, start: int, stop: int) -> Buckets:
        """Distributions at positions ``start`` to ``stop`` of those with a label."""
        if self.head is not None:
            assert said.hidden is not None, "a hidden cache holds hidden states"
            return Buckets(torch.log_softmax(self.head.logits(said.hidden[start:stop]), dim=1))
        targets, stop = said.targets, min(stop, len(said.targets))
        used, slots = in_rectangle(targets.num_entries[start:stop])
        slots = slots + targets.offsets[start]
        ids = torch.from_numpy(targets.token_ids[slots].astype(np.int64)).to(self.device)
        kept = torch.from_numpy(used).to(self.device)
        entries = torch.from_numpy(targets.logprobs[slots]).to(self.device).masked_fill(~kept, -torch.inf)
        tail = torch.tensor(targets.tail_at(1.0)[start:stop, None]).to(self.device)
        return Buckets(torch.cat([entries, tail], dim=1), ids, kept)
