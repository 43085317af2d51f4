"""What is planned is what comes: bytes and tokens against a real dump, losses against dense sums, break-even against counting."""

import json
import shlex
import shutil
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from kdcache.budget import costs as costs_module
from kdcache.budget.costs import Costs, check_disk
from kdcache.budget.footprint import read_shape
from kdcache.budget.measure import plan_budget
from kdcache.budget.options import PlanOptions, command_line, parse_scheme, scheme_name
from kdcache.cache.reader import open_cache
from kdcache.cli import main
from kdcache.dump import size
from kdcache.dump.engines.transformers import pad_batch
from kdcache.dump.estimate import Timing, _teacher_seconds, draw_error, kl_of_truncation
from kdcache.dump.launch import dump
from kdcache.dump.plan import draft_spec
from kdcache.dump.select import select
from kdcache.dump.size import count_corpus, spread
from kdcache.specs import TargetSpec
from kdcache.train.stream import KDBatchSampler
from tests.conftest import VOCAB_SIZE, make_llama
from tests.integration.test_dump import options as dumped
from tests.integration.test_dump import own_logits
from tests.strategies import log_softmax

COMPARED = ["systematic:25", "top_p:0.9:8", "hidden"]


def asked(teacher, corpus, **changes):
    given = {"seq_len": 64, "threads": 1, "batch_tokens": 512, "top_k": 8, "temperatures": (1.0, 2.0), "shard_positions": 600,
             "device": "cpu", "compare": [], "output": "/nowhere/cache"}  # fmt: skip
    return PlanOptions(teacher=teacher, dataset=corpus, **(given | changes))


def refused(*arguments):
    result = CliRunner().invoke(main, ["plan", *map(str, arguments)])
    assert result.exit_code == 1 and "hint:" in result.stderr, (result.output, result.exception)
    return result.stderr


def test_tokens_that_the_teacher_does_not_have_are_named(tmp_path, corpus_file):
    teacher = make_llama(tmp_path / "m", vocab_size=VOCAB_SIZE - 10)
    assert f"the teacher has {VOCAB_SIZE - 10} tokens" in refused(
        "--teacher", teacher, "--dataset", corpus_file, "--seq-len", 64, "--pilot-sequences", 20
    )


# --- against a real dump ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def budget(tiny_teacher, tiny_student, corpus_file):
    return plan_budget(
        asked(tiny_teacher, corpus_file, pilot_sequences=60, compare=COMPARED, student=tiny_student,
              train_temperatures=(1.0, 3.0), price_per_hour=2.0)
    )  # fmt: skip


@pytest.fixture(scope="module")
def caches(tmp_path_factory, tiny_teacher, corpus_file):
    """Real dumps of the planned schemes, by name."""
    root, found = tmp_path_factory.mktemp("dumped"), {}
    for name in ["top_k:8", *COMPARED]:
        given = parse_scheme(name)
        dump(dumped(tiny_teacher, corpus_file, root / name, **given))
        found[name] = open_cache(root / name)
    return found


def test_planned_tokens_sequences_and_shards_are_those_of_the_dump(budget, caches):
    stats, corpus = caches["top_k:8"].manifest.stats, budget.corpus
    assert corpus.num_positions == stats.num_positions
    assert corpus.num_sequences == stats.num_sequences
    assert corpus.num_shards == caches["top_k:8"].manifest.spec.num_shards
    assert corpus.num_cut == stats.num_rows_split + stats.num_rows_truncated
    assert corpus.num_skipped == stats.num_rows_skipped
    assert corpus.error == 0


def test_planned_padding_is_what_a_dump_computes(budget, tmp_path, tiny_teacher, corpus_file, monkeypatch):
    shapes = []

    def noted(batch):
        shapes.append(pad_batch(batch))
        return shapes[-1]

    monkeypatch.setattr("kdcache.dump.engines.transformers.pad_batch", noted)
    dump(dumped(tiny_teacher, corpus_file, tmp_path / "c"))
    assert budget.corpus.num_padded == sum(ids.numel() for ids, _ in shapes) > budget.corpus.num_positions


def test_hours_do_not_depend_on_how_the_pilot_was_padded():
    """Of the same 200 positions 50 are tokens, or all; the corpus is padded by a tenth."""
    for tokens in (50, 200):
        seconds = _teacher_seconds([Timing(tokens, 200, 2.0, tokens / 50)] * 3, 1.1)
        assert seconds == pytest.approx(2.0 / 200 * 1.1 + 1 / 50)


def test_planned_bytes_are_near_those_of_the_dump(budget, caches):
    """Whole files, from about half of the sequences."""
    assert [one.estimate.name for one in budget.schemes] == ["top_k:8", *COMPARED]
    for one in budget.schemes:
        reader = caches[one.estimate.name]
        folder = Path(reader.store.location)
        tables = sum(path.stat().st_size for path in folder.glob("tables/*"))
        assert one.estimate.shard_bytes == pytest.approx(reader.manifest.num_bytes, rel=0.03), one.estimate.name
        assert one.total_bytes == pytest.approx(reader.manifest.num_bytes + tables, rel=0.03)
        stats = reader.manifest.stats
        if one.estimate.name != "hidden":
            assert one.estimate.entries == pytest.approx(stats.num_entries / stats.num_targets, rel=0.02)
            assert one.estimate.mass == pytest.approx(1 - stats.sum_tail_mass / stats.num_targets, abs=0.02)


def test_a_pilot_of_everything_with_id_tables(tmp_path, tiny_teacher, corpus_file):
    """Tables are counted on one half and tried on the other."""
    found = plan_budget(asked(tiny_teacher, corpus_file, pilot_sequences=500, id_tables="global")).schemes[0]
    dump(dumped(tiny_teacher, corpus_file, tmp_path / "c", id_tables="global"))
    reader = open_cache(tmp_path / "c")
    assert reader.spec.codec.id_tables is not None
    assert found.estimate.shard_bytes == pytest.approx(reader.manifest.num_bytes, rel=0.04)
    assert found.estimate.table_bytes == sum(path.stat().st_size for path in (tmp_path / "c").glob("tables/*"))


def test_the_command_it_ends_with_is_the_dump_it_planned(tmp_path, tiny_teacher, corpus_file):
    given = asked(
        tiny_teacher, corpus_file, packing=False, output=str(tmp_path / "c"), targets="systematic", num_draws=10
    )
    words = shlex.split(command_line(given.dump_options()))
    assert words[:2] == ["kdcache", "dump-teacher"] and "--no-packing" in words
    result = CliRunner().invoke(main, words[1:])
    assert result.exit_code == 0, result.output
    spec, draft = open_cache(tmp_path / "c").spec, draft_spec(given.dump_options()).spec
    assert spec.fingerprint == draft.fingerprint
    assert scheme_name(given.dump_options()) == "systematic:10"


# --- against dense sums -----------------------------------------------------------------------------------------------


def test_what_truncation_loses_equals_a_dense_sum(budget, caches, tiny_teacher):
    """KL(teacher ‖ stored) in float64 over the whole vocabulary, the tail spread evenly over what is left out."""
    reader = caches["top_k:8"]
    dense, ours = [], []
    for index in range(len(reader)):
        row = reader[index]
        logp = log_softmax(own_logits(tiny_teacher, row.sequence))
        tail = row.targets.tail_logprobs[:, 0].astype(np.float64)
        logq = np.repeat((tail - np.log(VOCAB_SIZE - 8))[:, None], VOCAB_SIZE, axis=1)
        ids = row.targets.token_ids.reshape(len(tail), 8).astype(np.int64)
        np.put_along_axis(logq, ids, row.targets.logprobs.reshape(-1, 8), axis=1)
        dense.append((np.exp(logp) * (logp - logq)).sum(1))
        said = row.targets.__class__(
            **{name: getattr(row.targets, name) for name in ("temperatures", "num_entries", "token_ids", "logz", "label_logprobs")},
            logprobs=np.take_along_axis(logp, ids, 1).ravel().astype(np.float32),
            tail_logprobs=row.targets.tail_logprobs,
            entropy=-(np.exp(logp) * logp).sum(1).astype(np.float32),
        )  # fmt: skip
        said.tail_logprobs[:, 0] = np.log1p(-np.exp(np.take_along_axis(logp, ids, 1)).sum(1))
        ours.append(kl_of_truncation(said, reader[index].targets, VOCAB_SIZE))
        np.testing.assert_allclose(ours[-1], dense[-1], atol=2e-5)
    planned = budget.schemes[0].estimate.kl
    assert planned == pytest.approx(float(np.concatenate(dense).mean()), rel=0.03), "the pilot is a sample"
    assert next(one for one in budget.schemes if one.estimate.name == "hidden").estimate.kl == 0


@pytest.mark.parametrize(("scheme", "k"), [("sampled", 0), ("systematic", 0), ("hybrid", 3)])
def test_the_error_of_draws_equals_that_of_many_draws(scheme, k):
    repeats, draws = 20_000, 6
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(0, 2, (1, 24)), dtype=torch.float32).repeat(repeats, 1)
    spec = TargetSpec(scheme=scheme, k=k, temperatures=(1.0,), num_draws=draws)
    uniforms = rng.random((repeats, 1, draws if scheme == "sampled" else 1))
    chosen = select(logits, torch.zeros(repeats, dtype=torch.int64), spec, torch.from_numpy(uniforms))
    t = torch.softmax(logits[:1].double(), dim=1)
    used = torch.arange(chosen.token_ids.shape[1]) < chosen.num_entries[:, None]
    counts = torch.where(used, chosen.counts[:, :, 0], 0).double()
    exact = used & (counts == 0)
    rest = 1 - (t.expand(repeats, -1).gather(1, chosen.token_ids) * exact).sum(1, keepdim=True)
    tau_used = torch.where(exact, t.expand(repeats, -1).gather(1, chosen.token_ids), rest * counts / draws)
    tau = torch.zeros(repeats, 24, dtype=torch.float64).scatter_add_(1, chosen.token_ids, tau_used * used)
    measured = (tau - t).square().sum(1).mean()
    given = (chosen.token_ids[:1], exact[:1]) if k else None
    assert float(draw_error(t, draws, scheme, given)[0]) == pytest.approx(float(measured), rel=0.03)


# --- sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("student", [None, 0.0, 41.0])
@pytest.mark.parametrize(("dump_seconds", "teacher"), [(10.0, 3.0), (10.0, 5.0), (1.0, 7.0), (1234.5, 0.7)])
def test_break_even_is_the_first_number_of_runs_that_is_cheaper(dump_seconds, teacher, student):
    found = Costs(dump_seconds, teacher, student)
    first = next(n for n in range(1, 10_000) if found.cached(n) < found.live(n) - 1e-9)
    assert found.break_even == first


@pytest.mark.parametrize(("num_sequences", "steps"), [(39, 40), (39, 2), (39, 13), (8, 3), (5, 7), (640, 100)])
@pytest.mark.parametrize(("batch", "accumulation", "ranks"), [(8, 1, 1), (2, 2, 2), (3, 1, 4)])
def test_planned_passes_are_those_of_the_sequences_that_training_reads(
    num_sequences, steps, batch, accumulation, ranks
):
    """Against the batches themselves, whose last one of an epoch is not full."""
    planned = PlanOptions(teacher="t", dataset="d", max_steps=steps, num_train_epochs=3, per_device_train_batch_size=batch,
                          gradient_accumulation_steps=accumulation, gpus_per_student=ranks)  # fmt: skip
    read = 0
    for rank in range(ranks):
        sampler = KDBatchSampler(
            num_sequences, batch, accumulation=accumulation, fingerprint="0" * 32, rank=rank, world_size=ranks
        )
        batches = islice(chain.from_iterable(repeat(sampler)), steps * accumulation)
        read += sum(index >= 0 for micro_batch in batches for index in micro_batch)
    assert planned.passes(num_sequences) == pytest.approx(read / num_sequences)
    assert planned.model_copy(update={"max_steps": -1}).passes(num_sequences) == 3


def test_counted_shards_say_how_far_off_they_may_be(tiny_teacher, corpus_file, monkeypatch):
    draft = draft_spec(asked(tiny_teacher, corpus_file).dump_options())
    everything = count_corpus(draft, sample=False)
    monkeypatch.setattr(size, "SAMPLED_SHARDS", 8)
    some = count_corpus(draft, sample=True)
    assert 0 < some.error < 1
    assert abs(some.num_positions - everything.num_positions) <= 1.5 * some.error * some.num_positions
    assert (some.num_rows, some.num_shards) == (everything.num_rows, everything.num_shards)
    assert spread(10, 3) == [1, 5, 8] and spread(3, 9) == [0, 1, 2]


def test_what_should_be_known_is_said(budget, tmp_path, tiny_teacher, corpus_file, monkeypatch):
    said = "\n".join(budget.warnings)
    assert "T = 3" in said and "--temperatures 1,2,3" in said
    assert f"of {budget.corpus.num_rows} rows" in said and "longer than --seq-len 64" in said
    assert (
        budget.student_tokens_per_second > 0
        and budget.memory.weights > 0
        and budget.memory.peak > budget.memory.weights
    )
    assert budget.student_memory > 16 * budget.student_parameters > 0
    monkeypatch.setattr(costs_module.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 0, 500_000))
    (message,) = check_disk(str(tmp_path / "not" / "there"), {"top_k:64": 10**6, "systematic:25": 10**5})
    assert "1 MB" in message and "systematic:25 would fit" in message
    assert not check_disk("s3://bucket/cache", {"top_k:64": 10**18})


def test_steps_of_the_config_file_say_how_often_the_corpus_is_read(tmp_path, tiny_teacher, corpus_file):
    """40 steps of 8 sequences over a few more than that: a run is passes, and the teacher beside it reads them all."""
    config = tmp_path / "run.yaml"
    config.write_text(
        f"dump-teacher: {{teacher: {tiny_teacher}, dataset: {corpus_file}, seq_len: 64, top_k: 8, device: cpu, threads: 1}}\n"
        "train-student: {max_steps: 40, per_device_train_batch_size: 4, gradient_accumulation_steps: 2}\n"
        "plan: {pilot_sequences: 8, compare: []}\n"
    )

    def planned(*more):
        result = CliRunner().invoke(main, ["plan", "--config", str(config), *more])
        assert result.exit_code == 0, result.output
        return result.stdout

    found = json.loads(planned("--json"))
    sequences, tokens = found["corpus"]["num_sequences"], found["corpus"]["num_positions"]
    passes = 40 / -(-sequences // 8)
    assert found["epochs"] == pytest.approx(passes, rel=0.1) and passes > 2
    read = found["costs"]["teacher_a_run"] * found["teacher_tokens_per_second"]
    assert read == pytest.approx(tokens * found["epochs"])
    assert "in a student run: " in planned() and "(40 steps of 8 sequences)" in planned()
    assert "in a student run: 3\n" in planned("--num-train-epochs", "3"), "asked of the plan itself"
    assert "(2 steps of 8 sequences)" in planned("--max-steps", "2")


def test_a_student_far_smaller_is_said_to_be(tmp_path, corpus_file, tiny_student):
    teacher = make_llama(tmp_path / "m", hidden_size=192, intermediate_size=768)
    found = plan_budget(asked(teacher, corpus_file, pilot_sequences=4, student=tiny_student))
    assert any("times the student" in warning for warning in found.warnings)


# --- configs alone ----------------------------------------------------------------------------------------------------


def test_parameters_and_memory_of_a_config_are_those_of_the_model(tiny_teacher):
    shape = read_shape(tiny_teacher)
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.bfloat16)
    parameters = list(model.parameters())
    assert shape == read_shape(f"{tiny_teacher}/config.json")
    assert shape.num_parameters == sum(p.numel() for p in parameters)
    assert shape.weight_bytes("bfloat16") == sum(p.numel() * p.element_size() for p in parameters)
    assert shape.num_looked_up == model.get_input_embeddings().weight.numel()
    with torch.no_grad():
        out = model(input_ids=torch.arange(10)[None], use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    assert 10 * shape.kv_bytes("bfloat16") == held


def test_tied_embeddings_count_once_and_are_multiplied(tmp_path):
    folder = make_llama(tmp_path / "m", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    shape = read_shape(folder)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert shape.num_looked_up == 0


def test_a_plan_without_weights(tmp_path, tiny_teacher, tiny_student):
    flags = ["--teacher-config", tiny_teacher, "--student-config", tiny_student, "--positions", 10**6, "--seq-len", 64]
    result = CliRunner().invoke(
        main, ["plan", *map(str, flags), "--tokens-per-second", "1000", "--price-per-hour", "3.6", "--json"]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["wall_seconds"] == found["costs"]["dump"] == 1000
    assert found["teacher"]["shape"]["num_parameters"] == read_shape(tiny_teacher).num_parameters
    assert found["break_even_students"] == 2
    shown = CliRunner().invoke(main, ["plan", *map(str, flags), "--gpus-per-teacher", "2", "--workers", "3"])
    assert shown.exit_code == 0 and "not measured" in shown.stdout and "--device-map auto" in shown.stdout
    assert "80 MB" in shown.stdout, "80 bytes a token"


def test_a_plan_without_weights_knows_the_student_of_the_config_file(tmp_path, tiny_teacher, tiny_student):
    """Its batch, its epochs and its temperature; the section plan and flags win."""
    config = tmp_path / "run.yaml"
    story = ["dump-teacher:", "  seq_len: 64", "  temperatures: 1,2", "train-student:", "  per_device_train_batch_size: 2",
             "  num_train_epochs: 3", "  temperature: linear:1:4"]  # fmt: skip
    config.write_text("\n".join(story) + "\n")
    arguments = [
        "plan",
        "--config",
        config,
        "--teacher-config",
        tiny_teacher,
        "--student-config",
        tiny_student,
        "--positions",
        10**6,
    ]

    def planned(*more):
        result = CliRunner().invoke(main, [*map(str, [*arguments, "--json", *more])])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    found = planned()
    assert "activations of 128 tokens" in found["student"]["lines"][1]["what"]
    assert (found["epochs"], found["break_even_students"]) == (3, 1)
    (warning,) = (line for line in found["warnings"] if "T = 4" in line)
    assert "declares 1, 2" in warning and "--temperatures 1,2,4" in warning
    assert "activations of 320 tokens" in planned("--per-device-train-batch-size", 5)["student"]["lines"][1]["what"]
    config.write_text("\n".join([*story, "plan:", "  num_train_epochs: 1"]) + "\n")
    assert planned("--targets", "hidden")["epochs"] == 1
    assert not any("T = 4" in line for line in planned("--targets", "hidden")["warnings"])
    config.write_text("\n".join([*story, "  max_steps: 125"]) + "\n")
    assert planned()["epochs"] == 125 * 2 / 15_625, "10^6 tokens are so many full sequences"
    config.write_text("\n".join([*story, "  max_steps: 125", "  training: {max_steps: 250}"]) + "\n")
    assert planned("--gpus-per-student", 4)["epochs"] == 250 * 8 / 15_625
    config.write_text("\n".join([*story[:-1], "  temperature: warm"]) + "\n")
    assert "train-student: temperature: a number, linear:A:B" in refused(*arguments[1:])


def test_bytes_of_a_pilot_serve_another_teacher(tmp_path, tiny_teacher, corpus_file):
    """The output of one plan is the input of another; a config file is read as by the dump."""
    config = tmp_path / "run.yaml"
    config.write_text(f"dump-teacher:\n  teacher: {tiny_teacher}\n  dataset: {corpus_file}\n  seq_len: 64\n  top_k: 8\n"
                      "plan:\n  pilot_sequences: 8\n  compare: [systematic:25]\n")  # fmt: skip
    first = CliRunner().invoke(main, ["plan", "--config", str(config), "--json"])
    assert first.exit_code == 0, first.output
    told = json.loads(first.stdout)
    (tmp_path / "pilot.json").write_text(first.stdout)
    result = CliRunner().invoke(main, ["plan", "--teacher-config", tiny_teacher, "--positions", "1000000", "--seq-len", "64", "--top-k", "8",
                                       "--bytes-from", str(tmp_path / "pilot.json"), "--json"])  # fmt: skip
    assert result.exit_code == 0, result.output
    sizes = json.loads(result.stdout)["bytes_per_token"]
    assert sizes["top_k:8"] == told["schemes"][0]["estimate"]["bytes_per_token"]


def test_a_table_for_a_reader(tiny_teacher, corpus_file):
    result = CliRunner().invoke(main, ["plan", "--teacher", tiny_teacher, "--dataset", corpus_file, "--seq-len", "64", "--pilot-sequences", "8",
                                       "--compare", "sampled:50", "--price-per-hour", "2"])  # fmt: skip
    assert result.exit_code == 0, result.output
    for part in ("top_k:64", "sampled:50", "B/token", "KL lost", "from the cache", "cheaper from the cache once n"):
        assert part in result.stdout
    assert result.stdout.splitlines()[-1].startswith("kdcache dump-teacher --teacher")


# --- refused ----------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_with_a_hint(tmp_path, tiny_teacher, tiny_student, corpus_file):
    assert "--dataset are needed" in refused("--teacher", tiny_teacher)
    assert "no scheme 'topk'" in refused("--teacher", tiny_teacher, "--dataset", corpus_file, "--compare", "topk:64")
    assert "context of 256" in refused("--teacher", tiny_teacher, "--dataset", corpus_file, "--seq-len", 1024)
    assert "--positions" in refused("--teacher-config", tiny_teacher)
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    assert "model_type" in refused("--teacher-config", tmp_path / "config.json", "--positions", 10)
    (tmp_path / "pilot.json").write_text("[]")
    arguments = ["--teacher-config", tiny_teacher, "--positions", 10, "--seq-len", 64]
    assert "not what kdcache plan" in refused(*arguments, "--bytes-from", tmp_path / "pilot.json")
    short = make_llama(tmp_path / "short", max_position_embeddings=32)
    assert "student's context of 32" in refused(*arguments, "--student-config", short)
    arguments = ["--teacher", tiny_teacher, "--dataset", corpus_file, "--seq-len", 64, "--student", short]
    assert "context is 32" in refused(*arguments), "before the teacher reads anything"
