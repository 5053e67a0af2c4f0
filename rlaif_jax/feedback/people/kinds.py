"""The kinds of questions to people: which record type each one makes, and how many answers it shows."""

from __future__ import annotations

import dataclasses

from rlaif_jax.config import UserError
from rlaif_jax.feedback.records.forms import FORMS, Comment, Correction, Judgement, Ranking, Rating


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of question.

    Attributes:
        name: as written in files of tasks.
        record: the type of the records that its answers make; None for `CHAT`, which makes ratings and comments.
        min_answers: the smallest number of answers that it shows.
        max_answers: the largest number of answers that it shows.
    """

    name: str
    record: type[Judgement] | None
    min_answers: int
    max_answers: int

    @property
    def form(self) -> str:
        """Returns the form of the records that its answers make; "" for `CHAT`."""
        return "" if self.record is None else self.record.form


COMPARE = Kind("compare", Ranking, 2, 2)
RANK = Kind("rank", Ranking, 2, 9)
RATE = Kind("rate", Rating, 1, 1)
EDIT = Kind("edit", Correction, 1, 1)
COMMENT = Kind("comment", Comment, 1, 1)
CHAT = Kind("chat", None, 0, 0)
KINDS = (COMPARE, RANK, RATE, EDIT, COMMENT, CHAT)


def kind_named(name: str) -> Kind:
    """Returns the kind of that name. Raises UserError where no kind has it."""
    for kind in KINDS:
        if kind.name == name:
            return kind
    raise UserError(f"unknown kind {name!r}; the kinds are {', '.join(kind.name for kind in KINDS)}")


def kind_of_form(form: str) -> Kind:
    """Returns the kind that asks for records of a form; for rankings, `RANK`."""
    return next(kind for kind in (COMMENT, RATE, EDIT, RANK) if kind.record is FORMS[form])
