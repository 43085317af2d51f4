"""Where proofs and benchmarks leave what they measured: one dated Markdown file each, with command and versions; ``_cuda`` where there was a GPU."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from kdcache.config import library_versions

RESULTS = Path(__file__).parent / "results"


def write(name: str, title: str, rows: list[tuple[str, object]], notes: str = "") -> Path:
    """Write ``results/<name>_<date>.md`` and print the table."""
    width = max(len(key) for key, _ in rows)
    print("\n".join(f"{key:<{width}}  {value}" for key, value in rows))
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    return _save(name, title, f"| | |\n|---|---|\n{table}\n\n{notes}")


def spelled(dataset: str) -> str:
    """A dataset's name without the folders of this machine."""
    return dataset if dataset.startswith("builtin:") else Path(dataset).name


def command() -> str:
    """The command line of this process, as from the root of the repository; files and folders of this machine by their names alone."""
    script, *words = sys.argv
    parts = [word.rpartition("=") for word in words]  # --option=value too
    named = [f"{name}{equals}{Path(value).name if _is_path(value) else value}" for name, equals, value in parts]
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *named])


def _is_path(word: str) -> bool:
    return Path(word).is_absolute() or ("/" in word and Path(word).exists())


def write_text(name: str, title: str, body: str) -> Path:
    """The same for a body that is Markdown already."""
    print(body)
    return _save(name, title, body + "\n")


def _save(name: str, title: str, body: str) -> Path:
    versions = ", ".join(
        f"{package} {version}" for package, version in {**library_versions(), **_compiler(), **_commit()}.items()
    )
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
    if torch.cuda.is_available():
        name, machine = f"{name}_cuda", f"{torch.cuda.get_device_name()}, {machine}"
    path = RESULTS / f"{name}_{datetime.now(UTC):%Y-%m-%d}.md"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(f"# {title}\n\n{body.rstrip()}\n\nCommand: `{command()}`\n\n{machine}; {versions}.\n")
    return path


def _compiler() -> dict[str, str]:
    """numba moves times and no number."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return {"numba": importlib.metadata.version("numba")}
    return {"numba": "not installed"}


def _commit() -> dict[str, str]:
    """Of the code, where it is known; with a plus where files were changed since."""
    if shutil.which("git") is None:
        return {}
    said = [
        subprocess.run(["git", *words], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
        for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--", "../kdcache"))
    ]
    if any(one.returncode for one in said):
        return {}
    return {"commit": said[0].stdout.strip() + ("+" if said[1].stdout.strip() else "")}
