"""P1 for the divergences that exist: values, gradients, bounds, and the tail at its extremes."""

import torch

from kdcache.train.losses import LOSSES, forward_kl


def buckets(logits, ids):
    logp = torch.log_softmax(logits, -1)
    return logp.gather(1, ids), logp.scatter(1, ids, -torch.inf).logsumexp(1)


def case(n=23, v=40, k=6, seed=0):
    torch.manual_seed(seed)
    teacher, student = torch.randn(n, v, dtype=torch.float64) * 2, torch.randn(n, v, dtype=torch.float64)
    return teacher, student, teacher.topk(k).indices


def dense_kl(teacher, student):
    t, s = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    return (t.exp() * (t - s)).sum(-1)


def test_all_entries_kept_is_the_full_divergence():
    teacher, student, _ = case()
    ids = torch.arange(40).expand(23, -1)
    t, s = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    none = torch.full((23,), -torch.inf, dtype=torch.float64)
    torch.testing.assert_close(forward_kl(t, none, s, none), dense_kl(teacher, student), rtol=0, atol=1e-12)
    assert ids.shape == t.shape


def test_coarse_is_a_lower_bound_that_grows_with_k():
    teacher, student, _ = case()
    order = teacher.argsort(descending=True)
    values = [
        forward_kl(*buckets(teacher, order[:, :k]), *buckets(student, order[:, :k])) for k in (1, 2, 5, 10, 20, 39)
    ]
    full = dense_kl(teacher, student)
    for smaller, larger in zip(values, [*values[1:], full], strict=True):
        assert (smaller <= larger + 1e-12).all()
    assert (values[0] < full - 1e-3).any()


def test_zero_only_for_the_same_buckets():
    teacher, student, ids = case()
    same = forward_kl(*buckets(teacher, ids), *buckets(teacher, ids))
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-13)
    assert (forward_kl(*buckets(teacher, ids), *buckets(student, ids)) > 0).all()


def test_forward_is_not_reverse():
    """KL(teacher || student) punishes a student that misses a mode; the reverse would not."""
    teacher = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    student = torch.tensor([[0.999, 0.001]], dtype=torch.float64).log()
    none = torch.full((1,), -torch.inf, dtype=torch.float64)
    expected = 0.5 * (torch.tensor(0.5 / 0.999).log() + torch.tensor(0.5 / 0.001).log())
    torch.testing.assert_close(forward_kl(teacher, none, student, none)[0], expected.double(), rtol=1e-6, atol=0)


def test_minus_inf_and_sentinels():
    """Unused slots and an empty tail contribute nothing, to the value or to the gradient."""
    teacher, student, ids = case()
    t, t_tail = buckets(teacher, ids)
    s, s_tail = buckets(student, ids)
    padded_t = torch.cat([t, torch.full((23, 3), -torch.inf, dtype=torch.float64)], dim=1)
    padded_s = torch.cat([s, s[:, :3]], dim=1).requires_grad_()
    value = forward_kl(padded_t, t_tail, padded_s, s_tail)
    torch.testing.assert_close(value, forward_kl(t, t_tail, s, s_tail))
    (grad,) = torch.autograd.grad(value.sum(), padded_s)
    assert torch.isfinite(grad).all()
    assert (grad[:, -3:] == 0).all()


def test_a_tail_of_1e_minus_30_has_finite_gradients():
    for name, loss in LOSSES.items():
        t = torch.tensor([[0.0]], dtype=torch.float64)
        tail = torch.tensor([-69.0], dtype=torch.float64)
        s, s_tail = t.clone().requires_grad_(), tail.clone().requires_grad_()
        grads = torch.autograd.grad(loss(t, tail, s, s_tail).sum(), [s, s_tail])
        assert all(torch.isfinite(grad).all() for grad in grads), name


def test_losses_do_not_reduce():
    teacher, student, ids = case()
    for loss in LOSSES.values():
        assert loss(*buckets(teacher, ids), *buckets(student, ids)).shape == (23,)
