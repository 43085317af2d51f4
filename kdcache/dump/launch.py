"""From options to a finished cache: describe, plan, run workers, seal.

Workers share nothing but the store, so one process, several processes of this machine, torchrun and srun run the same loop;
only who starts it differs. Under torchrun or srun every process is a worker and takes its device from its local rank; no
process group is made, so one that dies takes nobody with it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from kdcache.cache.commit import check_writers, committed_shards, publish_by_digest, read_plan, seal, write_run
from kdcache.cache.layout import table_name
from kdcache.cache.manifest import Manifest, Plan
from kdcache.cache.shard import digest
from kdcache.cache.store import Store, open_store
from kdcache.cache.sums import warn_about_error
from kdcache.dump.dataset import open_rows
from kdcache.dump.options import DumpOptions
from kdcache.dump.plan import finished_before, make_plan, warn_about_versions
from kdcache.errors import CacheIncompleteError, ConfigError, KDCacheError
from kdcache.heads import check_packing, head_of
from kdcache.model_files import find_model
from kdcache.models import free_memory, keep_freed_memory, load_model, load_tokenizer, parse_dtype
from kdcache.progress import Progress, launched_rank

if TYPE_CHECKING:
    from kdcache.corpus import Rows
    from kdcache.dump.worker import Worker

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class DumpResult:
    """What came of a dump.

    Attributes:
        manifest: The cache as it stands.
        already_done: Nothing was left to do.
        stopped: Stopped by a signal, between shards.
    """

    manifest: Manifest
    already_done: bool = False
    stopped: int = 0


def dump(options: DumpOptions) -> DumpResult:
    """Run phase 1 to the end, or as far as it gets; running it again goes on from there.

    Raises:
        CacheMismatchError: The cache was begun with other settings.
        KDCacheError: Anything else that a user can meet.
    """
    store = open_store(options.output)
    done = finished_before(store, options)
    if done is not None:
        return DumpResult(done, already_done=True)
    keep_freed_memory()
    rank, world_size = launched_rank()
    check_writers(store, max(world_size, options.workers))
    loaded: list[Worker] = []

    def load_worker(draft: Plan, rows: Rows) -> Worker:
        loaded.append(make_worker(store, options, draft, rows, rank, world_size))
        return loaded[0]

    plan, rows = make_plan(store, options, load_worker)
    write_run(store, options.command, options, plan.spec.compute.device)
    warn_about_versions(plan)
    store.remove_abandoned()
    num_done = len(committed_shards(store))
    if num_done:
        logger.info("%d of %d shards are committed already; going on", num_done, plan.spec.num_shards)
    stopped = 0
    if num_done < plan.spec.num_shards:
        if world_size > 1 or options.workers == 1:
            stopped = _run_here(store, options, plan, rows, rank, world_size, num_done, loaded)
        else:
            loaded.clear()  # the teacher's memory is for the workers
            free_memory()
            stopped = _run_processes(store, options, plan, num_done)
    manifest = seal(store)
    if manifest.sealed and rank == 0:
        warn_about_error(manifest.stats, manifest.spec.codec.max_kl, str(store))
    return DumpResult(manifest, stopped=stopped)


def local_device(options: DumpOptions, plan: Plan, rank: int) -> str:
    """The device of a worker: its own GPU, or the CPU."""
    if plan.spec.compute.device != "cuda" or options.device not in ("auto", "cuda"):
        return plan.spec.compute.device if options.device == "auto" else options.device
    import torch

    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", rank)))
    return f"cuda:{local % max(torch.cuda.device_count(), 1)}"


def make_worker(store: Store, options: DumpOptions, plan: Plan, rows: Rows | None, rank: int, size: int) -> Worker:
    """Load the teacher and everything else that a worker needs."""
    import torch

    from kdcache.dump.average import open_averaged
    from kdcache.dump.engines.generate import answering_engine
    from kdcache.dump.engines.transformers import TransformersEngine
    from kdcache.dump.generate import GenerateWorker
    from kdcache.dump.worker import Worker

    keep_freed_memory()
    spec = plan.spec
    if spec.compute.device == "cpu":
        torch.set_num_threads(spec.compute.threads)
    source = find_model(options.teacher, options.revision)
    model = load_model(
        source,
        dtype=parse_dtype(spec.teacher.dtype),
        attention=spec.teacher.attention,
        device=local_device(options, plan, rank),
        device_map=options.device_map,
        trust_remote_code=options.trust_remote_code,
    )
    if spec.corpus.packing:
        check_packing(model)
    engine = TransformersEngine(
        model,
        vocab_size=spec.teacher.vocab_size,
        targets=spec.targets,
        chunk_positions=spec.compute.chunk_positions,
        averaged=open_averaged(options.average, spec.teacher.vocab_size, local_device(options, plan, rank)),
    )
    head_digest = None
    if spec.targets.scheme == "hidden":
        head = head_of(model).first(spec.teacher.vocab_size).to_bytes()
        head_digest = digest(head)
        if rank == 0:
            publish_by_digest(store, table_name(head_digest), head)
        else:  # looking at what stands there takes fetching it
            store.put_if_absent(table_name(head_digest), head)
    tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)
    make: Callable[..., Worker] = Worker
    if spec.generation is not None:
        make = partial(GenerateWorker, answering=answering_engine(engine, spec.generation, tokenizer))
    return make(
        store=store,
        plan=plan,
        rows=rows if rows is not None else open_rows(options),
        tokenizer=tokenizer,
        engine=engine,
        head_digest=head_digest,
        offset=rank / size,
    )


def progress_line(plan: Plan, shards_done: float, positions: float, seconds: float) -> str:
    """Shards and tokens so far, tokens a second of this run."""
    return (
        f"{shards_done:.1f}/{plan.spec.num_shards} shards, {positions:,.0f} tokens, {positions / seconds:,.0f} tokens/s"
    )


def _run_here(
    store: Store,
    options: DumpOptions,
    plan: Plan,
    rows: Rows,
    rank: int,
    size: int,
    num_done: int,
    loaded: list[Worker],
) -> int:
    """This process is the worker; ``loaded`` holds one already where there was a pilot."""
    with Progress("dump", plan.spec.num_shards, num_done) as progress, stop_on_signals() as stop:
        worker = loaded[0] if loaded else make_worker(store, options, plan, rows, rank, size)
        worker.plan = plan
        positions, shards = 0, 0.0

        def on_progress(more: int, fraction: float) -> None:
            nonlocal positions
            positions += more
            done = shards + (fraction if fraction < 1 else 0.0)
            line = progress_line(plan, num_done + done, positions, progress.seconds)
            progress.update(done, line + (" on this rank" if size > 1 else ""))

        def on_committed() -> None:
            nonlocal shards
            shards = worker.num_committed - num_done if size > 1 else shards + 1

        worker.on_progress, worker.on_committed, worker.should_stop = (
            on_progress,
            on_committed,
            lambda: bool(stop.signal),
        )
        worker.work()
    return stop.signal


def _run_processes(store: Store, options: DumpOptions, plan: Plan, num_done: int) -> int:
    """A process a worker; progress through shared numbers, failures through pipes."""
    if options.device_map is not None:
        raise ConfigError(
            f"--device-map {options.device_map} spreads one teacher over all GPUs, --workers {options.workers} wants one each",
            hint="use one of the two, or torchrun with CUDA_VISIBLE_DEVICES set for each process",
        )
    context = multiprocessing.get_context("spawn")
    shared = context.Array("d", 3 * options.workers, lock=False)
    with Progress("dump", plan.spec.num_shards, num_done) as progress, stop_on_signals() as stop:
        processes, pipes = [], []
        for rank in range(options.workers):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_worker_process, args=(options, rank, shared, sender), name=f"worker {rank}"
            )
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        errors: list[KDCacheError] = []
        forwarded = False
        while any(process.is_alive() for process in processes):
            time.sleep(REFRESH_SECONDS / 5)
            done = sum(shared[1::3]) + sum(shared[2::3])
            progress.update(done, progress_line(plan, num_done + done, sum(shared[0::3]), progress.seconds))
            errors += _receive(pipes)
            if (stop.signal or errors) and not forwarded:
                forwarded = True  # the others finish the shard in hand, whether a user or a failure asks them to stop
                for process in processes:
                    if process.is_alive() and process.pid:
                        os.kill(process.pid, signal.SIGTERM)
        errors += _receive(pipes)
    if errors:
        raise errors[0]
    died = {process.name: process.exitcode for process in processes if process.exitcode}
    if died and not stop.signal:
        logger.warning("%s", "; ".join(f"{name} ended with exit code {code}" for name, code in died.items()))
    left = plan.spec.num_shards - len(committed_shards(store))
    if left and not stop.signal:
        raise CacheIncompleteError(
            f"{left} of {plan.spec.num_shards} shards are not committed; workers that died: {died or 'none'}",
            hint="run the same command again: what is committed stays",
        )
    return stop.signal


def _receive(pipes: list[Connection]) -> list[KDCacheError]:
    """The errors that workers have sent since."""
    errors = []
    for pipe in pipes:
        try:
            if pipe.poll():
                errors.append(pipe.recv())
        except EOFError:
            continue
    return errors


def _worker_process(options: DumpOptions, rank: int, shared: Any, failures: Connection) -> None:
    """Body of a spawned worker. Ends at once when its parent is gone."""
    parent = os.getppid()
    store = open_store(options.output)
    with stop_on_signals(quiet=True) as stop:
        try:
            worker = make_worker(store, options, read_plan(store), None, rank, options.workers)

            def on_progress(more: int, fraction: float) -> None:
                shared[3 * rank] += more
                shared[3 * rank + 1] = fraction if fraction < 1 else 0.0
                if os.getppid() != parent:
                    os._exit(1)

            def on_committed() -> None:
                shared[3 * rank + 2] += 1

            worker.on_progress, worker.on_committed, worker.should_stop = (
                on_progress,
                on_committed,
                lambda: bool(stop.signal),
            )
            worker.work()
        except KDCacheError as error:
            failures.send(error)


@dataclass(slots=True)
class StopSignal:
    """The signal that asked to stop, or 0."""

    signal: int = 0


@contextmanager
def stop_on_signals(*, quiet: bool = False) -> Iterator[StopSignal]:
    """Ctrl-C and SIGTERM ask to finish the shard in hand; a second one ends the process as usual."""
    stop = StopSignal()
    previous: dict[int, Any] = {}

    def handle(number: int, frame: object) -> None:
        stop.signal = int(number)
        for known, handler in previous.items():
            signal.signal(known, handler)
        if not quiet:
            logger.warning("stopping after the shard in hand; once more to stop at once")

    try:
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            previous[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: whoever runs us there handles signals
        pass
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
