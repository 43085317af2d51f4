"""The pieces of the codec ``packed``: ids as gaps, logprobs as levels, tails as log-odds, each in one byte where it can.

Pure functions between arrays; which columns they fill, and what is read back with which bounds, is the codec's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.cache.jit import compiled
from kdcache.cache.loops import BITS_SET, COUNT_ESCAPE, GAP_ESCAPE, GAP_SMALL, NUM_BITS
from kdcache.errors import ConfigError
from kdcache.targets import FloatArray, SparseTargets, UIntArray

LEVEL_MAX_STEP = 1.0
# Levels are found by a grid of so many cells a nat, a small part of the finest step.
GRID_CELLS = 1024
# A tail is one byte of log-odds; 0 says that there is no tail. Steps are fine where tail and head are both large,
# and reach far enough for a teacher that knows nothing (a few entries of 2^20 equal ones).
TAIL_LOG_ODDS = np.concatenate([np.arange(-12, -6, 1 / 4), np.arange(-6, 3, 1 / 16), 3 + np.arange(87) / 8])
TAIL_ERROR = 1 / 16
# Every border between two of them is a multiple of one cell.
TAIL_CELLS = 32
# Log-normalisers are integers of so many nats: what a training run may ask of them is their scale, not their digits.
LOGZ_STEP = 1 / 8
LARGEST_LOGZ = 4095.0
ENTROPY_STEP = 1 / 4
# Columns whose bytes change along the way: gaps between ids grow with the rank of an entry, and so do levels.
BLOCK_BYTES = {"id_bits": 4096, "id_symbols": 8192, "levels": 32768}
BLOCK_A_ROW = {"tails", "logz"}


@dataclass(frozen=True, slots=True)
class Levels:
    """The levels of -logprob: each lies ``step * exp(growth * level)`` nats above the one before it, at most one nat.

    Growth 0.3 keeps the error of a probability nearly even at T = 1 and T = 2.

    Attributes:
        step: Of the first level, in nats.
        growth: Of the step, a nat.
    """

    step: float = 0.0645
    growth: float = 0.3

    @property
    def table(self) -> FloatArray:
        """``[256]`` float32, ascending from 0; read-only."""
        table: FloatArray = _level_table(self)
        return table

    def nearest(self, depths: FloatArray) -> npt.NDArray[np.uint8]:
        """The nearest level of each ``-logprob``, to a cell of the grid; those past the last level have the last."""
        cells = (depths * np.float32(GRID_CELLS)).astype(np.intp)
        levels: npt.NDArray[np.uint8] = _level_grid(self).take(cells, mode="clip")
        return levels

    def step_at(self, depth: FloatArray) -> FloatArray:
        """The step that a level at ``depth`` nats can lie above the one before it, in nats."""
        return np.asarray(np.minimum(self.step * np.exp(self.growth * depth), LEVEL_MAX_STEP), dtype=np.float32)


STANDARD = Levels()


@cache
def _level_table(levels: Levels) -> FloatArray:
    """Made once: every sequence needs it."""
    out = np.zeros(256)
    for i in range(1, 256):
        out[i] = out[i - 1] + min(levels.step * math.exp(levels.growth * out[i - 1]), LEVEL_MAX_STEP)
    table = out.astype(np.float32)
    table.setflags(write=False)
    return table


@cache
def _level_grid(levels: Levels) -> npt.NDArray[np.uint8]:
    """The level nearest to the middle of each cell."""
    table = _level_table(levels)
    return nearest(table, (np.arange(math.ceil(table[-1]) * GRID_CELLS + 1) + 0.5) / GRID_CELLS)


@cache
def tail_table(num_temperatures: int) -> FloatArray:
    """``[num_temperatures, 256]``: log tail mass of each code. Made once, and read-only."""
    row = np.concatenate([[-np.inf], -np.logaddexp(0, -TAIL_LOG_ODDS)]).astype(np.float32)
    table = np.tile(row, (num_temperatures, 1))
    table.setflags(write=False)
    return table


class ColumnOrder:
    """Entries by rank inside the position first, then by position: neighbours in a frame then look alike.

    Where all positions have the same number this is a transposed rectangle.

    Args:
        num_entries: ``[N]``.
    """

    def __init__(self, num_entries: UIntArray) -> None:
        self._num_entries, self._k = num_entries, int(num_entries.max(initial=0))
        self.is_rectangle = bool((num_entries == self._k).all())

    def to_columns(self, entries: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """``[E]`` in the order of the targets, into that of the columns."""
        if self.is_rectangle:
            return entries.reshape(-1, max(self._k, 1)).T.ravel()
        if loops := compiled():
            return np.asarray(loops.to_columns(entries, self._num_entries, loops.cursors(self._num_entries)))
        return entries.take(self._entries)

    def to_rows(self, columns: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Undo :meth:`to_columns`."""
        if self.is_rectangle:
            return columns.reshape(max(self._k, 1), -1).T.ravel()
        if loops := compiled():
            return np.asarray(loops.to_rows(columns, self._num_entries, loops.cursors(self._num_entries)))
        out = np.empty_like(columns)
        out[self._entries] = columns
        return out

    @cached_property
    def _entries(self) -> npt.NDArray[np.intp]:
        """``[E]``: the entry at each place of the columns."""
        counts = self._num_entries.astype(np.int64)
        starts = np.cumsum(counts) - counts
        rank = np.arange(int(counts.sum())) - np.repeat(starts, counts)
        # numpy sorts 8 and 16 bits by their digits.
        narrow = np.uint8 if self._k <= 1 << 8 else np.uint16 if self._k <= 1 << 16 else np.int64
        return np.argsort(rank.astype(narrow), kind="stable")

    def columns_of_gaps(self, token_ids: UIntArray) -> npt.NDArray[np.integer]:
        """:func:`id_gaps`, in the order of the columns."""
        if loops := compiled():
            gaps, ascend = loops.column_gaps(token_ids, self._num_entries, loops.cursors(self._num_entries))
            assert ascend, "token ids ascend inside a position"
            return np.asarray(gaps)
        return self.to_columns(id_gaps(token_ids, self._num_entries))

    def ids_of_gaps(self, gaps: npt.NDArray[np.integer]) -> UIntArray | npt.NDArray[np.int64]:
        """Undo :meth:`columns_of_gaps`: ids in the order of the targets; int64 where some are past 2^32."""
        if loops := compiled():
            ids, fit = loops.ids_of_gaps(gaps, self._num_entries, loops.cursors(self._num_entries))
            if fit:
                return np.asarray(ids)
        if self.is_rectangle:
            wide = np.int64 if gaps.dtype != np.uint16 or self._k > 1 << 14 else np.int32
            return _narrow(_running_sums(gaps.reshape(max(self._k, 1), -1), wide).T.ravel())
        running = np.cumsum(self.to_rows(gaps), dtype=np.int64)
        running += np.arange(len(running))
        counts = self._num_entries[self._num_entries > 0].astype(np.int64)
        ends = np.cumsum(counts) - 1
        before = np.concatenate([[-1], running[ends[:-1]]]) if len(ends) else ends
        running -= np.repeat(before + 1, counts)
        return _narrow(running)


def _narrow(ids: npt.NDArray[np.int32] | npt.NDArray[np.int64]) -> UIntArray | npt.NDArray[np.int64]:
    """uint32, where all ids are below 2^32."""
    if ids.dtype == np.int32 or int(ids.max(initial=0)) <= np.iinfo(np.uint32).max:
        return ids.astype(np.uint32)
    return ids.astype(np.int64)


def _running_sums(rectangle: npt.NDArray[Any], wide: type[np.int32] | type[np.int64]) -> npt.NDArray[Any]:
    """``cumsum(rectangle + 1, axis=0) - 1``, row upon row: numpy's own takes a column at a time."""
    num_rows, width = rectangle.shape
    if width < num_rows:
        return np.asarray(np.cumsum(rectangle.astype(wide) + 1, axis=0, dtype=wide) - 1)
    out: npt.NDArray[Any] = np.empty((num_rows, width), dtype=wide)
    out[0] = rectangle[0]
    for row in range(1, num_rows):
        np.add(out[row - 1], rectangle[row], out=out[row])
    out += np.arange(num_rows, dtype=wide)[:, None]
    return out


def split_ids(
    token_ids: UIntArray, num_entries: UIntArray
) -> tuple[npt.NDArray[np.uint8], UIntArray, npt.NDArray[np.uint32]]:
    """Ids below ``NUM_BITS`` as bits, and the others.

    Args:
        token_ids: ``[E]``, ascending inside a position.
        num_entries: ``[N]``.

    Returns:
        ``[NUM_BITS / 8, N]``, the bits of ids 0 to 7 first, the most significant one for the lowest id; ``[R]`` the other ids minus
        ``NUM_BITS``; ``[N]`` how many of them each position has.
    """
    if loops := compiled():
        bits, others, num_rest, ascend = loops.split_ids(token_ids, num_entries)
        assert ascend, "token ids ascend inside a position"
        return bits, others, num_rest
    n = len(num_entries)
    few = token_ids < NUM_BITS
    assert len(id_gaps(token_ids, num_entries)) == len(token_ids), "token ids ascend inside a position"
    bits = np.zeros((n, NUM_BITS), dtype=np.uint8)
    bits[np.repeat(np.arange(n), num_entries)[few], token_ids[few]] = 1
    rest = num_entries - bits.sum(axis=1, dtype=np.uint32)
    return np.ascontiguousarray(np.packbits(bits, axis=1).T), token_ids[~few] - np.uint32(NUM_BITS), rest


def num_bits_set(bits: npt.NDArray[np.uint8], num_targets: int) -> UIntArray:
    """``[N]``: how many ids the bits of each position name."""
    if loops := compiled():
        return np.asarray(loops.num_bits_set(bits, num_targets))
    return np.asarray(BITS_SET[bits, 8].reshape(NUM_BITS // 8, num_targets).sum(axis=0, dtype=np.uint32))


def join_ids(bits: npt.NDArray[np.uint8], rest: UIntArray, num_few: UIntArray, num_rest: UIntArray) -> UIntArray:
    """Undo :func:`split_ids`, from :func:`num_bits_set` and what :meth:`ColumnOrder.ids_of_gaps` gives."""
    if loops := compiled():
        return np.asarray(loops.join_ids(bits, rest, num_few, num_rest))
    runs = np.stack([num_few, num_rest], axis=1).ravel()
    is_few = np.repeat(np.tile([True, False], len(num_few)), runs)
    rows = np.ascontiguousarray(bits.reshape(NUM_BITS // 8, len(num_few)).T)
    ids = np.empty(len(is_few), dtype=np.uint32)
    ids[is_few] = np.flatnonzero(np.unpackbits(rows.ravel()).view(bool)) & (NUM_BITS - 1)
    ids[~is_few] = rest + np.uint32(NUM_BITS)
    return ids


def id_gaps(token_ids: UIntArray, num_entries: UIntArray) -> npt.NDArray[np.int32] | npt.NDArray[np.int64]:
    """``id - previous id - 1`` inside a position; the first entry of a position counts from -1."""
    small = int(token_ids.max(initial=0)) < 1 << 31
    ids: npt.NDArray[Any] = token_ids.astype(np.int32 if small else np.int64)
    gaps = np.empty_like(ids)
    np.subtract(ids[1:], ids[:-1], out=gaps[1:])
    gaps -= 1
    counts = num_entries[num_entries > 0].astype(np.int64)
    starts = np.cumsum(counts) - counts
    gaps[starts] = ids[starts]
    assert not len(gaps) or int(gaps.min()) >= 0, "token ids ascend inside a position"
    return gaps


def encode_gaps(
    gaps: npt.NDArray[np.integer],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], UIntArray]:
    """A symbol for each gap, the low bytes of those that take two, and those that escape."""
    if (loops := compiled()) and gaps.dtype == np.uint32:
        symbols, low, escapes = loops.symbols_of_gaps(gaps)
        return symbols, low, escapes
    large = np.flatnonzero(gaps >= GAP_SMALL)
    rest = gaps[large] - GAP_SMALL
    high = rest >> 8
    escaped = high >= GAP_ESCAPE - GAP_SMALL
    symbols = gaps.astype(np.uint8)
    symbols[large] = np.where(escaped, GAP_ESCAPE, GAP_SMALL + high).astype(np.uint8)
    return symbols, rest[~escaped].astype(np.uint8), gaps[large[escaped]].astype(np.uint32)


def decode_gaps(
    symbols: npt.NDArray[np.uint8], low: npt.NDArray[np.uint8], escapes: UIntArray
) -> npt.NDArray[np.integer]:
    """Undo :func:`encode_gaps`; uint16 or wider."""
    if loops := compiled():
        # One byte more, so that one can be read where none is used.
        return np.asarray(loops.gaps_of_symbols(symbols, np.append(low, np.uint8(0)), escapes))
    gaps: npt.NDArray[np.uint16] = np.multiply(
        np.maximum(symbols, GAP_SMALL) - np.uint8(GAP_SMALL), 255, dtype=np.uint16
    )
    gaps += symbols
    if not len(escapes):
        gaps[np.flatnonzero(symbols >= GAP_SMALL)] += low
        return gaps
    escaped = symbols == GAP_ESCAPE
    wide = gaps.astype(np.int64)
    wide[(symbols >= GAP_SMALL) & ~escaped] += low
    wide[escaped] = escapes
    return wide


def nearest(table: npt.NDArray[np.floating], values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """Where in an ascending table the nearest number stands, for each value."""
    middles = (table[1:] + table[:-1]) / 2
    return np.searchsorted(middles, values).astype(np.uint8)


def quantise(levels: Levels, targets: SparseTargets) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Levels counted down from each position's lowest probability, and that lowest level.

    Raises:
        ConfigError: A logprob below the last level.
    """
    lowest_logprob = -levels.table[-1]
    if len(targets.logprobs) and float(targets.logprobs.min()) < lowest_logprob:
        raise ConfigError(
            f"codec packed holds logprobs down to {lowest_logprob:.0f} nats, found {targets.logprobs.min():.1f}",
            hint="dump with --codec exact",
        )
    if loops := compiled():
        grid, cells = _level_grid(levels), np.float32(GRID_CELLS)
        below, lowest = loops.row_levels(targets.logprobs, targets.num_entries, grid, cells)
        return below, lowest
    level = levels.nearest(-targets.logprobs)
    counts = targets.num_entries[targets.num_entries > 0].astype(np.int64)
    lowest = np.zeros(len(targets), dtype=np.uint8)
    if len(counts):
        # Ties with the first choice step aside, so that argmax survives the round trip.
        best = _reduced(np.maximum, targets.logprobs, counts)
        first = levels.nearest(-best)
        shares = (level == _spread(first, counts)) & (targets.logprobs < _spread(best, counts))
        level += shares & (level < 255)
        lowest[targets.num_entries > 0] = _reduced(np.maximum, level, counts)
    return _spread(lowest[targets.num_entries > 0], counts) - level, lowest


def values_of_levels(
    below: npt.NDArray[np.uint8], lowest: npt.NDArray[np.uint8], num_entries: UIntArray
) -> npt.NDArray[np.uint8] | None:
    """``[E]``: levels counted up again, or None where one is below zero."""
    if loops := compiled():
        values, sound = loops.values_of_levels(below, lowest, num_entries)
        return values if sound else None
    ceiling = np.repeat(lowest, num_entries)
    return None if (below > ceiling).any() else ceiling - below


def are_whole_draws(counts: npt.NDArray[np.uint16], num_entries: UIntArray, num_draws: int) -> bool:
    """Whether the counts ``[E]`` of each position are at least one each, and ``num_draws`` together."""
    if loops := compiled():
        return bool(loops.are_whole_draws(counts, num_entries, num_draws))
    if not (counts.all() and num_entries.all()):
        return False
    starts = np.cumsum(num_entries, dtype=np.int64) - num_entries
    return not len(starts) or bool((np.add.reduceat(counts, starts, dtype=np.int64) == num_draws).all())


def _reduced(operation: np.ufunc, entries: npt.NDArray[Any], counts: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """``operation`` over each run of entries. Where all runs are as long, numpy has several times the speed, here and below."""
    if _are_even(counts):
        return np.asarray(operation.reduce(entries.reshape(len(counts), -1), axis=1))
    return np.asarray(operation.reduceat(entries, np.cumsum(counts) - counts))


def _spread(values: npt.NDArray[Any], counts: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """A value for each run, at every entry of it."""
    return np.repeat(values, int(counts[0]) if _are_even(counts) else counts)


def _are_even(counts: npt.NDArray[np.int64]) -> bool:
    return len(counts) > 0 and bool((counts == counts[0]).all())


def encode_counts(counts: npt.NDArray[np.uint16]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16]]:
    """``[n]`` draws as half bytes, those of the first half of them low; and what those at ``COUNT_ESCAPE`` have beyond it."""
    small = np.minimum(counts, COUNT_ESCAPE).astype(np.uint8)
    half = (len(small) + 1) // 2
    pairs = small[:half].copy()
    pairs[: len(small) - half] |= small[half:] << 4
    return pairs, counts[small == COUNT_ESCAPE] - np.uint16(COUNT_ESCAPE)


def decode_counts(
    pairs: npt.NDArray[np.uint8], beyond: npt.NDArray[np.uint8] | npt.NDArray[np.uint16], num_counts: int
) -> tuple[npt.NDArray[np.uint16], int]:
    """Undo :func:`encode_counts`; and how many go on in ``beyond``: where that is not its length, the counts mean nothing."""
    if loops := compiled():
        counts, num_large = loops.decode_counts(pairs, beyond, num_counts)
        return counts, num_large
    counts = np.concatenate([pairs & 15, pairs >> 4])[:num_counts].astype(np.uint16)
    large = np.flatnonzero(counts == COUNT_ESCAPE)
    if len(large) == len(beyond):
        counts[large] += beyond
    return counts, len(large)


@cache
def _tail_grid() -> npt.NDArray[np.uint8]:
    """The code of the log-odds in each cell, from the lowest to the highest."""
    cells = (
        TAIL_LOG_ODDS[0] + (np.arange(int((TAIL_LOG_ODDS[-1] - TAIL_LOG_ODDS[0]) * TAIL_CELLS) + 1) + 0.5) / TAIL_CELLS
    )
    return nearest(TAIL_LOG_ODDS, cells) + np.uint8(1)


def encode_tails(tail_logprobs: FloatArray) -> npt.NDArray[np.uint8]:
    """``[num_temperatures, N]``, temperature by temperature."""
    grid = _tail_grid()
    tail = np.minimum(tail_logprobs.T, np.float32(-1e-7))
    with np.errstate(divide="ignore"):
        log_odds = tail - np.log(-np.expm1(tail))
    cells = np.clip((log_odds - np.float32(TAIL_LOG_ODDS[0])) * np.float32(TAIL_CELLS), 0, len(grid) - 1)
    return np.where(np.isneginf(tail_logprobs.T), 0, grid[cells.astype(np.intp)]).astype(np.uint8)


def encode_logz(logz: FloatArray) -> npt.NDArray[np.uint8]:
    """Steps of ``LOGZ_STEP``: the low bytes of all int16, then the high ones."""
    steps = np.rint(logz / LOGZ_STEP).astype("<i2")
    return np.ascontiguousarray(steps.view(np.uint8).reshape(-1, 2).T)


def decode_logz(planes: npt.NDArray[np.uint8]) -> FloatArray:
    """Undo :func:`encode_logz`."""
    steps = np.ascontiguousarray(planes.reshape(2, -1).T).view("<i2").ravel()
    return (steps * LOGZ_STEP).astype(np.float32)
