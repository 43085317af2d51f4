"""Exact metrics over the full vocabulary, with one model in memory at a time.

The teacher is a ``hidden`` cache: its last hidden states and its output head, stored once, give its logits back without
loss. Student and baseline are loaded one after the other; each position's two distributions meet in chunks and leave sums.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdcache.cache.reader import CacheReader
from kdcache.calibration import NUM_BINS, calibration_error, calibration_sums, overconfidence
from kdcache.heads import OutputHead, check_packing, head_of, hidden_states, split_is_exact
from kdcache.model_files import find_model
from kdcache.models import check_student, load_model, load_tokenizer
from kdcache.targets import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU_CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS = 1 << 24, 1 << 27


@dataclass(slots=True)
class Metrics:
    """Means over the positions with a label; nats where a unit is needed.

    Attributes:
        name: The model.
        num_parameters: Of the model.
        num_targets: Positions measured.
        cross_entropy: Of the data tokens.
        forward_kl: KL(teacher ‖ model), exact.
        reverse_kl: KL(model ‖ teacher), exact.
        top1_agreement: Share of positions where both have the same first choice.
        accuracy: Share of positions where the first choice is the data token.
        acceptance_rate: ``sum(min(t, p))``: how often speculative decoding with this model as draft keeps its token (2211.17192).
        calibration_error: ECE, 15 equal bins of the confidence in the first choice (1706.04599).
        overconfidence: Mean confidence in the first choice minus accuracy.
        seconds: Of the measurement.
    """

    name: str
    num_parameters: int
    num_targets: int = 0
    cross_entropy: float = 0.0
    forward_kl: float = 0.0
    reverse_kl: float = 0.0
    top1_agreement: float = 0.0
    accuracy: float = 0.0
    acceptance_rate: float = 0.0
    calibration_error: float = 0.0
    overconfidence: float = 0.0
    seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """``exp(cross_entropy)``."""
        return math.exp(min(self.cross_entropy, 700.0))

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        names = (
            "num_parameters",
            "num_targets",
            "cross_entropy",
            "forward_kl",
            "reverse_kl",
            "top1_agreement",
            "accuracy",
            "acceptance_rate",
            "calibration_error",
            "overconfidence",
        )
        return {"model": self.name, "perplexity": self.perplexity, **{n: getattr(self, n) for n in names}, **self.extra}


class TeacherStates:
    """The teacher's side of a ``hidden`` cache.

    Raises:
        CacheNotFoundError: The cache holds something else than hidden states.
    """

    def __init__(self, reader: CacheReader, device: str) -> None:
        self.reader = reader
        self.head = OutputHead.from_bytes(reader.head_bytes()).to(device)
        self.device = device

    def read(self, index: int) -> tuple[TokenSequence, torch.Tensor, torch.Tensor]:
        """Tokens, hidden states ``[N, D]`` and labels ``[N]`` of a sequence."""
        row = self.reader[index]
        assert row.targets.hidden is not None, "a hidden cache holds hidden states"
        labels = row.sequence.input_ids[1:][row.sequence.target_mask[:-1]].astype(np.int64)
        return (
            row.sequence,
            torch.tensor(row.targets.hidden).to(self.device),
            torch.from_numpy(labels).to(self.device),
        )


def evaluate_teacher(states: TeacherStates, *, on_sequence: Callable[[int], None] = lambda done: None) -> Metrics:
    """The teacher against itself: its perplexity, and the zeros that everything else is held against."""
    spec = states.reader.spec.teacher
    return _evaluate(states, lambda sequence: None, states.head, Metrics(spec.name, spec.num_parameters), on_sequence)


def evaluate_model(
    name: str,
    states: TeacherStates,
    *,
    trust_remote_code: bool = False,
    on_sequence: Callable[[int], None] = lambda done: None,
) -> Metrics:
    """Load a model, hold it against the teacher's states, let it go.

    Raises:
        CacheMismatchError: It does not speak the cache's tokens.
    """
    source = find_model(name)
    spec = states.reader.spec
    model = load_model(source, dtype=torch.float32, device=states.device, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    check_student(model, tokenizer, spec.tokenizer, spec.teacher.vocab_size, spec.corpus.seq_len)
    if spec.corpus.packing:
        check_packing(model)
    metrics = Metrics(name, sum(p.numel() for p in model.parameters()))
    if split_is_exact(model):
        head = head_of(model).first(states.reader.vocab_size)
        return _evaluate(states, lambda sequence: _hidden(model, sequence, states.device), head, metrics, on_sequence)
    return _evaluate(states, lambda sequence: _logits(model, sequence, states), None, metrics, on_sequence)


def _inputs(sequence: TokenSequence, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.from_numpy(sequence.input_ids.astype(np.int64))[None].to(device)
    positions = torch.from_numpy(sequence.position_ids.astype(np.int64))[None].to(device)
    return ids, positions, torch.from_numpy(sequence.target_mask).to(device)


def _hidden(model: PreTrainedModel, sequence: TokenSequence, device: str) -> torch.Tensor:
    ids, positions, mask = _inputs(sequence, device)
    return hidden_states(model, ids, positions)[0][mask]


def _logits(model: PreTrainedModel, sequence: TokenSequence, states: TeacherStates) -> torch.Tensor:
    ids, positions, mask = _inputs(sequence, states.device)
    logits: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return logits[0][mask][:, : states.reader.vocab_size].float()


@torch.inference_mode()
def _evaluate(
    states: TeacherStates,
    forward: Callable[[TokenSequence], torch.Tensor | None],
    head: OutputHead | None,
    metrics: Metrics,
    on_sequence: Callable[[int], None],
) -> Metrics:
    """Sums over all positions. ``forward`` gives hidden states for ``head``, logits where that is None, None for the teacher."""
    started = time.monotonic()
    sums, bins = torch.zeros(6, dtype=torch.float64), torch.zeros(NUM_BINS, 3, dtype=torch.float64)
    elements = CPU_CHUNK_ELEMENTS if states.device == "cpu" else GPU_CHUNK_ELEMENTS
    chunk = max(16, elements // states.reader.vocab_size)
    for index in range(len(states.reader)):
        sequence, hidden_teacher, labels = states.read(index)
        own = forward(sequence)
        for start in range(0, len(labels), chunk):
            rows = slice(start, start + chunk)
            teacher = torch.log_softmax(states.head.logits(hidden_teacher[rows]), dim=1)
            model = teacher
            if own is not None:
                model = torch.log_softmax(own[rows] if head is None else head.logits(own[rows]), dim=1)
            more_sums, more_bins = position_sums(teacher, model, labels[rows])
            sums, bins = sums + more_sums, bins + more_bins
        metrics.num_targets += len(labels)
        on_sequence(index + 1)
    names = ("cross_entropy", "forward_kl", "reverse_kl", "top1_agreement", "accuracy", "acceptance_rate")
    for name, value in zip(names, (sums / max(metrics.num_targets, 1)).tolist(), strict=True):
        setattr(metrics, name, value)
    metrics.calibration_error, metrics.overconfidence = calibration_error(bins), overconfidence(bins)
    metrics.seconds = time.monotonic() - started
    return metrics


def position_sums(
    teacher: torch.Tensor, model: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over ``[N, V]`` logprobs.

    Returns:
        ``[6]``: cross-entropy, forward KL, reverse KL, agreement, accuracy, acceptance; and the
        ``calibration_sums`` of the model's first choices.
    """
    top, first_choice = model.max(1)
    teacher_p, model_p = teacher.exp(), model.exp()
    hit = first_choice == labels
    sums = torch.stack(
        [
            -model.gather(1, labels[:, None]).sum(),
            (teacher_p * (teacher - model)).sum(),
            (model_p * (model - teacher)).sum(),
            (first_choice == teacher.argmax(1)).sum(),
            hit.sum(),
            torch.minimum(teacher_p, model_p).sum(),
        ]
    )
    return sums.double().cpu(), calibration_sums(top.exp(), hit).double().cpu()
