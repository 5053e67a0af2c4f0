"""Verifiers of texts: the expected answer, or a regular expression."""

from __future__ import annotations

import dataclasses
import unicodedata

import regex

from rlaif_jax.config import UserError, require
from rlaif_jax.data.prompts import Record
from rlaif_jax.feedback.sources import FeedbackSource, Missing
from rlaif_jax.feedback.verifiers.base import RIGHT, WRONG, Verdict, VerifierSource, read_field, read_texts

# What may be around an answer without a change of its meaning; a minus sign or a leading dot is a part of a number.
_QUOTES = "\"'`*\u201c\u201d\u2018\u2019\u00ab\u00bb"
_BEFORE, _AFTER = f"{_QUOTES}([{{", f"{_QUOTES})]}}.,;:!?"


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """1 where the answer is the text in the record, or one of its texts; blanks count as one space.

    Attributes:
        field: the record's field: a text or number, or a list of those that are right.
        ignore_case: whether "Paris" and "paris" are the same.
        ignore_punctuation: whether quotation marks, brackets and emphasis around the text, and .,;:!? after it, are left out.
    """

    field: str = "answer"
    ignore_case: bool = True
    ignore_punctuation: bool = True

    def __post_init__(self) -> None:
        require(bool(self.field), "exact_match.field is empty; name the record's field")

    def normalised(self, text: str) -> str:
        """Returns the part of a text that is compared."""
        text = " ".join(unicodedata.normalize("NFC", text).split())
        if self.ignore_punctuation:
            text = text.lstrip(_BEFORE + " ").rstrip(_AFTER + " ")
        return text.casefold() if self.ignore_case else text

    def verify(self, record: Record, answer: str) -> Verdict:
        """Returns 1 for a right answer, 0 for a wrong one, `Missing` where the record has no text.

        Args:
            record: with the expected text.
            answer: the answer.
        """
        texts = read_texts(record, self.field)
        if isinstance(texts, Missing):
            return texts
        expected = {self.normalised(text) for text in texts} - {""}
        if not expected:
            return Missing(f"the record has no {self.field!r}")
        return RIGHT if self.normalised(answer) in expected else WRONG

    def build(self) -> FeedbackSource:
        """Returns the source of these verdicts."""
        return VerifierSource(self.verify)


@dataclasses.dataclass(frozen=True)
class Regex:
    """1 where a regular expression is found in the answer; ^ and $ anchor it, (?i) ignores case.

    The expressions are those of the package `regex`, which knows Python's `re` and stops a search after a time.

    Attributes:
        pattern: the expression for all records; "" = each record has one in `field`.
        field: the record's field with its expression; "" = `pattern` is for all records.
        timeout_s: seconds after which a search is given up; the judgement is then missing.
    """

    pattern: str = ""
    field: str = ""
    timeout_s: float = 1.0

    def __post_init__(self) -> None:
        require(bool(self.pattern) != bool(self.field), "regex needs either a pattern or a field, and not both")
        require(self.timeout_s > 0, f"regex.timeout_s must be positive, not {self.timeout_s}")
        if self.pattern:
            try:
                regex.compile(self.pattern)
            except regex.error as error:
                raise UserError(f"regex.pattern {self.pattern!r} is no regular expression: {error}") from None

    def verify(self, record: Record, answer: str) -> Verdict:
        """Returns 1 where the expression is found, 0 where not, `Missing` without one or after the timeout.

        Args:
            record: may have the expression.
            answer: the answer.
        """
        pattern = self.pattern or read_field(record, self.field)
        if isinstance(pattern, Missing):
            return pattern
        if not isinstance(pattern, str):
            return Missing(f"the record's {self.field!r} is a {type(pattern).__name__}, not a regular expression")
        try:
            return RIGHT if regex.search(pattern, answer, timeout=self.timeout_s) else WRONG
        except regex.error as error:
            return Missing(f"the record's {self.field!r} is no regular expression: {error}")
        except TimeoutError:
            return Missing(f"the search of the regular expression took more than {self.timeout_s:g} s")

    def build(self) -> FeedbackSource:
        """Returns the source of these verdicts."""
        return VerifierSource(self.verify)
