"""Verifiers of texts: what counts as the expected answer, and searches that would never end."""

import time

import pytest

from rlaif_jax.config import UserError, from_json, to_json
from rlaif_jax.feedback.sources import Missing
from rlaif_jax.feedback.verifiers.texts import ExactMatch, Regex


@pytest.mark.parametrize(
    "expected, answer, right",
    [
        ("Paris", "Paris", True),
        ("Paris", "  paris.\n", True),
        ("Paris", "**Paris**", True),
        ("Paris", "“Paris”!", True),
        ("New  York", "new\nyork", True),
        ("Paris", "It is Paris.", False),
        ("Paris", "Pari", False),
        ("Paris", "", False),
        ("Paris.", "Paris", True),
        ("(b)", "b", True),
        ("-5", "5", False),
        (".5", "5", False),
        (42, "42", True),
        (4.5, "4.5", True),
        ("café", "cafe\u0301", True),
        ("straße", "STRASSE", True),
        (["yes", "y"], "Y", True),
        (["yes", "y"], "no", False),
        (("yes",), "yes", True),
    ],
)
def test_the_expected_text(expected, answer, right):
    feedback = ExactMatch().build()([{"answer": expected}], [answer])
    assert feedback.values.tolist() == [[float(right)]] and feedback.valid.all()


def test_strict_comparison_and_another_field():
    strict = ExactMatch("gold", ignore_case=False, ignore_punctuation=False)
    record = {"gold": "Paris", "answer": "no"}
    assert [strict.verify(record, answer) for answer in ("Paris", " Paris\n", "paris", "Paris.")] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "record", [{}, {"answer": None}, {"answer": ""}, {"answer": " \n"}, {"answer": []}, {"answer": "."}]
)
def test_a_record_that_expects_nothing_has_no_verdict(record):
    source = ExactMatch().build()
    feedback = source([record, {"answer": "x"}], ["", "x"])
    assert feedback.valid[:, 0].tolist() == [False, True] and source.missing() == {"the record has no 'answer'": 1}


def test_a_record_with_another_kind_of_value():
    assert ExactMatch().verify({"answer": {"a": 1}}, "x") == Missing(
        "the record's 'answer' holds a dict, not a text or number"
    )


@pytest.mark.parametrize(
    "pattern, answer, right",
    [
        (r"^yes\b", "yes, it is", True),
        (r"^yes\b", "yesterday", False),
        (r"(?i)paris", "In PARIS", True),
        (r"\d{4}-\d\d-\d\d", "on 2024-02-29.", True),
        (r"^\w+$", "two words", False),
        (r"", "x", None),
        (r"a.c", "a\nc", False),
    ],
)
def test_a_pattern_for_all_records_or_of_each(pattern, answer, right):
    source = Regex(field="pattern").build()
    feedback = source([{"pattern": pattern}], [answer])
    assert feedback.valid.item() == (right is not None) and feedback.values.item() == float(right or 0)
    if pattern:
        assert Regex(pattern).verify({}, answer) == float(right)


def test_records_without_a_right_pattern():
    source = Regex(field="pattern").build()
    source([{}, {"pattern": "("}, {"pattern": 3}], ["x"] * 3)
    assert source.missing() == {
        "the record has no 'pattern'": 1,
        "the record's 'pattern' is no regular expression: missing ) at position 1": 1,
        "the record's 'pattern' is a int, not a regular expression": 1,
    }


def test_a_search_that_would_not_end_is_given_up():
    """Python's own `re` would take 2^60 steps; the other answers keep their verdicts."""
    source = Regex(r"^(a|aa)+$", timeout_s=0.1).build()
    started = time.monotonic()
    feedback = source([{}] * 3, ["aaa", "a" * 90 + "b", "b"])
    assert time.monotonic() - started < 5
    assert feedback.valid[:, 0].tolist() == [True, False, True] and feedback.values[:, 0].tolist() == [1, 0, 0]
    assert source.missing() == {"the search of the regular expression took more than 0.1 s": 1}


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ExactMatch(field=""), "exact_match.field is empty"),
        (lambda: Regex(), "either a pattern or a field"),
        (lambda: Regex("a", "b"), "either a pattern or a field"),
        (lambda: Regex("(a"), r"regex.pattern '\(a' is no regular expression: missing \)"),
        (lambda: Regex("a", timeout_s=0), "regex.timeout_s must be positive, not 0"),
    ],
)
def test_settings_that_are_not_right(make, words):
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize("config", [ExactMatch("x", False, False), Regex("a+"), Regex(field="p", timeout_s=2.0)])
def test_settings_as_json(config):
    assert from_json(type(config), to_json(config)) == config
