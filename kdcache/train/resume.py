"""Going on with a run that was cut off: what must be as it was, from which checkpoint, and when not."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kdcache.cache.commit import current_manifest
from kdcache.cache.manifest import Manifest
from kdcache.cache.store import open_store
from kdcache.config import read_mapping, read_section
from kdcache.errors import CacheMismatchError, ConfigError, KDCacheError
from kdcache.train.options import TrainOptions

logger = logging.getLogger(__name__)

RESULTS = "train_results.json"
# As kdcache.config.run_files names them.
OPTIONS, PROVENANCE = "train-student.yaml", "train-student.provenance.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Options that may differ when a run is taken up again: they change where it looks, not what it computes.
FREE_TO_CHANGE = {
    "resume",
    "output",
    "report_to",
    "logging_steps",
    "save_steps",
    "eval_steps",
    "eval_cache",
    "chunk_positions",
}
# Options that may differ where their product over all ranks does not: which sequences make a step depends on that alone.
DEALT = ("per_device_train_batch_size", "gradient_accumulation_steps")
# Options that name caches of which sequences are trained on, and the one of held-out text.
TRAINED_ON = ("cache", "student_cache", "rollout_cache")
HELD_OUT = "eval_cache"
BEGIN_ANEW = "use another --output, or --no-resume to begin anew"

Contents = dict[str, dict[str, dict[str, Any]]]


def step_of(options: TrainOptions) -> dict[str, int]:
    """For the provenance: ranks, and sequences of an optimiser step over all of them."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    on_a_rank = math.prod(int(options.training.get(name, getattr(options, name))) for name in DEALT)
    return {"world_size": ranks, "sequences_per_step": on_a_rank * ranks}


def check_same_run(output: Path, options: TrainOptions) -> None:
    """Refuse to go on with other settings than the output was begun with.

    Raises:
        CacheMismatchError: Options differ that change what is computed, or the sequences of a step, however they are dealt to ranks.
    """
    if not options.resume:
        return
    before_file = output / OPTIONS
    if not before_file.is_file():
        return
    before = read_section(str(before_file), "train-student")
    now = yaml.safe_load(yaml.safe_dump(options.model_dump(mode="json", exclude_none=True, by_alias=True)))
    differing = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    dealt = [name for name in differing if name in DEALT]
    begun = read_mapping(output / PROVENANCE) or {}
    step, step_before = step_of(options), begun.get("sequences_per_step")
    of_one_size = step_before == step["sequences_per_step"] or (step_before is None and not dealt)
    done = read_mapping(output / RESULTS) is not None  # on how many ranks does not matter then
    lines = [
        f"\n  {name}: begun with {before.get(name)!r}, this run asks for {now.get(name)!r}"
        for name in differing
        if name not in FREE_TO_CHANGE and not (name in DEALT and of_one_size)
    ]
    if not of_one_size and not dealt and not done:
        lines.append(
            f"\n  sequences of a step: begun with {step_before} (on {begun.get('world_size')} ranks), this run asks for "
            f"{step['sequences_per_step']} (on {step['world_size']})"
        )
    if lines:
        raise CacheMismatchError(
            f"{output} holds a run with other settings:{''.join(lines)}",
            hint=BEGIN_ANEW,
        )


def check_student_stays(student: str, outputs: Iterable[Path]) -> None:
    """Refuse to begin anew with a student that would be removed first.

    Raises:
        ConfigError: It is a checkpoint in one of the outputs.
    """
    for output in outputs:
        if Path(student).expanduser().resolve() in {folder.resolve() for folder in checkpoints(output)}:
            raise ConfigError(
                f"--student {student} is a checkpoint in {output}, which --no-resume removes",
                hint="use another --output",
            )


def contents_of(manifests: Iterable[tuple[str, str, Manifest]]) -> Contents:
    """For the provenance: what the caches hold, by option and path.

    Args:
        manifests: Option, path and manifest of each.
    """
    contents: Contents = {}
    for option, path, manifest in manifests:
        contents.setdefault(option, {})[path] = {
            "fingerprint": manifest.fingerprint,
            "num_sequences": manifest.stats.num_sequences,
            "content_digest": manifest.content_digest,
        }
    return contents


def reachable_manifests(
    options: TrainOptions, names: Sequence[str] = TRAINED_ON
) -> Iterator[tuple[str, str, Manifest]]:
    """Option, path and manifest of the caches that can be read now: a student that is trained no longer needs any."""
    for option in names:
        for path in getattr(options, option):
            try:
                yield option, path, current_manifest(open_store(path))
            except KDCacheError as error:
                logger.debug("not compared with what the run was begun with: %s", error)


def check_same_contents(output: Path, contents: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Refuse to go on with caches that hold something else than when the output was begun: other sequences in another order, or other targets.

    A run without checkpoints has nothing to go on with. One of an earlier kdcache does not tell what its caches held.

    Raises:
        CacheMismatchError: A cache has grown, or was made anew in the same place.
    """
    if read_mapping(output / RESULTS) is None and not checkpoints(output):
        return
    if lines := _differences(output, contents):
        raise CacheMismatchError(
            f"{output} holds a run over caches that held something else:{''.join(lines)}", hint=BEGIN_ANEW
        )


def _begun(output: Path) -> Contents:
    """What the caches held, as far as the output tells."""
    found: Contents = (read_mapping(output / PROVENANCE) or {}).get("contents", {})
    return found


def _differences(output: Path, contents: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    begun = _begun(output)
    return [
        f"\n  --{option.replace('_', '-')} {path}: {name} was {before[name]}, is {now[name]}"
        for option, paths in contents.items()
        for path, now in paths.items()
        if (before := begun.get(option, {}).get(path)) is not None
        for name in now
        if before[name] != now[name]
    ]


def evaluated_otherwise(output: Path, options: TrainOptions) -> str:
    """On which held-out text the results of a finished run are, where that is not what is asked for now; empty where it is.

    A cache that cannot be read is taken to be what it was; so is one of which an earlier kdcache did not tell what it held.
    """
    before_file = output / OPTIONS
    if not before_file.is_file():
        return ""
    before = read_section(str(before_file), "train-student").get(HELD_OUT) or {}
    contents = contents_of(reachable_manifests(options, (HELD_OUT,)))
    if before == options.eval_cache:
        return "".join(_differences(output, contents))
    now, begun = contents.get(HELD_OUT, {}), _begun(output).get(HELD_OUT, {})
    held = [(weight, now.get(path)) for path, weight in options.eval_cache.items()]
    held_before = [(weight, begun.get(path)) for path, weight in before.items()]
    if held == held_before and all(one is not None for _, one in held):
        return ""  # the same under another path
    was, asked = (
        ", ".join(f"{path}:{weight:g}" for path, weight in one.items()) for one in (before, options.eval_cache)
    )
    return f"\n  --eval-cache: was {was or 'none'}, this asks for {asked or 'none'}"


def check_same_on_all_ranks(contents: Contents) -> None:
    """Refuse caches that grew while the ranks opened them: each would deal out other sequences, and they would wait for each other for good.

    Raises:
        CacheMismatchError: On every rank.
    """
    from accelerate.utils import gather_object

    seen = gather_object([contents])
    for rank, other in enumerate(seen):
        for option, paths in other.items():
            for path, now in paths.items():
                if now != (first := seen[0][option][path]):
                    raise CacheMismatchError(
                        f"--{option.replace('_', '-')} {path}: rank 0 found {first['num_sequences']} sequences, rank {rank} "
                        f"{now['num_sequences']}: the cache is being written",
                        hint="the same command again, or wait until the dump is done",
                    )


def check_in_order(outputs: Sequence[Path]) -> None:
    """Refuse to train a stage while a later one holds what came of it before: that would go on from a student that there is no more.

    Args:
        outputs: Of all stages.

    Raises:
        CacheMismatchError: A stage is not done, and a later one has results or checkpoints.
    """
    first = next((i for i, output in enumerate(outputs) if read_mapping(output / RESULTS) is None), len(outputs))
    for output in outputs[first + 1 :]:
        if read_mapping(output / RESULTS) is not None or checkpoints(output):
            raise CacheMismatchError(
                f"stage {first + 1} is not done ({outputs[first]} holds no results), and {output} holds a later stage, which began with "
                "another student than the one that would be trained now",
                hint="--no-resume begins all stages anew; or use another --output",
            )


def check_no_others(output: Path, arguments: Any) -> None:
    """Refuse to write checkpoints beside a folder that is none and is named as if it were.

    transformers' Trainer, when it makes room for its own, removes what begins with ``checkpoint-``, whatever follows. Where it makes none, or keeps
    all, nothing is at risk.

    Args:
        output: Of the run.
        arguments: Its ``TrainingArguments``.

    Raises:
        ConfigError: There is such a folder.
    """
    if arguments.save_strategy == "no" or (arguments.save_total_limit or 0) <= 0:
        return
    others = [f.name for f in output.glob("checkpoint-*") if f.is_dir() and not CHECKPOINT.fullmatch(f.name)]
    if others:
        raise ConfigError(
            f"{output / min(others)} is no checkpoint of a run (checkpoint-NUMBER), and transformers' Trainer would remove it "
            "to make room for one",
            hint="rename it, or use another --output",
        )


def checkpoints(output: Path) -> list[Path]:
    """Those of a run, oldest first."""
    found = [(match, folder) for folder in output.glob("checkpoint-*") if (match := CHECKPOINT.fullmatch(folder.name))]
    return [folder for _, folder in sorted((int(match[1]), folder) for match, folder in found) if folder.is_dir()]


def last_checkpoint(output: Path) -> str | None:
    """The newest checkpoint whose writing was finished: its ``trainer_state.json``, written last, can be read."""
    for folder in reversed(checkpoints(output)):
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            logger.warning("%s was not finished; going on from the one before", folder)
            continue
        return str(folder)
    return None


def asked_for_checkpoints(options: TrainOptions) -> bool:
    """Whether someone wants them besides going on from them: by ``save_steps``, or by any such option of ``training``."""
    return "save_steps" in options.model_fields_set or any(
        name.startswith("save_") or name == "load_best_model_at_end" for name in options.training
    )


def remove_checkpoints(output: Path) -> None:
    """All of a run."""
    for folder in checkpoints(output):
        shutil.rmtree(folder)


def begin_anew(outputs: Iterable[Path]) -> None:
    """Remove what a later run would take for its own: that a run is done, its checkpoints, and what it was asked for."""
    for output in outputs:
        (output / RESULTS).unlink(missing_ok=True)
        remove_checkpoints(output)
        for name in (OPTIONS, PROVENANCE):
            (output / name).unlink(missing_ok=True)
