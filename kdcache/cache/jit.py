"""Compiled loops, where there is a compiler: the extra ``kdcache[fast]`` brings numba.

Without it the codec is numpy alone and gives the same bytes and the same arrays, at a half to a quarter of the rate. numba is no plain
requirement, because it holds numpy back to the versions that it knows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any

from kdcache.cache import loops

# numba takes half a second to load what it compiled before, and some seconds the first time of all: not for a glance at a cache.
WARM_UP_POSITIONS = 1 << 14
_positions = 0


def note(num_targets: int) -> None:
    """Count positions that are about to be encoded or decoded; few are done by numpy alone."""
    global _positions
    _positions += num_targets


def compiled() -> Any | None:
    """The functions of :mod:`kdcache.cache.loops`, each compiled when it is first called; None where numba is not installed or not worth it.

    What was compiled is kept beside the package, or in the user's cache folder, for the next process.
    """
    return _functions() if _positions >= WARM_UP_POSITIONS else None


@cache
def _functions() -> Any | None:
    try:
        import numba
    except ImportError:
        return None
    return each_loop(lambda function: _compiled(numba, function))


def each_loop(compile_one: Callable[[FunctionType], Callable[..., Any]]) -> SimpleNamespace:
    """Every function of :mod:`kdcache.cache.loops`, compiled."""
    functions = {name: value for name, value in vars(loops).items() if isinstance(value, FunctionType)}
    return SimpleNamespace(**{name: compile_one(function) for name, function in functions.items()})


def _compiled(numba: Any, function: FunctionType) -> Callable[..., Any]:
    def in_memory() -> Any:
        return numba.njit(function, nogil=True, fastmath=loops.FAST)

    try:
        dispatcher = numba.njit(function, nogil=True, cache=True, fastmath=loops.FAST)
    except RuntimeError:  # no folder that may be written
        dispatcher = in_memory()

    def call(*arguments: Any) -> Any:
        nonlocal dispatcher
        try:
            return dispatcher(*arguments)
        except OSError:  # what was compiled could not be kept: the disk is full; nothing has run yet
            dispatcher = in_memory()
            return dispatcher(*arguments)

    return call
