"""Each constraint on a table of answers, its instruction, and the reward of a record's constraints."""

import json
import re
import typing

import pytest

from rlaif_jax.config import UserError, from_json, to_json
from rlaif_jax.feedback.verifiers.constraints import (
    AllLowercase,
    AllUppercase,
    Constraint,
    Constraints,
    EndsWith,
    ExactWords,
    JsonKeys,
    ListItems,
    MaxSentences,
    MaxWords,
    MinSentences,
    MinWords,
    NoCommas,
    Paragraphs,
    Sentences,
    StartsWith,
    WithoutWord,
    WithWord,
    constraint_json,
    read_constraints,
    type_name,
)

# constraint -> its instruction, answers that satisfy it, answers that do not
CASES = {
    Sentences(1): (
        "Answer in one sentence.",
        ["One.", "one", "Is pi 3.14, e.g. here?"],
        ["One. Two.", "One! two", "- one\n- two", "...", ""],
    ),
    Sentences(2): (
        "Answer in exactly two sentences.",
        ["One. Two.", "One! Two", '"Why?" He left.'],
        ["One.", "One. Two. Three.", ""],
    ),
    MaxSentences(2): (
        "Use at most two sentences.",
        ["One. Two.", "One", "Dr. No met Mr. X at 5 p.m. They ate."],
        ["One. Two. Three.", "a\n\nb\n\nc", "One.Two words.Three words. Four"],
    ),
    MinSentences(3): (
        "Use at least three sentences.",
        ["One. Two. Three.", "One? Two! Three. Four.", "- a\n- b\n- c"],
        ["One. Two.", "One... two... three...", "3.1.4."],
    ),
    ExactWords(3): (
        "Use exactly three words.",
        ["one two three", "it's well-known now", " a \u2014 b: c! "],
        ["one two", "one two three four", "a - b"],
    ),
    MaxWords(20): (
        "Use at most 20 words.",
        ["word", "w " * 20, "w - " * 20],
        ["w " * 21, "w\n" * 30, "a--b " * 11],
    ),
    MinWords(1): ("Use at least one word.", ["word", "5", "a b"], ["-", "!!!", ""]),
    MinWords(3): ("Use at least three words.", ["a b c", "a\nb\tc d", "1 2 3"], ["a b", "a - b", "well-known-word"]),
    Paragraphs(1): ("Write one paragraph.", ["a", "a\nb", "\n\na\n\n"], ["a\n\nb", "a\n \nb", ""]),
    Paragraphs(3): (
        "Write three paragraphs, with blank lines between them.",
        ["a\n\nb\n\nc", "a\n\n\n\nb\n \nc", "\n\na\nb\n\nc\n\nd\n"],
        ["a\n\nb", "a\nb\nc", "a\n\nb\n\nc\n\nd"],
    ),
    ListItems(3): (
        'Give a list of three items, each on a line that begins with "- ".',
        ["- a\n- b\n- c", "So:\n1. a\n2. b\n3. c", "* a\n  * inner\n* b\n* c"],
        ["- a\n- b", "a\nb\nc", "-a\n-b\n-c", "- a\n- b\n- c\n- d"],
    ),
    WithWord("cat"): (
        'Use the word "cat".',
        ["A cat.", "CAT!", "the 'cat' sat"],
        ["cats", "concat", "cat_2", "a c a t"],
    ),
    WithWord("so far"): ('Use the phrase "so far".', ["So far, so good", "so\nfar", "so  far"], ["sofar", "so fart", "far"]),
    WithoutWord("cat"): (
        'Do not use the word "cat".',
        ["cats", "concat", "a dog"],
        ["a cat", "Cat", "cat-like"],
    ),
    WithWord("c++ (a.b)"): (
        'Use the phrase "c++ (a.b)".',
        ["In C++ (a.b) it", "c++ (a.b)", "c++  (a.b)."],
        ["cpp (a.b)", "c++ (axb)", "c"],
    ),
    StartsWith("Yes"): (
        'Begin your answer with "Yes".',
        ["Yes, it is", " \nYes", "Yes"],
        ["Yesterday", "yes", "Oh Yes", ""],
    ),
    StartsWith("Dear X:"): (
        'Begin your answer with "Dear X:".',
        ["Dear X:Y", "Dear X: a", "Dear X:"],
        ["Dear X", "dear x:", "X"],
    ),
    EndsWith("thank you"): (
        'End your answer with "thank you".',
        ["And thank you", "thank you.", "So: thank you! \n"],
        ["Bethank you", "Thank you", "thank you all", "thank you..", "thank"],
    ),
    EndsWith("Why?"): ('End your answer with "Why?".', ["Why?", "But Why? ", "so. Why?"], ["Why", "Why?!", "why?"]),
    AllLowercase(): ("Use only lowercase letters.", ["abc", "a 1!", "\u00e9t\u00e9"], ["Abc", "aBc", "123"]),
    AllUppercase(): ("Use only capital letters.", ["ABC", "A 1!", "\u00c9T\u00c9"], ["Abc", "ABc", "123"]),
    NoCommas(): ("Do not use commas.", ["abc", "a; b", "1.5"], ["a, b", "1,5", "a,"]),
    JsonKeys(("a", "b")): (
        'Answer with a JSON object that has the keys "a", "b" and no others.',
        ['{"a": 1, "b": 2}', '```json\n{"b": 1, "a": []}\n```', 'So:\n```\n{"a": {"c": 1}, "b": null}\n```'],
        ['{"a": 1}', '{"a": 1, "b": 2, "c": 3}', '["a", "b"]', "a b", 'So {"a": 1, "b": 2}', '"ab"'],
    ),
    JsonKeys(("a",)): (
        'Answer with a JSON object that has the key "a" and no others.',
        ['{"a": 1}', ' {"a": {}} ', '```JSON\n{"a": 0}\n```'],
        ["{}", '{"A": 1}', '{"a": NaN}'],
    ),
}  # fmt: skip


def test_every_constraint_has_cases():
    assert {type(constraint) for constraint in CASES} == set(typing.get_args(Constraint))
    assert all(
        len(right) + len(wrong) >= 6 and len(right) >= 3 and len(wrong) >= 3 for _, right, wrong in CASES.values()
    )


@pytest.mark.parametrize("constraint", CASES, ids=repr)
def test_instructions_and_answers(constraint):
    text, right, wrong = CASES[constraint]
    assert constraint.text() == text
    assert [answer for answer in right if not constraint.holds(answer)] == []
    assert [answer for answer in wrong if constraint.holds(answer)] == []


@pytest.mark.parametrize("constraint", CASES, ids=repr)
def test_constraints_in_records(constraint):
    """A record is JSON: what is written is read back, also from JSON text, and rewards 1 and 0."""
    _, right, wrong = CASES[constraint]
    values = json.loads(json.dumps([constraint_json(constraint)]))
    assert re.fullmatch(r"[a-z_]+", values[0]["type"])
    assert read_constraints(values, "constraints") == read_constraints(json.dumps(values), "c") == (constraint,)
    answers = right + wrong
    feedback = Constraints().build()([{"constraints": values}] * len(answers), answers)
    assert feedback.valid.all() and feedback.values[:, 0].tolist() == [1.0] * len(right) + [0.0] * len(wrong)


def test_names_in_records():
    assert [type_name(kind) for kind in (Sentences, MaxWords, WithoutWord, JsonKeys)] == [
        "sentences", "max_words", "without_word", "json_keys",
    ]  # fmt: skip


THREE = [{"type": "max_words", "count": 3}, {"type": "no_commas"}, {"type": "with_word", "word": "cat"}]


@pytest.mark.parametrize(
    "answer, held",
    [("a cat", 3), ("a, cat", 2), ("a, dog", 1), ("a, dog and b", 0), ("a b c cat", 2), ("", 0), (" !", 0)],
)
def test_the_reward_is_the_share_or_all_of_them(answer, held):
    records = [{"rules": THREE}]
    share = Constraints("rules").build()(records, [answer]).values.item()
    assert share == pytest.approx(held / 3, abs=1e-7)
    assert Constraints("rules", all_or_nothing=True).build()(records, [answer]).values.item() == (held == 3)


@pytest.mark.parametrize(
    "values, message",
    [
        (
            [{"type": "words", "count": 3}],
            r"c\[0\].type is 'words'; it is one of sentences, max_sentences, .*json_keys",
        ),
        ([{"count": 3}], r"c\[0\].type is None"),
        ([{"type": "no_commas"}, {"type": "max_words"}], r"c\[1\]: MaxWords misses count"),
        ([{"type": "max_words", "count": "3"}], r"c\[0\]: count: should be a whole number, not '3'"),
        ([{"type": "max_words", "count": 0}], r"c\[0\]: count must be at least 1, not 0"),
        ([{"type": "max_words", "count": 1, "word": "x"}], r"c\[0\]: word: MaxWords has no such field; it has count"),
        ([{"type": "with_word", "word": " "}], r"c\[0\]: word is empty"),
        ([{"type": "without_word", "word": ""}], r"c\[0\]: word is empty"),
        ([{"type": "starts_with", "start": ""}], r"c\[0\]: start is empty"),
        ([{"type": "ends_with", "end": ""}], r"c\[0\]: end is empty"),
        ([{"type": "json_keys", "keys": []}], r"c\[0\]: keys is empty"),
        (["max_words"], r"c\[0\] should be an object with a type, not 'max_words'"),
        ({"type": "max_words"}, "c should be a list of objects"),
        ("[{", "c is no JSON: "),
        ('"x"', "c should be a list of objects"),
    ],
)
def test_constraints_that_are_not_right(values, message):
    with pytest.raises(UserError, match=message) as raised:
        read_constraints(values, "c")
    assert "\n" not in str(raised.value)
    source = Constraints("c").build()
    feedback = source([{"c": values}, {"c": THREE}], ["a cat", "a cat"])
    assert feedback.valid[:, 0].tolist() == [False, True]
    ((reason, count),) = source.missing().items()
    assert count == 1 and re.match(f"the record's constraints are not right: {message}", reason)


@pytest.mark.parametrize("record", [{}, {"constraints": []}, {"constraints": None}, {"constraints": "[]"}])
def test_a_record_without_constraints_has_no_verdict(record):
    source = Constraints().build()
    assert not source([record], ["x"]).valid.any() and source.missing() == {"the record has no 'constraints'": 1}


def test_settings():
    config = Constraints("x", True)
    assert from_json(Constraints, to_json(config)) == config
    with pytest.raises(UserError, match=r"constraints\.field is empty"):
        Constraints("")
