"""Weights & Biases as a sink: one W&B run for a run folder, over all its resumes."""

from __future__ import annotations

import dataclasses
import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from rlaif_jax.config import (
    StopRequested,
    UserError,
    check_choices,
    missing_extra,
    require,
    to_json,
    without_credentials,
    without_secrets,
)
from rlaif_jax.files import atomic_write, read_json_lines
from rlaif_jax.progress.display import ProgressDisplay
from rlaif_jax.sinks.base import Numbers, Sink
from rlaif_jax.sinks.tensorboard import TensorBoard

ID_FILE = "wandb_id"
"""The file of the run folder that holds the id of its W&B run."""


@dataclasses.dataclass(frozen=True)
class Tracking:
    """Where a run is shown besides its folder; a resumed run may change it.

    Attributes:
        wandb: Weights & Biases: online sends numbers, settings and samples to its server, with the key of `wandb login`
            or $WANDB_API_KEY; offline keeps them in the run folder for `wandb sync`. Both need the
            extra `wandb`: pip install -e '.[wandb]' in the project's folder.
        project: the project of W&B.
        entity: the user or team of W&B that owns the project; "" = the default one of the key.
        group: the group of W&B that the run belongs to, such as the name of a sweep; "" = none.
    """

    wandb: Literal["disabled", "online", "offline"] = "disabled"
    project: str = "rlaif-jax"
    entity: str = ""
    group: str = ""

    def __post_init__(self) -> None:
        check_choices(self, "tracking")
        require(
            re.fullmatch(r"[^/\\#?%:]{1,128}", self.project) is not None,
            f"tracking.project is {self.project!r}; W&B takes 1 to 128 characters, none of them one of / \\ # ? % :",
        )

    def check(self) -> None:
        """Raises UserError if the package `wandb` is needed and not installed."""
        if self.wandb != "disabled":
            try:  # the name, as a folder `wandb` of an earlier run can be imported as an empty package
                from wandb import init  # noqa: F401
            except ImportError as error:
                raise missing_extra(
                    f"tracking.wandb {self.wandb} needs the package wandb ({error})", "wandb"
                ) from error


class TrackedRun(Protocol):
    """What a tracker sees of a run: `rlaif_jax.run.Run` has it all."""

    folder: Path
    experiment: str
    config: Any
    display: ProgressDisplay
    metrics: dict[str, Any]
    checks: dict[str, bool]
    verdict: str | None

    def warn(self, text: str) -> None:
        """Prints and records a warning, the same one only once."""


@contextmanager
def tracked(run: TrackedRun, tracking: Tracking) -> Iterator[Sequence[Sink]]:
    """Opens the sinks of a run for its `MetricsWriter`: TensorBoard, and W&B if `tracking` says so.

    At the end of the block W&B gets the final numbers of the run and its samples. Whatever fails in W&B is one warning
    of the run; the block goes on without W&B.

    Args:
        run: the run, inside its own block.
        tracking: where the run is shown.

    Raises:
        UserError: the package `wandb` is needed and not installed.
    """
    tracking.check()
    board = TensorBoard(run.folder / "tensorboard")
    if tracking.wandb == "disabled":
        yield (board,)
        return
    sink = Wandb(run, tracking)
    try:
        yield (board, sink)
    except BaseException as error:
        sink.finish(failed=not isinstance(error, (StopRequested, KeyboardInterrupt)))
        raise
    sink.finish(failed=False)


class Wandb:
    """Sends a run's numbers to Weights & Biases, as STAGE/NAME over STAGE/step.

    The id of the W&B run is in the run folder, so that a resume continues its curves. W&B takes nothing back: after a
    kill, the steps that are computed again are there twice, with equal values. Output, code, git state and command line
    are not sent; settings are sent without secrets.

    Without a network, or a key that the server takes, W&B is kept offline. A later call that fails ends it. Either is one
    warning of the run; no call asks a person for a key.

    Args:
        run: the run.
        tracking: project, entity, group and mode.
    """

    INIT_TIMEOUT_S = 30.0
    FINISH_TIMEOUT_S = 60.0

    def __init__(self, run: TrackedRun, tracking: Tracking) -> None:
        self._run, self._tracking = run, tracking
        self._warned = False
        self._wandb: Any = None  # the run of W&B; None: not begun, ended or given up
        mode: Literal["online", "offline"] = "offline"
        with self._guarded():
            if tracking.wandb == "online":
                _log_in()
                mode = "online"
        with self._guarded():
            self._wandb = self._begin(mode)

    def _begin(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        tracking, folder = self._tracking, self._run.folder
        begun = wandb.init(
            id=_run_id(folder / ID_FILE),
            resume="allow",
            reinit="create_new",  # sets no global run
            mode=mode,
            project=tracking.project,
            entity=tracking.entity or None,
            group=tracking.group or None,
            name=folder.resolve().name,
            job_type=self._run.experiment,
            config=without_secrets(to_json(self._run.config)),
            dir=str(folder),
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                save_code=False,
                x_disable_meta=True,  # it holds the command line, and so what a URL on it holds
                init_timeout=self.INIT_TIMEOUT_S,
                finish_timeout=self.FINISH_TIMEOUT_S,
                finish_timeout_raises=True,
            ),
        )
        where = begun.url if mode == "online" else f"offline; `wandb sync {begun.settings.sync_dir}` sends it"
        self._run.display.print(f"W&B: {where}")
        return begun

    def start(self, stage: str, total: int | None, resume_from: int | None) -> None:
        """Makes `stage`/step the axis of the numbers of `stage`; `total` and `resume_from` are not read."""
        with self._guarded():
            if self._wandb is not None:
                self._wandb.define_metric(f"{stage}/step", hidden=True)
                self._wandb.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def write(self, stage: str, step: int, values: Numbers) -> None:
        """Sends the finite ones of `values`, of one `step` of `stage`."""
        with self._guarded():
            if self._wandb is not None:
                finite = {f"{stage}/{key}": value for key, value in values.items() if value is not None}
                self._wandb.log({f"{stage}/step": step, **finite})

    def flush(self) -> None:
        """Does nothing: W&B's own process has every number at once, also when this one is killed."""

    def end(self, stage: str) -> None:
        """Does nothing: the numbers of a stage have no end in W&B."""

    def close(self) -> None:
        """Does nothing: the final numbers of the run are not known yet (see `finish`)."""

    def finish(self, *, failed: bool) -> None:
        """Sends the final numbers and the samples, and ends the W&B run; a second call does nothing.

        Args:
            failed: whether an error has ended the run.
        """
        ended, run = self._wandb, self._run
        if ended is None:
            return
        with self._guarded():
            checks = {f"checks/{name}": holds for name, holds in run.checks.items()}
            ended.summary.update({**run.metrics, **checks, **({"verdict": run.verdict} if run.verdict else {})})
        with self._guarded():
            from wandb import Table

            columns, rows = _table(run.folder / "samples.jsonl")
            if rows:
                ended.log({"samples": Table(columns=[*columns], data=rows, allow_mixed_types=True)})
        with self._guarded():
            ended.finish(exit_code=int(failed))
        self._wandb = None

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of the many kinds of W&B, its server and the network
            self._wandb = None
            if not self._warned:
                said = without_credentials(" ".join(str(error).split())) or type(error).__name__
                self._run.warn(
                    f"W&B: {said}. The run goes on, and its folder has all numbers; what W&B has kept of them is in "
                    f"{self._run.folder / 'wandb'}, for `wandb sync`"
                )
            self._warned = True


def _log_in() -> None:
    """Asks W&B's server whether it takes the key; raises an error of W&B or UserError."""
    import wandb

    # A run that begins and fails would keep its id: the same one could not be begun again offline.
    if not wandb.login(prompt=False, verify=True):
        raise UserError("no key: `wandb login` or the environment variable WANDB_API_KEY gives one")


def _run_id(path: Path) -> str:
    """Returns the id of the W&B run of a run folder, made at the first call."""
    if path.exists():
        found = path.read_text().strip()
        require(
            re.fullmatch(r"[0-9a-z]{1,64}", found) is not None,
            f"{path} should hold the id of a W&B run, small letters and digits; delete the file to begin a new W&B run",
        )
        return found
    made = uuid.uuid4().hex[:16]
    with atomic_write(path) as file:
        file.write(f"{made}\n")
    return made


def _table(path: Path) -> tuple[list[str | int], list[list[Any]]]:
    """Returns (columns, rows) of a file of JSON objects.

    A field that a row lacks is None; a nested value is JSON.
    """

    def parse(value: Any, place: str) -> Mapping[str | int, Any]:
        require(isinstance(value, dict), f"{place}: should be one JSON object")
        return value

    samples, _ = read_json_lines(path, parse) if path.exists() else ([], [])
    columns: list[str | int] = list(dict.fromkeys(key for sample in samples for key in sample))
    cell = lambda value: json.dumps(value) if isinstance(value, (dict, list)) else value
    return columns, [[cell(sample.get(key)) for key in columns] for sample in samples]
