"""Which sequences, in which order, and as which tensors.

**Order.** An epoch is a permutation that depends on the cache's fingerprint, the seed and the epoch alone. A global batch is
a run of it, cut into micro-batches and dealt to ranks; so the sequences of an optimiser step are the same whatever the
number of ranks and accumulation steps that make up the same global batch. The last global batch of an epoch is filled up
with sequences whose mask is off: every rank does the same number of micro-batches, every sequence counts once an epoch.

**Transport.** Targets travel as the small integers that the codec stores, entries one after the other, and become rectangles of logprobs
on the training device (:meth:`TargetDecoder.decode_buckets`); the numpy twin of that is ``CompactTargets.expand``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from kdcache.cache.compact import CompactTargets
from kdcache.cache.limits import enough_memory
from kdcache.cache.reader import CacheReader
from kdcache.heads import OutputHead
from kdcache.targets import TokenSequence, temperature_index
from kdcache.train.mix import Mix
from kdcache.train.objective import BucketTargets, FullTargets, MixedTargets, Targets, entropy_of
from kdcache.train.rollouts import Rollout, asked_in_turn, find_rollout

IGNORED = -100


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """A sequence on its way into a micro-batch.

    Attributes:
        sequence: Its tokens.
        targets: Of each teacher; none for labels alone, or where the sequence does not count.
        counts: False where it only fills up the last step of an epoch.
        from_student: The student wrote it, and another objective counts (the contrastive pair, MiniLLM).
        rollout: What is known of the pass in which it was written, where rollouts are told of.
    """

    sequence: TokenSequence
    targets: tuple[CompactTargets, ...] = ()
    counts: bool = True
    from_student: bool = False
    rollout: Rollout | None = None


@dataclass(frozen=True, slots=True, eq=False)
class CacheDataset(Dataset[Item]):
    """Sequences of one or several texts by index; index ``-1 - i`` is sequence ``i`` with its mask off.

    Attributes:
        reader: The cache of the first text.
        others: Caches of other teachers over the same sequences, found by their content.
        more: Caches of further texts; their sequences come after those of ``reader``.
        student_texts: Caches of text for which the student's objective counts; they come last.
        rollouts: Caches of the passes in which students wrote some of the texts.
        with_targets: Read targets; False reads tokens only (alpha 0).
    """

    reader: CacheReader
    others: tuple[CacheReader, ...] = ()
    more: tuple[CacheReader, ...] = ()
    student_texts: tuple[CacheReader, ...] = ()
    rollouts: tuple[CacheReader, ...] = ()
    with_targets: bool = True
    _asked: tuple[tuple[CacheReader, ...], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_asked", tuple(asked_in_turn(reader, self.rollouts) for reader in self.texts))

    @property
    def texts(self) -> tuple[CacheReader, ...]:
        """The cache of each text, in order."""
        return (self.reader, *self.more, *self.student_texts)

    def __len__(self) -> int:
        return sum(len(reader) for reader in self.texts)

    @property
    def fingerprint(self) -> str:
        """Of all that decides which sequence stands where."""
        return "".join(reader.manifest.fingerprint for reader in self.texts)

    def __getitem__(self, index: int) -> Item:
        counts = index >= 0
        number, reader, place = self._locate(index if counts else -1 - index)
        from_student = number > len(self.more)
        if not (self.with_targets and counts):
            sequence = reader.tokens(place)
            return Item(sequence, (), counts, from_student, self._rollout(number, sequence, None, counts))
        sequence, targets = reader.compact(place)
        others = () if number else self.others
        more = tuple(other.compact(other.find(sequence, "of another teacher"))[1] for other in others)
        return Item(sequence, (targets, *more), True, from_student, self._rollout(number, sequence, targets, counts))

    def _locate(self, index: int) -> tuple[int, CacheReader, int]:
        """Number and cache of the text, and the sequence in it."""
        for number, reader in enumerate(self.texts):
            if index < len(reader):
                return number, reader, index
            index -= len(reader)
        raise IndexError(f"sequence {index} past the last of {len(self)}")

    def _rollout(
        self, text: int, sequence: TokenSequence, targets: CompactTargets | None, counts: bool
    ) -> Rollout | None:
        return find_rollout(sequence, targets, self._asked[text]) if self.rollouts and counts else None


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
        mix: The order, instead of a permutation: shares of several texts.
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
        mix: Mix | None = None,
    ) -> None:
        num_sequences = num_sequences if mix is None else mix.epoch_length
        self.mix = mix
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
        with enough_memory(f"an order of {self.num_sequences} sequences"):
            if self.mix is not None:
                order = self.mix.order(self.epoch)
            elif self.shuffle:
                order = epoch_order(self.num_sequences, self.fingerprint, self.seed, self.epoch)
            else:
                order = np.arange(self.num_sequences)
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
        transformers has them, -100 where nothing is learned; ``target_mask`` ``[B, T]`` bool, where row t has a target;
        ``from_student`` ``[B]`` bool; ``num_tokens`` ``[B]`` int64, of each sequence, 0 where it does not count; ``rollout_logprobs`` and
        ``advantages`` ``[N]`` where rollouts are told of; and, for the N positions under that mask in row-major order, the compact
        targets of teacher m, ``kd<m>_*``.
    """
    length = max(len(item.sequence) for item in items)
    shape = (len(items), length)
    input_ids, position_ids = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    labels, mask = np.full(shape, IGNORED, dtype=np.int64), np.zeros(shape, dtype=bool)
    for row, item in enumerate(items):
        sequence = item.sequence
        n = len(sequence)
        positions = sequence.position_ids.astype(np.int64)
        input_ids[row, :n] = sequence.input_ids
        position_ids[row, :n] = positions
        position_ids[row, n:] = positions[-1] + 1 + np.arange(length - n)
        if item.counts:
            labels[row, :n] = np.where(sequence.loss_mask, sequence.input_ids.astype(np.int64), IGNORED)
            mask[row, :n] = sequence.target_mask
    from_student = np.array([item.from_student for item in items])
    arrays = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels, "target_mask": mask}
    arrays["from_student"] = from_student
    arrays["num_tokens"] = np.array([len(item.sequence) * item.counts for item in items], dtype=np.int64)
    if any(item.rollout is not None for item in items):
        known = [item.rollout for item in items if item.rollout is not None]
        arrays["rollout_logprobs"] = np.concatenate([rollout.logprobs for rollout in known])
        arrays["advantages"] = np.concatenate([rollout.advantages for rollout in known])
    for teacher, compact in enumerate(zip(*(item.targets for item in items if item.targets), strict=True)):
        columns = collate_targets(compact)
        arrays |= {f"kd{teacher}_{name}": array for name, array in columns.items()}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def collate_targets(compact: Sequence[CompactTargets]) -> dict[str, np.ndarray[Any, Any]]:
    """Compact targets of several sequences, as they travel: entries one after the other, the device lays them out (:func:`in_slots`).

    Returns:
        ``tails`` ``[N, num_temperatures]``; ``slots`` ``[K]`` int32, 0 to the most entries of a position, at least one; ``token_ids``
        int32 or int64, ``values`` ``[E]``, ``counts`` ``[E, num_temperatures]`` int16 where there are draws; ``num_entries`` ``[N]`` int32
        unless all have K; ``entropy`` ``[N]`` of frequencies. Or ``tails`` and ``hidden`` ``[N, D]``.
    """
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "tails": np.concatenate([targets.tails for targets in compact]),
    }
    if compact[0].hidden is not None:
        hidden = np.concatenate([targets.hidden for targets in compact if targets.hidden is not None])
        arrays["hidden"] = hidden.view(np.int16) if hidden.dtype == np.uint16 else hidden
        return arrays
    num_entries = np.concatenate([targets.num_entries for targets in compact])
    most = int(num_entries.max(initial=1))
    arrays["slots"] = np.arange(most, dtype=np.int32)
    ids = np.concatenate([targets.token_ids for targets in compact])
    wide = ids.max(initial=0) >= 1 << 31
    arrays["token_ids"] = ids.astype(np.int64) if wide else ids.astype(np.uint32, copy=False).view(np.int32)
    arrays["values"] = np.concatenate([targets.values for targets in compact])
    if compact[0].counts is not None:
        counts = np.concatenate([targets.counts for targets in compact if targets.counts is not None])
        arrays["counts"] = counts.view(np.int16)  # torch has few uses for uint16
    if compact[0].frequencies:
        arrays["entropy"] = np.concatenate([targets.entropy for targets in compact])
    if len(ids) != len(num_entries) * most:
        arrays["num_entries"] = num_entries.astype(np.int32)
    return arrays


def in_slots(
    num_entries: torch.Tensor | None, slots: torch.Tensor, num_positions: int, entries: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Runs of entries as rectangles, a row a position, without a word to the host; the torch twin of ``in_rectangle``.

    Args:
        num_entries: ``[N]``; None where every position has K.
        slots: ``[K]``, 0 to K - 1.
        num_positions: N.
        entries: ``[E, ...]``, runs of ``num_entries[n]``.

    Returns:
        ``[N, K, ...]`` of each; unused slots repeat the position's first entry, and where it has none hold anything. And
        ``[N, K]`` bool, the slots that are used; None for all.
    """
    if num_entries is None:
        return [values.view(num_positions, len(slots), *values.shape[1:]) for values in entries], None
    sizes_N = num_entries.long()
    used_NK = slots < sizes_N[:, None]
    entry_NK = (sizes_N.cumsum(0) - sizes_N)[:, None] + torch.where(used_NK, slots, 0)
    if not len(entries[0]):
        entries = [values.new_zeros(1, *values.shape[1:]) for values in entries]
    entry_NK.clamp_(max=len(entries[0]) - 1)
    return [values[entry_NK] for values in entries], used_NK


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
            head = OutputHead.from_bytes(reader.head_bytes(), reader.spec.teacher.head_shape).to(device)
        return TargetDecoder(
            temperature=temperature,
            temperature_column=column,
            value_table=None if value_table is None else torch.tensor(value_table, device=device),
            tail_table=None if tail_table is None else torch.tensor(tail_table[column], device=device),
            teacher_head=head,
        )

    def decode(self, batch: dict[str, torch.Tensor], teacher: int = 0) -> BucketTargets | FullTargets | None:
        """Targets of one teacher from a batch that is on the device; None when it carries none."""
        columns = {name.partition("_")[2]: t for name, t in batch.items() if name.startswith(f"kd{teacher}_")}
        if "hidden" in columns:
            hidden = columns["hidden"]
            hidden = hidden.view(torch.bfloat16) if hidden.dtype == torch.int16 else hidden
            assert self.teacher_head is not None, "hidden targets come with a head"
            return FullTargets(hidden, self.teacher_head, self.temperature)
        return self.decode_buckets(columns) if "token_ids" in columns else None

    def decode_buckets(self, columns: dict[str, torch.Tensor]) -> BucketTargets:
        """Levels to logprobs at T: ``log_softmax(level / T) + log(1 - tail)``, the torch twin of ``at_temperature``."""
        tails = columns["tails"][:, self.temperature_column]
        names = [name for name in ("token_ids", "values", "counts") if name in columns]
        laid_out, used_NK = in_slots(
            columns.get("num_entries"), columns["slots"], len(tails), [columns[name] for name in names]
        )
        rectangles = dict(zip(names, laid_out, strict=True))
        values_NK = rectangles["values"]
        scores_NK = values_NK if self.value_table is None else self.value_table[values_NK.int()]
        tail_N = tails if self.tail_table is None else self.tail_table[tails.int()]
        scores_NK = scores_NK / self.temperature
        if used_NK is not None:
            scores_NK = scores_NK.masked_fill(~used_NK, -torch.inf)
        log_head = torch.log(-torch.expm1(tail_N))
        logprobs_NK = torch.log_softmax(scores_NK, dim=1) + log_head[:, None]
        ratios_NK = None
        if "counts" in rectangles:
            counts_NKT = rectangles["counts"].int() & 0xFFFF  # uint16 travels as int16
            ratios_NK = draw_ratios(counts_NKT, self.temperature_column, logprobs_NK, tail_N)
        excess_N = entropy_of(logprobs_NK) - columns["entropy"] if "entropy" in columns else None
        return BucketTargets(rectangles["token_ids"].long(), logprobs_NK, tail_N, ratios_NK, self.temperature, excess_N)


def draw_ratios(counts_NKT: torch.Tensor, column: int, logprobs_NK: torch.Tensor, tail_N: torch.Tensor) -> torch.Tensor:
    """``tau / t`` of entries at one temperature, the torch twin of ``SparseTargets.weights_at`` over the probabilities.

    Args:
        counts_NKT: ``[N, K, num_temperatures]``, draws; what stands in unused slots is not looked at.
        column: Where the temperature stands.
        logprobs_NK: ``[N, K]`` at that temperature, ``-inf`` in unused slots.
        tail_N: ``[N]`` log tail mass at that temperature.
    """
    used_NK = logprobs_NK > -torch.inf
    drawn_NK = counts_NKT.any(dim=2) & used_NK
    counts_NK = torch.where(used_NK, counts_NKT[:, :, column], 0).float()
    probabilities = logprobs_NK.exp()
    rest_N = tail_N.exp() + torch.where(drawn_NK, probabilities, 0.0).sum(1)
    share_N = rest_N / counts_NK.sum(1).clamp(min=1)
    ratios = counts_NK * share_N[:, None] / probabilities.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(drawn_NK, ratios, used_NK.float())


def decode_all(decoders: Sequence[tuple[float, TargetDecoder]], batch: dict[str, torch.Tensor]) -> Targets | None:
    """Targets of all teachers, mixed by weight where there are several; None when the batch carries none."""
    parts = [(weight, decoder.decode(batch, teacher)) for teacher, (weight, decoder) in enumerate(decoders)]
    present = tuple((weight, targets) for weight, targets in parts if targets is not None)
    if len(present) > 1:
        return MixedTargets(present)
    return present[0][1] if present else None
