"""Copies of remote shards on a local disk, each under the digest of its bytes.

A copy is hashed before a process uses it: one that rotted is thrown away and fetched anew. Copies are made under a temporary name and
get theirs when they are whole and mapped, so any number of processes may share the folder, and one that makes room takes
nothing from another. Before a fetch would grow them past the limit the ones longest unused go, but only those whose original
is still the version that was fetched, as its store says (ETag, time of change): another copy may be the only one left. The
original was whole when it was fetched; what has rotted since unseen by its store is not seen here either, since that would
take reading it again.

A folder that cannot be written, a disk that is full: nothing is known about the cache then, and nothing is said about it.

``KDCACHE_COPIES`` names the folder (by default ``kdcache`` in the user's cache folder), ``KDCACHE_COPIES_GB`` the limit.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path

import xxhash

from kdcache.cache.layout import ABANDONED_SECONDS
from kdcache.cache.mapped import map_file, map_open_file
from kdcache.errors import CacheCorruptError, CacheError, ConfigError, StoreUnavailableError

logger = logging.getLogger(__name__)

DEFAULT_GB = 100.0
SUFFIX, ORIGIN = ".arrow", ".origin"
# Hands an original to a function, part by part; returns its version.
Fetch = Callable[[Callable[[bytes], object]], str]


@dataclass(frozen=True, slots=True)
class LocalCopies:
    """A folder of copies.

    Attributes:
        folder: Where they are.
        max_bytes: What they may take together; more only if nothing can go.
        version_of: What tells this version of the file of a URL from others; None where there is none or nobody can say now.
    """

    folder: Path
    max_bytes: int
    version_of: Callable[[str], str | None]

    @classmethod
    def from_environment(cls, version_of: Callable[[str], str | None]) -> LocalCopies:
        """As the environment says.

        Raises:
            ConfigError: The limit is not a number, or nothing names a folder.
        """
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = os.environ.get("KDCACHE_COPIES") or f"{home}/kdcache"
        limit = os.environ.get("KDCACHE_COPIES_GB") or str(DEFAULT_GB)
        try:
            max_bytes = int(float(limit) * 1e9)
        except (ValueError, OverflowError) as error:
            raise ConfigError(f"KDCACHE_COPIES_GB: a number of gigabytes was expected, found {limit!r}") from error
        try:
            return cls(Path(folder).expanduser(), max_bytes, version_of)
        except RuntimeError as error:
            raise ConfigError(f"{folder}: this user has no home folder", hint="KDCACHE_COPIES names another") from error

    def open(
        self,
        digest: str,
        num_bytes: int,
        origin: str,
        fetch: Fetch,
        *,
        check: bool = True,
    ) -> mmap.mmap:
        """A read-only map of the bytes with this digest.

        Args:
            digest: xxh3-128, 32 hex digits.
            num_bytes: Their number.
            origin: URL of the original.
            fetch: Hands the original to a function, part by part; returns its version.
            check: Whether to hash a copy that is there; this process has done so before where not.

        Raises:
            CacheCorruptError: The original has another digest, when fetched a second time too.
            StoreUnavailableError: No copy can be kept here.
        """
        path = self.folder / f"{digest}{SUFFIX}"
        with contextlib.suppress(OSError):  # there is none yet, or it is another user's
            os.utime(path)  # before it is hashed: a peer that makes room takes the ones longest unused
        try:
            return map_file(path, num_bytes, digest if check else None)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, CacheError) as error:
            logger.warning("%s: this copy cannot be used (%s); fetching it anew", path, error)
        try:
            for _ in range(2):
                copy = self._fetch(path, digest, num_bytes, origin, fetch)
                if copy is not None:
                    return copy
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreUnavailableError(
                f"{self.folder}: cannot keep a copy of {origin} ({error.strerror})",
                hint="KDCACHE_COPIES names another folder, KDCACHE_COPIES_GB a smaller limit",
            ) from error
        raise CacheCorruptError(
            f"{origin}: digest {digest} was committed, the bytes in the store have another (fetched twice)"
        )

    def _fetch(self, path: Path, digest: str, num_bytes: int, origin: str, fetch: Fetch) -> mmap.mmap | None:
        """A new copy, mapped before it gets its name; None if the store's bytes are others."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make_room(num_bytes)
        handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".part")
        try:
            with os.fdopen(handle, "w+b") as file:
                copy, _, version = _fetched(file, origin, fetch, digest)
            if copy is None:
                return None
            # Before the copy, and removed after it: no copy is left without, or it could never go.
            about = path.with_suffix(ORIGIN)
            about.write_text(f"{origin}\n{version}")
            os.replace(temporary, path)
            if not about.exists():  # a peer that made room took the copy that stood here, and this with it
                about.write_text(f"{origin}\n{version}")
            return copy
        finally:
            Path(temporary).unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        """Delete what fetches that were killed left behind, and the copies longest unused until there is room for another."""
        found = []
        for path in self.folder.glob("*.part"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()
        for path in self.folder.glob(f"*{SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # a peer was faster
                found.append((path.stat().st_mtime, path, path.stat().st_size))
        total = num_bytes + sum(size for _, _, size in found)
        for _, path, size in sorted(found):
            if total <= self.max_bytes:
                return
            with contextlib.suppress(OSError):  # a peer was faster, or it is another user's
                if self._is_elsewhere(path):
                    path.unlink()
                    path.with_suffix(ORIGIN).unlink(missing_ok=True)
                    total -= size
        if total > self.max_bytes:
            logger.warning(
                "%s: copies of remote shards take %.1f GB, the limit is %.1f; the rest stay, since their originals are gone or "
                "others now, or cannot be looked at",
                self.folder, total / 1e9, self.max_bytes / 1e9,
            )  # fmt: skip

    def _is_elsewhere(self, path: Path) -> bool:
        """Whether the original of a copy is still the version that was fetched."""
        origin, _, version = path.with_suffix(ORIGIN).read_text().partition("\n")
        return bool(version) and self.version_of(origin) == version


def map_without_copy(origin: str, fetch: Fetch, digest: str | None) -> mmap.mmap:
    """A read-only map of an original, in a file without a name that goes with it; fetched a second time where the first gave other bytes.

    Args:
        origin: URL of the original.
        fetch: As for :meth:`LocalCopies.open`.
        digest: Of the bytes; None where it does not matter.

    Raises:
        CacheCorruptError: The original has another digest, when fetched a second time too.
        StoreUnavailableError: There is no room for it, or what is read back is not what was written.
    """
    try:
        for _ in range(2):
            with tempfile.TemporaryFile() as file:
                data, found, _ = _fetched(file, origin, fetch, digest)
            if data is not None:
                return data
    except OSError as error:
        # gettempdir itself fails where there is no folder.
        folder = os.environ.get("TMPDIR", "the folder for temporary files")
        raise StoreUnavailableError(
            f"{folder}: cannot hold {origin} ({error.strerror or error})", hint="TMPDIR names another folder"
        ) from error
    raise CacheCorruptError(
        f"{origin}: digest {digest} was committed, the bytes in the store have {found} (fetched twice)"
    )


def _fetched(file: BufferedRandom, origin: str, fetch: Fetch, digest: str | None) -> tuple[mmap.mmap | None, str, str]:
    """The map of an empty file that an original was written to, None if the store's bytes are others; their digest, and their version.

    Raises:
        OSError: This disk cannot hold them, or does not give back what was written.
    """
    state = xxhash.xxh3_128()

    def write(part: bytes) -> None:
        state.update(part)
        file.write(part)

    version, found = fetch(write), state.hexdigest()
    if digest is not None and found != digest:
        return None, found, version
    num_bytes = file.tell()
    file.seek(0)  # which also flushes
    try:
        return map_open_file(file, origin, num_bytes, digest), found, version
    except CacheError as error:  # this disk, not the store
        raise OSError(errno.EIO, "what is read back is not what was written") from error
