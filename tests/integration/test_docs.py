"""The code of the pages under docs/ runs as it is printed, and does what it says."""

import re
from pathlib import Path

import click
import pytest
import torch

from kdcache.cache.reader import open_cache
from kdcache.cli import COMMANDS, main
from kdcache.dump.launch import dump
from kdcache.model_files import find_model
from kdcache.models import load_model, load_tokenizer
from tests.integration.test_dump import options
from tests.integration.test_train import losses, run

DOCS = Path(__file__).parents[2] / "docs"


def code_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


@pytest.fixture
def cache(tmp_path, monkeypatch, tiny_teacher, corpus_file):
    dump(options(tiny_teacher, corpus_file, tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return open_cache("cache")


@pytest.fixture
def student(tiny_student):
    return load_model(find_model(tiny_student), dtype=torch.float32).train()


def test_own_loop(cache, student):
    loop, _ = code_of("losses.md")
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    found = []
    for _ in range(5):
        names = {"student": student, "device": torch.device("cpu"), "batches": [list(range(len(cache)))]}
        exec(loop, names)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(names["sums"].loss.detach()))
    assert found == sorted(found, reverse=True)


def test_sparse_targets_in_a_loop(cache, student):
    """A row by hand gives the loss of the same row through collate and decoder."""
    loop, by_hand = code_of("losses.md")
    names = {"student": student, "device": torch.device("cpu"), "torch": torch}
    exec(by_hand, names)
    loop = re.sub(r"^objective = .*$", "objective = Objective(alpha=1.0, temperature=2.0)", loop, flags=re.MULTILINE)
    again = {"student": student, "device": torch.device("cpu"), "batches": [[0]]}
    exec(loop, again)
    torch.testing.assert_close(names["sums"].loss, again["sums"].loss, rtol=1e-6, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("adapters", [False, True])
def test_trl(cache, student, tiny_student, adapters):
    """SFTTrainer with our loss takes the steps of KDTrainer, where a step is the whole cache."""
    pytest.importorskip("trl")
    (page,) = code_of("trl.md")
    given = {"learning_rate": 3e-3, "lr_scheduler_type": "constant", "max_steps": 4, "logging_steps": 1, "seed": 0}
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": -(-len(cache) // 4), "max_grad_norm": 1.0,
                "optim": "adamw_torch", "weight_decay": 0.0, "use_cpu": True, "report_to": [], "bf16": False,
                "gradient_checkpointing": False, "dataloader_pin_memory": False, "save_strategy": "no", "disable_tqdm": True}  # fmt: skip
    names = {"student": student, "tokenizer": load_tokenizer(find_model(tiny_student)), "settings": given | settings}
    if adapters:
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        names["student"] = peft.get_peft_model(student, config)
    exec(page, names)
    theirs = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    assert theirs == sorted(theirs, reverse=True)
    if not adapters:
        run("cache", tiny_student, "ours", per_device_train_batch_size=len(cache), alpha=0.7, **given)
        assert theirs == pytest.approx(losses("ours"), abs=1e-4)


@pytest.mark.parametrize("page", ["recipes.md", "losses.md", "stores.md", "../README.md", "../pipelines/README.md"])
def test_flags_that_pages_name_are_there(page):
    commands = [main.get_command(click.Context(main), name) for name in COMMANDS]
    known = {flag for one in commands for option in one.params for flag in [*option.opts, *option.secondary_opts]}
    others = {"--nnodes", "--nproc-per-node", "--ntasks-per-node", "--gpus-per-node", "--nodes"}  # torchrun's, Slurm's
    for line in (DOCS / page).read_text().splitlines():
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", line))
        scripts = re.findall(r"\b(?:prove|bench)_\w+\.py|\benglish\.py", line)
        own = re.findall(r'"(--[a-z-]+)"', "".join((DOCS.parent / "benchmarks" / name).read_text() for name in scripts))
        assert named <= known | others | set(own), line
