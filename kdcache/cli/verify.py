"""``kdcache verify``."""

from __future__ import annotations

import dataclasses
import json
import sys

import click

from kdcache.cache.store import LocalStore
from kdcache.cache.verify import verify_cache


@click.command("verify")
@click.argument("cache", type=click.Path())
@click.option("--deep/--shallow", default=True, help="Decode every sequence, or only check digests.  [default: deep]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(cache: str, deep: bool, as_json: bool) -> None:
    """Check every byte of a cache against its commits, and that targets and tokens belong together.

    Exit code 0: whole. 1: damaged. 3: whole so far, but shards are missing.
    """
    audit = verify_cache(LocalStore(cache), deep=deep)
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(audit), "intact": audit.intact}, indent=2))
    else:
        click.echo(f"{audit.num_verified} of {audit.num_shards} shards verified, {audit.num_sequences:,} sequences")
        for problem in audit.problems:
            click.echo(f"damaged: {problem}")
        if audit.missing:
            click.echo(f"missing: {len(audit.missing)} shards, the first is {audit.missing[0]:05d}")
    if not audit.intact:
        click.echo(f"hint: remove the commits of damaged shards from {cache}/commits and run the dump again", err=True)
        sys.exit(1)
    sys.exit(3 if audit.missing else 0)
