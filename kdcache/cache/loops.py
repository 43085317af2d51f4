"""What the codec does entry by entry, as plain loops: passes that numpy makes over whole arrays, each in one.

Ordinary functions of ordinary Python, far too slow as such: :mod:`kdcache.cache.jit` compiles them where numba is installed. What each
gives is defined by the numpy form that it stands in for, named in its docstring, to the bit; tests hold the two against each other.
Only what a compiler of array loops takes is used here: no classes, no keywords, no exceptions.

**The order of columns** (:class:`kdcache.cache.packed.ColumnOrder`): entries by rank, then by position. Going through positions in
order, rank by rank, each rank is a stream that is read or written front to back, so one cursor for each rank is all that is kept.

Nothing checks an index. Callers vouch for what each relies upon: as many entries as ``num_entries`` adds up to (a frame's exact count on
reading, :class:`~kdcache.targets.SparseTargets` on writing), a context for each position, ids below the size of the vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float32]

# No value is NaN where a loop runs, and no zero's sign matters: largest values are then found side by side. Here and not beside the
# compiler, because what was compiled is kept until this file changes.
FAST = {"nnan", "nsz"}
Entries = npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

# Gaps below GAP_SMALL take one byte, others a byte and a low byte, those past the escape four bytes more.
GAP_SMALL, GAP_ESCAPE = 60, 255
# Renumbered ids below this hold about half of what is kept: a bit for each, there or not.
NUM_BITS = 128
# Draws of an entry take half a byte; from here on the rest follows elsewhere.
COUNT_ESCAPE = 15
# [256, 9]: which bits of a byte are set, the most significant first, and last how many are.
BITS_SET = np.zeros((256, 9), dtype=np.uint32)
for _byte in range(256):
    _set = [bit for bit in range(8) if _byte & (128 >> bit)]
    BITS_SET[_byte, : len(_set)], BITS_SET[_byte, 8] = _set, len(_set)


def cursors(num_entries: Numbers) -> npt.NDArray[np.int64]:
    """``[k + 1]``: where each rank begins among columns, and where the last ends."""
    k = 0
    for count in num_entries:
        k = max(k, np.int64(count))
    starts = np.zeros(k + 1, dtype=np.int64)
    for count in num_entries:
        starts[count] += 1
    # How many positions have more than r entries, then their running sum.
    total, above = 0, len(num_entries)
    for rank in range(k + 1):
        above -= starts[rank]
        starts[rank] = total
        total += above
    return starts


def to_rows(columns: Entries, num_entries: Numbers, starts: npt.NDArray[np.int64]) -> Entries:
    """:meth:`ColumnOrder.to_rows`; ``starts`` of :func:`cursors` are used up, here and below."""
    out = np.empty_like(columns)
    e = 0
    for count in num_entries:
        for rank in range(count):
            out[e + rank] = columns[starts[rank]]
        for rank in range(count):
            starts[rank] += 1
        e += count
    return out


def to_columns(entries: Entries, num_entries: Numbers, starts: npt.NDArray[np.int64]) -> Entries:
    """:meth:`ColumnOrder.to_columns`."""
    out = np.empty_like(entries)
    e = 0
    for count in num_entries:
        for rank in range(count):
            out[starts[rank]] = entries[e + rank]
        for rank in range(count):
            starts[rank] += 1
        e += count
    return out


def values_of_levels(below: Bytes, lowest: Bytes, num_entries: Numbers) -> tuple[Bytes, bool]:
    """``np.repeat(lowest, num_entries) - below``, and whether none is below zero."""
    values, sound, e = np.empty_like(below), True, 0
    for p in range(len(num_entries)):
        for rank in range(num_entries[p]):
            sound &= below[e + rank] <= lowest[p]
            values[e + rank] = lowest[p] - below[e + rank]
        e += num_entries[p]
    return values, sound


def decode_counts(
    pairs: Bytes, beyond: Bytes | npt.NDArray[np.uint16], num_counts: int
) -> tuple[npt.NDArray[np.uint16], int]:
    """:func:`packed.decode_counts`."""
    counts, half, at = np.empty(num_counts, dtype=np.uint16), len(pairs), 0
    for i in range(num_counts):
        counts[i] = pairs[i] & 15 if i < half else pairs[i - half] >> 4
    for i in range(num_counts):
        if counts[i] == COUNT_ESCAPE:
            if at < len(beyond):
                counts[i] += beyond[at]
            at += 1
    return counts, at


def are_whole_draws(counts: npt.NDArray[np.uint16], num_entries: Numbers, num_draws: int) -> bool:
    """Whether the counts of each position are at least one each, and ``num_draws`` together."""
    sound, e = True, 0
    for count in num_entries:
        drawn = 0
        for rank in range(count):
            sound &= counts[e + rank] > 0
            drawn += counts[e + rank]
        sound &= drawn == num_draws
        e += count
    return sound


def num_bits_set(bits: Bytes, num_targets: int) -> Numbers:
    """:func:`packed.num_bits_set`."""
    out = np.zeros(num_targets, dtype=np.uint32)
    for byte in range(NUM_BITS // 8):
        for p in range(num_targets):
            out[p] += BITS_SET[bits[byte * num_targets + p], 8]
    return out


def gaps_of_symbols(symbols: Bytes, low: Bytes, escapes: Numbers) -> Numbers:
    """:func:`packed.decode_gaps`; ``low`` has one byte more than is used."""
    gaps = np.empty(len(symbols), dtype=np.uint32)
    at, escaped = 0, 0
    for e in range(len(symbols)):
        symbol = np.uint32(symbols[e])
        # Without a branch: no processor guesses these.
        large = symbol >= GAP_SMALL
        gaps[e] = symbol + np.uint32(large) * ((symbol - np.uint32(GAP_SMALL)) * np.uint32(255) + np.uint32(low[at]))
        at += large
        if symbol == GAP_ESCAPE:
            gaps[e] = escapes[escaped]
            escaped += 1
            at -= 1
    return gaps


def ids_of_gaps(gaps: Numbers, num_entries: Numbers, starts: npt.NDArray[np.int64]) -> tuple[Numbers, bool]:
    """:meth:`ColumnOrder.ids_of_gaps`, and whether all ids are below 2^32."""
    ids = np.empty(len(gaps), dtype=np.uint32)
    e, beyond = 0, 0
    for count in num_entries:
        running = -1
        for rank in range(count):
            running += np.int64(gaps[starts[rank]]) + 1
            ids[e + rank] = running
        for rank in range(count):
            starts[rank] += 1
        beyond |= max(running, 0) >> 32
        e += count
    return ids, beyond == 0


def join_ids(bits: Bytes, rest: Numbers, num_few: Numbers, num_rest: Numbers) -> Numbers:
    """:func:`packed.join_ids`; ``bits`` is ``[NUM_BITS / 8 * N]``."""
    n, total = len(num_few), len(rest)
    for count in num_few:
        total += count
    # Eight numbers are written for each byte, and those of no bit are written over.
    ids = np.empty(total + 8, dtype=np.uint32)
    e, other = 0, 0
    for p in range(n):
        for byte in range(NUM_BITS // 8):
            there, first = bits[byte * n + p], np.uint32(8 * byte)
            for i in range(8):
                ids[e + i] = BITS_SET[there, i] + first
            e += BITS_SET[there, 8]
        count = num_rest[p]
        for i in range(count):
            ids[e + i] = rest[other + i] + np.uint32(NUM_BITS)
        e += count
        other += count
    return ids[:total]


def undo_order(codes: Numbers, frequent: Numbers, num_numbers: int) -> tuple[Numbers, bool]:
    """:meth:`OwnOrder.undo` of each code where no code is a list's place, and whether all stand for something."""
    ids = np.empty_like(codes)
    num_frequent, sound = len(frequent), True
    for e in range(len(codes)):
        code = np.int64(codes[e])
        if code < num_frequent:
            ids[e] = frequent[code]
        else:
            sound = sound and code - num_frequent < num_numbers
            ids[e] = code - num_frequent
    return ids, sound


def undo_tables(
    codes: Numbers,
    frequent: Numbers,
    num_entries: Numbers,
    rows: npt.NDArray[np.int32],
    lists: npt.NDArray[np.uint16],
    order: Numbers,
) -> tuple[Numbers, bool]:
    """:meth:`OwnOrder.undo`, then :meth:`IdTables.token_ids`; ``rows`` ``[N]`` of ``lists`` ``[C + 1, M]``."""
    ids = np.empty_like(codes)
    length, num_frequent, num_ranks = lists.shape[1], len(frequent), len(order)
    e, sound = 0, True
    for p in range(len(num_entries)):
        row = lists[rows[p]]
        for _ in range(num_entries[p]):
            code = np.int64(codes[e])
            if code < length:
                ids[e] = order[row[code]]
            else:
                rank = code - length
                rank = np.int64(frequent[rank]) if rank < num_frequent else rank - num_frequent
                if rank < num_ranks:
                    ids[e] = order[rank]
                else:
                    sound = False
            e += 1
    return ids, sound


def codes_of_ids(
    ids: Numbers,
    num_entries: Numbers,
    rows: npt.NDArray[np.int32],
    lists: npt.NDArray[np.uint16],
    ranks: npt.NDArray[np.int32],
    num_listed: int,
) -> Numbers:
    """:meth:`IdTables.codes`; ``rows`` ``[N]`` of ``lists`` ``[C + 1, M]``, whose ranks are below ``num_listed``."""
    codes = np.empty_like(ids)
    e, length = 0, lists.shape[1]
    # The codes of ranks after the token in hand: one list at a time, for those of all tokens are far more than a processor keeps at hand.
    places = np.empty(num_listed, dtype=np.uint16)
    for rank in range(num_listed):
        places[rank] = rank + length
    for p in range(len(num_entries)):
        row = lists[rows[p]]
        for place in range(length):
            places[row[place]] = place
        for _ in range(num_entries[p]):
            rank = ranks[ids[e]]
            codes[e] = places[rank] if rank < num_listed else rank + length
            e += 1
        for place in range(length):
            places[row[place]] = row[place] + length
    return codes


def histogram(numbers: Numbers, start: int, size: int) -> npt.NDArray[np.int32]:
    """``np.bincount(numbers[numbers >= start] - start, minlength=size)``."""
    counts = np.zeros(start + size, dtype=np.int32)
    for number in numbers:
        counts[number] += 1
    return counts[start:]


def renumber(codes: Numbers, places: Numbers) -> Numbers:
    """``places.take(codes)``."""
    out = np.empty_like(codes)
    for e in range(len(codes)):
        out[e] = places[codes[e]]
    return out


def sort_keys(numbers: Numbers, num_entries: Numbers, width: int, place_bits: int) -> Numbers:
    """``[N, width]``: each number with its place below it in ``place_bits``; rows end in the largest of all keys."""
    keys = np.empty((len(num_entries), width), dtype=np.uint32)
    e = 0
    for p in range(len(num_entries)):
        count = np.int64(num_entries[p])
        for rank in range(count):
            keys[p, rank] = (numbers[e + rank] << np.uint32(place_bits)) | np.uint32(rank)
        for rank in range(count, width):
            keys[p, rank] = np.uint32(0xFFFFFFFF)
        e += count
    return keys


def sorted_entries(
    keys: Numbers, num_entries: Numbers, place_bits: int, logprobs: Floats, counts: npt.NDArray[np.uint16]
) -> tuple[Numbers, Floats, npt.NDArray[np.uint16]]:
    """:func:`tables.sorted_by` from sorted keys: their numbers, and logprobs and counts ``[E, any]`` in the same order."""
    numbers, out, drawn = np.empty(len(logprobs), dtype=np.uint32), np.empty_like(logprobs), np.empty_like(counts)
    mask, start = np.uint32((1 << place_bits) - 1), 0
    for p in range(len(num_entries)):
        for rank in range(num_entries[p]):
            key = keys[p, rank]
            place = start + np.int64(key & mask)
            numbers[start + rank] = key >> np.uint32(place_bits)
            out[start + rank] = logprobs[place]
            for t in range(counts.shape[1]):
                drawn[start + rank, t] = counts[place, t]
        start += num_entries[p]
    return numbers, out, drawn


def split_ids(ids: Numbers, num_entries: Numbers) -> tuple[Bytes, Numbers, Numbers, bool]:
    """:func:`packed.split_ids`, and whether ids ascend inside each position."""
    n = len(num_entries)
    bits = np.zeros((NUM_BITS // 8, n), dtype=np.uint8)
    rest, num_rest = np.empty(len(ids), dtype=np.uint32), np.empty(n, dtype=np.uint32)
    e, other, ascend = 0, 0, True
    for p in range(n):
        count = np.int64(num_entries[p])
        mine, few = ids[e : e + count], 0
        while few < count and mine[few] < NUM_BITS:
            bits[mine[few] >> 3, p] |= 128 >> (mine[few] & 7)
            few += 1
        for rank in range(1, count):
            ascend &= mine[rank] > mine[rank - 1]
        for rank in range(few, count):
            rest[other + rank - few] = mine[rank] - np.uint32(NUM_BITS)
        num_rest[p] = count - few
        other += count - few
        e += count
    return bits, rest[:other], num_rest, ascend


def column_gaps(ids: Numbers, num_entries: Numbers, starts: npt.NDArray[np.int64]) -> tuple[Numbers, bool]:
    """:meth:`ColumnOrder.columns_of_gaps`, and whether ids ascend inside each position."""
    gaps = np.empty_like(ids)
    e, ascend = 0, True
    for count in num_entries:
        before = -1
        for rank in range(count):
            number = np.int64(ids[e + rank])
            ascend &= number > before
            gaps[starts[rank]] = number - before - 1
            before = number
        for rank in range(count):
            starts[rank] += 1
        e += count
    return gaps, ascend


def symbols_of_gaps(gaps: Numbers) -> tuple[Bytes, Bytes, Numbers]:
    """:func:`packed.encode_gaps`."""
    symbols, low = np.empty(len(gaps), dtype=np.uint8), np.empty(len(gaps) + 1, dtype=np.uint8)
    at, num_escaped = 0, 0
    for e in range(len(gaps)):
        rest = np.int64(gaps[e]) - GAP_SMALL
        high = rest >> 8
        large = rest >= 0
        symbols[e] = GAP_SMALL + (high if large else rest)
        low[at] = rest & 255
        at += large
        if high >= GAP_ESCAPE - GAP_SMALL:
            symbols[e] = GAP_ESCAPE
            at -= 1
            num_escaped += 1
    escapes = np.empty(num_escaped, dtype=np.uint32)
    if num_escaped:
        num_escaped = 0
        for e in range(len(gaps)):
            if symbols[e] == GAP_ESCAPE:
                escapes[num_escaped] = gaps[e]
                num_escaped += 1
    return symbols, low[:at], escapes


def row_levels(logprobs: Floats, num_entries: Numbers, grid: Bytes, cells: np.float32) -> tuple[Bytes, Bytes]:
    """:func:`packed.quantise`. ``grid`` holds ``cells`` levels a nat."""
    levels, lowest = np.empty(len(logprobs), dtype=np.uint8), np.zeros(len(num_entries), dtype=np.uint8)
    zero, last = np.float32(0), np.float32(len(grid) - 1)
    most, e = 0, 0
    for count in num_entries:
        most = max(most, np.int64(count))
    cell = np.empty(most, dtype=np.int32)
    # Several short passes over a position, for a processor takes each of them many entries at a time.
    for p in range(len(num_entries)):
        count = np.int64(num_entries[p])
        if count == 0:
            continue
        mine, level = logprobs[e : e + count], levels[e : e + count]
        best = mine[0]
        for rank in range(count):
            best = max(best, mine[rank])
        for rank in range(count):
            cell[rank] = np.int32(min(max(-mine[rank] * cells, zero), last))
        for rank in range(count):
            level[rank] = grid[np.uint32(cell[rank])]
        first, largest = grid[np.uint32(min(max(-best * cells, zero), last))], np.uint8(0)
        for rank in range(count):
            shares = (level[rank] == first) & (mine[rank] < best) & (level[rank] < 255)
            level[rank] += np.uint8(shares)
            largest = max(largest, level[rank])
        for rank in range(count):
            level[rank] = largest - level[rank]
        lowest[p] = largest
        e += count
    return levels, lowest
