"""A run's numbers: one JSON line a step, TensorBoard events, a progress bar behind one `write(step, values)`.

    with MetricsWriter(folder) as writer:
        with writer.stage("sft", 400) as log:  # each stage: own step count, own bar, same file
            log.write(1, {"loss": 2.3})
        with writer.stage("rl", 200) as log:
            log.write(1, {"reward": .1, "kl": 0.0, "time/tokens_per_s": 5e3})

`metrics.jsonl` holds one object a line: `{"step": 1, "stage": "rl", "reward": 0.1, ...}`.

- Numbers are written so that reading them gives the same bits (shortest exact representation of a float64;
  a float32 fits into it). Two runs can therefore be compared line by line. Everything that depends on the
  clock has a key that starts with `time/`; `without_time` takes those away.
- JSON has no NaN and no infinity: both are written as `null`. So `null` means "not a finite number", and
  a key that is missing means "not measured".
- Every stage counts its own steps, and a stage has every step once: starting a stage again replaces what an
  earlier start of it wrote beyond the step it continues from.
- Under several processes (a TPU pod) only the first should own a writer.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from rlaif_jax.config import UserError

RL_STAGE = "rl"
"""The stage of the reinforcement-learning loop; also that of a line without "stage"."""

PLAIN_LINE_EVERY_S = 5.0
"""Seconds between two progress lines when the output is no terminal."""

# What the progress bar shows of a step's values, in this order: (key, how to show it).
_SHOWN = (
    ("reward", "reward {:.3f}"),
    ("kl", "KL {:.3f}"),
    ("loss", "loss {:.4f}"),
    ("accuracy", "accuracy {:.3f}"),
    ("time/tokens_per_s", "{:,.0f} tokens/s"),
)


class MetricsWriter:
    """Writes a run's numbers to `folder/metrics.jsonl`, `folder/tensorboard/STAGE/` and the terminal.

    Args:
        folder: the run folder; made when missing.
        terminal: False: no output but the files.
        tensorboard: False: no TensorBoard events.

    Raises:
        UserError: the folder or a file cannot be written (read-only, full, not a folder), here or in any
            write; the message names the path. Also when the existing metrics.jsonl is damaged elsewhere than
            in its last line (a last line cut by `kill -9` is dropped).
    """

    def __init__(self, folder: Path, *, terminal: bool = True, tensorboard: bool = True) -> None:
        self._folder = Path(folder)
        self.path = self._folder / "metrics.jsonl"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lines = _read(self.path)
            if _cut(self.path):
                _rewrite(self.path, lines)
            # Unbuffered and in append mode: a line is with the system as soon as write() has returned.
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        # A resumed run's clock goes on where it stood; a new run has no lines.
        self._started = time.monotonic() - max(map(_elapsed, lines), default=0.0)
        self._tensorboard = tensorboard
        self._display = _Display(enabled=terminal)

    @contextmanager
    def stage(self, name: str, total: int | None, *, resume_from: int | None = None) -> Iterator[Stage]:
        """A stage of the run ("lm", "labeler", "sft", "reward_model", "rl" ...): own steps, own bar.

        Args:
            name: goes to each line's key "stage" and names its TensorBoard run.
            total: steps of the stage, for the bar and the time left; None when unknown.
            resume_from: the step the stage continues from; its lines beyond it are dropped at once (they came
                after the checkpoint that is continued). None: all its lines. Other stages' lines stay.
        """
        keep = -math.inf if resume_from is None else resume_from
        try:
            lines = _read(self.path)
            kept = [line for line in lines if line["stage"] != name or line["step"] <= keep]
            if len(kept) < len(lines):
                self._file.close()
                _rewrite(self.path, kept)
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        events = _Events(self._folder / "tensorboard" / name, resume_from) if self._tensorboard else None
        stage = Stage(self, name, events, self._display.add(name, total, resume_from or 0))
        try:
            yield stage
        finally:
            stage.close()

    def close(self) -> None:
        """Ends the bars and closes the file; a second call does nothing."""
        self._display.close()
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, stage: str, step: int, values: Mapping[str, float | int | None]) -> None:
        line = {"step": step, "stage": stage, **values}
        line["time/elapsed_s"] = round(time.monotonic() - self._started, 3)
        data = (json.dumps(line, allow_nan=False) + "\n").encode()
        try:
            while data:  # an unbuffered write may take only a part, as on a disk that is filling up
                data = data[self._file.write(data) :]
        except OSError as error:
            raise _unwritable(self.path, error) from error


class Stage:
    """One stage of a run; made by `MetricsWriter.stage`."""

    def __init__(self, writer: MetricsWriter, name: str, events: _Events | None, bar: _Bar) -> None:
        self._writer = writer
        self.name = name
        self._events = events
        self._bar = bar

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one step of this stage.

        Args:
            step: counts from 1 (0: before the first update).
            values: name -> Python, NumPy or JAX scalar; None, NaN and infinity become null.

        Raises:
            UserError: metrics.jsonl or the events cannot be written.
            ValueError: a value is no scalar, or a key is one of the writer's own ("step", "stage").
        """
        numbers = {key: _number(key, value) for key, value in values.items()}
        self._writer._append(self.name, int(step), numbers)
        if self._events is not None:
            self._events.write(int(step), numbers)
        self._bar.update(int(step), numbers)

    def flush(self) -> None:
        """Puts the stage's TensorBoard events on the disk; called with every checkpoint.

        Without it events are up to 10 seconds behind, which a killed process loses (metrics.jsonl never is).

        Raises:
            UserError: the events cannot be written.
        """
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Finishes the bar and closes the events; leaving the stage's `with` does it."""
        self._bar.close()
        if self._events is not None:
            self._events.close()


def read_metrics(path: Path, stage: str | None = None) -> list[dict[str, Any]]:
    """Reads metrics.jsonl: one dict a line, in the order of writing; `null` (NaN, infinity) becomes None.

    A last line that a killed process left half-written is ignored; a missing file is an empty list.

    Args:
        path: the file, or the run folder that holds it.
        stage: only the lines of this stage.

    Raises:
        UserError: any other line is not a JSON object with an integer "step", or the file cannot be read.
    """
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    try:
        lines = _read(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from error
    return [line for line in lines if stage is None or line["stage"] == stage]


def without_time(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line without what the clock decides (keys `time/...`): equal for two runs that computed the same."""
    return {key: value for key, value in line.items() if not key.startswith("time/")}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Reads a file of one JSON object a line; a last line that a killed process left half-written is ignored.

    Raises:
        UserError: any other line is not a JSON object; the message names file and line.
        OSError: the file cannot be read.
    """
    chunks = path.read_bytes().split(b"\n")
    lines = []
    for number, chunk in enumerate(chunks, start=1):
        if not chunk.strip():
            continue
        try:
            line = json.loads(chunk)
            if not isinstance(line, dict):
                raise ValueError(f"a JSON {type(line).__name__}")
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            if number == len(chunks):  # no newline after it: the writer was killed in the middle
                break
            raise UserError(
                f"{path}, line {number}: {error}. Every line should be one JSON object ({{...}}); "
                "delete the line to go on without it."
            ) from error
        lines.append(line)
    return lines


def _read(path: Path) -> list[dict[str, Any]]:
    lines = read_jsonl(path) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        step, stage = line.get("step"), line.setdefault("stage", RL_STAGE)
        if type(step) is not int or not isinstance(stage, str):
            raise UserError(
                f'{path}, line {number}: "step" should be a whole number and "stage" a text, as in '
                f'{{"step": 1, "stage": "rl", "reward": 0.5}}; got {step!r} and {stage!r}.'
            )
    return lines


def _cut(path: Path) -> bool:
    """Whether the file's last line has no newline: appending to it would join two lines."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _rewrite(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replaces the file in one go: killed at any moment, either the old or the new one is there, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _number(key: str, value: Any) -> float | int | None:
    if key in ("step", "stage"):
        raise ValueError(f'metrics: the key "{key}" is the writer\'s own; name the value otherwise')
    if value is None:
        return None
    if isinstance(value, (bool, int)):
        return int(value)
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f'metrics: "{key}" should be one number, got {type(value).__name__}') from error
    return number if math.isfinite(number) else None


def _elapsed(line: Mapping[str, Any]) -> float:
    value = line.get("time/elapsed_s")
    return float(value) if isinstance(value, (int, float)) else 0.0


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be written ({error.strerror or error}). Free some space or give a run folder that "
        "can be written to; what is already in the file stays valid."
    )


class _Events:
    """TensorBoard events of one stage: each stage is a TensorBoard run of its own.

    (A purge hides every event of its run from a step on, whatever the tag, so stages cannot share one.) The
    calling thread writes the events: tensorboardX's `SummaryWriter` hands them to a thread through a short
    queue, and when a full disk ends that thread the training would wait for the queue for ever.
    """

    FLUSH_EVERY_S = 10.0

    def __init__(self, folder: Path, resume_from: int | None) -> None:
        # Lazy: half a second that `--help` need not pay.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._folder = folder
        self._event = event_pb2.Event
        self._summary = summary_pb2.Summary
        self._flushed_at = -math.inf
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # The name has whole seconds only: the suffix keeps a quick restart from overwriting the file.
            self._file = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
            purge = 0 if resume_from is None else resume_from + 1
            log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._file.write_event(event_pb2.Event(wall_time=time.time(), step=purge, session_log=log))
        except OSError as error:
            raise _unwritable(folder, error) from error

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        finite = {key: value for key, value in values.items() if value is not None}
        tags = [self._summary.Value(tag=key, simple_value=value) for key, value in finite.items()]
        summary = self._summary(value=tags)
        try:
            self._file.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        except OSError as error:
            raise _unwritable(self._folder, error) from error
        if time.monotonic() - self._flushed_at > self.FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        self._flushed_at = time.monotonic()
        try:
            self._file.flush()
        except OSError as error:
            raise _unwritable(self._folder, error) from error

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            raise _unwritable(self._folder, error) from error


class _Display:
    """A live bar a stage on a terminal, plain lines elsewhere."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.console = Console()
        self.progress: Progress | None = None

    def add(self, name: str, total: int | None, start: int) -> _Bar:
        if self.enabled and self.console.is_terminal and self.progress is None:
            self.progress = Progress(
                TextColumn("[bold]{task.description:<12}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                TimeElapsedColumn(),
                console=self.console,
                refresh_per_second=2,  # drawn by a thread that shares the cores with the training
            )
            self.progress.start()
        return _Bar(self, name, total, start)

    def print(self, text: str) -> None:
        if not self.enabled:
            return
        try:
            print(text, flush=True)
        except (OSError, ValueError):  # the reader has gone (`| head`): the run is worth more than its lines
            self.enabled = False

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


class _Bar:
    def __init__(self, display: _Display, name: str, total: int | None, start: int) -> None:
        self.display = display
        self.name = name
        self.total = total
        self.first: tuple[int, float] | None = None  # step and time of the first write
        self.printed_at = -math.inf
        self.unprinted: str | None = None
        self.task: TaskID | None = None
        if display.progress is not None:
            self.task = display.progress.add_task(name, total=total, completed=start, text="")

    def update(self, step: int, values: Mapping[str, float | int | None]) -> None:
        now = time.monotonic()
        parts = [form.format(values[key]) for key, form in _SHOWN if values.get(key) is not None]
        # The first step holds the compilation, so the speed is measured from its end on.
        if self.first is None:
            self.first = (step, now)
        elif self.total is not None and step > self.first[0]:
            left = (self.total - step) * (now - self.first[1]) / (step - self.first[0])
            parts.append(f"{_duration(left)} left")
        text = "  ".join(parts)
        if self.task is not None and self.display.progress is not None:
            self.display.progress.update(self.task, completed=step, text=text)
            return
        total = "" if self.total is None else f"/{self.total}"
        self.unprinted = f"[{self.name}] step {step}{total}  {text}".rstrip()
        if now - self.printed_at >= PLAIN_LINE_EVERY_S:
            self.printed_at = now
            self._print()

    def close(self) -> None:
        self._print()
        if self.task is not None and self.display.progress is not None:
            self.display.progress.stop_task(self.task)

    def _print(self) -> None:
        if self.unprinted is not None:
            self.display.print(self.unprinted)
            self.unprinted = None


def _duration(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 1:02:03."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
