"""Plots as SVG text: what a page of results and a sweep draw, without a dependency.

Small enough to be read on a telephone, with direct labels instead of a legend; colours are Okabe and Ito's, which colour-blind readers
tell apart, and every line is named where it ends. All text is escaped here and nowhere else.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

LEFT, RIGHT, TOP, BOTTOM, FONT = 46, 92, 30, 40, 11
LIGHT = ("#0063a6", "#c04a00", "#555555", "#00785a", "#a04a80", "#8a6d00", "#5b5bd6", "#a3333d")
DARK = ("#5db7f0", "#f29a4a", "#b8b8b8", "#3fcaa2", "#e29ac6", "#e0c341", "#a9a9ff", "#f08a94")
STUDENT, BASELINE, TEACHER, FULL = range(4)


def escape(value: object) -> str:
    """Text for HTML and SVG: markup is escaped, control characters (line breaks aside) are shown as a replacement."""
    text = "".join(c if (c >= " " and not "\x7f" <= c < "\xa0") or c in "\n\t" else "�" for c in str(value))
    # Unpaired surrogates and the two noncharacters that XML does not have.
    return html.escape("".join("�" if "\ud800" <= c <= "\udfff" or c in "\ufffe\uffff" else c for c in text))


def _style() -> str:
    def rules(colours: Sequence[str], ink: str, grid: str) -> str:
        lines = "".join(
            f".plot .k{i}:not(text){{stroke:{c}}}.plot text.k{i},.plot circle.k{i}:not(.faint){{fill:{c}}}"
            for i, c in enumerate(colours)
        )
        return f".plot text{{fill:{ink}}}.plot .grid{{stroke:{grid}}}{lines}"

    return (
        f".plot{{font:{FONT}px system-ui,sans-serif}}.plot polyline{{fill:none;stroke-width:1.8;stroke-linejoin:round}}"
        f".plot .dashed{{stroke-dasharray:5 3}}.plot .faint{{fill:none}}{rules(LIGHT, '#222', '#ddd')}"
        f"@media(prefers-color-scheme:dark){{{rules(DARK, '#ddd', '#3a3d42')}}}"
    )


STYLE = _style()


@dataclass(frozen=True, slots=True)
class Point:
    """A measured value; ``title`` is shown on hover.

    ``spread`` is drawn as a bar of its length up and down. A ``faint`` point, one of few measurements, is hollow and not joined.
    """

    x: float
    y: float
    title: str
    spread: float = 0.0
    faint: bool = False


@dataclass(frozen=True, slots=True)
class Series:
    """Points joined by a line, named where it ends; without ``marks`` the line alone. ``colour`` is an index, as STUDENT."""

    name: str
    points: Sequence[Point]
    colour: int
    marks: bool = True
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """From ``low`` to ``high``, with a text at some places."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]


def number_axis(label: str, values: Sequence[float], *, from_zero: bool = False, percent: bool = False) -> Axis:
    """An axis over values that begins and ends at round numbers. Values that are not finite have no place on it."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    low = min(low, 0.0) if from_zero else low
    if not high > low:
        low, high = low - (abs(low) * 0.05 or 1.0), high + (abs(high) * 0.05 or 1.0)
    raw = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step) + 1e-9) + (1 if round(step / unit, 1) == 2.5 else 0))
    ticks = [(i * step, f"{i * step:.0%}" if percent else f"{i * step:,.{digits}f}") for i in range(first, last + 1)]
    return Axis(label, first * step, last * step, ticks)


def powers_axis(label: str, highest: int) -> Axis:
    """An axis of log2 from 1 to ``highest``; at most eight of its powers are named."""
    last = max(1, math.ceil(math.log2(max(highest, 2))))
    every = math.ceil((last + 1) / 8)
    return Axis(label, 0, last, [(i, f"{2**i:,}") for i in range(0, last + 1, every)])


def category_axis(label: str, names: Sequence[str]) -> Axis:
    """Names at 0, 1, 2 ..."""
    return Axis(label, -0.5, len(names) - 0.5, list(enumerate(names)))


def line_plot(
    title: str,
    x_axis: Axis,
    y_axis: Axis,
    series: Sequence[Series],
    *,
    diagonal: bool = False,
    width: int = 420,
    height: int = 270,
    right: int = RIGHT,
    standalone: bool = False,
) -> str:
    """An SVG of lines over two axes, each named at its end.

    Args:
        title: Said aloud by screen readers.
        x_axis: Below.
        y_axis: On the left; its label stands over it.
        series: Lines; a circle for each point where they have marks. Points that are not finite are left out.
        diagonal: Whether there is a dashed line from corner to corner.
        width: Of the drawing, in its own units, at which text is 11 high.
        height: Likewise.
        right: Room for the names of lines, which are cut to it.
        standalone: Whether the SVG is a file of its own, and so carries its style.
    """
    series = [
        replace(one, points=[p for p in one.points if math.isfinite(p.x) and math.isfinite(p.y)]) for one in series
    ]
    names, right, bottom = (right - 8) // 6, width - right, height - BOTTOM

    def x(value: float) -> float:
        return LEFT + (value - x_axis.low) * (right - LEFT) / (x_axis.high - x_axis.low)

    def y(value: float) -> float:
        return bottom - (value - y_axis.low) * (bottom - TOP) / (y_axis.high - y_axis.low)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>" if standalone else "",
        f'<text x="4" y="14">{escape(y_axis.label)}</text>',
        f'<text x="{(LEFT + right) / 2:.1f}" y="{height - 6}" text-anchor="middle">{escape(x_axis.label)}</text>',
    ]
    for value, label in y_axis.ticks:
        out.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{escape(label)}</text>')
    for value, label in x_axis.ticks:
        out.append(f'<text x="{x(value):.1f}" y="{bottom + 16}" text-anchor="middle">{escape(label)}</text>')
    if diagonal:
        out.append(f'<line class="k{TEACHER} dashed" x1="{LEFT}" y1="{bottom}" x2="{right}" y2="{TOP}"/>')
    for one in series:
        kind = f"k{one.colour % len(LIGHT)}"
        path = " ".join(f"{x(point.x):.1f},{y(point.y):.1f}" for point in one.points if not point.faint)
        out.append(f'<polyline class="{kind}{" dashed" if one.dashed else ""}" points="{path}"/>')
        for point in one.points if one.marks else ():
            if point.spread and math.isfinite(point.spread):
                ends = f'y1="{y(point.y - point.spread):.1f}" y2="{y(point.y + point.spread):.1f}"'
                out.append(f'<line class="{kind}" x1="{x(point.x):.1f}" x2="{x(point.x):.1f}" {ends}/>')
            out.append(
                f'<circle class="{kind}{" faint" if point.faint else ""}" cx="{x(point.x):.1f}" cy="{y(point.y):.1f}" r="3"><title>{escape(point.title)}</title></circle>'
            )
    line_ends = []
    everything = [(x(point.x), y(point.y)) for one in series for point in one.points]
    for one in filter(lambda one: one.points and one.name, series):
        last = next((point for point in reversed(one.points) if not point.faint), one.points[-1])
        # Beside the last point of the line, and of what else is as high as it.
        line_ends.append((one, max(at for at, height_ in everything if abs(height_ - y(last.y)) < 2 * FONT), y(last.y)))
    out += _end_labels(line_ends, height, names)
    return "\n".join(filter(None, [*out, "</svg>"])) + "\n"


def _end_labels(ends: list[tuple[Series, float, float]], height: int, longest: int) -> list[str]:
    """A name where each line ends, moved down where the one above needs the room."""
    out, free = [], float(TOP - 8)
    overflow = max(0.0, len(ends) * (FONT + 3) + TOP - height)
    for one, x, y in sorted(ends, key=lambda end: end[2]):
        free = max(y + 4, free + (FONT + 3) - overflow / len(ends))
        name = one.name if len(one.name) <= longest else one.name[: longest - 1] + "…"
        out.append(
            f'<text class="k{one.colour % len(LIGHT)}" x="{x + 7:.1f}" y="{free:.1f}">{escape(name)}<title>{escape(one.name)}</title></text>'
        )
    return out
