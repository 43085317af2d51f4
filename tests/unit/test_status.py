"""How far a cache is, and what it no longer needs."""

import json
import os
import time

import pytest
from click.testing import CliRunner

from kdcache.cache.commit import commit_name, publish_plan, read_commit, seal, shard_name
from kdcache.cache.garbage import collect_garbage, find_garbage
from kdcache.cache.lease import LEASE_SECONDS, claim
from kdcache.cache.manifest import to_json
from kdcache.cache.shard import digest
from kdcache.cache.status import cache_status
from kdcache.cache.store import LocalStore, hostname
from kdcache.cache.verify import verify_cache
from kdcache.cli import main
from kdcache.errors import CacheNotFoundError
from tests.strategies import build_shard, make_plan, put_shard, write_cache

PLAN = make_plan(corpus__num_rows=30)  # ten shards


@pytest.fixture
def store(tmp_path):
    store = LocalStore(tmp_path)
    publish_plan(store, PLAN)
    return store


def lease(store, shard, *, host="elsewhere", pid=1, expires=None):
    about = {"token": "t", "host": host, "pid": pid, "expires": time.time() + 60 if expires is None else expires}
    store.replace(f"leases/{shard:05d}.json", json.dumps(about).encode())


def test_nothing_yet(store):
    status = cache_status(store)
    assert (status.num_shards, status.num_committed, status.num_positions) == (10, 0, 0)
    assert status.holes == [(0, 9)]
    assert status.tokens_per_second is None and status.seconds_left is None


def test_committed_in_flight_stale_and_open(store):
    for shard in (0, 1, 5):
        put_shard(store, PLAN, shard)
    lease(store, 2)
    lease(store, 3, expires=time.time() - 1)  # a worker that has not been heard of
    lease(store, 7, host=hostname(), pid=2**22 + 5)  # a process of this host that is gone
    lease(store, 5)  # committed, and not let go of yet
    store.replace("leases/00009.json", b"{}")
    status = cache_status(store)
    assert status.num_committed == 3
    assert [holder.shard for holder in status.in_flight] == [2]
    assert status.stale == ["00003.json", "00005.json", "00007.json", "00009.json"]
    assert status.holes == [(3, 4), (6, 9)]
    assert status.num_positions == sum(read_commit(store, shard).stats.num_positions for shard in (0, 1, 5))


def test_rate_and_time_left_come_from_the_last_commits(store):
    for shard, second in ((0, 0), (1, 10), (2, 20)):
        put_shard(store, PLAN, shard)
        commit = read_commit(store, shard)
        later = commit.model_copy(update={"finished_at": f"2026-01-01T00:00:{second:02d}+00:00"})
        store.replace(commit_name(shard), to_json(later))
    tokens = [read_commit(store, shard).stats.num_positions for shard in range(3)]
    status = cache_status(store)
    assert status.tokens_per_second == pytest.approx((tokens[1] + tokens[2]) / 20)
    assert status.seconds_left == pytest.approx(7 * sum(tokens) / 3 / status.tokens_per_second)


def test_while_workers_live_the_rate_is_what_each_makes_times_their_number(store):
    """All commit in one second, or a night lies between two commits: neither says how fast they are."""
    for shard, finished in ((0, "01T00:00:00"), (1, "02T09:00:00"), (2, "02T09:00:00")):
        put_shard(store, PLAN, shard)
        commit = read_commit(store, shard)
        about = {"finished_at": f"2026-01-{finished}+00:00", "seconds": 50.0, "worker": f"elsewhere:{1 + shard % 2}"}
        store.replace(commit_name(shard), to_json(commit.model_copy(update=about)))
    for shard, pid in ((3, 1), (4, 2), (5, 2)):  # the second computes one while another is written
        lease(store, shard, pid=pid)
    tokens = sum(read_commit(store, shard).stats.num_positions for shard in range(3))
    status = cache_status(store)
    assert status.tokens_per_second == pytest.approx(2 * tokens / 150)
    assert status.seconds_left == pytest.approx(7 * tokens / 3 / status.tokens_per_second)


def test_commits_of_others_say_nothing_of_the_workers_that_live(store):
    """Those of a copy are the dump's, which took longer by far."""
    for shard in (0, 1, 2):
        put_shard(store, PLAN, shard)
    lease(store, 3)
    status = cache_status(store)
    assert (status.tokens_per_second, status.seconds_left) == (None, None)


def test_a_complete_cache(tmp_path):
    status = cache_status(write_cache(tmp_path))
    assert status.num_committed == status.num_shards == 4
    assert status.seconds_left == 0 and not status.holes and not status.in_flight


def test_the_command(store):
    put_shard(store, PLAN, 0)
    lease(store, 1)
    printed = CliRunner().invoke(main, ["status", str(store)])
    assert printed.exit_code == 0
    assert "1 of 10 shards" in printed.output
    assert "shard 00001, elsewhere, process 1" in printed.output
    assert "open       00002-00009" in printed.output
    about = json.loads(CliRunner().invoke(main, ["status", str(store), "--json"]).output)
    assert about["holes"] == [[2, 9]] and about["in_flight"][0]["shard"] == 1
    missing = CliRunner().invoke(main, ["status", str(store.root / "nowhere")])
    assert missing.exit_code == 1 and "is not a kdcache cache" in missing.output


# --- garbage ----------------------------------------------------------------------------------------------------------


def loser(store, shard):
    """A shard file of a writer that came second."""
    name = f"shards/{shard:05d}-{'ab' * 16}.arrow"
    store.replace(name, b"x")
    return name


def test_what_lost_goes_and_what_may_still_win_stays(store):
    put_shard(store, PLAN, 0)
    lost, maybe = loser(store, 0), loser(store, 1)
    store.replace("tables/" + "cd" * 16 + ".safetensors", b"a head of a dump that goes on")
    store.replace("shards/notes.txt", b"not ours")
    lease(store, 3, expires=0)
    live = claim(store, 4)
    assert find_garbage(store) == ["leases/00003.json", lost]
    garbage, _ = collect_garbage(store)
    assert garbage == ["leases/00003.json", lost]
    assert not store.exists(lost) and store.exists(maybe) and store.exists(live.name)
    assert store.exists("shards/notes.txt")
    assert find_garbage(store) == []


def test_only_what_has_a_name_of_ours_goes(tmp_path):
    """Also where it lies where only our files should."""
    store = write_cache(tmp_path)
    lost = "leases/00001.json", "tables/" + "cd" * 16 + ".safetensors"
    kept = ("leases/notes.txt", "leases/000001.json", "leases/\u0660\u0660\u0660\u0660\u0661.json", "tables/model.safetensors",
            "shards/000001-" + "ab" * 16 + ".arrow", "shards/model.arrow")  # fmt: skip
    for name in (*lost, *kept):
        store.replace(name, b"x")
    assert find_garbage(store) == sorted(lost)
    collect_garbage(store)
    store.replace(lost[0], b"x")
    seal(store)
    assert not any(store.exists(name) for name in lost) and all(store.exists(name) for name in kept)


def test_a_live_lease_under_another_spelling_is_none(store):
    lease(store, 1)
    store.replace("leases/000001.json", b"{}")
    status = cache_status(store)
    assert [holder.shard for holder in status.in_flight] == [1] and not status.stale
    assert find_garbage(store) == []


@pytest.mark.parametrize("folder", ["leases", "tables", "shards", "commits", "tmp"])
def test_nothing_is_deleted_behind_a_link(tmp_path, folder):
    store = write_cache(tmp_path / "cache")
    mine = tmp_path / "mine"
    mine.mkdir()
    files = (
        "00000.json",
        "x.txt",
        "ab" * 16 + ".safetensors",
        "00000-" + "ab" * 16 + ".arrow",
        f"{hostname()}~4194309~{'0' * 32}",
    )
    for name in files:
        (mine / name).write_bytes(b"mine")
    (store.root / folder).rename(tmp_path / "before") if (store.root / folder).exists() else None
    (store.root / folder).symlink_to(mine)
    for command in (["gc"], ["gc", "--dry-run"], ["verify", "--repair"], ["status"]):
        CliRunner().invoke(main, [*command, str(store.root)])
    assert sorted(os.listdir(mine)) == sorted(files)


def test_a_writer_stopped_past_its_lease_still_finds_its_file(store):
    data, _ = build_shard(PLAN, 2)
    store.put_if_absent(shard_name(2, digest(data)), data)
    lease(store, 2, expires=time.time() - 10 * LEASE_SECONDS)
    collect_garbage(store)
    assert put_shard(store, PLAN, 2)
    assert verify_cache(store).intact


def test_a_complete_cache_keeps_only_its_own_tables(tmp_path):
    store = write_cache(tmp_path)
    before = verify_cache(store)
    store.replace("tables/" + "cd" * 16 + ".safetensors", b"no commit names it")
    lost = loser(store, 2)
    dry = CliRunner().invoke(main, ["gc", str(tmp_path), "--dry-run"])
    assert dry.exit_code == 0 and "2 files would go" in dry.output and store.exists(lost)
    done = CliRunner().invoke(main, ["gc", str(tmp_path)])
    assert done.exit_code == 0 and "2 files deleted" in done.output and lost in done.output
    assert verify_cache(store) == before
    assert os.listdir(tmp_path / "tables") == []


def test_no_cache_here(tmp_path):
    with pytest.raises(CacheNotFoundError):
        find_garbage(LocalStore(tmp_path))
    assert CliRunner().invoke(main, ["gc", str(tmp_path)]).exit_code == 1
