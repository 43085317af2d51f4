"""The chunked head when FSDP2 has cut the student over two ranks: the same loss and gradients as in one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdcache.cache.reader import open_cache
from kdcache.dump.launch import dump
from kdcache.model_files import find_model
from kdcache.models import load_model
from kdcache.train.forward import extend_forward, run_objective
from kdcache.train.objective import Objective
from kdcache.train.stream import CacheDataset, TargetDecoder, collate
from tests.conftest import make_llama
from tests.integration.test_dump import options


@pytest.mark.parametrize(("own_head", "tied"), [("yes", False), ("no", False), ("no", True)])
def test_sharded_heads(tmp_path, tiny_teacher, corpus_file, own_head, tied):
    dump(options(tiny_teacher, corpus_file, tmp_path / "cache"))
    student = make_llama(tmp_path / "student", seed=1, tie_word_embeddings=tied)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(Path(__file__).with_name("fsdp_step.py")), str(tmp_path / "cache"), student, own_head, str(tmp_path / "out.pt")]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    sharded = torch.load(tmp_path / "out.pt", weights_only=True)

    model = load_model(find_model(student), dtype=torch.float32).train()
    reader = open_cache(tmp_path / "cache")
    extend_forward(model, reader.vocab_size, None)
    data = CacheDataset(reader)
    batch = collate([data[i] for i in range(4)])
    decoders = [(1.0, TargetDecoder.for_cache(reader, 1.0, torch.device("cpu")))]
    sums = run_objective(model, batch, Objective(0.7), decoders)
    loss = sums.loss / int(batch["target_mask"].sum())
    loss.backward()
    torch.testing.assert_close(sharded["loss"], loss.detach(), rtol=1e-5, atol=1e-6)
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert sharded["gradients"].keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            sharded["gradients"][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
