"""What a student's folder says about where it came from: the model card, and the records of its caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdcache.cache.commit import read_commits
from kdcache.cache.reader import CacheReader
from kdcache.train.options import TrainOptions


def describe_cache(reader: CacheReader) -> dict[str, Any]:
    """What a student's record says about where its targets came from, and what they cost."""
    stats = reader.manifest.stats
    return {
        "path": str(reader.store),
        "fingerprint": reader.manifest.fingerprint,
        "teacher": reader.spec.teacher.name,
        "teacher_digest": reader.spec.teacher.digest,
        "dataset": reader.spec.corpus.dataset,
        "num_positions": stats.num_positions,
        "bytes_per_token": round(reader.manifest.num_bytes / max(stats.num_positions, 1), 2),
        "dump_seconds": round(sum(commit.seconds for commit in read_commits(reader.store)), 2),
    }


def model_card(options: TrainOptions, results: dict[str, Any]) -> str:
    """README.md of a student folder."""
    stages = results.get("stages", [results])
    fields = ", ".join(f"{name}={value}" for name, value in options.lora.items())
    trained = f"LoRA on `{options.student}`: {fields}; {results['num_trained_parameters']:,} parameters trained"
    adapters = [("adapters", trained)] if options.lora else []
    rows = [
        *(
            (f"{name}, stage {number}" if len(stages) > 1 else name, value)
            for number, stage in enumerate(stages, start=1)
            for name, value in _rows_of(stage)
        ),
        *adapters,
        *(
            (name.removeprefix("eval_"), f"{results[name]:.4f} (held out)")
            for name in results
            if name.startswith("eval_")
        ),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [knowledge-distillation, kdcache]
---

# {Path(options.output).name}

A student of {results["num_parameters"]:,} parameters, distilled offline with kdcache:
its teacher was run once, and was not present when the student was trained.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{Path(options.output).name}")
tokenizer = AutoTokenizer.from_pretrained("{Path(options.output).name}")
```

The exact options stand in `train-student.yaml`, versions and device in `train-student.provenance.json`.
"""


def _rows_of(stage: dict[str, Any]) -> list[tuple[str, str]]:
    """What a stage was trained on, and for what."""
    cache, objective = stage["cache"], stage["objective"]
    shares = ", ".join(f"{share:g} {name}" for name, share in stage.get("mix", {}).items())
    return [
        ("teacher", f"`{cache['teacher']}` (digest `{cache['teacher_digest'][:12]}`)"),
        ("cache", f"fingerprint `{cache['fingerprint']}`, {cache['num_positions']:,} tokens of `{cache['dataset']}`"),
        (
            "loss",
            f"(1 - alpha) CE + alpha T² {objective['loss']}, alpha = {objective['alpha']}, T = {objective['temperature']}"
            + "".join(f", {name} = {value}" for name, value in objective["loss_args"].items()),
        ),
        *([("mix of tokens", shares)] if shares else []),
        ("steps", f"{stage['steps']:,} ({stage['train_tokens']:,} tokens), seed {stage['seed']}"),
    ]
