"""How a run ends: its story, its verdict, its status when it has diverged, and the exit code of the process."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from rlaif_jax.command_line import command_line, ended_worse
from rlaif_jax.config import Diverged, UserError
from rlaif_jax.quality.win_rates import verdict_of
from rlaif_jax.run import Run


@dataclasses.dataclass(frozen=True)
class Bounds:
    limit: float = 2.0


@dataclasses.dataclass(frozen=True)
class Options:
    out: Path = Path("out")
    watch: Bounds = Bounds()


def opened(folder, *, config=None, resume=False):
    return Run(folder, "test", config or Options(out=folder), seed=0, resume=resume)


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_the_summary_has_story_and_verdict(tmp_path):
    with opened(tmp_path / "one") as run:
        run.settled()
        run.report()
        assert (summary(tmp_path / "one")["story"], summary(tmp_path / "one")["verdict"]) == ([], None)
        run.story += ["The answers are better.", "Open the page."]
        run.verdict = verdict_of(0.55, 0.7)
    kept = summary(tmp_path / "one")
    assert (kept["status"], kept["verdict"]) == ("done", "better")
    assert kept["story"] == ["The answers are better.", "Open the page."]


def test_a_run_that_has_diverged_is_resumed_with_another_watch_only(tmp_path, capsys):
    def attempt(folder, resume=False, **watch):
        config = Options(out=folder, watch=Bounds(**watch))
        with opened(folder, config=config, resume=resume) as run:
            run.settled()
            if not resume:
                raise Diverged("step 3: the run has diverged")

    with pytest.raises(Diverged):
        attempt(tmp_path / "one")
    assert summary(tmp_path / "one")["status"] == "diverged"
    assert "diverged" in (tmp_path / "one" / "report.html").read_text()
    with pytest.raises(UserError, match=r"with the same settings it would again.*--train\.watch\.no-stop"):
        attempt(tmp_path / "one", resume=True)
    assert summary(tmp_path / "one")["status"] == "diverged"
    capsys.readouterr()
    attempt(tmp_path / "one", resume=True, limit=9.0)
    assert "watch.limit was 2.0 and is now 9.0" in capsys.readouterr().err
    assert summary(tmp_path / "one")["status"] == "done"
    assert json.loads((tmp_path / "one" / "config.json").read_text())["watch"]["limit"] == 9.0


@pytest.mark.parametrize(("verdict", "code"), [("better", 0), ("no different", 0), ("worse", 1), (None, 0)])
def test_the_exit_code_is_that_of_the_verdict(verdict, code, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program"])
    main = lambda config: {"gold": 1.0, "verdict": verdict}
    if code:
        with pytest.raises(SystemExit, match="1"):
            command_line(main, Options(), failed=ended_worse)
    else:
        assert command_line(main, Options(), failed=ended_worse)["verdict"] == verdict
    assert command_line(main, Options())["verdict"] == verdict, "a recipe may leave the verdict to its reader"


def test_a_run_that_has_diverged_ends_with_a_message_and_code_1(monkeypatch, capsys):
    def main(config):
        raise Diverged("step 3: the run has diverged")

    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit, match="1"):
        command_line(main, Options())
    assert capsys.readouterr().err == "error: step 3: the run has diverged\n"
