"""The path of one datum, by hand: a row of text to a student's loss. A tour for newcomers; read it beside the design."""

import numpy as np
import torch

from kdcache.cache.commit import commit_shard, publish_plan, seal
from kdcache.cache.reader import open_cache
from kdcache.cache.shard import ShardBuilder
from kdcache.cache.store import LocalStore
from kdcache.cache.sums import ShardSums
from kdcache.corpus import CorpusCounts, make_sequences
from kdcache.dump.engines.transformers import TransformersEngine
from kdcache.dump.options import DumpOptions
from kdcache.dump.plan import make_plan
from kdcache.heads import head_of, hidden_states
from kdcache.model_files import find_model
from kdcache.models import load_model, load_tokenizer
from kdcache.rows import load_rows
from kdcache.train.head import kd_loss
from kdcache.train.objective import Objective
from kdcache.train.stream import Item, TargetDecoder, collate


def test_one_datum(tmp_path, tiny_teacher, tiny_student, corpus_file):
    # The plan names everything that moves a stored number, before the first shard.
    store = LocalStore(tmp_path / "cache")
    plan, rows = make_plan(store, DumpOptions(teacher=tiny_teacher, dataset=corpus_file, split="train[:2]",
                                              output=str(store), seq_len=128, top_k=8, shard_positions=10_000))  # fmt: skip
    publish_plan(store, plan)

    # A row becomes token ids with a loss mask; documents are packed, and stay apart by their start positions.
    tokenizer = load_tokenizer(find_model(tiny_teacher))
    counts = CorpusCounts()
    (sequence, *_) = sequences = make_sequences(
        load_rows(corpus_file, "train[:2]"), plan.spec.corpus, tokenizer, counts
    )
    assert tokenizer.decode(sequence.input_ids).startswith(rows[0]["text"][:8]) or len(sequence.document_starts) > 1

    # The teacher reads it: hidden states, logits a chunk at a time, the entries to keep, an exact tail at each temperature.
    teacher = load_model(find_model(tiny_teacher), dtype=torch.float32)
    engine = TransformersEngine(teacher, plan.spec.teacher.vocab_size, plan.spec.targets, chunk_positions=64)
    targets = engine.run(sequences)
    assert len(targets[0]) == sequence.target_mask.sum(), "row t speaks of the token at t + 1"

    # Targets become compressed columns, columns a row of a shard, and a commit makes the shard count.
    builder, sums = ShardBuilder(plan.spec.make_codec(), plan.fingerprint, shard=0), ShardSums()
    for index, (one, said) in enumerate(zip(sequences, targets, strict=True)):
        builder.add(one, said)
        sums.add(index, one, said)
    total = sums.total(num_rows=counts.num_rows, num_skipped=counts.num_skipped, num_truncated=counts.num_truncated,
                       num_split=counts.num_split)  # fmt: skip
    assert commit_shard(store, plan, 0, memoryview(builder.finish()), total, worker="me", seconds=0.0)
    assert seal(store).sealed

    # Phase 2 opens the cache by index, without a teacher; probabilities and tail sum to one.
    reader = open_cache(tmp_path / "cache")
    row = reader[0]
    mass = np.add.reduceat(np.exp(row.targets.logprobs), row.targets.offsets[:-1]) + np.exp(row.targets.tail_at(1.0))
    np.testing.assert_allclose(mass, 1, atol=1e-5)

    # It travels on as small integers, and becomes logprobs where the student is.
    sequence, compact = reader.compact(0)
    batch = collate([Item(sequence, (compact,))])
    on_device = TargetDecoder.for_cache(reader, 2.0, torch.device("cpu")).decode(batch)

    # The student's hidden states meet it a chunk of positions at a time; the sum is divided once, by the number of targets.
    student = load_model(find_model(tiny_student), dtype=torch.float32)
    hidden = hidden_states(student, batch["input_ids"], batch["position_ids"])[batch["target_mask"]]
    labels = batch["input_ids"].roll(-1, dims=1)[batch["target_mask"]]
    sums = kd_loss(
        hidden, on_device, labels, Objective(0.7, temperature=2.0), head=head_of(student).first(reader.vocab_size)
    )
    (sums.loss / len(labels)).backward()
    assert student.get_input_embeddings().weight.grad.abs().sum() > 0
