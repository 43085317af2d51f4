"""A cache against its teacher: does it still say what the teacher says?

The teacher reads some of the cache's sequences again, and KL(live ‖ stored) is taken over the entries and the tail that the
cache holds. Beside it stands the teacher against itself, the same sequences alone and in a batch: in bfloat16 that is no zero,
and nothing stored can be closer than that. Where only counts of draws are kept, the teacher is drawn from again with the same random
numbers, and the share of draws that land elsewhere takes the place of the KL. Averaged teachers are not run: their logits lie in caches of their own.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kdcache.cache.reader import CacheReader, CacheRow
from kdcache.dump.draw import draw, position_uniforms
from kdcache.dump.engines.transformers import pad_batch
from kdcache.errors import CacheMismatchError, ConfigError, ModelError
from kdcache.heads import OutputHead, head_of, hidden_states, split_is_exact
from kdcache.model_files import TRUST_IT, ModelSource, find_model, find_named_model, model_digest
from kdcache.models import keep_freed_memory, load_model, parse_dtype, pick_device
from kdcache.specs import TargetSpec
from kdcache.targets import TokenSequence, in_rectangle

# What a stored distribution may differ from the live one, beside the codec's declared error: so many times what the teacher
# differs from itself, and rounding; a draw from the far tail lands elsewhere for less.
LIVE_FACTOR, ROUNDING, ROUNDING_OF_DRAWS = 3.0, 1e-5, 1e-2
LEAST_LOGPROB = -100.0


@dataclass(frozen=True, slots=True)
class TeacherAudit:
    """What :func:`against_teacher` found; KL in nats, over the entries and the tail that the cache holds, or a share of draws.

    Attributes:
        measure: ``KL in nats`` or ``share of draws that land elsewhere``.
        num_sequences: Run again.
        num_targets: Positions compared.
        stored: Of what is stored from the live teacher, KL(live ‖ stored), mean over positions.
        stored_max: The largest of them.
        live: Of the teacher from itself, KL(live ‖ live in a batch), mean over positions.
        live_max: The largest of them.
        bound: What ``stored`` may be.
    """

    measure: str
    num_sequences: int
    num_targets: int
    stored: float
    stored_max: float
    live: float
    live_max: float
    bound: float

    @property
    def agrees(self) -> bool:
        """The cache says what the teacher says, as closely as can be asked."""
        return self.stored <= self.bound


@torch.inference_mode()
def against_teacher(
    reader: CacheReader,
    num_sequences: int,
    *,
    teacher: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> TeacherAudit:
    """Run the teacher over some sequences, evenly spread, and compare.

    Args:
        reader: The cache.
        num_sequences: How many; fewer where the cache is smaller.
        teacher: Where the teacher is now, if not where it was. The name in the cache is a stranger's: see :func:`find_named_model`.
        device: ``auto``, ``cpu``, ``cuda`` ...
        trust_remote_code: Of the teacher.

    Raises:
        CacheMismatchError: That is another model than the one that filled the cache.
        ConfigError: The cache is empty, or averages teachers.
        ModelError: It cannot be loaded, or not unless it is the user who names it (``teacher``).
    """
    spec = reader.spec
    if spec.teacher.averaged or not len(reader):
        raise ConfigError(
            f"{reader.store}: " + ("averages teachers" if len(reader) else "the cache holds no sequences")
        )
    if spec.generation is not None and spec.targets.frequencies:
        raise ConfigError(
            f"{reader.store}: draws that were made while the teacher wrote depend on answers that were dropped since",
            hint="a cache of answers with --targets top_k, or with --entry-logprobs, can be held against its teacher",
        )
    # transformers takes the name of a repository for the attention, and runs its code.
    if not spec.teacher.attention.isidentifier():
        raise ConfigError(f"{reader.store}: the attention {spec.teacher.attention!r} is none of transformers' own")
    source = find_model(teacher) if teacher else find_named_model(spec.teacher.name)
    with _errors_of(source):
        found = model_digest(source)
    if found != spec.teacher.digest:
        raise CacheMismatchError(
            f"{reader.store} was filled by a teacher with digest {spec.teacher.digest}, {teacher or spec.teacher.name} has {found}",
            hint="--teacher names the model that filled the cache",
        )
    keep_freed_memory()
    where = pick_device(device)
    with _errors_of(source):
        model = load_model(
            source, dtype=parse_dtype(spec.teacher.dtype), attention=spec.teacher.attention, device=where,
            trust_remote_code=trust_remote_code,
        ).eval()  # fmt: skip
    head = head_of(model).first(reader.vocab_size) if split_is_exact(model) else None
    stored_head = (
        OutputHead.from_bytes(reader.head_bytes(), spec.teacher.head_shape).to(where)
        if spec.targets.scheme == "hidden"
        else None
    )

    def live(sequences: list[TokenSequence]) -> torch.Tensor:
        """``[N, V]`` logprobs of the first of the sequences, read in one batch."""
        input_ids, position_ids = (part.to(where) for part in pad_batch(sequences))
        mask = torch.from_numpy(sequences[0].target_mask).to(where)
        if head is not None:
            logits = head.logits(hidden_states(model, input_ids, position_ids)[0, : len(mask)][mask])
        else:
            whole = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
            logits = whole[0, : len(mask)][mask][:, : reader.vocab_size].float()
        return torch.log_softmax(logits, dim=1).cpu()

    spread = np.linspace(0, len(reader) - 1, min(num_sequences, len(reader))).astype(int)
    rows = [reader[int(index)] for index in spread]
    stored_kl, live_kl = [], []
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        alone, together = live([row.sequence]), live([row.sequence, other.sequence])
        if stored_head is not None:
            assert row.targets.hidden is not None, "a hidden cache holds hidden states"
            stored = torch.log_softmax(stored_head.logits(torch.tensor(row.targets.hidden).to(where)), dim=1).cpu()
        elif row.targets.frequencies:
            drawn = [_drawn_again(logprobs, row, spec.targets) for logprobs in (alone, together)]
            stored_kl.append(_share_that_differs(drawn[0], _drawn(row)))
            live_kl.append(_share_that_differs(*drawn))
            continue
        else:
            stored = _stored(row)
            alone, together = (_in_buckets(logprobs, row) for logprobs in (alone, together))
        stored_kl.append(_kl(alone, stored))
        live_kl.append(_kl(alone, together))
    stored_all, live_all = torch.cat(stored_kl), torch.cat(live_kl)
    declared = spec.codec.max_kl if spec.codec.name == "packed" else 0.0
    draws = spec.targets.frequencies
    return TeacherAudit(
        measure="share of draws that land elsewhere" if draws else "KL in nats",
        num_sequences=len(rows), num_targets=len(stored_all),
        stored=float(stored_all.mean()), stored_max=float(stored_all.max()),
        live=float(live_all.mean()), live_max=float(live_all.max()),
        bound=declared + LIVE_FACTOR * float(live_all.mean()) + (ROUNDING_OF_DRAWS if draws else ROUNDING),
    )  # fmt: skip


@contextlib.contextmanager
def _errors_of(source: ModelSource) -> Iterator[None]:
    """What is not loaded because only a file names it is loaded where the user does."""
    try:
        yield
    except ModelError as error:
        hint = TRUST_IT if source.untrusted else error.hint
        raise ModelError(error.message, hint=hint) from error


def _stored(row: CacheRow) -> torch.Tensor:
    """``[N, K + 1]`` logprobs of the entries and the tail; unused slots are ``-inf``."""
    used, entry = in_rectangle(row.targets.num_entries)
    logprobs = np.append(
        row.targets.logprobs, np.float32(0)
    )  # a slot of a position without entries points past the end
    kept = np.where(used, logprobs[np.minimum(entry, len(logprobs) - 1)], -np.inf)
    return torch.from_numpy(np.concatenate([kept, row.targets.tail_logprobs[:, :1]], axis=1))


def _in_buckets(logprobs_NV: torch.Tensor, row: CacheRow) -> torch.Tensor:
    """``[N, K + 1]``: what the teacher gives to the entries that a row holds, and to all others together."""
    used, entry = in_rectangle(row.targets.num_entries)
    ids = np.append(row.targets.token_ids, np.uint32(0)).astype(np.int64)
    ids_NK = torch.from_numpy(ids[np.minimum(entry, len(ids) - 1)])
    used_NK = torch.from_numpy(used)
    kept_NK = logprobs_NV.gather(1, ids_NK).masked_fill(~used_NK, -torch.inf)
    # Unused slots repeat the position's first entry, or name a token of a position that holds none: leave that one in.
    rest_NV = torch.where(used_NK.any(1, keepdim=True), logprobs_NV.scatter(1, ids_NK, -torch.inf), logprobs_NV)
    return torch.cat([kept_NK, rest_NV.logsumexp(1, keepdim=True)], dim=1)


def _drawn(row: CacheRow) -> npt.NDArray[np.int64]:
    """``[N, num_draws]`` token ids of a row that holds their counts, ascending."""
    assert row.targets.counts is not None, "frequencies come with counts"
    return np.repeat(row.targets.token_ids.astype(np.int64), row.targets.counts[:, 0]).reshape(len(row.targets), -1)


def _drawn_again(logprobs_NV: torch.Tensor, row: CacheRow, spec: TargetSpec) -> npt.NDArray[np.int64]:
    """``[N, num_draws]`` token ids, ascending, from the live teacher with the random numbers of the dump."""
    uniforms = torch.from_numpy(position_uniforms(spec, row.sequence_id, row.sequence.target_mask)[:, 0])
    nothing_exact = torch.empty(len(logprobs_NV), 0, dtype=torch.int64)
    return draw(logprobs_NV, uniforms, spec, 1.0, nothing_exact).sort(dim=1).values.numpy()


def _share_that_differs(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> torch.Tensor:
    """``[N]``: of the draws of each position those of ``a`` that ``b`` does not have, each as often as it came up."""

    def numbered(ids_ND: npt.NDArray[np.int64]) -> list[set[tuple[int, int]]]:
        return [{(token, seen) for token, n in Counter(row).items() for seen in range(n)} for row in ids_ND.tolist()]

    pairs = zip(numbered(a), numbered(b), strict=True)
    return torch.tensor([1 - len(one & other) / a.shape[1] for one, other in pairs], dtype=torch.float64)


def _kl(said: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``[N]`` nats, float64; a bucket that holds nothing counts for nothing."""
    said, other = said.double(), other.double().clamp(min=LEAST_LOGPROB)
    return torch.where(said > LEAST_LOGPROB, said.exp() * (said - other), 0.0).sum(1)
