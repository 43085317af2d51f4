"""Packing loses nothing and mixes nothing."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kdcache.corpus import CorpusCounts, Document, _cut, _join, best_fit
from kdcache.specs import CorpusSpec
from tests.strategies import make_spec

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=80)


def spec(seq_len: int, packing: bool = True, columns: str = "text") -> CorpusSpec:
    return CorpusSpec(
        dataset="d", digest="0" * 32, split="train", num_rows=1, columns=columns, text_column="text", seq_len=seq_len,
        packing=packing, append_eos=True, assistant_only=True,
    )  # fmt: skip


def documents(sizes):
    """Document d holds the tokens 1000 d, 1000 d + 1, ...: every token says where it is from."""
    out = []
    for number, size in enumerate(sizes):
        mask = np.ones(size, dtype=bool)
        mask[0] = False
        out.append(Document((1000 * number + np.arange(size)).astype(np.uint32), mask))
    return out


@given(lengths, st.integers(50, 120))
def test_best_fit_takes_every_item_once_and_never_too_many(sizes, capacity):
    bins = best_fit(sizes, capacity)
    assert sorted(item for group in bins for item in group) == list(range(len(sizes)))
    assert all(sum(sizes[item] for item in group) <= capacity for group in bins)


@given(lengths, st.integers(50, 120))
def test_best_fit_leaves_no_two_bins_that_fit_into_one(sizes, capacity):
    loads = sorted(sum(sizes[item] for item in group) for group in best_fit(sizes, capacity))
    assert len(loads) < 2 or loads[0] + loads[1] > capacity


@given(st.lists(st.integers(2, 200), min_size=1, max_size=30), st.integers(2, 64))
def test_texts_keep_every_token_but_a_lone_last_one(sizes, seq_len):
    pieces = [piece for document in documents(sizes) for piece in _cut(document, spec(seq_len), CorpusCounts())]
    kept = Counter(int(i) for piece in pieces for i in piece.input_ids)
    lost = {1000 * n + s - 1 for n, s in enumerate(sizes) if s > seq_len and s % seq_len == 1}
    assert kept == Counter(i for d in documents(sizes) for i in map(int, d.input_ids) if i not in lost)
    assert all(len(piece.input_ids) <= seq_len and not piece.loss_mask[0] for piece in pieces)


@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(40, 90))
def test_documents_stay_whole_and_apart_inside_a_sequence(sizes, seq_len):
    all_documents = documents(sizes)
    for group in best_fit(sizes, seq_len):
        sequence = _join([all_documents[i] for i in group])
        ends = [*sequence.document_starts[1:], len(sequence)]
        for number, start, end in zip(group, sequence.document_starts, ends, strict=True):
            assert (sequence.input_ids[start:end] == all_documents[number].input_ids).all()
            assert (sequence.position_ids[start:end] == np.arange(end - start)).all()
        assert not sequence.loss_mask[sequence.document_starts].any()
        assert int(sequence.target_mask.sum()) == sum(sizes[i] - 1 for i in group)


@given(st.integers(1, 500), st.integers(1, 60))
def test_shards_partition_the_rows(num_rows, rows_per_shard):
    base = make_spec()
    whole = base.model_copy(
        update={"corpus": base.corpus.model_copy(update={"num_rows": num_rows}), "rows_per_shard": rows_per_shard}
    )
    rows = [row for shard in range(whole.num_shards) for row in whole.rows(shard)]
    assert rows == list(range(num_rows))
    assert all(len(whole.rows(shard)) > 0 for shard in range(whole.num_shards))
