"""A student before there is a cache: whether it fits the teacher, and how long its steps take on what the pilot has kept."""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING

from kdcache.budget.footprint import Shape, shape_of
from kdcache.cache.manifest import CacheSpec, Plan
from kdcache.model_files import ModelSource, find_model
from kdcache.models import check_student, load_config, load_model, load_tokenizer, meta_model
from kdcache.targets import SparseTargets, TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdcache.budget.options import PlanOptions

logger = logging.getLogger(__name__)

STEPS = 4


def check_planned_student(name: str, spec: CacheSpec, trust_remote_code: bool = False) -> Shape:
    """What it is, once it is known to fit; without its weights.

    Raises:
        CacheMismatchError: Another tokenizer, too few embeddings or too short a context.
    """
    source = find_model(name)
    model = meta_model(source, load_config(source, trust_remote_code=trust_remote_code))
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    check_student(model, tokenizer, spec.tokenizer, spec.teacher.vocab_size, spec.corpus.seq_len)
    return shape_of(model)


def measure_student(options: PlanOptions, spec: CacheSpec, stored: list[tuple[TokenSequence, SparseTargets]]) -> float:
    """Seconds a token of a training step: forward, loss from stored targets, backward, AdamW; float32 as train-student has it.

    Args:
        options: Name the student and the sequences of a step.
        spec: Of the dump.
        stored: Sequences and what a student would read of them.
    """
    import torch

    from kdcache.dump.launch import local_device
    from kdcache.heads import split_is_exact

    device = local_device(options, Plan(spec=spec, fingerprint=spec.fingerprint), 0)
    if device == "cpu":
        torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    source: ModelSource = find_model(options.student or "")
    model = load_model(source, dtype=torch.float32, device=device, trust_remote_code=options.trust_remote_code).train()
    exact = split_is_exact(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    batch_size = min(options.per_device_train_batch_size, len(stored))
    logger.info("student: %d steps of %d sequences", STEPS, batch_size)
    timed: list[tuple[int, float]] = []
    for step in range(STEPS):
        some = [stored[(step * batch_size + i) % len(stored)] for i in range(batch_size)]
        started = time.monotonic()
        _step(model, some, spec.teacher.vocab_size, device, exact)
        optimizer.step()
        optimizer.zero_grad()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        timed.append((sum(len(sequence) for sequence, _ in some), time.monotonic() - started))
    steady = timed[1:]
    return sum(seconds for _, seconds in steady) / sum(tokens for tokens, _ in steady)


def _step(
    model: PreTrainedModel, some: list[tuple[TokenSequence, SparseTargets]], vocab_size: int, device: str, exact: bool
) -> None:
    """Forward and backward of one batch."""
    import torch

    from kdcache.dump.engines.transformers import pad_batch
    from kdcache.heads import head_of, hidden_states
    from kdcache.train.head import kd_loss
    from kdcache.train.objective import BucketTargets, Objective

    input_ids, position_ids = (tensor.to(device) for tensor in pad_batch([sequence for sequence, _ in some]))
    valid = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, (sequence, _) in enumerate(some):
        valid[row, : len(sequence)] = torch.from_numpy(sequence.target_mask)
    labels = input_ids.roll(-1, dims=1)[valid]
    targets = BucketTargets.of([targets for _, targets in some], 1.0, device)
    if exact:
        states = hidden_states(model, input_ids, position_ids)[valid]
        sums = kd_loss(states, targets, labels, Objective(), head=head_of(model).first(vocab_size))
    else:
        logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits[valid][:, :vocab_size]
        sums = kd_loss(logits, targets, labels, Objective())
    (sums.loss / len(labels)).backward()  # type: ignore[no-untyped-call]
