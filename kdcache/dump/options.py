"""Options of ``kdcache dump-teacher``: one place for names, defaults and meaning."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from kdcache.cache.quality import describe_codec
from kdcache.config import Options, Temperatures, WeightedPaths
from kdcache.specs import DRAWN, CodecSpec, GenerationSpec, Scheme, TargetSpec

DEFAULT_SHARD_POSITIONS = 65_536
MIN_SHARDS = 16


class DumpOptions(Options):
    """What a dump does. None means: decided by the plan, and then kept by it."""

    command: ClassVar[str] = "dump-teacher"

    teacher: Annotated[
        str,
        Field(
            description="Hub name, model folder, .gguf file, or package:NAME for a model that ships in a Python package."
        ),
    ]
    dataset: Annotated[
        str,
        Field(
            description="Hub name, save_to_disk folder, file, folder or glob (jsonl, parquet, csv, txt; .gz, .zst), or builtin:python-reference; "
            "or a cache, folder or URL, whose very tokens are read."
        ),
    ]
    output: Annotated[str, Field(description="Folder of the cache.")]
    split: Annotated[str, Field(description="Split with an optional slice: train, train[:90%], test[100:200].")] = (
        "train"
    )
    dataset_config: Annotated[str | None, Field(description="Configuration of a hub dataset.")] = None
    text_column: Annotated[str | None, Field(description="Column that holds the text, if it is not called text.")] = (
        None
    )
    revision: Annotated[str | None, Field(description="Revision of the teacher on the hub.")] = None
    trust_remote_code: Annotated[bool, Field(description="Run code that ships with the teacher.")] = False

    seq_len: Annotated[int, Field(ge=2, description="Longest sequence, in tokens.")] = 1024
    packing: Annotated[
        bool,
        Field(
            description="Pack documents into sequences, isolated from each other; without it, one document a sequence."
        ),
    ] = True
    append_eos: Annotated[bool, Field(description="End every text with the end-of-sequence token.")] = True
    assistant_only: Annotated[
        bool, Field(description="Of chats and completions, keep targets only for what the assistant says.")
    ] = True

    targets: Annotated[
        Scheme,
        Field(
            description="top_k and top_p keep the most probable tokens and the mass of the rest; sampled, systematic and hybrid "
            "draw at random, unbiased; hidden keeps the last hidden state, which is lossless."
        ),
    ] = "top_k"
    top_k: Annotated[
        int,
        Field(ge=1, description="Entries kept at a position: all (top_k), at most (top_p), besides draws (hybrid)."),
    ] = 64
    top_p: Annotated[float, Field(gt=0, le=1, description="Mass at which top_p stops.")] = 0.95
    num_draws: Annotated[
        int, Field(ge=1, lt=1 << 16, description="Draws a position and temperature (sampled, systematic, hybrid).")
    ] = 50
    target_seed: Annotated[int, Field(ge=0, lt=1 << 63, description="Of the draws.")] = 0
    entry_logprobs: Annotated[
        bool | None,
        Field(
            description="Of sampled and systematic: keep the teacher's logprob of each drawn token besides how often it was drawn, for losses "
            "other than forward_kl.  [default: off at T = 1, on at several temperatures]"
        ),
    ] = None
    temperatures: Annotated[
        Temperatures | None,
        Field(description="Temperatures at which students may train.  [default: 1,2,4; 1 where entries are drawn]"),
    ] = None
    average: Annotated[
        WeightedPaths,
        Field(
            default_factory=dict,
            description="Average the logits of another teacher in, from its hidden cache; the rest of the weight is this "
            "teacher's. Can be given again.",
        ),
    ]
    codec: Annotated[
        Literal["packed", "exact"], Field(description="packed is small, with a declared error; exact is float32.")
    ] = "packed"
    quality: Annotated[
        Literal["high", "standard", "small"],
        Field(
            description="Of packed: KL(said ‖ stored) of 1e-4, 1e-3, 1e-2 nats a position at most; measured while dumping."
        ),
    ] = "standard"
    id_tables: Annotated[
        Literal["auto", "none", "global", "context"],
        Field(
            description="Of packed: renumber token ids by frequency (global) or by the token before (context), counted on a pilot; auto "
            "decides by the size of the corpus."
        ),
    ] = "auto"

    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(description="Of the teacher; auto is what its config says."),
    ] = "auto"
    attention: Annotated[
        str, Field(description="attn_implementation of transformers; auto is what it takes for the model.")
    ] = "auto"
    device: Annotated[str, Field(description="auto, cpu, cuda, cuda:1 ...")] = "auto"
    device_map: Annotated[str | None, Field(description="Spread a teacher larger than one GPU: auto, balanced ...")] = (
        None
    )
    batch_tokens: Annotated[
        int,
        Field(ge=1, description="Tokens of a forward pass, padding included; halved by itself when memory runs out."),
    ] = 8192
    threads: Annotated[
        Annotated[int, Field(ge=1)] | None, Field(description="Threads of a worker on a CPU; part of the plan.")
    ] = None
    workers: Annotated[int, Field(ge=1, le=1024, description="Processes: one a GPU, or so many on the CPU.")] = 1
    shard_positions: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(description="Tokens of a shard, about; by default 65,536, or less for a small corpus."),
    ] = None

    @model_validator(mode="after")
    def _averages(self) -> Self:
        if self.average and self.targets == "hidden":
            raise ValueError("hidden states of two teachers cannot be averaged; --average needs another --targets")
        if sum(self.average.values()) >= 1:
            raise ValueError("weights of --average are together below 1: the rest is this teacher's")
        return self

    @model_validator(mode="after")
    def _frequencies(self) -> Self:
        alone = self.targets in ("sampled", "systematic") and self.temperatures in (None, (1.0,))
        if self.entry_logprobs is False and self.targets in DRAWN and not alone:
            raise ValueError(
                "only sampled and systematic targets at T = 1 can do without logprobs; leave --no-entry-logprobs out"
            )
        return self

    @property
    def generation(self) -> GenerationSpec | None:
        """How the teacher writes the text itself, if it does."""
        return None

    def target_spec(self, vocab_size: int) -> TargetSpec:
        """The target scheme over a vocabulary; options that the scheme does not use count for nothing."""
        drawn = self.targets in DRAWN
        temperatures = self.temperatures or ((1.0,) if drawn else (1.0, 2.0, 4.0))
        spec = TargetSpec(
            scheme=self.targets,
            k=min(self.top_k, vocab_size) if self.targets in ("top_k", "top_p", "hybrid") else 0,
            temperatures=temperatures,
            top_p=self.top_p if self.targets == "top_p" else 1.0,
            num_draws=self.num_draws if drawn else 0,
            seed=self.target_seed if drawn else 0,
        )
        return spec.model_copy(update={"frequencies": spec.can_be_frequencies and not self.entry_logprobs})

    def codec_spec(self, targets: TargetSpec) -> CodecSpec:
        """How targets of a scheme are stored."""
        return describe_codec("exact" if targets.scheme == "hidden" else self.codec, self.quality, targets.max_entries)


class GenerateOptions(DumpOptions):
    """What ``kdcache generate`` does: the options of a dump, and those of sampling."""

    command: ClassVar[str] = "generate"
    # A dump's options that say nothing about answers.
    WITHOUT: ClassVar[tuple[str, ...]] = ("packing", "append_eos", "assistant_only", "average", "id_tables")

    dataset: Annotated[
        str,
        Field(description="Prompts: what dump-teacher takes, with a column prompt (text or a chat), messages or text."),
    ]
    packing: bool = False
    id_tables: Literal["auto", "none"] = "none"
    seq_len: Annotated[int, Field(ge=2, description="Longest prompt and answer together, in tokens.")] = 1024
    max_new_tokens: Annotated[int, Field(ge=1, description="Longest answer, in tokens.")] = 256
    sample_temperature: Annotated[
        float,
        Field(
            ge=0, description="Temperature of sampling; 0 takes the most probable token. Targets do not depend on it."
        ),
    ] = 1.0
    sample_top_p: Annotated[float, Field(gt=0, le=1, description="Sample from the tokens that hold this mass.")] = 1.0
    sample_top_k: Annotated[int, Field(ge=0, description="Sample from so many tokens; 0 for all.")] = 0
    repetition_penalty: Annotated[float, Field(gt=0, description="As in transformers; 1 for none.")] = 1.0
    sample_seed: Annotated[int, Field(ge=0, lt=1 << 63, description="Of sampling.")] = 0
    num_answers: Annotated[int, Field(ge=1, description="Answers to each prompt.")] = 1
    chat: Annotated[
        bool, Field(description="A prompt of plain text is what a user says: put it through the chat template.")
    ] = False
    system: Annotated[str | None, Field(description="What the system says before every chat.")] = None
    min_tokens: Annotated[
        int, Field(ge=0, description="Drop answers of fewer tokens, their end not counted; 0 keeps empty ones.")
    ] = 1
    max_repetition: Annotated[
        float, Field(ge=0, le=1, description="Drop answers of whose 4-grams a larger share has been there before.")
    ] = 1.0
    keep_unfinished: Annotated[bool, Field(description="Keep answers that were cut off at their longest.")] = True
    keep_duplicates: Annotated[
        bool, Field(description="Keep an answer that the same shard holds already, to the same prompt.")
    ] = False
    answers: Annotated[
        str | None, Field(description="File for prompts and answers as text (jsonl).  [default: OUTPUT/answers.jsonl]")
    ] = None

    @model_validator(mode="after")
    def _one_pass(self) -> Self:
        if self.targets == "hidden":
            raise ValueError(
                "hidden states are not kept while a teacher writes; dump the answers with --targets hidden"
            )
        if self.packing or self.average:
            raise ValueError("answers are neither packed nor averaged; dump them as a dataset for that")
        return self

    @property
    def generation(self) -> GenerationSpec:
        """How the teacher writes."""
        return GenerationSpec(
            max_new_tokens=self.max_new_tokens,
            temperature=self.sample_temperature,
            top_p=self.sample_top_p,
            top_k=self.sample_top_k,
            repetition_penalty=self.repetition_penalty,
            seed=self.sample_seed,
            num_answers=self.num_answers,
            chat=self.chat,
            system=self.system,
            min_tokens=self.min_tokens,
            max_repetition=self.max_repetition,
            keep_unfinished=self.keep_unfinished,
            keep_duplicates=self.keep_duplicates,
        )
