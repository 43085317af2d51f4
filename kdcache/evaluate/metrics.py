"""Metrics over the full vocabulary, with one model in memory at a time.

The teacher is a cache, as a rule a ``hidden`` one: its last hidden states and its output head, stored once, give its logits
back without loss. Student and baseline are loaded one after the other; each position's two distributions meet in chunks, and
every number here, by document, by position or over all, is a sum of the same values of single positions.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from kdcache.calibration import NUM_BINS, calibration_error, calibration_sums
from kdcache.errors import TeacherOutputError
from kdcache.evaluate.teacher import Buckets, Said, TeacherStates
from kdcache.heads import OutputHead, check_packing, head_of, hidden_states, split_is_exact
from kdcache.model_files import find_model
from kdcache.models import check_student, load_config, load_model, load_tokenizer, parse_dtype
from kdcache.targets import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Measured at every position, in this order.
MEASURED = (
    "cross_entropy",
    "forward_kl",
    "reverse_kl",
    "top1_agreement",
    "accuracy",
    "acceptance_rate",
    "confidence",
)
FORWARD_KL = MEASURED.index("forward_kl")
ENTROPY_STEP, NUM_ENTROPY_BINS = 0.5, 16
# The teacher's logprob of a bucket counts as at least this in KL(model ‖ teacher): a stored tail of zero is a rounded one.
SMALLEST_LOGPROB = -69.0


@dataclass(slots=True)
class Metrics:
    """Means over the positions with a label; nats where a unit is needed. Not a number, all of them, of a model that gives NaN anywhere.

    Attributes:
        name: The model.
        num_parameters: Of the model.
        num_targets: Positions measured.
        cross_entropy: Of the data tokens.
        forward_kl: KL(teacher ‖ model); exact, or a lower bound where the cache holds the teacher's entries and tail only.
        reverse_kl: KL(model ‖ teacher), likewise.
        top1_agreement: Share of positions where both have the same first choice.
        accuracy: Share of positions where the first choice is the data token.
        acceptance_rate: ``sum(min(t, p))``: how often speculative decoding with this model as draft keeps its token (2211.17192); an upper
            bound where KL is a lower one.
        calibration_error: ECE, 15 equal bins of the confidence in the first choice (1706.04599).
        overconfidence: Mean confidence in the first choice minus accuracy.
        seconds: Of the measurement.
        document_sums: ``[D, len(MEASURED)]``, sums over the positions of each document. A document that was cut at the
            sequence length counts as several.
        document_sizes: ``[D]`` their positions.
        calibration: ``[NUM_BINS, 3]`` of :func:`calibration_sums`.
        by_context: ``[C, 2]``: positions, and the sum of their forward KL, where the model has read 2^c to 2^(c+1) - 1 tokens of the document.
        by_entropy: ``[NUM_ENTROPY_BINS, 2]``: the same where the teacher's entropy is from e to e + 1 times ENTROPY_STEP nats, the last
            bin being open.
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
    document_sums: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, len(MEASURED))))
    document_sizes: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    calibration: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((NUM_BINS, 3)))
    by_context: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 2)))
    by_entropy: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((NUM_ENTROPY_BINS, 2)))
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """``exp(cross_entropy)``."""
        return math.exp(min(self.cross_entropy, 700.0))

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        names = ("num_parameters", "num_targets", *MEASURED[:-1], "calibration_error", "overconfidence")
        binned = {
            "calibration": [{"positions": int(n), "confidence": c / n, "accuracy": h / n} for n, c, h in self.calibration.tolist() if n],
            "kl_by_context": [
                {"from": 2**i, "to": 2 ** (i + 1) - 1, "positions": int(n), "forward_kl": total / n}
                for i, (n, total) in enumerate(self.by_context.tolist()) if n
            ],
            "kl_by_entropy": [
                {"from": i * ENTROPY_STEP, "to": (i + 1) * ENTROPY_STEP if i + 1 < NUM_ENTROPY_BINS else None, "positions": int(n),
                 "forward_kl": total / n}
                for i, (n, total) in enumerate(self.by_entropy.tolist()) if n
            ],
        }  # fmt: skip
        return {
            "model": self.name, "perplexity": self.perplexity, **{n: getattr(self, n) for n in names}, **binned, **self.extra,
        }  # fmt: skip


# --- a model that is measured -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A student in memory.

    Attributes:
        name: As it was asked for.
        model: On its device or devices.
        tokenizer: Its own.
        head: Its output head over the teacher's vocabulary; None where the family's head is not understood.
        states: The teacher it is held against.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: OutputHead | None
    states: TeacherStates

    def forward(self, sequence: TokenSequence) -> torch.Tensor:
        """At the N positions with a label: hidden states ``[N, D]``, or logits ``[N, V]`` without a head."""
        device = self.model.get_input_embeddings().weight.device
        ids = torch.from_numpy(sequence.input_ids.astype(np.int64))[None].to(device)
        positions = torch.from_numpy(sequence.position_ids.astype(np.int64))[None].to(device)
        mask = torch.from_numpy(sequence.target_mask)
        if self.head is not None:
            hidden = hidden_states(self.model, ids, positions)[0]
            return hidden[mask.to(hidden.device)].to(self.head.weight.device)
        logits: torch.Tensor = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return logits[0][mask.to(logits.device)][:, : self.states.reader.vocab_size].float()

    def logprobs(self, rows: torch.Tensor) -> torch.Tensor:
        """``[n, V]`` of some rows of :meth:`forward`, on the device of the teacher's states."""
        logits = rows if self.head is None else self.head.logits(rows)
        return torch.log_softmax(logits.to(self.states.device), dim=1)


def load_student(
    name: str,
    states: TeacherStates,
    *,
    dtype: str = "float32",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model that is to be held against the teacher.

    Args:
        name: Of the model.
        states: The teacher.
        dtype: Of weights and activations; ``auto`` is what the model's config says.
        device_map: Spreads a model larger than one GPU: ``auto``, ``balanced`` ...
        trust_remote_code: Run code that ships with the model.

    Raises:
        CacheMismatchError: It does not speak the cache's tokens.
    """
    source = find_model(name)
    spec = states.reader.spec
    config = load_config(source, trust_remote_code=trust_remote_code) if dtype == "auto" else None
    model = load_model(
        source, dtype=parse_dtype(dtype, config), device=states.device, device_map=device_map,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    check_student(model, tokenizer, spec.tokenizer, spec.teacher.vocab_size, spec.corpus.seq_len)
    if spec.corpus.packing:
        try:
            check_packing(model)
        except TeacherOutputError as error:  # no reason to measure nothing: a diverged run is a result too
            logger.warning("%s: %s", name, error.message)
    head = head_of(model).first(states.reader.vocab_size) if split_is_exact(model) else None
    return LoadedModel(name, model, tokenizer, head, states)


def evaluate_teacher(states: TeacherStates, *, on_sequence: Callable[[int], None] = lambda done: None) -> Metrics:
    """The teacher against itself: its perplexity, and the zeros that everything else is held against."""
    spec = states.reader.spec.teacher
    return _measure(states, None, Metrics(spec.name, spec.num_parameters, extra={"dtype": spec.dtype}), on_sequence)


def evaluate_loaded(loaded: LoadedModel, *, on_sequence: Callable[[int], None] = lambda done: None) -> Metrics:
    """A model against the teacher."""
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    metrics = Metrics(loaded.name, sum(p.numel() for p in loaded.model.parameters()), extra={"dtype": dtype})
    return _measure(loaded.states, loaded, metrics, on_sequence)


def evaluate_model(
    name: str,
    states: TeacherStates,
    *,
    trust_remote_code: bool = False,
    on_sequence: Callable[[int], None] = lambda done: None,
) -> Metrics:
    """Load a model, hold it against the teacher, let it go.

    Raises:
        CacheMismatchError: It does not speak the cache's tokens.
    """
    return evaluate_loaded(load_student(name, states, trust_remote_code=trust_remote_code), on_sequence=on_sequence)


@torch.inference_mode()
def _measure(
    states: TeacherStates, loaded: LoadedModel | None, metrics: Metrics, on_sequence: Callable[[int], None]
) -> Metrics:
    started = time.monotonic()
    longest = states.reader.spec.corpus.seq_len
    metrics.by_context = np.zeros((longest.bit_length(), 2))
    sums, sizes = [], []
    for index in range(len(states.reader)):
        said = states.read(index)
        values = sequence_values(states, loaded, said)
        more_sums, more_sizes = _by_document(said.sequence, values)
        sums.append(more_sums)
        sizes.append(more_sizes)
        _add_bins(metrics, said, values)
        on_sequence(index + 1)
    metrics.document_sums, metrics.document_sizes = np.concatenate(sums), np.concatenate(sizes)
    metrics.num_targets = int(metrics.document_sizes.sum())
    means = metrics.document_sums.sum(0) / max(metrics.num_targets, 1)
    for name, value in zip(MEASURED, means.tolist(), strict=True):
        if name != "confidence":
            setattr(metrics, name, value)
    metrics.overconfidence = float(means[MEASURED.index("confidence")]) - metrics.accuracy
    metrics.calibration_error = calibration_error(torch.from_numpy(metrics.calibration))
    metrics.seconds = time.monotonic() - started
    return metrics


def sequence_values(states: TeacherStates, loaded: LoadedModel | None, said: Said) -> npt.NDArray[np.float64]:
    """``[N, len(MEASURED)]`` of one sequence, a chunk of positions at a time. None measures the teacher itself."""
    own = None if loaded is None else loaded.forward(said.sequence)
    label_logprobs = torch.tensor(said.targets.label_logprobs).to(states.device)
    parts = [torch.zeros(0, len(MEASURED))]
    for start in range(0, len(said.labels), states.chunk):
        rows = slice(start, start + states.chunk)
        teacher = states.buckets(said, start, start + states.chunk)
        if loaded is None or own is None:
            parts.append(teacher_values(teacher, said.labels[rows], label_logprobs[rows]).cpu())
        else:
            parts.append(position_values(teacher, loaded.logprobs(own[rows]), said.labels[rows]).cpu())
    return torch.cat(parts).double().numpy()


def position_values(teacher: Buckets, model: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What is measured of ``[N, V]`` logprobs at each position: ``[N, len(MEASURED)]``; NaN where the model's are."""
    top, first_choice = model.max(1)
    t, m = teacher.logprobs, teacher.of(model)
    t_p, m_p = t.exp(), m.exp()
    # Of tokens a model's logprob is finite; of a tail it is not where nothing is left out, and then the teacher's mass is rounding.
    forward = torch.where((t_p > 0) & m.isfinite(), t_p * (t - m), 0.0)
    reverse = torch.where(m_p > 0, m_p * (m - t.clamp(min=SMALLEST_LOGPROB)), 0.0)
    values = torch.stack(
        [
            -model.gather(1, labels[:, None])[:, 0],
            forward.sum(1),
            reverse.sum(1),
            (first_choice == teacher.top(1)[1][:, 0]).float(),
            (first_choice == labels).float(),
            torch.minimum(t_p, m_p).sum(1),
            top.exp(),
        ],
        dim=1,
    )
    # A comparison with NaN is False: a model that says nothing would be at no distance from the teacher.
    return values.masked_fill(top.isnan()[:, None], torch.nan)


def teacher_values(teacher: Buckets, labels: torch.Tensor, label_logprobs: torch.Tensor) -> torch.Tensor:
    """The same of the teacher, which is at no distance from itself. ``label_logprobs [N]`` serve where buckets are few."""
    if teacher.token_ids is None:
        label_logprobs = teacher.logprobs.gather(1, labels[:, None])[:, 0]
    top, first_choice = (part[:, 0] for part in teacher.top(1))
    none, all_ = torch.zeros_like(top), torch.ones_like(top)
    return torch.stack([-label_logprobs, none, none, all_, (first_choice == labels).float(), all_, top.exp()], dim=1)


def _by_document(
    sequence: TokenSequence, values: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Sums and numbers of positions of the documents that have a label."""
    at = np.flatnonzero(sequence.target_mask)
    document = np.searchsorted(sequence.document_starts, at, side="right") - 1
    sizes = np.bincount(document, minlength=len(sequence.document_starts))
    sums = np.zeros((len(sizes), values.shape[1]))
    np.add.at(sums, document, values)
    return sums[sizes > 0], sizes[sizes > 0].astype(np.int64)


def _add_bins(metrics: Metrics, said: Said, values: npt.NDArray[np.float64]) -> None:
    """Calibration, and forward KL by tokens read and by the teacher's entropy."""
    confidence, hit = values[:, MEASURED.index("confidence")], values[:, MEASURED.index("accuracy")]
    metrics.calibration += calibration_sums(torch.from_numpy(confidence), torch.from_numpy(hit)).numpy()
    kl = np.stack([np.ones(len(values)), values[:, FORWARD_KL]], axis=1)
    num_read = said.sequence.position_ids[said.sequence.target_mask].astype(np.int64) + 1
    np.add.at(metrics.by_context, np.frexp(num_read)[1] - 1, kl)
    entropy_bin = (said.targets.entropy / ENTROPY_STEP).astype(np.int64).clip(0, NUM_ENTROPY_BINS - 1)
    np.add.at(metrics.by_entropy, entropy_bin, kl)
