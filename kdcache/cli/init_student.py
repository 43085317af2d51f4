"""``kdcache init-student``."""

from __future__ import annotations

from typing import Any

import click

from kdcache.cli.flags import flags_of, given
from kdcache.config import resolve_options
from kdcache.train.options import InitOptions


@click.command("init-student")
@flags_of(InitOptions)
def command(config: str | None, **flags: Any) -> None:
    """Make a student: some of a teacher's layers (--layers), or random weights in a shape of its family (--shape)."""
    from kdcache.train.student import init_student

    options = resolve_options(InitOptions, "init-student", given(flags), config)
    about = init_student(options)
    kept = f"layers {about['layers']}" if "layers" in about else "random weights"
    click.echo(f"{options.output}: {about['num_parameters']:,} parameters, {kept}")
