"""An API judge as a feedback source: it judges while the devices generate the next answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from rlaif_jax.config import StopRequested, require
from rlaif_jax.data.prompts import Record
from rlaif_jax.feedback.api.judge import ApiJudge, Outcome
from rlaif_jax.feedback.api.templates import Question, Template
from rlaif_jax.feedback.sources import CountingSource, Missing, other_answer
from rlaif_jax.types import Feedback, Rollout

MESSAGE_LENGTH = 160  # of what a server or its connection says, in a reason


def prompt_and_answer(record: Record, answer: str) -> Question:
    """Asks about the record's prompt and the answer, for ratings."""
    return Question(str(record["prompt"]), (answer,))


def against_field(field: str) -> Callable[[Record, str], Question | Missing]:
    """Returns a question that shows the answer against the text in `field` of the record, for rankings."""

    def question(record: Record, answer: str) -> Question | Missing:
        other = other_answer(record, field)
        return other if isinstance(other, Missing) else Question(str(record["prompt"]), (answer, other))

    return question


def _to_ask(questions: Sequence[Question | Missing]) -> list[Question]:
    return [question for question in questions if not isinstance(question, Missing)]


@dataclasses.dataclass(frozen=True, eq=False)
class ApiJudgeSource(CountingSource):
    """A `FeedbackSource`: the expected score of each answer, or P(the answer beats another answer).

    A call waits for its judgements; `prefetch` does not: with `train.rollout_parts` > 1 the loop hands over
    each part's answers while the devices generate the next part, and the judge works meanwhile. The same
    question is never asked twice, so a call finds the judgements that were prefetched. A judgement that
    failed is missing (`valid` is false), counted by its status and recorded as such in the judge's store. A stop ends
    the wait for judgements:
    replies that are on their way are waited for, for seconds, and kept for the run that resumes.

    Attributes:
        judge: the judge.
        template: of a rating (the value is on its scale), or of a ranking whose question shows the answer
            first and another answer second (the value is the debiased probability of both orders).
        question: from (record, answer) to the question, or to `Missing` where the record lacks what is to be asked.
    """

    judge: ApiJudge
    template: Template
    question: Callable[[Record, str], Question | Missing] = prompt_and_answer

    def __post_init__(self) -> None:
        require(
            self.template.choices, f"a {self.template.form} is no reward by itself; use a rating or a ranking template"
        )

    def _questions(self, records: Sequence[Record], answers: Sequence[str]) -> list[Question | Missing]:
        return [self.question(record, answer) for record, answer in zip(records, answers, strict=True)]

    def prefetch(self, records: Sequence[Record], answers: Sequence[str]) -> None:
        """Starts to judge these answers and returns at once.

        Args:
            records: the record of each answer's prompt.
            answers: the B answers.
        """
        self.judge.submit(_to_ask(self._questions(records, answers)), self.template)

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout | None = None) -> Feedback:
        questions = self._questions(records, answers)
        try:
            outcomes = iter(self.judge.judge(_to_ask(questions), self.template))
        except StopRequested:
            self.judge.finish()
            raise
        return self.feedback(
            [question if isinstance(question, Missing) else self._value(next(outcomes)) for question in questions]
        )

    def _value(self, outcome: Outcome) -> float | Missing:
        if self.template.form == "rating":
            value = outcome.rating
        else:
            preferred = outcome.preference
            value = None if preferred is None else preferred.probability
        if value is not None:
            return value
        missing = next(iter(outcome.missing), None)
        if missing is not None and missing.status == "error":
            why = " ".join(missing.raw.split())[:MESSAGE_LENGTH]
            if why.startswith("the budget of "):  # what follows has other numbers in each call
                why = f"{why.partition(':')[0]} is spent"
            return Missing(f"the judge's call failed: {why}")
        return Missing(f"the judge's verdict: {'no verdict in one order' if missing is None else missing.status}")
