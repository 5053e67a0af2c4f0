"""The one progress display: a live bar for each task on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PLAIN_LINE_EVERY_S = 5.0
"""Seconds between two progress lines of a task when the output is no terminal."""


class ProgressDisplay:
    """Shows how far some tasks are, as a context manager or until `close`.

    Args:
        stderr: write to the standard error instead of the standard output.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        self._console = Console(stderr=stderr)
        self._file = sys.stderr if stderr else None
        self._broken = False
        self._rich: Progress | None = None

    def add(self, name: str, total: int | None, *, start: int = 0, unit: str = "step") -> ProgressBar:
        """Begins to show a task and returns its bar.

        Args:
            name: what the line begins with.
            total: number of units of the whole task; None if unknown.
            start: number of units that are done.
            unit: what is counted, for plain lines.
        """
        if self._console.is_terminal and self._rich is None:
            self._rich = Progress(
                TextColumn("{task.description:<12}", style="bold", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                TimeElapsedColumn(),
                console=self._console,
                refresh_per_second=2,  # drawn by a thread that shares the cores with the training
            )
            self._rich.start()
        return ProgressBar(self, name, total, start, unit)

    def print(self, text: str) -> None:
        """Prints a plain line, and nothing more once that fails: a run does not stop when its reader is gone."""
        if not self._broken:
            try:
                print(text, file=self._file, flush=True)
            except (OSError, ValueError):  # the reader has gone (`| head`)
                self._broken = True

    def close(self) -> None:
        """Ends all bars; a second call does nothing."""
        if self._rich is not None:
            self._rich.stop()
            self._rich = None

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ProgressBar:
    """One task of a `ProgressDisplay`; made by `ProgressDisplay.add`."""

    def __init__(self, display: ProgressDisplay, name: str, total: int | None, start: int, unit: str) -> None:
        self._display, self._name, self._total, self._unit = display, name, total, unit
        self._first: tuple[int, float] | None = None  # units and time of the first update
        self._printed_at = -math.inf
        self._unprinted: str | None = None
        rich = display._rich
        self._task = None if rich is None else rich.add_task(name, total=total, completed=start, text="")

    def update(self, done: int, text: str) -> None:
        """Shows that `done` units are done, with `text` and the time that is left."""
        now = time.monotonic()
        # The first step holds the compilation, so the speed is measured from its end on.
        if self._first is None:
            self._first = (done, now)
        elif self._total is not None and done > self._first[0]:
            left = (self._total - done) * (now - self._first[1]) / (done - self._first[0])
            text = f"{text}  {_duration(left)} left".lstrip()
        if self._task is not None:
            if self._display._rich is not None:
                self._display._rich.update(self._task, completed=done, text=text)
            return
        total = "" if self._total is None else f"/{self._total}"
        self._unprinted = f"[{self._name}] {self._unit} {done}{total}  {text}".rstrip()
        if now - self._printed_at >= PLAIN_LINE_EVERY_S:
            self._printed_at = now
            self._print()

    def close(self) -> None:
        """Stops the clock of the bar, or prints the last line if it was not printed."""
        self._print()
        if self._task is not None and self._display._rich is not None:
            self._display._rich.stop_task(self._task)

    def _print(self) -> None:
        if self._unprinted is not None:
            self._display.print(self._unprinted)
            self._unprinted = None


def _duration(seconds: float) -> str:
    """Returns seconds as 0:07, 12:34 or 1:02:03."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
