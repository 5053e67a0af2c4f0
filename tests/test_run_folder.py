"""Whose a run's folder is, which settings a resumed run may change, and what is taken back from its files."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_jax.command_line import command_line
from rlaif_jax.config import UserError, changed_settings, to_json
from rlaif_jax.files import LOCK, FolderLock
from rlaif_jax.run import Run

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Constant:
    """A rate that stays."""

    rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """A rate that follows a schedule."""

    rate: float = 0.5
    schedule: str = "linear"


@dataclasses.dataclass(frozen=True)
class Loop:
    """The loop's settings."""

    steps: int = 20
    kl_coef: float = 0.1
    optimizer: Constant | Scheduled = Constant()


@dataclasses.dataclass(frozen=True)
class Options:
    """A script's settings."""

    out: Path = Path("runs/x")
    resume: bool = False
    seed: int = 0
    train: Loop = Loop()


def open_run(folder, *, resume=False, config=None):
    return Run(folder, "test", config or Options(out=folder), seed=0, resume=resume)


def content(folder: Path) -> dict[str, bytes]:
    """All files under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


# ---- One run in a folder at a time

OWNER = """
import dataclasses, sys, time
from pathlib import Path
from rlaif_jax.run import Run

@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0

with Run(Path(sys.argv[1]), "owner", Config(), seed=0) as run:
    run.settled()
    print("running", flush=True)
    sys.stdin.readline()
"""


def owner(folder: Path) -> subprocess.Popen[str]:
    """A run in another process, which has the folder by now."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "running" not in process.stdout.readline():
        assert process.poll() is None
    return process


def test_a_second_run_in_a_folder_is_refused_and_touches_nothing(tmp_path):
    folder = tmp_path / "run"
    process = owner(folder)
    try:
        (tmp_path / "alias").symlink_to(folder)
        before = content(folder)
        for path in (folder, tmp_path / "alias"):
            for resume in (False, True):
                with pytest.raises(UserError, match=rf"another run is writing this folder \(process {process.pid} on "):
                    open_run(path, resume=resume).__enter__()
        assert content(folder) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["alias", "run"]
    finally:
        process.communicate("\n", timeout=60)
    assert process.returncode == 0
    assert summary(folder)["status"] == "done"
    assert not (folder / LOCK).exists()
    with open_run(folder) as run:
        run.settled()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alias", "run", "run.1"]


def test_the_folder_of_a_killed_run_is_free(tmp_path):
    process = owner(tmp_path / "run")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / "run" / LOCK).exists()
    config = dataclasses.make_dataclass("Config", [("seed", int, 0)], frozen=True)()
    with open_run(tmp_path / "run", resume=True, config=config) as run:
        run.settled()
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_lock_whose_file_the_owner_removes_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """Between its opening and its locking, the run before ends: the file that is locked would be one without a name."""
    real, first = os.open, FolderLock(tmp_path)

    def opened(*arguments):
        handle = real(*arguments)
        first.release(tmp_path)
        return handle

    monkeypatch.setattr(os, "open", opened)
    lock = FolderLock(tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
        FolderLock(tmp_path)
    lock.release(tmp_path)
    FolderLock(tmp_path).release(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_brings_the_earlier_run_back_and_frees_the_folder(tmp_path):
    folder = tmp_path / "run"
    with open_run(folder) as run:
        run.settled()
    before = content(folder)
    with pytest.raises(UserError, match="wrong"), open_run(folder):
        raise UserError("wrong")
    assert content(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_holds_something_else_is_not_moved_away(tmp_path, monkeypatch):
    folder = tmp_path / "work"
    folder.mkdir()
    for name in "abcd":
        (folder / name).write_text(name)
    before = content(tmp_path)
    monkeypatch.chdir(folder)
    for path in (folder, Path(), Path("..")):
        with pytest.raises(UserError, match=r" is no run's folder and holds .*: choose another --out"):
            open_run(path).__enter__()
    assert content(tmp_path) == before
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    with open_run(Path()) as run:
        run.settled()
    with pytest.raises(UserError, match="name the folder of the run by --out"):
        open_run(Path()).__enter__()
    assert not (tmp_path / "new" / LOCK).exists() and summary(tmp_path / "new")["status"] == "done"


def test_stages_that_can_have_no_folder_are_known_before_they_are_made(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "stages"):
        with pytest.raises(UserError, match=r"file is a file; stages need a folder"):
            Run(tmp_path / "run", "test", Options(), seed=0, stages=path).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("had_a_run", [False, True])
def test_settings_that_cannot_be_written_leave_the_folder_as_it_was(had_a_run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    if had_a_run:
        with open_run(folder) as run:
            run.settled()
    before = content(folder)

    def full(run_folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlaif_jax.run.save_environment", full)
    with pytest.raises(UserError, match=r"run: the run folder cannot be written \(No space left on device\)"):
        open_run(folder).__enter__()
    assert content(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == (["run"] if had_a_run else [])


# ---- Settings of a resumed run


def resumed(monkeypatch, *options) -> Options:
    monkeypatch.setattr(sys, "argv", ["program", *options])
    return command_line(lambda config: config, Options())


SCHEDULED = Options(seed=3, train=Loop(kl_coef=0.7, optimizer=Scheduled(rate=0.25)))


def test_resume_and_the_folder_are_enough_and_another_setting_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with open_run(folder, config=dataclasses.replace(SCHEDULED, out=folder)) as run:
        run.settled()
    for options in (("--resume", "--out", str(folder)), (f"--out={folder}", "--resume")):
        config = resumed(monkeypatch, *options)
        assert config == dataclasses.replace(SCHEDULED, out=folder, resume=True)
        with open_run(folder, resume=True, config=config):
            pass
    moved = folder.rename(tmp_path / "moved")
    config = resumed(monkeypatch, "--resume", "--out", str(moved), "--train.optimizer.rate", "0.5", "--seed", "3")
    assert config.train == dataclasses.replace(SCHEDULED.train, optimizer=Scheduled())
    with pytest.raises(UserError, match=r"another config: train\.optimizer\.rate was 0\.25 and is now 0\.5$"):
        open_run(moved, resume=True, config=config).__enter__()
    assert resumed(monkeypatch, "--out", str(moved)) == Options(out=moved), "without --resume the defaults hold"
    assert resumed(monkeypatch, "--resume", "--no-resume", "--out", str(moved)) == Options(out=moved)


def test_a_run_begins_with_the_settings_of_a_file_and_options_count_more(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with open_run(folder, config=dataclasses.replace(SCHEDULED, out=folder, resume=True)) as run:
        run.settled()
    file = str(folder / "config.json")
    assert resumed(monkeypatch, "--config", file) == dataclasses.replace(SCHEDULED, out=Options().out)
    given = resumed(monkeypatch, "--seed", "4", f"--config={file}", "--out", str(tmp_path / "other"))
    assert given == dataclasses.replace(SCHEDULED, seed=4, out=tmp_path / "other")
    (tmp_path / "part.json").write_text('{"seed": 5}')
    assert resumed(monkeypatch, "--config", str(tmp_path / "part.json")) == Options(seed=5)
    (tmp_path / "wrong.json").write_text('{"stepz": 1}')
    (tmp_path / "list.json").write_text("[]")
    for options, message in (
        (["--config", str(tmp_path / "none.json")], "none.json: cannot be read as JSON"),
        (["--config", str(tmp_path / "wrong.json")], "wrong.json: stepz: Options has no such field"),
        (["--config", str(tmp_path / "list.json")], "list.json: settings are one JSON object"),
        (["--config", file, "--resume"], "--config begins a run, and --resume goes on with one"),
        (["--config"], "--config: expected one argument; give a JSON file of settings"),
    ):
        with pytest.raises(SystemExit, match="2"):
            resumed(monkeypatch, *options)
        errors = capsys.readouterr().err
        assert message in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"train": {"steps": 5}}', Loop(5, 0.3, Scheduled(0.25))),
        ('{"train": {"optimizer": {"schedule": "cosine"}}}', Loop(7, 0.3, Scheduled(0.25, "cosine"))),
        ('{"train": {"optimizer": {"type": "Constant"}}}', Loop(7, 0.3, Constant())),
    ],
)
def test_what_a_file_leaves_out_is_as_help_says_not_as_in_its_class(text, expected, tmp_path, monkeypatch):
    (tmp_path / "part.json").write_text(text)
    monkeypatch.setattr(sys, "argv", ["program", "--config", str(tmp_path / "part.json")])
    default = Options(train=Loop(7, 0.3, Scheduled(0.25)))
    assert command_line(lambda config: config, default) == dataclasses.replace(default, train=expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "this is no run's settings"),
        ("[]", "this is no run's settings"),
        ('{"stepz": 1}', r"of another script or version: stepz: Options has no such field"),
    ],
)
def test_settings_that_cannot_be_read_are_a_message(text, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        resumed(monkeypatch, "--resume", "--out", str(tmp_path))
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {tmp_path}/config.json") and len(errors.splitlines()) == 1
    assert re.search(message, errors)


def test_more_steps_are_allowed_and_kept_and_schedules_are_named(tmp_path, capsys):
    folder = tmp_path / "run"
    config = dataclasses.replace(SCHEDULED, out=folder)
    with open_run(folder, config=config) as run:
        run.settled()
    more = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=30))
    capsys.readouterr()
    with open_run(folder, resume=True, config=more):
        pass
    errors = capsys.readouterr().err
    assert "train.steps was 20 and is now 30" in errors
    assert "train.optimizer.schedule is linear" in errors
    assert json.loads((folder / "config.json").read_text()) == to_json(more)
    with pytest.raises(UserError, match=r"train\.steps was 30 and is now 20"):
        open_run(folder, resume=True, config=config).__enter__()


FREE = ["out", "resume", "stages", "watch.stop", "train.watch.kl_limit"]
NUMBERS = ["seed", "train.kl_coef", "train.out", "ppo.watched", "steps.of", "stepsize"]
STEPS = ["steps", "train.steps"]
VALUES = st.none() | st.booleans() | st.integers(-3, 3) | st.text("ab", max_size=2) | st.lists(st.integers(0, 1))
BEFORE_AND_AFTER = st.dictionaries(st.sampled_from(FREE + NUMBERS + STEPS), st.tuples(VALUES, VALUES))


def nested(values: dict) -> dict:
    """Settings by their dotted names as groups of settings."""
    groups_of: dict = {}
    for name, value in values.items():
        *groups, last = name.split(".")
        part = groups_of
        for group in groups:
            part = part.setdefault(group, {})
        part[last] = value
    return groups_of


@settings(deadline=None)
@given(BEFORE_AND_AFTER.filter(lambda values: not {"steps", "steps.of"} <= values.keys()))
def test_only_settings_that_change_no_number_may_differ_and_all_others_are_named(values):
    differ = {name for name, (before, after) in values.items() if before != after}
    raised = {n for n in differ.intersection(STEPS) if type(values[n][0]) is type(values[n][1]) is int}
    raised = {name for name in raised if values[name][1] > values[name][0]}
    wrong = differ - set(FREE) - raised
    saved, now = (nested({name: pair[i] for name, pair in values.items()}) for i in (0, 1))
    with pytest.raises(UserError) if wrong else nullcontext() as refused:
        said = "; ".join(changed_settings(saved, now))
    assert all(f"{name} was" in (str(refused.value) if wrong else said) for name in wrong or raised)


# ---- Samples

LINES = st.lists(
    st.fixed_dictionaries({"stage": st.sampled_from(["rl", "before", "after"]), "step": st.integers(0, 9)}), max_size=8
)


@settings(deadline=None)
@given(lines=LINES, stage=st.sampled_from(["rl", "before", "after"]), after=st.integers(-1, 9), cut=st.booleans())
def test_samples_of_later_steps_are_dropped_and_others_stay(lines, stage, after, cut, tmp_path_factory):
    run = open_run(tmp_path_factory.mktemp("samples"))
    path = run.folder / "samples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + ('{"stage": "r' if cut else ""))
    run.drop_samples(stage, after)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line for line in lines if not (line["stage"] == stage and line["step"] > after)] == kept
    assert path.read_text().endswith("\n") or not kept


def test_without_samples_there_is_nothing_to_drop(tmp_path):
    open_run(tmp_path).drop_samples("rl", 3)
    assert list(tmp_path.iterdir()) == []


# ---- The reason of a failure


@pytest.mark.parametrize(
    ("error", "text"),
    [(UserError("a value is nan"), "a value is nan"), (ZeroDivisionError("by 0"), "ZeroDivisionError: by 0")],
)
def test_a_failed_run_says_why(error, text, tmp_path):
    def fails():
        with open_run(tmp_path / "run") as run:
            run.settled()
            raise error

    with pytest.raises(type(error)):
        fails()
    assert (summary(tmp_path / "run")["status"], summary(tmp_path / "run")["error"]) == ("failed", text)
    assert text in (tmp_path / "run" / "report.html").read_text()
    with open_run(tmp_path / "run", resume=True):
        pass
    assert "error" not in summary(tmp_path / "run")


@pytest.mark.parametrize("later", [UserError("samples.jsonl:2: no JSON"), OSError(28, "full"), ValueError("no figure")])
def test_an_error_of_the_page_does_not_replace_the_run_s_own(later, tmp_path, monkeypatch):
    def broken(folder):
        raise later

    def fails():
        with open_run(tmp_path / "run") as run:
            run.settled()
            monkeypatch.setattr("rlaif_jax.run.write_report", broken)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert summary(tmp_path / "run")["error"].startswith("ZeroDivisionError")


def test_a_reader_of_the_output_that_goes_leaves_one_line():
    script = (
        "import dataclasses\n"
        "from rlaif_jax.command_line import command_line\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Options:\n"
        "    '''Options.'''\n"
        "command_line(lambda config: [print('line') for _ in range(100_000)], Options())\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None and program.stderr is not None
        assert program.stdout.readline() == "line\n"
        program.stdout.close()
        assert program.stderr.read() == "error: nobody reads the output any more\n"
    assert program.returncode == 1
