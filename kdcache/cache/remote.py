"""A cache in an object store (``s3://``, ``gs://``, ``az://``) or on any other file system that fsspec knows.

**What correctness rests on**: ``put_if_absent`` asks the store itself to refuse a name that is taken (``If-None-Match: *`` on
S3). Not every store can: :meth:`RemoteStore.is_exclusive` tries it, and a dump by several writers is refused where it fails.
A connection that breaks after the store has taken a file leaves the writer in doubt; it then looks whether what stands there
is its own.

**What fails in passing** (a server that restarts, 503, 409, a time-out) is tried again for a minute, each time after a longer
pause; what is still refused then ends the run with a :class:`~kdcache.errors.StoreUnavailableError`. Nothing that is committed
is in danger, and the same command goes on from there.

Credentials and endpoints are the business of fsspec and its packages: environment variables (``AWS_ACCESS_KEY_ID``,
``AWS_ENDPOINT_URL``, ``FSSPEC_S3_...``) or their own config files. None of them is ever written to a cache.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import fsspec

from kdcache.cache.copies import LocalCopies, map_without_copy
from kdcache.cache.layout import ABANDONED_SECONDS, TABLES, TEMPORARY
from kdcache.cache.limits import MAX_FILE_BYTES, enough_memory, max_file_bytes
from kdcache.errors import CacheCorruptError, CacheNotFoundError, ConfigError, StoreError, StoreUnavailableError

logger = logging.getLogger(__name__)

RETRY_SECONDS = 60.0
RANGE_BYTES = 8 << 20
RANGES_AT_ONCE = 4
READS_AT_ONCE = 256
# A file up to this size is read back to find out whose it is.
OWN_BYTES = 1 << 20
RIGHTS = "these credentials need the right to list and read, and for a dump to write and delete"
# What packages of object stores raise besides OSError, by where it is defined; the first kind may pass by itself.
_PASSING = (
    "botocore.exceptions:ConnectionError",
    "botocore.exceptions:HTTPClientError",
    "aiohttp.client_exceptions:ClientError",
    "azure.core.exceptions:ServiceRequestError",
    "azure.core.exceptions:ServiceResponseError",
    "gcsfs.retry:HttpError",
)
_FINAL = (
    "botocore.exceptions:BotoCoreError",
    "azure.core.exceptions:AzureError",
    "google.auth.exceptions:GoogleAuthError",
)
# What changes when a file does, by the names that fsspec's packages have for it.
_VERSIONS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "created")
_TRIAL_NAME = re.compile(r"trial~(?P<seconds>\d{1,12})~[0-9a-f]{32}")
# Answers of a store, not failures of it.
_ANSWERS = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)


class RemoteStore:
    """A cache below a URL. Methods take names relative to it, with ``/``."""

    def __init__(self, url: str) -> None:
        self.location = url.rstrip("/")

    def __str__(self) -> str:
        return self.location

    def exists(self, name: str) -> bool:
        """Whether a file stands at the name.

        Raises:
            StoreError: It cannot be looked for.
        """
        try:
            with self._found(name):
                return bool(self._ask(f"look for {name}", lambda fs, path: fs.info(path), name)["type"] == "file")
        except CacheNotFoundError:
            return False

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """The whole file.

        Raises:
            CacheNotFoundError: There is none.
            CacheCorruptError: It is larger than ``max_bytes``, or than a file of its kind.
            StoreError: It cannot be read.
        """
        if max_bytes is None and not name.startswith(f"{TABLES}/"):
            return self.read_all([name])[0]
        with self._found(name), enough_memory(f"{self}/{name}"):
            limit = max_bytes or MAX_FILE_BYTES[TABLES]
            size = self._ask(f"read {name}", lambda fs, path: fs.info(path), name)["size"]
            if size > limit:
                raise CacheCorruptError(f"{self}/{name}: at most {limit} bytes were expected, found {size}")
            return b"".join(self._pieces(name, size))

    def read_all(self, names: list[str]) -> list[bytes]:
        """Several small files, many at a time.

        Raises:
            CacheNotFoundError: One of them is not there.
            CacheCorruptError: One is larger than a file of its kind.
            StoreError: One cannot be read.
        """
        found: list[bytes] = []
        for first in range(0, len(names), READS_AT_ONCE):
            some = names[first : first + READS_AT_ONCE]
            limits = [max_file_bytes(name) for name in some]
            with self._found_all(some):
                # A byte more than there may be is as much as is ever fetched.
                found += self._ranges(some, [0] * len(some), [None if limit is None else limit + 1 for limit in limits])
            for name, limit, data in zip(some, limits, found[first:], strict=True):
                if limit is not None and len(data) > limit:
                    raise CacheCorruptError(f"{self}/{name}: at most {limit} bytes were expected, found more")
        return found

    def map(self, name: str, num_bytes: int, digest: str | None = None, *, original: bool = False) -> mmap.mmap:
        """A read-only memory map of a local copy; fetched by ranges unless a whole copy is there.

        The name ends in the digest of the bytes, as those of shards do. A copy is hashed when it is fetched, and one that is there where
        a digest is given. Where the original is asked for it is fetched whatever copies there are, to a file without a name, and hashed
        where a digest is given.

        Raises:
            CacheNotFoundError: There is none.
            CacheCorruptError: Its bytes are not those of the digest; of a copy when fetched twice.
            StoreError: It has another size.
            StoreUnavailableError: It cannot be read, or no copy kept.
        """

        def fetch(write: Callable[[bytes], object]) -> str:
            with self._found(name):
                info = self._ask(f"read {name}", lambda fs, path: fs.info(path), name)
                if info["size"] != num_bytes or num_bytes == 0:
                    raise StoreError(f"{self}/{name}: {num_bytes} bytes were committed, found {info['size']}")
                for piece in self._pieces(name, num_bytes):
                    write(piece)
                return _version(info)

        if original:
            return map_without_copy(f"{self}/{name}", fetch, digest)
        copies, named = LocalCopies.from_environment(version_of), PurePosixPath(name).stem.rpartition("-")[2]
        return copies.open(named, num_bytes, f"{self}/{name}", fetch, check=digest is not None)

    def names_in(self, folder: str) -> list[str]:
        """File and folder names in a folder, sorted; empty when there is no folder.

        Raises:
            StoreError: It cannot be listed.
        """
        what = f"list {folder or 'the folder'}"
        try:
            with self._found(folder):
                here, paths = self._ask(what, lambda fs, path: (path, fs.ls(path, detail=False)), folder)
        except CacheNotFoundError:
            return []
        return sorted(PurePosixPath(path).name for path in paths if path.strip("/") != here.strip("/"))

    def put_if_absent(self, name: str, data: bytes | memoryview) -> bool:
        """Publish a file unless one stands there already.

        Returns:
            False when another writer was first; the data are discarded then.

        Raises:
            StoreError: It cannot be written.
        """
        if not len(data):
            raise ValueError("a file that decides something is not empty: stores create empty files without asking")

        def create(fs: Any, path: str) -> bool:
            try:
                fs.pipe_file(path, bytes(data), mode="create")
            except OSError as error:
                if _is_taken(error):
                    return False
                if not _is_unknown(error):
                    raise
                fs.pipe_file(path, bytes(data))  # one writer, as is_exclusive has said, and nothing stood there
            return True

        if self.exists(name):
            return False
        with self._writable(name):
            if self._ask(f"write {name}", create, name):
                return True
        if len(data) > OWN_BYTES:
            return False
        try:  # perhaps by us: the answer to an earlier try was lost
            return self.read(name) == data
        except (CacheNotFoundError, CacheCorruptError):  # a lease that was released since, and no file of ours
            return False

    def replace(self, name: str, data: bytes) -> None:
        """Publish a file over whatever stands there. Only for what can be derived again."""
        with self._writable(name):
            self._ask(f"write {name}", lambda fs, path: fs.pipe_file(path, bytes(data)), name)

    def delete(self, name: str) -> None:
        """Remove a file; no error when there is none."""
        with self._writable(name, missing_is_fine=True):
            self._ask(f"remove {name}", lambda fs, path: fs.rm_file(path), name)

    def remove_abandoned(self) -> int:
        """Delete what trials (:meth:`is_exclusive`) that were killed left behind; how many there were.

        An upload that was not finished never had a name.
        """
        removed = 0
        for name in self.names_in(TEMPORARY):
            match = _TRIAL_NAME.fullmatch(name)
            if match and time.time() - int(match["seconds"]) > ABANDONED_SECONDS:
                self.delete(f"{TEMPORARY}/{name}")
                removed += 1
        return removed

    def remove_empty(self, folder: str) -> None:
        """Nothing to do: an object store has no folders."""

    def is_exclusive(self) -> bool:
        """Whether the store itself refuses to create a file that is there, tried with a small one.

        What fsspec does where a store cannot (look, then write) does not count: its look is made blind for the trial.
        """

        def create_twice(fs: Any, root: str) -> bool:
            path = f"{root}/{TEMPORARY}/trial~{int(time.time())}~{uuid.uuid4().hex}"
            try:
                fs.pipe_file(path, b"first", mode="create")
            except OSError as error:
                if not _is_unknown(error):
                    raise
                return False
            try:
                with _blind(fs):
                    fs.pipe_file(path, b"second", mode="create")
            except OSError as error:
                if not _is_taken(error):
                    raise
            answer = fs.cat_file(path) == b"first"
            fs.rm_file(path)
            return bool(answer)

        with self._writable(TEMPORARY):
            return bool(self._ask("create a file", create_twice))

    def _pieces(self, name: str, num_bytes: int) -> Iterator[bytes]:
        """A large file, a few parts at a time."""
        step = RANGE_BYTES * RANGES_AT_ONCE
        for first in range(0, num_bytes, step):
            starts = list(range(first, min(first + step, num_bytes), RANGE_BYTES))
            ends = [min(start + RANGE_BYTES, num_bytes) for start in starts]
            yield from self._ranges([name] * len(starts), starts, ends)

    def _ranges(self, names: list[str], starts: list[int], ends: Sequence[int | None]) -> list[bytes]:
        """Parts of files, all at once."""

        def cat(fs: Any, root: str) -> list[bytes]:
            paths = [f"{root}/{name}" for name in names]
            found = []
            for path, part in zip(
                paths, fs.cat_ranges(paths, list(starts), list(ends), on_error="return"), strict=True
            ):
                if not isinstance(part, BaseException):
                    found.append(bytes(part))
                    continue
                # To some stores a part of an empty file is an error.
                if isinstance(part, _ANSWERS) or fs.info(path)["size"]:
                    raise part
                found.append(b"")
            return found

        answer: list[bytes] = self._ask(f"read {names[0]}", cat)
        return answer

    def _ask(self, what: str, act: Callable[[Any, str], Any], name: str = "") -> Any:
        """``act(fs, path)``, again while it fails in passing.

        Raises:
            OSError: The store's answer: not found, exists, not allowed.
            StoreUnavailableError: It could not be asked.
        """
        fs, root = self._connect()
        path = f"{root}/{name}" if name else root
        started, pause = time.monotonic(), 0.1
        while True:
            try:
                return act(fs, path)
            except _ANSWERS:
                raise
            except _failures(_PASSING + _FINAL) as error:
                passing = isinstance(error, _failures(_PASSING))
                if not passing or time.monotonic() - started + pause > RETRY_SECONDS:
                    raise StoreUnavailableError(
                        f"{self}: cannot {what} ({type(error).__name__}: {error})",
                        hint="see that the store is up and that credentials and endpoint are right, then run the same command "
                        "again: what is committed stays",
                    ) from error
                logger.warning("%s: cannot %s (%s: %s); trying again", self, what, type(error).__name__, error)
                time.sleep(pause)
                pause = min(2 * pause, 5.0)

    def _connect(self) -> tuple[Any, str]:
        """The file system and the path of the cache in it. fsspec keeps one for each process and thread."""
        try:
            fs, path = fsspec.url_to_fs(self.location, use_listings_cache=False)
        except ImportError as error:
            protocol = self.location.partition("://")[0]
            extra = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}.get(protocol)
            hint = f"pip install 'kdcache[{extra}]'" if extra else str(error)
            raise ConfigError(f"{self}: {protocol}:// needs a package that is not installed", hint=hint) from error
        except ValueError as error:
            raise ConfigError(
                f"{self}: {error}", hint="a folder, or a URL that fsspec knows: s3://bucket/cache"
            ) from error
        return fs, str(path).rstrip("/")

    @contextlib.contextmanager
    def _found(self, name: str) -> Iterator[None]:
        """Turn the store's answers to a read into errors of ours."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CacheNotFoundError(f"{self}/{name} does not exist") from error
        except _ANSWERS as error:
            raise StoreUnavailableError(f"{self}/{name}: cannot read ({error})", hint=RIGHTS) from error

    @contextlib.contextmanager
    def _found_all(self, names: list[str]) -> Iterator[None]:
        """The same for several files: says which one is not there."""
        try:
            with self._found(names[0]):
                yield
        except CacheNotFoundError as error:
            missing = next((name for name in names if not self.exists(name)), names[0])
            raise CacheNotFoundError(f"{self}/{missing} does not exist") from error

    @contextlib.contextmanager
    def _writable(self, name: str, *, missing_is_fine: bool = False) -> Iterator[None]:
        """Turn the store's answers to a write into errors of ours."""
        try:
            yield
        except FileNotFoundError as error:
            if missing_is_fine:
                return
            raise StoreError(
                f"{self}: cannot write {name} ({error})", hint="does the bucket exist? kdcache does not make buckets"
            ) from error
        except _ANSWERS as error:
            raise StoreError(f"{self}: cannot write {name} ({error})", hint=RIGHTS) from error


def version_of(url: str) -> str | None:
    """What tells this version of a file from others, as its store says; None where there is none or that cannot be found out now."""
    try:
        fs, path = fsspec.url_to_fs(url, use_listings_cache=False)
        return _version(fs.info(path))
    except (ValueError, ImportError):
        return None
    except _failures(_PASSING + _FINAL):
        return None


def _version(info: dict[str, Any]) -> str:
    """Its size, and the first of what stores say; a store that says nothing is believed by the size."""
    return f"{info['size']} {next((info[name] for name in _VERSIONS if info.get(name)), '')}"


def _is_taken(error: OSError) -> bool:
    """Whether this is the refusal to create what exists; servers say so in different words."""
    text = str(error).lower().replace("-", "")
    return isinstance(error, FileExistsError) or "precondition" in text


def _is_unknown(error: OSError) -> bool:
    """Whether the store does not know how to refuse what exists, and says so (501 Not Implemented)."""
    return error.errno in (errno.ENOSYS, errno.ENOTSUP) or "notimplemented" in str(error).lower().replace(" ", "")


def _failures(names: tuple[str, ...]) -> tuple[type[Exception], ...]:
    """OSError, time-outs, and the exception classes of those packages that are in use."""
    places = [name.split(":") for name in names]
    found = [getattr(sys.modules[module], kind) for module, kind in places if module in sys.modules]
    return (OSError, TimeoutError, *found)


@contextlib.contextmanager
def _blind(fs: Any) -> Iterator[None]:
    """A file system that finds no file, for as long as this lasts: what it refuses then, the store refuses."""

    def sees_nothing(path: str, **options: Any) -> bool:
        return False

    async def sees_nothing_later(path: str, **options: Any) -> bool:
        return False

    before = dict(fs.__dict__)
    fs.exists, fs._exists = sees_nothing, sees_nothing_later
    try:
        yield
    finally:
        for name in ("exists", "_exists"):
            if name in before:
                setattr(fs, name, before[name])
            else:
                delattr(fs, name)
