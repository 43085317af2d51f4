"""The few verbs that a cache needs of storage, and those of a folder on a local or shared file system.

:class:`Store` says what they are; :class:`LocalStore` is a folder, :class:`kdcache.cache.remote.RemoteStore` whatever
fsspec knows. :func:`open_store` picks by name.

``put_if_absent`` is the one that correctness rests on: the file appears at its name whole, or not at all, and only the
first writer's. On POSIX: write a temporary file in the same file system, fsync, ``link(2)`` to the final name (fails if it
exists), fsync the folder. Names are made by kdcache from numbers and digests, never taken from a file.

A folder may come from a stranger. It may be reached through a link; nothing in it is: what a link leads to may be anybody's, and is neither
listed, read, written nor deleted.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from kdcache.cache.files import open_file
from kdcache.cache.layout import ABANDONED_SECONDS, TEMPORARY
from kdcache.cache.limits import enough_memory, max_file_bytes
from kdcache.cache.mapped import map_file
from kdcache.errors import (
    CacheCorruptError,
    CacheNotFoundError,
    ConfigError,
    KDCacheError,
    StoreError,
    StoreUnavailableError,
)

# What stands at the name is no file, or nothing does: that is an answer.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
_TEMPORARY_NAME = re.compile(r"(?P<host>[A-Za-z0-9_.-]+)~(?P<pid>\d+)~[0-9a-f]{32}")


class Store(Protocol):
    """A place for one cache. Names are relative to it, with ``/``; ``str`` of it is how the user named it.

    Attributes:
        location: The same for the same place.
    """

    @property
    def location(self) -> str:
        """Path or URL, resolved."""

    def exists(self, name: str) -> bool:
        """Whether a file stands at the name; StoreUnavailableError where that cannot be found out."""

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """The whole file; CacheNotFoundError, StoreError where no file can be read there, else StoreUnavailableError.

        CacheCorruptError where it is larger than asked for, or than a file of its kind.
        """

    def read_all(self, names: list[str]) -> list[bytes]:
        """Several small files; the same errors."""

    def map(self, name: str, num_bytes: int, digest: str | None = None, *, original: bool = False) -> mmap.mmap:
        """A read-only map of a file of a known size whose name ends in its digest; the same errors.

        Its bytes are checked first where a digest is given: CacheCorruptError. The file itself where ``original`` is asked for, no copy of it.
        """

    def names_in(self, folder: str) -> list[str]:
        """Names in a folder, sorted; empty when there is none."""

    def put_if_absent(self, name: str, data: bytes | memoryview) -> bool:
        """Publish a file whole, or learn that another writer was first (False)."""

    def replace(self, name: str, data: bytes) -> None:
        """Publish a file over whatever stands there."""

    def delete(self, name: str) -> None:
        """Remove a file that may be there."""

    def remove_abandoned(self) -> int:
        """Remove temporary files of dead writers; how many there were."""

    def remove_empty(self, folder: str) -> None:
        """Remove a folder if nothing stands in it."""

    def is_exclusive(self) -> bool:
        """Whether :meth:`put_if_absent` holds against other writers."""


def open_store(location: str | os.PathLike[str]) -> Store:
    """A folder, or what fsspec knows: ``s3://bucket/cache``, ``gs://...``, ``az://...``.

    Raises:
        ConfigError: No place below the URL is named.
    """
    text = os.fspath(location)
    protocol, is_url, rest = text.partition("://")
    if not is_url or protocol in ("file", "local"):
        return LocalStore(rest if is_url else text)
    if not rest.strip("/"):
        raise ConfigError(f"{text}: a bucket and a folder were expected", hint=f"{protocol}://BUCKET/CACHE")
    from kdcache.cache.remote import RemoteStore

    return RemoteStore(text)


class LocalStore:
    """A cache folder. Methods take names relative to it, with ``/``."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def __str__(self) -> str:
        return str(self.root)

    @property
    def location(self) -> str:
        """The path with all links followed."""
        return str(self.root.resolve())

    def exists(self, name: str) -> bool:
        """Whether a file stands at the name.

        Raises:
            StoreUnavailableError: That cannot be found out.
        """
        path = self.root / name
        try:
            return stat.S_ISREG(path.stat().st_mode)
        except OSError as error:
            if error.errno in _NO_FILE:
                return False
            raise _unreadable(path, error) from error

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """The whole file.

        Raises:
            CacheNotFoundError: There is none.
            StoreError: What stands there is no file.
            CacheCorruptError: It is larger than ``max_bytes``, or than a file of its kind.
            StoreUnavailableError: It cannot be read.
        """
        path, limit = self.root / name, max_bytes or max_file_bytes(name)
        try:
            with open_file(self._path_to_read(name)) as file, enough_memory(str(path)):
                if limit is not None and (found := os.fstat(file.fileno()).st_size) > limit:
                    raise CacheCorruptError(f"{path}: at most {limit} bytes were expected, found {found}")
                return file.read()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CacheNotFoundError(f"{path} does not exist") from error
        except OSError as error:
            raise _unreadable(path, error) from error

    def read_all(self, names: list[str]) -> list[bytes]:
        """Several small files, as :meth:`read`."""
        return [self.read(name) for name in names]

    def map(self, name: str, num_bytes: int, digest: str | None = None, *, original: bool = False) -> mmap.mmap:
        """A read-only memory map of a file of a known size, its bytes hashed first where a digest is given.

        Raises:
            CacheNotFoundError: There is none.
            CacheCorruptError: It has another digest.
            StoreError: It has another size, or what stands there is no file.
            StoreUnavailableError: It cannot be read or mapped.
        """
        path = self.root / name
        try:
            return map_file(self._path_to_read(name), num_bytes, digest)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CacheNotFoundError(f"{path} does not exist") from error
        except OSError as error:
            raise _unreadable(path, error) from error

    def is_exclusive(self) -> bool:
        """Yes: a file system without hard links is refused at the first file."""
        return True

    def names_in(self, folder: str) -> list[str]:
        """File names in a folder, sorted; empty when there is no folder.

        Raises:
            StoreError: What stands there is no folder.
            StoreUnavailableError: It cannot be listed.
        """
        try:
            return sorted(os.listdir(self._path_to_read(f"{folder}/")))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _unreadable(self.root, error, f"list {folder or 'the folder'}") from error

    def put_if_absent(self, name: str, data: bytes | memoryview) -> bool:
        """Publish a file unless one stands there already; durable when this returns.

        Returns:
            False when another writer was first; the data are discarded then.

        Raises:
            StoreError: The file system has no hard links, no space, or cannot be written.
        """
        with self._errors(f"write {name}"):
            target = self._path(name)
            if target.exists():
                return False
            try:
                self._write_and_place(os.link, data, target)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                    raise StoreError(
                        f"{self.root}: this file system has no hard links, so two writers cannot be told apart",
                        hint="put the cache on a POSIX file system (ext4, xfs, Lustre, NFS)",
                    ) from error
                raise
        return True

    def replace(self, name: str, data: bytes) -> None:
        """Publish a file over whatever stands there. Only for what can be derived again."""
        with self._errors(f"write {name}"):
            self._write_and_place(os.replace, data, self._path(name))

    def delete(self, name: str) -> None:
        """Remove a file; no error when there is none."""
        with self._errors(f"remove {name}"):
            self._path(name).unlink(missing_ok=True)

    def remove_abandoned(self) -> int:
        """Delete temporary files whose writer on this host no longer runs, and any that are a day old; how many there were."""
        removed = 0
        for name in self.names_in(TEMPORARY):
            match = _TEMPORARY_NAME.fullmatch(name)
            is_dead = match and match["host"] == hostname() and not is_running(int(match["pid"]))
            if is_dead or (match and self._age(f"{TEMPORARY}/{name}") > ABANDONED_SECONDS):
                self.delete(f"{TEMPORARY}/{name}")
                removed += 1
        self.remove_empty(TEMPORARY)
        return removed

    def remove_empty(self, folder: str) -> None:
        """Remove a folder if nothing stands in it."""
        with contextlib.suppress(OSError):  # in use, or a peer was faster
            (self.root / folder).rmdir()

    def _folder(self, folder: str) -> Path:
        """A folder of the cache's own, or its root.

        Raises:
            NotADirectoryError: A link stands there.
        """
        path = self.root / folder
        if folder and path.is_symlink():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        return path

    def _path(self, name: str) -> Path:
        """Where a name stands; NotADirectoryError as :meth:`_folder`."""
        folder, _, file = name.rpartition("/")
        return self._folder(folder) / file

    def _path_to_read(self, name: str) -> Path:
        try:
            return self._path(name)
        except NotADirectoryError as error:
            raise StoreError(
                f"{error.filename}: a folder was expected, found a link",
                hint="link to the cache's folder itself, not to folders in it",
            ) from error

    def _age(self, name: str) -> float:
        """Seconds since a file was written, as far as clocks of hosts agree; 0 where it is gone."""
        try:
            return time.time() - self._path(name).lstat().st_mtime
        except OSError:
            return 0.0

    def _write_and_place(self, act: Callable[[Path, Path], None], data: bytes | memoryview, target: Path) -> None:
        """Write a temporary file and give it its name, durably.

        Again where a peer took the file away: one of the same host name that cannot see this process (containers) holds it for dead.
        """
        for last in (False, False, True):
            temporary = self._write_temporary(data)
            try:
                _place(act, temporary, target)
            except FileNotFoundError:
                if last:
                    raise
                continue
            finally:
                temporary.unlink(missing_ok=True)
            return _sync_folder(target.parent)

    def _write_temporary(self, data: bytes | memoryview) -> Path:
        folder = self._folder(TEMPORARY)
        path = folder / f"{hostname()}~{os.getpid()}~{uuid.uuid4().hex}"
        while True:
            _make_folder(folder)
            try:
                with open(path, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                return path
            except FileNotFoundError:
                continue  # the folder was tidied away by a peer between the two calls
            except OSError:
                path.unlink(missing_ok=True)
                raise

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turn what the operating system refuses into a StoreError."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise StoreError(
                f"{self.root}: cannot {what} ({error.strerror})",
                hint="free some space and run the same command again: what is committed stays"
                if full
                else "name a folder that can be written; what is committed stays",
            ) from error


def hostname() -> str:
    """This host, in characters that fit a file name."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())


def is_running(pid: int) -> bool:
    """Whether a process of this host is alive."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _unreadable(path: Path, error: OSError, what: str = "read") -> KDCacheError:
    """What cannot be read now (no right, a disk or a server that fails, no memory) says nothing about what it holds."""
    kind = StoreError if error.errno in _NO_FILE else StoreUnavailableError
    return kind(f"{path}: cannot {what} ({error.strerror})")


def _place(act: Callable[[Path, Path], None], temporary: Path, target: Path) -> None:
    """Give a written file its name, in a folder that a peer may tidy away at any moment while it is empty."""
    while True:
        _make_folder(target.parent)
        try:
            return act(temporary, target)
        except FileNotFoundError:
            if not temporary.exists():
                raise


def _make_folder(folder: Path) -> None:
    """A folder is there when this returns, or was: a peer may tidy it away at any moment while it is empty."""
    while True:
        try:
            return folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:  # no folder stands there, or one did and was gone when mkdir looked
            standing = _nearest(folder)
            if not standing.is_dir() and os.path.lexists(standing):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(standing)) from error


def _nearest(path: Path) -> Path:
    """The path, or the nearest above it where something stands: perhaps a link that leads nowhere."""
    return next(above for above in (path, *path.parents) if os.path.lexists(above))


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # a peer deleted what we put there, then the empty folder
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
