"""Symbolic rules of a constitution: each measures a text and says how far the measure lies where it should, in [0, 1].

The texts are written by a model that learns what pays: nothing here may hang or fail on them. Patterns read the first
`MAX_CHARACTERS` of a text and stop after `TIMEOUT_S` seconds; words, sentences and lines are counted in linear time.
What could not be measured is None, with a sentence about why; it is never 0.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

import regex

from rlaif_jax.config import require

MAX_CHARACTERS = 20_000  # of a text that a pattern reads
TIMEOUT_S = 0.5  # for one pattern on one text
MAX_TIMEOUTS = 3  # after so many a pattern is not tried on the rest of a batch

Unit = Literal["characters", "words", "sentences", "lines", "paragraphs"]
Judged = Literal["answer", "prompt"]


class Measured(NamedTuple):
    """A number, or None and why there is none; slow: because it took too long."""

    number: float | None
    problem: str = ""
    slow: bool = False


# ---- What a rule measures


@dataclasses.dataclass(frozen=True)
class Pattern:
    """How often a regular expression occurs, in the dialect of the `regex` package (that of `re`, and more)."""

    pattern: str
    ignore_case: bool = False

    @cached_property
    def compiled(self) -> regex.Pattern[str]:
        """Raises regex.error, with the place, if it is no regular expression."""
        return regex.compile(self.pattern, regex.IGNORECASE if self.ignore_case else 0)

    def matches(self, text: str) -> list[regex.Match[str]]:
        """All matches in the first `MAX_CHARACTERS`. Raises TimeoutError after `TIMEOUT_S`."""
        found, deadline = [], time.monotonic() + TIMEOUT_S
        for match in self.compiled.finditer(text[:MAX_CHARACTERS], timeout=TIMEOUT_S):
            found.append(match)
            if time.monotonic() > deadline:
                raise TimeoutError
        return found

    def spans(self, text: str) -> list[tuple[int, int]]:
        """(start, end) of all matches that are not empty; none where the pattern takes too long."""
        try:
            return [match.span() for match in self.matches(text) if match.end() > match.start()]
        except TimeoutError:
            return []

    def __call__(self, prompt: str, answer: str, text: str) -> Measured:
        try:
            return Measured(len(self.matches(text)))
        except TimeoutError:
            return Measured(None, f"the pattern took longer than {TIMEOUT_S:g} s on a text: make it simpler", slow=True)


def word_pattern(words: Sequence[str]) -> Pattern:
    """Any of the words or phrases, whole, in upper or lower case."""
    longest_first = sorted(words, key=len, reverse=True)
    return Pattern(rf"(?<!\w)(?:{'|'.join(regex.escape(w) for w in longest_first)})(?!\w)", ignore_case=True)


@dataclasses.dataclass(frozen=True)
class Length:
    """How long a text is.

    words: what blanks separate. sentences: what ends in . ! or ? before a blank or the end (abbreviations count, too).
    lines: those that are not blank. paragraphs: blocks of lines with blank lines between.
    """

    unit: Unit

    def __call__(self, prompt: str, answer: str, text: str) -> Measured:
        return Measured(length(text, self.unit))


def length(text: str, unit: Unit) -> int:
    """The length of a text in characters, words, sentences, lines or paragraphs (see `Length`)."""
    if unit == "characters":
        return len(text)
    if unit == "words":
        return len(text.split())
    if unit == "sentences":
        words = [word for word in (word.rstrip("\"'\u201d\u2019)]*_") for word in text.split()) if word]
        ends = sum(word.endswith((".", "!", "?", "…")) for word in words)
        return ends + bool(words and not words[-1].endswith((".", "!", "?", "…")))
    filled = [bool(line.strip()) for line in text.splitlines()]
    if unit == "lines":
        return sum(filled)
    return sum(now and not before for before, now in zip([False, *filled], filled))


PredicateFunction: TypeAlias = Callable[[str, str], "float | bool | None"]


@dataclasses.dataclass(frozen=True)
class Predicate:
    """A Python function of (prompt, answer): bool, a number, or None = cannot say. What it raises is a problem, not the
    end of the run. name: `module:function`, as the file has it."""

    name: str
    function: PredicateFunction = dataclasses.field(compare=False, repr=False)

    def __call__(self, prompt: str, answer: str, text: str) -> Measured:
        try:
            value = self.function(prompt, answer)
            number = None if value is None else float(value)
        except Exception as error:
            return Measured(None, f"{self.name} failed: {type(error).__name__}: {error}")
        if number is not None and not math.isfinite(number):
            return Measured(None, f"{self.name} gave {number}")
        return Measured(number)


@dataclasses.dataclass(frozen=True)
class Exemplar:
    """How similar a text is to `text`: the cosine of their embeddings under the caller's encoder, in [-1, 1]."""

    text: str


Measure: TypeAlias = Pattern | Length | Predicate | Exemplar


# ---- Rules


@dataclasses.dataclass(frozen=True)
class Rule:
    """A named predicate: whether a measure lies between `at_least` and `at_most`.

    Attributes:
        name: as formulas use it.
        measure: what is measured.
        of: of the answer, or of the prompt (a predicate function sees both).
        at_least, at_most: where the measure should lie, both included; None = no bound. Without both a predicate
          function's number is the rule's value, and must lie in [0, 1].
        soft: how far outside, in the measure's unit, the value has fallen from 1 to 0 (linearly). 0 = at once.
        replace: what to put in the place of a match that is a fault; None = nothing known.
        line: of its [[rule]] in the file.
    """

    name: str
    measure: Measure
    of: Judged = "answer"
    at_least: float | None = None
    at_most: float | None = None
    soft: float = 0.0
    replace: str | None = None
    line: int = 0

    def value(self, number: float) -> Measured:
        """The rule's value in [0, 1] for a measure."""
        if self.at_least is None and self.at_most is None:
            if 0 <= number <= 1:
                return Measured(number)
            return Measured(None, f"gave {number:g}: without at_least or at_most it must lie between 0 and 1")
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        outside = max(low - number, number - high, 0.0)
        if outside == 0 or self.soft == 0:
            return Measured(float(outside == 0))
        return Measured(max(0.0, 1.0 - outside / self.soft))


def apply_rule(
    rule: Rule, prompts: Sequence[str], answers: Sequence[str], numbers: Sequence[float | None] | None = None
) -> tuple[list[float | None], list[str]]:
    """(the rule's values for B answers, None where one is missing; the different problems met).

    numbers: the measures, where they are already known (an exemplar's similarities).
    """
    require(
        numbers is not None or not isinstance(rule.measure, Exemplar), f"rule {rule.name}: similarities must be given"
    )
    values: list[float | None] = []
    problems: list[str] = []
    timeouts = 0
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if timeouts >= MAX_TIMEOUTS:
            values.append(None)
            continue
        if numbers is not None:
            measured = Measured(numbers[i])
        else:
            assert not isinstance(rule.measure, Exemplar)
            measured = rule.measure(prompt, answer, answer if rule.of == "answer" else prompt)
        if measured.number is not None:
            measured = rule.value(measured.number)
        values.append(measured.number)
        timeouts += measured.slow
        if measured.problem:
            problems.append(measured.problem)
    return values, [f"rule {rule.name}: {problem}" for problem in dict.fromkeys(problems)]


# ---- A predicate to use and to copy


def fresh_words(prompt: str, answer: str) -> float | None:
    """Share of the answer's word triples that it has not said before: 1 = never repeats itself. None below 3 words."""
    words = answer.lower().split()
    triples = list(zip(words, words[1:], words[2:]))
    return len(set(triples)) / len(triples) if triples else None
