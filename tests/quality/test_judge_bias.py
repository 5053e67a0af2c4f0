"""Habits of raters in the report: planted biases of order and length are found."""

import dataclasses
import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_jax.feedback.api.verdicts import preference
from rlaif_jax.feedback.records.forms import Rater, Rating
from rlaif_jax.quality.quality import quality
from rlaif_jax.quality.text import quality_text
from rlaif_jax.report.quality_section import page_of
from rlaif_jax.rewards.log_odds import CLIP
from rlaif_jax.rewards.rankings import both_orders
from tests.quality.records import ANN, BOB, FAST, JUDGE, only, probable, verdict


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_an_order_that_was_not_recorded_is_no_order():
    """As in HH and distilabel, whose records name the better answer first."""
    records = [verdict(f"p{i}", ("b", "a"), rater, 0) for i in range(8) for rater in (ANN, BOB)]
    records += [verdict("q", ("b", "a"), ANN, 1, shown=(1, 0))]
    report = quality(records, **FAST)
    assert only(report["habits"], rater="bob")["first"]["value"] is None
    assert only(report["habits"], rater="ann")["first"]["value"] == 1  # of the one verdict whose order is known
    (row,) = report["agreement"]["comparisons"]["raters"]
    assert row["agreement"]["value"] == 1
    assert row["first"]["value"] is None
    mixed = [verdict("p", ("a", "b"), JUDGE, 0), verdict("p", ("a", "b"), JUDGE, 0, shown=(1, 0))]
    assert quality(mixed, **FAST)["order"] == []


@pytest.mark.parametrize("bias", [0.0, 0.8, -1.5])
def test_a_planted_position_bias_is_recovered_and_cancels(bias):
    rng = np.random.default_rng(3)
    records, flips = [], 0
    for i in range(150):
        margin = rng.normal(0, 1.2)
        front, back = sigmoid(margin + bias), sigmoid(margin - bias)  # P(a better) when a, when b is shown first
        flips += (front > 0.5) != (back > 0.5)
        records += [probable(f"p{i}", ("a", "b"), (0, 1), front), probable(f"p{i}", ("a", "b"), (1, 0), back)]
        records.append(verdict(f"p{i}", ("a", "b"), ANN, int(margin < 0)))
    report = quality(records, **FAST)
    row = only(report["order"], rater="judge")
    assert row["bias"]["value"] == pytest.approx(bias, abs=1e-9)
    assert row["consistent"]["value"] == pytest.approx(1 - flips / 150)
    assert row["same_position"]["value"] == pytest.approx(flips / 150)
    chance = [(r["probability"] if isinstance(r, dict) else r.probability) for r in records if r.rater is JUDGE]
    mean = np.array(chance).reshape(-1, 2).mean(1)  # both orders averaged
    right = np.array([r.ranks[0] == 1 for r in records if r.rater is ANN], float)
    assert only(report["calibration"], rater="judge")["brier"]["value"] == pytest.approx(np.mean((mean - right) ** 2))


def test_a_judge_in_words_has_no_b_but_a_same_position_rate():
    records = [
        verdict(f"p{i}", ("a", "b"), JUDGE, int(s == (1, 0)), shown=s) for i in range(5) for s in ((0, 1), (1, 0))
    ]
    row = only(quality(records, **FAST)["order"], rater="judge")
    assert row["bias"] == {"value": None, "low": None, "high": None, "reason": "the judge gives no probabilities"}
    assert row["same_position"]["value"] == 1


def test_repeats():
    records = [verdict(f"p{i}", ("a", "b"), JUDGE, w, seed=s) for i in range(4) for s, w in enumerate((0, 0, i % 2))]
    records += [
        Rating(prompt=f"p{i}", answers=("a",), rater=BOB, value=v, low=1, high=5, time=v)
        for i in range(2)
        for v in (2, 4)
    ]
    rows = quality(records, **FAST)["repeats"]
    assert only(rows, rater="judge")["same"]["value"] == pytest.approx((1 + 1 / 3) / 2)
    assert only(rows, rater="bob")["same"]["value"] == 0
    assert only(rows, rater="bob")["distance"]["value"] == pytest.approx(0.5)


def test_the_length_slope_is_the_judges_alone():
    """People do not care for length (slope 0 however long), the judge takes the longer one."""
    rng = np.random.default_rng(4)
    records, x, gap = [], [], []
    for i in range(200):
        answers = ("a" * int(rng.integers(1, 40)), "b" * int(rng.integers(1, 40)))
        longer = len(answers[0]) - len(answers[1])
        judged, person = (1 - int(longer > 0) if longer else None), int(rng.integers(2))
        records += [verdict(f"p{i}", answers, JUDGE, judged), verdict(f"p{i}", answers, ANN, person)]
        x.append(longer)
        gap.append((0.5 if judged is None else 1 - judged) - (1 - person))
    report = quality(records, **FAST)
    row = only(report["length_slope"], rater="judge")
    x = np.array(x) / np.sqrt(np.mean(np.square(x)))
    assert row["slope"]["value"] == pytest.approx(np.linalg.lstsq(x[:, None], np.array(gap), rcond=None)[0][0])
    assert row["slope"]["low"] > 0.2
    same = only(
        quality([r if r.rater is ANN else dataclasses.replace(r, ranks=(2, 1), status="ok") for r in records], **FAST)[
            "length_slope"
        ],
        rater="judge",
    )
    assert same["slope"]["low"] < 0 < same["slope"]["high"]


# ---- One clip of the log-odds


@pytest.mark.parametrize("chances", [(1.0, 1.0), (1 - 1e-12, 0.3), (1e-7, 0.9), (0.99995, 0.5), (0.7, 0.2)])
def test_the_tool_the_rewards_and_the_report_have_one_position_bias(chances):
    """P(the first answer is better) when it, and when the other one, is shown first."""
    front, back = chances
    records = [probable("p", ("a", "b"), (0, 1), front), probable("p", ("a", "b"), (1, 0), back)]
    reported = only(quality(records, **FAST)["order"], rater="judge")["bias"]["value"]
    by_tool = preference(records)
    better, bias = both_orders(jnp.array([front]), jnp.array([1 - back]))
    assert reported == pytest.approx(by_tool.bias) == pytest.approx(float(bias[0]), abs=1e-2)  # float32
    assert float(better[0]) == pytest.approx(by_tool.probability, abs=1e-5)
    assert abs(reported) <= math.log((1 - CLIP) / CLIP) + 1e-9
    inside = [min(max(p, CLIP), 1 - CLIP) for p in chances]
    expected = (math.log(inside[0] / (1 - inside[0])) - math.log(inside[1] / (1 - inside[1]))) / 2
    assert reported == pytest.approx(expected)


# ---- Ratings against people's comparisons


def scored(prompt, answer, value, rater=JUDGE, **more):
    return Rating(prompt=prompt, answers=(answer,), rater=rater, value=value, **{"low": 0, "high": 10, **more})


def test_ratings_against_comparisons_by_hand():
    """Right on p0, p1; wrong on p2; tied on p3; people are undecided on p4; the judge did not rate p5's second answer."""
    values = [(9, 2), (7, 6), (1, 8), (5, 5), (9, 1), (9, None)]
    records = [verdict(f"p{i}", ("b", "a"), ANN, None if i == 4 else 0) for i in range(6)]
    for i, pair in enumerate(values):
        records += [scored(f"p{i}", text, v) for text, v in zip("ba", pair) if v is not None]
    records.append(Rating(prompt="p5", answers=("a",), rater=JUDGE, status="unparsed"))
    (row,) = quality(records, **FAST)["scores"]
    assert (row["right"], row["wrong"], row["ties"], row["count"], row["undecided"]) == (2, 1, 1, 4, 1)
    assert row["accuracy"]["value"] == pytest.approx(2.5 / 4)
    assert row["accuracy"]["low"] < 2.5 / 4 < row["accuracy"]["high"]
    report = quality(records, **FAST)
    assert "Ratings against people's comparisons" in quality_text(report)
    assert any(table.title.startswith("Ratings against") for table in page_of(report).tables)


def test_ratings_of_other_scales_principles_and_people_are_kept_apart():
    records = [
        verdict("p", ("a", "b"), ANN, 0),
        scored("p", "a", 3, low=1, high=5),  # .5 of its scale
        scored("p", "b", 4, low=0, high=10),  # .4 of its scale
        scored("p", "a", 1, BOB),  # people's ratings are not the judge's
        scored("p", "b", 2, BOB),
        scored("p", "a", 0, principle="kind"),
        scored("p", "b", 9, principle="kind"),
    ]
    (row,) = quality(records, **FAST)["scores"]
    assert (row["rater"], row["right"], row["count"]) == ("judge", 1, 1)
    assert quality(records[1:], **FAST)["scores"] == []  # nobody compared


def test_an_adjudication_alone_says_which_answer_should_have_the_better_rating():
    records = [verdict("p", ("a", "b"), ANN, 0), scored("p", "a", 3), scored("p", "b", 4)]
    final = verdict("p", ("a", "b"), Rater("adjudicated by ann", "person"), 1)
    assert quality(records, **FAST)["scores"][0]["wrong"] == 1
    assert quality([*records, final], **FAST)["scores"][0]["right"] == 1


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([0, 1, None]), *[st.lists(st.integers(0, 4), max_size=3)] * 2),
        max_size=12,
    )
)
def test_ratings_against_comparisons_are_counted_as_by_hand(pairs):
    records, right, wrong, ties, undecided = [], 0, 0, 0, 0
    for number, (prompt, winner, *ratings) in enumerate(pairs):
        texts = (f"{number}a", f"{number}b")
        records.append(verdict(f"p{prompt}", texts, ANN, winner))
        for text, values in zip(texts, ratings):
            records += [scored(f"p{prompt}", text, v, high=4, seed=s) for s, v in enumerate(values)]
        if all(ratings):
            one, two = (Fraction(sum(values), len(values)) for values in ratings)
            undecided += winner is None
            if winner is not None:
                ties += one == two
                right += one != two and (one > two) == (winner == 0)
                wrong += one != two and (one > two) != (winner == 0)
    rows = quality(records, **FAST)["scores"]
    if right + wrong + ties + undecided == 0:
        assert rows == []
        return
    (row,) = rows
    assert (row["right"], row["wrong"], row["ties"], row["undecided"]) == (right, wrong, ties, undecided)
    value = row["accuracy"]["value"]
    assert value == (pytest.approx((right + ties / 2) / row["count"]) if row["count"] else None)
