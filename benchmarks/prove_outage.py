"""S7: a real S3 server (SeaweedFS) that is killed and started again while a dump writes to it and while students read from it.

Outages are shorter than a client tries again, so that it sits them out, or longer, so that it says why, ends, and is run again. Clients
are killed too, at every so manieth request, and at a checkpoint. What dies is finished by another number of workers. The caches are
those that a folder gets, byte for byte, and the students' weights those of a student that read from a folder.

    python benchmarks/prove_outage.py [--dumps 8] [--students 4] [--stride 5]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import results_file
from tests.abuse.crashes import kinds, prepare, run_to_the_end, small_dump
from tests.abuse.outage import (
    command,
    dump_through_outage,
    kill_client,
    kill_server,
    kill_student,
    server_for_forks,
    train_through_outage,
)
from tests.object_stores import Seaweed, seaweed


def at_requests(made: dict[str, dict[str, Any]], root: Path, server: Seaweed, stride: int) -> Counter[str]:
    """Clients and the server killed at every ``stride``-th request and every fourth of these, before and after it, of each kind of cache."""
    found: Counter[str] = Counter()
    for kind, options in made.items():
        reference = root / f"reference-{kind}"
        run_to_the_end({**options, "output": str(reference)})
        for when in ("before", "after"):
            for turn in range(10**6):
                where = {"number": 1 + turn * stride, "when": when, "workers": 1 + turn % 3, "then": 1 + (turn + 1) % 3}
                name = f"{kind}-{when}-{turn}".replace(" ", "-")
                killed = kill_client(options, reference, name=f"killed-{name}", **where)
                found["killed clients"] += where["workers"] if killed else 0
                found["caches of killed clients"] += killed
                if turn % 4 == 0:
                    said = kill_server(options, reference, server, name=f"away-{name}", **where)
                    found["clients that said why"] += said
                    found["caches of clients that said why"] += said > 0
                print(kind, where, dict(found), file=sys.stderr)
                if where["workers"] == 1 and not killed:
                    break
    return found


def make_student(folder: Path) -> str:
    """A student of one layer, made now that nothing is forked any more."""
    from tests.conftest import make_llama

    return make_llama(folder, seed=1, hidden_size=16, num_hidden_layers=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dumps", type=int, default=8)
    parser.add_argument("--students", type=int, default=4)
    parser.add_argument("--stride", type=int, default=5, help="clients are killed at every so manieth request")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    dumps: list[dict[str, int]] = []
    students: list[dict[str, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        options = small_dump(root, 64)
        prepare()
        made = kinds({**options, "split": "train[:12]"}, root / "made")
        run_to_the_end({**options, "output": str(root / "reference")})
        with server_for_forks(root / "seaweed-1") as server:
            found = at_requests(made, root, server, args.stride)
        with seaweed(root / "seaweed-2") as server:
            student = make_student(root / "init")
            learn = {"student": student, "max_steps": 60, "per_device_train_batch_size": 4}
            where = {"cache": root / "reference", "output": root / "student"}
            subprocess.run(command("train-student", learn | where), check=True, capture_output=True)
            for number in range(args.dumps):
                short = float(rng.uniform(0, 20)) if number % 2 else None
                commits = int(rng.integers(0, 20))
                dumps.append(
                    dump_through_outage(
                        options, root, server, name=f"cache-{number}", num_commits=commits, seconds=short
                    )
                )
                print("dump", number, short, dumps[-1], file=sys.stderr)
            for number in range(args.students):
                short = float(rng.uniform(0, 20)) if number % 2 else None
                students.append(
                    train_through_outage(learn, root, server, cache="cache-0", name=f"student-{number}", seconds=short)
                )
                print("student", number, short, students[-1], file=sys.stderr)
            killed = [
                kill_student(learn, root, cache="cache-0", name=f"killed-{number}", checkpoint=int(rng.integers(5, 50)))
                for number in range(args.students)
            ]
    rows: list[tuple[str, object]] = [
        ("clients killed at a request of theirs, 1 to 3 at a time", found["killed clients"]),
        ("their caches, finished by another number of workers: a folder's, byte for byte", found["caches of killed clients"]),
        ("clients that met the server's death at a request, for longer than they try again: said why and ended", found["clients that said why"]),
        ("their caches, finished by another number of workers: a folder's, byte for byte", found["caches of clients that said why"]),
    ]  # fmt: skip
    for what, ended, same in (("`dump-teacher`", dumps, "caches identical to a folder's, byte for byte"),
                              ("`train-student`", students, "weights identical to a folder's, bit for bit")):  # fmt: skip
        rows += [
            (f"{what} during which the server was killed", sum(one["outages"] for one in ended)),
            (f"{what} that sat it out", sum(one["outages"] and one["runs"] == 1 for one in ended)),
            (f"{what} that said why and were run again", sum(one["runs"] > 1 for one in ended)),
            (same, f"{len(ended)} of {len(ended)}"),
        ]
    rows.append(("`train-student` killed at a checkpoint and run again: weights identical, bit for bit", sum(killed)))
    results_file.write(
        "prove_outage", "S7: a real S3 server, and clients of it, killed while dumps write and students read", rows
    )


if __name__ == "__main__":
    main()
