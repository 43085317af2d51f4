"""``kdcache gc``."""

from __future__ import annotations

import click

from kdcache.cache.garbage import collect_garbage, find_garbage
from kdcache.cache.store import open_store


@click.command("gc")
@click.argument("cache", type=click.Path())
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
def command(cache: str, dry_run: bool) -> None:
    """Delete what writers that died or came second left behind. Safe while a dump runs; what is committed is never touched."""
    store = open_store(cache)
    garbage, num_temporary = (find_garbage(store), 0) if dry_run else collect_garbage(store)
    for name in garbage:
        click.echo(name)
    temporary = f" and {num_temporary} temporary files" if num_temporary else ""
    click.echo(f"{len(garbage)} files{temporary} {'would go' if dry_run else 'deleted'}", err=True)
