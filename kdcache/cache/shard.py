"""One shard: an Arrow IPC file, a row a sequence, written once.

A shard is built in memory and published whole, so a file that can be seen is a file that is complete. It is read through a
memory map; its digest is checked once, by the store that maps it and before Arrow parses a byte of it, because Arrow trusts what it reads (a bit flipped
in its metadata can crash the process). Every column of bytes is a zstd frame with its own checksum. What a stranger wrote has the digest
that he says: :mod:`kdcache.cache.arrow` lets Arrow see no more than what cannot make it take memory.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from kdcache.cache.arrow import read_batch
from kdcache.cache.codec import Codec
from kdcache.cache.compact import CompactTargets
from kdcache.cache.frames import compress, read_array
from kdcache.cache.limits import enough_memory
from kdcache.errors import CacheCorruptError
from kdcache.targets import SparseTargets, TokenSequence

METADATA_KEY = b"kdcache"
SEQUENCE_COLUMNS = ("input_ids", "loss_mask", "document_starts")


def digest(data: bytes | memoryview) -> str:
    """xxh3-128 of bytes, 32 hex digits: against decay and mix-ups, not against forgery."""
    return xxhash.xxh3_128_hexdigest(data)


def content_hash(sequence: TokenSequence) -> int:
    """xxh3-64 of token ids, mask and document starts: the same text tokenised alike has the same hash in every cache."""
    state = xxhash.xxh3_64()
    state.update(sequence.input_ids.astype("<u4").tobytes())
    state.update(np.packbits(sequence.loss_mask).tobytes())
    state.update(sequence.document_starts.astype("<u4").tobytes())
    return int(state.intdigest())


def sequence_id(shard: int, row: int) -> int:
    """Names a sequence for good, known before any other shard is: shard number, then row."""
    return (shard << 32) | row


def schema(codec: Codec, plan: str, shard: int) -> pa.Schema:
    """The Arrow schema of a shard, with the plan's fingerprint and the shard's number as metadata."""
    about = json.dumps({"format_version": 1, "plan": plan, "shard": shard}, sort_keys=True, separators=(",", ":"))
    return pa.schema(
        [
            pa.field("sequence_id", pa.uint64(), nullable=False),
            pa.field("num_positions", pa.uint32(), nullable=False),
            pa.field("content_hash", pa.uint64(), nullable=False),
            *(pa.field(name, pa.large_binary(), nullable=False) for name in SEQUENCE_COLUMNS + codec.column_names),
        ],
        metadata={METADATA_KEY: about.encode()},
    )


class ShardBuilder:
    """Collects the rows of one shard; :meth:`finish` gives the bytes of the file."""

    def __init__(self, codec: Codec, plan: str, shard: int) -> None:
        self.codec, self.shard = codec, shard
        self._schema = schema(codec, plan, shard)
        self._columns: dict[str, list[Any]] = {field.name: [] for field in self._schema}

    def add(self, sequence: TokenSequence, targets: SparseTargets) -> None:
        """Append a row. Rows are numbered in the order of calls."""
        if int(sequence.target_mask.sum()) != len(targets):
            raise ValueError("one target for each position whose next token has its loss bit set")
        self.add_frames(sequence, self.codec.encode(targets, sequence.contexts))

    def add_frames(self, sequence: TokenSequence, frames: dict[str, bytes]) -> None:
        """Append a row whose targets are encoded already (``codec.encode``)."""
        row = {
            "sequence_id": sequence_id(self.shard, len(self._columns["sequence_id"])),
            "num_positions": len(sequence),
            "content_hash": content_hash(sequence),
            "input_ids": compress(sequence.input_ids.astype(_id_dtype(self.codec))),
            "loss_mask": compress(np.packbits(sequence.loss_mask)),
            "document_starts": compress(sequence.document_starts.astype("<u4")),
            **frames,
        }
        for name, values in self._columns.items():
            values.append(row[name])

    def finish(self) -> pa.Buffer:
        """The complete file. The same rows give the same bytes."""
        batch = pa.record_batch(
            [pa.array(self._columns[field.name], type=field.type) for field in self._schema], schema=self._schema
        )
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, self._schema) as writer:
            writer.write_batch(batch)
        return sink.getvalue()


class ShardReader:
    """Rows of one shard by number.

    Args:
        data: The whole file, usually a memory map.
        codec: From the cache's plan.
        plan: Fingerprint that the shard must carry.
        shard: Number that the shard must carry.
        max_positions: Longest sequence that the plan allows.

    Raises:
        CacheCorruptError: The bytes are not a shard of this plan.
    """

    def __init__(self, data: Any, codec: Codec, *, plan: str, shard: int, max_positions: int) -> None:
        self.where = f"shard {shard:05d}"
        self._codec, self._max_positions = codec, max_positions
        batch = read_batch(data, schema(codec, plan, shard), self.where)
        if any(column.null_count for column in batch.columns):
            raise CacheCorruptError(f"{self.where}: a row with a missing value")
        self._columns = {name: batch.column(i) for i, name in enumerate(batch.schema.names)}
        self.num_rows: int = batch.num_rows

    def __len__(self) -> int:
        return self.num_rows

    def sequence(self, row: int) -> TokenSequence:
        """Token ids, mask and document starts of a row; its content hash is checked."""
        where = f"{self.where}, sequence {row}"
        with enough_memory(where):
            return self._sequence(row, where)

    def _sequence(self, row: int, where: str) -> TokenSequence:
        count = int(self._columns["num_positions"][row].as_py())
        if not 0 < count <= self._max_positions:
            raise CacheCorruptError(f"{where}: {count} positions, the plan allows 1 to {self._max_positions}")
        ids = read_array(self._frame("input_ids", row), _id_dtype(self._codec), what=f"{where}, input_ids", count=count)
        bits = read_array(self._frame("loss_mask", row), np.uint8, what=f"{where}, loss_mask", count=(count + 7) // 8)
        starts = read_array(
            self._frame("document_starts", row), np.uint32, what=f"{where}, document_starts", max_count=count
        )
        mask = np.unpackbits(bits, count=count).astype(bool)
        if not len(starts) or starts[0] != 0 or (np.diff(starts.astype(np.int64)) <= 0).any() or starts[-1] >= count:
            raise CacheCorruptError(f"{where}: document starts do not ascend from 0 to below {count}")
        if mask[starts].any():
            raise CacheCorruptError(f"{where}: a loss bit at the start of a document")
        if int(ids.max()) >= self._codec.vocab_size:
            raise CacheCorruptError(f"{where}: token id {ids.max()} in a vocabulary of {self._codec.vocab_size}")
        sequence = TokenSequence(ids.astype(np.uint32), mask, starts)
        if content_hash(sequence) != self._columns["content_hash"][row].as_py():
            raise CacheCorruptError(f"{where}: the content hash does not match the token ids")
        return sequence

    def targets(self, row: int, sequence: TokenSequence) -> CompactTargets:
        """Targets of a row, still compact; ``sequence`` is that of the same row."""
        frames = {name: self._frame(name, row) for name in self._codec.column_names}
        contexts, where = sequence.contexts, f"{self.where}, sequence {row}"
        with enough_memory(where):
            return self._codec.decode(frames, len(contexts), where, contexts)

    def sequence_id(self, row: int) -> int:
        """The stored id, ``shard << 32 | row``."""
        return int(self._columns["sequence_id"][row].as_py())

    def content_hashes(self) -> npt.NDArray[np.uint64]:
        """``[rows]``, the stored content hash of each sequence."""
        hashes: npt.NDArray[np.uint64] = self._columns["content_hash"].to_numpy()
        return hashes

    def _frame(self, name: str, row: int) -> memoryview:
        return memoryview(self._columns[name][row].as_buffer())


def _id_dtype(codec: Codec) -> str:
    return "<u2" if codec.vocab_size <= 1 << 16 else "<u4"
