"""The real page, the real judge and a trainer write into one store and are killed at random moments."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.records.forms import Judgement
from rlaif_jax.feedback.records.store import Store
from tests.feedback.api_server import serve
from tests.feedback.writers import made

pytest.importorskip("fastapi", reason="needs the page's extra")
pytest.importorskip("openai", reason="needs the openai package")

from rlaif_jax.feedback.people.kinds import RATE
from rlaif_jax.feedback.people.queue import TaskQueue
from rlaif_jax.feedback.people.tasks import PersonTask
from rlaif_jax.recipes.world.crowd import PageClient
from rlaif_jax.ui.tokens import rater_tokens

HERE = Path(__file__).parent
KILLS = {"page": 15, "judge": 15, "trainer": 20}


class Worker:
    """A process that is killed and started again. acknowledged: how many records it has acknowledged so far."""

    def __init__(self, command: list[str], acknowledged: Callable[[], int]) -> None:
        self.command, self.acknowledged = command, acknowledged
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it has acknowledged something since."""
        before, deadline = self.acknowledged(), time.monotonic() + 120
        environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
        self.process = subprocess.Popen(self.command, env=environment, stdout=subprocess.DEVNULL)
        while self.acknowledged() == before:
            assert self.process.poll() is None and time.monotonic() < deadline, f"{self.command[1:3]} does not write"
            time.sleep(0.005)

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def annotate(path: Path, port: int, answered: list[str], done: threading.Event) -> None:
    """Answers tasks until `done` is set and adds the ids of acknowledged records to `answered`."""
    # A post that fails on the way is sent again as it is, until the page is back.
    client = PageClient(f"http://127.0.0.1:{port}/?token={rater_tokens(path, ('anna',))['anna']}", retries=200)
    passed = False
    while not done.is_set():
        try:
            passed = passed or client.call("/api/check", {"answers": [1, 2]})["passed"]
            task = client.next()
            assert task is not None
            answered.extend(client.answer(task, {"value": 3})["recorded"])
        except UserError:
            if not done.is_set():
                raise


@pytest.mark.slow
def test_fifty_kills_of_page_judge_and_trainer_lose_and_double_nothing(tmp_path: Path):
    path, port = tmp_path / "feedback.sqlite", free_port()
    with Store(path), TaskQueue(path) as queue:
        queue.put(PersonTask(kind=RATE, prompt=f"task {n}", answers=("an answer",)) for n in range(5000))
    answered: list[str] = []  # the ids of the records that the page has acknowledged
    done = threading.Event()

    with serve() as server:
        annotation = ["annotate", "--store", str(path), "--raters", "anna", "--port", str(port)]
        page = [sys.executable, "-m", "rlaif_jax", *annotation]
        judge = [sys.executable, str(HERE / "judging.py"), str(path), server.url, str(tmp_path / "judge")]
        trainer = [sys.executable, str(HERE / "writers.py"), str(path), "trainer", str(tmp_path / "trainer")]
        workers = {
            "page": Worker(page, lambda: len(answered)),
            "judge": Worker(judge, lambda: lines(tmp_path / "judge")),
            "trainer": Worker(trainer, lambda: lines(tmp_path / "trainer")),
        }
        failed: list[BaseException] = []

        def torment(role: str) -> None:
            generator = random.Random(role)
            try:
                for _ in range(KILLS[role]):
                    workers[role].start()
                    time.sleep(generator.uniform(0, 0.3))
                    workers[role].kill()
                workers[role].start()  # whatever a crash had cut short is finished now
            except BaseException as error:
                failed.append(error)

        person = threading.Thread(target=annotate, args=(path, port, answered, done), daemon=True)
        person.start()
        threads = [threading.Thread(target=torment, args=(role,)) for role in workers]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            done.set()
            person.join(30)
            for worker in workers.values():
                if worker.process is not None:
                    worker.kill()
    assert failed == []

    with Store(path) as store:
        records = store.judgements(superseded=True)
        assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    ids = {record.id for record in records}
    acknowledged = {
        "page": answered,
        "judge": [line.split()[0] for line in (tmp_path / "judge").read_text().splitlines()],
        "trainer": (tmp_path / "trainer").read_text().split(),
    }
    for role, known in acknowledged.items():
        assert len(set(known)) > KILLS[role] and set(known) <= ids, role
    assert len(answered) == len(set(answered))
    assert all(not record.supersedes for record in records)  # nothing was said twice in other words
    assert max(Counter(map(subject, records)).values()) == 1
    by_rater = Counter(record.rater.source for record in records)
    assert len(answered) <= by_rater["person"] <= len(answered) + 1
    assert by_rater["rule"] % len(made("trainer", 0)) == 0
    assert all(record.answered for record in records)


def subject(record: Judgement) -> tuple[str, ...]:
    """Who judged what in which order: each is to be there once."""
    return (record.rater.name, record.prompt, *record.answers, str(record.shown))
