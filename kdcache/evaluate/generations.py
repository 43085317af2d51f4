"""What models answer to the same prompts, side by side, and how near the answers are to a reference and to the teacher's.

Every answer takes the most probable token, so that a difference is the models' and not the dice's. Nearness is ROUGE-L (Lin, 2004): F1
of the longest common subsequence of words, computed here: a dozen lines, equal to ``rouge_score`` without its stemmer on
English text, and not blind to other scripts as its ``[a-z0-9]+`` is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kdcache.corpus import tokenize_prompt
from kdcache.errors import CorpusError
from kdcache.models import answer_ends, describe_tokenizer, rows_without_token
from kdcache.rows import load_rows, prompt_column
from kdcache.specs import GenerationSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_ROWS = 8
WORD = re.compile(r"\w+")
NGRAM = 4


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """Rows to be answered.

    Attributes:
        rows: As the dataset has them.
        column: Of the prompts.
        shown: Each as text.
        references: Each one's reference answer, or None where the dataset has none.
        generation: How they are answered.
    """

    rows: Sequence[dict[str, Any]]
    column: str
    shown: Sequence[str]
    references: Sequence[str | None]
    generation: GenerationSpec


def read_prompts(
    dataset: str, number: int, *, max_new_tokens: int, chat: bool, has_teacher: bool, split: str = "train"
) -> Prompts:
    """The first prompts of a split of a dataset.

    Raises:
        CorpusError: It cannot be read; has no prompts; has references for some rows only; or there is neither a reference nor a teacher
            to hold answers against.
    """
    table = load_rows(dataset, split)
    column = prompt_column(table.column_names)[1]
    rows = [table[index] for index in range(min(number, len(table)))]
    references = [_reference(row, column) for row in rows]
    missing = [index for index, reference in enumerate(references) if reference is None]
    if missing and len(missing) < len(rows):
        raise CorpusError(
            f"prompts {dataset}: row {missing[0]} has no reference answer, others have",
            hint="give every row a completion (or a last message of the assistant), or none",
        )
    if missing and not has_teacher:
        raise CorpusError(
            f"prompts {dataset}: no reference answers, and no teacher: there is nothing to hold the answers against",
            hint="add a column completion, or name the teacher with --teacher",
        )
    generation = GenerationSpec(
        max_new_tokens=max_new_tokens, temperature=0, top_p=1, top_k=0, repetition_penalty=1, seed=0, num_answers=1, chat=chat,
        system=None, min_tokens=0, max_repetition=1, keep_unfinished=True, keep_duplicates=True,
    )  # fmt: skip
    return Prompts(rows, column, [_text_of(row[column], asked=True) for row in rows], references, generation)


def _reference(row: dict[str, Any], column: str) -> str | None:
    if row.get("completion"):
        return _text_of(row["completion"])
    messages = row[column] if isinstance(row[column], list) else []
    return str(messages[-1].get("content", "")) if messages and messages[-1].get("role") == "assistant" else None


def _text_of(value: Any, *, asked: bool = False) -> str:
    """Text as it is; of a chat what is said, and by whom where several say something."""
    if not isinstance(value, list):
        return str(value)
    messages = value[:-1] if asked and value and value[-1].get("role") == "assistant" else value
    if len(messages) == 1:
        return str(messages[0].get("content", ""))
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in messages)


def encode_prompts(prompts: Prompts, tokenizer: PreTrainedTokenizerBase, config: Any, name: str) -> list[list[int]]:
    """Token ids of each prompt, for a model of this config.

    Raises:
        CorpusError: A prompt is empty, or leaves no room for an answer in the model's context.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 31
    new = prompts.generation.max_new_tokens
    ids = [tokenize_prompt(row, prompts.column, prompts.generation, tokenizer) for row in prompts.rows]
    for number, prompt in enumerate(ids):
        if not 0 < len(prompt) <= longest - new:
            raise CorpusError(
                f"prompt {number} has {len(prompt)} tokens, from 1 to {longest - new} were expected: the context of {name} is {longest}, "
                f"the answer may have {new}",
                hint="a smaller --max-new-tokens, or other prompts",
            )
    return ids


@torch.inference_mode()
def answer_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, name: str
) -> list[str]:
    """A model's answers.

    Raises:
        CorpusError: A prompt is empty, or leaves no room for an answer in the model's context.
    """
    from transformers import GenerationConfig

    ends, pad = answer_ends(model, tokenizer)
    new = prompts.generation.max_new_tokens
    ids = encode_prompts(prompts, tokenizer, model.config, name)
    suppressed = rows_without_token(model, describe_tokenizer(tokenizer).num_tokens)
    config = GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=ends or None, pad_token_id=pad, suppress_tokens=suppressed
    )
    model.generation_config = GenerationConfig()  # what it says of sampling does not count
    device = model.get_input_embeddings().weight.device
    answers: list[str] = []
    for start in range(0, len(ids), BATCH_ROWS):
        batch = ids[start : start + BATCH_ROWS]
        width = max(map(len, batch))
        padded = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in batch])
        attended = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        written = model.generate(padded.to(device), attention_mask=attended.to(device), generation_config=config)
        answers += tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
    return answers


# --- how near answers are ---------------------------------------------------------------------------------------------


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, of any script, in any case; 0 where one has none."""
    words, wanted = (WORD.findall(text.casefold()) for text in (answer, reference))
    lengths = [0] * (len(wanted) + 1)
    for word in words:
        diagonal = 0
        for column, other in enumerate(wanted, start=1):
            above = lengths[column]
            lengths[column] = diagonal + 1 if word == other else max(above, lengths[column - 1])
            diagonal = above
    return 2 * lengths[-1] / (len(words) + len(wanted)) if lengths[-1] else 0.0


def repetition(text: str) -> float:
    """The share of an answer's 4-grams of words that have been there before."""
    words = WORD.findall(text.casefold())
    ngrams = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def side_by_side(prompts: Prompts, answers: dict[str, list[str]]) -> dict[str, Any]:
    """Answers by role, with ROUGE-L to the reference and to the teacher's answer.

    Returns:
        ``prompts`` (``prompt``, ``reference``, ``answers`` and ``rouge_l`` by role) and ``means`` by role: of each nearness, of
        ``words`` and of ``repetition``.
    """
    shown: list[dict[str, Any]] = []
    for row, (prompt, reference) in enumerate(zip(prompts.shown, prompts.references, strict=True)):
        said = {role: texts[row] for role, texts in answers.items()}
        against = {"reference": reference, "teacher": said.get("teacher")}
        scores = {
            role: {to: rouge_l(text, other) for to, other in against.items() if other is not None and to != role}
            for role, text in said.items()
        }
        shown.append({"prompt": prompt, "reference": reference, "answers": said, "rouge_l": scores})
    means = {}
    for role, texts in answers.items():
        kinds = shown[0]["rouge_l"][role]
        means[role] = {f"rouge_l_{to}": sum(one["rouge_l"][role][to] for one in shown) / len(shown) for to in kinds}
        means[role] |= {
            "words": sum(len(WORD.findall(text)) for text in texts) / len(texts),
            "repetition": sum(map(repetition, texts)) / len(texts),
        }
    return {"prompts": shown, "means": means, "max_new_tokens": prompts.generation.max_new_tokens}
