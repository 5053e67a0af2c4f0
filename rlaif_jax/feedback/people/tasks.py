"""Tasks for people: validated questions, as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.people.kinds import RATE, Kind, kind_named
from rlaif_jax.feedback.records.forms import Judgement, sha256, to_json
from rlaif_jax.feedback.records.parsing import from_json
from rlaif_jax.files import read_json_lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class PersonTask:
    """One question to people.

    Attributes:
        kind: the kind of question.
        prompt: the text that was answered; for a chat, its topic.
        answers: the answers; their order carries no meaning and is shuffled per rater.
        principle: the criterion, a sentence; "" means overall quality.
        low: the lowest score of `RATE` and `CHAT`, a whole number.
        high: the highest score of `RATE` and `CHAT`, a whole number.
        labels: the kinds of mistakes to mark in `EDIT`, the aspects to tick in `COMMENT`.
        suggestion: an AI judge's judgement of the same `answers`; shown only after the person has answered.
        generators: the name of the writer of each answer; recorded and never shown.

    Raises:
        UserError: a field holds a value that is not allowed.
    """

    kind: Kind
    prompt: str
    answers: tuple[str, ...] = ()
    principle: str = ""
    low: int = 1
    high: int = 5
    labels: tuple[str, ...] = ()
    suggestion: Judgement | None = None
    generators: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count, least, most = len(self.answers), self.kind.min_answers, self.kind.max_answers
        require(
            least <= count <= most,
            f"a task to {self.kind.name} shows {least if least == most else f'{least} to {most}'} answers, not {count}",
        )
        require(len(set(self.answers)) == count, "two of the answers are the same text: raters cannot tell them apart")
        require(self.low < self.high, f"the scale runs from low = {self.low} to high = {self.high}: low must be less")
        require(self.high - self.low <= 100, f"the scale {self.low} .. {self.high} has more than 101 points")
        require(
            not self.generators or len(self.generators) == count,
            f"generators names {len(self.generators)} writers of {count} answers",
        )
        require(
            self.suggestion is None or self.suggestion.answers == self.answers,
            "the suggestion judges other answers than the task's, or in another order",
        )

    @cached_property
    def id(self) -> str:
        """Returns the SHA-256 of the question, whatever the order of its answers."""
        asked = [self.kind.name, self.prompt, sorted(self.answers), self.principle]
        return sha256([*asked, [self.low, self.high] if self.kind is RATE else [], sorted(self.labels)])


def task_to_json(task: PersonTask) -> dict[str, Any]:
    """Returns the task in plain JSON types; `task_from_json` reads it back."""
    values = {field.name: vars(task)[field.name] for field in dataclasses.fields(task)}
    suggestion = values.pop("suggestion")
    plain = json.loads(json.dumps(values | {"kind": task.kind.name}))
    return plain if suggestion is None else plain | {"suggestion": to_json(suggestion)}


def task_from_json(values: Any, where: str = "", *, surrogates: bool = False) -> PersonTask:
    """Returns the task that `task_to_json` wrote as `values`.

    Args:
        values: the decoded JSON.
        where: the place of the value, with which messages begin.
        surrogates: accept lone surrogates (halves of characters), which JSON can carry and UTF-8 cannot.

    Raises:
        UserError: a missing or unknown field, a wrong type, or a value that is not allowed.
    """
    try:
        require(isinstance(values, Mapping), f"a task is a JSON object, not {str(values)[:60]!r}")
        fields = [field.name for field in dataclasses.fields(PersonTask)]
        unknown = sorted(set(values) - set(fields))
        require(not unknown, f"a task has no field {', '.join(unknown)}; it has {', '.join(fields)}")
        for name in ("kind", "prompt"):
            require(name in values, f"a task needs {name}")
        for name, value in values.items():
            require(surrogates or _is_utf8(value), f"{name} holds half a character (a lone surrogate)")
        return PersonTask(**{name: _parse_field(name, value) for name, value in values.items()})
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from error


def _parse_field(name: str, value: Any) -> Any:
    if name in ("answers", "labels", "generators"):
        is_right = isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value)
        require(is_right, f"{name} must be a list of texts, not {str(value)[:60]!r}")
        return tuple(value)
    if name in ("low", "high"):
        require(isinstance(value, int) and not isinstance(value, bool), f"{name} must be a whole number")
        return value
    if name == "suggestion":
        return None if value is None else from_json(value, "suggestion")
    require(isinstance(value, str), f"{name} must be text, not {str(value)[:60]!r}")
    return kind_named(value) if name == "kind" else value


def _is_utf8(value: Any) -> bool:
    """Returns whether UTF-8 can hold all texts of a JSON value."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_tasks(path: Path) -> tuple[list[PersonTask], list[str]]:
    """Returns (the tasks of a JSONL file, one message "FILE:LINE: fault" for each bad line).

    Raises UserError where the file cannot be read.
    """
    return read_json_lines(path, task_from_json)
