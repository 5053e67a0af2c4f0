"""The life of a run: its folder opened or resumed, stopped by a person, ended as done, stopped or failed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import jax
import tyro

from rlaif_jax.checkpoint import load_params, save_params
from rlaif_jax.config import CheckFailed, UserError, differing, require, save_config, to_json
from rlaif_jax.report.report import save_environment, write_report
from rlaif_jax.types import Params


class StopRequested(Exception):
    """SIGTERM or Ctrl-C came, outside the loop that would have saved; the run ends as `stopped`."""


class Run:
    """A run's folder as a context manager.

    Inside, SIGTERM and the first Ctrl-C only set `stop_requested`: the loop saves a checkpoint and leaves. On the way
    out summary.json and report.html are written, with status done, stopped or failed. A `UserError` before anything
    was computed removes the folder again: bad input leaves no half-written run.

    A folder that holds a run already is resumed with `resume`, else it is moved aside to NAME.1, NAME.2 ...: nothing
    collected is lost. A resumed run must have the settings it was started with, but for `out` and `resume`.
    """

    def __init__(self, folder: Path, experiment: str, config: Any, *, seed: int, resume: bool = False) -> None:
        require(0 <= seed < 2**32, f"seed must lie in 0 .. 2**32 - 1, not {seed}")
        self.folder, self.experiment, self.seed = Path(folder), experiment, seed
        self.config, self.resuming = config, resume
        self.stop_requested = False
        self.metrics: dict[str, Any] = {}
        self.checks: dict[str, bool] = {}
        self.claims: list[dict[str, Any]] = []
        self.steps_done = 0
        self._started = time.time()
        self._settled = False  # something worth keeping has been computed
        self._aside: Path | None = None  # where the run that stood here before has gone

    def __enter__(self) -> Run:
        folder = self.folder
        try:
            if self.resuming and not (folder / "config.json").exists():
                raise UserError(f"{folder}: there is no run to resume here (no config.json); start it without --resume")
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{folder} is a file; a run needs a folder")
            if not self.resuming and folder.exists() and any(folder.iterdir()):
                names = (folder.with_name(f"{folder.name}.{i}") for i in range(1, 10_000))
                self._aside = next(path for path in names if not path.exists())
                folder.rename(self._aside)
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise UserError(f"{folder}: this folder cannot be written; choose another --out")
            if self.resuming:
                self._settled = True
                self._continue()
            else:
                save_config(self.config, folder / "config.json")
                save_environment(folder)
        except OSError as error:
            raise UserError(
                f"{folder}: the run folder cannot be written ({error.strerror or error}); "
                "choose another --out or free some space"
            ) from error
        self._handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _continue(self) -> None:
        """Take over the clock, metrics and checks of the run that is resumed, after a look at its settings."""
        try:
            saved = json.loads((self.folder / "config.json").read_text())
            summary = self.folder / "summary.json"
            before = json.loads(summary.read_text()) if summary.exists() else {}
        except ValueError as error:
            raise UserError(f"{self.folder}: config.json or summary.json is damaged ({error})") from error
        changed = [line for line in differing(saved, to_json(self.config)) if line.split()[0] not in ("out", "resume")]
        require(not changed, f"{self.folder}: the run was started with another config: {'; '.join(changed)}")
        self._started -= before.get("wall_s", 0.0)
        self.metrics, self.checks = before.get("metrics", {}), before.get("checks", {})

    def stage(self, name: str, like: Params, make: Callable[[], Params]) -> Params:
        """The parameters of a stage before the loop: made by `make` and kept, or read back when the run is resumed.

        A stage that was stopped half-way is not kept: StopRequested, and a resume starts it again.
        """
        folder = self.folder / "checkpoints" / f"stage_{name}"
        if self.resuming and folder.exists():
            return load_params(folder, like)
        params = make()
        if self.stop_requested:
            raise StopRequested
        save_params(folder, params)
        self.report()
        return params

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stop_requested:  # a second Ctrl-C means now
            raise KeyboardInterrupt
        self.stop_requested = True
        print("\nstopping: this step is finished, a checkpoint saved (once more to leave at once)", file=sys.stderr)

    def settled(self) -> None:
        """From here on the folder is kept whatever happens."""
        self._settled = True

    def stopped(self) -> bool:
        """Whether somebody asked to stop; as a callable for long stages."""
        return self.stop_requested

    def check(self, name: str, holds: bool) -> bool:
        """Record a check of the run; once failed it stays failed."""
        self.checks[name] = bool(holds) and self.checks.get(name, True)
        return self.checks[name]

    def sample(self, **fields: Any) -> None:
        """Append a line to samples.jsonl."""
        with open(self.folder / "samples.jsonl", "a") as file:
            file.write(json.dumps(fields) + "\n")

    def report(self, status: str = "running") -> None:
        """Write summary.json and report.html as things stand."""
        summary = {
            "experiment": self.experiment,
            "status": status,
            "seed": self.seed,
            "steps": self.steps_done,
            "wall_s": round(time.time() - self._started, 3),
            "metrics": self.metrics,
            "checks": self.checks,
            "claims": self.claims,
        }
        temporary = self.folder / "summary.json.tmp"
        temporary.write_text(json.dumps(summary, indent=1) + "\n")
        temporary.replace(self.folder / "summary.json")
        write_report(self.folder)

    @property
    def wall_s(self) -> float:
        """Seconds since the run began, over all its resumes."""
        return time.time() - self._started

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if isinstance(error, UserError) and not self._settled:
            shutil.rmtree(self.folder)
            if self._aside is not None:
                self._aside.rename(self.folder)
            return False
        if self._aside is not None:
            print(f"{self.folder} held a run already: it is now {self._aside}", file=sys.stderr)
        stopped = isinstance(error, (StopRequested, KeyboardInterrupt)) or (error is None and self.stop_requested)
        status = "stopped" if stopped else "done" if error is None else "failed"
        try:
            self.report(status)
        except OSError as full:
            if error is None:
                raise UserError(f"{self.folder}: the report cannot be written ({full.strerror or full})") from full
        if status == "stopped":
            print(f"stopped after step {self.steps_done}; go on with --resume --out {self.folder}", file=sys.stderr)
        return isinstance(error, StopRequested)


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, in $JAX_COMPILATION_CACHE_DIR or ~/.cache/rlaif_jax/xla."""
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        base = Path(os.environ.get("RLAIF_JAX_CACHE", Path.home() / ".cache" / "rlaif_jax"))
        jax.config.update("jax_compilation_cache_dir", str(base / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def command_line(main: Callable[[Any], Any], default: Any, description: str | None = None) -> None:
    """Parse the options of `default` (a frozen dataclass), run `main(config)`; exit 2 with one line on bad input."""
    try:
        config = tyro.cli(type(default), default=default, description=description)
        use_compilation_cache()
        main(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (CheckFailed, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
