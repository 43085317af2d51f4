"""``kdcache sweep``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import yaml

from kdcache.cli.flags import flags_of, given
from kdcache.config import read_section, resolve_options
from kdcache.errors import ConfigError
from kdcache.sweep.grid import OURS, SweepOptions
from kdcache.sweep.run import sweep
from kdcache.sweep.shown import table


@click.command("sweep")
@flags_of(SweepOptions)
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON.")
def command(config: str | None, as_json: bool, **flags: Any) -> None:
    """Train a student for every combination of some options, from one cache or a few, and say which is best and what was saved.

    \b
    kdcache sweep --output S --train cache=C --train student=M --teacher-cache H --grid alpha=0.5,0.7 --grid temperature=1,2

    Run the same command again after a crash, or with a larger grid: what is trained stays, and is evaluated anew only where it, or
    the held-out cache, is not what it was. Without --teacher-cache a student that was trained beside another eval_cache fails, and says so.
    """  # noqa: D301 - click's mark for lines to leave alone
    flags = given(flags)
    options = resolve_options(SweepOptions, "sweep", flags, config)
    if config is not None and "train-student" in (yaml.safe_load(Path(config).read_text()) or ()):
        section = read_section(config, "train-student")
        base = {name: value for name, value in section.items() if name not in OURS}  # meant for train-student alone
        if taken := [name for name in options.grid if name in base]:
            raise ConfigError(
                f"--grid {taken[0]}: the section train-student of {config} sets it for all",
                hint=f"leave {taken[0]} out of that section",
            )
        options = options.model_copy(update={"train": base | options.train})
    found = sweep(options)
    click.echo(json.dumps(found, indent=2) if as_json else table(found))
    for name, error in found["failed"].items():
        click.echo(f"failed: {name}: {error}", err=True)
    if found["failed"]:
        sys.exit(1)
    click.echo(f"{options.output}/sweep.svg, sweep.json; students in {options.output}/students", err=True)
