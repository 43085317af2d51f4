"""What is measured at a position, over tokens and over entries with a tail."""

import json

import numpy as np
import pytest
import torch

from kdcache.cli.evaluate import _trained_for
from kdcache.evaluate.generations import repetition, rouge_l
from kdcache.evaluate.metrics import MEASURED, Metrics, position_values, teacher_values
from kdcache.evaluate.report import _training
from kdcache.evaluate.run import _phases, _training_record, read_curves
from kdcache.evaluate.teacher import Buckets


def logprobs(*shape, seed=0):
    return torch.log_softmax(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2, 1)  # fmt: skip


def kept(teacher, sizes):
    """Entries and tail of the most probable tokens, a number of them at each position."""
    width = max(sizes)
    used = torch.arange(width) < torch.tensor(sizes)[:, None]
    values, ids = teacher.topk(width)
    ids = torch.where(used, ids, ids[:, :1])
    tail = torch.where(teacher.scatter(1, ids, -torch.inf) > -torch.inf, teacher, -torch.inf).logsumexp(1, keepdim=True)
    return Buckets(torch.cat([values.masked_fill(~used, -torch.inf), tail], 1), ids, used)


def named(values):
    return dict(zip(MEASURED, values.T.double().numpy(), strict=True))


def test_over_tokens_against_torch():
    teacher, model, labels = logprobs(6, 11), logprobs(6, 11, seed=1), torch.arange(6)
    found = named(position_values(Buckets(teacher), model, labels))
    kl = torch.nn.functional.kl_div
    assert found["forward_kl"] == pytest.approx(kl(model, teacher, reduction="none", log_target=True).sum(1).numpy())
    assert found["reverse_kl"] == pytest.approx(kl(teacher, model, reduction="none", log_target=True).sum(1).numpy())
    assert found["acceptance_rate"] == pytest.approx(1 - (teacher.exp() - model.exp()).abs().sum(1).numpy() / 2)
    assert found["cross_entropy"] == pytest.approx(-model[range(6), labels].numpy())


def test_entries_and_tail_are_a_bound_and_exact_at_the_whole_vocabulary():
    teacher, model, labels = logprobs(6, 11), logprobs(6, 11, seed=1), torch.arange(6)
    exact = named(position_values(Buckets(teacher), model, labels))
    some = named(position_values(kept(teacher, [3, 5, 1, 4, 2, 5]), model, labels))
    every = named(position_values(kept(teacher, [11] * 6), model, labels))
    for name in MEASURED:
        assert every[name] == pytest.approx(exact[name]), name
    assert (some["forward_kl"] < exact["forward_kl"]).all()
    assert (some["reverse_kl"] < exact["reverse_kl"]).all()
    assert (some["acceptance_rate"] >= exact["acceptance_rate"] - 1e-12).all()
    for name in ("cross_entropy", "top1_agreement", "accuracy", "confidence"):
        assert some[name] == pytest.approx(exact[name]), name


@pytest.mark.parametrize("few", [False, True])
def test_a_teacher_is_at_no_distance_from_itself(few):
    teacher, labels = logprobs(6, 11), torch.arange(6)
    buckets = kept(teacher, [3] * 6) if few else Buckets(teacher)
    found = named(teacher_values(buckets, labels, teacher[range(6), labels]))
    assert (found["forward_kl"] == 0).all() and (found["top1_agreement"] == 1).all()
    assert found["cross_entropy"] == pytest.approx(-teacher[range(6), labels].numpy())
    assert found["confidence"] == pytest.approx(teacher.max(1).values.exp().numpy())


@pytest.mark.parametrize("few", [False, True])
def test_nan_is_nan_in_every_metric_and_nowhere_else(few):
    """Of the whole distribution, and where the cache holds the teacher's first entries alone."""
    teacher, model, labels = logprobs(6, 11), logprobs(6, 11, seed=1), torch.arange(6)
    buckets = kept(teacher, [3] * 6) if few else Buckets(teacher)
    whole = position_values(buckets, model, labels)
    model[2] = torch.nan
    values = position_values(buckets, model, labels)
    assert values[2].isnan().all()
    rows = [0, 1, 3, 4, 5]
    assert torch.equal(values[rows], whole[rows]) and whole.isfinite().all()


# Scores of rouge_score 0.1.2, RougeScorer(["rougeL"]), without its stemmer.
PAIRS = [
    ("the cat sat on the mat", "the cat sat on the mat", 1.0),
    ("The cat, sat!", "the CAT sat", 1.0),
    ("police killed the gunman", "police kill the gunman", 0.75),
    ("the gunman kill police", "police kill the gunman", 0.5),
    ("a b c d e f", "a x c y e z w v", 6 / 14),
    ("nothing in common", "other words here", 0.0),
    ("", "words", 0.0),
    ("the the the the", "the cat", 1 / 3),
]


@pytest.mark.parametrize(("answer", "reference", "wanted"), PAIRS)
def test_rouge_l(answer, reference, wanted):
    assert rouge_l(answer, reference) == pytest.approx(wanted)
    assert rouge_l(reference, answer) == pytest.approx(wanted)


def test_rouge_l_reads_other_scripts():
    assert rouge_l("кошка сидит дома", "Кошка спит дома") == pytest.approx(2 / 3)


def test_rouge_l_against_every_subsequence():
    import itertools

    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = (list(rng.choice(list("abcd"), size=int(rng.integers(1, 8)))) for _ in range(2))
        subsequences = {c for n in range(len(a) + 1) for c in itertools.combinations(a, n)}
        longest = max(n for n in range(len(b) + 1) if subsequences & set(itertools.combinations(b, n)))
        assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(2 * longest / (len(a) + len(b)))


def test_repetition():
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("a b") == 0


def test_the_cache_told_of_is_that_of_the_student():
    """A baseline may have learned from another one; seeds add up."""

    def trained(num_bytes, seconds):
        cache = {"dump_seconds": 10.0, "num_positions": 1000, "bytes_per_token": num_bytes}
        return Metrics("model", 1, seconds=seconds, extra={"cache": cache, "train_seconds": 5.0})

    rows = [
        ("teacher", Metrics("teacher", 1, seconds=2.0)),
        ("student", trained(20, 1.0)),
        ("student", trained(20, 1.5)),
    ]
    phases = _phases([*rows, ("baseline", trained(90, 3.0))])
    assert phases == {
        "dump_seconds": 10.0, "dump_tokens_per_second": 100.0, "bytes_per_token": 20, "evaluate_teacher_seconds": 2.0,
        "train_student_seconds": 10.0, "evaluate_student_seconds": 2.5, "train_baseline_seconds": 5.0, "evaluate_baseline_seconds": 3.0,
    }  # fmt: skip


RECORD = {
    "tokens_per_second": 9.5, "train_seconds": 3, "objective": {"alpha": "linear:0:1", "temperature": 2.0},
    "cache": {"dump_seconds": 1.5, "num_positions": 10, "bytes_per_token": 20.0, "path": "cache"},
}  # fmt: skip


def test_a_record_of_training_is_read_whole(tmp_path):
    (tmp_path / "train_results.json").write_text(json.dumps(RECORD | {"train_loss": float("nan"), "steps": 3}))
    assert _training_record(str(tmp_path)) == {
        "tokens_per_second": 9.5, "train_seconds": 3, "alpha": "linear:0:1", "temperature": 2.0, "cache": RECORD["cache"],
    }  # fmt: skip


def test_a_record_of_stages_tells_of_all(tmp_path):
    """Labels came last: neither are they all that it learned from, nor is their cache the teacher's."""
    last = {
        "tokens_per_second": 1.5, "train_seconds": 1, "objective": {"alpha": 0, "temperature": 1.0}, "cache": RECORD["cache"] | {"path": "task"},
    }  # fmt: skip
    (tmp_path / "train_results.json").write_text(json.dumps(last | {"stages": [last, RECORD, last]}))
    told = _training_record(str(tmp_path))
    assert told == {
        "tokens_per_second": 6.3, "train_seconds": 5, "alpha": 0, "temperature": 1.0, "cache": RECORD["cache"],
        "stages": [{"alpha": 0, "temperature": 1.0}, {"alpha": "linear:0:1", "temperature": 2.0}, {"alpha": 0, "temperature": 1.0}],
    }  # fmt: skip
    assert _trained_for(told) == "labels, then alpha linear:0:1, T 2, then labels"
    page = "".join(_training({"models": [told | {"role": "student", "curves": {"loss": [[1, 3.0], [2, 2.5]]}}]}))
    assert "Weight of the teacher (alpha): student 0, then linear:0:1, then 0." in page
    assert _trained_for(last["objective"]) == _trained_for({"stages": [last["objective"]] * 2}) == "labels only"


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(RECORD | {"stages": [RECORD, {}]}).encode(),
        json.dumps(RECORD)[:-20].encode(),
        b"",
        b"[]",
        b"\xff\x80",
        *(json.dumps(RECORD | {name: {}}).encode() for name in RECORD),
        *(json.dumps({name: RECORD[name] for name in RECORD if name != left_out}).encode() for left_out in RECORD),
        json.dumps(RECORD | {"train_seconds": "3"}).encode(),
    ],
)
def test_a_damaged_record_is_none(tmp_path, content):
    (tmp_path / "train_results.json").write_bytes(content)
    assert _training_record(str(tmp_path)) == {}
    assert _training_record(str(tmp_path / "no-folder")) == {}


def test_lines_that_are_no_log_are_passed_over(tmp_path):
    lines = [b"nonsense", b'{"loss": 3.5}', b'"step"', b'{"step": "2", "loss": 1}', b'{"step": 3, "loss": null}', b"\xff", b'{"step": 4, "loss": 2.5}', b'{"step": 5, "lo']  # fmt: skip
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert read_curves(tmp_path / "metrics.jsonl") == {"loss": [[4, 2.5]]}
    assert read_curves(tmp_path / "none.jsonl") == {}
