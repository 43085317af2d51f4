"""How far a dump is, from what lies on disk: anyone who can read the folder can ask, while it runs or after it stopped."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from kdcache.cache.commit import read_commits, read_plan
from kdcache.cache.lease import Holder, read_leases
from kdcache.cache.manifest import Commit
from kdcache.cache.store import Store

# The rate is that of the last so many commits.
RATE_COMMITS = 32


@dataclass(frozen=True, slots=True)
class Status:
    """What :func:`cache_status` found.

    Attributes:
        num_shards: Planned.
        num_committed: Of them.
        num_positions: Tokens committed.
        num_bytes: Of the committed shards.
        in_flight: Leases of workers that live.
        stale: Leases of workers that do not, and files in the place of leases that are none.
        holes: Shards that are neither committed nor in flight, as first and last of each run.
        tokens_per_second: Of all workers together: while some live, what one made of each of their last shards, times their number; else between
            the last commits. None where nothing is known, so of workers that have committed nothing yet.
        seconds_left: At that rate; 0 when all is committed, None where the rate is unknown.
    """

    num_shards: int
    num_committed: int
    num_positions: int
    num_bytes: int
    in_flight: list[Holder]
    stale: list[str]
    holes: list[tuple[int, int]]
    tokens_per_second: float | None
    seconds_left: float | None


def cache_status(store: Store, now: float | None = None) -> Status:
    """Look at plan, commits and leases.

    Raises:
        CacheNotFoundError: There is no cache here.
        CacheError: A record is damaged.
    """
    now = time.time() if now is None else now
    plan, commits = read_plan(store), read_commits(store)
    committed = {commit.shard for commit in commits}
    in_flight, stale = split_leases(store, committed, now)
    open_shards = committed | {holder.shard for holder in in_flight}
    holes = [shard for shard in range(plan.spec.num_shards) if shard not in open_shards]
    left = plan.spec.num_shards - len(commits)
    positions = sum(commit.stats.num_positions for commit in commits)
    rate = _rate(commits, {f"{holder.host}:{holder.pid}" for holder in in_flight})
    return Status(
        num_shards=plan.spec.num_shards,
        num_committed=len(commits),
        num_positions=positions,
        num_bytes=sum(commit.num_bytes for commit in commits),
        in_flight=in_flight,
        stale=stale,
        holes=_runs(holes),
        tokens_per_second=rate,
        seconds_left=0.0 if not left else left * positions / len(commits) / rate if rate else None,
    )


def split_leases(store: Store, committed: set[int], now: float) -> tuple[list[Holder], list[str]]:
    """Leases of workers that live and have a shard to make; file names of all others, sorted."""
    leases = read_leases(store)
    in_flight = [x for x in leases if isinstance(x, Holder) and x.is_live(now) and x.shard not in committed]
    stale = [x if isinstance(x, str) else f"{x.shard:05d}.json" for x in leases if x not in in_flight]
    return in_flight, sorted(stale)


def _rate(commits: list[Commit], workers: set[str]) -> float | None:
    """Tokens a second of the workers that live; where none does, those between the oldest and the newest of the last commits.

    When commits came says little while workers live: they may all commit at once, or have paused. Commits of others say nothing of them: those
    of a copied cache are the dump's.
    """
    timed = [
        (datetime.fromisoformat(commit.finished_at).timestamp(), commit)
        for commit in commits
        if not workers or commit.worker in workers
    ]
    last = sorted(timed, key=lambda one: one[0])[-RATE_COMMITS:]
    if workers:
        seconds = sum(commit.seconds for _, commit in last)
        return len(workers) * sum(commit.stats.num_positions for _, commit in last) / seconds if seconds else None
    if len(last) < 2:
        return None
    # Times are whole seconds.
    return sum(commit.stats.num_positions for _, commit in last[1:]) / max(last[-1][0] - last[0][0], 1.0)


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """``[1, 2, 3, 7]`` as ``[(1, 3), (7, 7)]``."""
    breaks = [i for i, (a, b) in enumerate(pairwise(numbers), start=1) if b != a + 1]
    edges = [0, *breaks, len(numbers)] if numbers else []
    return [(numbers[a], numbers[b - 1]) for a, b in pairwise(edges)]
