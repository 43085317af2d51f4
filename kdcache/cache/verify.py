"""Audit a cache: does every byte stand as it was committed, and does what it says hold together?

Damage is what was read and is wrong, or a file that the store says is not there. What cannot be read (no right, a disk or a
server that fails, no memory, no room for a copy) is told apart: nothing is known about it, and :func:`repair` leaves it alone.
Where a store does not answer at all, the audit ends with its error.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kdcache.cache.commit import (
    PLAN_IS_LOST,
    committed_shards,
    current_manifest,
    parse_commit,
    read_commit,
    read_id_tables,
    read_plan,
)
from kdcache.cache.layout import (
    COMMITS,
    MANIFEST,
    PLAN,
    commit_name,
    parse_misspelt,
    parse_number,
    shard_name,
)
from kdcache.cache.manifest import Commit, Manifest, Plan, derive_manifest, parse, to_json
from kdcache.cache.reader import CacheReader
from kdcache.cache.shard import ShardReader, sequence_id
from kdcache.cache.store import Store
from kdcache.errors import CacheCorruptError, CacheError, CacheMismatchError, KDCacheError, StoreUnavailableError
from kdcache.targets import check_alignment

# Sequences of a damaged shard that a message names.
MOST_NAMED = 10


@dataclass(slots=True)
class Audit:
    """What :func:`verify_cache` found.

    Attributes:
        num_shards: Shards planned.
        num_verified: Shards read and found whole.
        missing: Planned shards that are not committed.
        damaged: Committed shards whose file or commit is not whole.
        unread: Committed shards whose file or commit could not be read.
        strays: File names in ``commits/`` of no shard of the plan, or of another spelling.
        damaged_head: Digest of the output head of a ``hidden`` cache that is not what was committed, or None.
        damaged_tables: Digest of the id tables that are not those of the plan, or None.
        problems: One line for each damage.
        unknown: One line for each thing that could not be read.
    """

    num_shards: int
    num_verified: int = 0
    num_sequences: int = 0
    missing: list[int] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    unread: list[int] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    damaged_head: str | None = None
    damaged_tables: str | None = None
    problems: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def intact(self) -> bool:
        """All that is committed was read, and nothing is damaged (shards may still be missing)."""
        return not self.problems and not self.unknown


def verify_cache(store: Store, *, deep: bool = True, on_shard: Callable[[int], None] = lambda _: None) -> Audit:
    """Check manifest against commits, every shard's digest and structure, and, when ``deep``, decode every sequence.

    What is read is what lies in the store; no local copy of a remote shard is believed, or made.

    Args:
        store: Where the cache is.
        deep: Decode all targets and hold each label's logprob against its entry.
        on_shard: Called with the number of shards done.

    Raises:
        CacheNotFoundError: There is no cache here.
        StoreUnavailableError: The store does not answer.
    """
    plan = read_plan(store)
    audit = Audit(num_shards=plan.spec.num_shards)
    commits = _look_at_commits(store, plan, audit)
    known = set(audit.damaged + audit.unread).union(commit.shard for commit in commits)
    audit.missing = [shard for shard in range(plan.spec.num_shards) if shard not in known]
    if not _tables_are_whole(store, plan, audit):
        for position, commit in enumerate(commits):  # what a repair has to know, even so
            with _noting(store, plan, audit, commit.shard):
                store.map(shard_name(commit.shard, commit.digest), commit.num_bytes, commit.digest, original=True)
            on_shard(position + 1)
        return audit
    try:
        derived = _derive(plan, commits, audit)
        reader = CacheReader(store, allow_incomplete=True, manifest=derived)
    except CacheError as error:
        audit.problems.append(error.message)
        return audit
    _check_records(store, plan, derived, audit)
    if derived.head_digest is not None:
        with _noting(store, plan, audit):
            try:
                reader.head_bytes()
            except CacheError:
                audit.damaged_head = derived.head_digest
                raise
    for position, number in enumerate(derived.shards.shard):
        with _noting(store, plan, audit, number):
            audit.num_sequences += _verify_shard(reader, position, deep)
            audit.num_verified += 1
        on_shard(position + 1)
    return audit


@contextlib.contextmanager
def _noting(store: Store, plan: Plan, audit: Audit, shard: int | None = None) -> Iterator[None]:
    """Note what is wrong with something, or that it could not be read; ``shard`` is whose it is."""
    try:
        yield
    except (StoreUnavailableError, MemoryError) as error:
        read_plan(store)  # a store that does not answer at all ends the audit here
        audit.unknown.append(_message(error, plan, shard))
        if shard is not None:
            audit.unread.append(shard)
    except CacheError as error:
        audit.problems.append(_message(error, plan, shard))
        if shard is not None:
            audit.damaged.append(shard)


def _message(error: KDCacheError | MemoryError, plan: Plan, shard: int | None) -> str:
    """What is wrong, with the shard and the rows of the corpus that it holds; or with the sequence, where that is known."""
    text = "not enough memory to look at it" if isinstance(error, MemoryError) else error.message
    if shard is None:
        return text
    name, rows = f"shard {shard:05d}", plan.spec.rows(shard)
    if text.startswith(f"{name}, "):
        return text
    return f"{name} (rows {rows.start} to {rows.stop - 1}): {text.removeprefix(f'{name}: ')}"


def _look_at_commits(store: Store, plan: Plan, audit: Audit) -> list[Commit]:
    """The commits of this plan that can be read; what else stands among them is damage."""
    shards = []
    for name in store.names_in(COMMITS):
        shard = parse_number(name)
        if shard is not None and shard < plan.spec.num_shards:
            shards.append(shard)
        elif shard is not None or parse_misspelt(name) is not None:
            audit.problems.append(
                f"{COMMITS}/{name} is the commit of no shard of this plan ({plan.spec.num_shards} shards)"
            )
            audit.strays.append(name)
    shards.sort()
    try:
        files = store.read_all([commit_name(shard) for shard in shards])
    except KDCacheError:  # of one of them
        files = []
    commits = []
    for position, shard in enumerate(shards):
        name = commit_name(shard)
        with _noting(store, plan, audit, shard):
            data = files[position] if files else store.read(name)
            commit = parse_commit(store, shard, data)
            if commit.plan != plan.fingerprint:
                raise CacheMismatchError(f"{name} belongs to plan {commit.plan}, this cache has {plan.fingerprint}")
            commits.append(commit)
            if data != to_json(commit):
                raise CacheCorruptError(f"{name}: not the bytes that were written")
    return commits


def _tables_are_whole(store: Store, plan: Plan, audit: Audit) -> bool:
    """Without its id tables nothing in a cache can be decoded."""
    digest = plan.spec.codec.id_tables
    if digest is None:
        return True
    whole = False
    with _noting(store, plan, audit):
        try:
            read_id_tables(store, digest, plan.spec.teacher.vocab_size)
            whole = True
        except CacheError:
            audit.damaged_tables = digest
            raise
    return whole


def _derive(plan: Plan, commits: list[Commit], audit: Audit) -> Manifest:
    """The manifest of those commits that go together; the others are damage."""
    commits = _of_one_head(plan, commits, audit)
    while True:
        try:
            return derive_manifest(plan, commits)
        except CacheMismatchError as error:  # their sums are more than a cache can have
            most = max(
                commits, key=lambda commit: max(map(abs, [commit.num_bytes, *commit.stats.model_dump().values()]))
            )
            audit.problems.append(_message(error, plan, most.shard))
            audit.damaged.append(most.shard)
            commits = [commit for commit in commits if commit is not most]


def _of_one_head(plan: Plan, commits: list[Commit], audit: Audit) -> list[Commit]:
    """Those that name the output head which most name; a ``hidden`` cache has one, others have none."""
    heads = Counter(commit.head_digest for commit in commits)
    if len(heads) < 2:
        return commits
    wanted = plan.spec.targets.scheme == "hidden"
    kept = max(sorted(heads, key=str), key=lambda head: ((head is not None) == wanted, heads[head]))
    for commit in commits:
        if commit.head_digest != kept:
            audit.problems.append(
                f"{commit_name(commit.shard)} names the output head {commit.head_digest}, the others {kept}"
            )
            audit.damaged.append(commit.shard)
    return [commit for commit in commits if commit.head_digest == kept]


def _check_records(store: Store, plan: Plan, derived: Manifest, audit: Audit) -> None:
    """The plan is the very bytes that were written, and the manifest is what follows from the commits."""
    with _noting(store, plan, audit):
        if store.exists(MANIFEST):
            follows = current_manifest(store) == derived and store.read(MANIFEST) == to_json(derived)
            if not follows and not audit.unread:  # what follows from a commit that was not read is not known
                audit.problems.append(f"{MANIFEST} does not follow from the commits; remove it and run the dump again")
    with _noting(store, plan, audit):
        if store.read(PLAN) != to_json(plan):
            audit.problems.append(f"{PLAN}: not the bytes that were written")


def repair(store: Store, audit: Audit) -> list[int]:
    """Take back the commits of damaged shards, so that the next run of the dump makes them anew, and what is no commit of the plan.

    Nothing else is touched: a damaged file, of a shard, a head or id tables, stays until its successor replaces it, and of what could
    not be read nothing is taken back.

    Returns:
        The shards to be made again.
    """
    again = sorted(set(audit.damaged) - set(audit.unread))
    if audit.damaged_head is not None:
        # The head is written by a worker that has a shard to make.
        planned = {shard for shard in committed_shards(store) if shard < audit.num_shards}
        again = again or sorted(planned - set(audit.unread))[:1]
    if audit.problems:
        store.delete(MANIFEST)
    for name in audit.strays:
        store.delete(f"{COMMITS}/{name}")
    for shard in again:
        store.delete(commit_name(shard))
    return again


def restore_plan(store: Store) -> bool:
    """Write the plan of a finished cache anew from its manifest, which holds the same spec, where the plan is damaged or gone.

    Library versions, which do not count, are not in the manifest and stay behind.

    Returns:
        Whether the plan had to be written.

    Raises:
        CacheError: The plan is damaged or gone, and the manifest is too, or is that of another cache.
    """
    try:
        read_plan(store)
        return False
    except CacheError:
        if not store.exists(MANIFEST):
            raise
    manifest = parse(Manifest, store.read(MANIFEST), f"{store}/{MANIFEST}")
    commit = _first_whole_commit(store)
    if manifest.spec.fingerprint != manifest.fingerprint or commit is None or commit.plan != manifest.fingerprint:
        raise CacheMismatchError(
            f"{store}: {PLAN} is damaged or gone, and {MANIFEST} is not that of these commits",
            hint=PLAN_IS_LOST,
        )
    store.replace(PLAN, to_json(Plan(spec=manifest.spec, fingerprint=manifest.fingerprint)))
    return True


def _first_whole_commit(store: Store) -> Commit | None:
    for shard in sorted(committed_shards(store)):
        with contextlib.suppress(CacheError):
            return read_commit(store, shard)
    return None


def _verify_shard(reader: CacheReader, position: int, deep: bool) -> int:
    try:
        shard = reader.open_shard(position, original=True)
    except CacheCorruptError as error:
        raise CacheCorruptError(error.message + _where_in_shard(reader, position), hint=error.hint) from error
    expected = reader.manifest.shards.num_sequences[position]
    if len(shard) != expected:
        raise CacheCorruptError(f"{shard.where}: {expected} sequences were committed, found {len(shard)}")
    for row in range(len(shard) if deep else 0):
        _verify_sequence(reader, shard, position, row)
    return len(shard)


def _where_in_shard(reader: CacheReader, position: int) -> str:
    """Which sequences are those that do not read, where the file itself can still be read; no more is known of a shard's bytes than its digest."""
    try:
        shard = reader.open_shard(position, check_digest=False, original=True)
        damaged = [row for row in range(len(shard)) if not _reads(reader, shard, position, row)]
    except (KDCacheError, MemoryError):  # that it is damaged is known, whatever else fails now
        return ""
    if not damaged:
        return (
            f"; each of its {len(shard)} sequences reads, the damage lies between them or changes nothing that is read"
        )
    named = ", ".join(map(str, damaged[:MOST_NAMED])) + (", ..." if len(damaged) > MOST_NAMED else "")
    return f"; damaged are sequences {named} of its {len(shard)}"


def _reads(reader: CacheReader, shard: ShardReader, position: int, row: int) -> bool:
    try:
        _verify_sequence(reader, shard, position, row)
    except CacheError:
        return False
    return True


def _verify_sequence(reader: CacheReader, shard: ShardReader, position: int, row: int) -> None:
    where = f"{shard.where}, sequence {row}"
    if shard.sequence_id(row) != sequence_id(reader.manifest.shards.shard[position], row):
        raise CacheCorruptError(f"{where}: found the sequence id {shard.sequence_id(row)}")
    sequence = shard.sequence(row)
    targets = shard.targets(row, sequence).expand(reader.temperatures)
    check_alignment(sequence, targets, where, 2 * reader.codec.logprob_error_bound(targets.label_logprobs))
