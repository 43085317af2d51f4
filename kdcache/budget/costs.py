"""From how many student runs on a cache is cheaper than distilling live."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Costs:
    """Dump once and train n students from the cache, against the teacher beside every one of n students.

    With D for the dump, t for the teacher's forward pass over the tokens of one student run (all epochs), s for the student's own work in
    that run, n runs take ``D + n s`` from a cache and ``n (s + t)`` live: cached is cheaper once ``n > D / t``. s stands on both
    sides and cancels. That favours live distillation: its step also makes the loss over the whole vocabulary, and the two models
    share one device's memory; neither is counted.

    Attributes:
        dump: D, in seconds of one device.
        teacher_a_run: t.
        student_a_run: s, or None where nobody measured it.
    """

    dump: float
    teacher_a_run: float
    student_a_run: float | None = None

    def cached(self, num_runs: int) -> float:
        """Dump and n runs from the cache."""
        return self.dump + num_runs * (self.student_a_run or 0.0)

    def live(self, num_runs: int) -> float:
        """N runs with the teacher beside each."""
        return num_runs * ((self.student_a_run or 0.0) + self.teacher_a_run)

    @property
    def break_even(self) -> int:
        """The smallest number of runs for which the cache is cheaper."""
        return math.floor(self.dump / self.teacher_a_run) + 1

    def words(self) -> str:
        """The formula, with its numbers."""
        return (
            f"A dump takes {hours(self.dump)} once; distilling live, the teacher reads all that a student reads, in every run anew, {hours(self.teacher_a_run)} a "
            f"run. n runs are cheaper from the cache once n is above {hours(self.dump)} / {hours(self.teacher_a_run)} = "
            f"{self.dump / self.teacher_a_run:.2f}: from run {self.break_even} on. What the student itself takes is the same either way and cancels."
        )


def hours(seconds: float) -> str:
    """``12 s``, ``4.2 min``, ``3.1 h``, ``1,240 h``."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 360_000 else f"{seconds / 3600:,.0f} h"


def size(num_bytes: float) -> str:
    """``812 B``, ``4.2 MB``, ``1.30 TB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} PB"


def check_disk(output: str, total_bytes: dict[str, int]) -> list[str]:
    """What there is to say where the disk of a folder is too small for the first of some schemes; nothing of an object store.

    Args:
        output: Folder of the cache, which need not be there.
        total_bytes: Of each scheme, the chosen one first.
    """
    if "://" in output:
        return []
    folder = Path(output).expanduser().absolute()
    while not folder.is_dir():
        folder = folder.parent
    free, needed = shutil.disk_usage(folder).free, next(iter(total_bytes.values()))
    if needed <= free:
        return []
    fitting = [name for name, number in total_bytes.items() if number <= free]
    return [
        f"the cache takes {size(needed)}, and {folder} has {size(free)} left"
        + (f"; {', '.join(fitting)} would fit" if fitting else "; none of these schemes fits")
    ]
