"""The plan of a dump: describe everything that moves a stored number, before the first shard.

What an option leaves open (threads, rows a shard) is decided when the plan is made, and a resume keeps to it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcache.cache.commit import (
    check_is_ours,
    current_manifest,
    publish_by_digest,
    publish_plan,
    read_id_tables,
    read_plan,
)
from kdcache.cache.layout import table_name
from kdcache.cache.manifest import CacheSpec, Manifest, Plan
from kdcache.cache.reader import open_cache
from kdcache.cache.shard import digest
from kdcache.cache.store import Store
from kdcache.config import library_versions
from kdcache.corpus import Rows, mean_answered_tokens, mean_row_tokens
from kdcache.dump.average import describe_averaged
from kdcache.dump.dataset import asked_of_corpus, describe_corpus, open_rows
from kdcache.dump.options import DEFAULT_SHARD_POSITIONS, MIN_SHARDS, DumpOptions
from kdcache.dump.pilot import choose_tables, count_tables
from kdcache.errors import CacheCorruptError, CacheError, CacheMismatchError, ConfigError
from kdcache.model_files import find_model, model_digest
from kdcache.models import describe_model, describe_tokenizer, load_config, load_tokenizer, parse_dtype, pick_device
from kdcache.specs import ComputeSpec, TeacherSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdcache.dump.worker import Worker

logger = logging.getLogger(__name__)

CHUNK_POSITIONS = {"cpu": 1024, "cuda": 4096}


def finished_before(store: Store, options: DumpOptions) -> Manifest | None:
    """The manifest, if the cache is complete and was made with these options; found out without loading anything.

    Raises:
        CacheMismatchError: It is complete, but was made otherwise.
    """
    if not store.exists("plan.json"):
        return None
    manifest = current_manifest(store)
    if not manifest.sealed or not store.exists("manifest.json"):
        return None
    spec = manifest.spec
    targets = options.target_spec(spec.teacher.vocab_size)
    asked: dict[str, Any] = {
        "teacher.digest": model_digest(find_model(options.teacher, options.revision)),
        **{f"corpus.{name}": value for name, value in asked_of_corpus(options).items() if value is not None},
        **{f"targets.{name}": value for name, value in targets.model_dump(mode="json").items()},
        **{f"codec.{name}": value for name, value in options.codec_spec(targets).model_dump(mode="json").items()},
        "teacher.averaged": [a.model_dump() for a in describe_averaged(options.average, spec.tokenizer)],
        "compute.batch_tokens": options.batch_tokens,
    }
    if (options.generation is None) != (spec.generation is None):
        raise CacheMismatchError(
            f"{store} is finished, and was made by kdcache {'dump-teacher' if spec.generation is None else 'generate'}",
            hint="use another --output for a new cache",
        )
    if options.generation is not None:
        asked |= {f"generation.{name}": value for name, value in options.generation.model_dump(mode="json").items()}
    if options.id_tables != "none":
        del asked["codec.id_tables"]  # what they are was counted when the plan was made
    if options.text_column is not None:
        asked["corpus.text_column"] = options.text_column
    if options.attention != "auto":
        asked["teacher.attention"] = options.attention
    if options.dtype != "auto":
        asked["teacher.dtype"] = options.dtype
    if options.threads is not None:
        asked["compute.threads"] = options.threads
    standing = spec.fields()
    differing = [(name, standing.get(name), value) for name, value in asked.items() if standing.get(name) != value]
    if differing:
        lines = "".join(f"\n  {name}: the cache has {old!r}, this run asks for {new!r}" for name, old, new in differing)
        raise CacheMismatchError(
            f"{store} is finished, and was made with other settings:{lines}",
            hint="use another --output for a new cache",
        )
    return manifest


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """A dump as it would be.

    Attributes:
        spec: Without id tables.
        rows: The whole corpus.
        tokenizer: The teacher's.
        num_tokens: Of the corpus, about.
    """

    spec: CacheSpec
    rows: Rows
    tokenizer: PreTrainedTokenizerBase
    num_tokens: float


def make_plan(
    store: Store, options: DumpOptions, load_worker: Callable[[Plan, Rows], Worker] | None = None
) -> tuple[Plan, Rows]:
    """Describe everything that moves the numbers, and publish it or agree with what was published.

    Processes that begin a cache together do not wait for each other: each runs the pilot, which takes the time that it would have
    waited for a peer's, and the tables of the first to publish a plan count, for all.

    Args:
        store: Where the cache is, or will be.
        options: Of the dump.
        load_worker: Loads the teacher where a pilot is needed; without it there is none, and no id tables.
    """
    check_is_ours(store)
    standing = read_plan(store) if store.exists("plan.json") else None
    draft = draft_spec(options, standing)
    spec, rows, num_tokens = draft.spec, draft.rows, draft.num_tokens
    codec = spec.codec
    kind = choose_tables(options, spec.targets, codec, spec.teacher.vocab_size, num_tokens)
    tables = _standing_tables(store, standing, options, kind)
    is_counted = False
    if load_worker and tables is None and kind != "none" and not (standing and standing.spec.codec.id_tables is None):
        data = count_tables(load_worker(_plan(spec), rows), kind, num_tokens).to_bytes()
        standing = read_plan(store) if store.exists("plan.json") else None  # a peer may have been faster
        tables = standing.spec.codec.id_tables if standing else digest(data)
        if tables == digest(data):
            publish_by_digest(store, table_name(tables), data)
        elif tables is not None and not _are_whole(store, tables, spec.teacher.vocab_size):
            raise CacheCorruptError(
                f"{store}: the plan names id tables {tables}, {table_name(tables)} is gone or damaged, and counting them anew gives "
                f"{digest(data)}: no shard could be read",
                hint="go on where the cache was begun (same device, same versions as in plan.json), put a copy of the file back, or "
                "dump anew to another --output",
            )
        is_counted = standing is None

    def planned(tables: str | None) -> Plan:
        return _plan(spec.model_copy(update={"codec": codec.model_copy(update={"id_tables": tables})}))

    try:
        return publish_plan(store, planned(tables)), rows
    except CacheMismatchError:
        if not is_counted:
            raise
        # A peer was faster in this very moment, and on its device other tokens may have been the likely ones.
        return publish_plan(store, planned(read_plan(store).spec.codec.id_tables)), rows


def draft_spec(options: DumpOptions, standing: Plan | None = None) -> Draft:
    """Describe everything that moves the numbers, but the id tables; nothing is written.

    Args:
        options: Of the dump.
        standing: The plan that it goes on with, if there is one.

    Raises:
        KDCacheError: Teacher, dataset or options cannot be used, or not together.
    """
    source = find_model(options.teacher, options.revision)
    config = load_config(source, trust_remote_code=options.trust_remote_code)
    text_config = config.get_text_config()
    tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)
    tokenizer_spec = describe_tokenizer(tokenizer)
    rows = open_rows(options)
    generation = options.generation
    corpus = describe_corpus(options, rows, tokenizer_spec)
    num_parameters, attention = describe_model(source, config, options.attention)
    _check_context(corpus.seq_len, text_config)
    device = pick_device(options.device)
    vocab_size = min(text_config.vocab_size, tokenizer_spec.num_tokens)
    targets = options.target_spec(vocab_size)
    if targets.scheme == "hybrid" and targets.k == vocab_size:
        raise ConfigError(f"--top-k {options.top_k} keeps the whole vocabulary: nothing is left to draw from")
    if targets.k and options.top_k > vocab_size:
        logger.info(
            "--top-k %d is more than the vocabulary: every one of its %d tokens is kept", options.top_k, vocab_size
        )
    codec = options.codec_spec(targets)
    tokens_per_row = (
        mean_answered_tokens(rows, corpus, generation, tokenizer)
        if generation
        else mean_row_tokens(rows, corpus, tokenizer)
    )
    spec = CacheSpec(
        teacher=TeacherSpec(
            name=options.teacher,
            digest=model_digest(source),
            dtype=str(parse_dtype(options.dtype, text_config)).removeprefix("torch."),
            attention=attention,
            vocab_size=vocab_size,
            hidden_size=text_config.hidden_size,
            num_parameters=num_parameters,
            averaged=describe_averaged(options.average, tokenizer_spec),
        ),
        tokenizer=tokenizer_spec,
        corpus=corpus,
        targets=targets,
        codec=codec,
        compute=ComputeSpec(
            device=device.split(":")[0],
            threads=options.threads or (standing.spec.compute.threads if standing else _threads(options, device)),
            batch_tokens=options.batch_tokens,
            chunk_positions=CHUNK_POSITIONS.get(device.split(":")[0], 4096),
        ),
        rows_per_shard=_rows_of_others(standing, options) or _rows_per_shard(options, rows, tokens_per_row),
        generation=generation,
    )
    logger.info(
        "%d rows (%s) in %d shards; teacher %s, %s",
        len(rows),
        corpus.columns,
        spec.num_shards,
        options.teacher,
        spec.teacher.dtype,
    )
    return Draft(spec, rows, tokenizer, tokens_per_row * len(rows))


def _plan(spec: CacheSpec) -> Plan:
    return Plan(spec=spec, fingerprint=spec.fingerprint, environment=library_versions())


def _standing_tables(store: Store, standing: Plan | None, options: DumpOptions, kind: str) -> str | None:
    """Digest of the tables that the plan names, if they are there and nobody asks for something else.

    Raises:
        CacheMismatchError: The cache was begun without.
    """
    named = standing.spec.codec.id_tables if standing else None
    if standing and named is None and options.id_tables in ("global", "context"):
        raise CacheMismatchError(
            f"{store} was begun without id tables, this run asks for --id-tables {options.id_tables}",
            hint="leave the option out to go on with it, or use another --output",
        )
    if named is None or (kind == "none" and options.id_tables == "none"):
        return None
    assert standing is not None, "it names them"
    if not _are_whole(store, named, standing.spec.teacher.vocab_size):
        logger.warning("the id tables of %s are gone or damaged; counting them anew", store)
        return None
    return named


def _are_whole(store: Store, tables: str, vocab_size: int) -> bool:
    try:
        read_id_tables(store, tables, vocab_size)
    except CacheError:
        return False
    return True


def _rows_of_others(standing: Plan | None, options: DumpOptions) -> int | None:
    """Rows a shard of the plan that stands, or of a teacher to be averaged in: packing ends where a shard ends."""
    if options.shard_positions is not None:
        return None
    specs = [standing.spec] if standing else [open_cache(path).spec for path in options.average]
    return specs[0].rows_per_shard if specs else None


def _rows_per_shard(options: DumpOptions, rows: Rows, tokens_per_row: float) -> int:
    """As many rows as give a shard's worth of positions; small corpora still get a few shards, to resume between."""
    if tokens_per_row == 0:
        raise ConfigError(
            f"dataset {options.dataset}: no row of the pilot has anything to learn",
            hint="look at its rows and --text-column",
        )
    positions = options.shard_positions or min(DEFAULT_SHARD_POSITIONS, tokens_per_row * len(rows) / MIN_SHARDS)
    return max(1, min(len(rows), round(positions / tokens_per_row)))


def _threads(options: DumpOptions, device: str) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // options.workers) if device == "cpu" else 1


def _check_context(seq_len: int, text_config: Any) -> None:
    context = getattr(text_config, "max_position_embeddings", None)
    if context is not None and seq_len > context:
        raise ConfigError(
            f"--seq-len {seq_len} is longer than the teacher's context of {context} tokens",
            hint=f"--seq-len {context}",
        )


def warn_about_versions(plan: Plan) -> None:
    """Say so when a resume runs under other library versions than the dump began with."""
    now = library_versions()
    changed = [f"{name} {old} -> {now.get(name)}" for name, old in plan.environment.items() if now.get(name) != old]
    if changed:
        logger.warning(
            "the cache was begun under other versions (%s); its last bits may differ from an uninterrupted dump",
            ", ".join(changed),
        )
