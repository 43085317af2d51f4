"""``kdcache sweep``: many students from one cache or a few, one table, one plot, and what caching has saved.

Every student is an ordinary run of ``kdcache train-student`` in a folder of its own, which can be taken up again, looked at and used
like any other; a run that fails, of whatever error, does not end the others. What a sweep adds is the grid, the evaluation of all students
on the same text, and the sums.

**What is saved** is said from measured times alone: the seconds of the dump, and the tokens that the students were trained on. Distilling
live, the teacher reads each of these tokens once for each student. A dump's seconds are also those of selecting and encoding what is
kept, which a live teacher is spared, and what the teacher alone took is not recorded: so that all this is said as "at most".
"""

from __future__ import annotations

import json
import logging
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import xxhash
import yaml
from pydantic import BeforeValidator, Field

from kdcache.cache.commit import read_commits
from kdcache.cache.reader import open_cache
from kdcache.cache.transcode import TranscodeOptions, transcode
from kdcache.config import Options, check_options, read_mapping, replace_file
from kdcache.errors import ConfigError, KDCacheError
from kdcache.evaluate.bootstrap import deviation
from kdcache.evaluate.page import number
from kdcache.evaluate.plots import Point, Series, category_axis, line_plot, number_axis
from kdcache.progress import Progress
from kdcache.train.options import TrainOptions
from kdcache.train.run import RESULTS, stages_of, train

logger = logging.getLogger(__name__)
EVALUATION = "evaluation.json"
# Where less is better; of all others more is.
LESS_IS_BETTER = ("perplexity", "cross_entropy", "forward_kl", "reverse_kl", "calibration_error", "loss")
OURS = ("output", "seed", "resume")
# Not options of train-student: what a cache is cut down to, and what its spec calls that.
CUTS = {"top_k": "k", "top_p": "top_p"}
# To YAML 1.1 these are text, for want of a point or of a sign.
EXPONENTIAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def _parse_grid(value: Any) -> Any:
    """``{"alpha": "0.5,0.7"}`` as well as lists."""
    if not isinstance(value, Mapping):
        return value
    grid: dict[str, list[Any]] = {}
    for name, given in ((str(name).replace("-", "_"), given) for name, given in value.items()):
        if name in grid:
            raise ValueError(f"{name} is given twice")
        many = [yaml.safe_load(part) for part in given.split(",")] if isinstance(given, str) else given
        grid[name] = [_as_number(one) for one in (many if isinstance(many, list) else [many])]
    return grid


def _as_number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and EXPONENTIAL.fullmatch(value) else value


class SweepOptions(Options):
    """What is varied, and what is not."""

    output: Annotated[str, Field(description="Folder of the students, the table and the plot.")]
    grid: Annotated[
        dict[str, Annotated[list[Any], Field(min_length=1)]],
        BeforeValidator(_parse_grid),
        Field(
            min_length=1,
            description="Values of an option of train-student, as alpha=0.5,0.7; or top_k=64,32 and top_p=0.9,0.95, which make smaller caches first; cache=A,B compares caches, of other target schemes too. Can be "
            "given again: every combination is trained.",
        ),
    ]
    train: Annotated[
        dict[str, Any],
        Field(
            default_factory=dict,
            description="Any other option of train-student, the same for all: cache=C, student=S ... With --config its section "
            "train-student is taken first.",
        ),
    ]
    seeds: Annotated[int, Field(ge=1, description="Students of each combination, with seeds 0, 1, ...")] = 1
    teacher_cache: Annotated[
        str | None,
        Field(
            description="A hidden cache of held-out text: every student is evaluated on it, exactly. Without it eval_cache serves."
        ),
    ] = None
    metric: Annotated[str, Field(description="What the table is sorted by and the plot shows.")] = "forward_kl"


@dataclass(frozen=True, slots=True)
class Student:
    """One run of a sweep.

    Attributes:
        point: Grid option to value.
        seed: Of the run.
        folder: Its output.
        options: Of ``train-student``.
        caches: That it learns from, before they were cut down.
    """

    point: dict[str, Any]
    seed: int
    folder: Path
    options: TrainOptions
    caches: tuple[str, ...]


def sweep(options: SweepOptions) -> dict[str, Any]:
    """Train, evaluate and sum up; running it again does what is left.

    Returns:
        ``points`` (best first; each with its values, metrics and their spread), ``failed``, ``cost``. Also in ``sweep.json``.

    Raises:
        ConfigError: An option that train-student does not have, a value that does not fit, or nothing to compare the students by, before
            anything is trained.
        CacheError: A cache cannot be read, or cut down as the grid asks.
    """
    output = Path(options.output)
    if options.teacher_cache is not None:
        from kdcache.evaluate.teacher import check_measurable

        check_measurable(open_cache(options.teacher_cache))
    students = list(plan_students(options))
    for student in students:
        check_metric(options.metric, measured_of(student, options.teacher_cache))
    output.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    with Progress("sweep", len(students)) as progress:
        for number, student in enumerate(students):
            progress.update(number, f"{number}/{len(students)} students, now {student.folder.name}")
            error = train_one(student) or evaluate_one(student, options.teacher_cache)
            if error:
                failed[student.folder.name] = error
    done = [student for student in students if student.folder.name not in failed]
    points = summarise(done, options.metric, options.teacher_cache)
    found = {"metric": options.metric, "points": points, "failed": failed, "cost": cost(done)}
    replace_file(output / "sweep.json", json.dumps(found, indent=2) + "\n")
    if points:
        (output / "sweep.svg").write_text(plot(points, list(options.grid), options.metric))
    return found


# --- what is trained --------------------------------------------------------------------------------------------------


def plan_students(options: SweepOptions) -> Iterator[Student]:
    """Every combination and seed, checked; caches that the grid asks for are made."""
    for name in [*options.grid, *options.train]:
        if name not in TrainOptions.model_fields and name not in CUTS:
            check_options(TrainOptions, "train-student", {name: None})
    if taken := [name for name in options.grid if name in OURS or name in options.train]:
        raise ConfigError(
            f"--grid {taken[0]}: set once for all, or by the sweep itself",
            hint=f"leave it out of --train {taken[0]}" if taken[0] in options.train else "--seeds N varies the seed",
        )
    cut: dict[str, str] = {}  # by the name of its folder
    for values in product(*options.grid.values()):
        point = dict(zip(options.grid, values, strict=True))
        given = options.train | {name: value for name, value in point.items() if name not in CUTS}
        whole = given.get("cache")
        if any(name in point for name in CUTS):
            given["cache"] = _cut_down(options, whole, point, cut)
        for seed in range(options.seeds):
            name = "_".join([*(f"{key}={_named(key, value)}" for key, value in point.items()), f"seed={seed}"])
            folder = Path(options.output) / "students" / name.replace("/", "-").replace(":", "-")
            resolved = check_options(TrainOptions, "train-student", given | {"output": str(folder), "seed": seed})
            if seed == 0:
                check_recipe(resolved)
            caches = tuple(resolved.cache) if given.get("cache") == whole else (str(whole),)
            yield Student(point, seed, folder, resolved, caches)


def check_recipe(options: TrainOptions) -> None:
    """Refuse what a run would refuse once its turn comes: a loss, schedule or temperature that its caches cannot give.

    Raises:
        KDCacheError: As ``train-student`` says it.
    """
    from kdcache.train.recipe import Recipe

    recipe = Recipe.of(options.alpha, options.temperature, options.loss, options.loss_args)
    caches, held_out = (
        [(open_cache(path, allow_incomplete=options.allow_incomplete), weight) for path, weight in paths.items()]
        for paths in (options.cache, options.eval_cache)
    )
    own, rollouts = ([open_cache(p) for p in paths] for paths in (options.student_cache, options.rollout_cache))
    recipe.check(caches, held_out, own, rollouts, mixed=bool(options.mix))


def measured_of(student: Student, teacher_cache: str | None) -> set[str]:
    """Names of what will be known of a student once it is trained, see :func:`metrics_of`."""
    if teacher_cache is not None:
        from kdcache.evaluate.metrics import Metrics

        named = Metrics("", 0).as_dict().items()
        return {name for name, value in named if isinstance(value, int | float)} | {
            "tokens_per_second",
            "train_seconds",
        }
    from kdcache.train.objective import PARTS
    from kdcache.train.recipe import Recipe

    options = stages_of(student.options)[-1]
    if not options.eval_cache:
        return set()
    names = {"loss", "perplexity", "calibration_error", *PARTS} - {"divergence", "staleness", "rollout_share"}
    if any(open_cache(path).spec.targets.frequencies for path in [*options.cache, *options.eval_cache]):
        names.remove("acceptance_rate")
    return names | {Recipe.of(options.alpha, options.temperature, options.loss, options.loss_args).measured}


def check_metric(metric: str, known: set[str]) -> None:
    """Refuse to sort students by what is not known of them.

    Raises:
        ConfigError: It is not.
    """
    if metric not in known:
        raise ConfigError(
            f"--metric {metric}: what is known of the students is {', '.join(sorted(known)) or 'nothing'}",
            hint="--teacher-cache CACHE, or --train eval_cache=CACHE, measures them on held-out text",
        )


def _cut_down(options: SweepOptions, cache: Any, point: dict[str, Any], made: dict[str, str]) -> str:
    """The cache of a point of the grid, which keeps fewer entries; made where that is not done."""
    axes = [name for name in CUTS if name in point]
    if not isinstance(cache, str):
        raise ConfigError(f"--grid {axes[0]}: one cache to cut down was expected", hint="--train cache=CACHE")
    targets = open_cache(cache).spec.targets
    wanted = {name: point[name] for name in axes if point[name] != getattr(targets, CUTS[name])}
    if not wanted:
        return cache
    parts = [_named("cache", cache)] if "cache" in options.grid else []
    name = "_".join([*parts, *(f"{axis}-{_spelled(value)}" for axis, value in wanted.items())]).replace("/", "-")
    if name not in made:
        made[name] = str(Path(options.output) / "caches" / name)
        transcode(check_options(TranscodeOptions, "transcode", {"cache": cache, "output": made[name], **wanted}))
    return made[name]


def _named(axis: str, value: Any) -> str:
    """A value of the grid in the name of a folder; of a cache its last part, and something of the rest that tells namesakes apart."""
    if axis != "cache":
        return _spelled(value)
    return f"{Path(str(value)).name}-{xxhash.xxh64_hexdigest(str(value).encode())[:6]}"


def train_one(student: Student) -> str | None:
    """Train it, unless that is done; why it failed, or None."""
    return _without_ending(lambda: train(student.options))


def evaluate_one(student: Student, teacher_cache: str | None) -> str | None:
    """Evaluate it, unless that is done; why it failed, or None."""
    from kdcache.evaluate.options import EvaluateOptions
    from kdcache.evaluate.run import evaluate

    file = student.folder / EVALUATION
    if teacher_cache is None or ((read_mapping(file) or {}).get("teacher_cache") or {}).get("path") == teacher_cache:
        return None
    options = EvaluateOptions(student=(str(student.folder),), teacher_cache=teacher_cache)
    return _without_ending(lambda: replace_file(file, json.dumps(evaluate(options), indent=2) + "\n"))


def _without_ending(job: Callable[[], object]) -> str | None:
    """Run it; what it said where it failed. What it held is given back, so that the next begins as the first did."""
    from kdcache.models import free_memory

    try:
        job()
    except KDCacheError as error:
        return error.message
    except Exception as error:  # whatever it is, memory that ran out as a rule, the others can still be trained
        logger.warning("a run of the sweep failed", exc_info=True)
        return f"{type(error).__name__}: {error}"
    finally:
        free_memory()
    return None


# --- what came of it --------------------------------------------------------------------------------------------------


def metrics_of(student: Student, teacher_cache: str | None) -> dict[str, float]:
    """What is known of a trained student: measured exactly where there is a teacher_cache, else on its eval_cache."""
    if teacher_cache is not None:
        models = json.loads((student.folder / EVALUATION).read_text())["models"]
        found = next(model for model in models if model["role"] == "student")
    else:
        results = json.loads((student.folder / RESULTS).read_text())
        found = {name.removeprefix("eval_"): value for name, value in results.items() if name.startswith("eval_")}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def summarise(students: list[Student], metric: str, teacher_cache: str | None) -> list[dict[str, Any]]:
    """Means and standard deviations over seeds, best first; those that have diverged come last.

    Raises:
        ConfigError: No student has that metric.
    """
    grouped: dict[str, list[Student]] = {}
    for student in students:
        grouped.setdefault(json.dumps(student.point), []).append(student)
    points: list[dict[str, Any]] = []
    for group in grouped.values():
        measured = [metrics_of(student, teacher_cache) for student in group]
        names = [name for name in measured[0] if all(name in other for other in measured)]
        values = {name: [one[name] for one in measured] for name in names}
        points.append({
            "point": group[0].point,
            "seeds": len(group),
            "mean": {name: statistics.fmean(some) for name, some in values.items()},
            "deviation": {name: deviation(some) if len(some) > 1 else 0.0 for name, some in values.items()},
        })  # fmt: skip
    for one in points:
        check_metric(metric, set(one["mean"]))
    sign = 1 if metric in LESS_IS_BETTER else -1
    return sorted(points, key=lambda one: (math.isnan(one["mean"][metric]), sign * one["mean"][metric]))


def cost(students: list[Student]) -> dict[str, Any]:
    """What the teacher took once, and what it would have taken beside each student at most.

    Returns:
        ``num_students``, ``train_tokens``, ``num_dumps``; and where the caches were dumped, not made of others: ``dump_seconds``,
        ``teacher_tokens_per_second`` (of the dumps, all that they do), ``live_teacher_seconds`` and ``saved_seconds`` (both at most),
        ``break_even_students`` (at least).
    """
    if not students:
        return {}
    readers = {path: open_cache(path) for path in sorted({path for student in students for path in student.caches})}
    tokens = [json.loads((student.folder / RESULTS).read_text())["train_tokens"] for student in students]
    made = {"num_students": len(students), "train_tokens": sum(tokens), "num_dumps": len(readers)}
    if any(reader.spec.transcoded_from is not None for reader in readers.values()):
        return made  # what the teacher took is known where the cache was dumped
    dumped = {path: sum(commit.seconds for commit in read_commits(reader.store)) for path, reader in readers.items()}
    positions = {path: max(reader.manifest.stats.num_positions, 1) for path, reader in readers.items()}
    seconds = sum(dumped.values())
    rate = sum(positions.values()) / max(seconds, 1e-9)
    # Several teachers read a token each; of several texts it is in one.
    live = sum(
        trained * (max if student.options.mix else sum)(dumped[path] / positions[path] for path in student.caches)
        for trained, student in zip(tokens, students, strict=True)
    )
    return made | {
        "dump_seconds": round(seconds, 1),
        "teacher_tokens_per_second": round(rate, 1),
        "live_teacher_seconds": round(live, 1),
        "saved_seconds": round(live - seconds, 1),
        "break_even_students": math.ceil(seconds / (live / len(students))) if live else None,
    }


# --- shown ------------------------------------------------------------------------------------------------------------


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
        rows.append([*(_spelled(one["point"][axis]) for axis in axes), *cells])
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


def _spelled(value: Any) -> str:
    return f"{value:.12g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def plot(points: list[dict[str, Any]], axes: list[str], metric: str) -> str:
    """An SVG: the metric over the first option that varies, a line for each combination of the others, spread over seeds as bars."""
    axis = next((name for name in axes if len({json.dumps(one["point"][name]) for one in points}) > 1), axes[0])
    ordered = sorted(points, key=lambda one: _order(one["point"][axis]))
    places = list(dict.fromkeys(_spelled(one["point"][axis]) for one in ordered))
    lines: dict[str, list[Point]] = {}
    for one in ordered:
        name = ", ".join(f"{key} {_spelled(value)}" for key, value in one["point"].items() if key != axis)
        mean, spread = one["mean"][metric], one["deviation"][metric]
        place = places.index(_spelled(one["point"][axis]))
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
