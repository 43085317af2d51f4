"""A file as a read-only map, once its bytes were read and hashed.

The bytes are hashed by reading them, not through the map: where a disk or a server fails, reading is an error that can be said,
and touching a map ends the process (SIGBUS). What is read later through the map lies in the page cache as a rule.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from io import BufferedRandom, BufferedReader
from pathlib import Path

import xxhash

from kdcache.cache.files import open_file
from kdcache.errors import CacheCorruptError, StoreError


def map_file(path: Path, num_bytes: int, digest: str | None = None) -> mmap.mmap:
    """A read-only map of a file of a known size.

    Args:
        path: The file.
        num_bytes: Its size.
        digest: xxh3-128 of its bytes, 32 hex digits; None leaves them unread.

    Raises:
        OSError: It is not there, or cannot be read or mapped: nothing is known about its bytes.
        StoreError: It has another size, or what stands there is no file.
        CacheCorruptError: It has another digest.
    """
    with open_file(path) as file:
        return map_open_file(file, str(path), num_bytes, digest)


def map_open_file(
    file: BufferedReader | BufferedRandom, name: str, num_bytes: int, digest: str | None = None
) -> mmap.mmap:
    """:func:`map_file` of a file that is open, at its beginning."""
    size = os.fstat(file.fileno()).st_size
    if size != num_bytes or size == 0:
        raise StoreError(f"{name}: {num_bytes} bytes were committed, found {size}")
    # In pieces that stay in the processor's cache.
    found = digest and hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    if found != digest:
        raise CacheCorruptError(f"digest {digest} was committed, the bytes on disk have {found} ({name})")
    try:
        return mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ)
    except ValueError as error:  # cut short since it was read
        raise StoreError(f"{name}: {num_bytes} bytes were committed, found fewer") from error
