"""Tasks of lm-evaluation-harness: by name, or YAML files of one's own, which run without a network over local data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from kdcache.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, eq=False)
class Tasks:
    """Tasks that lm-eval knows.

    Attributes:
        names: Of the tasks.
        manager: lm-eval's TaskManager.
        limit: Examples of each, or None for all.
    """

    names: Sequence[str]
    manager: Any
    limit: int | None


def find_tasks(given: Sequence[str], limit: int | None) -> Tasks:
    """Look tasks up, before anything is measured.

    Args:
        given: Names, or paths of YAML files.
        limit: Examples of each, or None for all.

    Raises:
        ConfigError: lm-eval is not installed, does not know a task, or a file holds none.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            "tasks need the lm-eval package, which is not installed", hint="pip install 'kdcache[eval]'"
        ) from error
    files = [Path(name) for name in given if name.endswith((".yaml", ".yml"))]
    names = [_name_in(Path(name)) if Path(name) in files else name for name in given]
    folders = sorted({str(file.parent.resolve()) for file in files})
    manager = TaskManager(include_path=folders or None, include_defaults=len(files) < len(given))
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            raise ConfigError(
                f"task {name}: lm-eval does not know it",
                hint="lm-eval ls tasks lists what it knows; a task of your own is named by its YAML file",
            )
    return Tasks(names, manager, limit)


def _name_in(file: Path) -> str:
    try:
        # Tasks may hold tags such as !function: only the name is looked for here, lm-eval reads the rest.
        found = yaml.load(file.read_text(), Loader=yaml.BaseLoader)
        return str(found["task"])
    except OSError as error:
        raise ConfigError(f"task file {file}: {error.strerror}") from error
    except (yaml.YAMLError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise ConfigError(f"task file {file}: YAML with a name under task: was expected ({error})") from error


def run_tasks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Tasks) -> dict[str, dict[str, Any]]:
    """Scores of a loaded model.

    Returns:
        By task: by metric ``value`` and ``stderr`` (None where lm-eval gives none).

    Raises:
        ConfigError: A task's data cannot be read.
    """
    from datasets.exceptions import DatasetsError
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    try:
        found = simple_evaluate(
            wrapped, tasks=list(tasks.names), task_manager=tasks.manager, limit=tasks.limit, log_samples=False, bootstrap_iters=100,
        )  # fmt: skip
    except (OSError, DatasetsError) as error:
        raise ConfigError(
            f"tasks {', '.join(tasks.names)}: their data cannot be read: {str(error).splitlines()[0]}",
            hint="tasks by name take their data from the hub; a YAML file can name local files (dataset_path: json)",
        ) from error
    return {name: _scores(scores) for name, scores in found["results"].items()}


def _scores(scores: dict[str, Any]) -> dict[str, Any]:
    """``acc,none`` and ``acc_stderr,none`` as one."""
    out = {}
    for key, value in scores.items():
        metric, _, kept = key.partition(",")
        if isinstance(value, int | float) and kept and not metric.endswith("_stderr"):
            error = scores.get(f"{metric}_stderr,{kept}")
            shown = metric if kept == "none" else f"{metric} ({kept})"
            out[shown] = {"value": float(value), "stderr": float(error) if isinstance(error, int | float) else None}
    return out
