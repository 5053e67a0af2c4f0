"""How a judge's comparisons with the answers before training become a win rate and an audit of the judge."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.recipes.judge_rewards import Verdicts
from rlaif_jax.recipes.verdicts import AgainstStart, audit, by_opinion


def answers(*texts: str, score: float = 0.0) -> Any:
    lengths = np.array([len(text) for text in texts])
    return SimpleNamespace(texts=list(texts), lengths=lengths, scores=np.full(len(texts), score))


def compared(judge: Any, before: Any, after: Any) -> dict[str, Any]:
    against = AgainstStart(judge, "second", [f"prompt {i}" for i in range(len(before.texts))], before)
    return against.metrics(after)


def by_position(prompts: Any, first: Any, second: Any) -> Verdicts:
    """Always prefers the answer that is shown first, a little less where the answer is new."""
    size = len(prompts)
    return Verdicts(np.full(size, 0.49), np.zeros(size, bool), np.full(size, 0.98), np.ones(size, bool))


def test_the_audit_is_of_the_pairs_that_were_asked_about():
    """Most answers are as before: these are ties, and say nothing about the judge."""
    before = answers("a", "b", "c", "d", "e", "f")
    found = compared(by_position, before, answers("A", "B", "c", "d", "e", "f", score=1.0))
    assert found["win_rate_second"] == pytest.approx(4 / 6 / 2)
    assert (found["second_order_consistency"], found["second_first_shown"]) == (0, pytest.approx(0.98))
    assert (found["second_missing"], found["second_agrees"]) == (0, 0)


def test_where_no_answer_changed_there_is_a_tie_and_no_audit():
    before = answers("a", "b", "c")
    found = compared(lambda *texts: pytest.fail("nothing is asked"), before, before)
    assert found["win_rate_second"] == 0.5 and not {"second_order_consistency", "second_missing"} & found.keys()


def test_a_judge_that_answers_nothing_has_no_win_rate():
    def silent(prompts: Any, first: Any, second: Any) -> Verdicts:
        nothing = np.zeros(len(prompts), bool)
        return Verdicts(np.full(len(prompts), 0.5), nothing, np.full(len(prompts), 0.5), nothing)

    found = compared(silent, answers("a", "b", "c"), answers("A", "b", "c"))
    assert found == {"second_missing": 1.0}


@pytest.mark.parametrize("ranks", [False, True])
def test_a_judge_that_ranks_by_position_is_warned_of(ranks):
    said: list[str] = []
    run: Any = SimpleNamespace(metrics={}, warn=said.append)
    audit(run, by_position, ranks, ["p", "q"], answers("a", "b"), answers("A", "B", score=1.0))
    assert run.metrics["judge_order_consistency"] == 0 and run.metrics["judge_first_shown"] == pytest.approx(0.98)
    assert len(said) == ranks and all("in only 0% of the pairs" in warning for warning in said)


def test_a_judge_that_cannot_compare_is_not_audited():
    def refuses(prompts: Any, first: Any, second: Any) -> Verdicts:
        raise UserError("'A' is not one token")

    said: list[str] = []
    run: Any = SimpleNamespace(metrics={}, warn=said.append)
    audit(run, refuses, False, ["p", "q"], answers("a", "b"), answers("A", "B", score=1.0))
    assert run.metrics == {}
    assert said == [
        "The judge that the policy learned from cannot compare answers, so it is not audited: 'A' is not one token"
    ]


def test_a_second_opinion_of_scores_is_a_win_rate():
    nan = float("nan")
    before, after = answers(*"abcd"), answers("aa", "bb", "cc", "dd")
    before.second, after.second = np.array([1.0, 2.0, 3.0, nan]), np.array([2.0, 2.0, 1.0, 5.0])
    found = by_opinion(before, after)
    assert found["win_rate_second"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert (found["second_opinion_before"], found["second_opinion_after"]) == (2.0, 2.5)
    after.second[1:] = nan
    assert by_opinion(before, after) == {}, "one pair has no interval"
