"""An API judge as the loop's feedback: rewards while the next answers are being written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from rlaif_jax.config import require
from rlaif_jax.data.prompts import Record
from rlaif_jax.feedback.api.judge import JudgeClient, Outcome
from rlaif_jax.feedback.api.templates import Question, Template
from rlaif_jax.types import Feedback, Rollout


def prompt_and_answer(record: Record, answer: str) -> Question:
    """The record's prompt and the answer: for ratings."""
    return Question(str(record["prompt"]), (answer,))


def against(field: str) -> Callable[[Record, str], Question]:
    """The answer against the text in `field` of the record: for rankings."""
    return lambda record, answer: Question(str(record["prompt"]), (answer, str(record[field])))


@dataclasses.dataclass(frozen=True, eq=False)
class JudgeSource:
    """A `FeedbackSource`: the judge's expected score of each answer, or its P(the answer beats another one).

    template: of a rating (the value is on its scale), or of a ranking whose question shows the answer first and another
    one second (the value is the debiased probability, both orders). question: what is asked about (record, answer).

    A call waits for its judgements; `prefetch` does not: with `train.rollout_parts` > 1 the loop hands over each part's
    answers while the devices generate the next ones, and the judge works while they do.

    The same question is never asked twice, so a call finds what was prefetched. A judgement that failed is missing
    (`valid` is false) and recorded as such in the client's store.
    """

    client: JudgeClient
    template: Template
    question: Callable[[Record, str], Question] = prompt_and_answer

    def __post_init__(self) -> None:
        require(
            self.template.choices, f"a {self.template.form} is no reward by itself; use a rating or a ranking template"
        )

    def _questions(self, records: Sequence[Record], answers: Sequence[str]) -> list[Question]:
        return [self.question(record, answer) for record, answer in zip(records, answers, strict=True)]

    def prefetch(self, records: Sequence[Record], answers: Sequence[str]) -> None:
        """Start judging these answers and return at once."""
        self.client.submit(self._questions(records, answers), self.template)

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout | None = None) -> Feedback:
        outcomes = self.client.judge(self._questions(records, answers), self.template)
        values = [self._value(outcome) for outcome in outcomes]
        return Feedback.single(
            np.array([0.0 if value is None else value for value in values], np.float32),
            np.array([value is not None for value in values], bool),
        )

    def _value(self, outcome: Outcome) -> float | None:
        if self.template.form == "rating":
            return outcome.rating
        preferred = outcome.preference
        return None if preferred is None else preferred.probability
