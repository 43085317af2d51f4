"""Per-position divergences between teacher and student, as pure functions of logprobs. None of them reduces.

Most are f-divergences, ``D = sum(t f(p / t))`` with convex ``f`` and ``f(1) = 0``, and are written here as what one token
adds, ``term(log t, log p) = t f(p / t)``. What a cache holds decides how the terms are summed:

- **buckets** (top_k, top_p): over the K kept entries and the tail as one bucket. A lower bound of the divergence over the
  vocabulary, and equal to it at K = V (data-processing inequality; equality also where both agree on the tail's shape).
- **draws** (sampled, systematic, hybrid): with weights ``tau / t``, unbiased. Where ``f`` has a finite slope at infinity the
  sum of ``f(w) - slope * w`` has finite variance, and ``slope`` is added once, because ``E[w] = 1`` for ``w = p / t``. Where it
  has none (reverse KL) the variance is not bounded, and the loss is refused.

All of it is float32. An unused slot (logprob ``-inf``) contributes nothing: its inputs are replaced before the arithmetic, so
that no gradient meets ``0 * inf``.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from kdcache.errors import ConfigError
from kdcache.targets import Estimator

Term = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
OnBuckets = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
OnDraws = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Log of the smallest normal float32: what a tail of teacher mass zero counts as where the student has some.
LOG_FLOOR = -87.0


@dataclass(frozen=True, slots=True)
class Divergence:
    """A divergence at each position.

    Attributes:
        name: As in ``LOSSES``.
        on_buckets: ``(log_t [N, K], log_t_tail [N], log_p [N, K], log_p_tail [N]) -> [N]``, nats.
        on_draws: ``(ratios [N, K], log_t [N, K], log_p [N, K]) -> [N]`` with ``ratios = tau / t``; None where it is refused.
        refusal: Why it cannot be had from draws.
        term: What a token adds, where the divergence is a sum over tokens.
        on_frequencies: Whether its gradient is linear in the teacher, so that ``t`` may be replaced by an unbiased estimate.
    """

    name: str
    on_buckets: OnBuckets
    on_draws: OnDraws | None = None
    refusal: str = ""
    term: Term | None = None
    on_frequencies: bool = False

    def on_everything(self, log_t: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        """``(log_t [N, V], log_p [N, V]) -> [N]``: nothing left out, nothing unused."""
        if self.term is not None:
            return self.term(log_t, log_p).sum(-1)
        no_tail = torch.full_like(log_p[:, 0], -torch.inf)
        return self.on_buckets(log_t, no_tail, log_p, no_tail)


# --- terms of f-divergences -------------------------------------------------------------------------------------------


def forward_kl_term(log_t: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """``t log(t / p)``: KL(teacher ‖ student), covers the teacher's modes. Hinton et al. 1503.02531."""
    return log_t.exp() * (log_t - log_p)


def reverse_kl_term(log_t: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """``p log(p / t)``: KL(student ‖ teacher), seeks modes. MiniLLM 2306.08543."""
    return log_p.exp() * (log_p - log_t)


def jsd_term(log_t: torch.Tensor, log_p: torch.Tensor, beta: float) -> torch.Tensor:
    """``beta t log(t / m) + (1 - beta) p log(p / m)``, ``m = beta t + (1 - beta) p``. GKD 2306.13649 eq. 1."""
    log_m = _log_mix(log_t, log_p, beta)
    return beta * log_t.exp() * (log_t - log_m) + (1 - beta) * log_p.exp() * (log_p - log_m)


def skew_kl_term(log_t: torch.Tensor, log_p: torch.Tensor, skew: float) -> torch.Tensor:
    """``t log(t / m)``, ``m = skew t + (1 - skew) p``. DistiLLM 2402.03898 eq. 4."""
    return log_t.exp() * (log_t - _log_mix(log_t, log_p, skew))


def skew_reverse_kl_term(log_t: torch.Tensor, log_p: torch.Tensor, skew: float) -> torch.Tensor:
    """``p log(p / m)``, ``m = skew p + (1 - skew) t``. DistiLLM 2402.03898; the gradient goes through ``m`` as well."""
    return log_p.exp() * (log_p - _log_mix(log_p, log_t, skew))


def tv_term(log_t: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """``max(t - p, 0)``: summed over all tokens, half the L1 distance; one minus the acceptance rate of speculation."""
    return torch.relu(log_t.exp() - log_p.exp())


def _log_mix(log_a: torch.Tensor, log_b: torch.Tensor, share: float) -> torch.Tensor:
    """``log(share a + (1 - share) b)``."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


# --- sums -------------------------------------------------------------------------------------------------------------


def over_buckets(
    term: Term,
    teacher_logprobs: torch.Tensor,
    teacher_tail: torch.Tensor,
    student_logprobs: torch.Tensor,
    student_tail: torch.Tensor,
) -> torch.Tensor:
    """``sum(term(log t, log p))`` over the kept entries and the tail.

    Args:
        term: What a bucket adds.
        teacher_logprobs: ``[N, K]``; ``-inf`` in unused slots.
        teacher_tail: ``[N]``; ``-inf`` where nothing is left out.
        student_logprobs: ``[N, K]``, of the same tokens.
        student_tail: ``[N]``; ``-inf`` where nothing is left out.

    Returns:
        ``[N]``, nats.
    """
    kept = _where_present(term, teacher_logprobs > -torch.inf, teacher_logprobs, student_logprobs).sum(-1)
    tail = _where_present(term, student_tail > -torch.inf, teacher_tail.clamp(min=LOG_FLOOR), student_tail)
    return kept + tail


def over_draws(
    term: Term, slope: float, ratios: torch.Tensor, teacher_logprobs: torch.Tensor, student_logprobs: torch.Tensor
) -> torch.Tensor:
    """``slope + sum(tau / t * (term(log t, log p) - slope p))``: unbiased for the sum of terms over the vocabulary.

    Args:
        term: What a token adds.
        slope: Of ``f`` at infinity.
        ratios: ``[N, K]``, ``tau / t``; 0 in unused slots.
        teacher_logprobs: ``[N, K]``.
        student_logprobs: ``[N, K]``.

    Returns:
        ``[N]``, nats.
    """

    def with_control(log_t: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        value = term(log_t, log_p)
        return value if slope == 0 else value - slope * log_p.exp()

    values = _where_present(with_control, ratios > 0, teacher_logprobs, student_logprobs)
    return slope + (ratios * values).sum(-1)


def _where_present(term: Term, present: torch.Tensor, log_t: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    value = term(torch.where(present, log_t, 0.0), torch.where(present, log_p, 0.0))
    return torch.where(present, value, 0.0)


def _f_divergence(name: str, term: Term, slope: float | None, refusal: str = "") -> Divergence:
    def on_buckets(*logprobs: torch.Tensor) -> torch.Tensor:
        return over_buckets(term, *logprobs)

    def on_draws(*arguments: torch.Tensor) -> torch.Tensor:
        assert slope is not None, "refused before"
        return over_draws(term, slope, *arguments)

    return Divergence(name, on_buckets, None if slope is None else on_draws, refusal, term)


# --- divergences by name ----------------------------------------------------------------------------------------------


def forward_kl() -> Divergence:
    """KL(teacher ‖ student)."""
    return replace(_f_divergence("forward_kl", forward_kl_term, 0.0), on_frequencies=True)


def reverse_kl() -> Divergence:
    """KL(student ‖ teacher)."""
    refusal = "its importance weights p / t are not bounded: the variance is tens of times that of any other loss here"
    return _f_divergence("reverse_kl", reverse_kl_term, None, refusal)


def jsd(beta: float = 0.5) -> Divergence:
    """Generalised Jensen-Shannon divergence; TRL's and Liger's ``beta`` (there 0 and 1 stand for forward and reverse KL)."""
    _inside("jsd", "beta", beta, "0 is written forward_kl, 1 is written reverse_kl")
    return _f_divergence("jsd", lambda t, p: jsd_term(t, p, beta), -(1 - beta) * math.log1p(-beta))


def skew_kl(skew: float = 0.1) -> Divergence:
    """KL(teacher ‖ skew * teacher + (1 - skew) * student)."""
    _inside("skew_kl", "skew", skew, "0 is written forward_kl")
    return _f_divergence("skew_kl", lambda t, p: skew_kl_term(t, p, skew), 0.0)


def skew_reverse_kl(skew: float = 0.1) -> Divergence:
    """KL(student ‖ skew * student + (1 - skew) * teacher)."""
    _inside("skew_reverse_kl", "skew", skew, "0 is written reverse_kl")
    return _f_divergence("skew_reverse_kl", lambda t, p: skew_reverse_kl_term(t, p, skew), -math.log(skew))


def tv() -> Divergence:
    """Total variation distance."""
    return _f_divergence("tv", tv_term, 0.0)


def akl(head_mass: float = 0.5) -> Divergence:
    """Adaptive KL: forward and reverse KL weighted by where teacher and student differ. 2404.02657 eq. 8 to 10.

    ``g_head`` and ``g_tail`` are ``sum |t - p|`` over the fewest most probable tokens that reach ``head_mass`` and over the
    rest; the loss is ``(g_head forward_kl + g_tail reverse_kl) / (g_head + g_tail)``, the weights taken as constants.
    """
    _inside("akl", "head_mass", head_mass, "it divides the teacher's mass in two")

    def on_buckets(
        log_t: torch.Tensor, log_t_tail: torch.Tensor, log_p: torch.Tensor, log_p_tail: torch.Tensor
    ) -> torch.Tensor:
        with torch.no_grad():
            t = log_t.exp()
            by_mass, order = t.sort(dim=-1, descending=True, stable=True)
            in_head = torch.zeros_like(t, dtype=torch.bool)
            in_head.scatter_(-1, order, (by_mass.cumsum(-1) - by_mass < head_mass) & (by_mass > 0))
            gap = torch.where(log_t > -torch.inf, (t - log_p.exp()).abs(), 0.0)
            g_head = torch.where(in_head, gap, 0.0).sum(-1)
            g_tail = torch.where(in_head, 0.0, gap).sum(-1) + (log_t_tail.exp() - log_p_tail.exp()).abs()
            share = g_head / (g_head + g_tail).clamp(min=torch.finfo(t.dtype).tiny)
        forward = over_buckets(forward_kl_term, log_t, log_t_tail, log_p, log_p_tail)
        reverse = over_buckets(reverse_kl_term, log_t, log_t_tail, log_p, log_p_tail)
        return share * forward + (1 - share) * reverse

    return Divergence("akl", on_buckets, refusal="its head is the most probable tokens, which draws may miss")


def taid(interpolation: float = 0.4) -> Divergence:
    """Forward KL to a target between student and teacher: ``softmax((1 - lambda) z_student + lambda z_teacher)``.

    ``interpolation`` is lambda, and is meant to rise to 1 (a schedule: ``linear:0.4:1``); the student inside the target is taken
    as constant. 2501.16937 eq. 3. Over buckets the tail is interpolated as one token.
    """
    if not 0 <= interpolation <= 1:
        raise ConfigError(f"loss taid: interpolation is between 0 and 1, found {interpolation:g}")

    def on_buckets(
        log_t: torch.Tensor, log_t_tail: torch.Tensor, log_p: torch.Tensor, log_p_tail: torch.Tensor
    ) -> torch.Tensor:
        teacher = torch.cat(
            [log_t, torch.where(log_p_tail > -torch.inf, log_t_tail.clamp(min=LOG_FLOOR), log_t_tail)[:, None]], 1
        )
        student = torch.cat([log_p, log_p_tail[:, None]], 1).detach()
        present = teacher > -torch.inf
        between = (1 - interpolation) * torch.where(present, student, 0.0) + interpolation * teacher
        between = torch.log_softmax(between.masked_fill(~present, -torch.inf), dim=1)
        return over_buckets(forward_kl_term, between[:, :-1], between[:, -1], log_p, log_p_tail)

    return Divergence("taid", on_buckets, refusal="it needs the teacher at tokens that draws may miss")


def logit_mse() -> Divergence:
    """Mean squared difference of the kept entries' logits, each side centred on them, so that no shift counts."""

    def on_buckets(
        log_t: torch.Tensor, log_t_tail: torch.Tensor, log_p: torch.Tensor, log_p_tail: torch.Tensor
    ) -> torch.Tensor:
        present = log_t > -torch.inf
        number = present.sum(-1, keepdim=True).clamp(min=1)
        difference = torch.where(present, log_t, 0.0) - torch.where(present, log_p, 0.0)
        centred = torch.where(present, difference - difference.sum(-1, keepdim=True) / number, 0.0)
        return (centred.square() / number).sum(-1)

    return Divergence("logit_mse", on_buckets, refusal="it compares the most probable tokens, which draws may miss")


def ce() -> Divergence:
    """Labels alone: the weight of the teacher is 0 whatever alpha says."""

    def nothing(first: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return first.new_zeros(len(first))

    return Divergence("ce", nothing, nothing, on_frequencies=True)


LOSSES: dict[str, Callable[..., Divergence]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tv": tv,
    "akl": akl,
    "taid": taid,
    "logit_mse": logit_mse,
    "ce": ce,
}

# What other projects call them.
OTHER_NAMES = {
    "kl": "forward_kl", "kld": "forward_kl", "fkl": "forward_kl", "kl_div": "forward_kl", "rkl": "reverse_kl",
    "js": "jsd", "skl": "skew_kl", "sfkl": "skew_kl", "srkl": "skew_reverse_kl", "tvd": "tv", "adaptive_kl": "akl",
    "mse": "logit_mse", "cross_entropy": "ce", "sft": "ce",
}  # fmt: skip

REFUSED = {
    "truncated_reverse_kl": (
        "reverse KL over the kept entries alone is lowest at p = t / e, with most of the student's mass outside them",
        "--loss reverse_kl counts the tail as one bucket",
    ),
    "conditional_kl": (
        "with both sides renormalised over the kept entries nothing holds the student's mass outside them",
        "--loss forward_kl counts the tail as one bucket",
    ),
}


def make_divergence(name: str, arguments: Mapping[str, float] | None = None) -> Divergence:
    """A divergence by name.

    Raises:
        ConfigError: No such loss, one that is refused (with the reason), an argument that it does not have, or a value out of
            its range.
    """
    if name in REFUSED:
        reason, instead = REFUSED[name]
        raise ConfigError(f"loss {name}: {reason}", hint=instead)
    if name not in LOSSES:
        close = OTHER_NAMES.get(name) or next(iter(difflib.get_close_matches(name, LOSSES, n=1)), None)
        known = ", ".join(LOSSES)
        raise ConfigError(f"loss {name!r}: expected one of {known}", hint=f"did you mean {close}?" if close else None)
    taken = list(inspect.signature(LOSSES[name]).parameters)
    for argument, value in (arguments or {}).items():
        if argument not in taken:
            raise ConfigError(
                f"loss {name} has no argument {argument!r}", hint=f"it takes {', '.join(taken) or 'none'}"
            )
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"loss {name}: {argument} is a number, found {value!r}")
    return LOSSES[name](**(arguments or {}))


def check_estimator(divergence: Divergence, estimator: Estimator, where: str) -> None:
    """Refuse a loss that a cache's targets cannot give.

    Raises:
        ConfigError: With the reason, and the losses that they can.
    """
    if estimator == "draws" and divergence.on_draws is None:
        possible = ", ".join(name for name, make in LOSSES.items() if make().on_draws is not None)
        raise ConfigError(
            f"loss {divergence.name} cannot be had from drawn targets ({where}): {divergence.refusal}",
            hint=f"from draws: {possible}; or dump with --targets top_k or hidden",
        )
    if estimator == "frequencies" and not divergence.on_frequencies:
        raise ConfigError(
            f"loss {divergence.name} needs the teacher's probabilities, and {where} keeps how often each token was drawn",
            hint="forward_kl needs no more than that; for others dump with --entry-logprobs, or with --targets top_k or hidden",
        )


def _inside(loss: str, name: str, value: float, hint: str) -> None:
    if not 0 < value < 1:
        raise ConfigError(f"loss {loss}: {name} is between 0 and 1, both excluded; found {value:g}", hint=hint)
