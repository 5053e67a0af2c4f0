"""The verifier of numbers against Python's fractions, in the forms of GSM8K and MATH."""

import time
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlaif_jax.config import UserError, from_json, to_json
from rlaif_jax.feedback.verifiers.number import Number, boxed, expected_number, numbers_in, whole_number


@pytest.mark.parametrize(
    "text, expected",
    [
        ("She has 1,234 apples.", ["1234"]),
        ("1,234,567.89", ["123456789/100"]),
        ("1,2345 or 12,34", ["1", "2345", "12", "34"]),
        ("(3, 4)", ["3", "4"]),
        ("1e3, 1.5e-3, 1E5", ["1000", "3/2000", "100000"]),
        ("1.5 \\times 10^{3} and 2 x 10^-2 and 3 \u00d7 10^4", ["1500", "1/50", "30000"]),
        ("3/4 cup, 3 / 4 cup", ["3/4", "3/4"]),
        ("1 1/2 cups", ["3/2"]),
        ("-1 1/2", ["-3/2"]),
        (r"\frac{3}{4}, \dfrac{1.5}{-2}, \tfrac{-1}{2}, -\frac{1}{2}", ["3/4", "-3/4", "-1/2", "-1/2"]),
        (r"\frac12 and \frac 3 4 and 2\frac{1}{3}", ["1/2", "3/4", "7/3"]),
        (r"1{,}234 and 1,\!234 and 1\,234", ["1234", "1234", "1234"]),
        ("-$5.50, -\\$5, $18", ["-11/2", "-5", "18"]),
        ("x=-5; 3-5; 10 - 5; (2)-5", ["-5", "3", "5", "10", "5", "2", "5"]),
        ("\u22127 +7", ["-7", "7"]),
        (".5 and -.5 and 5.", ["1/2", "-1/2", "5"]),
        ("H2O, x2, a_3, v1.2", []),
        ("5kg on the 3rd", ["5", "3"]),
        ("12/25/2024, 3/4.5", ["12", "2/3"]),  # a date is no quotient
        ("1/0", []),
        ("no number", []),
        ("", []),
    ],
)
def test_numbers_in_a_text(text, expected):
    found = list(numbers_in(text))
    assert [str(value.number) for value in found] == expected and not any(value.percent for value in found)


@pytest.mark.parametrize("text", ["50%", r"50\%", "50 %", "50 percent", "50 per cent"])
def test_percentages(text):
    (value,) = numbers_in(f"It is {text}.")
    assert value == (50, True) and value.values == {Fraction(50), Fraction(1, 2)}
    assert not next(numbers_in("50 persons")).percent


def test_numbers_that_would_fill_the_memory_are_none():
    started = time.monotonic()
    for text in ("1e999999999", "1e-99999", "9" * 5000, f"1/{'9' * 5000}", f"1 {'9' * 5000}/3", "1 x 10^{99999}"):
        assert list(numbers_in(text)) == []
    list(numbers_in("1 " * 2000 + "," * 20000 + "1," * 2000 + " " * 20000 + "9" * 20000))
    assert time.monotonic() - started < 10


@settings(deadline=None)
@given(st.integers(-(10**30), 10**30))
def test_whole_numbers_are_read_back(number):
    for text in (f"{number}", f"{number:,}", f"{number}.", f"{number:,}".replace(",", "{,}")):
        assert [value.number for value in numbers_in(f"so {text} apples")] == [number]
        assert whole_number(text) == (number, False) == expected_number(number)


@settings(deadline=None)
@given(st.floats(-1e300, 1e300, allow_subnormal=False))
def test_floats_are_read_back(number):
    for text in (f"{number!r}", f"{number:e}", f"{number:.3f}", f"{number:,.2f}"):
        (value,) = numbers_in(f"x = {text}, so")
        assert value.number == Fraction(text.replace(",", ""))
    assert expected_number(number) == (Fraction(repr(number)), False)


@settings(deadline=None)
@given(st.integers(-999, 999), st.integers(1, 999), st.integers(1, 99))
def test_fractions_are_read_back(top, bottom, whole):
    for text in (f"{top}/{bottom}", rf"\frac{{{top}}}{{{bottom}}}", rf"\dfrac{{{top}}}{{{bottom}}}"):
        assert [value.number for value in numbers_in(f"${text}$")] == [Fraction(top, bottom)]
    assume(top >= 0)
    for text in (f"{whole} {top}/{bottom}", rf"{whole}\frac{{{top}}}{{{bottom}}}"):
        assert whole_number(f"-{text}") == (-whole - Fraction(top, bottom), False)


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{7}", "7"),
        (r"$\boxed 8$", "8$"),
        (r"\boxed{a{b}c} d}", "a{b}c"),
        (r"\boxed{", None),
        (r"\boxed{1", None),
        (r"\boxed", None),
        ("5", None),
    ],
)
def test_boxes(text, expected):
    assert boxed(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("x = 5", "5"),
        (r"5 \text{ cm}", "5"),
        (r"12\text{ cm}^2", "12"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        ("$5$", "5"),
        ("5 apples", "5"),
        (r"\$1,234", "1234"),
        (r"n=\frac{1}{2}", "1/2"),
        ("1/2", "1/2"),
        (r"2\pi", None),
        ("(3, 4)", None),
        ("3, 4", None),
        ("x^2", None),
        (r"\sqrt{3}", None),
        ("3x + 4", None),
        ("five", None),
        ("", None),
    ],
)
def test_a_text_that_is_one_number(text, expected):
    value = whole_number(text)
    assert (None if value is None else str(value.number)) == expected


GSM8K = {"answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nIn all 48+24 = <<48+24=72>>72.\n#### 72"}
MATH = {"answer": r"We have $x = \boxed{\frac{3}{4}}$ and $1 - x = \frac14$."}


@pytest.mark.parametrize(
    "where, record, answer, reward",
    [
        ("last", GSM8K, "She sold 48 and 24, in all 72.", 1),
        ("last", GSM8K, "In all 72, of which 24 in May.", 0),
        ("last", GSM8K, "72 or 1/0, 1e9999", 1),
        ("last", GSM8K, "many", 0),
        ("last", GSM8K, "$72.00", 1),
        ("hashes", GSM8K, "48 + 24\n#### 72\nDone in 1 minute.", 1),
        ("hashes", GSM8K, "#### 70\n#### 72 clips, not 3", 1),
        ("hashes", GSM8K, "72", 0),
        ("hashes", GSM8K, "#### \n72", 1),
        ("hashes", GSM8K, "#### clips\n72", 0),
        ("boxed", MATH, r"\boxed{0.75}", 1),
        ("boxed", MATH, r"\boxed{\dfrac{3}{4}}", 1),
        ("boxed", MATH, r"\boxed{x = 3/4}", 1),
        ("boxed", MATH, r"\boxed{\frac{3}{4}\pi}", 0),
        ("boxed", MATH, r"\boxed{(1, \frac{3}{4})}", 0),
        ("boxed", MATH, "0.75", 0),
        ("last", MATH, "75%", 1),
        ("last", MATH, "0.75%", 1),  # the sign is left out in the record
        ("last", MATH, "7.5%", 0),
        ("last", {"answer": "75%"}, "0.75", 1),
        ("last", {"answer": "75%"}, "75", 1),
        ("last", {"answer": "75%"}, "75 %", 1),
        ("last", {"answer": "75%"}, "0.75%", 0),
        ("last", {"answer": 0.1}, "0.1", 1),
        ("last", {"answer": 0}, "0.0", 1),
        ("last", {"answer": "-1,200.5"}, "it falls by -1200.5", 1),
        ("last", {"answer": "1/3"}, "0.333", 0),
    ],
)
def test_verdicts(where, record, answer, reward):
    source = Number(where=where).build()
    feedback = source([record], [answer])
    assert feedback.valid.all() and feedback.values.item() == reward and source.missing() == {}


def test_the_tolerance_is_relative_and_zero_is_exact():
    record = {"gold": "300"}
    within = lambda tolerance, answer: Number("gold", tolerance=tolerance).verify(record, answer)
    assert [within(0.01, answer) for answer in ("303", "297", "303.01", "-300")] == [1, 1, 0, 0]
    assert within(0.0, "300.0") == 1 and within(0.0, "300.0000000001") == 0 and within(1e-6, "300.0000000001") == 1
    assert Number("gold", tolerance=0.01).verify({"gold": 0}, "0.001") == 0
    assert Number("gold", tolerance=0.0).verify({"gold": 0.1}, "1/10") == 1


@pytest.mark.parametrize(
    "value, reason",
    [
        (None, "the record has no 'answer'"),
        ("", "the record has no 'answer'"),
        ("several", "the record's 'answer' is no number"),
        ("3 or 4", "the record's 'answer' is no number"),
        (r"\boxed{2\pi}", "the record's 'answer' is no number"),
        (True, "the record's 'answer' is no number"),
        (float("nan"), "the record's 'answer' is no number"),
        ([3], "the record's 'answer' is no number"),
    ],
)
def test_a_record_without_a_number_has_no_verdict(value, reason):
    source = Number().build()
    assert source([{"answer": value}, {"answer": 3}], ["3", "3"]).valid[:, 0].tolist() == [False, True]
    assert source.missing() == {reason: 1}


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"field": ""}, "number.field is empty"),
        ({"where": "first"}, "number.where is 'first'; it is one of last, hashes, boxed"),
        ({"tolerance": -1.0}, "number.tolerance must be a number from 0 up, not -1.0"),
        ({"tolerance": float("nan")}, "number.tolerance must be a number from 0 up, not nan"),
    ],
)
def test_settings_that_are_not_right(settings, words):
    with pytest.raises(UserError, match=words):
        Number(**settings)


def test_settings_as_json():
    config = Number("x", "boxed", 0.5)
    assert from_json(Number, to_json(config)) == config
