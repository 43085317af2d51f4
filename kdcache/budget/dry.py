"""A budget without weights: from configs, a number of tokens, a rate that somebody knows or that follows from FLOPs.

For jobs whose teacher is not at hand. Bytes a token are those of a pilot of another teacher; everything that is not exact says where
it comes from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kdcache.budget.costs import Costs, check_disk
from kdcache.budget.footprint import BYTES, Shape, read_shape
from kdcache.budget.options import PlanOptions, command_line, scheme_name, warn_of_temperatures
from kdcache.dump.options import DEFAULT_SHARD_POSITIONS
from kdcache.errors import ConfigError

GIB = 1 << 30
# Whole files over all positions: English text, V = 49,152, quality standard, id tables by the token before (corpora above two million tokens).
MEASURED = {"top_k:64": 80.0, "top_k:128": 148.0, "sampled:50": 26.4, "systematic:25": 18.6, "systematic:50": 27.7}
MEASURED_ON = (
    "SmolLM2-135M on English text, 49,152 tokens; ids of a vocabulary of 128,000 take up to 0.2 bytes more an entry"
)


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """One part of what a GPU holds, in bytes; ``exact`` or an estimate."""

    what: str
    num_bytes: int
    exact: bool


@dataclass(frozen=True, slots=True)
class ModelBudget:
    """One model on GPUs.

    Attributes:
        name: Of its config.
        shape: Its numbers.
        dtype: Of its weights.
        num_gpus: That share it.
        lines: What each of them holds.
        fewest_gpus: On which it would fit; None where activations alone are too much for one.
        kv_bytes: Of one GPU, that keys and values of a batch would take besides: kdcache generate keeps them, a dump does not.
    """

    name: str
    shape: Shape
    dtype: str
    num_gpus: int
    lines: list[MemoryLine]
    fewest_gpus: int | None
    kv_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Of one GPU."""
        return sum(line.num_bytes for line in self.lines)


@dataclass(frozen=True, slots=True)
class DryBudget:
    """What ``kdcache plan --teacher-config`` has found out.

    Attributes:
        teacher: Reading.
        student: Training, or None.
        positions: Tokens of the corpus.
        num_shards: Of about 65,536 tokens, or as asked.
        scheme: The chosen one.
        bytes_per_token: Of schemes.
        bytes_source: Where these are from.
        tokens_per_second: Of one teacher.
        rate_source: Where that is from.
        num_gpus: Of all teachers together.
        wall_seconds: Of the dump.
        costs: Over GPU seconds.
        epochs: Passes of a student run over the corpus; of max_steps as if its sequences were full.
        price_per_hour: Of a GPU, or None.
        warnings: What should be known.
        command: The dump.
    """

    teacher: ModelBudget
    student: ModelBudget | None
    positions: int
    num_shards: int
    scheme: str
    bytes_per_token: dict[str, float]
    bytes_source: str
    tokens_per_second: float
    rate_source: str
    num_gpus: int
    wall_seconds: float
    costs: Costs
    epochs: float
    price_per_hour: float | None
    warnings: list[str]
    command: str


def plan_dry(options: PlanOptions) -> DryBudget:
    """Compute a budget; no weights are loaded and nothing is run.

    Raises:
        ConfigError: A config or a table of bytes that cannot be read.
        ModelError: No such model.
    """
    assert options.teacher_config is not None and options.positions is not None, "checked by the options"
    shape = read_shape(options.teacher_config)
    dump_options = options.dump_options()
    if options.gpus_per_teacher > 1:
        dump_options = dump_options.model_copy(update={"device_map": "auto", "workers": 1})
    dtype = shape.dtype if options.dtype == "auto" else options.dtype
    dtype = dtype if dtype in BYTES else "float32"
    learner = None if options.student_config is None else read_shape(options.student_config)
    for who, context in (("teacher", shape.context), ("student", learner.context if learner else None)):
        if context is not None and options.seq_len > context:
            raise ConfigError(
                f"--seq-len {options.seq_len} is longer than the {who}'s context of {context} tokens",
                hint=f"--seq-len {context}",
            )
    sizes, source = _bytes_table(options)
    sizes["hidden"] = 2.0 * shape.hidden_size if dtype != "float32" else 4.0 * shape.hidden_size
    name = scheme_name(dump_options)
    if name not in sizes:
        raise ConfigError(
            f"{name}: nothing is known of its bytes a token; known are {', '.join(sizes)}",
            hint="kdcache plan --json of a pilot on any teacher with --compare, and --bytes-from its output",
        )
    if options.tokens_per_second:
        rate, rate_source = options.tokens_per_second, "as given"
    else:
        flops = shape.forward_flops(options.seq_len)
        busy = options.gpus_per_teacher if options.teacher_split == "tensor" else 1
        rate = busy * options.peak_tflops * 1e12 * options.mfu / flops
        rate_source = f"{flops / 1e9:,.1f} GFLOP a token at {options.mfu:.0%} of {busy} x {options.peak_tflops:g} TFLOP/s, not measured"
    num_gpus = options.workers * options.gpus_per_teacher
    passes = options.passes(-(-options.positions // options.seq_len))
    gpu_seconds = options.positions / rate * options.gpus_per_teacher
    teacher = _teacher(options, shape, dtype)
    student = None if learner is None else _student(options, learner)
    student_seconds = None
    if student is not None:  # forward and backward: three times the forward pass
        flops = 3 * student.shape.forward_flops(options.seq_len)
        student_seconds = options.positions * passes * flops / (options.peak_tflops * 1e12 * options.mfu)
    return DryBudget(
        teacher=teacher,
        student=student,
        positions=options.positions,
        num_shards=-(-options.positions // (options.shard_positions or DEFAULT_SHARD_POSITIONS)),
        scheme=name,
        bytes_per_token={one: sizes[one] for one in (name, *(options.compare or sizes)) if one in sizes},
        bytes_source=source,
        tokens_per_second=rate,
        rate_source=rate_source,
        num_gpus=num_gpus,
        wall_seconds=options.positions / rate / options.workers,
        costs=Costs(gpu_seconds, gpu_seconds * passes, student_seconds),
        epochs=passes,
        price_per_hour=options.price_per_hour,
        warnings=_warnings(options, teacher, student)
        + warn_of_temperatures(options, dump_options.target_spec(shape.vocab_size).temperatures)
        + check_disk(options.output, {one: round(sizes[one] * options.positions) for one in (name, *sizes)}),
        command=command_line(dump_options),
    )


def _bytes_table(options: PlanOptions) -> tuple[dict[str, float], str]:
    if options.bytes_from is None:
        return dict(MEASURED), MEASURED_ON
    try:
        told = json.loads(Path(options.bytes_from).read_text())
        sizes = {str(one["estimate"]["name"]): float(one["estimate"]["bytes_per_token"]) for one in told["schemes"]}
        return sizes, f"a pilot of {told['teacher']} ({options.bytes_from})"
    except OSError as error:
        raise ConfigError(
            f"--bytes-from {options.bytes_from}: {error.strerror}", hint="kdcache plan --json > FILE"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--bytes-from {options.bytes_from}: not what kdcache plan --json says", hint="kdcache plan --json > FILE"
        ) from error


def _teacher(options: PlanOptions, shape: Shape, dtype: str) -> ModelBudget:
    gpus = options.gpus_per_teacher
    activations = shape.reading_bytes(options.batch_tokens, dtype)
    lines = [
        MemoryLine(f"weights, {dtype}, split over {gpus}", shape.weight_bytes(dtype) // gpus, True),
        MemoryLine(
            f"activations of {options.batch_tokens:,} tokens, logits of {min(4096, options.batch_tokens):,}",
            activations,
            False,
        ),
    ]
    room = options.gpu_memory * GIB - activations
    return ModelBudget(
        str(options.teacher_config), shape, dtype, gpus, lines,
        -(-shape.weight_bytes(dtype) // int(room)) if room > 0 else None,
        kv_bytes=shape.kv_bytes(dtype) * options.batch_tokens // gpus,
    )  # fmt: skip


def _student(options: PlanOptions, shape: Shape) -> ModelBudget:
    gpus, tokens = options.gpus_per_student, options.per_device_train_batch_size * options.seq_len
    state, activations = shape.step_bytes(tokens, gpus)
    lines = [
        MemoryLine(f"weights, gradients, AdamW in float32, split over {gpus}", state, True),
        MemoryLine(f"activations of {tokens:,} tokens with checkpointing, logits", activations, False),
    ]
    room = options.gpu_memory * GIB - activations
    fewest = -(-shape.step_bytes(tokens, 1)[0] // int(room)) if room > 0 else None
    return ModelBudget(str(options.student_config), shape, "float32", gpus, lines, fewest)


def _warnings(options: PlanOptions, teacher: ModelBudget, student: ModelBudget | None) -> list[str]:
    out = []
    if options.gpus_per_teacher > 1 and options.workers > 1:
        out.append(
            f"{options.workers} teachers of {options.gpus_per_teacher} GPUs: start the command {options.workers} times, each with "
            "CUDA_VISIBLE_DEVICES of its own; they share the shards"
        )
    if options.gpus_per_teacher > 1 and options.teacher_split == "tensor":
        out.append(
            "dump-teacher spreads a teacher by layers, which take turns; this is the rate of an engine that splits tensors"
        )
    for what, model, flag in (("teacher", teacher, "--gpus-per-teacher"), ("student", student, "--gpus-per-student")):
        if model is not None and model.num_bytes > options.gpu_memory * GIB:
            enough = f"{flag} {model.fewest_gpus}" if model.fewest_gpus else "a smaller batch, or --seq-len"
            out.append(
                f"the {what} takes {model.num_bytes / GIB:.1f} GiB of each GPU, which has {options.gpu_memory:g}: {enough}"
            )
    if student is not None and teacher.shape.num_parameters > 30 * student.shape.num_parameters:
        ratio = teacher.shape.num_parameters / student.shape.num_parameters
        out.append(
            f"the teacher is {ratio:.0f} times the student; past about 30 a teacher in between often serves better"
        )
    return out
