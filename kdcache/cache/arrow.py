"""The one record batch of a shard's file, whoever wrote it.

Arrow takes as much memory as a file tells it to: a compressed body says how large it becomes, and metadata of a few hundred KB can name the
same strings so often that they fill any memory. So sizes are looked at before Arrow sees the metadata, and a batch that is
compressed, has metadata of its own or is of another kind is refused before Arrow sees the batch. What is left points into the file.

The file is read front to back, as a stream; its footer is for those who jump.
"""

from __future__ import annotations

import struct
from typing import Any

import pyarrow as pa

from kdcache.cache.limits import enough_memory
from kdcache.errors import CacheCorruptError

# Ours take less than 1,500 bytes.
MAX_METADATA_BYTES = 4096
MAGIC = b"ARROW1\0\0"
_CONTINUES = 0xFFFFFFFF
# Places in the tables of Arrow's Message.fbs.
_MESSAGE_HEADER, _MESSAGE_METADATA, _BATCH_COMPRESSION = 2, 4, 3


def read_batch(data: Any, expected: pa.Schema, where: str) -> pa.RecordBatch:
    """The batch of a file that has this schema and nothing else.

    Args:
        data: The whole file, usually a memory map.
        expected: Schema and metadata.
        where: Names the shard in messages.

    Raises:
        CacheCorruptError: It is not such a file.
        StoreUnavailableError: There is not enough memory.
    """
    try:
        with enough_memory(where):
            return _read_batch(pa.py_buffer(data), expected, where)
    except (pa.ArrowException, OSError, EOFError, struct.error, ValueError) as error:
        raise CacheCorruptError(f"{where}: not an Arrow file ({error})") from error


def _read_batch(file: pa.Buffer, expected: pa.Schema, where: str) -> pa.RecordBatch:
    if bytes(file[: len(MAGIC)]) != MAGIC:
        raise CacheCorruptError(f"{where}: not an Arrow file")
    message, end = _read_message(file, len(MAGIC), where)
    if message is None or message.type != "schema" or _num_bytes(message.body):
        raise CacheCorruptError(f"{where}: not an Arrow file with a schema")
    found = pa.ipc.read_schema(message)
    if not found.equals(expected, check_metadata=True):
        raise CacheCorruptError(
            f"{where}: schema or origin differ: expected {expected.metadata} and {len(expected)} columns, found "
            f"{found.metadata} and {len(found)}",
            hint="the file belongs to another shard or another cache",
        )
    message, end = _read_message(file, end, where)
    if message is None or _read_message(file, end, where)[0] is not None:
        number = "0" if message is None else "2 or more"
        raise CacheCorruptError(f"{where}: one record batch was expected, found {number}")
    if message.type != "record batch" or not _is_plain(message.metadata):
        raise CacheCorruptError(f"{where}: a plain record batch was expected, found a {message.type} with extras")
    batch = pa.ipc.read_record_batch(message, expected)
    batch.validate(full=True)
    return batch


def _read_message(file: pa.Buffer, start: int, where: str) -> tuple[pa.ipc.Message | None, int]:
    """The message that begins at a byte, or None at the end of all; and where the next one begins."""
    continues, size = struct.unpack_from("<Ii", file, start)
    if continues != _CONTINUES or not 0 <= size <= MAX_METADATA_BYTES:
        raise CacheCorruptError(f"{where}: metadata of at most {MAX_METADATA_BYTES} bytes were expected, found {size}")
    if size == 0:
        return None, start + 8
    message = pa.ipc.read_message(file[start:])
    return message, start + 8 + size + _num_bytes(message.body)


def _num_bytes(body: pa.Buffer | None) -> int:
    return 0 if body is None else int(body.size)


def _is_plain(metadata: pa.Buffer) -> bool:
    """Whether a message of a record batch has no metadata of its own and no compressed body.

    Flatbuffers: a table begins with the distance back to its vtable; that has its own size, the table's, and where each field
    stands in the table, 0 for one that is missing.
    """

    def field(table: int, number: int) -> int:
        vtable = table - struct.unpack_from("<i", metadata, table)[0]
        if 4 + 2 * number >= struct.unpack_from("<H", metadata, vtable)[0]:
            return 0
        place: int = struct.unpack_from("<H", metadata, vtable + 4 + 2 * number)[0]
        return table + place if place else 0

    message = struct.unpack_from("<I", metadata, 0)[0]
    if field(message, _MESSAGE_METADATA):
        return False
    header = field(message, _MESSAGE_HEADER)
    return not field(header + struct.unpack_from("<I", metadata, header)[0], _BATCH_COMPRESSION)
