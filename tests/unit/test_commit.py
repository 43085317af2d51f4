import json
import os
import subprocess
import sys
import time

import pytest

from kdcache.cache.commit import (
    commit_name,
    commit_shard,
    committed_shards,
    current_manifest,
    publish_plan,
    read_commits,
    read_plan,
    seal,
    shard_name,
)
from kdcache.cache.lease import LEASE_SECONDS, Lease, claim
from kdcache.cache.manifest import signed_json, to_json
from kdcache.cache.shard import digest
from kdcache.cache.store import LocalStore, hostname
from kdcache.errors import CacheCorruptError, CacheMismatchError, CacheNotFoundError
from tests.strategies import all_files, build_shard, make_plan, make_spec, put_shard, write_cache

PLAN = make_plan()


@pytest.fixture
def store(tmp_path):
    store = LocalStore(tmp_path / "cache")
    publish_plan(store, PLAN)
    return store


def test_the_first_plan_counts(store):
    moved = make_plan(teacher__name="/elsewhere")
    assert publish_plan(store, moved) == PLAN == read_plan(store)


def test_another_plan_is_refused_field_by_field(store):
    with pytest.raises(CacheMismatchError) as caught:
        publish_plan(store, make_plan(targets__k=7, compute__threads=9))
    assert "targets.k: the cache has 8, this run asks for 7" in caught.value.message
    assert "compute.threads: the cache has 1, this run asks for 9" in caught.value.message
    assert "another --output" in caught.value.hint


def test_no_cache_here(tmp_path):
    with pytest.raises(CacheNotFoundError, match=r"is not a kdcache cache: it has no plan\.json"):
        read_plan(LocalStore(tmp_path))


def test_an_edited_plan(store):
    fields = PLAN.model_dump(mode="json")
    fields["spec"]["rows_per_shard"] = 4
    store.replace("plan.json", signed_json(fields))
    with pytest.raises(CacheMismatchError, match="it was edited"):
        read_plan(store)


def test_a_commit_publishes_shard_and_commit(store):
    assert put_shard(store, PLAN, 1)
    data, stats = build_shard(PLAN, 1)
    (commit,) = read_commits(store)
    assert (commit.shard, commit.digest, commit.num_bytes, commit.stats) == (1, digest(data), len(data), stats)
    assert set(all_files(store.root)) == {"plan.json", "commits/00001.json", shard_name(1, digest(data))}
    assert store.read(shard_name(1, commit.digest)) == bytes(data)


def test_resume_holes(store):
    """What is to be done is planned minus committed, wherever the holes are."""
    for shard in (3, 1):
        put_shard(store, PLAN, shard)
    assert committed_shards(store) == {1, 3}
    assert [commit.shard for commit in read_commits(store)] == [1, 3]
    assert not current_manifest(store).sealed
    for shard in (0, 2):
        put_shard(store, PLAN, shard)
    assert current_manifest(store).sealed


def test_a_second_writer_of_the_same_bytes_loses_and_harms_nothing(store):
    put_shard(store, PLAN, 1, "first")
    before = all_files(store.root)
    assert not put_shard(store, PLAN, 1, "second")
    assert all_files(store.root) == before


def test_a_second_writer_of_other_bytes_discards_its_own(store):
    put_shard(store, PLAN, 1)
    before = all_files(store.root)
    data, stats = build_shard(PLAN, 2)
    assert not commit_shard(store, PLAN, 1, data, stats, worker="other", seconds=1.0)
    assert all_files(store.root) == before


def test_an_orphan_shard_is_taken_over(store):
    """Killed between shard and commit: the file is there, nothing names it."""
    data, _ = build_shard(PLAN, 1)
    store.put_if_absent(shard_name(1, digest(data)), data)
    assert committed_shards(store) == set()
    assert put_shard(store, PLAN, 1)


def test_a_damaged_orphan_is_replaced(store):
    data, _ = build_shard(PLAN, 1)
    name = shard_name(1, digest(data))
    store.put_if_absent(name, bytes(data)[:-7])
    assert put_shard(store, PLAN, 1)
    assert store.read(name) == bytes(data)


def test_an_orphan_that_cannot_be_read_is_replaced(store):
    """Nor is what it leads to."""
    data, _ = build_shard(PLAN, 1)
    name = shard_name(1, digest(data))
    (store.root / "shards").mkdir()
    (store.root / name).symlink_to("/proc/self/mem")
    assert put_shard(store, PLAN, 1)
    assert store.read(name) == bytes(data)
    assert not (store.root / name).is_symlink()


def test_files_that_are_no_commits_are_left_alone(store):
    put_shard(store, PLAN, 1)
    for name in ("notes.txt", "1.json", "00001.json.bak", "xxxxx.json"):
        store.put_if_absent(f"commits/{name}", b"junk")
    assert committed_shards(store) == {1}
    assert len(read_commits(store)) == 1


def test_a_commit_under_another_number(store):
    put_shard(store, PLAN, 1)
    store.put_if_absent("commits/00002.json", store.read("commits/00001.json"))
    with pytest.raises(CacheMismatchError, match=r"commits/00002\.json commits shard 00001"):
        read_commits(store)


@pytest.mark.parametrize("name", ["000001.json", "٠٠٠٠١.json"])
def test_a_commit_under_another_spelling(store, name):
    put_shard(store, PLAN, 1)
    store.put_if_absent(f"commits/{name}", store.read("commits/00001.json"))
    with pytest.raises(CacheMismatchError, match=r"stands at commits/00001\.json"):
        read_commits(store)
    store.delete("commits/00001.json")
    assert committed_shards(store) == set()


def test_a_commit_of_another_cache(store, tmp_path):
    other = write_cache(tmp_path / "other", make_plan(targets__k=7))
    store.put_if_absent(commit_name(0), other.read(commit_name(0)))
    with pytest.raises(CacheMismatchError, match="shard 00000 belongs to plan"):
        current_manifest(store)


# --- seal -------------------------------------------------------------------------------------------------------------


def test_seal_waits_for_every_shard(store):
    for shard in (0, 1, 2):
        put_shard(store, PLAN, shard)
    assert not seal(store).sealed and not store.exists("manifest.json")
    put_shard(store, PLAN, 3)
    assert seal(store).sealed and store.exists("manifest.json")


def test_seal_tidies_up(store):
    for shard in range(4):
        put_shard(store, PLAN, shard)
    kept = set(all_files(store.root)) | {"manifest.json"}
    store.put_if_absent(shard_name(2, "f" * 32), b"orphan")
    claim(store, 2)
    seal(store)
    assert set(all_files(store.root)) == kept


def test_seal_twice_writes_the_same_bytes(store):
    for shard in range(4):
        put_shard(store, PLAN, shard)
    manifest = seal(store)
    before = all_files(store.root)
    assert seal(store) == manifest == current_manifest(store)
    assert all_files(store.root) == before


def test_a_damaged_manifest_is_derived_again(store):
    for shard in range(4):
        put_shard(store, PLAN, shard)
    good = to_json(seal(store))
    store.replace("manifest.json", good[:-9])
    seal(store)
    assert store.read("manifest.json") == good


def test_manifest_of_another_cache(tmp_path):
    store = write_cache(tmp_path / "a")
    other = write_cache(tmp_path / "b", make_plan(targets__k=7))
    store.replace("manifest.json", other.read("manifest.json"))
    with pytest.raises(CacheMismatchError, match="belong to two caches"):
        current_manifest(store)


def test_a_manifest_whose_spec_is_not_the_plans(tmp_path):
    """The reader decodes by the manifest's spec, so its fingerprint alone is not enough."""
    store = write_cache(tmp_path)
    fields = current_manifest(store).model_dump(mode="json")
    fields["spec"]["codec"]["step"] = 0.1
    store.replace("manifest.json", signed_json(fields))
    with pytest.raises(CacheMismatchError):
        current_manifest(store)


def test_a_damaged_commit_says_which(store):
    put_shard(store, PLAN, 1)
    store.replace("commits/00001.json", store.read("commits/00001.json").replace(b"worker-0", b"worker-1"))
    with pytest.raises(CacheCorruptError, match=r"commits/00001\.json"):
        read_commits(store)


# --- leases -----------------------------------------------------------------------------------------------------------


def leave_lease(store, **changes):
    about = {"token": "t", "host": hostname(), "pid": os.getpid(), "expires": time.time() + 60}
    store.replace("leases/00001.json", json.dumps({**about, **changes}).encode())


def dead_pid():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_live_lease_is_respected(store):
    assert claim(store, 1) is not None
    assert claim(store, 1) is None
    assert claim(store, 2) is not None


def test_a_lease_of_another_host_is_respected_until_it_expires(store):
    leave_lease(store, host="another-host", pid=dead_pid())
    assert claim(store, 1) is None
    leave_lease(store, host="another-host", expires=time.time() - 1)
    assert claim(store, 1) is not None


def test_a_lease_of_a_dead_process_is_stale(store):
    leave_lease(store, pid=dead_pid())
    lease = claim(store, 1)
    assert lease is not None
    assert json.loads(store.read(lease.name))["pid"] == os.getpid()
    assert claim(store, 1) is None


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"host": 1, "pid": "x", "expires": 0}',
        b"\xff",
        b"[" * 100_000,
        bytes((1 << 20) + 1),
    ],
)
def test_a_lease_that_cannot_be_read_is_stale(store, junk):
    store.put_if_absent("leases/00001.json", junk)
    assert claim(store, 1) is not None


@pytest.mark.parametrize(
    "number", [{"pid": float("inf")}, *({"expires": end} for end in (10**400, 1e300, float("inf"), float("nan")))]
)
def test_a_lease_with_a_number_past_all_bounds_is_stale(store, number):
    leave_lease(store, host="elsewhere", **number)
    assert claim(store, 1) is not None


def test_a_lease_with_an_impossible_pid_is_stale(store):
    leave_lease(store, pid=10**30)
    assert claim(store, 1) is not None


def test_a_released_lease_is_free(store):
    lease = claim(store, 1)
    lease.release()
    assert claim(store, 1) is not None
    lease.release()
    lease.release()


def test_renewing_moves_the_end(store, monkeypatch):
    lease = claim(store, 1)
    first = json.loads(store.read(lease.name))
    lease.renew()
    assert json.loads(store.read(lease.name)) == first  # too soon to be worth a write
    now = time.time() + LEASE_SECONDS / 2
    monkeypatch.setattr(time, "time", lambda: now)
    lease.renew()
    second = json.loads(store.read(lease.name))
    assert second["expires"] > first["expires"] and second["token"] == first["token"]


def test_a_lost_lease_never_decides(store):
    """A writer that was stopped past its lease and goes on: the shard is committed once."""
    slow = Lease(store, 1)
    assert put_shard(store, PLAN, 1, "fast")
    slow.renew()
    assert not put_shard(store, PLAN, 1, "slow")
    assert read_commits(store)[0].worker == "fast"


def test_names():
    assert commit_name(7) == "commits/00007.json"
    assert commit_name(123_456) == "commits/123456.json"
    assert shard_name(7, "ab") == "shards/00007-ab.arrow"
    assert make_spec().num_shards == 4
