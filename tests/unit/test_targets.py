import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import CacheMismatchError, ConfigError
from kdcache.targets import SparseTargets, TokenSequence, check_alignment, rescale_entries
from tests.strategies import (
    log_softmax,
    make_plan,
    make_row,
    per_position,
    sparse_targets,
    targets_from_logits,
    token_sequences,
    zipf_logits,
)


def sequence_of(ids, mask, starts=(0,)):
    return TokenSequence(np.array(ids, np.uint32), np.array(mask, bool), np.array(starts, np.uint32))


def tolerance(targets, value=1e-3):
    return np.full(len(targets), value, dtype=np.float32)


@pytest.mark.parametrize(
    ("ids", "mask", "starts"),
    [
        ([1, 2], [False], [0]),
        ([], [], [0]),
        ([1, 2], [False, True], [1]),
        ([1, 2], [False, True], []),
        ([1, 2, 3], [False, False, True], [0, 1, 1]),
        ([1, 2, 3], [False, False, True], [0, 3]),
        ([1, 2], [True, True], [0]),
        ([1, 2, 3], [False, True, True], [0, 2]),
    ],
)
def test_token_sequence_refuses_what_breaks_the_rule(ids, mask, starts):
    with pytest.raises(AssertionError):
        sequence_of(ids, mask, starts)


def test_off_by_one_mask():
    sequence = sequence_of([5, 6, 7, 8, 9], [False, False, True, True, True])
    assert sequence.target_mask.tolist() == [False, True, True, True, False]


def test_no_target_at_the_end_of_a_packed_document():
    sequence = sequence_of([5, 6, 7, 8], [False, True, False, True], [0, 2])
    assert sequence.target_mask.tolist() == [True, False, True, False]
    assert sequence.position_ids.tolist() == [0, 1, 0, 1]


@given(token_sequences())
def test_target_mask_is_the_label_mask_shifted(sequence):
    rows = np.flatnonzero(sequence.target_mask)
    assert sequence.loss_mask[rows + 1].all()
    assert len(rows) == sequence.loss_mask.sum()
    assert not np.isin(rows + 1, sequence.document_starts).any()


@given(token_sequences())
def test_position_ids_count_from_each_start(sequence):
    expected, position = [], 0
    for index in range(len(sequence)):
        position = 0 if index in sequence.document_starts else position + 1
        expected.append(position)
    assert sequence.position_ids.tolist() == expected


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("noise", [0.1, 2.0, 8.0])
def test_at_temperature_is_exact(temperature, noise):
    rng = np.random.default_rng(3)
    logits = zipf_logits(rng, 6, 2000, noise)
    targets = targets_from_logits(logits, np.zeros(6, int), k=20)
    entries, tail = targets.at_temperature(temperature)
    oracle = log_softmax(logits / temperature)
    ids = targets.token_ids.reshape(6, 20)
    kept = np.take_along_axis(oracle, ids.astype(int), 1)
    np.testing.assert_allclose(entries.reshape(6, 20), kept, rtol=2e-5, atol=2e-5)
    left_out = np.exp(oracle)
    np.put_along_axis(left_out, ids.astype(int), 0, 1)
    np.testing.assert_allclose(np.exp(tail, dtype=float), left_out.sum(1), rtol=2e-5)


def test_retempered_truncated_targets():
    """What the pitfall does: softmax(logprobs / T) over entries and T = 1 tail. It is far from the truth; ours is not."""
    rng = np.random.default_rng(0)
    logits = zipf_logits(rng, 50, 5000)
    targets = targets_from_logits(logits, np.zeros(50, int), k=16)
    true_tail = np.exp(targets.tail_at(2.0), dtype=float)
    buckets = np.concatenate([targets.logprobs.reshape(50, 16), targets.tail_at(1.0)[:, None]], axis=1)
    naive_tail = np.exp(log_softmax(buckets / 2))[:, -1]
    assert (true_tail > 2 * naive_tail).mean() > 0.9
    entries, tail = targets.at_temperature(2.0)
    mass = np.exp(entries.reshape(50, 16), dtype=float).sum(1) + np.exp(tail, dtype=float)
    np.testing.assert_allclose(mass, 1, atol=1e-5)


def test_undeclared_temperature_is_refused_with_the_list():
    targets = targets_from_logits(np.zeros((1, 9)), np.zeros(1, int), k=3, temperatures=(1.0, 2.5))
    with pytest.raises(ConfigError, match=r"temperature 4 is not declared.*declared are 1, 2\.5") as caught:
        targets.at_temperature(4.0)
    assert "--temperatures" in caught.value.hint
    with pytest.raises(ConfigError):
        targets.tail_at(3.0)


@given(st.data())
def test_probabilities_above_one(data):
    targets = data.draw(sparse_targets(300))
    for temperature in targets.temperatures:
        entries, tail = targets.at_temperature(temperature)
        for mine, rest in zip(per_position(targets, entries), tail, strict=True) if len(targets) else ():
            mass = np.exp(mine, dtype=float).sum() + np.exp(float(rest))
            assert abs(mass - 1) < 1e-5
            assert (mine <= 1e-6).all()


@pytest.mark.parametrize("tail", [0.0, 1e-30, 1e-9, 0.3, 0.999999])
def test_minus_inf_and_sentinels(tail):
    """No tail is -inf, and neither it nor a tail of nearly nothing or everything turns into NaN or loses digits."""
    with np.errstate(divide="ignore"):
        log_tail = np.log(np.array([tail])).astype(np.float32)
    scores = np.array([0.0, -3.0, -80.0], np.float32)
    out = rescale_entries(scores, log_tail, np.array([3], np.uint32)).astype(float)
    expected = log_softmax(scores) + np.log(-np.expm1(float(log_tail[0])))
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)


def test_rescale_skips_empty_positions():
    counts = np.array([0, 2, 0, 1, 0], np.uint32)
    tails = np.log(np.array([1, 0.5, 1, 0.25, 1])).astype(np.float32)
    out = rescale_entries(np.array([3, 3, 7], np.float32), tails, counts)
    np.testing.assert_allclose(np.exp(out), [0.25, 0.25, 0.75], rtol=1e-6)
    assert rescale_entries(np.zeros(0, np.float32), tails, np.zeros(5, np.uint32)).shape == (0,)


def test_offsets_delimit_positions():
    targets = SparseTargets(
        temperatures=(1.0,),
        num_entries=np.array([2, 0, 1], np.uint32),
        token_ids=np.array([1, 5, 9], np.uint32),
        logprobs=np.log(np.array([0.25, 0.25, 0.5])).astype(np.float32),
        tail_logprobs=np.zeros((3, 1), np.float32),
        logz=np.zeros(3, np.float32),
        label_logprobs=np.zeros(3, np.float32),
        entropy=np.zeros(3, np.float32),
    )
    assert targets.offsets.tolist() == [0, 2, 2, 3]
    assert [part.tolist() for part in per_position(targets, targets.token_ids)] == [[1, 5], [], [9]]


@pytest.mark.parametrize(
    "change",
    [
        {"temperatures": (2.0, 1.0)},
        {"temperatures": ()},
        {"token_ids": np.zeros(3, np.uint32)},
        {"tail_logprobs": np.zeros((4, 1), np.float32)},
        {"logz": np.zeros(9, np.float32)},
        {"hidden": np.zeros((1, 8), np.float32)},
    ],
)
def test_targets_refuse_shapes_that_disagree(change):
    good = targets_from_logits(np.zeros((4, 9)), np.zeros(4, int), k=2)
    fields = {name: getattr(good, name) for name in good.__slots__}
    with pytest.raises(AssertionError):
        SparseTargets(**{**fields, **change})


def long_row():
    plan = make_plan()
    return next(row for row in (make_row(plan, i) for i in range(50)) if len(row[1]) >= 15)


def rolled(targets, by=1):
    """Targets moved by some positions, the labels' logprobs left where they are."""
    order = np.roll(np.arange(len(targets)), by)
    ids, logprobs = per_position(targets, targets.token_ids), per_position(targets, targets.logprobs)
    return SparseTargets(
        targets.temperatures, targets.num_entries[order],
        np.concatenate([ids[i] for i in order]), np.concatenate([logprobs[i] for i in order]),
        targets.tail_logprobs[order], targets.logz[order], targets.label_logprobs, targets.entropy[order],
    )  # fmt: skip


@pytest.mark.parametrize("by", [1, -1, 2])
def test_teacher_student_shift(by):
    sequence, targets = long_row()
    check_alignment(sequence, targets, "shard 00000, sequence 0", tolerance(targets))
    with pytest.raises(CacheMismatchError, match="shard 00000, sequence 0: targets and tokens are not aligned"):
        check_alignment(sequence, rolled(targets, by), "shard 00000, sequence 0", tolerance(targets))


def test_rolled_targets_are_caught_at_the_tolerance_of_the_packed_codec():
    plan = make_plan()
    codec = plan.spec.make_codec()
    sequence, targets = long_row()
    decoded = codec.decode(codec.encode(targets), len(targets), "x").expand(targets.temperatures)
    wide = 2 * codec.logprob_error_bound(decoded.label_logprobs)
    check_alignment(sequence, decoded, "x", wide)
    with pytest.raises(CacheMismatchError):
        check_alignment(sequence, rolled(decoded), "x", wide)


def test_rolled_tokens_are_caught():
    sequence, targets = long_row()
    moved = TokenSequence(np.roll(sequence.input_ids, 1), sequence.loss_mask, sequence.document_starts)
    with pytest.raises(CacheMismatchError):
        check_alignment(moved, targets, "x", tolerance(targets))


def test_another_number_of_targets_is_caught():
    sequence, targets = long_row()
    mask = sequence.loss_mask.copy()
    mask[np.flatnonzero(mask)[-1]] = False
    shorter = TokenSequence(sequence.input_ids, mask, sequence.document_starts)
    with pytest.raises(
        CacheMismatchError, match=f"{len(targets) - 1} positions have a label, but there are {len(targets)}"
    ):
        check_alignment(shorter, targets, "x", tolerance(targets))


def test_nan_label_does_not_pass_for_aligned():
    sequence, targets = long_row()
    targets.label_logprobs[:] = np.nan
    with pytest.raises(CacheMismatchError):
        check_alignment(sequence, targets, "x", tolerance(targets))


def test_label_in_the_tail_cannot_be_likelier_than_the_tail():
    sequence = sequence_of([1, 7], [False, True])
    logits = np.zeros((1, 10))
    logits[0, :3] = 5
    targets = targets_from_logits(logits, np.array([7]), k=3)
    check_alignment(sequence, targets, "x", tolerance(targets))
    targets.label_logprobs[:] = -0.5
    with pytest.raises(CacheMismatchError, match="the label 7 "):
        check_alignment(sequence, targets, "x", tolerance(targets))


def test_sequence_without_targets_is_aligned():
    sequence = sequence_of([1, 2], [False, False])
    targets = targets_from_logits(np.zeros((0, 9)), np.zeros(0, int), k=2)
    check_alignment(sequence, targets, "x", tolerance(targets))


def test_numpy_below_torch_above():
    """Reading a cache must not cost the three seconds that importing torch and transformers takes."""
    code = (
        "import sys, kdcache, kdcache.errors, kdcache.targets, kdcache.config\n"
        "import kdcache.cache.verify, kdcache.cache.reader, kdcache.cache.commit\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
