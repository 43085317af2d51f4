"""S7: a real S3 server (SeaweedFS) is killed and started again while a dump writes to it and while students read from it.

The caches are those that a folder gets, byte for byte, and the students' weights those of a student that read from a folder.

    python benchmarks/prove_outage.py [--dumps 8] [--students 4]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import results_file
from tests.abuse.crashes import dump_here, small_dump
from tests.abuse.outage import command, dump_through_outage, train_through_outage
from tests.conftest import make_llama
from tests.object_stores import seaweed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dumps", type=int, default=8)
    parser.add_argument("--students", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as folder, seaweed(Path(folder) / "seaweed") as server:
        root = Path(folder)
        options = small_dump(root, 64)
        os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        student = make_llama(root / "init", seed=1, hidden_size=16, num_hidden_layers=1)
        learn = {"student": student, "max_steps": 60, "per_device_train_batch_size": 4}
        dump_here({**options, "output": str(root / "reference")})
        where = {"cache": root / "reference", "output": root / "student"}
        subprocess.run(command("train-student", learn | where), check=True, capture_output=True)
        dumps, students = [], []
        for number in range(args.dumps):
            dumps.append(
                dump_through_outage(
                    options, root, server, name=f"cache-{number}", num_commits=int(rng.integers(0, 20)),
                    seconds=float(rng.uniform(0, 3)),
                )
            )  # fmt: skip
            print("dump", number, dumps[-1], file=sys.stderr)
        for number in range(args.students):
            os.environ["KDCACHE_COPIES"] = str(root / f"copies-{number}")
            seconds = float(rng.uniform(0, 3))
            students.append(
                train_through_outage(learn, root, server, cache="cache-0", name=f"student-{number}", seconds=seconds)
            )
            print("student", number, students[-1], file=sys.stderr)
    rows: list[tuple[str, object]] = []
    for what, found, same in (("dumps", dumps, "caches identical to a folder's, byte for byte"),
                              ("students", students, "weights identical to a folder's, bit for bit")):  # fmt: skip
        rows += [
            (f"{what} during which the server was killed", sum(one["outages"] for one in found)),
            (f"{what} that sat it out", sum(one["outages"] and one["runs"] == 1 for one in found)),
            (f"{what} that said why and were run again", sum(one["runs"] > 1 for one in found)),
            (same, f"{len(found)} of {len(found)}"),
        ]
    results_file.write("prove_outage", "S7: a real S3 server killed while dumps write and students read", rows)


if __name__ == "__main__":
    main()
