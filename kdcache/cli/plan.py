"""``kdcache plan``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from kdcache.budget.costs import hours, size
from kdcache.budget.options import PlanOptions
from kdcache.cli.flags import flags_of, given
from kdcache.config import read_section, resolve_options
from kdcache.errors import ConfigError
from kdcache.train.schedule import parse_schedule

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kdcache.budget.dry import DryBudget, ModelBudget
    from kdcache.budget.measure import Budget

NARROWEST = 120
GIB = 1 << 30
RUNS = (1, 2, 4)
# What of a student run decides how often it reads the corpus.
LENGTH = ("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")


@click.command("plan")
@flags_of(PlanOptions)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(config: str | None, as_json: bool, **flags: Any) -> None:
    """Before anything is spent: tokens, bytes, hours, money, what each scheme loses, and from how many students on a cache pays.

    \b
    kdcache plan --teacher M --dataset D --student S --price-per-hour 2.5
    kdcache plan --teacher-config DIR --student-config DIR --positions 10000000000 --gpus-per-teacher 4

    The first runs the teacher over a few hundred sequences, here; the second loads no weights. With --config the section
    dump-teacher is taken first, then batch, epochs or steps and temperature of the section train-student, then the section plan.
    """  # noqa: D301 - click's mark for lines to leave alone
    values = given(flags)
    if config is not None:
        dumped, planned = read_section(config, "dump-teacher"), read_section(config, "plan")
        if values.get("teacher_config") or planned.get("teacher_config"):
            dumped = {name: value for name, value in dumped.items() if name not in ("teacher", "dataset")}
        asked = planned | {name: value for name, value in values.items() if value is not None}
        learned = trained(config)
        if "num_train_epochs" in asked:
            learned.pop("max_steps", None)  # which would win over what is asked of the plan
        values = dumped | learned | asked
    options = resolve_options(PlanOptions, "plan", values, None)
    if options.teacher_config is not None:
        from kdcache.budget.dry import plan_dry

        dry = plan_dry(options)
        show(as_json, dry, lambda: render_dry(dry, options))
        return
    from kdcache.budget.measure import plan_budget

    budget = plan_budget(options)
    show(as_json, budget, lambda: render(budget, options))


def trained(config: str) -> dict[str, Any]:
    """What the section train-student of a config file says of students to come; not which, for that one may have to be made first.

    Raises:
        ConfigError: Its temperature is neither a number nor a schedule.
    """
    section = read_section(config, "train-student")
    more = section.get("training")  # which wins, as it does in train-student
    told = section | more if isinstance(more, dict) else section
    found: dict[str, Any] = {name: told[name] for name in LENGTH if name in told}
    if "temperature" in section:
        try:
            found["train_temperatures"] = parse_schedule(section["temperature"]).values
        except ValueError as error:
            raise ConfigError(
                f"train-student: temperature: {error} (found {section['temperature']!r}) ({config})",
                hint="kdcache train-student --help",
            ) from error
    return found


def show(as_json: bool, budget: Budget | DryBudget, parts: Callable[[], list[RenderableType]]) -> None:
    """Print it, as JSON or for a reader."""
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(budget) | {"break_even_students": budget.costs.break_even}, indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    console.width = max(console.width, NARROWEST)
    for part in parts():
        console.print(part)
    # The command is to be copied: neither wrapped nor coloured.
    for warning in budget.warnings:
        click.echo(f"warning: {warning}")
    click.echo(f"\n{budget.command}")


def render(budget: Budget, options: PlanOptions) -> list[RenderableType]:
    """Corpus, schemes, costs."""
    corpus, dear = budget.corpus, budget.schemes[0]
    exact = "counted" if not corpus.error else f"± {corpus.error:.1%}, from a sample of shards"
    facts = [
        ("corpus", f"{corpus.num_positions:,} tokens ({exact}), {corpus.num_sequences:,} sequences, {corpus.num_shards:,} shards"),
        ("teacher", f"{budget.teacher}: {budget.teacher_parameters:,} parameters, {budget.dtype}; {budget.device}; "
                    f"{budget.teacher_tokens_per_second:,.0f} tokens/s a worker"),
        ("pilot", f"{budget.pilot_sequences} sequences, {budget.pilot_positions:,} tokens, {hours(budget.pilot_seconds)} in all"),
        ("memory", f"{size(budget.memory.peak)} at most while the pilot ran, {size(budget.memory.weights)} of it the teacher's weights"),
    ]  # fmt: skip
    if budget.student_tokens_per_second is not None:
        facts += [
            (
                "student",
                f"{budget.student_parameters:,} parameters; a step reads {budget.student_tokens_per_second:,.0f} tokens/s",
            ),
            (
                "its memory",
                f"about {size(budget.student_memory or 0)} to train, on each of {options.gpus_per_student} GPUs: weights, gradients, AdamW in "
                f"float32, and a batch of {options.per_device_train_batch_size} with checkpointing; computed, not measured",
            ),
        ]
    columns = ["scheme", "B/token", "cache", "entries", "mass", "KL lost", "target MSE", "time", "losses", "T"]
    rows = []
    for one in budget.schemes:
        found = one.estimate
        rows.append([
            found.name, f"{found.bytes_per_token:.1f}", size(one.total_bytes), f"{found.entries:.1f}", f"{found.mass:.1%}",
            "-" if found.kl is None else f"{found.kl:.4f}", "-" if found.target_mse is None else f"{found.target_mse:.5f}",
            hours(one.wall_seconds), found.losses,
            "any" if found.name == "hidden" else ",".join(f"{t:g}" for t in found.temperatures),
        ])  # fmt: skip
    return [
        fact_table(facts),
        grid(columns, rows),
        "KL lost: KL(teacher ‖ stored) in nats, the tail spread evenly. target MSE: noise of drawn targets, which are unbiased.\n",
        *render_costs(budget, options, dear.wall_seconds, "GPU" if "GPU" in budget.device else "machine"),
    ]


def render_costs(
    budget: Budget | DryBudget, options: PlanOptions, wall_seconds: float, device: str
) -> list[RenderableType]:
    """The dump, how long a run is, then n runs both ways."""
    costs, price = budget.costs, options.price_per_hour
    money = "" if price is None else f", {costs.dump / 3600 * price:,.2f} at {price:g} an hour"
    out: list[RenderableType] = [
        f"dump: {hours(wall_seconds)} of wall time, {costs.dump / 3600:,.{2 if costs.dump < 360_000 else 0}f} {device}-hours{money}"
    ]
    steps = (
        f" ({options.max_steps:,} steps of {options.sequences_per_step:,} sequences)" if options.max_steps > 0 else ""
    )
    out.append(f"passes over the corpus in a student run: {budget.epochs:.3g}{steps}")
    what = "teacher and students" if costs.student_a_run is not None else "teacher alone: no student was measured"
    numbers = sorted({*RUNS, costs.break_even, options.num_students})
    rows = [
        [str(n), *(hours(seconds) + ("" if price is None else f" ({seconds / 3600 * price:,.2f})") for seconds in (costs.cached(n), costs.live(n))),
         f"{1 - costs.cached(n) / costs.live(n):.0%}"]
        for n in numbers if n <= max(options.num_students, costs.break_even)
    ]  # fmt: skip
    return [
        *out,
        grid(["students", "from the cache", "distilling live", "saved"], rows, f"{device} time of {what}"),
        costs.words(),
    ]


def render_dry(budget: DryBudget, options: PlanOptions) -> list[RenderableType]:
    """Memory, bytes, hours."""
    models = [("teacher", budget.teacher), *([("student", budget.student)] if budget.student else [])]
    memory = [row for what, model in models for row in memory_rows(what, model)]
    facts = [(what, f"{model.name}: {model.shape.num_parameters:,} parameters") for what, model in models]
    facts += [
        ("corpus", f"{budget.positions:,} tokens, as given; about {budget.num_shards:,} shards"),
        ("rate", f"{budget.tokens_per_second:,.0f} tokens/s a teacher ({budget.rate_source}); {budget.num_gpus} GPUs"),
    ]
    sizes = [[name, f"{b:,.1f}", size(b * budget.positions)] for name, b in budget.bytes_per_token.items()]
    return [
        fact_table(facts),
        grid(["", "of each GPU", "GiB", ""], memory),
        grid(["scheme", "B/token", "cache"], sizes),
        f"bytes: {budget.bytes_source}; hidden computed\n",
        *render_costs(budget, options, budget.wall_seconds, "GPU"),
    ]


def memory_rows(what: str, model: ModelBudget) -> list[list[str]]:
    """What a GPU holds of a model, and the sum."""
    rows = [
        [what, line.what, f"{line.num_bytes / GIB:,.1f}", "exact" if line.exact else "estimate"] for line in model.lines
    ]
    fewest = f"fits on {model.fewest_gpus} or more" if model.fewest_gpus else "fits on no number of GPUs"
    rows.append([what, "together", f"{model.num_bytes / GIB:,.1f}", fewest])
    if model.kv_bytes:
        rows.append(
            [what, "keys and values besides, of kdcache generate alone", f"{model.kv_bytes / GIB:,.1f}", "exact"]
        )
    return rows


def fact_table(facts: list[tuple[str, str]]) -> RenderableType:
    """Names and what they are."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, text in facts:
        table.add_row(name, text)
    return table


def grid(columns: list[str], rows: list[list[str]], title: str | None = None) -> RenderableType:
    """A table; numbers to the right, words to the left."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for number, name in enumerate(columns):
        words = any(row[number][:1].isalpha() for row in rows)
        table.add_column(name, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
