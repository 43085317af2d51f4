"""What a cache no longer needs: leftovers of writers that died or came second.

**What stays, always**: a shard file of a shard that is not committed yet. Its writer may be about to commit it, also one that
was stopped for longer than its lease; deleting it then would leave a commit without its file. And whatever has a name that kdcache does
not give.
"""

from __future__ import annotations

import time

from kdcache.cache.commit import read_commits, read_plan
from kdcache.cache.layout import LEASES, SHARDS, TABLES, is_table_name, parse_shard_name, shard_name, table_name
from kdcache.cache.status import split_leases
from kdcache.cache.store import Store


def find_garbage(store: Store, now: float | None = None) -> list[str]:
    """Names of the files that can go, sorted: shard files that lost to another commit, heads that no commit names, stale leases.

    Raises:
        CacheNotFoundError: There is no cache here.
        CacheError: A record is damaged: then nothing can be told apart.
    """
    now = time.time() if now is None else now
    plan, commits = read_plan(store), read_commits(store)
    named = {shard_name(commit.shard, commit.digest) for commit in commits}
    committed = {commit.shard for commit in commits}
    garbage = [
        f"{SHARDS}/{name}"
        for name in store.names_in(SHARDS)
        if (shard := parse_shard_name(name)) is not None and shard in committed and f"{SHARDS}/{name}" not in named
    ]
    if len(committed) == plan.spec.num_shards:
        digests = {commit.head_digest for commit in commits} | {plan.spec.codec.id_tables}
        tables = {table_name(digest) for digest in digests if digest}
        found = [f"{TABLES}/{name}" for name in store.names_in(TABLES) if is_table_name(name)]
        garbage += [name for name in found if name not in tables]
    garbage += [f"{LEASES}/{name}" for name in split_leases(store, committed, now)[1]]
    return sorted(garbage)


def collect_garbage(store: Store) -> tuple[list[str], int]:
    """Delete what :func:`find_garbage` finds, and temporary files of writers of this host that no longer run, or of any host that are a day old.

    Returns:
        Names of the files deleted, and how many temporary ones.
    """
    garbage = find_garbage(store)
    for name in garbage:
        store.delete(name)
    return garbage, store.remove_abandoned()
