"""Raters for tests: they answer the tasks of a run through the queue, as the annotation page does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlaif_jax.feedback.people.queue import Post, TaskQueue
from rlaif_jax.feedback.people.tasks import PersonTask
from rlaif_jax.feedback.records.forms import Judgement, Rater, Rating
from rlaif_jax.feedback.records.store import Store


def rating(task: PersonTask, value: float, rater: str = "anna", source: str = "simulated", **more: Any) -> Rating:
    """Returns a rater's rating from 1 to 5 of the task's answer."""
    return Rating(prompt=task.prompt, answers=task.answers, rater=Rater(rater, source), value=value, high=5.0, **more)


class Crowd:
    """Raters that answer in another thread, until the test ends.

    Args:
        store: the file of the tasks; they wait for it.
        judge: from (task, rater) to the judgement.
        raters: their names.

    Attributes:
        seen: the tasks that were taken, one entry a rater.
    """

    def __init__(
        self, store: Path, judge: Callable[[PersonTask, str], Judgement], raters: Sequence[str] = ("anna",)
    ) -> None:
        self.path, self.judge, self.raters = store, judge, raters
        self.seen: list[PersonTask] = []
        self.done = threading.Event()

    def __enter__(self) -> Crowd:
        self.thread = threading.Thread(target=self.work)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def work(self) -> None:
        """Answers what is offered."""
        while not self.path.exists():
            if self.done.wait(0.02):
                return
        with Store(self.path) as store, TaskQueue(self.path) as queue:
            while not self.done.is_set():
                for rater in self.raters:
                    if (task := queue.lease(rater)) is not None:
                        self.seen.append(task)
                        record = self.judge(task, rater)
                        act = "answer" if record.answered else "skip"
                        post = Post(rater, act, task.id, {}, (record,), 1.0, False)
                        queue.post(post, f"{rater} {task.id}", "", store)
                time.sleep(0.005)
