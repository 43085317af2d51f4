"""kdcache: offline knowledge distillation of language models.

Phase 1 runs the teacher once and keeps what it said; phase 2 trains students from that. They meet only on disk::

    cli
    dump | train | evaluate     phase 1, phase 2, and what it bought; none imports another
    corpus | models | cache     text to tokens; a model as trunk and head; the disk
    config
    targets                     SparseTargets, and the alignment rule
    errors

Importing this package imports neither torch nor transformers; the names below load on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "BucketTargets": "kdcache.train.objective",
    "CacheReader": "kdcache.cache.reader",
    "CacheRow": "kdcache.cache.reader",
    "KDCacheError": "kdcache.errors",
    "KDTrainer": "kdcache.train.trainer",
    "Objective": "kdcache.train.objective",
    "SparseTargets": "kdcache.targets",
    "TokenSequence": "kdcache.targets",
    "kd_loss": "kdcache.train.head",
    "make_divergence": "kdcache.train.losses",
    "open_cache": "kdcache.cache.reader",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kdcache' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
