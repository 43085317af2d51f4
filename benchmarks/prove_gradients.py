"""P1: every loss and its gradient, in float64, against autograd through dense logits.

For each divergence, over temperatures, mixtures with the cross-entropy, heads with and without bias, scale and soft cap: the
largest difference of the loss and of any gradient between ``kd_loss`` and four lines of autograd. Then three identities: all
entries kept equals everything kept; buckets never exceed the divergence over the vocabulary; a teacher's tail of any size,
from everything to nothing, gives finite gradients.

    python benchmarks/prove_gradients.py
"""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import results_file
from kdcache.train.head import kd_loss
from kdcache.train.losses import LOSSES, make_divergence
from kdcache.train.objective import BucketTargets, Objective
from tests.unit.test_head import N, V, autograd_loss, buckets, dense_logits, grads_of, model_and_teacher

BOUND = 1e-10
HEADS = ({"bias": False}, {"bias": True, "scale": 0.5, "softcap": 5.0})
MIXTURES = ((0.3, 1.0), (1.0, 1.0), (0.6, 2.0), (1.0, 4.0))


def differences(name: str, drawn: bool) -> tuple[float, float]:
    """Largest difference of the loss, and of a gradient."""
    value, gradient = 0.0, 0.0
    for (alpha, temperature), extras, k in itertools.product(MIXTURES, HEADS, (1, 7, V)):
        hidden, head, teacher, labels = model_and_teacher(**extras)
        targets = buckets(teacher, k, temperature)
        if drawn:
            ratios = 3 * torch.rand_like(targets.logprobs)
            targets = BucketTargets(targets.token_ids, targets.logprobs, targets.tail_logprobs, ratios, temperature)
        objective = Objective(alpha, temperature, make_divergence(name))
        ours = kd_loss(hidden, targets, labels, objective, head=head, chunk_positions=10).loss
        plain = autograd_loss(dense_logits(hidden, head), labels, targets, objective)
        value = max(value, abs(float((ours - plain).detach())))
        pairs = zip(grads_of(ours, hidden, head), grads_of(plain, hidden, head), strict=True)
        gradient = max(gradient, *(float((a - b).abs().max()) for a, b in pairs))
    return value, gradient


def whole(name: str, logits: torch.Tensor, teacher: torch.Tensor) -> float:
    """Over the vocabulary, summed over positions."""
    student = torch.log_softmax(logits, 1)
    return float(make_divergence(name).on_everything(torch.log_softmax(teacher, 1), student).sum())


def coarse(name: str, logits: torch.Tensor, teacher: torch.Tensor, k: int) -> float:
    labels = torch.zeros(len(logits), dtype=torch.long)
    objective = Objective(1.0, 1.0, make_divergence(name))
    return float(kd_loss(logits, buckets(teacher, k, 1.0), labels, objective).loss)


def share_of_whole(name: str) -> tuple[float, list[float]]:
    """Difference between k = V and everything; and the shares of the divergence that k = 1, 7, 25 see."""
    hidden, head, teacher, _ = model_and_teacher(bias=False)
    logits = dense_logits(hidden, head).detach()
    everything = whole(name, logits, teacher)
    shares = [coarse(name, logits, teacher, k) / everything for k in (1, 7, 25)]
    return abs(coarse(name, logits, teacher, V) - everything), shares


def tails_are_finite(name: str) -> bool:
    """Value and gradient, for a teacher's tail between all and nothing and a student's of 1e-30."""
    for tail, student_tail in itertools.product((-1e-9, -20.0, -69.0, -200.0, -math.inf), (0.0, -69.0)):
        tail_N = torch.full((1,), tail, dtype=torch.float64)
        entries = torch.log_softmax(torch.arange(3.0, dtype=torch.float64)[None], 1) + torch.log(-torch.expm1(tail_N))
        targets = BucketTargets(torch.tensor([[0, 4, 9]]), entries, tail_N)
        logits = torch.full((1, V), student_tail, dtype=torch.float64)
        logits[0, [0, 4, 9]] = 0.0
        logits.requires_grad_()
        loss = kd_loss(logits, targets, torch.tensor([4]), Objective(1.0, 1.0, make_divergence(name))).loss
        (gradient,) = torch.autograd.grad(loss, logits)
        if not (loss.isfinite() and gradient.isfinite().all()):
            return False
    return True


def main() -> None:
    lines = ["| loss | targets | loss, largest difference | gradient, largest difference | k = V against everything "
             "| share of the whole at k = 1, 7, 25 | tails from 1 to 0 |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name in LOSSES:
        kinds = [False] + [True] * (make_divergence(name).on_draws is not None and name != "ce")
        for drawn in kinds:
            value, gradient = differences(name, drawn)
            assert max(value, gradient) <= BOUND, (name, drawn, value, gradient)
            cells = [name, "draws" if drawn else "buckets", f"{value:.0e}", f"{gradient:.0e}", "", "", ""]
            if not drawn and name != "ce":
                assert tails_are_finite(name), name
                cells[6] = "finite"
                if make_divergence(name).term is not None:
                    difference, shares = share_of_whole(name)
                    assert difference <= BOUND, (name, difference)
                    assert shares == sorted(shares), (name, shares)
                    assert shares[-1] <= 1, (name, shares)
                    cells[4], cells[5] = f"{difference:.0e}", ", ".join(f"{share:.0%}" for share in shares)
            lines.append("| " + " | ".join(cells) + " |")
    about = (
        f"{N} positions, V = {V}, float64; k = 1, 7, V; alpha and T {', '.join(f'{a:g}/{t:g}' for a, t in MIXTURES)}; heads "
        "plain and with bias, scale, soft cap. The bound is 1e-10.\n\n"
    )
    results_file.write_text("prove_gradients", "P1: losses and gradients against dense autograd", about + "\n".join(lines) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
