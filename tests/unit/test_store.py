import errno
import io
import os
import resource
import subprocess
import sys
import time

import pytest

from kdcache.cache import store as store_module
from kdcache.cache.shard import digest
from kdcache.cache.store import LocalStore, hostname, is_running
from kdcache.errors import CacheCorruptError, CacheNotFoundError, StoreError, StoreUnavailableError
from tests.strategies import all_files

HEX = "0" * 32


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "cache")


def dead_pid():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_the_first_writer_wins(store):
    assert store.put_if_absent("commits/00000.json", b"first")
    assert not store.put_if_absent("commits/00000.json", b"second")
    assert store.read("commits/00000.json") == b"first"


def test_put_if_absent_leaves_no_temporary_file(store):
    store.put_if_absent("a/b.json", b"1")
    store.put_if_absent("a/b.json", b"2")
    store.replace("a/b.json", b"3")
    assert all_files(store.root) == {"a/b.json": b"3"}


def test_a_race_lost_at_the_link_leaves_no_temporary_file(store, monkeypatch):
    real = os.link

    def a_peer_is_faster(source, target):
        target.write_bytes(b"peer")
        real(source, target)

    monkeypatch.setattr(os, "link", a_peer_is_faster)
    assert not store.put_if_absent("x.json", b"mine")
    assert all_files(store.root) == {"x.json": b"peer"}


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_hard_links(store, monkeypatch, code):
    def no_links(source, target):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(StoreError, match="no hard links"):
        store.put_if_absent("x.json", b"1")
    assert all_files(store.root) == {}


def test_no_space(store, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="cannot write x.json \\(No space left on device\\)") as caught:
        store.put_if_absent("x.json", b"abc")
    assert "run the same command again" in caught.value.hint
    assert all_files(store.root) == {}


@pytest.mark.parametrize("act", [lambda s: s.put_if_absent("x.json", b"1"), lambda s: s.replace("x.json", b"1")])
def test_a_root_that_is_a_file(tmp_path, act):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="cannot write x.json") as caught:
        act(LocalStore(tmp_path / "file"))
    assert "can be written" in caught.value.hint
    assert (tmp_path / "file").read_text() == "mine"


def test_data_are_on_disk_before_the_name_is(store, monkeypatch):
    order = []
    for name in ("fsync", "link"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (order.append(name), real(*a))[1])
    store.put_if_absent("x.json", b"abc")
    assert order == ["fsync", "link", "fsync"]


def test_replace_publishes_whole(store):
    store.replace("manifest.json", b"a" * 100)
    store.replace("manifest.json", b"b")
    assert store.read("manifest.json") == b"b"


def test_what_is_not_there(store):
    assert not store.exists("plan.json")
    assert store.names_in("commits") == []
    store.delete("plan.json")
    for ask in (lambda: store.read("plan.json"), lambda: store.map("plan.json", 3)):
        with pytest.raises(CacheNotFoundError, match=r"plan\.json does not exist"):
            ask()


def test_a_file_where_a_folder_is_expected(store):
    store.put_if_absent("commits", b"")
    with pytest.raises(CacheNotFoundError):
        store.read("commits/00000.json")
    with pytest.raises(CacheNotFoundError):
        store.map("commits/00000.json", 1)


def test_a_folder_where_a_file_is_expected(store):
    store.put_if_absent("commits/00000.json/x", b"")
    with pytest.raises(StoreError, match="cannot read"):
        store.read("commits/00000.json")
    with pytest.raises(StoreError, match="cannot read"):
        store.map("commits/00000.json", 1)
    assert not store.exists("commits/00000.json")


def test_map_holds_the_size_against_the_file(store):
    store.put_if_absent("x", b"abc")
    assert bytes(store.map("x", 3)) == b"abc"
    for size in (2, 4):
        with pytest.raises(StoreError, match=f"{size} bytes were committed, found 3"):
            store.map("x", size)
    store.put_if_absent("empty", b"")
    with pytest.raises(StoreError):
        store.map("empty", 0)


def test_a_map_cannot_be_written(store):
    store.put_if_absent("x", b"abc")
    with pytest.raises(TypeError):
        store.map("x", 3)[0] = 0


def test_list_is_sorted(store):
    for name in ("c", "a", "b"):
        store.put_if_absent(f"shards/{name}", b"")
    assert store.names_in("shards") == ["a", "b", "c"]


def test_only_what_dead_writers_left_is_removed(store):
    names = {
        "dead": f"{hostname()}~{dead_pid()}~{HEX}",
        "alive": f"{hostname()}~{os.getpid()}~{HEX}",
        "elsewhere": f"another-host~{dead_pid()}~{HEX}",
        "not ours": "notes.txt",
    }
    for name in names.values():
        store.put_if_absent(f"tmp/{name}", b"")
    assert store.remove_abandoned() == 1
    assert set(store.names_in("tmp")) == set(names.values()) - {names["dead"]}


def test_temporary_files_of_other_hosts_go_after_a_day(store):
    """A pod has a host name that never comes back."""
    store.replace("plan.json", b"{}")
    folder = store.root / "tmp"
    folder.mkdir(exist_ok=True)
    now = time.time()
    for name, age in (("pod-1~7~" + "0" * 32, 2 * 86_400), ("pod-2~7~" + "0" * 32, 3600), ("notes.txt", 2 * 86_400)):
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (now - age, now - age))
    assert store.remove_abandoned() == 1
    assert store.names_in("tmp") == ["notes.txt", "pod-2~7~" + "0" * 32]


@pytest.mark.parametrize("act", ["put_if_absent", "replace"])
def test_a_temporary_file_that_a_peer_took_for_a_dead_writers_is_written_again(store, monkeypatch, act):
    """Containers of one host name do not see each other's processes."""
    write, taken = store._write_temporary, []

    def write_and_lose(data):
        path = write(data)
        if not taken:
            taken.append(path)
            path.unlink()
        return path

    monkeypatch.setattr(store, "_write_temporary", write_and_lose)
    getattr(store, act)("commits/00000.json", b"{}")
    assert taken and store.read("commits/00000.json") == b"{}" and store.names_in("tmp") == []


def test_the_temporary_folder_goes_when_it_is_empty(store):
    store.put_if_absent(f"tmp/{hostname()}~{dead_pid()}~{HEX}", b"")
    store.remove_abandoned()
    assert not (store.root / "tmp").exists()
    assert store.remove_abandoned() == 0


def test_tidying_survives_a_peer_that_tidies_too(store, monkeypatch):
    store.put_if_absent("x", b"")
    real = store_module.Path.rmdir

    def both(path):
        real(path)
        real(path)

    monkeypatch.setattr(store_module.Path, "rmdir", both)
    store.remove_abandoned()
    assert not (store.root / "tmp").exists()


@pytest.mark.parametrize(("act", "call"), [("put_if_absent", "link"), ("replace", "replace")])
def test_a_folder_that_a_peer_tidies_away_is_made_again(store, monkeypatch, act, call):
    """A peer seals the cache and removes its empty folder just before the file gets its name."""
    real, times = getattr(os, call), []

    def tidied_away(source, target):
        times.append(target)
        if len(times) < 3:
            target.parent.rmdir()
        real(source, target)

    monkeypatch.setattr(os, call, tidied_away)
    getattr(store, act)("leases/00000.json", b"1")
    assert len(times) == 3
    assert all_files(store.root) == {"leases/00000.json": b"1"}


@pytest.mark.parametrize("act", ["put_if_absent", "replace"])
@pytest.mark.parametrize("folder", ["tmp", "leases"])
def test_a_folder_that_goes_while_it_is_made_is_made_again(store, monkeypatch, act, folder):
    """A peer removes its empty folder between mkdir's "it exists" and the look at what exists."""
    real, times = os.mkdir, []

    def there_and_gone(path, *rest):
        if os.path.basename(path) == folder:
            times.append(path)
            if len(times) < 3:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        real(path, *rest)

    store.root.mkdir()
    monkeypatch.setattr(os, "mkdir", there_and_gone)
    assert getattr(store, act)("leases/00000.json", b"1") in (True, None)
    assert len(times) >= 3
    assert store.read("leases/00000.json") == b"1"


@pytest.mark.parametrize("act", ["put_if_absent", "replace"])
@pytest.mark.parametrize("target", ["elsewhere", None])
@pytest.mark.parametrize("folder", ["tmp", "leases"])
def test_what_stands_where_a_folder_should_is_said(store, act, target, folder):
    """A file, or a link that leads nowhere: neither "another writer was first" nor tried for ever."""
    store.root.mkdir()
    if target:
        (store.root / folder).symlink_to(target)
    else:
        (store.root / folder).write_bytes(b"")
    with pytest.raises(StoreError, match=r"cannot write leases/00000.json \(Not a directory\)"):
        getattr(store, act)("leases/00000.json", b"1")


def test_a_root_that_leads_nowhere_is_said(tmp_path):
    """Scratch that is not mounted: not tried for ever."""
    (tmp_path / "cache").symlink_to(tmp_path / "unmounted" / "cache")
    for act in (LocalStore(tmp_path / "cache").put_if_absent, LocalStore(tmp_path / "cache" / "below").replace):
        with pytest.raises(StoreError, match=r"cannot write commits/00000.json \(Not a directory\)"):
            act("commits/00000.json", b"1")


def test_a_root_may_be_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "cache").symlink_to("there")
    store = LocalStore(tmp_path / "cache")
    assert store.put_if_absent("commits/00000.json", b"1")
    assert store.names_in("commits") == ["00000.json"] and store.read("commits/00000.json") == b"1"
    store.delete("commits/00000.json")
    assert all_files(tmp_path / "there") == {}


def test_a_folder_in_it_may_not(store, tmp_path):
    """It may lead to anybody's files, and a cache may come from a stranger."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "00000.json").write_text("mine")
    store.root.mkdir()
    for folder in ("leases", "tmp"):
        (store.root / folder).symlink_to(mine)
    name = "leases/00000.json"
    for act in (
        lambda: store.read(name), lambda: store.map(name, 4), lambda: store.names_in("leases"), lambda: store.delete(name),
        lambda: store.put_if_absent("leases/1", b""), lambda: store.replace(name, b""), lambda: store.replace("x", b""),
        store.remove_abandoned,
    ):  # fmt: skip
        with pytest.raises(StoreError):
            act()
    store.remove_empty("leases")
    assert all_files(mine) == {"00000.json": b"mine"}


@pytest.mark.parametrize("kind", ["link", "dangling", "loop", "device", "pipe", "socket"])
def test_only_files_are_read(store, tmp_path, kind):
    """No link is followed, and no pipe or device waited for."""
    import socket

    store.root.mkdir()
    path = store.root / "x"
    (tmp_path / "secret").write_bytes(b"abc")
    links = {"link": "../secret", "dangling": "nowhere", "loop": "x", "device": "/dev/zero"}
    if kind in links:
        path.symlink_to(links[kind])
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(path))
    for ask in (lambda: store.read("x"), lambda: store.map("x", 3)):
        with pytest.raises(StoreError):
            ask()


def test_what_the_hub_fetched_is_read(tmp_path):
    """huggingface_hub keeps files under the names of their digests, and links to them."""
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"abc")
    store = LocalStore(tmp_path / "snapshots" / "revision")
    (store.root / "commits").mkdir(parents=True)
    (store.root / "commits" / "x").symlink_to(f"../../../blobs/{blob.name}")
    assert store.read("commits/x") == b"abc" == bytes(store.map("commits/x", 3))
    blob.unlink()
    with pytest.raises(CacheNotFoundError):
        store.read("commits/x")
    blob.symlink_to("/etc/passwd")
    with pytest.raises(StoreError):
        store.read("commits/x")


@pytest.mark.parametrize(
    ("name", "size"), [("commits/00000.json", 2 << 20), ("plan.json", 1 << 40), ("manifest.json", 1 << 40)]
)
def test_a_record_of_impossible_size_is_not_read(store, name, size):
    store.put_if_absent(name, b"{")
    os.truncate(store.root / name, size)
    with pytest.raises(CacheCorruptError, match="bytes were expected"):
        store.read(name)


def test_what_memory_cannot_hold_is_not_damaged(store):
    store.put_if_absent("shards/x", b"x")
    os.truncate(store.root / "shards" / "x", 1 << 42)
    before = resource.getrlimit(resource.RLIMIT_AS)
    # Where memory is given out freely, only the address space ends somewhere.
    resource.setrlimit(resource.RLIMIT_AS, (1 << 41, before[1]))
    try:
        with pytest.raises(StoreUnavailableError, match="not enough memory"):
            store.read("shards/x")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_folder_that_is_gone_needs_no_sync(store, monkeypatch):
    """A peer deletes the new file and its folder before the folder is synced."""
    real = os.link

    def deleted_at_once(source, target):
        real(source, target)
        target.unlink()
        target.parent.rmdir()

    monkeypatch.setattr(os, "link", deleted_at_once)
    assert store.put_if_absent("leases/00000.json", b"1")
    assert all_files(store.root) == {}


def test_hostname_fits_a_file_name(monkeypatch):
    monkeypatch.setattr(store_module.socket, "gethostname", lambda: "a/b~c d.example")
    assert hostname() == "a-b-c-d.example"


def test_is_running():
    assert is_running(os.getpid())
    assert not is_running(dead_pid())
    assert not is_running(10**30)


UNKNOWN = [errno.EACCES, errno.ESTALE, errno.EIO, errno.EMFILE, errno.ENOMEM]


@pytest.mark.parametrize("code", UNKNOWN)
def test_what_may_not_be_read_is_not_damaged(store, monkeypatch, code):
    """`verify --repair` must not take back what nobody could look at."""
    store.put_if_absent("x", b"abc")

    def refused(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("builtins.open", refused)
    monkeypatch.setattr(store_module.Path, "read_bytes", refused)
    for ask in (lambda: store.read("x"), lambda: store.map("x", 3)):
        with pytest.raises(StoreUnavailableError, match="cannot read"):
            ask()


def test_what_fails_half_way_through_a_file_is_not_damaged(store, monkeypatch):
    """The bytes of a map are read before it is made: a bad sector is an error that can be said, not the end of the process."""

    class Failing(io.FileIO):
        def readinto(self, buffer):
            if self.tell():
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().readinto(buffer)

    data = os.urandom(1 << 20)
    store.put_if_absent("x", data)
    monkeypatch.setattr("builtins.open", Failing)
    with pytest.raises(StoreUnavailableError, match="cannot read"):
        store.map("x", len(data), digest(data))


def test_what_is_cut_short_while_it_is_read_does_not_end_the_process(store):
    """Another client truncates the file: touching a map of it would be SIGBUS."""
    data = os.urandom(1 << 20)
    store.put_if_absent("x", data)
    script = f"""
import os, xxhash
from kdcache.cache.store import LocalStore
from kdcache.errors import CacheCorruptError
real = xxhash.xxh3_128
class Truncating:
    def __init__(self): self.state = real()
    def update(self, part):
        os.truncate({str(store.root / "x")!r}, 10)
        self.state.update(part)
    def hexdigest(self): return self.state.hexdigest()
xxhash.xxh3_128 = Truncating
try:
    LocalStore({str(store.root)!r}).map("x", {len(data)}, {digest(data)!r})
except CacheCorruptError as error:
    print(error.message)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"digest {digest(data)} was committed, the bytes on disk have")


def test_a_map_of_other_bytes(store):
    store.put_if_absent("x", b"abc")
    assert bytes(store.map("x", 3, digest(b"abc"))) == b"abc"
    with pytest.raises(CacheCorruptError, match=f"digest {digest(b'abd')} was committed, the bytes on disk have"):
        store.map("x", 3, digest(b"abd"))


def test_what_cannot_be_looked_for(tmp_path):
    """Not "there is none": a name that this file system does not take stands here for a server that fails."""
    store = LocalStore(tmp_path / ("x" * 300))
    for ask in (lambda: store.exists("plan.json"), lambda: store.names_in("")):
        with pytest.raises(StoreUnavailableError, match="File name too long"):
            ask()


def test_a_link_that_leads_nowhere_holds_no_file(store):
    store.root.mkdir()
    (store.root / "x").symlink_to("x")
    assert not store.exists("x")
    for ask in (lambda: store.read("x"), lambda: store.map("x", 3)):
        with pytest.raises(StoreError, match="cannot read"):
            ask()
