"""How others store the same targets: plain columns in Arrow, Parquet and safetensors, and DistillKit's scheme.

Each takes targets of many positions with K entries each and gives bytes back, and the logprobs that a reader would get from
them where it loses any. DistillKit's is written anew from its description (arcee-ai/DistillKit, README): ids as bits, the
most probable logits as bfloat16, a curve through the rest. Drawn targets have as many entries as were drawn, and counts: lists in Arrow and
Parquet, and 24 bits an entry, as Sparse Logit Sampling has them (2503.16870): here 17 of an id and 7 of a count.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import safetensors.numpy
import zstandard

from kdcache.targets import SparseTargets


@dataclass(frozen=True)
class Peer:
    """``encode(targets, k)`` gives bytes; ``decode(bytes, k)`` the ids and logprobs ``[N, K]``."""

    encode: Callable[[SparseTargets, int], bytes]
    decode: Callable[[bytes, int], tuple[np.ndarray, np.ndarray]]
    loses: Callable[[np.ndarray], np.ndarray] = lambda logprobs: logprobs.astype(np.float16).astype(np.float32)


def _narrowed(ids: np.ndarray) -> np.ndarray:
    return ids.astype(np.uint16 if ids.max(initial=0) < 1 << 16 else np.uint32)


def _rectangles(targets: SparseTargets, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids and logprobs by falling logprob, and tails."""
    ids, logprobs = targets.token_ids.reshape(-1, k), targets.logprobs.reshape(-1, k)
    order = np.argsort(-logprobs, axis=1, kind="stable")
    return (
        _narrowed(np.take_along_axis(ids, order, 1)),
        np.take_along_axis(logprobs, order, 1).astype(np.float16),
        targets.tail_logprobs.astype(np.float16),
    )


def _table(targets: SparseTargets, k: int) -> pa.Table:
    parts = _rectangles(targets, k)
    columns = [pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), part.shape[1]) for part in parts]
    return pa.table(columns, names=["token_ids", "logprobs", "tails"])


def arrow_zstd(targets: SparseTargets, k: int) -> bytes:
    """An Arrow IPC file with its own zstd compression."""
    return _arrow_file(_table(targets, k))


def _arrow_file(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def read_arrow(data: bytes, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and logprobs out of :func:`arrow_zstd`."""
    table = pa.ipc.open_file(pa.py_buffer(data)).read_all().combine_chunks()
    ids, logprobs = (table[name].chunk(0).flatten().to_numpy() for name in ("token_ids", "logprobs"))
    return ids.reshape(-1, k), logprobs.reshape(-1, k)


def parquet(targets: SparseTargets, k: int) -> bytes:
    """Parquet with byte-stream-split and zstd."""
    sink = io.BytesIO()
    table = _table(targets, k)
    # Half floats have no byte-stream split in every release; their bits as integers do.
    ids, logprobs, tails = (table[name].combine_chunks() for name in table.column_names)
    as_bits = [pa.FixedSizeListArray.from_arrays(pa.array(part.flatten().to_numpy().view(np.int16).astype(np.int32)), part.type.list_size)
               for part in (logprobs, tails)]  # fmt: skip
    wide = pa.FixedSizeListArray.from_arrays(pa.array(ids.flatten().to_numpy().astype(np.int32)), k)
    table = pa.table([wide, *as_bits], names=["token_ids", "logprobs", "tails"])
    pyarrow.parquet.write_table(
        table, sink, compression="zstd", use_dictionary=False,
        column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in table.column_names},
    )  # fmt: skip
    return sink.getvalue()


def read_parquet(data: bytes, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and logprobs out of :func:`parquet`."""
    table = pyarrow.parquet.read_table(io.BytesIO(data)).combine_chunks()
    ids, bits = (table[name].chunk(0).flatten().to_numpy() for name in ("token_ids", "logprobs"))
    return ids.reshape(-1, k), bits.astype(np.int16).view(np.float16).reshape(-1, k)


def safetensors_zstd(targets: SparseTargets, k: int) -> bytes:
    """A safetensors file, compressed whole."""
    ids, logprobs, tails = _rectangles(targets, k)
    return zstandard.ZstdCompressor(level=3).compress(
        safetensors.numpy.save({"token_ids": ids, "logprobs": logprobs, "tails": tails})
    )


def read_safetensors(data: bytes, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and logprobs out of :func:`safetensors_zstd`."""
    tensors = safetensors.numpy.load(zstandard.ZstdDecompressor().decompress(data))
    return tensors["token_ids"], tensors["logprobs"]


def distillkit(exact: int, degree: int) -> Peer:
    """Ids in bits of the vocabulary, ``exact`` first logprobs in bfloat16, the rest as a polynomial and a root of their rank."""

    def basis(k: int) -> np.ndarray:
        rank = np.arange(k - exact) / (k - exact)  # in double precision and up to 1: the scheme at its best
        return np.stack([*(rank**power for power in range(degree + 1)), np.sqrt(rank)], 1)

    def encode(targets: SparseTargets, k: int) -> bytes:
        ids, _, _ = _rectangles(targets, k)
        logprobs = np.sort(targets.logprobs.reshape(-1, k), axis=1)[:, ::-1]
        curve = np.linalg.lstsq(basis(k), logprobs[:, exact:].T, rcond=None)[0].T.astype(np.float32)
        head = (np.ascontiguousarray(logprobs[:, :exact]).view(np.uint32) >> 16).astype(np.uint16)
        return bytes([ids.itemsize]) + ids.tobytes() + head.tobytes() + curve.tobytes()

    def loses(logprobs: np.ndarray) -> np.ndarray:
        """``[N, K]`` by falling logprob, as stored."""
        curve = np.linalg.lstsq(basis(logprobs.shape[1]), logprobs[:, exact:].T, rcond=None)[0].astype(np.float32)
        head = (logprobs[:, :exact].astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
        return np.concatenate([head, (basis(logprobs.shape[1]) @ curve).T.astype(np.float32)], 1)

    def decode(data: bytes, k: int) -> tuple[np.ndarray, np.ndarray]:
        width = data[0]
        num_positions = (len(data) - 1) // (k * width + exact * 2 + (degree + 2) * 4)
        ids = np.frombuffer(data, f"u{width}", num_positions * k, 1)
        head = np.frombuffer(data, np.uint16, num_positions * exact, 1 + ids.nbytes)
        curve = np.frombuffer(data, np.float32, num_positions * (degree + 2), 1 + ids.nbytes + head.nbytes)
        fitted = curve.reshape(num_positions, -1) @ basis(k).T.astype(np.float32)
        kept = (head.astype(np.uint32) << 16).view(np.float32).reshape(-1, exact)
        return ids.reshape(-1, k), np.concatenate([kept, fitted], axis=1)

    return Peer(encode, decode, loses)


PEERS = {
    "Arrow, zstd": Peer(arrow_zstd, read_arrow),
    "Parquet, byte-stream split, zstd": Peer(parquet, read_parquet),
    "safetensors, zstd": Peer(safetensors_zstd, read_safetensors),
    "DistillKit, 16 exact, degree 4": distillkit(16, 4),
    "DistillKit, 1 exact, degree 1": distillkit(1, 1),
}


@dataclass(frozen=True)
class DrawnPeer:
    """``encode(targets)`` gives bytes; ``decode`` the number of entries, ids and counts of each position, entry after entry."""

    encode: Callable[[SparseTargets], bytes]
    decode: Callable[[bytes], tuple[np.ndarray, np.ndarray, np.ndarray]]


def _drawn_table(targets: SparseTargets) -> pa.Table:
    assert targets.counts is not None
    offsets = pa.array(targets.offsets.astype(np.int32))
    counts = targets.counts[:, 0].astype(np.uint8 if targets.counts.max(initial=0) < 1 << 8 else np.uint16)
    lists = [pa.ListArray.from_arrays(offsets, pa.array(part)) for part in (_narrowed(targets.token_ids), counts)]
    return pa.table(lists, names=["token_ids", "counts"])


def _undo_drawn_table(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids, counts = (table.combine_chunks()[name].chunk(0) for name in ("token_ids", "counts"))
    return np.diff(ids.offsets.to_numpy()), ids.flatten().to_numpy(), counts.flatten().to_numpy()


def drawn_arrow(targets: SparseTargets) -> bytes:
    """An Arrow IPC file of lists, with its own zstd compression."""
    return _arrow_file(_drawn_table(targets))


def drawn_parquet(targets: SparseTargets) -> bytes:
    """A Parquet file of lists, with zstd and its own choice of encodings."""
    sink = io.BytesIO()
    pyarrow.parquet.write_table(_drawn_table(targets), sink, compression="zstd")
    return sink.getvalue()


def drawn_24_bits(targets: SparseTargets) -> bytes:
    """The number of entries of each position in a byte, then three bytes an entry."""
    assert targets.counts is not None
    counts = targets.counts[:, 0].astype(np.uint32)
    assert targets.token_ids.max(initial=0) < 1 << 17 and counts.max(initial=0) < 1 << 7
    words = (targets.token_ids.astype("<u4") | counts << 17).view(np.uint8).reshape(-1, 4)
    return np.uint32(len(targets)).tobytes() + targets.num_entries.astype(np.uint8).tobytes() + words[:, :3].tobytes()


def read_24_bits(data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Out of :func:`drawn_24_bits`."""
    num_positions = int(np.frombuffer(data, np.uint32, 1)[0])
    num_entries = np.frombuffer(data, np.uint8, num_positions, 4)
    three = np.frombuffer(data, np.uint8, offset=4 + num_positions).reshape(-1, 3)
    words = np.zeros((len(three), 4), np.uint8)
    words[:, :3] = three
    flat = words.view("<u4")[:, 0]
    return num_entries, flat & ((1 << 17) - 1), flat >> 17


DRAWN_PEERS = {
    "Arrow, zstd": DrawnPeer(
        drawn_arrow, lambda data: _undo_drawn_table(pa.ipc.open_file(pa.py_buffer(data)).read_all())
    ),
    "Parquet, zstd": DrawnPeer(
        drawn_parquet, lambda data: _undo_drawn_table(pyarrow.parquet.read_table(io.BytesIO(data)))
    ),
    "Sparse Logit Sampling, 24 bits an entry": DrawnPeer(drawn_24_bits, read_24_bits),
}
