"""What a whole run shows: its folder, its stages, evaluations, a sample of each, its story."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import numpy as np

from rlaif_jax.metrics import MetricsWriter
from rlaif_jax.progress.display import ProgressDisplay
from rlaif_jax.progress.plan import PlannedStage
from rlaif_jax.run import Run


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path = Path("out")
    resume: bool = False


def opened(folder, stages=None, resume=False):
    return Run(folder, "test", Config(), seed=0, resume=resume, stages=stages)


def make_stages(run):
    made = {"w": np.zeros(3, np.float32)}
    base = run.stage("base", made, lambda: made, settings={})
    return run.stage("next", made, lambda _: made, settings={}, after=(base,))


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_the_story_ends_the_output_and_the_summary_knows_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["/opt/bin/python3", "some script.py", "--api-key", "sk-1", "--seed=0"])
    with opened(tmp_path / "one") as run:
        run.settled()
        run.story += ["The answers are better.", "Next: another seed."]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"test: seed 0, run folder {tmp_path / 'one'}"
    page = tmp_path / "one" / "report.html"
    assert lines[-3:] == ["The answers are better.", "Next: another seed.", f"done: the run's page is {page}"]
    kept = summary(tmp_path / "one")
    assert kept["story"] == ["The answers are better.", "Next: another seed."]
    assert kept["command"] == "python3 'some script.py' --api-key '***' --seed=0"
    monkeypatch.setattr(sys, "orig_argv", ["python3", "some script.py", "--resume"])
    with opened(tmp_path / "one", resume=True):
        pass
    assert summary(tmp_path / "one")["command"] == kept["command"]


def test_stages_are_announced_whether_they_are_made_or_reused(tmp_path, capsys):
    plan = [PlannedStage("base", "a model learns", 1), PlannedStage("next", "another one", 2)]
    for name in ("one", "two"):
        with opened(tmp_path / name, tmp_path / "shared") as run:
            run.display.plan(plan)
            make_stages(run)
        lines = [line.partition(" (")[0] for line in capsys.readouterr().out.splitlines()]
        assert [line for line in lines if line.startswith("stage")] == [
            "stage 1 of 2: a model learns",
            "stage 2 of 2: another one",
        ]


def test_one_sample_of_each_evaluation_is_shown_and_cannot_change_the_terminal(tmp_path, capsys):
    with opened(tmp_path / "one") as run:
        run.settled()
        for step in (0, 5):
            for i, chosen in enumerate(("worst", "random", "random")):
                answer = f"\x1b[2Janswer {i}\nof step {step}\r"
                run.sample(step=step, stage="rl", index=i, prompt="a prompt", response=answer, chosen=chosen)
        run.sample(step=5, stage="after", index=0, prompt="a prompt", response="not shown")
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if "answer" in line or "prompt:" in line] == [
        "step 0, an answer to a held-out prompt:",
        "  prompt: a prompt",
        "  answer: answer 1 of step 0",
        "step 5, an answer to a held-out prompt:",
        "  prompt: a prompt",
        "  answer: answer 1 of step 5",
    ]
    assert "\x1b" not in out
    assert len((tmp_path / "one" / "samples.jsonl").read_text().splitlines()) == 7


def test_a_run_that_is_a_part_of_another_uses_its_display_and_leaves_it_open(tmp_path, capsys):
    with opened(tmp_path / "whole") as whole:
        whole.settled()
        part = Run(tmp_path / "part", "part", Config(), seed=0, display=whole.display)
        with part:
            part.settled()
        with whole.display.wait("something", "question") as count:
            whole.display._printed_at = -np.inf
            count(1, 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == [
        f"part: seed 0, run folder {tmp_path / 'part'}",
        f"done: the run's page is {part.folder / 'report.html'}",
    ]
    assert lines[3].startswith("[something] question 1/2")


def test_an_evaluation_leaves_a_line_and_its_numbers_stay_until_the_next(tmp_path, capsys):
    with MetricsWriter(tmp_path, sinks=()) as out, out.stage("rl", 4) as log:
        log.write(0, {"gold": 0.5, "eval_length": 9.0})
        log.write(1, {"reward": 0.25})
        log.write(2, {"reward": 0.5, "gold": 0.75, "second_opinion": 6.5})
        log.write(3, {"reward": 0.5, "gold": math.nan})
        log.write(4, {"reward": 1.0, "gold": 0.8})
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"  \d:\d\d left$", "", line) for line in lines] == [
        "[rl] step 0/4  gold 0.500  compiling",
        "[rl] step 2/4  reward 0.500  second opinion 6.500  gold 0.750",
        "[rl] step 4/4  reward 1.000  second opinion 6.500  gold 0.800",
    ]


def test_a_display_of_a_run_outlives_the_writer(tmp_path, capsys):
    with ProgressDisplay() as display:
        display.plan([PlannedStage("lm", "a model learns", 1)])
        for name in ("one", "two"):
            with MetricsWriter(tmp_path / name, display=display, sinks=()) as out, out.stage("lm", 1) as lm:
                lm.write(1, {"loss": 1.0})
        bar = display.add("later", None)
        bar.update(1, "")
        bar.close()
    assert capsys.readouterr().out.splitlines() == [
        "stage 1 of 1: a model learns",
        "[lm] step 1/1  loss 1.0000",
        "[lm] step 1/1  loss 1.0000",
        "[later] step 1",
    ]
