"""How much memory does a piece of work take beyond what stood before it, and how long? On Linux and on CUDA.

On a CPU each form has a fresh process, because an allocator keeps what it once had; on a GPU torch counts.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock time of ``run``, until the GPU is done too."""
    _wait()
    started = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _status(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


def peak_growth(run: Callable[[], object]) -> int:
    """Bytes of memory at the peak of ``run`` beyond those before it: the GPU's where there is one, else resident."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    run()
    return _status("VmHWM") - before


def peaks(forms: Mapping[str, Callable[[], object]], script: str, arguments: list[str]) -> dict[str, int]:
    """Bytes that each form takes: in this process on a GPU, else by ``script --memory-of FORM`` in one of its own, as printed."""
    if torch.cuda.is_available():
        return {form: peak_growth(run) for form, run in forms.items()}
    found = {}
    for form in forms:
        command = [sys.executable, script, "--memory-of", form, *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[form] = int(done.stdout.strip().splitlines()[-1])
    return found
