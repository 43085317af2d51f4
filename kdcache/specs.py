"""What moves the stored numbers, each part as a record: teacher, tokenizer, corpus, targets, codec, compute.

These are the words in which models, corpus and cache speak of each other without knowing each other.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Positive = Annotated[int, Field(gt=0, lt=1 << 62)]


class Record(BaseModel):
    """Frozen; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TeacherSpec(Record):
    """The teacher and its numbers. ``digest`` is of config and weights; ``vocab_size`` leaves padded rows out."""

    name: str
    digest: Digest
    dtype: str
    attention: str
    vocab_size: Annotated[int, Field(gt=0, le=1 << 32)]
    hidden_size: Positive
    num_parameters: Positive


class TokenizerSpec(Record):
    """The tokenizer's content: vocabulary, behaviour on a fixed text, chat template."""

    digest: Digest
    vocab_digest: Digest
    num_tokens: Positive
    chat_template: Digest | None


class CorpusSpec(Record):
    """Rows and how they become sequences. ``digest`` is of the source's bytes or revision."""

    dataset: str
    digest: Digest
    split: str
    num_rows: Positive
    columns: Literal["text", "prompt_completion", "messages"]
    text_column: str
    seq_len: Annotated[int, Field(ge=2, le=1 << 24)]
    packing: bool
    append_eos: bool
    assistant_only: bool


class TargetSpec(Record):
    """What is kept of the teacher's distributions."""

    scheme: Literal["top_k", "hidden"]
    k: Annotated[int, Field(ge=0, le=1 << 20)]
    temperatures: Annotated[tuple[Annotated[float, Field(gt=0, le=1000)], ...], Field(min_length=1, max_length=16)]

    @model_validator(mode="after")
    def _first_is_one(self) -> Self:
        if self.temperatures[0] != 1.0 or len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError("temperatures begin with 1 and do not repeat")
        return self


class CodecSpec(Record):
    """How targets are stored; with teacher and targets it gives a :class:`~kdcache.cache.codec.Codec`."""

    name: Literal["exact", "packed"]
    step: Annotated[float, Field(gt=0, le=1)]


class ComputeSpec(Record):
    """What else moves the last bits: device kind, intra-op threads of a worker, batch composition, head chunk."""

    device: str
    threads: Positive
    batch_tokens: Positive
    chunk_positions: Positive


def canonical_json(value: Any) -> bytes:
    """The one spelling of a value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
