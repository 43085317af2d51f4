"""Rows of a dataset -> token sequences, as a pure function of a row range.

A row is plain text (``text``), a prompt with its completion (``prompt``, ``completion``) or a chat (``messages``): the
columns of TRL, told apart by name. What is learned is all of a text, the completion, or what the assistant says.

Sequences never cross the border of a shard: documents of a row range are cut or packed among themselves (best fit, longest
first), and stay apart inside a sequence by their start positions. Text longer than a sequence goes on in the next one; a
chat or completion is truncated instead, because its tail means nothing without its head.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kdcache.errors import CorpusError
from kdcache.specs import CorpusSpec, GenerationSpec
from kdcache.targets import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TOKEN_COLUMNS = ("input_ids", "loss_mask", "document_starts")


class Rows(Protocol):
    """What is read by number: a ``datasets.Dataset``, or the sequences of a cache."""

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


# --- documents --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """Token ids ``[n]`` of one row, and which of them are to be learned."""

    input_ids: np.ndarray[Any, np.dtype[np.uint32]]
    loss_mask: np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(slots=True)
class CorpusCounts:
    """What became of the rows of a range; kept in the commit of its shard, and said aloud once a dump is done."""

    num_rows: int = 0
    num_skipped: int = 0
    num_truncated: int = 0
    num_split: int = 0


def tokenize_row(row: dict[str, Any], spec: CorpusSpec, tokenizer: PreTrainedTokenizerBase) -> Document | None:
    """A row as token ids with a loss mask; None for a row without anything to learn.

    Raises:
        CorpusError: A column is not what its name says.
    """
    if spec.columns == "text":
        text = _expect(row, spec.text_column, str)
        ids = _with_eos(tokenizer(text)["input_ids"] if text else [], spec, tokenizer)
        mask = [True] * len(ids)
    elif spec.columns == "prompt_completion":
        ids, mask = _tokenize_completion(row, spec, tokenizer)
    else:
        messages = _expect(row, "messages", list)
        ids, mask = _tokenize_chat(messages, 0 if spec.assistant_only else None, tokenizer)
    mask[:1] = [False]
    if len(ids) < 2 or not any(mask):
        return None
    return Document(np.array(ids, dtype=np.uint32), np.array(mask, dtype=bool))


def tokenize_prompt(
    row: dict[str, Any], column: str, generation: GenerationSpec, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Token ids after which a teacher answers; none for an empty prompt.

    Raises:
        CorpusError: The column holds neither text nor a chat.
    """
    value = row.get(column)
    if not isinstance(value, str | list):
        raise CorpusError(
            f"column {column!r}: text or a chat was expected, found {type(value).__name__}: {str(value)[:60]!r}"
        )
    chat = asked_chat(value, generation)
    if chat is None:
        ids: list[int] = tokenizer(value)["input_ids"] if value else []
        return ids
    if not chat:
        return []
    if tokenizer.chat_template is None:
        raise CorpusError(
            "the prompts are chats, but the teacher's tokenizer has no chat template",
            hint="use prompts of plain text and --no-chat, or an instruction-tuned teacher",
        )
    text = _render(chat, tokenizer, add_generation_prompt=True)
    rendered: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return rendered


def asked_chat(value: str | list[dict[str, Any]], generation: GenerationSpec) -> list[dict[str, Any]] | None:
    """The messages after which a teacher answers, the system's first and no answer last; None for a prompt of plain text."""
    if isinstance(value, str):
        if not generation.chat:
            return None
        asked = [{"role": "user", "content": value}] if value else []
    else:
        asked = list(value)
    while asked and asked[-1].get("role") == "assistant":
        asked.pop()
    system = [{"role": "system", "content": generation.system}] if generation.system else []
    return [*system, *asked] if asked else []


def _expect(row: dict[str, Any], column: str, kind: type) -> Any:
    value = row.get(column)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise CorpusError(
            f"column {column!r}: {kind.__name__} was expected, found {type(value).__name__}: {str(value)[:60]!r}"
        )
    return value


def _with_eos(ids: list[int], spec: CorpusSpec, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    eos = tokenizer.eos_token_id
    return [*ids, eos] if spec.append_eos and eos is not None and ids and ids[-1] != eos else ids


def _tokenize_completion(
    row: dict[str, Any], spec: CorpusSpec, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _tokenize_chat([*prompt, *completion], len(prompt) if spec.assistant_only else None, tokenizer)
    prompt, completion = _expect(row, "prompt", str), _expect(row, "completion", str)
    if not completion:
        return [], []
    encoded = tokenizer(prompt + completion, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    # A token that straddles the border holds some of the completion: it is learned.
    mask = [not spec.assistant_only or (end > len(prompt) and end > start) for start, end in offsets]
    with_eos = _with_eos(ids, spec, tokenizer)
    return with_eos, mask + [True] * (len(with_eos) - len(ids))


def _tokenize_chat(
    messages: list[dict[str, Any]], first_learned: int | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """A chat through the chat template; learned is what the assistant says from message ``first_learned`` on, or all."""
    if tokenizer.chat_template is None:
        raise CorpusError(
            "the dataset holds chats, but the teacher's tokenizer has no chat template",
            hint="use a dataset with a text column, or an instruction-tuned teacher",
        )
    if not messages:
        return [], []
    text = _render(messages, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    if first_learned is None:
        return ids, [True] * len(ids)
    spans = []
    for i, message in enumerate(messages):
        if message.get("role") != "assistant" or i < first_learned:
            continue
        before = _render(messages[:i], tokenizer, add_generation_prompt=True)
        upto = _render(messages[: i + 1], tokenizer)
        if not (text.startswith(before) and text.startswith(upto)):
            raise CorpusError(
                "the chat template rewrites earlier turns, so what the assistant says cannot be told apart",
                hint="use --no-assistant-only to learn the whole chat, or a dataset with prompt and completion",
            )
        spans.append((len(before), len(upto.rstrip("\n")) if upto.endswith("\n") else len(upto)))
    mask = [any(a <= start and start < b and end > start for a, b in spans) for start, end in encoded["offset_mapping"]]
    return ids, mask


def _render(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool = False
) -> str:
    import jinja2

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except (jinja2.TemplateError, KeyError, TypeError) as error:
        raise CorpusError(
            f"the chat template refuses a chat: {error}", hint="roles and contents as the template expects"
        ) from error


# --- sequences --------------------------------------------------------------------------------------------------------


def make_sequences(
    rows: Iterable[dict[str, Any]],
    spec: CorpusSpec,
    tokenizer: PreTrainedTokenizerBase,
    counts: CorpusCounts | None = None,
) -> list[TokenSequence]:
    """The sequences of a shard, from its rows alone. Those of a cache stay as they are."""
    counts = counts if counts is not None else CorpusCounts()
    if spec.columns == "tokens":
        sequences = [TokenSequence(**row) for row in rows]
        counts.num_rows += len(sequences)
        return sequences
    pieces: list[Document] = []
    for row in rows:
        counts.num_rows += 1
        document = tokenize_row(row, spec, tokenizer)
        if document is None:
            counts.num_skipped += 1
            continue
        pieces.extend(_cut(document, spec, counts))
    if not spec.packing:
        return [_join([piece]) for piece in pieces]
    return [_join([pieces[i] for i in group]) for group in best_fit([len(p.input_ids) for p in pieces], spec.seq_len)]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into bins of a capacity, longest first, each into the fullest bin that holds it.

    Returns:
        Item numbers by bin; every item once, in an order that depends on the lengths alone.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (space left, bin), ascending
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        assert lengths[item] <= capacity, "pieces are cut to the capacity first"
        at = bisect.bisect_left(room, (lengths[item], -1))
        if at == len(room):
            bins.append([])
            left, number = capacity, len(bins) - 1
        else:
            left, number = room.pop(at)
        bins[number].append(item)
        if left - lengths[item]:
            bisect.insort(room, (left - lengths[item], number))
    return bins


def _cut(document: Document, spec: CorpusSpec, counts: CorpusCounts) -> Iterator[Document]:
    ids, mask = document.input_ids, document.loss_mask
    if len(ids) <= spec.seq_len:
        yield document
        return
    if spec.columns != "text":
        counts.num_truncated += 1
        if mask[: spec.seq_len].any():
            yield Document(ids[: spec.seq_len], mask[: spec.seq_len])
        else:
            counts.num_skipped += 1
        return
    counts.num_split += 1
    for start in range(0, len(ids), spec.seq_len):
        piece = mask[start : start + spec.seq_len].copy()
        piece[0] = False  # its predecessor is in another sequence
        if piece.any():
            yield Document(ids[start : start + spec.seq_len], piece)


def _join(pieces: Sequence[Document]) -> TokenSequence:
    ends = np.cumsum([len(piece.input_ids) for piece in pieces])
    return TokenSequence(
        input_ids=np.concatenate([piece.input_ids for piece in pieces]),
        loss_mask=np.concatenate([piece.loss_mask for piece in pieces]),
        document_starts=np.concatenate([[0], ends[:-1]]).astype(np.uint32),
    )


def mean_row_tokens(rows: Rows, spec: CorpusSpec, tokenizer: PreTrainedTokenizerBase, sample: int = 128) -> float:
    """Tokens of a row on average, from at most ``sample`` rows spread evenly: the pilot that sizes the shards."""
    step = max(1, len(rows) // sample)
    if spec.columns == "tokens":
        return float(np.mean([len(rows[i]["input_ids"]) for i in range(0, len(rows), step)]))
    documents = [tokenize_row(rows[i], spec, tokenizer) for i in range(0, len(rows), step)]
    return float(np.mean([0 if d is None else len(d.input_ids) for d in documents]))


def mean_answered_tokens(
    rows: Rows, spec: CorpusSpec, generation: GenerationSpec, tokenizer: PreTrainedTokenizerBase, sample: int = 128
) -> float:
    """Tokens of a row's prompt and answers at most, on average, from rows spread evenly."""
    step = max(1, len(rows) // sample)
    prompts = [tokenize_prompt(rows[i], spec.text_column, generation, tokenizer) for i in range(0, len(rows), step)]
    lengths = [min(len(p) + generation.max_new_tokens, spec.seq_len) for p in prompts if 0 < len(p) < spec.seq_len]
    return float(sum(lengths) * generation.num_answers / len(prompts))
