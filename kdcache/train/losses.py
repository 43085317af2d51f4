"""Per-position divergences between teacher and student, as pure functions of logprobs over K + 1 buckets.

The buckets are the K kept entries and the tail, everything else as one. A divergence over buckets is a lower bound of the
divergence over the vocabulary, and equal to it at K = V (the data-processing inequality; equality also where teacher and
student agree on the shape of the tail). No function here reduces: they return ``[N]``, and the trainer divides once by the
number of targets in the whole effective batch.

All of it is float32. A bucket of teacher mass zero, or an unused slot (logprob ``-inf``), contributes nothing: its inputs
are replaced before the arithmetic, so that no gradient meets ``0 * inf``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Divergence = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def forward_kl(
    teacher_logprobs: torch.Tensor,
    teacher_tail: torch.Tensor,
    student_logprobs: torch.Tensor,
    student_tail: torch.Tensor,
) -> torch.Tensor:
    """KL(teacher ‖ student), which covers the teacher's modes.

    Equals ``sum(t * (log t - log p)) + t_tail * (log t_tail - log p_tail)``. Hinton et al. 1503.02531, with the tail as one
    bucket.

    Args:
        teacher_logprobs: ``[N, K]``; ``-inf`` in unused slots.
        teacher_tail: ``[N]``; ``-inf`` where nothing is left out.
        student_logprobs: ``[N, K]``, of the same tokens.
        student_tail: ``[N]``.

    Returns:
        ``[N]``, nats.
    """
    return _weighted_ratio(teacher_logprobs, student_logprobs).sum(-1) + _weighted_ratio(teacher_tail, student_tail)


def _weighted_ratio(log_t: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """``t * (log t - log p)``, 0 where t is 0."""
    present = log_t > -torch.inf
    safe_t = torch.where(present, log_t, 0.0)
    safe_p = torch.where(present, log_p, 0.0)
    return torch.where(present, safe_t.exp() * (safe_t - safe_p), 0.0)


LOSSES: dict[str, Divergence] = {"forward_kl": forward_kl}
