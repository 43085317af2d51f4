"""S4: the n-th storage call of a dump fails, for every n; the dump ends well or says why, goes on, and the cache is the same.

On a folder the calls of the operating system fail once (no space, I/O error, quota, stale handle); in an object store those of its
client, once or from then on, before or after they took effect.

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
from tests.abuse.crashes import small_dump
from tests.abuse.faults import local_campaign, remote_campaign


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stride", type=int, default=1)
    args = parser.parse_args()
    logging.getLogger("kdcache").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        options = small_dump(root, 4)
        os.environ["KDCACHE_COPIES"] = str(root / "copies")
        lines = [
            "| store | n-th call fails with | n | ended well | said why | wrong after going on |",
            "|---|---|---|---|---|---|",
        ]
        for name, campaign in (("folder", local_campaign), ("object store", remote_campaign)):
            for kind, row in campaign(options, root / name, stride=args.stride).items():
                lines.append(f"| {name} | {kind} | {row['calls']} | {row['ended well']} | {row['said why']} | 0 |")
    notes = "Any byte that differs from the undisturbed cache, any file too many or too few, and any error but a KDCacheError ends the campaign.\n"
    results_file.write_text("prove_faults", "S4: every storage call fails once", notes + "\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
