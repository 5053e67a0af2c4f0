"""A run's folder: stages that runs share, warnings, and options on the command line."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from rlaif_jax.command_line import command_line
from rlaif_jax.config import StopRequested, UserError
from rlaif_jax.report import environment
from rlaif_jax.run import Run

ROOT = Path(__file__).parents[1]
LIKE = {"w": jax.ShapeDtypeStruct((3,), np.float32), "b": {"x": jax.ShapeDtypeStruct((), np.int32)}}


@dataclasses.dataclass(frozen=True)
class Fit:
    updates: int = 3
    rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path = Path("out")
    resume: bool = False
    stages: Path | None = None
    fit: Fit = Fit()


class Made:
    """Makes parameters and counts how often."""

    def __init__(self):
        self.count = 0

    def base(self):
        self.count += 1
        return {"w": np.arange(3, dtype=np.float32) / 7, "b": {"x": np.int32(self.count)}}

    def next(self, base):
        self.count += 1
        return {"w": base["w"] * 3, "b": {"x": np.int32(self.count)}}


def open_run(folder, stages=None, *, seed=0, resume=False, config=None):
    return Run(folder, "test", config or Config(out=folder, stages=stages), seed=seed, resume=resume, stages=stages)


def two_stages(run, made, fit=Fit(), name="base"):
    base = run.stage(name, LIKE, made.base, settings={"fit": fit, "task": "dialogue"})
    return base, run.stage("next", LIKE, made.next, settings=Fit(), after=(base,))


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


# ---- Stages


def test_two_runs_that_share_a_folder_make_a_stage_once(tmp_path, capsys):
    made, shared = Made(), tmp_path / "shared"
    with open_run(tmp_path / "one", shared) as run:
        first = two_stages(run, made)
    assert capsys.readouterr().err == ""
    with open_run(tmp_path / "two", shared) as run:
        second = two_stages(run, made)
    assert made.count == 2
    assert same([stage.params for stage in first], [stage.params for stage in second])
    assert [stage.key for stage in first] == [stage.key for stage in second]
    assert f"[base] reused from {shared / first[0].key}" in capsys.readouterr().err
    assert set(summary(tmp_path / "one")["stages"].values()) == {"made"}
    assert summary(tmp_path / "two")["stages"] == {stage.key: "reused" for stage in second}
    settings = json.loads((shared / first[1].key / "settings.json").read_text())
    assert settings["settings"] == {"updates": 3, "rate": 0.5}
    assert settings["after"] == [first[0].key]
    assert settings["made_by"]["jax"] == jax.__version__
    assert sorted(path.name for path in shared.iterdir()) == sorted(stage.key for stage in first)


def test_without_a_shared_folder_a_run_keeps_its_own_stages(tmp_path):
    made = Made()
    for name in ("one", "two"):
        with open_run(tmp_path / name) as run:
            stages = two_stages(run, made)
        assert (tmp_path / name / "checkpoints" / "stages" / stages[0].key).is_dir()
    assert made.count == 4
    with open_run(tmp_path / "two", resume=True) as run:
        assert same(two_stages(run, made)[1].params, stages[1].params)
    assert made.count == 4


def changed_code(monkeypatch):
    monkeypatch.setattr(environment, "package_sources", lambda: "other")


@pytest.mark.parametrize("what", ["settings", "seed", "code", "script", "name", "shape"])
def test_whatever_a_stage_depends_on_makes_it_again_and_all_that_follow(what, tmp_path, monkeypatch):
    made, shared = Made(), tmp_path / "shared"
    with open_run(tmp_path / "one", shared) as run:
        first = two_stages(run, made)
    if what == "code":
        changed_code(monkeypatch)
    elif what == "script":
        monkeypatch.setattr(environment.inspect, "getsourcefile", lambda make: environment.__file__)
    elif what == "shape":
        monkeypatch.setitem(LIKE, "w", jax.ShapeDtypeStruct((3,), np.float16))
    with open_run(tmp_path / "two", shared, seed=int(what == "seed")) as run:
        fit = Fit(rate=0.25) if what == "settings" else Fit()
        second = two_stages(run, made, fit, "other" if what == "name" else "base")
    assert made.count == 4
    assert not {stage.key for stage in first} & {stage.key for stage in second}


def test_a_resumed_run_keeps_to_its_stages_when_the_code_has_changed(tmp_path, monkeypatch, capsys):
    made, shared = Made(), tmp_path / "shared"
    with open_run(tmp_path / "one", shared) as run:
        first = two_stages(run, made)
    changed_code(monkeypatch)
    with open_run(tmp_path / "one", shared, resume=True) as run:
        assert [stage.key for stage in two_stages(run, made)] == [stage.key for stage in first]
    assert made.count == 2
    assert "was made by another version of the code" in capsys.readouterr().err
    assert len(summary(tmp_path / "one")["warnings"]) == 2
    (shared / first[0].key).rename(shared / "gone")
    with open_run(tmp_path / "one", shared, resume=True) as run:
        again = two_stages(run, made)
    assert made.count == 4, "a stage that is gone is made again, and what follows from it"
    assert again[0].key != first[0].key


def test_the_folder_of_stages_may_move_before_a_resume(tmp_path):
    made = Made()
    with open_run(tmp_path / "one", tmp_path / "shared") as run:
        two_stages(run, made)
    (tmp_path / "shared").rename(tmp_path / "moved")
    with open_run(tmp_path / "one", tmp_path / "moved", resume=True) as run:
        two_stages(run, made)
    assert made.count == 2


def test_half_a_stage_is_not_read(tmp_path):
    made, shared = Made(), tmp_path / "shared"
    with open_run(tmp_path / "one", shared) as run:
        key = two_stages(run, made)[0].key
    (shared / key).rename(shared / f".{key}.0123abcd.tmp")  # as a process leaves it that is killed before the rename
    (shared / f".{key}.0123abcd.tmp" / "settings.json").unlink()
    with open_run(tmp_path / "two", shared) as run:
        two_stages(run, made)
    assert made.count == 3


@pytest.mark.parametrize("damage", ["settings.json", "arrays", "other settings"])
def test_a_damaged_stage_is_a_message(damage, tmp_path):
    made, shared = Made(), tmp_path / "shared"
    with open_run(tmp_path / "one", shared) as run:
        key = two_stages(run, made)[0].key
    if damage == "arrays":
        for path in (shared / key / "arrays").rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    elif damage == "settings.json":
        (shared / key / damage).write_text("{")
    else:
        text = (shared / key / "settings.json").read_text()
        (shared / key / "settings.json").write_text(text.replace('"rate": 0.5', '"rate": 0.75'))
    names = r"settings\.fit\.rate was 0\.75 and is now 0\.5" if damage == "other settings" else "remove this folder"
    with pytest.raises(UserError, match=f"(?s){key}.*{names}"), open_run(tmp_path / "two", shared) as run:
        two_stages(run, made)
    assert made.count == 2


def test_a_stage_that_is_stopped_is_not_kept_and_the_message_says_so(tmp_path, capsys):
    made, shared = Made(), tmp_path / "shared"

    def stopped():
        signal.raise_signal(signal.SIGTERM)
        return made.base()

    with open_run(tmp_path / "one", shared) as run:
        run.settled()
        with pytest.raises(StopRequested):
            run.stage("base", LIKE, stopped, settings={})
        raise StopRequested
    assert not shared.exists()
    assert "stopping: the stage base is not done" in capsys.readouterr().err
    assert summary(tmp_path / "one")["status"] == "stopped"


@pytest.mark.parametrize("error", [OSError(28, "No space left"), ValueError(f"Error {'/' * 900} No space left")])
def test_a_full_disk_is_a_message_and_nothing_of_the_stage_is_kept(error, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr("orbax.checkpoint.StandardCheckpointer.save", full)
    with (
        pytest.raises(UserError, match=r"shared/base.*cannot be written .*No space left"),
        open_run(tmp_path / "one", tmp_path / "shared") as run,
    ):
        two_stages(run, Made())
    assert list((tmp_path / "shared").iterdir()) == []


PROGRAM = """
import dataclasses, os, sys, time
from pathlib import Path
import numpy as np
from rlaif_jax.report import environment
from rlaif_jax.run import Run

@dataclasses.dataclass(frozen=True)
class Config:
    updates: int = 3

folder, shared, wait = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

def make():
    (folder / "making").touch()
    while wait < 0 and len(list(shared.parent.glob("*/making"))) < 2:  # until the other one works, too
        time.sleep(0.01)
    time.sleep(max(wait, 0))
    return {"w": np.full((400, 1000), os.getpid(), np.float32)}

with Run(folder, "test", Config(), seed=0, stages=shared) as run:
    run.settled()
    like = {"w": np.zeros((400, 1000), np.float32)}
    maker = int(run.stage("base", like, make, settings=Config()).params["w"][0, 0])
(folder / "maker").write_text(str(maker))
"""


def process(tmp_path, name, wait):
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    command = [sys.executable, str(script), str(tmp_path / name), str(tmp_path / "shared"), str(wait)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_while_it_writes_a_stage_is_made_again(tmp_path):
    """Killed at many moments, from before the first file to after the rename: a stage is whole or is not there."""
    shared = tmp_path / "shared"
    for i, pause in enumerate((0.0, 0.01, 0.03, 0.06, 0.1, 0.2)):
        working = process(tmp_path, f"killed{i}", 0)
        while not (tmp_path / f"killed{i}" / "making").exists() and working.poll() is None:
            time.sleep(0.005)
        time.sleep(pause)
        working.kill()
        working.communicate()
        whole = [path for path in shared.glob("*") if not path.name.startswith(".")] if shared.exists() else []
        assert all((path / "settings.json").exists() for path in whole)
        if whole:
            break
    last = process(tmp_path, "last", 0)
    _, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors
    assert ("reused" in errors) == bool(whole)
    assert (int((tmp_path / "last" / "maker").read_text()) == last.pid) == (not whole)


def test_of_two_processes_that_make_the_same_stage_both_use_the_first(tmp_path):
    both = [process(tmp_path, name, -1) for name in ("one", "two")]
    ended = [(p.communicate(timeout=120), p) for p in both]
    assert all(p.returncode == 0 for _, p in ended), ended
    used = {int((tmp_path / name / "maker").read_text()) for name in ("one", "two")}
    assert len(used) == 1
    assert used <= {p.pid for p in both}
    assert sum("reused" in errors for (_, errors), _ in ended) == 1
    assert len(list((tmp_path / "shared").iterdir())) == 1


# ---- The summary


def test_warnings_and_missing_judgements_are_in_the_summary_and_on_the_page(tmp_path, capsys):
    with open_run(tmp_path / "one") as run:
        run.settled()
        run.warn("the labeler agrees with <nobody>")
        run.warn("the labeler agrees with <nobody>")
        run.missing["timeout"] = 3
        run.story.append("It is over.")
    shown = capsys.readouterr()
    assert shown.err.count("warning: the labeler agrees with <nobody>") == 1
    assert "This run warned:\n  the labeler agrees with <nobody>\nIt is over.\n" in shown.out, "again at the end"
    kept = summary(tmp_path / "one")
    page = (tmp_path / "one" / "report.html").read_text()
    assert page.count("the labeler agrees with &lt;nobody&gt;") == 1
    assert "<td>3</td>" in page
    assert (kept["warnings"], kept["missing"]) == (["the labeler agrees with <nobody>"], {"timeout": 3})
    with open_run(tmp_path / "one", resume=True) as run:
        assert run.missing == {"timeout": 3}
        run.warn("the labeler agrees with <nobody>")
    assert capsys.readouterr().err == ""


def test_a_report_that_cannot_be_written_does_not_hide_the_first_error(tmp_path):
    def run_into_a_full_disk(name, error=None):
        with open_run(tmp_path / name) as run:
            run.settled()
            (run.folder / "summary.json").mkdir()
            if error is not None:
                raise error

    with pytest.raises(ZeroDivisionError):
        run_into_a_full_disk("one", ZeroDivisionError())
    with pytest.raises(UserError, match=r"cannot write .*summary\.json"):
        run_into_a_full_disk("two")


def test_samples_are_appended_and_a_full_disk_is_a_message(tmp_path):
    with open_run(tmp_path / "one") as run:
        run.settled()
        run.sample(step=1, response="a")
        run.sample(step=2, response="b")
        lines = (run.folder / "samples.jsonl").read_text().splitlines()
        assert [json.loads(line)["response"] for line in lines] == ["a", "b"]
        (run.folder / "samples.jsonl").unlink()
        (run.folder / "samples.jsonl").mkdir()
        with pytest.raises(UserError, match=r"cannot write .*samples\.jsonl: Is a directory"):
            run.sample(step=3, response="c")
        (run.folder / "samples.jsonl").rmdir()


# ---- The command line


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean of all."""

    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class LeaveOneOut:
    """The mean of the others."""

    scale: bool = False
    weight: float = 2.0


@dataclasses.dataclass(frozen=True)
class Part:
    kl_coef: float = 0.1
    advantage: Mean | LeaveOneOut = Mean()
    baseline: LeaveOneOut | Mean = Mean()


@dataclasses.dataclass(frozen=True)
class Options:
    seed: int = 0
    part: Part = Part()


def parsed(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["program", *options])
    return command_line(lambda config: config, Options())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), Options()),
        (("--part.kl-coef", "3"), Options(part=Part(kl_coef=3.0))),
        (("--part.advantage.weight", "3"), Options(part=Part(advantage=Mean(3.0)))),
        (("part.advantage:leave-one-out",), Options(part=Part(advantage=LeaveOneOut()))),
        (
            ("part.advantage:leave-one-out", "--part.advantage.scale", "--seed", "4", "--part.kl-coef", "2"),
            Options(4, Part(2.0, LeaveOneOut(scale=True))),
        ),
        (
            ("--seed=4", "part.advantage:leave-one-out", "part.baseline:leave-one-out", "--part.baseline.weight=5"),
            Options(4, Part(advantage=LeaveOneOut(), baseline=LeaveOneOut(weight=5.0))),
        ),
    ],
)
def test_a_choice_on_the_command_line_is_a_word_with_the_options_of_its_class(options, expected, monkeypatch):
    assert parsed(monkeypatch, *options) == expected


def test_a_wrong_choice_is_named_and_help_lists_the_right_ones(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        parsed(monkeypatch, "part.advantage:median")
    assert "part.advantage:leave-one-out" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        parsed(monkeypatch, "--help")
    shown = capsys.readouterr().out
    assert "part.advantage:leave-one-out" in shown
    assert "The mean of the others." in shown
    assert "--part.advantage.weight" in shown


def test_what_main_returns_comes_back(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program"])
    assert command_line(lambda config: {"gold": 1.0}, Options()) == {"gold": 1.0}


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG, errno.ENOSPC])
def test_a_file_that_the_system_denies_is_one_line(number, monkeypatch, capsys):
    def main(config: Options) -> None:
        raise OSError(number, os.strerror(number), "runs/x")

    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as ended:
        command_line(main, Options())
    assert ended.value.code == 2 and capsys.readouterr().err == f"error: runs/x: {os.strerror(number)}\n"
