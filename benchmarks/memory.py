"""How much memory does a piece of work take beyond what stood before it? Linux, one fresh process for each form."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def _status(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


def peak_growth(run: Callable[[], None]) -> int:
    """Bytes of resident memory at the peak of ``run`` beyond those before it."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    run()
    return _status("VmHWM") - before


def of_forms(script: str, forms: list[str], arguments: list[str]) -> dict[str, int]:
    """Run ``script --memory-of FORM`` for each form, each in its own process; bytes as it prints them."""
    found = {}
    for form in forms:
        command = [sys.executable, script, "--memory-of", form, *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[form] = int(done.stdout.strip().splitlines()[-1])
    return found
