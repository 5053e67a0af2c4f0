"""A run's numbers, behind one `write(step, values)`: JSON lines and sinks, such as TensorBoard.

    with MetricsWriter(folder) as writer:
        with writer.stage("sft", 400) as log:  # each stage: own step count, own bar, same file
            log.write(1, {"loss": 2.3})
        with writer.stage("rl", 200) as log:
            log.write(1, {"reward": .1, "kl": 0.0, "time/tokens_per_s": 5e3})

`metrics.jsonl` holds one object per line: `{"step": 1, "stage": "rl", "reward": 0.1, ...}`. It is what is read back and
what a resume continues exactly; a `Sink` only shows the same numbers elsewhere.

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rlaif_jax.config import UserError, require
from rlaif_jax.files import atomic_write, read_json_lines
from rlaif_jax.progress.display import ProgressBar, ProgressDisplay

RL_STAGE = "rl"
"""The stage of the training loop; also that of a line without "stage"."""

Numbers = Mapping[str, float | int | None]  # None: not a finite number


class Sink(Protocol):
    """Shows a run's numbers somewhere: the methods that a tracker implements.

    `metrics.jsonl` does not depend on a sink.
    """

    def start(self, stage: str, total: int | None, resume_from: int | None) -> None:
        """Begins a stage.

        Args:
            stage: its name.
            total: the number of its steps; None if unknown.
            resume_from: the step after which it goes on; later steps that the sink holds are void. None: all steps are.
        """

    def write(self, stage: str, step: int, values: Numbers) -> None:
        """Takes the numbers of one step of a stage.

        Args:
            stage: the name of a stage that was started.
            step: the step.
            values: the numbers by name; None for a number that is not finite.
        """

    def flush(self) -> None:
        """Makes everything permanent; called with every checkpoint."""

    def end(self, stage: str) -> None:
        """Ends a stage."""

    def close(self) -> None:
        """Ends the run; a second call does nothing."""


class MetricsWriter:
    """Writes a run's numbers to `folder/metrics.jsonl` and to sinks.

    Args:
        folder: the run folder; made if missing.
        terminal: False: show nothing on the terminal.
        display: shows the numbers, `run.display`; None: a display that only this writer has.
        sinks: where else the numbers go; None: TensorBoard events in `folder/tensorboard`.

    Raises:
        UserError: the folder or a file cannot be written (read-only, full, not a folder), here or in any
            write; the message names the path. Also when the existing metrics.jsonl is damaged elsewhere than
            in its last line (a last line cut by `kill -9` is dropped).
    """

    def __init__(
        self,
        folder: Path,
        *,
        terminal: bool = True,
        display: ProgressDisplay | None = None,
        sinks: Sequence[Sink] | None = None,
    ) -> None:
        folder = Path(folder)
        self.path = folder / "metrics.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = read_metrics(self.path)
            if _is_cut(self.path):
                _rewrite(self.path, lines)
            self._open()
        except OSError as error:
            raise _unwritable(self.path, error) from error
        # A resumed run's clock goes on from its last line; a new run has no lines.
        self._started = time.monotonic() - max(map(_elapsed, lines), default=0.0)
        shown = [TensorBoard(folder / "tensorboard")] if sinks is None else sinks
        self._sinks: list[Sink] = [*([Terminal(display)] if terminal else []), *shown]

    def _open(self) -> None:
        # Unbuffered and in append mode: a line is with the system as soon as write() has returned.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)

    @contextmanager
    def stage(self, name: str, total: int | None, *, resume_from: int | None = None) -> Iterator[StageLog]:
        """Opens a stage of the run ("lm", "labeler", "sft", "reward_model", "rl" ...): own steps, own bar.

        Args:
            name: goes to each line's key "stage" and names its TensorBoard run.
            total: steps of the stage, for the bar and the time left; None when unknown.
            resume_from: the step the stage continues from; its lines beyond it are dropped at once (they came
                after the checkpoint that is continued). None: all its lines. Other stages' lines stay.

        Raises:
            UserError: metrics.jsonl cannot be written.
        """
        keep = -math.inf if resume_from is None else resume_from
        try:
            lines = read_metrics(self.path)
            kept = [line for line in lines if line["stage"] != name or line["step"] <= keep]
            if len(kept) < len(lines):
                self._file.close()
                _rewrite(self.path, kept)
                self._open()
        except OSError as error:
            raise _unwritable(self.path, error) from error
        for sink in self._sinks:
            sink.start(name, total, resume_from)
        try:
            yield StageLog(self, name)
        except BaseException:
            for sink in self._sinks:
                with suppress(UserError):  # the first error counts
                    sink.end(name)
            raise
        for sink in self._sinks:
            sink.end(name)

    def close(self) -> None:
        """Ends the sinks and closes the file; a second call does nothing."""
        for sink in self._sinks:
            sink.close()
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, stage: str, step: int, values: Numbers) -> None:
        line = {"step": step, "stage": stage, **values}
        line["time/elapsed_s"] = round(time.monotonic() - self._started, 3)
        data = (json.dumps(line, allow_nan=False) + "\n").encode()
        try:
            while data:  # an unbuffered write may take only a part, as on a disk that is filling up
                data = data[self._file.write(data) :]
        except OSError as error:
            raise _unwritable(self.path, error) from error
        for sink in self._sinks:
            sink.write(stage, step, values)

    def _flush(self) -> None:
        for sink in self._sinks:
            sink.flush()


class StageLog:
    """Takes the numbers of one stage; made by `MetricsWriter.stage`."""

    def __init__(self, writer: MetricsWriter, name: str) -> None:
        self._writer = writer
        self.name = name

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one step of this stage.

        Args:
            step: counts from 1 (0: before the first update).
            values: name -> Python, NumPy or JAX scalar; None, NaN and infinity become null.

        Raises:
            UserError: metrics.jsonl or the events cannot be written.
            ValueError: a value is no scalar, or a key is one of the writer's own ("step", "stage").
        """
        self._writer._write(self.name, int(step), {key: _number(key, value) for key, value in values.items()})

    def flush(self) -> None:
        """Puts the numbers of all sinks on the disk; called with every checkpoint.

        Without it TensorBoard events are up to 10 seconds behind, which a killed process loses (metrics.jsonl
        never is).

        Raises:
            UserError: the events cannot be written.
        """
        self._writer._flush()


def read_metrics(path: Path, stage: str | None = None) -> list[dict[str, Any]]:
    """Reads metrics.jsonl: one dict per line, in the order of writing.

    `null` (NaN, infinity) becomes None.

    A last line that a killed process left half-written is ignored; a missing file is an empty list.

    Args:
        path: the file, or the run folder that holds it.
        stage: only the lines of this stage.

    Raises:
        UserError: any other line is not a JSON object with an integer "step", or the file cannot be read.
    """
    path = Path(path)
    lines = read_appended(path / "metrics.jsonl" if path.is_dir() else path)
    for place, line in lines.items():
        step, of = line.get("step"), line.setdefault("stage", RL_STAGE)
        require(
            type(step) is int and isinstance(of, str),
            f'{place}: "step" should be a whole number and "stage" a text, as in '
            f'{{"step": 1, "stage": "rl", "reward": 0.5}}; got {step!r} and {of!r}.',
        )
    return [line for line in lines.values() if stage is None or line["stage"] == stage]


def read_appended(path: Path) -> dict[str, dict[str, Any]]:
    """Reads a file of one JSON object per line that a run appends to; returns {"FILE:LINE": object}.

    A last line that a killed process left half-written is ignored; a missing file is empty.

    Raises:
        UserError: any other line is not a JSON object, with its file and line; or the file cannot be read.
    """

    def parse(value: Any, place: str) -> tuple[str, dict[str, Any]]:
        require(isinstance(value, dict), f"a JSON {type(value).__name__}")
        return place, value

    good, bad = read_json_lines(path, parse, skip_cut=True) if path.exists() else ([], [])
    if bad:
        raise UserError(
            f"{bad[0]}. Every line should be one JSON object ({{...}}); delete the line to go on without it."
        )
    return dict(good)


def without_time(line: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a line without its keys `time/...`, so that it is equal for two runs that computed the same."""
    return {key: value for key, value in line.items() if not key.startswith("time/")}


def _is_cut(path: Path) -> bool:
    """Returns whether the file's last line has no newline: appending to it would join two lines."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _rewrite(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    with atomic_write(path) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


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


# ---- Sinks


class Terminal:
    """Shows each stage as a progress bar with the values of `SHOWN`, or as plain lines.

    What only evaluations measure is shown until the next one, and each evaluation leaves a line behind.

    Args:
        display: shows the bars; None: a display that only this terminal has.
    """

    SHOWN = (
        ("reward", "reward {:.3f}"),
        ("second_opinion", "second opinion {:.3f}"),
        ("gold", "gold {:.3f}"),
        ("judge", "judge {:.3f}"),
        ("kl", "KL {:.3f}"),
        ("loss", "loss {:.4f}"),
        ("accuracy", "accuracy {:.3f}"),
        ("check", "check {:.2f}"),
        ("time/tokens_per_s", "{:,.0f} tokens/s"),
    )
    EVALUATED = ("second_opinion", "gold", "judge")

    def __init__(self, display: ProgressDisplay | None = None) -> None:
        self._display = display or ProgressDisplay()
        self._owns = display is None
        self._bars: dict[str, ProgressBar] = {}
        self._measured: dict[str, dict[str, float | int]] = {}  # stage -> what its last evaluation measured

    def start(self, stage: str, total: int | None, resume_from: int | None) -> None:
        """Shows a bar for `stage` of `total` steps (None: unknown) that begins after `resume_from`."""
        self._display.begin(stage)
        self._bars[stage] = self._display.add(stage, total, start=resume_from or 0, text="compiling")
        self._measured[stage] = {}

    def write(self, stage: str, step: int, values: Numbers) -> None:
        """Moves the bar of `stage` to `step` and shows those of the `values` that SHOWN names."""
        new = {name: value for name in self.EVALUATED if (value := values.get(name)) is not None}
        self._measured[stage] |= new
        shown = {**values, **self._measured[stage]}
        text = "  ".join(f.format(shown[name]) for name, f in self.SHOWN if shown.get(name) is not None)
        self._bars[stage].update(step, text, keep=bool(new))

    def flush(self) -> None:
        """Does nothing: the terminal shows every number at once."""

    def end(self, stage: str) -> None:
        """Closes the bar of `stage`."""
        self._bars.pop(stage).close()

    def close(self) -> None:
        """Closes the display, unless the run goes on to use it."""
        if self._owns:
            self._display.close()


class TensorBoard:
    """Writes TensorBoard events to `folder/STAGE`: each stage is a TensorBoard run.

    (A purge hides every event of its run from a step on, whatever the tag, so stages cannot share one.) The
    calling thread writes the events: tensorboardX's `SummaryWriter` hands them to a thread through a short
    queue, and when a full disk ends that thread the training would wait for the queue for ever.
    """

    FLUSH_EVERY_S = 10.0

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}  # stage -> its EventsWriter
        self._flushed_at = -math.inf

    def start(self, stage: str, total: int | None, resume_from: int | None) -> None:
        # Lazy: half a second that `--help` need not pay.
        """Opens the events of `stage`; events after the step `resume_from` (None: all events) become void.

        `total` is not read.

        Raises:
            UserError: the file cannot be written.
        """
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        purge = 0 if resume_from is None else resume_from + 1
        with self._writable(stage):
            (self._folder / stage).mkdir(parents=True, exist_ok=True)
            # The name has whole seconds only: the suffix keeps a quick restart from overwriting the file.
            self._files[stage] = EventsWriter(str(self._folder / stage / "events"), f".{time.time_ns()}")
            self._files[stage].write_event(event_pb2.Event(wall_time=time.time(), step=purge, session_log=log))

    def write(self, stage: str, step: int, values: Numbers) -> None:
        """Writes the finite ones of `values` as scalars of `stage` at `step`; flushes every 10 seconds.

        Raises:
            UserError: the file cannot be written.
        """
        from tensorboardX.proto import event_pb2, summary_pb2

        finite = {key: value for key, value in values.items() if value is not None}
        summary = summary_pb2.Summary(
            value=[summary_pb2.Summary.Value(tag=key, simple_value=value) for key, value in finite.items()]
        )
        with self._writable(stage):
            self._files[stage].write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed_at > self.FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Writes all events to disk.

        Raises:
            UserError: a file cannot be written.
        """
        self._flushed_at = time.monotonic()
        for stage, file in self._files.items():
            with self._writable(stage):
                file.flush()

    def end(self, stage: str) -> None:
        """Closes the events of `stage`.

        Raises:
            UserError: the file cannot be written.
        """
        with self._writable(stage):
            self._files.pop(stage).close()

    def close(self) -> None:
        """Does nothing: `end` has closed the file of each stage."""

    @contextmanager
    def _writable(self, stage: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _unwritable(self._folder / stage, error) from error
