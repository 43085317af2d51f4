"""The pieces of the codec ``packed``: ids as gaps, logprobs as levels, tails as log-odds, each in one byte where it can.

Pure functions between arrays; which columns they fill, and what is read back with which bounds, is the codec's.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt

from kdcache.errors import CacheCorruptError, ConfigError
from kdcache.targets import FloatArray, SparseTargets, UIntArray

# Levels of -logprob. Growth 0.3 keeps the error of a probability nearly even at T = 1 and T = 2.
LEVEL_GROWTH = 0.3
LEVEL_MAX_STEP = 1.0
# A tail is one byte of log-odds; 0 says that there is no tail. Steps are fine where tail and head are both large,
# and reach far enough for a teacher that knows nothing (a few entries of 2^20 equal ones).
TAIL_LOG_ODDS = np.concatenate([np.arange(-12, -6, 1 / 4), np.arange(-6, 3, 1 / 16), 3 + np.arange(87) / 8])
TAIL_ERROR = 1 / 16
# Gaps below SMALL take one byte, others a byte and a low byte, those past the escape four bytes more.
GAP_SMALL, GAP_ESCAPE = 60, 255


@cache
def levels(step: float) -> FloatArray:
    """``[256]``: -logprob of each level; the first step is ``step`` nats. Made once, and read-only: every sequence needs it."""
    out = np.zeros(256)
    for i in range(1, 256):
        out[i] = out[i - 1] + min(step * math.exp(LEVEL_GROWTH * out[i - 1]), LEVEL_MAX_STEP)
    table = out.astype(np.float32)
    table.setflags(write=False)
    return table


@cache
def tail_table(num_temperatures: int) -> FloatArray:
    """``[num_temperatures, 256]``: log tail mass of each code. Made once, and read-only."""
    row = np.concatenate([[-np.inf], -np.logaddexp(0, -TAIL_LOG_ODDS)]).astype(np.float32)
    table = np.tile(row, (num_temperatures, 1))
    table.setflags(write=False)
    return table


def column_order(num_entries: UIntArray) -> npt.NDArray[np.int64]:
    """Entry indices by rank inside the position first, then by position: neighbours in a frame then look alike.

    Positions are taken by falling number of entries, so that the entries of one rank are a prefix of them.
    """
    counts = num_entries.astype(np.int64)
    offsets = np.cumsum(counts) - counts
    by_count = np.argsort(-counts, kind="stable")
    ranks = np.arange(counts.max(initial=0))[:, None]
    grid = offsets[by_count] + ranks
    return grid[ranks < counts[by_count]]


def id_gaps(targets: SparseTargets) -> npt.NDArray[np.int64]:
    """``id - previous id - 1`` inside a position; the first entry of a position counts from -1."""
    ids = targets.token_ids.astype(np.int64)
    gaps = np.diff(ids, prepend=-1) - 1
    starts = targets.offsets[:-1][targets.num_entries > 0]
    gaps[starts] = ids[starts]
    assert (gaps >= 0).all(), "token ids ascend inside a position"
    return gaps


def ids_from_gaps(gaps: npt.NDArray[np.int64], num_entries: UIntArray, where: str) -> UIntArray:
    """Undo :func:`id_gaps`.

    Raises:
        CacheCorruptError: An id past 2^32.
    """
    running = np.cumsum(gaps + 1)
    counts = num_entries[num_entries > 0].astype(np.int64)
    starts = np.cumsum(counts) - counts
    before = running[starts] - (gaps[starts] + 1)
    ids = running - np.repeat(before, counts) - 1
    if len(ids) and int(ids.max()) > np.iinfo(np.uint32).max:
        raise CacheCorruptError(f"{where}, id_symbols: token ids past 2^32")
    return np.asarray(ids, dtype=np.uint32)


def encode_gaps(gaps: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], UIntArray]:
    """A symbol for each gap, the low bytes of those that take two, and those that escape."""
    rest = gaps - GAP_SMALL
    high = rest >> 8
    escaped = high >= GAP_ESCAPE - GAP_SMALL
    two_bytes = (rest >= 0) & ~escaped
    symbols = np.where(rest < 0, gaps, np.where(escaped, GAP_ESCAPE, GAP_SMALL + high)).astype(np.uint8)
    return symbols, (rest[two_bytes] & 255).astype(np.uint8), gaps[escaped].astype(np.uint32)


def decode_gaps(
    symbols: npt.NDArray[np.uint8], low: npt.NDArray[np.uint8], escapes: UIntArray
) -> npt.NDArray[np.int64]:
    """Undo :func:`encode_gaps`."""
    gaps = symbols.astype(np.int64)
    escaped = symbols == GAP_ESCAPE
    two_bytes = (symbols >= GAP_SMALL) & ~escaped
    gaps[two_bytes] = GAP_SMALL + ((gaps[two_bytes] - GAP_SMALL) << 8) + low
    gaps[escaped] = escapes
    return gaps


def nearest(table: npt.NDArray[np.floating], values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """Where in an ascending table the nearest number stands, for each value."""
    middles = (table[1:] + table[:-1]) / 2
    return np.searchsorted(middles, values).astype(np.uint8)


def quantise(table: FloatArray, targets: SparseTargets) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Levels counted down from each position's lowest probability, and that lowest level.

    Raises:
        ConfigError: A logprob below the last level.
    """
    if len(targets.logprobs) and float(targets.logprobs.min()) < -table[-1]:
        raise ConfigError(
            f"codec packed holds logprobs down to {-table[-1]:.0f} nats, found {targets.logprobs.min():.1f}",
            hint="dump with --codec exact",
        )
    level = nearest(table, -targets.logprobs).astype(np.int64)
    counts = targets.num_entries[targets.num_entries > 0].astype(np.int64)
    starts = np.cumsum(counts) - counts
    lowest = np.zeros(len(targets), dtype=np.uint8)
    if len(counts):
        # Ties with the first choice step aside, so that argmax survives the round trip.
        best = np.repeat(np.maximum.reduceat(targets.logprobs, starts), counts)
        best_level = np.repeat(np.minimum.reduceat(level, starts), counts)
        level += (level == best_level) & (targets.logprobs < best)
        level = np.minimum(level, 255)
        lowest[targets.num_entries > 0] = np.maximum.reduceat(level, starts)
    return (np.repeat(lowest, targets.num_entries) - level).astype(np.uint8), lowest


def encode_tails(tail_logprobs: FloatArray) -> npt.NDArray[np.uint8]:
    """``[num_temperatures, N]``, temperature by temperature."""
    tail = np.minimum(tail_logprobs.T.astype(np.float64), -1e-12)
    with np.errstate(divide="ignore"):
        log_odds = tail - np.log(-np.expm1(tail))
    return np.where(np.isneginf(tail_logprobs.T), 0, nearest(TAIL_LOG_ODDS, log_odds) + 1).astype(np.uint8)


def byte_planes(array: npt.NDArray[np.float16]) -> npt.NDArray[np.uint8]:
    """The first bytes of all numbers, then the second ones."""
    return np.ascontiguousarray(array.view(np.uint8).reshape(-1, 2).T).ravel()


def join_planes(planes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
    """Undo :func:`byte_planes`."""
    return np.ascontiguousarray(planes.reshape(2, -1).T).view(np.float16).ravel()
