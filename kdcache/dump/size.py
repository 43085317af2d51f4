"""How large a corpus is, in tokens and shards, and a few hundred sequences that stand for it: nothing here needs a teacher."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kdcache.cache.shard import sequence_id
from kdcache.corpus import CorpusCounts, make_sequences
from kdcache.dump.worker import check_tokens, padded_size, plan_batches
from kdcache.progress import Progress
from kdcache.targets import TokenSequence

if TYPE_CHECKING:
    from kdcache.dump.plan import Draft

logger = logging.getLogger(__name__)

# Tokens up to which a corpus is counted to the last one: about a minute of tokenising.
COUNT_ALL = 20_000_000
SAMPLED_SHARDS = 32


@dataclass(frozen=True, slots=True)
class CorpusSize:
    """How much there is to read.

    Attributes:
        num_rows: Of the corpus.
        num_shards: That a dump makes of it.
        num_positions: Tokens of all sequences.
        num_padded: Positions that the teacher computes: a batch is as wide as its longest sequence.
        num_sequences: Of them.
        num_cut: Rows longer than a sequence: texts that go on in the next, chats and completions that are truncated.
        num_skipped: Rows with nothing to learn.
        error: Half of the 95 % interval of ``num_positions`` over it; 0 where all was counted.
    """

    num_rows: int
    num_shards: int
    num_positions: int
    num_padded: int
    num_sequences: int
    num_cut: int
    num_skipped: int
    error: float


def count_corpus(draft: Draft, sample: bool | None = None) -> CorpusSize:
    """Tokenise all of the corpus, or shards spread evenly over it; with None as its size asks.

    Args:
        draft: The dump.
        sample: Whether shards alone are enough.
    """
    spec = draft.spec
    sample = draft.num_tokens > COUNT_ALL if sample is None else sample
    shards = spread(spec.num_shards, SAMPLED_SHARDS if sample else spec.num_shards)
    what = "all rows" if len(shards) == spec.num_shards else f"{len(shards)} of {spec.num_shards} shards"
    logger.info("counting tokens: %s, about %s tokens in all", what, f"{draft.num_tokens:,.0f}")
    counts, positions, padded, sequences, rows = CorpusCounts(), [], 0, 0, []
    with Progress("count", len(shards)) as progress:
        for number, shard in enumerate(shards, start=1):
            made = make_sequences((draft.rows[i] for i in spec.rows(shard)), spec.corpus, draft.tokenizer, counts)
            lengths = [len(sequence) for sequence in made]
            positions.append(sum(lengths))
            padded += sum(padded_size(lengths, batch) for batch in plan_batches(lengths, spec.compute.batch_tokens))
            sequences += len(made)
            rows.append(len(spec.rows(shard)))
            progress.update(number, f"{number}/{len(shards)} shards, {sum(positions):,} tokens")
    seen, whole = sum(rows), spec.corpus.num_rows
    scale = whole / max(seen, 1)
    error = 0.0
    if (
        len(shards) < spec.num_shards
    ):  # shards are drawn without putting back; a shard has its rows in common with no other
        per_row = np.array(positions) / np.array(rows)
        spread_of_means = per_row.std(ddof=1) / math.sqrt(len(shards)) * math.sqrt(1 - len(shards) / spec.num_shards)
        error = float(1.96 * spread_of_means / max(per_row.mean(), 1e-9))
    return CorpusSize(
        num_rows=whole,
        num_shards=spec.num_shards,
        num_positions=round(sum(positions) * scale),
        num_padded=round(padded * scale),
        num_sequences=round(sequences * scale),
        num_cut=round((counts.num_split + counts.num_truncated) * scale),
        num_skipped=round(counts.num_skipped * scale),
        error=error,
    )


def spread(number: int, wanted: int) -> list[int]:
    """At most ``wanted`` of ``range(number)``, at even distances."""
    wanted = min(number, wanted)
    return [(2 * i + 1) * number // (2 * wanted) for i in range(wanted)]


def choose_pilot(draft: Draft, num_sequences: int) -> tuple[list[int], list[TokenSequence]]:
    """Ids and tokens of about so many sequences, evenly out of shards that lie evenly in the corpus, whole shards having been packed.

    Raises:
        CorpusError: A token that the teacher does not have.
    """
    shards = spread(draft.spec.num_shards, min(SAMPLED_SHARDS, num_sequences))
    ids: list[int] = []
    chosen: list[TokenSequence] = []
    for number, shard in enumerate(shards):
        made = make_sequences((draft.rows[i] for i in draft.spec.rows(shard)), draft.spec.corpus, draft.tokenizer)
        for sequence in made:
            check_tokens(sequence.input_ids, draft.spec, shard, draft.tokenizer)
        wanted = math.ceil((num_sequences - len(chosen)) / (len(shards) - number))
        for index in spread(len(made), wanted):
            ids.append(sequence_id(shard, index))
            chosen.append(made[index])
    return ids, chosen
