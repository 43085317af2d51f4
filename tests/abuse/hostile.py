"""S3: caches made to do harm. Each is read by a process of its own that may start nothing, use little memory, and write only where it should.

Every attack re-signs what it changed, as its author would: digests hold, so nothing but the checks on the content itself stands
between the bytes and the reader. The reader verifies, describes, shows and decodes; makes tensors of a batch to train on; transcodes, into a
folder of its own; then tidies up and repairs, and may delete what is a cache's and in the cache. Files of somebody else lie beside it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import zstandard

from kdcache import config
from kdcache.cache import jit, loops
from kdcache.cache.commit import commit_name, load_codec, read_commits, read_plan, shard_name, table_name
from kdcache.cache.frames import compress
from kdcache.cache.garbage import collect_garbage, find_garbage
from kdcache.cache.manifest import CacheSpec, Plan, derive_manifest, parse, signed_json, to_json
from kdcache.cache.own_order import OwnOrder
from kdcache.cache.reader import CacheReader, open_cache
from kdcache.cache.shard import digest, schema
from kdcache.cache.status import cache_status
from kdcache.cache.store import LocalStore, hostname
from kdcache.cache.transcode import TranscodeOptions, transcode
from kdcache.cache.verify import repair, verify_cache
from kdcache.cli.inspect import describe, show_sequence
from kdcache.errors import CacheError, KDCacheError
from kdcache.specs import canonical_json
from kdcache.train.objective import BucketTargets
from kdcache.train.stream import CacheDataset, KDBatchSampler, TargetDecoder, collate
from tests.strategies import all_files

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
    try:
        plan = parse(Plan, data, "plan")
        plan = plan.model_copy(update={"fingerprint": plan.spec.fingerprint})
    except (CacheError, ValueError, AssertionError, OverflowError, MemoryError):
        return data
    for commit in read_commits(store):
        store.replace(commit_name(commit.shard), to_json(commit.model_copy(update={"plan": plan.fingerprint})))
    with contextlib.suppress(
        CacheError, KeyError, pa.ArrowException, ValueError, AssertionError, OverflowError, MemoryError
    ):
        forge(store, schema(load_codec(store, plan.spec), plan.fingerprint, 0))
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


def tables(store: LocalStore, rng: np.random.Generator) -> str:
    """Id tables, or the teacher's output head: not those that were named, or others that are, whose content holds nothing that it should."""
    plan = read_plan(store)
    digest_of_head = read_commits(store)[0].head_digest
    name = table_name(plan.spec.codec.id_tables or digest_of_head or "")
    data = store.read(name)
    how = str(
        rng.choice(["gone", "flip", "junk", "header", "shapes", "types", "values", "names", "swap", "cut", "nothing"])
    )
    if how == "gone":
        store.delete(name)
        return how
    if how == "flip":
        changed = bytearray(data)
        changed[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        store.replace(name, bytes(changed))
        return how
    size = int.from_bytes(data[:8], "little")
    header, content = json.loads(data[8 : 8 + size]), data[8 + size :]
    key = str(rng.choice([key for key in header if key != "__metadata__"]))
    if how == "junk":
        data = rng.bytes(int(rng.integers(200)))
    elif how == "header":
        length = [0, 1, size - 1, size + 8, 2**31, 2**62, 2**64 - 1][int(rng.integers(7))]
        data = length.to_bytes(8, "little") + data[8:]
    elif how == "cut":
        data = data[: int(rng.integers(len(data)))]
    elif how == "values":
        content = rng.bytes(len(content)) if rng.random() < 0.5 else b"\xff" * len(content)
        data = _tensors(header, content)
    elif how == "swap":
        first, last = header[key]["data_offsets"]
        kind = np.dtype({"U32": "<u4", "U16": "<u2", "BF16": "<u2", "F64": "<f8"}.get(header[key]["dtype"], "<u4"))
        some = np.frombuffer(content, kind, count=(last - first) // kind.itemsize, offset=first).copy()
        rng.shuffle(some)
        data = _tensors(header, content[:first] + some.tobytes() + content[last:])
    elif how == "nothing":
        data = _tensors({}, b"")
    else:
        changes = {
            "shapes": ("shape", [[0], [2**40], [2**32, 2**32], [1, 1, 1], [-1], []]),
            "types": ("dtype", ["F64", "I8", "BOOL", "F8_E4M3", "C64", "U8"]),
            "names": ("data_offsets", [[0, 0], [0, 2**62], [8, 0], [0, len(content)]]),
        }
        field, values = changes[how]
        header[key][field] = values[int(rng.integers(len(values)))]
        if how == "names" and rng.random() < 0.5:
            header["x" * int(rng.integers(1, 1000))] = header.pop(key)
        data = _tensors(header, content)
    named = digest(data)
    store.replace(table_name(named), data)
    if plan.spec.codec.id_tables:
        raw = json.loads(store.read("plan.json"))
        raw["spec"]["codec"]["id_tables"] = named
        raw.pop("record_digest")
        store.replace("plan.json", _with_fingerprint(store, signed_json(raw)))
    else:
        for commit in read_commits(store):
            store.replace(commit_name(commit.shard), to_json(commit.model_copy(update={"head_digest": named})))
        store.delete("manifest.json")
        store.replace("manifest.json", to_json(derive_manifest(plan, read_commits(store))))
    return f"{how} of {key}"


def _tensors(header: dict[str, Any], content: bytes) -> bytes:
    """A safetensors file."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content


def no_files(store: LocalStore, rng: np.random.Generator) -> str:
    """Links, pipes, sockets, devices, folders in the place of files; links and files in the place of folders."""
    outside = store.root.parent / OUTSIDE
    store.replace("leases/00000.json", b"{}")
    if rng.random() < 0.5:
        names = [
            "plan.json",
            "manifest.json",
            commit_name(0),
            f"shards/{store.names_in('shards')[0]}",
            "leases/00000.json",
        ]
        names += [f"tables/{name}" for name in store.names_in("tables")] * 2
        path = store.root / str(rng.choice(names))
        whole = path.read_bytes()
        path.unlink()
        how = str(
            rng.choice(
                ["same", "mine", "passwd", "nowhere", "loop", "zero", "full", "pipe", "socket", "folder", "proc"]
            )
        )
        links = {"mine": outside / "leases" / "00000.json", "passwd": "/etc/passwd", "nowhere": "/no/such", "loop": path.name,
                 "zero": "/dev/zero", "full": "/dev/full", "proc": "/proc/self/environ"}  # fmt: skip
        if how == "same":
            (outside / "same").write_bytes(whole)
            path.symlink_to(outside / "same")
        elif how == "pipe":
            os.mkfifo(path)
        elif how == "socket":
            here = os.getcwd()
            os.chdir(path.parent)  # a socket's path is short
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
            os.chdir(here)
        elif how == "folder":
            path.mkdir()
        else:
            path.symlink_to(links[how])
    else:
        path = store.root / str(rng.choice(["commits", "shards", "tables", "leases", "tmp", "runs"]))
        how = str(rng.choice(["same", "mine", "root", "parent", "self", "file", "pipe"]))
        if path.exists():
            path.rename(outside / "same")
        elif how == "same":
            (outside / "same").mkdir()
        links = {"same": outside / "same", "mine": outside / path.name, "root": "/", "parent": "..", "self": "."}
        if how in links:
            path.symlink_to(links[how])
        elif how == "file":
            path.write_bytes(b"")
        else:
            os.mkfifo(path)
    if rng.random() < 0.3 and not (store.root / "manifest.json").is_dir():
        (store.root / "manifest.json").unlink(missing_ok=True)
    return f"{path.name}: {how}"


def huge(store: LocalStore, rng: np.random.Generator) -> str:
    """Files of impossible size: holes, and records that go on and on."""
    names = ["plan.json", "manifest.json", commit_name(0), "leases/00000.json", f"shards/{store.names_in('shards')[0]}"]
    names += [f"tables/{name}" for name in store.names_in("tables")]
    name = str(rng.choice(names))
    if name.startswith("leases"):
        store.replace(name, b"{}")
    if name.startswith("commits"):
        store.delete("manifest.json")
    whole, path = store.read(name), store.root / name
    how = str(rng.choice(["hole", "spaces", "list", "text", "keys"]))
    if how == "hole":
        path.unlink()
        path.write_bytes(whole)
        os.truncate(path, int(rng.choice([1 << 31, 1 << 33, 1 << 40, 1 << 43])))
        return f"{name}: {how}"
    size = int(rng.choice([3 << 20, 20 << 20]))
    start = whole.rstrip()[:-1]
    more = {
        "spaces": whole + b" " * size, "list": start + b', "x": [' + b"0," * (size // 2) + b"0]}",
        "text": start + b', "x": "' + b"x" * size + b'"}',
        "keys": start + b"".join(b', "%d": 0' % i for i in range(size // 10)) + b"}",
    }  # fmt: skip
    store.replace(name, more[how])
    return f"{name}: {how}"


def arrow_bombs(store: LocalStore, rng: np.random.Generator) -> str:
    """Compressed bodies, dictionaries, metadata in plenty, other numbers of batches: what Arrow would unpack on its own."""
    plan = read_plan(store)
    kind = schema(load_codec(store, plan.spec), plan.fingerprint, 0)
    rows = pa.ipc.open_file(pa.py_buffer(shard_bytes(store))).get_batch(0).to_pylist()
    how = str(
        rng.choice(
            ["zstd", "lz4", "dictionary", "metadata", "of the batch", "of a field", "batches", "none", "many fields"]
        )
    )
    options, custom, batches = None, None, 1
    size = int(rng.choice([10, 5_000, 1 << 20]))
    if how in ("zstd", "lz4"):
        options = pa.ipc.IpcWriteOptions(compression=how)
        rows[0][str(rng.choice(kind.names[3:]))] = bytes(64 << 20)
    elif how == "dictionary":
        at = int(rng.integers(3, len(kind)))
        kind = kind.set(at, pa.field(kind.names[at], pa.dictionary(pa.int32(), pa.large_binary()), nullable=False))
    elif how == "metadata":
        kind = kind.with_metadata(dict(kind.metadata) | {f"{i}": "x" * 100 for i in range(size // 100)})
    elif how == "of the batch":
        custom = {"ARROW:experimental_compression": "zstd", **{f"{i}": "x" * 100 for i in range(size // 100)}}
    elif how == "of a field":
        kind = kind.set(0, kind.field(0).with_metadata({"a": "x" * size}))
    elif how == "batches":
        batches = int(rng.integers(2, 50))
    elif how == "none":
        batches = 0
    else:
        kind = pa.schema([*kind, *(pa.field(f"{i}", pa.uint32()) for i in range(size // 100))], metadata=kind.metadata)
    rows = [{**row, **{name: None for name in kind.names if name not in row}} for row in rows]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, kind, options=options) as writer:
        for _ in range(batches):
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=kind), custom_metadata=custom)
    commit_again(store, 0, sink.getvalue().to_pybytes())
    return f"{how}, {size}"


def counts(store: LocalStore, rng: np.random.Generator) -> str:
    """Numbers of sequences, bytes and shards that no cache has, in the manifest alone or in a commit too."""
    number = int(rng.choice([-1, 0, 1, 2**31, 2**32, 2**32 + 1, 2**39, 2**40, 2**53, 2**62 - 1, 2**63, 10**18]))
    field = str(rng.choice(["num_sequences", "num_bytes", "shard", "stats", "sealed", "rows"]))
    raw = json.loads(store.read("manifest.json"))
    at = int(rng.integers(len(raw["shards"]["shard"])))
    if field == "sealed":
        for column in raw["shards"].values():
            column.pop(at)
    elif field == "rows":
        for column in raw["shards"].values():
            column.append(column[at])
    elif field == "stats":
        key = str(rng.choice(list(raw["stats"])))
        raw["stats"][key] = number
        if rng.random() < 0.5:
            commit = json.loads(store.read(commit_name(0)))
            commit["stats"][key] = number
            commit.pop("record_digest")
            store.replace(commit_name(0), signed_json(commit))
    else:
        raw["shards"][field][at] = number
        if field == "num_sequences" and rng.random() < 0.5:
            commit = json.loads(store.read(commit_name(at)))
            commit["stats"][field] = number
            commit.pop("record_digest")
            store.replace(commit_name(at), signed_json(commit))
    raw.pop("record_digest")
    store.replace("manifest.json", signed_json(raw))
    if rng.random() < 0.3:
        store.delete("manifest.json")
    return f"{field} {number}"


def nesting(store: LocalStore, rng: np.random.Generator) -> str:
    """Lists in lists, to any depth: each step of reading a record has a limit of its own."""
    name = str(rng.choice(["plan.json", "manifest.json", commit_name(0), "leases/00000.json"]))
    if name.startswith("leases"):
        store.replace(name, b'{"host": "x", "pid": 1, "expires": 1e300, "token": "x"}')
    depth = int(rng.integers(1, 1100)) if rng.random() < 0.8 else 100_000
    opened, closed = [("[", "]"), ('{"a":', "}")][int(rng.integers(2))]
    nested = opened * depth + "0" + closed * depth
    text = store.read(name).decode()
    keys = re.findall(r'"(\w+)": ', text)
    key = str(rng.choice(keys))
    text = text.replace(f'"{key}": ', f'"{key}": {nested}, "x": ', 1)
    if rng.random() < 0.7:
        with contextlib.suppress(RecursionError, ValueError):
            raw = json.loads(text)
            raw.pop("record_digest", None)
            signed = raw | {"record_digest": hashlib.sha256(canonical_json(raw)).hexdigest()[:32]}
            text = json.dumps(signed)
    store.replace(name, text.encode())
    if name.startswith("commits"):
        store.delete("manifest.json")
    return f"{name}: {key}, {depth} deep"


def distributions(store: LocalStore, rng: np.random.Generator) -> str:
    """Ids that repeat or do not ascend, masses above one, tails above nothing: well formed, and no distribution."""
    plan = read_plan(store)
    codec = load_codec(store, plan.spec)
    row = pa.ipc.open_file(pa.py_buffer(shard_bytes(store))).get_batch(0).to_pylist()[0]
    content = {name: zstandard.ZstdDecompressor().decompress(row[name]) for name in codec.column_names}
    if codec.renumbers:
        # An id in the order has two codes: its place there, and the one that it would have otherwise.
        number = int(rng.integers(1, min(codec.vocab_size, 200)))
        some = np.sort(rng.choice(min(codec.vocab_size, 200), number, replace=False))
        order = OwnOrder(some.astype(np.int64), rng.integers(0, 4, number).astype(np.uint8))
        forge(store, frequent_gaps=compress(order.gaps()), frequent_steps=compress(order.steps))
        return f"{number} frequent ids"
    ids = np.frombuffer(content["token_ids"], "<u4").copy()
    how = str(rng.choice(["same", "backwards", "one twice", "certain", "tail", "logz"]))
    if how == "same":
        ids[:] = ids[:1]
    elif how == "backwards":
        ids = ids[::-1].copy()
    elif how == "one twice" and len(ids) > 1:
        at = int(rng.integers(1, len(ids)))
        ids[at] = ids[at - 1]
    forged = {"token_ids": compress(ids)}
    if not codec.frequencies:
        numbers = {"certain": ("logprobs", 0.0), "tail": ("tails", 9e-5), "logz": ("logz", 1e38)}
        if how in numbers:
            name, value = numbers[how]
            forged[name] = compress(np.full(len(content[name]) // 4, value, np.float32))
    forge(store, **forged)
    return how


ATTACKS: dict[str, Callable[[LocalStore, np.random.Generator], str]] = {
    "frames with other content": frame_content,
    "bombs and lying frames": raw_frame,
    "Arrow files with changed bytes": arrow_bytes,
    "cells and schemas": arrow_cells,
    "records": records,
    "junk": junk,
    "tables": tables,
    "links, pipes and devices": no_files,
    "files of impossible size": huge,
    "bombs in Arrow's own form": arrow_bombs,
    "counts": counts,
    "nesting": nesting,
    "no distributions": distributions,
}
# Of which caches an attack is one, where it is not of all.
NEEDS: dict[str, Callable[[CacheSpec], bool]] = {
    "tables": lambda spec: spec.codec.id_tables is not None or spec.targets.scheme == "hidden",
    "no distributions": lambda spec: spec.targets.scheme != "hidden",
}


# --- the victim -------------------------------------------------------------------------------------------------------

REFUSED, READ, FOUND_BY_VERIFY, HARM = 10, 11, 12, 13
SECONDS = 120
FILE_BYTES = 256 << 20
# Beside the cache: files that are somebody's, under names that a cache has, and what a cache is made into.
OUTSIDE, OUTPUT = "outside", "output"
EVENTS = (
    "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.chmod", "os.chown", "os.truncate", "socket.connect",
    "socket.getaddrinfo", "pickle.find_class", "ctypes.dlopen",
)  # fmt: skip
WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink")


class Warden:
    """Watches what a process does, and ends it at what it may not: any program, any code, any writing but below some folders."""

    def __init__(self) -> None:
        self.writable: tuple[Path, ...] = ()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = (mode and set(mode) & set("wax+")) or (flags or 0) & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
            )
            wrong = (writes and not self._may_write(path)) or "passwd" in str(path)
        elif event in WRITES:
            paths = arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]
            wrong = not all(self._may_write(path) for path in paths)
        else:
            wrong = event in EVENTS
        if wrong:
            os.write(2, f"HARM {event} {arguments}\n".encode())
            os._exit(HARM)

    def _may_write(self, path: Any) -> bool:
        """Of the folder that it is really in."""
        if not isinstance(path, str | os.PathLike):
            return False
        folder = Path(os.path.realpath(os.path.dirname(os.fspath(path))))
        return any(folder.is_relative_to(allowed) for allowed in self.writable)


def victim(folder: Path, warden: Warden, *, copies: bool) -> int:
    """What a user does with a cache from a stranger; an exit code. Anything but an error of ours is harm."""
    store = LocalStore(folder)
    refused = 0

    def attempt(act: Callable[[], Any]) -> Any:
        nonlocal refused
        try:
            return act()
        except KDCacheError:
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
                position = np.repeat(np.arange(len(targets)), targets.num_entries)
                assert (np.diff(position * (1 << 33) + targets.token_ids) > 0).all(), "ids ascend"
                assert (np.bincount(position, np.exp(targets.logprobs), len(targets)) < 1.01).all()
            attempt(lambda index=index: show_sequence(reader, index, 4, 10))
            attempt(lambda index=index: reader.compact(index))
        if len(reader):
            attempt(lambda: train_a_batch(reader))
    outcome = REFUSED if refused else READ if audit is not None and audit.intact else FOUND_BY_VERIFY
    warden.writable = (folder.parent / OUTPUT,)
    changes = {} if copies or reader is None else transcoding(reader.spec)
    attempt(
        lambda: transcode(TranscodeOptions(cache=str(folder), output=str(folder.parent / OUTPUT / "cache"), **changes))
    )
    warden.writable = (folder,)
    attempt(lambda: collect_garbage(store))
    if audit is not None:
        attempt(lambda: repair(store, audit))
    return outcome


def train_a_batch(reader: CacheReader) -> None:
    """The first micro-batch of a run, as far as the student: tensors on the device."""
    batch = batch_of(reader)
    targets = TargetDecoder.for_cache(reader, 1.0, torch.device("cpu")).decode(batch)
    assert int(batch["input_ids"].max()) < reader.vocab_size
    if isinstance(targets, BucketTargets):
        assert not len(targets) or int(targets.token_ids.max()) < reader.vocab_size
        assert not targets.logprobs.isnan().any() and not (targets.logprobs > 1e-4).any()
        assert targets.ratios is None or targets.ratios.isfinite().all()


def batch_of(reader: CacheReader) -> dict[str, Any]:
    """The tensors of the first micro-batch."""
    dataset = CacheDataset(reader)
    first = next(iter(KDBatchSampler(len(dataset), 4, fingerprint=dataset.fingerprint)))
    return collate([dataset[index] for index in first])


def transcoding(spec: CacheSpec) -> dict[str, Any]:
    """Options of a transcoding that decodes and encodes, where there is one that is short; a copy elsewhere."""
    if spec.targets.scheme == "hidden" or (spec.codec.name == "packed" and spec.targets.num_draws):
        return {}
    return {"codec": "packed"} if spec.codec.name == "exact" else {"top_k": max(1, spec.targets.k // 2)}


def confined(folder: Path, report: Path, *, copies: bool) -> int:
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
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
        signal.alarm(SECONDS)  # one that waits takes no processor's time
        os.fsync = lambda descriptor: None
        warnings.simplefilter("ignore")
        warden = Warden()
        sys.addaudithook(warden)
        code = victim(folder.resolve(), warden, copies=copies)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        os._exit(code)


def watch_loops(sound: list[Path]) -> bool:
    """Compile the codec's loops with every index checked, by reading and transcoding what is sound; False where numba is not installed.

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
        with tempfile.TemporaryDirectory() as folder:
            spec = read_plan(LocalStore(path)).spec
            transcode(TranscodeOptions(cache=str(path), output=f"{folder}/cache", **transcoding(spec)))
        reader = open_cache(path)
        for row in reader:
            assert len(row.sequence)
        assert batch_of(reader)
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
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    words = {REFUSED: "refused", READ: "read", FOUND_BY_VERIFY: "found by verify"}
    table: dict[str, Counter[str]] = {}
    has_loops = watch_loops(sound)
    specs = {path: read_plan(LocalStore(path)).spec for path in sound}
    config.library_versions = functools.cache(config.library_versions)
    config.library_versions()
    gc.freeze()  # or each child looks through all that its parent ever made
    for name, attack in ATTACKS.items():
        table[name] = Counter()
        fitting = [path for path in sound if name not in NEEDS or NEEDS[name](specs[path])]
        for attempt_number in range(number):
            use_loops(has_loops and attempt_number % 2 == 1)
            cache = root / "cache"
            for folder in (cache, root / OUTSIDE, root / OUTPUT):
                shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(fitting[int(rng.integers(len(fitting)))], cache)
            (root / OUTPUT).mkdir()
            somebodys_files(root / OUTSIDE)
            what = attack(LocalStore(cache), rng)
            before = all_files(root / OUTSIDE)
            code = confined(cache, root / "report", copies=attempt_number % 4 > 1)
            if all_files(root / OUTSIDE) != before:
                code, what = HARM, f"{what}: files outside are others now"
            table[name][words.get(code, "HARM")] += 1
            if code not in words:
                report = (root / "report").read_text(errors="replace")[-1500:]
                print(f"{name}, {what}: exit code {code}\n{report}", file=sys.stderr)
    return table


def somebodys_files(folder: Path) -> None:
    """Files with names that a cache has, and what no cache has."""
    names = {
        "commits": ["00000.json"], "leases": ["00000.json", "letter.txt"], "runs": ["x.yaml"], "tables": ["ab" * 16 + ".safetensors"],
        "shards": ["00000-" + "ab" * 16 + ".arrow"], "tmp": [f"{hostname()}~4194309~{'0' * 32}"],
    }  # fmt: skip
    for inner, files in names.items():
        (folder / inner).mkdir(parents=True)
        for file in files:
            (folder / inner / file).write_bytes(b"{}")
