"""Live distillation, as plain as it can be written: the oracle of training from a cache."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from kdcache.train.stream import Item, KDBatchSampler, collate


def live_distillation(
    teacher_folder,
    student_folder,
    reader,
    *,
    steps,
    alpha,
    temperature,
    batch_size,
    learning_rate,
    seed=0,
    accumulation=1,
):
    """Teacher and student in one process, full vocabulary, dense logits, AdamW at a constant rate.

    Returns:
        The loss of every step, and the trained student.
    """
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32).eval()
    student = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    fingerprint = reader.manifest.fingerprint
    sampler = KDBatchSampler(
        len(reader), batch_size, accumulation=accumulation, fingerprint=fingerprint, seed=seed
    )  # the same order; everything else is written anew
    losses, epoch = [], 0
    while len(losses) < steps:
        sampler.set_epoch(epoch)
        epoch += 1
        micro_batches = list(sampler)
        for start in range(0, len(micro_batches), accumulation):
            if len(losses) == steps:
                break
            losses.append(
                _step(
                    teacher, student, optimizer, reader, micro_batches[start : start + accumulation], alpha, temperature
                )
            )
    return losses, student


def _step(teacher, student, optimizer, reader, micro_batches, alpha, temperature):
    batches = [
        collate([Item(reader.tokens(i if i >= 0 else -1 - i), counts=i >= 0) for i in indices])
        for indices in micro_batches
    ]
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
        with torch.no_grad():
            t = torch.log_softmax(teacher(**inputs).logits[:, :-1, : reader.vocab_size] / temperature, -1)
        logits = student(**inputs).logits[:, :-1, : reader.vocab_size]
        labels = batch["labels"][:, 1:]
        valid = labels != -100
        cross_entropy = torch.nn.functional.cross_entropy(logits[valid], labels[valid], reduction="sum")
        s = torch.log_softmax(logits / temperature, -1)
        divergence = (t.exp() * (t - s)).sum(-1)[valid].sum()
        loss = ((1 - alpha) * cross_entropy + alpha * temperature**2 * divergence) / count
        loss.backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total
