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
    """Make a student: a teacher cut in depth (--layers) or width (--hidden-size ...), or random weights in a --shape."""
    from kdcache.train.student import init_student

    options = resolve_options(InitOptions, "init-student", given(flags), config)
    about = init_student(options)
    kept = [f"layers {about['layers']}"] if "layers" in about else []
    kept += [f"{name} {size}" for name, size in about.get("widths", {}).items()]
    click.echo(f"{options.output}: {about['num_parameters']:,} parameters, {', '.join(kept) or 'random weights'}")
    if kept:
        click.echo(
            f"next, heal it: kdcache train-student --student {options.output} --cache CACHE --output {options.output}-healed "
            "--alpha 1 --loss forward_kl --learning-rate 3e-4 --warmup-steps 100"
        )
