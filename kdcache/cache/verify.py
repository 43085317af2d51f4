"""Audit a cache: does every byte stand as it was committed, and does what it says hold together?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kdcache.cache.commit import MANIFEST, PLAN, commit_name, current_manifest, read_commits, read_plan
from kdcache.cache.manifest import derive_manifest, to_json
from kdcache.cache.reader import CacheReader
from kdcache.cache.shard import sequence_id
from kdcache.cache.store import LocalStore
from kdcache.errors import CacheCorruptError, CacheError
from kdcache.targets import check_alignment


@dataclass(slots=True)
class Audit:
    """What :func:`verify_cache` found.

    Attributes:
        num_shards: Shards planned.
        num_verified: Shards read and found whole.
        missing: Planned shards that are not committed.
        problems: One line each; empty when all is well.
    """

    num_shards: int
    num_verified: int = 0
    num_sequences: int = 0
    missing: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def intact(self) -> bool:
        """Nothing is damaged (shards may still be missing)."""
        return not self.problems


def verify_cache(store: LocalStore, *, deep: bool = True, on_shard: Callable[[int], None] = lambda _: None) -> Audit:
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
    try:
        commits = read_commits(store)
        derived = derive_manifest(plan, commits)
        if store.exists(MANIFEST) and (current_manifest(store) != derived or store.read(MANIFEST) != to_json(derived)):
            audit.problems.append(f"{MANIFEST} does not follow from the commits; remove it and run the dump again")
        records = [(PLAN, plan), *((commit_name(commit.shard), commit) for commit in commits)]
        audit.problems += [
            f"{name}: not the bytes that were written" for name, r in records if store.read(name) != to_json(r)
        ]
        store_view = CacheReader(store, allow_incomplete=True)
        store_view.manifest = derived
    except CacheError as error:
        audit.problems.append(str(error.message))
        return audit
    committed = set(derived.shards.shard)
    audit.missing = [shard for shard in range(plan.spec.num_shards) if shard not in committed]
    if derived.head_digest is not None:
        try:
            store_view.head_bytes()
        except CacheError as error:
            audit.problems.append(error.message)
    for position, number in enumerate(derived.shards.shard):
        try:
            audit.num_sequences += _verify_shard(store_view, position, deep)
            audit.num_verified += 1
        except CacheError as error:
            message = error.message if error.message.startswith("shard") else f"shard {number:05d}: {error.message}"
            audit.problems.append(message)
        on_shard(position + 1)
    return audit


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
        targets = shard.targets(row, int(sequence.target_mask.sum())).expand(reader.temperatures)
        check_alignment(sequence, targets, where, 2 * reader.codec.logprob_error_bound(targets.label_logprobs))
    return len(shard)
