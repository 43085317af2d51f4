"""Leases keep two workers from doing the same work at the same time; they never decide what counts.

A lease that is lost, stale or stolen can cost time and never correctness: the first commit of a shard wins, whoever made it.
One is stale when it has expired, or says that it will far from now, when its process of this host no longer runs, and when this very
process has given it up.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from dataclasses import dataclass, field

from kdcache.cache.layout import LEASES, lease_name, parse_number
from kdcache.cache.store import Store, hostname, is_running
from kdcache.errors import CacheCorruptError, CacheNotFoundError, KDCacheError

LEASE_SECONDS = 120.0
# Clocks of two hosts are no further apart; who says that a lease ends later than this says nothing.
CLOCK_SECONDS = 86_400.0
# Tokens of the leases that this process holds: one under its own number that is not among them was given up.
_HELD: set[str] = set()


@dataclass(slots=True)
class Lease:
    """One worker's word that it is at work on a shard."""

    store: Store
    shard: int
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    _renewed: float = 0.0

    def __post_init__(self) -> None:
        _HELD.add(self.token)

    @property
    def name(self) -> str:
        """Where the lease stands."""
        return lease_name(self.shard)

    def renew(self) -> None:
        """Say so again; cheap to call often."""
        now = time.time()
        if now - self._renewed > LEASE_SECONDS / 4:
            self._renewed = now
            self.store.replace(self.name, self._content(now))

    def release(self) -> None:
        """Done, or given up. Given up also where the file cannot be removed: this process knows."""
        if self.token in _HELD:
            _HELD.discard(self.token)
            self.store.delete(self.name)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with contextlib.suppress(*([] if kind is None else [KDCacheError])):  # the first error counts
            self.release()

    def _content(self, now: float) -> bytes:
        about = {"token": self.token, "host": hostname(), "pid": os.getpid(), "expires": now + LEASE_SECONDS}
        return json.dumps(about).encode()


def claim(store: Store, shard: int) -> Lease | None:
    """Take the lease of a shard, or None while a live worker holds it."""
    lease, now, taken = Lease(store, shard), time.time(), False
    try:
        if store.put_if_absent(lease.name, lease._content(now)):
            lease._renewed, taken = now, True
        elif _is_stale(store, lease.name, shard, now):
            lease.renew()
            taken = True
    finally:
        if not taken:
            _HELD.discard(lease.token)
    return lease if taken else None


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lease, as its file says."""

    shard: int
    host: str
    pid: int
    expires: float
    token: str

    def is_live(self, now: float) -> bool:
        """Neither expired (or without a credible end) nor, on this host, dead, nor given up by this process."""
        if not now <= self.expires <= now + LEASE_SECONDS + CLOCK_SECONDS:
            return False
        if self.host != hostname():
            return True
        return self.token in _HELD if self.pid == os.getpid() else is_running(self.pid)


def read_leases(store: Store) -> list[Holder | str]:
    """Every lease by shard number; the file name where the content says nothing. What has no name of ours is no lease."""
    found: list[Holder | str] = []
    for name in store.names_in(LEASES):
        shard = parse_number(name)
        if shard is not None:
            found.append(_read_holder(store, f"{LEASES}/{name}", shard) or name)
    return found


def _read_holder(store: Store, name: str, shard: int) -> Holder | None:
    try:
        about = json.loads(store.read(name))
        return Holder(shard, str(about["host"]), int(about["pid"]), float(about["expires"]), str(about["token"]))
    except (CacheNotFoundError, CacheCorruptError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _is_stale(store: Store, name: str, shard: int, now: float) -> bool:
    holder = _read_holder(store, name, shard)
    return holder is None or not holder.is_live(now)
