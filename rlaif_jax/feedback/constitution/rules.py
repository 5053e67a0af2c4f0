"""Symbolic rules of a constitution: a rule measures a text and maps the measure to a value in [0, 1].

The texts are written by a model that learns to earn rewards, so no text may make a rule hang or fail.
Patterns read the first `MAX_CHARACTERS` of a text and stop after `TIMEOUT_S` seconds; words, sentences and
lines are counted in linear time. A measure that failed is None, with a sentence that says why; it is never 0.
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

MAX_CHARACTERS = 20_000  # the part of a text that a pattern reads
TIMEOUT_S = 0.5  # of one pattern on one text
MAX_TIMEOUTS = 3  # after this many a pattern is not tried on the rest of a batch

Unit = Literal["characters", "words", "sentences", "lines", "paragraphs"]
MeasuredText = Literal["answer", "prompt"]


class Measured(NamedTuple):
    """The result of a measurement.

    Attributes:
        number: the measure; None = it failed or does not apply.
        problem: a sentence that says why it failed; "" = no problem.
        slow: whether it took too long.
    """

    number: float | None
    problem: str = ""
    slow: bool = False


# ---- What a rule measures


@dataclasses.dataclass(frozen=True)
class Pattern:
    """The number of matches of a regular expression, in the dialect of the `regex` package."""

    pattern: str
    ignore_case: bool = False

    @cached_property
    def compiled(self) -> regex.Pattern[str]:
        """Returns the compiled expression; raises regex.error, with the place, if it is no regular expression."""
        return regex.compile(self.pattern, regex.IGNORECASE if self.ignore_case else 0)

    def matches(self, text: str) -> list[regex.Match[str]]:
        """Finds all matches in the first `MAX_CHARACTERS`; raises TimeoutError after `TIMEOUT_S`."""
        found, deadline = [], time.monotonic() + TIMEOUT_S
        for match in self.compiled.finditer(text[:MAX_CHARACTERS], timeout=TIMEOUT_S):
            found.append(match)
            if time.monotonic() > deadline:
                raise TimeoutError
        return found

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Returns (start, end) of all matches that are not empty, [] where the pattern takes too long."""
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
    """Builds the pattern of any of the words or phrases, whole, in upper or lower case."""
    longest_first = sorted(words, key=len, reverse=True)
    return Pattern(rf"(?<!\w)(?:{'|'.join(regex.escape(w) for w in longest_first)})(?!\w)", ignore_case=True)


@dataclasses.dataclass(frozen=True)
class Length:
    """The length of a text.

    Attributes:
        unit: characters; words, separated by blanks; sentences, which end in . ! or ? before a blank or the
            end (abbreviations count, too); lines that are not blank; or paragraphs, separated by blank lines.
    """

    unit: Unit

    def __call__(self, prompt: str, answer: str, text: str) -> Measured:
        return Measured(measure_length(text, self.unit))


def measure_length(text: str, unit: Unit) -> int:
    """Returns the length of a text, counted in `unit`: characters, words, sentences, lines or paragraphs."""
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
    """A Python function as a measure; an exception that it raises is a problem, not the end of the run.

    Attributes:
        name: `module:function`, as in the file.
        function: from (prompt, answer) to a bool, a number, or None where it does not apply.
    """

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
    """The cosine of a text's and the exemplar's embeddings under the caller's encoder, in [-1, 1]."""

    text: str


Measure: TypeAlias = Pattern | Length | Predicate | Exemplar


# ---- Rules


@dataclasses.dataclass(frozen=True)
class Rule:
    """A named predicate: whether a measure lies between `at_least` and `at_most`.

    Attributes:
        name: the rule's name in formulas.
        measure: what is measured.
        of: whether the answer or the prompt is measured (a predicate function sees both).
        at_least, at_most: the bounds of the measure, both included; None = no bound. Without both, a
            predicate function's number is the rule's value, and must lie in [0, 1].
        soft: the distance from the bounds, in the measure's unit, at which the value has fallen linearly from
            1 to 0.
        replace: the text for the place of a match that is a fault; None = not known.
        line: the line of its [[rule]] in the file.
    """

    name: str
    measure: Measure
    of: MeasuredText = "answer"
    at_least: float | None = None
    at_most: float | None = None
    soft: float = 0.0
    replace: str | None = None
    line: int = 0

    def value(self, number: float) -> Measured:
        """Maps a measure to the rule's value in [0, 1]."""
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
    """Applies a rule to B answers.

    Args:
        rule: the rule.
        prompts: the prompts [B].
        answers: the answers [B].
        numbers: the measures [B], where they are known already; an exemplar's similarities must be given so.

    Returns:
        The rule's values [B], None where missing; and a sentence about each different problem.

    Raises:
        UserError: the rule compares with an exemplar and `numbers` is None.
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
    """Computes the share of distinct word triples of the answer: 1 = no repetition; None below 3 words.

    Args:
        prompt: not read; every predicate takes it.
        answer: the answer.
    """
    words = answer.lower().split()
    triples = list(zip(words, words[1:], words[2:]))
    return len(set(triples)) / len(triples) if triples else None
