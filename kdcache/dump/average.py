"""Other teachers, averaged in: logits of several teachers become one target, with one teacher in memory at a time.

The geometric mean of distributions, normalised, is the softmax of their averaged logits, so it needs all of a position's
logits at once; it cannot be made of truncated targets afterwards. The other teachers run first, each into a ``hidden`` cache
of the same corpus; here their hidden states and output heads stand in for them. (The arithmetic mean needs none of this: it is
a weighted sum of losses at training time.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kdcache.cache.reader import CacheReader, open_cache
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
    """

    reader: CacheReader
    head: OutputHead
    weight: float

    def hidden(self, batch: list[TokenSequence]) -> torch.Tensor:
        """Hidden states ``[N, D]`` of the positions with targets, found by the content of the sequences.

        Raises:
            CacheMismatchError: The cache does not hold a sequence.
        """
        import torch

        found = [self.reader.find(sequence, "whose logits are to be averaged in") for sequence in batch]
        parts = [self.reader[index].targets.hidden for index in found]
        hidden = np.concatenate([part for part in parts if part is not None])
        return torch.from_numpy(hidden).to(self.head.weight.device)


def average_logits(own_CV: torch.Tensor, averaged: Sequence[Averaged], hidden: Sequence[torch.Tensor]) -> torch.Tensor:
    """Weighted sum of logits ``[C, V]``: the running teacher's, with what the others leave of the weight, and theirs.

    Args:
        own_CV: Of the running teacher; given back as it is where nobody is averaged in.
        averaged: The other teachers.
        hidden: ``[C, D]`` of each.
    """
    if not averaged:
        return own_CV
    total = own_CV.float() * (1.0 - sum(one.weight for one in averaged))
    for one, hidden_CD in zip(averaged, hidden, strict=True):
        total += one.weight * one.head.logits(hidden_CD)
    return total


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
    opened = []
    for path, weight in caches.items():
        reader = open_cache(path)
        opened.append(
            Averaged(
                reader,
                OutputHead.from_bytes(reader.head_bytes(), reader.spec.teacher.head_shape).first(vocab_size).to(device),
                weight,
            )
        )
    return opened
