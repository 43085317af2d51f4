"""What a dump reads: the rows of a dataset, or the very sequences of another cache.

A second teacher over the text of a first, or a teacher that judges what a student wrote, must see token for token what is there: text
that is written out and read in again may be cut into other tokens. So a cache is a dataset too. Its sequences stay whole, keep their
loss mask and their content hash, and are found again by it (several teachers, on-policy rounds).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from kdcache.cache.layout import PLAN
from kdcache.cache.reader import CacheReader, open_cache
from kdcache.cache.store import open_store
from kdcache.corpus import TOKEN_COLUMNS, Rows
from kdcache.errors import CacheMismatchError, CorpusError
from kdcache.rows import Columns, detect_columns, load_rows, prompt_column, source_digest
from kdcache.specs import CorpusSpec, TokenizerSpec

if TYPE_CHECKING:
    from kdcache.dump.options import DumpOptions


@dataclass(frozen=True, slots=True, eq=False)
class CacheRows:
    """The sequences of a cache, as rows with the columns ``input_ids``, ``loss_mask``, ``document_starts``."""

    reader: CacheReader

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        return list(TOKEN_COLUMNS)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> dict[str, np.ndarray[Any, Any]]:
        sequence = self.reader.tokens(index)
        return {name: getattr(sequence, name) for name in TOKEN_COLUMNS}


def open_rows(options: DumpOptions) -> Rows:
    """The rows that the options name.

    Raises:
        CorpusError: There are none, or a split of a cache was asked for.
        CacheIncompleteError: The cache is still being made.
    """
    if not is_cache(options.dataset):
        return cast(Rows, load_rows(options.dataset, options.split, config_name=options.dataset_config))
    if options.split != "train":
        raise CorpusError(
            f"dataset {options.dataset} is a cache, which has no splits; found --split {options.split}",
            hint="leave --split out: all its sequences are read",
        )
    rows = CacheRows(open_cache(options.dataset))
    if not len(rows):
        raise CorpusError(f"dataset {options.dataset}: the cache holds no sequences")
    return rows


def is_cache(dataset: str) -> bool:
    """Whether a dataset is a cache: a folder, or a URL where one lies.

    Raises:
        StoreError: That cannot be found out.
    """
    return open_store(dataset).exists(PLAN)


def describe_corpus(options: DumpOptions, rows: Rows, tokenizer: TokenizerSpec) -> CorpusSpec:
    """Rows and how they become sequences.

    Raises:
        CorpusError: Columns that are not known.
        CacheMismatchError: The sequences of the cache are made of another vocabulary's tokens.
    """
    if isinstance(rows, CacheRows):
        columns: Columns = "tokens"
        text_column = TOKEN_COLUMNS[0]
        if options.generation:
            columns, text_column = prompt_column(rows.column_names)
        if rows.reader.spec.tokenizer.vocab_digest != tokenizer.vocab_digest:
            raise CacheMismatchError(
                f"{options.dataset} holds token ids of another vocabulary ({rows.reader.spec.tokenizer.vocab_digest[:12]}) than the "
                f"teacher's ({tokenizer.vocab_digest[:12]})",
                hint="only a teacher with the same tokenizer can read the sequences of a cache; dump its dataset instead",
            )
    else:
        detect = prompt_column if options.generation else detect_columns
        columns, text_column = detect(rows.column_names, options.text_column)
    return CorpusSpec(
        dataset=options.dataset,
        num_rows=len(rows),
        columns=columns,
        text_column=text_column,
        **asked_of_corpus(options),
    )


def asked_of_corpus(options: DumpOptions) -> dict[str, Any]:
    """The fields of the corpus that options decide, or the cache that they name."""
    asked: dict[str, Any] = {
        "split": options.split,
        "seq_len": options.seq_len,
        "packing": options.packing,
        "append_eos": options.append_eos,
        "assistant_only": options.assistant_only,
    }
    if not is_cache(options.dataset):
        return asked | {"digest": source_digest(options.dataset, options.split, options.dataset_config)}
    manifest = open_cache(options.dataset).manifest
    spec = manifest.spec
    return asked | {
        "digest": manifest.content_digest,
        "written_by": spec.teacher.digest if spec.generation else spec.corpus.written_by,
        **{name: getattr(spec.corpus, name) for name in ("seq_len", "packing", "append_eos", "assistant_only")},
    }
