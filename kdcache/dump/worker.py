"""One idempotent unit of work: dump shard i. A function of the plan and the shard's rows; which worker does it is no matter.

Encoding and writing run on one background thread while the teacher goes on. Its result is taken before the next piece is
handed over, so an error there stops the dump at once.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from kdcache.cache.codec import Codec
from kdcache.cache.commit import commit_shard, load_codec
from kdcache.cache.lease import Lease
from kdcache.cache.manifest import CacheSpec, Plan
from kdcache.cache.shard import ShardBuilder, sequence_id
from kdcache.cache.store import Store, hostname
from kdcache.cache.sums import SHARD_FACTOR, ShardSums, warn_about_error
from kdcache.cache.work import Remaining
from kdcache.corpus import CorpusCounts, Rows, make_sequences
from kdcache.errors import CorpusError, KDCacheError, TeacherOutputError
from kdcache.targets import SparseTargets, TokenSequence, check_alignment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POLL_SECONDS = 0.5


class Engine(Protocol):
    """Token ids to what the teacher says about them."""

    num_splits: int

    def run(self, batch: list[TokenSequence], sequence_ids: Sequence[int]) -> list[SparseTargets]:
        """Targets of each sequence, in order. What is drawn at random depends on the ids and nothing else."""


@dataclass(slots=True)
class Worker:
    """Everything that dumping a shard needs. ``on_progress(positions, fraction of the shard)`` is called after each batch.

    Attributes:
        store: Where the cache is.
        plan: Its plan.
        rows: The whole corpus.
        tokenizer: The teacher's.
        engine: The teacher.
        head_digest: Of the output head in ``tables/``, for hidden states.
        offset: Where this worker begins in the list of shards, so that several do not start at the same one.
        should_stop: Asked between shards.
        on_progress: Told after each batch.
        on_committed: Told after each commit of this worker.
    """

    store: Store
    plan: Plan
    rows: Rows
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    head_digest: str | None = None
    offset: float = 0.0
    should_stop: Callable[[], bool] = lambda: False
    on_progress: Callable[[int, float], None] = lambda positions, fraction: None
    on_committed: Callable[[], None] = lambda: None
    _remaining: Remaining | None = None
    _codec: Codec | None = None
    _leases: list[Lease] = field(default_factory=list)
    _pending: Future[None] | None = None
    _executor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "kdcache-writer"))

    def work(self) -> None:
        """Dump shards until all are committed or someone asks to stop.

        While the last shards are in other hands, waits for them: if their worker dies its lease goes stale, and the shard
        is done here.
        """
        try:
            remaining = self._remaining = Remaining(self.store, self.plan.spec.num_shards, self.offset)
            while remaining and not self.should_stop():
                lease = remaining.claim()
                if lease is not None:
                    self._leases.append(lease)
                    self.dump_shard(lease)
                elif not self._drain():  # what is left is in other hands, not in our own writer's
                    time.sleep(POLL_SECONDS)
            self._drain()
        finally:
            self._executor.shutdown(wait=True, cancel_futures=True)
            for lease in self._leases:  # what this worker could not finish, another need not wait for
                with suppress(KDCacheError):
                    lease.release()

    @property
    def num_committed(self) -> int:
        """Shards that this worker knows to be committed, by whomever."""
        left = self.plan.spec.num_shards if self._remaining is None else len(self._remaining)
        return self.plan.spec.num_shards - left - len(self._leases)

    def dump_shard(self, lease: Lease) -> None:
        """Dump one shard; its last batch and its commit are finished in the background."""
        started, splits_before = time.monotonic(), self.engine.num_splits
        spec, shard = self.plan.spec, lease.shard
        counts, dropped = CorpusCounts(), Counter[str]()
        sequences: dict[int, TokenSequence] = {}
        frames: dict[int, dict[str, bytes]] = {}
        stats = ShardSums()
        codec = self._codec = self._codec or load_codec(self.store, spec)

        def encode(indices: Sequence[int], batch: list[SparseTargets]) -> None:
            for index, targets in zip(indices, batch, strict=True):
                where = f"shard {shard:05d}, sequence {index}"
                check_alignment(sequences[index], targets, where, np.full(len(targets), 1e-3, dtype=np.float32))
                frames[index] = codec.encode(targets, sequences[index].contexts)
                stats.add(index, sequences[index], targets)
                stats.add_error(index, sequences[index], targets, codec, frames[index])

        def finish() -> None:
            builder = ShardBuilder(codec, self.plan.fingerprint, shard)
            for index in range(len(sequences)):
                builder.add_frames(sequences[index], frames[index])
            total = stats.total(
                num_rows=counts.num_rows, num_skipped=counts.num_skipped, num_truncated=counts.num_truncated,
                num_split=counts.num_split, **dropped,
            )  # fmt: skip
            warn_about_error(total, spec.codec.max_kl, f"shard {shard:05d}", factor=SHARD_FACTOR)
            commit_shard(
                self.store, self.plan, shard, memoryview(builder.finish()), total,
                worker=f"{hostname()}:{os.getpid()}", seconds=time.monotonic() - started,
                batch_splits=self.engine.num_splits - splits_before, head_digest=self.head_digest,
            )  # fmt: skip
            self._release(lease)
            self.on_committed()

        for indices, batch, targets in self.said(lease, counts, dropped):
            sequences |= dict(zip(indices, batch, strict=True))
            self._submit(partial(encode, indices, targets))
        self._submit(finish)

    def said(
        self, lease: Lease, counts: CorpusCounts, dropped: Counter[str]
    ) -> Iterator[tuple[list[int], list[TokenSequence], list[SparseTargets]]]:
        """The sequences of a shard with their numbers and targets, a batch at a time; what becomes of rows is counted on the way."""
        spec, shard = self.plan.spec, lease.shard
        sequences = self.sequences(shard, counts)
        batches = plan_batches([len(sequence) for sequence in sequences], spec.compute.batch_tokens)
        for number, indices in enumerate(batches, start=1):
            lease.renew()
            batch = [sequences[i] for i in indices]
            try:
                targets = self.engine.run(batch, [sequence_id(shard, i) for i in indices])
            except TeacherOutputError as error:
                raise self._name_culprit(shard, indices, batch, error) from error
            yield indices, batch, targets
            self.on_progress(sum(len(sequence) for sequence in batch), number / len(batches))

    def sequences(self, shard: int, counts: CorpusCounts) -> list[TokenSequence]:
        """Those of a shard; what becomes of rows is counted.

        Raises:
            CorpusError: A token that the teacher does not have.
        """
        rows = self.plan.spec.rows(shard)
        made = make_sequences((self.rows[i] for i in rows), self.plan.spec.corpus, self.tokenizer, counts)
        for sequence in made:
            check_tokens(sequence.input_ids, self.plan.spec, shard, self.tokenizer)
        return made

    def _release(self, lease: Lease) -> None:
        lease.release()
        self._leases.remove(lease)

    def _submit(self, job: Callable[[], None]) -> None:
        self._drain()
        self._pending = self._executor.submit(job)

    def _drain(self) -> bool:
        """Wait for the writer; whether it had something to do."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
        return pending is not None

    def _name_culprit(
        self, shard: int, indices: Sequence[int], batch: list[TokenSequence], error: TeacherOutputError
    ) -> KDCacheError:
        """Find the sequence whose logits are not finite, by running each alone."""
        for index, sequence in zip(indices, batch, strict=True):
            try:
                self.engine.run([sequence], [sequence_id(shard, index)])
            except TeacherOutputError as alone:
                return TeacherOutputError(
                    f"shard {shard:05d}, sequence {index} (id {sequence_id(shard, index)}, rows "
                    f"{self.plan.spec.rows(shard)}): {alone.message}",
                    hint="try --dtype float32 or bfloat16; nothing of this shard was kept",
                )
        return TeacherOutputError(f"shard {shard:05d}: {error.message}, in a batch but in none of its sequences alone")


def check_tokens(input_ids: npt.ArrayLike, spec: CacheSpec, shard: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse tokens past the teacher's vocabulary, which happens where its tokenizer got new ones and its embedding did not.

    Raises:
        CorpusError: There is one in a text of this shard.
    """
    vocab_size, rows = spec.teacher.vocab_size, spec.rows(shard)
    if (largest := int(np.max(input_ids, initial=0))) >= vocab_size:
        raise CorpusError(
            f"rows {rows.start} to {rows.stop - 1}: the tokenizer gives token {largest} ({tokenizer.decode([largest])!r}), "
            f"the teacher has {vocab_size} tokens",
            hint="the tokenizer that the teacher was trained with, or teacher.resize_token_embeddings(len(tokenizer))",
        )


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Sequence numbers by batch, longest first, padded size at most ``batch_tokens`` (or one sequence)."""
    batches: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * width > batch_tokens:
            batches.append([])
            width = lengths[index]
        batches[-1].append(index)
    return batches


def padded_size(lengths: Sequence[int], batch: Sequence[int]) -> int:
    """Positions that a batch of these sequences takes, padding included."""
    return len(batch) * max(lengths[index] for index in batch)
