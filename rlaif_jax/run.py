"""The life of a run: its folder, the stages before its loop, and how it ends."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import jax

from rlaif_jax.checkpoint import StagePart, load_params, save_params
from rlaif_jax.config import (
    CheckFailed,
    Diverged,
    StopRequested,
    UserError,
    changed_settings,
    differing,
    require,
    save_config,
    to_json,
)
from rlaif_jax.files import LOCK, FolderLock, atomic_write, require_folder, require_run_or_nothing
from rlaif_jax.metrics import read_appended
from rlaif_jax.progress.display import ProgressDisplay
from rlaif_jax.progress.startup import command_text
from rlaif_jax.report.environment import made_by, save_environment
from rlaif_jax.report.report import write_report
from rlaif_jax.types import Params


class FinishedStage(NamedTuple):
    """A stage before the loop that is done.

    Attributes:
        key: the name of its folder, made of all that its parameters depend on.
        params: its parameters, a pytree of arrays.
    """

    key: str
    params: Params


class Run:
    """A run's folder as a context manager.

    Inside, SIGTERM and the first Ctrl-C set `stop_requested`, and end a wait that is `interruptible`: the loop saves a
    checkpoint and leaves. At the end
    summary.json and report.html are written, with the status done, stopped, failed or diverged. A `UserError` before
    anything was computed removes the folder again: bad input leaves no half-written run.

    If the folder holds a run already, that run is resumed with `resume`, else it is moved to NAME.1, NAME.2 ...: nothing
    that was collected is lost. While a run is going on in the folder, another one is refused. A resumed run must have the
    settings that it was started with, except for where its files are (`out`, `stages`) and it is shown (`tracking`), `resume`,
    when it warns (`watch`) and more `steps`, which go on from its end. One that has diverged needs another `watch`.

    Args:
        folder: the run's folder.
        experiment: its name in summary.json.
        config: the settings, a dataclass.
        seed: of everything random, in 0 .. 2**32 - 1.
        resume: go on with the run in `folder`.
        stages: the folder of finished stages, which several runs may share; None: `folder`/checkpoints/stages.
        display: the display of the run that this one is a part of; None: the run has one.

    Attributes:
        display: shows on the terminal how far the run is.
        metrics, checks, warnings, missing, claims: go to summary.json; `missing` counts missing judgements by reason.
        story: sentences in plain words for the terminal's end and the page's top: what happened, and what to do next.
        verdict: better, no different or worse (`verdict_of`); None where nobody compares.
        steps_done: steps of the loop.
        stop_requested: whether a person or the system asked the run to stop.
        resuming: whether the run was begun by an earlier process.
        part: keeps how far the stage is that is being made.
    """

    def __init__(
        self,
        folder: Path,
        experiment: str,
        config: Any,
        *,
        seed: int,
        resume: bool = False,
        stages: Path | None = None,
        display: ProgressDisplay | None = None,
    ) -> None:
        require(0 <= seed < 2**32, f"seed must lie in 0 .. 2**32 - 1, not {seed}")
        self.folder, self.experiment, self.seed = Path(folder), experiment, seed
        self.config, self.resuming = config, resume
        self.display, self._is_part = display or ProgressDisplay(), display is not None
        self.stop_requested = False
        self.metrics: dict[str, Any] = {}
        self.checks: dict[str, bool] = {}
        self.warnings: list[str] = []
        self.missing: dict[str, int] = {}
        self.claims: list[dict[str, Any]] = []
        self.story: list[str] = []
        self.verdict: str | None = None
        self.steps_done = 0
        self._command = command_text(sys.orig_argv)
        self._sampled_at: int | None = None  # the step of the last sample on the terminal
        self._stages = stages or self.folder / "checkpoints" / "stages"
        self._used_stages: dict[str, str] = {}  # key -> "made" or "reused"
        self._started = time.time()
        self.part = StagePart(self.folder / "checkpoints" / "part" / "stage")
        self._making: str | None = None  # the stage that is being made
        self._interruptible = False  # a stop need not wait for what is done at the moment
        self._settled = False  # something worth keeping has been computed
        self._aside: Path | None = None  # the new place of an earlier run of this folder
        self._lock: FolderLock | None = None

    def __enter__(self) -> Run:
        try:
            self._take_folder()
        except BaseException as error:
            self._undo()
            if isinstance(error, OSError):
                raise UserError(
                    f"{self.folder}: the run folder cannot be written ({error.strerror or error}); "
                    "choose another --out or free some space"
                ) from error
            raise
        self._handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        self.display.print(f"{self.experiment}: seed {self.seed}, run folder {self.folder}")
        if not self._is_part:
            self.display.open(self.experiment)
        return self

    def _take_folder(self) -> None:
        """Makes the folder, or takes up that of the resumed run, for this run alone."""
        folder = self.folder
        if self.resuming and not (folder / "config.json").exists():
            raise UserError(f"{folder}: there is no run to resume here (no config.json); start it without --resume")
        require_folder(folder, "a run needs")
        require_folder(self._stages, "stages need")
        if not self.resuming:
            require_run_or_nothing(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder)
        if self.resuming:
            self._lock, self._settled = lock, True
            self._continue()
            return
        if any(path.name != LOCK for path in folder.iterdir()):
            names = (folder.with_name(f"{folder.name}.{i}") for i in range(1, 10_000))
            self._aside = folder.rename(next(path for path in names if not path.exists()))
            lock.release(self._aside)
            folder.mkdir()
            lock = FolderLock(folder)
        self._lock = lock
        save_config(self.config, folder / "config.json")
        save_environment(folder)

    def _undo(self) -> None:
        """Leaves the folder as it was before this run, unless the run is settled or has never had the folder."""
        if self._lock is None:
            return
        if not self._settled:
            shutil.rmtree(self.folder)
            if self._aside is not None:
                self._aside.rename(self.folder)
        self._lock.release(self.folder)

    def _continue(self) -> None:
        """Takes over the summary of the run that is resumed; raises UserError if its settings were others."""
        folder = self.folder
        try:
            saved = json.loads((folder / "config.json").read_text())
            summary = folder / "summary.json"
            before: dict[str, Any] = json.loads(summary.read_text()) if summary.exists() else {}
        except ValueError as error:
            raise UserError(f"{folder}: config.json or summary.json is damaged ({error})") from error
        try:
            changed = changed_settings(saved, to_json(self.config))
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        require(
            before.get("status") != "diverged" or any("watch" in line.split()[0].split(".") for line in changed),
            f"{folder}: this run has diverged, and with the same settings it would again. Resume it with another bound, "
            "such as --train.watch.kl-limit, or with --train.watch.no-stop to go on from its last healthy checkpoint "
            "whatever happens; or start a new run with other settings, without --resume",
        )
        if changed:
            save_config(self.config, folder / "config.json")
            print(f"{folder}: resumed with other settings: {'; '.join(changed)}", file=sys.stderr)
        self._started -= before.get("wall_s", 0.0)
        self.metrics, self.checks = before.get("metrics", {}), before.get("checks", {})
        self.warnings, self.missing = before.get("warnings", []), before.get("missing", {})
        self._used_stages = before.get("stages", {})
        self._command = before.get("command", self._command)

    def stage(
        self,
        name: str,
        like: Params,
        make: Callable[..., Params],
        *,
        settings: Any,
        after: Sequence[FinishedStage] = (),
    ) -> FinishedStage:
        """Returns the parameters of a stage before the loop, made now or read back.

        A stage is read back if it was made before, by this run or by one that shares the folder. It is made again when
        anything differs that it depends on: `settings`, the run's seed, the stages of `after`, the arrays' shapes, the code
        of this package and of the script, the libraries, the backend. Only a resumed run keeps to the stages that it began
        with, and warns if the code has changed since.
        A stage that was stopped is made again, from where its function has kept it (`part`).

        Args:
            name: for people; the first part of the folder's name.
            like: a pytree of arrays or `jax.ShapeDtypeStruct`, of the result's shapes and dtypes.
            make: a function that is called with the parameters of each stage of `after` and returns the stage's own.
                It should leave nothing else that the run needs: it is not called when the stage is reused.
            settings: a dataclass, or a dict of JSON values and dataclasses: everything else that `make` depends on.
            after: the stages that `make` builds on.

        Raises:
            StopRequested: the run was asked to stop while `make` worked.
            UserError: the stage cannot be written, or a kept one is damaged.
        """
        described = {
            "stage": name,
            "seed": self.seed,
            "settings": to_json(settings),
            "after": [stage.key for stage in after],
            "arrays": {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in _leaves(like)},
        }
        by = made_by(make)
        stem = f"{name}-{_digest(described)}"
        key = f"{stem}-{_digest(by)[:8]}"
        if self.resuming:
            known = [used for used in self._used_stages if used.startswith(f"{stem}-") and self._stage_exists(used)]
            if known and key not in known:
                key = known[0]
                self.warn(f"the stage {key} was made by another version of the code; a resumed run keeps to it")
        kept = self._stage_exists(key)
        self.display.begin(name, skipped=kept)
        if not kept:
            self._making, self.part = name, StagePart(self.folder / "checkpoints" / "part" / key)
            params = make(*(stage.params for stage in after))
            if self.stop_requested:
                raise StopRequested
            self._making = None
            kept = not save_params(self._stages / key, params, {**described, "made_by": by})
            self.part.remove()
            self.settled()
        if kept:
            params, saved = load_params(self._stages / key, like)
            changed = differing({**saved, "made_by": None}, {**described, "made_by": None})
            require(not changed, f"{self._stages / key}: settings.json is of another stage: {'; '.join(changed)}")
            print(f"[{name}] reused from {self._stages / key}", file=sys.stderr)
        self._used_stages.setdefault(key, "reused" if kept else "made")
        self.report()
        return FinishedStage(key, params)

    def _stage_exists(self, key: str) -> bool:
        return (self._stages / key).is_dir()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stop_requested:  # at a second Ctrl-C the person does not want to wait
            raise KeyboardInterrupt
        self.stop_requested = True
        part = f"the stage {self._making} is not done; when resumed it goes on from its last check, if it has checks"
        part = part if self._making else "what is computed is saved"
        print(f"\nstopping: {part} (once more to leave at once)", file=sys.stderr)
        if self._interruptible:
            raise StopRequested

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Lets a stop end the block at once: for waits that can be begun again, such as those for a judge.

        Raises:
            StopRequested: SIGTERM or Ctrl-C came in the block, or before it.
        """
        self._interruptible = True
        try:
            if self.stop_requested:
                raise StopRequested
            yield
        finally:
            self._interruptible = False
        if self.stop_requested:  # the block has noticed the stop itself, and left something undone
            raise StopRequested

    def settled(self) -> None:
        """Keeps the folder from now on, whatever happens."""
        self._settled = True

    def stopped(self) -> bool:
        """Returns whether SIGTERM or Ctrl-C has asked this run to stop; long stages poll this function."""
        return self.stop_requested

    def check(self, name: str, holds: bool) -> bool:
        """Records the check `name` of the run; a check that failed once stays failed.

        Args:
            name: the name of the check.
            holds: whether it holds now.

        Returns:
            Whether it has held every time.
        """
        self.checks[name] = bool(holds) and self.checks.get(name, True)
        return self.checks[name]

    def warn(self, text: str) -> None:
        """Prints a warning and records it for summary.json and the page; the same warning only once."""
        if text not in self.warnings:
            self.warnings.append(text)
            print(f"warning: {text}", file=sys.stderr)

    def sample(self, **fields: Any) -> None:
        """Appends `fields`, JSON values, as a line to samples.jsonl; raises UserError if it cannot be written.

        The first sample of each evaluation during training is also shown on the terminal.
        """
        path = self.folder / "samples.jsonl"
        try:
            with open(path, "a") as file:
                file.write(json.dumps(fields) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        if fields.get("stage") == "rl" and fields["step"] != self._sampled_at and fields.get("chosen") != "worst":
            self._sampled_at = fields["step"]
            title = f"step {fields['step']}, an answer to a held-out prompt:"
            self.display.sample(title, str(fields["prompt"]), str(fields["response"]))

    def drop_samples(self, stage: str, after: int = -1) -> None:
        """Removes from samples.jsonl what an earlier process has written and this one writes again.

        Args:
            stage: their stage.
            after: the last step whose samples stay.

        Raises:
            UserError: the file is damaged or cannot be written.
        """
        path = self.folder / "samples.jsonl"
        if path.exists():
            lines = read_appended(path).values()
            kept = [line for line in lines if line.get("stage") != stage or line.get("step", 0) <= after]
            with atomic_write(path) as file:
                file.writelines(json.dumps(line) + "\n" for line in kept)

    def report(self, status: str = "running", error: BaseException | None = None) -> None:
        """Writes summary.json and report.html from what is known by now.

        Args:
            status: running, done, stopped, failed or diverged.
            error: why the run has failed or diverged.

        Raises:
            UserError: a file cannot be written.
        """
        summary = {
            "experiment": self.experiment,
            "status": status,
            **({} if error is None else {"error": _error_text(error)}),
            "command": self._command,
            "seed": self.seed,
            "steps": self.steps_done,
            "wall_s": round(time.time() - self._started, 3),
            "metrics": self.metrics,
            "checks": self.checks,
            "warnings": self.warnings,
            "missing": self.missing,
            "claims": self.claims,
            "story": self.story,
            "verdict": self.verdict,
            "stages": self._used_stages,
        }
        with self.display.wait("the run's page"):
            with atomic_write(self.folder / "summary.json") as file:
                file.write(json.dumps(summary, indent=1) + "\n")
            write_report(self.folder)

    @property
    def wall_s(self) -> float:
        """Seconds since the run began, summed over its resumes."""
        return time.time() - self._started

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        try:
            return self._end(error)
        finally:
            if self._lock is not None:
                self._lock.release(self.folder)
            if not self._is_part:
                self.display.close()

    def _end(self, error: BaseException | None) -> bool:
        """Writes the last report and prints how the run ended; returns whether `error` is dealt with."""
        if isinstance(error, UserError) and not self._settled:
            self._undo()
            return False
        if self._aside is not None:
            print(f"{self.folder} held a run already: it is now {self._aside}", file=sys.stderr)
        stopped = isinstance(error, (StopRequested, KeyboardInterrupt)) or (error is None and self.stop_requested)
        ended = "done" if error is None else "diverged" if isinstance(error, Diverged) else "failed"
        status = "stopped" if stopped else ended
        try:
            self.report(status, None if stopped else error)
        except Exception:
            if error is None:  # else the first error counts
                raise
        if self.warnings:  # they may have scrolled away
            self.display.print("\n".join(["This run warned:", *(f"  {warning}" for warning in self.warnings)]))
        for sentence in self.story:
            self.display.print(sentence)
        if self.verdict:
            self.display.print(f"Verdict: {self.verdict}")
        self.display.print(f"{status}: the run's page is {self.folder / 'report.html'}")
        if status == "stopped":
            print(
                f"stopped after step {self.steps_done}: the same script with --resume --out {self.folder} goes on",
                file=sys.stderr,
            )
        return isinstance(error, StopRequested)


def _error_text(error: BaseException) -> str:
    """Returns the message of an error, with its kind where it was not written for a person."""
    written = isinstance(error, (UserError, CheckFailed, Diverged, FloatingPointError))
    return str(error) if written else f"{type(error).__name__}: {error}"


# ---- The key of a stage


def _leaves(like: Params) -> Sequence[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(like)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
