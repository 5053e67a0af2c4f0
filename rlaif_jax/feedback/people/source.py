"""People as a source of feedback: a run puts its answers on the annotation page and waits.

A mixture of several sources is `MixedSource`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

from rlaif_jax.config import StopRequested, require
from rlaif_jax.data.prompts import Record
from rlaif_jax.feedback.people.kinds import CHAT, COMPARE, RANK, RATE, Kind
from rlaif_jax.feedback.people.queue import ADJUDICATED, TaskQueue, is_later
from rlaif_jax.feedback.people.tasks import PersonTask
from rlaif_jax.feedback.record_rewards import RewardFn, group_by_answer, mean_rating, win_share
from rlaif_jax.feedback.records.forms import Judgement, sha256
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.feedback.sources import CountingSource
from rlaif_jax.types import Feedback, Rollout

KEPT_S = 60.0
"""Seconds for which a run's tasks stay open without a sign of life: nobody works for a run that was killed."""


@dataclasses.dataclass(frozen=True, eq=False)
class PeopleSource(CountingSource):
    """Puts a step's answers on the annotation page of `store` and waits until enough of them are judged.

    Start the page on the same file: `python -m rlaif_jax annotate --store FILE`. What the store holds already is not asked
    again. A judgement that does not come in time is missing, not zero; it still goes into the store when it comes.

    Attributes:
        store: the feedback store's file.
        kind: what people do: `RATE` each answer, `RANK` the answers to one prompt, `COMPARE` each of them with the next;
            with a `reward_fn` also `EDIT` or `COMMENT` on each answer.
        principle: the criterion, a sentence; "" means overall quality.
        low: the lowest score of `RATE`.
        high: the highest score of `RATE`.
        labels: the kinds of mistakes of `EDIT`, the aspects of `COMMENT`.
        reward_fn: makes rewards of judgements; by default `mean_rating` for `RATE`, `win_share` for rankings.
        overlap: the number of raters for each task.
        enough: the share of judgements after which the step goes on, in (0, 1]. A task that every rater of the page has
            judged or skipped is not waited for; what was skipped is missing.
        timeout_s: seconds after which the step goes on with what has come.
        limit: the largest number of tasks of a step; the other answers are missing, for another source to fill
            (`MixedSource`). None asks about all.
        poll_s: seconds between two looks at the store.
        interrupted: a function that ends the wait at once when it returns True, as after a signal. The call then raises
            StopRequested and returns nothing: what is missing only because the run stops must not be learned from. What
            came is in the store, where the resumed run finds it.

    Raises:
        UserError: a setting is not allowed, or the store cannot be opened.
    """

    store: Path
    kind: Kind = RATE
    principle: str = ""
    low: int = 1
    high: int = 5
    labels: tuple[str, ...] = ()
    reward_fn: RewardFn | None = None
    overlap: int = 1
    enough: float = 1.0
    timeout_s: float = 3600.0
    limit: int | None = None
    poll_s: float = 0.5
    interrupted: Callable[[], bool] | None = None

    def __post_init__(self) -> None:
        require(self.kind is not CHAT, "people.kind is chat; a run can ask to compare, rank, rate, edit and comment")
        require(
            self.reward_fn is not None or self.kind in (RATE, RANK, COMPARE),
            f"people.reward_fn is missing: name the function that makes rewards of each {self.kind.form}",
        )
        require(0 < self.enough <= 1, f"people.enough must lie in (0, 1], not {self.enough}")
        require(self.overlap >= 1, f"people.overlap must be at least 1, not {self.overlap}")
        require(self.timeout_s > 0 and self.poll_s > 0, "people.timeout_s and poll_s must be positive")
        require(self.limit is None or self.limit >= 1, f"people.limit must be at least 1, not {self.limit}")
        _ = self._since

    @cached_property
    def _since(self) -> int:
        """The newest request to stop before this run: it is not meant for this run."""
        with TaskQueue(self.store) as queue:
            return queue.team.last_stop

    def stop_requested(self) -> bool:
        """Returns whether "good enough, stop" was pressed on the page since this source was made."""
        with TaskQueue(self.store) as queue:
            return queue.team.stop_requested(self._since)

    def tasks(self, records: Sequence[Record], answers: Sequence[str]) -> list[PersonTask]:
        """Returns the tasks about B answers; equal answers to a prompt are asked about once.

        In rankings, a prompt with fewer than two different answers makes no task.

        Args:
            records: the record of each answer's prompt.
            answers: the B answers.

        Raises:
            UserError: more different answers to a prompt than people can rank at once.
        """
        by_prompt: dict[str, dict[str, None]] = {}
        for record, answer in zip(records, answers):
            by_prompt.setdefault(str(record["prompt"]), {})[answer] = None
        ask = partial(
            PersonTask, kind=self.kind, principle=self.principle, low=self.low, high=self.high, labels=self.labels
        )
        found: list[PersonTask] = []
        for prompt, given in by_prompt.items():
            texts = sorted(given)
            groups: list[tuple[str, ...]]
            if self.kind is RANK:
                require(
                    len(texts) <= RANK.max_answers,
                    f"people rank at most {RANK.max_answers} answers at once, not {len(texts)}: use COMPARE or RATE",
                )
                groups = [tuple(texts)] if len(texts) > 1 else []
            elif self.kind is COMPARE:
                groups = list(itertools.pairwise(texts))
            else:
                groups = [(text,) for text in texts]
            found += [ask(prompt=prompt, answers=group) for group in groups]
        return found if self.limit is None else found[: self.limit]

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout) -> Feedback:
        tasks = self.tasks(records, answers)
        with Store(self.store) as store, TaskQueue(self.store) as queue:
            self._wait(store, queue, tasks)
            judged = [judgement for task in tasks for judgement in self._judgements(store, task)]
        reward_fn = self.reward_fn or (mean_rating if self.kind is RATE else win_share)
        rewards = reward_fn(records, answers, rollout, group_by_answer(records, answers, judged))
        return self.counted(rewards, "nobody judged the answer in time")

    def _judgements(self, store: Store, task: PersonTask) -> list[Judgement]:
        """Returns people's judgements for the task, or only the latest adjudication where one was made."""
        found = [
            judgement
            for judgement in store.judgements(item=_item(task), form=task.kind.form)
            if judgement.answered
            and judgement.principle == task.principle
            and judgement.rater.source in ("person", "simulated")
        ]
        final: Judgement | None = None
        for judgement in found:
            if judgement.rater.name.startswith(ADJUDICATED) and (final is None or not is_later(final, judgement)):
                final = judgement
        return found if final is None else [final]

    def _wait(self, store: Store, queue: TaskQueue, tasks: Sequence[PersonTask]) -> None:
        """Asks what the store does not know yet and waits for enough, the timeout or a stop on the page.

        Raises StopRequested where the wait was interrupted.
        """
        deadline, kept_for = time.monotonic() + self.timeout_s, max(KEPT_S, 4 * self.poll_s)
        raters: frozenset[str] = frozenset()  # while no page has named them, anyone may still answer
        store_seen, queue_seen = store.cursor, queue.last_number()

        def count(task: PersonTask) -> int:
            names = {j.rater.name for j in self._judgements(store, task)}
            adjudicated = any(name.startswith(ADJUDICATED) for name in names)
            nobody_left = bool(raters) and raters <= names | queue.handled(task.id)
            return self.overlap if adjudicated or nobody_left else min(len(names), self.overlap)

        counts = {task.id: count(task) for task in tasks}
        open_tasks = {task.id: task for task in tasks if counts[task.id] < self.overlap}
        by_item: dict[str, list[str]] = {}
        for task in open_tasks.values():
            by_item.setdefault(_item(task), []).append(task.id)
        wanted = math.ceil(self.enough * self.overlap * len(tasks) - 1e-9)
        put_at = time.monotonic()
        queue.put(
            open_tasks.values(), overlap=self.overlap, priority=1.0, origin="training", until=time.time() + kept_for
        )
        try:
            while open_tasks:
                before, raters = raters, queue.team.raters
                cursor, number = (
                    store.cursor,
                    queue.last_number(),
                )  # first: what comes meanwhile is seen by the next look
                new = queue.touched(queue_seen) | {i for item in store.items(store_seen) for i in by_item.get(item, ())}
                store_seen, queue_seen = cursor, number
                # Only what something happened to is looked at anew: a look costs the same with any number of tasks.
                for identifier in open_tasks if raters != before else new & set(open_tasks):
                    counts[identifier] = count(open_tasks[identifier])
                if sum(counts.values()) >= wanted:
                    break
                if self.interrupted is not None and self.interrupted():
                    raise StopRequested
                if time.monotonic() >= deadline or queue.team.stop_requested(self._since):
                    break
                if time.monotonic() >= put_at + kept_for / 3:
                    put_at = time.monotonic()
                    queue.keep(open_tasks, time.time() + kept_for)
                time.sleep(min(self.poll_s, max(deadline - time.monotonic(), 0.0)))
        finally:
            queue.withdraw(open_tasks, origin="training")


def _item(task: PersonTask) -> str:
    """Returns the `Judgement.item` of the records about a task."""
    return sha256([task.prompt, sorted(task.answers)])
