"""S4: the n-th storage call of a dump fails, for every n; the dump ends well or says why, goes on, and the cache is the same.

On a folder the calls of the operating system fail, once or from then on (no space, I/O error, quota, stale handle), or do half of
what they were asked for; in an object store those of its client, once or from then on, before or after they took effect. Dumps
without and with id tables and of hidden states, and caches that are transcoded and copied, where reading the old one fails too.

    python benchmarks/prove_faults.py [--stride 1]
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import results_file
from tests.abuse.crashes import kinds, prepare, small_dump
from tests.abuse.faults import local_campaign, remote_campaign


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stride", type=int, default=1)
    args = parser.parse_args()
    logging.getLogger("kdcache").setLevel(logging.ERROR)
    lines = [
        "| store | cache | n-th call fails with | n | ended well | said why | wrong after going on |",
        "|---|---|---|---|---|---|---|",
    ]
    functions: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        options = small_dump(root, 4)
        os.environ["KDCACHE_COPIES"] = str(root / "copies")
        prepare()
        made = kinds(options, root)
        for name, campaign in (("folder", local_campaign), ("object store", remote_campaign)):
            for kind, here in made.items():
                print(name, kind, file=sys.stderr)
                for fault, row in campaign(here, root / name / kind, stride=args.stride).items():
                    functions |= set(row["functions"])
                    lines.append(
                        f"| {name} | {kind} | {fault} | {row['calls']} | {row['ended well']} | {row['said why']} | 0 |"
                    )
    notes = (
        "Any byte that differs from the undisturbed cache, any file too many or too few, and any error but a KDCacheError ends the campaign.\n"
        f"Functions of the operating system that failed: {', '.join(sorted(functions))}.\n"
    )
    results_file.write_text("prove_faults", "S4: every storage call fails", notes + "\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
