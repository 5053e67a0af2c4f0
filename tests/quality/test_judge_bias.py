"""Habits of raters in the report: planted biases of order and length are found."""

import dataclasses
import math

import numpy as np
import pytest

from rlaif_jax.feedback.records.forms import Rating
from rlaif_jax.quality.quality import quality
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
