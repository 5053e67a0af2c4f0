"""Win rates in the report: matches of generators by hand, length control, debiasing."""

import numpy as np
import pytest

from rlaif_jax.quality.quality import quality
from rlaif_jax.quality.win_rates import length_controlled_win_rate
from tests.quality.records import ANN, FAST, JUDGE, matches, only, verdict


def test_models_that_wrote_the_same_texts_have_their_own_wins():
    """Judged first on behalf of m and n, then of n and m: each won once."""
    records = [
        verdict("p", ("a", "b"), JUDGE, 0, generators=("m", "n")),
        verdict("p", ("b", "a"), JUDGE, 1, generators=("m", "n")),
        verdict("p", ("a", "b"), JUDGE, 0, generators=("k", "n")),
    ]
    rows = quality(records, **FAST)["win_rates"]["rows"]
    row = only(rows, a="m", b="n")
    assert (row["count"], row["wins"], row["losses"], row["rate"]["value"]) == (2, 1, 1, 0.5)
    assert only(rows, a="k", b="n")["wins"] == 1


def test_records_without_writers_speak_of_the_only_ones():
    records = [
        verdict("p", ("a", "b"), ANN, 0),
        verdict("p", ("b", "a"), JUDGE, 1, generators=("n", "m")),
    ]
    report = quality(records, **FAST)
    assert only(report["win_rates"]["rows"], source="person", a="m", b="n")["wins"] == 1
    assert report["agreement"]["comparisons"]["raters"][0]["agreement"]["value"] == 1


def test_equal_answers_of_two_models_are_a_tie():
    records = [
        verdict("p", ("a", "b"), JUDGE, 0, generators=("m", "n")),
        verdict("q", ("c", "c"), JUDGE, 0, generators=("n", "m")),
        verdict("q", ("c", "c"), JUDGE, 1, generators=("m", "n")),  # the same again
        verdict("r", ("c", "c"), JUDGE, 0, generators=("m", "m")),  # one model's twice: no match
    ]
    report = quality(records, **FAST)
    (row,) = report["win_rates"]["rows"]
    assert (row["count"], row["wins"], row["ties"], row["losses"]) == (2, 1, 1, 0)
    assert row["rate"]["value"] == 0.75
    assert only(report["habits"], rater="judge")["count"] == 1  # a verdict on equal answers shows no habit
    (only_ties,) = quality(records[1:2], **FAST)["win_rates"]["rows"]
    assert (only_ties["ties"], only_ties["rate"]["value"]) == (1, 0.5)


def test_the_three_win_rates():
    records = matches(np.random.default_rng(5))
    report = quality(records, **FAST)
    rows = report["win_rates"]["rows"]
    judge = only(rows, source="ai")
    wins = np.array([r.ranks == (1, 2) for r in records if r.rater is JUDGE], float)
    longer = np.array([len(r.answers[0]) - len(r.answers[1]) for r in records if r.rater is JUDGE])
    assert judge["rate"]["value"] == pytest.approx(wins.mean())
    assert (judge["wins"], judge["ties"], judge["losses"]) == (wins.sum(), 0, 200 - wins.sum())
    expected = length_controlled_win_rate(wins, longer)
    assert judge["length_controlled"]["value"] == pytest.approx(expected.value)
    people = only(rows, source="person")
    debiased = only(rows, source="ai, debiased")
    assert (debiased["count"], debiased["labelled"]) == (200, 60)
    assert debiased["alone"]["value"] == pytest.approx(people["rate"]["value"])
    width = lambda e: e["high"] - e["low"]
    assert width(debiased["rate"]) < width(debiased["alone"])
    assert debiased["rate"]["low"] < 0.5 < debiased["rate"]["high"] < judge["rate"]["high"]
    assert [row["labels"] for row in debiased["budget"]] == [25, 50, 100, 200]


def test_a_reference_is_the_opponent_and_ties_are_half():
    records = [
        verdict("p", ("a", "b"), ANN, 0, generators=("base", "x")),
        verdict("q", ("a", "b"), ANN, None, generators=("x", "base")),
        verdict("r", ("a", "b"), ANN, 0, generators=("x", "y")),
        verdict("s", ("a", "b"), ANN, 0, generators=("x", "x")),
    ]
    (row,) = quality(records, reference="base", **FAST)["win_rates"]["rows"]
    assert (row["a"], row["b"], row["wins"], row["ties"], row["losses"]) == ("x", "base", 0, 1, 1)
    assert row["rate"]["value"] == 0.25
    assert len(quality(records, **FAST)["win_rates"]["rows"]) == 2


def test_few_labels_debias_nothing():
    row = only(
        quality(matches(np.random.default_rng(6), labelled=4), **FAST)["win_rates"]["rows"], source="ai, debiased"
    )
    assert row["rate"]["value"] is None
    assert "4 of these pairs" in row["rate"]["reason"]
