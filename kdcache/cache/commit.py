"""Plan once, commit each shard once, seal: resume is "planned minus committed", at any number of workers.

The order of a commit is: publish the shard under a name that holds its digest, then publish the commit. A crash between
the two leaves a file that nothing names; the next writer finds it, or replaces it. The first commit of a shard wins; a
second writer learns that it lost and discards its own. Leases only keep two workers from doing the same work at the same
time; a lease that is lost, stale or stolen can cost time and never correctness.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import lru_cache

from pydantic import BaseModel

from kdcache.cache.codec import Codec
from kdcache.cache.layout import (
    COMMITS,
    LEASES,
    MANIFEST,
    PLAN,
    RUNS,
    SHARDS,
    TABLES,
    TEMPORARY,
    commit_name,
    is_table_name,
    parse_misspelt,
    parse_number,
    parse_shard_name,
    shard_name,
    table_name,
)
from kdcache.cache.manifest import (
    CacheSpec,
    Commit,
    Manifest,
    Plan,
    ShardStats,
    derive_manifest,
    differing_fields,
    parse,
    to_json,
)
from kdcache.cache.shard import digest
from kdcache.cache.store import Store, open_store
from kdcache.cache.tables import MAX_BYTES, IdTables
from kdcache.config import run_files, run_name
from kdcache.errors import (
    CacheCorruptError,
    CacheError,
    CacheMismatchError,
    CacheNotFoundError,
    ConfigError,
    StoreError,
    StoreUnavailableError,
)

logger = logging.getLogger(__name__)

COMMITS_AT_ONCE = 256
PLAN_IS_LOST = f"put a copy of {PLAN} back, or begin anew in another folder"


def check_no_cache(folder: str) -> None:
    """Refuse to write something else into a cache's folder, or to what is not a folder.

    Raises:
        ConfigError: There is a cache, or this is a URL.
    """
    if "://" in folder:
        raise ConfigError(f"--output {folder}: a folder was expected", hint="only caches live in object stores")
    if open_store(folder).exists(PLAN):
        raise ConfigError(f"--output {folder} is a cache", hint="name another folder")


def check_is_ours(store: Store) -> None:
    """Refuse to begin a cache in a folder that holds something else.

    What stands there before a plan does is ours too: tables are published first, and a writer may die or be at work in between.

    Raises:
        ConfigError: The folder is neither empty nor a cache.
    """
    others = sorted(set(store.names_in("")) - {TEMPORARY})
    if TABLES in others and all(is_table_name(name) for name in store.names_in(TABLES)):
        others.remove(TABLES)
    if others and not store.exists(PLAN):
        if MANIFEST in others:
            read_plan(store)  # says that it is gone, and how it comes back
        raise ConfigError(
            f"--output {store} is not a cache and not empty: it holds {', '.join(others[:3])}{' ...' if others[3:] else ''}",
            hint="name a new folder",
        )


def write_run(store: Store, command: str, options: BaseModel, device: str) -> None:
    """Leave beside the cache what this run was: its options and provenance."""
    for name, data in run_files(run_name(), command, options, device).items():
        store.replace(f"{RUNS}/{name}", data)


def check_writers(store: Store, num_writers: int) -> None:
    """Find out, before any work, whether the store can tell writers apart.

    Raises:
        StoreError: It cannot, and there are several.
    """
    if store.is_exclusive():
        return
    message = f"{store}: this store overwrites a file that was to be created, so it cannot tell two writers apart"
    if num_writers > 1:
        raise StoreError(
            message, hint=f"one writer instead of {num_writers}, or a folder, or a store with If-None-Match"
        )
    logger.warning("%s; see to it that nothing else writes there", message)


def read_plan(store: Store) -> Plan:
    """The plan of a cache.

    Raises:
        CacheNotFoundError: There is no cache here.
        CacheError: The plan is damaged, or gone from a finished cache.
    """
    try:
        data = store.read(PLAN)
    except CacheNotFoundError as error:
        if store.exists(MANIFEST):
            raise CacheCorruptError(f"{store}: {PLAN} is gone", hint=_how_it_comes_back(store)) from error
        raise CacheNotFoundError(
            f"{store} is not a kdcache cache: it has no {PLAN}", hint="kdcache dump-teacher --output makes one"
        ) from error
    try:
        plan = parse(Plan, data, f"{store}/{PLAN}")
        if plan.spec.fingerprint != plan.fingerprint:
            raise CacheMismatchError(
                f"{store}/{PLAN}: the spec has fingerprint {plan.spec.fingerprint}, the plan says {plan.fingerprint}: it was edited"
            )
    except CacheError as error:
        error.hint = error.hint or _how_it_comes_back(store)
        raise
    return plan


def _how_it_comes_back(store: Store) -> str:
    return f"kdcache verify {store} --repair writes it anew from {MANIFEST}" if store.exists(MANIFEST) else PLAN_IS_LOST


def publish_plan(store: Store, plan: Plan) -> Plan:
    """Write the plan, or agree with the one that stands there.

    Returns:
        The plan that counts: the first one written.

    Raises:
        CacheMismatchError: The cache was planned otherwise; names each field, old and new.
    """
    if store.put_if_absent(PLAN, to_json(plan)):
        return plan
    standing = read_plan(store)
    check_same_plan(store, standing, plan)
    return standing


def check_same_plan(store: Store, standing: Plan, asked: Plan) -> None:
    """Refuse to go on with other settings than the cache was begun with."""
    differences = differing_fields(standing.spec, asked.spec)
    if differences:
        lines = "".join(
            f"\n  {name}: the cache has {old!r}, this run asks for {new!r}" for name, old, new in differences
        )
        raise CacheMismatchError(
            f"{store} was begun with other settings:{lines}",
            hint="use the old settings to go on with it, or another --output to begin a new one"
            if committed_shards(store)
            else f"nothing is committed there yet: remove {store} and run again, or use another --output",
        )


def read_commits(store: Store) -> list[Commit]:
    """All commits of a cache, by shard number."""
    return list(each_commit(store))


def each_commit(store: Store) -> Iterator[Commit]:
    """The same, a few hundred held at a time."""
    names = store.names_in(COMMITS)
    for name in names:
        if (shard := parse_misspelt(name)) is not None:
            raise CacheMismatchError(
                f"{store}/{COMMITS}/{name}: a shard's commit stands at {commit_name(shard)}",
                hint=f"kdcache verify {store} --repair",
            )
    shards = sorted(shard for name in names if (shard := parse_number(name)) is not None)
    for first in range(0, len(shards), COMMITS_AT_ONCE):
        some = shards[first : first + COMMITS_AT_ONCE]
        files = store.read_all([commit_name(shard) for shard in some])
        yield from (parse_commit(store, shard, data) for shard, data in zip(some, files, strict=True))


def read_commit(store: Store, shard: int) -> Commit:
    """The commit of one shard."""
    return parse_commit(store, shard, store.read(commit_name(shard)))


def parse_commit(store: Store, shard: int, data: bytes) -> Commit:
    """The commit of one shard, from the bytes of its file.

    Raises:
        CacheError: It is none, is not the one that was written, or commits another shard.
    """
    name = commit_name(shard)
    commit = parse(Commit, data, f"{store}/{name}")
    if commit.shard != shard:
        raise CacheMismatchError(f"{store}/{name} commits shard {commit.shard:05d}")
    return commit


def committed_shards(store: Store) -> set[int]:
    """Numbers of the committed shards, from file names alone."""
    return {shard for name in store.names_in(COMMITS) if (shard := parse_number(name)) is not None}


def load_codec(store: Store, spec: CacheSpec) -> Codec:
    """The codec of a cache, with the tables that its plan names; their digest is checked.

    Raises:
        CacheCorruptError: The tables are not those of the plan.
    """
    if spec.codec.id_tables is None:
        return spec.make_codec()
    return spec.make_codec(read_id_tables(store, spec.codec.id_tables, spec.teacher.vocab_size))


@lru_cache(maxsize=4)
def _parse_id_tables(data: bytes, vocab_size: int, where: str) -> IdTables:
    return IdTables.from_bytes(data, vocab_size, where)


def read_id_tables(store: Store, table_digest: str, vocab_size: int) -> IdTables:
    """Tables by digest.

    Raises:
        CacheCorruptError: They are not there, or are not those.
    """
    name = table_name(table_digest)
    try:
        data = store.read(name, MAX_BYTES)
    except CacheNotFoundError as error:
        raise CacheCorruptError(f"{store}: the plan names id tables, {name} is not there") from error
    if (found := digest(data)) != table_digest:
        raise CacheCorruptError(f"{store}/{name}: these id tables have digest {found}")
    return _parse_id_tables(data, vocab_size, f"{store}/{name}")


def publish_by_digest(store: Store, name: str, data: bytes | memoryview) -> None:
    """See that a file stands under the name that holds its digest, in place of what rotted there or cannot be read."""
    if store.put_if_absent(name, data):
        return
    try:
        store.map(name, len(data), digest(data), original=True)
    except (CacheError, StoreUnavailableError):
        store.replace(name, bytes(data))


def commit_shard(
    store: Store,
    plan: Plan,
    shard: int,
    data: memoryview,
    stats: ShardStats,
    *,
    worker: str,
    seconds: float,
    batch_splits: int = 0,
    head_digest: str | None = None,
) -> bool:
    """Make a finished shard count.

    Returns:
        False when another writer had committed this shard before.
    """
    name = shard_name(shard, digest(data))
    publish_by_digest(store, name, data)
    commit = Commit(
        plan=plan.fingerprint,
        shard=shard,
        digest=digest(data),
        num_bytes=len(data),
        stats=stats,
        head_digest=head_digest,
        worker=worker,
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
        batch_splits=batch_splits,
    )
    won = store.put_if_absent(commit_name(shard), to_json(commit))
    if not won and read_commit(store, shard).digest != commit.digest:
        store.delete(name)
    return won


def current_manifest(store: Store) -> Manifest:
    """The manifest: the sealed file if there is one, else derived from what is committed so far."""
    plan = read_plan(store)
    if store.exists(MANIFEST):
        manifest = parse(Manifest, store.read(MANIFEST), f"{store}/{MANIFEST}")
        if manifest.fingerprint != plan.fingerprint or manifest.spec != plan.spec:
            raise CacheMismatchError(
                f"{store}: plan {plan.fingerprint} and manifest {manifest.fingerprint} belong to two caches"
            )
        return manifest
    return derive_manifest(plan, each_commit(store))


def seal(store: Store) -> Manifest:
    """Once every shard is committed, write the manifest and tidy up; before that, only derive it.

    Any number of workers may seal at once: they write the same bytes.
    """
    manifest = derive_manifest(read_plan(store), each_commit(store))
    if not manifest.sealed:
        return manifest
    named = {shard_name(s, d) for s, d in zip(manifest.shards.shard, manifest.shards.digest, strict=True)}
    for name in store.names_in(SHARDS):
        if parse_shard_name(name) is not None and f"{SHARDS}/{name}" not in named:
            store.delete(f"{SHARDS}/{name}")
    for name in store.names_in(LEASES):
        if parse_number(name) is not None:
            store.delete(f"{LEASES}/{name}")
    store.remove_abandoned()
    if not store.exists(MANIFEST) or store.read(MANIFEST) != to_json(manifest):
        store.replace(MANIFEST, to_json(manifest))
    store.remove_empty(LEASES)
    store.remove_empty(TEMPORARY)
    return manifest
