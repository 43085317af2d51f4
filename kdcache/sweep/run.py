"""``kdcache sweep``: many students from one cache or a few, one table, one plot, and what caching has saved.

Every student is an ordinary run of ``kdcache train-student`` in a folder of its own, which can be taken up again, looked at and used
like any other; a run that fails, of whatever error, does not end the others. What a sweep adds is the grid, the evaluation of all students
on the same text, and the sums. An evaluation is done again unless it was of the same bytes of the held-out cache and of the same run; without a
``teacher_cache`` it is part of the training, and a student that was held against another ``eval_cache`` fails by name, for it has no place in the table.

**What is saved** is said from measured times alone: the seconds of the dump, and the tokens that the students were trained on. Distilling
live, the teacher reads each of these tokens once for each student. A dump's seconds are also those of selecting and encoding what is
kept, which a live teacher is spared, and what the teacher alone took is not recorded: so that all this is said as "at most".
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdcache.cache.commit import read_commits
from kdcache.cache.manifest import to_json
from kdcache.cache.reader import open_cache
from kdcache.cache.shard import digest
from kdcache.config import read_mapping, replace_file
from kdcache.errors import CacheMismatchError, ConfigError, KDCacheError
from kdcache.evaluate.bootstrap import deviation
from kdcache.progress import Progress
from kdcache.sweep.grid import Student, SweepOptions, plan_students
from kdcache.sweep.shown import plot
from kdcache.train.resume import RESULTS
from kdcache.train.run import stages_of, train

logger = logging.getLogger(__name__)
EVALUATION = "evaluation.json"
# Where less is better; of all others more is.
LESS_IS_BETTER = ("perplexity", "cross_entropy", "forward_kl", "reverse_kl", "calibration_error", "loss")


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
    measured_on = ""  # digest of the manifest: of the cache's fingerprint and of every committed shard
    if options.teacher_cache is not None:
        from kdcache.evaluate.teacher import check_measurable

        reader = open_cache(options.teacher_cache)
        check_measurable(reader)
        measured_on = digest(to_json(reader.manifest))
    students = list(plan_students(options))
    for student in students:
        check_metric(options.metric, measured_of(student, options.teacher_cache))
    output.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    with Progress("sweep", len(students)) as progress:
        for number, student in enumerate(students):
            progress.update(number, f"{number}/{len(students)} students, now {student.folder.name}")
            error = train_one(student, options.teacher_cache) or evaluate_one(
                student, options.teacher_cache, measured_on
            )
            if error:
                failed[student.folder.name] = error
    done = [student for student in students if student.folder.name not in failed]
    points = summarise(done, options.metric, options.teacher_cache)
    found = {"metric": options.metric, "points": points, "failed": failed, "cost": cost(done)}
    replace_file(output / "sweep.json", json.dumps(found, indent=2) + "\n")
    if points:
        (output / "sweep.svg").write_text(plot(points, list(options.grid), options.metric))
    return found


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


def train_one(student: Student, teacher_cache: str | None) -> str | None:
    """Train it, unless that is done; why it failed, or None. Without a teacher_cache it is compared by what training evaluated at its end."""
    return _without_ending(lambda: _train_and_hold(student, on_eval_cache=teacher_cache is None))


def _train_and_hold(student: Student, *, on_eval_cache: bool) -> None:
    result = train(student.options)
    if on_eval_cache and result.evaluated_otherwise:
        raise CacheMismatchError(
            f"it was trained and evaluated when the held-out text was another:{result.evaluated_otherwise}",
            hint=f"remove {student.folder}, and it is trained and evaluated anew; or --teacher-cache CACHE evaluates all students on one text",
        )


def evaluate_one(student: Student, teacher_cache: str | None, measured_on: str) -> str | None:
    """Evaluate it, unless that is done: of this very run, and on these very bytes; why it failed, or None."""
    from kdcache.evaluate.options import EvaluateOptions
    from kdcache.evaluate.run import evaluate

    if teacher_cache is None:
        return None
    file = student.folder / EVALUATION
    made_of = {"teacher_cache": measured_on, "student": digest((student.folder / RESULTS).read_bytes())}
    if (read_mapping(file) or {}).get("made_of") == made_of:
        return None
    options = EvaluateOptions(student=(str(student.folder),), teacher_cache=teacher_cache)
    return _without_ending(
        lambda: replace_file(file, json.dumps(evaluate(options) | {"made_of": made_of}, indent=2) + "\n")
    )


def _without_ending(job: Callable[[], object]) -> str | None:
    """Run it; what it said where it failed. What it held is given back, so that the next begins as the first did."""
    from kdcache.models import free_memory

    try:
        job()
    except KDCacheError as error:
        return str(error)
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
    stages = [stage for student in students for stage in _read_tokens(student)]
    readers = {path: open_cache(path) for path in sorted({path for _, paths, _ in stages for path in paths})}
    tokens = sum(trained for trained, _, _ in stages)
    made = {"num_students": len(students), "train_tokens": tokens, "num_dumps": len(readers)}
    if any(reader.spec.transcoded_from is not None for reader in readers.values()):
        return made  # what the teacher took is known where the cache was dumped
    dumped = {path: sum(commit.seconds for commit in read_commits(reader.store)) for path, reader in readers.items()}
    positions = {path: max(reader.manifest.stats.num_positions, 1) for path, reader in readers.items()}
    seconds = sum(dumped.values())
    rate = sum(positions.values()) / max(seconds, 1e-9)
    # Several teachers read a token each; of several texts it is in one.
    live = sum(
        trained * (max if mixed else sum)(dumped[path] / positions[path] for path in paths)
        for trained, paths, mixed in stages
    )
    return made | {
        "dump_seconds": round(seconds, 1),
        "teacher_tokens_per_second": round(rate, 1),
        "live_teacher_seconds": round(live, 1),
        "saved_seconds": round(live - seconds, 1),
        "break_even_students": math.ceil(seconds / (live / len(students))) if live else None,
    }


def _read_tokens(student: Student) -> list[tuple[int, tuple[str, ...], bool]]:
    """Of each stage that its record tells of: tokens trained on, caches before they were cut down, and whether these are of several texts."""
    results = json.loads((student.folder / RESULTS).read_text())
    told = results.get("stages", [results])
    return [
        (
            one["train_tokens"],
            student.caches if stage.cache == student.options.cache else tuple(stage.cache),
            bool(stage.mix),
        )
        for one, stage in zip(told, stages_of(student.options)[-len(told) :], strict=True)
    ]
