"""Options of ``kdcache plan``: those of the dump that it plans, and how it is planned. Schemes by name, as ``top_k:64``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from kdcache.config import Temperatures, check_options
from kdcache.dump.options import DumpOptions
from kdcache.errors import ConfigError

COMPARED = ("top_k:16", "top_k:64", "top_k:128", "sampled:50", "systematic:25", "hidden")
# What the numbers of a scheme's name are.
NUMBERS: dict[str, dict[str, type[int] | type[float]]] = {
    "top_k": {"top_k": int},
    "top_p": {"top_p": float, "top_k": int},
    "sampled": {"num_draws": int},
    "systematic": {"num_draws": int},
    "hybrid": {"top_k": int, "num_draws": int},
    "hidden": {},
}


def _split(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


class PlanOptions(DumpOptions):
    """A dump as it would be, and what is to be found out about it."""

    command: ClassVar[str] = "plan"

    teacher: Annotated[
        str,
        Field(description="As for dump-teacher. Without weights at hand: --teacher-config."),
    ] = ""
    dataset: Annotated[str, Field(description="As for dump-teacher. Without one at hand: --positions.")] = ""
    output: Annotated[
        str, Field(description="Where the cache is going to be: its disk is asked, nothing is written.")
    ] = "cache"

    pilot_sequences: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(description="Sequences that the teacher reads.  [default: 200, or a quarter of a smaller corpus]"),
    ] = None
    count: Annotated[
        Literal["auto", "all", "sample"],
        Field(
            description="Tokens of the corpus: count them all, or in shards spread evenly over it, with the error said; auto counts all up to "
            "20 million."
        ),
    ] = "auto"
    compare: Annotated[
        list[str] | None,
        BeforeValidator(_split),
        Field(
            title="SCHEME[:SIZE]",
            description="A scheme to hold beside the chosen one: top_k:K, top_p:P, sampled:N, systematic:N, hybrid:K:N or hidden; can be given "
            f"again.  [default: {', '.join(COMPARED)}]",
        ),
    ] = None
    student: Annotated[str | None, Field(description="Student: a few of its steps are measured.")] = None
    num_train_epochs: Annotated[float, Field(gt=0, description="Passes over the cache of one student run.")] = 1.0
    max_steps: Annotated[
        int, Field(description="Optimiser steps of one student run; above 0 they say how many passes it makes.")
    ] = -1
    per_device_train_batch_size: Annotated[int, Field(ge=1, description="Sequences of a student's micro-batch.")] = 8
    gradient_accumulation_steps: Annotated[int, Field(ge=1, description="Micro-batches of an optimiser step.")] = 1
    train_temperatures: Annotated[
        Temperatures | None, Field(description="Temperatures at which students are to train, as 1,2.")
    ] = None
    num_students: Annotated[int, Field(ge=1, description="Student runs to add up.")] = 8
    price_per_hour: Annotated[
        Annotated[float, Field(gt=0)] | None, Field(description="Of one GPU, or of this machine where there is none.")
    ] = None

    teacher_config: Annotated[
        str | None, Field(description="Folder or config.json of a teacher that is not here: nothing is run.")
    ] = None
    student_config: Annotated[str | None, Field(description="The same of a student.")] = None
    positions: Annotated[
        Annotated[int, Field(ge=1)] | None, Field(description="Of --teacher-config: tokens of the corpus.")
    ] = None
    tokens_per_second: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Field(
            description="Of --teacher-config: what one teacher reads.  [default: from FLOPs, --peak-tflops and --mfu]"
        ),
    ] = None
    peak_tflops: Annotated[float, Field(gt=0, description="Of one GPU, dense, in the teacher's dtype.")] = 989.0
    mfu: Annotated[float, Field(gt=0, le=1, description="Share of these that the teacher's forward pass uses.")] = 0.4
    gpus_per_teacher: Annotated[int, Field(ge=1, description="Of --teacher-config: GPUs that share one teacher.")] = 1
    teacher_split: Annotated[
        Literal["layers", "tensor"],
        Field(
            description="How they share it: layers, which take turns, so that the rate is that of one GPU (dump-teacher --device-map); tensor, all "
            "at once."
        ),
    ] = "layers"
    gpus_per_student: Annotated[
        int, Field(ge=1, description="GPUs that share one student (FSDP), each with a micro-batch of its own.")
    ] = 1
    gpu_memory: Annotated[float, Field(gt=0, description="Of one GPU, in GiB.")] = 80.0
    bytes_from: Annotated[
        str | None,
        Field(
            description="Of --teacher-config: what kdcache plan --json said of a pilot of another teacher.  [default: measured on SmolLM2]"
        ),
    ] = None

    @model_validator(mode="after")
    def _something_to_plan(self) -> Self:
        for scheme in self.compare or ():
            parse_scheme(scheme)
        if self.teacher_config is None:
            if not self.teacher or not self.dataset:
                raise ValueError(
                    "--teacher and --dataset are needed; or, with neither at hand, --teacher-config and --positions"
                )
            if self.positions or self.student_config or self.tokens_per_second or self.bytes_from:
                raise ValueError(
                    "--positions, --student-config, --tokens-per-second and --bytes-from go with --teacher-config; here they are measured"
                )
        elif self.teacher or self.dataset or self.student:
            raise ValueError("with --teacher-config nothing is run: leave --teacher, --dataset and --student out")
        elif self.positions is None:
            raise ValueError("--teacher-config needs --positions, the tokens of the corpus")
        return self

    @property
    def sequences_per_step(self) -> int:
        """Of a student's optimiser step, over all of its GPUs."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.gpus_per_student

    def passes(self, num_sequences: int) -> float:
        """Over the corpus, of one student run: steps win over epochs, as in TrainingArguments. A pass is whole steps."""
        if self.max_steps <= 0:
            return self.num_train_epochs
        whole, rest = divmod(self.max_steps, -(-num_sequences // self.sequences_per_step))
        return whole + rest * self.sequences_per_step / num_sequences

    def dump_options(self, scheme: str | None = None) -> DumpOptions:
        """The dump that is planned, or the same with another scheme.

        Raises:
            ConfigError: There is no such scheme, or it does not fit the other options.
        """
        given = {name: getattr(self, name) for name in DumpOptions.model_fields if name in self.model_fields_set}
        given |= {"teacher": self.teacher or "TEACHER", "dataset": self.dataset or "DATASET", "output": self.output}
        if scheme is not None:
            given |= parse_scheme(scheme)
            if given["targets"] not in ("sampled", "systematic"):
                given.pop("entry_logprobs", None)
        return check_options(DumpOptions, "plan", given)


def parse_scheme(text: str) -> dict[str, Any]:
    """``top_k:64`` as ``{"targets": "top_k", "top_k": 64}``.

    Raises:
        ConfigError: Not a scheme, or not its numbers.
    """
    scheme, *numbers = text.strip().split(":")
    known = NUMBERS.get(scheme)
    hint = "top_k:64, top_p:0.95, sampled:50, systematic:25, hybrid:16:16, hidden"
    if known is None:
        raise ConfigError(f"--compare {text}: there is no scheme {scheme!r}", hint=hint)
    try:
        if len(numbers) > len(known):
            raise ValueError(f"{len(known)} numbers at most")
        named = zip(known.items(), numbers, strict=False)
        return {"targets": scheme, **{name: kind(number) for (name, kind), number in named}}
    except ValueError as error:
        raise ConfigError(f"--compare {text}: {error}", hint=hint) from error


def scheme_name(options: DumpOptions) -> str:
    """``top_k:64`` of a dump."""
    parts = [getattr(options, name) for name in NUMBERS[options.targets]]
    return ":".join([options.targets, *(f"{part:g}" if isinstance(part, float) else str(part) for part in parts)])


def warn_of_temperatures(options: PlanOptions, declared: tuple[float, ...]) -> list[str]:
    """What there is to say where students are to train at temperatures that the dump does not declare.

    Args:
        options: Of the plan.
        declared: By the dump that is planned.
    """
    wanted = options.train_temperatures or ()
    missing = [f"{t:g}" for t in wanted if t not in declared]
    if not missing or options.targets == "hidden":
        return []
    return [
        f"students are to train at T = {', '.join(missing)}, and the dump declares {', '.join(f'{t:g}' for t in declared)}: no later "
        f"step can make up for that; --temperatures {','.join(f'{t:g}' for t in sorted({*declared, *wanted}))}"
    ]


def command_line(options: DumpOptions) -> str:
    """The ``kdcache dump-teacher`` that was planned: every option that somebody has set."""
    words = ["kdcache", "dump-teacher"]
    for name in DumpOptions.model_fields:
        value = getattr(options, name)
        if name not in options.model_fields_set or value is None:
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, Mapping):
            words += [word for path, weight in value.items() for word in (f"--{flag}", f"{path}:{weight:g}")]
        else:
            many = isinstance(value, tuple)
            words += [f"--{flag}", ",".join(f"{part:g}" for part in value) if many else str(value)]
    return shlex.join(words)
