"""Progress as a reader of plain lines and of a terminal sees it."""

from __future__ import annotations

import itertools
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlaif_jax.progress import display as progress
from rlaif_jax.progress.display import ProgressDisplay
from rlaif_jax.progress.plan import PlannedStage
from tests.helpers import read_terminal

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_are_rare_and_include_the_last(clock, capsys):
    with ProgressDisplay() as display:
        bar = display.add("judge [a/b]", 101, unit="judgement")
        for done in range(1, 102):
            bar.update(done, f"{done % 7} missing" if done != 21 else "")
            clock[0] += 0.5
        bar.close()
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert [line.split()[3] for line in lines] == [f"{done}/101" for done in range(1, 102, 4)]
    assert lines[0] == "[judge [a/b]] judgement 1/101  1 missing"
    assert lines[1] == "[judge [a/b]] judgement 5/101  5 missing  0:48 left"
    assert lines[5] == "[judge [a/b]] judgement 21/101  0:40 left"
    assert lines[-1] == "[judge [a/b]] judgement 101/101  3 missing"


def test_a_line_that_was_not_printed_comes_with_the_end_and_only_once(clock, capsys):
    display = ProgressDisplay(stderr=True)
    bar, other = display.add("lm", None), display.add("sft", 2, start=1)
    bar.update(1, "loss 1")
    bar.update(2, "loss 2")
    other.update(2, "")
    for _ in range(2):
        bar.close()
        other.close()
        display.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["[lm] step 1  loss 1", "[lm] step 2  loss 2", "[sft] step 2/2"]


def test_hours_and_minutes_are_shown(clock, capsys):
    for total, left in ((9, "0:07"), (756, "12:34"), (3725, "1:02:03")):
        with ProgressDisplay() as display:
            bar = display.add("lm", total)
            bar.update(1, "")
            clock[0] += 1.0
            bar.update(2, "")
            bar.close()
        assert capsys.readouterr().out.splitlines()[-1] == f"[lm] step 2/{total}  {left} left"


def test_the_lines_of_a_long_run_become_rarer(clock, capsys):
    with ProgressDisplay() as display:
        bar = display.add("rl", None)
        for done in range(1, 36_001):
            bar.update(done, "")
            clock[0] += 1.0
        lines = capsys.readouterr().out.splitlines()
    times = [int(line.split()[2]) for line in lines]
    assert times[:4] == [1, 3, 5, 7]
    assert max(b - a for a, b in itertools.pairwise(times)) == 60
    assert len(times) < 1300  # of ten hours


# ---- A plan, waits, samples


STAGES = (PlannedStage("lm", "a model learns", 1), PlannedStage("labels", "a judge labels", 2))


def test_planned_stages_are_announced_with_the_time_that_is_left(clock, capsys):
    with ProgressDisplay() as display:
        display.plan(STAGES)
        display.begin("other")
        display.begin("lm")
        bar = display.add("lm", 10)
        for done in (2, 4, 10):
            clock[0] += 5.0
            bar.update(done, "")
        bar.close()
        display.begin("lm")
        display.begin("labels")
    assert capsys.readouterr().out.splitlines() == [
        "stage 1 of 2: a model learns",
        "[lm] step 2/10",
        "[lm] step 4/10  0:15 left  (whole run: 1:05 left)",
        "[lm] step 10/10  (whole run: 0:30 left)",
        "stage 2 of 2: a judge labels (about 0:30 left of the whole run)",
    ]


def test_a_stage_that_ends_when_a_check_holds_is_expected_to_take_its_usual_steps(clock, capsys):
    with ProgressDisplay() as display:
        display.plan([PlannedStage("lm", "a model learns", 1, usual=40), PlannedStage("rl", "PPO", 1)])
        display.begin("lm")
        bar = display.add("lm", 100)
        for done in (10, 20, 40):
            clock[0] += 5.0
            bar.update(done, "")
    assert capsys.readouterr().out.splitlines()[1:] == [
        "[lm] step 10/100",
        "[lm] step 20/100  0:10 left  (whole run: 0:30 left)",
        "[lm] step 40/100  0:03 left  (whole run: 0:20 left)",
    ]


def test_what_a_stage_does_after_its_bar_does_not_make_the_run_longer(clock, capsys):
    with ProgressDisplay() as display:
        display.plan([*STAGES, PlannedStage("rl", "PPO", 10)])
        display.begin("rl")
        bar = display.add("rl", 4)
        for done in (1, 2, 4):
            clock[0] += 5.0
            bar.update(done, "")
        bar.close()
        with display.wait("the last answers", "answer") as count:
            clock[0] += 5.0
            count(1, 2)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "[rl] step 1/4",
        "[rl] step 2/4  0:10 left  (whole run: 0:10 left)",
        "[rl] step 4/4",
        "[the last answers] answer 1/2",
    ]


def test_a_short_wait_leaves_no_line_and_a_longer_one_its_last(clock, capsys):
    with ProgressDisplay() as display:
        display.print("begun")
        with display.wait("short", "question") as count:
            count(1, 3)
            clock[0] += 0.5
            count(3, 3)
        with display.wait("long", "question") as count:
            for done in range(1, 9):
                clock[0] += 0.5
                count(done, 8)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["begun", "[long] question 3/8  0:02 left", "[long] question 7/8  0:00 left", "[long] question 8/8"]


def test_what_cannot_say_how_far_it_is_is_not_silent(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_LINE_EVERY_S", 0.05)
    monkeypatch.setattr(progress, "TICK_S", {"plain": 0.01})
    threads = threading.active_count()
    display = ProgressDisplay()

    def wait_for(text):
        """Waits until the text is printed; nobody calls the display meanwhile."""
        shown, deadline = "", time.monotonic() + 20
        while text not in shown:
            assert time.monotonic() < deadline, shown
            time.sleep(0.02)
            shown += capsys.readouterr().out

    display.open("some run")
    wait_for("[some run] working, 0:00")
    display.plan(STAGES)
    display.begin("lm")
    wait_for("[lm] working, 0:00")
    bar = display.add("lm", 5, text="compiling")
    wait_for("[lm] step 0/5  compiling  0:00 so far")
    with display.wait("the page"):
        wait_for("[the page]  0:00 so far")
    bar.update(0, "gold 0.5")
    wait_for("[lm] step 0/5  gold 0.5  compiling  0:00 so far")
    bar.close()
    display.close()
    capsys.readouterr()
    time.sleep(0.2)
    assert capsys.readouterr().out == ""
    assert threading.active_count() == threads


def test_a_sample_is_two_lines_of_safe_text_cut_to_the_width(capsys):
    display = ProgressDisplay()
    display.sample("step 3:", "start " + "p" * 300 + " end?", "yes\x1b[2J\nno " + "a" * 300)
    title, prompt, answer = capsys.readouterr().out.splitlines()
    assert title == "step 3:"
    assert prompt.startswith("  prompt: ...ppp")
    assert prompt.endswith(" end?")
    assert answer.startswith("  answer: yes no aaa")
    assert answer.endswith("...")
    assert len(prompt) == len(answer) == progress.PLAIN_WIDTH


def test_an_output_that_knows_few_characters_gets_the_others_replaced():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    program = "from rlaif_jax.progress.display import ProgressDisplay as D; D().print('é → b'); D().print('c')"
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, check=True)
    assert done.stdout.decode().splitlines() == ["? ? b", "c"]


# ---- A terminal


PROGRAM = """
import sys, time
from rlaif_jax.progress.display import ProgressDisplay
with ProgressDisplay(stderr=True) as display:
    for name in ("one", "two [x]"):
        bar = display.add(name, 4)
        for done in range(1, 5):
            bar.update(done, f"[missing] {done}")
            time.sleep(0.02)
        bar.close()
print("the result")
"""


def on_a_terminal(program: str, **variables: str) -> tuple[int, str, str]:
    """Runs a program whose standard error is a terminal; returns its status, its output and what was shown."""
    parent, child = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"} | variables
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=child, env=environment, cwd=ROOT, text=True
    )
    os.close(child)
    shown = read_terminal(parent)
    out, _ = process.communicate()
    return process.returncode, out, shown


def plain(shown: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)


def test_a_terminal_gets_bars_and_the_standard_output_only_the_result():
    status, out, shown = on_a_terminal(PROGRAM)
    assert (status, out) == (0, "the result\n")
    text = plain(shown)
    assert "━" in text
    assert text.count("4/4") >= 2
    assert "two [x]" in text
    assert "[missing] 4" in text


PLANNED = """
import time
from rlaif_jax.progress import display
from rlaif_jax.progress.plan import PlannedStage
display.TICK_S = {"live": 0.02}
display.SHOWN_AFTER_S = 0.3
with display.ProgressDisplay(stderr=True) as shown:
    shown.open("some run")
    shown.plan([PlannedStage("lm", "a model learns", 1), PlannedStage("rl", "PPO", 3)])
    shown.begin("lm")
    bar = shown.add("lm", 4, text="compiling")
    time.sleep(0.1)
    for done in range(1, 5):
        bar.update(done, "", keep=done == 3)
        with shown.wait("a moment"):
            time.sleep(0.1)
    with shown.wait("a long wait", "answer") as count:
        count(1, 2)
        time.sleep(0.6)
    bar.close()
    shown.begin("rl")
    shown.sample("a sample", "\\x1b[7mprompt " + "x" * 200, "[bold]answer[/bold]")
    time.sleep(0.1)
"""


def test_a_terminal_shows_the_whole_run_and_waits_that_last():
    status, _, shown = on_a_terminal(PLANNED)
    assert status == 0
    text = plain(shown)
    assert "0/4  compiling" in text
    assert re.search("whole run .* stage 1 of 2 .* left", text)
    assert "stage 1 of 2: a model learns\r\n" in text
    assert re.search(r"stage 2 of 2: PPO \(about 0:0\d left of the whole run\)\r\n", text)
    assert re.search(r"\[lm\] step 3/4 .*\r\n", text)  # a line that stays
    assert "a moment" not in text
    assert "a long wait" in text
    assert "1/2" in text
    assert re.search("  prompt: [.]{3}x+\r\n  answer: \\[bold\\]answer\\[/bold\\]\r\n", text)
    assert "\x1b[7m" not in shown
    assert all(len(line.strip("\r")) <= 100 for line in re.findall("  prompt: .*", text))


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines():
    status, _, shown = on_a_terminal(PLANNED, TERM="dumb")
    assert status == 0
    assert "\x1b" not in shown
    assert "[lm] step 3/4" in shown


def test_a_reader_that_goes_away_stops_nothing():
    read, write = os.pipe()
    os.close(read)
    program = PROGRAM.replace("stderr=True", "stderr=False").replace('print("the result")', "sys.exit(7)")
    done = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    os.close(write)
    assert done.returncode == 7, done.stderr.decode()
