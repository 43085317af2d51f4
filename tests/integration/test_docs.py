"""The code of the pages under docs/ runs as it is printed, and does what it says."""

import json
import re
import shlex
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from kdcache.cache.reader import open_cache
from kdcache.cli import COMMANDS, main
from kdcache.dump.launch import dump
from kdcache.model_files import find_model
from kdcache.models import load_model, load_tokenizer
from tests import conftest
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


# --- recipes.md --------------------------------------------------------------------------------------------------------

# What makes the commands of the page small: added to each, or in the place of a number that is there.
SMALL = {
    "dump-teacher": ["--seq-len", "128", "--dtype", "float32", "--shard-positions", "512"],
    "generate": ["--seq-len", "128", "--dtype", "float32", "--shard-positions", "512", "--max-new-tokens", "8"],
    "train-student": ["--max-steps", "2", "--per-device-train-batch-size", "4"],
}
TINY = {"--hidden-size": "16", "--intermediate-size": "32", "--num-attention-heads": "2", "--layers": "1"}
METHODS = ("Hinton", "SeqKD", "RS-KD", "MiniLLM", "GKD", "DistiLLM ", "Minitron", "MiniPLM")


def small(arguments: list[str]) -> list[str]:
    """The command as it is printed, but for sizes."""
    given = [TINY.get(before, one) for before, one in zip(["", *arguments], arguments, strict=False)]
    return [re.sub(r"max_steps=\d+", "max_steps=2", one) for one in given] + SMALL.get(arguments[0], [])


def kept_by_hand(texts: list[str], large: str, small: str) -> list[str]:
    """The half of the texts that the large model finds likelier than the small one does, a token on average."""
    scores = np.zeros(len(texts))
    for folder, sign in ((large, 1), (small, -1)):
        model, tokenizer = load_model(find_model(folder), dtype=torch.float32), load_tokenizer(find_model(folder))
        for number, text in enumerate(texts):
            ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
            with torch.no_grad():
                logprobs = model(ids).logits[0, :-1].log_softmax(-1)
            scores[number] += sign * float(logprobs.gather(1, ids[0, 1:, None]).mean())
    return [texts[i] for i in sorted(np.argsort(scores)[len(texts) // 2 :])]


def test_recipes_run_as_printed(tmp_path, monkeypatch, tiny_teacher, tiny_student):
    """Every block of the page, in its order, with tiny models in the place of the names; what MiniPLM keeps is what it should."""
    page = (DOCS / "recipes.md").read_text()
    texts = [" ".join(text.split()[:30]) for text in conftest.texts(24)]
    for name, column in (("corpus", "text"), ("heldout", "text"), ("prompts", "prompt")):
        rows = texts if name == "corpus" else texts[:6]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({column: text}) + "\n" for text in rows))
    names = {
        "TEACHER": tiny_teacher, "TEACHER_2": conftest.make_llama(tmp_path / "second", seed=7), "REFERENCE": tiny_student,
        "STUDENT": tiny_student, "CORPUS": "corpus.jsonl", "HELD_OUT": "heldout.jsonl", "PROMPTS": "prompts.jsonl",
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == page.count("```") // 2
    for language, block in blocks:
        code = re.sub(r"\b[A-Z]+(?:_[A-Z0-9]+)*\b", lambda found: names.get(found[0], found[0]), block)
        if language == "python":
            exec(code, {})
            continue
        assert language == "bash"
        for line in filter(None, code.replace("\\\n", " ").splitlines()):
            program, *arguments = shlex.split(line, comments=True)
            assert program == "kdcache"
            done = CliRunner().invoke(main, small(arguments))
            assert done.exit_code == 0, f"{line}\n{done.output}"
    kept = [json.loads(line)["text"] for line in Path("kept.jsonl").read_text().splitlines()]
    assert kept == kept_by_hand(texts, tiny_teacher, tiny_student)


def test_miniplm_stops_where_a_row_is_not_a_sequence(tmp_path, monkeypatch, tiny_teacher):
    """An empty row and a text of two sequences: as many sequences as rows, but not theirs."""
    texts = ["", "the cat sat on a mat while rain fell from heavy clouds", "a dog", "the hills"]
    (tmp_path / "CORPUS").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "corpus.jsonl").write_bytes((tmp_path / "CORPUS").read_bytes())
    dump(options(tiny_teacher, str(tmp_path / "corpus.jsonl"), tmp_path / "scores-large", packing=False, seq_len=20))
    (tmp_path / "scores-small").symlink_to("scores-large")
    monkeypatch.chdir(tmp_path)
    assert len(open_cache("scores-large")) == len(texts)
    (select,) = code_of("recipes.md")
    with pytest.raises(SystemExit, match="a row is not one sequence"):
        exec(select, {})


def test_every_method_has_its_commands():
    page = (DOCS / "recipes.md").read_text()
    sections = re.split(r"^### ", page.split("\n## What was seen here")[0], flags=re.MULTILINE)[1:]
    for section in sections:
        commands = [block.split() for block in re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)]
        assert "train-student" in commands[-1], section
        assert "- **Differs**: " in section
        assert "- **Not offline**: " in section
    for method in METHODS:
        assert sum(section.startswith(method) for section in sections) == 1, method
