"""What moves the stored numbers, each part as a record: teacher, tokenizer, corpus, targets, codec, compute.

These are the words in which models, corpus and cache speak of each other without knowing each other.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from kdcache.targets import Estimator

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Positive = Annotated[int, Field(gt=0, lt=1 << 62)]


class Record(BaseModel):
    """Frozen; unknown fields and numbers that are not finite are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AveragedSpec(Record):
    """A teacher whose logits were averaged in: the fingerprint of its ``hidden`` cache, and its weight."""

    fingerprint: Digest
    weight: Annotated[float, Field(gt=0, lt=1)]


class TeacherSpec(Record):
    """The teacher and its numbers. ``digest`` is of config and weights; ``vocab_size`` leaves padded rows out.

    ``averaged`` names the teachers whose logits were averaged in; this one has the rest of the weight.
    """

    name: str
    digest: Digest
    dtype: str
    attention: str
    vocab_size: Annotated[int, Field(gt=0, le=1 << 32)]
    hidden_size: Annotated[int, Field(gt=0, le=1 << 20)]
    num_parameters: Positive
    averaged: tuple[AveragedSpec, ...] = ()

    @property
    def head_shape(self) -> tuple[int, int]:
        """V and D of the output head that is kept beside hidden states."""
        return self.vocab_size, self.hidden_size


class TokenizerSpec(Record):
    """The tokenizer's content: vocabulary, behaviour on a fixed text, chat template."""

    digest: Digest
    vocab_digest: Digest
    num_tokens: Positive
    chat_template: Digest | None


class CorpusSpec(Record):
    """Rows and how they become sequences. ``digest`` is of the source's bytes or revision.

    Rows of the columns ``tokens`` are sequences of another cache; ``written_by`` is the digest of the model that wrote their text, where
    one did.
    """

    dataset: str
    digest: Digest
    split: str
    num_rows: Positive
    columns: Literal["text", "prompt_completion", "messages", "prompt", "tokens"]
    text_column: str
    seq_len: Annotated[int, Field(ge=2, le=1 << 24)]
    packing: bool
    append_eos: bool
    assistant_only: bool
    written_by: Digest | None = None

    @model_serializer(mode="wrap")
    def _without_writer(self, dumped: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Text that no model wrote says nothing of it, in no file and no fingerprint."""
        fields: dict[str, Any] = dumped(self)
        if self.written_by is None:
            fields.pop("written_by", None)
        return fields


Scheme = Literal["top_k", "top_p", "sampled", "systematic", "hybrid", "hidden"]
DRAWN = ("sampled", "systematic", "hybrid")
# Nats: a cache whose declared error is more than that says nothing.
MOST_MAX_KL = 1.0


class TargetSpec(Record):
    """What is kept of the teacher's distributions.

    Attributes:
        scheme: ``top_k``, ``top_p``, ``sampled``, ``systematic``, ``hybrid`` or ``hidden``.
        k: Entries kept for their probability: all (top_k), at most (top_p), besides the draws (hybrid); 0 elsewhere.
        top_p: Mass after which top_p stops; 1 elsewhere.
        num_draws: Draws a position and temperature (sampled, systematic, hybrid); 0 elsewhere.
        seed: Of the draws; 0 where nothing is drawn.
        temperatures: The first is 1.
        frequencies: Whether of drawn entries only the counts are kept, no logprob of each and no tail (sampled, systematic).
    """

    scheme: Scheme
    k: Annotated[int, Field(ge=0, le=1 << 20)]
    temperatures: Annotated[tuple[Annotated[float, Field(gt=0, le=1000)], ...], Field(min_length=1, max_length=16)]
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    num_draws: Annotated[int, Field(ge=0, lt=1 << 16)] = 0
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    frequencies: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.temperatures[0] != 1.0 or len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError("temperatures begin with 1 and do not repeat")
        if (self.scheme in DRAWN) != (self.num_draws > 0):
            raise ValueError(f"{self.scheme} with {self.num_draws} draws")
        if (self.scheme in ("top_k", "top_p", "hybrid")) != (self.k > 0):
            raise ValueError(f"{self.scheme} with k = {self.k}")
        if self.frequencies and not self.can_be_frequencies:
            raise ValueError("frequencies alone are kept of sampled and systematic targets at T = 1, no others")
        return self

    @property
    def can_be_frequencies(self) -> bool:
        """Whether the counts of the draws are an estimate of all that there is."""
        return self.num_draws > 0 and self.k == 0 and self.temperatures == (1.0,)

    @property
    def estimator(self) -> Estimator:
        """What the targets claim to be, see :mod:`kdcache.targets`."""
        return "frequencies" if self.frequencies else "draws" if self.num_draws else "buckets"

    @property
    def max_entries(self) -> int:
        """Most entries that a position can have."""
        return self.k + self.num_draws * len(self.temperatures)


class GenerationSpec(Record):
    """How a teacher answers prompts, and which of its answers are kept.

    Attributes:
        max_new_tokens: Of an answer.
        temperature: Of sampling; 0 takes the most probable token.
        top_p: Mass of the tokens that are sampled from.
        top_k: Their number; 0 for all.
        repetition_penalty: As in transformers; 1 for none.
        seed: Of sampling.
        num_answers: To each prompt.
        chat: Whether a prompt of plain text is what a user says, put through the chat template.
        system: What the system says before it, or None.
        min_tokens: Answers of fewer tokens, their end not counted, are dropped.
        max_repetition: Answers of whose 4-grams a larger share has been there before are dropped.
        keep_unfinished: Whether answers that were cut off are kept.
        keep_duplicates: Whether an answer is kept that the same shard holds already, to the same prompt.
    """

    max_new_tokens: Annotated[int, Field(ge=1, le=1 << 20)]
    temperature: Annotated[float, Field(ge=0, le=100)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: Annotated[int, Field(ge=0, le=1 << 32)]
    repetition_penalty: Annotated[float, Field(gt=0, le=100)]
    seed: Annotated[int, Field(ge=0, lt=1 << 63)]
    num_answers: Annotated[int, Field(ge=1, le=1 << 16)]
    chat: bool
    system: str | None
    min_tokens: Count
    max_repetition: Annotated[float, Field(ge=0, le=1)]
    keep_unfinished: bool
    keep_duplicates: bool


class CodecSpec(Record):
    """How targets are stored; with teacher and targets it gives a :class:`~kdcache.cache.codec.Codec`.

    Attributes:
        name: ``exact`` or ``packed``.
        step: Of the levels at logprob 0, in nats (packed).
        growth: Of that step, a nat (packed).
        max_kl: The declared error: KL(said ‖ stored) over entries and tail at T = 1, mean over positions, in nats.
        id_tables: Digest of the tables that renumber token ids (packed), or None.
    """

    name: Literal["exact", "packed"]
    step: Annotated[float, Field(ge=1 / 128, le=1)]
    growth: Annotated[float, Field(ge=0, le=1)]
    max_kl: Annotated[float, Field(gt=0, le=MOST_MAX_KL)]
    id_tables: Digest | None = None

    @model_validator(mode="after")
    def _packed_only(self) -> Self:
        if self.id_tables is not None and self.name != "packed":
            raise ValueError(f"{self.name} has no id tables")
        return self


class ComputeSpec(Record):
    """What else moves the last bits: device kind, intra-op threads of a worker, batch composition, head chunk."""

    device: str
    threads: Positive
    batch_tokens: Positive
    chunk_positions: Positive


def canonical_json(value: Any) -> bytes:
    """The one spelling of a value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
