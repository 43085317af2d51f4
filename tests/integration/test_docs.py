"""The loop of docs/losses.md runs as it is printed, and trains."""

import re
from pathlib import Path

import torch

from kdcache.cache.reader import open_cache
from kdcache.dump.launch import dump
from kdcache.models import find_model, load_model
from tests.integration.test_dump import options

DOCS = Path(__file__).parents[2] / "docs"


def test_own_loop(tmp_path, monkeypatch, tiny_teacher, tiny_student, corpus_file):
    dump(options(tiny_teacher, corpus_file, tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "losses.md").read_text(), flags=re.DOTALL)
    student = load_model(find_model(tiny_student), dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    indices = list(range(len(open_cache("cache"))))
    losses = []
    for _ in range(5):
        names = {"student": student, "device": torch.device("cpu"), "batches": [indices]}
        exec(code, names)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(names["sums"].loss.detach()))
    assert losses == sorted(losses, reverse=True)
