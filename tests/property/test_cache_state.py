"""Whatever happens to a cache that is being made, in whatever order: finished, it is the same bytes."""

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from kdcache.cache.commit import (
    commit_name,
    committed_shards,
    current_manifest,
    publish_plan,
    read_commit,
    seal,
    shard_name,
)
from kdcache.cache.lease import claim
from kdcache.cache.reader import open_cache
from kdcache.cache.shard import digest
from kdcache.cache.store import LocalStore
from kdcache.cache.verify import verify_cache
from tests.strategies import all_files, build_shard, make_plan, make_row, put_shard, write_cache

PLAN = make_plan()
SHARDS = st.integers(0, PLAN.spec.num_shards - 1)
PERSONAL = ("commits/",)


class CacheBeingMade(RuleBasedStateMachine):
    """Workers commit, die half-way, leave rubbish, hold leases; someone deletes commits; anyone may seal at any time."""

    leases = Bundle("leases")

    @initialize()
    def begin(self):
        self.folder = tempfile.TemporaryDirectory()
        self.store = LocalStore(Path(self.folder.name) / "cache")
        publish_plan(self.store, PLAN)
        self.committed = set()

    def teardown(self):
        if hasattr(self, "folder"):
            self.finish()
            self.folder.cleanup()

    @rule(shard=SHARDS)
    def commit(self, shard):
        assert put_shard(self.store, PLAN, shard) == (shard not in self.committed), "the first commit wins"
        self.committed.add(shard)

    @rule(shard=SHARDS)
    def die_between_shard_and_commit(self, shard):
        data, _ = build_shard(PLAN, shard)
        self.store.put_if_absent(shard_name(shard, digest(data)), data)

    @rule(shard=SHARDS, junk=st.binary(max_size=20))
    def leave_a_damaged_orphan(self, shard, junk):
        if shard not in self.committed:
            self.store.replace(shard_name(shard, digest(build_shard(PLAN, shard)[0])), junk)

    @rule(shard=SHARDS, junk=st.binary(min_size=1, max_size=20))
    def leave_a_shard_of_other_bytes(self, shard, junk):
        self.store.put_if_absent(shard_name(shard, digest(junk)), junk)

    @rule(target=leases, shard=SHARDS)
    def take_a_lease(self, shard):
        return claim(self.store, shard)

    @rule(lease=leases)
    def let_it_go(self, lease):
        if lease is not None:
            lease.release()

    @rule(shard=SHARDS)
    def delete_a_commit(self, shard):
        self.store.delete("manifest.json")
        self.store.delete(commit_name(shard))
        self.committed.discard(shard)

    @rule()
    def try_to_seal(self):
        assert seal(self.store).sealed == (len(self.committed) == PLAN.spec.num_shards)
        assert self.store.exists("manifest.json") == (len(self.committed) == PLAN.spec.num_shards)

    @invariant()
    def what_counts_is_what_was_committed(self):
        if not hasattr(self, "store"):
            return
        assert committed_shards(self.store) == self.committed
        assert set(current_manifest(self.store).shards.shard) == self.committed
        for index, row in enumerate(open_cache(self.store.root, allow_incomplete=True)):
            rows = [r for shard in sorted(self.committed) for r in PLAN.spec.rows(shard)]
            assert (row.sequence.input_ids == make_row(PLAN, rows[index])[0].input_ids).all()

    def finish(self):
        for shard in range(PLAN.spec.num_shards):
            put_shard(self.store, PLAN, shard)
        assert seal(self.store).sealed
        assert verify_cache(self.store).intact
        with tempfile.TemporaryDirectory() as folder:
            whole = write_cache(Path(folder) / "cache")
            expected, found = all_files(whole.root), all_files(self.store.root)
            assert found.keys() == expected.keys()
            assert all(found[n] == expected[n] for n in found if not n.startswith(PERSONAL))
            for shard in range(PLAN.spec.num_shards):
                assert read_commit(self.store, shard).digest == read_commit(whole, shard).digest


TestCacheBeingMade = CacheBeingMade.TestCase
TestCacheBeingMade.settings = settings(max_examples=25, stateful_step_count=15)
