"""A reader of the format that shares nothing with ``kdcache.cache``: written from ``docs/format.md``, and held against it.

``read_cache(folder)`` gives a dict of arrays a sequence. It checks digests, and is otherwise as short as it can be.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
import zstandard
from safetensors.numpy import load


def record(path):
    """A JSON record whose digest holds."""
    fields = json.loads(path.read_text())
    digest = fields.pop("record_digest")
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(canonical.encode()).hexdigest()[:32] == digest, path
    assert fields["format_version"] == 1
    return fields


def read_cache(folder):
    """Every sequence of a finished cache, in order."""
    folder = Path(folder)
    plan, manifest = record(folder / "plan.json"), record(folder / "manifest.json")
    spec = plan["spec"]
    num_shards = -(-spec["corpus"]["num_rows"] // spec["rows_per_shard"])
    assert manifest["sealed"] and manifest["shards"]["shard"] == list(range(num_shards))
    for shard in range(num_shards):
        commit = record(folder / "commits" / f"{shard:05d}.json")
        data = (folder / "shards" / f"{shard:05d}-{commit['digest']}.arrow").read_bytes()
        assert xxhash.xxh3_128_hexdigest(data) == commit["digest"] == manifest["shards"]["digest"][shard]
        batch = pa.ipc.open_file(pa.py_buffer(data)).get_batch(0)
        about = json.loads(batch.schema.metadata[b"kdcache"])
        assert about == {"format_version": 1, "plan": plan["fingerprint"], "shard": shard}
        for row, columns in enumerate(batch.to_pylist()):
            assert columns["sequence_id"] == shard << 32 | row
            yield read_row(columns, spec, read_tables(folder, spec))


def read_tables(folder, spec):
    """The id tables, or None."""
    digest = spec["codec"]["id_tables"]
    if digest is None:
        return None
    data = (folder / "tables" / f"{digest}.safetensors").read_bytes()
    assert xxhash.xxh3_128_hexdigest(data) == digest
    return load(data)


def token_id(code, before, frequent, tables):
    """The token that a code stands for after another token."""
    length = 0 if tables is None else tables["lists"].shape[1]
    if code < length:
        contexts = tables["contexts"].tolist()
        return int(tables["order"][tables["lists"][contexts.index(before)][code] if before in contexts else code])
    code -= length
    number = frequent[code] if code < len(frequent) else code - len(frequent)
    return int(number if tables is None else tables["order"][number])


def frequent_numbers(gaps, steps):
    """The numbers that come up most in a row, by how often they do."""
    numbers, number = [], 0
    for gap in gaps.tolist():
        number += gap
        if gap < 255:
            numbers.append(number)
            number += 1
    return [number for _, number in sorted(zip(steps.tolist(), numbers, strict=True))]


def read_row(columns, spec, tables):
    """One sequence: tokens, and what the teacher said."""

    def array(name, dtype):
        return np.frombuffer(zstandard.ZstdDecompressor().decompress(columns[name]), dtype=dtype)

    length, vocab_size = columns["num_positions"], spec["teacher"]["vocab_size"]
    ids = array("input_ids", "<u2" if vocab_size <= 65_536 else "<u4").astype(np.uint32)
    mask = np.unpackbits(array("loss_mask", "u1"))[:length].astype(bool)
    starts = array("document_starts", "<u4")
    hashed = xxhash.xxh3_64(ids.astype("<u4").tobytes() + np.packbits(mask).tobytes() + starts.astype("<u4").tobytes())
    assert hashed.intdigest() == columns["content_hash"] and len(ids) == length
    n = int(mask[1:].sum())
    read = read_exact if spec["codec"]["name"] == "exact" else read_packed
    said = read(array, n, spec)
    if "frequent_gaps" in columns:
        frequent = frequent_numbers(array("frequent_gaps", "u1"), array("frequent_steps", "u1"))
        before = np.repeat(ids[:-1][mask[1:]], said["num_entries"]).tolist()
        codes = said["token_ids"].astype(int).tolist()
        plain = [token_id(code, token, frequent, tables) for code, token in zip(codes, before, strict=True)]
        order = np.lexsort((plain, np.repeat(np.arange(n), said["num_entries"])))
        said |= {"token_ids": np.array(plain)[order], "logprobs": said["logprobs"][order]}
        said |= {"counts": said["counts"][order]} if "counts" in said else {}
    return {"input_ids": ids, "loss_mask": mask, "document_starts": starts, **said}


def counts_of(array, spec, total):
    """Draws ``[temperatures, E]``, or nothing."""
    if not spec["targets"]["num_draws"]:
        return None
    dtype, num_temperatures = (
        "u1" if spec["targets"]["num_draws"] < 256 else "<u2",
        len(spec["targets"]["temperatures"]),
    )
    if spec["codec"]["name"] == "exact":
        return array("counts", dtype).reshape(num_temperatures, total).astype(int)
    pairs, beyond = array("counts", "u1"), iter(array("count_escapes", dtype))
    halves = [*(pairs & 15), *(pairs >> 4)][: num_temperatures * total]
    counts = [int(half) + (int(next(beyond)) if half == 15 else 0) for half in halves]
    return np.array(counts, dtype=int).reshape(num_temperatures, total)


def with_frequencies(said):
    """What a row says where nothing but counts is kept of its entries."""
    n = len(said["num_entries"])
    row = np.repeat(np.arange(n), said["num_entries"])
    counts = said["counts"][:, 0]
    logprobs = np.log(counts / np.bincount(row, counts, n)[row])
    return said | {"logprobs": logprobs, "tails": np.full((n, 1), -np.inf), "logz": np.zeros(n)}


def read_exact(array, n, spec):
    """Codec ``exact``."""
    num_entries = array("num_entries", "<u4")
    out = {"num_entries": num_entries, "token_ids": array("token_ids", "<u4"),
           "label_logprobs": array("label_logprobs", "<f4"), "entropy": array("entropy", "<f4")}  # fmt: skip
    counts = counts_of(array, spec, int(num_entries.sum()))
    if counts is not None:
        out["counts"] = counts.T
    if spec["targets"]["scheme"] == "hidden":
        bf16 = spec["teacher"]["dtype"] == "bfloat16"
        raw = array("hidden", "<u2" if bf16 else "<f4").reshape(n, -1)
        out["hidden"] = (raw.astype("<u4") << 16).view("<f4") if bf16 else raw
    if spec["targets"]["frequencies"]:
        return with_frequencies(out)
    return out | {
        "logprobs": array("logprobs", "<f4"),
        "tails": array("tails", "<f4").reshape(n, -1),
        "logz": array("logz", "<f4"),
    }


def read_packed(array, n, spec):
    """Codec ``packed``, an entry at a time."""
    step, growth = spec["codec"]["step"], spec["codec"]["growth"]
    level = [0.0]
    while len(level) < 256:
        level.append(level[-1] + min(step * np.exp(growth * level[-1]), 1.0))
    narrow = max_entries(spec["targets"], spec["teacher"]["vocab_size"]) <= 255
    num_entries = array("num_entries", "u1" if narrow else "<u4").astype(int)
    symbols, low, escapes = (
        iter(array("id_symbols", "u1")),
        iter(array("id_low", "u1")),
        iter(array("id_escapes", "<u4")),
    )
    ids = [[] for _ in range(n)]
    if spec["codec"]["id_tables"] is not None and not spec["targets"]["num_draws"]:
        bits = np.unpackbits(array("id_bits", "u1").reshape(16, n).T, axis=1)
        ids = [np.flatnonzero(row).tolist() for row in bits]
    lasts = [127 if spec["codec"]["id_tables"] is not None and not spec["targets"]["num_draws"] else -1] * n
    rest = [int(number) - len(row) for number, row in zip(num_entries, ids, strict=True)]
    for row in by_rank(rest):
        symbol = int(next(symbols))
        gap = (
            symbol
            if symbol < 60
            else int(next(escapes))
            if symbol == 255
            else 60 + ((symbol - 60) << 8) + int(next(low))
        )
        lasts[row] += gap + 1
        ids[row].append(lasts[row])
    out = {
        "num_entries": num_entries, "token_ids": np.array([token for row in ids for token in row]),
        "label_logprobs": -np.array(level)[array("label_levels", "u1")], "entropy": array("entropy", "u1") / 4,
    }  # fmt: skip
    counts = counts_of(array, spec, int(num_entries.sum()))
    if counts is not None:
        drawn = [[] for _ in range(n)]
        for place, row in enumerate(by_rank(num_entries)):
            drawn[row].append(counts[:, place])
        out["counts"] = np.array([each for row in drawn for each in row])
    if spec["targets"]["frequencies"]:
        return with_frequencies(out)
    stored, lowest = iter(array("levels", "u1")), array("lowest_level", "u1")
    scores = [[] for _ in range(n)]
    for row in by_rank(num_entries):
        scores[row].append(-level[int(lowest[row]) - int(next(stored))])
    tails = log_tails(array("tails", "u1").reshape(-1, n).T)
    logprobs = [
        np.array(row) - np.log(np.exp(row).sum()) + np.log(-np.expm1(tail))
        for row, tail in zip(scores, tails[:, 0], strict=True)
        if row
    ]
    logz = array("logz", "u1").reshape(2, -1).T.copy().view("<i2").ravel() / 8
    return out | {"logprobs": np.concatenate([[], *logprobs]), "tails": tails, "logz": logz}


def by_rank(num_entries):
    """The row of each entry in the order in which they are stored."""
    for rank in range(max(num_entries, default=0)):
        yield from (row for row, number in enumerate(num_entries) if rank < number)


def max_entries(targets, vocab_size):
    """The most entries that a row can have: those kept, and one for each draw at each temperature."""
    return min(targets["k"] + targets["num_draws"] * len(targets["temperatures"]), 1 << 32)


def log_tails(codes):
    """Log mass of the tail, from codes of its log-odds."""
    i = codes.astype(float) - 1
    odds = np.where(i < 24, -12 + i / 4, np.where(i < 168, -6 + (i - 24) / 16, 3 + (i - 168) / 8))
    return np.where(codes == 0, -np.inf, -np.log1p(np.exp(-odds)))
