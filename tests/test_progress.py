"""Progress as a reader of plain lines and of a terminal sees it."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlaif_jax import progress
from rlaif_jax.progress import ProgressDisplay

ROOT = Path(__file__).parents[1]


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
    assert [line.split()[3] for line in lines] == [f"{done}/101" for done in range(1, 102, 10)]
    assert lines[0] == "[judge [a/b]] judgement 1/101  1 missing"
    assert lines[1] == "[judge [a/b]] judgement 11/101  4 missing  0:45 left"
    assert lines[2] == "[judge [a/b]] judgement 21/101  0:40 left"
    assert lines[-1].endswith("0:00 left")


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
    assert err.splitlines() == ["[lm] step 1  loss 1", "[sft] step 2/2", "[lm] step 2  loss 2"]


def test_hours_and_minutes_are_shown(clock, capsys):
    display = ProgressDisplay()
    for total, left in ((8, "0:07"), (755, "12:34"), (3724, "1:02:03")):
        bar = display.add("lm", total)
        clock[0] = 0.0
        bar.update(0, "")
        clock[0] = 1.0
        bar.update(1, "")
        bar.close()
        assert capsys.readouterr().out.splitlines()[-1] == f"[lm] step 1/{total}  {left} left"


PROGRAM = """
import sys, time
from rlaif_jax.progress import ProgressDisplay
with ProgressDisplay(stderr=True) as display:
    for name in ("one", "two [x]"):
        bar = display.add(name, 4)
        for done in range(1, 5):
            bar.update(done, f"[missing] {done}")
            time.sleep(0.02)
        bar.close()
print("the result")
"""


def test_a_terminal_gets_bars_and_the_standard_output_only_the_result():
    parent, child = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=child, env=environment, cwd=ROOT, text=True
    )
    os.close(child)
    shown = b""
    try:
        while data := os.read(parent, 65536):
            shown += data
    except OSError:  # the other end has closed
        pass
    os.close(parent)
    out, _ = process.communicate()
    assert (process.returncode, out) == (0, "the result\n")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert "━" in text
    assert text.count("4/4") >= 2
    assert "two [x]" in text
    assert "[missing] 4" in text


def test_a_reader_that_goes_away_stops_nothing():
    read, write = os.pipe()
    os.close(read)
    program = PROGRAM.replace("stderr=True", "stderr=False").replace('print("the result")', "sys.exit(7)")
    done = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    os.close(write)
    assert done.returncode == 7, done.stderr.decode()
