"""S2: one bit flipped anywhere, files cut short, swapped, missing and doubled: what notices, here and in other formats?

Ours: the golden caches, of every codec and kind of scheme, each flip once before ``verify`` (digests only), which must name the
file, and once before a reader that reads everything. Others: the same number of flips in files of the same targets, read whole. Each reading is a
process of its own with bounded memory, since a flipped bit can crash a reader: it ends with an error, with other values than
were written (silently wrong), with the same values, or is killed.

    python benchmarks/prove_corruption.py [--flips 3000]
"""

from __future__ import annotations

import argparse
import importlib.machinery
import io
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import safetensors.numpy

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import results_file
from benchmarks.peers import arrow_zstd, parquet, safetensors_zstd
from kdcache.cache.reader import open_cache
from tests.abuse.corruption import are_named, audited
from tests.golden.make import GOLDEN
from tests.strategies import targets_from_logits, zipf_logits

ERROR, WRONG, SAME, KILLED = "error", "silently wrong", "the same values", "killed the reader"
MEMORY = 4 << 30
SECONDS = 20


def outcome(run: Callable[[], bool]) -> str:
    """Of ``run`` in a child: whether what it read is what was written, or how it ended."""
    child = os.fork()
    if child == 0:
        os.close(2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        code = 2
        try:
            code = 0 if run() else 1
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return KILLED
    return {0: SAME, 1: WRONG, 2: ERROR}[os.WEXITSTATUS(status)]


def flip(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    changed[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


# --- ours -------------------------------------------------------------------------------------------------------------


def contents(folder: Path, *, check_digests: bool = True) -> list[bytes]:
    """Everything that a reader gives; also where digests do not hold, if that is asked."""
    cache = open_cache(folder)
    if not check_digests:
        cache._whole.update(range(len(cache.manifest.shards.shard)))
    out = []
    for row in cache:
        t, s = row.targets, row.sequence
        arrays = (s.input_ids, s.loss_mask, s.document_starts, t.num_entries, t.token_ids, t.logprobs, t.tail_logprobs, t.logz,
                  t.label_logprobs, t.entropy, t.hidden, t.counts)  # fmt: skip
        out += [np.ascontiguousarray(array).tobytes() for array in arrays if array is not None]
    return out


def kind_of(name: str) -> str:
    return name.split("/")[0].removesuffix(".json")


def sequence_at(shard: bytes, place: int) -> int | None:
    """The sequence that a byte of a shard is of; None for what holds sequences together."""
    batch = pa.ipc.open_file(shard).get_batch(0)
    for column in batch.columns:
        if pa.types.is_large_binary(column.type):
            cells = column.to_pylist()
            start = shard.index(b"".join(cells))
            for row, cell in enumerate(cells):
                if start <= place < start + len(cell):
                    return row
                start += len(cell)
    return None


def our_flips(
    folder: Path,
    flips: int,
    rng: np.random.Generator,
    verified: Counter,
    named: Counter,
    read: Counter,
    sequences: Counter,
) -> None:
    """Flips spread over all files alike, so that small files are hit as often as large ones."""
    before, paths = contents(folder), sorted(path for path in folder.rglob("*") if path.is_file())
    for number in range(flips):
        path = paths[number % len(paths)]
        kind, whole = kind_of(str(path.relative_to(folder))), path.read_bytes()
        changed = flip(whole, rng)
        path.write_bytes(changed)
        audit = audited(folder, deep=False)
        if kind == "shards":
            place = next(i for i, (a, b) in enumerate(zip(whole, changed, strict=True)) if a != b)
            hit, told = sequence_at(whole, place), re.search(r"damaged are sequences ([\d, ]+) of", audit.problems[0])
            sequences[None if hit is None else "none" if told is None else told[1] == str(hit)] += 1
            if hit is not None and told is None:
                sequences["none, same values"] += contents(folder, check_digests=False) == before
        verified[kind, not audit.intact] += 1
        named[kind, are_named(audit, path)] += 1
        read[kind, outcome(lambda: contents(folder) == before)] += 1
        path.write_bytes(whole)
    assert audited(folder).intact


def our_files(folder: Path) -> Counter:
    """Files cut short, swapped with another of their kind, missing, doubled in another's place, and commits under a second name."""
    found: Counter = Counter()

    def note(what: str, *damaged: Path) -> None:
        audit = audited(folder, deep=False)
        # A commit that is gone is a shard to be made, and said to be.
        missing = [int(path.stem) for path in damaged if path.parent.name == "commits" and not path.exists()]
        by_name = audit.missing == missing if missing else are_named(audit, *damaged)
        found[what, "noticed", not audit.intact or bool(missing and by_name)] += 1
        found[what, "named", by_name] += 1

    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        whole = path.read_bytes()
        for length in sorted({0, 1, len(whole) // 2, len(whole) - 1}):
            path.write_bytes(whole[:length])
            note("cut short", path)
        path.unlink()
        if path.name == "manifest.json":
            assert audited(folder).intact, "it follows from the commits: a cache without it is one that was not sealed"
        else:
            note("missing", path)
        path.write_bytes(whole)
        for other in (one for one in paths if one.parent == path.parent and one != path):
            theirs = other.read_bytes()
            path.write_bytes(theirs)
            note("doubled", path)
            other.write_bytes(whole)
            # Without a plan nothing can be said of the manifest.
            note("swapped", *(one for one in (path, other) if one.name != "manifest.json"))
            path.write_bytes(whole)
            other.write_bytes(theirs)
        if path.parent.name == "commits":
            for second in (f"0{path.name}", f"{int(path.stem) + 10_000:05d}.json"):
                (path.parent / second).write_bytes(whole)
                audit = audited(folder, deep=False)
                found["a second name for a commit", "noticed", not audit.intact] += 1
                found["a second name for a commit", "named", any(second in line for line in audit.problems)] += 1
                (path.parent / second).unlink()
    assert audited(folder).intact
    return found


# --- others -----------------------------------------------------------------------------------------------------------


def other_formats() -> dict[str, tuple[bytes, Callable[[bytes], list[np.ndarray]]]]:
    """Bytes of a file of top-8 targets, and what reads all of it."""
    rng, k = np.random.default_rng(0), 8
    targets = targets_from_logits(zipf_logits(rng, 300, 5000), rng.integers(0, 5000, 300), k)

    def plain_arrow() -> bytes:
        sink = pa.BufferOutputStream()
        table = read_arrow_table(arrow_zstd(targets, k))
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()

    def read_arrow_table(data: bytes) -> pa.Table:
        return pa.ipc.open_file(pa.py_buffer(data)).read_all()

    def flat(table: pa.Table) -> list[np.ndarray]:
        return [table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False) for name in table.column_names]

    def checked(data: bytes) -> list[np.ndarray]:
        return flat(pyarrow.parquet.read_table(io.BytesIO(data), page_checksum_verification=True))

    def with_checksums() -> bytes:
        sink = io.BytesIO()
        table = pyarrow.parquet.read_table(io.BytesIO(parquet(targets, k)))
        pyarrow.parquet.write_table(table, sink, compression="zstd", write_page_checksum=True)
        return sink.getvalue()

    def tensors(data: bytes) -> list[np.ndarray]:
        return list(safetensors.numpy.load(data).values())

    import zstandard

    squeezed = safetensors_zstd(targets, k)
    return {
        "Arrow IPC": (plain_arrow(), lambda data: flat(read_arrow_table(data))),
        "Arrow IPC, zstd": (arrow_zstd(targets, k), lambda data: flat(read_arrow_table(data))),
        "Parquet, zstd": (parquet(targets, k), lambda data: flat(pyarrow.parquet.read_table(io.BytesIO(data)))),
        "Parquet, zstd, page checksums asked for": (with_checksums(), checked),
        "safetensors": (zstandard.ZstdDecompressor().decompress(squeezed), tensors),
        "safetensors, zstd": (squeezed, lambda data: tensors(zstandard.ZstdDecompressor().decompress(data))),
    }


def mosaicml(folder: Path) -> tuple[bytes, Callable[[bytes], list[np.ndarray]]] | None:
    """The same targets in MDS, as its defaults write and read it; the package is brought for the occasion. None without it."""
    packages = ["mosaicml-streaming==0.13.0", "brotli", "python-snappy", "cramjam", "zstd", "catalogue"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(folder / "lib"),
        *packages,
    ]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        return None
    sys.path.insert(0, str(folder / "lib"))
    import transformers  # before there is a torchvision that is none

    assert transformers.__version__
    stubs = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    for name in stubs:
        stub: Any = types.ModuleType(name)  # only its vision datasets need it
        stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
        stub.__path__, stub.__getattr__ = [], lambda attribute: type(attribute, (), {})
        sys.modules.setdefault(name, stub)
    from streaming import LocalDataset, MDSWriter

    for name in stubs:
        del sys.modules[name]
    rng, k = np.random.default_rng(0), 8
    targets = targets_from_logits(zipf_logits(rng, 300, 5000), rng.integers(0, 5000, 300), k)
    ids, values = targets.token_ids.reshape(-1, k).astype(np.uint16), targets.logprobs.reshape(-1, k).astype(np.float16)
    out = folder / "mds"
    with MDSWriter(out=str(out), columns={"ids": "ndarray:uint16", "logprobs": "ndarray:float16"}) as writer:
        for one in zip(ids, values, strict=True):
            writer.write(dict(zip(("ids", "logprobs"), one, strict=True)))
    shard = out / "shard.00000.mds"

    def read(data: bytes) -> list[np.ndarray]:
        shard.write_bytes(data)
        rows = LocalDataset(str(out))
        return [array for i in range(len(rows)) for array in rows[i].values()]

    return shard.read_bytes(), read


def their_flips(
    data: bytes, read: Callable[[bytes], list[np.ndarray]], flips: int, rng: np.random.Generator
) -> Counter:
    before = [array.tobytes() for array in read(data)]
    found: Counter = Counter()
    for _ in range(flips):
        changed = flip(data, rng)
        found[outcome(lambda changed=changed: [array.tobytes() for array in read(changed)] == before)] += 1
    return found


# --- the table --------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=3000, help="of ours in all, and of each other format")
    args = parser.parse_args()
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    rng = np.random.default_rng(0)
    verified: Counter = Counter()
    named: Counter = Counter()
    read: Counter = Counter()
    sequences: Counter = Counter()
    files: Counter = Counter()
    caches = sorted(GOLDEN.iterdir())
    with tempfile.TemporaryDirectory() as temporary:
        for golden in caches:
            folder = Path(temporary) / golden.name
            shutil.copytree(golden, folder)
            our_flips(folder, -(-args.flips // len(caches)), rng, verified, named, read, sequences)
            files += our_files(folder)
    lines = [
        "| kdcache, flips in | flips | noticed by `verify` | file named | reading: error | same values | silently wrong | killed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in sorted({kind for kind, _ in verified}):
        number = verified[kind, True] + verified[kind, False]
        ends = [read[kind, end] for end in (ERROR, SAME, WRONG, KILLED)]
        lines.append(
            f"| {kind} | {number:,} | {verified[kind, True] / number:.1%} | {named[kind, True] / number:.1%} | "
            f"{' | '.join(map(str, ends))} |"
        )
    lines += ["", "| kdcache, whole files | cases | noticed | files named |", "|---|---|---|---|"]
    for what in ("cut short", "missing", "swapped", "doubled", "a second name for a commit"):
        number = files[what, "noticed", True] + files[what, "noticed", False]
        noticed, by_name = files[what, "noticed", True] / number, files[what, "named", True] / number
        lines.append(f"| {what} | {number} | {noticed:.1%} | {by_name:.1%} |")
    lines += [
        "",
        "Named: `verify` names the file (of a shard its number and its rows of the corpus, of a table its digest) and calls no other shard damaged.",
        f"Of the flips in shards {sequences[True] + sequences['none']} hit a sequence, which `verify` then names in {sequences[True]} cases, and no other one in any; in the other {sequences['none']}",
        f"all values are as they were: bits that no reader of zstd looks at. The rest ({sequences[None]}) hit what holds sequences together. Missing files do not count `manifest.json`: it follows from the commits, and",
        "a cache without it is one that was not sealed.",
        "",
        "| others, flips | flips | reading: error | same values | silently wrong | killed |",
        "|---|---|---|---|---|---|",
    ]
    others = other_formats()
    mds = tempfile.TemporaryDirectory()
    if (mosaic := mosaicml(Path(mds.name))) is not None:
        others["MDS (mosaicml-streaming 0.13.0)"] = mosaic
    for name, (data, reader) in others.items():
        found = their_flips(data, reader, args.flips, rng)
        lines.append(
            f"| {name} | {args.flips:,} | {' | '.join(f'{found[end] / args.flips:.1%}' for end in (ERROR, SAME, WRONG, KILLED))} |"
        )
    mds.cleanup()
    results_file.write_text("prove_corruption", "S2: flipped bits and lost files", "\n".join(lines) + "\n")
    assert not any(count for (_, noticed), count in verified.items() if not noticed)
    assert not any(count for (_, by_name), count in named.items() if not by_name)
    assert not sequences[False]
    assert sequences["none"] == sequences["none, same values"]
    assert not any(count for (_, end), count in read.items() if end in (WRONG, KILLED))
    assert not any(count for (_, _, well), count in files.items() if not well)


if __name__ == "__main__":
    main()
