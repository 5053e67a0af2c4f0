"""`python -m rlaif_jax judge`, as its users run it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rlaif_jax.__main__ import tool
from rlaif_jax.config import UserError
from rlaif_jax.feedback.api.command import JudgeConfig, main, read_questions
from rlaif_jax.feedback.records.store import Store
from tests.feedback.api_server import Wrong, right, serve

pytest.importorskip("openai", reason="the API judge needs the extra: pip install -e '.[api]'")


def items(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


GOOD = {"prompt": "Say it.", "answers": ["quality 2", "quality 1", "quality 3"], "generators": ["x", "y", "z"]}


def test_judging_a_file_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, store = items(tmp_path / "items.jsonl", GOOD, GOOD | {"prompt": "Once more."}), tmp_path / "f.sqlite"
    with serve() as server:
        config = JudgeConfig(server=server.url, model="judge", items=(path,), store=store)
        assert main(config) == 0
        printed = capsys.readouterr().out
        assert "12 judgements of 6 questions: 12 answered, 0 missing" in printed
        assert "position bias: +0.700 log-odds" in printed and "13 requests" in printed
        assert "both orders prefer the same answer in 100.0 % of 6 pairs" in printed
        assert main(config) == 0 and server.count == 13
        assert "0 requests" in capsys.readouterr().out
    with Store(store) as feedback:
        assert len(feedback) == 12 and feedback.judgements()[0].generators == ("x", "y")


def test_bad_lines_are_reported_and_the_good_ones_asked(tmp_path: Path):
    path = items(
        tmp_path / "items.jsonl",
        GOOD,
        '{"prompt": "cut',
        {"prompt": "p"},
        {"prompt": "p", "answers": "a"},
        {"prompt": "p", "answers": []},
        GOOD | {"answer": "a"},
        GOOD | {"generators": ["x"]},
        [1],
        GOOD | {"prompt": "half \ud83d"},
        GOOD | {"answers": ["a", "\ude00", "c"]},
        {"prompt": None, "answers": ["a"]},
        {"prompt": "p", "answers": None},
        "",
        GOOD,
    )
    good, bad = read_questions(path)
    assert len(good) == 2 and good[1].where == f"{path}:14"
    assert [message.split(": ", 1)[0].rsplit(":", 1)[1] for message in bad] == [str(i) for i in range(2, 13)]
    assert "no valid JSON" in bad[0] and "needs prompt and answers" in bad[1] and "no field answer" in bad[4]
    assert "prompt holds half of a Unicode" in bad[7] and "answers holds half of a Unicode" in bad[8]
    with pytest.raises(UserError, match="cannot read"):
        read_questions(tmp_path / "none.jsonl")


def test_missing_judgements_are_named_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = items(
        tmp_path / "items.jsonl",
        {"prompt": "Bad.", "answers": ["quality 1"]},
        {"prompt": "Good.", "answers": ["quality 5"]},
    )
    behave = lambda body, number: Wrong(400) if "Bad." in str(body) else right(body)
    with serve(behave) as server:
        config = JudgeConfig(
            server=server.url, model="judge", items=(path,), form="rating", store=tmp_path / "f.sqlite", attempts=1
        )
        assert main(config) == 1
    printed = capsys.readouterr().out
    assert "2 judgements of 2 questions: 1 answered, 1 missing (1 error)" in printed
    assert f"missing: {path}:1: error: 'status 400" in printed


def test_a_server_that_does_not_exist_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = items(tmp_path / "items.jsonl", GOOD)
    config = JudgeConfig(
        server="http://127.0.0.1:9/v1", model="j", items=(path,), store=tmp_path / "f.sqlite", attempts=3
    )
    assert main(config) == 6
    printed = capsys.readouterr().out
    assert printed.count("no connection to http://127.0.0.1:9/v1: ConnectError") == 6
    assert "3 requests" in printed and "0 tokens" in printed  # all six share three attempts, which cost nothing


def test_nothing_to_do():
    with pytest.raises(UserError, match="items is missing"):
        main(JudgeConfig())


def test_own_template_and_showing_the_built_in_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(JudgeConfig(form="comment", show_template=True)) == 0
    template = tmp_path / "mine.txt"
    template.write_text(capsys.readouterr().out)
    path = items(tmp_path / "items.jsonl", {"prompt": "Say it.", "answers": ["quality 5"]})
    with serve() as server:
        store = tmp_path / "f.sqlite"
        assert main(JudgeConfig(server=server.url, model="j", items=(path,), template=template, store=store)) == 0
    with Store(store) as feedback:
        assert [entry.form for entry in feedback.judgements()] == ["comment"]


def test_the_list_of_tools(capsys: pytest.CaptureFixture[str]):
    tool([])
    assert "judge" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        tool(["jugde"])
    assert exit_.value.code == 2 and "no tool 'jugde'" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_keeps_the_replies_that_are_under_way(number: signal.Signals, tmp_path: Path):
    path = items(tmp_path / "items.jsonl", *(GOOD | {"prompt": f"Say it {i}."} for i in range(10)))
    begun, ended = threading.Event(), threading.Event()

    def slow(body: dict[str, Any], count: int) -> Any:
        if count > 1:  # the first asks what the server can do
            begun.set()
            time.sleep(0 if ended.is_set() else 1)
        return right(body)

    with serve(slow) as server:
        command = ["judge", "--server", server.url, "--model", "j", "--items", str(path), "--concurrency", "4"]
        arguments = [sys.executable, "-m", "rlaif_jax", *command, "--store", str(tmp_path / "f.sqlite")]
        process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
        assert begun.wait(60)
        time.sleep(0.3)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        ended.set()
        stopped = server.count
        assert process.returncode == 128 + number, errors
        assert "the same command goes on" in errors
        with Store(tmp_path / "f.sqlite") as feedback:
            assert 0 < len(feedback) < 60
        subprocess.run(arguments, check=True, capture_output=True)
        asked = [json.dumps(body) for body in server.requests]
    about = [body for body in asked if "quality" in body]
    assert stopped < len(asked)
    assert len(set(about)) == len(about) == 60, "no reply is bought twice"


@pytest.mark.slow
def test_the_command_line(tmp_path: Path):
    path = items(tmp_path / "items.jsonl", *(GOOD | {"prompt": f"p{i}"} for i in range(5)))
    run = lambda *options: subprocess.run(
        [sys.executable, "-m", "rlaif_jax", *options], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    with serve() as server:
        done = run("judge", "--server", server.url, "--model", "j", "--items", str(path), "--report")
    assert done.returncode == 0, done.stderr
    assert "30 answered" in done.stdout and "recorded in feedback.sqlite" in done.stdout
    bad = run("judge", "--items", str(path), "--server", "nowhere")
    assert bad.returncode == 2 and "server is 'nowhere'" in bad.stderr and "Traceback" not in bad.stderr
    bad = run("judge", "--server", "http://127.0.0.1:9", "--model", "j", "--items", "none.jsonl")
    assert bad.returncode == 2 and bad.stderr == "error: cannot read none.jsonl: No such file or directory\n"
