"""A machine for killing dumps: forks workers, kills them, resumes, and compares the finished cache byte for byte.

Workers are forked from a process that has imported torch but never computed with it, so that a kill costs half a second instead
of five. Several workers are started as torchrun would start them, each with its rank.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.errors import KDCacheError
from tests.abuse.calls import Call, watch

IMPORTS = ("torch", "transformers", "datasets", "kdcache.dump.launch", "kdcache.dump.worker", "kdcache.dump.engines.transformers",
           "kdcache.dump.engines.generate", "kdcache.dump.generate", "kdcache.cache.transcode",
           "transformers.models.llama.modeling_llama")  # fmt: skip
# Exit code of a worker that ended with one of our errors.
SAID_WHY = 3


def prepare() -> None:
    """Import what a dump needs, and compute nothing: what forks must not hold is a thread."""
    import importlib

    for name in IMPORTS:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")  # compiles a thousand patterns, once


# Of a dump of some seconds.
SMALL = {"seq_len": 64, "top_k": 8, "threads": 1, "batch_tokens": 256, "shard_positions": 300, "device": "cpu"}


def told_by(script: str, teacher: str, corpus: str, root: Path, *arguments: str) -> dict[str, Any]:
    """What a script prints, as JSON, run in a process that has not computed yet: given a small dump's options, a folder, and more."""
    options = {"teacher": teacher, "dataset": corpus, "output": "", "split": "train[:6]", **SMALL}
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(options), str(root), *arguments],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def small_dump(root: Path, num_texts: int) -> dict[str, Any]:
    """Options of a dump of some seconds, without ``output``: a corpus and a random teacher below a folder, and datasets' own files too.

    The teacher is made in a process of its own: what forks later must not have computed.
    """
    os.environ["HF_DATASETS_CACHE"] = str(root / "datasets")
    corpus = root / "texts.jsonl"
    maker = """if True:
        import json, sys
        from pathlib import Path
        from tests.conftest import make_llama, texts
        teacher, corpus, num_texts = sys.argv[1:]
        make_llama(Path(teacher))
        Path(corpus).write_text("".join(json.dumps({"text": text}) + "\\n" for text in texts(int(num_texts))))
    """
    subprocess.run(
        [sys.executable, "-c", maker, str(root / "teacher"), str(corpus), str(num_texts)],
        check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    return {"teacher": str(root / "teacher"), "dataset": str(corpus), **SMALL}


def kinds(options: dict[str, Any], root: Path) -> dict[str, dict[str, Any]]:
    """Options of all that writes a cache otherwise, by kind: what stands before the plan, beside it or in the shards differs.

    What is transcoded and copied is made below ``root``, in processes of its own.
    """
    tables, hidden = {**options, "id_tables": "global"}, {**options, "targets": "hidden"}
    run_to_the_end({**tables, "output": str(root / "tables")})
    run_to_the_end({**hidden, "output": str(root / "hidden")})
    return {
        "top_k": options,
        "id tables": tables,
        "hidden": hidden,
        "transcoded": {"cache": str(root / "tables"), "top_k": 4},
        "copied": {"cache": str(root / "hidden")},
    }


def dump_here(options: dict[str, Any]) -> None:
    """A dump in this process; where a cache is named, a transcode of it."""
    if "cache" in options:
        from kdcache.cache.transcode import TranscodeOptions, transcode

        transcode(TranscodeOptions(**options))
        return
    from kdcache.dump.launch import dump
    from kdcache.dump.options import DumpOptions

    dump(DumpOptions(**options))


def start(options: dict[str, Any], rank: int, world_size: int, before: Callable[[], None] = lambda: None) -> int:
    """Fork a worker; its process id. It exits with 0 when the dump ended well, with SAID_WHY when it ended with an error of ours."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        if not os.environ.get("KDCACHE_CRASH_DEBUG"):
            said_by(options, rank).parent.mkdir(parents=True, exist_ok=True)
            os.dup2(os.open(said_by(options, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        before()
        dump_here(options)
        code = 0
    except KDCacheError as error:
        code = SAID_WHY
        print(error, file=sys.stderr, flush=True)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        os._exit(code)


def said_by(options: dict[str, Any], rank: int) -> Path:
    """What a worker writes to standard error: beside the cache, or below KDCACHE_SAID."""
    _, is_url, below = options["output"].partition("://")
    beside = f"{os.environ['KDCACHE_SAID']}/{below}" if is_url else options["output"]
    return Path(f"{beside}.{rank}.stderr")


def run_to_the_end(options: dict[str, Any], world_size: int = 1) -> None:
    """An undisturbed dump, in processes of its own."""
    children = [start(options, rank, world_size) for rank in range(world_size)]
    codes = [wait(child) for child in children]
    if codes != [0] * world_size:
        said = [said_by(options, rank) for rank, code in enumerate(codes) if code and said_by(options, rank).exists()]
        raise AssertionError(
            f"an undisturbed dump ended with {codes}:\n" + "\n".join(file.read_text()[-1500:] for file in said)
        )


def run_and_kill(options: dict[str, Any], world_size: int, after_seconds: float, victims: int) -> int:
    """Start workers, SIGKILL some of them after a while, let the others finish; how many were still alive to be killed."""
    children = [start(options, rank, world_size) for rank in range(world_size)]
    time.sleep(after_seconds)
    killed = 0
    for child in children[:victims]:
        done, _ = os.waitpid(child, os.WNOHANG)
        if not done:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            killed += 1
    for child in children[victims:]:
        os.waitpid(child, 0)
    return killed


def at_call(folder: Path, number: int, act: Callable[[], None], when: str) -> None:
    """In this process: do something at the n-th call that changes a folder: before it, after it, or halfway through it.

    Halfway, only calls are counted that write bytes.
    """
    numbers = itertools.count(1)

    def seen(call: Call) -> Any:
        counts = call.changes and (when != "half" or call.half is not None)
        if not counts or next(numbers) != number:
            return call.go()
        if when == "before":
            act()
        result = call.half() if when == "half" and call.half else call.go()
        if when != "before":
            act()
        return result

    watch([folder], seen)


def kill_at_call(options: dict[str, Any], number: int, when: str) -> Callable[[], None]:
    """For a child: die at the n-th change of the cache's folder."""
    return lambda: at_call(Path(options["output"]), number, lambda: os.kill(os.getpid(), signal.SIGKILL), when)


def short_leases() -> None:
    """For a child: leases of a second."""
    import kdcache.cache.lease as lease

    lease.LEASE_SECONDS = 1.0


def stop_at_call(options: dict[str, Any], number: int, when: str) -> Callable[[], None]:
    """For a child: stop (SIGSTOP) at the n-th change of the cache's folder, until another process says go on."""

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.5)  # any thread may be the one that takes the signal; until then this one runs on

    def install() -> None:
        short_leases()
        at_call(Path(options["output"]), number, stop, when)

    return install


def wait(child: int) -> int:
    """Its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def stopped_writers(options: dict[str, Any], root: Path, *, first: int = 1, stride: int = 1) -> dict[str, int]:
    """A writer stops at the n-th change, past its lease; another finishes the cache; the first goes on and ends well.

    Returns:
        How often, and how often the other had nothing left to do.
    """
    run_to_the_end({**options, "output": str(root / "reference")})
    reference = contents(root / "reference")
    stops = 0
    for when in ("before", "half", "after"):
        for number in range(first, 10**6, stride):
            cache = root / f"{when}-{number}"
            here = {**options, "output": str(cache)}
            sleeper = start(here, 0, 2, stop_at_call(here, number, when))
            _, status = os.waitpid(sleeper, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                assert os.waitstatus_to_exitcode(status) == 0
                break
            time.sleep(1.2)
            other = start(here, 1, 2, short_leases)
            assert wait(other) == 0, f"the other one, with one stopped {when} call {number}"
            assert (cache / "manifest.json").exists(), "the other one finished the cache alone"
            os.kill(sleeper, signal.SIGCONT)
            assert wait(sleeper) == 0, f"the one that woke up {when} call {number} lost, and ended well"
            assert_same(cache, reference)
            stops += 1
    return {"stops": stops}


def blind_writers(options: dict[str, Any], root: Path, *, rounds: int, writers: int = 2) -> dict[str, int]:
    """Writers that know nothing of each other do the same shards at the same time: leases fail to keep them apart."""

    def no_leases() -> None:
        import kdcache.cache.lease as lease

        lease.claim = lambda store, shard: lease.Lease(store, shard)

    run_to_the_end({**options, "output": str(root / "reference")})
    reference = contents(root / "reference")
    for number in range(rounds):
        cache = root / f"blind-{number}"
        children = [start({**options, "output": str(cache)}, 0, 2, no_leases) for _ in range(writers)]
        assert [wait(child) for child in children] == [0] * writers
        assert_same(cache, reference)
    return {"rounds": rounds, "writers": writers}


def contents(cache: Path) -> dict[str, Any]:
    """Everything that must be the same in the end: bytes of plan, manifest, shards and tables; commits without who and when."""
    found: dict[str, Any] = {}
    for path in sorted(cache.rglob("*")):
        name = path.relative_to(cache).as_posix()
        if path.is_dir() or name.startswith("runs/"):
            continue
        found[name] = path.read_bytes()
        if name.startswith("commits/"):
            record = json.loads(found[name])
            for personal in ("worker", "finished_at", "seconds", "record_digest"):
                record.pop(personal)
            found[name] = record
    return found


def assert_same(cache: Path, reference: dict[str, Any]) -> None:
    """The finished cache is the uninterrupted one: no byte differs, nothing is missing, nothing is left over."""
    found = contents(cache)
    assert found.keys() == reference.keys(), f"files differ: {sorted(found.keys() ^ reference.keys())}"
    different = [name for name in found if found[name] != reference[name]]
    assert not different, f"bytes differ: {different}"


def campaign(
    options: dict[str, Any],
    root: Path,
    *,
    num_kills: int,
    seed: int,
    on_kill: Callable[[int, int], None] = lambda k, c: None,
) -> dict[str, int]:
    """Kill at random moments until there were enough kills; each finished cache is compared and a new one begun.

    Returns:
        Numbers of kills, of finished caches, of runs, and of workers at most.
    """
    rng = np.random.default_rng(seed)
    run_to_the_end({**options, "output": str(root / "reference")})
    reference = contents(root / "reference")
    started = time.monotonic()
    run_to_the_end({**options, "output": str(root / "timed")})
    duration = time.monotonic() - started
    kills = caches = runs = 0
    while kills < num_kills:
        cache = root / f"cache-{caches}"
        while not (cache / "manifest.json").exists():
            workers = int(rng.integers(1, 4))
            victims = workers if rng.random() < 0.7 else int(rng.integers(1, workers + 1))
            kills += run_and_kill(
                {**options, "output": str(cache)}, workers, float(rng.uniform(0.1 * duration, duration)), victims
            )
            runs += 1
            on_kill(kills, caches)
        run_to_the_end({**options, "output": str(cache)})
        assert_same(cache, reference)
        caches += 1
    return {"kills": kills, "finished_caches": caches, "runs": runs, "workers_at_most": 3}


def every_commit_point(
    options: dict[str, Any], root: Path, *, first: int = 1, last: int = 10**6, stride: int = 1
) -> dict[str, int]:
    """Die at the n-th change of the folder for every n, before, after and halfway through it, then resume with another number of workers.

    Returns:
        Number of kill points, and how many of them left a cache without a plan, or a file half written.
    """
    run_to_the_end({**options, "output": str(root / "reference")})
    reference = contents(root / "reference")
    found = {"kill_points": 0, "before_the_plan": 0, "half_written": 0}
    for when in ("before", "half", "after"):
        for number in range(first, last + 1, stride):
            cache = root / f"{when}-{number}"
            here = {**options, "output": str(cache)}
            code = wait(start(here, 0, 1, kill_at_call(here, number, when)))
            if code != -signal.SIGKILL:
                assert code == 0, f"died otherwise, with {code}"
                assert_same(cache, reference)
                break
            found["kill_points"] += 1
            found["before_the_plan"] += not (cache / "plan.json").exists()
            found["half_written"] += when == "half"
            run_to_the_end(here, world_size=1 + found["kill_points"] % 3)
            assert_same(cache, reference)
            shutil.rmtree(cache)
    return found
