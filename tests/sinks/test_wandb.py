"""Weights & Biases with the real package: offline, resumed, without a key, a network or the package."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlaif_jax.config import UserError
from rlaif_jax.metrics import MetricsWriter, read_metrics
from rlaif_jax.run import Run
from rlaif_jax.sinks.wandb import Tracking, tracked
from tests.sinks.wandb_file import history, records, values
from tests.sinks.wandb_server import serve

ROOT = Path(__file__).parents[2]
OFFLINE = Tracking("offline", project="p", entity="team", group="sweep-1")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings with secrets.

    Attributes:
        out: the run's folder.
        tracking: where the run is shown.
        server: an address with a password.
        api_key: a key.
        learning_rate: a number.
    """

    out: Path
    tracking: Tracking = OFFLINE
    server: str = "https://me:hunter2@host/v1"
    api_key: str = "sk-hidden"
    learning_rate: float = 0.5


def track(out: Path, steps: range, *, resume: bool = False, tracking: Tracking = OFFLINE, fails: bool = False) -> Run:
    """A run with two stages, the second of which goes through `steps`; returns it."""
    settings = Settings(out, tracking)
    with (
        Run(out, "tracked", settings, seed=0, resume=resume) as run,
        tracked(run, tracking) as sinks,
        MetricsWriter(out, terminal=False, sinks=sinks) as writer,
    ):
        run.settled()
        if not resume:
            with writer.stage("sft", 1) as log:
                log.write(1, {"loss": 2.0})
        with writer.stage("rl", 9, resume_from=steps.start - 1 or None) as log:
            for step in steps:
                log.write(step, {"reward": step / 4, "kl": math.nan})
            log.flush()
        run.metrics |= {"gain": 1.5, "gain_ci95": [1.0, 2.0]}
        run.check("eos", True)
        run.verdict = "better"
        run.sample(stage="after", step=steps.stop - 1, prompt="<b>p</b>", response="a", scores={"a": 1})
        run.sample(stage="after", step=steps.stop - 1, prompt="q", response="r", chosen="worst")
        if fails:
            raise FloatingPointError("a loss is not finite")
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    pytest.importorskip("wandb", reason="needs the extra wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [sys.argv[0], "--server=https://me:hunter2@host/v1", "--api-key=sk-hidden"])
        return track(tmp_path_factory.mktemp("runs") / "one", range(1, 4))


def test_stages_are_prefixes_and_axes_and_what_is_not_finite_is_left_out(run):
    assert history(run.folder)[:4] == [
        {"sft/step": 1, "sft/loss": 2.0},
        {"rl/step": 1, "rl/reward": 0.25},
        {"rl/step": 2, "rl/reward": 0.5},
        {"rl/step": 3, "rl/reward": 0.75},
    ]
    axes = {r.metric.glob_name: r.metric.step_metric for r in records(run.folder) if r.metric.glob_name}
    assert axes == {"sft/*": "sft/step", "rl/*": "rl/step"}


def test_the_run_has_its_names_and_its_settings_without_secrets(run):
    (begun,) = [record.run for record in records(run.folder) if record.HasField("run")]
    assert begun.run_id == (run.folder / "wandb_id").read_text().strip()
    names = (begun.project, begun.entity, begun.run_group, begun.display_name, begun.job_type)
    assert names == ("p", "team", "sweep-1", "one", "tracked")
    config = {name: value for name, value in values(begun.config.update).items() if name != "_wandb"}
    assert config == {
        "out": str(run.folder),
        "tracking": {"wandb": "offline", "project": "p", "entity": "team", "group": "sweep-1"},
        "server": "https://(hidden)@host/v1",
        "api_key": "(hidden)",
        "learning_rate": 0.5,
    }


def test_no_file_of_wandb_has_a_secret_of_the_settings_or_the_command_line(run):
    files = [path for path in (run.folder / "wandb").rglob("*") if path.is_file()]
    assert {"requirements.txt", "debug.log"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert b"hunter2" not in content and b"sk-hidden" not in content, path


def test_the_summary_has_the_final_numbers_and_the_samples_are_a_table(run):
    summary = {}
    for record in records(run.folder):
        summary |= values(record.summary.update)
    assert {"gain": 1.5, "gain_ci95": [1.0, 2.0], "checks/eos": True, "verdict": "better"}.items() <= summary.items()
    (path,) = run.folder.glob("wandb/*run-*/files/media/table/samples*.json")
    table = json.loads(path.read_text())
    assert table["columns"] == ["stage", "step", "prompt", "response", "scores", "chosen"]
    assert table["data"] == [
        ["after", 3, "<b>p</b>", "a", '{"a": 1}', None],
        ["after", 3, "q", "r", None, "worst"],
    ]


def test_the_run_of_wandb_ends_well(run):
    assert [record.exit.exit_code for record in records(run.folder) if record.HasField("exit")] == [0]
    assert run.warnings == []
    assert read_metrics(run.folder, "rl")[-1]["reward"] == 0.75
    assert list((run.folder / "tensorboard").iterdir())


def test_a_resume_goes_on_with_the_same_run_and_a_failure_is_one_there(tmp_path):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    with pytest.raises(FloatingPointError):
        track(tmp_path / "run", range(1, 3), fails=True)
    track(tmp_path / "run", range(3, 5), resume=True)
    found = records(tmp_path / "run")
    assert len({record.run.run_id for record in found if record.HasField("run")}) == 1
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [1, 0]
    assert [row["rl/step"] for row in history(tmp_path / "run") if "rl/step" in row] == [1, 2, 3, 4]


def test_a_resume_may_change_where_the_run_is_shown(tmp_path):
    track(tmp_path / "run", range(1, 3), tracking=Tracking())
    assert not (tmp_path / "run" / "wandb").exists()
    pytest.importorskip("wandb", reason="needs the extra wandb")
    track(tmp_path / "run", range(3, 4), resume=True)
    assert [row["rl/reward"] for row in history(tmp_path / "run") if "rl/reward" in row] == [0.75]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["tracking"]["wandb"] == "offline"


def test_an_error_of_wandb_is_one_warning_and_the_run_goes_on(tmp_path):
    wandb = pytest.importorskip("wandb", reason="needs the extra wandb")
    settings = Settings(tmp_path)
    with (
        Run(tmp_path / "run", "tracked", settings, seed=0) as run,
        tracked(run, OFFLINE) as sinks,
        MetricsWriter(run.folder, terminal=False, sinks=sinks) as writer,
        writer.stage("rl", 3) as log,
    ):
        log.write(1, {"reward": 1.0})
        assert wandb.run is None  # which is for a run of the person's own script
        sinks[1]._wandb.finish()  # as if its process had gone: each further call is an error
        log.write(2, {"reward": 2.0})
        log.write(3, {"reward": 3.0})
    (warning,) = run.warnings
    assert warning.startswith("W&B: ") and "The run goes on" in warning
    assert [line["reward"] for line in read_metrics(run.folder)] == [1.0, 2.0, 3.0]
    assert [row["rl/reward"] for row in history(run.folder)] == [1.0]


def test_several_errors_at_the_end_are_one_warning(tmp_path):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    settings = Settings(tmp_path)
    with Run(tmp_path / "run", "tracked", settings, seed=0) as run, tracked(run, OFFLINE) as sinks:
        run.settled()
        run.metrics["gain"] = 1.0
        run.sample(stage="after", step=1, prompt="p", response="r")
        sinks[1]._wandb.finish()
        sinks[1].finish(failed=False)
    assert len(run.warnings) == 1


def test_a_damaged_id_is_a_warning_that_names_its_file(tmp_path):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    track(tmp_path / "run", range(1, 2), tracking=Tracking())
    (tmp_path / "run" / "wandb_id").write_text("../elsewhere\n")
    run = track(tmp_path / "run", range(2, 3), resume=True)
    assert len(run.warnings) == 1 and "wandb_id should hold the id" in run.warnings[0]


# -- Online, in a process of its own: W&B reads its environment once ------------------------------

PROGRAM = """
import sys
from pathlib import Path
from tests.sinks.test_wandb import Tracking, track
first, last = map(int, sys.argv[2:])
run = track(Path(sys.argv[1]), range(first, last + 1), resume=first > 1, tracking=Tracking("online", project="p"))
print(*run.warnings, sep="\\n")
"""


def call(arguments: list[str], home: Path, url: str, key: str = "a" * 40) -> str:
    """The output of a Python process that knows one server of W&B and its key."""
    pytest.importorskip("wandb", reason="needs the extra wandb")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, "HOME": str(home), "WANDB_BASE_URL": url, "WANDB_API_KEY": key},
        cwd=home,  # `wandb sync` leaves a log there
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def warnings_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("W&B: ") and "The run goes on" in line]


@pytest.mark.slow
@pytest.mark.parametrize("url, key, message", [
    ("http://127.0.0.1:9", "a" * 40, "Failed to authenticate"),
    ("http://127.0.0.1:9", "", "no key: `wandb login`"),
])  # fmt: skip
def test_online_without_network_or_key_is_one_warning_and_is_kept_offline(tmp_path, url, key, message):
    output = call(["-c", PROGRAM, str(tmp_path / "run"), "1", "2"], tmp_path, url, key)
    (warning,) = warnings_of(output)
    assert message in warning
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "done"
    assert [row["rl/step"] for row in history(tmp_path / "run") if "rl/step" in row] == [1, 2]


@pytest.mark.slow
def test_online_a_resume_continues_the_curve_and_no_secret_is_sent(tmp_path):
    with serve() as server:
        for first, last in ((1, 2), (3, 4)):
            output = call(["-c", PROGRAM, str(tmp_path / "run"), str(first), str(last)], tmp_path, server.url)
            assert warnings_of(output) == []
    ((name, lines),) = server.history.items()
    assert name == (tmp_path / "run" / "wandb_id").read_text().strip()
    assert [line["rl/step"] for line in lines if "rl/step" in line] == [1, 2, 3, 4]
    assert [line["rl/reward"] for line in lines if "rl/step" in line] == [0.25, 0.5, 0.75, 1.0]
    assert [line["_step"] for line in lines] == list(range(len(lines)))  # W&B drops a line that steps back
    assert server.ended == [0, 0]
    assert server.runs[name]["displayName"] == "run" and server.runs[name]["jobType"] == "tracked"
    assert b"(hidden)@host" in server.received
    assert b"hunter2" not in server.received and b"sk-hidden" not in server.received


@pytest.mark.slow
def test_what_was_kept_offline_over_a_resume_is_one_curve_once_it_is_sent(tmp_path):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    track(tmp_path / "run", range(1, 3))
    track(tmp_path / "run", range(3, 5), resume=True)
    folders = sorted(map(str, tmp_path.glob("run/wandb/offline-run-*")))
    assert len(folders) == 2
    with serve() as server:
        call(["-m", "wandb", "sync", "--yes", *folders], tmp_path, server.url)
    ((name, lines),) = server.history.items()
    assert name == (tmp_path / "run" / "wandb_id").read_text().strip()
    assert [line["rl/step"] for line in lines if "rl/step" in line] == [1, 2, 3, 4]


# -- Settings ---------------------------------------------------------------------------------------


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError, match=r"tracking.wandb offline needs the package wandb .*pip install -e '\.\[wandb\]' in"
    ):
        track(tmp_path / "run", range(1, 2))
    Tracking().check()


def test_a_folder_named_wandb_is_not_taken_for_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="needs the package wandb"):
        OFFLINE.check()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"wandb": "on"}, "tracking.wandb is 'on'; it is one of disabled, online, offline"),
        ({"project": "a/b"}, "tracking.project is 'a/b'"),
        ({"project": ""}, "tracking.project is ''"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Tracking(**settings)
