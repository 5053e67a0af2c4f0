"""A run whose judge is a real model behind llama.cpp's server, and which is killed twice.

The policy is stories260K. SmolLM2 rates the answers through the chat API (the variable SMOLLM2_GGUF names its file), or
stories260K compares them with those before training through the completion API.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rlaif_jax.feedback.records.forms import to_json
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.metrics import read_metrics, without_time
from rlaif_jax.models.hf.files import load_model
from tests.feedback.api_server import Wrong, serve
from tests.feedback.model_servers import Shared, llama_cpp_python, llama_cpp_server, running, stories_gguf
from tests.helpers import assert_same_leaves

pytest.importorskip("openai", reason="the API judge needs the extra: pip install -e '.[api]'")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PROBE = "Reply with the letter A."  # how a judge asks once or twice what a server can do
BEGINNINGS = ("Lily saw a", "Tom had a", "One day, a", "The sun was", "Mom said to", "In the park, a")
ENDINGS = ("big red", "small dog and", "funny bird that", "new box with", "very old")

# What a model of children's stories can be asked: how it goes on.
FEELING = """form: ranking
labels: happy = first, sad = second
[user]
{prompt} {answer_1} Then {answer_2}.
[direct]
She was very"""


class Moment(NamedTuple):
    """When a run is killed: after a number of replies that follow the numbers of a step."""

    step: int
    replies: int


KILLS = (Moment(step=1, replies=3), Moment(step=3, replies=0))  # in the middle of step 2's judgements; between 3 and 4


class Gateway:
    """Passes requests on to a model server one at a time, counts its replies, and kills runs; or repeats the replies."""

    def __init__(self, server: str) -> None:
        self.server = server.removesuffix("/v1")
        self.replies: dict[str, Any] = {}
        self.paid: Counter[str] = Counter()
        self.repeated: Counter[str] = Counter()
        self.faults: list[str] = []
        self.replaying = False
        self._lock = threading.Lock()
        self._run: subprocess.Popen[bytes] | None = None
        self._folder = Path()
        self._kills: list[Moment] = []
        self._since = Moment(-1, 0)  # the last step that was written, and the replies after it

    def watch(self, run: subprocess.Popen[bytes], folder: Path, kills: list[Moment]) -> None:
        """Counts the requests of a run, which is killed at the first of the moments."""
        self._run, self._folder, self._kills, self._since = run, folder, kills, Moment(-1, 0)

    @property
    def judged(self) -> int:
        """Returns the number of replies to questions of a judge."""
        return sum(count for question, count in self.paid.items() if PROBE not in question)

    def __call__(self, body: dict[str, Any], number: int) -> Any:
        run, question = self._run, json.dumps(body)
        if self.replaying:
            self.repeated[question] += 1
            if question not in self.replies:
                self.faults.append(f"never asked before: {question}")
            return self.replies.get(question, Wrong(400))
        with self._lock:
            assert run is not None
            if run.poll() is not None or self._kill(run):
                return Wrong(event="reset")  # nobody waits for the reply any more
            try:
                self.replies[question] = self._ask(question)
            except OSError as error:
                self.faults.append(f"{error}: {question}")
                return Wrong(500)
            self.paid[question] += 1
            self._since = self._since._replace(replies=self._since.replies + 1)
            return self.replies[question]

    def _ask(self, question: str) -> Any:
        path = "chat/completions" if "messages" in json.loads(question) else "completions"
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.server}/v1/{path}", question.encode(), headers)
        with urllib.request.urlopen(request, timeout=600) as reply:
            return json.load(reply)

    def _kill(self, run: subprocess.Popen[bytes]) -> bool:
        """Kills the run if its moment has come, and returns whether it did."""
        metrics = self._folder / "metrics.jsonl"
        step = max((row["step"] for row in read_metrics(metrics)), default=-1) if metrics.exists() else -1
        if step != self._since.step:
            self._since = Moment(step, 0)
        if not self._kills or self._since < self._kills[0]:
            return False
        # No program can keep a reply that it gets in the millisecond of its death: those before are on the disk by now.
        deadline = time.monotonic() + 20
        while kept(self._folder) < self.judged and time.monotonic() < deadline:
            time.sleep(0.01)
        self._kills.pop(0)
        run.kill()
        run.wait()
        return True


def kept(folder: Path) -> int:
    """Returns the number of replies to questions that are on disk."""
    with closing(sqlite3.connect(f"file:{folder}/feedback.calls.sqlite?mode=ro", uri=True)) as cache:
        return int(cache.execute("SELECT count(*) FROM call").fetchone()[0])


def judgements(folder: Path) -> list[str]:
    """Returns all that was recorded, superseded records too, without what depends on the clock."""
    with Store(folder / "feedback.sqlite") as store:
        found = [to_json(entry) for entry in store.judgements(superseded=True)]
    return sorted(json.dumps({k: v for k, v in entry.items() if k not in ("time", "call")}) for entry in found)


def train(*options: str) -> subprocess.Popen[bytes]:
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "rlaif_jax", "train", *options], env=environment)


@contextmanager
def judge_server(judge: str, shared_data: Shared, folder: Path) -> Iterator[tuple[str, str]]:
    """(URL, settings of the reward) of a model behind llama.cpp's server."""
    python = llama_cpp_python()
    if judge == "smollm2":
        file = Path(os.environ.get("SMOLLM2_GGUF", ""))
        if not file.is_file():
            pytest.skip("needs SmolLM2-135M-Instruct as GGUF: SMOLLM2_GGUF names its file")
        command, settings = llama_cpp_server(file, judge, context=1024), "min_mass=0.1 timeout_s=600"
    else:
        (folder / "feeling.txt").write_text(FEELING)
        command = llama_cpp_server(stories_gguf(python, shared_data, folder), judge, context=512)
        settings = f"api=completion form=ranking template={folder}/feeling.txt min_mass=0"
    with running(command, "/v1/models", folder / "server.log") as url:
        yield url, f"model={judge} constrain=none {settings}"


@pytest.mark.parametrize("judge", ["stories", "smollm2"])
def test_a_run_that_is_killed_twice_pays_once_for_each_judgement(judge: str, shared_data: Shared, tmp_path: Path):
    policy, tokens = (shared_data(f"lm_stories260k/{name}") for name in ("stories260K.bin", "tok512.bin"))
    prompts = [f"{beginning} {ending}" for beginning in BEGINNINGS for ending in ENDINGS]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    with judge_server(judge, shared_data, tmp_path) as (url, settings):
        gateway = Gateway(url)
        with serve(gateway) as server:
            options = [
                *("--policy", str(policy), "--tokenizer", str(tokens), "--prompts", str(tmp_path / "prompts.txt")),
                *("--feedback", f"api {server.url} {settings}", "--held-out", "2", "--scale-answers", "4"),
                *("--train.steps", "4", "--train.prompts-per-step", "2", "--train.prompt-length", "16"),
                *("--train.eval-every", "4", "--train.save-every", "2", "--sampling.max-new-tokens", "12"),
                *("--ppo.answers-per-prompt", "3", "--ppo.policy-optimizer.learning-rate", "1e-3"),
            ]
            killed, whole = tmp_path / "killed", tmp_path / "whole"
            kills, ends = list(KILLS), []
            while not ends or ends[-1] == -signal.SIGKILL:
                run = train("--out", str(killed), *(["--resume"] if ends else options))
                gateway.watch(run, killed, kills)
                ends.append(run.wait())
            gateway.replaying = True  # the same replies for a run that nobody kills
            ends.append(train("--out", str(whole), *options).wait())
    assert not gateway.faults and not kills and ends[:2] == [-signal.SIGKILL] * 2 and len(ends) == 4
    assert [json.loads((out / "summary.json").read_text())["status"] for out in (killed, whole)] == ["done"] * 2
    assert set(gateway.paid.values()) == {1}, "a question was asked again that had been answered"
    assert gateway.paid == gateway.repeated, "the run that was killed asked what the other one asked"
    found = judgements(killed)
    assert found == judgements(whole) and len(found) == gateway.judged == kept(killed), "a judgement was lost"
    with Store(killed / "feedback.sqlite") as store:
        assert all(entry.answered and entry.label_mass is not None for entry in store.judgements())
    rows = [[without_time(row) for row in read_metrics(out / "metrics.jsonl")] for out in (killed, whole)]
    assert [row["step"] for row in rows[0]] == [0, 1, 2, 3, 4] and json.dumps(rows[0]) == json.dumps(rows[1])
    after, unkilled, before = (load_model(folder)[1] for folder in (killed / "model", whole / "model", policy))
    assert_same_leaves(after, unkilled)
    with pytest.raises(AssertionError):  # the judgements have taught something
        assert_same_leaves(after, before)
