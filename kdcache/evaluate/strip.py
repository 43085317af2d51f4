"""One held-out document, token by token: how far the student is from the teacher at each of them, and what both would have said."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kdcache.evaluate.metrics import FORWARD_KL, LoadedModel, Metrics, sequence_values

LONGEST, SHORTEST, NUM_CHOICES = 160, 24, 3


def typical_document(metrics: Metrics) -> int:
    """The document whose mean KL is the median of those that are long enough to read (of all, where none is)."""
    sizes = metrics.document_sizes
    mean = metrics.document_sums[:, FORWARD_KL] / sizes
    long = np.flatnonzero(sizes >= min(SHORTEST, int(sizes.max())))
    return int(long[np.argsort(mean[long], kind="stable")[(len(long) - 1) // 2]])


@torch.inference_mode()
def token_strip(loaded: LoadedModel, document: int) -> dict[str, Any]:
    """The first tokens of a document, in the order of ``Metrics.document_sums``.

    Returns:
        ``before`` (text of the tokens that have no label before the first that does), ``tokens``: a dict each of ``text``,
        ``forward_kl`` (nats), ``teacher`` and ``student`` (first choices, as ``[text, probability]``), and ``probability``,
        the student's of the token.
    """
    states, tokenizer = loaded.states, loaded.tokenizer
    for index in range(len(states.reader)):
        said = states.read(index)
        at = np.flatnonzero(said.sequence.target_mask)
        which = np.searchsorted(said.sequence.document_starts, at, side="right") - 1
        documents = np.unique(which)
        if document < len(documents):
            break
        document -= len(documents)
    rows = np.flatnonzero(which == documents[document])[:LONGEST]
    start, stop = int(rows[0]), int(rows[-1]) + 1
    kl = sequence_values(states, loaded, said)[start:stop, FORWARD_KL]
    student = loaded.logprobs(loaded.forward(said.sequence)[start:stop])
    their, our = states.buckets(said, start, stop).top(NUM_CHOICES), student.topk(NUM_CHOICES)
    labels = said.labels[start:stop]
    own = student.gather(1, labels[:, None])[:, 0].exp().tolist()

    def choices(found: tuple[torch.Tensor, torch.Tensor], row: int) -> list[list[Any]]:
        pairs = zip(found[1][row].tolist(), found[0][row].exp().tolist(), strict=True)
        return [[tokenizer.decode([token]), probability] for token, probability in pairs if probability > 0]

    ids = said.sequence.input_ids
    first = int(said.sequence.document_starts[documents[document]])
    return {
        "before": tokenizer.decode(ids[first : int(at[start]) + 1].tolist()),
        "tokens": [
            {"text": tokenizer.decode([label]), "forward_kl": float(kl[row]), "probability": own[row],
             "teacher": choices(their, row), "student": choices((our.values, our.indices), row)}
            for row, label in enumerate(labels.tolist())
        ],
    }  # fmt: skip
