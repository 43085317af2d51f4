"""The chunked output head: student hidden states to loss, with logits for one chunk of positions at a time.

``[positions, vocabulary]`` is the largest tensor of a training step, several times over: logits, their softmax, the
gradient. Here it exists for one chunk. The gradient with respect to a chunk's logits is known in closed form as soon as the
loss is, so it is formed in the forward pass, in the chunk's own buffer, and multiplied through the head at once; backward
only scales what is there (``kernel`` has the arithmetic). What this equals is four lines of autograd, in
``tests/unit/test_head.py``.
"""

from __future__ import annotations

from typing import Any

import torch

from kdcache.errors import ConfigError
from kdcache.heads import OutputHead
from kdcache.train.kernel import chunk_loss
from kdcache.train.objective import (
    NUM_SUMS,
    LossSums,
    MixedTargets,
    Objective,
    Rollouts,
    Targets,
)

# Elements of a chunk of logits: 25 MB of float32 on a CPU, 1 GB on a GPU, where a chunk must be worth its launches.
# Positions come in eights: products of other shapes are slower and take more memory.
CPU_CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS = 6 << 20, 1 << 28


def kd_loss(
    hidden_or_logits: torch.Tensor,
    targets: Targets | None,
    labels: torch.Tensor,
    objective: Objective,
    *,
    head: OutputHead | None = None,
    chunk_positions: int | None = None,
    rollouts: Rollouts | None = None,
) -> LossSums:
    """The distillation loss over N positions, summed: divide ``loss`` by the number of targets of the effective batch.

    Args:
        hidden_or_logits: ``[N, D]`` hidden states of the valid positions, any float dtype; or ``[N, V]`` logits of them, whole,
            where there is no ``head``. They and the head receive gradients.
        targets: What the teacher said there, at the temperature of the objective; None is enough when alpha is 0.
        labels: ``[N]`` int64, the token at the next position.
        objective: Which loss.
        head: The student's output head, cut to the cache's vocabulary.
        chunk_positions: Positions whose logits may exist at a time; by default as many as make 25 MB, on a GPU 1 GB.
        rollouts: What is known of positions that a student wrote: for the staleness, and for an objective with a policy.

    Raises:
        ConfigError: Targets at another temperature than the objective's, or of another number of positions, or none.
    """
    _check_targets(targets, labels, objective, len(hidden_or_logits))
    if head is None:
        return _apply(_LogitsLoss, hidden_or_logits, labels, targets, objective, rollouts)
    elements = CPU_CHUNK_ELEMENTS if head.weight.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    chunk = chunk_positions or max(16, elements // head.weight.shape[0] // 8 * 8)
    return _apply(
        _ChunkedLoss, hidden_or_logits, head.weight, head.bias, head, labels, targets, objective, rollouts,
        chunk, torch.is_grad_enabled(),
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
        rollouts: Rollouts | None,
        chunk: int,
        with_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.autocast(device, enabled=False):
            return _run_chunks(ctx, hidden, head, labels, targets, objective, rollouts, chunk, dtype, with_grad)

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, grad_parts: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = [None if grad is None else grad.mul_(grad_loss) for grad in ctx.grads]
        ctx.grads = None
        return (*grads, None, None, None, None, None, None, None)


def _run_chunks(
    ctx: Any,
    hidden_ND: torch.Tensor,
    head: OutputHead,
    labels: torch.Tensor,
    targets: Targets | None,
    objective: Objective,
    rollouts: Rollouts | None,
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
        written = rollouts[rows] if rollouts is not None else None
        sums, grad_CV = chunk_loss(logits_CV, labels[rows], part, objective, with_grad, written)
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
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        targets: Targets | None,
        objective: Objective,
        rollouts: Rollouts | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(logits.device.type, enabled=False):
            buffer = logits.detach().clone() if logits.dtype == torch.float64 else logits.detach().float().clone()
            sums, grad = chunk_loss(buffer, labels, targets, objective, ctx.needs_input_grad[0], rollouts)
        ctx.grad = None if grad is None else grad.to(logits.dtype)
        parts = sums[1:].clone()
        ctx.mark_non_differentiable(parts)
        return sums[0].clone(), parts

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, grad_parts: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.grad * grad_loss, None, None, None, None
