"""From options to the table that says what distillation bought."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdcache.cache.commit import read_commits
from kdcache.cache.reader import open_cache
from kdcache.evaluate.metrics import Metrics, TeacherStates, evaluate_model, evaluate_teacher
from kdcache.evaluate.options import EvaluateOptions
from kdcache.models import keep_freed_memory, pick_device
from kdcache.progress import Progress

TRAIN_RESULTS = "train_results.json"


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Measure teacher, student and baseline on a ``hidden`` cache, a model at a time.

    Returns:
        ``models`` (a dict each, teacher first), ``teacher_cache``, ``phases`` (seconds, and bytes a token, where known).

    Raises:
        KDCacheError: No such cache or model, or they do not belong together.
    """
    keep_freed_memory()
    reader = open_cache(options.teacher_cache)
    states = TeacherStates(reader, pick_device(options.device))
    named = {"student": options.student, "baseline": options.baseline}
    models = {role: name for role, name in named.items() if name is not None}
    with Progress("evaluate", len(reader) * (1 + len(models))) as progress:

        def show(role: str, before: int) -> Callable[[int], None]:
            return lambda done: progress.update(before + done, f"{role}, {done}/{len(reader)} sequences")

        rows = [("teacher", evaluate_teacher(states, on_sequence=show("teacher", 0)))]
        for role, name in models.items():
            on_sequence = show(role, len(rows) * len(reader))
            metrics = evaluate_model(name, states, trust_remote_code=options.trust_remote_code, on_sequence=on_sequence)
            metrics.extra |= _training_record(name)
            rows.append((role, metrics))
            gc.collect()
    report = {
        "models": [{"role": role, **metrics.as_dict()} for role, metrics in rows],
        "teacher_cache": {"path": options.teacher_cache, "num_targets": reader.manifest.stats.num_targets,
                          "dump_seconds": round(sum(c.seconds for c in read_commits(reader.store)), 2)},
        "phases": _phases(rows),
    }  # fmt: skip
    if options.output is not None:
        Path(options.output).write_text(json.dumps(report, indent=2) + "\n")
    return report


def _training_record(name: str) -> dict[str, Any]:
    """What a folder made by ``train-student`` says about its training."""
    file = Path(name) / TRAIN_RESULTS
    if not file.is_file():
        return {}
    record = json.loads(file.read_text())
    return {
        "tokens_per_second": record["tokens_per_second"],
        "train_seconds": record["train_seconds"],
        "alpha": record["objective"]["alpha"],
        "temperature": record["objective"]["temperature"],
        "cache": record["cache"],
    }


def _phases(rows: list[tuple[str, Metrics]]) -> dict[str, Any]:
    phases: dict[str, Any] = {}
    for role, metrics in rows:
        if cache := metrics.extra.get("cache"):
            phases["dump_seconds"] = cache["dump_seconds"]
            phases["dump_tokens_per_second"] = round(cache["num_positions"] / max(cache["dump_seconds"], 1e-9), 1)
            phases["bytes_per_token"] = cache["bytes_per_token"]
            phases[f"train_{role}_seconds"] = metrics.extra["train_seconds"]
        phases[f"evaluate_{role}_seconds"] = round(metrics.seconds, 2)
    return phases
