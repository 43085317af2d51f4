"""Every call by which this process touches some folders, shown to a function that lets it through, fails it, cuts it short or dies.

Watched are the functions of ``os`` that take a path (pathlib and ``os.path`` use them) or a descriptor, what ``open`` gives, down to
each read and write below its buffer, and ``mmap``. By which of them a store does its work is no matter.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import mmap
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BY_PATH = (
    "listdir",
    "scandir",
    "mkdir",
    "rmdir",
    "unlink",
    "remove",
    "link",
    "rename",
    "replace",
    "stat",
    "lstat",
    "utime",
)
BY_DESCRIPTOR = ("read", "pread", "write", "pwrite", "fsync", "fdatasync", "fstat", "ftruncate")
# What may find that there is no space.
ALLOCATING = frozenset(
    {"create", "write", "pwrite", "fsync", "fdatasync", "close", "mkdir", "link", "rename", "replace"}
)
# After these the folder is another one, for whoever looks.
CHANGING = frozenset(
    {"create", "write", "pwrite", "ftruncate", "mkdir", "rmdir", "unlink", "remove", "link", "rename", "replace"}
)
real_stat = os.stat


@dataclass(frozen=True, slots=True)
class Call:
    """One call.

    Attributes:
        name: Of the function; ``create`` is an open that makes or empties a file, ``close`` that of a file that was written.
        path: What it touches.
        go: Does it.
        half: Does it with half of the bytes, at least one; None for what neither reads nor writes.
        changes: Whether the folder is another one afterwards.
    """

    name: str
    path: str
    go: Callable[[], Any]
    half: Callable[[], Any] | None
    changes: bool


def watch(folders: Iterable[str | Path], act: Callable[[Call], Any]) -> pytest.MonkeyPatch:
    """From now on, in all threads, ``act`` answers for every call that touches something below these folders."""
    patch = pytest.MonkeyPatch()
    _Watch(tuple(os.path.abspath(folder) for folder in folders), act).install(patch)
    return patch


@contextlib.contextmanager
def watched(folders: Iterable[str | Path], act: Callable[[Call], Any]) -> Iterator[None]:
    """The same for a while."""
    patch = watch(folders, act)
    try:
        yield
    finally:
        patch.undo()


class _Watch:
    def __init__(self, folders: tuple[str, ...], act: Callable[[Call], Any]) -> None:
        self.folders, self.act = folders, act
        self.opened: dict[int, str] = {}

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in BY_PATH:
            patch.setattr(os, name, self.by_path(name, getattr(os, name)))
        for name in BY_DESCRIPTOR:
            patch.setattr(os, name, self.by_descriptor(name, getattr(os, name)))
        patch.setattr(os, "open", self.os_open(os.open))
        patch.setattr(os, "close", self.os_close(os.close))
        opening = self.open(builtins.open)
        patch.setattr(builtins, "open", opening)
        patch.setattr(io, "open", opening)
        patch.setattr(mmap, "mmap", self.maps(mmap.mmap))

    def path_of(self, place: Any) -> str | None:
        """Of a path or descriptor, or None if it is not below the folders."""
        if isinstance(place, int):
            return self.opened.get(place)
        if not isinstance(place, str | os.PathLike):
            return None
        path = os.path.abspath(os.fspath(place))
        return path if any(path == one or path.startswith(one + os.sep) for one in self.folders) else None

    def see(self, name: str, path: str, go: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        changes = name in CHANGING and not (name == "mkdir" and _is_folder(path))
        return self.act(Call(name, path, go, half, changes))

    def by_path(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            paths = [path for path in map(self.path_of, args[:2]) if path is not None]
            return self.see(name, paths[-1], lambda: real(*args, **kwargs)) if paths else real(*args, **kwargs)

        return call

    def by_descriptor(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: int, *args: Any) -> Any:
            if descriptor not in self.opened:
                return real(descriptor, *args)
            half = None
            if name in ("read", "pread"):
                half = lambda: real(descriptor, max(1, args[0] // 2), *args[1:])  # noqa: E731
            elif name in ("write", "pwrite"):
                half = lambda: real(descriptor, _half(args[0]), *args[1:])  # noqa: E731
            return self.see(name, self.opened[descriptor], lambda: real(descriptor, *args), half)

        return call

    def os_open(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(place: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            path = self.path_of(place) if dir_fd is None else self.opened.get(dir_fd)
            if path is None:
                return real(place, flags, mode, dir_fd=dir_fd)
            name = "create" if flags & (os.O_CREAT | os.O_TRUNC) else "open"
            descriptor: int = self.see(name, path, lambda: real(place, flags, mode, dir_fd=dir_fd))
            self.opened[descriptor] = path
            return descriptor

        return call

    def os_close(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            self.opened.pop(descriptor, None)
            real(descriptor)

        return call

    def open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(
            place: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, newline: Any = None,
            closefd: bool = True, opener: Any = None,
        ) -> Any:  # fmt: skip
            path = self.path_of(place)
            if path is None:
                return real(place, mode, buffering, encoding, errors, newline, closefd, opener)
            raw_mode = mode.replace("b", "").replace("t", "")

            def go() -> io.FileIO:
                return _File(self, path, place, raw_mode, closefd, opener)

            creates = not isinstance(place, int) and raw_mode[0] != "r"
            raw = go() if isinstance(place, int) else self.see("create" if creates else "open", path, go)
            if buffering == 0:
                return raw
            kind = io.BufferedRandom if "+" in mode else io.BufferedReader if raw_mode[0] == "r" else io.BufferedWriter
            buffer = kind(raw, buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE)
            return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline, buffering == 1)

        return call

    def maps(self, real: type[mmap.mmap]) -> type[mmap.mmap]:
        watch = self

        class Map(real):  # type: ignore[valid-type, misc]
            def __new__(cls, descriptor: int, *args: Any, **kwargs: Any) -> Any:
                def go() -> Any:
                    return real.__new__(cls, descriptor, *args, **kwargs)

                return watch.see("mmap", watch.opened[descriptor], go) if descriptor in watch.opened else go()

        return Map


class _File(io.FileIO):
    """A file whose every read and write is seen."""

    def __init__(self, watch: _Watch, path: str, place: Any, mode: str, closefd: bool, opener: Any) -> None:
        super().__init__(place, mode, closefd, opener)
        self.watch, self.path = watch, path
        watch.opened[self.fileno()] = path

    def readinto(self, buffer: Any) -> Any:
        with memoryview(buffer).cast("B") as view:
            here = super()
            return self.watch.see("read", self.path, lambda: here.readinto(view), lambda: here.readinto(_half(view)))

    def readall(self) -> Any:
        here = super()
        return self.watch.see("read", self.path, here.readall)

    def read(self, size: int | None = -1) -> Any:
        if size is None or size < 0:
            return self.readall()
        here = super()
        return self.watch.see("read", self.path, lambda: here.read(size), lambda: here.read(max(1, size // 2)))

    def write(self, data: Any) -> Any:
        here = super()
        return self.watch.see("write", self.path, lambda: here.write(data), lambda: here.write(_half(data)))

    def close(self) -> None:
        if self.closed:
            return
        written = self.writable()
        self.watch.opened.pop(self.fileno(), None)
        super().close()  # in any case: a descriptor is gone also where the system says that close failed
        if written:
            self.watch.see("close", self.path, lambda: None)


def _half(data: Any) -> memoryview:
    view = memoryview(data).cast("B")
    return view[: max(1, len(view) // 2)]


def _is_folder(path: str) -> bool:
    try:
        return stat.S_ISDIR(real_stat(path).st_mode)
    except OSError:
        return False
