"""Other teachers, averaged in: logits of several teachers become one target, with one teacher in memory at a time.

The geometric mean of distributions, normalised, is the softmax of their averaged logits, so it needs all of a position's
logits at once; it cannot be made of truncated targets afterwards. The other teachers run first, each into a ``hidden`` cache
of the same corpus; here their hidden states and output heads stand in for them. (The arithmetic mean needs none of this: it is
a weighted sum of losses at training time.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kdcache.cache.reader import CacheReader, open_cache
from kdcache.cache.shard import content_hash
from kdcache.errors import CacheMismatchError
from kdcache.heads import OutputHead
from kdcache.specs import AveragedSpec, TokenizerSpec

if TYPE_CHECKING:
    import torch

    from kdcache.targets import TokenSequence


@dataclass(frozen=True, slots=True, eq=False)
class Averaged:
    """A teacher that has been dumped, as a source of logits.

    Attributes:
        reader: Its ``hidden`` cache.
        head: Its output head, over the cache's vocabulary.
        weight: Of its logits.
        own_weight: Of the teacher that is running.
    """

    reader: CacheReader
    head: OutputHead
    weight: float
    own_weight: float

    def hidden(self, batch: list[TokenSequence]) -> torch.Tensor:
        """Hidden states ``[N, D]`` of the positions with targets, found by the content of the sequences.

        Raises:
            CacheMismatchError: The cache does not hold a sequence.
        """
        import torch

        parts = []
        for sequence in batch:
            index = self.reader.index_of(content_hash(sequence))
            if index is None:
                raise CacheMismatchError(
                    f"{self.reader.store}: a sequence of this corpus ({len(sequence)} tokens, content hash "
                    f"{content_hash(sequence):016x}) is not in the cache whose logits are to be averaged in",
                    hint="dump both teachers over the same dataset with the same --seq-len and packing",
                )
            hidden = self.reader[index].targets.hidden
            assert hidden is not None, "a hidden cache holds hidden states"
            parts.append(hidden)
        return torch.from_numpy(np.concatenate(parts)).to(self.head.weight.device)

    def add_to(self, logits_CV: torch.Tensor, hidden_CD: torch.Tensor, *, first: bool) -> torch.Tensor:
        """Weighted logits so far plus this teacher's; the running teacher's own are weighted by the first."""
        own = logits_CV.float() * self.own_weight if first else logits_CV
        return own + self.weight * self.head.logits(hidden_CD)[:, : own.shape[1]]


def describe_averaged(caches: dict[str, float], tokenizer: TokenizerSpec) -> tuple[AveragedSpec, ...]:
    """What the plan says about them.

    Raises:
        CacheMismatchError: Not a ``hidden`` cache, or one of another tokenizer.
    """
    described = []
    for path, weight in caches.items():
        spec = open_cache(path).spec
        if spec.targets.scheme != "hidden":
            raise CacheMismatchError(
                f"{path} holds {spec.targets.scheme} targets; averaging logits needs all of them",
                hint="dump that teacher with --targets hidden",
            )
        if spec.tokenizer.digest != tokenizer.digest:
            raise CacheMismatchError(
                f"{path} was made with another tokenizer: {spec.tokenizer.digest[:12]}, this teacher has {tokenizer.digest[:12]}"
            )
        described.append(AveragedSpec(fingerprint=spec.fingerprint, weight=weight))
    return tuple(described)


def open_averaged(caches: dict[str, float], vocab_size: int, device: str) -> list[Averaged]:
    """The other teachers, their heads on the device of this one."""
    own_weight = 1.0 - sum(caches.values())
    opened = []
    for path, weight in caches.items():
        reader = open_cache(path)
        head = OutputHead.from_bytes(reader.head_bytes()).first(vocab_size).to(device)
        opened.append(Averaged(reader, head, weight, own_weight))
    return opened
