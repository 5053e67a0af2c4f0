"""Servers with a language model behind them, as processes: each test starts its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket

import pytest

Shared = Callable[[str], Path]


@contextmanager
def running(command: list[str], path: str, log: Path) -> Iterator[str]:
    """The URL of a server that `command PORT` starts, once it answers GET `path`."""
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(log, "w") as out:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=out, stderr=out, cwd=log.parent)
    try:
        for _ in range(240):
            if process.poll() is not None:
                pytest.skip(f"the server does not start here: {log.read_text()[-300:]}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=1):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)
        else:
            pytest.skip("the server did not answer within 60 s")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


def llama_cpp_python() -> str:
    """Returns an interpreter that can serve GGUF files, or skips the test."""
    python = os.environ.get("LLAMA_CPP_PYTHON", sys.executable)
    probe = subprocess.run([python, "-c", "import llama_cpp.server, gguf"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("needs llama-cpp-python[server] and gguf, here or in the interpreter that LLAMA_CPP_PYTHON names")
    return python


def llama_cpp_server(model: Path, alias: str, *, context: int) -> list[str]:
    """Returns the command of llama.cpp's server for a GGUF file, with log-probabilities; it lacks the port."""
    served = ["--model", str(model), "--model_alias", alias, "--n_ctx", str(context), "--logits_all", "true"]
    threads = ["--n_threads", "1", "--n_threads_batch", "1"]  # more of them than free cores wait for one another
    return [llama_cpp_python(), "-m", "llama_cpp.server", *served, *threads]


def stories_gguf(python: str, shared_data: Shared, folder: Path) -> Path:
    """Returns the GGUF file of the stories260K model, made in `folder` by an interpreter that has the package gguf."""
    script, made = Path(__file__).with_name("stories_gguf.py"), folder / "stories260K.gguf"
    weights, tokens = shared_data("lm_stories260k_hf"), shared_data("lm_stories260k/tok512.bin")
    subprocess.run([python, str(script), str(weights), str(tokens), str(made)], check=True)
    return made
