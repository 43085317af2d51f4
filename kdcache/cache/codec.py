"""SparseTargets <-> compressed columns.

Two codecs share one interface and one intermediate, :class:`~kdcache.cache.compact.CompactTargets`, which is what a training
process moves to its device before it turns integers into logprobs:

- ``exact``: raw ids and float32. The oracle of every other codec, and the container of the ``hidden`` scheme.
- ``packed``: ids renumbered so that likely ones are small, ascending and gap-coded; logprobs as one-byte levels whose step grows
  toward the tail, tails as one byte of log-odds. Declares its error (``logprob_error_bound``).

**Trade.** The quantisation error of ``packed`` (KL below 1e-3 nats) is a hundredth of what keeping only 64 of 49,152
entries costs, and about the numeric noise of a bf16 teacher. Kept entries are rescaled on decode to ``1 - tail``, so
probabilities never sum to more than one; deriving the tail by subtraction instead would cost twice the quantisation.
Refuses what its levels cannot hold (a logprob below about -200 nats).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.cache import jit, packed
from kdcache.cache.columns import COLUMNS, DECODERS, ENCODERS, MAX_LOGPROB, UNKNOWN_TO_FREQUENCIES, Frames, are_logprobs
from kdcache.cache.compact import CompactTargets, float_to_bfloat16
from kdcache.cache.frames import compress, read_array
from kdcache.cache.own_order import GAP_GOES_ON, OwnOrder, most_gap_bytes
from kdcache.cache.parameters import CodecParameters
from kdcache.cache.tables import sorted_by
from kdcache.errors import CacheCorruptError, TeacherOutputError
from kdcache.targets import SparseTargets, UIntArray


@dataclass(frozen=True, slots=True)
class Codec(CodecParameters):
    """A way to store targets."""

    def encode(self, targets: SparseTargets, contexts: UIntArray | None = None) -> dict[str, bytes]:
        """Frames by column name, the same names for every sequence of a cache.

        Args:
            targets: What the teacher said at N positions.
            contexts: ``[N]``, the token before each (``TokenSequence.contexts``); needed where there are tables.

        Raises:
            ConfigError: The codec cannot hold these values within its bound.
            TeacherOutputError: A value is NaN or infinite.
        """
        if targets.temperatures != self.temperatures:
            raise ValueError(f"targets declare temperatures {targets.temperatures}, the codec {self.temperatures}")
        self._check_storable(targets)
        jit.note(len(targets))
        arrays: dict[str, npt.NDArray[Any]] = {}
        if self.renumbers:
            codes, start = targets.token_ids, self.num_listed
            if self.id_tables is not None:
                assert contexts is not None, "tables renumber ids by the token before"
                codes = self.id_tables.codes(codes, targets.num_entries, contexts)
            order = OwnOrder.count(codes, start, self.vocab_size)
            targets = sorted_by(targets, order.renumber(codes, start, self.vocab_size))
            arrays = {"frequent_gaps": order.gaps(), "frequent_steps": order.steps}
        arrays |= ENCODERS[self.name](self, targets)
        if self.hidden_size:
            assert targets.hidden is not None, "the hidden scheme stores hidden states"
            arrays["hidden"] = float_to_bfloat16(targets.hidden) if self.hidden_dtype == "bfloat16" else targets.hidden
        return {
            name: compress(arrays[name], block_bytes=self._block_bytes(name, arrays[name]))
            for name in self.column_names
        }

    def _block_bytes(self, name: str, array: npt.NDArray[Any]) -> int | None:
        if self.name == "packed" and name in packed.BLOCK_A_ROW:
            return int(array.shape[1] * array.itemsize)
        return packed.BLOCK_BYTES.get(name) if self.name == "packed" else None

    def _check_storable(self, targets: SparseTargets) -> None:
        """Refuse to write what :meth:`decode` would refuse to read."""
        if len(targets.token_ids) and int(targets.token_ids.max()) >= self.vocab_size:
            raise ValueError(f"token id {targets.token_ids.max()} in a vocabulary of {self.vocab_size}")
        if int(targets.num_entries.max(initial=0)) > self.max_entries:
            raise ValueError(
                f"{targets.num_entries.max()} entries at a position, at most {self.max_entries} were declared"
            )
        if (
            not are_logprobs(targets.logprobs, targets.label_logprobs)
            or not (targets.tail_logprobs <= MAX_LOGPROB).all()
        ):
            raise TeacherOutputError("a logprob that is not finite and at most 0 cannot be stored")
        if targets.frequencies and not self.frequencies:
            raise ValueError("logprobs of the entries are not known, and the codec keeps them")
        if (targets.counts is not None) != (self.num_draws > 0):
            raise ValueError(f"counts of a scheme with {self.num_draws} draws")
        if targets.counts is not None and int(targets.counts.max(initial=0)) > self.num_draws:
            raise ValueError(f"an entry drawn {targets.counts.max()} times in {self.num_draws} draws")
        if not (np.isfinite(targets.logz).all() and np.isfinite(targets.entropy).all()):
            raise TeacherOutputError("a log-normaliser or an entropy that is not finite cannot be stored")

    def decode(self, frames: Frames, num_targets: int, where: str, contexts: UIntArray | None = None) -> CompactTargets:
        """Undo :meth:`encode`.

        Args:
            frames: Column name to frame.
            num_targets: N, known from the loss mask.
            where: Names shard and sequence in messages.
            contexts: As for :meth:`encode`.

        Raises:
            CacheCorruptError: A frame is not intact, or its values cannot have been written.
        """
        jit.note(num_targets)
        try:
            compact = DECODERS[self.name](self, frames, num_targets, where)
            ids = self._token_ids(frames, compact, where, contexts) if self.renumbers else None
        except KeyError as error:
            raise CacheCorruptError(f"{where}: column {error} is missing") from error
        if ids is not None:
            compact = replace(compact, token_ids=ids, ascending=False)
        elif self.name != "exact" and len(compact.token_ids) and int(compact.token_ids.max()) >= self.vocab_size:
            raise CacheCorruptError(f"{where}: token id {compact.token_ids.max()} in a vocabulary of {self.vocab_size}")
        return compact

    def _token_ids(
        self, frames: Frames, compact: CompactTargets, where: str, contexts: UIntArray | None
    ) -> npt.NDArray[np.uint32]:
        """Token ids of codes."""
        most = most_gap_bytes(self.vocab_size)
        gaps = read_array(frames["frequent_gaps"], np.uint8, what=f"{where}, frequent_gaps", max_count=most)
        number = int(np.count_nonzero(gaps != GAP_GOES_ON))
        steps = read_array(frames["frequent_steps"], np.uint8, what=f"{where}, frequent_steps", count=number)
        order = OwnOrder.of(gaps, steps, self.vocab_size, where)
        if self.id_tables is None:
            return order.undo(compact.token_ids, 0, self.vocab_size, where)
        assert contexts is not None, "tables renumber ids by the token before"
        return self.id_tables.token_ids(compact.token_ids, compact.num_entries, contexts, where, order)

    @property
    def column_names(self) -> tuple[str, ...]:
        """Names of the columns that :meth:`encode` gives."""
        names = COLUMNS[self.name]
        if self.frequencies:
            names = tuple(name for name in names if name not in UNKNOWN_TO_FREQUENCIES)
        if self.renumbers:
            names += ("frequent_gaps", "frequent_steps")
        if self.has_bits:
            names += ("id_bits",)
        if self.num_draws:
            names += ("counts",) if self.name == "exact" else ("counts", "count_escapes")
        return names + (("hidden",) if self.hidden_size else ())
