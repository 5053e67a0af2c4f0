"""What people are asked: one record of each question, validated, as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.records.forms import Judgement, from_json, sha256, to_json

Kind = Literal["compare", "rank", "rate", "edit", "comment", "chat"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One question to people.

    Attributes:
        kind: what is asked. `compare` shows two answers, `rank` two or more, `rate`, `edit` and `comment` one; `chat`
          talks to the model and shows none.
        prompt: the text that was answered; of a chat, what to talk about.
        answers: the answers, in an order of no meaning: every rater sees another one.
        principle: by what to judge, a sentence; "" = overall quality.
        low, high: the scale of `rate`, whole numbers.
        labels: kinds of mistakes to mark in `edit`, aspects to tick in `comment`.
        suggestion: what an AI judge said of the same `answers`; shown only after the person has answered.
        generators: who wrote each answer; recorded and never shown.
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
        require(self.kind in get_args(Kind), f"unknown kind {self.kind!r}; the kinds are {', '.join(get_args(Kind))}")
        count, least, most = len(self.answers), *_ANSWERS[self.kind]
        require(
            least <= count <= most,
            f"a task to {self.kind} shows {least if least == most else f'{least} to {most}'} answers, not {count}",
        )
        require(len(set(self.answers)) == count, "two of the answers are the same text: nothing tells them apart")
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
        """SHA-256 of the question, whatever the order of its answers: the same question put twice is one."""
        asked = [self.kind, self.prompt, sorted(self.answers), self.principle]
        return sha256([*asked, [self.low, self.high] if self.kind == "rate" else [], sorted(self.labels)])


_ANSWERS: dict[str, tuple[int, int]] = {
    "compare": (2, 2),
    "rank": (2, 9),
    "rate": (1, 1),
    "edit": (1, 1),
    "comment": (1, 1),
    "chat": (0, 0),
}


def task_to_json(task: Task) -> dict[str, Any]:
    """Plain JSON types; `task_from_json` reads them back."""
    values = {f.name: getattr(task, f.name) for f in dataclasses.fields(task) if f.name != "suggestion"}
    return json.loads(json.dumps(values)) | ({"suggestion": to_json(task.suggestion)} if task.suggestion else {})


def task_from_json(values: Any, where: str = "", *, surrogates: bool = False) -> Task:
    """A task from `task_to_json`'s shape. UserError, beginning with `where`, for anything else.

    surrogates: let halves of characters through (lone surrogates, which JSON can carry and UTF-8 cannot).
    """
    try:
        require(isinstance(values, Mapping), f"a task is a JSON object, not {str(values)[:60]!r}")
        fields = [field.name for field in dataclasses.fields(Task)]
        unknown = sorted(set(values) - set(fields))
        require(not unknown, f"a task has no field {', '.join(unknown)}; it has {', '.join(fields)}")
        for name in ("kind", "prompt"):
            require(name in values, f"a task needs {name}")
        built: dict[str, Any] = {}
        for name, value in values.items():
            if name in ("answers", "labels", "generators"):
                right = isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value)
                require(right, f"{name} must be a list of texts, not {str(value)[:60]!r}")
                built[name] = tuple(value)
            elif name in ("low", "high"):
                require(isinstance(value, int) and not isinstance(value, bool), f"{name} must be a whole number")
                built[name] = value
            elif name == "suggestion":
                built[name] = None if value is None else from_json(value, "suggestion")
            else:
                require(isinstance(value, str), f"{name} must be text, not {str(value)[:60]!r}")
                built[name] = value
            require(surrogates or _is_whole(value), f"{name} holds half a character (a lone surrogate)")
        return Task(**built)
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from error


def _is_whole(value: Any) -> bool:
    """Whether UTF-8 can hold all texts of a JSON value."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_tasks(path: Path) -> tuple[list[Task], list[str]]:
    """(the good tasks of a JSONL file, one message with file and line for each bad line). UserError if it cannot be read."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    good: list[Task] = []
    bad: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            good.append(task_from_json(json.loads(line.decode()), f"{path}:{number}"))
        except UserError as error:
            bad.append(str(error))
        except (ValueError, RecursionError) as error:
            bad.append(f"{path}:{number}: no valid JSON ({error})")
    return good, bad
