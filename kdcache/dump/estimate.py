"""The pilot of ``kdcache plan``: the real teacher reads a few hundred sequences once, and every scheme is tried on what it said.

For each batch the trunk runs once, and of each chunk of logits every scheme takes its entries; they are encoded by the codec
that a dump would use into a shard that nobody keeps. So bytes are counted, not computed. Teacher, selection and encoding are timed
apart, because live distillation pays for the first alone.

**What truncation loses** is said in two ways, each where it means something. Entries and tail are held against the whole
distribution with the tail spread evenly over the tokens that it stands for: KL(teacher ‖ stored), which nothing that is drawn at random
has. Drawn targets have an error that shrinks with the number of draws instead, the mean of ``sum_i (tau_i - t_i)^2``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from kdcache.cache import jit
from kdcache.cache.codec import Codec
from kdcache.cache.manifest import CacheSpec
from kdcache.cache.shard import ShardBuilder
from kdcache.cache.tables import IdTables
from kdcache.dump.pilot import LEAST_SEEN, LIST_LENGTH, NUM_CONTEXTS, pilot_positions
from kdcache.dump.select import Selected, select
from kdcache.dump.size import CorpusSize
from kdcache.dump.worker import padded_size, plan_batches
from kdcache.progress import Progress
from kdcache.targets import SparseTargets, TokenSequence, kl_of_stored

if TYPE_CHECKING:
    from kdcache.dump.engines.transformers import TransformersEngine

# Rows at a time whose probabilities are held in float64.
DENSE_ROWS = 64
# Hidden states are large, and cost the same at every position.
HIDDEN_SEQUENCES = 16
# Of what a student would read, for its step to be measured on.
KEPT_SEQUENCES = 64


@dataclass(frozen=True, slots=True)
class SchemeEstimate:
    """What a pilot found of one scheme.

    Attributes:
        name: As it was asked for.
        bytes_per_token: Of shards, whole files over all positions.
        shard_bytes: Of all shards of the corpus.
        table_bytes: Of what else the cache holds: the output head (hidden), id tables.
        id_tables: ``none``, ``global`` or ``context``.
        entries: Kept at a position, on average.
        mass: Of the teacher's distribution at T = 1 that the entries have, on average.
        kl: KL(teacher ‖ stored) in nats at T = 1, the tail spread evenly over what is left out; None where entries are drawn.
        codec_kl: Of it, KL(said ‖ stored) over entries and tail: what the codec's levels cost. 0 where it loses nothing.
        target_mse: Expected ``sum_i (tau_i - t_i)^2`` at T = 1; None where nothing is drawn.
        select_seconds: To take the entries, a token.
        encode_seconds: To encode them, a token.
        temperatures: At which students may train.
        losses: For which the targets serve.
    """

    name: str
    bytes_per_token: float
    shard_bytes: int
    table_bytes: int
    id_tables: str
    entries: float
    mass: float
    kl: float | None
    codec_kl: float
    target_mse: float | None
    select_seconds: float
    encode_seconds: float
    temperatures: tuple[float, ...]
    losses: str

    @property
    def total_bytes(self) -> int:
        """Of the whole cache."""
        return self.shard_bytes + self.table_bytes


@dataclass(slots=True, eq=False)
class Trial:
    """A scheme that is tried: what a dump with it would be, and what it has kept of the pilot so far.

    Attributes:
        name: Of the scheme.
        spec: Of the dump, without id tables.
        id_tables: The kind that a dump would count.
        said: Sequences read, and what was kept of them.
        squares: Expected squared errors of draws, an array a chunk.
        select_seconds: Spent on taking entries, and the tokens of it, a pair a batch.
    """

    name: str
    spec: CacheSpec
    id_tables: str
    said: list[tuple[TokenSequence, SparseTargets]] = field(default_factory=list)
    squares: list[np.ndarray] = field(default_factory=list)
    select_seconds: list[tuple[int, float]] = field(default_factory=list)

    @property
    def has_enough(self) -> bool:
        """Whether more would say nothing new."""
        return self.spec.targets.scheme == "hidden" and len(self.said) >= HIDDEN_SEQUENCES


@dataclass(frozen=True, slots=True, eq=False)
class Pilot:
    """What the teacher's reading of a few sequences came to.

    Attributes:
        stored: Some sequences, and what the first scheme with entries keeps of them as a student would read it; empty where there is none.
        num_positions: Of all sequences.
        teacher_seconds: Of trunk and logits alone, a token of the corpus, with what its batches are padded by.
        schemes: In the order of the trials.
    """

    stored: list[tuple[TokenSequence, SparseTargets]]
    num_positions: int
    teacher_seconds: float
    schemes: list[SchemeEstimate]


@dataclass(frozen=True, slots=True)
class Timing:
    """What the teacher took for a batch. The trunk works on padding too, the logits are of tokens alone.

    Attributes:
        num_tokens: Of its sequences.
        num_padded: With what fills them up to the longest.
        trunk_seconds: Of the trunk.
        logits_seconds: Of the logits.
    """

    num_tokens: int
    num_padded: int
    trunk_seconds: float
    logits_seconds: float


def run_pilot(
    engine: TransformersEngine,
    trials: Sequence[Trial],
    ids: Sequence[int],
    sequences: Sequence[TokenSequence],
    size: CorpusSize,
) -> Pilot:
    """Read the pilot's sequences once, and try every scheme on each chunk of logits.

    Args:
        engine: The teacher.
        trials: The schemes; what each keeps is left in them.
        ids: Of the sequences; they key what is drawn.
        sequences: The pilot.
        size: Of the corpus that the pilot stands for.
    """
    compute = trials[0].spec.compute
    batches = plan_batches([len(sequence) for sequence in sequences], compute.batch_tokens)
    if engine.head is None:
        batches = [[index] for batch in batches for index in batch]
    timed: list[Timing] = []

    def read(indices: list[int], read_some: Callable[[slice], list[Timing]]) -> list[Timing]:
        def refusal(row: int) -> tuple[str, str]:
            return f"a sequence of {len(sequences[indices[row]])} tokens does not fit into memory", "--seq-len"

        return engine.halving(read_some, slice(0, len(indices)), refusal)

    if len(batches) <= 2:  # too few to leave out the first, which also warms everything up
        read(batches[0], partial(_warm_up, engine, [sequences[i] for i in batches[0]]))
    total = sum(len(sequence) for sequence in sequences)
    with Progress("pilot", total) as progress:
        for indices in batches:
            batch, names = [sequences[i] for i in indices], [ids[i] for i in indices]
            timed += read(indices, partial(_read, engine, trials, batch, names))
            done = sum(one.num_tokens for one in timed)
            progress.update(done, f"{done:,}/{total:,} tokens")
    schemes, stored = [], list[tuple[TokenSequence, SparseTargets]]()
    for trial in trials:
        estimate, some = _estimate(trial, size, engine)
        schemes.append(estimate)
        stored = stored or some
        trial.said.clear()
    return Pilot(
        stored=stored,
        num_positions=total,
        teacher_seconds=_teacher_seconds(timed, 1.0 if engine.head is None else size.num_padded / size.num_positions),
        schemes=schemes,
    )


@torch.inference_mode()
def _read(
    engine: TransformersEngine, trials: Sequence[Trial], batch: list[TokenSequence], names: Sequence[int], some: slice
) -> list[Timing]:
    """Read some of a batch for all schemes; what the teacher alone took."""
    batch, names = batch[some], names[some]
    clock, trials = _clock(engine), [trial for trial in trials if not trial.has_enough]
    started = clock()
    read = engine.read(batch)
    trunk_seconds, logits_seconds = clock() - started, 0.0
    kept: list[list[Selected]] = [[] for _ in trials]
    uniforms = [engine.uniforms(trial.spec.targets, batch, names, read.given.device) for trial in trials]
    squares = []
    spent, num_tokens = [0.0] * len(trials), sum(len(sequence) for sequence in batch)
    for rows in read.chunks(engine.chunk_positions):
        started = clock()
        logits = read.logits(rows)
        logits_seconds += clock() - started
        for number, trial in enumerate(trials):
            started, numbers = clock(), uniforms[number]
            chosen = select(logits, read.labels[rows], trial.spec.targets, None if numbers is None else numbers[rows])
            spent[number] += clock() - started
            kept[number].append(chosen)
        squares.append(_squares(logits, [trial.spec for trial in trials], [chosen[-1] for chosen in kept]))
    for number, trial in enumerate(trials):
        hidden = read.given if trial.spec.targets.scheme == "hidden" else None
        started = clock()
        said = engine.split(trial.spec.targets, kept[number], hidden, read.sizes)
        trial.select_seconds.append((num_tokens, spent[number] + clock() - started))
        trial.said += zip(batch, said, strict=True)
        trial.squares += [chunk[number] for chunk in squares]
    num_padded = padded_size([len(sequence) for sequence in batch], range(len(batch)))
    return [Timing(num_tokens, num_padded, trunk_seconds, logits_seconds)]


@torch.inference_mode()
def _warm_up(engine: TransformersEngine, batch: list[TokenSequence], some: slice) -> list[Timing]:
    """Read some of a batch, for nothing but to have done so."""
    read = engine.read(batch[some])
    for rows in read.chunks(engine.chunk_positions):
        read.logits(rows)
    return []


def _teacher_seconds(timed: list[Timing], padding: float) -> float:
    """Seconds a token where ``padding`` positions are computed for each; the pilot's own sequences may be padded otherwise."""
    trunk = _a_token([(one.num_padded, one.trunk_seconds) for one in timed])
    return trunk * padding + _a_token([(one.num_tokens, one.logits_seconds) for one in timed])


def _a_token(timed: list[tuple[int, float]]) -> float:
    """Seconds a token; the first batch, which also warms everything up, does not count where there are more."""
    steady = timed[1:] if len(timed) > 2 else timed
    return sum(seconds for _, seconds in steady) / sum(tokens for tokens, _ in steady)


def _clock(engine: TransformersEngine) -> Callable[[], float]:
    """Seconds at which all that was begun is done."""
    device = engine.model.device

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.monotonic()

    return now


def _squares(logits: torch.Tensor, specs: Sequence[CacheSpec], kept: list[Selected]) -> list[np.ndarray]:
    """Of each scheme ``[C]`` float64, the expected ``sum_i (tau_i - t_i)^2`` of a chunk; zeros where nothing is drawn."""
    out = [np.zeros(len(logits)) for _ in specs]
    drawn = [number for number, spec in enumerate(specs) if spec.targets.num_draws]
    for start in range(0, len(logits) if drawn else 0, DENSE_ROWS):
        rows = slice(start, start + DENSE_ROWS)
        t_CV = torch.softmax(logits[rows].double(), dim=1)
        for number in drawn:
            targets, chosen = specs[number].targets, kept[number]
            exact = None
            if targets.k:
                assert chosen.counts is not None, "a scheme that draws counts"
                used = torch.arange(chosen.token_ids.shape[1], device=t_CV.device) < chosen.num_entries[rows, None]
                never_drawn = used & (chosen.counts[rows] == 0).all(2)
                exact = chosen.token_ids[rows], never_drawn
            out[number][rows] = draw_error(t_CV, targets.num_draws, targets.scheme, exact).cpu().numpy()
    return out


def draw_error(
    t_NV: torch.Tensor, num_draws: int, scheme: str, exact: tuple[torch.Tensor, torch.Tensor] | None = None
) -> torch.Tensor:
    """``[N]`` float64: expected ``sum_i (tau_i - t_i)^2`` of drawn targets, in closed form.

    Independent draws: ``(1 - sum t^2) / N``. Systematic ones: ``sum f (1 - f) / N^2`` with ``f = frac(N t)``, since an entry comes up
    ``floor(N t)`` times, or once more with probability ``f``; after exact entries the same of what they leave, times its square.

    Args:
        t_NV: ``[N, V]`` float64 probabilities.
        num_draws: N of the formula.
        scheme: ``sampled``, ``systematic`` or ``hybrid``.
        exact: ``[N, K]`` ids, and which of them are exact (hybrid).
    """
    if scheme == "sampled":
        return (1 - t_NV.square().sum(1)) / num_draws
    if exact is None:
        expected = t_NV * num_draws
        rest = torch.ones(len(t_NV), dtype=t_NV.dtype, device=t_NV.device)
    else:
        ids, is_exact = exact
        left = t_NV.clone().scatter_(1, ids, torch.where(is_exact, 0.0, t_NV.gather(1, ids)))
        rest = left.sum(1)
        expected = left * (num_draws / rest.clamp(min=1e-300))[:, None]
    fraction = expected - expected.floor()
    return (fraction * (1 - fraction)).sum(1) * (rest / num_draws).square()


def _estimate(
    trial: Trial, size: CorpusSize, engine: TransformersEngine
) -> tuple[SchemeEstimate, list[tuple[TokenSequence, SparseTargets]]]:
    """What a scheme has kept, encoded and held against what was said; and some of what is stored, where it has entries."""
    spec, said = trial.spec, trial.said
    codec, tried, table_bytes = spec.make_codec(), said, 0
    if trial.id_tables != "none" and len(said) > 1:  # counted on one half, tried on the other
        pairs = [(sequence.contexts, targets) for sequence, targets in _first_of(said[::2], size.num_positions)]
        contexts = NUM_CONTEXTS if trial.id_tables == "context" else 0
        tables = IdTables.count(pairs, spec.teacher.vocab_size, contexts, LIST_LENGTH, LEAST_SEEN)
        codec, tried, table_bytes = replace(codec, id_tables=tables), said[1::2], len(tables.to_bytes())
    hidden = spec.targets.scheme == "hidden"
    if hidden:
        assert engine.head is not None, "hidden states need a head that is understood"
        table_bytes += sum(
            t.numel() * t.element_size() for t in (engine.head.weight, engine.head.bias) if t is not None
        )
    builder, empty = (ShardBuilder(codec, spec.fingerprint, 0) for _ in range(2))
    # What is made once a process is not a token's; and a dump of this size compiles its loops.
    jit.note(size.num_positions)
    codec.encode(tried[0][1], tried[0][0].contexts)
    started = time.monotonic()
    frames = [codec.encode(targets, sequence.contexts) for sequence, targets in tried]
    for (sequence, _), frame in zip(tried, frames, strict=True):
        builder.add_frames(sequence, frame)
    whole, fixed = len(builder.finish()), len(empty.finish())
    tried_positions = sum(len(sequence) for sequence, _ in tried)
    encode_seconds = (time.monotonic() - started) / tried_positions
    shard_bytes = round((whole - fixed) / tried_positions * size.num_positions + fixed * size.num_shards)
    stored = [
        (sequence, codec.decode(frame, len(one), "pilot", sequence.contexts).expand(codec.temperatures))
        for (sequence, one), frame in zip(tried, frames, strict=True)
    ]
    pairs_stored = [(one, kept) for (_, one), (_, kept) in zip(tried, stored, strict=True)]
    drawn, lossless = spec.targets.num_draws > 0, hidden or codec.frequencies
    tails = np.concatenate([one.tail_logprobs[:, 0] for _, one in said]).astype(np.float64)
    estimate = SchemeEstimate(
        name=trial.name,
        bytes_per_token=shard_bytes / max(size.num_positions, 1),
        shard_bytes=shard_bytes,
        table_bytes=table_bytes,
        id_tables=trial.id_tables,
        entries=sum(len(one.token_ids) for _, one in said) / len(tails),
        mass=1.0 if hidden else float(1 - np.exp(tails).mean()),
        kl=None if drawn else 0.0 if hidden else _mean(kl_of_truncation(*p, codec.vocab_size) for p in pairs_stored),
        codec_kl=0.0 if lossless else _mean(kl_of_stored(*pair) for pair in pairs_stored),
        target_mse=_mean(trial.squares) if drawn else None,
        select_seconds=_a_token(trial.select_seconds),
        encode_seconds=encode_seconds,
        temperatures=spec.targets.temperatures,
        losses=serves(codec),
    )
    return estimate, [] if hidden else stored[:KEPT_SEQUENCES]


def _first_of(
    said: list[tuple[TokenSequence, SparseTargets]], num_tokens: int
) -> list[tuple[TokenSequence, SparseTargets]]:
    """As many as a dump of so many tokens counts its tables on."""
    ends = np.cumsum([len(sequence) for sequence, _ in said])
    return said[: int(np.searchsorted(ends, pilot_positions(num_tokens))) + 1]


def _mean(parts: Iterable[np.ndarray]) -> float:
    return float(np.concatenate(list(parts)).mean())


def serves(codec: Codec) -> str:
    """For which losses targets of a codec serve, in a few words."""
    if codec.hidden_size:
        return "any, at any T"
    if codec.frequencies:
        return "forward_kl, ce"
    return "forward_kl, tv, skew, jsd" if codec.num_draws else "any, over buckets"


def kl_of_truncation(said: SparseTargets, stored: SparseTargets, vocab_size: int) -> np.ndarray:
    """``[N]`` nats: KL(teacher ‖ stored) at T = 1, the stored tail spread evenly over the tokens that are not entries.

    Equals ``sum_V t (log t - log q)`` with ``q`` the stored probability of an entry, and ``tail / (V - K)`` of any other token. The
    teacher's entropy was measured over the whole vocabulary, so the sum needs no logits.

    Args:
        said: What the teacher said.
        stored: The same entries as they come back from the codec.
        vocab_size: V.
    """
    position = np.repeat(np.arange(len(said)), said.num_entries)
    t = np.exp(said.logprobs.astype(np.float64))
    kept = np.bincount(position, t * stored.logprobs.astype(np.float64), len(said))
    tail, kept_tail = (one.tail_logprobs[:, 0].astype(np.float64) for one in (said, stored))
    others = np.log(np.maximum(vocab_size - said.num_entries.astype(np.float64), 1))
    some = tail > -np.inf
    spread_out = np.exp(tail[some]) * (kept_tail[some] - others[some])
    return np.asarray(
        -said.entropy.astype(np.float64) - kept - np.bincount(np.flatnonzero(some), spread_out, len(said))
    )
