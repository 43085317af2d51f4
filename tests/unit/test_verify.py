import errno
import io
import json
import os
import resource
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner

from kdcache.cache.commit import (
    commit_name,
    commit_shard,
    publish_plan,
    read_commits,
    read_plan,
    seal,
    shard_name,
    table_name,
)
from kdcache.cache.manifest import signed_json
from kdcache.cache.reader import open_cache
from kdcache.cache.shard import ShardBuilder, digest
from kdcache.cache.store import LocalStore
from kdcache.cache.verify import repair, restore_plan, verify_cache
from kdcache.cli import main
from kdcache.errors import CacheError, CacheNotFoundError, StoreUnavailableError
from kdcache.targets import TokenSequence
from tests.strategies import all_files, build_shard, make_plan, make_row, put_shard, write_cache

PLAN = make_plan()


@pytest.fixture
def store(tmp_path):
    return write_cache(tmp_path)


def shard_file(shard):
    return shard_name(shard, digest(build_shard(PLAN, shard)[0]))


def flip(store, name, position=None):
    data = bytearray(store.read(name))
    data[len(data) // 2 if position is None else position] ^= 1
    store.replace(name, bytes(data))


def only_problem(store, **options):
    audit = verify_cache(store, **options)
    assert not audit.intact
    (problem,) = audit.problems
    return problem


@pytest.mark.parametrize("codec", ["exact", "packed"])
@pytest.mark.parametrize("deep", [True, False])
def test_a_whole_cache(tmp_path, codec, deep):
    seen = []
    audit = verify_cache(write_cache(tmp_path, make_plan(codec__name=codec)), deep=deep, on_shard=seen.append)
    assert audit.intact and not audit.missing
    assert (audit.num_shards, audit.num_verified, audit.num_sequences) == (4, 4, 10)
    assert seen == [1, 2, 3, 4]


def test_an_unfinished_cache_is_intact(tmp_path):
    store = LocalStore(tmp_path)
    publish_plan(store, PLAN)
    put_shard(store, PLAN, 2)
    audit = verify_cache(store)
    assert audit.intact and audit.missing == [0, 1, 3] and audit.num_verified == 1


def test_no_cache_here(tmp_path):
    with pytest.raises(CacheNotFoundError):
        verify_cache(LocalStore(tmp_path))


def rows(shard):
    """As a message names them."""
    return f"rows {PLAN.spec.rows(shard)[0]} to {PLAN.spec.rows(shard)[-1]}"


def test_a_flipped_bit_is_named_by_shard_and_rows(store):
    flip(store, shard_file(2))
    assert only_problem(store).startswith(f"shard 00002 ({rows(2)}): digest")
    assert verify_cache(store).num_verified == 3


@pytest.mark.parametrize("column", ["input_ids", "num_entries", "levels", "logz"])
def test_a_flipped_bit_of_a_sequence_is_named_by_sequence(store, column):
    name = shard_file(2)
    data = store.read(name)
    cells = pa.ipc.open_file(data).get_batch(0).column(column)
    for row in (0, len(cells) - 1):
        cell = cells[row].as_py()
        assert data.count(cell) == 1
        flip(store, name, data.index(cell) + len(cell) - 1)
        told = only_problem(store)
        assert told.startswith(f"shard 00002 ({rows(2)}): digest"), told
        assert told.endswith(f"; damaged are sequences {row} of its {len(cells)}"), told
        store.replace(name, data)
    flip(store, name, data.index(b"ARROW1"))
    assert only_problem(store).endswith(f"({store.root / name})"), "no Arrow file: nothing is known of its sequences"
    store.replace(name, data)
    if sum(map(len, cells.to_pylist())) % 8:
        flip(store, name, data.index(cell) + len(cell))  # Arrow fills buffers up to 8 bytes
        assert only_problem(store).endswith(
            f"; each of its {len(cells)} sequences reads, the damage lies between them or changes nothing that is read"
        )


def test_every_damaged_shard_is_named(store):
    flip(store, shard_file(1))
    flip(store, shard_file(3))
    assert [problem[:11] for problem in verify_cache(store, deep=False).problems] == ["shard 00001", "shard 00003"]


def test_without_its_tables_shards_are_held_against_their_digests_all_the_same(tmp_path):
    store = LocalStore(
        shutil.copytree(Path(__file__).parents[1] / "golden/version-1/packed-top_k-id-tables", tmp_path / "cache")
    )
    (table,), shards = store.names_in("tables"), store.names_in("shards")
    flip(store, f"tables/{table}")
    flip(store, f"shards/{shards[1]}")
    audit = verify_cache(store)
    assert f"{audit.damaged_tables}.safetensors" == table and audit.damaged == [1] and audit.num_verified == 0
    assert len(audit.problems) == 2
    assert repair(store, audit) == [1]
    assert store.exists(f"tables/{table}"), "until its successor replaces it"
    assert store.names_in("commits") == ["00000.json"]


def test_a_missing_shard_file(store):
    store.delete(shard_file(0))
    assert only_problem(store).startswith("shard 00000 (rows ")


def damage_a_shard(store):
    flip(store, shard_file(2))


def damage_a_commit(store):
    flip(store, commit_name(2))


def lose_a_shard(store):
    store.delete(shard_file(2))


def respell_a_commit(store):
    store.replace(commit_name(2), json.dumps(json.loads(store.read(commit_name(2)))).encode())


@pytest.mark.parametrize("harm", [damage_a_shard, damage_a_commit, lose_a_shard, respell_a_commit])
def test_repair_takes_back_what_is_damaged_and_the_next_dump_mends_it(store, harm):
    before = {name: data for name, data in all_files(store.root).items() if not name.startswith("commits")}
    harm(store)
    audit = verify_cache(store)
    assert audit.damaged == [2] and audit.missing == []
    assert repair(store, audit) == [2]
    now = verify_cache(store)
    assert now.intact and now.missing == [2] and now.num_verified == 3
    assert put_shard(store, PLAN, 2)
    assert seal(store).sealed and verify_cache(store).intact
    assert before == {name: data for name, data in all_files(store.root).items() if not name.startswith("commits")}


def test_repair_of_a_manifest_and_of_a_whole_cache(store):
    whole = all_files(store.root)
    assert repair(store, verify_cache(store)) == []
    assert all_files(store.root) == whole
    flip(store, "manifest.json")
    audit = verify_cache(store)
    assert len(audit.problems) == 1 and audit.num_verified == 4
    assert repair(store, audit) == []
    assert seal(store).sealed and all_files(store.root) == whole


def test_the_command_repairs(store):
    flip(store, shard_file(1))
    only_told = CliRunner().invoke(main, ["verify", str(store)])
    assert only_told.exit_code == 1 and "verify --repair" in only_told.output
    mended = CliRunner().invoke(main, ["verify", str(store), "--repair"])
    assert mended.exit_code == 3 and "taken back: 00001" in mended.output
    assert CliRunner().invoke(main, ["verify", str(store)]).exit_code == 3
    put_shard(store, PLAN, 1)
    seal(store)
    assert CliRunner().invoke(main, ["verify", str(store)]).exit_code == 0


def test_a_missing_commit(store):
    store.delete(commit_name(1))
    audit = verify_cache(store)
    assert audit.missing == [1]
    assert audit.problems == ["manifest.json does not follow from the commits; remove it and run the dump again"]


def test_a_missing_manifest_is_only_unsealed(store):
    store.delete("manifest.json")
    assert verify_cache(store).intact
    assert seal(store).sealed


@pytest.mark.parametrize("name", ["plan.json", "manifest.json", "commits/00001.json"])
def test_a_record_spelled_otherwise(store, name):
    """Same content, other bytes: no damage to the meaning, but not what was written."""
    fields = json.loads(store.read(name))
    store.replace(name, json.dumps(fields, indent=1).encode())
    problem = only_problem(store)
    assert name in problem


def cut_short(store):
    store.replace("plan.json", store.read("plan.json")[:100])


def edited(store):
    fields = json.loads(store.read("plan.json"))
    del fields["record_digest"]
    fields["spec"]["rows_per_shard"] += 1
    store.replace("plan.json", signed_json(fields))


def of_another_cache(store):
    other = write_cache(store.root.parent / "other", make_plan(targets__k=7))
    store.replace("manifest.json", other.read("manifest.json"))
    store.delete("plan.json")


@pytest.mark.parametrize(
    "harm", [lambda store: flip(store, "plan.json"), lambda store: store.delete("plan.json"), cut_short, edited]
)
def test_a_plan_comes_back_from_the_manifest(store, harm):
    """A finished cache says twice what it is."""
    before = all_files(store.root)
    harm(store)
    with pytest.raises(CacheError) as raised:
        verify_cache(store)
    assert "plan.json" in raised.value.message and raised.value.hint.startswith(f"kdcache verify {store} --repair")
    with pytest.raises(CacheError) as raised:
        open_cache(store.root)
    assert "--repair" in raised.value.hint
    done = CliRunner().invoke(main, ["verify", str(store), "--repair"])
    assert done.exit_code == 0 and "plan.json was damaged or gone" in done.stderr, done.output
    assert read_plan(store) == PLAN.model_copy(update={"environment": {}}), "all of it but the library versions"
    assert {**all_files(store.root), "plan.json": before["plan.json"]} == before
    assert restore_plan(store) is False


def test_a_plan_comes_back_though_commits_are_damaged(store):
    flip(store, commit_name(0))
    store.delete("plan.json")
    done = CliRunner().invoke(main, ["verify", str(store), "--repair"])
    assert done.exit_code == 3 and "taken back: 00000" in done.stderr, done.output


@pytest.mark.parametrize("harm", [of_another_cache, lambda store: (cut_short(store), flip(store, "manifest.json"))])
def test_a_plan_does_not_come_back_from_what_is_not_its_manifest(store, harm):
    harm(store)
    before = all_files(store.root)
    done = CliRunner().invoke(main, ["verify", str(store), "--repair"])
    assert done.exit_code == 1 and "manifest.json" in done.output
    assert all_files(store.root) == before, "nothing is taken back"


def test_a_damaged_plan_without_a_manifest_names_a_way_on(store):
    cut_short(store)
    store.delete("manifest.json")
    with pytest.raises(CacheError) as raised:
        restore_plan(store)
    assert "plan.json: not JSON" in raised.value.message and "put a copy" in raised.value.hint


def test_a_plan_that_is_gone_before_there_is_a_manifest(store):
    store.delete("manifest.json")
    store.delete("plan.json")
    with pytest.raises(CacheNotFoundError, match="not a kdcache cache"):
        restore_plan(store)


def test_wrong_statistics_in_the_manifest(store):
    fields = json.loads(store.read("manifest.json"))
    del fields["record_digest"]
    fields["stats"]["num_targets"] += 1
    store.replace("manifest.json", signed_json(fields))
    assert "does not follow from the commits" in only_problem(store)


def test_a_commit_of_another_shard_with_a_valid_digest(store):
    """Commit 1 names the bytes of shard 2, and they are there under that name."""
    fields = json.loads(store.read(commit_name(2)))
    del fields["record_digest"]
    fields["shard"] = 1
    store.replace(commit_name(1), signed_json(fields))
    store.put_if_absent(shard_name(1, fields["digest"]), store.read(shard_file(2)))
    store.delete("manifest.json")
    assert "): schema or origin differ" in only_problem(store) and only_problem(store).startswith("shard 00001 (")
    assert repair(store, verify_cache(store)) == [1]


def commit_rows(store, rows):
    builder = ShardBuilder(PLAN.spec.make_codec(), PLAN.fingerprint, 0)
    for sequence, targets in rows:
        builder.add(sequence, targets)
    commit_shard(store, PLAN, 0, memoryview(builder.finish()), build_shard(PLAN, 0)[1], worker="w", seconds=0.0)


def test_misaligned_targets_are_named_by_sequence(tmp_path):
    store = LocalStore(tmp_path)
    publish_plan(store, PLAN)
    rows = [make_row(PLAN, i) for i in PLAN.spec.rows(0)]
    sequence, targets = rows[1]
    mask = sequence.target_mask
    ids = sequence.input_ids.copy()
    ids[1:][mask[:-1]] = (ids[1:][mask[:-1]] + 1) % 300
    rows[1] = (TokenSequence(ids, sequence.loss_mask, sequence.document_starts), targets)
    commit_rows(store, rows)
    assert only_problem(store).startswith("shard 00000, sequence 1: targets and tokens are not aligned")
    assert verify_cache(store, deep=False).intact


def test_a_head_that_is_gone(tmp_path):
    store = LocalStore(tmp_path)
    publish_plan(store, PLAN)
    data, stats = build_shard(PLAN, 0)
    store.put_if_absent(table_name(digest(b"head")), b"head")
    commit_shard(store, PLAN, 0, data, stats, worker="w", seconds=0.0, head_digest=digest(b"head"))
    assert verify_cache(store).intact
    store.replace(table_name(digest(b"head")), b"Head")
    assert "the head has digest" in only_problem(store)
    store.delete(table_name(digest(b"head")))
    assert "does not exist" in only_problem(store)
    # A head is written by a worker, and a worker starts where a shard is to be made.
    assert repair(store, verify_cache(store)) == [0]
    assert verify_cache(store).missing == [0, 1, 2, 3]


def test_rows_that_carry_another_name(tmp_path, monkeypatch):
    store = LocalStore(tmp_path)
    publish_plan(store, PLAN)
    monkeypatch.setattr("kdcache.cache.shard.sequence_id", lambda shard, row: 7)
    put_shard(store, PLAN, 0)
    assert "shard 00000, sequence 0: found the sequence id 7" in only_problem(store)


def test_verifying_changes_nothing(store):
    before = [store.read(f"shards/{name}") for name in store.names_in("shards")]
    verify_cache(store)
    assert [store.read(f"shards/{name}") for name in store.names_in("shards")] == before
    assert len(read_commits(store)) == 4


# --- what could not be read -------------------------------------------------------------------------------------------


@pytest.fixture
def bad_sector(monkeypatch):
    """Reading a file that a name is given of fails; the rest is read."""
    bad = []

    class Failing(io.FileIO):
        def readinto(self, buffer):
            if bad and self.name == bad[0]:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().readinto(buffer)

        def read(self, size=-1):
            self.readinto(bytearray(0))
            return super().read(size)

    real = open
    monkeypatch.setattr(
        "builtins.open", lambda path, *how, **more: Failing(path) if path in bad else real(path, *how, **more)
    )
    return bad


def test_a_shard_that_cannot_be_read_is_not_taken_back(store, bad_sector):
    """Not even beside one that is damaged; removed by hand it is lost, and redone."""
    whole = all_files(store.root)
    bad_sector.append(store.root / shard_file(2))
    flip(store, shard_file(0))
    audit = verify_cache(store)
    assert not audit.intact
    assert (audit.damaged, audit.unread, audit.missing, audit.num_verified) == ([0], [2], [], 2)
    assert audit.unknown == [f"shard 00002 ({rows(2)}): {store.root / shard_file(2)}: cannot read (Input/output error)"]
    said = CliRunner().invoke(main, ["verify", str(store), "--repair"])
    assert said.exit_code == 1
    assert "could not be looked at: shard 00002" in said.output and "taken back: 00000\n" in said.output
    assert "removed by hand" in said.output
    put_shard(store, PLAN, 0)
    seal(store)
    said = CliRunner().invoke(main, ["verify", str(store), "--repair"])
    assert said.exit_code == 1 and "taken back" not in said.output
    (store.root / shard_file(2)).unlink()
    bad_sector.clear()
    said = CliRunner().invoke(main, ["verify", str(store), "--repair"])
    assert said.exit_code == 3 and "taken back: 00002\n" in said.output
    put_shard(store, PLAN, 2)
    assert seal(store).sealed and verify_cache(store).intact
    now = all_files(store.root)
    assert now.keys() == whole.keys()
    assert all(now[name] == whole[name] for name in whole if not name.startswith("commits/"))


@pytest.mark.parametrize("name", [commit_name(2), "manifest.json"])
def test_a_record_that_cannot_be_read(store, bad_sector, name):
    """What follows from a commit that nobody read is not known: the manifest is not accused."""
    bad_sector.append(store.root / name)
    audit = verify_cache(store)
    assert not audit.intact
    assert (audit.problems, audit.damaged, audit.missing) == ([], [], [])
    assert audit.unread == ([2] if name == commit_name(2) else [])
    assert len(audit.unknown) == 1 and name in audit.unknown[0]
    before = store.names_in("commits")
    assert CliRunner().invoke(main, ["verify", str(store), "--repair"]).exit_code == 1
    assert store.names_in("commits") == before and "manifest.json" in store.names_in("")


def test_without_file_descriptors_nothing_is_known(store):
    """The audit ends: a store that does not even give its plan says nothing about its shards."""
    verify_cache(store)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        with pytest.raises(StoreUnavailableError, match="Too many open files"):
            verify_cache(store)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_without_memory_nothing_is_known(store, monkeypatch):
    def no_memory(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr("kdcache.cache.reader.ShardReader", no_memory)
    audit = verify_cache(store)
    assert (audit.problems, audit.damaged, audit.unread) == ([], [], [0, 1, 2, 3])
    assert audit.unknown[0] == f"shard 00000 ({rows(0)}): not enough memory to look at it"


# --- commits that do not belong ---------------------------------------------------------------------------------------


def foreign_plan(store):
    other = write_cache(store.root.parent / "other", make_plan(targets__k=7))
    store.replace(commit_name(2), other.read(commit_name(2)))


def beyond_the_plan(store):
    recommit(store, 2, 7, shard=7)


def a_number_in_six_digits(store):
    store.replace("commits/000002.json", store.read(commit_name(2)))


def six_digits_alone(store):
    a_number_in_six_digits(store)
    store.delete(commit_name(2))


def another_head(store):
    recommit(store, 2, 2, head_digest=digest(b"head"))


def more_than_a_cache_has(store):
    stats = json.loads(store.read(commit_name(2)))["stats"]
    recommit(store, 2, 2, stats={**stats, "num_sequences": (1 << 62) - 1})


def recommit(store, source, number, **changes):
    fields = json.loads(store.read(commit_name(source)))
    del fields["record_digest"]
    store.replace(commit_name(number), signed_json({**fields, **changes}))


@pytest.mark.parametrize(
    "harm",
    [foreign_plan, beyond_the_plan, a_number_in_six_digits, six_digits_alone, another_head, more_than_a_cache_has],
)
@pytest.mark.parametrize("sealed", [True, False])
def test_a_commit_that_does_not_belong_is_removed_and_the_dump_finishes(tmp_path, harm, sealed):
    """The other shards are verified all the same."""
    store = write_cache(tmp_path / "c")
    flip(store, shard_file(1))
    harm(store)
    if not sealed:
        store.delete("manifest.json")
    audit = verify_cache(store)
    replaced = harm in (foreign_plan, another_head, more_than_a_cache_has)
    lost = replaced or harm is six_digits_alone
    assert audit.num_verified == (2 if lost else 3)
    assert sorted(audit.damaged) == ([1, 2] if replaced else [1])
    assert audit.missing == ([2] if harm is six_digits_alone else [])
    assert audit.strays == ([] if replaced else ["00007.json" if harm is beyond_the_plan else "000002.json"])
    said = CliRunner().invoke(main, ["verify", str(store), "--repair"])
    assert said.exit_code == 3
    assert all(f"commits/{name}" in said.output for name in audit.strays)
    now = verify_cache(store)
    assert now.intact
    assert now.missing == ([1, 2] if lost else [1])
    for shard in now.missing:
        put_shard(store, PLAN, shard)
    assert seal(store).sealed
    audit = verify_cache(store)
    assert audit.intact and audit.num_verified == 4


def test_of_heads_that_differ_most_count(tmp_path):
    store = LocalStore(tmp_path)
    publish_plan(store, PLAN)
    for shard, head in enumerate([b"head", b"other", b"head", b"head"]):
        store.put_if_absent(table_name(digest(head)), head)
        commit_shard(store, PLAN, shard, *build_shard(PLAN, shard), worker="w", seconds=0.0, head_digest=digest(head))
    audit = verify_cache(store)
    assert audit.damaged == [1] and audit.num_verified == 3
    assert repair(store, audit) == [1]
    assert verify_cache(store).intact
