"""Options of ``kdcache train-student`` and ``kdcache init-student``: names, defaults, meaning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from kdcache.config import Options, Paths, Shares, Stages, WeightedPaths
from kdcache.train.schedule import parse_schedule

# The keys of kdcache.train.losses.LOSSES, which imports torch.
LOSS_NAMES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_kl",
    "skew_reverse_kl",
    "tv",
    "akl",
    "taid",
    "logit_mse",
    "ce",
)
# Losses that also read text that the student wrote, on which another objective counts.
TWO_TEXT_LOSSES = ("contrastive", "minillm")


def _number_or_schedule(value: Any) -> Any:
    schedule = parse_schedule(value)
    return schedule.values[0] if schedule.kind == "constant" else str(schedule)


Scheduled = Annotated[str | float, BeforeValidator(_number_or_schedule)]


class TrainOptions(Options):
    """What a training run does.

    The first block is kdcache's; the second are the usual options of ``transformers.TrainingArguments`` under their usual
    names. ``training`` takes any other of them.
    """

    cache: Annotated[
        WeightedPaths,
        Field(
            min_length=1,
            description="Cache to train from; give it again for several teachers over the same text, each with a weight, or for several texts, "
            "whose shares --mix gives.",
        ),
    ]
    student: Annotated[str, Field(description="Student: hub name, model folder or .gguf file.")]
    output: Annotated[str, Field(description="Folder of the trained student.")]
    eval_cache: Annotated[
        WeightedPaths,
        Field(
            default_factory=dict,
            description="Cache of held-out text, evaluated at the end and every --eval-steps; several as for --cache.",
        ),
    ]
    mix: Annotated[
        Shares,
        Field(
            default_factory=dict,
            title="NAME:SHARE,...",
            description="Shares of tokens of several texts, as teacher:0.7,real:0.3: by who wrote a cache's text (real, teacher, student), or "
            "by a cache's path.",
        ),
    ]
    alpha: Annotated[
        Scheduled,
        Field(
            description="Weight of the teacher: (1 - alpha) CE + alpha T^2 D. 0 trains on labels alone. Also a schedule: "
            "linear:A:B, cosine:A:B, wsd:A:B:C."
        ),
    ] = 0.7
    temperature: Annotated[
        Scheduled,
        Field(description="T, one that the cache declares; a schedule moves through those that it declares."),
    ] = 1.0
    loss: Annotated[
        str,
        Field(
            description="Divergence between teacher and student: " + ", ".join([*LOSS_NAMES, *TWO_TEXT_LOSSES]) + "."
        ),
    ] = "forward_kl"
    loss_args: Annotated[
        dict[str, Scheduled],
        Field(default_factory=dict, description="Argument of the loss, as beta=0.3 (jsd); can be given again."),
    ]
    student_cache: Annotated[
        Paths,
        Field(
            default_factory=list,
            title="CACHE",
            description="Cache of text that the student wrote, for --loss contrastive (--cache has the teacher's) and minillm (--cache has real "
            "text). Can be given again.",
        ),
    ]
    rollout_cache: Annotated[
        Paths,
        Field(
            default_factory=list,
            title="CACHE",
            description="Cache that generate made with the student as the model: with which probability it wrote its text. Needed by minillm; "
            "otherwise it tells how stale rollouts are. Can be given again, in the order of rounds.",
        ),
    ]
    then: Annotated[
        Stages,
        Field(
            default_factory=list,
            title="'OPTION=VALUE ...'",
            description="Go on with the student that comes out, under other options: a second stage, as 'cache=TASK alpha=0 max_steps=100'. Can be "
            "given again. Other options are those of the stage before, but --loss-args go with its loss, --mix with its caches, --max-steps where "
            "num_train_epochs is named. All stages are checked before the first trains. Earlier ones are kept in OUTPUT/stage-1, ...",
        ),
    ]
    lora: Annotated[
        dict[str, Any],
        Field(
            default_factory=dict,
            description="Train adapters and keep the student's weights: r=16 or any other field of peft.LoraConfig; can be "
            "given again. A student that is an adapter is trained on, with its own fields. Needs kdcache[lora].",
        ),
    ]
    attention: Annotated[
        str, Field(description="attn_implementation of transformers; auto is what it takes for the model.")
    ] = "auto"
    chunk_positions: Annotated[
        Annotated[int, Field(ge=1)] | None, Field(description="Positions whose logits may exist at a time.")
    ] = None
    allow_incomplete: Annotated[
        bool,
        Field(
            description="Train from a cache that is still being made, from what it holds at the start. Once it has grown, the run cannot go on from a "
            "checkpoint."
        ),
    ] = False
    trust_remote_code: Annotated[bool, Field(description="Run code that ships with the model.")] = False
    resume: Annotated[
        bool, Field(description="Go on from the last checkpoint in --output; --no-resume begins anew.")
    ] = True

    learning_rate: Annotated[float, Field(gt=0, description="Peak learning rate.")] = 5e-4
    num_train_epochs: Annotated[float, Field(gt=0, description="Passes over the cache.")] = 1.0
    max_steps: Annotated[int, Field(description="Optimiser steps; above 0 it wins over epochs.")] = -1
    per_device_train_batch_size: Annotated[int, Field(ge=1, description="Sequences of a micro-batch.")] = 8
    gradient_accumulation_steps: Annotated[int, Field(ge=1, description="Micro-batches of an optimiser step.")] = 1
    warmup_steps: Annotated[int, Field(ge=0, description="Steps of warm-up.")] = 0
    lr_scheduler_type: Annotated[str, Field(description="cosine, linear, constant_with_warmup ...")] = "cosine"
    weight_decay: Annotated[float, Field(ge=0, description="AdamW weight decay.")] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0, description="Gradient clipping.")] = 1.0
    bf16: Annotated[bool, Field(description="bfloat16 autocast over float32 weights.")] = False
    gradient_checkpointing: Annotated[bool, Field(description="Trade time for memory in the trunk.")] = False
    seed: Annotated[int, Field(description="Of order, dropout and initial weights.")] = 0
    eval_steps: Annotated[Annotated[int, Field(ge=1)] | None, Field(description="Evaluate every so many steps.")] = None
    save_steps: Annotated[
        int,
        Field(
            ge=0,
            description="Checkpoint every so many steps, the two newest are kept, and stay when all is done if this is given; 0 makes none.",
        ),
    ] = 500
    logging_steps: Annotated[int, Field(ge=1, description="Log every so many steps.")] = 10
    report_to: Annotated[str, Field(description="tensorboard, wandb, trackio (comma-separated) or none.")] = "none"
    training: Annotated[
        dict[str, Any],
        Field(
            default_factory=dict, description="Any other option of transformers.TrainingArguments (config file only)."
        ),
    ]


class InitOptions(Options):
    """How a student begins: a teacher cut in depth or width, or random weights of a given shape; the teacher's tokenizer."""

    from_: Annotated[str, Field(alias="from", description="Teacher that gives layers or config, and the tokenizer.")]
    output: Annotated[str, Field(description="Folder of the new student.")]
    layers: Annotated[
        Annotated[int, Field(ge=1)] | None, Field(description="Layers to keep, chosen by angular distance.")
    ] = None
    hidden_size: Annotated[
        Annotated[int, Field(ge=1)] | None, Field(description="Hidden channels to keep, chosen by activation.")
    ] = None
    intermediate_size: Annotated[
        Annotated[int, Field(ge=1)] | None, Field(description="MLP neurons of a layer to keep, chosen by activation.")
    ] = None
    num_attention_heads: Annotated[
        Annotated[int, Field(ge=1)] | None, Field(description="Query heads of a layer to keep, chosen by activation.")
    ] = None
    num_key_value_heads: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(description="Key/value heads of a layer to keep; as many as whole groups need unless given."),
    ] = None
    shape: Annotated[
        dict[str, Any] | None,
        Field(description="Config fields of a student with random weights, as field=value; can be given again."),
    ] = None
    calibration: Annotated[
        str, Field(description="Text on which layers, channels, neurons and heads are compared.")
    ] = "builtin:python-reference"
    calibration_tokens: Annotated[int, Field(ge=16, description="Tokens of it.")] = 4096
    seed: Annotated[int, Field(description="Of order, dropout and initial weights.")] = 0
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], Field(description="Of the saved weights.")] = (
        "float32"
    )
    trust_remote_code: Annotated[bool, Field(description="Run code that ships with the model.")] = False
