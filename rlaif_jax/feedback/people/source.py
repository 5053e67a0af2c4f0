"""People as a source of judgements: a run puts its answers on the annotation page and waits; mixing them with judges."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import jax
import numpy as np

from rlaif_jax.config import require
from rlaif_jax.data.prompts import Record
from rlaif_jax.feedback.people.queue import ADJUDICATED, TaskQueue
from rlaif_jax.feedback.people.tasks import Kind, Task
from rlaif_jax.feedback.record_rewards import Worth, mean_rating, rows_of, win_share
from rlaif_jax.feedback.records.forms import Judgement, sha256
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.feedback.sources import FeedbackSource
from rlaif_jax.types import Feedback, Rollout

_FORM = {"compare": "ranking", "rank": "ranking", "rate": "rating", "edit": "correction", "comment": "comment"}


@dataclasses.dataclass(frozen=True, eq=False)
class PeopleSource(FeedbackSource):
    """Puts a step's answers on the annotation page of `store` and waits until enough of them are judged.

    Start the page on the same file: `python -m rlaif_jax annotate --store FILE`. A judgement that is in the store already
    costs nobody anything. What does not come in time is missing, not zero; it still goes into the store when it comes.

    Attributes:
        kind: what people do: `rate` and, with a `worth`, `edit` or `comment` each answer; `rank` the answers to one
          prompt; `compare` each of them with the next one.
        principle: by what, a sentence for people.
        low, high: the scale of `rate`.
        labels: kinds of mistakes or aspects, for `edit` and `comment`.
        worth: judgements -> rewards; default: the mean rating, or the share of comparisons won.
        overlap: raters an answer.
        enough: the share of judgements after which the step goes on, in (0, 1]. Of an answer that every rater of the page
          has judged or skipped no more is waited for; what was skipped is missing.
        timeout_s: seconds after which it goes on with what there is.
        limit: at most that many tasks a step; the rest is missing, for another source to fill (`MixedSource`).
        poll_s: seconds between two looks.
        interrupted: when it returns True the wait ends at once, as after a signal.
    """

    store: Path
    kind: Kind = "rate"
    principle: str = ""
    low: int = 1
    high: int = 5
    labels: tuple[str, ...] = ()
    worth: Worth | None = None
    overlap: int = 1
    enough: float = 1.0
    timeout_s: float = 3600.0
    limit: int | None = None
    poll_s: float = 0.5
    interrupted: Callable[[], bool] | None = None

    def __post_init__(self) -> None:
        require(self.kind in _FORM, f"people.kind is {self.kind!r}; a run can ask to {', '.join(_FORM)}")
        require(
            self.worth is not None or self.kind in ("rate", "rank", "compare"),
            f"people.worth: what is a {_FORM[self.kind]} worth? Name a function of judgements",
        )
        require(0 < self.enough <= 1, f"people.enough must lie in (0, 1], not {self.enough}")
        require(self.overlap >= 1, f"people.overlap must be at least 1, not {self.overlap}")
        require(self.timeout_s > 0 and self.poll_s > 0, "people.timeout_s and poll_s must be positive")
        require(self.limit is None or self.limit >= 1, f"people.limit must be at least 1, not {self.limit}")
        _ = self._since

    @cached_property
    def _since(self) -> int:
        """Presses of "stop" before this run are not meant for it."""
        with TaskQueue(self.store) as queue:
            return queue.stops

    def stop_requested(self) -> bool:
        """Whether "good enough, stop" was pressed on the page since this source was made."""
        with TaskQueue(self.store) as queue:
            return queue.stop_requested(self._since)

    def tasks(self, records: Sequence[Record], answers: Sequence[str]) -> list[Task]:
        """What is asked about B answers: each text once. Prompts with fewer than two different answers cannot be ranked."""
        by_prompt: dict[str, dict[str, None]] = {}
        for record, answer in zip(records, answers):
            by_prompt.setdefault(str(record["prompt"]), {})[answer] = None
        shared = {"principle": self.principle, "low": self.low, "high": self.high, "labels": self.labels}
        found: list[Task] = []
        for prompt, given in by_prompt.items():
            texts = sorted(given)
            if self.kind == "rank":
                require(
                    len(texts) <= 9,
                    f"people rank at most 9 answers at once, not {len(texts)}: kind='compare' or 'rate'",
                )
                groups = [tuple(texts)] if len(texts) > 1 else []
            elif self.kind == "compare":
                groups = list(itertools.pairwise(texts))
            else:
                groups = [(text,) for text in texts]
            found += [Task(kind=self.kind, prompt=prompt, answers=group, **shared) for group in groups]  # type: ignore[arg-type]
        return found if self.limit is None else found[: self.limit]

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout) -> Feedback:
        tasks = self.tasks(records, answers)
        with Store(self.store) as store, TaskQueue(self.store) as queue:
            self._wait(store, queue, tasks)
            judged = [judgement for task in tasks for judgement in self._judgements(store, task)]
        rows = rows_of(records, answers, judged)
        worth = self.worth or (mean_rating if self.kind == "rate" else win_share)
        return worth(records, answers, rollout, rows)

    def _judgements(self, store: Store, task: Task) -> list[Judgement]:
        """What people said about the task; where one of them adjudicated, that alone."""
        item = sha256([task.prompt, sorted(task.answers)])
        found = [
            judgement
            for judgement in store.judgements(item=item, form=_FORM[task.kind])
            if judgement.answered
            and judgement.principle == task.principle
            and judgement.rater.source in ("person", "simulated")
        ]
        return [j for j in found if j.rater.name.startswith(ADJUDICATED)][-1:] or found

    def _wait(self, store: Store, queue: TaskQueue, tasks: Sequence[Task]) -> None:
        """Ask what the store does not know yet; return when enough has come, at the timeout, or when told to stop."""
        until = time.monotonic() + self.timeout_s
        raters: frozenset[str] = frozenset()  # while no page has named them, anyone may still answer

        def count(task: Task) -> int:
            names = {j.rater.name for j in self._judgements(store, task)}
            settled = any(name.startswith(ADJUDICATED) for name in names)
            nobody_left = bool(raters) and raters <= names | queue.handled(task.id)
            return self.overlap if settled or nobody_left else min(len(names), self.overlap)

        open_tasks = {task.id: task for task in tasks if count(task) < self.overlap}
        known = self.overlap * (len(tasks) - len(open_tasks))
        wanted = math.ceil(self.enough * self.overlap * len(tasks) - 1e-9)
        queue.put(open_tasks.values(), overlap=self.overlap, priority=1.0, origin="training")
        seen: tuple[int, frozenset[str]] | None = None
        try:
            while open_tasks:
                raters = queue.raters
                if seen != (seen := (store.cursor, raters)) and known + sum(map(count, open_tasks.values())) >= wanted:
                    break
                told = self.interrupted is not None and self.interrupted()
                if told or time.monotonic() >= until or queue.stop_requested(self._since):
                    break
                time.sleep(min(self.poll_s, max(until - time.monotonic(), 0.0)))
        finally:
            queue.withdraw(open_tasks, origin="training")


@dataclasses.dataclass(frozen=True, eq=False)
class MixedSource:
    """Several sources as one: the weighted mean of those that judged an answer; missing where none did.

    Attributes:
        sources: asked one after the other.
        weights: one a source, positive; of an answer, those of the sources that judged it count.
        standardise: bring each source to mean 0 and deviation 1 over its valid answers of the step first. For sources on
          different scales: otherwise filling one's gaps with another's values moves them by the difference in scale.
    """

    sources: tuple[FeedbackSource, ...]
    weights: tuple[float, ...] = ()
    standardise: bool = False

    def __post_init__(self) -> None:
        require(len(self.sources) >= 1, "mixed.sources is empty")
        require(
            not self.weights or len(self.weights) == len(self.sources),
            f"mixed.weights has {len(self.weights)} entries for {len(self.sources)} sources",
        )
        require(
            all(w > 0 and math.isfinite(w) for w in self.weights), f"mixed.weights must be positive: {self.weights}"
        )

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout) -> Feedback:
        total, weight = np.zeros(len(answers)), np.zeros(len(answers))
        dense: np.ndarray | None = None
        for source, share in zip(self.sources, self.weights or (1.0,) * len(self.sources)):
            judged = jax.device_get(source(records, answers, rollout))
            valid = np.asarray(judged.valid, bool)
            values = np.where(valid, np.asarray(judged.values, float), 0.0)
            if self.standardise and valid.any():
                spread = values[valid].std()
                values = np.where(valid, (values - values[valid].mean()) / (spread if spread > 1e-8 else 1.0), 0.0)
            total, weight = total + share * values, weight + share * valid
            if judged.token_rewards is not None:
                part = share * np.where(valid[:, None], np.asarray(judged.token_rewards, float), 0.0)
                dense = part if dense is None else dense + part
        scale = np.where(weight > 0, weight, 1.0)
        return Feedback.single(
            (total / scale).astype(np.float32),
            weight > 0,
            None if dense is None else (dense / scale[:, None]).astype(np.float32),
        )
