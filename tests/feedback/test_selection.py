"""What to ask next: signals by hand and by enumeration, and the rules of choosing."""

import itertools
import math

import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.selection import (
    RANDOM,
    Selection,
    choose,
    ensemble_disagreement,
    judge_margin,
    order_disagreement,
)


def indices(choices):
    return [choice.index for choice in choices]


# ---- Signals


def test_ensemble_disagreement_is_mutual_information_by_enumeration():
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 2, size=(4, 30))
    p = 1 / (1 + np.exp(-margins))
    for n in range(30):
        joint = np.array([[p[m, n] / 4, (1 - p[m, n]) / 4] for m in range(4)])  # of model and verdict
        outer = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
        assert ensemble_disagreement(margins)[n] == pytest.approx(float((joint * np.log(joint / outer)).sum()))


def test_a_toss_up_that_all_agree_on_teaches_nothing():
    margins = np.array([[0.0, -4.0, 3.0, 1000.0], [0.0, 4.0, 3.0, -1000.0]])
    disagreement = ensemble_disagreement(margins)
    assert disagreement[0] == pytest.approx(0)
    assert disagreement[2] == pytest.approx(0, abs=1e-12)
    assert disagreement[3] == pytest.approx(math.log(2))
    assert disagreement[1] > 0.5
    assert judge_margin(1 / (1 + np.exp(-margins[0])))[0] == 1  # the margin alone cannot tell them apart


def test_margins_and_orders():
    np.testing.assert_allclose(judge_margin([0.5, 1, 0, 0.25]), [1, 0, 0, 0.5])
    # the first shown wins in both orders: a conflict; the same answer wins in both: none
    np.testing.assert_allclose(order_disagreement([0.9, 0.9, 0.1], [0.9, 0.1, 0.1]), [0.8, 0, 0.8])
    assert np.isnan(judge_margin([np.nan])[0])
    assert np.isnan(order_disagreement([np.nan], [0.5])[0])
    assert np.isnan(ensemble_disagreement([[np.nan], [1.0]])[0])


@pytest.mark.parametrize(
    "call",
    [
        lambda: judge_margin([1.2]),
        lambda: order_disagreement([0.5], [-0.1]),
        lambda: ensemble_disagreement([[1.0, 2.0]]),
        lambda: ensemble_disagreement([1.0, 2.0]),
    ],
)
def test_signals_refuse_what_is_none(call):
    with pytest.raises(UserError):
        call()


# ---- Choosing


def test_the_highest_come_first_and_no_prompt_twice():
    chosen = choose(3, {"x": [1, 5, 4, 3, 2]}, prompts=["a", "b", "b", "c", "d"])
    assert indices(chosen) == [1, 3, 4]
    assert [choice.score for choice in chosen] == [1, 0.5, 0.25]
    assert chosen[0].reason == "x 5, more than 100 % of the pool"
    assert indices(
        choose(3, {"x": [1, 5, 4, 3, 2]}, prompts=["a", "b", "b", "c", "d"], selection=Selection(per_prompt=2))
    ) == [1, 2, 3]


def test_signals_are_averaged_by_rank_and_weight_and_the_strongest_is_the_reason():
    signals = {"disagreement": [0, 1, 2, 3], "order": [300, 200, 0, 100]}
    prompts = list("abcd")
    chosen = {c.index: c for c in choose(4, signals, prompts=prompts)}
    np.testing.assert_allclose([chosen[i].score for i in range(4)], [0.5, 0.5, 1 / 3, 2 / 3])
    assert chosen[0].reason.startswith("order 300")
    assert chosen[3].reason.startswith("disagreement 3")
    weighed = choose(1, signals, prompts=prompts, selection=Selection(weights={"disagreement": 0.0}))
    assert indices(weighed) == [0]


def test_an_unknown_signal_has_no_say():
    signals = {"a": [0.0, 1.0, 2.0], "b": [np.nan, np.nan, np.nan]}
    assert indices(choose(3, signals, prompts=list("xyz"))) == [2, 1, 0]
    part = choose(3, {"a": [0.0, np.nan, 1.0]}, prompts=list("xyz"))
    assert indices(part) == [2, 1, 0]
    assert part[1].score == 0.5
    assert part[1].reason == "nothing known about it"


def test_duplicates_of_easy_items_are_not_asked_and_of_hard_ones_are():
    signals = {"x": np.arange(10.0)}
    items = [f"i{n // 2}" for n in range(10)]  # 0 and 1 are the same question, ...
    chosen = choose(10, signals, prompts=[str(n) for n in range(10)], items=items, selection=Selection(hard=0.85))
    assert indices(chosen) == [9, 8, 7, 5, 3, 1]  # only 8 is hard enough to be asked again
    assert "asked 1 x before" in chosen[1].reason
    before = choose(
        10,
        signals,
        prompts=[str(n) for n in range(10)],
        items=items,
        asked={"i4": 2, "i0": 1},
        selection=Selection(hard=0.85),
    )
    assert indices(before) == [9, 7, 5, 3]  # i4 now has three answers, enough; i0 is easy


def test_the_budget_is_never_exceeded_and_cheap_questions_fill_it():
    costs = np.array([5.0, 3.0, 3.0, 1.0, 1.0])
    for budget in np.linspace(0, 14, 29):
        chosen = choose(float(budget), {"x": [5, 4, 3, 2, 1]}, prompts=list("abcde"), costs=costs)
        assert costs[indices(chosen)].sum() <= budget + 1e-9
    assert indices(choose(6.5, {"x": [5, 4, 3, 2, 1]}, prompts=list("abcde"), costs=costs)) == [0, 3]
    assert choose(0, {"x": [1.0]}, prompts=["a"]) == []
    assert choose(5, {}, prompts=[]) == []


def test_the_same_seed_chooses_the_same_and_ties_are_broken_by_it():
    pool = {"x": np.zeros(50)}
    prompts = [str(n) for n in range(50)]
    assert choose(5, pool, prompts=prompts, seed=1) == choose(5, pool, prompts=prompts, seed=1)
    assert len({tuple(indices(choose(5, pool, prompts=prompts, seed=s))) for s in range(5)}) == 5


def test_no_signals_is_random_order_where_all_are_equally_likely():
    counts = np.zeros(6)
    for seed in range(600):
        counts[indices(choose(2, {}, prompts=list("abcdef"), seed=seed))] += 1
    assert counts.sum() == 1200
    assert (np.abs(counts - 200) < 50).all()


def test_a_share_is_drawn_at_random_and_says_so():
    signals = {"x": np.arange(100.0)}
    prompts = [str(n) for n in range(100)]
    chosen = choose(20, signals, prompts=prompts, selection=Selection(explore=0.5))
    assert len(chosen) == 20
    assert sum(choice.reason == RANDOM for choice in chosen) == 10
    assert len({*indices(chosen)}) == 20
    assert sum(choice.index >= 80 for choice in chosen) >= 10


def test_a_power_draws_in_proportion_to_the_score():
    """Two of three without replacement: chances as Plackett-Luce says."""
    signals, prompts = {"x": [1.0, 2.0, 3.0]}, list("abc")  # scores 0, 1/2, 1
    firsts = [choose(1, signals, prompts=prompts, seed=s, selection=Selection(power=2.0))[0].index for s in range(800)]
    assert firsts.count(0) == 0
    assert firsts.count(2) / 800 == pytest.approx(1 / (1 + 0.25), abs=0.05)


def test_every_round_of_random_pools_keeps_the_rules():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(1, 40))
        prompts = [str(p) for p in rng.integers(0, 15, n)]
        items = [str(p) for p in rng.integers(0, 20, n)]
        signals = {name: np.where(rng.random(n) < 0.2, np.nan, rng.random(n)) for name in ("a", "b")}
        costs = rng.uniform(0.5, 2, n)
        budget = float(rng.uniform(0, 15))
        rules = Selection(per_prompt=2, hard=0.7, max_asks=2, explore=0.3 * (seed % 3), power=[None, 1.0][seed % 2])
        chosen = choose(budget, signals, prompts=prompts, items=items, costs=costs, seed=seed, selection=rules)
        at = indices(chosen)
        assert len(at) == len(set(at))
        assert costs[at].sum() <= budget + 1e-9
        assert all(sum(prompts[i] == p for i in at) <= 2 for p in prompts)
        for item, group in itertools.groupby(sorted(at, key=lambda i: items[i]), key=lambda i: items[i]):
            again = [c for c in chosen if items[c.index] == item and "before" in c.reason]
            assert len(list(group)) == 1 + len(again) <= 2
            assert all(c.score >= 0.7 for c in again)


@pytest.mark.parametrize(
    "wrong",
    [
        {"signals": {"x": [1.0, 2.0]}},
        {"signals": {"x": [np.inf]}},
        {"budget": -1},
        {"budget": math.nan},
        {"costs": [0.0]},
        {"costs": [1.0, 1.0]},
        {"items": ["a", "b"]},
    ],
    ids=str,
)
def test_bad_input_is_refused(wrong):
    given = {"budget": 1, "signals": {"x": [1.0]}, "prompts": ["a"]} | wrong
    with pytest.raises(UserError):
        choose(given.pop("budget"), given.pop("signals"), **given)


@pytest.mark.parametrize(
    "wrong",
    [{"per_prompt": 0}, {"hard": 2}, {"max_asks": 0}, {"explore": -1}, {"power": 0}, {"weights": {"x": -1}}],
    ids=str,
)
def test_bad_settings_are_refused(wrong):
    with pytest.raises(UserError):
        Selection(**wrong)
