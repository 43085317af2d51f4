"""From options to a trained student folder: check, train or go on, save, describe."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.cache.commit import check_no_cache
from kdcache.cache.reader import CacheReader
from kdcache.config import check_options, parse_weighted, read_mapping, replace_file, write_provenance
from kdcache.errors import ConfigError, KDCacheError
from kdcache.heads import check_packing
from kdcache.model_files import find_model
from kdcache.models import keep_freed_memory, load_model, load_tokenizer, pick_device, quiet_progress
from kdcache.train.card import describe_cache, model_card
from kdcache.train.checks import StageCaches, check_reads, check_recipe, check_sequences
from kdcache.train.lora import add_lora, check_lora
from kdcache.train.options import TWO_TEXT_LOSSES, TrainOptions
from kdcache.train.resume import (
    RESULTS,
    asked_for_checkpoints,
    begin_anew,
    check_in_order,
    check_no_others,
    check_same_contents,
    check_same_on_all_ranks,
    check_same_run,
    check_student_stays,
    contents_of,
    evaluated_otherwise,
    last_checkpoint,
    reachable_manifests,
    remove_checkpoints,
    step_of,
)

logger = logging.getLogger(__name__)

# What the results of a run of several stages tell of each.
TOLD_OF_A_STAGE = (
    "objective", "cache", "other_caches", "student_caches", "mix", "seed", "steps", "train_tokens", "train_seconds", "tokens_per_second",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What came of a training run: ``results`` as written to ``train_results.json``.

    Its ``train_tokens`` are those of the sequences trained on, each as often as it was, over all ranks, before and after a resume: counted
    as ``num_positions`` of a cache are, prompts too, padding not. ``tokens_per_second`` and ``train_seconds`` are of this run alone.
    Of several stages they are those of the last, whose ``stages`` tell of each, itself too. Where all was done already, ``evaluated_otherwise``
    says on which held-out text, if that is not the one that is asked for.
    """

    results: dict[str, Any]
    already_done: bool = False
    evaluated_otherwise: str = ""


def train(options: TrainOptions) -> TrainResult:
    """Run phase 2, all its stages; running it again goes on from the last checkpoint, or says that all is done.

    Raises:
        CacheMismatchError: Cache and student do not belong together, or the output holds another run.
        KDCacheError: Anything else that a user can meet.
    """
    check_no_cache(options.output)
    stages = stages_of(options)
    if not options.resume:
        check_student_stays(options.student, [Path(stage.output) for stage in stages])
    if len(stages) > 1:
        check_stages(stages)
    earlier: list[dict[str, Any]] = []
    for number, stage in enumerate(stages, start=1):
        if len(stages) > 1:
            logger.info("stage %d of %d, in %s", number, len(stages), stage.output)
        result = train_stage(stage, stages[number:], earlier)
        earlier.append(result.results)
    return result


def stages_of(options: TrainOptions) -> list[TrainOptions]:
    """The options of each stage: those of the one before (:func:`carried_over`), but for what ``then`` says, and its student.

    The last stage has the output; those before it ``stage-1`` and so on inside.

    Raises:
        ConfigError: A stage has an option that there is not, or one that is not a stage's to decide.
    """
    values = options.model_dump(exclude={"then"}, exclude_unset=True)
    stages: list[TrainOptions] = []
    for number, changed in enumerate([{}, *options.then]):
        if taken := [name for name in ("student", "output", "then", "resume") if name in changed]:
            raise ConfigError(
                f"--then: {taken[0]} is not for a stage to choose: it goes on with the student of the one before"
            )
        if number:
            values = carried_over(stages[-1], values, changed) | changed | {"student": stages[-1].output}
        last = number == len(options.then)
        values["output"] = options.output if last else str(Path(options.output) / f"stage-{number + 1}")
        stages.append(check_options(TrainOptions, "train-student", values, f" (stage {number + 1})" if changed else ""))
    return stages


def carried_over(before: TrainOptions, values: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """What was asked of a stage and holds for the next: not arguments of a loss that is another now, nor text and shares that went with it.

    Nor does ``max_steps``, which would win, where the next names ``num_train_epochs``.

    Args:
        before: The stage.
        values: What was asked of it.
        changed: What is asked of the next.
    """
    gone = set()
    loss = changed.get("loss", before.loss)
    if loss != before.loss:
        gone.add("loss_args")
    if before.student_cache and loss not in TWO_TEXT_LOSSES:
        gone |= {"student_cache", "rollout_cache", "mix"}
    if "cache" in changed and _caches(changed["cache"]) != before.cache:
        gone.add("mix")
    if "num_train_epochs" in changed:
        gone.add("max_steps")
    return {name: value for name, value in values.items() if name not in gone}


def _caches(given: Any) -> Any:
    try:
        return parse_weighted(given)
    except ValueError:  # said where the options of the stage are checked
        return None


def check_stages(stages: Sequence[TrainOptions]) -> None:
    """Refuse, before the first stage trains, what a later one would be refused for; stages that are done are left alone.

    Whether the student can read the caches of all stages is known once it is loaded, see :func:`train_stage`.

    Raises:
        KDCacheError: As the stage itself would say it, with its number; or a later stage holds what came of a student that is to be
            trained again.
    """
    adapter: dict[str, Any] = {}  # that the stage before will leave
    for number, stage in enumerate(stages, start=1):
        try:
            check_same_run(Path(stage.output), stage)
            if stage.resume and read_mapping(Path(stage.output) / RESULTS) is not None:
                continue
            check_no_others(Path(stage.output), training_arguments(stage))
            check_sequences(stage, check_recipe(stage))
            if stage.lora:
                check_lora(stage.lora, adapter)
            adapter = stage.lora
        except KDCacheError as error:
            raise type(error)(f"stage {number}: {error.message}", hint=error.hint) from error
    if stages[0].resume:
        check_in_order([Path(stage.output) for stage in stages])


def train_stage(
    options: TrainOptions, later: Sequence[TrainOptions] = (), earlier: Sequence[dict[str, Any]] = ()
) -> TrainResult:
    """Run one stage; running it again goes on from the last checkpoint, or says that all is done.

    Args:
        options: Of the stage.
        later: Options of the stages after it: the student has to read their caches too, and they begin anew where this one does.
        earlier: Results of those before it.

    Raises:
        CacheMismatchError: Cache and student do not belong together, or the output holds another run.
        KDCacheError: Anything else that a user can meet.
    """
    output = Path(options.output)
    check_same_run(output, options)
    if options.resume and (done := read_mapping(output / RESULTS)) is not None:
        check_same_contents(output, contents_of(reachable_manifests(options)))
        return TrainResult(done, already_done=True, evaluated_otherwise=evaluated_otherwise(output, options))
    found = check_recipe(options)
    contents = contents_of(found.trained_on(options))
    if options.resume:
        check_same_contents(output, contents)
    check_sequences(options, found)
    reader = found.caches[0][0]

    import torch
    from transformers import PrinterCallback, set_seed

    from kdcache.train.trainer import Checkpoints, KDTrainer, MetricsFile, ProgressLine

    keep_freed_memory()
    source = find_model(options.student)
    tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)
    arguments = training_arguments(options)
    check_no_others(output, arguments)
    adapter = source.adapter if options.lora else None  # trained on, where adapters are asked for; else merged
    model = load_model(
        dataclasses.replace(source, adapter=None) if adapter else source,
        dtype=torch.float32,
        attention=options.attention,
        trust_remote_code=options.trust_remote_code,
    )
    read = [(stage.attention, one) for stage in later for one in StageCaches.of(stage).read]
    read = [*((options.attention, one) for one in found.read), *read]
    check_reads(model, tokenizer, [one for _, one in read])
    if any(one.spec.corpus.packing and attention == options.attention for attention, one in read):
        check_packing(model)
    _warn_about_sizes(reader, sum(p.numel() for p in model.parameters()))
    set_seed(options.seed)
    if options.lora:
        model = add_lora(model, options.lora, options.student, adapter)
    trainer = KDTrainer(
        model,
        arguments,
        found.caches,
        eval_cache=found.eval_caches or None,
        alpha=options.alpha,
        temperature=options.temperature,
        loss=options.loss,
        loss_args=options.loss_args,
        mix=options.mix,
        student_cache=found.student_caches,
        rollout_cache=found.rollout_caches,
        chunk_positions=options.chunk_positions,
        processing_class=tokenizer,
        callbacks=[MetricsFile(output / "metrics.jsonl"), Checkpoints()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressLine(trainer))
    trainer.accelerator.wait_for_everyone()  # all ranks have looked at what the folder held
    check_same_on_all_ranks(contents)
    if trainer.is_world_process_zero():
        if not options.resume:  # else a later run that is told to resume would take up the one before
            begin_anew([output, *(Path(stage.output) for stage in later)])
        told = {**step_of(options), "contents": contents | contents_of(found.held_out(options))}
        write_provenance(output, "train-student", "train-student", options, str(arguments.device), **told)
    checkpoint = last_checkpoint(output) if options.resume else None
    if checkpoint:
        logger.info("going on from %s", checkpoint)
    started = time.monotonic()
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.monotonic() - started
    evaluation = trainer.evaluate() if found.eval_caches else {}
    with quiet_progress():
        trainer.save_model(str(output))
    results = {
        "student": options.student,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": outcome.global_step,
        "resumed": checkpoint is not None,
        "train_loss": outcome.training_loss,
        "train_seconds": round(seconds, 2),
        "train_tokens": trainer.state.num_input_tokens_seen,
        "tokens_per_second": round(trainer.num_tokens_seen / seconds, 1),
        **evaluation,
        "cache": describe_cache(reader),
        "other_caches": [
            describe_cache(cache) | ({} if options.mix else {"weight": w}) for cache, w in found.caches[1:]
        ],
        **({"mix": options.mix} if options.mix else {}),
        **(
            {"student_caches": [describe_cache(cache) for cache in found.student_caches]}
            if found.student_caches
            else {}
        ),
        **_last_staleness(trainer.state.log_history),
        "objective": {
            "loss": options.loss,
            "loss_args": options.loss_args,
            "alpha": options.alpha if trainer.recipe.uses_teacher else 0.0,
            "temperature": options.temperature,
        },
        "seed": options.seed,
    }
    if earlier:
        results["stages"] = [{n: one[n] for n in TOLD_OF_A_STAGE if n in one} for one in [*earlier, results]]
    if trainer.is_world_process_zero():
        (output / "README.md").write_text(model_card(options, results))
        replace_file(output / RESULTS, json.dumps(results, indent=2) + "\n")
        if not asked_for_checkpoints(options):  # made to go on from, and there is no more to do
            remove_checkpoints(output)
    trainer.accelerator.wait_for_everyone()  # the first rank wrote what the next stage reads
    return TrainResult(results)


def _last_staleness(logs: list[dict[str, Any]]) -> dict[str, float]:
    """How far the student had come from those that wrote the rollouts: nats a token, as the log said last."""
    said = [log["staleness"] for log in logs if "staleness" in log]
    return {"staleness": said[-1]} if said else {}


def training_arguments(options: TrainOptions) -> Any:
    """TrainingArguments from ours and from ``training``.

    Raises:
        ConfigError: ``training`` names something that TrainingArguments does not have, or that is ours to set.
    """
    from transformers import TrainingArguments

    given: dict[str, Any] = {
        "output_dir": options.output,
        "learning_rate": options.learning_rate,
        "num_train_epochs": options.num_train_epochs,
        "max_steps": options.max_steps,
        "per_device_train_batch_size": options.per_device_train_batch_size,
        "per_device_eval_batch_size": options.per_device_train_batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "warmup_steps": options.warmup_steps,
        "lr_scheduler_type": options.lr_scheduler_type,
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        "bf16": options.bf16,
        "seed": options.seed,
        "data_seed": options.seed,
        "eval_strategy": "steps" if options.eval_steps and options.eval_cache else "no",
        "eval_steps": options.eval_steps,
        "save_strategy": "steps" if options.save_steps else "no",
        "save_steps": options.save_steps or 500,
        "save_total_limit": 2,
        "logging_steps": options.logging_steps,
        "report_to": [] if options.report_to == "none" else options.report_to.split(","),
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cpu": pick_device() == "cpu",
    }
    _check_loggers(given["report_to"])
    if options.gradient_checkpointing:
        names = {field.name for field in dataclasses.fields(TrainingArguments)}
        if "activation_checkpointing" in names:
            given["activation_checkpointing"] = True
        else:  # reentrant ones, once the default, give no gradient where only adapters are trained
            given |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    try:
        return TrainingArguments(**(given | options.training))
    except TypeError as error:
        raise ConfigError(
            f"training: {str(error).replace('TrainingArguments.__init__() ', '')}",
            hint="training takes the options of transformers.TrainingArguments",
        ) from error
    except (ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(f"training: {str(error).splitlines()[0]}") from error


def _check_loggers(names: list[str]) -> None:
    """Refuse a logger that transformers does not know, or whose package is missing, before anything is loaded."""
    from transformers.integrations import get_reporting_integration_callbacks

    for name in names:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ValueError, RuntimeError, ImportError) as error:
            raise ConfigError(
                f"report_to {name}: {str(error).splitlines()[0]}", hint=f"pip install {name}, or --report-to none"
            ) from error


def _warn_about_sizes(reader: CacheReader, num_parameters: int) -> None:
    ratio = reader.spec.teacher.num_parameters / max(num_parameters, 1)
    if ratio > 30:
        logger.warning(
            "the teacher is %.0f times the student; past about 30 a teacher of middle size in between often serves better",
            ratio,
        )
