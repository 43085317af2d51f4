"""zstd frames: the smallest unit of a cache on disk, each with its size and a checksum.

Columns of a shard are small arrays of bytes with little to match, so frames are compressed with literals only (Huffman
coding of bytes): as small as level 19 on this data, at about 1 GB/s. A frame that does not declare its size, or declares
more than its place allows, is refused before a byte is allocated: python-zstandard ignores ``max_output_size`` for a frame
that declares one.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from kdcache.cache.limits import MAX_FRAME_BYTES
from kdcache.errors import CacheCorruptError, ConfigError

MAX_WINDOW_BYTES = 8 << 20

_local = threading.local()


def compress(data: bytes | memoryview | npt.NDArray[np.generic], *, block_bytes: int | None = None) -> bytes:
    """One frame, content size and XXH64 checksum included.

    Args:
        data: What to store.
        block_bytes: Cut the content into blocks of so many bytes, each coded by its own frequencies of bytes: worth its
            hundred bytes where the content changes along the way.

    Raises:
        ConfigError: More than a frame holds.
    """
    if not hasattr(_local, "compressor"):
        parameters = zstandard.ZstdCompressionParameters.from_level(
            1, min_match=7, hash_log=6, write_checksum=True, write_content_size=True
        )
        _local.compressor = zstandard.ZstdCompressor(compression_params=parameters)
    raw = np.ascontiguousarray(data).tobytes() if isinstance(data, np.ndarray) else bytes(data)
    if len(raw) > MAX_FRAME_BYTES:
        raise ConfigError(
            f"a column of a sequence takes at most {MAX_FRAME_BYTES} bytes, found {len(raw)}",
            hint="a smaller --seq-len, or fewer entries",
        )
    if block_bytes is None or len(raw) <= block_bytes:
        frame: bytes = _local.compressor.compress(raw)
        return frame
    stream = _local.compressor.compressobj(size=len(raw))
    parts = []
    for start in range(0, len(raw), block_bytes):
        if start:
            parts.append(stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
        parts.append(stream.compress(raw[start : start + block_bytes]))
    parts.append(stream.flush())
    return b"".join(parts)


def decompress(frame: bytes | memoryview, *, max_bytes: int, what: str) -> bytes:
    """The content of a frame of at most ``max_bytes``.

    Raises:
        CacheCorruptError: Not a frame, larger than its place allows, or the checksum does not hold.
    """
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    try:
        size = zstandard.frame_content_size(frame)
        limit = min(max_bytes, MAX_FRAME_BYTES)
        if not 0 <= size <= limit:
            raise CacheCorruptError(
                f"{what}: a frame of at most {limit} bytes was expected, found one that declares {size}"
            )
        content: bytes = _local.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CacheCorruptError(f"{what}: not an intact zstd frame ({error})") from error
    if len(content) != size:
        raise CacheCorruptError(f"{what}: the frame declares {size} bytes and holds {len(content)}")
    return content


def read_array(
    frame: bytes | memoryview,
    dtype: npt.DTypeLike,
    *,
    what: str,
    count: int | None = None,
    max_count: int | None = None,
) -> npt.NDArray[Any]:
    """A one-dimensional little-endian array out of a frame.

    Args:
        frame: The frame.
        dtype: Element type.
        what: Names the column and sequence in messages.
        count: Exact number of elements, where it is known.
        max_count: Largest allowed number of elements, where it is not.
    """
    item = np.dtype(dtype).newbyteorder("<")
    limit = count if count is not None else max_count
    assert limit is not None, "a frame is never read without a bound"
    content = decompress(frame, max_bytes=limit * item.itemsize, what=what)
    if len(content) % item.itemsize or (count is not None and len(content) != count * item.itemsize):
        raise CacheCorruptError(f"{what}: {limit} elements of {item} were expected, found {len(content)} bytes")
    return np.frombuffer(content, dtype=item)
