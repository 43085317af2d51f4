"""Logits -> targets: which entries to keep, and exact numbers for what is left out.

Everything is computed from float32 logits while they are at hand, in one pass over a chunk of positions: the entries, the
log-normalisers and tails of every temperature, the entropy, the label's logprob. The tail is a logsumexp over what is not
kept (never ``1 - sum``), so that a tail of 1e-30 is as exact as one of 0.3. Schemes that draw at random keep the same
numbers for what they drew, and how often (``draw``).

On a CPU the work is cut to a few rows that stay in the cache of a core, and the entries are found in two stages (the k
blocks with the largest maxima contain the k largest entries); both keep the cost at a fraction of the teacher's own. The
plain form that this equals stands in ``tests/unit/test_select.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kdcache.dump.draw import count_draws, draw
from kdcache.specs import DRAWN, TargetSpec

BLOCK = 8
CACHED_ROWS = 8
GPU_CHUNK_ELEMENTS = 1 << 28
BELOW_ALL = -1.0e4
INTEGER_OF_WIDTH = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Selected:
    """Targets of N positions as tensors on the teacher's device; the fields of ``SparseTargets``, at most K entries a row.

    Attributes:
        num_entries: ``[N]`` int64; the slots of a row past its number repeat one of its ids.
        token_ids: ``[N, K]`` int64, ascending.
        logprobs: ``[N, K]`` float32.
        tail_logprobs: ``[N, num_temperatures]`` float32.
        logz: ``[N]`` float32.
        label_logprobs: ``[N]`` float32.
        entropy: ``[N]`` float32.
        counts: ``[N, K, num_temperatures]`` int64, draws, or None.
    """

    num_entries: torch.Tensor
    token_ids: torch.Tensor
    logprobs: torch.Tensor
    tail_logprobs: torch.Tensor
    logz: torch.Tensor
    label_logprobs: torch.Tensor
    entropy: torch.Tensor
    counts: torch.Tensor | None = None


def select(
    logits: torch.Tensor, labels: torch.Tensor, spec: TargetSpec, uniforms: torch.Tensor | None = None
) -> Selected:
    """Keep of each position what a target scheme keeps.

    Args:
        logits: ``[N, V]``, padded vocabulary rows already left out.
        labels: ``[N]`` int64, below V.
        spec: The scheme.
        uniforms: ``[N, num_temperatures, uniforms_per_draw]`` float64 in [0, 1), for the schemes that draw.
    """
    k = min(spec.k, logits.shape[1])
    if spec.scheme == "top_p":
        return keep_top_p(select_top_k(logits, labels, k=k, temperatures=spec.temperatures), spec)
    if spec.scheme in DRAWN:
        assert uniforms is not None, "a scheme that draws is given its random numbers"
        return select_draws(logits, labels, spec, uniforms)
    return select_top_k(logits, labels, k=k, temperatures=spec.temperatures)


def keep_top_p(selected: Selected, spec: TargetSpec) -> Selected:
    """Of k entries keep the fewest, most probable first, whose mass reaches ``top_p``; the others join the tails.

    An entry stays if those before it have less than ``top_p`` together, as in nucleus sampling (1904.09751).
    """
    by_mass, order = selected.logprobs.sort(dim=1, descending=True, stable=True)
    before = by_mass.exp().cumsum(1) - by_mass.exp()
    stays = torch.zeros_like(before, dtype=torch.bool).scatter_(1, order, before < spec.top_p)
    stays.scatter_(1, order[:, :1], True)
    tails = []
    for column, temperature in enumerate(spec.temperatures):
        tail = selected.tail_logprobs[:, column]
        log_head = torch.log(-torch.expm1(tail))
        logprobs = torch.log_softmax(selected.logprobs / temperature, dim=1) + log_head[:, None]
        dropped = torch.logsumexp(logprobs.masked_fill(stays, -torch.inf), dim=1)
        tails.append(torch.logaddexp(tail, dropped))
    # What stays moves to the front, its ids still ascending; free slots repeat the first.
    num_entries = stays.sum(1)
    front = (~stays).to(torch.uint8).sort(dim=1, stable=True).indices[:, : int(num_entries.max())]
    slots = torch.arange(front.shape[1], device=front.device)
    front = torch.where(slots < num_entries[:, None], front, front[:, :1])
    return replace(
        selected,
        num_entries=num_entries,
        token_ids=selected.token_ids.gather(1, front),
        logprobs=selected.logprobs.gather(1, front),
        tail_logprobs=torch.stack(tails, dim=1),
    )


def select_draws(logits: torch.Tensor, labels: torch.Tensor, spec: TargetSpec, uniforms: torch.Tensor) -> Selected:
    """Entries drawn at every temperature from the teacher's distribution there, after ``k`` exact ones (hybrid)."""
    k = min(spec.k, logits.shape[1])
    exact_ids = _top_k(logits, k)[1]
    drawn = torch.stack(
        [
            draw(logits, uniforms[:, column], spec, temperature, exact_ids)
            for column, temperature in enumerate(spec.temperatures)
        ],
        dim=1,
    )
    num_entries, ids_NK, counts = count_draws(exact_ids, drawn)
    # Entries need not be the largest logits here: measure from the largest of all, so that no exponential overflows.
    base = logits.amax(1, keepdim=True).float()
    used_NK = torch.arange(ids_NK.shape[1], device=ids_NK.device) < num_entries[:, None]
    measured = _measure(logits, labels, ids_NK, used_NK, base, spec.temperatures)
    return replace(measured, num_entries=num_entries, counts=counts)


def select_top_k(logits: torch.Tensor, labels: torch.Tensor, *, k: int, temperatures: tuple[float, ...]) -> Selected:
    """Keep the k most probable tokens of each position.

    Equals, for ``logp = log_softmax(logits.float())``: ``logp.topk(k)``; the logsumexp of the rest of
    ``log_softmax(logits / T)`` for each T; ``-(exp(logp) * logp).sum(-1)``; ``logp[label]``.

    Args:
        logits: ``[N, V]``, padded vocabulary rows already left out.
        labels: ``[N]`` int64, below V.
        k: Entries a position; 0 keeps none (the ``hidden`` scheme), V keeps all.
        temperatures: The first is 1.
    """
    kept_NK, ids_NK = _top_k(logits, k)
    ids_NK = ids_NK.sort(dim=1).values
    # Everything is measured from the smallest kept logit (the largest of all where none is kept): the tail lies below it,
    # so its exponentials neither overflow nor vanish.
    base = (kept_NK.amin(1, keepdim=True) if k else logits.amax(1, keepdim=True)).float()
    return _measure(logits, labels, ids_NK, None, base, temperatures)


def _measure(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ids_NK: torch.Tensor,
    used_NK: torch.Tensor | None,
    base: torch.Tensor,
    temperatures: tuple[float, ...],
) -> Selected:
    """Logprobs of chosen entries, tails, log-normaliser, entropy and the label's logprob; exponentials from ``base``."""
    k = ids_NK.shape[1]
    kept_NK = logits.gather(1, ids_NK).float() - base
    if used_NK is not None:
        kept_NK = kept_NK.masked_fill(~used_NK, -torch.inf)
    tail_z, weighted = _tail_sums(logits, base, ids_NK, temperatures)
    if k == logits.shape[1]:
        tail_z = torch.full_like(tail_z, -torch.inf)
    all_z = tail_z
    if k:
        kept_z = torch.stack([torch.logsumexp(kept_NK / temperature, dim=1) for temperature in temperatures], dim=1)
        all_z = torch.logaddexp(kept_z, tail_z)
    logz = all_z[:, 0]
    logprobs_NK = kept_NK - logz[:, None]
    label_z = (logits.gather(1, labels[:, None]).float() - base)[:, 0]
    # entropy = logz - E[z], both from the base
    kept_mean = (logprobs_NK.exp() * kept_NK.masked_fill(kept_NK == -torch.inf, 0.0)).sum(1)
    mean_z = kept_mean + weighted * torch.exp(-logz)
    return Selected(
        num_entries=torch.full_like(labels, k),
        token_ids=ids_NK,
        logprobs=logprobs_NK,
        tail_logprobs=tail_z - all_z,
        logz=logz + base[:, 0],
        label_logprobs=label_z - logz,
        entropy=(logz - mean_z).clamp_min(0),
    )


def _tail_sums(
    logits_NV: torch.Tensor, base: torch.Tensor, ids_NK: torch.Tensor, temperatures: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[N, num_temperatures]`` log-sums of the tail, and ``[N]`` ``sum(exp(z) z)`` at T = 1, with z measured from the base.

    One exponential serves temperatures that halve: ``exp(z / 2)`` is ``exp(z / 4)`` squared. A few rows at a time on a CPU,
    in two buffers that stay in the cache of a core.
    """
    n, vocab_size = logits_NV.shape
    descending = sorted(temperatures, reverse=True)
    highest = descending[0]
    rows = CACHED_ROWS if logits_NV.device.type == "cpu" else max(1, GPU_CHUNK_ELEMENTS // vocab_size)
    sums, weighted = base.new_empty(len(temperatures), n), base.new_empty(n)
    shift = -base / highest
    scaled_buffer, powers_buffer = base.new_empty(min(rows, n), vocab_size), base.new_empty(min(rows, n), vocab_size)
    for start in range(0, n, rows):
        here = slice(start, min(start + rows, n))
        scaled_NV, powers_NV = scaled_buffer[: here.stop - start], powers_buffer[: here.stop - start]
        scaled_NV.copy_(logits_NV[here])
        torch.add(shift[here], scaled_NV, alpha=1 / highest, out=scaled_NV)
        scaled_NV.scatter_(1, ids_NK[here], BELOW_ALL)
        torch.exp(scaled_NV, out=powers_NV)
        reached = highest
        for temperature in descending:
            if reached == 2 * temperature:
                powers_NV.mul_(powers_NV)
            elif reached != temperature:
                torch.exp(scaled_NV * (highest / temperature), out=powers_NV)
            reached = temperature
            torch.sum(powers_NV, 1, out=sums[temperatures.index(temperature), here])
            if temperature == 1.0:
                in_place = temperature == descending[-1]
                torch.sum(powers_NV.mul_(scaled_NV) if in_place else powers_NV * scaled_NV, 1, out=weighted[here])
    return sums.T.log(), weighted * highest


def _top_k(logits_NV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and ids of the k largest logits of each row, in no order.

    On a CPU bit patterns are compared as integers, which is faster by half: positive floats order as their patterns do, and
    lie above the negative ones. Rows where this finds a logit that is not positive are done again as floats.
    """
    if logits_NV.device.type != "cpu" or k == 0:
        kept, ids = logits_NV.topk(k, dim=1, sorted=False)
        return kept, ids
    patterns, ids = _in_two_stages(logits_NV.view(INTEGER_OF_WIDTH[logits_NV.itemsize]), k)
    kept = patterns.view(logits_NV.dtype)
    again = (patterns <= 0).any(1).nonzero()[:, 0]
    if len(again):
        kept[again], ids[again] = _in_two_stages(logits_NV[again], k)
    return kept, ids


def _in_two_stages(values_NV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``topk(k)``: the k blocks with the largest maxima are found first, by the same means; they hold the k largest.

    Blocks are strided, {b, b + stride, b + 2 stride, ...}, so that their maxima are an elementwise maximum of contiguous rows.
    """
    n, vocab_size = values_NV.shape
    if vocab_size < 4 * BLOCK * k:
        kept, ids = values_NV.topk(k, dim=1, sorted=False)
        return kept, ids
    stride = vocab_size // BLOCK
    whole = stride * BLOCK
    _, best = _in_two_stages(values_NV[:, :whole].reshape(n, BLOCK, stride).amax(dim=1), k)
    candidate_ids = (best[:, None, :] + (torch.arange(BLOCK) * stride)[:, None]).view(n, -1)
    if whole < vocab_size:
        candidate_ids = torch.cat([candidate_ids, torch.arange(whole, vocab_size).expand(n, -1)], dim=1)
    kept, which = values_NV.gather(1, candidate_ids).topk(k, dim=1, sorted=False)
    return kept, candidate_ids.gather(1, which)
