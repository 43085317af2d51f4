"""``kdcache transcode``."""

from __future__ import annotations

from typing import Any

import click

from kdcache.cache.transcode import TranscodeOptions, transcode
from kdcache.cli.dump_teacher import report_size
from kdcache.cli.flags import flags_of, given
from kdcache.config import resolve_options


@click.command("transcode")
@flags_of(TranscodeOptions)
def command(config: str | None, **flags: Any) -> None:
    """Make a smaller cache from a cache: fewer entries or temperatures, another codec or quality. The teacher is not needed.

    Without any of these it is copied byte for byte, to another folder or to an object store.
    Run the same command again after a crash, or several times at once: it goes on.
    """
    options = resolve_options(TranscodeOptions, "transcode", given(flags), config)
    report_size(options.output, transcode(options))
