"""Starts the two processes that run an answer's code and its tests, and reads the results."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rlaif_jax.feedback.verifiers.sandbox.tester import PASSED, UNCHECKED

_ROOT = Path(__file__).resolve().parents[4]
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from rlaif_jax.feedback.verifiers.sandbox.tester import main; del sys.path[0]; main(sys.argv[2])"
)


class Results(NamedTuple):
    """How the tests of an answer ended.

    Attributes:
        passed: the number of tests that passed.
        tests: the number of tests that could be checked; those that did not run to their end did not pass.
        problem: why there is no result, where the tests are to blame or the processes could not start; "" else.
        unconfined: what this system could not confine, such as "files"; () where it could all.
    """

    passed: int
    tests: int
    problem: str = ""
    unconfined: tuple[str, ...] = ()


def run_tests(code: str, tests: str | list[str], *, timeout_s: float, memory_mb: int) -> Results:
    """Runs tests on code that nobody has read, in new processes, and returns how many passed.

    The processes have no environment, no input, a new folder as their home, and the limits of `confine.py`.

    Args:
        code: the answer's.
        tests: as in `tester.read_tests`.
        timeout_s: seconds for all of it, from the start of the processes.
        memory_mb: address space of each of both processes.
    """
    nonce = secrets.token_hex(16)
    job = json.dumps({"nonce": nonce, "code": code, "tests": tests}).encode() + b"\n"
    limits = json.dumps({"timeout_s": timeout_s, "memory_mb": memory_mb})
    with tempfile.TemporaryDirectory(prefix="rlaif_jax_answer_", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", _START, str(_ROOT), limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(job, timeout_s)
        except subprocess.TimeoutExpired:
            _kill(process)
            output, _ = process.communicate()
        finally:
            _kill(process)  # also what outlives the first process of the group
            process.wait()
    return _read_results(output.decode(errors="replace"), nonce)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _read_results(output: str, nonce: str) -> Results:
    """Returns the results of the lines that begin with the nonce."""
    lines = [line.split()[1:] for line in output.splitlines() if line.startswith(f"{nonce} ")]
    if not lines or lines[0][0] not in ("tests", "no-tests"):
        return Results(0, 0, "the processes of the tests could not start")
    if lines[0][0] == "no-tests":
        return Results(0, 0, f"the tests are no Python ({lines[0][1]})")
    count = int(lines[0][1])
    outcomes = [line[0] for line in lines[1:]]
    checked = count - outcomes.count(UNCHECKED)
    unconfined = () if lines[0][2] == "-" else tuple(lines[0][2].replace("-", " ").split(","))
    problem = (
        "" if checked else "the tests hand functions to the answer's code" if count else "the tests have no assert"
    )
    return Results(outcomes.count(PASSED), checked, problem, unconfined)
