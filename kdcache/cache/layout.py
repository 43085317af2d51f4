"""Where each file of a cache stands. Names are made from numbers and digests here, and never taken from a file."""

from __future__ import annotations

import re

PLAN, MANIFEST = "plan.json", "manifest.json"
COMMITS, SHARDS, LEASES, TABLES, RUNS = "commits", "shards", "leases", "tables", "runs"
TEMPORARY = "tmp"
# A file in there, or a part of a copy, that is so old is nobody's any more, whatever host wrote it.
ABANDONED_SECONDS = 86_400.0
_NUMBERED = re.compile(r"(\d{5,10})\.json")
_SHARD_NAME = re.compile(r"(\d{5,10})-[0-9a-f]{32}\.arrow")
_TABLE_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")


def commit_name(shard: int) -> str:
    """Where the commit of a shard stands."""
    return f"{COMMITS}/{shard:05d}.json"


def lease_name(shard: int) -> str:
    """Where the lease of a shard stands."""
    return f"{LEASES}/{shard:05d}.json"


def parse_number(name: str) -> int | None:
    """The shard that a file in ``commits/`` or ``leases/`` is of, or None where the name is not one of ours."""
    match = _NUMBERED.fullmatch(name)
    return int(match[1]) if match and name == f"{int(match[1]):05d}.json" else None


def parse_misspelt(name: str) -> int | None:
    """The shard that a file in ``commits/`` names otherwise than we do, with more zeros; None for every other name."""
    match = _NUMBERED.fullmatch(name)
    return int(match[1]) if match and parse_number(name) is None else None


def shard_name(shard: int, shard_digest: str) -> str:
    """Where a shard of these bytes stands."""
    return f"{SHARDS}/{shard:05d}-{shard_digest}.arrow"


def parse_shard_name(name: str) -> int | None:
    """The shard that a file in ``shards/`` is of, or None where the name is not one of ours."""
    match = _SHARD_NAME.fullmatch(name)
    return int(match[1]) if match and match[1] == f"{int(match[1]):05d}" else None


def is_table_name(name: str) -> bool:
    """Whether a file in ``tables/`` has a name of ours."""
    return _TABLE_NAME.fullmatch(name) is not None


def table_name(table_digest: str) -> str:
    """Where a table of these bytes stands: id tables, or the teacher's output head."""
    return f"{TABLES}/{table_digest}.safetensors"
