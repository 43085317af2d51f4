"""S4 in small; the campaign is ``make prove-faults``."""

import pytest

from tests.abuse.faults import local_campaign, remote_campaign


@pytest.fixture
def options(tiny_teacher, corpus_file):
    return {
        "teacher": tiny_teacher, "dataset": corpus_file, "output": "", "split": "train[:4]", "seq_len": 64, "top_k": 8,
        "threads": 1, "batch_tokens": 256, "shard_positions": 300, "device": "cpu",
    }  # fmt: skip


def test_a_folder_whose_calls_fail(options, tmp_path):
    """Either the dump ends well or says why; then it goes on, and the cache is the undisturbed one."""
    (full,) = local_campaign(options, tmp_path, stride=17, kinds=["ENOSPC"]).values()
    assert full["calls"] >= 3
    assert full["said why"] >= 1


def test_an_object_store_whose_calls_fail(options, tmp_path):
    kinds = ["503 for good", "time-out after success", "412 after success"]
    table = remote_campaign(options, tmp_path, stride=13, kinds=kinds)
    assert all(row["calls"] >= 2 for row in table.values())
    assert table["503 for good"]["ended well"] == 0
    assert table["time-out after success"]["said why"] == 0
