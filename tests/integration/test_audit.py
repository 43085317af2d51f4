"""``verify --against-teacher``: a cache that says what its teacher says passes, any other does not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from kdcache.cache.commit import commit_shard, publish_plan, read_commit, read_commits, read_plan, seal
from kdcache.cache.manifest import derive_manifest, to_json
from kdcache.cache.reader import open_cache
from kdcache.cache.shard import ShardBuilder
from kdcache.cache.store import LocalStore
from kdcache.cli import main
from kdcache.dump.audit import against_teacher
from kdcache.dump.launch import dump
from kdcache.dump.options import DumpOptions
from kdcache.errors import CacheMismatchError, ConfigError
from kdcache.targets import SparseTargets
from tests.conftest import make_llama, texts

SCHEMES = {
    "packed": {"top_k": 16},
    "exact": {"top_k": 16, "codec": "exact"},
    "top_p": {"targets": "top_p", "top_p": 0.5, "top_k": 16},
    "sampled": {"targets": "sampled", "num_draws": 20},
    "hidden": {"targets": "hidden"},
}


@pytest.fixture(scope="module")
def caches(tmp_path_factory, tiny_teacher, corpus_file):
    root = tmp_path_factory.mktemp("audit")
    for name, changes in SCHEMES.items():
        dump(DumpOptions.model_validate({"teacher": tiny_teacher, "dataset": corpus_file, "seq_len": 64, "dtype": "float32", "split": "train[:12]", "threads": 1,
                                         "output": str(root / name), **changes}))  # fmt: skip
    return root


@pytest.mark.parametrize("name", SCHEMES)
def test_a_cache_agrees_with_its_teacher(caches, name):
    audit = against_teacher(open_cache(caches / name), 6)
    assert audit.num_sequences == 6 and audit.num_targets > 50
    assert audit.agrees
    assert audit.live < 1e-6
    assert audit.stored < (1e-3 if open_cache(caches / name).codec.name == "packed" else 1e-6)


def test_its_error_is_the_one_that_the_dump_measured(caches):
    cache = open_cache(caches / "packed")
    stats = cache.manifest.stats
    audit = against_teacher(cache, len(cache))
    assert audit.num_targets == stats.num_targets
    assert audit.stored == pytest.approx(stats.sum_codec_kl / stats.num_kl_targets, rel=0.2)


def test_a_cache_of_other_targets_does_not(caches, tmp_path):
    """Well formed, aligned, with digests that hold, and half a nat off."""
    old = open_cache(caches / "packed")
    store = LocalStore(tmp_path / "off")
    plan = publish_plan(store, read_plan(old.store))
    for shard in range(plan.spec.num_shards):
        reader, builder = old.open_shard(shard), ShardBuilder(old.codec, plan.fingerprint, shard)
        for row in range(len(reader)):
            sequence = reader.sequence(row)
            said = reader.targets(row, sequence).expand(old.temperatures)
            flat = said.logprobs * np.float32(0.5)
            fields = {name: getattr(said, name) for name in SparseTargets.__slots__}
            builder.add(sequence, SparseTargets(**fields | {"logprobs": flat}))
        stats = read_commit(old.store, shard).stats
        commit_shard(store, plan, shard, memoryview(builder.finish()), stats, worker="w", seconds=0.0)
    seal(store)
    audit = against_teacher(open_cache(store.root), 6)
    assert not audit.agrees and audit.stored > 10 * audit.bound
    printed = CliRunner().invoke(main, ["verify", "--shallow", "--against-teacher", "6", str(store)])
    assert printed.exit_code == 1 and "does NOT say" in printed.output


def test_another_teacher_is_refused(caches, tmp_path):
    other = make_llama(tmp_path / "other", seed=9)
    with pytest.raises(CacheMismatchError, match="was filled by a teacher with digest"):
        against_teacher(open_cache(caches / "packed"), 2, teacher=other)
    refused = CliRunner().invoke(main, ["verify", str(caches / "packed"), "--against-teacher", "2", "--teacher", other])
    assert refused.exit_code == 1 and "--teacher names the model" in refused.output


def test_the_command(caches, tiny_teacher, tmp_path):
    printed = CliRunner().invoke(main, ["verify", str(caches / "packed"), "--against-teacher", "3"])
    assert printed.exit_code == 0, printed.output
    assert "3 sequences read again" in printed.output and "says what the teacher says" in printed.output
    moved = Path(tiny_teacher).rename(tmp_path / "moved")
    try:
        about = CliRunner().invoke(main, ["verify", str(caches / "hidden"), "--against-teacher", "1000", "--teacher", str(moved), "--json"])  # fmt: skip
    finally:
        moved.rename(tiny_teacher)
    assert about.exit_code == 0, about.output
    assert json.loads(about.stdout)["against_teacher"]["num_sequences"] == len(open_cache(caches / "hidden"))


def renamed(cache, path, name):
    """The same cache, whose author says that its teacher has another name; a name does not count."""
    shutil.copytree(cache, path)
    store = LocalStore(path)
    plan = read_plan(store)
    spec = plan.spec.model_copy(update={"teacher": plan.spec.teacher.model_copy(update={"name": name})})
    plan = plan.model_copy(update={"spec": spec})
    store.replace("plan.json", to_json(plan))
    store.replace("manifest.json", to_json(derive_manifest(plan, read_commits(store))))
    return store


@pytest.mark.parametrize("command", [["inspect", "--sequence", "0"], ["verify", "--shallow", "--against-teacher", "2"]])
def test_nothing_that_a_cache_names_is_imported(caches, tiny_teacher, tmp_path, monkeypatch, command):
    """The author of a cache chooses the teacher's name."""
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    store = renamed(caches / "packed", tmp_path / "cache", "package:evil.model")
    done = CliRunner().invoke(main, [*command, str(store)])
    assert done.exit_code == (0 if command[0] == "inspect" else 1), done.output
    assert (
        "not installed" in done.output
        and "pip install" not in done.output
        and ("showing token ids" if command[0] == "inspect" else "--teacher") in done.output
    )
    assert not (tmp_path / "ran").exists()
    named = "--tokenizer" if command[0] == "inspect" else "--teacher"
    done = CliRunner().invoke(main, [*command, named, tiny_teacher, str(store)])
    assert done.exit_code == 0, done.output


def test_weights_that_a_cache_names_are_no_pickles(tiny_teacher, tmp_path):
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_teacher, pickled)
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    store, corpus = LocalStore(tmp_path / "cache"), tmp_path / "texts.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(6)))
    dump(DumpOptions(teacher=str(pickled), dataset=str(corpus), seq_len=32, threads=1, top_k=4, output=str(store)))
    refused = CliRunner().invoke(main, ["verify", "--against-teacher", "2", str(store)])
    assert refused.exit_code == 1 and "--teacher names a model" in refused.output, refused.output
    named = CliRunner().invoke(main, ["verify", "--against-teacher", "2", "--teacher", str(pickled), str(store)])
    assert named.exit_code == 0, named.output


def test_an_attention_that_is_a_repository_is_refused(caches):
    """transformers would run its code."""
    reader = open_cache(caches / "packed")
    reader.spec.teacher.__dict__["attention"] = "kernels-community/flash-attn"
    with pytest.raises(ConfigError, match="is none of transformers' own"):
        against_teacher(reader, 2)
