"""Texts of several caches in given shares of tokens: the teacher's answers and real text, a round's rollouts and a replay of earlier ones.

**What is mixed.** Caches over different texts, grouped by who wrote them (``real``, ``teacher``, ``student``) or named by their path. A
token counts where it has a target: shares are of what the student learns from, not of prompts and padding.

**The order.** Each group goes through its sequences in its own permutation, then in another one, and so on, as if alone. A sequence may
come once its group is not ahead of its share: ``tokens of the group before it / share <= tokens of all``. Of those that may, the one comes
that has to be through first, by ``tokens of the group with it / share`` (worst-case fair weighted fair queueing, Bennett and Zhang 1996,
10.1109/INFCOM.1996.497885); of equals the group that is named first. Nothing is drawn at random, and the order depends on caches, shares
and seed alone.

**The bound.** Wherever the order is cut, and however many groups there are, the tokens of each group are no further from its share of all
tokens so far than the longest sequence has: with L tokens in the longest of all and l in the longest of the group, it is ahead by at most
``(1 - share) l`` and behind by at most ``share L + (1 - share) l``, which is at most L.

**An epoch** ends where a group would begin again: it is as long as the first of them lasts. The next epoch goes on where it ended: what a
long group had left comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

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
        """Sequences until a group would begin again."""
        left, turns, length = [len(group.indices) for group in self.groups], self._turns(), 0
        while left[number := next(turns)]:
            left[number] -= 1
            length += 1
        return length

    def order(self, epoch: int) -> IntArray:
        """``[epoch_length]``, the sequences of an epoch."""
        length = self.epoch_length
        turns = np.fromiter(self._turns(), np.int64, (epoch + 1) * length)
        order = np.empty_like(turns)
        for number, group in enumerate(self.groups):
            own = np.flatnonzero(turns == number)
            passes = range(-(-len(own) // len(group.indices)))
            order[own] = np.concatenate([group.indices[:0], *(group.indices[group.permutation(n)] for n in passes)])[
                : len(own)
            ]
        return order[epoch * length :]

    def _turns(self) -> Iterator[int]:
        """The number of the group whose sequence comes next, without end."""
        sizes = [_sizes(group) for group in self.groups]
        # Of each group's next sequence: from when on it may come and when it has to be through, in tokens of all.
        tokens = [next(one) for one in sizes]
        begins = [0.0] * len(tokens)
        ends = [size / group.share for size, group in zip(tokens, self.groups, strict=True)]
        own, total = [0] * len(tokens), 0
        while True:
            now = max(total, min(begins))  # some group is not ahead, but for rounding
            turn = min((end, number) for number, end in enumerate(ends) if begins[number] <= now)[1]
            yield turn
            total += tokens[turn]
            own[turn] += tokens[turn]
            tokens[turn] = next(sizes[turn])
            begins[turn] = own[turn] / self.groups[turn].share
            ends[turn] = (own[turn] + tokens[turn]) / self.groups[turn].share


def _sizes(group: Group) -> Iterator[int]:
    """Tokens of its sequences in their order, pass after pass."""
    for number in count():
        yield from group.num_targets[group.permutation(number)].tolist()


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
