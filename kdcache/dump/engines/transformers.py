"""The default engine: any causal LM of transformers, its trunk once, its head a chunk of positions at a time.

Logits never exist for more than a chunk. Other teachers can be averaged in (:class:`kdcache.dump.average.Averaged`): their
logits come from their ``hidden`` caches, so that two teachers are never in memory together. Padded rows of the vocabulary are left out before anything is selected. When
memory runs out a batch is halved and done again; the commit says how often. A model whose head is not understood
(:func:`kdcache.heads.split_is_exact`) is run whole instead, one sequence at a time, with one warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from kdcache.dump.average import Averaged, average_logits
from kdcache.dump.draw import position_uniforms
from kdcache.dump.select import Selected, select
from kdcache.errors import ModelError, TeacherOutputError
from kdcache.heads import OutputHead, head_of, hidden_states, split_is_exact
from kdcache.specs import DRAWN, TargetSpec
from kdcache.targets import SparseTargets, TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What the trunk gave for a batch: everything that logits are made of.

    Attributes:
        given: ``[N, D]`` hidden states of the positions with targets; ``[N, V]`` logits where the head is not understood.
        labels: ``[N]`` int64.
        sizes: Targets of each sequence.
    """

    given: torch.Tensor
    labels: torch.Tensor
    sizes: list[int]
    _to_logits: Callable[[torch.Tensor], torch.Tensor]
    _averaged: Sequence[Averaged]
    _others: list[torch.Tensor]

    def chunks(self, chunk_positions: int) -> list[slice]:
        """All N positions, so many at a time."""
        return [slice(start, start + chunk_positions) for start in range(0, len(self.given), chunk_positions)]

    def logits(self, rows: slice) -> torch.Tensor:
        """``[C, V]`` of some of the positions."""
        return average_logits(
            self._to_logits(self.given[rows]), self._averaged, [other[rows] for other in self._others]
        )


@dataclass(slots=True)
class TransformersEngine:
    """A loaded teacher.

    Attributes:
        model: In eval mode, on its device or devices.
        vocab_size: V, the tokens without padded rows.
        targets: What to keep of each position.
        chunk_positions: Positions whose logits may exist at a time.
        averaged: Teachers whose logits are averaged in; this one has the rest of the weight.
        num_splits: Batches halved so far because memory ran out.
    """

    model: PreTrainedModel
    vocab_size: int
    targets: TargetSpec
    chunk_positions: int
    averaged: Sequence[Averaged] = ()
    num_splits: int = 0
    head: OutputHead | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.model.eval()
        if split_is_exact(self.model):
            self.head = head_of(self.model).first(self.vocab_size)
        elif self.targets.scheme == "hidden":
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
    def run(self, batch: list[TokenSequence], sequence_ids: Sequence[int] | None = None) -> list[SparseTargets]:
        """Targets of each sequence of a batch. Their ids key random draws; without them they are numbered from 0.

        Raises:
            TeacherOutputError: NaN or Inf.
            ModelError: One sequence alone does not fit into memory.
        """
        sequence_ids = range(len(batch)) if sequence_ids is None else sequence_ids
        if self.head is None and len(batch) > 1:
            return [t for sequence, name in zip(batch, sequence_ids, strict=True) for t in self.run([sequence], [name])]
        return self.halving(
            lambda rows: self._run(batch[rows], sequence_ids[rows]),
            slice(0, len(batch)),
            lambda row: (f"a sequence of {len(batch[row])} tokens does not fit into memory", "--seq-len"),
        )

    def halving(
        self, job: Callable[[slice], list[ResultT]], rows: slice, too_large: Callable[[int], tuple[str, str]]
    ) -> list[ResultT]:
        """The results of a job over some rows of a batch; half of them at a time where memory runs out.

        Args:
            job: Gives a result for each of the rows.
            rows: Which, from a start to a stop.
            too_large: Says of a row that does not fit alone, and names the option that makes rows shorter.

        Raises:
            ModelError: One row alone does not fit into memory.
        """
        number = rows.stop - rows.start
        try:
            return job(rows)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if number == 1:
                what, option = too_large(rows.start)
                raise ModelError(
                    f"{what}: {str(error).splitlines()[0]}",
                    hint=f"use a smaller {option}, --device-map auto over more GPUs, or --dtype bfloat16",
                ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.num_splits += 1
        logger.warning("memory ran out at %d sequences; going on with half as many", number)
        middle = rows.start + number // 2
        first, second = slice(rows.start, middle), slice(middle, rows.stop)
        return self.halving(job, first, too_large) + self.halving(job, second, too_large)

    def _run(self, batch: list[TokenSequence], sequence_ids: Sequence[int]) -> list[SparseTargets]:
        read = self.read(batch)
        uniforms = self.uniforms(self.targets, batch, sequence_ids, read.given.device)
        chunks = []
        for rows in read.chunks(self.chunk_positions):
            chunk_uniforms = None if uniforms is None else uniforms[rows]
            chunks.append(select(read.logits(rows), read.labels[rows], self.targets, chunk_uniforms))
        keep_hidden = self.targets.scheme == "hidden"
        return self.split(self.targets, chunks, read.given if keep_hidden else None, read.sizes)

    def read(self, batch: list[TokenSequence]) -> Reading:
        """Run the trunk over a batch; logits are made of what it gives a chunk at a time."""
        input_ids, position_ids = (t.to(self.model.get_input_embeddings().weight.device) for t in pad_batch(batch))
        masks = np.zeros(tuple(input_ids.shape), dtype=bool)
        for row, sequence in enumerate(batch):
            masks[row, : len(sequence)] = sequence.target_mask
        valid = torch.from_numpy(masks)
        labels_N = input_ids.roll(-1, dims=1)[valid.to(input_ids.device)]
        if self.head is not None:
            hidden_BTD = hidden_states(self.model, input_ids, position_ids)
            given_NX = hidden_BTD[valid.to(hidden_BTD.device)].to(self.head.weight.device)
            to_logits: Callable[[torch.Tensor], torch.Tensor] = self.head.logits_as_computed
        else:
            logits_BTV = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
            given_NX = logits_BTV[valid.to(logits_BTV.device)][:, : self.vocab_size]
            to_logits = _as_they_are
        others = [averaged.hidden(batch) for averaged in self.averaged]
        sizes = [int(mask.sum()) for mask in masks]
        return Reading(given_NX, labels_N.to(given_NX.device), sizes, to_logits, self.averaged, others)

    @staticmethod
    def uniforms(
        targets: TargetSpec, batch: list[TokenSequence], sequence_ids: Sequence[int], device: torch.device
    ) -> torch.Tensor | None:
        """The random numbers of a batch's positions, for a scheme that draws."""
        if targets.scheme not in DRAWN:
            return None
        parts = [
            position_uniforms(targets, name, sequence.target_mask)
            for sequence, name in zip(batch, sequence_ids, strict=True)
        ]
        return torch.from_numpy(np.concatenate(parts)).to(device)

    def split(
        self, targets: TargetSpec, chunks: list[Selected], hidden_ND: torch.Tensor | None, sizes: list[int]
    ) -> list[SparseTargets]:
        """Back to the host, a sequence at a time."""
        per_position: dict[str, np.ndarray] = {}
        per_entry: dict[str, np.ndarray] = {}
        if chunks:
            used = [
                torch.arange(c.token_ids.shape[1], device=c.token_ids.device) < c.num_entries[:, None] for c in chunks
            ]
            for name in ("num_entries", "tail_logprobs", "logz", "label_logprobs", "entropy"):
                per_position[name] = np.concatenate([getattr(chunk, name).cpu().numpy() for chunk in chunks])
            names = ("token_ids", "logprobs", *(("counts",) if chunks[0].counts is not None else ()))
            for name in names:
                parts = [getattr(chunk, name)[mask].cpu().numpy() for chunk, mask in zip(chunks, used, strict=True)]
                per_entry[name] = np.concatenate(parts)
        hidden = None if hidden_ND is None else hidden_ND.float().cpu().numpy()
        ends = np.cumsum([0, *sizes])
        out = []
        for start, end in pairwise(ends):
            if start == end:
                raise ModelError("a sequence without anything to learn reached the teacher")
            part = {name: array[start:end] for name, array in per_position.items()}
            first = int(per_position["num_entries"][:start].sum())
            last = first + int(part["num_entries"].sum())
            entries = {name: array[first:last] for name, array in per_entry.items()}
            self._check_finite(part | entries)
            out.append(
                SparseTargets(
                    temperatures=targets.temperatures,
                    num_entries=part["num_entries"].astype(np.uint32),
                    token_ids=entries["token_ids"].astype(np.uint32),
                    logprobs=entries["logprobs"],
                    tail_logprobs=part["tail_logprobs"],
                    logz=part["logz"],
                    label_logprobs=part["label_logprobs"],
                    entropy=part["entropy"],
                    hidden=None if hidden is None else hidden[start:end],
                    counts=entries["counts"].astype(np.uint16) if "counts" in entries else None,
                )
            )
        return out

    def _check_finite(self, part: dict[str, np.ndarray]) -> None:
        for name in ("logz", "logprobs", "label_logprobs", "entropy"):
            if not np.isfinite(part[name]).all():
                raise TeacherOutputError(f"the teacher's {name} are NaN or Inf")


def _as_they_are(logits: torch.Tensor) -> torch.Tensor:
    return logits


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
