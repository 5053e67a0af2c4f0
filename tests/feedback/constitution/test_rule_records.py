"""Rules in every form of feedback: what the records say is what the rules find."""

from __future__ import annotations

import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.constitution.constitution import load_constitution
from rlaif_jax.feedback.constitution.rule_records import (
    rule_comments,
    rule_corrections,
    rule_rankings,
    rule_rater,
    rule_ratings,
)
from rlaif_jax.feedback.records.forms import Span, to_json
from rlaif_jax.feedback.records.parsing import from_json
from rlaif_jax.feedback.records.store import Store

FILE = """\
name = "tone"

[[rule]]
name = "rude"
words = ["idiot", "fool"]
replace = "friend"

[[rule]]
name = "thanks"
pattern = "(?i)thank you"

[[rule]]
name = "calm"
pattern = "!"
at_most = 1

[[rule]]
name = "brief"
length = "words"
at_most = 8

[[rule]]
name = "fresh"
predicate = "rlaif_jax.feedback.constitution.rules:fresh_words"
at_least = 1

[[formula]]
name = "polite"
formula = "thanks & !rude"
weight = 2.0
praise = "How polite."
blame = "Not polite."

[[formula]]
name = "calm"
formula = "calm & brief"

[[formula]]
name = "repeats"
formula = "!fresh"
weight = -0.5
"""
POLITE = "Thank you so much!"
RUDE = "Thank you, idiot! Fool! Go!"
LONG = "Thank you for one two three four five six seven"
SHORT = "Go on"


@pytest.fixture
def constitution(tmp_path):
    path = tmp_path / "tone.toml"
    path.write_text(FILE)
    return load_constitution(path)


def test_all_records_are_of_the_rule_rater_are_valid_and_the_same_again(constitution, tmp_path):
    prompts, answers = ["p"] * 4, [POLITE, RUDE, LONG, SHORT]

    def all_records():
        return [
            *rule_ratings(constitution, prompts, answers),
            *rule_rankings(constitution, ["p"], [answers]),
            *rule_comments(constitution, prompts, answers),
            *rule_corrections(constitution, prompts, answers),
        ]

    records = all_records()
    assert len(records) == 4 + 1 + 12 + 4
    assert {record.rater for record in records} == {rule_rater(constitution)}
    assert records[0].rater.name == "rule/tone"
    assert records[0].rater.source == "rule"
    assert records[0].rater.prompt_hash == constitution.hash
    for record in records:
        assert from_json(to_json(record)) == record
    with Store(tmp_path / "store.sqlite") as store:
        assert store.add(records) == len(records)
        assert store.add(all_records()) == 0


def test_ratings_are_rewards_on_the_scale_of_the_formulas(constitution):
    found = rule_ratings(constitution, ["p"] * 3, [POLITE, RUDE, LONG])
    assert [(r.low, r.high) for r in found] == [(-0.5, 3.0)] * 3
    assert [r.value for r in found] == pytest.approx([3.0, 0.0, 2.0])


def test_rankings_have_ties_and_leave_out_what_is_missing(constitution, tmp_path):
    found = rule_rankings(constitution, ["p", "q"], [[LONG, POLITE, RUDE, POLITE], [RUDE, RUDE]])
    assert found[0].ranks == (3, 1, 4, 1)
    assert found[0].status == "ok"
    assert (found[1].ranks, found[1].status) == ((1, 1), "tie")
    path = tmp_path / "fresh.toml"
    path.write_text(
        '[[rule]]\nname = "fresh"\npredicate = "rlaif_jax.feedback.constitution.rules:fresh_words"\n'
        '[[formula]]\nname = "f"\nformula = "fresh"\n'
    )
    fresh = load_constitution(path)
    found = rule_rankings(fresh, ["p", "q"], [["a a a a", "a b", "a b c"], ["a", "b c d"]])
    assert found[0].ranks == (2, None, 1)
    assert (found[1].status, found[1].ranks) == ("abstained", ())
    assert [r.status for r in rule_ratings(fresh, ["p"] * 2, ["a", "a b c"])] == ["abstained", "ok"]
    with pytest.raises(UserError, match="two or more answers; there are 1 to 'p'"):
        rule_rankings(fresh, ["p"], [["a"]])


def test_comments_praise_and_blame_formula_by_formula(constitution):
    found = rule_comments(constitution, ["p", "p"], [POLITE, RUDE])
    assert [c.aspects for c in found] == [("polite",), ("calm",), ("repeats",)] * 2
    assert [c.text for c in found] == [
        "How polite.",
        "Good: calm.",
        "Good: repeats.",
        "Not polite.",
        "Bad: not calm.",
        "Good: repeats.",
    ]
    assert all(c.principle == c.aspects[0] and c.confidence == 1 for c in found)
    short = rule_comments(constitution, ["p"], [SHORT])
    assert [c.status for c in short] == ["ok", "ok", "abstained"]  # two words: whether they repeat is not defined


def test_corrections_mark_the_places_with_their_effect_on_the_reward(constitution):
    polite, rude, long, short = rule_corrections(constitution, ["p"] * 4, [POLITE, RUDE, LONG, SHORT])
    assert polite.spans == (Span(0, 9, 2.0, "thanks"),)  # one ! is allowed
    assert polite.edited == POLITE
    # Rude already: thanks would not help. Three ! are too many.
    assert [(RUDE[s.start : s.end], s.value, s.category) for s in rude.spans] == [
        ("idiot", -2.0, "rude"),
        ("!", -1.0, "calm"),
        ("Fool", -2.0, "rude"),
        ("!", -1.0, "calm"),
        ("!", -1.0, "calm"),
    ]
    assert rude.edited is None  # nothing is known to put in the place of !
    assert long.spans == (Span(0, 9, 2.0, "thanks"),)
    assert long.edited is None  # too long: not as it should be, and no place to point at
    assert (short.status, short.spans) == ("abstained", ())


def test_an_answer_is_edited_where_every_fault_has_a_replacement(constitution):
    (found,) = rule_corrections(constitution, ["p"], ["Thank you, idiot and FOOL. Foolish though!"])
    assert found.edited == "Thank you, friend and friend. Foolish though!"
    assert [s.value for s in found.spans] == [-2.0, -2.0]


def test_faults_that_overlap_are_replaced_once(tmp_path):
    path = tmp_path / "overlap.toml"
    path.write_text(
        '[[rule]]\nname = "a"\nwords = ["old fool"]\nreplace = "friend"\n'
        '[[rule]]\nname = "b"\nwords = ["fool"]\nreplace = "person"\n'
        '[[formula]]\nname = "f"\nformula = "!a & !b"\n[[formula]]\nname = "g"\nformula = "!a"\n'
        '[[formula]]\nname = "h"\nformula = "!b"\n'
    )
    (found,) = rule_corrections(load_constitution(path), ["p"], ["You old fool, fool."])
    assert [(s.start, s.end, s.category) for s in found.spans] == [(4, 12, "a"), (8, 12, "b"), (14, 18, "b")]
    assert found.edited == "You friend, person."
