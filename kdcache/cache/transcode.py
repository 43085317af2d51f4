"""One cache made from another: fewer entries (top_k, top_p), fewer temperatures, another codec or quality, another store. Never the teacher.

A shard of the new cache is a function of the same shard of the old one, so everything that a dump promises holds here: it is
planned first, committed shard by shard, taken up again where it was stopped, and several processes may work at it. The plan
names the old cache by its fingerprint (``transcoded_from``): targets that went through a lossy codec are told apart from
those that came from the teacher. Where nothing is to change, the cache is copied byte for byte, perhaps to another store.

**Refused**: what the old cache cannot give. More entries, undeclared temperatures, a finer quality than it has, other draws.
"""

from __future__ import annotations

import os
import time
from typing import Annotated, Literal

from pydantic import Field

from kdcache.cache.commit import (
    check_is_ours,
    check_writers,
    commit_shard,
    committed_shards,
    load_codec,
    publish_by_digest,
    publish_plan,
    read_commit,
    read_plan,
    seal,
    write_run,
)
from kdcache.cache.layout import commit_name, shard_name, table_name
from kdcache.cache.lease import Lease
from kdcache.cache.manifest import CacheSpec, Manifest, Plan, to_json
from kdcache.cache.parameters import CodecName
from kdcache.cache.quality import describe_codec, error_of_levels
from kdcache.cache.reader import CacheReader
from kdcache.cache.shard import ShardBuilder
from kdcache.cache.store import Store, hostname, open_store
from kdcache.cache.sums import SHARD_FACTOR, ShardSums, warn_about_error
from kdcache.cache.work import Remaining
from kdcache.config import Options, Temperatures
from kdcache.errors import CacheCorruptError, CacheNotFoundError, ConfigError, StoreError
from kdcache.progress import Progress
from kdcache.specs import DRAWN, MOST_MAX_KL, CodecSpec, TargetSpec
from kdcache.targets import (
    SparseTargets,
    check_alignment,
    keep_most_probable,
    keep_temperatures,
    keep_top_p,
    temperature_index,
)

POLL_SECONDS = 0.5


class TranscodeOptions(Options):
    """What the new cache holds; what is not said stays as it is."""

    cache: Annotated[str, Field(description="The cache to take targets from.")]
    output: Annotated[str, Field(description="The new cache.")]
    top_k: Annotated[Annotated[int, Field(ge=1)] | None, Field(description="Keep so many of the entries.")] = None
    top_p: Annotated[
        Annotated[float, Field(gt=0, le=1)] | None,
        Field(description="Keep the fewest entries of a position that have this mass: top_k becomes top_p."),
    ] = None
    temperatures: Annotated[
        Temperatures | None, Field(description="Keep these of the declared temperatures, 1 among them.")
    ] = None
    entry_logprobs: Annotated[
        bool | None,
        Field(description="Of sampled and systematic at T = 1: keep the logprob of each entry, or only the counts."),
    ] = None
    codec: Annotated[Literal["packed", "exact"] | None, Field(description="packed or exact.")] = None
    quality: Annotated[
        Literal["high", "standard", "small"] | None, Field(description="Of packed; adds its error to what was lost.")
    ] = None


def transcode(options: TranscodeOptions) -> Manifest:
    """Make the new cache, or go on with it.

    Raises:
        ConfigError: The old cache cannot give what is asked for.
        CacheError: It is incomplete or damaged, or the output was begun otherwise.
    """
    source = CacheReader(open_store(options.cache))
    store = open_store(options.output)
    if store.location == source.store.location:
        raise ConfigError(f"--output {store} is the cache itself", hint="name another folder")
    check_is_ours(store)
    check_writers(store, 1)
    asked = options.model_dump(exclude_none=True, exclude={"cache", "output"})
    planned = plan_of(source, options) if asked else read_plan(source.store)
    if (tables := planned.spec.codec.id_tables) is not None:
        publish_by_digest(store, table_name(tables), source.store.read(table_name(tables)))
    if (head := source.manifest.head_digest) is not None:
        publish_by_digest(store, table_name(head), source.head_bytes())
    plan = publish_plan(store, planned)
    write_run(store, "transcode", options, "cpu")
    done, total = len(committed_shards(store)), plan.spec.num_shards
    with Progress("transcode", total, done) as progress:
        remaining = Remaining(store, total)
        while remaining:
            progress.update(total - len(remaining) - done, f"{total - len(remaining)}/{total} shards")
            lease = remaining.claim()
            if lease is None:
                time.sleep(POLL_SECONDS)
                continue
            with lease:
                (_transcode_shard if asked else _copy_shard)(source, store, plan, lease)
    manifest = seal(store)
    warn_about_error(
        manifest.stats,
        _max_kl_of_change(source.spec.codec, plan.spec.codec) if asked else plan.spec.codec.max_kl,
        str(store),
    )
    return manifest


def plan_of(source: CacheReader, options: TranscodeOptions) -> Plan:
    """The plan of the new cache.

    Raises:
        ConfigError: The old cache cannot give it.
    """
    old = source.spec
    if old.targets.scheme == "hidden":
        raise ConfigError(
            f"{source.store} holds hidden states, which are stored as they are",
            hint="without options it is copied, also to another store; it is read at any temperature as it stands",
        )
    targets = _fewer(old.targets, options)
    codec = _codec(old, targets, options)
    spec = old.model_copy(update={"targets": targets, "codec": codec, "transcoded_from": source.manifest.fingerprint})
    return Plan(spec=spec, fingerprint=spec.fingerprint, environment=read_plan(source.store).environment)


def _fewer(old: TargetSpec, options: TranscodeOptions) -> TargetSpec:
    changes: dict[str, object] = {}
    cuts = {"--top-k": (options.top_k, old.k), "--top-p": (options.top_p, old.top_p)}
    for flag, (asked, before) in cuts.items():
        if old.scheme in DRAWN and asked not in (None, before):
            raise ConfigError(
                f"{flag} {asked:g}: entries of a {old.scheme} cache were drawn, and leaving some out biases the rest",
                hint="dump again with fewer draws",
            )
    if options.top_p is not None and options.top_p != old.top_p:
        if options.top_p > old.top_p:
            raise ConfigError(
                f"--top-p {options.top_p:g}: the cache keeps a mass of {old.top_p:g}", hint="dump again to keep more"
            )
        changes |= {"scheme": "top_p", "top_p": options.top_p}
    if options.top_k is not None and options.top_k != old.k:
        if options.top_k > old.k:
            raise ConfigError(
                f"--top-k {options.top_k}: the cache keeps {old.k} entries", hint="dump again to keep more"
            )
        changes["k"] = options.top_k
    if options.temperatures is not None:
        for temperature in options.temperatures:
            temperature_index(old.temperatures, temperature)
        changes["temperatures"] = options.temperatures
    new = TargetSpec.model_validate(old.model_dump() | changes)
    if options.entry_logprobs is None or options.entry_logprobs is not new.frequencies:
        return new
    if options.entry_logprobs:
        raise ConfigError("--entry-logprobs: the cache keeps the counts alone", hint="dump again with --entry-logprobs")
    if not new.can_be_frequencies:
        raise ConfigError(
            f"--no-entry-logprobs: {new.scheme} targets at T = {', '.join(f'{t:g}' for t in new.temperatures)} cannot do without",
            hint="sampled and systematic can, at T = 1 alone (--temperatures 1)",
        )
    return new.model_copy(update={"frequencies": True})


def _codec(before: CacheSpec, targets: TargetSpec, options: TranscodeOptions) -> CodecSpec:
    old = before.codec
    name: CodecName = options.codec or old.name
    if name == "exact" == old.name:
        return old
    new, own = old, error_of_levels(old) if before.transcoded_from else old.max_kl
    adds = own
    if name != old.name or options.quality is not None:
        described = describe_codec(name, options.quality or "standard", targets.max_entries)
        new = described.model_copy(update={"id_tables": old.id_tables if name == "packed" else None})
        adds = new.max_kl
    if old.name == "packed" and (name == "exact" or adds < own):
        raise ConfigError(
            f"the cache is packed with an error of up to {old.max_kl:g} nats: {name} of a finer quality cannot bring back what "
            "was lost",
            hint="dump again, with --quality high or --codec exact",
        )
    if old.name == "packed" and not targets.frequencies:
        # Errors of logprobs add up as vectors do, and KL is the square of their length.
        together = (old.max_kl**0.5 + adds**0.5) ** 2
        if together > MOST_MAX_KL:
            raise ConfigError(
                f"the cache declares an error of {old.max_kl:.2g} nats, and packed once more it would be {together:.2g}, of at most {MOST_MAX_KL:g}",
                hint="transcode the cache that was dumped, in one step",
            )
        new = new.model_copy(update={"max_kl": together})
    return new


def _max_kl_of_change(old: CodecSpec, new: CodecSpec) -> float:
    """What the change itself may cost, of what the new cache declares."""
    before = old.max_kl if old.name == "packed" and new.max_kl > old.max_kl else 0.0
    return float((new.max_kl**0.5 - before**0.5) ** 2)


def _transcode_shard(source: CacheReader, store: Store, plan: Plan, lease: Lease) -> None:
    started, shard = time.monotonic(), lease.shard
    old, codec = source.open_shard(shard), load_codec(store, plan.spec)
    builder, sums = ShardBuilder(codec, plan.fingerprint, shard), ShardSums()
    for row in range(len(old)):
        lease.renew()
        sequence = old.sequence(row)
        said = old.targets(row, sequence).expand(source.temperatures)
        where = f"{source.store}, shard {shard:05d}, sequence {row}"
        check_alignment(sequence, said, where, 2 * source.codec.logprob_error_bound(said.label_logprobs))
        targets = change(said, source.spec.targets, plan.spec.targets)
        frames = codec.encode(targets, sequence.contexts)
        builder.add_frames(sequence, frames)
        sums.add(row, sequence, targets)
        sums.add_error(row, sequence, targets, codec, frames)
    before = read_commit(source.store, shard).stats
    total = sums.total(
        num_rows=before.num_rows, num_skipped=before.num_rows_skipped, num_truncated=before.num_rows_truncated,
        num_split=before.num_rows_split,
        **{name: number for name, number in before.model_dump().items() if name.startswith("num_answers_")},
    )  # fmt: skip
    max_kl = _max_kl_of_change(source.spec.codec, plan.spec.codec)
    warn_about_error(total, max_kl, f"shard {shard:05d}", factor=SHARD_FACTOR)
    commit_shard(
        store, plan, shard, memoryview(builder.finish()), total,
        worker=f"{hostname()}:{os.getpid()}", seconds=time.monotonic() - started,
    )  # fmt: skip


def _copy_shard(source: CacheReader, store: Store, plan: Plan, lease: Lease) -> None:
    """The very bytes, once their digest holds, and the very commit."""
    commit = read_commit(source.store, lease.shard)
    name = shard_name(lease.shard, commit.digest)
    try:
        data = source.store.map(name, commit.num_bytes, commit.digest, original=True)
    except (CacheNotFoundError, CacheCorruptError, StoreError) as error:
        raise CacheCorruptError(
            f"{source.store}, shard {lease.shard:05d}: {error.message}", hint=f"kdcache verify {source.store} --repair"
        ) from error
    publish_by_digest(store, name, memoryview(data))
    store.put_if_absent(commit_name(lease.shard), to_json(commit))


def change(targets: SparseTargets, old: TargetSpec, new: TargetSpec) -> SparseTargets:
    """Targets of one sequence, cut down from what one spec says to what another says."""
    if targets.temperatures != new.temperatures:
        targets = keep_temperatures(targets, new.temperatures)
    if targets.counts is None and int(targets.num_entries.max(initial=0)) > new.k:
        targets = keep_most_probable(targets, new.k)
    return targets if new.top_p == old.top_p else keep_top_p(targets, new.top_p)
