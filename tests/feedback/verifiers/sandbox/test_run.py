"""Answers that are right, wrong and hostile, run with their tests in real processes."""

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from rlaif_jax.feedback.verifiers.sandbox.run import Results, run_tests
from tests.feedback.verifiers.sandbox.answers import HOSTILE, REFUSED, RIGHT, STRICT, WRONG


def has_landlock():
    return sys.platform == "linux" and ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) >= 1


CONFINED = pytest.mark.skipif(not has_landlock(), reason="this system cannot confine files (Landlock)")


def run(code, tests, timeout_s=20.0, memory_mb=256):
    return run_tests(code, tests, timeout_s=timeout_s, memory_mb=memory_mb)


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers(name):
    results = run(*RIGHT[name])
    assert results.passed == results.tests >= 1 and results.problem == ""


@pytest.mark.parametrize("code, tests, expected", WRONG)
def test_wrong_answers(code, tests, expected):
    assert run(code, tests) == Results(*expected)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_pass_no_test(name):
    assert run(HOSTILE[name], STRICT) == Results(0, len(STRICT))


def test_the_strict_tests_pass_a_right_answer():
    assert run("def f(x): return 2", STRICT) == Results(len(STRICT), len(STRICT))


def test_a_loop_without_end_is_stopped_and_the_tests_before_it_count():
    started = time.monotonic()
    results = run("def f(x):\n    while x == 3: pass\n    return x", [f"assert f({i}) == {i}" for i in range(6)], 1.5)
    assert results == Results(3, 6) and time.monotonic() - started < 10


@pytest.mark.parametrize(
    "code", ["import time\ntime.sleep(60)", "while True:\n    try: pass\n    except BaseException: pass"]
)
def test_waiting_is_stopped(code):
    started = time.monotonic()
    assert run(code, ["assert True"], 1.0) == Results(0, 1) and time.monotonic() - started < 10


def test_memory_is_limited():
    code = "def f(n):\n    x = bytearray(n << 20)\n    return len(x)"
    assert run(code, ["assert f(8) == 8 << 20", "assert f(400) == 400 << 20", "assert f(1) == 1 << 20"]) == Results(
        2, 3
    )
    assert run("x = []\nwhile True: x.append(bytearray(1 << 20))", ["assert True"]) == Results(0, 1)


def test_recursion_without_a_limit():
    code = "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x): return f(x)"
    assert run(code, ["assert f(0) == 1"], 2.0, 64) == Results(0, 1)


@CONFINED
def test_what_an_answer_cannot_do(tmp_path):
    (tmp_path / "key").write_text("sk-123")
    code = "import ctypes, os, resource, socket, subprocess, urllib.request\n"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for number, attempt in enumerate(REFUSED):
            attempt = attempt.format(secret=tmp_path / "key", folder=tmp_path, pid=os.getpid(), port=port)
            code += f"""
def f{number}():
    try:
        {attempt}
    except (OSError, ValueError):  # `setrlimit` has ValueError
        return "refused"
    return "done"
"""
        count = len(REFUSED)
        assert run(code, [f"assert f{i}() == 'refused'" for i in range(count)]) == Results(count, count)
    assert (tmp_path / "key").read_text() == "sk-123" and list(tmp_path.iterdir()) == [tmp_path / "key"]


@CONFINED
def test_a_fork_bomb_starts_nothing():
    code = """
import os, time
started = 0
for _ in range(100):
    try:
        if os.fork() == 0: time.sleep(60)
        started += 1
    except OSError: pass
"""
    assert run(code, ["assert started == 0"]) == Results(1, 1)


@CONFINED
def test_the_tests_are_confined_too():
    attempts = ("open('/etc/passwd')", "os.fork()", "os.kill(os.getppid(), 0)", "socket.socket()")
    tests = [
        f"import os, socket\ntry: {attempt}\nexcept OSError: pass\nelse: raise AssertionError" for attempt in attempts
    ]
    assert run("", tests) == Results(4, 4)


def test_the_environment_is_not_passed_on(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-123")
    code = "import os\ndef f(): return dict(os.environ), os.getcwd(), os.path.expanduser('~')"
    tests = """
import os
found, folder, home = f()
assert "sk-123" not in str(found) and "sk-123" not in str(os.environ)
assert folder == home == found["TMPDIR"] and "rlaif_jax_answer" in home
"""
    assert run(code, tests) == Results(2, 2)


def test_files_of_a_limited_size_may_be_written_and_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # other tests have folders in the usual place
    code = """
import os
def f(n):
    with open("x", "wb") as file: file.write(bytes(n << 20))
    return os.path.getsize("x")
"""
    assert run(code, ["assert f(1) == 1 << 20", "assert f(20) == 20 << 20"]) == Results(1, 2)
    assert list(tmp_path.iterdir()) == []


def running(mark):
    """The processes that have `mark` among their arguments."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [entry.parent.name] if mark in entry.read_bytes() else []
    return found


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux kills what a run leaves behind")
def test_the_processes_end_with_their_parent():
    """A run that is killed leaves no answer that computes on."""
    seconds = 30 + os.getpid() / 1e6
    program = (
        "from rlaif_jax.feedback.verifiers.sandbox.run import run_tests\n"
        f"run_tests('while True: pass', ['assert True'], timeout_s={seconds}, memory_mb=256)"
    )
    path = os.pathsep.join(sys.path)
    parent = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path})
    mark = f'"timeout_s": {seconds}'.encode()
    wait_for(lambda: len(running(mark)) == 2)
    parent.kill()
    parent.wait()
    wait_for(lambda: not running(mark))


@pytest.mark.parametrize(
    "tests, problem",
    [
        ("assert f(1) ==", "the tests are no Python (SyntaxError)"),
        (["assert f(1) == 1", "("], "the tests are no Python (SyntaxError)"),
        ("x = 1", "the tests have no assert"),
        (["", "# nothing"], "the tests have no assert"),
        ("def helper():\n    assert f(1) == 1", "the tests have no assert"),
        (["assert f(lambda x: x) == 1"], "the tests hand functions to the answer's code"),
    ],
)
def test_tests_that_cannot_judge(tests, problem):
    assert run("def f(x): return 1", tests) == Results(0, 0, problem)


def test_a_test_that_cannot_be_checked_does_not_count():
    tests = ["assert f(1) == 1", "assert f(lambda x: x) == 1", "assert f(2) == 2"]
    assert run("def f(x): return 1", tests) == Results(1, 2)
