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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from kdcache.cache import packed
from kdcache.cache.frames import compress, read_array
from kdcache.cache.own_order import GAP_GOES_ON, OwnOrder, most_gap_bytes
from kdcache.cache.tables import MAX_VOCAB, IdTables, ascending, sorted_by
from kdcache.errors import CacheCorruptError, ConfigError, TeacherOutputError
from kdcache.targets import CountArray, FloatArray, SparseTargets, UIntArray, rescale_entries

CodecName = Literal["exact", "packed"]
Frames = Mapping[str, bytes | memoryview]


# The largest logprob that rounding of float32 can give.
MAX_LOGPROB = 1e-4


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
            CacheCorruptError: An id stands twice at a position.
        """
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
        hidden = None if self.hidden is None else bfloat16_to_float(self.hidden)
        targets = SparseTargets(
            temperatures, self.num_entries, self.token_ids, logprobs, tails,
            self.logz, self.label_logprobs, self.entropy, hidden, self.counts, self.frequencies,
        )  # fmt: skip
        return targets if self.ascending else ascending(targets)


@dataclass(frozen=True, slots=True)
class Codec:
    """A way to store targets: its name and everything a reader needs to undo it.

    Attributes:
        name: ``exact`` or ``packed``.
        vocab_size: V; ids are below it.
        temperatures: Declared temperatures.
        max_entries: Largest number of entries at a position.
        levels: Of logprobs (packed).
        num_draws: Draws a position and temperature of the schemes that draw, else 0.
        frequencies: Whether only the counts of drawn entries are kept.
        hidden_size: D of the ``hidden`` scheme, else 0.
        hidden_dtype: What hidden states are stored as.
        id_tables: A renumbering of token ids by the token before (packed), or None.
    """

    name: CodecName
    vocab_size: int
    temperatures: tuple[float, ...]
    max_entries: int
    levels: packed.Levels = packed.STANDARD
    num_draws: int = 0
    frequencies: bool = False
    hidden_size: int = 0
    hidden_dtype: Literal["float32", "bfloat16"] = "float32"
    id_tables: IdTables | None = None

    def encode(self, targets: SparseTargets, contexts: UIntArray | None = None) -> dict[str, bytes]:
        """Frames by column name, the same names for every sequence of a cache.

        Args:
            targets: What the teacher said at N positions.
            contexts: ``[N]``, the token before each (``TokenSequence.contexts``); needed where there are tables.

        Raises:
            ConfigError: The codec cannot hold these values within its bound.
            TeacherOutputError: A value is NaN or infinite.
        """
        if targets.temperatures != self.temperatures:
            raise ValueError(f"targets declare temperatures {targets.temperatures}, the codec {self.temperatures}")
        self._check_storable(targets)
        arrays: dict[str, npt.NDArray[Any]] = {}
        if self.renumbers:
            codes: npt.NDArray[Any] = targets.token_ids
            if self.id_tables is not None:
                assert contexts is not None, "tables renumber ids by the token before"
                codes = self.id_tables.codes(codes, targets.num_entries, contexts)
            # numpy indexes with this type alone: converted once.
            codes, start = codes.astype(np.intp), self._num_listed
            order = OwnOrder.count(codes[codes >= start] - start if start else codes)
            targets = sorted_by(targets, order.codes(start, self.vocab_size).take(codes))
            arrays = {"frequent_gaps": order.gaps(), "frequent_steps": order.steps}
        arrays |= _ENCODERS[self.name](self, targets)
        if self.hidden_size:
            assert targets.hidden is not None, "the hidden scheme stores hidden states"
            arrays["hidden"] = float_to_bfloat16(targets.hidden) if self.hidden_dtype == "bfloat16" else targets.hidden
        return {
            name: compress(arrays[name], block_bytes=self._block_bytes(name, arrays[name]))
            for name in self.column_names
        }

    def _block_bytes(self, name: str, array: npt.NDArray[Any]) -> int | None:
        if self.name == "packed" and name in packed.BLOCK_A_ROW:
            return int(array.shape[1] * array.itemsize)
        return packed.BLOCK_BYTES.get(name) if self.name == "packed" else None

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
        if targets.frequencies and not self.frequencies:
            raise ValueError("logprobs of the entries are not known, and the codec keeps them")
        if (targets.counts is not None) != (self.num_draws > 0):
            raise ValueError(f"counts of a scheme with {self.num_draws} draws")
        if targets.counts is not None and int(targets.counts.max(initial=0)) > self.num_draws:
            raise ValueError(f"an entry drawn {targets.counts.max()} times in {self.num_draws} draws")
        if not (np.isfinite(targets.logz).all() and np.isfinite(targets.entropy).all()):
            raise TeacherOutputError("a log-normaliser or an entropy that is not finite cannot be stored")

    def decode(self, frames: Frames, num_targets: int, where: str, contexts: UIntArray | None = None) -> CompactTargets:
        """Undo :meth:`encode`.

        Args:
            frames: Column name to frame.
            num_targets: N, known from the loss mask.
            where: Names shard and sequence in messages.
            contexts: As for :meth:`encode`.

        Raises:
            CacheCorruptError: A frame is not intact, or its values cannot have been written.
        """
        try:
            compact = _DECODERS[self.name](self, frames, num_targets, where)
            ids = self._token_ids(frames, compact, where, contexts) if self.renumbers else None
        except KeyError as error:
            raise CacheCorruptError(f"{where}: column {error} is missing") from error
        if ids is not None:
            compact = replace(compact, token_ids=ids, ascending=False)
        elif len(compact.token_ids) and int(compact.token_ids.max()) >= self.vocab_size:
            raise CacheCorruptError(f"{where}: token id {compact.token_ids.max()} in a vocabulary of {self.vocab_size}")
        return compact

    def _token_ids(
        self, frames: Frames, compact: CompactTargets, where: str, contexts: UIntArray | None
    ) -> npt.NDArray[np.uint32]:
        """Token ids of codes."""
        most = most_gap_bytes(self.vocab_size)
        gaps = read_array(frames["frequent_gaps"], np.uint8, what=f"{where}, frequent_gaps", max_count=most)
        number = int(np.count_nonzero(gaps != GAP_GOES_ON))
        steps = read_array(frames["frequent_steps"], np.uint8, what=f"{where}, frequent_steps", count=number)
        order = OwnOrder.of(
            cast(npt.NDArray[np.uint8], gaps), cast(npt.NDArray[np.uint8], steps), self.vocab_size, where
        )
        codes = order.undo(self._num_listed, self.vocab_size)
        try:
            before: npt.NDArray[np.uint32] = codes.take(compact.token_ids)
        except IndexError as error:
            raise CacheCorruptError(
                f"{where}: code {compact.token_ids.max()} of {len(codes)} stands for no token id"
            ) from error
        if self.id_tables is None:
            return before
        assert contexts is not None, "tables renumber ids by the token before"
        return self.id_tables.token_ids(before, compact.num_entries, contexts, where)

    @property
    def renumbers(self) -> bool:
        """Whether ids are stored as codes: always, but in vocabularies for which the order of each row would be too long."""
        return self.name == "packed" and self.vocab_size <= MAX_VOCAB

    @property
    def _num_listed(self) -> int:
        """Codes that are places in lists."""
        return 0 if self.id_tables is None else self.id_tables.list_length

    @property
    def column_names(self) -> tuple[str, ...]:
        """Names of the columns that :meth:`encode` gives."""
        names = _COLUMNS[self.name]
        if self.frequencies:
            names = tuple(name for name in names if name not in _UNKNOWN_TO_FREQUENCIES)
        if self.renumbers:
            names += ("frequent_gaps", "frequent_steps")
        if self.has_bits:
            names += ("id_bits",)
        if self.num_draws:
            names += ("counts",) if self.name == "exact" else ("counts", "count_escapes")
        return names + (("hidden",) if self.hidden_size else ())

    @property
    def has_bits(self) -> bool:
        """Whether the smallest ids are kept as bits: where they are renumbered, and many of a position are kept."""
        return self.id_tables is not None and not self.num_draws

    @property
    def _count_dtype(self) -> type[np.uint8] | type[np.uint16]:
        return np.uint8 if self.num_draws < 256 else np.uint16

    def logprob_error_bound(self, logprobs: FloatArray) -> FloatArray:
        """Largest difference in nats between a stored and a true logprob, for each of ``logprobs``.

        exact: rounding of float32. packed: a step and a half of the level (half a step of rounding, one more where an entry
        had to make room so that the teacher's first choice stays first); what rescaling all K entries of mass M together
        can shift, at most ``0.65 step (K / M)^growth`` by Hoelder's inequality, with M no less than the entry itself; and
        the tail's own error. Of frequencies only the label has a logprob: a step.
        """
        if self.name == "exact":
            return np.full_like(logprobs, 1e-5)
        if self.frequencies:
            return self.levels.step_at(-logprobs + packed.LEVEL_MAX_STEP)
        step = self.levels.step_at(-logprobs + packed.LEVEL_MAX_STEP)
        together = self.levels.step * (self.max_entries * np.exp(-logprobs)) ** self.levels.growth
        shift = 0.65 * np.minimum(together, packed.LEVEL_MAX_STEP)
        return np.asarray(1.5 * step + shift + packed.TAIL_ERROR, dtype=np.float32)

    def tables(self) -> tuple[FloatArray | None, FloatArray | None]:
        """Value table ``[256]`` and tail table ``[num_temperatures, 256]`` of this codec's compact targets, or None."""
        if self.frequencies:
            return (_log_counts() if self.num_draws < 256 else None), None
        if self.name == "exact":
            return None, None
        return -self.levels.table, packed.tail_table(len(self.temperatures))


@cache
def _log_counts() -> FloatArray:
    """``[256]``: log of a count; read-only. The first is of no use, and finite."""
    table: FloatArray = np.log(np.maximum(np.arange(256), 1)).astype(np.float32)
    table.setflags(write=False)
    return table


# --- exact ------------------------------------------------------------------------------------------------------------


def _encode_exact(codec: Codec, targets: SparseTargets) -> dict[str, npt.NDArray[Any]]:
    arrays: dict[str, npt.NDArray[Any]] = {
        "num_entries": targets.num_entries,
        "token_ids": targets.token_ids,
        "label_logprobs": targets.label_logprobs,
        "entropy": targets.entropy,
    }
    if not codec.frequencies:
        arrays |= {"logprobs": targets.logprobs, "tails": targets.tail_logprobs, "logz": targets.logz}
    if targets.counts is not None:
        arrays["counts"] = np.ascontiguousarray(targets.counts.T.astype(codec._count_dtype))
    return arrays


def _decode_exact(codec: Codec, frames: Frames, n: int, where: str) -> CompactTargets:
    def floats(name: str, count: int) -> FloatArray:
        return cast(FloatArray, read_array(frames[name], np.float32, what=f"{where}, {name}", count=count))

    num_entries = _read_num_entries(codec, frames, n, where, np.uint32)
    total = int(num_entries.sum(dtype=np.int64))
    token_ids = cast(UIntArray, read_array(frames["token_ids"], np.uint32, what=f"{where}, token_ids", count=total))
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
    if not (_all_logprobs(label_logprobs) and np.isfinite(entropy).all()):
        raise CacheCorruptError(f"{where}: a label's logprob or an entropy that cannot be")
    if counts is not None and codec.frequencies:
        return CompactTargets(**known, **_frequencies(codec, counts, num_entries, where))
    logprobs, logz = floats("logprobs", total), floats("logz", n)
    tails = floats("tails", n * len(codec.temperatures)).reshape(n, len(codec.temperatures))
    if not _all_logprobs(logprobs) or not (tails <= MAX_LOGPROB).all():
        raise CacheCorruptError(f"{where}: a logprob that is not finite and at most 0")
    if not np.isfinite(logz).all():
        raise CacheCorruptError(f"{where}: a log-normaliser that is not finite")
    return CompactTargets(**known, values=logprobs, value_table=None, tails=tails, tail_table=None, logz=logz)


# --- packed -----------------------------------------------------------------------------------------------------------


def _encode_packed(codec: Codec, targets: SparseTargets) -> dict[str, npt.NDArray[Any]]:
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
        gaps = packed.ColumnOrder(num_rest).to_columns(packed.id_gaps(ids, num_rest))
    else:
        gaps = order.to_columns(packed.id_gaps(targets.token_ids, targets.num_entries))
    arrays["id_symbols"], arrays["id_low"], arrays["id_escapes"] = packed.encode_gaps(gaps)
    if not codec.frequencies:
        levels, arrays["lowest_level"] = packed.quantise(codec.levels, targets)
        arrays["levels"] = order.to_columns(levels)
        arrays["tails"] = packed.encode_tails(targets.tail_logprobs)
        arrays["logz"] = packed.encode_logz(targets.logz)
    if targets.counts is not None:
        columns = [order.to_columns(targets.counts[:, t]) for t in range(len(codec.temperatures))]
        pairs, escapes = packed.encode_counts(np.concatenate(columns))
        arrays |= {"counts": pairs, "count_escapes": escapes.astype(codec._count_dtype)}
    return arrays


def _decode_packed(codec: Codec, frames: Frames, n: int, where: str) -> CompactTargets:
    def read(name: str, count: int, dtype: npt.DTypeLike = np.uint8) -> npt.NDArray[Any]:
        return read_array(frames[name], dtype, what=f"{where}, {name}", count=count)

    num_entries = _read_num_entries(codec, frames, n, where, np.uint8 if codec.max_entries < 256 else np.uint32)
    total = int(num_entries.sum(dtype=np.int64))
    order = packed.ColumnOrder(num_entries)
    if codec.has_bits:
        few, num_few = packed.ids_from_bits(read("id_bits", n * packed.NUM_BITS // 8), n)
        if (num_few > num_entries).any():
            raise CacheCorruptError(f"{where}, id_bits: more ids at a position than it has entries")
        num_rest = num_entries - num_few
        rest = _read_ids(frames, packed.ColumnOrder(num_rest), num_rest, where)
        token_ids = packed.join_ids(few, num_few, rest, num_rest)
    else:
        token_ids = _read_ids(frames, order, num_entries, where)
    if token_ids.dtype == np.int64 and int(token_ids.max(initial=0)) > np.iinfo(np.uint32).max:
        raise CacheCorruptError(f"{where}, id_symbols: token ids past 2^32")
    counts = _read_counts(codec, frames, total, where)
    if counts is not None:
        columns = [order.to_rows(counts[:, t]) for t in range(len(codec.temperatures))]
        counts = np.stack(columns, axis=1)
    known: dict[str, Any] = {
        "num_entries": num_entries,
        "token_ids": token_ids if codec.renumbers else token_ids.astype(np.uint32),
        "label_logprobs": -codec.levels.table[read("label_levels", n)],
        "entropy": (read("entropy", n) * packed.ENTROPY_STEP).astype(np.float32),
        "hidden": _read_hidden(codec, frames, n, where),
        "counts": counts,
    }
    if counts is not None and codec.frequencies:
        return CompactTargets(**known, **_frequencies(codec, counts, num_entries, where))
    below = order.to_rows(read("levels", total))
    ceiling = np.repeat(read("lowest_level", n), num_entries)
    if (below > ceiling).any():
        raise CacheCorruptError(f"{where}, levels: a level below zero")
    num_temperatures = len(codec.temperatures)
    return CompactTargets(
        **known,
        values=ceiling - below,
        value_table=-codec.levels.table,
        tails=read("tails", n * num_temperatures).reshape(num_temperatures, n).T,
        tail_table=packed.tail_table(num_temperatures),
        logz=packed.decode_logz(read("logz", 2 * n)),
    )


def _read_ids(frames: Frames, order: packed.ColumnOrder, num_entries: UIntArray, where: str) -> npt.NDArray[np.int64]:
    """Ids out of their gaps, position by position."""

    def read(name: str, count: int, dtype: npt.DTypeLike = np.uint8) -> npt.NDArray[Any]:
        return read_array(frames[name], dtype, what=f"{where}, {name}", count=count)

    symbols = read("id_symbols", int(num_entries.sum(dtype=np.int64)))
    num_escapes = int(np.count_nonzero(symbols == packed.GAP_ESCAPE))
    num_low = int(np.count_nonzero(symbols >= packed.GAP_SMALL)) - num_escapes
    escapes = cast(UIntArray, read("id_escapes", num_escapes, np.uint32))
    return order.ids_from_gaps(packed.decode_gaps(symbols, read("id_low", num_low), escapes))


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


def _read_counts(codec: Codec, frames: Frames, total: int, where: str) -> CountArray | None:
    """``[E, num_temperatures]``, entries in the order of the column."""
    if not codec.num_draws:
        return None
    count, dtype = total * len(codec.temperatures), codec._count_dtype
    if codec.name == "exact":
        stored = read_array(frames["counts"], dtype, what=f"{where}, counts", count=count).astype(np.uint16)
    else:
        pairs = read_array(frames["counts"], np.uint8, what=f"{where}, counts", count=(count + 1) // 2)
        stored = packed.small_counts(cast(npt.NDArray[np.uint8], pairs), count)
        large = np.flatnonzero(stored == packed.COUNT_ESCAPE)
        beyond = read_array(frames["count_escapes"], dtype, what=f"{where}, count_escapes", count=len(large))
        if int(beyond.max(initial=0)) > codec.num_draws:
            raise CacheCorruptError(
                f"{where}: an entry drawn more than {beyond.max()} times in {codec.num_draws} draws"
            )
        stored[large] += beyond.astype(np.uint16)
    if int(stored.max(initial=0)) > codec.num_draws:
        raise CacheCorruptError(f"{where}: an entry drawn {stored.max()} times in {codec.num_draws} draws")
    return stored.reshape(len(codec.temperatures), total).T


def _frequencies(codec: Codec, counts: CountArray, num_entries: UIntArray, where: str) -> dict[str, Any]:
    """What stands in the place of logprobs, tails and log-normalisers where only counts are known.

    ``log(counts)``, which need only be normalised; nothing left out; zeros.
    """
    n, values = len(num_entries), counts[:, 0]
    sound = bool(values.all() and num_entries.all())
    if sound and n:
        num_drawn = np.add.reduceat(values, np.cumsum(num_entries, dtype=np.int64) - num_entries, dtype=np.int64)
        sound = bool((num_drawn == codec.num_draws).all())
    if not sound:
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
_UNKNOWN_TO_FREQUENCIES = ("logprobs", "levels", "lowest_level", "tails", "logz")
_COLUMNS: dict[str, tuple[str, ...]] = {
    "exact": ("num_entries", "token_ids", "logprobs", "tails", "logz", "label_logprobs", "entropy"),
    "packed": ("num_entries", "id_symbols", "id_low", "id_escapes", "levels", "lowest_level", "tails", "logz",
               "label_levels", "entropy"),
}  # fmt: skip
