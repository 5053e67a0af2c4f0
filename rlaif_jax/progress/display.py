"""The one progress display of a run: a live bar for each wait on a terminal, plain lines elsewhere.

    with ProgressDisplay() as display:
        display.open("quickstart")
        display.plan([PlannedStage("labels", "the labeler compares answers", 30), PlannedStage("rl", "PPO", 90)])
        display.begin("labels")  # "stage 1 of 2: the labeler compares answers"
        with display.wait("labels", "question") as count:
            judge.score(prompts, answers, progress=count)

A thread keeps the display alive: it shows the time of a wait that cannot say how far it is, such as a compilation.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from rlaif_jax.progress.count import Count
from rlaif_jax.progress.plan import Plan, PlannedStage
from rlaif_jax.progress.text import cut_end, cut_start, duration, one_line

PLAIN_LINE_EVERY_S = 2.0
"""Seconds between two progress lines when the output is no terminal; more in a long run, see `_interval`."""
PLAIN_WIDTH = 120  # columns of a sample when the output is no terminal
SHOWN_AFTER_S = 1.0  # a shorter wait inside of a stage is not shown
TICK_S = {"plain": 0.25, "live": 0.5}  # seldom: the thread shares the cores with the training


class ProgressDisplay:
    """Shows how far a run is, as a context manager or until `close`.

    Args:
        stderr: write to the standard error instead of the standard output.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        self._console = Console(stderr=stderr, highlight=False)
        self._file = sys.stderr if stderr else None
        self._is_live = self._console.is_interactive and self._console.file.isatty()
        self._broken = False
        self._lock = threading.RLock()  # between the caller and the thread
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._rich: Progress | None = None
        self._whole: TaskID | None = None
        self._bars: list[ProgressBar] = []
        self._plan: Plan | None = None
        self._name: str | None = None
        self._opened_at = self._begun_at = time.monotonic()
        self._printed_at = -math.inf
        self._stage_counted = False  # the present stage's own bar has been and is closed

    # ---- The run

    def open(self, name: str) -> None:
        """Shows from now on, until `close`, that the run `name` works, even where no bar is active."""
        with self._lock:
            self._name = name
            self._opened_at = self._begun_at = self._printed_at = time.monotonic()
            if not self._is_live:  # else the first bar or plan does: until then another display may use the terminal
                self._start()

    def plan(self, stages: Sequence[PlannedStage]) -> None:
        """Says which stages come, so that each is announced with its number and the time that is left of all.

        A stage that was not planned is shown as without a plan.

        Args:
            stages: in the order in which they begin.
        """
        with self._lock:
            self._plan = Plan(stages)
            self._start()

    def begin(self, name: str, *, skipped: bool = False) -> None:
        """Announces a planned stage that begins; does nothing for any other, or for one that has begun.

        Args:
            name: of the stage.
            skipped: the stage is done already.
        """
        with self._lock:
            now = time.monotonic()
            if self._plan is None or not self._plan.begin(name, now, skipped=skipped):
                return
            self._begun_at, self._stage_counted = now, False
            left = self._plan.left(now)
            about = "" if left is None else f" (about {duration(left)} left of the whole run)"
            self.print(self._plan.title() + about)

    # ---- Waits

    def add(
        self, name: str, total: int | None, *, start: int = 0, unit: str = "step", text: str = "", brief: bool = False
    ) -> ProgressBar:
        """Begins to show a task and returns its bar.

        Args:
            name: what the line begins with.
            total: number of units of the whole task; None if unknown.
            start: number of units that are done.
            unit: what is counted, for plain lines.
            text: shown until the first unit is done.
            brief: a task that leaves no line behind where it is short.
        """
        with self._lock:
            bar = ProgressBar(self, name, total, start, unit, text, brief)
            self._bars.append(bar)
            self._start()
            self._draw()
            return bar

    @contextmanager
    def wait(self, name: str, unit: str = "") -> Iterator[Count]:
        """Shows a bar while the block runs; yields a function that takes how much is done, and of how much.

        Args:
            name: what is waited for.
            unit: what is counted.
        """
        bar = self.add(name, None, unit=unit, brief=True)
        try:
            yield bar.count
        finally:
            bar.close()

    def print(self, text: str) -> None:
        """Prints a plain line, and nothing more once that fails: a run does not stop when its reader is gone."""
        with self._lock:
            if self._broken:
                return
            self._printed_at = time.monotonic()
            encoding = self._console.encoding
            text = text.encode(encoding, "replace").decode(encoding)
            try:
                if self._rich is None:
                    print(text, file=self._file, flush=True)
                else:
                    self._console.print(text, markup=False, soft_wrap=True)
            except (OSError, ValueError):  # the reader has gone (`| head`)
                self._broken = True

    def sample(self, title: str, prompt: str, answer: str) -> None:
        """Prints a prompt and its answer, each on one line of what is no control character.

        Args:
            title: what they are.
            prompt: any text; where it is too long its end is shown.
            answer: any text; where it is too long its beginning is shown.
        """
        width = (self._console.width if self._is_live else PLAIN_WIDTH) - len("  prompt: ")
        prompt, answer = cut_start(one_line(prompt), width), cut_end(one_line(answer), width)
        self.print(f"{title}\n  prompt: {prompt}\n  answer: {answer}")

    def close(self) -> None:
        """Ends all bars and the thread; a second call does nothing."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._ended.set()
            self._bars.clear()
            self._name = None
        if thread is not None:
            thread.join()
        if self._rich is not None:
            self._rich.stop()
            self._rich = self._whole = None

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- Drawing

    def _start(self) -> None:
        if self._thread is not None:
            return
        if self._is_live:
            column = Column(no_wrap=True, overflow="ellipsis")
            self._rich = Progress(
                TextColumn("{task.description:<12}", style="bold", markup=False, table_column=column),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}", markup=False, table_column=column.copy()),
                TimeElapsedColumn(),
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stderr=sys.stderr.isatty(),  # else errors would miss the file that they are sent to
            )
            self._rich.start()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(self._ended,), daemon=True)
        self._thread.start()

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(TICK_S["live" if self._is_live else "plain"]):
            with self._lock:
                if ended.is_set():
                    return
                if self._rich is not None:
                    self._draw()
                elif time.monotonic() - self._printed_at >= self._interval():
                    self._print_alive()

    def _interval(self) -> float:
        """Returns the seconds between two plain lines: a long run should not fill its log with them."""
        return min(max(PLAIN_LINE_EVERY_S, (time.monotonic() - self._opened_at) / 40), 60.0)

    def _print_alive(self) -> None:
        if self._bars:
            self._bars[-1].print(time.monotonic())
        elif self._name is not None:
            stage = self._plan.stages[self._plan.at].name if self._plan is not None and self._plan.at >= 0 else ""
            now = time.monotonic()
            self.print(f"[{stage or self._name}] working, {duration(now - self._begun_at)}{self._whole_left(now)}")

    def _stage_of(self, bar: ProgressBar) -> PlannedStage | None:
        """Returns the present planned stage if the bar counts its steps."""
        if self._plan is None or self._plan.at < 0:
            return None
        stage = self._plan.stages[self._plan.at]
        return stage if bar.name == stage.name else None

    def _left(self, now: float) -> float | None:
        """Returns the seconds that are left of the whole run, None while they are unknown or nearly over."""
        if self._plan is None or self._plan.at < 0:
            return None
        # What a stage does after its bar is short.
        stage_left = 0.0 if self._stage_counted else None
        stage_left = next((bar.left(now) for bar in self._bars if self._stage_of(bar)), stage_left)
        left = self._plan.left(now, stage_left)
        return None if left is None or left < 1 else left

    def _whole_left(self, now: float) -> str:
        left = self._left(now)
        return "" if left is None else f"  (whole run: {duration(left)} left)"

    def _draw(self) -> None:
        if self._rich is None:
            return
        now = time.monotonic()
        if self._name is not None:
            left = self._left(now)
            total = None if left is None else now - self._opened_at + left
            text = self._name if self._plan is None or self._plan.at < 0 else self._plan.title().partition(":")[0]
            text += "" if left is None else f"  {duration(left)} left"
            if self._whole is None:
                self._whole = self._rich.add_task("whole run", total=None, text="")
            self._rich.update(self._whole, total=total, completed=now - self._opened_at, text=text)
        for bar in self._bars:
            bar.draw(self._rich, now)
        self._rich.refresh()


class ProgressBar:
    """One task of a `ProgressDisplay`; made by `ProgressDisplay.add`."""

    def __init__(
        self, display: ProgressDisplay, name: str, total: int | None, start: int, unit: str, text: str, brief: bool
    ) -> None:
        self.name, self.brief = name, brief
        self._display, self._total, self._unit, self._text, self._first_text = display, total, unit, "", text
        self._start = self._done = start
        self._began = time.monotonic()
        self._alone = not display._bars
        self._first: tuple[int, float] | None = None  # units and time of the first update beyond the start
        self._updated: float | None = None  # time of the last update
        self._unprinted = False
        self._printed: str | None = None
        self._task: TaskID | None = None

    def update(self, done: int, text: str, *, keep: bool = False) -> None:
        """Shows that `done` units are done, with `text` and the time that is left.

        Args:
            done: number of units.
            text: shown with them.
            keep: leave a line behind.
        """
        display = self._display
        with display._lock:
            now = time.monotonic()
            # The first step holds the compilation, so the speed is measured from its end on.
            if self._first is None and done > self._start:
                self._first = (done, now)
            self._done, self._text, self._updated, self._unprinted = done, text, now, True
            if keep or (not display._is_live and now - display._printed_at >= display._interval()):
                self.print(now)

    def count(self, done: int, total: int) -> None:
        """Shows that `done` of `total` units are done."""
        self._total = total
        self.update(done, "")

    def left(self, now: float) -> float | None:
        """Returns the seconds that are left of the task, None while its speed is unknown."""
        if self._first is None or self._updated is None or self._total is None or self._done <= self._first[0]:
            return None
        (done, since), updated = self._first, self._updated
        stage = self._display._stage_of(self)
        total = self._total if stage is None else stage.expected(self._done, self._total)
        left = (total - self._done) * (updated - since) / (self._done - done)
        return max(0.0, left - (now - updated))

    def line(self, now: float) -> str:
        """Returns the bar as a plain line."""
        counted = "" if self._total is None and self._updated is None else f" {self._counted()}".rstrip()
        return f"[{self.name}]{counted}  {self._words(now)}".rstrip()

    def draw(self, rich: Progress, now: float) -> None:
        """Brings the row of a live display up to date."""
        if self._task is None:
            if self.brief and not self._alone and now - self._began < SHOWN_AFTER_S:
                return
            self._task = rich.add_task(self.name, total=self._total, text="")
        total = "" if self._total is None else f"/{self._total}"
        counted = "" if self._total is None and self._updated is None else f"{self._done}{total}  "
        rich.update(self._task, total=self._total, completed=self._done, text=counted + self._words(now))

    def close(self) -> None:
        """Removes the bar; prints its last line if that was not printed."""
        display = self._display
        with display._lock:
            if self not in display._bars:
                return
            if self._unprinted and (not self.brief or self._printed is not None):
                self.print(time.monotonic())
            display._bars.remove(self)
            display._stage_counted |= display._stage_of(self) is not None
            if self._task is not None and display._rich is not None:
                display._rich.remove_task(self._task)

    def _counted(self) -> str:
        total = "" if self._total is None else f"/{self._total}"
        return f"{self._unit} {self._done}{total}".lstrip()

    def _words(self, now: float) -> str:
        left = self.left(now)
        last = "" if left is None or self._done == self._total else f"{duration(left)} left"
        last = self._first_text if self._first is None else last
        return f"{self._text}  {last}".strip()

    def print(self, now: float) -> None:
        """Prints the bar as a plain line, with the time that has passed where the line says nothing new."""
        line = self.line(now)
        again = line == self._printed or self._updated is None
        self._unprinted, self._printed = False, line
        passed = f"  {duration(now - self._began)} so far" if again else ""
        self._display.print(line + passed + self._display._whole_left(now))
