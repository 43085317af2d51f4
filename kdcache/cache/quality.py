"""How finely ``packed`` keeps what a teacher said: three qualities, each with the error that it declares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from kdcache.cache.packed import Levels
from kdcache.specs import CodecSpec


@dataclass(frozen=True, slots=True)
class Quality:
    """How finely ``packed`` keeps logprobs of at most 64 entries, and the error that it declares for it.

    Attributes:
        levels: Of logprobs.
        max_kl: KL(what the teacher said ‖ what is stored) over entries and tail at T = 1, mean over positions, in nats.
    """

    levels: Levels
    max_kl: float

    def for_entries(self, max_entries: int) -> Quality:
        """The same fidelity for more entries a position, whose errors add up: finer steps.

        256 levels have to reach past 50 nats, so those of a nat begin at level 200; where fine steps would have to grow too soon
        for that (``high``, past 93 entries) they are even instead, and twice the error is declared.
        """
        step = self.levels.step * min(1.0, (64 / max(max_entries, 1)) ** 0.25)
        if (1 - step) / (200 * step) <= self.levels.growth:
            return replace(self, levels=Levels(step, self.levels.growth))
        return Quality(EVEN, 2 * self.max_kl)


# As even as 256 levels allow: deep entries, of which there are many, cost no more than shallow ones.
EVEN = Levels(0.03, 0.97 / 6)
QUALITIES = {
    "high": Quality(Levels(0.018, 0.3), 1e-4),
    "standard": Quality(Levels(0.0645, 0.3), 1e-3),
    "small": Quality(Levels(0.28, 0.25), 1e-2),
}


def describe_codec(name: Literal["exact", "packed"], quality: str, max_entries: int) -> CodecSpec:
    """How targets of at most so many entries are stored; ``exact`` has no quality, and says ``standard``."""
    chosen = QUALITIES[quality if name == "packed" else "standard"].for_entries(max_entries)
    return CodecSpec(name=name, step=chosen.levels.step, growth=chosen.levels.growth, max_kl=chosen.max_kl)


def error_of_levels(codec: CodecSpec) -> float:
    """What ``packed`` declares for these levels alone; ``max_kl`` of a cache made from another has what was lost before in it, too.

    Levels of no quality are taken to cost all of ``max_kl``.
    """
    levels = Levels(codec.step, codec.growth)
    if levels == EVEN:
        return min(2 * QUALITIES["high"].max_kl, codec.max_kl)
    # Those of more entries are finer, and declare the same.
    declared = [
        quality.max_kl
        for quality in QUALITIES.values()
        if quality.levels.growth == levels.growth and levels.step <= quality.levels.step
    ]
    return min([*declared, codec.max_kl])
