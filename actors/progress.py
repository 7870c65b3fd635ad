"""One bar, drawn by the driver: stage, layer, experts done, time left. In a file or a pipe, a line whenever the stage changes. And a
file that status reads in another terminal."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

FILE_SECONDS = 0.5
EVALUATION_COST = 0.1  # of a block, against expanding it


class Reporter(Protocol):
    path: Path | None

    def stage(self, name: str, detail: str = "") -> None: ...
    def detail(self, detail: str) -> None: ...
    def advance(self, steps: float = 1.0) -> None: ...
    def note(self, line: str) -> None: ...


class Bar:
    """Progress on standard error. `total` counts steps of about equal cost, so that the time left is honest. path: of the file."""

    def __init__(self, total: float, verbose: bool, done: float = 0.0, path: Path | None = None):
        self.path, self._written = path, 0.0
        self._console = Console(stderr=True)
        self._live = self._console.is_terminal and not verbose
        self._total, self._done, self._started_at, self._start = total, done, done, time.monotonic()
        self._label = self._stage = ""
        if self._live:
            columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(),
                       TextColumn("left"), TimeRemainingColumn()]
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("starting", total=total, completed=done)
            self._bar.start()

    def stage(self, name: str, detail: str = "") -> None:
        self._stage, label = name, f"{name} {detail}".strip()
        if self._live:
            self._bar.update(self._task, description=label)
        elif label != self._label:
            print(f"[{time.strftime('%H:%M:%S')}] {label}{self._left()}", file=sys.stderr, flush=True)
        self._label = label
        self._save(label)

    def detail(self, detail: str) -> None:
        """More about the stage, for who watches the bar."""
        if self._live:
            self._bar.update(self._task, description=f"{self._stage} {detail}")
        self._save(f"{self._stage} {detail}")

    def advance(self, steps: float = 1.0) -> None:
        self._done = min(self._total, self._done + steps)
        if self._live:
            self._bar.update(self._task, completed=self._done)

    def note(self, line: str) -> None:
        self._label = ""  # after an interruption the stage is said again
        if self._live:
            self._console.print(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._live:
            self._bar.stop()

    def _left(self) -> str:
        seconds = self._seconds_left()
        return "" if seconds is None else f" ({self._done / self._total:.0%}, about {seconds:.0f} s left)"

    def _seconds_left(self) -> float | None:
        gone = self._done - self._started_at
        return max(0.0, (time.monotonic() - self._start) / gone * (self._total - self._done)) if gone > 0 else None

    def _save(self, label: str) -> None:
        """For who looks from elsewhere; a second old at most, and not worth waiting for the disk, or stopping where it is full."""
        if self.path is None or time.monotonic() - self._written < FILE_SECONDS:
            return
        self._written = time.monotonic()
        temporary = self.path.with_name(f"{self.path.name}.tmp-{os.getpid()}")
        try:
            temporary.write_text(json.dumps({"stage": label, "done": self._done / self._total, "seconds_left": self._seconds_left(), "at": time.time()}))
            os.replace(temporary, self.path)
        except OSError:
            temporary.unlink(missing_ok=True)
