"""Agreement in the report: confusion by hand, alpha and kappa against their independent implementations."""

import itertools

import numpy as np
import pytest

from rlaif_jax.feedback.records.forms import Ranking, Rater, Rating
from rlaif_jax.quality.quality import quality
from tests.quality.records import ANN, BOB, FAST, JUDGE, only, verdict


def test_agreement_and_kappa_by_hand():
    """Ann and Bob on 10 pairs: 4 + 2 + 1 on the diagonal (first, second, tie); alike in orientation as "a" < "b"."""
    cells = [(0, 0)] * 4 + [(1, 1)] * 2 + [(None, None)] + [(0, 1)] * 2 + [(1, 0)]
    records = [
        verdict(f"p{i}", ("a", "bb"), rater, winner, shown=(0, 1))
        for i, pair in enumerate(cells)
        for rater, winner in zip((ANN, BOB), pair)
    ]
    report = quality(records, **FAST)["agreement"]["comparisons"]
    (row,) = report["raters"]
    chance = (6 * 5 + 3 * 4 + 1 * 1) / 100
    assert row["agreement"]["value"] == pytest.approx(0.7)
    assert row["kappa"]["value"] == pytest.approx((0.7 - chance) / (1 - chance))
    assert row["longer"]["value"] == pytest.approx(0.4)  # bob takes the longer one in 4 of 10
    assert row["first"]["value"] == pytest.approx(0.5)  # and what is shown first in 5
    assert 0.3 < row["agreement"]["low"] < 0.7 < row["agreement"]["high"] <= 1
    (sources,) = report["sources"]
    assert (sources["a"], sources["b"], sources["agreement"]["value"]) == ("person", "person", pytest.approx(0.7))
    assert [row["source"] for row in report["alpha"]] == ["person", "all"]


def test_alpha_of_comparisons_and_ratings_is_krippendorffs():
    import krippendorff

    rng = np.random.default_rng(1)
    raters = [Rater(f"r{k}", "person") for k in range(4)]
    table, marks = np.full((4, 25), np.nan), np.full((4, 25), np.nan)
    records = []
    for unit, k in itertools.product(range(25), range(4)):
        if rng.random() < 0.6:
            winner = int(rng.random() < 0.2 + 0.6 * (unit % 2))
            table[k, unit] = winner
            records.append(verdict(f"p{unit}", ("a", "b"), raters[k], winner))
            marks[k, unit] = np.clip(unit % 5 + rng.integers(-1, 2), 0, 10)
            records.append(
                Rating(prompt=f"p{unit}", answers=("a",), rater=raters[k], value=marks[k, unit], low=0, high=10)
            )
    agreement = quality(records, **FAST)["agreement"]
    found = only(agreement["comparisons"]["alpha"], source="person")["nominal"]["value"]
    assert found == pytest.approx(krippendorff.alpha(reliability_data=table, level_of_measurement="nominal"))
    for level in ("nominal", "ordinal", "interval"):
        found = only(agreement["ratings"]["alpha"], source="person")[level]["value"]
        assert found == pytest.approx(krippendorff.alpha(reliability_data=marks, level_of_measurement=level))


def test_ratings_agree_as_scikit_learn_says():
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(2)
    a = rng.integers(1, 6, 60)
    b = np.clip(a + rng.integers(-1, 2, 60), 1, 5)
    records = [
        Rating(prompt=f"p{i}", answers=("x",), rater=rater, value=float(v), low=1, high=5)
        for i, pair in enumerate(zip(a, b))
        for rater, v in zip((ANN, BOB), pair)
    ]
    (row,) = quality(records, **FAST)["agreement"]["ratings"]["raters"]
    assert row["agreement"]["value"] == pytest.approx(np.mean(a == b))
    assert row["kappa"]["value"] == pytest.approx(cohen_kappa_score(a, b, weights="quadratic"))
    assert row["correlation"]["value"] == pytest.approx(np.corrcoef(a, b)[0, 1])


def test_scales_are_compared_on_the_unit_interval_and_many_values_as_numbers():
    ten = [Rating(prompt=f"p{i}", answers=("x",), rater=ANN, value=1 + 9 * i / 4) for i in range(5)]
    five = [Rating(prompt=f"p{i}", answers=("x",), rater=BOB, value=1.0 + i, low=1, high=5) for i in range(5)]
    row = quality(ten + five, **FAST)["agreement"]["ratings"]["raters"][0]
    assert row["agreement"]["value"] == 1
    assert row["kappa"]["value"] == pytest.approx(1)
    many = [
        Rating(prompt=f"p{i}", answers=("x",), rater=rater, value=i + shift, low=0, high=100)
        for i in range(50)
        for rater, shift in ((ANN, 0), (BOB, 1))
    ]
    alpha = only(quality(many, **FAST)["agreement"]["ratings"]["alpha"], source="person")
    assert alpha["ordinal"]["value"] is None
    assert "interval" in alpha["ordinal"]["reason"]
    assert alpha["interval"]["value"] > 0.99


def test_an_order_conflict_is_half_a_vote_for_each_side_and_no_tie():
    records = []
    for i in range(8):
        records += [
            verdict(f"p{i}", ("a", "b"), JUDGE, 0, shown=(0, 1)),
            verdict(f"p{i}", ("a", "b"), JUDGE, 1, shown=(1, 0)),
        ]
        records.append(verdict(f"p{i}", ("a", "b"), ANN, i % 2))
    report = quality(records, **FAST)
    row = only(report["agreement"]["comparisons"]["sources"], a="ai", b="person")
    assert row["agreement"]["value"] == 0.5
    order = only(report["order"], rater="judge")
    assert (order["consistent"]["value"], order["same_position"]["value"]) == (0, 1)
    assert only(report["habits"], rater="judge")["ties"]["value"] == 0
    assert only(report["habits"], rater="judge")["first"]["value"] == 1


def test_principles_and_prompts_are_kept_apart():
    records = [
        verdict("p", ("a", "b"), ANN, 0, principle="kind"),
        verdict("p", ("a", "b"), BOB, 1, principle="brief"),
        verdict("q", ("a", "b"), BOB, 1, principle="kind"),
    ]
    assert quality(records, **FAST)["agreement"]["comparisons"]["raters"] == []


def test_a_long_ranking_is_its_pairs():
    records = [
        Ranking(prompt="p", answers=("a", "b", "c"), rater=ANN, ranks=(1, 2, 3)),
        Ranking(prompt="p", answers=("c", "b", "a"), rater=BOB, ranks=(1, 3, 2)),
    ]
    (row,) = quality(records, **FAST)["agreement"]["comparisons"]["raters"]
    assert (row["count"], row["agreement"]["value"]) == (3, pytest.approx(1 / 3))  # they agree on a > b alone
