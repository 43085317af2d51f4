"""S1: SIGKILL at every change of the cache's folder, then at random moments; resumed with 1, 2 and 3 workers; the finished cache is compared.

Of dumps without and with id tables and of hidden states, and of caches that are transcoded and copied.

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
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import results_file
from tests.abuse.crashes import assert_same, campaign, contents, every_commit_point, kinds, prepare, small_dump


def through_the_command_line(options: dict[str, Any], root: Path, *, num_kills: int) -> int:
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500, help="at random moments, of all kinds together")
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lines = [
        "| | SIGKILLs at random moments | runs of 1 to 3 workers | kill points | before there was a plan | halfway through a write "
        "| caches finished and compared | differ in a byte |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        options = small_dump(root, 40)
        kills_cli = through_the_command_line(options, root / "cli", num_kills=3)
        prepare()
        large, small = kinds(options, root), kinds({**options, "split": "train[:12]"}, root / "small")
        for number, kind in enumerate(large):
            print(kind, file=sys.stderr)
            at_random = campaign(
                large[kind], root / f"random-{number}", num_kills=-(-args.kills // len(large)), seed=args.seed + number,
                on_kill=lambda kills, caches: print(f"\r{kills} kills, {caches} caches", end="", file=sys.stderr),
            )  # fmt: skip
            points = every_commit_point(small[kind], root / f"points-{number}", stride=args.stride)
            lines.append(
                f"| {kind} | {at_random['kills']} | {at_random['runs']} | {points['kill_points']} | {points['before_the_plan']} | "
                f"{points['half_written']} | {at_random['finished_caches'] + points['kill_points']} | 0 |"
            )
    notes = (
        "Kill points: before and after each call that changes the folder, and halfway through each write. A cache that differs from the\n"
        "uninterrupted one in a byte, and a file lost, doubled, torn or left over, ends the campaign. Besides, the process groups of\n"
        f"{kills_cli} `dump-teacher --workers 2` were killed.\n"
    )
    results_file.write_text(
        "prove_crash", "S1: killed at any moment, a dump ends in the same bytes", notes + "\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()
