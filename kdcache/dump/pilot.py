"""The pilot: the teacher reads a little of the corpus before the plan is made, to count which tokens follow which.

What is counted goes into the id tables of the codec. The pilot's sequences are the first ones of shards spread evenly over the
corpus; nothing of it is kept, and the dump reads them again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kdcache.cache.manifest import Plan
from kdcache.cache.shard import sequence_id
from kdcache.cache.tables import MAX_VOCAB, IdTables
from kdcache.corpus import CorpusCounts
from kdcache.dump.options import DumpOptions
from kdcache.dump.worker import Worker, plan_batches
from kdcache.targets import SparseTargets, TokenSequence, UIntArray

if TYPE_CHECKING:
    from kdcache.specs import CodecSpec, TargetSpec

logger = logging.getLogger(__name__)

# A list takes two kilobytes; a token seen less often has little to put into one.
NUM_CONTEXTS, LIST_LENGTH, LEAST_SEEN = 8192, 1024, 12
SHARE = 0.02
# Positions: fewer tell little of what follows a token, more tell nothing new.
LEAST, MOST = 4_096, 1_000_000
# From so many tokens on tables by context, or of the vocabulary alone, are worth their bytes and the pilot.
WORTH_CONTEXTS, WORTH_ORDER = 2_000_000, 200_000
MAX_ENTRIES = 1024


def choose_tables(
    options: DumpOptions, targets: TargetSpec, codec: CodecSpec, vocab_size: int, num_tokens: float
) -> str:
    """``none``, ``global`` or ``context``: what was asked for, or what pays.

    Args:
        options: Of the dump.
        targets: What is kept.
        codec: How it is stored.
        vocab_size: V.
        num_tokens: Of the corpus, about.
    """
    fits = codec.name == "packed" and vocab_size <= MAX_VOCAB and 0 < targets.max_entries <= MAX_ENTRIES
    if not fits:
        if options.id_tables not in ("auto", "none"):
            logger.info("no id tables for this codec, vocabulary or number of entries")
        return "none"
    if options.id_tables != "auto":
        return options.id_tables
    return "context" if num_tokens >= WORTH_CONTEXTS else "global" if num_tokens >= WORTH_ORDER else "none"


def count_tables(worker: Worker, kind: str, num_tokens: float) -> IdTables:
    """Run the pilot and count.

    Args:
        worker: With the teacher and a plan that names no tables yet.
        kind: ``global`` or ``context``.
        num_tokens: Of the corpus, about.
    """
    num_positions = pilot_positions(num_tokens)
    logger.info("pilot: the teacher reads %s tokens to count what follows what", f"{num_positions:,}")
    pilot = list(_read(worker, num_positions))
    contexts = NUM_CONTEXTS if kind == "context" else 0
    return IdTables.count(pilot, worker.plan.spec.teacher.vocab_size, contexts, LIST_LENGTH, LEAST_SEEN)


def pilot_positions(num_tokens: float) -> int:
    """Positions that are counted of a corpus of so many tokens."""
    return int(min(max(SHARE * num_tokens, LEAST), MOST))


def _read(worker: Worker, num_positions: int) -> Iterator[tuple[UIntArray, SparseTargets]]:
    """Tokens before, and targets, of the pilot's sequences."""
    plan, done = worker.plan, 0
    shards = _spread(plan, num_positions)
    for number, shard in enumerate(shards, start=1):
        sequences: list[TokenSequence] = []
        for sequence in worker.sequences(shard, CorpusCounts()):
            if done >= num_positions * number / len(shards):
                break
            sequences.append(sequence)
            done += len(sequence)
        for indices in plan_batches([len(s) for s in sequences], plan.spec.compute.batch_tokens):
            batch = [sequences[i] for i in indices]
            ids = [sequence_id(shard, i) for i in indices]
            for sequence, targets in zip(batch, worker.engine.run(batch, ids), strict=True):
                yield sequence.contexts, targets


def _spread(plan: Plan, num_positions: int) -> list[int]:
    """Shards at even distances: as many as give each at least a few sequences."""
    wanted = max(1, num_positions // (4 * plan.spec.corpus.seq_len))
    step = max(1, plan.spec.num_shards // wanted)
    return list(range(0, plan.spec.num_shards, step))
