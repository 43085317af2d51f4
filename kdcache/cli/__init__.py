"""The command line: parse, call one function, print.

stdout carries data, stderr logs and progress. Errors that a user can meet become exit code 1 in one place, here. Commands
load on first use, and torch only where it is needed, so that ``inspect`` and ``verify`` answer at once.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
from typing import Any

import click

from kdcache import __version__
from kdcache.errors import KDCacheError
from kdcache.progress import launched_rank

COMMANDS = {
    "plan": "kdcache.cli.plan",
    "dump-teacher": "kdcache.cli.dump_teacher",
    "generate": "kdcache.cli.generate",
    "train-student": "kdcache.cli.train_student",
    "init-student": "kdcache.cli.init_student",
    "evaluate": "kdcache.cli.evaluate",
    "sweep": "kdcache.cli.sweep",
    "inspect": "kdcache.cli.inspect",
    "verify": "kdcache.cli.verify",
    "status": "kdcache.cli.status",
    "transcode": "kdcache.cli.transcode",
    "gc": "kdcache.cli.gc",
}


class KDCacheGroup(click.Group):
    """Loads a command's module when the command is asked for; turns KDCacheError into a message and exit code 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of a story, not of the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name]).command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """The one place where errors meet the user."""
        try:
            return super().invoke(ctx)
        except KDCacheError as error:
            rank, world_size = launched_rank()
            if world_size > 1:
                click.echo(f"rank {rank}:", err=True)
            click.echo(f"error: {error.message}", err=True)
            if error.hint:
                click.echo(f"\nhint: {error.hint}", err=True)
            ctx.exit(1)
        except OSError as error:  # a place that cannot be written, a disk that is full: not a mistake in the program
            if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            click.echo(f"error: {error.filename or 'writing'}: {error.strerror}", err=True)
            ctx.exit(1)


class _StderrHandler(logging.Handler):
    """Messages as they are, on stderr as it is now."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one."""
        click.echo(self.format(record), err=True)


@click.group(cls=KDCacheGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kdcache")
@click.option("-q", "--quiet", is_flag=True, help="Only warnings and errors on stderr.")
def main(quiet: bool) -> None:
    """Offline knowledge distillation: run the teacher once, train many students from what it said.

    \b
    kdcache dump-teacher  --teacher M --dataset D --output CACHE
    kdcache train-student --cache CACHE --student M --output DIR
    """  # noqa: D301 - click's mark for lines to leave alone
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries; ours become a line a minute
    logger = logging.getLogger("kdcache")  # libraries have handlers of their own
    if not logger.handlers:
        logger.addHandler(_StderrHandler())
    quiet = quiet or launched_rank()[0] > 0  # what is said once is said by the first rank
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
