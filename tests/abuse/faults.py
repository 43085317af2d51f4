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
    folders: dict[int, str] = {}

    def wrap(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            places = [
                folders.get(a, "") if isinstance(a, int) else os.fspath(a) for a in args[:2] if not isinstance(a, bytes)
            ]
            if not any(str(place).startswith(str(root)) for place in places) and name != "fsync":
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
    dump_here({**options, "output": str(root / "reference")})
    reference = stored(open_store(root / "reference"))
    table = {}
    for kind in kinds:
        ended_well = said_why = 0
        for number in range(1, 10**6, stride):
            cache = root / "cache"
            with failing_calls(cache, number, LOCAL_FAULTS[kind]) as calls:
                said = dump_or_say_why({**options, "output": str(cache)})
            if calls() < number:
                assert said is None
                break
            if said is None:
                ended_well += 1
            else:
                said_why += 1
                dump_here({**options, "output": str(cache)})
            assert_same(stored(open_store(cache)), reference, f"{kind} at call {number}")
            shutil.rmtree(cache)
        shutil.rmtree(root / "cache", ignore_errors=True)
        table[kind] = {"calls": ended_well + said_why, "ended well": ended_well, "said why": said_why}
    return table


def remote_campaign(
    options: dict[str, Any], root: Path, *, stride: int = 1, kinds: Iterable[str] = FAULTS
) -> dict[str, dict[str, int]]:
    """The same for an object store in memory whose client's calls fail; patience with it is cut to half a second."""
    dump_here({**options, "output": str(root / "reference")})
    reference = stored(open_store(root / "reference"))
    faulty_memory()
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.5)
    table = {}
    for kind in kinds:
        ended_well = said_why = 0
        for number in range(1, 10**6, stride):
            FaultyMemory.store.clear()
            FaultyMemory.fail(number, kind)
            said = dump_or_say_why({**options, "output": "faulty://bucket/cache"})
            calls = FaultyMemory.calls
            FaultyMemory.disarm()
            if calls < number:
                assert said is None
                break
            if said is None:
                ended_well += 1
            else:
                said_why += 1
                dump_here({**options, "output": "faulty://bucket/cache"})
            assert_same(stored(open_store("faulty://bucket/cache")), reference, f"{kind} at call {number}")
        table[kind] = {"calls": ended_well + said_why, "ended well": ended_well, "said why": said_why}
    monkeypatch.undo()
    return table
