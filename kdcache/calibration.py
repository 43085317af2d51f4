"""How sure a model is of its first choice, and how often it is right: what training and evaluation both report."""

from __future__ import annotations

import torch

NUM_BINS = 15


def calibration_sums(confidence: torch.Tensor, hit: torch.Tensor) -> torch.Tensor:
    """By equal bins of the confidence: positions, sum of confidence, hits.

    Args:
        confidence: ``[N]``, probability of the first choice.
        hit: ``[N]`` bool, whether it is the data token.

    Returns:
        ``[NUM_BINS, 3]``; sums of several parts add up.
    """
    bins = (confidence * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    rows = torch.stack([torch.ones_like(confidence), confidence, hit.to(confidence)], dim=1)
    return confidence.new_zeros(NUM_BINS, 3).index_add_(0, bins, rows)


def calibration_error(sums: torch.Tensor) -> float:
    """Expected calibration error: the mean gap between confidence and accuracy over bins, weighted by their positions.

    Args:
        sums: ``[NUM_BINS, 3]`` of :func:`calibration_sums`. Guo et al. 1706.04599.
    """
    number, confidence, hits = sums.double().unbind(1)
    return float((confidence - hits).abs().sum() / number.sum().clamp(min=1))


def overconfidence(sums: torch.Tensor) -> float:
    """Mean confidence minus accuracy."""
    number, confidence, hits = sums.double().sum(0)
    return float((confidence - hits) / number.clamp(min=1))
