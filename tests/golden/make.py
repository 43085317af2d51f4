"""Make the golden caches that are not there: ``python -m tests.golden.make``. Those that are there stay as they are, for good."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from kdcache.cache.commit import commit_shard, load_codec, publish_plan, seal, table_name
from kdcache.cache.manifest import Plan
from kdcache.cache.shard import ShardBuilder, digest
from kdcache.cache.store import LocalStore
from kdcache.cache.sums import ShardSums
from kdcache.cache.tables import IdTables
from kdcache.dump.draw import position_uniforms
from kdcache.dump.select import select
from kdcache.heads import OutputHead
from kdcache.targets import SparseTargets, TokenSequence
from tests.strategies import VOCAB_SIZE, make_plan, zipf_logits

GOLDEN = Path(__file__).parent / "version-1"
HIDDEN_SIZE = 16
TOP_K = {"scheme": "top_k", "k": 8, "temperatures": [1.0, 2.0]}
GENERATION = {"max_new_tokens": 16, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1, "seed": 3, "num_answers": 2, "chat": True,
              "system": "Be brief.", "min_tokens": 2, "max_repetition": 0.5, "keep_unfinished": False, "keep_duplicates": True}  # fmt: skip
CASES = {
    "packed-top_k": {"targets": TOP_K},
    "packed-high": {"targets": TOP_K, "codec": {"name": "packed", "step": 0.018, "growth": 0.3, "max_kl": 1e-4}},
    "exact-top_k": {"targets": TOP_K, "codec__name": "exact"},
    "packed-top_p": {"targets": {"scheme": "top_p", "k": 16, "top_p": 0.8, "temperatures": [1.0]}},
    "packed-sampled": {"targets": {"scheme": "sampled", "k": 0, "num_draws": 20, "temperatures": [1.0]}},
    "packed-frequencies": {"targets": {"scheme": "sampled", "k": 0, "num_draws": 40, "temperatures": [1.0], "frequencies": True}},
    "exact-frequencies": {"targets": {"scheme": "systematic", "k": 0, "num_draws": 10, "temperatures": [1.0], "frequencies": True}, "codec__name": "exact"},
    "packed-hybrid": {"targets": {"scheme": "hybrid", "k": 4, "num_draws": 6, "temperatures": [1.0, 2.0]}},
    "packed-many-draws": {"targets": {"scheme": "systematic", "k": 0, "num_draws": 400, "temperatures": [1.0]}},
    "exact-systematic": {"targets": {"scheme": "systematic", "k": 0, "num_draws": 10, "temperatures": [1.0]}, "codec__name": "exact"},
    "packed-wide-vocabulary": {"targets": TOP_K, "teacher__vocab_size": 131_073, "tokenizer__num_tokens": 131_073},
    "packed-vast-vocabulary": {"targets": TOP_K, "teacher__vocab_size": (1 << 20) + 1, "tokenizer__num_tokens": (1 << 20) + 1},
    "exact-hybrid": {"targets": {"scheme": "hybrid", "k": 4, "num_draws": 6, "temperatures": [1.0, 2.0]}, "codec__name": "exact"},
    "hidden": {"targets": {"scheme": "hidden", "k": 0, "temperatures": [1.0]}, "codec__name": "exact"},
    "packed-small-generated": {"targets": TOP_K, "codec": {"name": "packed", "step": 0.28, "growth": 0.25, "max_kl": 1e-2},
                               "corpus__columns": "prompt", "generation": GENERATION},
    "packed-even-averaged": {"targets": {"scheme": "top_k", "k": 100, "temperatures": [1.0]},
                             "codec": {"name": "packed", "step": 0.03, "growth": 0.97 / 6, "max_kl": 2e-4},
                             "teacher__averaged": [{"fingerprint": "5" * 32, "weight": 0.3}]},
    "packed-rollouts-transcoded": {"targets": TOP_K, "transcoded_from": "7" * 32, "corpus__columns": "tokens", "corpus__written_by": "9" * 32},
    "hidden-bfloat16": {"targets": {"scheme": "hidden", "k": 0, "temperatures": [1.0]}, "codec__name": "exact", "teacher__dtype": "bfloat16"},
}  # fmt: skip

# Contexts of the id tables; without any, ids are told by rank alone.
WITH_TABLES = {
    "packed-top_k-id-tables": 20,
    "packed-top_k-id-tables-by-rank": 0,
    "packed-hybrid-id-tables": 20,
    "packed-frequencies-id-tables": 20,
}


def a_row(plan: Plan, index: int) -> tuple[TokenSequence, SparseTargets]:
    """A sequence of two documents, and targets of random logits."""
    rng = np.random.default_rng(index)
    vocab_size, spec = plan.spec.teacher.vocab_size, plan.spec.targets
    length = int(rng.integers(6, 20))
    ids = rng.integers(0, vocab_size, length).astype(np.uint32)
    starts = np.array([0, length // 2], np.uint32)
    mask = rng.random(length) < 0.8
    mask[starts] = False
    sequence = TokenSequence(ids, mask, starts)
    labels = torch.from_numpy(ids[1:][mask[1:]].astype(np.int64))
    logits = torch.from_numpy(zipf_logits(rng, len(labels), vocab_size).astype(np.float32))
    uniforms = None
    if spec.num_draws:
        uniforms = torch.from_numpy(position_uniforms(spec, index, sequence.target_mask))
    chosen = select(logits, labels, spec, uniforms)
    used = torch.arange(chosen.token_ids.shape[1]) < chosen.num_entries[:, None]
    hidden = None
    if spec.scheme == "hidden":
        hidden = rng.normal(size=(len(labels), HIDDEN_SIZE)).astype(np.float32)
        if plan.spec.teacher.dtype == "bfloat16":
            hidden = (hidden.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return sequence, SparseTargets(
        spec.temperatures,
        chosen.num_entries.numpy().astype(np.uint32),
        chosen.token_ids[used].numpy().astype(np.uint32),
        chosen.logprobs[used].numpy(),
        chosen.tail_logprobs.numpy(),
        chosen.logz.numpy(),
        chosen.label_logprobs.numpy(),
        chosen.entropy.numpy(),
        hidden,
        None if chosen.counts is None else chosen.counts[used].numpy().astype(np.uint16),
    )


def make_cache(folder: Path, plan: Plan, tables: IdTables | None = None) -> None:
    """Two shards, three sequences and two."""
    store = LocalStore(folder)
    if tables is not None:
        store.put_if_absent(table_name(digest(tables.to_bytes())), tables.to_bytes())
    publish_plan(store, plan)
    head_digest = None
    if plan.spec.targets.scheme == "hidden":
        torch.manual_seed(0)
        head = OutputHead(torch.randn(VOCAB_SIZE, HIDDEN_SIZE).to(torch.bfloat16)).to_bytes()
        head_digest = digest(head)
        store.put_if_absent(table_name(head_digest), head)
    codec = load_codec(store, plan.spec)
    for shard in range(plan.spec.num_shards):
        builder, sums = ShardBuilder(codec, plan.fingerprint, shard), ShardSums()
        for row, index in enumerate(plan.spec.rows(shard)):
            sequence, targets = a_row(plan, index)
            frames = codec.encode(targets, sequence.contexts)
            builder.add_frames(sequence, frames)
            sums.add(row, sequence, targets)
            sums.add_error(row, sequence, targets, codec, frames)
        total = sums.total(num_rows=len(plan.spec.rows(shard)), num_skipped=0, num_truncated=0, num_split=0)
        data = memoryview(builder.finish())
        commit_shard(store, plan, shard, data, total, worker="golden", seconds=1.0, head_digest=head_digest)
    seal(store)


def main() -> None:
    """Make those that are not there."""
    for name, changes in CASES.items():
        plan = make_plan(corpus__num_rows=5, corpus__packing=True, **changes)
        if not (GOLDEN / name).exists():
            make_cache(GOLDEN / name, plan)
    for name, num_contexts in WITH_TABLES.items():
        if (GOLDEN / name).exists():
            continue
        changes = CASES[name.partition("-id-tables")[0]]
        plan = make_plan(corpus__num_rows=5, corpus__packing=True, **changes)
        pilot = [(sequence.contexts, targets) for sequence, targets in (a_row(plan, index) for index in range(40))]
        tables = IdTables.count(pilot, plan.spec.teacher.vocab_size, num_contexts=num_contexts, list_length=8)
        changed = changes | {"codec__id_tables": digest(tables.to_bytes())}
        make_cache(GOLDEN / name, make_plan(corpus__num_rows=5, corpus__packing=True, **changed), tables)


if __name__ == "__main__":
    main()
