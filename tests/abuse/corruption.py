"""What an audit says of a cache that was tampered with, and whether it names the files."""

from __future__ import annotations

from pathlib import Path

from kdcache.cache.store import LocalStore
from kdcache.cache.verify import Audit, verify_cache
from kdcache.errors import KDCacheError


def audited(folder: Path, *, deep: bool = True) -> Audit:
    """What an audit finds; where it cannot begin, why."""
    try:
        return verify_cache(LocalStore(folder), deep=deep)
    except KDCacheError as error:
        return Audit(num_shards=0, problems=[error.message])


def are_named(audit: Audit, *paths: Path) -> bool:
    """Whether an audit says which files of a cache are damaged, a line or more for each, and calls no other shard damaged.

    A shard is named by its number, with the rows of the corpus that are lost with it, a table by its digest, what else there is by its name.
    """
    damaged = {int(path.name[:5]) for path in paths if path.parent.name in ("shards", "commits")}
    return set(audit.damaged) == damaged and all(any(_said(path) in line for line in audit.problems) for path in paths)


def _said(path: Path) -> str:
    names = {"shards": f"shard {path.name[:5]} (rows ", "tables": path.stem, "commits": f"commits/{path.name}"}
    return names.get(path.parent.name, path.name)
