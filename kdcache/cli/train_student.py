"""``kdcache train-student``."""

from __future__ import annotations

from typing import Any

import click

from kdcache.cli.flags import flags_of, given
from kdcache.config import resolve_options
from kdcache.progress import launched_rank
from kdcache.train.options import TrainOptions


@click.command("train-student")
@flags_of(TrainOptions, without=("training",))
def command(config: str | None, **flags: Any) -> None:
    """Phase 2: train a student from a cache. The teacher is not needed.

    One cache serves any number of runs. Options of transformers.TrainingArguments that have no flag here go under training: in
    the config file. Run the same command again after a crash: it goes on from the last checkpoint (--save-steps).
    """
    from kdcache.train.run import train

    options = resolve_options(TrainOptions, "train-student", given(flags), config)
    result = train(options)
    if launched_rank()[0] > 0:
        return
    record = result.results
    if result.already_done:
        told = result.evaluated_otherwise
        click.echo(
            f"all done: {options.output} was trained with these very options"
            + (f", but its results are of other held-out text:{told}" if told else "")
        )
        return
    held_out = ", ".join(f"{k.removeprefix('eval_')} {v:.4f}" for k, v in record.items() if k.startswith("eval_"))
    click.echo(
        f"{options.output}: {record['steps']} steps, {record['train_tokens']:,} tokens, {record['tokens_per_second']:,.0f} tokens/s"
        + (f"; held out: {held_out}" if held_out else "")
    )
