"""S6: a writer is stopped past its lease at every change of the folder and goes on when another has finished; writers without leases.

python benchmarks/prove_writers.py [--stride 1] [--rounds 20]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import results_file
from tests.abuse.crashes import blind_writers, prepare, small_dump, stopped_writers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        options = small_dump(root, 6)
        prepare()
        stopped = stopped_writers(options, root / "stopped", stride=args.stride)
        blind = blind_writers(options, root / "blind", rounds=args.rounds, writers=3)
    rows = [
        (
            "writers stopped past their lease, before, halfway through and after every change of the folder, then let go on",
            stopped["stops"],
        ),
        ("caches finished meanwhile by another writer, then unchanged, byte for byte", stopped["stops"]),
        ("caches made by three writers at once that no lease keeps apart, byte for byte", blind["rounds"]),
        ("writers that ended otherwise than well", 0),
    ]
    results_file.write("prove_writers", "S6: two writers of one shard, and a writer stopped past its lease", rows)


if __name__ == "__main__":
    main()
