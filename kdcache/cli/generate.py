"""``kdcache generate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from kdcache.cache.layout import MANIFEST
from kdcache.cache.manifest import Manifest
from kdcache.cache.store import open_store
from kdcache.cli.dump_teacher import report
from kdcache.cli.flags import flags_of, given
from kdcache.config import resolve_options
from kdcache.dump.options import GenerateOptions
from kdcache.errors import ConfigError
from kdcache.progress import launched_rank


@click.command("generate")
@flags_of(GenerateOptions, without=GenerateOptions.WITHOUT)
def command(config: str | None, **flags: Any) -> None:
    """A teacher answers prompts: the text becomes a dataset, and what the teacher said of every token of its answers a cache, in one pass.

    Run the same command again after a crash, on any number of workers: it goes on, and ends in the same bytes. Train on the cache
    with train-student: --loss ce on the text alone, any other loss on the targets too. Of transformers' sampling there are temperature, top-p,
    top-k and repetition penalty. There are no beams: targets are kept of every step of one answer.

    Dropped and counted are empty answers, the same answer to the same prompt where it is in the same shard (workers do not see each
    other's), and what --min-tokens, --max-repetition and --no-keep-unfinished ask for.
    """
    from kdcache.dump.launch import dump

    options = resolve_options(GenerateOptions, "generate", given(flags), config)
    answers = options.answers or f"{options.output}/answers.jsonl"
    if options.answers is None and "://" in options.output:
        raise ConfigError(f"{options.output} is not a folder", hint="name a file for the text with --answers")
    was_there = Path(answers).exists()
    if was_there and options.answers is not None and not open_store(options.output).exists(MANIFEST):
        raise ConfigError(
            f"--answers {answers} is there already, and {options.output} is not finished: it is written when the last shard is",
            hint="remove it, or name another file",
        )
    result = dump(options)
    if launched_rank()[0] > 0:
        return
    if result.manifest.sealed:
        number = write_text(options, answers)
        if not was_there:
            click.echo(f"{answers}: {number:,} answers", err=True)
    report_dropped(result.manifest)
    report(options.output, result)
    if result.stopped and not result.manifest.sealed:
        sys.exit(128 + result.stopped)


def write_text(options: GenerateOptions, path: str) -> int:
    """The answers as text; how many.

    Raises:
        ConfigError: Another text is there.
    """
    from kdcache.cache.reader import open_cache
    from kdcache.dump.generate import write_answers
    from kdcache.model_files import find_model
    from kdcache.models import load_tokenizer
    from kdcache.rows import load_rows

    rows = load_rows(options.dataset, options.split, config_name=options.dataset_config)
    source = find_model(options.teacher, options.revision)
    tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)
    return write_answers(open_cache(options.output), rows, tokenizer, path)


def report_dropped(manifest: Manifest) -> None:
    """Which answers were not kept, and why."""
    stats = manifest.stats
    for number, what in (
        (stats.num_answers_short, "were shorter than --min-tokens"),
        (stats.num_answers_unfinished, "were cut off, and --no-keep-unfinished drops those"),
        (stats.num_answers_repetitive, "repeat themselves more than --max-repetition allows"),
        (stats.num_answers_duplicate, "were in their shard already, to the same prompt"),
    ):
        if number:
            click.echo(f"{number:,} answers {what}; {stats.num_sequences:,} are kept", err=True)
