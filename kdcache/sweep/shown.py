"""What came of a sweep, to look at: a table for the terminal and a plot."""

from __future__ import annotations

import json
import math
from typing import Any

from kdcache.evaluate.page import number
from kdcache.evaluate.plots import Point, Series, category_axis, line_plot, number_axis
from kdcache.sweep.grid import spelled


def table(found: dict[str, Any]) -> str:
    """Points best first, then what was saved."""
    metric, points = found["metric"], found["points"]
    if not points:
        return "no student was trained"
    axes = list(points[0]["point"])
    others = [name for name in ("perplexity", "forward_kl", "reverse_kl", "top1_agreement", "acceptance_rate", "calibration_error")
              if name in points[0]["mean"] and name != metric]  # fmt: skip
    shown = [metric, *others]
    rows = [[*axes, *shown]]
    for one in points:
        cells = [
            number("{:.4f}", one["mean"][name])
            + f" ± {one['deviation'][name]:.4f}" * (one["seeds"] > 1 and math.isfinite(one["deviation"][name]))
            for name in shown
        ]
        rows.append([*(spelled(one["point"][axis]) for axis in axes), *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    spent = found["cost"]
    lines.append(f"\n{spent['num_students']} students, {spent['train_tokens']:,} tokens.")
    if "dump_seconds" not in spent:
        lines[-1] += " What the teacher took is not known: a cache was made of another (kdcache transcode)"
        return "\n".join(lines)
    lines[-1] += (
        f" The teacher ran {_times(spent['num_dumps'])}, {spent['dump_seconds']:,.0f} s at "
        f"{spent['teacher_tokens_per_second']:,.0f} tokens/s with all that a dump does; beside every student, which is the teacher alone, it would have "
        f"run {spent['live_teacher_seconds']:,.0f} s at most: "
        + (f"at most {spent['saved_seconds']:,.0f} s saved" if spent["saved_seconds"] >= 0
           else f"at least {-spent['saved_seconds']:,.0f} s not yet earned back")
        + f", earned back with student {spent['break_even_students']} at the earliest"
    )  # fmt: skip
    return "\n".join(lines)


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def plot(points: list[dict[str, Any]], axes: list[str], metric: str) -> str:
    """An SVG: the metric over the first option that varies, a line for each combination of the others, spread over seeds as bars."""
    axis = next((name for name in axes if len({json.dumps(one["point"][name]) for one in points}) > 1), axes[0])
    ordered = sorted(points, key=lambda one: _order(one["point"][axis]))
    places = list(dict.fromkeys(spelled(one["point"][axis]) for one in ordered))
    lines: dict[str, list[Point]] = {}
    for one in ordered:
        name = ", ".join(f"{key} {spelled(value)}" for key, value in one["point"].items() if key != axis)
        mean, spread = one["mean"][metric], one["deviation"][metric]
        place = places.index(spelled(one["point"][axis]))
        lines.setdefault(name, []).append(Point(place, mean, f"{mean:.4g} ± {spread:.2g}", spread))
    title = metric.replace("_", " ")
    ends = [
        end for some in lines.values() for point in some for end in (point.y - point.spread, point.y + point.spread)
    ]
    series = [Series(name, some, number) for number, (name, some) in enumerate(lines.items())]
    return line_plot(
        f"{title} over {axis}", category_axis(axis, places), number_axis(title, ends), series, width=620, height=330, right=220, standalone=True,
    )  # fmt: skip


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, then everything else by name."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, float(value), "") if is_number else (1, 0.0, str(value))
