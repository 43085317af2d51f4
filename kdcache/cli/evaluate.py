"""``kdcache evaluate``."""

from __future__ import annotations

import json
from typing import Any

import click

from kdcache.cli.flags import flags_of, given
from kdcache.config import resolve_options
from kdcache.evaluate.options import EvaluateOptions
from kdcache.evaluate.page import number


@click.command("evaluate")
@flags_of(EvaluateOptions)
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON.")
def command(config: str | None, as_json: bool, **flags: Any) -> None:
    """Hold a student, and a baseline, against the teacher on held-out text.

    From a hidden cache all is exact, over the full vocabulary; from entries and tails KL is a lower bound, and is called one.
    """
    from kdcache.evaluate.run import evaluate

    options = resolve_options(EvaluateOptions, "evaluate", given(flags), config)
    report = evaluate(options)
    click.echo(json.dumps(report, indent=2) if as_json else table(report))


COLUMNS = (
    ("perplexity", "perplexity", "{:.2f}"),
    ("KL(teacher‖·)", "forward_kl", "{:.4f}"),
    ("KL(·‖teacher)", "reverse_kl", "{:.4f}"),
    ("top-1 agreement", "top1_agreement", "{:.1%}"),
    ("acceptance", "acceptance_rate", "{:.1%}"),
    ("ECE", "calibration_error", "{:.1%}"),
    ("parameters", "num_parameters", "{:,}"),
    ("train tokens/s", "tokens_per_second", "{:,.0f}"),
)
BOUNDS = {"forward_kl": "KL(teacher‖·) ≥", "reverse_kl": "KL(·‖teacher) ≥", "acceptance_rate": "acceptance ≤"}


def table(report: dict[str, Any]) -> str:
    """The models side by side, then what the phases cost."""
    columns = (
        COLUMNS if report["teacher_cache"]["exact"] else [(BOUNDS.get(key, title), key, s) for title, key, s in COLUMNS]
    )
    rows = [["", *(title for title, _, _ in columns)]]
    for model in report["models"]:
        label = model["role"]
        if "alpha" in model:
            label += f" ({_trained_for(model)})"
        rows.append([label, *(number(shape, model[key]) if key in model else "-" for _, key, shape in COLUMNS)])
    for role, spread in report["summary"]["spread"].items():
        for which in ("mean", "deviation"):
            values = spread[which]
            cells = (number(shape, values[key]) if key in values else "-" for _, key, shape in COLUMNS)
            rows.append([f"{role}, {which} of {spread['seeds']}", *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
             for row in rows]  # fmt: skip
    lines.insert(1, "  ".join("-" * width for width in widths))
    cache = report["teacher_cache"]
    positions = f"\n{cache['num_targets']:,} held-out positions"
    lines.append(
        f"{positions}, full vocabulary; KL in nats a token"
        if cache["exact"]
        else f"{positions}; KL in nats a token, over kept entries and one tail"
    )
    if not cache["exact"]:
        lines.append(
            f"KL is a lower bound, acceptance an upper one: the cache holds {cache['targets']} targets; "
            "one made with --targets hidden is exact"
        )
    gap = report["summary"]["gap"]
    if gap and gap["cross_entropy"]["value"] is not None:
        share = gap["cross_entropy"]
        known = "" if share["low"] is None else f" (95 %: {share['low']:.1%} to {share['high']:.1%})"
        lines.append(f"share of the cross-entropy gap from baseline to {gap['far_end']}: {share['value']:.1%}{known}")
    phases = dict(report["phases"])
    if "bytes_per_token" in phases:
        lines.append(
            f"cache: {phases.pop('bytes_per_token'):.1f} bytes a token; "
            f"the teacher said it at {phases.pop('dump_tokens_per_second'):,.0f} tokens/s"
        )
    if phases:
        shown = ", ".join(
            f"{name.removesuffix('_seconds').replace('_', ' ')} {value:.0f} s" for name, value in phases.items()
        )
        lines.append(f"phases: {shown}")
    return "\n".join(lines)


def _trained_for(model: dict[str, Any]) -> str:
    """Whose word counted, stage by stage."""
    told = [
        "labels" if stage["alpha"] == 0 else f"alpha {_short(stage['alpha'])}, T {_short(stage['temperature'])}"
        for stage in model.get("stages", [model])
    ]
    return "labels only" if set(told) == {"labels"} else ", then ".join(told)


def _short(value: float | str) -> str:
    """A number, or a schedule as it was written."""
    return value if isinstance(value, str) else f"{value:g}"
