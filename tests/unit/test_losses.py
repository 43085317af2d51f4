"""P1 for every divergence: values and gradients against dense float64, bounds, unbiasedness, and the tail at its extremes."""

import math

import pytest
import torch

from kdcache.errors import ConfigError
from kdcache.train.losses import LOSSES, OTHER_NAMES, REFUSED, check_estimator, make_divergence
from kdcache.train.options import LOSS_NAMES

N, V = 23, 40
F_DIVERGENCES = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jsd", {}),
    ("jsd", {"beta": 0.1}),
    ("jsd", {"beta": 0.9}),
    ("skew_kl", {}),
    ("skew_kl", {"skew": 0.6}),
    ("skew_reverse_kl", {}),
    ("skew_reverse_kl", {"skew": 0.6}),
    ("tv", {}),
]
ALL = [
    *F_DIVERGENCES,
    ("akl", {}),
    ("akl", {"head_mass": 0.3}),
    ("taid", {}),
    ("taid", {"interpolation": 0.9}),
    ("logit_mse", {}),
]
FROM_DRAWS = [(name, arguments) for name, arguments in F_DIVERGENCES if name != "reverse_kl"]


def case(n=N, v=V, seed=0):
    torch.manual_seed(seed)
    return torch.randn(n, v, dtype=torch.float64) * 2, torch.randn(n, v, dtype=torch.float64)


def dense(name, t, p, **arguments):
    """Each divergence as its paper writes it, over ``[N, V]`` probabilities."""
    if name == "forward_kl":
        return (t * (t / p).log()).sum(-1)
    if name == "reverse_kl":
        return (p * (p / t).log()).sum(-1)
    if name == "jsd":
        beta = arguments.get("beta", 0.5)
        m = beta * t + (1 - beta) * p
        return beta * (t * (t / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1)
    if name == "skew_kl":
        a = arguments.get("skew", 0.1)
        return (t * (t / (a * t + (1 - a) * p)).log()).sum(-1)
    if name == "skew_reverse_kl":
        a = arguments.get("skew", 0.1)
        return (p * (p / (a * p + (1 - a) * t)).log()).sum(-1)
    if name == "tv":
        return (t - p).abs().sum(-1) / 2
    if name == "akl":
        mass = arguments.get("head_mass", 0.5)
        order = t.argsort(-1, descending=True)
        head = torch.zeros_like(t, dtype=torch.bool)
        for row in range(len(t)):
            total = 0.0
            for token in order[row].tolist():
                if total >= mass:
                    break
                head[row, token] = True
                total += float(t[row, token])
        gap = (t - p).abs().detach()
        g_head = (gap * head).sum(-1)
        g_tail = (gap * ~head).sum(-1)
        forward, reverse = dense("forward_kl", t, p), dense("reverse_kl", t, p)
        return (g_head * forward + g_tail * reverse) / (g_head + g_tail)
    if name == "taid":
        share = arguments.get("interpolation", 0.4)
        between = torch.softmax((1 - share) * p.log().detach() + share * t.log(), -1)
        return (between * (between / p).log()).sum(-1)
    assert name == "logit_mse"
    z, v = p.log(), t.log()
    return ((z - z.mean(-1, keepdim=True)) - (v - v.mean(-1, keepdim=True))).square().mean(-1)


def coarse(logits, ids):
    """Kept entries and tail of ``[N, V]`` logits, with a gradient."""
    logp = torch.log_softmax(logits, -1)
    return logp.gather(1, ids), logp.scatter(1, ids, -torch.inf).logsumexp(1)


def assert_same_value_and_gradient(ours, plain, student):
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    (mine,) = torch.autograd.grad(ours.sum(), student, retain_graph=True)
    (theirs,) = torch.autograd.grad(plain.sum(), student)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "arguments"), ALL)
def test_all_entries_kept_is_the_full_divergence(name, arguments):
    """Value and gradient at k = V."""
    teacher, student = case()
    student.requires_grad_()
    t, p = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    none = torch.full((N,), -torch.inf, dtype=torch.float64)
    ours = make_divergence(name, arguments).on_buckets(t, none, p, none)
    plain = dense(name, t.exp(), p.exp(), **arguments)
    assert_same_value_and_gradient(ours, plain, student)


@pytest.mark.parametrize(("name", "arguments"), ALL)
def test_kept_entries_and_tail_are_k_plus_1_tokens(name, arguments):
    """With a tail the divergence is the dense one over the coarser alphabet (logit_mse: over the kept entries alone)."""
    teacher, student = case()
    student.requires_grad_()
    ids = teacher.topk(12).indices
    (t, t_tail), (p, p_tail) = coarse(teacher, ids), coarse(student, ids)
    ours = make_divergence(name, arguments).on_buckets(t, t_tail, p, p_tail)
    if name == "logit_mse":
        plain = dense(name, t.exp(), p.exp())
    else:
        plain = dense(
            name, torch.cat([t, t_tail[:, None]], 1).exp(), torch.cat([p, p_tail[:, None]], 1).exp(), **arguments
        )
    if name == "akl":
        # The tail is never part of the head, however heavy: rows where the head is full before the tail's turn comes.
        before = torch.where(t > t_tail[:, None], t.exp(), 0.0).sum(1)
        same = before >= arguments.get("head_mass", 0.5)
        assert same.any()
        ours, plain = ours[same], plain[same]
    assert_same_value_and_gradient(ours, plain, student)


@pytest.mark.parametrize(("name", "arguments"), F_DIVERGENCES)
def test_coarse_is_a_lower_bound_that_grows_with_k(name, arguments):
    """The data-processing inequality, which f-divergences have."""
    teacher, student = case()
    order = teacher.argsort(descending=True)
    divergence = make_divergence(name, arguments)
    values = [divergence.on_buckets(*_ordered(teacher, student, order[:, :k])) for k in (1, 2, 5, 10, 20, 39)]
    full = dense(name, torch.softmax(teacher, -1), torch.softmax(student, -1), **arguments)
    for smaller, larger in zip(values, [*values[1:], full], strict=True):
        assert (smaller <= larger + 1e-12).all()
    assert (values[0] < full - 1e-4).any()


def _ordered(teacher, student, ids):
    (t, t_tail), (p, p_tail) = coarse(teacher, ids), coarse(student, ids)
    return t, t_tail, p, p_tail


@pytest.mark.parametrize(("name", "arguments"), ALL)
def test_zero_only_for_the_same_buckets(name, arguments):
    teacher, student = case()
    ids = teacher.topk(6).indices
    divergence = make_divergence(name, arguments)
    same = divergence.on_buckets(*_ordered(teacher, teacher, ids))
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-13)
    assert (divergence.on_buckets(*_ordered(teacher, student, ids)) > 0).all()


def test_forward_is_not_reverse():
    """KL(teacher || student) punishes a student that misses a mode; the reverse one that invents one."""
    teacher = torch.tensor([[0.5, 0.499, 0.001]], dtype=torch.float64).log()
    misses = torch.tensor([[0.998, 0.001, 0.001]], dtype=torch.float64).log()
    invents = torch.tensor([[0.3, 0.3, 0.4]], dtype=torch.float64).log()
    none = torch.full((1,), -torch.inf, dtype=torch.float64)
    value = {
        (name, who): float(make_divergence(name).on_buckets(teacher, none, student, none))
        for name in ("forward_kl", "reverse_kl")
        for who, student in (("misses", misses), ("invents", invents))
    }
    assert value["forward_kl", "misses"] > value["forward_kl", "invents"]
    assert value["reverse_kl", "misses"] < value["reverse_kl", "invents"]
    by_hand = 0.5 * math.log(0.5 / 0.998) + 0.499 * math.log(0.499 / 0.001)
    assert value["forward_kl", "misses"] == pytest.approx(by_hand, rel=1e-6)


def test_bounds_that_papers_give():
    """Skew KL is at most -log(skew), JSD at most log 2, TV at most 1, even for distributions that share nothing."""
    t = torch.tensor([[0.0, -80.0]], dtype=torch.float64)
    p = torch.tensor([[-80.0, 0.0]], dtype=torch.float64)
    none = torch.full((1,), -torch.inf, dtype=torch.float64)
    for name, bound in (
        ("skew_kl", -math.log(0.1)),
        ("skew_reverse_kl", -math.log(0.1)),
        ("jsd", math.log(2)),
        ("tv", 1.0),
    ):
        assert float(make_divergence(name).on_buckets(t, none, p, none)) == pytest.approx(bound, abs=1e-9)


# --- from draws -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "arguments"), FROM_DRAWS)
def test_draws_of_everything_are_the_full_divergence(name, arguments):
    """Weights equal to the probabilities leave nothing to chance, and the control variate adds nothing."""
    teacher, student = case()
    t, p = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    ours = make_divergence(name, arguments).on_draws(torch.ones_like(t), t, p)
    torch.testing.assert_close(ours, dense(name, t.exp(), p.exp(), **arguments), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "arguments"), FROM_DRAWS)
def test_draws_are_unbiased(name, arguments):
    """Value and gradient, averaged over 20,000 redraws, within 5 standard errors of the dense ones."""
    teacher, student = case(1, 30)
    student.requires_grad_()
    t, p = torch.log_softmax(teacher[0], -1), torch.log_softmax(student[0], -1)
    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(t.exp(), 20_000 * 4, replacement=True, generator=generator).view(20_000, 4)
    ratios = torch.full((20_000, 4), 0.25, dtype=torch.float64) / t[draws].exp()
    values = make_divergence(name, arguments).on_draws(ratios, t[draws], p[draws])
    full = dense(name, t.exp()[None], p.exp()[None], **arguments)[0]
    error = float(values.detach().std()) / math.sqrt(20_000)
    assert abs(float(values.detach().mean() - full.detach())) < 5 * error
    (mine,) = torch.autograd.grad(values.mean(), student, retain_graph=True)
    (theirs,) = torch.autograd.grad(full, student)
    cosine = torch.nn.functional.cosine_similarity(mine, theirs)
    assert cosine > 0.999
    assert float(mine.norm() / theirs.norm()) == pytest.approx(1, abs=0.03)


def test_control_variates_bound_the_variance():
    """Without one, skew reverse KL from draws varies many times as much (the student is far from the teacher)."""
    torch.manual_seed(0)
    teacher, student = torch.randn(2000, dtype=torch.float64) * 3, torch.randn(2000, dtype=torch.float64) * 3
    t, p = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    draws = torch.multinomial(t.exp(), 50_000, replacement=True)[:, None]
    ratios = 1 / t[draws].exp()
    with_control = make_divergence("skew_reverse_kl").on_draws(ratios, t[draws], p[draws])
    w = (p - t)[draws].exp()
    plain = (w * (w.log() - (0.1 * w + 0.9).log()))[:, 0]
    full = dense("skew_reverse_kl", t.exp()[None], p.exp()[None])[0]
    assert abs(float(with_control.mean() - full)) < 0.1
    assert float(with_control.std()) < 0.2 * float(plain.std())


def test_what_cannot_be_drawn_is_refused():
    for name in ("reverse_kl", "akl", "taid", "logit_mse"):
        with pytest.raises(ConfigError, match=f"loss {name} cannot be had from drawn targets") as error:
            check_estimator(make_divergence(name), "draws", "cache")
        assert "forward_kl" in error.value.hint
        check_estimator(make_divergence(name), "buckets", "cache")


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "arguments"), ALL)
def test_minus_inf_and_sentinels(name, arguments):
    """Unused slots contribute nothing, to the value or to the gradient."""
    teacher, student = case()
    ids = teacher.topk(6).indices
    t, t_tail, p, p_tail = _ordered(teacher, student, ids)
    divergence = make_divergence(name, arguments)
    padded_t = torch.cat([t, torch.full((N, 3), -torch.inf, dtype=torch.float64)], dim=1)
    padded_p = torch.cat([p, p[:, :3]], dim=1).requires_grad_()
    value = divergence.on_buckets(padded_t, t_tail, padded_p, p_tail)
    torch.testing.assert_close(value, divergence.on_buckets(t, t_tail, p, p_tail))
    (grad,) = torch.autograd.grad(value.sum(), padded_p)
    assert torch.isfinite(grad).all()
    assert (grad[:, -3:] == 0).all()


@pytest.mark.parametrize(("name", "arguments"), ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("t_tail", "p_tail"), [(-69.0, -69.0), (-69.0, -0.1), (-0.1, -69.0), (-math.inf, -2.0), (-math.inf, -math.inf)]
)
def test_a_tail_of_1e_minus_30_has_finite_gradients(name, arguments, dtype, t_tail, p_tail):
    t = torch.log1p(-torch.tensor([[t_tail]], dtype=dtype).exp())
    p = torch.log1p(-torch.tensor([[p_tail]], dtype=dtype).exp()).requires_grad_()
    tail = torch.tensor([p_tail], dtype=dtype, requires_grad=True)
    value = make_divergence(name, arguments).on_buckets(t, torch.tensor([t_tail], dtype=dtype), p, tail)
    assert torch.isfinite(value).all()
    assert value >= -1e-6
    grads = torch.autograd.grad(value.sum(), [p, tail], allow_unused=True)
    assert all(grad is None or torch.isfinite(grad).all() for grad in grads)


def test_a_student_with_mass_where_the_teacher_has_none_pays():
    """An empty tail does not excuse the student's: reverse KL there is large, not zero."""
    t, p = torch.zeros(1, 1), torch.tensor([[math.log(0.9)]])
    value = make_divergence("reverse_kl").on_buckets(t, torch.tensor([-math.inf]), p, torch.tensor([math.log(0.1)]))
    assert value > 5


@pytest.mark.parametrize(("name", "arguments"), ALL)
def test_losses_do_not_reduce(name, arguments):
    teacher, student = case()
    value = make_divergence(name, arguments).on_buckets(*_ordered(teacher, student, teacher.topk(6).indices))
    assert value.shape == (N,)


def test_bf16_loss_math():
    """Terms are computed in what they are given, and the head gives float32: small differences are not lost to bf16."""
    teacher, _ = case()
    student = teacher + 1e-3 * torch.randn(N, V, dtype=torch.float64)
    ids = teacher.topk(6).indices
    exact = make_divergence("forward_kl").on_buckets(*_ordered(teacher, student, ids))
    single = make_divergence("forward_kl").on_buckets(*(x.float() for x in _ordered(teacher, student, ids)))
    assert float((single - exact).abs().max()) < 1e-6


def test_logit_mse_does_not_see_a_shift():
    teacher, student = case()
    ids = teacher.topk(6).indices
    divergence = make_divergence("logit_mse")
    t, _, p, _ = _ordered(teacher, student, ids)
    shifted = divergence.on_buckets(t, t[:, 0], p + 3.7, p[:, 0])
    torch.testing.assert_close(shifted, divergence.on_buckets(t, t[:, 0], p, p[:, 0]))


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_are_the_options_names():
    assert tuple(LOSSES) == LOSS_NAMES
    assert set(OTHER_NAMES.values()) <= set(LOSSES)
    for name, make in LOSSES.items():
        assert make().name == name


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("rkl", {}, "did you mean reverse_kl"),
        ("foward_kl", {}, "did you mean forward_kl"),
        ("jsd", {"beta": 0.0}, "forward_kl"),
        ("jsd", {"beta": 1.0}, "reverse_kl"),
        ("jsd", {"alpha": 0.5}, "it takes beta"),
        ("forward_kl", {"beta": 0.5}, "it takes none"),
        ("skew_kl", {"skew": 1.5}, "between 0 and 1"),
        ("taid", {"interpolation": 2}, "between 0 and 1"),
        ("jsd", {"beta": "much"}, "is a number"),
    ],
)
def test_bad_names_and_arguments(name, arguments, says):
    with pytest.raises(ConfigError) as error:
        make_divergence(name, arguments)
    assert says in str(error.value)


@pytest.mark.parametrize("name", REFUSED)
def test_subset_renormalisation_and_other_refusals_name_the_reason(name):
    with pytest.raises(ConfigError, match="kept entries") as error:
        make_divergence(name)
    assert error.value.hint.startswith("--loss")


def test_truncated_reverse_kl_is_degenerate():
    """Why it is refused: minimised over the kept entries alone it puts them at t / e, and the rest of the mass anywhere."""
    t = torch.tensor([0.6, 0.3], dtype=torch.float64)  # the tail has 0.1
    z = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([z], lr=0.5, max_iter=500, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        p = torch.softmax(z, 0)[:2]
        loss = (p * (p / t).log()).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    p = torch.softmax(z, 0).detach()
    torch.testing.assert_close(p[:2], t / math.e, atol=1e-4, rtol=0)
    assert p[2] > 0.63
