"""A budget from a pilot: the real teacher on this device, the real codec, a few real steps of the student."""

from __future__ import annotations

import logging
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcache.budget.costs import Costs, check_disk
from kdcache.budget.options import COMPARED, PlanOptions, command_line, scheme_name, warn_of_temperatures
from kdcache.cache.manifest import Plan
from kdcache.cache.store import open_store
from kdcache.dump.options import DumpOptions
from kdcache.dump.pilot import choose_tables, pilot_positions
from kdcache.dump.plan import Draft, draft_spec
from kdcache.dump.size import CorpusSize, choose_pilot, count_corpus
from kdcache.errors import CorpusError
from kdcache.specs import DRAWN

if TYPE_CHECKING:
    from kdcache.dump.estimate import Pilot, SchemeEstimate, Trial

logger = logging.getLogger(__name__)

PILOT_SEQUENCES = 200
LARGEST_RATIO = 30
ROUNDING = {"bfloat16": "about 1e-3", "float16": "about 1e-4"}


@dataclass(frozen=True, slots=True)
class SchemeCost:
    """A scheme, and what dumping it takes.

    Attributes:
        estimate: What the pilot found.
        total_bytes: Of the cache.
        tokens_per_second: Of one worker: teacher, selection, and encoding where that takes the teacher's time.
        wall_seconds: Of the dump, with all workers.
        device_seconds: Of all GPUs together; of this machine where there is none.
    """

    estimate: SchemeEstimate
    total_bytes: int
    tokens_per_second: float
    wall_seconds: float
    device_seconds: float


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes: measured at most while the pilot ran, and of the teacher's weights."""

    peak: int
    weights: int


@dataclass(frozen=True, slots=True)
class Budget:
    """What ``kdcache plan`` has found out.

    Attributes:
        teacher: As it was named.
        teacher_parameters: Of it.
        student_parameters: Of the student, or None.
        device: Kind and number, in words.
        dtype: Of the teacher.
        corpus: How much there is to read.
        pilot_sequences: That were read.
        pilot_positions: Their tokens.
        pilot_seconds: Of everything that was done to find this out.
        teacher_tokens_per_second: Of one worker, trunk and logits alone.
        student_tokens_per_second: Of a training step on one device, or None.
        memory: Of one worker.
        student_memory: Bytes of each GPU that trains the student, estimated, or None.
        chosen: Name of the scheme that the other numbers are of.
        schemes: The chosen one and those beside it.
        costs: Of the chosen one.
        epochs: Passes of a student run over the corpus.
        price_per_hour: Of a device, or None.
        warnings: What should be known before anything is spent.
        command: The dump that was planned.
    """

    teacher: str
    teacher_parameters: int
    student_parameters: int | None
    device: str
    dtype: str
    corpus: CorpusSize
    pilot_sequences: int
    pilot_positions: int
    pilot_seconds: float
    teacher_tokens_per_second: float
    student_tokens_per_second: float | None
    memory: Memory
    student_memory: int | None
    chosen: str
    schemes: list[SchemeCost]
    costs: Costs
    epochs: float
    price_per_hour: float | None
    warnings: list[str]
    command: str


def plan_budget(options: PlanOptions) -> Budget:
    """Count the corpus, run the pilot, try the schemes, measure the student, add up. Nothing is written.

    Raises:
        KDCacheError: What a dump with these options would meet before its first shard, or the student before its first step.
    """
    started = time.monotonic()
    dump_options = options.dump_options()
    draft = draft_spec(dump_options)
    student_parameters = student_memory = None
    if options.student is not None:
        from kdcache.budget.student import check_planned_student

        shape = check_planned_student(options.student, draft.spec, options.trust_remote_code)
        student_parameters, tokens = shape.num_parameters, options.per_device_train_batch_size * options.seq_len
        student_memory = sum(shape.step_bytes(tokens, options.gpus_per_student))
    corpus = count_corpus(draft, {"auto": None, "all": False, "sample": True}[options.count])
    if not corpus.num_positions:
        raise CorpusError(
            f"dataset {options.dataset}: no row has anything to learn", hint="look at its rows and --text-column"
        )
    trials = make_trials(options, draft, corpus)
    wanted = options.pilot_sequences or min(PILOT_SEQUENCES, max(8, corpus.num_sequences // 4))
    pilot, memory, num_sequences, gpus = _run(dump_options, draft, trials, wanted, corpus)
    on_gpu = draft.spec.compute.device == "cuda"
    # Seconds of a device a second of a worker: all GPUs of a teacher, or a share of this machine.
    devices = float(gpus) if on_gpu else 1 / options.workers
    schemes = [_cost(one, pilot, corpus, options.workers, devices, on_gpu=on_gpu) for one in pilot.schemes]
    chosen = schemes[0]
    student_seconds = None
    if options.student is not None and pilot.stored:
        from kdcache.budget.student import measure_student

        student_seconds = measure_student(options, draft.spec, pilot.stored)
    passes = options.passes(corpus.num_sequences)
    tokens_a_run = corpus.num_positions * passes
    costs = Costs(
        dump=chosen.device_seconds,
        teacher_a_run=tokens_a_run * pilot.teacher_seconds * devices,
        student_a_run=None if student_seconds is None else tokens_a_run * student_seconds,
    )
    spec = draft.spec
    kind = f"{gpus} GPUs" if gpus > 1 else "GPU" if on_gpu else f"{spec.compute.threads} thread(s) of a CPU"
    return Budget(
        teacher=options.teacher,
        teacher_parameters=spec.teacher.num_parameters,
        student_parameters=student_parameters,
        device=f"{options.workers} worker{'s' if options.workers > 1 else ''}, {kind} each",
        dtype=spec.teacher.dtype,
        corpus=corpus,
        pilot_sequences=num_sequences,
        pilot_positions=pilot.num_positions,
        pilot_seconds=time.monotonic() - started,
        teacher_tokens_per_second=1 / pilot.teacher_seconds,
        student_tokens_per_second=None if student_seconds is None else 1 / student_seconds,
        memory=memory,
        student_memory=student_memory,
        chosen=chosen.estimate.name,
        schemes=schemes,
        costs=costs,
        epochs=passes,
        price_per_hour=options.price_per_hour,
        warnings=list(warn(options, dump_options, draft, corpus, schemes, student_parameters)),
        command=command_line(dump_options),
    )


def make_trials(options: PlanOptions, draft: Draft, corpus: CorpusSize) -> list[Trial]:
    """The chosen scheme first, then those beside it, each as a dump would do it."""
    from kdcache.dump.estimate import Trial

    trials: dict[str, Trial] = {}
    vocab_size = draft.spec.teacher.vocab_size
    names: list[str | None] = [None, *(COMPARED if options.compare is None else options.compare)]
    for scheme in names:
        if scheme == "hidden" and options.average:
            continue
        dump_options = options.dump_options(scheme)
        targets = dump_options.target_spec(vocab_size)
        codec = dump_options.codec_spec(targets)
        spec = draft.spec.model_copy(update={"targets": targets, "codec": codec})
        kind = choose_tables(dump_options, targets, codec, vocab_size, corpus.num_positions)
        name = scheme_name(dump_options)
        trials.setdefault(name, Trial(name, spec, kind))
    return list(trials.values())


def _run(
    options: DumpOptions, draft: Draft, trials: list[Trial], wanted: int, corpus: CorpusSize
) -> tuple[Pilot, Memory, int, int]:
    """The pilot; its memory, the number of its sequences, and the GPUs that the teacher lies on."""
    import torch

    from kdcache.dump.engines.transformers import TransformersEngine
    from kdcache.dump.estimate import run_pilot
    from kdcache.dump.launch import make_worker
    from kdcache.models import free_memory

    ids, sequences = choose_pilot(draft, wanted)
    logger.info("pilot: the teacher reads %d sequences, %s tokens", len(ids), f"{sum(map(len, sequences)):,}")
    # The engine is asked for its readings alone, so that its own scheme does not matter; that of hidden states would write a table.
    plain = draft.spec.model_copy(
        update={"targets": draft.spec.targets.model_copy(update={"scheme": "top_k", "k": 1, "num_draws": 0})}
    )
    with tempfile.TemporaryDirectory() as nowhere:
        plan = Plan(spec=plain, fingerprint=plain.fingerprint)
        worker = make_worker(open_store(nowhere), options, plan, draft.rows, 0, 1)
    engine = worker.engine
    assert isinstance(engine, TransformersEngine), "a worker that dumps has this engine"
    if engine.head is None and any(trial.name == "hidden" for trial in trials):
        logger.warning("hidden: left out, the teacher's output head is not understood")
        trials = [trial for trial in trials if trial.name != "hidden"]
    pilot = run_pilot(engine, trials, ids, sequences, corpus)
    devices = {parameter.device for parameter in engine.model.parameters()}
    weights = sum(p.numel() * p.element_size() for p in engine.model.parameters())
    if draft.spec.compute.device == "cuda":
        peak = sum(torch.cuda.max_memory_allocated(device) for device in devices if device.type == "cuda")
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    del worker, engine
    free_memory()
    return pilot, Memory(peak=peak, weights=weights), len(ids), max(len(devices), 1)


def _cost(
    estimate: SchemeEstimate, pilot: Pilot, corpus: CorpusSize, workers: int, devices: float, *, on_gpu: bool
) -> SchemeCost:
    """Seconds of a dump. On a GPU encoding runs beside the teacher; on a CPU it takes the same cores."""
    seconds = pilot.teacher_seconds + estimate.select_seconds
    seconds = max(seconds, estimate.encode_seconds) if on_gpu else seconds + estimate.encode_seconds
    tokens = corpus.num_positions
    if estimate.id_tables != "none":
        tokens += min(pilot_positions(corpus.num_positions), corpus.num_positions)
    return SchemeCost(
        estimate=estimate,
        total_bytes=estimate.shard_bytes + estimate.table_bytes,
        tokens_per_second=1 / seconds,
        wall_seconds=tokens * seconds / workers,
        device_seconds=tokens * seconds * devices,
    )


# --- what should be known ---------------------------------------------------------------------------------------------


def warn(
    options: PlanOptions,
    dump_options: DumpOptions,
    draft: Draft,
    corpus: CorpusSize,
    schemes: list[SchemeCost],
    student_parameters: int | None,
) -> list[str]:
    """Everything that would be met later, in sentences."""
    spec, chosen, out = draft.spec, schemes[0], []
    if student_parameters and spec.teacher.num_parameters > LARGEST_RATIO * student_parameters:
        out.append(
            f"the teacher is {spec.teacher.num_parameters / student_parameters:.0f} times the student; past about {LARGEST_RATIO} a teacher of "
            "middle size in between often serves better"
        )
    out += warn_of_temperatures(options, chosen.estimate.temperatures)
    if corpus.num_cut:
        what = "go on in the next sequence" if spec.corpus.columns == "text" else "lose their end"
        out.append(
            f"{corpus.num_cut:,} of {corpus.num_rows:,} rows ({corpus.num_cut / corpus.num_rows:.1%}) are longer than --seq-len "
            f"{spec.corpus.seq_len} and {what}"
        )
    fine = dump_options.codec == "exact" or dump_options.quality == "high"
    if spec.teacher.dtype in ROUNDING and fine and dump_options.targets not in (*DRAWN, "hidden"):
        out.append(
            f"a {spec.teacher.dtype} teacher's own rounding moves its distributions by {ROUNDING[spec.teacher.dtype]} nats: a codec finer than "
            "--quality standard keeps noise"
        )
    if spec.teacher.dtype == "float16":
        out.append("float16 overflows in some families, which stops a dump at the first NaN; bfloat16 does not")
    out += check_disk(options.output, {one.estimate.name: one.total_bytes for one in schemes})
    return out
