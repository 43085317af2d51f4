"""How much a cache may ask of its reader.

No cache that a dump makes comes near these bounds (docs/format.md states them); one that was made to do harm is refused before memory is
taken. What the machine cannot hold says nothing about the cache: :func:`enough_memory`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from kdcache.cache.layout import COMMITS, LEASES, MANIFEST, PLAN, TABLES
from kdcache.errors import StoreUnavailableError

MAX_SHARDS = 1 << 22
MAX_ROWS_OF_A_SHARD = 1 << 32
MAX_SEQUENCES = 1 << 40
# Kept at all positions of one sequence: 2^20 positions with 256 each.
MAX_ENTRIES = 1 << 28
# No column of a sequence is larger; what a plan from a stranger allows may be.
MAX_FRAME_BYTES = 1 << 30
# Files that are read whole, by name or folder. A manifest has up to 110 bytes a shard; a head is as large as its model has it.
MAX_FILE_BYTES = {PLAN: 16 << 20, MANIFEST: 128 * MAX_SHARDS, COMMITS: 1 << 20, LEASES: 1 << 20, TABLES: 1 << 35}


def max_file_bytes(name: str) -> int | None:
    """Of a file that is read whole; None for shards, whose size stands in their commit."""
    return MAX_FILE_BYTES.get(name.partition("/")[0])


@contextlib.contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """Say what could not be held.

    Raises:
        StoreUnavailableError: There was not enough.
    """
    try:
        yield
    except MemoryError as error:
        raise StoreUnavailableError(
            f"{what}: not enough memory to hold it", hint="free some, or use a larger machine"
        ) from error
