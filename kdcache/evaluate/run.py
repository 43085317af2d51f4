"""From options to what distillation bought: a table, and a page."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdcache.cache.commit import read_commits
from kdcache.cache.reader import CacheReader, open_cache
from kdcache.config import library_versions, read_mapping
from kdcache.errors import ConfigError
from kdcache.evaluate.generations import Prompts, answer_prompts, encode_prompts, read_prompts, side_by_side
from kdcache.evaluate.metrics import Metrics, evaluate_loaded, evaluate_teacher, load_student
from kdcache.evaluate.options import EvaluateOptions
from kdcache.evaluate.report import render
from kdcache.evaluate.strip import token_strip, typical_document
from kdcache.evaluate.summary import summarise
from kdcache.evaluate.tasks import Tasks, find_tasks, run_tasks
from kdcache.evaluate.teacher import TeacherStates
from kdcache.model_files import find_model, model_digest
from kdcache.models import (
    free_memory,
    keep_freed_memory,
    load_config,
    load_model,
    load_tokenizer,
    parse_dtype,
    pick_device,
)
from kdcache.progress import Progress

logger = logging.getLogger(__name__)
TRAIN_RESULTS, CURVES = "train_results.json", "metrics.jsonl"
CURVE_KEYS = ("loss", "cross_entropy", "eval_loss", "eval_cross_entropy")
MAX_CURVE_POINTS = 1000


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Measure teacher, students and baselines on a cache of held-out text, a model at a time.

    Returns:
        ``models`` (a dict each, teacher first), ``teacher_cache``, ``summary`` (see :func:`summarise`), ``phases`` (seconds, and bytes a
        token, where known), ``versions``; ``generations`` and ``tasks`` where they were asked for, and ``strip`` with a report: of the
        first model that has not diverged, whose ``role`` it names. The report is made of this alone.

    Raises:
        KDCacheError: No such cache or model, they do not belong together, or an option does not fit. Said before anything is
            measured where it can be known.
    """
    _check(options)
    tasks = find_tasks(options.tasks, options.task_limit) if options.tasks else None
    prompts = _read_prompts(options)
    keep_freed_memory()
    reader = open_cache(options.teacher_cache)
    states = TeacherStates(reader, pick_device(options.device))
    planned = [*(("student", name) for name in options.student), *(("baseline", name) for name in options.baseline)]
    planned += [("full", options.full)] if options.full else []
    rows: list[tuple[str, Metrics]] = []
    answers: dict[str, list[str]] = {}
    strip: dict[str, Any] | None = None
    with Progress("evaluate", len(reader) * (1 + len(planned))) as progress:

        def show(role: str) -> Callable[[int], None]:
            before = len(rows) * len(reader)
            return lambda done: progress.update(before + done, f"{role}, {done}/{len(reader)} sequences")

        rows.append(("teacher", evaluate_teacher(states, on_sequence=show("teacher"))))
        for role, name in planned:
            loaded = load_student(
                name, states, dtype=options.dtype or "float32", device_map=options.device_map,
                trust_remote_code=options.trust_remote_code,
            )  # fmt: skip
            metrics = evaluate_loaded(loaded, on_sequence=show(role))
            metrics.extra |= _training_record(name)
            if options.report is not None:
                metrics.extra |= {"curves": read_curves(Path(name) / CURVES)}
                if strip is None and not math.isnan(metrics.cross_entropy):
                    strip = {"role": role, **token_strip(loaded, typical_document(metrics))}
            if prompts is not None and role not in answers:
                answers[role] = answer_prompts(loaded.model, loaded.tokenizer, prompts, name)
            if tasks is not None:
                metrics.extra["tasks"] = run_tasks(loaded.model, loaded.tokenizer, tasks)
            rows.append((role, metrics))
            del loaded
            free_memory()
    if options.teacher is not None and (prompts is not None or tasks is not None):
        _ask_teacher(options, reader, rows[0][1], prompts, tasks, answers, states.device)
    found: dict[str, Any] = {
        "models": [{"role": role, **metrics.as_dict()} for role, metrics in rows],
        "teacher_cache": {"path": options.teacher_cache, "num_targets": reader.manifest.stats.num_targets,
                          "dump_seconds": round(sum(c.seconds for c in read_commits(reader.store)), 2),
                          "fingerprint": reader.manifest.fingerprint, "dataset": reader.spec.corpus.dataset,
                          "split": reader.spec.corpus.split, "targets": reader.spec.targets.scheme, "exact": states.exact,
                          "vocab_size": reader.vocab_size},
        "summary": summarise(rows, reader.vocab_size, options.num_resamples),
        "phases": _phases(rows),
        "versions": library_versions(),
    }  # fmt: skip
    if prompts is not None:
        found["generations"] = side_by_side(prompts, answers)
    if strip is not None:
        found["strip"] = strip
    if options.output is not None:
        Path(options.output).write_text(json.dumps(found, indent=2) + "\n")
    if options.report is not None:
        Path(options.report).write_text(render(found), encoding="utf-8")
    return found


def _check(options: EvaluateOptions) -> None:
    for name, path in (("report", options.report), ("output", options.output)):
        if path is not None and not Path(path).resolve().parent.is_dir():
            raise ConfigError(
                f"--{name} {path}: No such file or directory", hint=f"mkdir -p {Path(path).parent}, or another path"
            )
        if path is not None and Path(path).is_dir():
            raise ConfigError(f"--{name} {path}: a file was expected, found a folder", hint=f"{path}/{name}.html")
    if options.full is not None and not options.baseline:
        raise ConfigError(
            "--full is the far end of a gap that begins at a baseline, and none was given",
            hint="--baseline MODEL, a student of labels alone (train-student --alpha 0)",
        )


def _read_prompts(options: EvaluateOptions) -> Prompts | None:
    """The prompts, once it is known that every model that answers them has the room; of models only config and tokenizer are read."""
    if options.prompts is None:
        return None
    prompts = read_prompts(
        options.prompts, options.num_prompts, split=options.split, max_new_tokens=options.max_new_tokens, chat=options.chat,
        has_teacher=options.teacher is not None,
    )  # fmt: skip
    for name in filter(None, (options.student[0], *options.baseline[:1], options.full, options.teacher)):
        source = find_model(name)
        config = load_config(source, trust_remote_code=options.trust_remote_code)
        encode_prompts(prompts, load_tokenizer(source, trust_remote_code=options.trust_remote_code), config, name)
    return prompts


def _ask_teacher(
    options: EvaluateOptions,
    reader: CacheReader,
    metrics: Metrics,
    prompts: Prompts | None,
    tasks: Tasks | None,
    answers: dict[str, list[str]],
    device: str,
) -> None:
    """What the teacher itself answers, and how it does in the tasks."""
    assert options.teacher is not None, "asked where there is one"
    source = find_model(options.teacher)
    if (found := model_digest(source)) != reader.spec.teacher.digest:
        logger.warning(
            "%s (digest %s) is not the teacher of the cache, %s (digest %s): its answers stand beside another's distributions",
            options.teacher, found[:12], reader.spec.teacher.name, reader.spec.teacher.digest[:12],
        )  # fmt: skip
    config = load_config(source, trust_remote_code=options.trust_remote_code)
    dtype = parse_dtype(options.dtype or "auto", config)
    model = load_model(
        source, dtype=dtype, device=device, device_map=options.device_map, trust_remote_code=options.trust_remote_code
    )
    tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)
    if prompts is not None:
        answers |= {"teacher": answer_prompts(model, tokenizer, prompts, options.teacher)}
    if tasks is not None:
        metrics.extra["tasks"] = run_tasks(model, tokenizer, tasks)


def read_curves(file: Path) -> dict[str, list[list[float]]]:
    """Step and value of what ``train-student`` logged beside a student, thinned evenly where there is more than can be drawn.

    Lines that are none of its own are passed over: those of a killed run may be torn, and the file may be another program's.
    """
    if not file.is_file():
        return {}
    curves: dict[str, list[list[float]]] = {}
    for line in file.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int | float):
            continue
        for key in CURVE_KEYS:
            if isinstance(record.get(key), int | float):
                curves.setdefault(key, []).append([record["step"], record[key]])
    return {key: points[:: -(-len(points) // MAX_CURVE_POINTS)] for key, points in curves.items()}


class _Strict(BaseModel):
    """What is read as it stands: a number that is written as text is none."""

    model_config = ConfigDict(strict=True)


class _Objective(_Strict):
    alpha: float | str
    temperature: float | str


class _Cache(_Strict):
    dump_seconds: float
    num_positions: int
    bytes_per_token: float


class _Stage(_Strict):
    """What is told of a stage of a run."""

    tokens_per_second: float
    train_seconds: float
    objective: _Objective
    cache: _Cache


class _Record(_Stage):
    """What is told of a run, in the ``train_results.json`` of ``train-student``: of several stages, the last one's, and a list of them all."""

    stages: list[_Stage] = Field(default_factory=list)


def _training_record(name: str) -> dict[str, Any]:
    """What a folder made by ``train-student`` says about its training; nothing where the file is torn, or of another program.

    Of several stages: seconds and rate are of all together, the cache is that of the first that had a teacher.
    """
    record = read_mapping(Path(name) / TRAIN_RESULTS) or {}
    try:
        _Record.model_validate(record)
    except ValidationError:
        return {}
    objective = {name: record["objective"][name] for name in ("alpha", "temperature")}
    if not (stages := record.get("stages")):
        return {name: record[name] for name in ("tokens_per_second", "train_seconds", "cache")} | objective
    seconds = sum(stage["train_seconds"] for stage in stages)
    tokens = sum(stage["tokens_per_second"] * stage["train_seconds"] for stage in stages)
    taught = [stage for stage in stages if stage["objective"]["alpha"] != 0]
    return {
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "train_seconds": round(seconds, 2),
        "cache": (taught or stages)[0]["cache"],
        **objective,
        "stages": [{name: stage["objective"][name] for name in objective} for stage in stages],
    }


def _phases(rows: list[tuple[str, Metrics]]) -> dict[str, Any]:
    """Of several seeds the times are those of all together; of several caches that of the first row is told of, a student's where it has one."""
    phases: dict[str, Any] = {}
    for role, metrics in rows:
        if cache := metrics.extra.get("cache"):
            told = {
                "dump_seconds": cache["dump_seconds"],
                "dump_tokens_per_second": round(cache["num_positions"] / max(cache["dump_seconds"], 1e-9), 1),
                "bytes_per_token": cache["bytes_per_token"],
            }
            phases = told | phases
            key = f"train_{role}_seconds"
            phases[key] = round(phases.get(key, 0.0) + metrics.extra["train_seconds"], 2)
        key = f"evaluate_{role}_seconds"
        phases[key] = round(phases.get(key, 0.0) + metrics.seconds, 2)
    return phases
