"""A machine for failing storage calls: the n-th one of a dump fails, for every n; the dump ends well or says why, and goes on.

On a folder the calls are those of the operating system (:mod:`tests.abuse.calls`); in an object store those of its client.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kdcache.cache import remote
from kdcache.cache.store import open_store
from kdcache.errors import KDCacheError
from tests.abuse.calls import ALLOCATING, Call, watched
from tests.abuse.crashes import dump_here
from tests.object_stores import FAULTS, FaultyMemory, faulty_memory, stored


@dataclass(frozen=True, slots=True)
class Fault:
    """How a call of the operating system fails.

    Attributes:
        code: The errno; None for a read or write that does half of what it was asked for, which is no error.
        allocating: Only calls that may need space fail.
        lasting: All that follow fail too, until the dump has ended.
    """

    code: int | None
    allocating: bool = False
    lasting: bool = False

    def hits(self, call: Call) -> bool:
        """Whether a call can fail so."""
        if self.code is None:
            return call.half is not None
        return call.name in ALLOCATING if self.allocating else True


LOCAL_FAULTS = {
    "ENOSPC": Fault(errno.ENOSPC, allocating=True),
    "ENOSPC for good": Fault(errno.ENOSPC, allocating=True, lasting=True),
    "EDQUOT": Fault(errno.EDQUOT, allocating=True),
    "EIO": Fault(errno.EIO),
    "EIO for good": Fault(errno.EIO, lasting=True),
    "ESTALE": Fault(errno.ESTALE),
    "half of the bytes": Fault(None),
    "half of the bytes for good": Fault(None, lasting=True),
}


class Failing:
    """Lets calls through, all but the ``number``-th that can fail so, and with a lasting fault those after it.

    Attributes:
        calls: How many there were that could.
        failed: Names of the functions of those that failed.
    """

    def __init__(self, number: int, fault: Fault) -> None:
        self.number, self.fault = number, fault
        self.calls, self.failed = 0, set[str]()
        self._numbers = itertools.count(1)

    def __call__(self, call: Call) -> Any:
        """Answer for a call."""
        if not self.fault.hits(call):
            return call.go()
        self.calls = mine = next(self._numbers)
        if mine != self.number and not (self.fault.lasting and mine > self.number):
            return call.go()
        self.failed.add(call.name)
        if self.fault.code is None:
            assert call.half is not None
            return call.half()
        raise OSError(self.fault.code, os.strerror(self.fault.code), call.path)


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
    options: dict[str, Any], root: Path, *, stride: int = 1, first: int = 1, kinds: Iterable[str] = LOCAL_FAULTS
) -> dict[str, dict[str, Any]]:
    """Fail every ``stride``-th call once, for each kind; how many runs ended well all the same, how many said why.

    Where the options name a cache that is read, calls that read it fail too.
    """
    cache = root / "cache"
    folders = [cache, *(Path(options[name]) for name in ("cache",) if name in options)]

    def attempt(here: dict[str, Any], number: int, kind: str) -> tuple[str | None, int, set[str]]:
        shutil.rmtree(cache, ignore_errors=True)
        failing = Failing(number, LOCAL_FAULTS[kind])
        with watched(folders, failing):
            said = dump_or_say_why(here)
        return said, failing.calls, failing.failed

    return _campaign(options, root, str(cache), attempt, range(first, 10**6, stride), kinds)


def remote_campaign(
    options: dict[str, Any], root: Path, *, stride: int = 1, kinds: Iterable[str] = FAULTS
) -> dict[str, dict[str, Any]]:
    """The same for an object store in memory whose client's calls fail; patience with it is cut to half a second."""

    def attempt(here: dict[str, Any], number: int, kind: str) -> tuple[str | None, int, set[str]]:
        FaultyMemory.store.clear()
        FaultyMemory.fail(number, kind)
        said = dump_or_say_why(here)
        calls = FaultyMemory.calls
        FaultyMemory.disarm()
        return said, calls, set()

    faulty_memory()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(remote, "RETRY_SECONDS", 0.5)
        return _campaign(options, root, "faulty://bucket/cache", attempt, range(1, 10**6, stride), kinds)


def _campaign(
    options: dict[str, Any],
    root: Path,
    cache: str,
    attempt: Callable[[dict[str, Any], int, str], tuple[str | None, int, set[str]]],
    numbers: Iterable[int],
    kinds: Iterable[str],
) -> dict[str, dict[str, Any]]:
    """``attempt(options, number, kind)`` begins a new cache with a failing call.

    It gives what the run said, how many calls there were, and names of those that failed where they have some.
    """
    dump_here({**options, "output": str(root / "reference")})
    reference, here = stored(open_store(root / "reference")), {**options, "output": cache}
    table = {}
    for kind in kinds:
        ended_well = said_why = 0
        functions: set[str] = set()
        for number in numbers:
            said, calls, failed = attempt(here, number, kind)
            functions |= failed
            if calls < number:
                assert said is None
                break
            if said is None:
                ended_well += 1
            else:
                said_why += 1
                dump_here(here)
            assert_same(stored(open_store(cache)), reference, f"{kind} at call {number}")
        table[kind] = {
            "calls": ended_well + said_why, "ended well": ended_well, "said why": said_why, "functions": sorted(functions),
        }  # fmt: skip
    return table
