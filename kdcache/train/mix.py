"""Texts of several caches in given shares of tokens: the teacher's answers and real text, a round's rollouts and a replay of earlier ones.

**What is mixed.** Caches over different texts, grouped by who wrote them (``real``, ``teacher``, ``student``) or named by their path. A
token counts where it has a target: shares are of what the student learns from, not of prompts and padding.

**The order.** Each group goes through its sequences in its own permutation, then in another one, and so on, as if alone. The sequence
that comes next is the one whose group is furthest behind its share (weighted fair queueing, by the tokens before it divided by the
share). So wherever the order is cut, no group is further from its share than one sequence; nothing is drawn at random, and the order
depends on caches, shares and seed alone.

**An epoch** is as long as the first of the groups lasts. The next epoch goes on where it ended: what a long group had left comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kdcache.cache.reader import CacheReader
from kdcache.cache.store import open_store
from kdcache.errors import ConfigError

IntArray = npt.NDArray[np.int64]
KINDS = ("real", "teacher", "student")


def kind_of_text(reader: CacheReader) -> str:
    """Who wrote a cache's text: ``teacher`` where the model that its targets are of did, ``student`` where another one did, else ``real``."""
    spec = reader.spec
    if spec.generation is not None:
        return "teacher"
    if spec.corpus.written_by is None:
        return "real"
    return "teacher" if spec.corpus.written_by == spec.teacher.digest else "student"


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Sequences that share a share.

    Attributes:
        name: A kind of text, or the path of a cache.
        share: Of all tokens, 0 to 1.
        indices: ``[S]``, of its sequences in the whole dataset.
        num_targets: ``[S]``, tokens of each that have a target.
        permutation: ``pass number -> [S]``.
    """

    name: str
    share: float
    indices: IntArray
    num_targets: IntArray
    permutation: Callable[[int], IntArray]


@dataclass(frozen=True, slots=True, eq=False)
class Mix:
    """An order in which the tokens of each group have their share.

    Attributes:
        groups: In the order in which they win ties; none is empty.
    """

    groups: tuple[Group, ...]

    @property
    def epoch_length(self) -> int:
        """Sequences until the first group is through."""
        first_end = min(int(group.num_targets.sum()) / group.share for group in self.groups)
        return sum(int((_begins(group, 1)[1] < first_end).sum()) for group in self.groups)

    def order(self, epoch: int) -> IntArray:
        """``[epoch_length]``, the sequences of an epoch."""
        length = self.epoch_length
        first, stop = epoch * length, (epoch + 1) * length
        passes = [1] * len(self.groups)
        while True:
            lists = [_begins(group, number) for group, number in zip(self.groups, passes, strict=True)]
            # From the end of the first list on the others would come without it.
            ends = [number * int(g.num_targets.sum()) / g.share for g, number in zip(self.groups, passes, strict=True)]
            listed = np.concatenate([times for _, times in lists])
            if int((listed < min(ends)).sum()) >= stop:
                break
            passes[int(np.argmin(ends))] *= 2
        by_time = np.argsort(listed, kind="stable")[first:stop]
        order: IntArray = np.concatenate([indices for indices, _ in lists])[by_time]
        return order


def _begins(group: Group, num_passes: int) -> tuple[IntArray, npt.NDArray[np.float64]]:
    """Sequences of so many passes in their order, and when each is due: the tokens before it, divided by the share."""
    order = np.concatenate([group.permutation(number) for number in range(num_passes)])
    tokens = group.num_targets[order]
    return group.indices[order], (np.cumsum(tokens) - tokens) / group.share


def group_caches(mix: Mapping[str, float], caches: Sequence[CacheReader]) -> dict[str, list[int]]:
    """Which caches, by number, belong to each name of a mix.

    Raises:
        ConfigError: A name without a cache, or a cache without a name.
    """
    groups: dict[str, list[int]] = {name: [] for name in mix}
    paths = {str(open_store(name)): name for name in mix if name not in KINDS}
    for number, reader in enumerate(caches):
        kind = kind_of_text(reader)
        name = paths.get(str(reader.store), kind)
        if name not in groups:
            raise ConfigError(
                f"--mix gives no share to {reader.store}, whose text is of the kind {kind}; found {', '.join(mix)}",
                hint=f"add {kind}:SHARE or {reader.store}:SHARE",
            )
        groups[name].append(number)
    for name, members in groups.items():
        if not members:
            have = ", ".join(f"{reader.store} ({kind_of_text(reader)})" for reader in caches)
            raise ConfigError(
                f"--mix names {name!r}, and no cache of that name or kind is there; found {have}",
                hint=f"kinds of text are {', '.join(KINDS)}; a cache can also be named by its path",
            )
    return groups


def describe_group(group: Group, first_epoch: IntArray) -> str:
    """Its share, and how much of it an epoch takes."""
    taken = int(np.isin(first_epoch, group.indices).sum())
    tokens = int(group.num_targets.sum())
    return f"{group.share:.1%} of the tokens from {group.name}: an epoch takes {taken:,} of {len(group.indices):,} sequences ({tokens:,} tokens in all)"


def count_targets(reader: CacheReader) -> IntArray:
    """``[sequences]``, tokens of each that have a target."""
    return np.array([int(reader.tokens(index).target_mask.sum()) for index in range(len(reader))], dtype=np.int64)
