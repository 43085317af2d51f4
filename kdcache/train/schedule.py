"""Numbers that change while a student trains: the weight of the teacher, the temperature, TAID's interpolation.

Written as one string wherever a number can stand::

    0.9                     constant
    linear:0.1:0.9          straight from the first to the second
    cosine:0.1:0.9          the same along half a cosine
    wsd:0:0.9:0             warm-up, stable, decay: first to second in the first tenth, to the third in the last fifth
    wsd:0:0.9:0:0.05:0.5    the same with other shares of the run

A schedule is a function of the share of the run that is done, so that a resumed run goes on where it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

KINDS = {"constant": (1, 1), "linear": (2, 2), "cosine": (2, 2), "wsd": (3, 5)}
WARMUP, DECAY = 0.1, 0.2


@dataclass(frozen=True, slots=True)
class Schedule:
    """A number over the course of a run.

    Attributes:
        kind: ``constant``, ``linear``, ``cosine`` or ``wsd``.
        values: The numbers it goes through.
        warmup: Share of the run in which ``wsd`` rises.
        decay: Share of the run in which it falls.
    """

    kind: str
    values: tuple[float, ...]
    warmup: float = WARMUP
    decay: float = DECAY

    def at(self, progress: float) -> float:
        """The value when ``progress`` of the run, 0 to 1, is done."""
        progress = min(max(progress, 0.0), 1.0)
        if self.kind == "constant":
            return self.values[0]
        if self.kind in ("linear", "cosine"):
            start, end = self.values
            share = progress if self.kind == "linear" else (1 - math.cos(math.pi * progress)) / 2
            return _between(start, end, share)
        start, stable, end = self.values
        if progress < self.warmup:
            return _between(start, stable, progress / self.warmup)
        if progress > 1 - self.decay:
            return _between(stable, end, (progress - 1 + self.decay) / self.decay)
        return stable

    @property
    def is_constant(self) -> bool:
        """Whether it never changes."""
        return len(set(self.values)) == 1

    def __str__(self) -> str:
        numbers = ":".join(f"{value:g}" for value in self.values)
        if self.kind == "constant":
            return numbers
        shares = f":{self.warmup:g}:{self.decay:g}" if (self.warmup, self.decay) != (WARMUP, DECAY) else ""
        return f"{self.kind}:{numbers}{shares}"


def parse_schedule(value: Any) -> Schedule:
    """A schedule out of a number or a string.

    Raises:
        ValueError: It is neither; says what was expected.
    """
    if isinstance(value, Schedule):
        return value
    kind, *parts = str(value).split(":")
    if not parts:
        kind, parts = "constant", [kind]
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    fewest, most = KINDS.get(kind, (1, 0))
    if not fewest <= len(numbers) <= most or not all(map(math.isfinite, numbers)):
        raise ValueError("a number, linear:A:B, cosine:A:B or wsd:A:B:C[:WARMUP:DECAY] was expected")
    if kind != "wsd":
        return Schedule(kind, tuple(numbers))
    warmup, decay = (*numbers[3:], *(WARMUP, DECAY)[len(numbers) - 3 :])
    if min(warmup, decay) < 0 or warmup + decay > 1:
        raise ValueError("warm-up and decay are shares of the run, together at most 1")
    return Schedule(kind, tuple(numbers[:3]), warmup, decay)


def _between(start: float, end: float, share: float) -> float:
    return start + (end - start) * share
