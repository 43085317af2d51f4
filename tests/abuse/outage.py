"""A real S3 server that is killed and started again while a dump writes to it and while students read from it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdcache.cache.commit import committed_shards
from kdcache.cache.store import open_store
from tests.object_stores import BUCKET, Seaweed, stored


def command(name: str, options: dict[str, Any]) -> list[str]:
    """A command line of kdcache."""
    flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "kdcache", "-q", name, *flags]


def restart(server: Seaweed, seconds: float) -> None:
    """Kill the server, and start it again a while later."""
    server.kill()
    time.sleep(seconds)
    server.start()


def run_through_outage(
    arguments: list[str], server: Seaweed, due: Callable[[], bool], seconds: float
) -> tuple[int, int]:
    """Run a command; when ``due`` says so, take the server away for a while; run it again until it ends well.

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
                    restart(server, seconds)
                    outages += 1
                time.sleep(0.05)
            log.seek(0)
            said = log.read()
        if process.returncode == 0:
            return outages, runs
        assert process.returncode == 1, said
        assert "hint:" in said, said
        assert "Traceback" not in said, said
        assert runs < 5, said
        server.wait_until_ready()


def dump_through_outage(
    options: dict[str, Any], root: Path, server: Seaweed, *, name: str, num_commits: int, seconds: float
) -> dict[str, int]:
    """A dump to the server, which goes away after so many commits; the cache is the one that a folder gets.

    Args:
        options: Of the dump.
        root: Holds ``reference``, the same dump to a folder.
        server: Is up.
        name: Of the cache in the bucket.
        num_commits: When to kill.
        seconds: How long to stay away, besides the time of starting.
    """
    url = f"s3://{BUCKET}/{name}"
    store = open_store(url)
    arguments = command("dump-teacher", {**options, "output": url})
    outages, runs = run_through_outage(arguments, server, lambda: len(committed_shards(store)) >= num_commits, seconds)
    server.wait_until_ready()
    found, reference = stored(store), stored(open_store(root / "reference"))
    assert found.keys() == reference.keys(), sorted(found.keys() ^ reference.keys())
    assert found == reference
    return {"outages": outages, "runs": runs}


def train_through_outage(
    options: dict[str, Any], root: Path, server: Seaweed, *, cache: str, name: str, seconds: float
) -> dict[str, int]:
    """A student that reads from the server while it goes away; its weights are those of one that read from a folder.

    ``options`` lead to ``root / "student"``, trained from the folder before.
    """
    output = root / name
    arguments = command("train-student", {**options, "cache": f"s3://{BUCKET}/{cache}", "output": str(output)})
    outages, runs = run_through_outage(arguments, server, lambda: any(output.glob("*")), seconds)
    server.wait_until_ready()
    weights = "model.safetensors"
    assert (output / weights).read_bytes() == (root / "student" / weights).read_bytes(), "the same steps, bit for bit"
    return {"outages": outages, "runs": runs}
