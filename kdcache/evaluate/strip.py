"""One held-out document, token by token: how far the student is from the teacher at each of them, and what both would have said."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdcache.evaluate.metrics import FORWARD_KL, LoadedModel, Metrics, sequence_values

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST, SHORTEST, NUM_CHOICES = 160, 24, 3
# Tokens before those of interest that are decoded with them.
CONTEXT = 16
# What decoders write for bytes that are no character, such as the first of one.
BROKEN = "\ufffd"


def typical_document(metrics: Metrics) -> int:
    """The document whose mean KL is the median of those that are long enough to read (of all, where none is)."""
    sizes = metrics.document_sizes
    mean = metrics.document_sums[:, FORWARD_KL] / sizes
    long = np.flatnonzero(sizes >= min(SHORTEST, int(sizes.max())))
    return int(long[np.argsort(mean[long], kind="stable")[(len(long) - 1) // 2]])


class TextSoFar:
    """What each further token adds to a text.

    A token alone does not tell: decoders drop a space at the beginning, and a character may be cut over several tokens. It
    belongs to the last of them here, so that the parts joined are the whole.

    Args:
        tokenizer: Any.
        ids: Tokens that are there already.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self.before = self._decode(ids).rstrip(BROKEN)
        self._ids = ids[-CONTEXT:]
        self._length = len(self._decode(self._ids).rstrip(BROKEN))

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def added_by(self, token: int) -> str:
        """Text; empty where the token leaves a character unfinished."""
        return self._decode([*self._ids, token]).rstrip(BROKEN)[self._length :]

    def shown(self, token: int) -> str:
        """The same, for a token that is looked at by itself: where it adds no text, its name in the vocabulary."""
        return self.added_by(token).lstrip(BROKEN) or str(self._tokenizer.convert_ids_to_tokens(token))

    def add(self, token: int) -> str:
        """Go on with a token; what it has added."""
        text = self.added_by(token)
        self._ids.append(token)
        self._length += len(text)
        return text


@torch.inference_mode()
def token_strip(loaded: LoadedModel, document: int) -> dict[str, Any]:
    """The first tokens of a document, in the order of ``Metrics.document_sums``.

    Returns:
        ``before`` (text of the tokens that have no label before the first that does), ``tokens``: a dict each of ``text``,
        ``shown`` (the same, or the token's name where it is only a part of a character), ``forward_kl`` (nats), ``teacher`` and
        ``student`` (first choices of the model, whatever its role, as ``[text, probability]``), and ``probability``, the model's of the token.
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
    first = int(said.sequence.document_starts[documents[document]])
    text = TextSoFar(tokenizer, said.sequence.input_ids[first : int(at[start]) + 1].tolist())

    def choices(found: tuple[torch.Tensor, torch.Tensor], row: int) -> list[list[Any]]:
        pairs = zip(found[1][row].tolist(), found[0][row].exp().tolist(), strict=True)
        return [[text.shown(token), probability] for token, probability in pairs if probability > 0]

    tokens = []
    before = text.before
    for row, label in enumerate(labels.tolist()):
        told = {"teacher": choices(their, row), "student": choices((our.values, our.indices), row)}
        shown = text.shown(label)
        tokens.append(
            {"text": text.add(label), "shown": shown, "forward_kl": float(kl[row]), "probability": own[row], **told}
        )
    return {"before": before, "tokens": tokens}
