"""What a rater of an annotation tool judged, and the judgement that a tool's value expresses."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from rlaif_jax.config import require
from rlaif_jax.feedback.records.formats.rows import field, pair
from rlaif_jax.feedback.records.forms import FORMS, Comment, Correction, Judgement, Ranking, Rater, Rating, Span

EDITS = ("correction",)
"""Names of questions whose text is a correction, not a comment."""


class Subject(NamedTuple):
    """What one value is about.

    Attributes:
        name: the name of the question, or of the tag, that says it.
        answer: the name of the answer; None where `name` names none of several.
        principle: the criterion.
    """

    name: str
    answer: str | None
    principle: str


@dataclasses.dataclass(frozen=True)
class Item:
    """What raters of an annotation tool judged.

    Attributes:
        prompt: the prompt.
        answers: the answers by the names of their fields.
        edits: the names of the questions whose text is a correction.
        scale: the lowest and the highest rating.
        about: the name of a question or tag -> the name of the answer that it is about.
    """

    prompt: str
    answers: dict[str, str]
    edits: Collection[str]
    scale: tuple[float, float]
    about: Mapping[str, str]

    def __post_init__(self) -> None:
        unknown = sorted(set(self.about.values()) - set(self.answers))
        names = ", ".join(self.answers)
        require(not unknown, f"about names {', '.join(unknown)}; the answers are {names}")

    @property
    def all(self) -> tuple[str, ...]:
        """Returns the texts of all answers."""
        return tuple(self.answers.values())

    def abstained(self, rater: Rater, more: Mapping[str, Any]) -> Judgement:
        """Returns the record of a rater who was asked and gave no value.

        Args:
            rater: who was asked.
            more: further fields of the record.
        """
        form = Ranking if len(self.answers) > 1 else Rating
        return form(**{**more, "prompt": self.prompt, "answers": self.all, "rater": rater, "status": "abstained"})

    def subject(self, question: str) -> Subject:
        """Returns what a question is about.

        A question about one of several answers ends with that answer's name behind a separator (`quality_answer_2`).
        """
        if question in self.about:
            return Subject(question, self.about[question], question)
        for name in sorted(self.answers, key=len, reverse=True):
            rest = question.removesuffix(name)
            if question == name or (question != rest and not rest[-1].isalnum()):
                return Subject(question, name, rest.rstrip("_-.: "))
        return Subject(question, next(iter(self.answers)) if len(self.answers) == 1 else None, question)


def judgement_of(
    item: Item, question: str, subject: Subject, value: Any, rater: Rater, more: Mapping[str, Any]
) -> Judgement:
    """Returns the judgement that a value expresses.

    Args:
        item: what was judged.
        question: the name of the question, which `item.edits` may name.
        subject: what the value is about, and its principle.
        value: a number is a rating; a list of `{value, rank}`, or of all names in order, a ranking; a list of
            `{start, end, label}` marked spans; the name of an answer (or "tie") a choice; another text a comment or a
            correction.
        rater: who judged.
        more: further fields of the record.

    Raises:
        UserError: a value of no form, or it is not known which answer the value is about.
    """
    names = list(item.answers)
    every: dict[str, Any] = {**more, "prompt": item.prompt, "answers": item.all, "rater": rater}
    every["principle"] = "" if subject.principle in FORMS else subject.principle

    def one() -> dict[str, Any]:
        require(
            subject.answer is not None,
            f"which of {', '.join(names)} is it about? {subject.name!r} names none: give about={{{subject.name!r}: ANSWER}}",
        )
        return every | {"answers": (item.answers[subject.answer or ""],)}

    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Rating(**one(), value=float(value), low=item.scale[0], high=item.scale[1])
    if isinstance(value, list) and value:
        if all(isinstance(entry, Mapping) and "start" in entry for entry in value):
            spans = tuple(
                Span(field(e, "start", int), field(e, "end", int), category=str(e.get("label") or "")) for e in value
            )
            return Correction(**one(), spans=spans)
        return Ranking(**every, ranks=_ranks(value, names))
    require(isinstance(value, str), f"a value of no form: {str(value)[:60]!r}")
    if value in names or (value == "tie" and len(names) == 2):
        if "status" in more:
            return Ranking(**every)
        if len(names) == 2:
            return pair(winner=names.index(value) if value in names else None, **every)
        return Ranking(**every, ranks=tuple(1 if name == value else 2 for name in names))
    if any(edit in question for edit in item.edits):
        return Correction(**one(), edited=value)
    return Comment(**one(), text=value)


def _ranks(value: Sequence[Any], names: Sequence[str]) -> tuple[int | None, ...]:
    """Returns the place of each answer in a ranking: `{value, rank}` objects, or names, the best first."""
    if all(isinstance(entry, str) for entry in value):
        require(
            sorted(value) == sorted(names),
            f"the texts {', '.join(value)[:60]!r} are no ranking: that has each of {', '.join(names)} once",
        )
        return tuple(value.index(name) + 1 for name in names)
    require(all(isinstance(entry, Mapping) for entry in value), f"a value of no form: {str(value)[:60]!r}")
    require(all("rank" in entry for entry in value), f"a ranking without places: {str(value)[:60]!r} has no rank")
    ranks = {field(entry, "value"): entry["rank"] for entry in value}
    unknown = sorted(set(ranks) - set(names))
    require(not unknown, f"ranks the unknown answer {', '.join(unknown)}; the answers are {', '.join(names)}")
    require(len(ranks) == len(value), f"ranks an answer twice: {', '.join(field(e, 'value') for e in value)}")
    return tuple(ranks.get(name) for name in names)


def confidence(score: Any) -> dict[str, Any]:
    """Returns a score from 0 to 1 as the field `confidence`; no field for another score."""
    return {"confidence": float(score)} if isinstance(score, (int, float)) and 0 <= score <= 1 else {}


def unix(stamp: str | None) -> float | None:
    """Returns the Unix seconds of an ISO time stamp, which is in UTC where it has no zone."""
    if stamp is None:
        return None
    time = datetime.datetime.fromisoformat(stamp)
    return (time if time.tzinfo else time.replace(tzinfo=datetime.UTC)).timestamp()
