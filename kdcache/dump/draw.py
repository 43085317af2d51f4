"""Entries drawn at random from the teacher's distribution, so that weighted sums over few entries are unbiased.

``sampled`` draws N tokens independently (2503.16870). ``systematic`` takes N evenly spaced points of the cumulative
distribution with one random offset: each token still comes up ``N t_i`` times on average, but never fewer than
``floor(N t_i)`` or more than ``ceil(N t_i)`` times, which leaves about a third of the variance at the same size. ``hybrid``
keeps the k most probable tokens exactly and draws systematically from the rest.

**The random numbers** are a function of (seed, sequence id, position) alone: a counter-based stream (Philox 4x64) for each
sequence, a fixed run of it for each position. Which batch, worker or resume computes a position is no matter.

**Numerics.** A cumulative sum over a vocabulary in float32 loses the tail. Here float32 exponentials are summed in float64, a
block of tokens at a time, and a point is looked for first among the blocks and then inside one. The plain form, one float64
cumulative sum, stands in ``tests/unit/test_draw.py``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from kdcache.specs import TargetSpec

BLOCK = 256
CPU_ROWS = 8
GPU_ROWS = 512


def uniforms_per_draw(spec: TargetSpec) -> int:
    """Random numbers that a position needs at each temperature: one for each draw, or one offset."""
    return spec.num_draws if spec.scheme == "sampled" else 1


def position_uniforms(spec: TargetSpec, sequence_id: int, positions: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """The random numbers of a sequence's positions.

    Args:
        spec: The scheme, with its seed.
        sequence_id: Of the sequence.
        positions: ``[T]``, where numbers are wanted.

    Returns:
        ``[positions.sum(), num_temperatures, uniforms_per_draw]`` in [0, 1).
    """
    key = np.array([spec.seed, sequence_id], dtype=np.uint64)
    shape = (len(positions), len(spec.temperatures), uniforms_per_draw(spec))
    return np.random.Generator(np.random.Philox(key=key)).random(shape)[positions]


def draw(
    logits: torch.Tensor, uniforms: torch.Tensor, spec: TargetSpec, temperature: float, exact_ids: torch.Tensor
) -> torch.Tensor:
    """Draw ``num_draws`` tokens a position from ``softmax(logits / temperature)`` without the exact ones.

    Args:
        logits: ``[N, V]``.
        uniforms: ``[N, uniforms_per_draw]`` float64.
        spec: The scheme.
        temperature: T.
        exact_ids: ``[N, k]``, tokens that are not drawn; k may be 0.

    Returns:
        ``[N, num_draws]`` int64; -1 throughout where nothing is left to draw from.
    """
    points = uniforms
    if spec.scheme != "sampled":
        points = (uniforms + torch.arange(spec.num_draws, device=uniforms.device)) / spec.num_draws
    rows = CPU_ROWS if logits.device.type == "cpu" else GPU_ROWS
    parts = [
        _inverse_cdf(logits[i : i + rows], points[i : i + rows], temperature, exact_ids[i : i + rows])
        for i in range(0, len(logits), rows)
    ]
    return torch.cat(parts) if parts else torch.empty(0, spec.num_draws, dtype=torch.int64, device=logits.device)


def _inverse_cdf(
    logits_CV: torch.Tensor, points_CM: torch.Tensor, temperature: float, exact_ids: torch.Tensor
) -> torch.Tensor:
    """Where each point falls in the cumulative distribution of the tokens that are not exact."""
    n, vocab_size = logits_CV.shape
    z_CV = logits_CV.float()
    if exact_ids.shape[1]:
        z_CV = z_CV.scatter(1, exact_ids, -torch.inf)
    top = z_CV.amax(1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    mass = torch.exp((z_CV - top) / temperature)
    num_blocks = -(-vocab_size // BLOCK)
    mass = torch.nn.functional.pad(mass, (0, num_blocks * BLOCK - vocab_size)).view(n, num_blocks, BLOCK)
    block_mass = mass.sum(2, dtype=torch.float64)
    block_ends = block_mass.cumsum(1)
    total = block_ends[:, -1:]
    points = points_CM * total
    block = torch.searchsorted(block_ends, points.contiguous(), right=True)
    block = torch.minimum(block, _last_above_zero(block_mass))  # a point may round up to the end
    inside = mass.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).double()
    left = points - (block_ends - block_mass).gather(1, block)
    slot = (inside.cumsum(2) <= left[:, :, None]).sum(2)
    slot = torch.minimum(slot, _last_above_zero(inside)[:, :, 0])
    return torch.where(total > 0, block * BLOCK + slot, -1)


def _last_above_zero(mass: torch.Tensor) -> torch.Tensor:
    """``[..., 1]``: index of the last element above zero, or 0."""
    index = torch.arange(mass.shape[-1], device=mass.device)
    return torch.where(mass > 0, index, 0).amax(-1, keepdim=True)


def count_draws(exact_ids: torch.Tensor, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Exact entries and draws of all temperatures as ascending ids without repeats, and how often each was drawn.

    Args:
        exact_ids: ``[N, k]``, without repeats.
        drawn: ``[N, num_temperatures, M]``, none of the exact ones; -1 for nothing.

    Returns:
        ``[N]`` numbers of entries, ``[N, K]`` ids (slots past the number repeat the first), ``[N, K, num_temperatures]``.
    """
    n, num_temperatures, num_draws = drawn.shape
    k = exact_ids.shape[1]
    everything = torch.cat([exact_ids, drawn.reshape(n, -1)], dim=1)
    ids, order = everything.sort(dim=1)
    present = ids >= 0
    first = present & torch.cat([torch.ones_like(ids[:, :1], dtype=torch.bool), ids[:, 1:] != ids[:, :-1]], dim=1)
    slot = (first.cumsum(1) - 1).clamp(min=0)
    num_entries = first.sum(1)
    width = max(int(num_entries.max()), 1) if n else 1
    # Nothing-slots sort before all others and are overwritten by the first real id, or stay 0 where there is none.
    rows = torch.arange(n, device=ids.device)[:, None]
    lowest = torch.where(present, ids, ids.amax(1, keepdim=True).clamp(min=0)).amin(1, keepdim=True)
    out = lowest.repeat(1, width)
    out[rows.expand_as(ids)[present], slot[present]] = ids[present]
    # Which temperature each element came from; exact entries count for none.
    column = torch.where(order >= k, (order - k).clamp(min=0) // num_draws, num_temperatures)
    counts = torch.zeros(n, width, num_temperatures + 1, dtype=torch.int64, device=ids.device)
    index = (rows * width + slot) * (num_temperatures + 1) + column
    counts.view(-1).scatter_add_(0, index[present], torch.ones_like(index[present]))
    return num_entries, out, counts[:, :, :num_temperatures]
