"""A verifier of numbers: reads them in prose and LaTeX, exactly, and compares them."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from rlaif_jax.config import check_choices, require
from rlaif_jax.data.prompts import Record
from rlaif_jax.feedback.sources import FeedbackSource, Missing
from rlaif_jax.feedback.verifiers.base import RIGHT, WRONG, Verdict, VerifierSource, read_field

LONGEST = 400  # characters of a number, and its greatest power of ten: 1e999999999 must not fill the memory

# A plain number: 1,234.5 or .5 or 12, then a power of ten as 1e3 or as 1 \times 10^{3}.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"


def _plain(name: str) -> str:
    """Returns the pattern of a plain number; its groups end in `name`."""
    times = (
        rf"\s*(?:\\times|\\cdot|[\u00d7x*])\s*10\s*\^\s*(?:\{{(?P<times_{name}>[-+]?\d+)\}}|(?P<bare_{name}>[-+]?\d+))"
    )
    return rf"(?P<{name}>{_DIGITS})(?:[eE](?P<power_{name}>[-+]?\d+)(?![\d.])|{times})?"


_NUMBER = re.compile(
    r"(?<![\w.])(?<!\d/)(?P<sign>(?<![)\]}])[-+])?(?:"
    # 2 \frac{-1}{3}, \frac12
    r"(?:(?P<whole>\d+)\s*)?\\[dt]?frac\s*(?:"
    rf"\{{\s*(?P<above>[-+])?{_plain('top')}\s*\}}\s*\{{\s*(?P<below>[-+])?{_plain('bottom')}\s*\}}"
    r"|(?P<top_digit>\d)\s*(?P<bottom_digit>\d))"
    # 1 1/2
    r"|(?P<mixed>\d+)\s+(?P<mixed_top>\d+)\s?/\s?(?P<mixed_bottom>\d+)(?![\d/])"
    # 3/4, 5
    rf"|{_plain('number')}(?:\s?/\s?{_plain('divisor')}(?!\d|\.\d|\s?/\s?\d))?"
    r")(?P<percent>\s?\\?%|\s+per\s?cent\b)?"
)


class Value(NamedTuple):
    """A number that was read.

    Attributes:
        number: without its per cent sign.
        percent: whether it has one.
    """

    number: Fraction
    percent: bool

    @property
    def values(self) -> set[Fraction]:
        """Returns what the number may mean: a percentage is its hundredth, and data sets leave the sign out."""
        return {self.number, self.number / 100} if self.percent else {self.number}


def _latex_plain(text: str) -> str:
    r"""Returns a text without LaTeX's spaces and signs inside numbers: 1{,}234 and 1,\!234 and \$5."""
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\!", "")
    text = re.sub(r"(?<=\d)\\[,;: ](?=\d)", "", text)
    return re.sub(r"([-+])\s?\\?[$€£]\s?(?=[\d.])", r"\1", text)


def _plain_number(match: re.Match[str], name: str) -> Fraction | None:
    """Returns a plain number of a match; None where it is longer or larger than what is read."""
    digits = match[name].replace(",", "")
    power = match[f"power_{name}"] or match[f"times_{name}"] or match[f"bare_{name}"] or "0"
    if len(digits) > LONGEST or len(power) > 5 or abs(int(power)) > LONGEST:
        return None
    return Fraction(digits) * Fraction(10) ** int(power)


def _value(match: re.Match[str]) -> Value | None:
    """Returns the number of a match of `_NUMBER`; None for a division by zero and for what is too long."""
    if any(len(match[name] or "") > LONGEST for name in ("whole", "mixed", "mixed_top", "mixed_bottom")):
        return None
    top: Fraction | None
    bottom: Fraction | None
    if match["top"]:
        top, bottom = _plain_number(match, "top"), _plain_number(match, "bottom")
    elif match["number"]:
        top, bottom = _plain_number(match, "number"), Fraction(1)
        if match["divisor"]:
            bottom = _plain_number(match, "divisor")
    else:
        digits = ("top_digit", "bottom_digit") if match["top_digit"] else ("mixed_top", "mixed_bottom")
        top, bottom = (Fraction(int(match[name])) for name in digits)
    if top is None or not bottom:
        return None
    fraction = top / bottom if match["above"] != "-" else -top / bottom
    fraction = fraction if match["below"] != "-" else -fraction
    number = int(match["whole"] or match["mixed"] or "0") + fraction
    return Value(-number if match["sign"] == "-" else number, match["percent"] is not None)


def numbers_in(text: str) -> Iterator[Value]:
    """Yields the numbers of a text in their order: 1,234; 1e3; 3/4; 1 1/2; 50%; \\frac{3}{4}."""
    for match in _NUMBER.finditer(_latex_plain(text)):
        value = _value(match)
        if value is not None:
            yield value


_WRAPPERS = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{[^{}]*\}(?:\s*\^\s*\{?\d\}?)?|\^\s*\{?\s*\\circ\s*\}?|\\[,;: !]|~"
)
_NAMED = re.compile(r"^\s*\\?[A-Za-z]\w*\s*=\s*")
_UNITS = re.compile(r"^[A-Za-z ]*$")


def whole_number(text: str) -> Value | None:
    r"""Returns the number that a text is; None where it is another expression, such as 2\pi or (3, 4).

    Around the number may be "x =", currency signs, a unit in letters or \text{...}, and a dot at the end.
    """
    text = _NAMED.sub("", _WRAPPERS.sub(" ", _latex_plain(text).replace("\\$", "$"))).strip()
    text = text.strip("$€£ ").rstrip(".").strip()
    match = _NUMBER.match(text)
    return _value(match) if match is not None and _UNITS.match(text[match.end() :]) else None


def boxed(text: str) -> str | None:
    r"""Returns the content of the last \boxed{...} (or \fbox) of a text, braces balanced; None without one."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[text.index("box", start) :].removeprefix("boxed").removeprefix("box").lstrip()
    if not rest.startswith("{"):
        return rest.split()[0] if rest.split() else None
    depth = 0
    for at, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:at]
    return None


def expected_number(value: Any) -> Value | None:
    r"""Returns the number of a record's field: a number, a text that is one, or a solution with one.

    A solution has its number after "####", as in GSM8K, or in \boxed{}, as in MATH.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if not isinstance(value, str):
        if isinstance(value, int):
            return Value(Fraction(value), False)
        return Value(Fraction(str(value)), False) if math.isfinite(value) else None
    if "####" in value:
        return whole_number(value.rpartition("####")[2])
    content = boxed(value)
    return whole_number(value if content is None else content)


@dataclasses.dataclass(frozen=True)
class Number:
    r"""1 where the answer's number is that of the record; an answer without a number is wrong.

    Both are read exactly, as fractions: 1,234 and 1e3 and 1.5 \times 10^{3}, 3/4 and 1 1/2, \frac{3}{4}, 50%. A
    percentage equals its hundredth; where only one of both has the sign, equal numbers are right as well, because data
    sets leave it out.

    Attributes:
        field: the record's field: a number, or a text with it (alone, after "####", or in \boxed{}).
        where: which number of the answer counts: the last one; the one after "####"; the one in the last \boxed{}.
        tolerance: the greatest difference that is right, relative to the record's number.
    """

    field: str = "answer"
    where: Literal["last", "hashes", "boxed"] = "last"
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        require(bool(self.field), "number.field is empty; name the record's field")
        check_choices(self, "number")
        require(0 <= self.tolerance < math.inf, f"number.tolerance must be a number from 0 up, not {self.tolerance}")

    def read(self, answer: str) -> Value | None:
        """Returns the number that counts in an answer; None without one."""
        if self.where == "boxed":
            content = boxed(answer)
            return None if content is None else whole_number(content)
        if self.where == "hashes":
            _, mark, rest = answer.rpartition("####")
            return next(numbers_in(rest.strip().partition("\n")[0]), None) if mark else None
        matches = reversed(list(_NUMBER.finditer(_latex_plain(answer))))
        return next((value for match in matches if (value := _value(match)) is not None), None)

    def verify(self, record: Record, answer: str) -> Verdict:
        """Returns 1 for a right answer, 0 for a wrong one, `Missing` where the record has no number.

        Args:
            record: with the expected number.
            answer: the answer.
        """
        value = read_field(record, self.field)
        if isinstance(value, Missing):
            return value
        expected = expected_number(value)
        if expected is None:
            return Missing(f"the record's {self.field!r} is no number")
        found = self.read(answer)
        if found is None:
            return WRONG
        signs_agree = found.percent == expected.percent
        found_values = {found.number} if signs_agree else found.values
        expected_values = {expected.number} if signs_agree else expected.values
        tolerance = Fraction(str(self.tolerance))
        pairs = itertools.product(found_values, expected_values)
        return RIGHT if any(abs(one - other) <= tolerance * abs(other) for one, other in pairs) else WRONG

    def build(self) -> FeedbackSource:
        """Returns the source of these verdicts."""
        return VerifierSource(self.verify)
