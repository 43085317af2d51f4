"""Progress of a long job: a bar on a terminal, a line a minute in a log. Always on stderr, and from the first rank only."""

from __future__ import annotations

import logging
import os
import sys
import time
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)
LOG_SECONDS = 60.0


def launched_rank() -> tuple[int, int]:
    """``(rank, world size)`` under torchrun or srun; ``(0, 1)`` elsewhere."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1


class Progress:
    """Shows how far a job is; says nothing on other ranks than the first.

    Args:
        name: Of the job.
        total: Units of work in all.
        done: Units that were done before this run; time left is estimated without them.
    """

    def __init__(self, name: str, total: float, done: float = 0.0) -> None:
        self.name, self.total, self.before = name, total, done
        self._started = self._logged = time.monotonic()
        self._is_first = launched_rank()[0] == 0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self._is_first and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            columns = (TextColumn(self.name), BarColumn(), TextColumn("{task.fields[line]}"), TimeElapsedColumn())
            self._bar = RichProgress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(self.name, total=self.total, completed=self.before, line="starting")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since this run began."""
        return max(time.monotonic() - self._started, 1e-9)

    def update(self, done: float, line: str) -> None:
        """Say how far it is.

        Args:
            done: Units of work that this run has done.
            line: What else to show; the time left is added.
        """
        if done > 0:
            left = (self.total - self.before - done) * self.seconds / done
            line = f"{line}, {format_seconds(left)} left"
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.before + done, line=line)
        elif self._is_first and now - self._logged >= LOG_SECONDS:
            self._logged = now
            logger.info("%s: %s", self.name, line)


def format_seconds(seconds: float) -> str:
    """``42 s``, ``3 min 20 s``, ``5 h 10 min``."""
    whole = round(max(seconds, 0))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
