"""Which shard next: every one once, with few listings."""

import pytest

from kdcache.cache import work
from kdcache.cache.layout import commit_name
from kdcache.cache.lease import claim
from kdcache.cache.store import LocalStore


class Counting(LocalStore):
    """Counts listings."""

    listings = 0

    def names_in(self, folder):
        self.listings += folder == "commits"
        return super().names_in(folder)


@pytest.fixture
def store(tmp_path):
    return Counting(tmp_path / "cache")


def commit(store, shard):
    store.put_if_absent(commit_name(shard), b"{}")


def take_all(remaining):
    """Shards in the order in which they are given out, each committed at once."""
    taken = []
    while lease := remaining.claim():
        taken.append(lease.shard)
        commit(remaining._store, lease.shard)
        lease.release()
    return taken


@pytest.mark.parametrize(("offset", "order"), [(0.0, [0, 1, 2, 3]), (0.5, [2, 3, 0, 1])])
def test_every_shard_once_from_the_offset_on(store, offset, order):
    remaining = work.Remaining(store, 4, offset)
    assert take_all(remaining) == order
    assert len(remaining) == 0 and store.listings == 1


def test_what_others_commit_meanwhile_is_not_given_out(store):
    commit(store, 1)
    remaining = work.Remaining(store, 6)
    commit(store, 0)
    commit(store, 3)
    assert take_all(remaining) == [2, 4, 5]
    assert store.names_in("leases") == []


def test_others_are_asked_about_once_a_minute(store, monkeypatch):
    """One that was busy while we were: the listing tells of all that it did."""
    remaining = work.Remaining(store, 50)
    for shard in range(40):
        commit(store, shard)
    looked = []
    monkeypatch.setattr(Counting, "exists", lambda store, name: looked.append(name) or LocalStore.exists(store, name))
    monkeypatch.setattr(work, "RELIST_SECONDS", 0.0)
    lease = remaining.claim()
    assert lease.shard == 40 and len(remaining) == 9
    assert looked == [commit_name(0), commit_name(40), commit_name(40)] and store.listings == 2
    lease.release()


def test_what_is_in_other_hands_remains(store):
    remaining, other = work.Remaining(store, 2), claim(store, 0)
    mine = remaining.claim()
    assert mine.shard == 1 and len(remaining) == 1
    assert remaining.claim() is None and len(remaining) == 1
    other.release()
    assert remaining.claim().shard == 0 and not remaining
