"""The arithmetic of the chunked head: a chunk of logits to sums of the loss and the gradient, in the chunk's own buffer.

**The gradient.** Let ``u = z / T``, ``p`` its softmax, kept entries K, tail mass ``p_tail``, and ``q`` the tail's conditional
distribution. For a divergence with derivatives ``g_k`` and ``g_tail`` with respect to ``log p_k`` and ``log p_tail``, and
``G = sum(g_k) + g_tail``::

    d/du_k = g_k - G p_k         (kept)
    d/du_j = (g_tail - G p_tail) q_j    (tail)

Nothing is divided by the tail mass, so a student that has driven it to 1e-30 has finite gradients. ``g`` itself comes from
autograd on ``[C, K + 1]``, so one kernel serves every divergence, over buckets and from draws (there ``g_tail`` is 0). The
cross-entropy joins the same pass. Objective: ``(1 - alpha) * CE + alpha * T^2 * D_T``; with weights a position where text is
a rollout and the label an action.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdcache.calibration import calibration_sums
from kdcache.train.losses import Divergence, forward_kl, tv
from kdcache.train.objective import (
    NUM_TEACHER_PARTS,
    BucketTargets,
    FullTargets,
    MixedTargets,
    Objective,
    PolicyGradient,
    Rollouts,
    Targets,
)

CACHED_ROWS = 8
FORWARD_KL, TV = forward_kl(), tv()


@dataclass(frozen=True, slots=True, eq=False)
class _Pass:
    """What is asked of one pass over a chunk, for one teacher.

    Attributes:
        objective: Divergence and temperature.
        labels: ``[C]``.
        first_choice: ``[C]``, the student's.
        ce_weight: Of the cross-entropy in the gradient; of each position ``[C]`` where they differ.
        kd_weight: Of the divergence, without the temperature's factor; likewise.
        with_grad: Form the gradient.
    """

    objective: Objective
    labels: torch.Tensor
    first_choice: torch.Tensor
    ce_weight: float | torch.Tensor
    kd_weight: float | torch.Tensor
    with_grad: bool

    @property
    def has_ce(self) -> bool:
        """Whether the label has a gradient of its own."""
        return isinstance(self.ce_weight, torch.Tensor) or self.ce_weight != 0


# Log-normalisers at T = 1 [C], the sum of the weighted divergence, sums of the teacher's PARTS, gradient [C, V] or None.
_Passed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def chunk_loss(
    logits_CV: torch.Tensor,
    labels: torch.Tensor,
    targets: Targets | None,
    objective: Objective,
    with_grad: bool,
    rollouts: Rollouts | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Loss of one chunk and its gradient with respect to the logits, whose buffer is consumed.

    Returns:
        ``[NUM_SUMS]``: loss, ``PARTS``, calibration; and ``[C, V]`` or None.
    """
    label_logits = logits_CV.gather(1, labels[:, None])[:, 0]
    top_logit, first_choice = logits_CV.max(1)
    alpha = 0.0 if targets is None else objective.alpha
    ce_weight: float | torch.Tensor = objective.weight * (1 - alpha)
    kd_weight: float | torch.Tensor = objective.weight * alpha
    label_loss = None
    if objective.policy is not None:
        assert rollouts is not None, "a policy is judged by what it wrote"
        label_logprobs = label_logits - torch.logsumexp(logits_CV, 1)
        acting = act(label_logprobs, rollouts, objective.policy)
        kd_weight, ce_weight = objective.weight * acting.kd_weight, objective.weight * acting.label_weight
        label_loss = objective.weight * acting.label_loss
    mixed = targets.parts if isinstance(targets, MixedTargets) else ((1.0, targets),)
    parts, weighted = top_logit.new_zeros(NUM_TEACHER_PARTS), top_logit.new_zeros(())
    logz, grad = None, None
    for number, (weight, part) in enumerate(mixed):
        last = number == len(mixed) - 1
        buffer = logits_CV if last else logits_CV.clone()
        # The cross-entropy joins the last teacher's pass.
        asked = _Pass(objective, labels, first_choice, ce_weight * last, kd_weight * weight, with_grad)
        if part is None:
            logz, value, more, part_grad = _labels_only(buffer, asked)
        elif isinstance(part, FullTargets):
            logz, value, more, part_grad = _full_loss(buffer, part, asked)
        else:
            logz, value, more, part_grad = _bucket_loss(buffer, part, asked)
        parts += weight * more
        weighted += value
        grad = part_grad if grad is None or part_grad is None else grad.add_(part_grad)
    assert logz is not None
    cross_entropy = (logz - label_logits).sum()
    loss = objective.temperature**2 * weighted + (ce_weight * cross_entropy if label_loss is None else label_loss)
    calibration = calibration_sums((top_logit - logz).exp(), first_choice == labels)
    stale = _staleness(label_logits - logz, rollouts)
    return torch.cat([loss[None], cross_entropy[None], parts, stale, calibration.view(-1)]), grad


@dataclass(frozen=True, slots=True, eq=False)
class Action:
    """What a policy gradient weighs at each position, see :class:`~kdcache.train.objective.PolicyGradient`.

    Attributes:
        kd_weight: ``[C]``, of the divergence.
        label_weight: ``[C]``, of the cross-entropy in the gradient.
        label_loss: Sum of the label's part of the loss.
    """

    kd_weight: torch.Tensor
    label_weight: torch.Tensor
    label_loss: torch.Tensor


def act(label_logprobs: torch.Tensor, rollouts: Rollouts, policy: PolicyGradient) -> Action:
    """Weights of each position, given what the student now thinks of the label ``[C]``. Positions that are no rollout count as on-policy."""
    ratio = (label_logprobs - rollouts.logprobs).nan_to_num(0.0).exp()
    clipped = ratio.clamp(1 - policy.clip, 1 + policy.clip)
    gain = torch.minimum(ratio * rollouts.advantages, clipped * rollouts.advantages)
    moves = ratio * rollouts.advantages <= gain
    label_weight = policy.long_term * torch.where(moves, ratio * rollouts.advantages, 0.0)
    return Action(policy.single_step * clipped, label_weight, -policy.long_term * gain.sum())


def _staleness(label_logprobs: torch.Tensor, rollouts: Rollouts | None) -> torch.Tensor:
    """``[2]``: the last two of ``PARTS``."""
    if rollouts is None:
        return label_logprobs.new_zeros(2)
    known = ~rollouts.logprobs.isnan()
    return torch.stack(
        [torch.where(known, rollouts.logprobs - label_logprobs, 0.0).sum(), known.sum().to(label_logprobs)]
    )


def _column(weight: float | torch.Tensor) -> float | torch.Tensor:
    return weight[:, None] if isinstance(weight, torch.Tensor) else weight


def _rows(weight: float | torch.Tensor, rows: slice) -> float | torch.Tensor:
    return weight[rows] if isinstance(weight, torch.Tensor) else weight


def _labels_only(logits_CV: torch.Tensor, asked: _Pass) -> _Passed:
    powers_CV, total, logz = _exponentials(logits_CV)
    grad = None
    if asked.with_grad:
        grad = powers_CV.mul_((asked.ce_weight / total)[:, None])
        _add_at(grad, asked.labels, -asked.ce_weight)
    return logz, logz.new_zeros(()), logz.new_zeros(NUM_TEACHER_PARTS), grad


def _bucket_loss(logits_CV: torch.Tensor, targets: BucketTargets, asked: _Pass) -> _Passed:
    temperature, ids = asked.objective.temperature, targets.token_ids
    unused = targets.logprobs == -torch.inf
    kept_CK = logits_CV.gather(1, ids)
    tail_CV = logits_CV.scatter_(1, ids, -torch.inf)
    tempered_CV = None if temperature == 1.0 else tail_CV / temperature
    powers_CV, total, tail_lse_1 = _exponentials(tail_CV)
    logz = torch.logaddexp(torch.logsumexp(kept_CK.masked_fill(unused, -torch.inf), 1), tail_lse_1)
    u_CK = kept_CK / temperature
    if tempered_CV is None:
        powers_T_CV, total_T, tail_lse, logz_T = powers_CV, total, tail_lse_1, logz
    else:
        powers_T_CV, total_T, tail_lse = _exponentials(tempered_CV)
        logz_T = torch.logaddexp(torch.logsumexp(u_CK.masked_fill(unused, -torch.inf), 1), tail_lse)
    student_CK, student_tail = u_CK - logz_T[:, None], tail_lse - logz_T
    divergence, g_CK, g_tail = _differentiate(
        asked.objective.divergence, targets, student_CK, student_tail, asked.with_grad
    )
    teacher_choice = ids.gather(1, targets.logprobs.argmax(1, keepdim=True))[:, 0]
    parts = _parts(asked.objective, targets, student_CK, student_tail, divergence, asked.first_choice == teacher_choice)
    weighted = (asked.kd_weight * divergence).sum()
    if not asked.with_grad:
        return logz, weighted, parts, None
    assert g_CK is not None
    assert g_tail is not None
    scale = asked.kd_weight * temperature
    sum_of_g = g_CK.sum(1) + g_tail
    at_kept = _column(scale) * (g_CK - sum_of_g[:, None] * student_CK.exp())
    at_tail = scale * (g_tail - sum_of_g * student_tail.exp())
    at_tail_1 = asked.ce_weight * (tail_lse_1 - logz).exp()
    if asked.has_ce:
        at_kept += _column(asked.ce_weight) * (kept_CK - logz[:, None]).exp()
    if tempered_CV is None:
        at_tail += at_tail_1
    # The sum is at least 1, or 0 where there is no tail at all and every power is 0.
    grad = powers_T_CV.mul_((at_tail / total_T.clamp(min=1.0))[:, None])
    if tempered_CV is not None and asked.has_ce:
        grad.addcmul_(powers_CV, (at_tail_1 / total.clamp(min=1.0))[:, None])
    # Unused slots repeat the first id: give them its value, so that whichever is written last is right.
    grad.scatter_(1, ids, torch.where(unused, at_kept[:, :1], at_kept))
    _add_at(grad, asked.labels, -asked.ce_weight)
    return logz, weighted, parts, grad


def _full_loss(logits_CV: torch.Tensor, targets: FullTargets, asked: _Pass) -> _Passed:
    """A few rows at a time on a CPU: everything here is as wide as the vocabulary."""
    teacher_CV = targets.head.logits(targets.hidden).to(logits_CV)
    logz, sums = logits_CV.new_empty(len(logits_CV)), logits_CV.new_zeros(NUM_TEACHER_PARTS)
    weighted = logits_CV.new_zeros(())
    step = CACHED_ROWS if logits_CV.device.type == "cpu" else max(1, len(logits_CV))
    for start in range(0, len(logits_CV), step):
        rows = slice(start, start + step)
        logits, teacher = logits_CV[rows], teacher_CV[rows]
        student_logprobs = torch.log_softmax(logits / asked.objective.temperature, dim=1)
        whole = _Whole(torch.log_softmax(teacher / asked.objective.temperature, dim=1))
        no_tail = torch.full_like(student_logprobs[:, 0], -torch.inf)
        divergence, g, _ = _differentiate(asked.objective.divergence, whole, student_logprobs, no_tail, asked.with_grad)
        agree = asked.first_choice[rows] == teacher.argmax(1)
        sums += _parts(asked.objective, whole, student_logprobs, no_tail, divergence, agree)
        kd_weight, ce_weight = (_rows(weight, rows) for weight in (asked.kd_weight, asked.ce_weight))
        weighted += (kd_weight * divergence).sum()
        powers, total, logz[rows] = _exponentials(logits)
        if g is not None:
            g.sub_(student_logprobs.exp_().mul_(g.sum(1, keepdim=True))).mul_(
                _column(kd_weight * asked.objective.temperature)
            )
            torch.add(g, powers.mul_((ce_weight / total)[:, None]), out=logits)
    if asked.with_grad and asked.has_ce:
        _add_at(logits_CV, asked.labels, -asked.ce_weight)
    return logz, weighted, sums, logits_CV if asked.with_grad else None


@dataclass(frozen=True, slots=True, eq=False)
class _Whole:
    """``[C, V]`` logprobs of the teacher, at every token."""

    logprobs: torch.Tensor


def _divergence(
    divergence: Divergence, targets: BucketTargets | _Whole, log_p: torch.Tensor, log_p_tail: torch.Tensor
) -> torch.Tensor:
    if isinstance(targets, _Whole):
        return divergence.on_everything(targets.logprobs, log_p)
    if targets.ratios is None:
        return divergence.on_buckets(targets.logprobs, targets.tail_logprobs, log_p, log_p_tail)
    assert divergence.on_draws is not None, "check_estimator refuses such a loss"
    value = divergence.on_draws(targets.ratios, targets.logprobs, log_p)
    return value if targets.excess is None or divergence.name != FORWARD_KL.name else value + targets.excess


def _differentiate(
    divergence: Divergence,
    targets: BucketTargets | _Whole,
    student_CK: torch.Tensor,
    student_tail: torch.Tensor,
    with_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The divergence a position, and its derivatives with respect to the student's logprobs, by autograd on ``[C, K + 1]``."""
    if not with_grad:
        return _divergence(divergence, targets, student_CK, student_tail), None, None
    with torch.enable_grad():
        log_p, log_p_tail = student_CK.detach().requires_grad_(), student_tail.detach().requires_grad_()
        value = _divergence(divergence, targets, log_p, log_p_tail)
        # A loss of labels alone does not look at the student's distribution.
        grads = (
            torch.autograd.grad(value.sum(), [log_p, log_p_tail], allow_unused=True)
            if value.requires_grad
            else (None, None)
        )
    g_CK, g_tail = (torch.zeros_like(x) if g is None else g for x, g in zip((log_p, log_p_tail), grads, strict=True))
    return value.detach(), g_CK, g_tail


def _parts(
    objective: Objective,
    targets: BucketTargets | _Whole,
    student_CK: torch.Tensor,
    student_tail: torch.Tensor,
    divergence: torch.Tensor,
    agree: torch.Tensor,
) -> torch.Tensor:
    """Sums of the teacher's ``PARTS``."""
    kl = divergence
    if objective.divergence.name != "forward_kl":
        kl = _divergence(FORWARD_KL, targets, student_CK, student_tail)
    acceptance = 1 - _divergence(TV, targets, student_CK, student_tail)
    teacher_tail = student_tail if isinstance(targets, _Whole) else targets.tail_logprobs
    return torch.stack(
        [
            divergence.sum(),
            kl.sum(),
            agree.sum().to(kl),
            student_tail.exp().sum(),
            teacher_tail.exp().sum(),
            acceptance.sum(),
        ]
    )


def _exponentials(values_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``exp(z - max)`` in the buffer of z, its sum, and the logsumexp of z, over each row; a row of ``-inf`` sums to 0.

    A few rows at a time on a CPU, so that they are read from memory once.
    """
    total, shift = values_CV.new_empty(len(values_CV)), values_CV.new_empty(len(values_CV), 1)
    step = CACHED_ROWS if values_CV.device.type == "cpu" else max(1, len(values_CV))
    for start in range(0, len(values_CV), step):
        rows = slice(start, start + step)
        part = values_CV[rows]
        shift[rows] = part.amax(1, keepdim=True).clamp(min=torch.finfo(part.dtype).min)
        torch.sum(part.sub_(shift[rows]).exp_(), 1, out=total[rows])
    return values_CV, total, total.log().add_(shift[:, 0])


def _add_at(grad_CV: torch.Tensor, labels: torch.Tensor, value: float | torch.Tensor) -> None:
    column = value[:, None] if isinstance(value, torch.Tensor) else torch.full_like(grad_CV[:, :1], value)
    grad_CV.scatter_add_(1, labels[:, None], column.to(grad_CV))
