"""The label instead of the tail, as a variant of E10: KL over the kept entries, and where the label is none of them, the label with mass one.

The weights of a position are ``tau = t_K + [y not in K] e_y``, its gradient ``sum(tau) p - tau``. Where the label was drawn from the
teacher itself its expectation is that of KL over the whole vocabulary, ``p - t``; on other text the label's part is the data's, and the
students go towards a mixture. No loss of kdcache does this: draws are unbiased on any text.
"""

from __future__ import annotations

from typing import Any

import torch

from kdcache.train import head
from kdcache.train.kernel import chunk_loss
from kdcache.train.losses import LOSSES, Divergence
from kdcache.train.objective import BucketTargets, Objective

NAME = "label_tail"
# In the place of the label's logprob, which nobody knows; to measures that do not know it, it is no mass at all.
STANDS_FOR_TAIL = -80.0


def label_tail() -> Divergence:
    """``sum(tau log(tau / p))`` over the kept entries and the label; of targets that :func:`with_label` made, at T = 1."""

    def on_buckets(
        log_t: torch.Tensor, _log_t_tail: torch.Tensor, log_p: torch.Tensor, _log_p_tail: torch.Tensor
    ) -> torch.Tensor:
        is_label = log_t == STANDS_FOR_TAIL
        weights = torch.where(is_label, 1.0, log_t.exp())
        log_weights = torch.where(is_label | (log_t == -torch.inf), 0.0, log_t)
        return (weights * (log_weights - log_p)).sum(-1)

    return Divergence(NAME, on_buckets)


def with_label(targets: BucketTargets, labels: torch.Tensor) -> BucketTargets:
    """One slot more ``[N, K + 1]``: the label where it is no kept entry, unused where it is one."""
    is_kept = ((targets.token_ids == labels[:, None]) & (targets.logprobs > -torch.inf)).any(1)
    ids = torch.where(is_kept, targets.token_ids[:, 0], labels)
    logprobs = torch.where(is_kept, -torch.inf, STANDS_FOR_TAIL).to(targets.logprobs)
    return BucketTargets(
        torch.cat([targets.token_ids, ids[:, None]], 1),
        torch.cat([targets.logprobs, logprobs[:, None]], 1),
        targets.tail_logprobs,
        temperature=targets.temperature,
    )


def add_loss() -> None:
    """Make ``loss: label_tail`` known to this process."""

    def labelled_chunk_loss(
        logits: torch.Tensor, labels: torch.Tensor, targets: Any, objective: Objective, *others: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if objective.divergence.name == NAME and targets is not None:
            targets = with_label(targets, labels)
        return chunk_loss(logits, labels, targets, objective, *others)

    LOSSES[NAME] = label_tail
    head.chunk_loss = labelled_chunk_loss
