"""A real S3 server that goes away while dumps write to it and students read from it, and clients of it that are killed.

Dumps are forked as in :mod:`tests.abuse.crashes`, so that the server, or the client, dies at the very request that is named; the
process that forks never speaks to the server itself. Commands of the command line see an outage from outside, at some moment.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from kdcache.cache.commit import committed_shards
from kdcache.cache.store import open_store
from tests.abuse.crashes import SAID_WHY, run_to_the_end, said_by, start, wait
from tests.object_stores import BUCKET, Seaweed, s3_environment, stored

# Seconds for which a client tries again, where an outage is to be longer than that.
PATIENCE = 0.5


# --- dumps that are forked ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server_for_forks(folder: Path) -> Iterator[Seaweed]:
    """A server with a bucket, for a process that must hold no thread: what speaks to the server are its children."""
    import s3fs  # noqa: F401  before anything is forked

    server = Seaweed(folder)
    with pytest.MonkeyPatch.context() as patch, s3_environment(server.port):
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setenv("KDCACHE_SAID", str(folder / "said"))
        try:
            server.start()
            in_a_child(server.wait_until_ready)
            yield server
        finally:
            server.kill()


def in_a_child(act: Callable[[], object]) -> None:
    """Do something in a process of its own."""
    child = os.fork()
    if not child:
        code = 1
        try:
            act()
            code = 0
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            os._exit(code)
    assert wait(child) == 0


def at_request(number: int, act: Callable[[], object], when: str) -> None:
    """In this process: do something before or after the n-th request to the server."""
    from s3fs.core import S3FileSystem

    numbers, real = itertools.count(1), S3FileSystem._call_s3

    async def call(*args: Any, **kwargs: Any) -> Any:
        mine = next(numbers) == number
        if mine and when == "before":
            act()
        try:
            return await real(*args, **kwargs)
        finally:  # that a file is not there is an answer too
            if mine and when == "after":
                act()

    S3FileSystem._call_s3 = call


def be_impatient() -> None:
    """In this process: give up soon."""
    from kdcache.cache import remote

    remote.RETRY_SECONDS = PATIENCE


def assert_like_a_folder(url: str, folder: Path, killed: Collection[int] = ()) -> None:
    """The same files with the same bytes; what a killed client tried the store with may be left.

    So may a lease of one: a request that was on its way when its sender died is answered when the server comes to it, perhaps
    after others have finished and tidied up. It is said, and holds nobody up.
    """

    def compare() -> None:
        found = {name: data for name, data in stored(open_store(url)).items() if not name.startswith("tmp/")}
        reference = stored(open_store(folder))
        leases = {name: json.loads(found.pop(name)) for name in list(found) if name.startswith("leases/")}
        assert all(about["pid"] in killed for about in leases.values()), (leases, killed)
        if leases:
            print(f"{url}: the lease of a killed client came late: {leases}", file=sys.stderr)
        assert found.keys() == reference.keys(), sorted(found.keys() ^ reference.keys())
        assert found == reference, [name for name in found if found[name] != reference[name]]

    in_a_child(compare)


def kill_client(
    options: dict[str, Any], reference: Path, *, name: str, number: int, when: str, workers: int, then: int
) -> bool:
    """Workers dump to the server; all are killed when the first comes to its n-th request; others finish the cache.

    Args:
        options: Of the dump, without ``output``.
        reference: The same dump, to a folder.
        name: Of the cache in the bucket.
        number: Of the request.
        when: ``before`` or ``after`` it.
        workers: How many are killed.
        then: How many finish.

    Returns:
        Whether there were as many requests.
    """
    here = {**options, "output": f"s3://{BUCKET}/{name}"}
    first = start(here, 0, workers, lambda: at_request(number, lambda: os.kill(os.getpid(), signal.SIGKILL), when))
    others = [start(here, rank, workers) for rank in range(1, workers)]
    code = wait(first)
    for child in others:
        os.kill(child, signal.SIGKILL)
        wait(child)
    assert code in (0, -signal.SIGKILL), said_by(here, 0).read_text()
    run_to_the_end(here, then)
    assert_like_a_folder(here["output"], reference, killed=[first, *others])
    return code != 0


def kill_server(
    options: dict[str, Any], reference: Path, server: Seaweed, *, name: str, number: int, when: str, workers: int, then: int
) -> int:  # fmt: skip
    """The server dies when the first worker comes to its n-th request, for longer than workers try again; each says why and ends.

    Once it is up again others finish the cache. Arguments are those of :func:`kill_client`.

    Returns:
        How many workers said why; 0 where there were fewer requests.
    """
    here = {**options, "output": f"s3://{BUCKET}/{name}"}
    assert server.process is not None
    group = server.process.pid

    def take_away() -> None:
        be_impatient()
        at_request(number, lambda: os.killpg(group, signal.SIGKILL), when)

    children = [start(here, 0, workers, take_away), *(start(here, rank, workers, be_impatient) for rank in range(1, workers))]  # fmt: skip
    codes = [wait(child) for child in children]
    for rank, code in enumerate(codes):
        said = said_by(here, rank).read_text()
        assert code in (0, SAID_WHY), said
        assert not code or ("hint: see that the store is up" in said and "Traceback" not in said), said
    server.kill()
    server.start()
    in_a_child(server.wait_until_ready)
    run_to_the_end(here, then)
    assert_like_a_folder(here["output"], reference)
    return codes.count(SAID_WHY)


# --- the command line -----------------------------------------------------------------------------------------------------


def command(name: str, options: dict[str, Any], patience: float | None = None) -> list[str]:
    """A command line of kdcache; one that tries again for so many seconds, where that is given."""
    flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    impatient = (
        f"from kdcache.cache import remote; remote.RETRY_SECONDS = {patience}; from kdcache.cli import main; main()"
    )
    program = ["-m", "kdcache"] if patience is None else ["-c", impatient]
    return [sys.executable, *program, "-q", name, *flags]


def run_through_outage(
    arguments: list[str], server: Seaweed, due: Callable[[], bool], seconds: float | None
) -> tuple[int, int]:
    """Run a command; when ``due`` says so, take the server away for a while; run the command again until it ends well.

    Args:
        arguments: The command.
        server: Is up.
        due: Asked again and again.
        seconds: How long the server stays away, besides the time of starting; None until the command has ended.

    Returns:
        Outages (0 if the command was faster), and how often the command had to be run.
    """
    outages, runs = 0, 0
    while True:
        runs += 1
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=log)
            while process.poll() is None:
                if not outages and due():
                    outages += 1
                    server.kill()
                    if seconds is not None:
                        time.sleep(seconds)
                        server.start()
                time.sleep(0.05)
            log.seek(0)
            said = log.read()
        if outages and not server.is_running():
            server.start()
        if process.returncode == 0:
            return outages, runs
        assert process.returncode == 1, said
        assert "hint:" in said, said
        assert "Traceback" not in said, said
        assert runs < 5, said
        server.wait_until_ready()


def dump_through_outage(
    options: dict[str, Any], root: Path, server: Seaweed, *, name: str, num_commits: int, seconds: float | None
) -> dict[str, int]:
    """A dump to the server, which goes away after so many commits; the cache is the one that a folder gets.

    Args:
        options: Of the dump.
        root: Holds ``reference``, the same dump to a folder.
        server: Is up.
        name: Of the cache in the bucket.
        num_commits: When to kill.
        seconds: How long to stay away, besides the time of starting; None until the dump has given up.
    """
    url = f"s3://{BUCKET}/{name}"
    store = open_store(url)
    arguments = command("dump-teacher", {**options, "output": url}, PATIENCE if seconds is None else None)
    outages, runs = run_through_outage(arguments, server, lambda: len(committed_shards(store)) >= num_commits, seconds)
    server.wait_until_ready()
    found, reference = stored(store), stored(open_store(root / "reference"))
    assert found.keys() == reference.keys(), sorted(found.keys() ^ reference.keys())
    assert found == reference
    return {"outages": outages, "runs": runs}


def train_through_outage(
    options: dict[str, Any], root: Path, server: Seaweed, *, cache: str, name: str, seconds: float | None
) -> dict[str, int]:
    """A student that reads from the server while it goes away; its weights are those of one that read from a folder.

    ``options`` lead to ``root / "student"``, trained from the folder before. Where the outage is longer than the student tries
    again (``seconds`` None), it begins with the first shard that is fetched.
    """
    output, copies = root / name, root / f"copies-{name}"
    os.environ["KDCACHE_COPIES"] = str(copies)
    arguments = command(
        "train-student", {**options, "cache": f"s3://{BUCKET}/{cache}", "output": str(output)},
        PATIENCE if seconds is None else None,
    )  # fmt: skip
    begun = copies if seconds is None else output
    outages, runs = run_through_outage(arguments, server, lambda: any(begun.glob("*")), seconds)
    server.wait_until_ready()
    assert_same_student(output, root)
    return {"outages": outages, "runs": runs}


def kill_student(options: dict[str, Any], root: Path, *, cache: str, name: str, checkpoint: int) -> bool:
    """A student that reads from the server is killed once it has written a checkpoint, and run again; its weights are the same.

    Returns:
        Whether it lived that long.
    """
    output = root / name
    os.environ["KDCACHE_COPIES"] = str(root / f"copies-{name}")
    settings = {**options, "cache": f"s3://{BUCKET}/{cache}", "output": str(output), "save_steps": checkpoint}
    arguments = command("train-student", settings)
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not any(output.glob("checkpoint-*/trainer_state.json")):
        time.sleep(0.02)
    process.kill()
    killed = process.wait() == -signal.SIGKILL
    subprocess.run(arguments, check=True, capture_output=True)
    assert_same_student(output, root)
    return killed


def assert_same_student(output: Path, root: Path) -> None:
    """The weights are those of ``root / "student"``."""
    weights = "model.safetensors"
    assert (output / weights).read_bytes() == (root / "student" / weights).read_bytes(), "the same steps, bit for bit"
