"""The ids that come up most often in a sequence, renumbered to come first: an order that each row carries for itself.

A text has its topic, and of the 49,152 tokens of a vocabulary a thousand hold half of what a teacher says of it. Their ids, with
how often each comes up by half octaves, take one to two bytes a position, and save ten (``top_k`` 64) to twenty (128). With id
tables (:mod:`kdcache.cache.tables`) this is done to the entries that are in no list, which are the ones that tables say least of.

Where the first ``start`` codes are lists' places, the code of a frequent number is ``start`` plus its place in the order, that of
any other ``start + len(order) + number``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kdcache.cache.jit import compiled
from kdcache.errors import CacheCorruptError
from kdcache.targets import UIntArray

# An id that comes up seldom costs more in the order than it saves.
LEAST_COUNT, MAX_FREQUENT = 8, 4096
# A byte of a gap between two of them that is this large says: so many, and the gap goes on.
GAP_GOES_ON = 255
# The least counts of each half octave.
HALF_OCTAVES = np.array([math.isqrt((1 << i) - 1) + 1 for i in range(1, 63)])


@dataclass(frozen=True, slots=True, eq=False)
class OwnOrder:
    """Frequent numbers of one sequence.

    Attributes:
        numbers: ``[F]`` int64, ascending.
        steps: ``[F]`` uint8, half octaves by which each comes up less often than the most frequent; the order is by them, then by number.
    """

    numbers: npt.NDArray[np.int64]
    steps: npt.NDArray[np.uint8]

    @classmethod
    def count(cls, codes: UIntArray, start: int, num_numbers: int) -> OwnOrder:
        """The order for the codes ``[E]`` of a sequence; those below ``start`` are not counted."""
        if loops := compiled():
            counts = loops.histogram(codes, start, num_numbers)
        else:
            counts = np.bincount(codes[codes >= start] - np.uint32(start) if start else codes)
        frequent = np.flatnonzero(counts >= LEAST_COUNT)
        if len(frequent) > MAX_FREQUENT:
            frequent = np.sort(frequent[np.argsort(-counts[frequent], kind="stable")[:MAX_FREQUENT]])
        octaves = np.searchsorted(HALF_OCTAVES, counts[frequent], side="right")
        return cls(frequent, (octaves.max(initial=0) - octaves).astype(np.uint8))

    @property
    def by_frequency(self) -> npt.NDArray[np.int64]:
        """``[F]``: the numbers by their place."""
        return self.numbers[np.argsort(self.steps, kind="stable")]

    def renumber(self, codes: UIntArray, start: int, num_numbers: int) -> UIntArray:
        """``[E]``: what each code becomes, those below ``start`` themselves."""
        first = start + len(self.numbers)
        places = np.arange(len(self.numbers), first + num_numbers, dtype=np.uint32)
        places[:start] = np.arange(start)
        places[start + self.by_frequency] = np.arange(start, first)
        if loops := compiled():
            return np.asarray(loops.renumber(codes, places))
        return places.take(codes)

    def undo(self, codes: UIntArray, start: int, num_numbers: int, where: str) -> UIntArray:
        """``[E]``: what each code was.

        Raises:
            CacheCorruptError: A code that stands for nothing.
        """
        frequent, most = self.by_frequency.astype(np.uint32), start + len(self.numbers) + num_numbers
        if (loops := compiled()) and not start:
            before, sound = loops.undo_order(codes, frequent, num_numbers)
        elif sound := int(codes.max(initial=0)) < most:
            rest = np.arange(start, start + num_numbers, dtype=np.uint32)
            before = np.concatenate([np.arange(start, dtype=np.uint32), frequent + np.uint32(start), rest]).take(codes)
        if not sound:
            raise CacheCorruptError(f"{where}: code {codes.max()} of {most} stands for no token id")
        return np.asarray(before, dtype=np.uint32)

    def gaps(self) -> npt.NDArray[np.uint8]:
        """The numbers as bytes: ``number - previous - 1``, the first counted from -1; ``GAP_GOES_ON`` as often as it is in the gap."""
        gaps = np.diff(self.numbers, prepend=-1) - 1
        more, last = np.divmod(gaps, GAP_GOES_ON)
        out = np.full(len(gaps) + int(more.sum()), GAP_GOES_ON, dtype=np.uint8)
        out[np.cumsum(more + 1) - 1] = last
        return out

    @classmethod
    def of(cls, gaps: npt.NDArray[np.uint8], steps: npt.NDArray[np.uint8], num_numbers: int, where: str) -> OwnOrder:
        """Undo :meth:`gaps`.

        Raises:
            CacheCorruptError: A number past the last.
        """
        ends = gaps < GAP_GOES_ON
        numbers = np.cumsum(gaps, dtype=np.int64)[ends] + np.arange(int(ends.sum()))
        if len(numbers) and int(numbers[-1]) >= num_numbers:
            raise CacheCorruptError(f"{where}, frequent_gaps: number {numbers[-1]} of {num_numbers}")
        return cls(numbers, steps)


NO_ORDER = OwnOrder(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint8))


def most_gap_bytes(num_numbers: int) -> int:
    """Bytes that :meth:`OwnOrder.gaps` takes at most."""
    return MAX_FREQUENT + num_numbers // GAP_GOES_ON + 1
