"""The chunked output head: student hidden states to loss, with logits for one chunk of positions at a time.

``[positions, vocabulary]`` is the largest tensor of a training step, several times over: logits, their softmax, the
gradient. Here it exists for one chunk. The gradient with respect to a chunk's logits is known in closed form as soon as the
loss is, so it is formed in the forward pass, in the chunk's own buffer, and multiplied through the head at once; backward
only scales what is there. What this equals is four lines of autograd, in ``tests/unit/test_head.py``.

**The gradient.** Let ``u = z / T``, ``p`` its softmax, kept entries K, tail mass ``p_tail``, and ``q`` the tail's conditional
distribution. For a divergence with derivatives ``g_k`` and ``g_tail`` with respect to ``log p_k`` and ``log p_tail``, and
``G = sum(g_k) + g_tail``::

    d/du_k = g_k - G p_k         (kept)
    d/du_j = (g_tail - G p_tail) q_j    (tail)

Nothing is divided by the tail mass, so a student that has driven it to 1e-30 has finite gradients. ``g`` itself comes from
autograd on ``[C, K + 1]``, so one kernel serves every divergence, over buckets and from draws (there ``g_tail`` is 0). The
cross-entropy joins the same pass. Objective: ``(1 - alpha) * CE + alpha * T^2 * D_T``.
"""

from __future__ import annotations

from typing import Any

import torch

from kdcache.calibration import calibration_sums
from kdcache.heads import OutputHead
from kdcache.train.losses import Divergence, forward_kl, tv
from kdcache.train.objective import (
    NUM_SUMS,
    PARTS,
    BucketTargets,
    FullTargets,
    LossSums,
    MixedTargets,
    Objective,
    Targets,
)

# Elements of a chunk of logits: 32 MB of float32.
CHUNK_ELEMENTS = 1 << 23
CACHED_ROWS = 16
FORWARD_KL, TV = forward_kl(), tv()


def kd_loss(
    hidden: torch.Tensor,
    head: OutputHead,
    labels: torch.Tensor,
    targets: Targets | None,
    objective: Objective,
    *,
    chunk_positions: int | None = None,
) -> LossSums:
    """Distillation loss of student hidden states, summed over positions.

    Args:
        hidden: ``[N, D]``, the student's last hidden state at every position with a target.
        head: The student's output head, restricted to the cache's vocabulary.
        labels: ``[N]`` int64, the token at the next position.
        targets: What the teacher said there; None is enough when alpha is 0.
        objective: Which loss.
        chunk_positions: Positions whose logits may exist at a time; by default as many as make 32 MB.
    """
    if targets is None and objective.alpha != 0:
        raise ValueError("alpha above 0 needs targets")
    chunk = chunk_positions or max(16, CHUNK_ELEMENTS // head.weight.shape[0])
    return _apply(
        _ChunkedLoss, hidden, head.weight, head.bias, head, labels, targets, objective, chunk, torch.is_grad_enabled()
    )


def kd_loss_from_logits(
    logits: torch.Tensor, labels: torch.Tensor, targets: Targets | None, objective: Objective
) -> LossSums:
    """The same loss from logits ``[N, V]`` that exist already: for heads that :class:`OutputHead` does not describe."""
    if targets is None and objective.alpha != 0:
        raise ValueError("alpha above 0 needs targets")
    return _apply(_LogitsLoss, logits, labels, targets, objective)


def _apply(function: Any, *arguments: Any) -> LossSums:
    """``Function.apply``, which torch leaves untyped."""
    loss, measured = function.apply(*arguments)
    return LossSums.from_flat(loss, measured)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        head: OutputHead,
        labels: torch.Tensor,
        targets: Targets | None,
        objective: Objective,
        chunk: int,
        with_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.autocast(device, enabled=False):
            return _run_chunks(ctx, hidden, head, labels, targets, objective, chunk, dtype, with_grad)

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, grad_parts: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = [None if grad is None else grad.mul_(grad_loss) for grad in ctx.grads]
        ctx.grads = None
        return (*grads, None, None, None, None, None, None)


def _run_chunks(
    ctx: Any,
    hidden_ND: torch.Tensor,
    head: OutputHead,
    labels: torch.Tensor,
    targets: Targets | None,
    objective: Objective,
    chunk: int,
    dtype: torch.dtype,
    with_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    weight_VD = head.weight.detach().to(dtype)
    bias = None if head.bias is None else head.bias.detach().to(dtype)
    cast_head = OutputHead(weight_VD, bias, head.scale, head.softcap)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    needs_hidden, needs_weight, needs_bias = (with_grad and need for need in ctx.needs_input_grad[:3])
    grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
    grad_weight = torch.zeros_like(head.weight, dtype=wide) if needs_weight else None
    grad_bias = torch.zeros_like(head.bias, dtype=wide) if needs_bias and head.bias is not None else None
    totals = torch.zeros(NUM_SUMS, dtype=wide, device=hidden_ND.device)
    for start in range(0, len(hidden_ND), chunk):
        rows = slice(start, start + chunk)
        hidden_CD = hidden_ND[rows].detach().to(dtype)
        logits_CV = cast_head.logits(hidden_CD) if dtype != torch.float64 else _logits_fp64(cast_head, hidden_CD)
        kept_logits = logits_CV.clone() if head.softcap is not None and with_grad else None
        part = targets[rows] if targets is not None else None
        sums, grad_CV = chunk_loss(logits_CV, labels[rows], part, objective, with_grad)
        totals += sums
        if grad_CV is None:
            continue
        if kept_logits is not None and head.softcap is not None:
            grad_CV.mul_(1 - (kept_logits / head.softcap).square_())
        if head.scale != 1.0:
            grad_CV.mul_(head.scale)
        grad_CV = grad_CV.to(dtype)
        if grad_hidden is not None:
            grad_hidden[rows] = grad_CV @ weight_VD
        if grad_weight is not None:
            if dtype == grad_weight.dtype:
                grad_weight.addmm_(grad_CV.T, hidden_CD)
            else:
                grad_weight += grad_CV.T @ hidden_CD
        if grad_bias is not None:
            grad_bias += grad_CV.sum(0)
        del logits_CV, grad_CV  # before the next chunk's are made
    ctx.grads = (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(head.weight.dtype),
        None if grad_bias is None or head.bias is None else grad_bias.to(head.bias.dtype),
    )
    parts = totals[1:].clone()
    ctx.mark_non_differentiable(parts)
    return totals[0].clone(), parts


def _logits_fp64(head: OutputHead, hidden: torch.Tensor) -> torch.Tensor:
    """float64 throughout, for proofs; ``OutputHead.logits`` gives float32."""
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias) * head.scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, targets: Targets | None, objective: Objective
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(logits.device.type, enabled=False):
            buffer = logits.detach().clone() if logits.dtype == torch.float64 else logits.detach().float().clone()
            sums, grad = chunk_loss(buffer, labels, targets, objective, ctx.needs_input_grad[0])
        ctx.grad = None if grad is None else grad.to(logits.dtype)
        parts = sums[1:].clone()
        ctx.mark_non_differentiable(parts)
        return sums[0].clone(), parts

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, grad_parts: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.grad * grad_loss, None, None, None


def chunk_loss(
    logits_CV: torch.Tensor, labels: torch.Tensor, targets: Targets | None, objective: Objective, with_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Loss of one chunk and its gradient with respect to the logits, whose buffer is consumed.

    Returns:
        ``[NUM_SUMS]``: loss, ``PARTS``, calibration; and ``[C, V]`` or None.
    """
    label_logits = logits_CV.gather(1, labels[:, None])[:, 0]
    top_logit, first_choice = logits_CV.max(1)
    alpha = 0.0 if targets is None else objective.alpha
    ce_share, kd_share = objective.weight * (1 - alpha), objective.weight * alpha
    mixed = targets.parts if isinstance(targets, MixedTargets) else ((1.0, targets),)
    parts = top_logit.new_zeros(len(PARTS) - 1)
    logz, grad = None, None
    for number, (weight, part) in enumerate(mixed):
        last = number == len(mixed) - 1
        buffer = logits_CV if last else logits_CV.clone()
        # The cross-entropy joins the last teacher's pass.
        ce_weight, kd_weight = ce_share * last, kd_share * weight
        if part is None:
            logz, more, part_grad = _labels_only(buffer, labels, ce_weight, with_grad)
        elif isinstance(part, FullTargets):
            logz, more, part_grad = _full_loss(
                buffer, labels, first_choice, part, objective, ce_weight, kd_weight, with_grad
            )
        else:
            logz, more, part_grad = _bucket_loss(
                buffer, labels, first_choice, part, objective, ce_weight, kd_weight, with_grad
            )
        parts += weight * more
        grad = part_grad if grad is None or part_grad is None else grad.add_(part_grad)
    assert logz is not None
    cross_entropy = (logz - label_logits).sum()
    loss = objective.weight * ((1 - alpha) * cross_entropy + alpha * objective.temperature**2 * parts[0])
    calibration = calibration_sums((top_logit - logz).exp(), first_choice == labels)
    return torch.cat([loss[None], cross_entropy[None], parts, calibration.view(-1)]), grad


def _labels_only(
    logits_CV: torch.Tensor, labels: torch.Tensor, ce_weight: float, with_grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    logz = _logsumexp(logits_CV)
    grad = None
    if with_grad:
        grad = logits_CV.sub_(logz[:, None]).exp_().mul_(ce_weight)
        _add_at(grad, labels, -ce_weight)
    return logz, logz.new_zeros(len(PARTS) - 1), grad


def _bucket_loss(
    logits_CV: torch.Tensor,
    labels: torch.Tensor,
    first_choice: torch.Tensor,
    targets: BucketTargets,
    objective: Objective,
    ce_weight: float,
    kd_weight: float,
    with_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    temperature, ids = objective.temperature, targets.token_ids
    unused = targets.logprobs == -torch.inf
    kept_CK = logits_CV.gather(1, ids)
    tail_CV = logits_CV.scatter_(1, ids, -torch.inf)
    kept_lse_1, tail_lse_1 = _logsumexp(kept_CK.masked_fill(unused, -torch.inf)), _logsumexp(tail_CV)
    logz = torch.logaddexp(kept_lse_1, tail_lse_1)
    u_CK = kept_CK / temperature
    if temperature == 1.0:
        tail_lse, logz_T = tail_lse_1, logz
    else:
        tail_lse = _logsumexp(tail_CV / temperature)
        logz_T = torch.logaddexp(_logsumexp(u_CK.masked_fill(unused, -torch.inf)), tail_lse)
    student_CK, student_tail = u_CK - logz_T[:, None], tail_lse - logz_T
    divergence, g_CK, g_tail = _differentiate(objective.divergence, targets, student_CK, student_tail, with_grad)
    teacher_choice = ids.gather(1, targets.logprobs.argmax(1, keepdim=True))[:, 0]
    parts = _parts(objective, targets, student_CK, student_tail, divergence, first_choice == teacher_choice)
    if not with_grad:
        return logz, parts, None
    assert g_CK is not None
    assert g_tail is not None
    scale = kd_weight * temperature
    total = g_CK.sum(1) + g_tail
    at_kept = scale * (g_CK - total[:, None] * student_CK.exp())
    at_tail = scale * (g_tail - total * student_tail.exp())
    if temperature == 1.0:
        at_kept += ce_weight * (kept_CK - logz[:, None]).exp()
        at_tail += ce_weight * (tail_lse_1 - logz).exp()
        grad = _conditional(tail_CV, tail_lse_1).mul_(at_tail[:, None])
    else:
        grad = _conditional(tail_CV / temperature, tail_lse).mul_(at_tail[:, None])
        if ce_weight:
            at_kept += ce_weight * (kept_CK - logz[:, None]).exp()
            grad.add_(_conditional(tail_CV, tail_lse_1).mul_((ce_weight * (tail_lse_1 - logz).exp())[:, None]))
    # Unused slots repeat the first id: give them its value, so that whichever is written last is right.
    grad.scatter_(1, ids, torch.where(unused, at_kept[:, :1], at_kept))
    _add_at(grad, labels, -ce_weight)
    return logz, parts, grad


def _full_loss(
    logits_CV: torch.Tensor,
    labels: torch.Tensor,
    first_choice: torch.Tensor,
    targets: FullTargets,
    objective: Objective,
    ce_weight: float,
    kd_weight: float,
    with_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    temperature = objective.temperature
    teacher_logits = targets.head.logits(targets.hidden).to(logits_CV)
    logz = _logsumexp(logits_CV)
    student_CV = torch.log_softmax(logits_CV / temperature, dim=1)
    no_tail = torch.full_like(logz, -torch.inf)
    whole = BucketTargets(
        token_ids=labels[:, None],  # not looked at
        logprobs=torch.log_softmax(teacher_logits / temperature, dim=1),
        tail_logprobs=no_tail,
    )
    divergence, g_CV, _ = _differentiate(objective.divergence, whole, student_CV, no_tail, with_grad)
    agree = first_choice == teacher_logits.argmax(1)
    parts = _parts(objective, whole, student_CV, no_tail, divergence, agree)
    if not with_grad:
        return logz, parts, None
    assert g_CV is not None
    grad = (g_CV - g_CV.sum(1, keepdim=True) * student_CV.exp()).mul_(kd_weight * temperature)
    if ce_weight:
        grad.add_(logits_CV.sub_(logz[:, None]).exp_(), alpha=ce_weight)
        _add_at(grad, labels, -ce_weight)
    return logz, parts, grad


def _divergence(
    divergence: Divergence, targets: BucketTargets, log_p: torch.Tensor, log_p_tail: torch.Tensor
) -> torch.Tensor:
    if targets.ratios is None:
        return divergence.on_buckets(targets.logprobs, targets.tail_logprobs, log_p, log_p_tail)
    assert divergence.on_draws is not None, "check_estimator refuses such a loss"
    return divergence.on_draws(targets.ratios, targets.logprobs, log_p)


def _differentiate(
    divergence: Divergence,
    targets: BucketTargets,
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
        grads = torch.autograd.grad(value.sum(), [log_p, log_p_tail], allow_unused=True)
    g_CK, g_tail = (torch.zeros_like(x) if g is None else g for x, g in zip((log_p, log_p_tail), grads, strict=True))
    return value.detach(), g_CK, g_tail


def _parts(
    objective: Objective,
    targets: BucketTargets,
    student_CK: torch.Tensor,
    student_tail: torch.Tensor,
    divergence: torch.Tensor,
    agree: torch.Tensor,
) -> torch.Tensor:
    """Sums of ``PARTS`` after the cross-entropy."""
    kl = divergence
    if objective.divergence.name != "forward_kl":
        kl = _divergence(FORWARD_KL, targets, student_CK, student_tail)
    acceptance = 1 - _divergence(TV, targets, student_CK, student_tail)
    return torch.stack(
        [
            divergence.sum(),
            kl.sum(),
            agree.sum().to(kl),
            student_tail.exp().sum(),
            targets.tail_logprobs.exp().sum(),
            acceptance.sum(),
        ]
    )


def _logsumexp(values: torch.Tensor) -> torch.Tensor:
    """Over each row. A few rows at a time on a CPU: the exponentials are a second buffer of the same size otherwise."""
    if values.device.type != "cpu":
        return torch.logsumexp(values, dim=1)
    return torch.cat(
        [torch.logsumexp(rows, dim=1) for rows in torch.split(values, CACHED_ROWS)] or [values.new_empty(0)]
    )


def _conditional(tail_CV: torch.Tensor, tail_lse: torch.Tensor) -> torch.Tensor:
    """``exp(z - tail_lse)`` in the buffer of ``tail_CV``; 0 where there is no tail at all."""
    return tail_CV.sub_(torch.where(tail_lse == -torch.inf, 0.0, tail_lse)[:, None]).exp_()


def _add_at(grad_CV: torch.Tensor, labels: torch.Tensor, value: float) -> None:
    grad_CV.scatter_add_(1, labels[:, None], torch.full_like(grad_CV[:, :1], value))
