"""SparseTargets <-> compressed columns.

Two codecs share one interface and one intermediate, :class:`CompactTargets`, which is what a training process moves to its
device before it turns integers into logprobs:

- ``exact``: raw ids and float32. The oracle of every other codec, and the container of the ``hidden`` scheme.
- ``packed``: ids ascending and gap-coded, logprobs as one-byte levels whose step grows toward the tail, tails as one byte
  of log-odds. Declares its error (:meth:`Codec.logprob_error_bound`).

**Trade.** The quantisation error of ``packed`` (KL below 1e-3 nats) is a hundredth of what keeping only 64 of 49,152
entries costs, and about the numeric noise of a bf16 teacher. Kept entries are rescaled on decode to ``1 - tail``, so
probabilities never sum to more than one; deriving the tail by subtraction instead would cost twice the quantisation.
Refuses what its levels cannot hold (a logprob below about -200 nats).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from kdcache.cache.frames import compress, read_array
from kdcache.errors import CacheCorruptError, ConfigError, TeacherOutputError
from kdcache.targets import CountArray, FloatArray, SparseTargets, UIntArray, rescale_entries

CodecName = Literal["exact", "packed"]
Frames = Mapping[str, bytes | memoryview]

# The largest logprob that rounding of float32 can give.
MAX_LOGPROB = 1e-4
# packed: levels of -logprob. Growth 0.3 keeps the error of a probability nearly even at T = 1 and T = 2.
LEVEL_GROWTH = 0.3
LEVEL_MAX_STEP = 1.0
# packed: a tail is one byte of log-odds; 0 says that there is no tail. Steps are fine where tail and head are both large,
# and reach far enough for a teacher that knows nothing (a few entries of 2^20 equal ones).
TAIL_LOG_ODDS = np.concatenate([np.arange(-12, -6, 1 / 4), np.arange(-6, 3, 1 / 16), 3 + np.arange(87) / 8])
TAIL_ERROR = 1 / 16
# packed: logz is a float16.
LARGEST_LOGZ = 65504
# packed: gaps below SMALL take one byte, others a byte and a low byte, those past the escape four bytes more.
GAP_SMALL, GAP_ESCAPE = 60, 255


@dataclass(frozen=True, slots=True, eq=False)
class CompactTargets:
    """Targets of N positions as they come out of the frames, before any logarithm: cheap to move, cheap to hold.

    Attributes:
        num_entries: ``[N]``.
        token_ids: ``[E]``.
        values: ``[E]`` float32 logprobs, or uint8 indices into ``value_table``.
        value_table: ``[256]`` float32, or None where ``values`` are logprobs already.
        tails: ``[N, num_temperatures]`` float32 log tail masses, or uint8 indices into ``tail_table``.
        tail_table: ``[num_temperatures, 256]`` float32 or None.
        logz: ``[N]`` float32.
        label_logprobs: ``[N]`` float32.
        entropy: ``[N]`` float32.
        hidden: ``[N, D]`` float32, or uint16 holding bfloat16 bits, or None.
        counts: ``[E, num_temperatures]`` uint16, draws of each entry, or None.
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

    def expand(self, temperatures: tuple[float, ...]) -> SparseTargets:
        """Integers to logprobs, the plain numpy form of what ``kdcache.train`` does on the device."""
        tails = (
            self.tails
            if self.tail_table is None
            else np.take_along_axis(self.tail_table.T, self.tails.astype(np.intp), axis=0)
        )
        tails = np.asarray(tails, dtype=np.float32)
        if self.value_table is None:
            logprobs = np.asarray(self.values, dtype=np.float32)
        else:
            logprobs = rescale_entries(self.value_table[self.values], tails[:, 0], self.num_entries)
        hidden = None if self.hidden is None else bfloat16_to_float(self.hidden)
        return SparseTargets(
            temperatures, self.num_entries, self.token_ids, logprobs, tails,
            self.logz, self.label_logprobs, self.entropy, hidden, self.counts,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Codec:
    """A way to store targets: its name and everything a reader needs to undo it.

    Attributes:
        name: ``exact`` or ``packed``.
        vocab_size: V; ids are below it.
        temperatures: Declared temperatures.
        max_entries: Largest number of entries at a position.
        step: Step of the levels at logprob 0, in nats (packed).
        num_draws: Draws a position and temperature of the schemes that draw, else 0.
        hidden_size: D of the ``hidden`` scheme, else 0.
        hidden_dtype: What hidden states are stored as.
    """

    name: CodecName
    vocab_size: int
    temperatures: tuple[float, ...]
    max_entries: int
    step: float = 0.0645
    num_draws: int = 0
    hidden_size: int = 0
    hidden_dtype: Literal["float32", "bfloat16"] = "float32"

    def encode(self, targets: SparseTargets) -> dict[str, bytes]:
        """Frames by column name, the same names for every sequence of a cache.

        Raises:
            ConfigError: The codec cannot hold these values within its bound.
            TeacherOutputError: A value is NaN or infinite.
        """
        if targets.temperatures != self.temperatures:
            raise ValueError(f"targets declare temperatures {targets.temperatures}, the codec {self.temperatures}")
        self._check_storable(targets)
        arrays = _ENCODERS[self.name](self, targets)
        if self.num_draws:
            assert targets.counts is not None, "a scheme that draws stores how often"
            order = _column_order(targets.num_entries) if self.name == "packed" else slice(None)
            arrays["counts"] = np.ascontiguousarray(targets.counts[order].T.astype(self._count_dtype))
        if self.hidden_size:
            assert targets.hidden is not None, "the hidden scheme stores hidden states"
            arrays["hidden"] = float_to_bfloat16(targets.hidden) if self.hidden_dtype == "bfloat16" else targets.hidden
        return {name: compress(array) for name, array in arrays.items()}

    def _check_storable(self, targets: SparseTargets) -> None:
        """Refuse to write what :meth:`decode` would refuse to read."""
        if len(targets.token_ids) and int(targets.token_ids.max()) >= self.vocab_size:
            raise ValueError(f"token id {targets.token_ids.max()} in a vocabulary of {self.vocab_size}")
        if int(targets.num_entries.max(initial=0)) > self.max_entries:
            raise ValueError(
                f"{targets.num_entries.max()} entries at a position, at most {self.max_entries} were declared"
            )
        if (
            not _all_logprobs(targets.logprobs, targets.label_logprobs)
            or not (targets.tail_logprobs <= MAX_LOGPROB).all()
        ):
            raise TeacherOutputError("a logprob that is not finite and at most 0 cannot be stored")
        if (targets.counts is not None) != (self.num_draws > 0):
            raise ValueError(f"counts of a scheme with {self.num_draws} draws")
        if targets.counts is not None and int(targets.counts.max(initial=0)) > self.num_draws:
            raise ValueError(f"an entry drawn {targets.counts.max()} times in {self.num_draws} draws")
        if not (np.isfinite(targets.logz).all() and np.isfinite(targets.entropy).all()):
            raise TeacherOutputError("a log-normaliser or an entropy that is not finite cannot be stored")

    def decode(self, frames: Frames, num_targets: int, where: str) -> CompactTargets:
        """Undo :meth:`encode`.

        Args:
            frames: Column name to frame.
            num_targets: N, known from the loss mask.
            where: Names shard and sequence in messages.

        Raises:
            CacheCorruptError: A frame is not intact, or its values cannot have been written.
        """
        try:
            compact = _DECODERS[self.name](self, frames, num_targets, where)
            if self.num_draws:
                compact = dataclasses.replace(compact, counts=self._decode_counts(frames, compact.num_entries, where))
        except KeyError as error:
            raise CacheCorruptError(f"{where}: column {error} is missing") from error
        if len(compact.token_ids) and int(compact.token_ids.max()) >= self.vocab_size:
            raise CacheCorruptError(f"{where}: token id {compact.token_ids.max()} in a vocabulary of {self.vocab_size}")
        return compact

    @property
    def column_names(self) -> tuple[str, ...]:
        """Names of the columns that :meth:`encode` gives."""
        counts = ("counts",) if self.num_draws else ()
        return _COLUMNS[self.name] + counts + (("hidden",) if self.hidden_size else ())

    @property
    def _count_dtype(self) -> type[np.uint8] | type[np.uint16]:
        return np.uint8 if self.num_draws < 256 else np.uint16

    def _decode_counts(self, frames: Frames, num_entries: UIntArray, where: str) -> CountArray:
        total, num_temperatures = int(num_entries.sum(dtype=np.int64)), len(self.temperatures)
        stored = read_array(
            frames["counts"], self._count_dtype, what=f"{where}, counts", count=total * num_temperatures
        ).reshape(num_temperatures, total)
        if int(stored.max(initial=0)) > self.num_draws:
            raise CacheCorruptError(f"{where}: an entry drawn {stored.max()} times in {self.num_draws} draws")
        counts = np.empty((total, num_temperatures), dtype=np.uint16)
        counts[_column_order(num_entries) if self.name == "packed" else slice(None)] = stored.T
        return counts

    def logprob_error_bound(self, logprobs: FloatArray) -> FloatArray:
        """Largest difference in nats between a stored and a true logprob, for each of ``logprobs``.

        exact: rounding of float32. packed: a step and a half of the level (half a step of rounding, one more where an entry
        had to make room so that the teacher's first choice stays first); what rescaling all K entries of mass M together
        can shift, at most ``0.65 step (K / M)^growth`` by Hoelder's inequality, with M no less than the entry itself; and
        the tail's own error.
        """
        if self.name == "exact":
            return np.full_like(logprobs, 1e-5)
        step = np.minimum(self.step * np.exp(LEVEL_GROWTH * (-logprobs + LEVEL_MAX_STEP)), LEVEL_MAX_STEP)
        shift = 0.65 * np.minimum(self.step * (self.max_entries * np.exp(-logprobs)) ** LEVEL_GROWTH, LEVEL_MAX_STEP)
        return np.asarray(1.5 * step + shift + TAIL_ERROR, dtype=np.float32)

    def tables(self) -> tuple[FloatArray | None, FloatArray | None]:
        """Value table ``[256]`` and tail table ``[num_temperatures, 256]`` of this codec's compact targets, or None."""
        return (-self._levels(), self._tail_table()) if self.name == "packed" else (None, None)

    def _levels(self) -> FloatArray:
        """``[256]``: -logprob of each level."""
        levels = np.zeros(256)
        for i in range(1, 256):
            levels[i] = levels[i - 1] + min(self.step * math.exp(LEVEL_GROWTH * levels[i - 1]), LEVEL_MAX_STEP)
        return levels.astype(np.float32)

    def _tail_table(self) -> FloatArray:
        """``[num_temperatures, 256]``: log tail mass of each code."""
        row = np.concatenate([[-np.inf], -np.logaddexp(0, -TAIL_LOG_ODDS)]).astype(np.float32)
        return np.tile(row, (len(self.temperatures), 1))

    def _entropy_step(self) -> float:
        return math.log(self.vocab_size) / 255


# --- exact ------------------------------------------------------------------------------------------------------------


def _encode_exact(codec: Codec, targets: SparseTargets) -> dict[str, npt.NDArray[Any]]:
    return {
        "num_entries": targets.num_entries,
        "token_ids": targets.token_ids,
        "logprobs": targets.logprobs,
        "tails": targets.tail_logprobs,
        "logz": targets.logz,
        "label_logprobs": targets.label_logprobs,
        "entropy": targets.entropy,
    }


def _decode_exact(codec: Codec, frames: Frames, n: int, where: str) -> CompactTargets:
    def floats(name: str, count: int) -> FloatArray:
        return cast(FloatArray, read_array(frames[name], np.float32, what=f"{where}, {name}", count=count))

    num_entries = _read_num_entries(codec, frames, n, where, np.uint32)
    total = int(num_entries.sum(dtype=np.int64))
    tails = floats("tails", n * len(codec.temperatures)).reshape(n, len(codec.temperatures))
    logprobs, label_logprobs = floats("logprobs", total), floats("label_logprobs", n)
    logz, entropy = floats("logz", n), floats("entropy", n)
    if not _all_logprobs(logprobs, label_logprobs) or not (tails <= MAX_LOGPROB).all():
        raise CacheCorruptError(f"{where}: a logprob that is not finite and at most 0")
    if not (np.isfinite(logz).all() and np.isfinite(entropy).all()):
        raise CacheCorruptError(f"{where}: a log-normaliser or an entropy that is not finite")
    return CompactTargets(
        num_entries=num_entries,
        token_ids=cast(UIntArray, read_array(frames["token_ids"], np.uint32, what=f"{where}, token_ids", count=total)),
        values=logprobs,
        value_table=None,
        tails=tails,
        tail_table=None,
        logz=logz,
        label_logprobs=label_logprobs,
        entropy=entropy,
        hidden=_read_hidden(codec, frames, n, where),
    )


# --- packed -----------------------------------------------------------------------------------------------------------


def _encode_packed(codec: Codec, targets: SparseTargets) -> dict[str, npt.NDArray[Any]]:
    if (np.abs(targets.logz) > LARGEST_LOGZ).any():
        raise ConfigError(
            f"codec packed holds log-normalisers up to {LARGEST_LOGZ}, found {np.abs(targets.logz).max():.0f}",
            hint="dump with --codec exact",
        )
    order = _column_order(targets.num_entries)
    symbols, low, escapes = _encode_gaps(_gaps(targets)[order])
    levels, lowest = _quantise(codec, targets)
    table = codec._levels()
    return {
        "num_entries": targets.num_entries.astype(np.uint8 if codec.max_entries < 256 else np.uint32),
        "id_symbols": symbols,
        "id_low": low,
        "id_escapes": escapes,
        "levels": levels[order],
        "lowest_level": lowest,
        "tails": _encode_tails(targets.tail_logprobs),
        "logz": _byte_planes(targets.logz.astype(np.float16)),
        "label_levels": _nearest(table, -targets.label_logprobs),
        "entropy": np.clip(np.rint(targets.entropy / codec._entropy_step()), 0, 255).astype(np.uint8),
    }


def _decode_packed(codec: Codec, frames: Frames, n: int, where: str) -> CompactTargets:
    def read(name: str, count: int, dtype: npt.DTypeLike = np.uint8) -> npt.NDArray[Any]:
        return read_array(frames[name], dtype, what=f"{where}, {name}", count=count)

    num_entries = _read_num_entries(codec, frames, n, where, np.uint8 if codec.max_entries < 256 else np.uint32)
    total = int(num_entries.sum(dtype=np.int64))
    order = _column_order(num_entries)
    symbols = read("id_symbols", total)
    num_escapes, num_low = int((symbols == GAP_ESCAPE).sum()), int((symbols >= GAP_SMALL).sum())
    low = read("id_low", num_low - num_escapes)
    escapes = read("id_escapes", num_escapes, np.uint32)
    gaps = np.empty(total, dtype=np.int64)
    gaps[order] = _decode_gaps(symbols, low, escapes)
    lowest = read("lowest_level", n)
    below = np.empty(total, dtype=np.uint8)
    below[order] = read("levels", total)
    logz = _join_planes(read("logz", 2 * n)).astype(np.float32)
    if not np.isfinite(logz).all():
        raise CacheCorruptError(f"{where}, logz: a log-normaliser that is not finite")
    ceiling = np.repeat(lowest, num_entries)
    if (below > ceiling).any():
        raise CacheCorruptError(f"{where}, levels: a level below zero")
    num_temperatures = len(codec.temperatures)
    table = codec._levels()
    return CompactTargets(
        num_entries=num_entries,
        token_ids=_ids_from_gaps(gaps, num_entries, where),
        values=ceiling - below,
        value_table=-table,
        tails=read("tails", n * num_temperatures).reshape(num_temperatures, n).T,
        tail_table=codec._tail_table(),
        logz=logz,
        label_logprobs=-table[read("label_levels", n)],
        entropy=(read("entropy", n) * codec._entropy_step()).astype(np.float32),
        hidden=_read_hidden(codec, frames, n, where),
    )


def _column_order(num_entries: UIntArray) -> npt.NDArray[np.int64]:
    """Entry indices by rank inside the position first, then by position: neighbours in a frame then look alike.

    Positions are taken by falling number of entries, so that the entries of one rank are a prefix of them.
    """
    counts = num_entries.astype(np.int64)
    offsets = np.cumsum(counts) - counts
    by_count = np.argsort(-counts, kind="stable")
    ranks = np.arange(counts.max(initial=0))[:, None]
    grid = offsets[by_count] + ranks
    return grid[ranks < counts[by_count]]


def _gaps(targets: SparseTargets) -> npt.NDArray[np.int64]:
    """``id - previous id - 1`` inside a position; the first entry of a position counts from -1."""
    ids = targets.token_ids.astype(np.int64)
    gaps = np.diff(ids, prepend=-1) - 1
    starts = targets.offsets[:-1][targets.num_entries > 0]
    gaps[starts] = ids[starts]
    assert (gaps >= 0).all(), "token ids ascend inside a position"
    return gaps


def _ids_from_gaps(gaps: npt.NDArray[np.int64], num_entries: UIntArray, where: str) -> UIntArray:
    running = np.cumsum(gaps + 1)
    counts = num_entries[num_entries > 0].astype(np.int64)
    starts = np.cumsum(counts) - counts
    before = running[starts] - (gaps[starts] + 1)
    ids = running - np.repeat(before, counts) - 1
    if len(ids) and int(ids.max()) > np.iinfo(np.uint32).max:
        raise CacheCorruptError(f"{where}, id_symbols: token ids past 2^32")
    return np.asarray(ids, dtype=np.uint32)


def _encode_gaps(gaps: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], UIntArray]:
    rest = gaps - GAP_SMALL
    high = rest >> 8
    escaped = high >= GAP_ESCAPE - GAP_SMALL
    two_bytes = (rest >= 0) & ~escaped
    symbols = np.where(rest < 0, gaps, np.where(escaped, GAP_ESCAPE, GAP_SMALL + high)).astype(np.uint8)
    return symbols, (rest[two_bytes] & 255).astype(np.uint8), gaps[escaped].astype(np.uint32)


def _decode_gaps(
    symbols: npt.NDArray[np.uint8], low: npt.NDArray[np.uint8], escapes: UIntArray
) -> npt.NDArray[np.int64]:
    gaps = symbols.astype(np.int64)
    escaped = symbols == GAP_ESCAPE
    two_bytes = (symbols >= GAP_SMALL) & ~escaped
    gaps[two_bytes] = GAP_SMALL + ((gaps[two_bytes] - GAP_SMALL) << 8) + low
    gaps[escaped] = escapes
    return gaps


def _nearest(levels: npt.NDArray[np.floating], values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    middles = (levels[1:] + levels[:-1]) / 2
    return np.searchsorted(middles, values).astype(np.uint8)


def _quantise(codec: Codec, targets: SparseTargets) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Levels counted down from each position's lowest probability, and that lowest level."""
    table = codec._levels()
    if len(targets.logprobs) and float(targets.logprobs.min()) < -table[-1]:
        raise ConfigError(
            f"codec packed holds logprobs down to {-table[-1]:.0f} nats, found {targets.logprobs.min():.1f}",
            hint="dump with --codec exact",
        )
    level = _nearest(table, -targets.logprobs).astype(np.int64)
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


def _encode_tails(tail_logprobs: FloatArray) -> npt.NDArray[np.uint8]:
    """``[num_temperatures, N]``, temperature by temperature."""
    tail = np.minimum(tail_logprobs.T.astype(np.float64), -1e-12)
    with np.errstate(divide="ignore"):
        log_odds = tail - np.log(-np.expm1(tail))
    return np.where(np.isneginf(tail_logprobs.T), 0, _nearest(TAIL_LOG_ODDS, log_odds) + 1).astype(np.uint8)


def _byte_planes(array: npt.NDArray[np.float16]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array.view(np.uint8).reshape(-1, 2).T).ravel()


def _join_planes(planes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
    return np.ascontiguousarray(planes.reshape(2, -1).T).view(np.float16).ravel()


# --- shared -----------------------------------------------------------------------------------------------------------


def _all_logprobs(*arrays: FloatArray) -> bool:
    return all(bool(np.isfinite(array).all() and (array <= MAX_LOGPROB).all()) for array in arrays)


def _read_num_entries(codec: Codec, frames: Frames, n: int, where: str, dtype: npt.DTypeLike) -> UIntArray:
    num_entries = read_array(frames["num_entries"], dtype, what=f"{where}, num_entries", count=n).astype(np.uint32)
    if n and int(num_entries.max()) > codec.max_entries:
        raise CacheCorruptError(
            f"{where}: {num_entries.max()} entries at a position, the plan allows {codec.max_entries}"
        )
    return num_entries


def _read_hidden(codec: Codec, frames: Frames, n: int, where: str) -> FloatArray | npt.NDArray[np.uint16] | None:
    if not codec.hidden_size:
        return None
    dtype = np.uint16 if codec.hidden_dtype == "bfloat16" else np.float32
    array: npt.NDArray[Any] = read_array(frames["hidden"], dtype, what=f"{where}, hidden", count=n * codec.hidden_size)
    return array.reshape(n, codec.hidden_size)


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


_Encoder = Callable[[Codec, SparseTargets], dict[str, npt.NDArray[Any]]]
_Decoder = Callable[[Codec, Frames, int, str], CompactTargets]
_ENCODERS: dict[str, _Encoder] = {"exact": _encode_exact, "packed": _encode_packed}
_DECODERS: dict[str, _Decoder] = {"exact": _decode_exact, "packed": _decode_packed}
_COLUMNS: dict[str, tuple[str, ...]] = {
    "exact": ("num_entries", "token_ids", "logprobs", "tails", "logz", "label_logprobs", "entropy"),
    "packed": ("num_entries", "id_symbols", "id_low", "id_escapes", "levels", "lowest_level", "tails", "logz",
               "label_levels", "entropy"),
}  # fmt: skip
