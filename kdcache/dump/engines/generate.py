"""A teacher that answers prompts, and what it said of every token while it did: one pass, no second forward.

transformers generates (its sampling, its stopping); a hook on the model's forward takes the raw logits of each step, before anything
that sampling does to them, and keeps targets of them. A step's label is the token that was sampled from it, which the next step reads.

Answers of a batch depend on its prompts and on one seed, so they are the same whoever makes them (on one device kind and set of
versions). Logits come out of a key-value cache and left padding: in bfloat16 they differ from those of one forward over the finished
text as a batch differs from a batch (``kdcache verify --against-teacher`` shows by how much).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdcache.dump.draw import position_uniforms
from kdcache.dump.engines.transformers import TransformersEngine
from kdcache.dump.select import Selected, select
from kdcache.models import answer_ends, rows_without_token
from kdcache.specs import DRAWN, GenerationSpec, TargetSpec
from kdcache.targets import SparseTargets, TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What a teacher wrote after one prompt.

    Attributes:
        sequence: Prompt and answer; the answer is to be learned.
        targets: Of every token of the answer.
        finished: Whether it ended by itself: its last token, and no other, is one that ends an answer.
    """

    sequence: TokenSequence
    targets: SparseTargets
    finished: bool


@dataclass(slots=True)
class AnsweringEngine:
    """A loaded teacher that writes.

    Attributes:
        engine: The teacher, as for a dump.
        generation: How it samples and when it stops.
        end_ids: Tokens that end an answer.
        pad_id: Fills up shorter prompts.
    """

    engine: TransformersEngine
    generation: GenerationSpec
    end_ids: Sequence[int]
    pad_id: int

    def answer(self, prompts: Sequence[Sequence[int]], names: Sequence[int], longest: int) -> list[Answer]:
        """One answer to each prompt of a batch; half of it at a time where memory runs out.

        Args:
            prompts: Token ids.
            names: Of the answers: what is drawn for targets depends on them, and what is sampled on the first of them.
            longest: Tokens that prompt and answer may have together.

        Raises:
            TeacherOutputError: NaN or Inf.
            ModelError: One prompt alone does not fit into memory.
        """
        return self.engine.halving(
            lambda rows: self._answer(prompts[rows], names[rows], longest),
            slice(0, len(prompts)),
            lambda row: (
                f"a prompt of {len(prompts[row])} tokens and its answer do not fit into memory",
                "--max-new-tokens",
            ),
        )

    @torch.inference_mode()
    def _answer(self, prompts: Sequence[Sequence[int]], names: Sequence[int], longest: int) -> list[Answer]:
        model, spec = self.engine.model, self.engine.targets
        width = max(len(prompt) for prompt in prompts)
        input_ids = torch.full((len(prompts), width), self.pad_id, dtype=torch.int64)
        attended = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
            attended[row, width - len(prompt) :] = 1
        device = model.get_input_embeddings().weight.device
        steps = min(self.generation.max_new_tokens, longest - min(len(prompt) for prompt in prompts))
        uniforms = _uniforms(spec, names, [len(prompt) for prompt in prompts], steps)
        torch.manual_seed(_seed(self.generation.seed, names[0]))
        with _recording(model, self.engine, uniforms) as steps_said:
            written = model.generate(input_ids.to(device), attention_mask=attended.to(device), **self._sampling(steps))[
                :, width:
            ]
        said = steps_said.finish(written[:, -1])
        return self._split(prompts, written.cpu().numpy(), said, longest)

    def _sampling(self, steps: int) -> dict[str, Any]:
        """Arguments of ``generate``."""
        from transformers import GenerationConfig

        spec = self.generation
        sampled = (
            {"temperature": spec.temperature, "top_p": spec.top_p, "top_k": spec.top_k} if spec.temperature else {}
        )
        config = GenerationConfig(
            max_new_tokens=steps, do_sample=spec.temperature > 0, repetition_penalty=spec.repetition_penalty,
            eos_token_id=list(self.end_ids) or None, pad_token_id=self.pad_id,
            suppress_tokens=rows_without_token(self.engine.model, self.engine.vocab_size), **sampled,
        )  # fmt: skip
        return {"generation_config": config}

    def _split(
        self, prompts: Sequence[Sequence[int]], written: np.ndarray[Any, Any], said: list[Selected], longest: int
    ) -> list[Answer]:
        """A sequence and its targets for each row, as long as its answer."""
        lengths, finished = [], []
        for prompt, row in zip(prompts, written, strict=True):
            ends = np.flatnonzero(np.isin(row, self.end_ids))
            length = int(ends[0]) + 1 if len(ends) else len(row)
            room = longest - len(prompt)
            lengths.append(min(length, room))
            finished.append(bool(len(ends)) and length <= room)
        # Steps are rows of a batch each; an answer is a column.
        whole = _stack(said)
        rows = [step * len(prompts) + row for row, length in enumerate(lengths) for step in range(length)]
        targets = self.engine.split(self.engine.targets, [_take(whole, torch.tensor(rows))], None, lengths)
        answers = []
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            ids = np.concatenate([np.asarray(prompt), written[row, :length]]).astype(np.uint32)
            sequence = TokenSequence(ids, np.arange(len(ids)) >= len(prompt), np.zeros(1, dtype=np.uint32))
            answers.append(Answer(sequence, targets[row], finished[row]))
        return answers


def answering_engine(
    engine: TransformersEngine, generation: GenerationSpec, tokenizer: PreTrainedTokenizerBase
) -> AnsweringEngine:
    """A teacher that stops where its generation config, or its tokenizer, says that an answer ends."""
    from transformers import GenerationConfig

    end_ids, pad_id = answer_ends(engine.model, tokenizer)
    engine.model.generation_config = GenerationConfig()  # what it says of sampling does not count
    return AnsweringEngine(engine, generation, end_ids, pad_id)


@dataclass(slots=True)
class _Recorder:
    """Targets of each step; the logits of the last one wait for the token that is sampled from them."""

    engine: TransformersEngine
    uniforms: torch.Tensor | None
    said: list[Selected] = field(default_factory=list)
    waiting: torch.Tensor | None = None

    def hook(self, module: torch.nn.Module, positional: Any, named: dict[str, Any], output: Any) -> None:
        """After each forward: the logits at the last position of each row."""
        if self.waiting is not None:
            self._keep(named["input_ids"][:, -1])
        self.waiting = output.logits[:, -1, : self.engine.vocab_size].clone()

    def finish(self, last: torch.Tensor) -> list[Selected]:
        """All steps, now that the last token is known."""
        self._keep(last)
        return self.said

    def _keep(self, labels: torch.Tensor) -> None:
        assert self.waiting is not None, "a forward has been"
        drawn = None if self.uniforms is None else self.uniforms[:, len(self.said)].to(self.waiting.device)
        # A row that has ended goes on with padding, which may lie past the vocabulary; nobody reads what is kept of it.
        labels = labels.clamp(max=self.engine.vocab_size - 1).to(self.waiting.device)
        self.said.append(select(self.waiting, labels, self.engine.targets, drawn))
        self.waiting = None


@contextmanager
def _recording(
    model: PreTrainedModel, engine: TransformersEngine, uniforms: torch.Tensor | None
) -> Iterator[_Recorder]:
    recorder = _Recorder(engine, uniforms)
    handle = model.register_forward_hook(recorder.hook, with_kwargs=True)
    try:
        yield recorder
    finally:
        handle.remove()


def _uniforms(spec: TargetSpec, names: Sequence[int], starts: Sequence[int], steps: int) -> torch.Tensor | None:
    """``[B, steps, num_temperatures, uniforms_per_draw]``: those of the positions that predict the answer, as in a dump."""
    if spec.scheme not in DRAWN:
        return None
    parts = []
    for name, start in zip(names, starts, strict=True):
        positions = np.arange(start + steps) >= start - 1
        parts.append(position_uniforms(spec, name, positions)[:steps])
    return torch.from_numpy(np.stack(parts))


def _seed(seed: int, name: int) -> int:
    """One number of 63 bits from two, well mixed: numpy's SeedSequence."""
    return int(np.random.SeedSequence([seed, name]).generate_state(1, np.uint64)[0]) >> 1


def _stack(steps: list[Selected]) -> Selected:
    """All steps one after the other, ``[steps * B]`` rows, as wide as the widest."""
    width = max(step.token_ids.shape[1] for step in steps)

    def joined(name: str) -> torch.Tensor | None:
        parts = [getattr(step, name) for step in steps]
        if parts[0] is None:
            return None
        if name in ("token_ids", "logprobs", "counts"):
            # Slots past a row's number are never looked at: they repeat its last one.
            parts = [part[:, torch.arange(width, device=part.device).clamp(max=part.shape[1] - 1)] for part in parts]
        return torch.cat(parts)

    return Selected(**{each.name: joined(each.name) for each in fields(Selected)})  # type: ignore[arg-type]


def _take(said: Selected, rows: torch.Tensor) -> Selected:
    parts = {each.name: getattr(said, each.name) for each in fields(Selected)}
    return Selected(**{name: None if part is None else part[rows.to(part.device)] for name, part in parts.items()})  # type: ignore[arg-type]
