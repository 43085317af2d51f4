"""Draws of which only the counts are kept: the default at T = 1, through both phases and every command."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from kdcache.cache.reader import open_cache
from kdcache.cache.transcode import TranscodeOptions, transcode
from kdcache.cache.verify import verify_cache
from kdcache.cli import main
from kdcache.dump.audit import against_teacher
from kdcache.dump.launch import dump
from kdcache.dump.options import DumpOptions
from kdcache.errors import CacheMismatchError, ConfigError
from kdcache.targets import TokenSequence, check_alignment
from kdcache.train.losses import LOSSES, make_divergence
from kdcache.train.objective import BucketTargets
from kdcache.train.stream import CacheDataset, TargetDecoder, collate
from tests.conftest import make_llama
from tests.integration.test_train import run
from tests.strategies import frequencies_of

KINDS = {
    "counts": {},
    "logprobs": {"entry_logprobs": True},
    "counts-exact": {"codec": "exact"},
    "logprobs-exact": {"entry_logprobs": True, "codec": "exact"},
}
SCHEMES = ["sampled", "systematic"]


def asked(teacher, dataset, output, **changes):
    return DumpOptions.model_validate({
        "teacher": teacher, "dataset": dataset, "output": str(output), "seq_len": 64, "dtype": "float32", "split": "train[:12]",
        "threads": 1, "num_draws": 20, **changes,
    })  # fmt: skip


@pytest.fixture(scope="module")
def caches(tmp_path_factory, tiny_teacher, corpus_file):
    root = tmp_path_factory.mktemp("frequencies")
    for scheme in SCHEMES:
        for kind, changes in KINDS.items():
            dump(asked(tiny_teacher, corpus_file, root / f"{scheme}-{kind}", targets=scheme, **changes))
    return root


@pytest.mark.parametrize("codec", ["", "-exact"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_draws_without_logprobs(caches, scheme, codec):
    counts, logprobs = (open_cache(caches / f"{scheme}-{kind}{codec}") for kind in ("counts", "logprobs"))
    assert counts.spec.targets.estimator == "frequencies" and logprobs.spec.targets.estimator == "draws"
    assert counts.manifest.num_bytes < (0.8 if not codec else 1) * logprobs.manifest.num_bytes
    for one, other in zip(counts, logprobs, strict=True):
        for name in ("num_entries", "token_ids", "counts", "label_logprobs", "entropy"):
            np.testing.assert_array_equal(getattr(one.targets, name), getattr(other.targets, name), err_msg=name)
        np.testing.assert_allclose(np.exp(one.targets.logprobs), one.targets.counts[:, 0] / 20, rtol=1e-5)
        assert np.isneginf(one.targets.tail_logprobs).all()
        np.testing.assert_allclose(one.targets.weights_at(1.0), other.targets.weights_at(1.0), rtol=1e-3)
    assert verify_cache(counts.store, deep=True).intact


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_gradient_is_the_same_and_the_kl_is_that_of_the_teacher(caches, tiny_student, tmp_path, scheme):
    """Weights of two runs from one set of draws; what is logged is KL(teacher ‖ student) in both, not KL(frequencies ‖ student)."""
    weights, logged = {}, {}
    for kind in ("counts-exact", "logprobs-exact"):
        cache = caches / f"{scheme}-{kind}"
        # All sequences in each step, so that their order, which the fingerprint decides, moves roundings alone.
        run(
            cache, tiny_student, tmp_path / kind, max_steps=4, eval_cache=str(cache), learning_rate=0.1,
            per_device_train_batch_size=len(open_cache(cache)), training={"optim": "sgd"},
        )  # fmt: skip
        weights[kind] = torch.cat([
            parameter.flatten() for parameter in AutoModelForCausalLM.from_pretrained(tmp_path / kind).parameters()
        ])  # fmt: skip
        logged[kind] = [json.loads(line) for line in (tmp_path / kind / "metrics.jsonl").read_text().splitlines()]
    torch.testing.assert_close(weights["counts-exact"], weights["logprobs-exact"], rtol=1e-4, atol=1e-5)
    first, second = (next(record for record in records if "forward_kl" in record) for records in logged.values())
    assert first["forward_kl"] == pytest.approx(second["forward_kl"], abs=0.25)
    assert "acceptance_rate" not in first and "acceptance_rate" in second


def test_kl_from_frequencies_is_unbiased():
    """Over ten thousand positions of one teacher and student, against the sum over the whole vocabulary."""
    torch.manual_seed(0)
    t, p = torch.log_softmax(torch.randn(50) * 2, 0), torch.log_softmax(torch.randn(50) * 2, 0)
    true = float((t.exp() * (t - p)).sum())
    drawn = torch.multinomial(t.exp().expand(10_000, -1), 20, replacement=True).numpy()
    entropy = float(-(t.exp() * t).sum())
    targets = BucketTargets.of([frequencies_of(drawn, entropy)], 1.0)
    log_p = p[targets.token_ids]
    biased = make_divergence("forward_kl").on_draws(targets.ratios, targets.logprobs, log_p)
    estimate = biased + targets.excess
    error = float(estimate.std()) / 100
    assert abs(float(estimate.mean()) - true) < 4 * error
    assert float(biased.mean()) - true > 20 * error


@pytest.mark.parametrize("kind", ["counts", "counts-exact"])
def test_the_device_decodes_what_numpy_does(caches, kind):
    cache = open_cache(caches / f"sampled-{kind}")
    batch = collate([CacheDataset(cache)[i] for i in range(2)])
    ours = TargetDecoder.for_cache(cache, 1.0, torch.device("cpu")).decode(batch)
    twin = BucketTargets.of([cache[i].targets for i in range(2)], 1.0)
    used = twin.logprobs > -torch.inf
    assert (ours.token_ids[used].sort().values == twin.token_ids[used].sort().values).all()
    torch.testing.assert_close(ours.logprobs[used].sort().values, twin.logprobs[used].sort().values)
    torch.testing.assert_close(ours.ratios[used], torch.ones(int(used.sum())))
    torch.testing.assert_close(ours.excess, twin.excess)


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - {"forward_kl", "ce"}))
def test_other_losses_are_refused_and_told_what_they_need(caches, tiny_student, tmp_path, loss):
    with pytest.raises(ConfigError, match=f"loss {loss} needs the teacher's probabilities") as error:
        run(caches / "sampled-counts", tiny_student, tmp_path / "out", loss=loss)
    assert "--entry-logprobs" in error.value.hint


@pytest.mark.parametrize("scheme", SCHEMES)
def test_targets_of_another_position_are_noticed(caches, scheme):
    """The label's probability against how often it came up, by Chernoff's bound; nobody else's tokens pass."""
    cache = open_cache(caches / f"{scheme}-counts-exact")
    tolerance = [cache.codec.logprob_error_bound(row.targets.label_logprobs) for row in cache]
    for row, allowed in zip(cache, tolerance, strict=True):
        check_alignment(row.sequence, row.targets, "right", allowed)
    sharp = _sharp(20)
    check_alignment(*sharp, "right", np.full(20, 1e-3, np.float32))
    rolled = TokenSequence(np.roll(sharp[0].input_ids, 1), sharp[0].loss_mask, sharp[0].document_starts)
    with pytest.raises(CacheMismatchError, match="not aligned"):
        check_alignment(rolled, sharp[1], "rolled", np.full(20, 1e-3, np.float32))


def _sharp(n):
    """A teacher that gives the label 0.9, drawn 50 times."""
    rng = np.random.default_rng(0)
    ids = rng.permutation(200)[: n + 1].astype(np.uint32)
    drawn = np.where(rng.random((n, 50)) < 0.9, ids[1:, None], 300 + rng.integers(0, 50, (n, 50)))
    targets = frequencies_of(drawn, 1.0, np.full(n, np.log(0.9), np.float32))
    return TokenSequence(ids, np.arange(n + 1) > 0, np.zeros(1, np.uint32)), targets


@pytest.mark.parametrize("codec", ["", "-exact"])
def test_logprobs_are_left_out_later_and_never_come_back(caches, tmp_path, codec):
    old = caches / f"sampled-logprobs{codec}"
    transcode(TranscodeOptions(cache=str(old), output=str(tmp_path / "new"), entry_logprobs=False))
    for one, other in zip(open_cache(tmp_path / "new"), open_cache(caches / f"sampled-counts{codec}"), strict=True):
        np.testing.assert_array_equal(one.targets.counts, other.targets.counts)
        np.testing.assert_array_equal(one.targets.logprobs, other.targets.logprobs)
    with pytest.raises(ConfigError, match="keeps the counts alone"):
        transcode(TranscodeOptions(cache=str(tmp_path / "new"), output=str(tmp_path / "back"), entry_logprobs=True))


def test_several_temperatures_and_exact_entries_need_logprobs(tiny_teacher, corpus_file, tmp_path):
    for changes in ({"targets": "hybrid"}, {"targets": "sampled", "temperatures": "1,2"}):
        with pytest.raises(ValueError, match="at T = 1 can do without"):
            asked(tiny_teacher, corpus_file, tmp_path, entry_logprobs=False, **changes)
        assert not asked(tiny_teacher, corpus_file, tmp_path, **changes).target_spec(300).frequencies
    both = tmp_path / "both"
    dump(asked(tiny_teacher, corpus_file, both, targets="sampled", temperatures="1,2"))
    with pytest.raises(ConfigError, match="cannot do without"):
        transcode(TranscodeOptions(cache=str(both), output=str(tmp_path / "new"), entry_logprobs=False))
    transcode(TranscodeOptions(cache=str(both), output=str(tmp_path / "new"), entry_logprobs=False, temperatures="1"))
    assert open_cache(tmp_path / "new").spec.targets.estimator == "frequencies"


def test_the_teacher_draws_them_again(caches, tmp_path):
    audit = against_teacher(open_cache(caches / "sampled-counts"), 6)
    assert audit.agrees and audit.stored < 1e-2 and "draws" in audit.measure
    other = make_llama(tmp_path / "other", seed=9)
    with pytest.raises(CacheMismatchError, match="digest"):
        against_teacher(open_cache(caches / "sampled-counts"), 6, teacher=str(other))


def test_the_commands_say_what_is_kept(caches, tiny_teacher, corpus_file, tmp_path):
    shown = CliRunner().invoke(main, ["inspect", str(caches / "sampled-counts")])
    assert shown.exit_code == 0 and "20 draws, counts alone" in shown.output
    bad = CliRunner().invoke(main, ["dump-teacher", "--teacher", tiny_teacher, "--dataset", corpus_file, "--output", str(tmp_path / "x"),
                                    "--targets", "hybrid", "--no-entry-logprobs"])  # fmt: skip
    assert bad.exit_code != 0 and "leave --no-entry-logprobs out" in bad.output
    assert not (tmp_path / "x").exists()
