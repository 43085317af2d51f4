"""A machine for failing storage calls: the n-th one of a dump fails, for every n; the dump ends well or says why, and goes on.

On a folder the calls are those of the operating system; in an object store those of its client.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kdcache.cache import remote
from kdcache.cache.store import open_store
from kdcache.errors import KDCacheError
from tests.abuse.crashes import dump_here
from tests.object_stores import FAULTS, FaultyMemory, faulty_memory, stored

LOCAL_CALLS = ("link", "fsync", "replace", "unlink", "rmdir", "open", "listdir", "mkdir")
LOCAL_FAULTS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EDQUOT": errno.EDQUOT, "ESTALE": errno.ESTALE}


@contextlib.contextmanager
def failing_calls(root: Path, number: int, code: int) -> Iterator[Callable[[], int]]:
    """The ``number``-th call that touches something below a folder fails; gives a function that tells how many there were."""
    count = 0
    real = {name: getattr(os, name) for name in LOCAL_CALLS}

    def wrap(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            ours = any(str(os.fspath(a)).startswith(str(root)) for a in args[:2] if isinstance(a, str | os.PathLike))
            if not ours and name != "fsync":
                return real[name](*args, **kwargs)
            count += 1
            if count == number:
                raise OSError(code, os.strerror(code))
            return real[name](*args, **kwargs)

        return call

    for name in LOCAL_CALLS:
        setattr(os, name, wrap(name))
    try:
        yield lambda: count
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def dump_or_say_why(options: dict[str, Any]) -> str | None:
    """Run a dump; None when it ended well, else the message. Anything but an error of ours is a failure of the test."""
    try:
        dump_here(options)
    except KDCacheError as error:
        return error.message
    return None


def assert_same(found: dict[str, bytes], reference: dict[str, bytes], where: str) -> None:
    """No byte differs, nothing is missing, nothing is left over but temporary files that could not be removed."""
    found = {name: data for name, data in found.items() if not name.startswith("tmp/")}
    assert found.keys() == reference.keys(), f"{where}: files differ: {sorted(found.keys() ^ reference.keys())}"
    different = [name for name in found if found[name] != reference[name]]
    assert not different, f"{where}: bytes differ: {different}"


def local_campaign(
    options: dict[str, Any], root: Path, *, stride: int = 1, kinds: Iterable[str] = LOCAL_FAULTS
) -> dict[str, dict[str, int]]:
    """Fail every ``stride``-th call once, for each kind; how many runs ended well all the same, how many said why."""
    cache = root / "cache"

    def attempt(here: dict[str, Any], number: int, kind: str) -> tuple[str | None, int]:
        shutil.rmtree(cache, ignore_errors=True)
        with failing_calls(cache, number, LOCAL_FAULTS[kind]) as calls:
            said = dump_or_say_why(here)
        return said, calls()

    return _campaign(options, root, str(cache), attempt, stride, kinds)


def remote_campaign(
    options: dict[str, Any], root: Path, *, stride: int = 1, kinds: Iterable[str] = FAULTS
) -> dict[str, dict[str, int]]:
    """The same for an object store in memory whose client's calls fail; patience with it is cut to half a second."""

    def attempt(here: dict[str, Any], number: int, kind: str) -> tuple[str | None, int]:
        FaultyMemory.store.clear()
        FaultyMemory.fail(number, kind)
        said = dump_or_say_why(here)
        calls = FaultyMemory.calls
        FaultyMemory.disarm()
        return said, calls

    faulty_memory()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(remote, "RETRY_SECONDS", 0.5)
        return _campaign(options, root, "faulty://bucket/cache", attempt, stride, kinds)


def _campaign(
    options: dict[str, Any],
    root: Path,
    cache: str,
    attempt: Callable[[dict[str, Any], int, str], tuple[str | None, int]],
    stride: int,
    kinds: Iterable[str],
) -> dict[str, dict[str, int]]:
    """``attempt(options, number, kind)`` begins a new cache with a failing call; what it said, and how many calls there were."""
    dump_here({**options, "output": str(root / "reference")})
    reference, here = stored(open_store(root / "reference")), {**options, "output": cache}
    table = {}
    for kind in kinds:
        ended_well = said_why = 0
        for number in range(1, 10**6, stride):
            said, calls = attempt(here, number, kind)
            if calls < number:
                assert said is None
                break
            if said is None:
                ended_well += 1
            else:
                said_why += 1
                dump_here(here)
            assert_same(stored(open_store(cache)), reference, f"{kind} at call {number}")
        table[kind] = {"calls": ended_well + said_why, "ended well": ended_well, "said why": said_why}
    return table
