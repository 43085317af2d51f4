import pickle
import sys

import numpy as np
import pytest

from kdcache.cache import reader as reader_module
from kdcache.cache.commit import commit_name, commit_shard, publish_plan, seal, shard_name, table_name
from kdcache.cache.reader import CacheReader, open_cache
from kdcache.cache.shard import ShardBuilder, digest, sequence_id
from kdcache.cache.store import LocalStore
from kdcache.errors import CacheCorruptError, CacheIncompleteError, CacheNotFoundError, ConfigError
from tests.object_stores import in_threads
from tests.strategies import build_shard, make_plan, make_row, put_shard, write_cache, write_records

PLAN = make_plan()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("reader"))


@pytest.fixture
def store(tmp_path):
    return write_cache(tmp_path)


def assert_row(row, index, plan=PLAN):
    sequence, targets = make_row(plan, index)
    assert (row.sequence.input_ids == sequence.input_ids).all()
    assert (row.sequence.loss_mask == sequence.loss_mask).all()
    assert (row.targets.token_ids == targets.token_ids).all()
    assert row.sequence_id == sequence_id(index // plan.spec.rows_per_shard, index % plan.spec.rows_per_shard)


def test_rows_come_back_in_order(finished):
    reader = open_cache(finished.root)
    assert len(reader) == 10
    for index, row in enumerate(reader):
        assert_row(row, index)


def test_any_order_and_negative_indices(finished):
    reader = open_cache(finished.root)
    for index in (9, 0, 5, -1, -10, np.int64(4)):
        assert_row(reader[index], index % 10)


@pytest.mark.parametrize("index", [10, -11, 10**9])
def test_outside(finished, index):
    with pytest.raises(IndexError, match="of 10"):
        open_cache(finished.root)[index]


def test_iterating_ends(finished):
    assert len(list(open_cache(finished.root))) == 10


def test_exact_cache_gives_back_every_bit(tmp_path):
    plan = make_plan(codec__name="exact")
    write_cache(tmp_path, plan)
    for index, row in enumerate(open_cache(tmp_path)):
        _, targets = make_row(plan, index)
        for name in ("num_entries", "token_ids", "logprobs", "tail_logprobs", "logz", "label_logprobs", "entropy"):
            assert getattr(row.targets, name).tobytes() == getattr(targets, name).tobytes()


def test_tokens_and_compact_agree_with_the_row(finished):
    reader = open_cache(finished.root)
    sequence, compact = reader.compact(4)
    assert (reader.tokens(4).input_ids == sequence.input_ids).all()
    expanded = compact.expand(reader.temperatures)
    assert (expanded.logprobs == reader[4].targets.logprobs).all()


def test_what_the_cache_says_of_itself(finished):
    reader = open_cache(str(finished.root))
    assert reader.temperatures == (1.0, 2.0) and reader.vocab_size == 300
    with pytest.raises(ConfigError, match="declared are 1, 2"):
        reader[0].targets.at_temperature(3.0)


def test_a_reader_travels_to_a_worker(finished):
    reader = open_cache(finished.root)
    before = reader[7]
    again = pickle.loads(pickle.dumps(reader))
    assert_row(again[7], 7)
    assert (again[7].targets.logprobs == before.targets.logprobs).all()


def test_few_shards_stay_open(finished, monkeypatch):
    monkeypatch.setattr(reader_module, "MAX_OPEN_SHARDS", 2)
    reader = open_cache(finished.root)
    for index in (0, 3, 6, 9, 1, 4, 0, 9):
        assert_row(reader[index], index)
        assert len(reader._open) <= 2


def test_threads_share_a_reader(finished, monkeypatch):
    """While each throws out what the others have just opened."""
    monkeypatch.setattr(reader_module, "MAX_OPEN_SHARDS", 1)
    reader = open_cache(finished.root)
    failures = []

    def read(i):
        try:
            for index in np.random.default_rng(i).integers(0, 10, size=150):
                reader.tokens(int(index))
        except KeyError as error:
            failures.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        in_threads(6, read)
    finally:
        sys.setswitchinterval(before)
    assert not failures
    assert len(reader._open) == 1


def test_digest_is_checked_once_a_shard(finished, monkeypatch):
    calls = []
    real = reader_module.ShardReader
    monkeypatch.setattr(reader_module, "ShardReader", lambda *a, **k: (calls.append(k["shard"]), real(*a, **k))[1])
    list(open_cache(finished.root))
    assert calls == [0, 1, 2, 3]


def test_a_shard_is_hashed_once_a_process(finished, monkeypatch):
    """However often it gives way to others; a reader in another process hashes again."""
    monkeypatch.setattr(reader_module, "MAX_OPEN_SHARDS", 1)
    asked = []
    real = LocalStore.map

    def watched(self, name, num_bytes, digest=None, **options):
        asked.append((name[7:12], digest is not None))
        return real(self, name, num_bytes, digest, **options)

    monkeypatch.setattr(LocalStore, "map", watched)
    reader = open_cache(finished.root)
    for index in (0, 9, 1, 9):
        assert_row(reader[index], index)
    assert asked == [("00000", True), ("00003", True), ("00000", False), ("00003", False)]
    assert_row(pickle.loads(pickle.dumps(reader))[0], 0)
    assert asked[-1] == ("00000", True)


def test_no_cache_here(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CacheNotFoundError, match="is not a kdcache cache"):
            open_cache(path)


def test_an_unfinished_cache_is_refused_unless_asked_for(tmp_path):
    store = LocalStore(tmp_path)
    publish_plan(store, PLAN)
    for shard in (2, 0):
        put_shard(store, PLAN, shard)
    with pytest.raises(CacheIncompleteError, match="2 of 4 shards are committed") as caught:
        open_cache(tmp_path)
    assert "--allow-incomplete" in caught.value.hint
    reader = open_cache(tmp_path, allow_incomplete=True)
    assert len(reader) == 6
    assert_row(reader[5], 8)


def test_a_cache_with_nothing_committed(tmp_path):
    publish_plan(LocalStore(tmp_path), PLAN)
    reader = open_cache(tmp_path, allow_incomplete=True)
    assert len(reader) == 0 and list(reader) == []


def test_positional_alignment_missing_shard(tmp_path):
    """Rows keep their names when a shard is missing, and nothing else slides into its place."""
    store = LocalStore(tmp_path)
    publish_plan(store, PLAN)
    for shard in (0, 2, 3):
        put_shard(store, PLAN, shard)
    reader = open_cache(tmp_path, allow_incomplete=True)
    ids = [row.sequence_id for row in reader]
    assert ids == [sequence_id(s, r) for s, rows in ((0, 3), (2, 3), (3, 1)) for r in range(rows)]
    assert_row(reader[3], 6)


def test_a_shard_file_that_is_gone(store):
    data, _ = build_shard(PLAN, 1)
    store.delete(shard_name(1, digest(data)))
    reader = open_cache(store.root)
    assert_row(reader[0], 0)
    with pytest.raises(CacheCorruptError, match="shard 00001: .* does not exist") as caught:
        reader[3]
    assert f"kdcache verify {store} --repair" in caught.value.hint


def test_a_truncated_shard(store):
    data, _ = build_shard(PLAN, 1)
    store.replace(shard_name(1, digest(data)), bytes(data)[:-1])
    with pytest.raises(
        CacheCorruptError, match=f"shard 00001: .*{len(data)} bytes were committed, found {len(data) - 1}"
    ):
        open_cache(store.root)[3]


def test_swapped_shards(store):
    """Shards 1 and 2 change places, names and all: sizes differ or digests do."""
    names = [shard_name(s, digest(build_shard(PLAN, s)[0])) for s in (1, 2)]
    one, two = (store.read(name) for name in names)
    store.replace(names[0], two)
    store.replace(names[1], one)
    for index in (3, 6):
        with pytest.raises(CacheCorruptError, match="shard 0000"):
            open_cache(store.root)[index]


def test_fewer_rows_than_committed(tmp_path):
    store = LocalStore(tmp_path)
    plan = make_plan(corpus__num_rows=2)
    publish_plan(store, plan)
    builder = ShardBuilder(plan.spec.make_codec(), plan.fingerprint, 0)
    builder.add(*make_row(plan, 0))
    _, stats = build_shard(plan, 0)
    commit_shard(store, plan, 0, memoryview(builder.finish()), stats, worker="w", seconds=0.0)
    seal(store)
    with pytest.raises(CacheCorruptError, match="2 sequences were committed, found 1"):
        open_cache(tmp_path)[0]


def test_the_head_is_checked(tmp_path):
    plan = make_plan()
    store, head = LocalStore(tmp_path), b"safetensors"
    publish_plan(store, plan)
    store.put_if_absent(table_name(digest(head)), head)
    for shard in range(4):
        data, stats = build_shard(plan, shard)
        commit_shard(store, plan, shard, data, stats, worker="w", seconds=0.0, head_digest=digest(head))
    seal(store)
    assert open_cache(tmp_path).head_bytes() == head
    store.replace(table_name(digest(head)), b"Safetensors")
    with pytest.raises(CacheCorruptError, match="the head has digest"):
        open_cache(tmp_path).head_bytes()


def test_no_head(finished):
    with pytest.raises(CacheNotFoundError, match="holds top_k targets, not hidden states"):
        open_cache(finished.root).head_bytes()


def test_opening_reads_no_shard(store):
    for name in store.names_in("shards"):
        store.delete(f"shards/{name}")
    for shard in range(4):
        store.delete(commit_name(shard))
    assert len(CacheReader(store)) == 10


def test_a_hundred_thousand_shards(tmp_path, monkeypatch):
    """Opening reads two files and lists nothing; a sequence is looked for in its own shard, and in no other."""
    store = write_records(tmp_path, 100_000)
    read, mapped = [], []
    plain = LocalStore.read
    monkeypatch.setattr(LocalStore, "read", lambda self, name, *limit: read.append(name) or plain(self, name, *limit))
    monkeypatch.setattr(LocalStore, "names_in", lambda self, folder: pytest.fail(f"{folder} was listed"))
    monkeypatch.setattr(LocalStore, "map", lambda self, name, *given, **more: mapped.append(name) or missing(name))
    cache = CacheReader(store)
    assert len(cache) == 800_000
    assert sorted(set(read)) == ["manifest.json", "plan.json"] and len(read) <= 4
    for index in (0, 7, 8, 399_999, 400_000, 799_999):
        with pytest.raises(CacheCorruptError, match=f"shard {index // 8:05d}"):
            cache[index]
        assert mapped == [shard_name(index // 8, f"{index // 8:032x}")]
        mapped.clear()


def missing(name):
    raise CacheNotFoundError(f"{name} does not exist")
