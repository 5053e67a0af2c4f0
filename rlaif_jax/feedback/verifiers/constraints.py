"""Constraints on the form of an answer that a program can check, in the spirit of IFEval (Zhou 2023).

A constraint is a small class: its fields, `text()` for the prompt, `holds(answer)` for the reward. In records it is an
object whose `type` is the name of its class in small letters: {"type": "max_words", "count": 20}. A new constraint is
one class and its name in `Constraint`. An answer without a letter or digit satisfies nothing.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from rlaif_jax.config import UserError, from_json, require, to_json
from rlaif_jax.data.prompts import Record
from rlaif_jax.feedback.sources import FeedbackSource, Missing
from rlaif_jax.feedback.verifiers.base import Verdict, VerifierSource, fenced, read_field, read_json
from rlaif_jax.feedback.verifiers.sentences import list_items, paragraphs, sentences, words

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def _amount(count: int, noun: str) -> str:
    """Returns "one sentence", "20 words"."""
    return f"{_NUMBERS[count] if count < len(_NUMBERS) else count} {noun}{'' if count == 1 else 's'}"


@dataclasses.dataclass(frozen=True)
class _Counted:
    """A constraint on a number of things.

    Attributes:
        count: the number.
    """

    count: int

    def __post_init__(self) -> None:
        require(self.count >= 1, f"count must be at least 1, not {self.count}")


@dataclasses.dataclass(frozen=True)
class Sentences(_Counted):
    """The answer has exactly `count` sentences."""

    def text(self) -> str:
        """Returns the instruction."""
        return f"Answer in {'' if self.count == 1 else 'exactly '}{_amount(self.count, 'sentence')}."

    def holds(self, answer: str) -> bool:
        """Returns whether the answer satisfies it."""
        return len(sentences(answer)) == self.count


@dataclasses.dataclass(frozen=True)
class MaxSentences(_Counted):
    """The answer has at most `count` sentences."""

    def text(self) -> str:
        """Returns the instruction."""
        return f"Use at most {_amount(self.count, 'sentence')}."

    def holds(self, answer: str) -> bool:
        """Returns whether the answer satisfies it."""
        return len(sentences(answer)) <= self.count


@dataclasses.dataclass(frozen=True)
class MinSentences(_Counted):
    """The answer has at least `count` sentences."""

    def text(self) -> str:
        """Returns the instruction."""
        return f"Use at least {_amount(self.count, 'sentence')}."

    def holds(self, answer: str) -> bool:
        """Returns whether the answer satisfies it."""
        return len(sentences(answer)) >= self.count


@dataclasses.dataclass(frozen=True)
class ExactWords(_Counted):
    """The answer has exactly `count` words."""

    def text(self) -> str:
        """Returns the instruction."""
        return f"Use exactly {_amount(self.count, 'word')}."

    def holds(self, answer: str) -> bool:
        """Returns whether the answer satisfies it."""
        return len(words(answer)) == self.count


@dataclasses.dataclass(frozen=True)
class MaxWords(_Counted):
    """The answer has at most `count` words."""

    def text(self) -> str:
        """Returns the instruction."""
        return f"Use at most {_amount(self.count, 'word')}."

    def holds(self, answer: str) -> bool:
        """Returns whether the answer satisfies it."""
        return len(words(answer)) <= self.count


@dataclasses.dataclass(frozen=True)
class MinWords(_Counted):
    """The answer has at least `count` words."""

    def text(self) -> str:
        """Returns the instruction."""
        return f"Use at least {_amount(self.count, 'word')}."

    def holds(self, answer: str) -> bool:
        """Returns whether the answer satisfies it."""
        return len(words(answer)) >= self.count


@dataclasses.dataclass(frozen=True)
class Paragraphs(_Counted):
    """The answer has exactly `count` paragraphs, with blank lines between them."""

    def text(self) -> str:
        """Returns the instruction."""
        apart = "" if self.count == 1 else ", with blank lines between them"
        return f"Write {_amount(self.count, 'paragraph')}{apart}."

    def holds(self, answer: str) -> bool:
        """Returns whether the answer satisfies it."""
        return len(paragraphs(answer)) == self.count


@dataclasses.dataclass(frozen=True)
class ListItems(_Counted):
    """The answer has a list of exactly `count` items, with bullets or numbers; inner lists do not count."""

    def text(self) -> str:
        """Returns the instruction."""
        return f'Give a list of {_amount(self.count, "item")}, each on a line that begins with "- ".'

    def holds(self, answer: str) -> bool:
        """Returns whether the answer satisfies it."""
        return len(list_items(answer)) == self.count


def _found(word: str, answer: str) -> bool:
    """Returns whether a word or phrase is in the answer, as a whole, in any case and with any blanks."""
    phrase = r"\s+".join(map(re.escape, word.split()))
    return re.search(rf"(?<!\w){phrase}(?!\w)", answer, re.IGNORECASE) is not None


@dataclasses.dataclass(frozen=True)
class WithWord:
    """The answer has a word or phrase, in small letters or capitals; "cats" is not "cat".

    Attributes:
        word: the word.
    """

    word: str

    def __post_init__(self) -> None:
        require(bool(self.word.strip()), "word is empty")

    def text(self) -> str:
        """Returns the instruction."""
        return f'Use the {"phrase" if " " in self.word.strip() else "word"} "{self.word}".'

    def holds(self, answer: str) -> bool:
        """Returns whether the answer satisfies it."""
        return _found(self.word, answer)


@dataclasses.dataclass(frozen=True)
class WithoutWord:
    """The answer does not have a word or phrase, in small letters or capitals; "cats" is not "cat".

    Attributes:
        word: the word.
    """

    word: str

    def __post_init__(self) -> None:
        require(bool(self.word.strip()), "word is empty")

    def text(self) -> str:
        """Returns the instruction."""
        return f'Do not use the {"phrase" if " " in self.word.strip() else "word"} "{self.word}".'

    def holds(self, answer: str) -> bool:
        """Returns whether the answer satisfies it."""
        return not _found(self.word, answer)


@dataclasses.dataclass(frozen=True)
class StartsWith:
    """The answer begins with a text, in the same case; blanks before it do not count.

    Attributes:
        start: the text; a word must be a whole one of the answer.
    """

    start: str

    def __post_init__(self) -> None:
        require(bool(self.start.strip()), "start is empty")

    def text(self) -> str:
        """Returns the instruction."""
        return f'Begin your answer with "{self.start.strip()}".'

    def holds(self, answer: str) -> bool:
        """Returns whether the answer satisfies it."""
        start, answer = self.start.strip(), answer.lstrip()
        rest = answer[len(start) :]
        return answer.startswith(start) and not (start[-1].isalnum() and rest[:1].isalnum())


@dataclasses.dataclass(frozen=True)
class EndsWith:
    """The answer ends with a text, in the same case; blanks after it do not count.

    Attributes:
        end: the text; a word must be a whole one of the answer. Where it has no mark at its end, one of .!? may follow.
    """

    end: str

    def __post_init__(self) -> None:
        require(bool(self.end.strip()), "end is empty")

    def text(self) -> str:
        """Returns the instruction."""
        return f'End your answer with "{self.end.strip()}".'

    def holds(self, answer: str) -> bool:
        """Returns whether the answer satisfies it."""
        end, answer = self.end.strip(), answer.rstrip()
        if end[-1].isalnum() and answer[-1:] in (".", "!", "?"):
            answer = answer[:-1]
        before = answer[: -len(end)]
        return answer.endswith(end) and not (end[0].isalnum() and before[-1:].isalnum())


@dataclasses.dataclass(frozen=True)
class AllLowercase:
    """The answer has small letters and no capitals."""

    def text(self) -> str:
        """Returns the instruction."""
        return "Use only lowercase letters."

    def holds(self, answer: str) -> bool:
        """Returns whether the answer satisfies it."""
        return answer.islower()


@dataclasses.dataclass(frozen=True)
class AllUppercase:
    """The answer has capitals and no small letters."""

    def text(self) -> str:
        """Returns the instruction."""
        return "Use only capital letters."

    def holds(self, answer: str) -> bool:
        """Returns whether the answer satisfies it."""
        return answer.isupper()


@dataclasses.dataclass(frozen=True)
class NoCommas:
    """The answer has no comma."""

    def text(self) -> str:
        """Returns the instruction."""
        return "Do not use commas."

    def holds(self, answer: str) -> bool:
        """Returns whether the answer satisfies it."""
        return "," not in answer


@dataclasses.dataclass(frozen=True)
class JsonKeys:
    """The answer is a JSON object with these keys and no others, alone or in a fence (```json).

    Attributes:
        keys: the keys.
    """

    keys: tuple[str, ...]

    def __post_init__(self) -> None:
        require(len(self.keys) >= 1, "keys is empty")

    def text(self) -> str:
        """Returns the instruction."""
        names = ", ".join(f'"{key}"' for key in self.keys)
        return f"Answer with a JSON object that has the key{'' if len(self.keys) == 1 else 's'} {names} and no others."

    def holds(self, answer: str) -> bool:
        """Returns whether the answer satisfies it."""
        code = fenced(answer, "json", "")
        try:
            value = read_json(answer if code is None else code)
        except ValueError:
            return False
        return isinstance(value, dict) and set(value) == set(self.keys)


Constraint = (
    Sentences
    | MaxSentences
    | MinSentences
    | ExactWords
    | MaxWords
    | MinWords
    | Paragraphs
    | ListItems
    | WithWord
    | WithoutWord
    | StartsWith
    | EndsWith
    | AllLowercase
    | AllUppercase
    | NoCommas
    | JsonKeys
)


def type_name(kind: type) -> str:
    """Returns the name of a constraint's class in records: MaxWords is "max_words"."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


_KINDS: Mapping[str, type[Any]] = {type_name(kind): kind for kind in typing.get_args(Constraint)}


def constraint_json(constraint: Constraint) -> dict[str, Any]:
    """Returns a constraint as it is in records, as JSON."""
    return {"type": type_name(type(constraint)), **to_json(constraint)}


def read_constraints(values: Any, where: str) -> tuple[Constraint, ...]:
    """Returns the constraints of a list in a record.

    Args:
        values: a list of objects with a `type` and its fields, or such a list as JSON text.
        where: what messages call the list, such as "constraints".

    Raises:
        UserError: a constraint is not right; the message has its place and what is right.
    """
    if isinstance(values, str):
        try:
            values = read_json(values)
        except ValueError as error:
            raise UserError(f"{where} is no JSON: {error}") from None
    require(isinstance(values, Sequence) and not isinstance(values, str), f"{where} should be a list of objects")
    found: list[Constraint] = []
    for number, value in enumerate(values):
        place = f"{where}[{number}]"
        require(isinstance(value, Mapping), f"{place} should be an object with a type, not {value!r:.60}")
        kind = _KINDS.get(str(value.get("type")))
        if kind is None:
            raise UserError(f"{place}.type is {value.get('type')!r}; it is one of {', '.join(_KINDS)}")
        try:
            found.append(from_json(kind, {k: v for k, v in value.items() if k != "type"}, place))
        except UserError as error:
            message = str(error)
            raise UserError(message if message.startswith(place) else f"{place}: {message}") from None
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Constraints:
    """The share of the record's constraints that the answer satisfies.

    Attributes:
        field: the record's field with the list of its constraints.
        all_or_nothing: 1 where the answer satisfies all of them, else 0.
    """

    field: str = "constraints"
    all_or_nothing: bool = False

    def __post_init__(self) -> None:
        require(bool(self.field), "constraints.field is empty; name the record's field")

    def verify(self, record: Record, answer: str) -> Verdict:
        """Returns the share of the constraints that hold, `Missing` where the record has none.

        Args:
            record: with the constraints.
            answer: the answer.
        """
        values = read_field(record, self.field)
        if isinstance(values, Missing):
            return values
        try:
            constraints = read_constraints(values, self.field)
        except UserError as error:
            return Missing(f"the record's constraints are not right: {error}")
        if not constraints:
            return Missing(f"the record has no {self.field!r}")
        says_something = any(map(str.isalnum, answer))
        held = sum(says_something and constraint.holds(answer) for constraint in constraints)
        return float(held == len(constraints)) if self.all_or_nothing else held / len(constraints)

    def build(self) -> FeedbackSource:
        """Returns the source of these rewards."""
        return VerifierSource(self.verify)
