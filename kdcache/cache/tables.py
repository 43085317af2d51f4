"""Token ids renumbered so that the likely ones are small: sorted and gap-coded, they then take fewer bits.

A table knows an order of the whole vocabulary (most frequent entry first: ranks) and, for the tokens that most often stand
before, a list of the ranks most frequent after each of them. The **code** of an entry after a token is its place in that
token's list; ranks that are not in the list have the code ``list length + rank``. A token without a list has the first ranks
as its list. Measured on top_k 64, with the order of each row (:mod:`kdcache.cache.own_order`): ids take 60 bytes a position as they
are, 58 by rank, 46 by the token before; 72 without either.

Tables are counted once, on a pilot, before the first shard, and named in the plan by the digest of their bytes, so shards stay
pure functions of it. They cost nothing in fidelity: ids come back exactly, whatever the table says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

from kdcache.cache.jit import compiled
from kdcache.cache.own_order import NO_ORDER, OwnOrder
from kdcache.errors import CacheCorruptError
from kdcache.targets import SparseTargets, UIntArray

# Lists hold ranks below this; rarer tokens are not worth a place.
MAX_RANK = 1 << 13
MAX_BYTES = 256 << 20
MAX_VOCAB = 1 << 20
# Two bytes each in memory, once something is encoded by numpy alone.
MAX_CODES = 1 << 29
COUNT_AT_ONCE = 1 << 24
SORT_AT_ONCE = 512
# Rows are sorted side by side where they are not much longer than what they hold.
MAX_PADDING = 8


class IdTables:
    """A renumbering of token ids by the token before.

    Attributes:
        order: ``[V]`` uint32, token ids by rank.
        contexts: ``[C]`` uint32, ascending: the tokens that have a list.
        lists: ``[C, M]`` uint16, ranks below ``MAX_RANK``, most frequent first.
    """

    def __init__(self, order: UIntArray, contexts: UIntArray, lists: npt.NDArray[np.uint16]) -> None:
        self.order, self.contexts = order, contexts
        num_contexts, self._length = lists.shape
        self._ranks = _places(order, len(order))
        self._rows = _places(contexts, len(order), missing=num_contexts)
        # The last row is for tokens without a list.
        self._lists = np.vstack([lists, np.arange(self._length, dtype=np.uint16)[None]])

    @classmethod
    def count(
        cls,
        pilot: Sequence[tuple[UIntArray, SparseTargets]],
        vocab_size: int,
        num_contexts: int,
        list_length: int,
        least_seen: int = 1,
    ) -> IdTables:
        """Count the entries of a pilot.

        Args:
            pilot: For each sequence the tokens before its targets ``[N]``, and the targets.
            vocab_size: V.
            num_contexts: C at most; 0 for an order alone.
            list_length: M at most.
            least_seen: How often a token has to stand before to have a list.
        """
        entries = np.zeros(vocab_size, dtype=np.int64)
        before = np.zeros(vocab_size, dtype=np.int64)
        for contexts, targets in pilot:
            entries += np.bincount(targets.token_ids, minlength=vocab_size)
            before += np.bincount(contexts, minlength=vocab_size)
        order = np.argsort(-entries, kind="stable").astype(np.uint32)
        chosen = np.argsort(-before, kind="stable")[: min(num_contexts, int((before >= least_seen).sum()))]
        frequent = np.sort(chosen).astype(np.uint32)
        num_ranks = min(MAX_RANK, vocab_size)
        length = min(list_length, num_ranks) if len(frequent) else 0
        ranks, rows = _places(order, vocab_size), _places(frequent, vocab_size, missing=len(frequent))

        def cells_of(contexts: UIntArray, targets: SparseTargets) -> npt.NDArray[np.int64]:
            """Row and rank of each entry that may be listed, as one number."""
            row, rank = np.repeat(rows[contexts], targets.num_entries).astype(np.int64), ranks[targets.token_ids]
            counted = (row < len(frequent)) & (rank < num_ranks)
            return np.asarray(row[counted] * num_ranks + rank[counted])

        counts = np.zeros(len(frequent) * num_ranks, dtype=np.int32)
        for cells in _in_chunks(cells_of(contexts, targets) for contexts, targets in pilot):
            counts += np.bincount(cells, minlength=len(counts)).astype(np.int32)
        lists = np.empty((len(frequent), length), dtype=np.uint16)
        for some in np.array_split(np.arange(len(frequent)), len(frequent) // SORT_AT_ONCE + 1):
            lists[some] = np.argsort(-counts.reshape(-1, num_ranks)[some], axis=1, kind="stable")[:, :length]
        return cls(order, frequent, lists)

    def to_bytes(self) -> bytes:
        """A safetensors file; the same tables give the same bytes."""
        arrays = {"order": self.order, "contexts": self.contexts, "lists": self.lists}
        data: bytes = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        return data

    @classmethod
    def from_bytes(cls, data: bytes, vocab_size: int, where: str) -> IdTables:
        """Undo :meth:`to_bytes`.

        Raises:
            CacheCorruptError: Not such tables of this vocabulary.
        """
        if len(data) > MAX_BYTES:
            raise CacheCorruptError(f"{where}: tables of at most {MAX_BYTES} bytes were expected, found {len(data)}")
        try:
            arrays = safetensors.numpy.load(data)
        except (SafetensorError, ValueError, KeyError) as error:
            raise CacheCorruptError(f"{where}: not a safetensors file ({error})") from error
        kinds = {name: (array.dtype.str, array.ndim) for name, array in arrays.items()}
        if kinds != {"order": ("<u4", 1), "contexts": ("<u4", 1), "lists": ("<u2", 2)}:
            raise CacheCorruptError(f"{where}: order, contexts and lists were expected, found {kinds}")
        order, contexts, lists = arrays["order"], arrays["contexts"], arrays["lists"]
        num_ranks = min(MAX_RANK, vocab_size)
        sound = (
            len(order) == vocab_size
            and np.array_equal(np.sort(order), np.arange(vocab_size))
            and len(contexts) == len(lists)
            and bool((np.diff(contexts.astype(np.int64)) > 0).all())
            and int(contexts.max(initial=0)) < vocab_size
            and (len(contexts) + 1) * num_ranks <= MAX_CODES
            and lists.shape[1] <= num_ranks
            and int(lists.max(initial=0)) < num_ranks
            and bool((np.diff(np.sort(lists, axis=1).astype(np.int32), axis=1) > 0).all())
        )
        if not sound:
            raise CacheCorruptError(
                f"{where}: not an order of {vocab_size} tokens with lists of its first {num_ranks}, for at most "
                f"{MAX_CODES // num_ranks - 1} tokens"
            )
        return cls(order, contexts, lists)

    @property
    def list_length(self) -> int:
        """M: codes below it are places in lists, others are M and a rank."""
        length: int = self._length
        return length

    def codes(self, token_ids: UIntArray, num_entries: UIntArray, contexts: UIntArray) -> UIntArray:
        """``[E]``, the code of each entry.

        Args:
            token_ids: ``[E]``.
            num_entries: ``[N]``.
            contexts: ``[N]``, the token before each position.
        """
        _check_as_many(contexts, num_entries)
        if loops := compiled():
            rows, num_listed = self._rows[contexts], min(MAX_RANK, len(self.order))
            return np.asarray(loops.codes_of_ids(token_ids, num_entries, rows, self._lists, self._ranks, num_listed))
        table = self._code_table
        ranks = self._ranks[token_ids]
        rows = np.repeat(self._rows[contexts].astype(np.int64) * table.shape[1], num_entries)
        small = ranks < table.shape[1]
        codes = np.where(
            small, table.ravel()[rows + np.minimum(ranks, table.shape[1] - 1)], ranks + np.int32(self._length)
        )
        return np.asarray(codes, dtype=np.uint32)

    def token_ids(
        self, codes: UIntArray, num_entries: UIntArray, contexts: UIntArray, where: str, order: OwnOrder = NO_ORDER
    ) -> UIntArray:
        """Token ids of codes, in their order.

        Args:
            codes: ``[E]``.
            num_entries: ``[N]``.
            contexts: ``[N]``, the token before each position.
            where: Names shard and sequence in messages.
            order: What the sequence did to the codes that are in no list.

        Raises:
            CacheCorruptError: A code that no id has.
        """
        _check_as_many(contexts, num_entries)
        rows = self._rows[contexts]
        if loops := compiled():
            frequent = order.by_frequency.astype(np.uint32)
            ids, sound = loops.undo_tables(codes, frequent, num_entries, rows, self._lists, self.order)
            if not sound:
                most = self._length + len(frequent) + len(self.order)
                raise CacheCorruptError(f"{where}: code {codes.max()} of {most} stands for no token id")
            return np.asarray(ids)
        codes = order.undo(codes, self._length, len(self.order), where)
        ranked = self._lists.size - self._length
        places = codes + np.where(
            codes < self._length, np.repeat(rows, num_entries) * np.int64(self._length), np.int64(ranked)
        )
        return np.asarray(self._ids[places])

    @property
    def lists(self) -> npt.NDArray[np.uint16]:
        """``[C, M]``."""
        return self._lists[:-1]

    @cached_property
    def _ids(self) -> UIntArray:
        """Ids by row and code, then those of all ranks."""
        return np.concatenate([self.order[self._lists].ravel(), self.order])

    @cached_property
    def _code_table(self) -> npt.NDArray[np.uint16]:
        """``[C + 1, MAX_RANK]``: the code of a rank in each row. Made when something is encoded by numpy alone."""
        num_contexts, length = self.lists.shape
        num_ranks = min(MAX_RANK, len(self.order))
        codes = np.tile(np.arange(num_ranks, dtype=np.uint16) + np.uint16(length), (num_contexts + 1, 1))
        np.put_along_axis(codes[:-1], self.lists.astype(np.intp), np.arange(length, dtype=np.uint16)[None], axis=1)
        codes[-1, :length] = np.arange(length)
        return codes


def _check_as_many(contexts: UIntArray, num_entries: UIntArray) -> None:
    """Compiled loops do not look where one of them ends."""
    if len(contexts) != len(num_entries):
        raise ValueError(f"{len(num_entries)} positions and {len(contexts)} tokens before them")


def _places(items: UIntArray, size: int, missing: int = 0) -> npt.NDArray[np.int32]:
    """``[size]``: where each number stands among the items, or ``missing``."""
    places = np.full(size, missing, dtype=np.int32)
    places[items] = np.arange(len(items), dtype=np.int32)
    return places


def ascending(targets: SparseTargets) -> SparseTargets:
    """The same targets, token ids ascending inside a position.

    Raises:
        CacheCorruptError: An id stands twice at a position.
    """
    out = sorted_by(targets, targets.token_ids)
    position = np.repeat(np.arange(len(out)), out.num_entries)
    if ((np.diff(out.token_ids.astype(np.int64)) <= 0) & (np.diff(position) == 0)).any():
        raise CacheCorruptError("a token id stands twice at a position")
    return out


def sorted_by(targets: SparseTargets, numbers: UIntArray) -> SparseTargets:
    """Entries sorted by a number each, inside each position; the numbers take the place of the ids.

    Sorting values that carry their place is faster than ``argsort``, and rows of 32 bits are faster still.
    """
    num_entries, n = targets.num_entries.astype(np.int64), len(targets)
    k = int(num_entries.max(initial=0))
    number_bits, place_bits = int(numbers.max(initial=0)).bit_length(), max(k - 1, 0).bit_length()
    draws = np.empty((len(numbers), 0), dtype=np.uint16) if targets.counts is None else targets.counts
    fits = number_bits + place_bits <= 32
    if fits and (loops := compiled()) and n * k <= MAX_PADDING * len(numbers):
        keys = loops.sort_keys(numbers, targets.num_entries, k, place_bits)
        keys.sort(axis=1)
        numbers, logprobs, draws = loops.sorted_entries(keys, targets.num_entries, place_bits, targets.logprobs, draws)
    else:
        order, numbers = _sorted_inside(num_entries, numbers, number_bits, place_bits)
        logprobs, draws = targets.logprobs.take(order), draws[order]
    return replace(targets, token_ids=numbers, logprobs=logprobs, counts=None if targets.counts is None else draws)


def _sorted_inside(
    counts: npt.NDArray[np.int64], numbers: UIntArray, number_bits: int, place_bits: int
) -> tuple[npt.NDArray[np.int64], UIntArray]:
    """``[E]``: what sorts the numbers inside each position, and the numbers so sorted."""
    n, k = len(counts), int(counts.max(initial=0))
    if len(numbers) == k * n and number_bits + place_bits <= 32:
        rows = (numbers << np.uint32(place_bits)).reshape(n, k)
        rows |= np.arange(k, dtype=np.uint32)
        rows.sort(axis=1)
        order = np.arange(n)[:, None] * k + (rows & np.uint32((1 << place_bits) - 1))
        return order.ravel(), (rows >> np.uint32(place_bits)).ravel()
    position = np.repeat(np.arange(n), counts)
    if number_bits + place_bits + n.bit_length() > 63:
        order = np.lexsort((numbers, position))
        return order, numbers[order]
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    keys = (position << (number_bits + place_bits)) | (numbers.astype(np.int64) << place_bits)
    keys |= np.arange(len(numbers)) - starts
    keys.sort()
    numbers = ((keys >> place_bits) & ((1 << number_bits) - 1)).astype(np.uint32)
    return (keys & ((1 << place_bits) - 1)) + starts, numbers


def _in_chunks(parts: Any) -> Any:
    """Arrays joined until they are long enough to be worth a pass over the counts."""
    held: list[npt.NDArray[np.int64]] = []
    size = 0
    for part in parts:
        held.append(part)
        size += len(part)
        if size >= COUNT_AT_ONCE:
            yield np.concatenate(held)
            held, size = [], 0
    if held:
        yield np.concatenate(held)
