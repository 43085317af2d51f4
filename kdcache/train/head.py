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

from dataclasses import dataclass
from typing import Any

import torch

from kdcache.calibration import calibration_sums
from kdcache.errors import ConfigError
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

# Elements of a chunk of logits: 24 MB of float32.
CHUNK_ELEMENTS = 6_000_000
CACHED_ROWS = 8
FORWARD_KL, TV = forward_kl(), tv()


def kd_loss(
    hidden_or_logits: torch.Tensor,
    targets: Targets | None,
    labels: torch.Tensor,
    objective: Objective,
    *,
    head: OutputHead | None = None,
    chunk_positions: int | None = None,
) -> LossSums:
    """The distillation loss over N positions, summed: divide ``loss`` by the number of targets of the effective batch.

    Args:
        hidden_or_logits: ``[N, D]`` hidden states of the valid positions, any float dtype; or ``[N, V]`` logits of them, whole,
            where there is no ``head``. They and the head receive gradients.
        targets: What the teacher said there, at the temperature of the objective; None is enough when alpha is 0.
        labels: ``[N]`` int64, the token at the next position.
        objective: Which loss.
        head: The student's output head, cut to the cache's vocabulary.
        chunk_positions: Positions whose logits may exist at a time; by default as many as make 24 MB.

    Raises:
        ConfigError: Targets at another temperature than the objective's, or of another number of positions, or none.
    """
    _check_targets(targets, labels, objective, len(hidden_or_logits))
    if head is None:
        return _apply(_LogitsLoss, hidden_or_logits, labels, targets, objective)
    chunk = chunk_positions or max(16, CHUNK_ELEMENTS // head.weight.shape[0])
    return _apply(
        _ChunkedLoss, hidden_or_logits, head.weight, head.bias, head, labels, targets, objective, chunk,
        torch.is_grad_enabled(),
    )  # fmt: skip


def _check_targets(targets: Targets | None, labels: torch.Tensor, objective: Objective, num_positions: int) -> None:
    parts = [part for _, part in targets.parts] if isinstance(targets, MixedTargets) else [targets]
    for part in parts:
        if part is None:
            if objective.alpha != 0:
                raise ConfigError(
                    f"alpha {objective.alpha:g} needs targets, found none", hint="alpha 0 is labels alone"
                )
            continue
        if part.temperature != objective.temperature:
            raise ConfigError(
                f"the targets are at temperature {part.temperature:g}, the objective at {objective.temperature:g}",
                hint="read the targets at the temperature of the objective",
            )
        if not len(part) == len(labels) == num_positions:
            raise ConfigError(
                f"as many targets and labels as positions were expected: {num_positions} positions, {len(part)} targets, "
                f"{len(labels)} labels",
                hint="keep the positions where TokenSequence.target_mask is set, in order",
            )


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
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    needs_hidden, needs_weight, needs_bias = (with_grad and need for need in ctx.needs_input_grad[:3])
    grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
    grad_weight = torch.zeros_like(head.weight, dtype=wide) if needs_weight else None
    grad_bias = torch.zeros_like(head.bias, dtype=wide) if needs_bias and head.bias is not None else None
    totals = torch.zeros(NUM_SUMS, dtype=wide, device=hidden_ND.device)
    # Made once: allocators leave holes between the small tensors of a chunk and the next one's logits.
    shape = (min(chunk, len(hidden_ND)), len(weight_VD))
    product_CV = torch.empty(shape, dtype=dtype, device=hidden_ND.device)
    buffer_CV = product_CV if dtype == wide else torch.empty(shape, dtype=wide, device=hidden_ND.device)
    for start in range(0, len(hidden_ND), chunk):
        rows = slice(start, start + chunk)
        hidden_CD = hidden_ND[rows].detach().to(dtype)
        logits_CV = _logits_into(
            buffer_CV[: len(hidden_CD)], product_CV[: len(hidden_CD)], hidden_CD, weight_VD, bias, head
        )
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
        if dtype != wide:
            grad_CV = product_CV[: len(grad_CV)].copy_(grad_CV)
        if grad_hidden is not None:
            grad_hidden[rows] = grad_CV @ weight_VD
        if grad_weight is not None:
            if dtype == grad_weight.dtype:
                grad_weight.addmm_(grad_CV.T, hidden_CD)
            else:
                grad_weight += grad_CV.T @ hidden_CD
        if grad_bias is not None:
            grad_bias += grad_CV.sum(0)
    ctx.grads = (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(head.weight.dtype),
        None if grad_bias is None or head.bias is None else grad_bias.to(head.bias.dtype),
    )
    parts = totals[1:].clone()
    ctx.mark_non_differentiable(parts)
    return totals[0].clone(), parts


def _logits_into(
    out_CV: torch.Tensor,
    product_CV: torch.Tensor,
    hidden_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias: torch.Tensor | None,
    head: OutputHead,
) -> torch.Tensor:
    """``OutputHead.logits`` in given buffers: the product in the head's dtype, then float32 (float64 in proofs)."""
    if bias is None:
        torch.mm(hidden_CD, weight_VD.T, out=product_CV)
    else:
        torch.addmm(bias, hidden_CD, weight_VD.T, out=product_CV)
    if out_CV.dtype != product_CV.dtype:
        out_CV.copy_(product_CV)
    if head.scale != 1.0:
        out_CV.mul_(head.scale)
    if head.softcap is not None:
        out_CV.div_(head.softcap).tanh_().mul_(head.softcap)
    return out_CV


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
    powers_CV, total, logz = _exponentials(logits_CV)
    grad = None
    if with_grad:
        grad = powers_CV.mul_((ce_weight / total)[:, None])
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
    divergence, g_CK, g_tail = _differentiate(objective.divergence, targets, student_CK, student_tail, with_grad)
    teacher_choice = ids.gather(1, targets.logprobs.argmax(1, keepdim=True))[:, 0]
    parts = _parts(objective, targets, student_CK, student_tail, divergence, first_choice == teacher_choice)
    if not with_grad:
        return logz, parts, None
    assert g_CK is not None
    assert g_tail is not None
    scale = kd_weight * temperature
    sum_of_g = g_CK.sum(1) + g_tail
    at_kept = scale * (g_CK - sum_of_g[:, None] * student_CK.exp())
    at_tail = scale * (g_tail - sum_of_g * student_tail.exp())
    at_tail_1 = ce_weight * (tail_lse_1 - logz).exp()
    if ce_weight:
        at_kept += ce_weight * (kept_CK - logz[:, None]).exp()
    if tempered_CV is None:
        at_tail += at_tail_1
    # The sum is at least 1, or 0 where there is no tail at all and every power is 0.
    grad = powers_T_CV.mul_((at_tail / total_T.clamp(min=1.0))[:, None])
    if tempered_CV is not None and ce_weight:
        grad.addcmul_(powers_CV, (at_tail_1 / total.clamp(min=1.0))[:, None])
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
    """A few rows at a time on a CPU: everything here is as wide as the vocabulary."""
    teacher_CV = targets.head.logits(targets.hidden).to(logits_CV)
    logz, sums = logits_CV.new_empty(len(logits_CV)), logits_CV.new_zeros(len(PARTS) - 1)
    step = CACHED_ROWS if logits_CV.device.type == "cpu" else max(1, len(logits_CV))
    for start in range(0, len(logits_CV), step):
        rows = slice(start, start + step)
        logits, teacher = logits_CV[rows], teacher_CV[rows]
        student_logprobs = torch.log_softmax(logits / objective.temperature, dim=1)
        whole = _Whole(torch.log_softmax(teacher / objective.temperature, dim=1))
        no_tail = torch.full_like(student_logprobs[:, 0], -torch.inf)
        divergence, g, _ = _differentiate(objective.divergence, whole, student_logprobs, no_tail, with_grad)
        agree = first_choice[rows] == teacher.argmax(1)
        sums += _parts(objective, whole, student_logprobs, no_tail, divergence, agree)
        powers, total, logz[rows] = _exponentials(logits)
        if g is not None:
            g.sub_(student_logprobs.exp_().mul_(g.sum(1, keepdim=True))).mul_(kd_weight * objective.temperature)
            torch.add(g, powers.mul_((ce_weight / total)[:, None]), out=logits)
    if with_grad and ce_weight:
        _add_at(logits_CV, labels, -ce_weight)
    return logz, sums, logits_CV if with_grad else None


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
    return divergence.on_draws(targets.ratios, targets.logprobs, log_p)


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
    """Sums of ``PARTS`` after the cross-entropy."""
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


def _add_at(grad_CV: torch.Tensor, labels: torch.Tensor, value: float) -> None:
    grad_CV.scatter_add_(1, labels[:, None], torch.full_like(grad_CV[:, :1], value))
