"""The rows of a dataset, wherever it is, and what their columns hold. Reading is datasets' own; errors say what was expected."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import xxhash

from kdcache.errors import CorpusError

if TYPE_CHECKING:
    from datasets import Dataset

BUILTIN = "builtin:python-reference"
READERS = {
    ".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text",
}  # fmt: skip
COMPRESSION = (".gz", ".zst", ".bz2", ".xz")
Columns = Literal["text", "prompt_completion", "messages", "prompt", "tokens"]


def load_rows(dataset: str, split: str, *, config_name: str | None = None) -> Dataset:
    """The rows of a dataset.

    Args:
        dataset: Hub name; folder of ``save_to_disk``; file (jsonl, parquet, csv, txt, also .gz and .zst), folder or glob
            of such files; or ``builtin:python-reference``, prose that ships with Python.
        split: A split with an optional slice, as in ``datasets``: ``train``, ``train[:90%]``, ``test[100:200]``.
        config_name: Configuration of a hub dataset.

    Raises:
        CorpusError: There is no such dataset or split, or it has no rows.
    """
    import datasets

    with _reading(dataset):
        if dataset == BUILTIN:
            rows = _take_split(datasets.Dataset.from_list(_python_reference()), split)
        elif (Path(dataset) / "state.json").is_file() or (Path(dataset) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(dataset)
            rows = _take_split(loaded, split)
        elif files := local_files(dataset):
            rows = datasets.load_dataset(
                _reader_of(dataset, files), data_files={_split_name(split): files}, split=split
            )
        elif Path(dataset).exists():
            raise CorpusError(f"dataset {dataset}: no files of a known kind", hint=f"known are {', '.join(READERS)}")
        elif "://" in dataset:
            raise CorpusError(
                f"dataset {dataset}: no cache lies there", hint="files are read from a disk; of URLs, caches alone"
            )
        elif dataset.startswith((".", "/", "~")) or dataset.count("/") > 1 or _reader(dataset):
            raise CorpusError(f"dataset {dataset}: no such file or folder")
        else:
            rows = datasets.load_dataset(dataset, config_name, split=split)
    if not len(rows):
        raise CorpusError(f"dataset {dataset}, split {split}: no rows")
    return rows


def source_digest(dataset: str, split: str, config_name: str | None = None) -> str:
    """Digest of what rows come from: bytes of local files, text of the builtin, or the fingerprint that datasets keeps."""
    state = xxhash.xxh3_128()
    if dataset == BUILTIN:
        for row in _python_reference():
            state.update(row["text"].encode())
    elif Path(dataset).is_dir() or local_files(dataset):
        folder = Path(dataset)
        files = [str(p) for p in sorted(folder.rglob("*.arrow"))] if folder.is_dir() else []
        for file in files or local_files(dataset):
            state.update(Path(file).name.encode())
            with open(file, "rb") as stream:
                while block := stream.read(16 << 20):
                    state.update(block)
    else:
        state.update(str(load_rows(dataset, split, config_name=config_name)._fingerprint).encode())
    return state.hexdigest()


def local_files(dataset: str) -> list[str]:
    """Files of a known kind that a path, folder or glob names, sorted; empty for a hub name."""
    path = Path(dataset).expanduser()
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        return [str(p) for p in sorted(path.rglob("*")) if p.is_file() and _reader(p.name)]
    if any(mark in dataset for mark in "*?["):
        anchor = Path(path.anchor) if path.is_absolute() else Path()
        return [str(p) for p in sorted(anchor.glob(str(path.relative_to(path.anchor) if path.anchor else path)))]
    return []


def detect_columns(names: Iterable[str], text_column: str | None = None) -> tuple[Columns, str]:
    """What the rows hold, from column names; the text column's name.

    Raises:
        CorpusError: No known combination of columns.
    """
    have = set(names)
    if text_column is not None:
        if text_column not in have:
            raise CorpusError(f"column {text_column!r} was asked for, the dataset has {sorted(have)}")
        return "text", text_column
    if "messages" in have:
        return "messages", "messages"
    if {"prompt", "completion"} <= have:
        return "prompt_completion", "completion"
    if "text" in have:
        return "text", "text"
    raise CorpusError(
        f"columns text, or prompt and completion, or messages were expected, found {sorted(have)}",
        hint="rename a column, or name the text with --text-column",
    )


def prompt_column(names: Iterable[str], text_column: str | None = None) -> tuple[Columns, str]:
    """Which column of the rows holds prompts: ``prompt``, or chats, whose last answer is left out, or text to go on with.

    Raises:
        CorpusError: None does.
    """
    have = set(names)
    for column in (text_column,) if text_column is not None else ("prompt", "messages", "text"):
        if column in have:
            return "prompt", column
    raise CorpusError(
        f"a column prompt, messages or text was expected, found {sorted(have)}",
        hint="rename a column, or name the prompts with --text-column",
    )


def _python_reference() -> list[dict[str, str]]:
    """The Python language reference, topic by topic: about 465 kB of prose that needs no download."""
    from pydoc_data.topics import topics

    return [{"text": topics[name]} for name in sorted(topics)]


def _take_split(loaded: Any, split: str) -> Dataset:
    import datasets

    splits = loaded if isinstance(loaded, dict) else {_split_name(split): loaded}
    if _split_name(split) not in splits:
        raise CorpusError(f"split {_split_name(split)!r} was asked for, the dataset has {sorted(splits)}")
    sizes = {name: len(rows) for name, rows in splits.items()}
    parts = []
    for part in datasets.ReadInstruction.from_spec(split).to_absolute(sizes):
        stop = sizes[part.splitname] if part.to is None else part.to
        parts.append(splits[part.splitname].select(range(part.from_ or 0, stop)))
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _split_name(split: str) -> str:
    return split.split("[")[0].split("+")[0] or "train"


def _reader(name: str) -> str | None:
    suffixes = [s for s in Path(name).suffixes if s not in COMPRESSION]
    return READERS.get(suffixes[-1]) if suffixes else None


def _reader_of(dataset: str, files: Sequence[str]) -> str:
    kinds = {_reader(Path(file).name) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise CorpusError(
            f"dataset {dataset}: files of one known kind were expected, found {sorted({Path(f).suffix for f in files})}",
            hint=f"known are {', '.join(READERS)}, each also with .gz or .zst",
        )
    return str(kinds.pop())


@contextmanager
def _reading(dataset: str) -> Iterator[None]:
    """Turn what datasets raises for data it cannot read into a CorpusError."""
    import datasets
    import pyarrow as pa

    bars_were_on = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    except (
        FileNotFoundError, ConnectionError, datasets.exceptions.DatasetsError, datasets.exceptions.DatasetGenerationError,
        pa.ArrowInvalid, ValueError, AssertionError, StopIteration,
    ) as error:  # fmt: skip
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        # What releases of datasets make of a file without a line.
        if isinstance(cause, StopIteration) or "at least one example" in str(cause):
            raise CorpusError(f"dataset {dataset}: no rows") from error
        first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise CorpusError(f"dataset {dataset}: cannot be read: {first}") from error
    finally:
        if bars_were_on:
            datasets.enable_progress_bars()
