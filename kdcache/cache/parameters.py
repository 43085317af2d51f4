"""What a codec is made of, and what follows from it alone: which columns it has, and how far its values may lie off."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from kdcache.cache import packed
from kdcache.cache.tables import MAX_VOCAB, IdTables
from kdcache.targets import FloatArray

CodecName = Literal["exact", "packed"]


@dataclass(frozen=True, slots=True)
class CodecParameters:
    """What a codec is: its name and everything a reader needs to undo it.

    Attributes:
        name: ``exact`` or ``packed``.
        vocab_size: V; ids are below it.
        temperatures: Declared temperatures.
        max_entries: Largest number of entries at a position.
        levels: Of logprobs (packed).
        num_draws: Draws a position and temperature of the schemes that draw, else 0.
        frequencies: Whether only the counts of drawn entries are kept.
        hidden_size: D of the ``hidden`` scheme, else 0.
        hidden_dtype: What hidden states are stored as.
        id_tables: A renumbering of token ids by the token before (packed), or None.
    """

    name: CodecName
    vocab_size: int
    temperatures: tuple[float, ...]
    max_entries: int
    levels: packed.Levels = packed.STANDARD
    num_draws: int = 0
    frequencies: bool = False
    hidden_size: int = 0
    hidden_dtype: Literal["float32", "bfloat16"] = "float32"
    id_tables: IdTables | None = None

    @property
    def renumbers(self) -> bool:
        """Whether ids are stored as codes: always, but in vocabularies for which the order of each row would be too long."""
        return self.name == "packed" and self.vocab_size <= MAX_VOCAB

    @property
    def num_listed(self) -> int:
        """Codes that are places in lists."""
        return 0 if self.id_tables is None else self.id_tables.list_length

    @property
    def has_bits(self) -> bool:
        """Whether the smallest ids are kept as bits: where they are renumbered, and many of a position are kept."""
        return self.id_tables is not None and not self.num_draws

    @property
    def count_dtype(self) -> type[np.uint8] | type[np.uint16]:
        """Of draws."""
        return np.uint8 if self.num_draws < 256 else np.uint16

    def logprob_error_bound(self, logprobs: FloatArray) -> FloatArray:
        """Largest difference in nats between a stored and a true logprob, for each of ``logprobs``.

        exact: rounding of float32. packed: a step and a half of the level (half a step of rounding, one more where an entry
        had to make room so that the teacher's first choice stays first); what rescaling all K entries of mass M together
        can shift, at most ``0.65 step (K / M)^growth`` by Hoelder's inequality, with M no less than the entry itself; and
        the tail's own error. Of frequencies only the label has a logprob: a step.
        """
        if self.name == "exact":
            return np.full_like(logprobs, 1e-5)
        if self.frequencies:
            return self.levels.step_at(-logprobs + packed.LEVEL_MAX_STEP)
        step = self.levels.step_at(-logprobs + packed.LEVEL_MAX_STEP)
        together = self.levels.step * (self.max_entries * np.exp(-logprobs)) ** self.levels.growth
        shift = 0.65 * np.minimum(together, packed.LEVEL_MAX_STEP)
        return np.asarray(1.5 * step + shift + packed.TAIL_ERROR, dtype=np.float32)

    def tables(self) -> tuple[FloatArray | None, FloatArray | None]:
        """Value table ``[256]`` and tail table ``[num_temperatures, 256]`` of this codec's compact targets, or None."""
        if self.frequencies:
            return (_log_counts() if self.num_draws < 256 else None), None
        if self.name == "exact":
            return None, None
        return -self.levels.table, packed.tail_table(len(self.temperatures))


@cache
def _log_counts() -> FloatArray:
    """``[256]``: log of a count; read-only. The first is of no use, and finite."""
    table: FloatArray = np.log(np.maximum(np.arange(256), 1)).astype(np.float32)
    table.setflags(write=False)
    return table
