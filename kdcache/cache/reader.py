"""Read a cache by index, without torch.

Opening reads plan and manifest only. A shard's digest is checked and it is mapped when its first sequence is asked for; after
that a sequence costs its own frames, and one of a shard that gave way to others a map more: a process reads each shard whole once. What is read is checked or refused, never guessed; what cannot be read is not called
damaged (StoreUnavailableError).
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdcache.cache.commit import current_manifest, load_codec
from kdcache.cache.compact import CompactTargets
from kdcache.cache.layout import shard_name, table_name
from kdcache.cache.manifest import Manifest
from kdcache.cache.shard import ShardReader, content_hash, digest
from kdcache.cache.store import Store, open_store
from kdcache.errors import (
    CacheCorruptError,
    CacheIncompleteError,
    CacheMismatchError,
    CacheNotFoundError,
    StoreError,
)
from kdcache.targets import SparseTargets, TokenSequence

MAX_OPEN_SHARDS = 64


@dataclass(frozen=True, slots=True, eq=False)
class CacheRow:
    """One sequence and what the teacher said about it."""

    sequence_id: int
    sequence: TokenSequence
    targets: SparseTargets


def open_cache(path: str | os.PathLike[str], *, allow_incomplete: bool = False) -> CacheReader:
    """Open a cache for reading.

    Args:
        path: The cache folder, or its URL.
        allow_incomplete: Take the shards that are committed so far, instead of refusing a cache that is still being made.

    Raises:
        CacheNotFoundError: There is no cache here.
        CacheIncompleteError: Not every planned shard is committed.
        CacheFormatError: A newer format, or not one of ours.
    """
    return CacheReader(open_store(path), allow_incomplete=allow_incomplete)


class CacheReader:
    """``len(reader)`` sequences, ``reader[i]`` one of them, iteration in order. Picklable, and for threads; opens shards lazily.

    Attributes:
        manifest: The cache's description of itself.
    """

    def __init__(self, store: Store, *, allow_incomplete: bool = False, manifest: Manifest | None = None) -> None:
        self.store = store
        self.manifest = manifest or current_manifest(store)
        self.spec = self.manifest.spec
        self.codec = load_codec(store, self.spec)
        if not self.manifest.sealed and not allow_incomplete:
            done, planned = len(self.manifest.shards.shard), self.spec.num_shards
            raise CacheIncompleteError(
                f"{store}: {done} of {planned} shards are committed",
                hint="run the same dump-teacher command again to finish it, or pass --allow-incomplete",
            )
        self._ends = np.cumsum([0, *self.manifest.shards.num_sequences], dtype=np.int64)
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._whole: set[int] = set()
        self._lock = threading.Lock()
        self._by_content: dict[int, int] | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> CacheRow:
        """Sequence ``index``, targets as logprobs.

        Raises:
            CacheCorruptError: Its bytes are not those that were committed.
        """
        shard, row = self._locate(index)
        sequence = shard.sequence(row)
        compact = shard.targets(row, sequence)
        return CacheRow(shard.sequence_id(row), sequence, compact.expand(self.temperatures))

    def __iter__(self) -> Iterator[CacheRow]:
        return (self[i] for i in range(len(self)))

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures at which targets are exact."""
        return self.spec.targets.temperatures

    @property
    def vocab_size(self) -> int:
        """V of the targets: the teacher's tokens without padded rows."""
        return self.spec.teacher.vocab_size

    def content_hashes(self) -> list[int]:
        """Of every sequence, in order. Looks into every shard."""
        firsts = self._ends[:-1][np.diff(self._ends) > 0]
        return [h for first in firsts for h in self._locate(int(first))[0].content_hashes().tolist()]

    def index_of(self, content_hash: int) -> int | None:
        """Where the sequence with this content is, or None. The first call looks into every shard."""
        if self._by_content is None:
            self._by_content = {h: index for index, h in enumerate(self.content_hashes())}
        return self._by_content.get(content_hash)

    def find(self, sequence: TokenSequence, role: str) -> int:
        """Where the same sequence is, whatever order the caches have. ``role`` says in messages which cache this is.

        Raises:
            CacheMismatchError: It is not here.
        """
        index = self.index_of(content_hash(sequence))
        if index is None:
            raise CacheMismatchError(
                f"{self.store}: a sequence of {len(sequence)} tokens (content hash {content_hash(sequence):016x}) is not in the "
                f"cache {role}",
                hint="caches of several teachers are made from the same dataset with the same --seq-len and packing",
            )
        return index

    def tokens(self, index: int) -> TokenSequence:
        """Only the tokens of a sequence."""
        shard, row = self._locate(index)
        return shard.sequence(row)

    def compact(self, index: int) -> tuple[TokenSequence, CompactTargets]:
        """A sequence with its targets still as small integers, for decoding on the training device."""
        shard, row = self._locate(index)
        sequence = shard.sequence(row)
        return sequence, shard.targets(row, sequence)

    def head_bytes(self) -> bytes:
        """The safetensors file of the teacher's output head, its digest checked (``hidden`` caches).

        Raises:
            CacheNotFoundError: This cache has none.
        """
        if self.manifest.head_digest is None:
            raise CacheNotFoundError(
                f"{self.store} holds {self.spec.targets.scheme} targets, not hidden states",
                hint="dump with --targets hidden for an exact, lossless cache",
            )
        data = self.store.read(table_name(self.manifest.head_digest))
        if (found := digest(data)) != self.manifest.head_digest:
            raise CacheCorruptError(
                f"{self.store}: the head has digest {found}, {self.manifest.head_digest} was committed"
            )
        return data

    def open_shard(self, position: int, *, check_digest: bool = True, original: bool = False) -> ShardReader:
        """The ``position``-th committed shard; what lies in the store itself where the original is asked for, no local copy.

        Raises:
            CacheCorruptError: Its bytes are not those that were committed, or not there.
            StoreUnavailableError: They cannot be read.
        """
        table = self.manifest.shards
        number, expected = table.shard[position], table.digest[position]
        name = shard_name(number, expected)
        try:
            proof = expected if check_digest else None
            data = self.store.map(name, table.num_bytes[position], proof, original=original)
        except (CacheNotFoundError, CacheCorruptError, StoreError) as error:
            raise CacheCorruptError(
                f"shard {number:05d}: {error.message}",
                hint=f"kdcache verify {self.store} --repair, then the same dump again: only this shard is redone",
            ) from error
        return ShardReader(
            data,
            self.codec,
            plan=self.manifest.fingerprint,
            shard=number,
            max_positions=self.spec.corpus.seq_len,
        )

    def _locate(self, index: int) -> tuple[ShardReader, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        index %= len(self)
        position = int(np.searchsorted(self._ends, index, side="right")) - 1
        with self._lock:
            shard = self._open.get(position)
            if shard is not None:
                self._open.move_to_end(position)
        if shard is None:  # not under the lock: other threads need not wait for a store
            shard = self.open_shard(position, check_digest=position not in self._whole)
            if len(shard) != self.manifest.shards.num_sequences[position]:
                raise CacheCorruptError(
                    f"{shard.where}: {self.manifest.shards.num_sequences[position]} sequences were committed, found {len(shard)}"
                )
            with self._lock:
                self._whole.add(position)
                self._open[position] = shard
                if len(self._open) > MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
        return shard, index - int(self._ends[position])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_open", "_whole", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _open=OrderedDict(), _whole=set(), _lock=threading.Lock())
