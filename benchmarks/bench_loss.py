"""What does the loss cost, in time and memory: dense, gathered, chunked, at three sizes?

From hidden states to gradients of hidden states and head, forward KL over 64 kept entries and the tail; on a CPU in float32
with the shapes of SmolLM2, on a GPU in bfloat16 with those of a Llama of one billion parameters:

- dense: logits of all positions, log-softmax, ``F.kl_div`` against the teacher's dense probabilities;
- gather: logits of all positions, log-softmax, the kept entries gathered from it;
- chunked: ``kd_loss``.

    python benchmarks/bench_loss.py [--rounds 3] [--chunks 512 2048]

``--chunks`` compares numbers of positions a chunk.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import measure, results_file
from kdcache.heads import OutputHead
from kdcache.models import keep_freed_memory, pick_device
from kdcache.train.head import kd_loss
from kdcache.train.objective import BucketTargets, Objective

DEVICE = pick_device()
V, D, K = (49_152, 576, 64) if DEVICE == "cpu" else (128_256, 2048, 64)
SIZES = (1024, 2048, 4096) if DEVICE == "cpu" else (2048, 8192, 16_384)
DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16
FORMS = ("dense", "gather", "chunked")


def case(n: int):
    """Hidden states, head, labels and targets of n positions."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        hidden = torch.randn(n, D).to(DTYPE).requires_grad_()
        weight = (torch.randn(V, D) / D**0.5).to(DTYPE).requires_grad_()
        ids = torch.arange(K) * (V // K) + torch.randint(0, V // K, (n, K))
        logprobs = torch.log_softmax(torch.randn(n, K), 1) + torch.log(torch.tensor(0.9))
        return hidden, weight, torch.randint(0, V, (n,)), BucketTargets(ids, logprobs, torch.full((n,), 0.1).log())


def loss(form: str, hidden, weight, labels, targets) -> torch.Tensor:
    """The sum over positions."""
    if form.startswith("chunked"):
        chunk = int(form.partition(" ")[2] or 0) or None
        return kd_loss(hidden, targets, labels, Objective(1.0), head=OutputHead(weight), chunk_positions=chunk).loss
    student = torch.log_softmax((hidden @ weight.T).float(), 1)
    if form == "gather":
        kept = student.gather(1, targets.token_ids)
        tail = torch.log1p(-kept.exp().sum(1).clamp(max=1 - 1e-6))
        head = (targets.logprobs.exp() * (targets.logprobs - kept)).sum()
        return head + (targets.tail_logprobs.exp() * (targets.tail_logprobs - tail)).sum()
    spread = (targets.tail_logprobs.exp() / (V - K))[:, None].expand(-1, V)
    dense = spread.scatter(1, targets.token_ids, targets.logprobs.exp())
    return torch.nn.functional.kl_div(student, dense, reduction="sum")


def run(form: str, given) -> None:
    hidden, weight, labels, targets = given
    hidden.grad = weight.grad = None
    loss(form, hidden, weight, labels, targets).backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-of")
    parser.add_argument("--size", type=int)
    parser.add_argument("--chunks", type=int, nargs="*", default=[])
    args = parser.parse_args()
    forms = [*FORMS, *(f"chunked {chunk}" for chunk in args.chunks)]
    if args.memory_of:
        given = case(args.size)
        run(
            args.memory_of, tuple(part[:16] if part is not given[1] else part for part in given)
        )  # code and its buffers
        given[0].grad = given[1].grad = None
        print(measure.peak_growth(lambda: run(args.memory_of, given)))
        return
    keep_freed_memory()
    rows: list[tuple[str, object]] = []
    for n in SIZES:
        given, best = case(n), dict.fromkeys(forms, float("inf"))
        for _ in range(args.rounds):
            for form in forms:
                best[form] = min(best[form], measure.seconds(partial(run, form, given)))
        peak = measure.peaks({form: partial(run, form, given) for form in forms}, __file__, ["--size", str(n)])
        for form in forms:
            rows.append((f"{n} positions, {form}", f"time {best[form] / best['chunked']:.2f}, peak memory {peak[form] / peak['chunked']:.1f} of chunked"
                         f" ({peak[form] / 1e6:,.0f} MB)"))  # fmt: skip
    assert peak["chunked"] <= peak["gather"] / 5, f"at {SIZES[-1]} positions: {peak}"
    results_file.write("bench_loss", "P8: time and memory of the loss", rows,
                       f"V = {V:,}, D = {D}, k = {K}, {str(DTYPE)[6:]}; best of {args.rounds}; the gradient of the head is "
                       f"{V * D * DTYPE.itemsize / 1e6:.0f} MB of the peak.\n\n")  # fmt: skip


if __name__ == "__main__":
    main()
