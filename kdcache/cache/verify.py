"""Audit a cache: does every byte stand as it was committed, and does what it says hold together?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kdcache.cache.commit import (
    committed_shards,
    current_manifest,
    read_commit,
    read_commits,
    read_id_tables,
    read_plan,
)
from kdcache.cache.layout import MANIFEST, PLAN, commit_name, table_name
from kdcache.cache.manifest import Commit, Manifest, Plan, derive_manifest, to_json
from kdcache.cache.reader import CacheReader
from kdcache.cache.shard import sequence_id
from kdcache.cache.store import Store
from kdcache.errors import CacheCorruptError, CacheError
from kdcache.targets import check_alignment


@dataclass(slots=True)
class Audit:
    """What :func:`verify_cache` found.

    Attributes:
        num_shards: Shards planned.
        num_verified: Shards read and found whole.
        missing: Planned shards that are not committed.
        damaged: Committed shards whose file or commit is not whole.
        damaged_head: Digest of the output head of a ``hidden`` cache that is not what was committed, or None.
        damaged_tables: Digest of the id tables that are not those of the plan, or None.
        problems: One line each; empty when all is well.
    """

    num_shards: int
    num_verified: int = 0
    num_sequences: int = 0
    missing: list[int] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    damaged_head: str | None = None
    damaged_tables: str | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def intact(self) -> bool:
        """Nothing is damaged (shards may still be missing)."""
        return not self.problems


def verify_cache(store: Store, *, deep: bool = True, on_shard: Callable[[int], None] = lambda _: None) -> Audit:
    """Check manifest against commits, every shard's digest and structure, and, when ``deep``, decode every sequence.

    Args:
        store: Where the cache is.
        deep: Decode all targets and hold each label's logprob against its entry.
        on_shard: Called with the number of shards done.

    Raises:
        CacheNotFoundError: There is no cache here.
    """
    plan = read_plan(store)
    audit = Audit(num_shards=plan.spec.num_shards)
    commits = _readable_commits(store, audit)
    if not _tables_are_whole(store, plan, audit):
        return audit
    try:
        derived = derive_manifest(plan, commits)
        reader = CacheReader(store, allow_incomplete=True, manifest=derived)
    except CacheError as error:
        audit.problems.append(error.message)
        return audit
    _check_records(store, plan, commits, derived, audit)
    committed = set(derived.shards.shard)
    audit.missing = [s for s in range(plan.spec.num_shards) if s not in committed and s not in audit.damaged]
    if derived.head_digest is not None:
        try:
            reader.head_bytes()
        except CacheError as error:
            audit.problems.append(error.message)
            audit.damaged_head = derived.head_digest
    for position, number in enumerate(derived.shards.shard):
        try:
            audit.num_sequences += _verify_shard(reader, position, deep)
            audit.num_verified += 1
        except CacheError as error:
            message = error.message if error.message.startswith("shard") else f"shard {number:05d}: {error.message}"
            audit.problems.append(message)
            audit.damaged.append(number)
        on_shard(position + 1)
    return audit


def _tables_are_whole(store: Store, plan: Plan, audit: Audit) -> bool:
    """Without its id tables no shard of a cache can be read."""
    digest = plan.spec.codec.id_tables
    if digest is None:
        return True
    try:
        read_id_tables(store, digest, plan.spec.teacher.vocab_size)
    except CacheError as error:
        audit.problems.append(error.message)
        audit.damaged_tables = digest
        return False
    return True


def _check_records(store: Store, plan: Plan, commits: list[Commit], derived: Manifest, audit: Audit) -> None:
    """Plan and commits are the very bytes that were written, and the manifest is what follows from them."""
    if store.exists(MANIFEST):
        try:
            if current_manifest(store) != derived or store.read(MANIFEST) != to_json(derived):
                audit.problems.append(f"{MANIFEST} does not follow from the commits; remove it and run the dump again")
        except CacheError as error:
            audit.problems.append(error.message)
    if store.read(PLAN) != to_json(plan):
        audit.problems.append(f"{PLAN}: not the bytes that were written")
    for commit in commits:
        if store.read(commit_name(commit.shard)) != to_json(commit):
            audit.problems.append(f"{commit_name(commit.shard)}: not the bytes that were written")
            audit.damaged.append(commit.shard)


def _readable_commits(store: Store, audit: Audit) -> list[Commit]:
    """The commits that can be read; the others are damage."""
    try:
        return read_commits(store)
    except CacheError:
        commits = []
        for shard in sorted(committed_shards(store)):
            try:
                commits.append(read_commit(store, shard))
            except CacheError as error:
                audit.problems.append(error.message)
                audit.damaged.append(shard)
        return commits


def repair(store: Store, audit: Audit) -> list[int]:
    """Take back the commits of damaged shards, so that the next run of the dump makes them anew; nothing else is touched.

    A damaged file stays until its successor replaces it.

    Returns:
        The shards to be made again.
    """
    again = sorted(set(audit.damaged))
    if audit.damaged_tables is not None:
        store.delete(table_name(audit.damaged_tables))
    if audit.damaged_head is not None:
        store.delete(table_name(audit.damaged_head))
        # The head is written by a worker that has a shard to make.
        again = again or [min(committed_shards(store))]
    if not audit.intact:
        store.delete(MANIFEST)
    for shard in again:
        store.delete(commit_name(shard))
    return again


def _verify_shard(reader: CacheReader, position: int, deep: bool) -> int:
    shard = reader.open_shard(position)
    expected = reader.manifest.shards.num_sequences[position]
    if len(shard) != expected:
        raise CacheCorruptError(f"{shard.where}: {expected} sequences were committed, found {len(shard)}")
    for row in range(len(shard) if deep else 0):
        where = f"{shard.where}, sequence {row}"
        if shard.sequence_id(row) != sequence_id(reader.manifest.shards.shard[position], row):
            raise CacheCorruptError(f"{where}: found the sequence id {shard.sequence_id(row)}")
        sequence = shard.sequence(row)
        targets = shard.targets(row, sequence).expand(reader.temperatures)
        check_alignment(sequence, targets, where, 2 * reader.codec.logprob_error_bound(targets.label_logprobs))
    return len(shard)
