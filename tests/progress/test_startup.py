"""A script says at once that it has started, and a command line is kept without its secrets."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlaif_jax.progress import startup
from rlaif_jax.progress.startup import Loading, command_text

ROOT = Path(__file__).parents[2]
SCRIPTS = ("quickstart", "stories_sentiment", "feedback_forms", "what_to_ask")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_that_it_loads_before_it_imports_anything_slow(name):
    program = (
        "import builtins, runpy, sys\n"
        "first = builtins.__import__\n"
        "def guarded(name, *args, **kwargs):\n"
        "    if name.partition('.')[0] in ('jax', 'numpy', 'rich'):\n"
        "        raise SystemExit(f'first slow import: {name}')\n"
        "    return first(name, *args, **kwargs)\n"
        "builtins.__import__ = guarded\n"
        f"sys.argv = ['experiments/{name}.py', '--help']\n"
        f"runpy.run_path('experiments/{name}.py', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    first, second = done.stderr.splitlines()
    assert first == f"{name}: loading JAX and this package"
    assert second.startswith("first slow import: ")
    assert done.stdout == ""


def test_lines_come_while_the_imports_last_and_end_with_them(capsys, monkeypatch):
    monkeypatch.setattr(startup, "ALIVE_EVERY_S", 0.02)
    monkeypatch.setattr(sys, "argv", ["experiments/some.py"])
    loading = Loading()
    deadline = time.monotonic() + 20
    lines = []
    while len(lines) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
        lines += capsys.readouterr().err.splitlines()
    loading.done()
    loading.done()
    time.sleep(0.05)
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""
    assert lines[0] == "some: loading JAX and this package"
    assert lines[1:3] == ["some: still loading, 0 s"] * 2


def test_a_command_is_what_a_shell_reads_without_secrets():
    given = ["/opt/bin/python3", "a b.py", "--judge.api-key", "sk-1", "--token=abc", "--sampling.max-new-tokens", "24"]
    given += ["--secret-file", "f", "-password=x", "--key", "--url", "https://me:pw@host/v1", "--tokenizer=t"]
    assert command_text(given) == (
        "python3 'a b.py' --judge.api-key '***' '--token=***' --sampling.max-new-tokens 24 "
        "--secret-file f '-password=***' --key '***' 'https://me:***@host/v1' --tokenizer=t"
    )
