"""``kdcache dump-teacher``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from kdcache.cache.manifest import Manifest
from kdcache.cli.flags import flags_of, given
from kdcache.config import resolve_options
from kdcache.dump.options import DumpOptions
from kdcache.progress import launched_rank

if TYPE_CHECKING:
    from kdcache.dump.launch import DumpResult


@click.command("dump-teacher")
@flags_of(DumpOptions)
def command(config: str | None, **flags: Any) -> None:
    """Phase 1: run the teacher over a dataset and keep what it says.

    Run the same command again after a crash, on any number of workers: it goes on, and ends in the same bytes. Works as it is
    under torchrun and srun.
    """
    from kdcache.dump.launch import dump

    options = resolve_options(DumpOptions, "dump-teacher", given(flags), config)
    result = dump(options)
    if launched_rank()[0] == 0:
        report(options.output, result)
    if result.stopped and not result.manifest.sealed:
        sys.exit(128 + result.stopped)


def report(output: str, result: DumpResult) -> None:
    """What the dump came to, and what became of the rows."""
    manifest, stats = result.manifest, result.manifest.stats
    done, planned = len(manifest.shards.shard), manifest.spec.num_shards
    if result.already_done:
        click.echo(f"all done: {output} is complete ({planned} shards), made with these very options")
        return
    if not manifest.sealed:
        click.echo(f"{done} of {planned} shards are committed; run the same command again to go on", err=True)
        return
    for number, what in (
        (
            stats.num_rows_skipped,
            "prompts were empty, or left no room for an answer"
            if manifest.spec.generation
            else "rows had nothing to learn and were skipped",
        ),
        (stats.num_rows_truncated, "chats or completions were longer than a sequence and were truncated"),
        (stats.num_rows_split, "texts were longer than a sequence and go on in the next"),
    ):
        if number:
            click.echo(f"{number:,} of {stats.num_rows:,} {what}", err=True)
    report_size(output, manifest)


def report_size(output: str, manifest: Manifest) -> None:
    """What a finished cache holds."""
    stats = manifest.stats
    tail = stats.sum_tail_mass / max(stats.num_targets, 1)
    kept = "" if manifest.spec.targets.scheme == "hidden" else f", {1 - tail:.1%} of the mass kept"
    click.echo(
        f"{output}: {stats.num_positions:,} tokens in {manifest.spec.num_shards} shards, {manifest.num_bytes:,} bytes "
        f"({manifest.num_bytes / max(stats.num_positions, 1):.1f} a token){kept}"
    )
