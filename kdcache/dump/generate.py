"""``kdcache generate``: a worker whose sequences are what the teacher answers to prompts, with the targets of that very pass.

A shard is a function of its prompts and the plan, as in a dump: batches are made of the shard's prompts alone, longest first, and
what is sampled depends on the seed and the numbers of the answers. So it is resumed, shared and verified like any other cache.

Answers are dropped for what they are (too short, repetitive, cut off, in their shard already), and counted by reason in the commit. The text of
those that stay is read back out of the cache into a dataset: nothing is kept twice that could disagree.
"""

from __future__ import annotations

import filecmp
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.cache.lease import Lease
from kdcache.cache.reader import CacheReader
from kdcache.cache.shard import sequence_id
from kdcache.corpus import CorpusCounts, asked_chat, tokenize_prompt
from kdcache.dump.engines.generate import Answer, AnsweringEngine
from kdcache.dump.worker import Worker, check_tokens, plan_batches
from kdcache.errors import ConfigError, TeacherOutputError
from kdcache.specs import GenerationSpec
from kdcache.targets import SparseTargets, TokenSequence

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

NGRAM = 4
REASONS = ("num_answers_short", "num_answers_unfinished", "num_answers_repetitive", "num_answers_duplicate")


@dataclass(slots=True, kw_only=True)
class GenerateWorker(Worker):
    """Makes shards of answers.

    Attributes:
        answering: The teacher.
    """

    answering: AnsweringEngine

    def said(
        self, lease: Lease, counts: CorpusCounts, dropped: Counter[str]
    ) -> Iterator[tuple[list[int], list[TokenSequence], list[SparseTargets]]]:
        """The answers of a shard that are kept, in the order of its prompts."""
        spec, shard = self.plan.spec, lease.shard
        assert spec.generation is not None, "a plan that says how answers are made"
        longest = spec.corpus.seq_len
        prompts = list(self._prompts(shard, counts))
        width = [min(len(prompt) + spec.generation.max_new_tokens, longest) for prompt in prompts]
        answers: dict[int, Answer] = {}
        batches = plan_batches(width, spec.compute.batch_tokens)
        for number, indices in enumerate(batches, start=1):
            lease.renew()
            names = [sequence_id(shard, index) for index in indices]
            try:
                written = self.answering.answer([prompts[index] for index in indices], names, longest)
            except TeacherOutputError as error:
                raise TeacherOutputError(
                    f"shard {shard:05d}, one of the prompts in rows {spec.rows(shard)}: {error.message}",
                    hint="try --dtype float32 or bfloat16; nothing of this shard was kept",
                ) from error
            answers |= dict(zip(indices, written, strict=True))
            self.on_progress(sum(len(answer.sequence) for answer in written), number / len(batches))
        dropped.update(dict.fromkeys(REASONS, 0))
        kept = list(keep_answers((answers[index] for index in range(len(prompts))), spec.generation, dropped))
        if kept:
            yield list(range(len(kept))), [a.sequence for a in kept], [a.targets for a in kept]

    def _prompts(self, shard: int, counts: CorpusCounts) -> Iterator[list[int]]:
        """Token ids of each prompt that leaves room for an answer, as often as it is answered."""
        spec = self.plan.spec
        assert spec.generation is not None, "a plan that says how answers are made"
        for row in (self.rows[i] for i in spec.rows(shard)):
            counts.num_rows += 1
            ids = tokenize_prompt(row, spec.corpus.text_column, spec.generation, self.tokenizer)
            if not 0 < len(ids) < spec.corpus.seq_len:
                counts.num_skipped += 1
                continue
            check_tokens(ids, self.plan.spec, shard, self.tokenizer)
            for _ in range(spec.generation.num_answers):
                yield ids


def keep_answers(answers: Iterable[Answer], spec: GenerationSpec, dropped: Counter[str]) -> Iterator[Answer]:
    """Those that pass; of the others the first reason is counted."""
    seen = set()
    for answer in answers:
        ids = answer.sequence.input_ids
        said = ids[answer.sequence.loss_mask].tolist()
        if len(said) - answer.finished < spec.min_tokens:  # the token that finished it says nothing
            dropped["num_answers_short"] += 1
        elif not (answer.finished or spec.keep_unfinished):
            dropped["num_answers_unfinished"] += 1
        elif repetition(said) > spec.max_repetition:
            dropped["num_answers_repetitive"] += 1
        elif not spec.keep_duplicates and ids.tobytes() in seen:
            dropped["num_answers_duplicate"] += 1
        else:
            seen.add(ids.tobytes())
            yield answer


def repetition(ids: Sequence[int]) -> float:
    """The share of 4-grams that have been there before; 0 where there are none."""
    ngrams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


# --- text -------------------------------------------------------------------------------------------------------------


def answers_of(cache: CacheReader, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """Prompts as they were given, with what the teacher answered: ``prompt`` and ``completion``, as TRL has them.

    A chat is answered by a chat. Rows whose answers were all dropped do not appear.
    """
    spec = cache.spec
    assert spec.generation is not None, "a cache that kdcache generate made"
    index = 0
    for shard, number in zip(cache.manifest.shards.shard, cache.manifest.shards.num_sequences, strict=True):
        given = (
            (rows[i], tokenize_prompt(rows[i], spec.corpus.text_column, spec.generation, tokenizer))
            for i in spec.rows(shard)
        )
        row, prompt = None, None
        for _ in range(number):
            sequence = cache.tokens(index)
            said = sequence.input_ids[sequence.loss_mask].tolist()
            asked = sequence.input_ids[~sequence.loss_mask].tolist()
            while prompt != asked:
                row, prompt = next(given)
            assert row is not None, "every answer has a prompt"
            text = tokenizer.decode(said, skip_special_tokens=True)
            value = row[spec.corpus.text_column]
            chat = asked_chat(value, spec.generation)
            answer = text if chat is None else [{"role": "assistant", "content": text}]
            yield {"prompt": value if chat is None else chat, "completion": answer}
            index += 1


def write_answers(cache: CacheReader, rows: Dataset, tokenizer: PreTrainedTokenizerBase, path: str) -> int:
    """One line of JSON an answer; the file appears when it is whole. One that is there stays, if it says the same.

    Returns:
        How many.

    Raises:
        ConfigError: It says something else.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    number = 0
    with open(temporary, "w", encoding="utf-8") as stream:
        for answer in answers_of(cache, rows, tokenizer):
            stream.write(json.dumps(answer, ensure_ascii=False) + "\n")
            number += 1
    if not target.exists():
        temporary.replace(target)
        return number
    agrees = filecmp.cmp(temporary, target, shallow=False)
    temporary.unlink()
    if not agrees:
        raise ConfigError(
            f"{path} is not the text of {cache.store}, which holds {number:,} answers",
            hint="remove it, and the same command writes it anew; or name another file with --answers",
        )
    return number
