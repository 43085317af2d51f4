"""Every target scheme and loss through both phases; several teachers; what is refused, and how."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from kdcache.cache.reader import open_cache
from kdcache.cache.shard import content_hash
from kdcache.cache.transcode import TranscodeOptions, transcode
from kdcache.cli import main
from kdcache.dump.launch import dump
from kdcache.errors import CacheMismatchError, ConfigError
from kdcache.train.objective import BucketTargets
from kdcache.train.stream import CacheDataset, TargetDecoder, collate
from tests.abuse.crashes import assert_same, contents
from tests.conftest import LOGGED_TO, VOCAB_SIZE, make_llama
from tests.integration.test_dump import options, own_logits
from tests.integration.test_train import run
from tests.strategies import log_softmax

SCHEMES = {
    "top_k": {"top_k": 8},
    "top_p": {"targets": "top_p", "top_p": 0.3, "top_k": 60},
    "sampled": {"targets": "sampled", "num_draws": 20},
    "systematic": {"targets": "systematic", "num_draws": 20},
    "hybrid": {"targets": "hybrid", "top_k": 4, "num_draws": 10},
}
LOSSES = ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tv", "akl", "taid", "logit_mse", "ce"]


@pytest.fixture(scope="module")
def caches(tmp_path_factory, tiny_teacher, corpus_file):
    """A cache of each scheme at T = 1 and 2."""
    root = tmp_path_factory.mktemp("schemes")
    for name, changes in SCHEMES.items():
        dump(options(tiny_teacher, corpus_file, root / name, codec="exact", **changes))
    dump(options(tiny_teacher, corpus_file, root / "hidden", targets="hidden"))
    return root


@pytest.fixture(scope="module")
def other_teacher(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("other") / "teacher", seed=5)


def records(output):
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def kdcache(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


# --- what is stored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_entries_are_what_the_model_says(caches, tiny_teacher, scheme):
    reader = open_cache(caches / scheme)
    row = reader[0]
    logits = own_logits(tiny_teacher, row.sequence)
    position = np.repeat(np.arange(len(row.targets)), row.targets.num_entries)
    for temperature in (1.0, 2.0):
        expected = log_softmax(logits / temperature)[position, row.targets.token_ids]
        entries, tail = row.targets.at_temperature(temperature)
        np.testing.assert_allclose(entries, expected, atol=3e-5)
        mass = np.bincount(position, np.exp(entries.astype(np.float64))) + np.exp(tail)
        np.testing.assert_allclose(mass, 1, atol=1e-5)
    assert (row.targets.estimator == "draws") == (scheme in ("sampled", "systematic", "hybrid"))


def test_top_p_keeps_the_nucleus(caches, tiny_teacher):
    """As few entries as reach p; one always; never more than k."""
    row = open_cache(caches / "top_p")[0]
    probabilities = np.sort(np.exp(log_softmax(own_logits(tiny_teacher, row.sequence))), axis=1)[:, ::-1]
    wanted = np.minimum((np.cumsum(probabilities, axis=1) < 0.3 - 1e-6).sum(1) + 1, 60)
    np.testing.assert_array_equal(row.targets.num_entries, wanted)
    assert wanted.min() < wanted.max() < 60


@pytest.mark.parametrize("scheme", ["sampled", "systematic", "hybrid"])
def test_draws_are_the_same_for_any_number_of_workers(tmp_path, caches, tiny_teacher, corpus_file, scheme):
    dump(options(tiny_teacher, corpus_file, tmp_path / "again", codec="exact", workers=2, **SCHEMES[scheme]))
    assert_same(tmp_path / "again", contents(caches / scheme))


def test_another_seed_draws_otherwise(tmp_path, caches, tiny_teacher, corpus_file):
    changes = SCHEMES["sampled"] | {"target_seed": 1}
    dump(options(tiny_teacher, corpus_file, tmp_path / "again", codec="exact", **changes))
    first, second = open_cache(caches / "sampled")[0].targets, open_cache(tmp_path / "again")[0].targets
    assert not np.array_equal(first.token_ids, second.token_ids)
    np.testing.assert_allclose(first.entropy, second.entropy, atol=1e-5)


@pytest.mark.parametrize("scheme", ["top_p", "systematic", "hybrid"])
def test_packed_codec_holds_every_scheme(tmp_path, caches, tiny_teacher, corpus_file, scheme):
    dump(options(tiny_teacher, corpus_file, tmp_path / "packed", codec="packed", **SCHEMES[scheme]))
    reader = open_cache(tmp_path / "packed")
    for exact, packed in zip(open_cache(caches / scheme), reader, strict=True):
        np.testing.assert_array_equal(exact.targets.token_ids, packed.targets.token_ids)
        if exact.targets.counts is not None:
            np.testing.assert_array_equal(exact.targets.counts, packed.targets.counts)
        bound = reader.codec.logprob_error_bound(exact.targets.logprobs)
        assert (np.abs(exact.targets.logprobs - packed.targets.logprobs) <= bound).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sparse_targets_by_hand_are_what_the_decoder_gives(caches, scheme):
    """``BucketTargets.of``, from numpy, and ``TargetDecoder``, from the codec's integers: twins."""
    reader, indices = open_cache(caches / scheme), [0, 1, 2]
    data = CacheDataset(reader)
    for temperature in (1.0, 2.0):
        decoded = TargetDecoder.for_cache(reader, temperature, torch.device("cpu")).decode(
            collate([data[i] for i in indices])
        )
        by_hand = BucketTargets.of([reader[i].targets for i in indices], temperature)
        assert torch.equal(by_hand.token_ids, decoded.token_ids)
        torch.testing.assert_close(by_hand.logprobs, decoded.logprobs, rtol=0, atol=1e-5)
        torch.testing.assert_close(by_hand.tail_logprobs, decoded.tail_logprobs, rtol=0, atol=1e-6)
        assert (by_hand.ratios is None) == (decoded.ratios is None) == (scheme in ("top_k", "top_p"))
        if by_hand.ratios is not None:
            torch.testing.assert_close(by_hand.ratios, decoded.ratios, rtol=1e-4, atol=1e-5)


def test_hidden_states_are_no_buckets(caches):
    with pytest.raises(ConfigError, match="not entries and a tail"):
        BucketTargets.of([open_cache(caches / "hidden")[0].targets], 1.0)


def test_schemes_from_the_command_line(tmp_path, tiny_teacher, corpus_file):
    """Drawn schemes declare T = 1 unless told otherwise; inspect and verify know them."""
    common = ("dump-teacher", "--teacher", tiny_teacher, "--dataset", corpus_file, "--seq-len", 64, "--threads", 1)
    done = kdcache(*common, "--targets", "systematic", "--num-draws", 25, "--output", tmp_path / "cache")
    assert done.exit_code == 0, done.output
    about = json.loads(kdcache("inspect", tmp_path / "cache", "--json").stdout)
    assert about["temperatures"] == [1.0]
    assert kdcache("verify", tmp_path / "cache").exit_code == 0
    again = kdcache(*common, "--targets", "systematic", "--num-draws", 25, "--output", tmp_path / "cache")
    assert "all done" in again.stdout
    other = kdcache(*common, "--targets", "systematic", "--num-draws", 30, "--output", tmp_path / "cache")
    assert other.exit_code == 1
    assert "targets.num_draws: the cache has 25, this run asks for 30" in other.output
    for wrong in ("0", "5000", ",".join(str(t) for t in range(1, 20)), "one"):
        refused = kdcache(*common, "--temperatures", wrong, "--output", tmp_path / "c")
        assert refused.exit_code == 1
        assert "temperatures" in refused.output
    too_many = kdcache(*common, "--targets", "hybrid", "--top-k", VOCAB_SIZE, "--output", tmp_path / "c")
    assert too_many.exit_code == 1
    assert "nothing is left to draw from" in too_many.output


# --- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [*SCHEMES, "hidden"])
def test_students_learn_from_every_scheme(tmp_path, caches, tiny_student, scheme):
    run(caches / scheme, tiny_student, tmp_path / "out", alpha=1.0, max_steps=12, eval_cache=str(caches / "hidden"),
        eval_steps=11)  # fmt: skip
    found = [r["eval_forward_kl"] for r in records(tmp_path / "out") if "eval_loss" in r]
    assert found[-1] < found[0] or len(found) == 1
    trained = [r for r in records(tmp_path / "out") if "loss" in r]
    assert trained[-1]["forward_kl"] < trained[0]["forward_kl"]


@pytest.mark.parametrize("loss", LOSSES)
def test_students_learn_by_every_loss(tmp_path, caches, tiny_student, loss):
    run(caches / "top_k", tiny_student, tmp_path / "out", alpha=0.8, temperature=2.0, loss=loss, max_steps=12)
    trained = [r for r in records(tmp_path / "out") if "loss" in r]
    assert trained[-1]["loss"] < trained[0]["loss"]
    if loss == "ce":
        assert "forward_kl" not in trained[0]
    else:
        names = {loss, "forward_kl", "top1_agreement", "student_tail_mass", "teacher_tail_mass", "acceptance_rate"}
        assert names <= trained[0].keys()
        assert trained[0]["loss"] == pytest.approx(
            0.2 * trained[0]["cross_entropy"] + 0.8 * 4 * trained[0][loss], rel=1e-3
        )


def test_evaluation_reports_calibration(tmp_path, caches, tiny_student):
    result = run(caches / "top_k", tiny_student, tmp_path / "out", eval_cache=str(caches / "hidden")).results
    assert 0 < result["eval_calibration_error"] < 1
    assert 0 < result["eval_acceptance_rate"] < 1
    assert result["eval_student_tail_mass"] == 0


@pytest.mark.parametrize("scheme", ["sampled", "systematic", "hybrid"])
def test_reverse_kl_from_draws_is_refused(tmp_path, caches, tiny_student, scheme):
    with pytest.raises(ConfigError, match="variance") as error:
        run(caches / scheme, tiny_student, tmp_path / "out", loss="reverse_kl")
    assert "skew_reverse_kl" in error.value.hint


def test_undeclared_temperature_is_refused_with_the_list(tmp_path, caches, tiny_student):
    for scheme in SCHEMES:
        with pytest.raises(ConfigError, match="declared are 1, 2"):
            run(caches / scheme, tiny_student, tmp_path / "out", temperature=3.0)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--loss", "rkl"), "did you mean reverse_kl"),
        (("--loss", "truncated_reverse_kl"), "p = t / e"),
        (("--loss", "jsd", "--loss-args", "beta=1"), "1 is written reverse_kl"),
        (("--loss", "jsd", "--loss-args", "skew=0.1"), "it takes beta"),
        (("--alpha", "1.5"), "alpha is between 0 and 1"),
        (("--alpha", "linear:0"), "linear:A:B"),
        (("--temperature", "-1"), "above 0"),
        (("--loss", "contrastive"), "--student-cache"),
    ],
)
def test_bad_objectives_name_what_was_expected(tmp_path, caches, tiny_student, flags, says):
    done = kdcache(
        "train-student", "--cache", caches / "top_k", "--student", tiny_student, "--output", tmp_path / "o", *flags
    )
    assert done.exit_code == 1
    assert says in done.output
    assert not (tmp_path / "o" / "model.safetensors").exists()


# --- schedules --------------------------------------------------------------------------------------------------------


def test_schedules_move_alpha_and_temperature(tmp_path, caches, tiny_student):
    """alpha along a line; T through the declared ones alone."""
    run(caches / "top_k", tiny_student, tmp_path / "out", alpha="linear:0:1", temperature="linear:2:1", max_steps=10)
    logged = [r for r in records(tmp_path / "out") if "loss" in r]
    alphas = [r["alpha"] for r in logged]
    assert alphas == sorted(alphas)
    assert alphas[0] < 0.2
    assert alphas[-1] > 0.8
    assert {r["temperature"] for r in logged} == {1.0, 2.0}
    assert all(r["forward_kl"] > 0 for r in logged), "measured at the first step too, where alpha is 0"


def test_an_argument_of_the_loss_can_be_scheduled(tmp_path, caches, tiny_student):
    run(caches / "top_k", tiny_student, tmp_path / "out", loss="taid", loss_args={"interpolation": "linear:0.4:1"})
    assert records(tmp_path / "out")[0]["taid"] < records(tmp_path / "out")[0]["forward_kl"]


# --- several teachers -------------------------------------------------------------------------------------------------


def test_two_caches_are_their_weighted_sum(tmp_path, caches, tiny_student, other_teacher, corpus_file):
    """The first step's divergence is the weighted mean of those to each; the second cache has another order of shards."""
    other = tmp_path / "other"
    dump(options(other_teacher, corpus_file, other, codec="exact", top_k=8))
    firsts = {}
    for name, cache in {
        "a": {str(caches / "top_k"): 1.0},
        "b": {str(other): 1.0},
        "both": {str(caches / "top_k"): 7.0, str(other): 3.0},
    }.items():
        run(cache, tiny_student, tmp_path / name, alpha=1.0, max_steps=1, per_device_train_batch_size=200)
        firsts[name] = records(tmp_path / name)[0]["forward_kl"]
    assert firsts["a"] != pytest.approx(firsts["b"], rel=1e-3)
    assert firsts["both"] == pytest.approx(0.7 * firsts["a"] + 0.3 * firsts["b"], rel=1e-5)
    done = kdcache(
        "train-student", "--cache", f"{caches / 'top_k'}:0.7", "--cache", f"{other}:0.3", "--student", tiny_student,
        "--output", tmp_path / "cli", "--max-steps", 2,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    recorded = json.loads((tmp_path / "cli" / "train_results.json").read_text())
    assert recorded["other_caches"][0]["weight"] == pytest.approx(0.3)


def test_positional_alignment_of_two_caches(tmp_path, caches, tiny_student, tiny_teacher, corpus_file):
    """A cache over other text, or over the same text cut otherwise, is refused before anything is trained."""
    dump(options(tiny_teacher, corpus_file, tmp_path / "longer", seq_len=128))
    with pytest.raises(CacheMismatchError, match="hold different sequences"):
        run({str(caches / "top_k"): 1.0, str(tmp_path / "longer"): 1.0}, tiny_student, tmp_path / "out")


def test_averaged_logits(tmp_path, caches, tiny_teacher, other_teacher, corpus_file):
    """The cache of an averaged teacher is the softmax of the weighted logits; the first teacher is not loaded again."""
    flags = (
        "--targets",
        "top_k",
        "--top-k",
        8,
        "--codec",
        "exact",
        "--seq-len",
        64,
        "--threads",
        1,
        "--temperatures",
        "1,2",
    )
    done = kdcache(
        "dump-teacher", "--teacher", other_teacher, "--dataset", corpus_file, "--output", tmp_path / "mean",
        "--average", f"{caches / 'hidden'}:0.3", *flags,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    row = open_cache(tmp_path / "mean")[0]
    logits = 0.3 * own_logits(tiny_teacher, row.sequence) + 0.7 * own_logits(other_teacher, row.sequence)
    position = np.repeat(np.arange(len(row.targets)), row.targets.num_entries)
    np.testing.assert_allclose(row.targets.logprobs, log_softmax(logits)[position, row.targets.token_ids], atol=5e-5)
    np.testing.assert_allclose(
        row.targets.at_temperature(2.0)[0], log_softmax(logits / 2)[position, row.targets.token_ids], atol=5e-5
    )
    spec = open_cache(tmp_path / "mean").spec
    assert spec.teacher.averaged[0].fingerprint == open_cache(caches / "hidden").spec.fingerprint


@pytest.mark.parametrize(
    ("weights", "says"),
    [("hidden:1.0", "together below 1"), ("top_k:0.5", "--targets hidden"), ("hidden:0", "above 0")],
)
def test_bad_averages(tmp_path, caches, other_teacher, corpus_file, weights, says):
    done = kdcache(
        "dump-teacher", "--teacher", other_teacher, "--dataset", corpus_file, "--output", tmp_path / "mean", "--seq-len", 64,
        "--average", f"{caches}/{weights}",
    )  # fmt: skip
    assert done.exit_code == 1
    assert says in done.output


def test_averaging_needs_the_same_sequences(tmp_path, caches, other_teacher, corpus_file):
    done = kdcache(
        "dump-teacher", "--teacher", other_teacher, "--dataset", corpus_file, "--output", tmp_path / "mean", "--seq-len", 128,
        "--average", f"{caches}/hidden:0.5",
    )  # fmt: skip
    assert done.exit_code == 1
    assert "is not in the cache whose logits are to be averaged in" in done.output


# --- the contrastive pair ---------------------------------------------------------------------------------------------


def test_contrastive_pair(tmp_path, caches, tiny_teacher, tiny_student, corpus_file):
    """Skew KL on the teacher's text, skew reverse KL on the student's: the mean over both, weighted by their balance."""
    (tmp_path / "mine.jsonl").write_text(
        "".join(json.dumps({"text": f"the cat ran {i} {'on ' * i}"}) + "\n" for i in range(2, 9))
    )
    dump(options(tiny_teacher, str(tmp_path / "mine.jsonl"), tmp_path / "mine", codec="exact"))
    both = {"alpha": 1.0, "max_steps": 1, "per_device_train_batch_size": 200}
    run(caches / "top_k", tiny_student, tmp_path / "pair", loss="contrastive", student_cache=[str(tmp_path / "mine")],
        loss_args={"balance": 1.5}, **both)  # fmt: skip
    run(caches / "top_k", tiny_student, tmp_path / "skl", loss="skew_kl", **both)
    run(tmp_path / "mine", tiny_student, tmp_path / "srkl", loss="skew_reverse_kl", **both)
    numbers = [open_cache(p).manifest.stats.num_targets for p in (caches / "top_k", tmp_path / "mine")]
    sides = records(tmp_path / "skl")[0]["skew_kl"], records(tmp_path / "srkl")[0]["skew_reverse_kl"]
    expected = (0.5 * numbers[0] * sides[0] + 1.5 * numbers[1] * sides[1]) / sum(numbers)
    # transformers 4 logs four digits
    assert records(tmp_path / "pair")[0]["loss"] == pytest.approx(expected, rel=1e-5, abs=LOGGED_TO)


def test_index_by_content(caches):
    reader = open_cache(caches / "top_k")
    for index in range(len(reader)):
        assert (
            reader.tokens(reader.index_of(content_hash(reader.tokens(index)))).input_ids.tolist()
            == reader.tokens(index).input_ids.tolist()
        )
    assert reader.index_of(12345) is None


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of dynamo's own, and they differ between releases
def test_compiled_training_equals_eager(tmp_path, caches, tiny_student):
    """The trunk is compiled, the loss stays as it is: the same losses."""
    losses = {}
    for name, training in {
        "eager": {},
        "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    }.items():
        training = {"optim": "adamw_torch", "dataloader_pin_memory": False} | training
        run(caches / "top_k", tiny_student, tmp_path / name, max_steps=3, training=training)
        losses[name] = [r["loss"] for r in records(tmp_path / name) if "loss" in r]
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-4)


def test_top_p_made_of_top_k_is_what_a_dump_keeps(tiny_teacher, corpus_file, tmp_path):
    """Without the teacher: the same entries at every position, and tails to rounding."""
    dump(options(tiny_teacher, corpus_file, tmp_path / "top_k", codec="exact", top_k=12))
    dump(options(tiny_teacher, corpus_file, tmp_path / "top_p", codec="exact", top_k=12, targets="top_p", top_p=0.3))
    transcode(TranscodeOptions(cache=str(tmp_path / "top_k"), output=str(tmp_path / "cut"), top_p=0.3))
    dumped, cut = open_cache(tmp_path / "top_p"), open_cache(tmp_path / "cut")
    assert cut.spec.targets == dumped.spec.targets
    for a, b in zip(dumped, cut, strict=True):
        np.testing.assert_array_equal(a.targets.num_entries, b.targets.num_entries)
        np.testing.assert_array_equal(a.targets.token_ids, b.targets.token_ids)
        np.testing.assert_array_equal(a.targets.logprobs, b.targets.logprobs)
        np.testing.assert_allclose(a.targets.tail_logprobs, b.targets.tail_logprobs, atol=1e-5)
    sizes = np.concatenate([row.targets.num_entries for row in cut])
    assert len(np.unique(sizes)) > 3, "cut by mass, not by number"
