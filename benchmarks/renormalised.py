"""What widely copied recipes do with top-k targets, as a baseline: probabilities divided by their sum, the rest forgotten."""

from __future__ import annotations

import torch

from kdcache.train.losses import Divergence


def renormalised() -> Divergence:
    """KL(teacher renormalised over the kept entries ‖ student)."""

    def on_buckets(
        log_t: torch.Tensor, log_t_tail: torch.Tensor, log_p: torch.Tensor, log_p_tail: torch.Tensor
    ) -> torch.Tensor:
        log_t = torch.log_softmax(log_t, dim=-1)
        return (log_t.exp() * (log_t - log_p)).sum(-1)

    return Divergence("renormalised", on_buckets)
