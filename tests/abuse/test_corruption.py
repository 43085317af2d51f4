"""S2 and S3 in small: every flipped bit is noticed and its file named, and a cache from a stranger can do nothing but be refused."""

import json
import os
import shutil

import numpy as np
import pytest

from kdcache.cache.commit import commit_name, current_manifest
from kdcache.cache.frames import compress
from kdcache.cache.reader import open_cache
from kdcache.cache.store import LocalStore
from kdcache.cache.verify import verify_cache
from kdcache.dump.launch import dump
from kdcache.dump.options import DumpOptions
from kdcache.errors import CacheError
from tests.abuse.corruption import are_named, audited
from tests.abuse.hostile import forge
from tests.strategies import make_plan, write_cache

FLIPS = 150


@pytest.fixture(scope="module", params=["packed", "exact", "hidden"])
def sound(request, tmp_path_factory, tiny_teacher, corpus_file):
    """A finished cache of each kind; the packed one with id tables."""
    folder = tmp_path_factory.mktemp("sound") / request.param
    kind = {"packed": {"id_tables": "global"}, "exact": {"codec": "exact"}, "hidden": {"targets": "hidden"}}[
        request.param
    ]
    dump(DumpOptions(teacher=tiny_teacher, dataset=corpus_file, split="train[:9]", output=str(folder), seq_len=64,
                     threads=1, top_k=8, shard_positions=200, device="cpu", **kind))  # fmt: skip
    shutil.rmtree(folder / "runs")
    assert verify_cache(LocalStore(folder)).intact
    return folder


def is_refused(folder):
    """Whether an audit finds something, or cannot even begin."""
    return not audited(folder).intact


def read_everything(folder):
    for row in open_cache(folder):
        assert row.sequence is not None


def test_every_flipped_bit_is_detected(tmp_path, sound):
    """One bit of any file of a cache, at places drawn over all files alike; the file is named, and the shard."""
    cache = tmp_path / "c"
    shutil.copytree(sound, cache)
    paths = sorted(path for path in cache.rglob("*") if path.is_file())
    kinds = {path.relative_to(cache).parts[0] for path in paths}
    assert {"plan.json", "manifest.json", "commits", "shards"} <= kinds
    rng = np.random.default_rng(0)
    for number in range(FLIPS):
        path = paths[number % len(paths)]
        whole = path.read_bytes()
        changed = bytearray(whole)
        at, bit = int(rng.integers(len(whole))), int(rng.integers(8))
        changed[at] ^= 1 << bit
        path.write_bytes(changed)
        audit = audited(cache)
        assert not audit.intact, f"{path.relative_to(cache)}: bit {bit} of byte {at} went unnoticed"
        assert are_named(audit, path), f"{path.relative_to(cache)}: bit {bit} of byte {at}: {audit}"
        path.write_bytes(whole)
    assert not is_refused(cache)


def test_a_flipped_bit_of_a_shard_is_refused_by_the_reader_and_named(tmp_path, sound):
    """Not only by an audit: training cannot begin to read it."""
    cache = tmp_path / "c"
    shutil.copytree(sound, cache)
    rng = np.random.default_rng(1)
    for path in sorted((cache / "shards").iterdir()):
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[int(rng.integers(len(whole)))] ^= 1
        path.write_bytes(changed)
        with pytest.raises(CacheError, match=f"shard {path.name[:5]}"):
            read_everything(cache)
        path.write_bytes(whole)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_truncation_is_refused(tmp_path, sound, keep):
    cache = tmp_path / "c"
    shutil.copytree(sound, cache)
    for path in sorted(path for path in cache.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        path.write_bytes(whole[:keep])
        assert are_named(audited(cache), path), path.name
        path.write_bytes(whole)


def test_swapped_missing_and_doubled_files_are_refused(tmp_path, sound):
    cache = tmp_path / "c"
    shutil.copytree(sound, cache)
    first, second = sorted((cache / "shards").iterdir())[:2]
    one, two = first.read_bytes(), second.read_bytes()
    for change, damaged in (((two, one), [first, second]), ((one, one), [second])):
        first.write_bytes(change[0])
        second.write_bytes(change[1])
        assert are_named(audited(cache), *damaged)
    first.write_bytes(one)
    second.unlink()
    assert are_named(audited(cache), second)
    second.write_bytes(two)
    commits = sorted((cache / "commits").iterdir())
    for stray in ("99999.json", "000000.json"):  # of no shard, and a second spelling of one
        shutil.copy(commits[0], cache / "commits" / stray)
        assert any(f"commits/{stray}" in line for line in audited(cache).problems)
        (cache / "commits" / stray).unlink()
    for table in (cache / "tables").glob("*"):
        whole = table.read_bytes()
        table.unlink()
        assert are_named(audited(cache), table)
        table.write_bytes(whole)
    commits[0].rename(cache / "commits" / "held")
    audit = audited(cache)
    assert not audit.intact, "the manifest names a shard that nobody committed"
    assert audit.missing == [0]


def test_a_missing_manifest_is_no_damage(tmp_path, sound):
    """It follows from the commits: without it the cache is one that was not sealed, and reads the same."""
    cache = tmp_path / "c"
    shutil.copytree(sound, cache)
    (cache / "manifest.json").unlink()
    assert audited(cache).intact
    assert open_cache(cache).manifest == open_cache(sound).manifest


# --- caches from strangers: every digest is right, the content is not --------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "column", "content"),
    [
        ("exact", "logprobs", lambda n: np.full(n, np.nan, np.float32)),
        ("exact", "logprobs", lambda n: np.full(n, 0.5, np.float32)),
        ("exact", "token_ids", lambda n: np.full(n, 300, np.uint32)),
        ("exact", "token_ids", lambda n: np.full(n, 2**32 - 1, np.uint32)),
        ("packed", "id_symbols", lambda n: np.full(n, 59, np.uint8)),
        ("packed", "levels", lambda n: np.full(n, 255, np.uint8)),
    ],
)
def test_hostile_values_are_refused(tmp_path, codec, column, content):
    """NaN, probabilities above one, ids past the vocabulary, levels that cannot be: a clear error, no number gets through."""
    store = write_cache(tmp_path / "c", make_plan(codec__name=codec))
    entries = len(open_cache(store.root)[0].targets.token_ids)
    forge(store, **{column: compress(content(entries))})
    with pytest.raises(CacheError, match="shard 00000, sequence 0"):
        read_everything(store.root)
    assert is_refused(store.root)


@pytest.mark.parametrize("column", ["input_ids", "loss_mask", "document_starts", "num_entries", "id_symbols", "levels"])
def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, column):
    """A frame of a few KB that unpacks to a gigabyte."""
    import tracemalloc

    import zstandard

    store = write_cache(tmp_path / "c")
    bomb = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(bytes(1 << 30))
    assert len(bomb) < 200_000
    forge(store, **{column: bomb})
    tracemalloc.start()
    with pytest.raises(CacheError):
        read_everything(store.root)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20


def test_a_future_version_says_what_to_do(tmp_path):
    store = write_cache(tmp_path / "c")
    plan = json.loads(store.read("plan.json"))
    store.replace("plan.json", json.dumps(plan | {"format_version": 99}).encode())
    with pytest.raises(CacheError, match="99") as caught:
        open_cache(store.root)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "shards/../../x", "a\x00b", "x" * 5000])
def test_hostile_names_lead_nowhere(tmp_path, name):
    """Paths are made from numbers and digests, never from a file: a digest that is none is refused."""
    store = write_cache(tmp_path / "c")
    commit = json.loads(store.read(commit_name(0)))
    store.replace(commit_name(0), json.dumps(commit | {"digest": name}).encode())
    store.delete("manifest.json")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CacheError):
        current_manifest(store)
    assert is_refused(store.root)
    assert sorted(tmp_path.rglob("*")) == before


def test_links_out_of_a_cache_do_not_pass_for_shards(tmp_path):
    """A shard that is a link to a file elsewhere must still be the bytes that were committed."""
    store = write_cache(tmp_path / "c")
    (shard, *_) = sorted((store.root / "shards").iterdir())
    (tmp_path / "secret").write_bytes(os.urandom(shard.stat().st_size))
    shard.unlink()
    shard.symlink_to(tmp_path / "secret")
    with pytest.raises(CacheError, match="shard 00000"):
        read_everything(store.root)


@pytest.mark.parametrize("name", ["plan.json", "manifest.json", "commits/00000.json"])
@pytest.mark.parametrize("junk", [b"", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"a": 1e999}', b"null"])
def test_junk_in_the_place_of_a_record(tmp_path, name, junk):
    store = write_cache(tmp_path / "c")
    store.replace(name, junk)
    if name.startswith("commits"):
        store.delete("manifest.json")
    with pytest.raises(CacheError):
        open_cache(store.root)
    assert is_refused(store.root)
