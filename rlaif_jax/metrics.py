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
from typing import Any

from rlaif_jax.config import UserError, require
from rlaif_jax.files import atomic_write, read_json_lines
from rlaif_jax.progress.display import ProgressDisplay
from rlaif_jax.sinks.base import Numbers, Sink, unwritable
from rlaif_jax.sinks.tensorboard import TensorBoard
from rlaif_jax.sinks.terminal import Terminal

RL_STAGE = "rl"
"""The stage of the training loop; also that of a line without "stage"."""


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
            raise unwritable(self.path, error) from error
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
            raise unwritable(self.path, error) from error
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
            raise unwritable(self.path, error) from error
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
