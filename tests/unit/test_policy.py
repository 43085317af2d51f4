"""MiniLLM on cached scores: against its definition, and against the gradient of the sequences' reverse KL itself."""

import itertools

import numpy as np
import pytest
import torch

from kdcache.heads import OutputHead
from kdcache.train.head import kd_loss
from kdcache.train.losses import reverse_kl
from kdcache.train.objective import BucketTargets, FullTargets, Objective, PolicyGradient, Rollouts
from kdcache.train.rollouts import advantages

V, D = 17, 8
IDENTITY = OutputHead(torch.eye(V, dtype=torch.float64))


def whole(logits):
    """Targets that are all of ``softmax(logits)``, as k = V entries without a tail."""
    ids = torch.arange(V).expand(len(logits), V).contiguous()
    return BucketTargets(ids, logits.log_softmax(-1), torch.full((len(logits),), -torch.inf, dtype=torch.float64))


def dense(logits, teacher, labels, rollouts, policy, weight):
    """The loss, from its definition, by autograd."""
    log_p, log_t = logits.log_softmax(-1), teacher.log_softmax(-1)
    label = log_p.gather(1, labels[:, None])[:, 0]
    ratio = (label - torch.where(rollouts.logprobs.isnan(), label.detach(), rollouts.logprobs)).exp()
    clipped = ratio.clamp(1 - policy.clip, 1 + policy.clip)
    single = (clipped.detach() * (log_p.exp() * (log_p - log_t)).sum(-1)).sum()
    gain = torch.minimum(ratio * rollouts.advantages, clipped * rollouts.advantages).sum()
    return weight * (policy.single_step * single - policy.long_term * gain)


@pytest.mark.parametrize("clip", [0.2, 10.0])
@pytest.mark.parametrize("kind", ["entries", "hidden"])
@pytest.mark.parametrize("chunk", [4, 100])
def test_equals_its_definition(clip, kind, chunk):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(30, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    teacher = torch.randn(30, V, generator=generator).double()  # what the head of hidden states gives is float32
    labels = torch.randint(V, (30,), generator=generator)
    now = (hidden @ weight.T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    old = now + 0.5 * torch.randn(30, generator=generator, dtype=torch.float64)
    old[::5] = torch.nan
    written = Rollouts(old, torch.randn(30, generator=generator, dtype=torch.float64))
    policy = PolicyGradient(single_step=0.7, long_term=1.3, clip=clip)
    targets = whole(teacher) if kind == "entries" else FullTargets(teacher, IDENTITY, 1.0)
    ours, theirs = ([x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2))
    objective = Objective(1.0, 1.0, reverse_kl(), weight=0.6, policy=policy)
    sums = kd_loss(
        ours[0], targets, labels, objective, head=OutputHead(ours[1]), chunk_positions=chunk, rollouts=written
    )
    expected = dense(theirs[0] @ theirs[1].T, teacher, labels, written, policy, 0.6)
    torch.testing.assert_close(sums.loss, expected, rtol=1e-10, atol=1e-10)
    sums.loss.backward()
    expected.backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10)
    assert float(sums.rollout_share) == 24
    torch.testing.assert_close(sums.staleness, (old - now)[~old.isnan()].sum())


def test_expected_gradient_is_that_of_reverse_kl_over_sequences():
    """All texts of two tokens, each as often as the student writes it: the long-term part makes single steps whole."""
    generator = torch.Generator().manual_seed(1)
    first, second, teacher_first, teacher_second = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((V,), (V, V), (V,), (V, V))
    )
    ours, theirs = ([x.clone().requires_grad_() for x in (first, second)] for _ in range(2))
    log_p = theirs[0].log_softmax(-1)[:, None] + theirs[1].log_softmax(-1)
    log_t = teacher_first.log_softmax(-1)[:, None] + teacher_second.log_softmax(-1)
    (log_p.exp() * (log_p - log_t)).sum().backward()

    def expected(policy):
        objective, total = Objective(1.0, 1.0, reverse_kl(), policy=policy), torch.zeros((), dtype=torch.float64)
        for a, b in itertools.product(range(V), range(V)):
            logits, teacher = torch.stack([ours[0], ours[1][a]]), torch.stack([teacher_first, teacher_second[a]])
            labels = torch.tensor([a, b])
            old = logits.detach().log_softmax(-1).gather(1, labels[:, None])[:, 0]
            rewards = (teacher.log_softmax(-1).gather(1, labels[:, None])[:, 0] - old).numpy()
            gains = torch.tensor(advantages(rewards, np.zeros(2, dtype=int))).double()
            loss = kd_loss(logits, whole(teacher), labels, objective, rollouts=Rollouts(old, gains)).loss
            total = total + log_p[a, b].exp().detach() * loss
        grads = torch.autograd.grad(total, ours)
        return torch.cat([g.flatten() for g in grads])

    right = torch.cat([x.grad.flatten() for x in theirs])
    torch.testing.assert_close(expected(PolicyGradient()), right, rtol=0, atol=1e-6)  # advantages are float32
    assert (expected(PolicyGradient(long_term=0.0)) - right).abs().max() > 1e-3


def test_advantages_are_means_of_what_comes_after():
    rewards = np.array([1, 2, 4, 8, 5, 7], dtype=np.float32)
    got = advantages(rewards, np.array([1, 1, 1, 1, 2, 2]))
    assert got == pytest.approx([14 / 3, 6, 8, 0, 7, 0])
    assert len(advantages(rewards[:0], np.zeros(0, dtype=int))) == 0
