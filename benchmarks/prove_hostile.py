"""S3: caches made to do harm, each re-signed so that its digests hold; also a fuzz run over the reader.

Each is verified, asked for its status, opened, described, read, made into tensors to train on, transcoded, tidied up and repaired in a
process of its own with 2 GiB of memory and a minute, in which any process, any code from elsewhere, any writing but into the new cache and
any deleting but in the old one ends the attempt as harm. Every other one meets the codec's compiled loops, with every index checked.

    python benchmarks/prove_hostile.py [--number 2000] [--seed 0]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import results_file
from kdcache.dump.launch import dump
from kdcache.dump.options import DumpOptions
from tests.abuse.hostile import ATTACKS, campaign
from tests.conftest import make_llama, texts
from tests.golden.make import GOLDEN
from tests.strategies import make_plan, write_cache

OUTCOMES = ("refused", "found by verify", "read", "HARM")


def sound_caches(root: Path) -> list[Path]:
    """Small ones of every codec, and dumped ones of the schemes that draw or keep hidden states."""
    import json

    found = [root / name for name in ("packed", "exact")]
    for path in found:
        write_cache(path, make_plan(codec__name=path.name))
    corpus = root / "texts.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(6)))
    teacher = make_llama(root / "teacher")
    for scheme in ("systematic", "hybrid", "hidden"):
        found.append(root / scheme)
        dump(
            DumpOptions(
                teacher=teacher, dataset=str(corpus), output=str(found[-1]), seq_len=32, targets=scheme, top_k=4,
                num_draws=10, threads=1, device="cpu", shard_positions=200,
            )
        )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=2000, help="attacks of each kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["HF_DATASETS_CACHE"] = str(root / "datasets")
        # Made in a child: what forks for each attack must not have computed.
        child = os.fork()
        if not child:
            sound_caches(root)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        sound = [root / name for name in ("packed", "exact", "systematic", "hybrid", "hidden")]
        sound += [path for path in sorted(GOLDEN.iterdir()) if path.name.endswith(("id-tables", "sampled"))]
        table = campaign(sound, root, number=args.number, seed=args.seed)
    lines = ["| attack | tried | " + " | ".join(OUTCOMES) + " |", "|---" * (2 + len(OUTCOMES)) + "|"]
    for name in ATTACKS:
        counts = table[name]
        lines.append(f"| {name} | {sum(counts.values())} | " + " | ".join(str(counts[o]) for o in OUTCOMES) + " |")
    notes = (
        "`read`: values that could have been written (another level, another count), or the change met nothing that is read. HARM: a "
        "crash, any error that is not one of kdcache's, more than 2 GiB, more than a minute (two where it waits), a file written or deleted that is none of the cache's "
        "or of what it is transcoded into, a process or code started, a number out of range or an id twice handed on, an index past the end in a compiled loop (which every other "
        "attack meets, numba installed)."
    )
    results_file.write_text("prove_hostile", "S3: caches from strangers", "\n".join(lines) + "\n\n" + notes + "\n")
    if any(counts["HARM"] for counts in table.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
