"""Rules measure texts as a person would count, and neither hang nor fail on what a model may write."""

from __future__ import annotations

import time

import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.constitution.rules import (
    MAX_CHARACTERS,
    MAX_TIMEOUTS,
    Exemplar,
    Length,
    Measured,
    Pattern,
    Predicate,
    Rule,
    apply_rule,
    fresh_words,
    measure_length,
    word_pattern,
)


def values(rule: Rule, *answers: str) -> list[float | None]:
    return apply_rule(rule, [""] * len(answers), answers)[0]


def test_words_are_whole_whatever_their_case_and_the_longest_is_found():
    words = word_pattern(["ass", "shut up", "shut", "c++", "naïve", "a.b"])
    assert words.spans("Class ass. SHUT UP! shut-in, c++; xc++ NAÏVE a.b acb") == [
        (6, 9),
        (11, 18),
        (20, 24),
        (29, 32),
        (39, 44),
        (45, 48),
    ]


def test_a_pattern_is_counted_and_case_matters_by_default():
    assert Pattern(r"\d+")("", "", "1 22 x333") == Measured(3)
    assert Pattern("a")("", "", "aA") == Measured(1)
    assert Pattern("a", ignore_case=True)("", "", "aA") == Measured(2)
    assert Pattern("^")("", "", "aA") == Measured(1)
    assert Pattern("x*").spans("axx") == [(1, 3)]  # what is empty has no place


@pytest.mark.parametrize(
    "text, characters, words, sentences, lines, paragraphs",
    [
        ("", 0, 0, 0, 0, 0),
        ("  \n\n ", 5, 0, 0, 0, 0),
        ("Hello", 5, 1, 1, 1, 1),
        ("Hi there. How are you? Fine!", 28, 6, 3, 1, 1),
        ('He said "no." Then left', 23, 5, 2, 1, 1),
        ("One.\nTwo\n\n\nthree (four!)\n", 25, 4, 2, 3, 2),
        ("3.14 is pi... is it?!", 21, 5, 2, 1, 1),
    ],
)
def test_lengths(text, characters, words, sentences, lines, paragraphs):
    found = [measure_length(text, unit) for unit in ("characters", "words", "sentences", "lines", "paragraphs")]
    assert found == [characters, words, sentences, lines, paragraphs]
    assert Length("words")("", "", text) == Measured(words)


def test_bounds_are_included_and_soften():
    hard = Rule("r", Length("words"), at_least=2, at_most=3)
    assert values(hard, "", "a", "a b", "a b c", "a b c d") == [0, 0, 1, 1, 0]
    soft = Rule("r", Length("words"), at_least=3, at_most=3, soft=2)
    assert values(soft, "", "a", "a b", "a b c", "a b c d", "a b c d e") == [0, 0, 0.5, 1, 0.5, 0]
    assert values(Rule("r", word_pattern(["a"]), at_most=0), "b", "a") == [1, 0]


def test_a_rule_reads_the_answer_or_the_prompt():
    of_prompt = Rule("r", word_pattern(["list"]), of="prompt", at_least=1)
    assert apply_rule(of_prompt, ["a list", "x"], ["x", "a list"])[0] == [1, 0]


def test_a_predicate_says_yes_no_a_number_or_nothing():
    def judge(prompt, answer):
        return {"yes": True, "no": False, "half": 0.5, "none": None, "nan": float("nan"), "big": 3}[answer]

    rule = Rule("judged", Predicate("m:judge", judge))
    found, problems = apply_rule(rule, [""] * 7, ["yes", "no", "half", "none", "nan", "big", "oops"])
    assert found == [1, 0, 0.5, None, None, None, None]
    assert problems == [
        "rule judged: m:judge gave nan",
        "rule judged: gave 3: without at_least or at_most it must lie between 0 and 1",
        "rule judged: m:judge failed: KeyError: 'oops'",
    ]
    assert values(Rule("r", Predicate("m:judge", judge), at_least=2), "big", "half") == [1, 0]


def test_a_problem_is_reported_once():
    rule = Rule("r", Predicate("m:f", lambda p, a: 1 / 0))
    found, problems = apply_rule(rule, [""] * 50, ["x"] * 50)
    assert found == [None] * 50
    assert len(problems) == 1


@pytest.mark.parametrize("pattern", [r"(x+x+)+y", r"(.*)*$z", r"(?:a|a|x)+b", r"x*x*x*x*x*y"])
def test_no_pattern_hangs(pattern):
    rule = Rule("slow", Pattern(pattern), at_least=1)
    answers = ["x" * 50_000] * 40
    start = time.monotonic()
    found, problems = apply_rule(rule, [""] * 40, answers)
    assert time.monotonic() - start < 20  # not 40 texts of half a second, let alone for ever
    assert all(value in (None, 0) for value in found)
    if None in found:
        assert problems == ["rule slow: the pattern took longer than 0.5 s on a text: make it simpler"]
        assert found[MAX_TIMEOUTS:] == [None] * (40 - MAX_TIMEOUTS)


def test_a_pattern_that_takes_too_long_finds_nothing_and_says_so():
    slow = Pattern(r"(x+x+)+y")
    assert slow("", "", "x" * 5000).number is None
    assert slow("", "", "x" * 5000).slow
    assert slow.spans("x" * 5000) == []


def test_patterns_read_the_beginning_of_a_very_long_text_and_lengths_all_of_it():
    text = "a " * MAX_CHARACTERS
    assert Pattern("a")("", "", text) == Measured(MAX_CHARACTERS / 2)
    start = time.monotonic()
    for unit in ("characters", "words", "sentences", "lines", "paragraphs"):
        measure_length("." * 2_000_000, unit)
        measure_length('."' * 1_000_000, unit)
    assert time.monotonic() - start < 5
    assert measure_length(text, "words") == MAX_CHARACTERS


def test_an_exemplar_needs_its_similarities():
    rule = Rule("r", Exemplar("x"), at_least=0.5, soft=0.5)
    assert apply_rule(rule, [""] * 4, ["x"] * 4, [1.0, 0.25, None, -1.0])[0] == [1, 0.5, None, 0]
    with pytest.raises(UserError, match="rule r: similarities must be given"):
        apply_rule(rule, [""], ["x"])


def test_fresh_words():
    assert fresh_words("", "one two three four") == 1
    assert fresh_words("", "a b c A b c a b c") == 3 / 7
    assert fresh_words("", "two words") is None
