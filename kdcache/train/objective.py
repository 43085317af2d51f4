"""What a step is given and what it gives: targets on the training device, the objective, sums over positions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kdcache.calibration import NUM_BINS
from kdcache.errors import ConfigError
from kdcache.heads import OutputHead
from kdcache.targets import SparseTargets, in_rectangle
from kdcache.train.losses import LOG_FLOOR, Divergence, forward_kl

# The first is the label's; the last two are of rollouts; those in between are 0 without targets.
PARTS = (
    "cross_entropy",
    "divergence",
    "forward_kl",
    "top1_agreement",
    "student_tail_mass",
    "teacher_tail_mass",
    "acceptance_rate",
    "staleness",
    "rollout_share",
)
NUM_TEACHER_PARTS = len(PARTS) - 3
NUM_SUMS = 1 + len(PARTS) + 3 * NUM_BINS


@dataclass(frozen=True, slots=True, eq=False)
class BucketTargets:
    """The teacher's distribution at one temperature over kept entries and tail, on the training device.

    Attributes:
        token_ids: ``[N, K]`` int64. Unused slots repeat the position's first id.
        logprobs: ``[N, K]`` float32, ``-inf`` in unused slots.
        tail_logprobs: ``[N]`` float32.
        ratios: ``[N, K]`` float32, ``tau / t`` of entries that were drawn (``SparseTargets.weights_at``), 0 in unused slots;
            None where entries and tail are the distribution.
        temperature: T.
        excess: ``[N]`` float32, where the logprobs are only those of frequencies: the entropy of these minus the teacher's, in nats,
            which makes KL(frequencies ‖ student) an estimate of KL(teacher ‖ student). None elsewhere.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    tail_logprobs: torch.Tensor
    ratios: torch.Tensor | None = None
    temperature: float = 1.0
    excess: torch.Tensor | None = None

    @staticmethod
    def of(targets: Sequence[SparseTargets], temperature: float, device: torch.device | str = "cpu") -> BucketTargets:
        """Of the positions of several sequences, one after the other.

        Raises:
            ConfigError: The temperature is not declared, or the targets are hidden states (``TargetDecoder`` reads those).
        """
        if any(one.hidden is not None for one in targets):
            raise ConfigError(
                "hidden targets are not entries and a tail",
                hint="TargetDecoder.for_cache(cache, temperature, device) reads them with the teacher's head",
            )
        used, entry = in_rectangle(np.concatenate([one.num_entries for one in targets]))
        logprobs, tails = zip(*(one.at_temperature(temperature) for one in targets), strict=True)

        def padded(values: Iterable[np.ndarray], unused: float) -> torch.Tensor:
            return torch.from_numpy(np.where(used, np.concatenate(list(values))[entry], np.float32(unused))).to(device)

        ids = np.concatenate([one.token_ids for one in targets]).astype(np.int64)[entry]
        logprobs_NK = padded(logprobs, -np.inf)
        ratios_NK = None
        if targets[0].counts is not None:
            weights_NK = padded((one.weights_at(temperature) for one in targets), 0.0)
            ratios_NK = weights_NK / logprobs_NK.exp().clamp(min=torch.finfo(torch.float32).tiny)
        tail_N = torch.from_numpy(np.concatenate(tails)).to(device)
        excess_N = None
        if targets[0].frequencies:
            entropy_N = torch.from_numpy(np.concatenate([one.entropy for one in targets])).to(device)
            excess_N = entropy_of(logprobs_NK) - entropy_N
        return BucketTargets(torch.from_numpy(ids).to(device), logprobs_NK, tail_N, ratios_NK, temperature, excess_N)

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, rows: slice | torch.Tensor) -> BucketTargets:
        ratios, excess = (None if x is None else x[rows] for x in (self.ratios, self.excess))
        return BucketTargets(
            self.token_ids[rows], self.logprobs[rows], self.tail_logprobs[rows], ratios, self.temperature, excess
        )


def entropy_of(logprobs_NK: torch.Tensor) -> torch.Tensor:
    """``[N]`` nats; slots at ``-inf`` hold nothing."""
    return -(logprobs_NK.exp() * logprobs_NK.clamp(min=LOG_FLOOR)).sum(1)


@dataclass(frozen=True, slots=True, eq=False)
class FullTargets:
    """The teacher's whole distribution, as hidden states and the head that turns them into logits.

    Attributes:
        hidden: ``[N, D_teacher]``.
        head: The teacher's, without padded rows.
        temperature: T.
    """

    hidden: torch.Tensor
    head: OutputHead
    temperature: float

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: slice | torch.Tensor) -> FullTargets:
        return FullTargets(self.hidden[rows], self.head, self.temperature)


@dataclass(frozen=True, slots=True, eq=False)
class MixedTargets:
    """Several teachers, each with a weight: the loss is the weighted sum of the losses to each.

    For forward KL its gradient is the one to the mixture of the teachers, whatever entries each has kept.
    """

    parts: tuple[tuple[float, BucketTargets | FullTargets], ...]

    def __getitem__(self, rows: slice | torch.Tensor) -> MixedTargets:
        return MixedTargets(tuple((weight, targets[rows]) for weight, targets in self.parts))


Targets = BucketTargets | FullTargets | MixedTargets


@dataclass(frozen=True, slots=True, eq=False)
class Rollouts:
    """What is known of positions whose text a student wrote, from the pass in which it wrote it.

    Attributes:
        logprobs: ``[N]`` float32, of the label, by the student that wrote it; NaN where nobody knows.
        advantages: ``[N]`` float32, of the label for what comes after it (:func:`kdcache.train.rollouts.advantages`); 0 elsewhere.
    """

    logprobs: torch.Tensor
    advantages: torch.Tensor

    def __getitem__(self, rows: slice | torch.Tensor) -> Rollouts:
        return Rollouts(self.logprobs[rows], self.advantages[rows])


@dataclass(frozen=True, slots=True)
class PolicyGradient:
    """The label as an action, in place of the cross-entropy (MiniLLM, 2306.08543, eq. 7 to 9).

    With ``ratio = p(label) / p_rollout(label)``, the weight of the divergence at a position is ``ratio`` (a constant, between ``1 - clip``
    and ``1 + clip``), and the label's part of the loss ``-long_term * min(ratio * A, clipped ratio * A)`` with the advantage A.

    Attributes:
        single_step: Weight of the divergence at the position itself.
        long_term: Weight of what comes after it.
        clip: How far the ratio may be from 1.
    """

    single_step: float = 1.0
    long_term: float = 1.0
    clip: float = 0.2


@dataclass(frozen=True, slots=True)
class Objective:
    """What a student is trained for: ``(1 - alpha) * CE + alpha * temperature^2 * divergence``.

    Attributes:
        alpha: Weight of the teacher.
        temperature: T.
        divergence: D.
        weight: Factor of everything.
        on_student_text: What counts instead on sequences that the student wrote itself (the contrastive pair, MiniLLM), or None.
        policy: The label as an action, in place of the cross-entropy, or None.
    """

    alpha: float = 0.7
    temperature: float = 1.0
    divergence: Divergence = field(default_factory=forward_kl)
    weight: float = 1.0
    on_student_text: Objective | None = None
    policy: PolicyGradient | None = None

    @property
    def uses_teacher(self) -> bool:
        """Whether it needs targets anywhere."""
        return self.alpha > 0 or (self.on_student_text is not None and self.on_student_text.uses_teacher)


@dataclass(frozen=True, slots=True, eq=False)
class LossSums:
    """Sums over positions; divide by the number of targets of the effective batch, once.

    Attributes:
        loss: As optimised, carries the gradient.
        parts: ``[len(PARTS)]``, sums of: ``cross_entropy`` of the labels (nats); ``divergence`` at temperature T without the
            factor ``T^2``, and ``forward_kl``, KL(teacher ‖ student) whatever is optimised (nats; teacher entropy subtracted);
            ``top1_agreement`` of student and teacher; the mass at T that each gives to what the targets leave out; the
            ``acceptance_rate`` ``sum(min(t, p))`` of speculative decoding. All these but the first are 0 without targets. Then the
            ``staleness``, ``log p_rollout(label) - log p(label)`` at positions of rollouts (nats), and the number of these.
        calibration: ``[NUM_BINS, 3]``, ``calibration_sums`` of the student's first choices at T = 1.
    """

    loss: torch.Tensor
    parts: torch.Tensor
    calibration: torch.Tensor

    def flat(self) -> torch.Tensor:
        """``[NUM_SUMS]``: everything one after the other, without the gradient."""
        return torch.cat([self.loss.detach()[None], self.parts, self.calibration.reshape(-1)])

    @staticmethod
    def from_flat(loss: torch.Tensor, measured: torch.Tensor) -> LossSums:
        """From the loss and the rest of :meth:`flat`."""
        return LossSums(loss, measured[: len(PARTS)], measured[len(PARTS) :].view(NUM_BINS, 3))

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(self.loss + other.loss, self.parts + other.parts, self.calibration + other.calibration)

    def __getattr__(self, name: str) -> torch.Tensor:
        if name in PARTS:
            return self.parts[PARTS.index(name)]
        raise AttributeError(name)
