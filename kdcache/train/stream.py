"""Which sequences, in which order, and as which tensors.

**Order.** An epoch is a permutation that depends on the cache's fingerprint, the seed and the epoch alone. A global batch is
a run of it, cut into micro-batches and dealt to ranks; so the sequences of an optimiser step are the same whatever the
number of ranks and accumulation steps that make up the same global batch. The last global batch of an epoch is filled up
with sequences whose mask is off: every rank does the same number of micro-batches, every sequence counts once an epoch.

**Transport.** Targets travel as the small integers that the codec stores and become logprobs on the training device
(:func:`decode_buckets`); the numpy twin of that is ``CompactTargets.expand``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from kdcache.cache.codec import CompactTargets
from kdcache.cache.reader import CacheReader
from kdcache.heads import OutputHead
from kdcache.targets import TokenSequence, temperature_index
from kdcache.train.head import BucketTargets, FullTargets, Targets

IGNORED = -100
Item = tuple[TokenSequence, CompactTargets | None, bool]


@dataclass(frozen=True, slots=True, eq=False)
class CacheDataset(Dataset[Item]):
    """Sequences of a cache by index; index ``-1 - i`` is sequence ``i`` with its mask off.

    Attributes:
        reader: The cache.
        with_targets: Read targets; False reads tokens only (alpha 0).
    """

    reader: CacheReader
    with_targets: bool = True

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Item:
        counts = index >= 0
        index = index if counts else -1 - index
        if self.with_targets and counts:
            sequence, targets = self.reader.compact(index)
            return sequence, targets, True
        return self.reader.tokens(index), None, counts


def epoch_order(num_sequences: int, fingerprint: str, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The permutation of an epoch, from a counter-based generator keyed by all that it depends on."""
    key = np.random.SeedSequence([int(fingerprint, 16), seed, epoch])
    return np.random.Generator(np.random.Philox(key)).permutation(num_sequences)


class KDBatchSampler(Sampler[list[int]]):
    """Micro-batches of one rank, epoch by epoch.

    Args:
        num_sequences: Sequences of the cache.
        batch_size: Sequences of a micro-batch.
        accumulation: Micro-batches of an optimiser step on each rank.
        fingerprint: Of the cache.
        seed: Of the order.
        rank: This process.
        world_size: All processes.
        shuffle: False reads in order (evaluation).
    """

    def __init__(
        self,
        num_sequences: int,
        batch_size: int,
        *,
        accumulation: int = 1,
        fingerprint: str,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        self.num_sequences, self.batch_size, self.accumulation = num_sequences, batch_size, accumulation
        self.fingerprint, self.seed, self.rank, self.world_size = fingerprint, seed, rank, world_size
        self.shuffle, self.epoch = shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        """Begin the next iteration at this epoch."""
        self.epoch = int(epoch)

    @property
    def global_batch(self) -> int:
        """Sequences of an optimiser step, over all ranks."""
        return self.batch_size * self.accumulation * self.world_size

    def __len__(self) -> int:
        return -(-self.num_sequences // self.global_batch) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        order = (
            epoch_order(self.num_sequences, self.fingerprint, self.seed, self.epoch)
            if self.shuffle
            else np.arange(self.num_sequences)
        )
        missing = len(self) // self.accumulation * self.global_batch - self.num_sequences
        filled = np.concatenate([order, -1 - np.resize(order, missing)])
        dealt = filled.reshape(-1, self.accumulation, self.world_size, self.batch_size)
        for step in dealt[:, :, self.rank]:
            for micro_batch in step:
                yield [int(index) for index in micro_batch]


class KDLoader(DataLoader[Item]):
    """A DataLoader that tells its batch sampler about epochs."""

    def set_epoch(self, epoch: int) -> None:
        """Forwarded to the batch sampler."""
        if isinstance(self.batch_sampler, KDBatchSampler):
            self.batch_sampler.set_epoch(epoch)


def collate(items: list[Item]) -> dict[str, torch.Tensor]:
    """Tensors of a micro-batch.

    Returns:
        ``input_ids``, ``position_ids`` ``[B, T]`` int64, padded on the right; ``labels`` ``[B, T]``, unshifted as
        transformers has them, -100 where nothing is learned; ``target_mask`` ``[B, T]`` bool, where row t has a target; and,
        for the N positions under that mask in row-major order, the compact targets ``kd_*``.
    """
    length = max(len(sequence) for sequence, _, _ in items)
    shape = (len(items), length)
    input_ids, position_ids = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    labels, mask = np.full(shape, IGNORED, dtype=np.int64), np.zeros(shape, dtype=bool)
    for row, (sequence, _, counts) in enumerate(items):
        n = len(sequence)
        positions = sequence.position_ids.astype(np.int64)
        input_ids[row, :n] = sequence.input_ids
        position_ids[row, :n] = positions
        position_ids[row, n:] = positions[-1] + 1 + np.arange(length - n)
        if counts:
            labels[row, :n] = np.where(sequence.loss_mask, sequence.input_ids.astype(np.int64), IGNORED)
            mask[row, :n] = sequence.target_mask
    arrays = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels, "target_mask": mask}
    compact = [targets for _, targets, counts in items if targets is not None and counts]
    return {name: torch.from_numpy(array) for name, array in (arrays | _collate_targets(compact)).items()}


def _collate_targets(compact: list[CompactTargets]) -> dict[str, np.ndarray[Any, Any]]:
    """Compact targets of several sequences as rectangles ``[N, K]``; unused slots repeat the position's first entry."""
    if not compact:
        return {}
    num_entries = np.concatenate([targets.num_entries for targets in compact]).astype(np.int64)
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "kd_tails": np.concatenate([targets.tails for targets in compact]),
        "kd_entropy": np.concatenate([targets.entropy for targets in compact]),
    }
    if compact[0].hidden is not None:
        hidden = np.concatenate([targets.hidden for targets in compact if targets.hidden is not None])
        arrays["kd_hidden"] = hidden.view(np.int16) if hidden.dtype == np.uint16 else hidden
        return arrays
    slots = np.arange(max(int(num_entries.max()), 1))
    used = slots < num_entries[:, None]
    entry = (np.cumsum(num_entries) - num_entries)[:, None] + np.where(used, slots, 0)
    ids = np.concatenate([targets.token_ids for targets in compact])
    arrays["kd_token_ids"] = ids.astype(np.int64 if ids.max(initial=0) >= 1 << 31 else np.int32)[entry]
    arrays["kd_values"] = np.concatenate([targets.values for targets in compact])[entry]
    if not used.all():
        arrays["kd_used"] = used
    return arrays


@dataclass(frozen=True, slots=True, eq=False)
class TargetDecoder:
    """What turns compact targets into logprobs on a device: the codec's tables, and the teacher's head for hidden states.

    Attributes:
        temperature: T of the run.
        temperature_column: Where T stands among the declared temperatures.
        value_table: ``[256]`` or None.
        tail_table: ``[256]`` of this temperature, or None.
        teacher_head: For ``hidden`` targets.
    """

    temperature: float
    temperature_column: int
    value_table: torch.Tensor | None
    tail_table: torch.Tensor | None
    teacher_head: OutputHead | None = None

    @staticmethod
    def for_cache(reader: CacheReader, temperature: float, device: torch.device) -> TargetDecoder:
        """The decoder of a cache.

        Raises:
            ConfigError: The cache does not declare the temperature.
        """
        hidden = reader.spec.targets.scheme == "hidden"
        # From hidden states any temperature is exact; from entries and tails only the declared ones are.
        column = 0 if hidden else temperature_index(reader.temperatures, temperature)
        value_table, tail_table = reader.codec.tables()
        head = None
        if hidden:
            head = OutputHead.from_bytes(reader.head_bytes())
            head = OutputHead(
                head.weight.to(device), None if head.bias is None else head.bias.to(device), head.scale, head.softcap
            )
        return TargetDecoder(
            temperature=temperature,
            temperature_column=column,
            value_table=None if value_table is None else torch.from_numpy(value_table).to(device),
            tail_table=None if tail_table is None else torch.from_numpy(tail_table[column]).to(device),
            teacher_head=head,
        )

    def decode(self, batch: dict[str, torch.Tensor]) -> Targets | None:
        """Targets of a batch that is on the device; None when it carries none."""
        if "kd_hidden" in batch:
            hidden = batch["kd_hidden"]
            hidden = hidden.view(torch.bfloat16) if hidden.dtype == torch.int16 else hidden
            assert self.teacher_head is not None, "hidden targets come with a head"
            return FullTargets(hidden, self.teacher_head, self.temperature)
        return self.decode_buckets(batch) if "kd_token_ids" in batch else None

    def decode_buckets(self, batch: dict[str, torch.Tensor]) -> BucketTargets:
        """Levels to logprobs at T: ``log_softmax(level / T) + log(1 - tail)``, the torch twin of ``at_temperature``."""
        values, tails = batch["kd_values"], batch["kd_tails"][:, self.temperature_column]
        scores_NK = values if self.value_table is None else self.value_table[values.int()]
        tail_N = tails if self.tail_table is None else self.tail_table[tails.int()]
        scores_NK = scores_NK / self.temperature
        if "kd_used" in batch:
            scores_NK = scores_NK.masked_fill(~batch["kd_used"], -torch.inf)
        log_head = torch.log(-torch.expm1(tail_N))
        return BucketTargets(
            token_ids=batch["kd_token_ids"].long(),
            logprobs=torch.log_softmax(scores_NK, dim=1) + log_head[:, None],
            tail_logprobs=tail_N,
        )
