"""Rules about the world's summaries: what each predicate sees, and that the experiment's constitution names them."""

from pathlib import Path

import pytest

from rlaif_jax.feedback.constitution.constitution import load_constitution
from rlaif_jax.recipes.world import rules
from rlaif_jax.recipes.world.judges import by_rules, pool_of

PROMPT = "summarise sel mor : market damp vital river narrow minor ="
GOOD = "in sel mor the market damp ."
FALSE = "in sel mor the market narrow ."
CONSTITUTION = Path(__file__).resolve().parents[3] / "experiments" / "brindlemoor.toml"


def test_the_facts_are_read_off_the_prompt():
    assert rules.facts(PROMPT) == {"market": (3, "damp"), "river": (1, "narrow")}


@pytest.mark.parametrize(
    "answer, telling, faithful, fresh, town",
    [
        (GOOD, 0.75, 1.0, 1.0, 1.0),
        (FALSE, 0.0, 0.0, 1.0, 1.0),
        ("in sel mor the market damp and the market damp .", 0.75, 1.0, 0.0, 1.0),
        ("the market damp and the river narrow .", 1.0, 1.0, 1.0, 0.0),
    ],
)
def test_predicates(answer, telling, faithful, fresh, town):
    found = [getattr(rules, name)(PROMPT, answer) for name in ("telling", "faithful", "fresh", "town")]
    assert found == [telling, faithful, fresh, town]


def test_a_mended_answer_is_true_and_says_what_matters():
    mended = rules.mended(PROMPT, FALSE)
    assert rules.faithful(PROMPT, mended) == rules.telling(PROMPT, mended) == 1.0
    assert rules.mended(PROMPT, mended) == mended


def test_the_constitution_of_the_experiment_judges_in_every_form():
    constitution, pool = load_constitution(CONSTITUTION), pool_of([PROMPT] * 2, [GOOD, FALSE])
    assert pool == ((PROMPT,), ((GOOD, FALSE),))
    good, bad = by_rules("rating", pool, constitution)
    assert good.value > bad.value
    (ranking,) = by_rules("ranking", pool, constitution)
    assert ranking.ranks == (1, 2)
    assert [correction.edited for correction in by_rules("correction", pool, constitution)] == [
        rules.mended(PROMPT, answer) for answer in (GOOD, FALSE)
    ]
    assert all(comment.text for comment in by_rules("comment", pool, constitution))
