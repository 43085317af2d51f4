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
    assert hashed(fields) == digest and fields["format_version"] == 1, path
    return fields


def hashed(fields):
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def flat(value, name=""):
    """Dotted names to values."""
    if not isinstance(value, dict):
        return {name: value}
    return {dotted: one for key in value for dotted, one in flat(value[key], f"{name}.{key}".lstrip(".")).items()}


def proven(path, digest):
    """A file's bytes, which have the digest."""
    data = path.read_bytes()
    assert xxhash.xxh3_128_hexdigest(data) == digest, path
    return data


def read_cache(folder):
    """Every sequence of a finished cache, in order."""
    plan, manifest = record(Path(folder, "plan.json")), record(Path(folder, "manifest.json"))
    spec, shards = plan["spec"], manifest["shards"]
    num_shards = -(-spec["corpus"]["num_rows"] // spec["rows_per_shard"])
    names = {"teacher.name", "corpus.dataset"} | ({"generation"} if spec["generation"] is None else set())
    assert hashed({name: value for name, value in flat(spec).items() if name not in names}) == plan["fingerprint"]
    assert manifest["sealed"] and shards["shard"] == list(range(num_shards))
    name = spec["codec"]["id_tables"]
    tables = None if name is None else load(proven(Path(folder, "tables", f"{name}.safetensors"), name))
    for shard, digest in enumerate(shards["digest"]):
        assert record(Path(folder, "commits", f"{shard:05d}.json"))["digest"] == digest
        batch = pa.ipc.open_file(proven(Path(folder, "shards", f"{shard:05d}-{digest}.arrow"), digest)).get_batch(0)
        about = json.loads(batch.schema.metadata[b"kdcache"])
        assert about == {"format_version": 1, "plan": plan["fingerprint"], "shard": shard}
        for row, columns in enumerate(batch.to_pylist()):
            assert columns["sequence_id"] == shard << 32 | row
            yield read_sequence(columns, spec, tables)


def read_sequence(columns, spec, tables):
    """Tokens, and what the teacher said of them."""

    def frame(name, dtype):
        return np.frombuffer(zstandard.decompress(columns[name]), dtype)

    ids = frame("input_ids", "<u2" if spec["teacher"]["vocab_size"] <= 65_536 else "<u4").astype("<u4")
    mask = np.unpackbits(frame("loss_mask", "u1"))[: len(ids)].astype(bool)
    starts = frame("document_starts", "<u4")
    found = xxhash.xxh3_64_intdigest(ids.tobytes() + np.packbits(mask).tobytes() + starts.tobytes())
    assert (columns["num_positions"], columns["content_hash"]) == (len(ids), found)
    read = read_exact if spec["codec"]["name"] == "exact" else read_packed
    said = read(frame, spec, ids[:-1][mask[1:]], tables)
    row = np.repeat(np.arange(len(said["num_entries"])), said["num_entries"])
    if spec["targets"]["frequencies"]:
        drawn = said["counts"][:, 0]
        nothing = np.zeros(len(said["num_entries"]))
        said |= {
            "logprobs": np.log(drawn / np.bincount(row, drawn)[row]),
            "tails": nothing[:, None] - np.inf,
            "logz": nothing,
        }
    order = np.lexsort((said["token_ids"], row))
    said |= {name: said[name][order] for name in ("token_ids", "logprobs", "counts") if name in said}
    return {"input_ids": ids, "loss_mask": mask, "document_starts": starts, **said}


def read_exact(frame, spec, before, _tables):
    """Codec ``exact``."""
    targets, wide = spec["targets"], spec["teacher"]["dtype"] != "bfloat16"
    names = ["label_logprobs", "entropy"] + ["logprobs", "tails", "logz"] * (not targets["frequencies"])
    said = {name: frame(name, "<u4") for name in ("num_entries", "token_ids")} | {
        name: frame(name, "<f4") for name in names
    }
    if "tails" in said:
        said["tails"] = said["tails"].reshape(len(before), -1)
    if targets["num_draws"]:
        counts = frame("counts", "u1" if targets["num_draws"] < 256 else "<u2").astype(int)
        said["counts"] = counts.reshape(len(targets["temperatures"]), -1).T
    if targets["scheme"] == "hidden":
        hidden = frame("hidden", "<f4") if wide else (frame("hidden", "<u2").astype("<u4") << 16).view("<f4")
        said["hidden"] = hidden.reshape(len(before), -1)
    return said


def read_packed(frame, spec, before, tables):
    """Codec ``packed``; what is stored by rank stands in order of positions when it has gone through ``by_row``."""
    targets, codec, n = spec["targets"], spec["codec"], len(before)
    num_draws, num_temperatures = targets["num_draws"], len(targets["temperatures"])
    narrow = targets["k"] + num_draws * num_temperatures <= 255
    num_entries = frame("num_entries", "u1" if narrow else "<u4").astype(int)
    has_bits = tables is not None and not num_draws
    packed = frame("id_bits", "u1").reshape(16, n).T if has_bits else np.zeros((n, 0), "u1")
    bits = np.unpackbits(packed, axis=1).astype(int)
    gaps = frame("id_symbols", "u1").astype(int)
    escaped, short = gaps == 255, (gaps >= 60) & (gaps < 255)
    gaps[short] = 60 + (gaps[short] - 60 << 8) + frame("id_low", "u1")
    gaps[escaped] = frame("id_escapes", "<u4")
    of_gaps = num_entries - bits.sum(1)
    gaps = by_row(of_gaps, gaps[None])[0]
    parts = zip(bits, np.split(gaps, of_gaps.cumsum()[:-1]), strict=True)
    codes = [[*np.flatnonzero(bit), *(bits.shape[1] - 1 + (part + 1).cumsum())] for bit, part in parts]
    if spec["teacher"]["vocab_size"] <= 1 << 20:
        frequent = frequent_numbers(frame("frequent_gaps", "u1"), frame("frequent_steps", "u1"))
        codes = [ids_of(row, token, frequent, tables) for row, token in zip(codes, before.tolist(), strict=True)]
    level = [0.0]
    while len(level) < 256:
        level.append(level[-1] + min(codec["step"] * np.exp(codec["growth"] * level[-1]), 1.0))
    level = np.array(level)
    said = {"num_entries": num_entries, "token_ids": np.array([each for row in codes for each in row], dtype=int)}
    said |= {"label_logprobs": -level[frame("label_levels", "u1")], "entropy": frame("entropy", "u1") / 4}
    if num_draws:
        pairs = frame("counts", "u1")
        counts = np.concatenate([pairs & 15, pairs >> 4])[: num_temperatures * num_entries.sum()].astype(int)
        counts[counts == 15] += frame("count_escapes", "u1" if num_draws < 256 else "<u2")
        said["counts"] = by_row(num_entries, counts.reshape(num_temperatures, -1)).T
    if targets["frequencies"]:
        return said
    i = frame("tails", "u1").reshape(-1, n).T - 1.0
    odds = np.where(i < 24, -12 + i / 4, np.where(i < 168, -6 + (i - 24) / 16, 3 + (i - 168) / 8))
    tails = np.where(i < 0, -np.inf, -np.log1p(np.exp(-odds)))
    row = np.repeat(np.arange(n), num_entries)
    scores = -level[frame("lowest_level", "u1")[row] - by_row(num_entries, frame("levels", "u1")[None])[0]]
    kept = np.log(np.bincount(row, np.exp(scores), n))
    logprobs = scores - kept[row] + np.log(-np.expm1(tails[row, 0]))
    logz = np.stack(np.split(frame("logz", "u1"), 2), 1).copy().view("<i2")[:, 0] / 8
    return said | {"logprobs": logprobs, "tails": tails, "logz": logz}


def by_row(num_entries, stored):
    """``[..., E]`` from the order of rank, then row, to that of row, then rank."""
    rows = [np.flatnonzero(num_entries > rank) for rank in range(num_entries.max(initial=0))]
    return stored[:, np.concatenate([np.zeros(0, int), *rows]).argsort(kind="stable")]


def frequent_numbers(gaps, steps):
    """The numbers that come up most in a sequence, by how often they do."""
    numbers = np.cumsum(gaps.astype(int) + (gaps < 255))[gaps < 255] - 1
    return numbers[np.lexsort((numbers, steps))].tolist()


def ids_of(codes, before, frequent, tables):
    """The tokens that codes of a position stand for, after the token before."""
    if tables is None:
        return [frequent[code] if code < len(frequent) else code - len(frequent) for code in codes]
    place, length = np.flatnonzero(tables["contexts"] == before), tables["lists"].shape[1]
    first = tables["lists"][place[0]] if len(place) else np.arange(length)
    ranks = [first[code] if code < length else ids_of([code - length], before, frequent, None)[0] for code in codes]
    return [int(tables["order"][rank]) for rank in ranks]
