"""``kdcache verify``."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING

import click

from kdcache.cache.commit import read_plan
from kdcache.cache.layout import COMMITS, MANIFEST, PLAN
from kdcache.cache.reader import CacheReader
from kdcache.cache.store import Store, open_store
from kdcache.cache.verify import Audit, repair, restore_plan, verify_cache
from kdcache.progress import Progress

if TYPE_CHECKING:
    from kdcache.dump.audit import TeacherAudit


@click.command("verify")
@click.argument("cache", type=click.Path())
@click.option("--deep/--shallow", default=True, help="Decode every sequence, or only check digests.  [default: deep]")
@click.option(
    "--repair",
    "mend",
    is_flag=True,
    help="Take back the commits of damaged shards: the next dump makes them anew. A plan that is damaged or gone is written anew from a manifest that is whole.",
)
@click.option(
    "--against-teacher",
    "rerun",
    type=click.IntRange(min=1),
    default=None,
    metavar="N",
    help="Also run the teacher again over N sequences, and say how far the cache is from it.",
)
@click.option("--teacher", default=None, help="Where the teacher is now, if not where it was.")
@click.option("--device", default="auto", help="Of the teacher: auto, cpu, cuda ...  [default: auto]")
@click.option("--trust-remote-code", is_flag=True, help="Run code that ships with the teacher.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    cache: str, deep: bool, mend: bool, rerun: int | None, teacher: str | None, device: str, trust_remote_code: bool, as_json: bool
) -> None:  # fmt: skip
    """Check every byte of a cache against its commits, and that targets and tokens belong together.

    What cannot be read is neither whole nor damaged: it is said, and --repair leaves it alone.

    Exit code 0: whole. 1: damaged, not what the teacher says, or not all could be read. 3: whole so far, but shards are missing (also those that --repair took back).
    """
    store = open_store(cache)
    if mend and restore_plan(store):
        click.echo(f"{PLAN} was damaged or gone, and is written anew from {MANIFEST}", err=True)
    num_shards = read_plan(store).spec.num_shards
    with Progress("verify", num_shards) as progress:
        audit = verify_cache(
            store, deep=deep, on_shard=lambda done: progress.update(done, f"{done}/{num_shards} shards")
        )
    live = None
    if rerun and audit.intact:
        live = _against_teacher(store, rerun, teacher, device, trust_remote_code)
    elif rerun:
        click.echo("not held against the teacher: not all of it is whole", err=True)
    if as_json:
        about = {**dataclasses.asdict(audit), "intact": audit.intact}
        if live is not None:
            about["against_teacher"] = {**dataclasses.asdict(live), "agrees": live.agrees}
        click.echo(json.dumps(about, indent=2))
    else:
        _print(audit, live)
    if live is not None and not live.agrees:
        sys.exit(1)
    if audit.intact:
        sys.exit(3 if audit.missing else 0)
    if audit.problems and not mend:
        click.echo(
            "hint: kdcache verify --repair takes the damaged shards back, and the same dump makes them anew", err=True
        )
    if audit.problems and mend:
        again = repair(store, audit)
        taken = [f"{shard:05d}" for shard in again] + [f"{COMMITS}/{name}" for name in audit.strays]
        click.echo(f"taken back: {', '.join(taken) or 'the manifest'}", err=True)
        click.echo("hint: run the same command again that made the cache; only these shards are made", err=True)
    if audit.unknown:
        click.echo(
            "hint: what could not be read may be whole: mend the cause and verify again. A file that its disk no longer gives is "
            "removed by hand; it then counts as lost, and --repair takes its shard back",
            err=True,
        )
    sys.exit(3 if mend and not audit.unknown else 1)


def _against_teacher(
    store: Store, num_sequences: int, teacher: str | None, device: str, trust_remote_code: bool
) -> TeacherAudit:
    from kdcache.dump.audit import against_teacher

    reader = CacheReader(store, allow_incomplete=True)
    return against_teacher(reader, num_sequences, teacher=teacher, device=device, trust_remote_code=trust_remote_code)


def _print(audit: Audit, live: TeacherAudit | None) -> None:
    click.echo(f"{audit.num_verified} of {audit.num_shards} shards verified, {audit.num_sequences:,} sequences")
    for problem in audit.problems:
        click.echo(f"damaged: {problem}")
    for message in audit.unknown:
        click.echo(f"could not be looked at: {message}")
    if audit.missing:
        click.echo(f"missing: {len(audit.missing)} shards, the first is {audit.missing[0]:05d}")
    if live is None:
        return
    click.echo(
        f"{live.num_sequences} sequences read again by the teacher, {live.num_targets:,} targets; {live.measure}:"
    )
    click.echo(f"  teacher ‖ cache              mean {live.stored:.1e}, largest {live.stored_max:.1e}")
    click.echo(f"  teacher ‖ teacher in a batch mean {live.live:.1e}, largest {live.live_max:.1e}")
    verdict = "the cache says what the teacher says" if live.agrees else "the cache does NOT say what the teacher says"
    click.echo(f"  {verdict} (mean of at most {live.bound:.1e})")
