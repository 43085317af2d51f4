"""``kdcache status``."""

from __future__ import annotations

import dataclasses
import json

import click

from kdcache.cache.status import Status, cache_status
from kdcache.cache.store import open_store
from kdcache.progress import format_seconds


@click.command("status")
@click.argument("cache", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(cache: str, as_json: bool) -> None:
    """How far a dump is: committed, in flight, holes, rate, time left. Reads the cache only, from wherever its folder is mounted or its URL is known."""
    status = cache_status(open_store(cache))
    click.echo(json.dumps(dataclasses.asdict(status), indent=2) if as_json else as_lines(status))


def as_lines(status: Status) -> str:
    """For a reader."""
    lines = [
        f"committed  {status.num_committed} of {status.num_shards} shards, {status.num_positions:,} tokens, "
        f"{status.num_bytes:,} bytes"
    ]
    lines += [f"in flight  shard {one.shard:05d}, {one.host}, process {one.pid}" for one in status.in_flight]
    if status.stale:
        lines.append(f"stale      {len(status.stale)} leases of workers that are gone (kdcache gc, or the next run)")
    if status.holes:
        runs = [f"{first:05d}" if first == last else f"{first:05d}-{last:05d}" for first, last in status.holes]
        lines.append(f"open       {', '.join(runs[:8])}{' ...' if len(runs) > 8 else ''}")
    if status.tokens_per_second is not None:
        lines.append(f"rate       {status.tokens_per_second:,.0f} tokens/s over the last commits")
    if status.seconds_left:
        left = format_seconds(status.seconds_left)
        lines.append(
            f"left       {left} at that rate" if status.in_flight else f"left       {left}, but nobody is at work"
        )
    if status.num_committed == status.num_shards:
        lines.append("complete")
    return "\n".join(lines)
