"""S4 in small; the campaign is ``make prove-faults``."""

import os
from pathlib import Path

import pytest

from kdcache.cache.store import LocalStore
from kdcache.errors import KDCacheError
from tests.abuse.calls import watched
from tests.abuse.crashes import dump_here
from tests.abuse.faults import LOCAL_FAULTS, Failing, local_campaign, remote_campaign


@pytest.fixture(scope="module")
def options(tiny_teacher, corpus_file):
    return {
        "teacher": tiny_teacher, "dataset": corpus_file, "output": "", "split": "train[:4]", "seq_len": 64, "top_k": 8,
        "threads": 1, "batch_tokens": 256, "shard_positions": 300, "device": "cpu",
    }  # fmt: skip


@pytest.fixture(scope="module")
def with_tables(options, tmp_path_factory):
    """A cache to be transcoded."""
    cache = tmp_path_factory.mktemp("faults") / "with-tables"
    dump_here({**options, "id_tables": "global", "output": str(cache)})
    return cache


def test_a_folder_whose_calls_fail(options, tmp_path):
    """Either the dump ends well or says why; then it goes on, and the cache is the undisturbed one."""
    table = local_campaign(options, tmp_path, stride=29, first=5, kinds=["ENOSPC for good", "EIO"])
    assert all(row["calls"] >= 3 and row["said why"] >= 1 for row in table.values())


def test_a_folder_whose_calls_fail_while_it_is_transcoded(with_tables, tmp_path):
    """The same, where calls that read the old cache may fail too."""
    table = local_campaign({"cache": str(with_tables), "top_k": 4}, tmp_path, stride=13, kinds=["ENOSPC", "EIO"])
    assert all(row["calls"] >= 5 and row["said why"] >= 3 for row in table.values())
    assert {"write", "fsync", "link", "mkdir", "create"} & set(table["ENOSPC"]["functions"])
    assert {"open", "read", "stat", "listdir", "mmap"} & set(table["EIO"]["functions"])


def test_reads_and_writes_of_half_of_the_bytes(with_tables, tmp_path):
    """What the system does not do at once is done in the end."""
    (row,) = local_campaign(
        {"cache": str(with_tables), "top_k": 4}, tmp_path, stride=100, kinds=["half of the bytes for good"]
    ).values()
    assert row["ended well"] == 1
    assert "write" in row["functions"]


@pytest.mark.parametrize("act", ["put_if_absent", "replace", "read", "map", "exists", "names_in"])
@pytest.mark.parametrize("kind", ["EIO", "ESTALE"])
def test_each_call_of_a_store_says_why(tmp_path, act, kind):
    """Whichever call of the system fails below a verb of a store: an error of ours, or the verb did what it should."""
    store = LocalStore(tmp_path / "cache")
    store.put_if_absent("a/old", b"old")
    store.put_if_absent("a/new", b"new")
    acts = {
        "put_if_absent": lambda: store.put_if_absent("b/new", b"new"),
        "replace": lambda: store.replace("b/new", b"new"),
        "read": lambda: store.read("a/old") == b"old",
        "map": lambda: store.map("a/old", 3)[:] == b"old",
        "exists": lambda: store.exists("a/old"),
        "names_in": lambda: store.names_in("a") == ["new", "old"],
    }
    said = []
    for number in range(1, 100):
        store.delete("b/new")
        store.remove_empty("b")
        failing = Failing(number, LOCAL_FAULTS[kind])
        with watched([store.root], failing):
            try:
                assert acts[act]() in (True, None)
            except KDCacheError as error:
                said.append(error.message)
        if act in ("put_if_absent", "replace") and store.exists("b/new"):
            assert store.read("b/new") == b"new", "whole, or not there"
        if failing.calls < number:
            break
    assert said
    assert all(os.strerror(LOCAL_FAULTS[kind].code) in message for message in said)
    assert not [path for path in Path(store.root, "tmp").glob("*") if path.stat().st_size > 3]


def test_an_object_store_whose_calls_fail(options, tmp_path):
    kinds = ["503 for good", "time-out after success", "412 after success"]
    table = remote_campaign(options, tmp_path, stride=13, kinds=kinds)
    assert all(row["calls"] >= 2 for row in table.values())
    assert table["503 for good"]["ended well"] == 0
    assert table["time-out after success"]["said why"] == 0
