"""The report of an evaluation: one HTML file that needs no network, no script and no font, made of the evaluation's JSON alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from kdcache.evaluate import plots
from kdcache.evaluate.page import NAMES, figure, number, page, paragraph, table
from kdcache.evaluate.plots import Point, Series, escape
from kdcache.evaluate.texts import answers_section, token_section

COLOURS = {"student": plots.STUDENT, "baseline": plots.BASELINE, "teacher": plots.TEACHER, "full": plots.FULL}
Found = dict[str, Any]
METRICS = (
    ("perplexity", "perplexity", "{:.2f}", "exp of the cross-entropy of the data tokens; less is better"),
    ("cross_entropy", "cross-entropy", "{:.4f}", "nats a token, of the data tokens; less is better"),
    ("forward_kl", "KL(teacher‖·)", "{:.4f}", "nats a token; how much of what the teacher would say is missed; 0 is best"),
    ("reverse_kl", "KL(·‖teacher)", "{:.4f}", "nats a token; how much is said that the teacher would not say; 0 is best"),
    ("top1_agreement", "top-1 agreement", "{:.1%}", "share of positions where model and teacher have the same first choice"),
    ("accuracy", "accuracy", "{:.1%}", "share of positions where the first choice is the data token"),
    ("acceptance_rate", "acceptance rate", "{:.1%}", "of the model's tokens as drafts in speculative decoding: sum of min(teacher, model)"),
    ("calibration_error", "ECE", "{:.2%}", "mean gap between confidence in the first choice and accuracy, 15 bins; 0 is best"),
    ("overconfidence", "overconfidence", "{:+.2%}", "mean confidence minus accuracy; above 0 the model is too sure, below too unsure"),
)  # fmt: skip
# Bins of fewer positions are drawn hollow.
FEW = 30


def render(found: Found) -> str:
    """The page.

    Args:
        found: What :func:`kdcache.evaluate.run.evaluate` returns.
    """
    student = next(model for model in found["models"] if model["role"] == "student")
    body = [
        *_head(found, student),
        *_metrics(found),
        *_shares(found),
        *_divergence(found),
        *_calibration(found),
        *token_section(found),
        *answers_section(found),
        *_tasks(found),
        *_training(found),
        *_provenance(found),
    ]
    return page(f"{student['model']}: report", body)


def _labelled(found: Found) -> list[tuple[str, Found]]:
    """Models with a name each: the role, and its number where there are several seeds."""
    out, seen = [], dict[str, int]()
    for model in found["models"]:
        role = model["role"]
        seen[role] = seen.get(role, 0) + 1
        several = sum(other["role"] == role for other in found["models"]) > 1
        out.append((NAMES[role] + (f" {seen[role]}" if several else ""), model))
    return out


def _head(found: Found, student: Found) -> Iterator[str]:
    cache = found["teacher_cache"]
    yield f"<h1>{escape(student['model'])}</h1>"
    yield paragraph(
        f"A student of {student['num_parameters']:,} parameters held against its teacher {found['models'][0]['model']} "
        f"({found['models'][0]['num_parameters']:,}) on {student['num_targets']:,} positions of held-out text"
        + (", over the full vocabulary." if cache["exact"] else "."),
        soft=True,
    )
    for name, model in _labelled(found):
        if math.isnan(model["cross_entropy"]):
            yield f"<p><strong>The {escape(name)} diverged</strong>: it gives NaN on this text, and nothing can be said of it.</p>"
    gap = found["summary"]["gap"]
    if gap is not None and gap["cross_entropy"]["value"] is not None:
        share, end = gap["cross_entropy"], NAMES[gap["far_end"]]
        yield (
            f"<p><strong>{escape(_percent(share))}</strong> of the way from the baseline to the {end} in held-out cross-entropy"
            f"{escape(_range(share, _percent_of))}.</p>"
        )
    if not cache["exact"]:
        yield (
            f"<p><strong>KL is a lower bound here</strong>, and the acceptance rate an upper one: the cache holds {escape(cache['targets'])} "
            "targets, what they leave out counts as one token. A cache made with <code>--targets hidden</code> makes them exact.</p>"
        )


# --- numbers ----------------------------------------------------------------------------------------------------------


def _percent_of(value: float) -> str:
    return f"{value:.1%}".replace("-", "−")


def _percent(share: Found) -> str:
    return "not defined" if share["value"] is None else f"{share['value']:.1%}"


def _range(told: Found, shape: Callable[[float], str]) -> str:
    return "" if told["low"] is None else f" ({shape(told['low'])} to {shape(told['high'])})"


def _with_range(told: Found, shape: Callable[[float], str]) -> str:
    """A cell: the value, its interval under it."""
    if told["value"] is None:
        return "not defined"
    under = _range(told, shape).strip(" ()")
    return escape(shape(told["value"])) + (f'<span class="range">{escape(under)}</span>' if under else "")


def _metrics(found: Found) -> Iterator[str]:
    summary = found["summary"]
    roles = list(dict.fromkeys(model["role"] for model in found["models"]))
    bounds = (
        {} if found["teacher_cache"]["exact"] else {"forward_kl": "≥ ", "reverse_kl": "≥ ", "acceptance_rate": "≤ "}
    )
    rows = []
    for key, name, shape, _ in METRICS:
        cells = []
        for role in roles:
            one = next(model for model in found["models"] if model["role"] == role)
            spread = summary["spread"].get(role)
            mark = "" if role == "teacher" else bounds.get(key, "")
            value = spread["mean"][key] if spread else one[key]
            cell = ("" if math.isnan(value) else mark) + number(shape, value)
            under = (
                f'<span class="range">± {shape.format(spread["deviation"][key]).lstrip("+")}</span>'
                if spread and not math.isnan(spread["deviation"][key])
                else ""
            )
            cells.append(escape(cell.replace("-", "−")) + under)
        if told := summary["differences"].get(key):
            cells.append(_with_range(told, partial(_signed, shape)))
        elif summary["differences"]:
            cells.append("")
        rows.append([escape(name), *cells])
    head = ["", *(NAMES[role] for role in roles), *(["student − baseline"] if summary["differences"] else [])]
    yield "<h2>Against the teacher</h2>"
    yield table("Means over the held-out positions", head, rows)
    if summary["differences"]:
        yield paragraph(_intervals(summary), soft=True)
    if summary["spread"]:
        seeds = ", ".join(f"{NAMES[role]} {spread['seeds']}" for role, spread in summary["spread"].items())
        yield paragraph(f"Mean ± standard deviation over seeds ({seeds} models).", soft=True)
    meanings = [[escape(name), escape(meaning)] for _, name, _, meaning in METRICS]
    yield f"<details><summary>what these are</summary>{table('', ['', 'meaning'], meanings, text_columns=[1])}</details>"


def _signed(shape: str, value: float) -> str:
    """A difference; of shares in percentage points."""
    if "%" in shape:
        return f"{100 * value:+.{2 if '.2' in shape else 1}f} pp".replace("-", "−")
    return shape.replace(":", ":+").format(value).replace("-", "−")


def _intervals(summary: Found) -> str:
    number = summary["num_documents"]
    few = " These are few: read the ranges with care." if number < 30 else ""
    return (
        f"Ranges hold {summary['confidence']:.0%} of {summary['num_resamples']:,} bootstrap samples of the {number:,} held-out "
        f"documents, the same for all models (a text cut at the sequence length counts as several).{few} They are about which text was "
        "measured, not about another seed of training."
    )


def _shares(found: Found) -> Iterator[str]:
    gap, kept, names = found["summary"]["gap"], found["summary"]["kept"], {key: name for key, name, _, _ in METRICS}
    yield '<h2>Shares</h2>\n<div class="plots">'
    if gap is not None:
        rows = [[escape(names[key]), _with_range(gap[key], _percent_of)] for key in gap if key != "far_end"]
        yield "<div>" + table(f"Share of the gap from baseline to {NAMES[gap['far_end']]}", ["in", "share"], rows)
        yield paragraph(
            f"(student − baseline) / ({NAMES[gap['far_end']]} − baseline): 0 % is what the baseline has, 100 % all there is to win; "
            "below 0 the student is worse than the baseline.", soft=True,
        ) + "</div>"  # fmt: skip
    rows = [[escape(names[key]), _with_range(kept[key], _percent_of)] for key in kept]
    yield f"<div>{table('Share of the teacher kept', ['in', 'share'], rows)}"
    yield paragraph(
        "(student − chance) / (teacher − chance), chance being a uniform guess over the "
        f"{found['teacher_cache']['vocab_size']:,} tokens of the vocabulary.", soft=True,
    ) + "</div></div>"  # fmt: skip


# --- plots ------------------------------------------------------------------------------------------------------------


def _students(found: Found) -> list[tuple[str, Found]]:
    return [(name, model) for name, model in _labelled(found) if model["role"] != "teacher"]


def _series(name: str, model: Found, points: Sequence[Point], **how: bool) -> Series:
    return Series(name, points, COLOURS[model["role"]], dashed=model["role"] == "baseline", **how)


def _numbers(caption: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return table(
        caption,
        head,
        [[escape(number("{:.4g}", cell) if isinstance(cell, float) else cell) for cell in row] for row in rows],
    )


def _divergence(found: Found) -> Iterator[str]:
    first = _students(found)[0][1]
    contexts, entropies = first["kl_by_context"], first["kl_by_entropy"]
    last = entropies[-1]["to"] or entropies[-1]["from"] + 0.5
    by_context = plots.powers_axis("tokens of the document read so far", contexts[-1]["to"])
    by_entropy = plots.number_axis("teacher's entropy, nats", [0.0, last])
    yield '<h2>Where it is far from the teacher</h2>\n<div class="plots">'
    yield _kl_figure(
        found, "kl_by_context", "KL by position", by_context, [math.log2(b["from"] * b["to"]) / 2 for b in contexts]
    )
    yield _kl_figure(
        found, "kl_by_entropy", "KL by the teacher's entropy", by_entropy, [b["from"] + 0.25 for b in entropies]
    )
    yield "</div>"
    yield paragraph(
        f"Each point is the mean over the positions of its bin; times their numbers they sum to the whole KL. Hollow: fewer than {FEW} positions.",
        soft=True,
    )


def _kl_figure(found: Found, key: str, title: str, x_axis: plots.Axis, places: Sequence[float]) -> str:
    models = _students(found)
    series = []
    for name, model in models:
        points = [
            Point(x, b["forward_kl"], f"{name}, {_range_of(b)}: {b['forward_kl']:.3f} nats, {b['positions']:,} positions",
                  faint=b["positions"] < FEW)
            for x, b in zip(places, model[key], strict=True)
        ]  # fmt: skip
        series.append(_series(name, model, points))
    bound = "" if found["teacher_cache"]["exact"] else ", lower bound"
    values = [point.y for one in series for point in one.points]
    y_axis = plots.number_axis(f"KL(teacher‖·), nats a token{bound}", values, from_zero=True)
    rows = [
        [_range_of(b), f"{b['positions']:,}", *(model[key][i]["forward_kl"] for _, model in models)]
        for i, b in enumerate(models[0][1][key])
    ]
    data = _numbers("KL(teacher‖·), nats a token", ["", "positions", *(name for name, _ in models)], rows)
    return figure(title, plots.line_plot(title, x_axis, y_axis, series), data)


def _range_of(one: Found) -> str:
    return f"{one['from']:g} and more" if one["to"] is None else f"{one['from']:g} to {one['to']:g}"


def _calibration(found: Found) -> Iterator[str]:
    yield "<h2>Is it as sure as it should be?</h2>"
    series, rows = [], []
    for name, model in _labelled(found):
        points = [
            Point(b["confidence"], b["accuracy"], f"{name}: {b['confidence']:.1%} sure, {b['accuracy']:.1%} right, {b['positions']:,} positions",
                  faint=b["positions"] < FEW)
            for b in model["calibration"]
        ]  # fmt: skip
        series.append(_series(name, model, points))
        rows += [[name, f"{b['positions']:,}", b["confidence"], b["accuracy"]] for b in model["calibration"]]
    x_axis = plots.number_axis("confidence in the first choice", [0.0, 1.0], percent=True)
    y_axis = plots.number_axis("share right (dashed: as sure as right)", [0.0, 1.0], percent=True)
    plot = plots.line_plot("Reliability", x_axis, y_axis, series, diagonal=True, height=340)
    data = _numbers("Bins of the confidence", ["", "positions", "confidence", "right"], rows)
    sure = [
        [escape(name), number("{:.2%}", m["calibration_error"]), number("{:+.2%}", m["overconfidence"])]
        for name, m in _labelled(found)
    ]
    yield f'<div class="plots">{figure("Reliability", plot, data)}<div>'
    yield table("Calibration", ["", "ECE", "overconfidence"], sure)
    yield paragraph(
        "Below the diagonal a model is too sure of itself, above it too unsure. Hollow: bins of fewer than 30 positions.",
        soft=True,
    )
    yield "</div></div>"


def _training(found: Found) -> Iterator[str]:
    figures = [
        _curves(found, "loss", "Loss, each model's own"),
        _curves(found, "cross_entropy", "Cross-entropy of the labels"),
    ]
    if any(figures):
        yield f'<h2>Training</h2>\n<div class="plots">{"".join(figures)}</div>'
        own = ", ".join(
            f"{name} {', then '.join(str(stage['alpha']) for stage in model.get('stages', [model]))}"
            for name, model in _students(found)
            if "alpha" in model
        )
        yield paragraph(
            f"Circles: held-out text. Losses of other objectives are not comparable with each other, cross-entropies are. Weight of the teacher "
            f"(alpha): {own or 'not known'}.", soft=True,
        )  # fmt: skip


def _curves(found: Found, key: str, title: str) -> str:
    series, rows = [], list[list[Any]]()
    for name, model in _students(found):
        curves = model.get("curves") or {}
        logged, held = curves.get(key, []), curves.get(f"eval_{key}", [])
        series.append(_series(name, model, [Point(x, y, "") for x, y in logged], marks=False))
        series.append(_series("", model, [Point(x, y, f"{name}, step {x:,}: {y:.4f} held out") for x, y in held]))
        rows += [[name, f"{x:,}", y] for x, y in logged] + [[f"{name}, held out", f"{x:,}", y] for x, y in held]
    series = [one for one in series if one.points]
    if not series:
        return ""
    every = [point for one in series for point in one.points]
    x_axis = plots.number_axis("step", [0.0, max(point.x for point in every)])
    plot = plots.line_plot(title, x_axis, plots.number_axis("nats a token", [point.y for point in every]), series)
    return figure(title, plot, _numbers(title, ["", "step", "nats"], rows))


# --- the rest ---------------------------------------------------------------------------------------------------------


def _tasks(found: Found) -> Iterator[str]:
    measured = [(name, model["tasks"]) for name, model in _labelled(found) if "tasks" in model]
    if not measured:
        return
    rows = []
    for task, scores in measured[0][1].items():
        for metric in scores:
            cells = []
            for _, tasks in measured:
                one = tasks[task][metric]
                error = "" if one["stderr"] is None else f'<span class="range">± {one["stderr"]:.3f}</span>'
                cells.append(f"{one['value']:.3f}{error}")
            rows.append([f"{escape(task)}, {escape(metric)}", *cells])
    yield "<h2>Tasks</h2>"
    yield table("Scores of lm-evaluation-harness", ["", *(name for name, _ in measured)], rows)
    yield paragraph("± is the standard error over a task's examples.", soft=True)


def _provenance(found: Found) -> Iterator[str]:
    cache = found["teacher_cache"]
    rows = [
        ["held-out cache", f"{cache['path']} (fingerprint {cache['fingerprint']}, {cache['targets']} targets)"],
        ["text", f"{cache['dataset']}, split {cache['split']}"],
        *(
            [name, f"{model['model']}, {model['num_parameters']:,} parameters, {model['dtype']}"]
            for name, model in _labelled(found)
        ),
        *([name.replace("_", " "), f"{value:,}"] for name, value in found["phases"].items()),
        ["versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items())],
    ]
    yield "<h2>Where this comes from</h2>"
    yield table("", ["", "what"], [[escape(name), escape(value)] for name, value in rows], text_columns=[1])
