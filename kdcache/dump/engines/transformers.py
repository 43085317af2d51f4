"""The default engine: any causal LM of transformers, its trunk once, its head a chunk of positions at a time.

Logits never exist for more than a chunk. Padded rows of the vocabulary are left out before anything is selected. When
memory runs out a batch is halved and done again; the commit says how often. A model whose head is not understood
(:func:`kdcache.heads.split_is_exact`) is run whole instead, one sequence at a time, with one warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from kdcache.dump.select import Selected, select_top_k
from kdcache.errors import ModelError, TeacherOutputError
from kdcache.heads import OutputHead, head_of, hidden_states, split_is_exact
from kdcache.targets import SparseTargets, TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class TransformersEngine:
    """A loaded teacher.

    Attributes:
        model: In eval mode, on its device or devices.
        vocab_size: V, the tokens without padded rows.
        k: Entries a position; 0 for the ``hidden`` scheme.
        temperatures: The first is 1.
        chunk_positions: Positions whose logits may exist at a time.
        keep_hidden: Give hidden states as well (the ``hidden`` scheme).
        num_splits: Batches halved so far because memory ran out.
    """

    model: PreTrainedModel
    vocab_size: int
    k: int
    temperatures: tuple[float, ...]
    chunk_positions: int
    keep_hidden: bool = False
    num_splits: int = 0
    head: OutputHead | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.model.eval()
        if split_is_exact(self.model):
            self.head = head_of(self.model).first(self.vocab_size)
        elif self.keep_hidden:
            raise ModelError(
                f"{type(self.model).__name__}: its output head is not understood, so hidden states do not give its logits",
                hint="dump with --targets top_k",
            )
        else:
            logger.warning(
                "%s: its output head is not understood; using the model's own logits, a sequence at a time",
                type(self.model).__name__,
            )

    @torch.inference_mode()
    def run(self, batch: list[TokenSequence]) -> list[SparseTargets]:
        """Targets of each sequence of a batch.

        Raises:
            TeacherOutputError: NaN or Inf.
            ModelError: One sequence alone does not fit into memory.
        """
        if self.head is None and len(batch) > 1:
            return [targets for sequence in batch for targets in self.run([sequence])]
        try:
            return self._run(batch)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise ModelError(
                    f"a sequence of {len(batch[0])} tokens does not fit into memory: {str(error).splitlines()[0]}",
                    hint="use a smaller --seq-len, --device-map auto over more GPUs, or --dtype bfloat16",
                ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.num_splits += 1
        logger.warning("memory ran out at %d sequences; going on with half as many", len(batch))
        middle = len(batch) // 2
        return self.run(batch[:middle]) + self.run(batch[middle:])

    def _run(self, batch: list[TokenSequence]) -> list[SparseTargets]:
        input_ids, position_ids = (t.to(self.model.get_input_embeddings().weight.device) for t in pad_batch(batch))
        masks = np.zeros(tuple(input_ids.shape), dtype=bool)
        for row, sequence in enumerate(batch):
            masks[row, : len(sequence)] = sequence.target_mask
        valid = torch.from_numpy(masks)
        labels_N = input_ids.roll(-1, dims=1)[valid.to(input_ids.device)]
        if self.head is not None:
            hidden_BTD = hidden_states(self.model, input_ids, position_ids)
            hidden_ND = hidden_BTD[valid.to(hidden_BTD.device)].to(self.head.weight.device)
            selected = self._select(hidden_ND, self.head.logits_as_computed, labels_N.to(hidden_ND.device))
        else:
            logits_BTV = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
            hidden_ND = logits_BTV[valid.to(logits_BTV.device)][:, : self.vocab_size]
            selected = self._select(hidden_ND, lambda logits: logits, labels_N.to(hidden_ND.device))
        return self._split(selected, hidden_ND if self.keep_hidden else None, [int(mask.sum()) for mask in masks])

    def _select(
        self, hidden_ND: torch.Tensor, to_logits: Callable[[torch.Tensor], torch.Tensor], labels_N: torch.Tensor
    ) -> list[Selected]:
        return [
            select_top_k(
                to_logits(hidden_ND[i : i + self.chunk_positions]),
                labels_N[i : i + self.chunk_positions],
                k=min(self.k, self.vocab_size),
                temperatures=self.temperatures,
            )
            for i in range(0, len(hidden_ND), self.chunk_positions)
        ]

    def _split(self, chunks: list[Selected], hidden_ND: torch.Tensor | None, sizes: list[int]) -> list[SparseTargets]:
        """Back to the host, a sequence at a time."""
        whole = (
            {
                name: np.concatenate([getattr(chunk, name).cpu().numpy() for chunk in chunks])
                for name in ("token_ids", "logprobs", "tail_logprobs", "logz", "label_logprobs", "entropy")
            }
            if chunks
            else {}
        )
        hidden = None if hidden_ND is None else hidden_ND.float().cpu().numpy()
        ends = np.cumsum([0, *sizes])
        out = []
        for start, end in pairwise(ends):
            if start == end:
                raise ModelError("a sequence without anything to learn reached the teacher")
            part = {name: array[start:end] for name, array in whole.items()}
            self._check_finite(part)
            k = part["token_ids"].shape[1]
            out.append(
                SparseTargets(
                    temperatures=self.temperatures,
                    num_entries=np.full(end - start, k, dtype=np.uint32),
                    token_ids=part["token_ids"].astype(np.uint32).ravel(),
                    logprobs=part["logprobs"].ravel(),
                    tail_logprobs=part["tail_logprobs"],
                    logz=part["logz"],
                    label_logprobs=part["label_logprobs"],
                    entropy=part["entropy"],
                    hidden=None if hidden is None else hidden[start:end],
                )
            )
        return out

    def _check_finite(self, part: dict[str, np.ndarray]) -> None:
        for name in ("logz", "logprobs", "label_logprobs", "entropy"):
            if not np.isfinite(part[name]).all():
                raise TeacherOutputError(f"the teacher's {name} are NaN or Inf")


def pad_batch(batch: list[TokenSequence]) -> tuple[torch.Tensor, torch.Tensor]:
    """``[B, T]`` token ids and position ids, padded on the right; positions run on through the padding."""
    length = max(len(sequence) for sequence in batch)
    input_ids = np.zeros((len(batch), length), dtype=np.int64)
    position_ids = np.zeros((len(batch), length), dtype=np.int64)
    for row, sequence in enumerate(batch):
        n = len(sequence)
        input_ids[row, :n] = sequence.input_ids
        positions = sequence.position_ids.astype(np.int64)
        position_ids[row, :n] = positions
        position_ids[row, n:] = positions[-1] + 1 + np.arange(length - n)
    return torch.from_numpy(input_ids), torch.from_numpy(position_ids)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "can't allocate memory" in text or "out of memory" in text
    )
