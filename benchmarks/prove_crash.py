"""S1: SIGKILL at every storage call, then at random moments; resumed with 1, 2 and 3 workers; the finished cache is compared.

python benchmarks/prove_crash.py [--kills 500] [--stride 1]
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import results_file
from tests.abuse.crashes import assert_same, campaign, contents, every_commit_point, prepare, small_dump


def through_the_command_line(options: dict, root: Path, *, num_kills: int) -> int:
    """The command itself with ``--workers 2``, its whole process group killed, then run again to the end."""
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "kdcache", "-q", "dump-teacher", *flags]
    subprocess.run([*command, "--output", str(root / "reference")], check=True, capture_output=True)
    kills = 0
    for number in range(num_kills):
        cache = root / f"cli-{number}"
        process = subprocess.Popen(
            [*command, "--workers", "2", "--output", str(cache)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while len(list((cache / "commits").glob("*.json"))) < 1 + number and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        subprocess.run(
            [*command, "--workers", str(1 + number % 3), "--output", str(cache)], check=True, capture_output=True
        )
        assert_same(cache, contents(root / "reference"))
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        options = small_dump(root, 40)
        kills_cli = through_the_command_line(options, root / "cli", num_kills=3)
        prepare()
        at_random = campaign(
            options, root / "random", num_kills=args.kills, seed=args.seed,
            on_kill=lambda kills, caches: print(f"\r{kills} kills, {caches} caches", end="", file=sys.stderr),
        )  # fmt: skip
        points = every_commit_point({**options, "split": "train[:12]"}, root / "points", stride=args.stride)
    results_file.write(
        "prove_crash",
        "S1: killed at any moment, a dump ends in the same bytes",
        [
            ("SIGKILLs at random moments", at_random["kills"]),
            ("runs of 1 to 3 workers", at_random["runs"]),
            ("caches finished and compared", at_random["finished_caches"] + points["kill_points"] + kills_cli),
            ("kill points (before and after each storage call)", points["kill_points"]),
            ("whole process groups of `dump-teacher --workers 2` killed", kills_cli),
            ("caches that differ from the uninterrupted one in any byte", 0),
            ("files lost, doubled, torn or left over", 0),
        ],
    )


if __name__ == "__main__":
    main()
