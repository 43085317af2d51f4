"""Targets between disk and device: small integers, and the tables that turn them into logprobs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kdcache.cache.limits import enough_memory
from kdcache.cache.tables import ascending
from kdcache.errors import CacheCorruptError
from kdcache.targets import CountArray, FloatArray, SparseTargets, UIntArray, rescale_entries

# Of float32 logprobs over a large vocabulary, amply.
MASS_ROUNDING = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class CompactTargets:
    """Targets of N positions as they come out of the frames, before any logarithm: cheap to move, cheap to hold.

    Attributes:
        num_entries: ``[N]``.
        token_ids: ``[E]``.
        values: ``[E]`` float32 logprobs, or uint8 indices into ``value_table``.
        value_table: ``[256]`` float32, or None where ``values`` are logprobs already (not normalised, of frequencies).
        tails: ``[N, num_temperatures]`` float32 log tail masses, or uint8 indices into ``tail_table``.
        tail_table: ``[num_temperatures, 256]`` float32 or None.
        logz: ``[N]`` float32.
        label_logprobs: ``[N]`` float32.
        entropy: ``[N]`` float32.
        hidden: ``[N, D]`` float32, or uint16 holding bfloat16 bits, or None.
        counts: ``[E, num_temperatures]`` uint16, draws of each entry, or None.
        ascending: Whether token ids ascend inside a position; those that were renumbered come in the order of their codes.
        frequencies: As in :class:`~kdcache.targets.SparseTargets`.
    """

    num_entries: UIntArray
    token_ids: UIntArray
    values: FloatArray | npt.NDArray[np.uint8]
    value_table: FloatArray | None
    tails: FloatArray | npt.NDArray[np.uint8]
    tail_table: FloatArray | None
    logz: FloatArray
    label_logprobs: FloatArray
    entropy: FloatArray
    hidden: FloatArray | npt.NDArray[np.uint16] | None = None
    counts: CountArray | None = None
    ascending: bool = True
    frequencies: bool = False

    def expand(self, temperatures: tuple[float, ...]) -> SparseTargets:
        """Integers to logprobs, the plain numpy form of what ``kdcache.train`` does on the device; ids ascend.

        Raises:
            CacheCorruptError: An id stands twice at a position, or the entries have more mass than the tail leaves.
        """
        with enough_memory(f"targets of {len(self.num_entries)} positions"):
            return self._expand(temperatures)

    def _expand(self, temperatures: tuple[float, ...]) -> SparseTargets:
        tails = (
            self.tails
            if self.tail_table is None
            else np.take_along_axis(self.tail_table.T, self.tails.astype(np.intp), axis=0)
        )
        tails = np.asarray(tails, dtype=np.float32)
        logprobs = np.asarray(
            self.values if self.value_table is None else self.value_table[self.values], dtype=np.float32
        )
        if self.value_table is not None or self.frequencies:
            logprobs = rescale_entries(logprobs, tails[:, 0], self.num_entries)
        else:
            _check_masses(logprobs, tails[:, 0], self.num_entries)
        hidden = None if self.hidden is None else bfloat16_to_float(self.hidden)
        targets = SparseTargets(
            temperatures, self.num_entries, self.token_ids, logprobs, tails,
            self.logz, self.label_logprobs, self.entropy, hidden, self.counts, self.frequencies,
        )  # fmt: skip
        return targets if self.ascending else ascending(targets)


def _check_masses(logprobs: FloatArray, tail: FloatArray, num_entries: UIntArray) -> None:
    """Logprobs that are taken as they are must be those of a distribution."""
    some = num_entries > 0
    counts = num_entries[some].astype(np.int64)
    if not len(counts):
        return
    masses = np.add.reduceat(np.exp(logprobs), np.cumsum(counts) - counts, dtype=np.float64) + np.exp(tail[some])
    if masses.max() > 1 + MASS_ROUNDING:
        raise CacheCorruptError(f"entries and tail of a position have mass {masses.max():.3g}, 1 was expected")


def float_to_bfloat16(array: FloatArray) -> npt.NDArray[np.uint16]:
    """The bits of float32 values that are bfloat16 values already; others are a programmer's mistake."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any(), "values are bfloat16"
    return (bits >> 16).astype(np.uint16)


def bfloat16_to_float(array: FloatArray | npt.NDArray[np.uint16]) -> FloatArray:
    """float32 of stored hidden states, whichever way they are stored."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(array, dtype=np.float32)
