"""The chunked head against four lines of autograd on dense logits, in float64 (P1), and its edges."""

import itertools

import pytest
import torch

from kdcache.calibration import calibration_error
from kdcache.errors import ConfigError
from kdcache.heads import OutputHead
from kdcache.train import head as head_module
from kdcache.train.head import kd_loss
from kdcache.train.kernel import chunk_loss
from kdcache.train.losses import LOSSES, make_divergence
from kdcache.train.objective import PARTS, BucketTargets, FullTargets, MixedTargets, Objective

N, D, V = 37, 8, 50


def model_and_teacher(*, bias, scale=1.0, softcap=None, seed=0):
    torch.manual_seed(seed)
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(V, dtype=torch.float64, requires_grad=True) if bias else None
    teacher = torch.randn(N, V, dtype=torch.float64) * 2
    return hidden, OutputHead(weight, offset, scale, softcap), teacher, torch.randint(0, V, (N,))


def buckets(teacher, k, temperature):
    logp = torch.log_softmax(teacher / temperature, -1)
    ids = teacher.topk(k).indices.sort(1).values
    tail = logp.scatter(1, ids, -torch.inf).logsumexp(1)
    return BucketTargets(ids, logp.gather(1, ids), tail, temperature=temperature)


def dense_logits(hidden, head):
    logits = hidden @ head.weight.T
    logits = (logits if head.bias is None else logits + head.bias) * head.scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


def dense_loss(logits, labels, targets, alpha, temperature):
    """The plain twin."""
    cross_entropy = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    student = torch.log_softmax(logits / temperature, -1)
    kept = student.gather(1, targets.token_ids)
    divergence = (targets.logprobs.exp() * (targets.logprobs - kept)).sum()
    if targets.token_ids.shape[1] < logits.shape[1]:
        tail = student.scatter(1, targets.token_ids, -torch.inf).logsumexp(1)
        divergence = divergence + (targets.tail_logprobs.exp() * (targets.tail_logprobs - tail)).sum()
    return (1 - alpha) * cross_entropy + alpha * temperature**2 * divergence


def grads_of(loss, hidden, head):
    parameters = [hidden, head.weight] + ([] if head.bias is None else [head.bias])
    return torch.autograd.grad(loss, parameters)


def assert_same_loss_and_gradients(ours, plain, hidden, head):
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10)
    for mine, theirs in zip(grads_of(ours, hidden, head), grads_of(plain, hidden, head), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("k", [1, 7, V])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("extras", [{"bias": False}, {"bias": True, "scale": 0.5, "softcap": 5.0}])
def test_values_and_gradients_equal_dense_autograd(k, temperature, alpha, extras):
    hidden, head, teacher, labels = model_and_teacher(**extras)
    targets = buckets(teacher, k, temperature)
    ours = kd_loss(hidden, targets, labels, Objective(alpha, temperature), head=head, chunk_positions=10)
    plain = dense_loss(dense_logits(hidden, head), labels, targets, alpha, temperature)
    assert_same_loss_and_gradients(ours.loss, plain, hidden, head)


@pytest.mark.parametrize(("alpha", "temperature"), itertools.product([0.3, 1.0], [1.0, 3.0]))
def test_full_targets_equal_all_entries_kept(alpha, temperature):
    hidden, head, _, labels = model_and_teacher(bias=False)
    # small whole numbers, so that float32 products are exact however they are chunked
    states, teacher_head = torch.randint(-2, 3, (N, 5)).float(), OutputHead(torch.randint(-2, 3, (V, 5)).float())
    teacher = teacher_head.logits(states).double()
    objective = Objective(alpha, temperature)
    full = kd_loss(
        hidden, FullTargets(states, teacher_head, temperature), labels, objective, head=head, chunk_positions=9
    )
    kept = kd_loss(hidden, buckets(teacher, V, temperature), labels, objective, head=head)
    torch.testing.assert_close(full.loss, kept.loss, rtol=0, atol=1e-10)
    for a, b in zip(grads_of(full.loss, hidden, head), grads_of(kept.loss, hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_logits_path_equals_head_path():
    hidden, head, teacher, labels = model_and_teacher(bias=True)
    targets, objective = buckets(teacher, 7, 2.0), Objective(0.6, 2.0)
    through_head = kd_loss(hidden, targets, labels, objective, head=head, chunk_positions=8)
    logits = dense_logits(hidden, head)
    through_logits = kd_loss(logits, targets, labels, objective)
    torch.testing.assert_close(through_head.loss, through_logits.loss, rtol=0, atol=1e-10)
    for a, b in zip(
        grads_of(through_head.loss, hidden, head), grads_of(through_logits.loss, hidden, head), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_chunks_do_not_matter():
    hidden, head, teacher, labels = model_and_teacher(bias=False)
    targets, objective = buckets(teacher, 7, 1.0), Objective(0.5)
    losses = [kd_loss(hidden, targets, labels, objective, head=head, chunk_positions=c).loss for c in (1, 5, 37, 100)]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=0, atol=1e-10)


def test_logits_of_a_chunk_only(monkeypatch):
    """[positions, vocabulary] never exists: the head is asked for at most a chunk at a time."""
    hidden, head, teacher, labels = model_and_teacher(bias=False)
    hidden, head = hidden.detach().float().requires_grad_(), OutputHead(head.weight.detach().float())
    asked = []
    plain = head_module._logits_into
    monkeypatch.setattr(head_module, "_logits_into", lambda out, *given: asked.append(len(out)) or plain(out, *given))
    b = buckets(teacher, 7, 1.0)
    float_targets = BucketTargets(b.token_ids, b.logprobs.float(), b.tail_logprobs.float())
    kd_loss(hidden, float_targets, labels, Objective(0.5), head=head, chunk_positions=10).loss.backward()
    assert asked == [10, 10, 10, 7]


def test_unused_slots_change_nothing():
    hidden, head, teacher, labels = model_and_teacher(bias=False)
    narrow = buckets(teacher, 5, 1.0)
    wide = BucketTargets(
        torch.cat([narrow.token_ids, narrow.token_ids[:, :1].expand(-1, 3)], 1),
        torch.cat([narrow.logprobs, torch.full((N, 3), -torch.inf, dtype=torch.float64)], 1),
        narrow.tail_logprobs,
    )
    objective = Objective(0.7)
    a, b = (kd_loss(hidden, t, labels, objective, head=head, chunk_positions=11) for t in (narrow, wide))
    torch.testing.assert_close(a.loss, b.loss, rtol=0, atol=1e-12)
    for x, y in zip(grads_of(a.loss, hidden, head), grads_of(b.loss, hidden, head), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_a_student_tail_that_vanished_has_finite_gradients():
    logits = torch.full((1, V), -200.0, dtype=torch.float64)
    logits[0, :3] = 0.0
    targets = buckets(torch.randn(1, V, dtype=torch.float64), 3, 1.0)
    targets = BucketTargets(torch.tensor([[0, 1, 2]]), targets.logprobs, targets.tail_logprobs)
    for temperature in (1.0, 2.0):
        sums, grad = chunk_loss(logits.clone(), torch.tensor([1]), targets, Objective(0.5, temperature), True)
        assert torch.isfinite(sums).all()
        assert torch.isfinite(grad).all()


def divergence_of(logits, targets, temperature=1.0):
    sums = kd_loss(logits, targets, torch.zeros(len(logits), dtype=torch.long), Objective(1.0, temperature))
    return sums.divergence


def test_coarse_is_at_most_full():
    """Data processing: merging tokens into a tail bucket can only lower the divergence, and less the more are kept."""
    hidden, head, teacher, _ = model_and_teacher(bias=False)
    logits = dense_logits(hidden, head).detach()
    found = [float(divergence_of(logits, buckets(teacher, k, 1.0))) for k in (1, 2, 5, 20, V - 1, V)]
    full = torch.nn.functional.kl_div(
        torch.log_softmax(logits, -1), torch.log_softmax(teacher, -1), reduction="sum", log_target=True
    )
    assert found == sorted(found)
    assert found[-2] <= float(full) + 1e-10
    assert found[-1] == pytest.approx(float(full), abs=1e-10)


def test_subset_renormalisation():
    """A student that has the right ratios among the kept tokens but twice the tail is wrong, and is told so.

    Renormalising both over the kept tokens, as is often done, would call it perfect; and the teacher itself is a minimum.
    """
    _, _, teacher, labels = model_and_teacher(bias=False)
    targets = buckets(teacher, 7, 1.0)
    ids = targets.token_ids
    wrong = (teacher + 1.0).scatter(1, ids, teacher.gather(1, ids)).requires_grad_()
    renormalised = torch.log_softmax(wrong.gather(1, ids), -1) - torch.log_softmax(teacher.gather(1, ids), -1)
    assert renormalised.abs().max() < 1e-10, "blind to it"
    loss = kd_loss(wrong, targets, labels, Objective(1.0)).loss
    assert float(loss.detach()) / N > 0.02
    assert torch.autograd.grad(loss, wrong)[0].norm() > 0.1
    right = teacher.clone().requires_grad_()
    at_teacher = kd_loss(right, targets, labels, Objective(1.0)).loss
    assert abs(float(at_teacher.detach())) < 1e-10
    assert torch.autograd.grad(at_teacher, right)[0].abs().max() < 1e-10


@pytest.mark.parametrize("tail", [-1e-9, -20.0, -69.0, -200.0, -torch.inf])
def test_a_teacher_tail_of_any_size_is_finite(tail):
    """From everything in the tail to nothing (1e-30 and below), value and gradient stay finite."""
    torch.manual_seed(0)
    tail = torch.full((1,), tail, dtype=torch.float64)
    entries = torch.log_softmax(torch.randn(1, 3, dtype=torch.float64), -1) + torch.log(-torch.expm1(tail))
    logits = torch.randn(1, V, dtype=torch.float64, requires_grad=True)
    loss = kd_loss(
        logits, BucketTargets(torch.tensor([[0, 4, 9]]), entries, tail), torch.tensor([1]), Objective(1.0)
    ).loss
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()


def test_reported_loss_is_the_optimised_one():
    """T^2 stands in the value as in the gradient: a small step along -grad lowers the reported loss by |grad|^2."""
    hidden, head, teacher, labels = model_and_teacher(bias=False)
    targets, objective, step = buckets(teacher, 7, 4.0), Objective(0.8, 4.0), 1e-6
    loss = kd_loss(hidden, targets, labels, objective, head=head).loss
    (grad,) = torch.autograd.grad(loss, hidden)
    moved = kd_loss(hidden - step * grad, targets, labels, objective, head=head).loss
    assert float((loss - moved).detach() / step) == pytest.approx(float(grad.square().sum()), rel=1e-3)


def test_bf16_loss_math():
    """Under bf16 the loss keeps float32 from the logits on: its error is that of bf16 logits, no more."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32).bfloat16(), (torch.randn(1000, 32) / 3).bfloat16()
    teacher, labels = torch.randn(64, 1000, dtype=torch.float64) * 3, torch.randint(0, 1000, (64,))
    b = buckets(teacher, 16, 1.0)
    targets = BucketTargets(b.token_ids, b.logprobs.float(), b.tail_logprobs.float())
    ours = kd_loss(hidden.clone().requires_grad_(), targets, labels, Objective(0.5), head=OutputHead(weight))
    rounded = torch.nn.functional.linear(hidden, weight).double()
    exact = dense_loss(rounded, labels, b, 0.5, 1.0)
    assert ours.loss.dtype == torch.float32
    assert float(ours.loss.detach()) == pytest.approx(float(exact), rel=1e-5)


def test_frozen_head_gets_no_gradient():
    hidden, head, teacher, labels = model_and_teacher(bias=False)
    frozen = OutputHead(head.weight.detach())
    loss = kd_loss(hidden, buckets(teacher, 5, 1.0), labels, Objective(0.5), head=frozen).loss
    loss.backward()
    assert hidden.grad is not None
    assert frozen.weight.grad is None


def test_alpha_above_zero_needs_targets():
    hidden, head, _, labels = model_and_teacher(bias=False)
    with pytest.raises(ConfigError, match="needs targets"):
        kd_loss(hidden, None, labels, Objective(0.5), head=head)


def test_targets_of_another_temperature_or_number_are_refused():
    hidden, head, teacher, labels = model_and_teacher(bias=False)
    at_2 = buckets(teacher, 5, 2.0)
    with pytest.raises(ConfigError, match="targets are at temperature 2, the objective at 1"):
        kd_loss(hidden, at_2, labels, Objective(0.5, 1.0), head=head)
    mixed = MixedTargets(((0.5, buckets(teacher, 5, 1.0)), (0.5, at_2)))
    with pytest.raises(ConfigError, match="temperature"):
        kd_loss(hidden, mixed, labels, Objective(0.5, 1.0), head=head)
    with pytest.raises(ConfigError, match="37 positions, 36 targets"):
        kd_loss(hidden, at_2[:36], labels, Objective(0.5, 2.0), head=head)


def test_no_position_at_all():
    hidden, head, teacher, labels = model_and_teacher(bias=False)
    empty = kd_loss(hidden[:0], buckets(teacher, 5, 1.0)[0:0], labels[:0], Objective(0.5), head=head)
    assert float(empty.loss.detach()) == 0
    grads = grads_of(empty.loss, hidden, head)
    assert all((grad == 0).all() for grad in grads)


# --- every divergence through the kernel ------------------------------------------------------------------------------

DIVERGENCES = ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tv", "akl", "taid", "logit_mse"]


def autograd_loss(logits, labels, targets, objective):
    """Any divergence by autograd through dense logits: the plain twin of the kernel, for buckets and for draws."""
    student = torch.log_softmax(logits / objective.temperature, -1)
    kept = student.gather(1, targets.token_ids)
    if targets.ratios is None:
        tail = student.scatter(1, targets.token_ids, -torch.inf).logsumexp(1)
        divergence = objective.divergence.on_buckets(targets.logprobs, targets.tail_logprobs, kept, tail)
    else:
        divergence = objective.divergence.on_draws(targets.ratios, targets.logprobs, kept)
    cross_entropy = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    distilled = objective.temperature**2 * divergence.sum()
    return objective.weight * ((1 - objective.alpha) * cross_entropy + objective.alpha * distilled)


def check_against_autograd(hidden, head, labels, targets, objective):
    ours = kd_loss(hidden, targets, labels, objective, head=head, chunk_positions=10)
    plain = autograd_loss(dense_logits(hidden, head), labels, targets, objective)
    assert_same_loss_and_gradients(ours.loss, plain, hidden, head)
    return ours


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("alpha", "temperature"), [(0.6, 1.0), (1.0, 2.0), (0.3, 4.0)])
@pytest.mark.parametrize("extras", [{"bias": False}, {"bias": True, "scale": 0.5, "softcap": 5.0}])
def test_every_divergence_equals_autograd(name, alpha, temperature, extras):
    hidden, head, teacher, labels = model_and_teacher(**extras)
    objective = Objective(alpha, temperature, make_divergence(name), weight=1.3)
    check_against_autograd(hidden, head, labels, buckets(teacher, 7, temperature), objective)


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "skew_kl", "skew_reverse_kl", "tv"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_divergence_from_draws_equals_autograd(name, temperature):
    hidden, head, teacher, labels = model_and_teacher(bias=False)
    b = buckets(teacher, 7, temperature)
    torch.manual_seed(3)
    targets = BucketTargets(b.token_ids, b.logprobs, b.tail_logprobs, torch.rand_like(b.logprobs) * 3, temperature)
    sums = check_against_autograd(hidden, head, labels, targets, Objective(0.6, temperature, make_divergence(name)))
    assert float(sums.student_tail_mass) > 0


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "tv"])
def test_several_teachers_sum_their_losses(name):
    hidden, head, teacher, labels = model_and_teacher(bias=True)
    other = torch.randn(N, V, dtype=torch.float64)
    parts = ((0.7, buckets(teacher, 7, 1.0)), (0.3, buckets(other, 12, 1.0)))
    objective = Objective(0.6, 1.0, make_divergence(name))
    ours = kd_loss(hidden, MixedTargets(parts), labels, objective, head=head, chunk_positions=10)
    plain = sum(w * autograd_loss(dense_logits(hidden, head), labels, part, objective) for w, part in parts)
    assert_same_loss_and_gradients(ours.loss, plain, hidden, head)


def test_several_teachers_have_the_gradient_of_their_mixture():
    """Forward KL to each, summed by weight, pulls as forward KL to the mixture does, to 1e-10."""
    hidden, head, teacher, labels = model_and_teacher(bias=False)
    other = torch.randn(N, V, dtype=torch.float64)
    objective = Objective(1.0)
    summed = MixedTargets(((0.7, buckets(teacher, V, 1.0)), (0.3, buckets(other, V, 1.0))))
    mixture = (0.7 * torch.softmax(teacher, -1) + 0.3 * torch.softmax(other, -1)).log()
    ours = grads_of(kd_loss(hidden, summed, labels, objective, head=head).loss, hidden, head)
    theirs = grads_of(kd_loss(hidden, buckets(mixture, V, 1.0), labels, objective, head=head).loss, hidden, head)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_reported_parts_equal_dense_ones():
    hidden, head, teacher, labels = model_and_teacher(bias=False)
    objective = Objective(0.5, 1.0, make_divergence("reverse_kl"))
    sums = kd_loss(hidden, buckets(teacher, V, 1.0), labels, objective, head=head, chunk_positions=10)
    t, logits = torch.softmax(teacher, -1), dense_logits(hidden, head).detach()
    p = torch.softmax(logits, -1)
    expected = {
        "cross_entropy": torch.nn.functional.cross_entropy(logits, labels, reduction="sum"),
        "divergence": (p * (p / t).log()).sum(),
        "forward_kl": (t * (t / p).log()).sum(),
        "top1_agreement": (t.argmax(1) == p.argmax(1)).sum().double(),
        "student_tail_mass": torch.zeros(()).double(),
        "teacher_tail_mass": torch.zeros(()).double(),
        "acceptance_rate": torch.minimum(t, p).sum(),
        "staleness": torch.zeros(()).double(),
        "rollout_share": torch.zeros(()).double(),
    }
    assert tuple(expected) == PARTS
    for name, value in expected.items():
        torch.testing.assert_close(getattr(sums, name), value, rtol=0, atol=1e-10)
    kept = kd_loss(hidden, buckets(teacher, 5, 1.0), labels, objective, head=head)
    ids = teacher.topk(5).indices
    torch.testing.assert_close(kept.student_tail_mass, (1 - p.gather(1, ids).sum(1)).sum())
    torch.testing.assert_close(kept.teacher_tail_mass, (1 - t.gather(1, ids).sum(1)).sum())


def test_calibration_error_by_hand():
    """Sure and right half of the time: the error is the gap."""
    logits = torch.full((4, 3), -50.0, dtype=torch.float64)
    logits[:, 0] = 0.0
    sums = kd_loss(logits, None, torch.tensor([0, 0, 1, 2]), Objective(0.0))
    assert sums.calibration.sum(0).tolist() == pytest.approx([4, 4, 2])
    assert calibration_error(sums.calibration) == pytest.approx(0.5)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("repeats", [2, 7])
@pytest.mark.parametrize("has_tail", [False, True])
def test_an_id_that_stands_twice_does_no_harm_of_another_kind(name, drawn, repeats, has_tail):
    """A stranger's packed cache may hold one that ``verify`` finds and training does not look for: wrong numbers, all of them finite."""
    hidden, head, teacher, labels = model_and_teacher(bias=True)
    sound = buckets(teacher, 7, 2.0)
    ids = sound.token_ids.clone()
    ids[:, -repeats:] = ids[:, -repeats:][:, :1]
    tail = sound.tail_logprobs if has_tail else torch.full_like(sound.tail_logprobs, -torch.inf)
    targets = BucketTargets(
        ids, sound.logprobs, tail, torch.rand_like(sound.logprobs) if drawn else None, temperature=2.0
    )
    divergence = LOSSES[name]()
    if drawn and divergence.on_draws is None:
        pytest.skip(f"{name} is not taken from draws")
    ours = kd_loss(hidden, targets, labels, Objective(0.5, 2.0, divergence), head=head, chunk_positions=10)
    for numbers in (ours.loss, ours.parts, *grads_of(ours.loss, hidden, head)):
        assert torch.isfinite(numbers).all()
