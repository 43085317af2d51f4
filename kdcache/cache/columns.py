"""The columns of each codec: targets as named arrays, and back out of their frames with every bound checked.

Which columns a codec has, how ids are renumbered before and after, and how arrays become frames is :mod:`kdcache.cache.codec`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.cache import packed
from kdcache.cache.compact import CompactTargets
from kdcache.cache.frames import read_array
from kdcache.cache.limits import MAX_ENTRIES
from kdcache.cache.loops import COUNT_ESCAPE, GAP_ESCAPE, GAP_SMALL, NUM_BITS
from kdcache.cache.parameters import CodecParameters
from kdcache.errors import CacheCorruptError, ConfigError
from kdcache.targets import CountArray, FloatArray, SparseTargets, UIntArray

Frames = Mapping[str, bytes | memoryview]

# The largest logprob that rounding of float32 can give.
MAX_LOGPROB = 1e-4


# --- exact ------------------------------------------------------------------------------------------------------------


def _encode_exact(codec: CodecParameters, targets: SparseTargets) -> dict[str, npt.NDArray[Any]]:
    _check_number(len(targets.token_ids))
    arrays: dict[str, npt.NDArray[Any]] = {
        "num_entries": targets.num_entries,
        "token_ids": targets.token_ids,
        "label_logprobs": targets.label_logprobs,
        "entropy": targets.entropy,
    }
    if not codec.frequencies:
        arrays |= {"logprobs": targets.logprobs, "tails": targets.tail_logprobs, "logz": targets.logz}
    if targets.counts is not None:
        arrays["counts"] = np.ascontiguousarray(targets.counts.T.astype(codec.count_dtype))
    return arrays


def _decode_exact(codec: CodecParameters, frames: Frames, n: int, where: str) -> CompactTargets:
    def floats(name: str, count: int) -> FloatArray:
        return read_array(frames[name], np.float32, what=f"{where}, {name}", count=count)

    num_entries = _read_num_entries(codec, frames, n, where, np.uint32)
    total = _total(num_entries, where)
    token_ids = read_array(frames["token_ids"], np.uint32, what=f"{where}, token_ids", count=total)
    _check_ids(token_ids, num_entries, codec.vocab_size, where)
    label_logprobs, entropy = floats("label_logprobs", n), floats("entropy", n)
    counts = _read_counts(codec, frames, total, where)
    known: dict[str, Any] = {
        "num_entries": num_entries,
        "token_ids": token_ids,
        "label_logprobs": label_logprobs,
        "entropy": entropy,
        "hidden": _read_hidden(codec, frames, n, where),
        "counts": counts,
    }
    if not (are_logprobs(label_logprobs) and np.isfinite(entropy).all()):
        raise CacheCorruptError(f"{where}: a label's logprob or an entropy that cannot be")
    if counts is not None and codec.frequencies:
        return CompactTargets(**known, **_frequencies(codec, counts, num_entries, where))
    logprobs, logz = floats("logprobs", total), floats("logz", n)
    tails = floats("tails", n * len(codec.temperatures)).reshape(n, len(codec.temperatures))
    if not are_logprobs(logprobs) or not (tails <= MAX_LOGPROB).all():
        raise CacheCorruptError(f"{where}: a logprob that is not finite and at most 0")
    if not np.isfinite(logz).all():
        raise CacheCorruptError(f"{where}: a log-normaliser that is not finite")
    tails = np.minimum(tails, 0)  # whoever takes the log of what a tail leaves
    return CompactTargets(**known, values=logprobs, value_table=None, tails=tails, tail_table=None, logz=logz)


# --- packed -----------------------------------------------------------------------------------------------------------


def _encode_packed(codec: CodecParameters, targets: SparseTargets) -> dict[str, npt.NDArray[Any]]:
    _check_number(len(targets.token_ids))
    if (np.abs(targets.logz) > packed.LARGEST_LOGZ).any():
        raise ConfigError(
            f"codec packed holds log-normalisers up to {packed.LARGEST_LOGZ:g}, found {np.abs(targets.logz).max():.0f}",
            hint="dump with --codec exact",
        )
    order = packed.ColumnOrder(targets.num_entries)
    arrays: dict[str, npt.NDArray[Any]] = {
        "num_entries": targets.num_entries.astype(np.uint8 if codec.max_entries < 256 else np.uint32),
        "label_levels": codec.levels.nearest(-targets.label_logprobs),
        "entropy": np.clip(np.rint(targets.entropy / packed.ENTROPY_STEP), 0, 255).astype(np.uint8),
    }
    if codec.has_bits:
        arrays["id_bits"], ids, num_rest = packed.split_ids(targets.token_ids, targets.num_entries)
        gaps = packed.ColumnOrder(num_rest).columns_of_gaps(ids)
    else:
        gaps = order.columns_of_gaps(targets.token_ids)
    arrays["id_symbols"], arrays["id_low"], arrays["id_escapes"] = packed.encode_gaps(gaps)
    if not codec.frequencies:
        levels, arrays["lowest_level"] = packed.quantise(codec.levels, targets)
        arrays["levels"] = order.to_columns(levels)
        arrays["tails"] = packed.encode_tails(targets.tail_logprobs)
        arrays["logz"] = packed.encode_logz(targets.logz)
    if targets.counts is not None:
        columns = [order.to_columns(targets.counts[:, t]) for t in range(len(codec.temperatures))]
        pairs, escapes = packed.encode_counts(np.concatenate(columns))
        arrays |= {"counts": pairs, "count_escapes": escapes.astype(codec.count_dtype)}
    return arrays


def _decode_packed(codec: CodecParameters, frames: Frames, n: int, where: str) -> CompactTargets:
    def read(name: str, count: int, dtype: npt.DTypeLike = np.uint8) -> npt.NDArray[Any]:
        return read_array(frames[name], dtype, what=f"{where}, {name}", count=count)

    num_entries = _read_num_entries(codec, frames, n, where, np.uint8 if codec.max_entries < 256 else np.uint32)
    total = _total(num_entries, where)
    order = packed.ColumnOrder(num_entries)
    if codec.has_bits:
        bits = read("id_bits", n * NUM_BITS // 8)
        num_few = packed.num_bits_set(bits, n)
        if (num_few > num_entries).any():
            raise CacheCorruptError(f"{where}, id_bits: more ids at a position than it has entries")
        num_rest = num_entries - num_few
        rest = _read_ids(frames, packed.ColumnOrder(num_rest), num_rest, where, NUM_BITS)
        token_ids = packed.join_ids(bits, rest, num_few, num_rest)
    else:
        token_ids = _read_ids(frames, order, num_entries, where)
    counts = _read_counts(codec, frames, total, where)
    if counts is not None:
        columns = [order.to_rows(counts[:, t]) for t in range(len(codec.temperatures))]
        counts = np.stack(columns, axis=1) if len(columns) > 1 else columns[0][:, None]
    known: dict[str, Any] = {
        "num_entries": num_entries,
        "token_ids": token_ids,
        "label_logprobs": -codec.levels.table[read("label_levels", n)],
        "entropy": (read("entropy", n) * packed.ENTROPY_STEP).astype(np.float32),
        "hidden": _read_hidden(codec, frames, n, where),
        "counts": counts,
    }
    if counts is not None and codec.frequencies:
        return CompactTargets(**known, **_frequencies(codec, counts, num_entries, where))
    values = packed.values_of_levels(order.to_rows(read("levels", total)), read("lowest_level", n), num_entries)
    if values is None:
        raise CacheCorruptError(f"{where}, levels: a level below zero")
    num_temperatures = len(codec.temperatures)
    return CompactTargets(
        **known,
        values=values,
        value_table=-codec.levels.table,
        tails=read("tails", n * num_temperatures).reshape(num_temperatures, n).T,
        tail_table=packed.tail_table(num_temperatures),
        logz=packed.decode_logz(read("logz", 2 * n)),
    )


def _read_ids(
    frames: Frames, order: packed.ColumnOrder, num_entries: UIntArray, where: str, first: int = 0
) -> UIntArray:
    """Ids out of their gaps, position by position, counted from ``first``."""

    def read(name: str, count: int, dtype: npt.DTypeLike = np.uint8) -> npt.NDArray[Any]:
        return read_array(frames[name], dtype, what=f"{where}, {name}", count=count)

    symbols = read("id_symbols", int(num_entries.sum(dtype=np.int64)))
    num_escapes = int(np.count_nonzero(symbols == GAP_ESCAPE))
    num_low = int(np.count_nonzero(symbols >= GAP_SMALL)) - num_escapes
    escapes = read("id_escapes", num_escapes, np.uint32)
    ids: npt.NDArray[Any] = order.ids_of_gaps(packed.decode_gaps(symbols, read("id_low", num_low), escapes))
    if int(ids.max(initial=0)) + first >= 1 << 32:
        raise CacheCorruptError(f"{where}, id_symbols: token ids past 2^32")
    return ids


# --- shared -----------------------------------------------------------------------------------------------------------


def are_logprobs(*arrays: FloatArray) -> bool:
    """All finite and at most 0, but for rounding. NaN is the least and the largest of any that holds it."""
    return all(not array.size or (array.min() > -np.inf and array.max() <= MAX_LOGPROB) for array in arrays)


def _read_num_entries(codec: CodecParameters, frames: Frames, n: int, where: str, dtype: npt.DTypeLike) -> UIntArray:
    num_entries = read_array(frames["num_entries"], dtype, what=f"{where}, num_entries", count=n).astype(np.uint32)
    if n and int(num_entries.max()) > codec.max_entries:
        raise CacheCorruptError(
            f"{where}: {num_entries.max()} entries at a position, the plan allows {codec.max_entries}"
        )
    return num_entries


def _total(num_entries: UIntArray, where: str) -> int:
    if (total := int(num_entries.sum(dtype=np.int64))) > MAX_ENTRIES:
        raise CacheCorruptError(f"{where}: {total} entries, a sequence has at most {MAX_ENTRIES}")
    return total


def _check_ids(token_ids: UIntArray, num_entries: UIntArray, vocab_size: int, where: str) -> None:
    """Ids ascend inside each position, so that none stands there twice, and the last is in the vocabulary."""
    if not len(token_ids):
        return
    ascends = np.empty(len(token_ids), dtype=bool)
    np.greater(token_ids[1:], token_ids[:-1], out=ascends[:-1])
    k = int(num_entries[0])
    if k and (num_entries == k).all():
        last: Any = slice(k - 1, None, k)
    else:
        last = np.cumsum(num_entries[num_entries > 0], dtype=np.int64) - 1
    ascends[last] = True
    if not ascends.all():
        raise CacheCorruptError(f"{where}, token_ids: ids that do not ascend inside a position")
    if (largest := int(token_ids[last].max())) >= vocab_size:
        raise CacheCorruptError(f"{where}: token id {largest} in a vocabulary of {vocab_size}")


def _check_number(num_entries: int) -> None:
    """Refuse to write what no reader would take."""
    if num_entries > MAX_ENTRIES:
        raise ConfigError(
            f"a sequence has at most {MAX_ENTRIES} entries, found {num_entries}",
            hint="a smaller --seq-len, or fewer entries",
        )


def _read_counts(codec: CodecParameters, frames: Frames, total: int, where: str) -> CountArray | None:
    """``[E, num_temperatures]``, entries in the order of the column."""
    if not codec.num_draws:
        return None
    count, dtype = total * len(codec.temperatures), codec.count_dtype
    if codec.name == "exact":
        stored = read_array(frames["counts"], dtype, what=f"{where}, counts", count=count).astype(np.uint16)
    else:
        pairs = read_array(frames["counts"], np.uint8, what=f"{where}, counts", count=(count + 1) // 2)
        beyond = read_array(frames["count_escapes"], dtype, what=f"{where}, count_escapes", max_count=count)
        if len(beyond) and int(beyond.max()) + COUNT_ESCAPE > codec.num_draws:
            raise CacheCorruptError(
                f"{where}: an entry drawn {int(beyond.max()) + COUNT_ESCAPE} times in {codec.num_draws} draws"
            )
        stored, num_escapes = packed.decode_counts(pairs, beyond, count)
        if num_escapes != len(beyond):
            raise CacheCorruptError(f"{where}, count_escapes: {num_escapes} counts go on, found {len(beyond)}")
    if int(stored.max(initial=0)) > codec.num_draws:
        raise CacheCorruptError(f"{where}: an entry drawn {stored.max()} times in {codec.num_draws} draws")
    return stored.reshape(len(codec.temperatures), total).T


def _frequencies(codec: CodecParameters, counts: CountArray, num_entries: UIntArray, where: str) -> dict[str, Any]:
    """What stands in the place of logprobs, tails and log-normalisers where only counts are known.

    ``log(counts)``, which need only be normalised; nothing left out; zeros.
    """
    n, values = len(num_entries), np.ascontiguousarray(counts[:, 0])
    if not packed.are_whole_draws(values, num_entries, codec.num_draws):
        raise CacheCorruptError(
            f"{where}, counts: {codec.num_draws} draws at each position were expected, of entries drawn at least once"
        )
    table, _ = codec.tables()
    return {
        "values": np.log(values).astype(np.float32) if table is None else values.astype(np.uint8),
        "value_table": table,
        "tails": np.full((n, 1), -np.inf, dtype=np.float32),
        "tail_table": None,
        "logz": np.zeros(n, dtype=np.float32),
        "frequencies": True,
    }


def _read_hidden(
    codec: CodecParameters, frames: Frames, n: int, where: str
) -> FloatArray | npt.NDArray[np.uint16] | None:
    if not codec.hidden_size:
        return None
    dtype = np.uint16 if codec.hidden_dtype == "bfloat16" else np.float32
    array: npt.NDArray[Any] = read_array(frames["hidden"], dtype, what=f"{where}, hidden", count=n * codec.hidden_size)
    return array.reshape(n, codec.hidden_size)


_Encoder = Callable[[CodecParameters, SparseTargets], dict[str, npt.NDArray[Any]]]
_Decoder = Callable[[CodecParameters, Frames, int, str], CompactTargets]
ENCODERS: dict[str, _Encoder] = {"exact": _encode_exact, "packed": _encode_packed}
DECODERS: dict[str, _Decoder] = {"exact": _decode_exact, "packed": _decode_packed}
UNKNOWN_TO_FREQUENCIES = ("logprobs", "levels", "lowest_level", "tails", "logz")
COLUMNS: dict[str, tuple[str, ...]] = {
    "exact": ("num_entries", "token_ids", "logprobs", "tails", "logz", "label_logprobs", "entropy"),
    "packed": ("num_entries", "id_symbols", "id_low", "id_escapes", "levels", "lowest_level", "tails", "logz",
               "label_levels", "entropy"),
}  # fmt: skip
