"""What a teacher said about one sequence of tokens. numpy only; every other file refers to this one.

**The alignment rule, stated once.** Row ``t`` of the targets is the teacher's distribution over the token at ``t + 1``,
given tokens ``0..t`` of the same document. It pairs with the student's logits at ``t`` and with the label
``input_ids[t + 1]``. The mask is the label's: row ``t`` exists exactly when ``loss_mask[t + 1]`` is set. The last position
of a sequence has no target, and neither has the last position of a document inside a packed sequence, because the first
token of a document is never a label.

**The truncation.** A row keeps some entries (token id, logprob) and one number for all the rest, the tail. Logprobs are
normalised over the whole vocabulary, so entries and tail together are a distribution over ``K + 1`` buckets.

**The estimator.** What a row claims to be is declared by :attr:`SparseTargets.estimator`, and losses ask for nothing else:

- ``buckets``: the K entries and the tail are the teacher's distribution, everything left out taken as one. A divergence over
  them is a lower bound of the true one (top_k, top_p).
- ``draws``: entries were drawn at random, ``counts`` times each. Their weights ``tau`` satisfy ``E[tau] = t`` over the whole
  vocabulary, so sums weighted by ``tau / t`` are unbiased (sampled, systematic, hybrid). 2503.16870 for sampled.
- ``frequencies``: drawn, and nothing else is known of the entries: ``tau`` stands in the place of ``t``. Unbiased for what is
  linear in the teacher, which is the gradient of forward KL and of cross-entropy, and no other divergence.

**Temperature.** ``softmax(z / T)`` is not computable from a truncated ``softmax(z)``: what the entries leave out at T = 2
is often most of the mass. So the tail is measured at every declared temperature when the logits are at hand, and
:meth:`SparseTargets.at_temperature` refuses any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kdcache.errors import CacheMismatchError, ConfigError

UIntArray = npt.NDArray[np.uint32]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
CountArray = npt.NDArray[np.uint16]
# e^-40: about once in 10^17 positions by chance.
UNLIKELY_NATS = 40.0
Estimator = Literal["buckets", "draws", "frequencies"]


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """Token ids of one sequence: one document, or several packed one after the other.

    Attributes:
        input_ids: ``[T]`` uint32.
        loss_mask: ``[T]`` bool, of labels: True where the token is to be learned. False at every document start.
        document_starts: ``[num_documents]`` uint32, ascending, the first is 0. Attention never crosses a start.
    """

    input_ids: UIntArray
    loss_mask: BoolArray
    document_starts: UIntArray

    def __post_init__(self) -> None:
        starts = self.document_starts
        assert len(self.input_ids) == len(self.loss_mask) > 0, "one mask bit a token, at least one token"
        assert len(starts) > 0 and starts[0] == 0 and (np.diff(starts.astype(np.int64)) > 0).all(), (
            "starts ascend from 0"
        )
        assert starts[-1] < len(self.input_ids), "every document has a token"
        assert not self.loss_mask[starts].any(), "the first token of a document is never a label"

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def target_mask(self) -> BoolArray:
        """``[T]`` bool: where row ``t`` has a target, i.e. ``loss_mask`` shifted by one (the alignment rule)."""
        mask = np.zeros(len(self), dtype=bool)
        mask[:-1] = self.loss_mask[1:]
        return mask

    @property
    def contexts(self) -> UIntArray:
        """``[N]`` uint32: the token at each row that has a target, the last one that the teacher had read."""
        return self.input_ids[self.target_mask]

    @property
    def position_ids(self) -> UIntArray:
        """``[T]`` uint32: positions counted from the start of each document."""
        index = np.arange(len(self), dtype=np.uint32)
        which = np.searchsorted(self.document_starts, index, side="right") - 1
        return index - self.document_starts[which]


@dataclass(frozen=True, slots=True, eq=False)
class SparseTargets:
    """What the teacher said at the N valid positions of a sequence, see the module docstring for the alignment.

    N counts the set bits of ``TokenSequence.target_mask``, in order; E counts all kept entries.

    Attributes:
        temperatures: The declared temperatures; the first is 1.
        num_entries: ``[N]`` uint32, entries kept at each position.
        token_ids: ``[E]`` uint32, ascending and without repeats inside a position.
        logprobs: ``[E]`` float32, nats, at T = 1, normalised over the whole vocabulary.
        tail_logprobs: ``[N, num_temperatures]`` float32, nats: log of the mass that the entries leave out. ``-inf`` where
            they leave out nothing.
        logz: ``[N]`` float32, logsumexp of the teacher's raw logits at T = 1.
        label_logprobs: ``[N]`` float32, the teacher's logprob of the label at T = 1: the witness of alignment.
        entropy: ``[N]`` float32, nats, of the full distribution at T = 1.
        hidden: ``[N, D]`` float32, the last hidden state, for the lossless ``hidden`` scheme; else None.
        counts: ``[E, num_temperatures]`` uint16, how often each entry was drawn at each temperature, or None where nothing
            was drawn. An entry that was drawn at none is an exact one: its weight is its probability.
        frequencies: Whether the teacher's logprobs are not known: ``logprobs`` are ``log(counts / sum(counts))`` at T = 1, nothing is
            left out (``tail_logprobs`` are ``-inf``), and ``logz`` is 0.
    """

    temperatures: tuple[float, ...]
    num_entries: UIntArray
    token_ids: UIntArray
    logprobs: FloatArray
    tail_logprobs: FloatArray
    logz: FloatArray
    label_logprobs: FloatArray
    entropy: FloatArray
    hidden: FloatArray | None = None
    counts: CountArray | None = None
    frequencies: bool = False

    def __post_init__(self) -> None:
        n, num_kept = len(self.num_entries), int(self.num_entries.sum(dtype=np.int64))
        assert self.temperatures and self.temperatures[0] == 1.0, "the first temperature is 1"
        assert self.token_ids.shape == self.logprobs.shape == (num_kept,), "num_entries sums to the entries"
        assert self.tail_logprobs.shape == (n, len(self.temperatures)), "a tail for each position and temperature"
        assert self.logz.shape == self.label_logprobs.shape == self.entropy.shape == (n,)
        assert self.hidden is None or self.hidden.shape[0] == n
        assert self.counts is None or self.counts.shape == (num_kept, len(self.temperatures))

    def __len__(self) -> int:
        return len(self.num_entries)

    @property
    def estimator(self) -> Estimator:
        """``buckets``, ``draws`` or ``frequencies``, see the module docstring."""
        return "frequencies" if self.frequencies else "buckets" if self.counts is None else "draws"

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """``[N + 1]`` int64: the entries of position ``n`` are ``offsets[n]:offsets[n + 1]``."""
        return np.concatenate([[0], np.cumsum(self.num_entries, dtype=np.int64)])

    def tail_at(self, temperature: float) -> FloatArray:
        """``[N]`` log tail mass at a declared temperature.

        Raises:
            ConfigError: The temperature is not declared.
        """
        tail: FloatArray = self.tail_logprobs[:, temperature_index(self.temperatures, temperature)]
        return tail

    def at_temperature(self, temperature: float) -> tuple[FloatArray, FloatArray]:
        """Logprobs of the entries and of the tail under ``softmax(z / T)``, exact at every declared temperature.

        Equals, per position: ``log_softmax(logprobs / T) + log(1 - exp(tail_T))`` and ``tail_T``.

        Returns:
            ``[E]`` and ``[N]`` float32, nats.

        Raises:
            ConfigError: The temperature is not declared.
        """
        tail = self.tail_at(temperature)
        return rescale_entries(self.logprobs / np.float32(temperature), tail, self.num_entries), tail

    def weights_at(self, temperature: float) -> FloatArray:
        """The weights ``tau`` of the entries at a declared temperature.

        Equals ``t_i`` for an exact entry and ``rest * counts_i / sum(counts)`` for a drawn one, where ``rest`` is what the
        exact entries of the position leave: 1 for ``sampled`` and ``systematic``, so that ``tau = counts / N``.

        Returns:
            ``[E]`` float32.

        Raises:
            ConfigError: The temperature is not declared.
        """
        logprobs, tail = self.at_temperature(temperature)
        probabilities = np.exp(logprobs.astype(np.float64))
        if self.counts is None:
            return probabilities.astype(np.float32)
        drawn = self.counts.any(axis=1)
        counts = self.counts[:, temperature_index(self.temperatures, temperature)].astype(np.float64)
        position = np.repeat(np.arange(len(self)), self.num_entries)
        # The tail and the drawn entries, rather than 1 - sum(exact): nothing cancels.
        rest = np.exp(tail.astype(np.float64)) + np.bincount(position, probabilities * drawn, len(self))
        num_draws = np.bincount(position, counts, len(self))
        share = (rest / np.maximum(num_draws, 1))[position]
        return np.where(drawn, counts * share, probabilities).astype(np.float32)


def keep_entries(targets: SparseTargets, kept: BoolArray) -> SparseTargets:
    """Only some of the entries; what the others had joins the tail, exactly, at every declared temperature.

    Args:
        targets: All entries.
        kept: ``[E]``.
    """
    position = np.repeat(np.arange(len(targets)), targets.num_entries)
    tails = []
    for temperature in targets.temperatures:
        logprobs, tail = targets.at_temperature(temperature)
        dropped = np.bincount(position[~kept], np.exp(logprobs[~kept].astype(np.float64)), len(targets))
        with np.errstate(divide="ignore"):
            tails.append(np.log(np.exp(tail.astype(np.float64)) + dropped))
    return replace(
        targets,
        num_entries=np.bincount(position[kept], minlength=len(targets)).astype(np.uint32),
        token_ids=targets.token_ids[kept],
        logprobs=targets.logprobs[kept],
        tail_logprobs=np.minimum(np.stack(tails, axis=1), 0).astype(np.float32),
        counts=None if targets.counts is None else targets.counts[kept],
    )


def keep_most_probable(targets: SparseTargets, k: int) -> SparseTargets:
    """The k most probable entries of each position; of equal ones the lower ids."""
    order, starts = _most_probable_first(targets)
    stays = np.empty(len(order), dtype=bool)
    stays[order] = np.arange(len(order)) - starts < k
    return keep_entries(targets, stays)


def keep_top_p(targets: SparseTargets, top_p: float) -> SparseTargets:
    """The fewest entries of each position, most probable first, that have the mass ``top_p`` together; all where they have less.

    An entry stays if those before it have less than ``top_p``, as in nucleus sampling (1904.09751).
    """
    order, starts = _most_probable_first(targets)
    mass = np.exp(targets.logprobs[order].astype(np.float64))
    before = np.concatenate([[0.0], np.cumsum(mass)])[:-1]
    stays = np.empty(len(order), dtype=bool)
    stays[order] = (before - before[starts] < top_p) | (np.arange(len(order)) == starts)
    return keep_entries(targets, stays)


def _most_probable_first(targets: SparseTargets) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """``[E]``: entries by position and probability, of equal ones the lower ids first; and where the position of each begins."""
    position = np.repeat(np.arange(len(targets)), targets.num_entries)
    order = np.lexsort((targets.token_ids, -targets.logprobs, position))
    return order, targets.offsets[:-1][position]


def keep_temperatures(targets: SparseTargets, temperatures: tuple[float, ...]) -> SparseTargets:
    """Only some of the declared temperatures. An entry that was drawn at none of them goes; its mass joins the tail.

    Raises:
        ConfigError: One is not declared.
    """
    columns = [temperature_index(targets.temperatures, temperature) for temperature in temperatures]
    if targets.counts is not None:
        targets = keep_entries(
            targets, np.asarray(targets.counts[:, columns].any(axis=1) | ~targets.counts.any(axis=1))
        )
    return replace(
        targets,
        temperatures=temperatures,
        tail_logprobs=targets.tail_logprobs[:, columns],
        counts=None if targets.counts is None else targets.counts[:, columns],
    )


def in_rectangle(num_entries: npt.NDArray[np.integer[Any]]) -> tuple[BoolArray, npt.NDArray[np.int64]]:
    """Runs of entries laid out as a rectangle, a row a position.

    Args:
        num_entries: ``[N]``, entries of each position; they stand one after the other.

    Returns:
        ``[N, K]`` bool, the slots that are used; ``[N, K]`` int64, the entry of each slot. Unused slots repeat the position's
        first entry.
    """
    sizes = num_entries.astype(np.int64)
    slots = np.arange(max(int(sizes.max(initial=0)), 1))
    used = slots < sizes[:, None]
    return used, (np.cumsum(sizes) - sizes)[:, None] + np.where(used, slots, 0)


def rescale_entries(scores: FloatArray, tail_logprobs: FloatArray, num_entries: UIntArray) -> FloatArray:
    """Normalise entries so that together with the tail they have mass one: ``log_softmax(scores) + log(1 - tail)``.

    Computed in float64 from the masses themselves, and ``log(1 - tail)`` with ``expm1``, so that neither a tail of 1e-30
    nor one of 0.999999 loses digits.

    Args:
        scores: ``[E]`` unnormalised log-scores, a run of ``num_entries[n]`` for each position.
        tail_logprobs: ``[N]``.
        num_entries: ``[N]``.
    """
    kept = num_entries > 0
    out = np.empty(len(scores), dtype=np.float32)
    if not kept.any():
        return out
    counts = num_entries[kept].astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    top = np.maximum.reduceat(scores, starts).astype(np.float64)
    shifted = scores.astype(np.float64) - np.repeat(top, counts)
    log_sum = np.log(np.add.reduceat(np.exp(shifted), starts))
    with np.errstate(divide="ignore"):
        log_head = np.log(-np.expm1(tail_logprobs[kept].astype(np.float64)))
    return np.asarray(shifted - np.repeat(log_sum - log_head, counts), dtype=np.float32)


def kl_of_stored(said: SparseTargets, stored: SparseTargets, temperature: float = 1.0) -> npt.NDArray[np.float64]:
    """``[N]`` nats: KL(said ‖ stored) over the entries and the tail, at a declared temperature; the same entries in both."""
    (said_logp, said_tail), (logp, tail) = said.at_temperature(temperature), stored.at_temperature(temperature)
    position = np.repeat(np.arange(len(said)), said.num_entries)
    entries = np.exp(said_logp.astype(np.float64)) * (said_logp.astype(np.float64) - logp)
    some = said_tail > -np.inf
    kl = np.bincount(position, entries, len(said)).astype(np.float64)
    kl[some] += np.exp(said_tail[some].astype(np.float64)) * (said_tail[some].astype(np.float64) - tail[some])
    return kl


def temperature_index(temperatures: tuple[float, ...], temperature: float) -> int:
    """Where a declared temperature stands.

    Raises:
        ConfigError: It is not declared; names those that are.
    """
    if temperature in temperatures:
        return temperatures.index(temperature)
    known = ", ".join(f"{t:g}" for t in temperatures)
    raise ConfigError(
        f"temperature {temperature:g} is not declared by the cache; declared are {known}",
        hint=f"train with one of {known}, or dump again with --temperatures 1,...,{temperature:g}: the tail mass at "
        "another temperature cannot be computed from truncated targets",
    )


def check_alignment(sequence: TokenSequence, targets: SparseTargets, where: str, tolerance: FloatArray) -> None:
    """Hold the label's stored logprob against the entry of the same token: off-by-one targets cannot pass.

    Args:
        sequence: The tokens.
        targets: The targets said to belong to them.
        where: Names the sequence in the message.
        tolerance: ``[N]`` largest honest difference in nats, from the codec's declared error.

    Raises:
        CacheMismatchError: Targets and tokens do not belong together.
    """
    mask = sequence.target_mask
    if int(mask.sum()) != len(targets):
        raise CacheMismatchError(
            f"{where}: {int(mask.sum())} positions have a label, but there are {len(targets)} targets"
        )
    labels = sequence.input_ids[1:][mask[:-1]]
    position = np.repeat(np.arange(len(targets)), targets.num_entries)
    hit = targets.token_ids == labels[position]
    disagree = (_unlikely if targets.frequencies else _different)(targets, position[hit], hit, tolerance)
    if disagree.any():
        first = int(np.flatnonzero(disagree)[0])
        raise CacheMismatchError(
            f"{where}: targets and tokens are not aligned: at target {first} of {len(targets)} the label {labels[first]} has "
            f"another logprob among the entries than the one stored for it ({int(disagree.sum())} positions disagree)",
            hint="targets row t must be the distribution over the token at t + 1; dump this shard again",
        )


def _different(
    targets: SparseTargets, position: npt.NDArray[np.int64], hit: BoolArray, tolerance: FloatArray
) -> BoolArray:
    """``[N]``: the label's entry has another logprob, or the label is none of the entries and more probable than all these."""
    near = np.abs(targets.logprobs[hit] - targets.label_logprobs[position]) <= tolerance[position]
    outside = targets.num_entries > 0
    outside[position] = False
    disagree = outside & (targets.label_logprobs > targets.tail_logprobs[:, 0] + tolerance)
    disagree[position[~near]] = True  # not near, so that NaN is wrong
    return disagree


def _unlikely(
    targets: SparseTargets, position: npt.NDArray[np.int64], hit: BoolArray, tolerance: FloatArray
) -> BoolArray:
    """``[N]``: the label came up so much more or less often than its probability has it that no draw explains it.

    By Chernoff's bound N draws have probability below ``exp(-N KL(frequency ‖ probability))``, of heads and tails.
    """
    assert targets.counts is not None, "frequencies come with counts"
    entry_of = np.repeat(np.arange(len(targets)), targets.num_entries)
    num_draws = np.bincount(entry_of, targets.counts[:, 0], len(targets))
    frequency = np.zeros(len(targets))
    frequency[position] = targets.counts[hit, 0] / num_draws[position]
    label = targets.label_logprobs.astype(np.float64)
    nearest = np.clip(frequency, np.exp(label - tolerance), np.exp(np.minimum(label + tolerance, 0)))
    with np.errstate(divide="ignore", invalid="ignore"):
        heads = np.where(frequency > 0, frequency * np.log(frequency / nearest), 0)
        tails = np.where(frequency < 1, (1 - frequency) * np.log((1 - frequency) / (1 - nearest)), 0)
    likely = num_draws * (heads + tails) <= UNLIKELY_NATS
    return np.asarray(~likely)
