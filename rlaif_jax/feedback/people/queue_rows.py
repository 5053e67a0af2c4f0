"""What the queue returns: posts, progress, tasks with their raters."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from rlaif_jax.feedback.people.tasks import PersonTask
from rlaif_jax.feedback.records.forms import Judgement

Act = Literal["answer", "skip", "undo", "adjudicate"]


class Post(NamedTuple):
    """An action of a rater.

    Attributes:
        rater: the rater's name.
        act: what the rater did.
        task: the id of the task.
        payload: the answer as the rater sent it.
        records: the judgements made from the payload.
        seconds: the time that the rater spent.
        informed: whether the rater had seen the AI's suggestion before.
    """

    rater: str
    act: Act
    task: str
    payload: dict[str, Any]
    records: tuple[Judgement, ...]
    seconds: float
    informed: bool


class Progress(NamedTuple):
    """The state of a rater's work.

    Attributes:
        rater: the rater's name.
        answered: number of tasks answered.
        skipped: number of tasks skipped.
        left: number of open tasks that this rater could still answer.
        in_hand: number of tasks leased to this rater.
        seconds: the time spent on all tasks.
    """

    rater: str
    answered: int
    skipped: int
    left: int
    in_hand: int
    seconds: float


class TaskGroup(NamedTuple):
    """The open tasks of one kind and origin.

    Attributes:
        kind: the name of the kind.
        origin: who asks, as given to `put`.
        tasks: the number of tasks.
        answers: the number of answers, of a task at most as many as wanted.
        wanted: the number of answers that are wanted.
    """

    kind: str
    origin: str
    tasks: int
    answers: int
    wanted: int


class QueuedTask(NamedTuple):
    """A task in the queue.

    Attributes:
        task: the question.
        overlap: the number of raters who are to answer it.
        answered: the raters who answered it.
        skipped: the raters who skipped it.
        origin: who asks, as given to `put`.
    """

    task: PersonTask
    overlap: int
    answered: tuple[str, ...]
    skipped: tuple[str, ...]
    origin: str
