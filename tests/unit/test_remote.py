"""The verbs of a store, on every kind of store there is; local copies; what happens when calls fail."""

import contextlib
import errno
import io
import os
import resource
import tempfile
import time
from pathlib import Path

import fsspec
import pytest
import xxhash
from click.testing import CliRunner

from kdcache.cache import copies as copies_module
from kdcache.cache import limits, remote
from kdcache.cache.commit import check_writers
from kdcache.cache.copies import SUFFIX, LocalCopies
from kdcache.cache.reader import CacheReader, open_cache
from kdcache.cache.shard import content_hash
from kdcache.cache.store import LocalStore, open_store
from kdcache.cache.verify import verify_cache
from kdcache.cli import main
from kdcache.errors import (
    CacheCorruptError,
    CacheNotFoundError,
    ConfigError,
    StoreError,
    StoreUnavailableError,
)
from tests.object_stores import BUCKET, FaultyMemory, faulty_memory, in_threads, moto, s3_environment, seaweed
from tests.strategies import write_cache


@pytest.fixture(scope="module")
def moto_port():
    with moto() as port:
        yield port


@pytest.fixture(scope="module")
def seaweed_port(tmp_path_factory):
    with seaweed(tmp_path_factory.mktemp("seaweed")) as server:
        yield server.port


@pytest.fixture
def moto_url(moto_port):
    with s3_environment(moto_port):
        yield f"s3://{BUCKET}"


@pytest.fixture
def seaweed_url(seaweed_port):
    with s3_environment(seaweed_port):
        yield f"s3://{BUCKET}"


@pytest.fixture
def memory_url():
    faulty_memory()
    FaultyMemory.disarm()
    FaultyMemory.store.clear()
    yield "faulty://bucket"
    FaultyMemory.disarm()


@pytest.fixture(params=["folder", "memory", "moto", "seaweed"])
def store(request, tmp_path, monkeypatch):
    monkeypatch.setenv("KDCACHE_COPIES", str(tmp_path / "copies"))
    monkeypatch.setattr(remote, "RETRY_SECONDS", 3.0)
    if request.param == "folder":
        return open_store(tmp_path / "cache")
    return open_store(f"{request.getfixturevalue(f'{request.param}_url')}/{tmp_path.name}")


@pytest.fixture
def faulty(memory_url, tmp_path, monkeypatch):
    monkeypatch.setenv("KDCACHE_COPIES", str(tmp_path / "copies"))
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.5)
    return open_store(f"{memory_url}/cache")


def named(data: bytes) -> str:
    return f"shards/00000-{xxhash.xxh3_128_hexdigest(data)}.arrow"


def test_the_first_writer_wins(store):
    assert store.put_if_absent("commits/00000.json", b"first")
    assert not store.put_if_absent("commits/00000.json", b"second")
    assert store.read("commits/00000.json") == b"first"
    store.replace("commits/00000.json", b"third")
    assert store.read("commits/00000.json") == b"third"


def test_a_file_larger_than_its_kind_is_not_fetched_whole(store, monkeypatch):
    """A stranger's record; and an empty file is one of no bytes, whatever a store says of parts of nothing."""
    monkeypatch.setitem(limits.MAX_FILE_BYTES, "commits", 1000)
    for size in (0, 1, 1000, 1001, 50_000):
        names = [f"commits/{size + number:05d}.json" for number in range(2)]
        store.replace(names[0], bytes(size))
        store.replace(names[1], b"{}")
        if size <= 1000:
            assert store.read(names[0]) == bytes(size)
            assert store.read_all(names) == [bytes(size), b"{}"]
            continue
        for read in (lambda: store.read(names[0]), lambda: store.read_all(names)):  # noqa: B023
            with pytest.raises(CacheCorruptError, match=f"{names[0]}: at most 1000 bytes were expected, found"):
                read()


def test_each_server_is_asked_itself(moto_port, seaweed_port):
    """Two endpoints in one process: fsspec would go on with the client of the first."""
    for port in (moto_port, seaweed_port, moto_port):
        with s3_environment(port):
            fs = open_store(f"s3://{BUCKET}/cache")._connect()[0]
            assert fs.exists(BUCKET)
            assert fs.s3.meta.endpoint_url == f"http://127.0.0.1:{port}"


def test_one_of_many_writers_wins(store):
    for number in range(5):
        name = f"commits/{number:05d}.json"
        won = in_threads(8, lambda i, name=name: store.put_if_absent(name, b"writer %d" % i))
        assert won.count(True) == 1
        assert store.read(name) == b"writer %d" % won.index(True)


def test_it_can_tell_writers_apart_and_the_trial_leaves_nothing(store, request):
    assert store.is_exclusive()
    assert store.names_in("tmp") == []
    keeps_folders = request.node.callspec.params["store"] == "seaweed"  # an empty one stays when its last file goes
    assert store.names_in("") == (["tmp"] if keeps_folders else [])


def test_names(store):
    assert store.names_in("") == []
    assert store.names_in("commits") == []
    for name in ("commits/b", "commits/a", "plan.json"):
        store.replace(name, b"1")
    assert set(store.names_in("")) - {"tmp"} == {"commits", "plan.json"}
    assert store.names_in("commits") == ["a", "b"]
    assert store.exists("commits/a")
    assert not store.exists("commits")
    assert not store.exists("commits/c")


def test_what_is_not_there(store):
    store.delete("commits/00000.json")
    for ask in (
        lambda: store.read("plan.json"),
        lambda: store.read_all(["plan.json"]),
        lambda: store.map(named(b"abc"), 3),
    ):
        with pytest.raises(CacheNotFoundError, match="does not exist"):
            ask()


def test_what_was_deleted_can_be_put_again(store):
    assert store.put_if_absent("x.json", b"1")
    store.delete("x.json")
    assert not store.exists("x.json")
    assert store.put_if_absent("x.json", b"2")
    assert store.read("x.json") == b"2"


def test_many_small_files(store, monkeypatch):
    monkeypatch.setattr(remote, "READS_AT_ONCE", 4)
    names = [f"commits/{i:05d}.json" for i in range(11)]
    for i, name in enumerate(names):
        store.replace(name, b"%d" % i)
    assert store.read_all(names) == [b"%d" % i for i in range(11)]
    assert store.read_all([]) == []


def test_a_map_of_several_ranges(store, monkeypatch):
    monkeypatch.setattr(remote, "RANGE_BYTES", 1000)
    data = os.urandom(9500)
    store.replace(named(data), data)
    assert bytes(store.map(named(data), len(data))) == data
    with pytest.raises(StoreError, match="9501 bytes were committed, found 9500"):
        store.map(named(data), len(data) + 1)


def test_open_store(tmp_path):
    assert isinstance(open_store(tmp_path), LocalStore)
    assert open_store(f"file://{tmp_path}").location == open_store(tmp_path).location == str(tmp_path)
    assert open_store("s3://bucket/cache/").location == "s3://bucket/cache"
    with pytest.raises(ConfigError, match="a bucket and a folder were expected"):
        open_store("s3://")
    with pytest.raises(ConfigError, match="Protocol not known"):
        open_store("nonsense://x").exists("plan.json")
    with pytest.raises(ConfigError, match="needs a package") as caught:
        open_store("gs://x/y").exists("plan.json")
    assert "kdcache[gcs]" in caught.value.hint


def test_a_bucket_that_is_not_there(moto_url):
    with pytest.raises(StoreError, match="cannot write x") as caught:
        open_store("s3://no-such-bucket/cache").put_if_absent("x", b"1")
    assert "bucket" in caught.value.hint


def test_a_store_that_cannot_tell_writers_apart(caplog):
    """fsspec's own memory store looks first and writes then; several writers are refused, one is warned."""
    fsspec.filesystem("memory").store.clear()
    store = open_store("memory://cache")
    with pytest.raises(StoreError, match="cannot tell two writers apart") as caught:
        check_writers(store, 2)
    assert "one writer instead of 2" in caught.value.hint
    check_writers(store, 1)
    assert "nothing else writes there" in caplog.text


def test_empty_files_are_not_put(faulty):
    """s3fs creates an empty file without asking whether there is one."""
    with pytest.raises(ValueError, match="not empty"):
        faulty.put_if_absent("x", b"")


@pytest.mark.parametrize("kind", ["409", "503", "time-out", "time-out after success", "412 after success"])
def test_what_fails_in_passing_is_tried_again(faulty, kind, caplog):
    """Also where the file was taken and only the answer was lost: then it is ours."""
    for number in (1, 2, 3, 4):
        FaultyMemory.fail(number, kind)
        assert faulty.put_if_absent(f"commits/{number}.json", b"mine %d" % number)
        FaultyMemory.disarm()
        assert faulty.read(f"commits/{number}.json") == b"mine %d" % number
    assert "trying again" in caplog.text or kind == "412 after success"


def test_another_writers_file_may_go_while_it_is_looked_at(faulty, monkeypatch):
    """A lease: taken by another worker when we ask for it, and released before we see whose it is."""
    fs, _ = faulty._connect()

    def taken(path, data, **options):
        fs.rm_file(path)
        raise FileExistsError(path)

    faulty.replace("leases/00000.json", b"another's")
    before = iter([False])  # no lease when we first look
    monkeypatch.setattr(faulty, "exists", lambda name: next(before, True))
    monkeypatch.setattr(fs, "pipe_file", taken)
    assert not faulty.put_if_absent("leases/00000.json", b"ours")


def test_what_fails_for_good(faulty):
    for kind, refused in (("503 for good", StoreUnavailableError), ("403 for good", StoreError)):
        FaultyMemory.fail(1, kind)
        for act, error in (
            (lambda: faulty.replace("x", b"1"), refused),
            (lambda: faulty.read("x"), StoreUnavailableError),
        ):
            with pytest.raises(error) as caught:
                act()
            assert "faulty://bucket/cache" in caught.value.message
        FaultyMemory.disarm()


def test_a_copy_that_rotted_is_fetched_anew(faulty, tmp_path, caplog):
    data = os.urandom(5000)
    faulty.replace(named(data), data)
    faulty.map(named(data), len(data))
    (copy,) = (tmp_path / "copies").glob("*.arrow")
    for damage in (lambda b: b[:17] + bytes([b[17] ^ 1]) + b[18:], lambda b: b[:-1], lambda b: b""):
        copy.write_bytes(damage(data))
        assert bytes(faulty.map(named(data), len(data), xxhash.xxh3_128_hexdigest(data))) == data
        assert copy.read_bytes() == data
    assert "fetching it anew" in caplog.text
    FaultyMemory.disarm()
    faulty.map(named(data), len(data))
    assert FaultyMemory.calls == 0, "a whole copy asks nothing of the store"


def test_an_original_that_rotted(faulty, tmp_path):
    data = os.urandom(5000)
    faulty.replace(named(data), b"\0" + data[1:])
    with pytest.raises(CacheCorruptError, match="the bytes in the store have another"):
        faulty.map(named(data), len(data))
    assert not list((tmp_path / "copies").glob("*.arrow"))


def test_copies_make_room_but_never_the_last_one(tmp_path):
    """The ones longest unused go first; one whose original is gone stays."""
    originals = {}

    copies = LocalCopies(tmp_path / "copies", 3000, lambda url: originals.get(url, b"").hex() or None)
    blobs = [os.urandom(1000) for _ in range(6)]

    def use(i):
        url = f"s3://b/{i}"
        digest = xxhash.xxh3_128_hexdigest(blobs[i])
        assert bytes(copies.open(digest, 1000, url, fetch(url))) == blobs[i]

    def fetch(url):
        return lambda write: (write(originals[url]), originals[url].hex())[1]

    def held():
        digests = {xxhash.xxh3_128_hexdigest(blob): i for i, blob in enumerate(blobs)}
        return sorted(digests[path.stem] for path in (tmp_path / "copies").glob("*.arrow"))

    def age(i, seconds):
        path = tmp_path / "copies" / f"{xxhash.xxh3_128_hexdigest(blobs[i])}.arrow"
        os.utime(path, (1e9 - seconds, 1e9 - seconds))

    for i, blob in enumerate(blobs):
        originals[f"s3://b/{i}"] = blob
    for i in range(3):
        use(i)
        age(i, 100 - i)
    use(0)  # now the newest
    use(3)
    assert held() == [0, 2, 3]
    age(2, 50)
    del originals["s3://b/2"]
    age(0, 40)
    use(4)
    assert held() == [2, 3, 4], "2 has no original any more: 0 goes in its place"
    originals.clear()
    originals["s3://b/5"] = blobs[5]
    use(5)
    assert held() == [2, 3, 4, 5], "none has an original: the limit gives way"


def test_copies_tidy_up_after_fetches_that_were_killed(tmp_path):
    folder = tmp_path / "copies"
    folder.mkdir()
    (folder / "old.part").write_bytes(b"x")
    (folder / "new.part").write_bytes(b"x")
    os.utime(folder / "old.part", (1e9, 1e9))
    LocalCopies(folder, 10**9, lambda url: "1").open(
        xxhash.xxh3_128_hexdigest(b"abc"), 3, "s3://b/x", lambda write: (write(b"abc"), "1")[1]
    )
    assert sorted(path.name for path in folder.glob("*.part")) == ["new.part"]


@pytest.mark.parametrize("limit", ["many", "nan", "inf"])
def test_a_limit_that_is_no_number(monkeypatch, limit):
    monkeypatch.setenv("KDCACHE_COPIES_GB", limit)
    with pytest.raises(ConfigError, match="KDCACHE_COPIES_GB"):
        LocalCopies.from_environment(lambda url: "1")


def test_a_user_without_a_home_folder(monkeypatch):
    monkeypatch.setenv("KDCACHE_COPIES", "~no-such-user/copies")
    with pytest.raises(ConfigError, match="no home folder") as caught:
        LocalCopies.from_environment(lambda url: "1")
    assert "KDCACHE_COPIES" in caught.value.hint


def test_a_peer_takes_a_copy_while_it_is_hashed(faulty, tmp_path, monkeypatch):
    """What is mapped stays; the original is not called damaged, nor the folder."""
    data = os.urandom(5000)
    faulty.replace(named(data), data)
    faulty.map(named(data), len(data))
    real = copies_module.map_file

    def taken(path, *about):
        copy = real(path, *about)
        if path.suffix == ".arrow":
            path.unlink()
        return copy

    monkeypatch.setattr(copies_module, "map_file", taken)
    assert bytes(faulty.map(named(data), len(data))) == data


def test_a_peer_takes_every_copy_as_soon_as_it_is_there(faulty, tmp_path, monkeypatch):
    data = os.urandom(5000)
    faulty.replace(named(data), data)
    real = os.replace

    def taken(source, target):
        real(source, target)
        os.unlink(target)

    monkeypatch.setattr(os, "replace", taken)
    assert bytes(faulty.map(named(data), len(data))) == data


def test_many_readers_share_a_folder_that_is_too_small(faulty, monkeypatch):
    """Each fetch throws out what others have just fetched, or are hashing."""
    blobs = [os.urandom(20_000 + i) for i in range(6)]
    for blob in blobs:
        faulty.replace(named(blob), blob)
    monkeypatch.setenv("KDCACHE_COPIES_GB", "0.00005")

    def read(i):
        return all(bytes(faulty.map(named(b), len(b))) == b for b in [*blobs[i:], *blobs[:i]] * 8)

    assert in_threads(6, read) == [True] * 6


@pytest.mark.parametrize("kind", ["memory", "moto"])
def test_a_copy_whose_original_is_another_now_stays(kind, request, tmp_path, monkeypatch):
    """It may be the only good one left."""
    monkeypatch.setenv("KDCACHE_COPIES", str(tmp_path / "copies"))
    monkeypatch.setenv("KDCACHE_COPIES_GB", "0.000001")
    store = open_store(f"{request.getfixturevalue(f'{kind}_url')}/{tmp_path.name}")
    blobs = [os.urandom(1000) for _ in range(4)]
    for blob in blobs:
        store.replace(named(blob), blob)

    def held():
        digests = {xxhash.xxh3_128_hexdigest(blob): i for i, blob in enumerate(blobs)}
        return sorted(digests[path.stem] for path in (tmp_path / "copies").glob("*.arrow"))

    for i, blob in enumerate(blobs[:2]):
        store.map(named(blob), 1000)
        assert held() == [i], "the limit is one copy"
    store.replace(named(blobs[1]), b"\0" + blobs[1][1:])
    store.map(named(blobs[2]), 1000)
    assert held() == [1, 2]
    store.map(named(blobs[3]), 1000)
    assert held() == [1, 3]


def write_remote(store, tmp_path):
    """A finished cache, uploaded file by file."""
    local = write_cache(tmp_path / "local")
    for path in sorted(Path(local.root).rglob("*")):
        if path.is_file():
            store.replace(path.relative_to(local.root).as_posix(), path.read_bytes())


@contextlib.contextmanager
def a_folder_that_is_a_file(folder):
    folder.write_bytes(b"")
    yield


@contextlib.contextmanager
def a_disk_that_is_full(folder):
    """For every file of more than two kilobytes, and no shard is smaller."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("trouble", [a_folder_that_is_a_file, a_disk_that_is_full])
def test_no_room_for_copies_is_not_a_damaged_cache(faulty, tmp_path, trouble):
    """`verify --repair` must not take back shards because the disk of copies is full."""
    write_remote(faulty, tmp_path)
    before = {name: faulty.read(f"commits/{name}") for name in faulty.names_in("commits")}
    with trouble(tmp_path / "copies"):
        audit = verify_cache(faulty)
        with pytest.raises(StoreUnavailableError, match="cannot keep a copy"):
            open_cache(faulty.location)[0]
        if trouble is a_folder_that_is_a_file:
            assert audit.intact and audit.num_verified == 4, "an audit makes no copies"
            return
        said = CliRunner().invoke(main, ["verify", faulty.location, "--repair"])
    assert not audit.intact
    assert (audit.problems, audit.damaged, audit.unread, audit.num_verified) == ([], [], [0, 1, 2, 3], 0)
    assert said.exit_code == 1
    assert "could not be looked at: shard 00000" in said.output
    assert {name: faulty.read(f"commits/{name}") for name in faulty.names_in("commits")} == before
    assert faulty.exists("manifest.json")


def test_no_folder_for_temporary_files_is_not_a_damaged_cache(faulty, tmp_path, monkeypatch):
    write_remote(faulty, tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "nowhere")])
    audit = verify_cache(faulty)
    assert (audit.problems, audit.damaged, audit.unread, audit.num_verified) == ([], [], [0, 1, 2, 3], 0)


def a_transfer_that_loses_bytes(monkeypatch):
    real, calls = FaultyMemory.cat_ranges, []

    def cat_ranges(self, paths, starts, ends, **options):
        parts = real(self, paths, starts, ends, **options)
        if any(path.endswith(SUFFIX) for path in paths):
            calls.append(paths)
            return [part[:-1] + b"\0" for part in parts] if len(calls) == 1 else parts
        return parts

    monkeypatch.setattr(FaultyMemory, "cat_ranges", cat_ranges)


def a_disk_that_keeps_other_bytes(monkeypatch):
    class Rotten(io.FileIO):
        def write(self, data):
            return super().write(bytes(data)[:-1] + b"\0")

    def temporary_file():
        handle, path = tempfile.mkstemp()
        os.close(handle)
        return Rotten(path, "r+")

    monkeypatch.setattr(tempfile, "TemporaryFile", temporary_file)


@pytest.mark.parametrize("trouble", [a_transfer_that_loses_bytes, a_disk_that_keeps_other_bytes])
def test_what_went_wrong_on_the_way_is_no_damage_of_the_store(faulty, tmp_path, monkeypatch, trouble):
    write_remote(faulty, tmp_path)
    trouble(monkeypatch)
    audit = verify_cache(faulty)
    assert (audit.problems, audit.damaged) == ([], [])
    assert audit.intact if trouble is a_transfer_that_loses_bytes else audit.unread == [0, 1, 2, 3]


@pytest.mark.parametrize("harm", ["deleted", "flipped"])
def test_verify_looks_at_what_lies_in_the_store_whatever_copies_there_are(store, tmp_path, harm):
    """Whole copies say nothing about originals that are gone or rotted; and the sequence is named, there too."""
    write_remote(store, tmp_path)
    cache = open_cache(store.location)
    assert len([row.sequence_id for row in cache]) == len(cache)
    assert verify_cache(store).intact
    name = f"shards/{store.names_in('shards')[2]}"
    whole = store.read(name)
    if harm == "deleted":
        store.delete(name)
    else:
        frame = cache.open_shard(2)._frame("levels", 1)
        place = whole.index(bytes(frame)) + len(frame) // 2
        store.replace(name, whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    audit = verify_cache(store)
    assert audit.damaged == [2] and audit.num_verified == 3
    (problem,) = audit.problems
    assert ("does not exist" in problem) if harm == "deleted" else problem.endswith("damaged are sequences 1 of its 3")
    if not isinstance(store, LocalStore):
        assert len([row.sequence_id for row in open_cache(store.location)]) == len(cache), "read from whole copies"


@pytest.mark.parametrize("trouble", [StoreUnavailableError("the network is down"), MemoryError()])
def test_damage_that_was_seen_stays_damage_where_nothing_more_can_be_found_out(store, tmp_path, monkeypatch, trouble):
    """The digest is wrong, and the second look, for the sequence, fails."""
    write_remote(store, tmp_path)
    name = f"shards/{store.names_in('shards')[0]}"
    store.replace(name, b"\0" + store.read(name)[1:])
    real = CacheReader.open_shard

    def open_shard(self, position, *, check_digest=True, **options):
        if not check_digest:
            raise trouble
        return real(self, position, check_digest=check_digest, **options)

    monkeypatch.setattr(CacheReader, "open_shard", open_shard)
    audit = verify_cache(store)
    assert (audit.damaged, audit.unread, audit.num_verified) == ([0], [], 3)


def test_a_server_that_knows_no_condition_has_one_writer(faulty, monkeypatch, caplog):
    """It answers 501 to If-None-Match."""
    fs, real = faulty._connect()[0], type(faulty._connect()[0]).pipe_file

    def pipe_file(self, path, value, mode="overwrite", **options):
        if mode == "create":
            raise OSError(errno.ENOSYS, "A header you provided implies functionality that is not implemented")
        return real(self, path, value, mode=mode, **options)

    monkeypatch.setattr(type(fs), "pipe_file", pipe_file)
    assert not faulty.is_exclusive()
    with pytest.raises(StoreError, match="cannot tell two writers apart"):
        check_writers(faulty, 2)
    check_writers(faulty, 1)
    assert "see to it that nothing else writes there" in caplog.text
    assert faulty.put_if_absent("plan.json", b"first") and not faulty.put_if_absent("plan.json", b"second")
    assert faulty.read("plan.json") == b"first"


def test_of_many_files_the_one_that_is_missing_is_named(store):
    for number in (0, 1, 3):
        store.replace(f"commits/{number:05d}.json", b"{}")
    with pytest.raises(CacheNotFoundError, match="commits/00002.json does not exist"):
        store.read_all([f"commits/{number:05d}.json" for number in range(4)])


def test_a_file_is_read_no_further_than_asked(store):
    for name in ("tables/a.safetensors", "shards/a.arrow"):
        store.replace(name, bytes(1000))
        assert len(store.read(name, 1000)) == 1000
        with pytest.raises(CacheCorruptError, match="at most 999 bytes were expected, found 1000"):
            store.read(name, 999)


@pytest.mark.parametrize("dies_at", ["write_text", "replace"])
def test_no_copy_is_left_that_can_never_go(faulty, tmp_path, monkeypatch, dies_at):
    """Killed between a copy and the note of where it is from."""
    data, more = os.urandom(1000), os.urandom(1000)
    for blob in (data, more):
        faulty.replace(named(blob), blob)

    def die(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(*{"write_text": (Path, "write_text"), "replace": (os, "replace")}[dies_at], die)
        with pytest.raises(KeyboardInterrupt):
            faulty.map(named(data), 1000)
    monkeypatch.setenv("KDCACHE_COPIES_GB", "0.000001")
    faulty.map(named(data), 1000)
    faulty.map(named(more), 1000)
    assert [path.stem for path in (tmp_path / "copies").glob("*.arrow")] == [xxhash.xxh3_128_hexdigest(more)]


def test_a_peer_that_makes_room_does_not_take_the_note_of_a_new_copy(faulty, tmp_path, monkeypatch):
    """Between the note and the copy, a peer takes the old copy of that name, and the note with it."""
    data, more = os.urandom(1000), os.urandom(1000)
    for blob in (data, more):
        faulty.replace(named(blob), blob)
    real = os.replace

    def replace(source, target):
        Path(target).with_suffix(copies_module.ORIGIN).unlink()
        real(source, target)

    with monkeypatch.context() as racing:
        racing.setattr(os, "replace", replace)
        faulty.map(named(data), 1000)
    monkeypatch.setenv("KDCACHE_COPIES_GB", "0.000001")
    faulty.map(named(more), 1000)
    assert [path.stem for path in (tmp_path / "copies").glob("*.arrow")] == [xxhash.xxh3_128_hexdigest(more)]


def test_room_is_made_before_a_fetch(faulty, tmp_path, monkeypatch):
    """On a full disk a smaller limit helps at once."""
    blobs = [os.urandom(1000) for _ in range(3)]
    for blob in blobs:
        faulty.replace(named(blob), blob)
        faulty.map(named(blob), 1000)
    monkeypatch.setenv("KDCACHE_COPIES_GB", "0.000002")
    most, real = [], faulty._ranges

    def watched(names, starts, ends):
        most.append(sum(path.stat().st_size for path in (tmp_path / "copies").glob("*.arrow")))
        return real(names, starts, ends)

    monkeypatch.setattr(faulty, "_ranges", watched)
    more = os.urandom(1000)
    faulty.replace(named(more), more)
    faulty.map(named(more), 1000)
    assert most == [1000]


def test_a_trial_that_was_killed_is_tidied_up(faulty):
    now = int(time.time())
    names = [f"trial~{now - 2 * 86_400}~{'0' * 32}", f"trial~{now}~{'0' * 32}", "notes.txt"]
    for name in names:
        faulty.replace(f"tmp/{name}", b"first")
    assert faulty.remove_abandoned() == 1
    assert faulty.names_in("tmp") == sorted(names[1:])


def test_a_trial_is_named_so_that_it_can_be_tidied_up(faulty, monkeypatch):
    FaultyMemory.fail(3, "503 for good")
    with pytest.raises(StoreUnavailableError):
        faulty.is_exclusive()
    FaultyMemory.disarm()
    left = faulty.names_in("tmp")
    assert left
    later = time.time() + 2 * 86_400
    monkeypatch.setattr(remote.time, "time", lambda: later)
    assert faulty.remove_abandoned() == len(left)
    assert faulty.names_in("tmp") == []


def test_a_cache_is_read_the_same(store, tmp_path):
    """Uploaded file by file, as `aws s3 cp --recursive` does."""
    local = write_cache(tmp_path / "local")
    for path in sorted(Path(local.root).rglob("*")):
        if path.is_file():
            store.replace(path.relative_to(local.root).as_posix(), path.read_bytes())
    there, here = open_cache(store.location), open_cache(local.root)
    assert there.manifest == here.manifest
    assert len(there) == len(here)
    for a, b in zip(there, here, strict=True):
        assert a.sequence_id == b.sequence_id
        assert content_hash(a.sequence) == content_hash(b.sequence)
        assert (a.targets.logprobs == b.targets.logprobs).all()
    assert verify_cache(store).intact


def test_a_store_that_cannot_be_asked_is_not_a_damaged_cache(faulty, tmp_path):
    """`verify --repair` must not take back shards because the network was down."""
    write_remote(faulty, tmp_path)
    FaultyMemory.disarm()
    verify_cache(faulty)
    total = FaultyMemory.calls
    assert total > 5
    for number in range(1, total + 1):
        for copy in (tmp_path / "copies").glob("*"):
            copy.unlink()
        FaultyMemory.fail(number, "503 for good")
        with pytest.raises(StoreUnavailableError):
            verify_cache(faulty)
        FaultyMemory.disarm()
