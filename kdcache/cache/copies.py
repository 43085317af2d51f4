"""Copies of remote shards on a local disk, each under the digest of its bytes.

A copy is hashed before every use: one that rotted, or that a full disk cut short, is thrown away and fetched anew. Copies are
made under a temporary name and get theirs when they are whole, so any number of processes may share the folder. When they
grow past the limit the ones longest unused go, but never one whose original is no longer where it came from: that may be the
only one left.

``KDCACHE_COPIES`` names the folder (by default ``kdcache`` in the user's cache folder), ``KDCACHE_COPIES_GB`` the limit.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from kdcache.errors import CacheCorruptError, ConfigError, StoreError

logger = logging.getLogger(__name__)

DEFAULT_GB = 100.0
ABANDONED_SECONDS = 86_400.0
SUFFIX, ORIGIN = ".arrow", ".origin"


@dataclass(frozen=True, slots=True)
class LocalCopies:
    """A folder of copies.

    Attributes:
        folder: Where they are.
        max_bytes: What they may take together; more only if nothing can go.
        has_original: Whether a file of this URL and size is there.
    """

    folder: Path
    max_bytes: int
    has_original: Callable[[str, int], bool]

    @classmethod
    def from_environment(cls, has_original: Callable[[str, int], bool]) -> LocalCopies:
        """As the environment says.

        Raises:
            ConfigError: The limit is not a number.
        """
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = os.environ.get("KDCACHE_COPIES") or f"{home}/kdcache"
        limit = os.environ.get("KDCACHE_COPIES_GB") or str(DEFAULT_GB)
        try:
            max_bytes = int(float(limit) * 1e9)
        except (ValueError, OverflowError) as error:
            raise ConfigError(f"KDCACHE_COPIES_GB: a number of gigabytes was expected, found {limit!r}") from error
        return cls(Path(folder).expanduser(), max_bytes, has_original)

    def open(self, digest: str, num_bytes: int, origin: str, fetch: Callable[[BinaryIO], None]) -> mmap.mmap:
        """A read-only map of the bytes with this digest.

        Args:
            digest: xxh3-128, 32 hex digits.
            num_bytes: Their number.
            origin: URL of the original.
            fetch: Writes the original into a file.

        Raises:
            CacheCorruptError: The original has another digest, when fetched a second time too.
            StoreError: The folder cannot be written.
        """
        path = self.folder / f"{digest}{SUFFIX}"
        try:
            for fetches_left in (2, 1, 0):
                copy = _whole(path, digest, num_bytes)
                if copy is not None:
                    os.utime(path)
                    return copy
                if fetches_left:
                    self._fetch(path, origin, fetch)
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(
                f"{self.folder}: cannot keep a copy of {origin} ({error.strerror})",
                hint="KDCACHE_COPIES names another folder, KDCACHE_COPIES_GB a smaller limit",
            ) from error
        raise CacheCorruptError(
            f"{origin}: digest {digest} was committed, the bytes in the store have another (fetched twice)"
        )

    def _fetch(self, path: Path, origin: str, fetch: Callable[[BinaryIO], None]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                fetch(file)
            path.with_suffix(ORIGIN).write_text(origin)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
        self._make_room(path)

    def _make_room(self, newest: Path) -> None:
        """Delete the copies longest unused until the rest fits, and what fetches that were killed left behind."""
        found = []
        for path in self.folder.glob("*.part"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()
        for path in self.folder.glob(f"*{SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # a peer was faster
                found.append((path.stat().st_mtime, path, path.stat().st_size))
        total = sum(size for _, _, size in found)
        for _, path, size in sorted(found):
            if total <= self.max_bytes:
                return
            origin = path.with_suffix(ORIGIN)
            if path != newest and origin.exists() and self.has_original(origin.read_text(), size):
                path.unlink(missing_ok=True)
                origin.unlink(missing_ok=True)
                total -= size
        if total > self.max_bytes:
            logger.warning(
                "%s: copies of remote shards take %.1f GB, the limit is %.1f; the rest have no original to be fetched again",
                self.folder, total / 1e9, self.max_bytes / 1e9,
            )  # fmt: skip


def _whole(path: Path, digest: str, num_bytes: int) -> mmap.mmap | None:
    """A map of the copy, or None if it is not there or not what its name says."""
    try:
        with path.open("rb") as file:
            if num_bytes == 0 or os.fstat(file.fileno()).st_size != num_bytes:
                return None
            copy = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        return None
    if xxhash.xxh3_128_hexdigest(copy) != digest:
        logger.warning("%s: this copy has other bytes than its name says; fetching it anew", path)
        return None
    return copy
