"""How a cache describes itself: the plan made before the first shard, a commit for each shard, the manifest derived from both.

The **spec** inside the plan names everything that moves the stored numbers: teacher, tokenizer, corpus, targets, codec and
how the teacher is computed. Its hash, the fingerprint, stands in every shard and commit, so that files of two caches cannot
be mixed. Names and paths are recorded but do not count: a teacher moved to another folder is the same teacher.

pydantic checks what is read, because the files may come from anywhere: unknown fields, other versions and numbers out of
range are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import pairwise
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from kdcache.cache.codec import Codec
from kdcache.cache.limits import MAX_ROWS_OF_A_SHARD, MAX_SEQUENCES, MAX_SHARDS, enough_memory
from kdcache.cache.packed import Levels
from kdcache.cache.shard import digest
from kdcache.cache.tables import IdTables
from kdcache.errors import CacheCorruptError, CacheFormatError, CacheMismatchError
from kdcache.specs import (
    CodecSpec,
    ComputeSpec,
    CorpusSpec,
    Count,
    Digest,
    GenerationSpec,
    Positive,
    Record,
    TargetSpec,
    TeacherSpec,
    TokenizerSpec,
    canonical_json,
)

FORMAT_VERSION = 1
RECORD_DIGEST = "record_digest"
# Recorded in the spec, but not part of what it is.
NAMES_ONLY = ("teacher.name", "corpus.dataset")

RecordT = TypeVar("RecordT", bound=BaseModel)


class CacheSpec(Record):
    """Everything that decides the bytes of the shards.

    ``transcoded_from`` is the fingerprint of the cache that these targets were taken from, where it was not the teacher. ``generation``
    says how the teacher wrote the text itself, where the corpus holds prompts.
    """

    teacher: TeacherSpec
    tokenizer: TokenizerSpec
    corpus: CorpusSpec
    targets: TargetSpec
    codec: CodecSpec
    compute: ComputeSpec
    rows_per_shard: Positive
    transcoded_from: Digest | None = None
    generation: GenerationSpec | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.num_shards > MAX_SHARDS:
            raise ValueError(f"{self.num_shards} shards, at most {MAX_SHARDS} are allowed")
        return self

    def fields(self) -> dict[str, Any]:
        """Dotted name to value, of the fields that count."""
        flat = dict(_flatten(self.model_dump(mode="json", exclude=None if self.generation else {"generation"})))
        return {name: value for name, value in flat.items() if name not in NAMES_ONLY}

    @property
    def fingerprint(self) -> str:
        """Hash of :meth:`fields`: 32 hex digits of SHA-256."""
        return _hash(canonical_json(self.fields()))

    @property
    def num_shards(self) -> int:
        """Shards of the plan."""
        return -(-self.corpus.num_rows // self.rows_per_shard)

    def rows(self, shard: int) -> range:
        """The corpus rows of a shard: all that it is a function of, besides the spec."""
        if not 0 <= shard < self.num_shards:
            raise ValueError(f"shard {shard} of {self.num_shards}")
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.corpus.num_rows))

    def make_codec(self, id_tables: IdTables | None = None) -> Codec:
        """The codec of the shards; with the tables that it names, where it names some."""
        assert (id_tables is None) == (self.codec.id_tables is None), "the tables of the plan, no others"
        hidden = self.targets.scheme == "hidden"
        return Codec(
            name=self.codec.name,
            vocab_size=self.teacher.vocab_size,
            temperatures=self.targets.temperatures,
            max_entries=self.targets.max_entries,
            num_draws=self.targets.num_draws,
            frequencies=self.targets.frequencies,
            levels=Levels(self.codec.step, self.codec.growth),
            hidden_size=self.teacher.hidden_size if hidden else 0,
            hidden_dtype="bfloat16" if self.teacher.dtype == "bfloat16" else "float32",
            id_tables=id_tables,
        )


class Plan(Record):
    """``plan.json``. ``environment`` (library versions) is recorded for the reader and does not count."""

    format_version: Literal[1] = 1
    spec: CacheSpec
    fingerprint: Digest
    environment: dict[str, str] = Field(default_factory=dict)


class ShardStats(Record):
    """Sums over a shard; the ``sum_*`` are in nats or probability over the targets, ``num_rows_*`` say what became of rows.

    ``num_answers_*`` say which of a teacher's answers were dropped, and why. ``sum_codec_kl`` is KL(said ‖ stored) at T = 1 over ``num_kl_targets`` targets, a sample of the sequences.
    """

    num_rows: Count
    num_rows_skipped: Count
    num_rows_truncated: Count
    num_rows_split: Count
    num_sequences: Count
    num_positions: Count
    num_targets: Count
    num_entries: Count
    sum_tail_mass: float
    sum_entropy: float
    sum_label_nll: float
    num_kl_targets: Count
    sum_codec_kl: float
    num_answers_short: Count = 0
    num_answers_unfinished: Count = 0
    num_answers_repetitive: Count = 0
    num_answers_duplicate: Count = 0


def _check_time(text: str) -> str:
    datetime.fromisoformat(text).timestamp()
    return text


class Commit(Record):
    """``commits/NNNNN.json``: makes a shard count. Names a digest, never a path."""

    format_version: Literal[1] = 1
    plan: Digest
    shard: Count
    digest: Digest
    num_bytes: Positive
    stats: ShardStats
    head_digest: Digest | None = None
    worker: str
    finished_at: Annotated[str, AfterValidator(_check_time)]
    seconds: float
    batch_splits: Count = 0


class ShardTable(Record):
    """The committed shards, column by column, in order of their numbers."""

    shard: list[Count]
    digest: list[Digest]
    num_bytes: list[Positive]
    num_sequences: list[Count]

    @model_validator(mode="after")
    def _columns_agree(self) -> Self:
        if not len(self.shard) == len(self.digest) == len(self.num_bytes) == len(self.num_sequences):
            raise ValueError("columns have one length")
        # A sequence's id holds its number in the shard in 32 bits; readers count all of them in 64.
        if max(self.num_sequences, default=0) > MAX_ROWS_OF_A_SHARD or sum(self.num_sequences) > MAX_SEQUENCES:
            raise ValueError(
                f"at most {MAX_ROWS_OF_A_SHARD} sequences a shard and {MAX_SEQUENCES} together are allowed, "
                f"found {sum(self.num_sequences)}"
            )
        return self


class Manifest(Record):
    """``manifest.json``: plan and commits reduced to one file. Derived, never accumulated; without who and when."""

    format_version: Literal[1] = 1
    spec: CacheSpec
    fingerprint: Digest
    head_digest: Digest | None
    sealed: bool
    num_bytes: Count
    stats: ShardStats
    shards: ShardTable

    @property
    def content_digest(self) -> str:
        """Of all that is committed: the digests of the shards, in order. A dump of this cache names it as its corpus's."""
        return digest("".join(self.shards.digest).encode())

    @model_validator(mode="after")
    def _is_of_its_plan(self) -> Self:
        numbers, planned = self.shards.shard, self.spec.num_shards
        if any(a >= b for a, b in pairwise(numbers)) or any(number >= planned for number in numbers[-1:]):
            raise ValueError(f"shards ascend below {planned}")
        if self.sealed != (len(numbers) == planned):
            raise ValueError(f"{len(numbers)} of {planned} shards, and sealed is {self.sealed}")
        return self


def derive_manifest(plan: Plan, commits: Iterable[Commit]) -> Manifest:
    """Reduce commits to the manifest of what they amount to.

    Args:
        plan: Of the cache.
        commits: A list in any order; anything else in that of the shards, so that they need not be held together.

    Raises:
        CacheMismatchError: A commit belongs to another plan, or two claim one shard.
    """
    rows: list[tuple[int, str, int, int]] = []
    heads: set[str | None] = set()
    totals: dict[str, float] = dict.fromkeys(ShardStats.model_fields, 0)
    for commit in sorted(commits, key=lambda commit: commit.shard) if isinstance(commits, list) else commits:
        if commit.plan != plan.fingerprint:
            raise CacheMismatchError(
                f"commit of shard {commit.shard:05d} belongs to plan {commit.plan}, this cache has {plan.fingerprint}"
            )
        rows.append((commit.shard, commit.digest, commit.num_bytes, commit.stats.num_sequences))
        heads.add(commit.head_digest)
        for name in totals:
            totals[name] += getattr(commit.stats, name)
    numbers = [number for number, *_ in rows]
    if any(a >= b for a, b in pairwise([*numbers, plan.spec.num_shards])):
        raise CacheMismatchError(f"commits name shards {numbers}, the plan has {plan.spec.num_shards}")
    if len(heads) > 1:
        raise CacheMismatchError(f"commits name different output heads: {sorted(map(str, heads))}")
    try:
        return Manifest(
            spec=plan.spec,
            fingerprint=plan.fingerprint,
            head_digest=heads.pop() if heads else None,
            sealed=len(rows) == plan.spec.num_shards,
            num_bytes=sum(num_bytes for _, _, num_bytes, _ in rows),
            stats=ShardStats.model_validate(totals),
            shards=ShardTable(
                shard=numbers,
                digest=[digest for _, digest, _, _ in rows],
                num_bytes=[num_bytes for _, _, num_bytes, _ in rows],
                num_sequences=[num_sequences for _, _, _, num_sequences in rows],
            ),
        )
    except ValidationError as error:
        raise CacheMismatchError(f"commits add up to what no cache has ({error.errors()[0]['msg']})") from error


def differing_fields(old: CacheSpec, new: CacheSpec) -> list[tuple[str, Any, Any]]:
    """``(field, old, new)`` of every field that counts and differs."""
    before, after = old.fields(), new.fields()
    return [
        (name, before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def to_json(record: BaseModel) -> bytes:
    """Readable and canonical: sorted keys, two spaces, and a digest of the rest so that no flipped bit passes."""
    return signed_json(record.model_dump(mode="json"))


def signed_json(fields: dict[str, Any]) -> bytes:
    """The file of a record with these fields: they and ``record_digest``, the hash of their canonical JSON."""
    signed = {**fields, RECORD_DIGEST: _hash(canonical_json(fields))}
    return json.dumps(signed, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def parse(kind: type[RecordT], data: bytes, where: str) -> RecordT:
    """Read a record, whoever wrote it.

    Raises:
        CacheFormatError: Another format version, or not such a record.
        CacheCorruptError: Its digest does not hold.
    """
    with enough_memory(where):
        try:
            return _parse(kind, data, where)
        except RecursionError as error:
            raise CacheFormatError(f"{where}: not such a record ({error})") from error


def _parse(kind: type[RecordT], data: bytes, where: str) -> RecordT:
    try:
        raw = json.loads(data)
    except ValueError as error:
        raise CacheFormatError(f"{where}: not JSON ({error})") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise CacheFormatError(
            f"{where}: format version {FORMAT_VERSION} was expected, found {version!r:.80}",
            hint="a newer kdcache wrote this cache" if isinstance(version, int) and version > FORMAT_VERSION else None,
        )
    signed = raw.pop(RECORD_DIGEST, None)
    try:
        content = canonical_json(raw)
    except ValueError as error:
        raise CacheFormatError(f"{where}: not JSON ({error})") from error
    if signed != (found := _hash(content)):
        raise CacheCorruptError(
            f"{where}: {RECORD_DIGEST} {signed!r:.80} was written, the fields have {found}: damaged or edited"
        )
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CacheFormatError(f"{where}: {place}: {first['msg']} (found {str(first.get('input'))[:80]!r})") from error


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value
