"""Caches written once stay readable, and say what a reader made from ``docs/format.md`` alone finds in them."""

from pathlib import Path

import numpy as np
import pytest

from kdcache.cache.reader import open_cache
from kdcache.cache.store import LocalStore
from kdcache.cache.verify import verify_cache
from tests.reference_reader import read_cache
from tests.strategies import make_plan, write_cache

pytestmark = pytest.mark.usefixtures("codec_form")

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "version-1").iterdir())


def assert_agree(folder):
    cache, reference = open_cache(folder), list(read_cache(folder))
    assert len(cache) == len(reference) > 0
    for row, other in zip(cache, reference, strict=True):
        sequence, targets = row.sequence, row.targets
        ours = {"input_ids": sequence.input_ids, "loss_mask": sequence.loss_mask, "num_entries": targets.num_entries,
                "document_starts": sequence.document_starts, "token_ids": targets.token_ids,
                "logprobs": targets.logprobs, "tails": targets.tail_logprobs, "logz": targets.logz,
                "label_logprobs": targets.label_logprobs, "entropy": targets.entropy}  # fmt: skip
        ours |= {name: array for name in ("counts", "hidden") if (array := getattr(targets, name)) is not None}
        assert ours.keys() == other.keys()
        for name, array in ours.items():
            if np.issubdtype(array.dtype, np.floating):
                np.testing.assert_allclose(array, other[name], rtol=1e-5, atol=1e-5, err_msg=name)
            else:
                np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda path: path.name)
def test_golden_caches_are_whole_and_two_readers_agree(folder):
    assert verify_cache(LocalStore(folder)).intact
    assert_agree(folder)


def test_there_is_a_golden_cache_of_every_codec_and_kind_of_scheme():
    specs = [open_cache(folder).spec for folder in GOLDEN]
    assert {(spec.codec.name, spec.targets.scheme) for spec in specs} >= {
        ("packed", "top_k"), ("exact", "top_k"), ("packed", "top_p"), ("packed", "sampled"), ("packed", "hybrid"),
        ("packed", "systematic"), ("exact", "systematic"), ("exact", "hybrid"), ("exact", "hidden"),
    }  # fmt: skip
    assert {spec.codec.max_kl for spec in specs if spec.codec.name == "packed"} == {1e-2, 1e-3, 2e-4, 1e-4}
    assert any(spec.generation for spec in specs) and any(spec.teacher.averaged for spec in specs)
    assert any(spec.transcoded_from for spec in specs) and any(spec.corpus.written_by for spec in specs)
    vocabularies = {spec.teacher.vocab_size for spec in specs if spec.codec.name == "packed"}
    assert min(vocabularies) < 1 << 16 < 1 << 17 < max(vocabularies - {max(vocabularies)}) < 1 << 20 < max(vocabularies)
    assert sum(path.stat().st_size for folder in GOLDEN for path in folder.rglob("*") if path.is_file()) < 20_000 * len(
        GOLDEN
    )


@pytest.mark.parametrize(
    "changes", [{}, {"codec__name": "exact"}, {"targets__k": 300}, {"teacher__vocab_size": 70_000}]
)
def test_two_readers_agree_on_caches_made_now(tmp_path, changes):
    if "teacher__vocab_size" in changes:
        changes = changes | {"tokenizer__num_tokens": 70_000}
    write_cache(tmp_path, make_plan(**changes))
    assert_agree(tmp_path)
