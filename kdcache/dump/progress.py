"""Progress of a dump: a bar on a terminal, a line a minute in a log. Always on stderr."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)
LOG_SECONDS = 60.0


@dataclass(slots=True)
class DumpProgress:
    """Shards done of shards planned, tokens a second, time left. Fed with totals, so several workers can share it.

    Attributes:
        num_shards: Shards planned.
        num_done: Shards that were committed before this run.
    """

    num_shards: int
    num_done: int
    _started: float = field(default_factory=time.monotonic)
    _logged: float = field(default_factory=time.monotonic)
    _bar: Any = None
    _task: Any = None

    def __enter__(self) -> DumpProgress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("dump"), BarColumn(), TextColumn("{task.fields[line]}"), TimeElapsedColumn(),
                console=Console(stderr=True),
            )  # fmt: skip
            self._task = self._bar.add_task("dump", total=self.num_shards, completed=self.num_done, line="loading")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, positions: float, shards_done: float) -> None:
        """Say how far it is.

        Args:
            positions: Tokens that this run has put through the teacher.
            shards_done: Shards that this run has finished, with fractions for those in hand.
        """
        now = time.monotonic()
        line = self._line(positions, shards_done, now - self._started)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.num_done + shards_done, line=line)
        elif now - self._logged >= LOG_SECONDS:
            self._logged = now
            logger.info("dump: %s", line)

    def _line(self, positions: float, shards_done: float, seconds: float) -> str:
        done = self.num_done + shards_done
        line = f"{done:.1f}/{self.num_shards} shards, {positions:,.0f} tokens, {positions / max(seconds, 1e-9):,.0f} tokens/s"
        if shards_done > 0:
            left = (self.num_shards - done) * seconds / shards_done
            line += f", {format_seconds(left)} left"
        return line


def format_seconds(seconds: float) -> str:
    """``42 s``, ``3 min 20 s``, ``5 h 10 min``."""
    whole = round(max(seconds, 0))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
