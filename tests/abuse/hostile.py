"""S3: caches made to do harm. Each is read by a process of its own that may write nowhere, start nothing and use little memory.

Every attack re-signs what it changed, as its author would: digests hold, so nothing but the checks on the content itself stands
between the bytes and the reader.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zstandard

from kdcache.cache import jit, loops
from kdcache.cache.commit import commit_name, load_codec, read_commits, read_plan, shard_name
from kdcache.cache.frames import compress
from kdcache.cache.manifest import Plan, parse, signed_json, to_json
from kdcache.cache.reader import open_cache
from kdcache.cache.shard import digest, schema
from kdcache.cache.store import LocalStore

MEMORY_BYTES = 2 << 30
CPU_SECONDS = 60
BOMB_BYTES = 4 << 30
STRANGE: list[Any] = [
    -1, 0, 1, 2, 255, 256, 65_535, 65_536, 2**31, 2**32 - 1, 2**32, 2**53, 2**62 - 1, 2**63, 10**400, 0.0, -0.5, 1e-300, 1e308,
    True, None, "", "x" * 100_000, "../../../etc/passwd", "/etc/passwd", "shards/../..", "a\x00b", "\ud800", [], {}, [[]] * 3,
    [1.0, 1.0], {"a": {"b": {}}}, "0" * 32,
]  # fmt: skip


# --- attacks ----------------------------------------------------------------------------------------------------------


def commit_again(store: LocalStore, shard: int, data: bytes) -> None:
    """Publish other bytes for a shard, with a commit that vouches for them."""
    commit = next(c for c in read_commits(store) if c.shard == shard)
    changed = commit.model_copy(update={"digest": digest(data), "num_bytes": len(data)})
    store.replace(shard_name(shard, changed.digest), data)
    store.replace(commit_name(shard), to_json(changed))
    store.delete("manifest.json")


def shard_bytes(store: LocalStore, shard: int = 0) -> bytes:
    """The file of a shard."""
    return store.read(f"shards/{store.names_in('shards')[shard]}")


def forge(store: LocalStore, kind: pa.Schema | None = None, **columns: Any) -> None:
    """Shard 0 with cells of its first row replaced, perhaps under another schema."""
    plan = read_plan(store)
    kind = kind or schema(load_codec(store, plan.spec), plan.fingerprint, 0)
    rows = pa.ipc.open_file(pa.py_buffer(shard_bytes(store))).get_batch(0).to_pylist()
    rows[0] |= columns
    if kind.names != list(rows[0]) or any(kind.field(name).type == pa.float64() for name in columns):
        rows = rows[:1]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, kind) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=kind))
    commit_again(store, 0, sink.getvalue().to_pybytes())


def frame_content(store: LocalStore, rng: np.random.Generator) -> str:
    """Whole frames whose content no writer would have written."""
    codec = load_codec(store, read_plan(store).spec)
    name = str(rng.choice([*codec.column_names, "input_ids", "loss_mask", "document_starts"]))
    row = pa.ipc.open_file(pa.py_buffer(shard_bytes(store))).get_batch(0).to_pylist()[0]
    content = bytearray(zstandard.ZstdDecompressor().decompress(row[name]))
    how = str(rng.choice(["flip", "cut", "grow", "ones", "random", "nan", "swap"]))
    if how == "flip" and content:
        for _ in range(int(rng.integers(1, 8))):
            content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    elif how == "cut":
        content = content[: int(rng.integers(len(content) + 1))]
    elif how == "grow":
        content += bytes(int(rng.integers(1, 5000)))
    elif how == "ones":
        content = bytearray(b"\xff" * len(content))
    elif how == "random":
        content = bytearray(rng.bytes(len(content)))
    elif how == "nan":
        content = bytearray(np.full(len(content) // 4 + 1, np.nan, np.float32).tobytes()[: len(content)])
    elif how == "swap":
        content = content[::-1]
    forge(store, **{name: compress(bytes(content))})
    return f"{name}: {how}"


def raw_frame(store: LocalStore, rng: np.random.Generator) -> str:
    """Bytes that are no frame, or a frame that lies about its size, or a bomb."""
    codec = load_codec(store, read_plan(store).spec)
    name = str(rng.choice([*codec.column_names, "input_ids", "loss_mask", "document_starts"]))
    how = str(rng.choice(["random", "empty", "cut", "two", "no size", "bomb", "huge window", "lie"]))
    row = pa.ipc.open_file(pa.py_buffer(shard_bytes(store))).get_batch(0).to_pylist()[0]
    frame = row[name]
    if how == "random":
        frame = rng.bytes(int(rng.integers(1, 200)))
    elif how == "empty":
        frame = b""
    elif how == "cut":
        frame = frame[: int(rng.integers(len(frame)))]
    elif how == "two":
        frame = frame + frame
    elif how == "no size":
        frame = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 20))
    elif how == "bomb":
        frame = bomb()
    elif how == "huge window":
        parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=27, write_content_size=False)
        frame = zstandard.ZstdCompressor(compression_params=parameters).compress(rng.bytes(4096))
    elif how == "lie":
        frame = bytearray(zstandard.ZstdCompressor().compress(bytes(300)))
        frame[5:7] = rng.bytes(2)
    forge(store, **{name: bytes(frame)})
    return f"{name}: {how}"


_bomb: list[bytes] = []


def bomb() -> bytes:
    """A frame of some hundred KB that unpacks to gigabytes."""
    if not _bomb:
        compressor = zstandard.ZstdCompressor(level=1).compressobj(size=BOMB_BYTES)
        block = bytes(64 << 20)
        _bomb.append(b"".join(compressor.compress(block) for _ in range(BOMB_BYTES // len(block))) + compressor.flush())
    return _bomb[0]


def arrow_bytes(store: LocalStore, rng: np.random.Generator) -> str:
    """Bytes of the Arrow file changed anywhere: offsets, lengths, types, row counts."""
    data = bytearray(shard_bytes(store))
    metadata = rng.random() < 0.7
    number = int(rng.integers(1, 6))
    for _ in range(number):
        # The footer and the message of the batch are near the ends.
        place = int(rng.integers(min(3000, len(data))))
        place = (-place - 1 if rng.random() < 0.5 else place) if metadata else int(rng.integers(len(data)))
        data[place] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))]))
    commit_again(store, 0, bytes(data))
    return f"{number} bytes of {'metadata' if metadata else 'anything'}"


def arrow_cells(store: LocalStore, rng: np.random.Generator) -> str:
    """Numbers of a row, and schemas, that do not fit."""
    how = str(
        rng.choice(["num_positions", "sequence_id", "content_hash", "column gone", "column more", "other type", "null"])
    )
    kind = schema(load_codec(store, read_plan(store).spec), read_plan(store).fingerprint, 0)
    if how in kind.names:
        top = 2**32 if how == "num_positions" else 2**64
        forge(store, **{how: [0, 1, top - 1, top // 2, int(rng.integers(1, 1000))][int(rng.integers(5))]})
    elif how == "column gone":
        forge(store, kind.remove(int(rng.integers(len(kind)))))
    elif how == "column more":
        forge(store, kind.append(pa.field("x", pa.int32())))
    elif how == "other type":
        at = int(rng.integers(3, len(kind)))
        forge(store, kind.set(at, pa.field(kind.names[at], pa.float64())), **{kind.names[at]: 1.0})
    else:
        nullable = pa.schema([field.with_nullable(True) for field in kind], metadata=kind.metadata)
        forge(store, nullable, **{str(rng.choice(kind.names)): None})
    return how


def records(store: LocalStore, rng: np.random.Generator) -> str:
    """A field of a record replaced by something strange, and signed; of the plan also with a fingerprint that holds."""
    name = str(rng.choice(["plan.json", "plan.json", "manifest.json", commit_name(0)]))
    raw = json.loads(store.read(name))
    raw.pop("record_digest")
    place: Any = raw
    path = []
    while True:
        key = list(place)[int(rng.integers(len(place)))] if isinstance(place, dict) else int(rng.integers(len(place)))
        path.append(str(key))
        if not (isinstance(place[key], dict | list) and place[key]) or rng.random() < 0.1:
            break
        place = place[key]
    place[key] = STRANGE[int(rng.integers(len(STRANGE)))]
    try:
        data = signed_json(raw)
    except (ValueError, TypeError, UnicodeEncodeError):
        data = json.dumps(raw).encode()
    if name == "plan.json":
        data = _with_fingerprint(store, data)
    store.replace(name, data)
    return f"{name}: {'.'.join(path)} = {str(place[key])[:30]}"


def _with_fingerprint(store: LocalStore, data: bytes) -> bytes:
    """Where the changed plan is one that parses: shards and commits made to belong to it."""
    from kdcache.errors import CacheError

    try:
        plan = parse(Plan, data, "plan")
        plan = plan.model_copy(update={"fingerprint": plan.spec.fingerprint})
        kind = schema(load_codec(store, plan.spec), plan.fingerprint, 0)
    except (CacheError, ValueError, AssertionError, OverflowError, MemoryError):
        return data
    for commit in read_commits(store):
        store.replace(commit_name(commit.shard), to_json(commit.model_copy(update={"plan": plan.fingerprint})))
    with contextlib.suppress(KeyError, pa.ArrowException, ValueError):
        forge(store, kind)
    store.delete("manifest.json")
    return to_json(plan)


def junk(store: LocalStore, rng: np.random.Generator) -> str:
    """Anything in the place of a file."""
    names = ["plan.json", "manifest.json", commit_name(0), f"shards/{store.names_in('shards')[0]}"]
    name = str(rng.choice(names))
    data = [b"", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"a": 1e999}', b"null", rng.bytes(500)][
        int(rng.integers(8))
    ]
    store.replace(name, data)
    if name.startswith("commits"):
        store.delete("manifest.json")
    return f"{name}: {data[:10]!r}"


ATTACKS: dict[str, Callable[[LocalStore, np.random.Generator], str]] = {
    "frames with other content": frame_content,
    "bombs and lying frames": raw_frame,
    "Arrow files with changed bytes": arrow_bytes,
    "cells and schemas": arrow_cells,
    "records": records,
    "junk": junk,
}


# --- the victim -------------------------------------------------------------------------------------------------------

REFUSED, READ, FOUND_BY_VERIFY, HARM = 10, 11, 12, 13


def victim(folder: Path) -> int:
    """What a user does with a cache from a stranger; an exit code. Anything but an error of ours is harm."""
    from kdcache.cache.garbage import find_garbage
    from kdcache.cache.status import cache_status
    from kdcache.cache.verify import verify_cache
    from kdcache.cli.inspect import describe, show_sequence
    from kdcache.errors import CacheError

    store = LocalStore(folder)
    refused = 0

    def attempt(act: Callable[[], Any]) -> Any:
        nonlocal refused
        try:
            return act()
        except CacheError:
            refused += 1
            return None

    audit = attempt(lambda: verify_cache(store))
    attempt(lambda: cache_status(store))
    attempt(lambda: find_garbage(store))
    reader = attempt(lambda: open_cache(folder, allow_incomplete=True))
    if reader is not None:
        attempt(lambda: describe(reader))
        for index in range(min(len(reader), 20)):
            row = attempt(lambda index=index: reader[index])
            if row is not None:
                targets = row.targets
                assert not len(targets.token_ids) or int(targets.token_ids.max()) < reader.vocab_size
                assert np.isfinite(targets.logprobs).all() and (targets.logprobs <= 1e-4).all()
                assert np.isfinite(targets.label_logprobs).all() and np.isfinite(targets.entropy).all()
                assert (targets.tail_logprobs <= 1e-4).all()
            attempt(lambda index=index: show_sequence(reader, index, 4, 10))
            attempt(lambda index=index: reader.compact(index))
    if refused:
        return REFUSED
    return READ if audit is not None and audit.intact else FOUND_BY_VERIFY


def confined(folder: Path, report: Path) -> int:
    """Run :func:`victim` in a child with little memory and time, no writing, no processes, no code; its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = HARM
    try:
        log = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 2)
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event == "open" and isinstance(arguments[1], str) and any(c in arguments[1] for c in "wax+")
            elsewhere = event == "open" and isinstance(arguments[0], str) and "passwd" in arguments[0]
            acts = event in ("subprocess.Popen", "os.system", "os.exec", "os.remove", "os.rename", "os.mkdir", "os.link",
                             "os.symlink", "socket.connect", "pickle.find_class", "ctypes.dlopen")  # fmt: skip
            if writes or elsewhere or acts:
                os.write(2, f"HARM {event} {arguments}\n".encode())
                os._exit(HARM)

        sys.addaudithook(watch)
        code = victim(folder)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        os._exit(code)


def watch_loops(sound: list[Path]) -> bool:
    """Compile the codec's loops with every index checked, by reading what is sound; False where numba is not installed.

    An index past the end is then an error of its own, and harm, instead of whatever lies there.
    """
    try:
        import numba
    except ImportError:
        return False
    # Compiled in memory: those that are attacked may write nowhere.
    watched = jit.each_loop(lambda function: numba.njit(function, boundscheck=True, fastmath=loops.FAST))
    jit._functions = lambda: watched
    use_loops(True)
    for path in sound:
        for row in open_cache(path):
            assert len(row.sequence)
    return True


def use_loops(wanted: bool) -> None:
    """In this process, from now on."""
    jit.WARM_UP_POSITIONS = 0 if wanted else 1 << 62


def campaign(sound: list[Path], root: Path, *, number: int, seed: int) -> dict[str, Counter[str]]:
    """So many attacks of each kind, each on a fresh copy of one of the sound caches; every other one meets compiled loops.

    Returns:
        Attack to outcome to how often: ``refused``, ``found by verify``, ``read`` (nothing wrong could be told), and
        ``HARM``: any other error, a crash, too much memory or time, a write, a process.
    """
    rng = np.random.default_rng(seed)
    words = {REFUSED: "refused", READ: "read", FOUND_BY_VERIFY: "found by verify"}
    table: dict[str, Counter[str]] = {}
    has_loops = watch_loops(sound)
    for name, attack in ATTACKS.items():
        table[name] = Counter()
        for attempt_number in range(number):
            use_loops(has_loops and attempt_number % 2 == 1)
            cache = root / "cache"
            shutil.rmtree(cache, ignore_errors=True)
            shutil.copytree(sound[int(rng.integers(len(sound)))], cache)
            what = attack(LocalStore(cache), rng)
            code = confined(cache, root / "report")
            table[name][words.get(code, "HARM")] += 1
            if code not in words:
                report = (root / "report").read_text(errors="replace")[-1500:]
                print(f"{name}, {what}: exit code {code}\n{report}", file=sys.stderr)
    return table
