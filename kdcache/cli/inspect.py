"""``kdcache inspect``."""

from __future__ import annotations

import json
from typing import Any

import click
import numpy as np

from kdcache.cache.reader import CacheReader, open_cache
from kdcache.specs import TargetSpec


@click.command("inspect")
@click.argument("cache", type=click.Path())
@click.option("--sequence", "index", type=click.INT, default=None, help="Show this sequence token by token.")
@click.option("--top", type=click.IntRange(1, 20), default=4, help="The teacher's first choices to show.  [default: 4]")
@click.option("--positions", type=click.IntRange(min=1), default=40, help="Positions to show.  [default: 40]")
@click.option(
    "--tokenizer",
    default=None,
    help="Model whose tokenizer spells the tokens; by default the teacher's, if it is on this machine.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(cache: str, index: int | None, top: int, positions: int, tokenizer: str | None, as_json: bool) -> None:
    """What is inside a cache: totals, mass captured, entropy; or one sequence with the teacher's choices."""
    reader = open_cache(cache, allow_incomplete=True)
    if index is None:
        about = describe(reader)
        click.echo(json.dumps(about, indent=2) if as_json else _as_lines(about))
        return
    if not -len(reader) <= index < len(reader):
        raise click.BadParameter(f"the cache has {len(reader)} sequences, found {index}", param_hint="--sequence")
    spell = _speller(reader, tokenizer)
    rows = show_sequence(reader, index, top, positions)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        choices = "  ".join(f"{spell(token)} {probability:.1%}" for token, probability in row["choices"])
        probability = f"{row['label_probability']:.1%}"
        click.echo(
            f"{row['position']:>5}  {spell(row['token']):<16} -> {spell(row['label']):<16} {probability:>6}   {choices}"
        )


def describe(reader: CacheReader) -> dict[str, Any]:
    """Totals of a cache."""
    manifest, spec = reader.manifest, reader.spec
    stats, n = manifest.stats, max(manifest.stats.num_targets, 1)
    about: dict[str, Any] = {
        "cache": str(reader.store),
        "fingerprint": manifest.fingerprint,
        "complete": manifest.sealed,
        "shards": f"{len(manifest.shards.shard)} of {spec.num_shards}",
        "teacher": spec.teacher.name,
        "dataset": f"{spec.corpus.dataset}, split {spec.corpus.split}, {spec.corpus.num_rows:,} rows",
        "targets": _spelled_targets(spec.targets),
        "temperatures": list(spec.targets.temperatures),
        "codec": spec.codec.name,
        "vocabulary": spec.teacher.vocab_size,
        "rows": stats.num_rows,
        "rows_skipped": stats.num_rows_skipped,
        "rows_truncated": stats.num_rows_truncated,
        "rows_split": stats.num_rows_split,
        "sequences": stats.num_sequences,
        "tokens": stats.num_positions,
        "targets_stored": stats.num_targets,
        "bytes": manifest.num_bytes,
        "bytes_per_token": round(manifest.num_bytes / max(stats.num_positions, 1), 2),
        "teacher_perplexity": round(float(np.exp(stats.sum_label_nll / n)), 3),
        "teacher_entropy_nats": round(stats.sum_entropy / n, 4),
    }
    if spec.targets.scheme != "hidden":
        about["mass_captured"] = round(1 - stats.sum_tail_mass / n, 4)
        about["entries_per_target"] = round(stats.num_entries / n, 2)
    if stats.num_kl_targets:
        about["codec_error_nats"] = float(f"{stats.sum_codec_kl / stats.num_kl_targets:.1e}")
    return about


def _spelled_targets(targets: TargetSpec) -> str:
    kept = [f"k = {targets.k}"] if targets.k else []
    kept += [f"p = {targets.top_p:g}"] if targets.scheme == "top_p" else []
    kept += [f"{targets.num_draws} draws"] if targets.num_draws else []
    kept += ["counts alone"] if targets.frequencies else []
    return ", ".join([targets.scheme, *kept])


def show_sequence(reader: CacheReader, index: int, top: int, positions: int) -> list[dict[str, Any]]:
    """The first positions of a sequence that have targets: token, label, the label's probability, the teacher's choices."""
    row = reader[index]
    where = np.flatnonzero(row.sequence.target_mask)[:positions]
    offsets = row.targets.offsets
    shown = []
    for n, position in enumerate(where):
        entries = slice(int(offsets[n]), int(offsets[n + 1]))
        best = np.argsort(-row.targets.logprobs[entries])[:top]
        ids, logprobs = row.targets.token_ids[entries][best], row.targets.logprobs[entries][best]
        shown.append(
            {
                "position": int(position),
                "token": int(row.sequence.input_ids[position]),
                "label": int(row.sequence.input_ids[position + 1]),
                "label_probability": float(np.exp(row.targets.label_logprobs[n])),
                "entropy": float(row.targets.entropy[n]),
                "choices": [[int(i), float(np.exp(p))] for i, p in zip(ids, logprobs, strict=True)],
            }
        )
    return shown


def _speller(reader: CacheReader, name: str | None) -> Any:
    """Token id to text; to its number where the tokenizer is not at hand."""
    from kdcache.errors import ModelError
    from kdcache.model_files import find_model, find_named_model
    from kdcache.models import load_tokenizer

    try:
        tokenizer = load_tokenizer(find_model(name) if name else find_named_model(reader.spec.teacher.name))
    except ModelError as error:
        click.echo(f"{error.message}; showing token ids (--tokenizer names another)", err=True)
        return lambda token: f"#{token}"
    return lambda token: repr(tokenizer.decode([token]))


def _as_lines(about: dict[str, Any]) -> str:
    width = max(len(name) for name in about)
    return "\n".join(f"{name.replace('_', ' '):<{width}}  {_spelled(value)}" for name, value in about.items())


def _spelled(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(f"{part:g}" for part in value)
    return f"{value:,}" if isinstance(value, int) else str(value)
