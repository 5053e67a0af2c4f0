"""What verifiers share: a source that judges each answer alone, and how a record's field is read."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlaif_jax.data.prompts import Record
from rlaif_jax.feedback.sources import CountingSource, Missing
from rlaif_jax.types import Feedback, Rollout

Verdict = float | Missing
RIGHT, WRONG = 1.0, 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class VerifierSource(CountingSource):
    """Judges each answer alone: 1 for a right one, 0 for a wrong one, missing where the record cannot say.

    Attributes:
        verify: from (record, answer) to the verdict.
    """

    verify: Callable[[Record, str], Verdict]

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout | None = None) -> Feedback:
        """Returns one reward an answer; see `FeedbackSource`."""
        return self.feedback([self.verify(record, answer) for record, answer in zip(records, answers, strict=True)])


def read_field(record: Record, field: str) -> Any | Missing:
    """Returns the value of a record's field; `Missing` where it is absent, None, or has nothing in it."""
    value = record.get(field)
    empty = value is None or (isinstance(value, str | bytes | Mapping | list | tuple) and not len(value))
    if empty or (isinstance(value, str) and not value.strip()):
        return Missing(f"the record has no {field!r}")
    return value


def read_texts(record: Record, field: str) -> tuple[str, ...] | Missing:
    """Returns the texts of a field that holds one text or number, or a list of them."""
    value = read_field(record, field)
    if isinstance(value, Missing):
        return value
    values = value if isinstance(value, list | tuple) else [value]
    wrong = next((item for item in values if not isinstance(item, str | int | float)), None)
    if wrong is not None:
        return Missing(f"the record's {field!r} holds a {type(wrong).__name__}, not a text or number")
    return tuple(map(str, values))


_FENCE = re.compile(r"^ {0,3}(`{3,})[ \t]*([\w+-]*)[^\n`]*\n(.*?)^ {0,3}\1`*[ \t]*$", re.DOTALL | re.MULTILINE)


def fenced(answer: str, *languages: str) -> str | None:
    """Returns the content of the first Markdown fence in one of the languages; "" means no language."""
    found = (match[3] for match in _FENCE.finditer(answer) if match[2].lower() in languages)
    return next(found, None)


def read_json(text: str) -> Any:
    """Returns the value of a JSON text.

    Raises:
        ValueError: it is no JSON; NaN and Infinity are none.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("the values are nested too deeply") from None
