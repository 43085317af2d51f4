"""Phase 1 as a whole: the cache equals the model's own logits, however the work was divided, stopped and taken up again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from kdcache.cache.commit import committed_shards
from kdcache.cache.quality import QUALITIES
from kdcache.cache.reader import open_cache
from kdcache.cache.store import LocalStore, open_store
from kdcache.dump.launch import dump, make_worker
from kdcache.dump.options import DumpOptions
from kdcache.dump.plan import make_plan
from kdcache.errors import CacheMismatchError, ConfigError, CorpusError
from kdcache.heads import OutputHead
from tests.abuse.crashes import assert_same, contents
from tests.conftest import VOCAB_SIZE, make_llama
from tests.strategies import log_softmax

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def options(teacher, corpus, output, **changes):
    given = {"seq_len": 64, "threads": 1, "batch_tokens": 512, "top_k": 8, "temperatures": (1.0, 2.0),
             "shard_positions": 600, "device": "cpu"}  # fmt: skip
    return DumpOptions(teacher=teacher, dataset=corpus, output=str(output), **(given | changes))


def own_logits(teacher, sequence):
    """``[N, V]`` float64 logits of transformers itself, a document at a time."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    ends = [*sequence.document_starts[1:], len(sequence)]
    rows = []
    for start, end in zip(sequence.document_starts, ends, strict=True):
        ids = torch.tensor(sequence.input_ids[start:end].astype(np.int64))[None]
        with torch.no_grad():
            rows.append(model(ids).logits[0].double().numpy())
    return np.concatenate(rows)[sequence.target_mask]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, tiny_teacher, corpus_file):
    """An uninterrupted dump by one worker."""
    folder = tmp_path_factory.mktemp("reference") / "cache"
    dump(options(tiny_teacher, corpus_file, folder))
    return folder


@pytest.mark.parametrize(("declared", "warned"), [(1e-9, True), (1e-3, False)])
def test_more_error_than_declared_is_said(tmp_path, tiny_teacher, corpus_file, monkeypatch, caplog, declared, warned):
    """Measured on what is stored, a shard and the whole cache; both name the way out."""
    monkeypatch.setitem(QUALITIES, "standard", replace(QUALITIES["standard"], max_kl=declared))
    found = dump(options(tiny_teacher, corpus_file, tmp_path / "c")).manifest.stats
    assert found.num_kl_targets > 0
    assert 1e-9 < found.sum_codec_kl / found.num_kl_targets < 1e-3
    said = [record.getMessage() for record in caplog.records if "the codec declares" in record.getMessage()]
    assert bool(said) == warned
    for where in ("shard 00000:", f"{tmp_path / 'c'}:") if warned else ():
        assert any(line.startswith(where) and "--quality high" in line for line in said)


# --- what is stored is what the model says ----------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
def test_an_exact_cache_holds_the_models_own_numbers(tmp_path, tiny_teacher, corpus_file, packing):
    dump(options(tiny_teacher, corpus_file, tmp_path / "c", codec="exact", packing=packing, split="train[:10]"))
    reader = open_cache(tmp_path / "c")
    documents = [len(reader.tokens(index).document_starts) for index in range(len(reader))]
    assert (max(documents) > 1) == packing
    for index in range(len(reader)):
        sequence, targets = reader[index].sequence, reader[index].targets
        logits = own_logits(tiny_teacher, sequence)
        logp = log_softmax(logits)
        ids = targets.token_ids.reshape(len(targets), 8).astype(np.int64)
        kept = np.take_along_axis(logp, ids, 1)
        np.testing.assert_allclose(targets.logprobs.reshape(-1, 8), kept, atol=2e-5)
        assert (kept.min(1) >= np.sort(logp, 1)[:, -8] - 1e-5).all(), "these are the most probable tokens"
        for t in (1.0, 2.0):
            left_out = np.exp(log_softmax(logits / t))
            np.put_along_axis(left_out, ids, 0, axis=1)
            np.testing.assert_allclose(targets.tail_at(t), np.log(left_out.sum(1)), atol=2e-5)
        labels = sequence.input_ids[1:][sequence.target_mask[:-1]].astype(np.int64)
        np.testing.assert_allclose(targets.label_logprobs, logp[np.arange(len(labels)), labels], atol=2e-5)
        np.testing.assert_allclose(targets.entropy, -(np.exp(logp) * logp).sum(1), atol=1e-4)
        np.testing.assert_allclose(targets.logz, np.logaddexp.reduce(logits, 1), atol=1e-4)


def test_a_packed_cache_stays_within_its_declared_error(reference, tiny_teacher):
    reader = open_cache(reference)
    for index in range(0, len(reader), 7):
        row = reader[index]
        logp = log_softmax(own_logits(tiny_teacher, row.sequence))
        ids = row.targets.token_ids.reshape(len(row.targets), -1).astype(np.int64)
        exact = np.take_along_axis(logp, ids, 1).ravel()
        bound = reader.codec.logprob_error_bound(exact)
        assert (np.abs(row.targets.logprobs - exact) <= bound + 1e-4).all()


def test_probabilities_above_one(reference):
    """Entries and tail together have mass one at every position and temperature, after all rounding."""
    reader = open_cache(reference)
    for index in range(len(reader)):
        targets = reader[index].targets
        for temperature in reader.temperatures:
            entries, tail = targets.at_temperature(temperature)
            mass = np.add.reduceat(np.exp(entries, dtype=np.float64), targets.offsets[:-1]) + np.exp(tail)
            np.testing.assert_allclose(mass, 1, atol=2e-6)
            assert entries.max() <= 0
            assert tail.max() <= 0


def test_padded_vocabulary_rows(tmp_path, corpus_file):
    """A teacher with 64 rows more than tokens: none of them is kept, none of them has mass."""
    teacher = make_llama(tmp_path / "m", vocab_size=VOCAB_SIZE + 64)
    dump(options(teacher, corpus_file, tmp_path / "c", codec="exact", top_k=VOCAB_SIZE, split="train[:3]"))
    reader = open_cache(tmp_path / "c")
    assert reader.vocab_size == VOCAB_SIZE
    for index in range(len(reader)):
        targets = reader[index].targets
        logp = log_softmax(own_logits(teacher, reader[index].sequence)[:, :VOCAB_SIZE])
        np.testing.assert_allclose(targets.logprobs.reshape(-1, VOCAB_SIZE), logp, atol=2e-5)
        assert (targets.tail_logprobs == -np.inf).all()


@pytest.mark.parametrize("id_tables", ["none", "context"])
def test_a_vocabulary_of_a_quarter_of_a_million(tmp_path, id_tables):
    """Ids past 2^16 and 2^17, in the text and among the entries, from the tokenizer to the reader."""
    vocab_size, rng = 262_144, np.random.default_rng(0)
    teacher = make_llama(tmp_path / "m", vocab_size=vocab_size, hidden_size=8, intermediate_size=8, num_attention_heads=1,
                         num_key_value_heads=1, num_hidden_layers=1)  # fmt: skip
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w1").save_pretrained(teacher)
    rows = [{"text": " ".join(f"w{i}" for i in rng.integers(0, vocab_size, 20))} for _ in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dump(options(teacher, str(tmp_path / "rows.jsonl"), tmp_path / "c", id_tables=id_tables))
    reader = open_cache(tmp_path / "c")
    assert reader.vocab_size == vocab_size
    assert (reader.spec.codec.id_tables is not None) == (id_tables == "context")
    found = [reader[index] for index in range(len(reader))]
    for row in found:
        logp = log_softmax(own_logits(teacher, row.sequence))
        ids = row.targets.token_ids.reshape(len(row.targets), 8).astype(np.int64)
        assert (np.take_along_axis(logp, ids, 1).min(1) >= np.sort(logp, 1)[:, -8] - 1e-5).all()
    for ids in (
        np.concatenate([row.sequence.input_ids for row in found]),
        np.concatenate([row.targets.token_ids for row in found]),
    ):
        assert (ids >= 1 << 17).any() and (ids < 1 << 16).any()


def test_a_tokenizer_with_more_tokens_than_the_teacher(tmp_path, corpus_file):
    teacher = make_llama(tmp_path / "m", vocab_size=VOCAB_SIZE - 10)
    with pytest.raises(
        CorpusError, match=rf"rows 0 to \d+: the tokenizer gives token \d+ \(.*, the teacher has {VOCAB_SIZE - 10}"
    ):
        dump(options(teacher, corpus_file, tmp_path / "c"))


def test_the_head_that_stands_is_compared_once_a_launch(tmp_path, tiny_teacher, corpus_file):
    """Of an object store that takes fetching it: gigabytes, by every rank."""
    given = options(tiny_teacher, corpus_file, tmp_path / "c", targets="hidden", split="train[:6]")
    dump(given)
    store = open_store(str(tmp_path / "c"))
    (name,) = (f"tables/{name}" for name in store.names_in("tables"))
    whole = store.read(name)
    store.replace(name, b"\0" + whole[1:])
    plan, rows = make_plan(store, given)
    make_worker(store, given, plan, rows, rank=1, size=2)
    assert store.read(name) != whole
    make_worker(store, given, plan, rows, rank=0, size=2)
    assert store.read(name) == whole


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_states_with_the_head_give_the_teacher_back(tmp_path, tiny_teacher, corpus_file, dtype):
    """Lossless: the stored states are the model's, bit for bit, and their logits have the stored normaliser."""
    dump(options(tiny_teacher, corpus_file, tmp_path / "c", targets="hidden", dtype=dtype, split="train[:6]"))
    reader = open_cache(tmp_path / "c")
    head = OutputHead.from_bytes(reader.head_bytes())
    assert str(head.weight.dtype) == f"torch.{dtype}"
    for index in range(len(reader)):
        targets = reader[index].targets
        stored = torch.tensor(targets.hidden)
        logits = head.logits(stored)
        np.testing.assert_allclose(targets.logz, logits.logsumexp(1), atol=2e-5)
        if dtype == "bfloat16":
            assert torch.equal(stored.bfloat16().float(), stored), "two bytes are all that a state has"


@pytest.mark.parametrize(
    ("suffix", "rows"),
    [
        ("jsonl", [{"prompt": "the cat", "completion": " sat on a mat."}] * 5),
        ("jsonl", [{"messages": [{"role": "user", "content": "the dog"},
                                 {"role": "assistant", "content": "saw green hills."}]}] * 5),
    ],
)  # fmt: skip
def test_prompts_are_read_but_not_kept(tmp_path, tiny_teacher, suffix, rows):
    path = tmp_path / f"rows.{suffix}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dump(options(tiny_teacher, str(path), tmp_path / "c"))
    reader = open_cache(tmp_path / "c")
    stats = reader.manifest.stats
    assert 0 < stats.num_targets < stats.num_positions - stats.num_sequences


# --- however the work is divided --------------------------------------------------------------------------------------


def test_two_workers_end_in_the_same_bytes(tmp_path, reference, tiny_teacher, corpus_file):
    dump(options(tiny_teacher, corpus_file, tmp_path / "c", workers=2))
    assert_same(tmp_path / "c", contents(reference))


def test_ranks_of_torchrun_end_in_the_same_bytes(tmp_path, reference, tiny_teacher, corpus_file):
    flags = ["--teacher", tiny_teacher, "--dataset", corpus_file, "--output", tmp_path / "c", "--seq-len", 64, "--threads", 1,
             "--batch-tokens", 512, "--top-k", 8, "--temperatures", "1,2", "--shard-positions", 600, "--device", "cpu"]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kdcache",
               "dump-teacher", *map(str, flags)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("tokens in") == 1, "the first rank speaks for all"
    assert_same(tmp_path / "c", contents(reference))


def test_tasks_of_srun_divide_the_shards(tmp_path, reference, tiny_teacher, corpus_file, monkeypatch):
    """The variables that srun sets are enough; the second task finds what the first has done."""
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    dump(options(tiny_teacher, corpus_file, tmp_path / "c"))
    assert_same(tmp_path / "c", contents(reference))


# --- stopped, and taken up again --------------------------------------------------------------------------------------


def test_a_second_run_is_done_at_once(reference, tiny_teacher, corpus_file):
    before = contents(reference)
    assert dump(options(tiny_teacher, corpus_file, reference)).already_done
    assert_same(reference, before)


def test_resume_holes(tmp_path, reference, tiny_teacher, corpus_file):
    """Shards missing in the middle are filled, and nothing else is touched."""
    cache = tmp_path / "c"
    shutil.copytree(reference, cache)
    (cache / "manifest.json").unlink()
    commits = sorted((cache / "commits").iterdir())
    for hole in (commits[1], commits[-2]):
        hole.unlink()
    kept = {path: path.stat().st_mtime_ns for path in (commits[0], commits[2])}
    dump(options(tiny_teacher, corpus_file, cache))
    assert_same(cache, contents(reference))
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())


def test_sigterm_finishes_the_shard_in_hand(tmp_path, reference, tiny_teacher, corpus_file):
    """It stops between shards, says how to go on, and the same command ends in the same bytes."""
    cache = tmp_path / "c"
    flags = ["--teacher", tiny_teacher, "--dataset", corpus_file, "--output", cache, "--seq-len", 64, "--threads", 1,
             "--batch-tokens", 512, "--top-k", 8, "--temperatures", "1,2", "--shard-positions", 600, "--device", "cpu"]  # fmt: skip
    script = (
        "import sys, time\nimport kdcache.dump.worker as w\nfrom kdcache.cli import main\n"
        "run = w.Worker.dump_shard\n"
        "def slow(self, lease):\n    time.sleep(0.5)\n    run(self, lease)\n"
        "w.Worker.dump_shard = slow\nmain(sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, "dump-teacher", *map(str, flags)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list((cache / "commits").glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, (out, err)
    assert "same command" in out + err
    assert 1 <= len(committed_shards(LocalStore(cache))) < len(list((reference / "commits").iterdir()))
    dump(options(tiny_teacher, corpus_file, cache))
    assert_same(cache, contents(reference))


CHANGES = [
    ({"top_k": 16}, "targets.k"),
    ({"seq_len": 32}, "corpus.seq_len"),
    ({"temperatures": (1.0, 4.0)}, "targets.temperatures"),
    ({"packing": False}, "corpus.packing"),
    ({"codec": "exact"}, "codec.name"),
    ({"split": "train[:50%]"}, "corpus.split"),
    ({"dtype": "bfloat16"}, "teacher.dtype"),
    ({"append_eos": False}, "corpus.append_eos"),
    ({"batch_tokens": 256}, "compute.batch_tokens"),
    ({"attention": "eager"}, "teacher.attention"),
]


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("change", "field"), CHANGES)
def test_another_argument_is_refused_by_field(tmp_path, reference, tiny_teacher, corpus_file, change, field, finished):
    cache = tmp_path / "c"
    shutil.copytree(reference, cache)
    if not finished:
        (cache / "manifest.json").unlink()
        sorted((cache / "commits").iterdir())[0].unlink()
    before = contents(cache)
    with pytest.raises(CacheMismatchError, match=field):
        dump(options(tiny_teacher, corpus_file, cache, **change))
    assert_same(cache, before)


def test_another_teacher_or_corpus_under_the_same_name_is_refused(tmp_path, corpus_file):
    teacher = make_llama(tmp_path / "m")
    corpus = tmp_path / "rows.jsonl"
    shutil.copy(corpus_file, corpus)
    dump(options(teacher, str(corpus), tmp_path / "c"))
    with open(corpus, "a") as stream:
        stream.write('{"text": "one more"}\n')
    with pytest.raises(CacheMismatchError, match=r"corpus\.digest"):
        dump(options(teacher, str(corpus), tmp_path / "c"))
    shutil.copy(corpus_file, corpus)
    make_llama(tmp_path / "m", seed=7)
    with pytest.raises(CacheMismatchError, match=r"teacher\.digest"):
        dump(options(teacher, str(corpus), tmp_path / "c"))


def test_a_teacher_that_moved_is_the_same_teacher(tmp_path, reference, tiny_teacher, corpus_file):
    cache, moved = tmp_path / "c", tmp_path / "elsewhere"
    shutil.copytree(reference, cache)
    shutil.copytree(tiny_teacher, moved)
    assert dump(options(str(moved), corpus_file, cache)).already_done
    (cache / "manifest.json").unlink()
    sorted((cache / "commits").iterdir())[0].unlink()
    dump(options(str(moved), corpus_file, cache))
    assert_same(cache, contents(reference))


def test_device_map_and_workers_exclude_each_other(tmp_path, tiny_teacher, corpus_file):
    with pytest.raises(ConfigError, match="--device-map auto"):
        dump(options(tiny_teacher, corpus_file, tmp_path / "c", workers=2, device_map="auto"))


def test_a_device_map_gives_the_same_cache(tmp_path, tiny_teacher, corpus_file, reference):
    """A teacher spread by accelerate (here over one CPU) dumps what it would dump in one piece."""
    dump(options(tiny_teacher, corpus_file, tmp_path / "c", device_map="auto"))
    assert_same(tmp_path / "c", contents(reference))


def test_a_failing_worker_process_ends_the_dump_with_its_error(tmp_path, corpus_file):
    """NaN in a worker of several: the parent raises the worker's own error, with its hint."""
    from kdcache.errors import TeacherOutputError

    teacher = make_llama(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(teacher)
    with pytest.raises(TeacherOutputError, match="NaN or Inf") as caught:
        dump(options(teacher, corpus_file, tmp_path / "c", workers=2))
    assert caught.value.hint
    assert not list(Path(tmp_path / "c").glob("commits/*"))
