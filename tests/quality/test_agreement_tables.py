"""Agreement in the report: confusion by hand, alpha and kappa against their independent implementations."""

import dataclasses
import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_jax.feedback.records.forms import Ranking, Rater, Rating
from rlaif_jax.quality.quality import quality
from rlaif_jax.quality.text import quality_text
from rlaif_jax.report.quality_section import page_of
from tests.quality.records import ANN, BOB, FAST, JUDGE, only, verdict

BOB_JUDGE = Rater("other", "ai")


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


# ---- Labels


def labels(given, classes):
    """Records of choices: {rater: {item: index of the class}}."""
    options = tuple(f"l{i}" for i in range(classes))
    return [
        Ranking(prompt=f"t{item}", answers=options, rater=rater, ranks=tuple(1 + (i != c) for i in range(classes)))
        for rater, of_items in given.items()
        for item, c in of_items.items()
    ]


def test_labels_at_random_agree_as_often_as_chance():
    """10 classes, two raters at random: they agree on a tenth, whatever options both did not choose."""
    rng = np.random.default_rng(0)
    given = {rater: dict(enumerate(rng.integers(10, size=300).tolist())) for rater in (ANN, BOB)}
    report = quality(labels(given, 10), **FAST)["agreement"]
    (row,) = report["labels"]["raters"]
    assert row["agreement"]["value"] == pytest.approx(np.mean([given[ANN][k] == given[BOB][k] for k in range(300)]))
    assert row["agreement"]["value"] < 0.15 and abs(row["kappa"]["value"]) < 0.06
    assert row["kappa"]["low"] < 0 < row["kappa"]["high"]
    assert report["comparisons"]["raters"] == []


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 6), st.integers(0, 10**6))
def test_agreement_on_labels_is_that_of_other_programs(classes, seed):
    import krippendorff
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(seed)
    raters = [ANN, BOB, Rater("cat", "person"), JUDGE]
    truth = rng.integers(classes, size=25)
    table = np.where(rng.random((4, 25)) < 0.5, truth, rng.integers(classes, size=(4, 25))).astype(float)
    table[rng.random((4, 25)) < 0.3] = np.nan
    given = {r: {i: int(c) for i, c in enumerate(row) if not np.isnan(c)} for r, row in zip(raters, table)}
    report = quality(labels(given, classes), **FAST)["agreement"]["labels"]
    for row in report["raters"]:
        a, b = (next(g for r, g in given.items() if r.name == row[side]) for side in "ab")
        both = sorted(a.keys() & b.keys())
        one, two = [a[i] for i in both], [b[i] for i in both]
        assert row["count"] == len(both)
        assert row["agreement"]["value"] == pytest.approx(np.mean(np.array(one) == two))
        assert row["most_common"]["value"] == pytest.approx(max(map(two.count, two)) / len(two))
        if len({*one, *two}) > 1:
            assert row["kappa"]["value"] == pytest.approx(cohen_kappa_score(one, two), abs=1e-12)
    everyone = only(report["alpha"], source="all")["nominal"]["value"]
    assert everyone == pytest.approx(krippendorff.alpha(reliability_data=table, level_of_measurement="nominal"))


def test_labels_that_a_rater_changed_are_shared_and_repeats_are_counted():
    given = {ANN: {0: 0, 1: 1}, BOB: {0: 0, 1: 2}}
    again = [dataclasses.replace(record, time=1.0) for record in labels({ANN: {0: 1, 1: 1}}, 3)]
    report = quality([*labels(given, 3), *again], **FAST)
    (row,) = report["agreement"]["labels"]["raters"]
    assert row["agreement"]["value"] == pytest.approx(1 / 4)  # half of item 0, nothing of item 1
    assert only(report["repeats"], form="label")["same"]["value"] == 0.5


def test_the_cost_of_labels_is_linear_in_the_classes():
    """1,500 labels: 200 classes take about as long as 3; as pairs they would be 30 million."""
    rng = np.random.default_rng(0)

    def seconds(classes):
        made = labels(
            {r: dict(enumerate(rng.integers(classes, size=500).tolist())) for r in (ANN, BOB, JUDGE)}, classes
        )
        start = time.process_time()
        quality(made, **FAST)
        return time.process_time() - start

    assert seconds(200) < 20 * seconds(3) + 2


# ---- Judges against people


@pytest.mark.parametrize("form", ["comparisons", "ratings", "labels"])
def test_a_judge_that_says_the_opposite_is_said_to_be_worse_than_chance(form):
    rng = np.random.default_rng(1)
    records = []
    for i in range(60):
        person, opposed = (c := int(rng.integers(3))), (c + int(rng.integers(1, 3))) % 3
        for rater, value in ((ANN, person), (JUDGE, opposed), (BOB_JUDGE, person if rng.random() < 0.7 else opposed)):
            if form == "comparisons":
                records.append(verdict(f"p{i}", ("a", "b"), rater, (0, 1, None)[value]))
            elif form == "labels":
                records += labels({rater: {i: value}}, 3)
            else:
                value = value if rater is not JUDGE else 2 - person
                records.append(Rating(prompt=f"p{i}", answers=("x",), rater=rater, value=value, low=0, high=2))
    report = quality(records, **FAST)
    low, fine = (only(report["agreement"][form]["judges"], rater=name)["kappa"] for name in ("judge", "other"))
    assert low["high"] < 0 < fine["low"]
    for shown in (quality_text(report), page_of(report).note):
        assert f"judge is WORSE THAN CHANCE against people: kappa {low['value']:.3f}" in shown
        assert shown.count("WORSE THAN CHANCE") == 1
    assert any(table.title == f"Judges against people on {form}" for table in page_of(report).tables)


def test_chance_itself_is_not_worse_than_chance():
    rng = np.random.default_rng(2)
    records = [verdict(f"p{i}", ("a", "b"), rater, int(rng.integers(2))) for i in range(60) for rater in (ANN, JUDGE)]
    assert "WORSE THAN CHANCE" not in quality_text(quality(records, **FAST))


def test_judges_are_compared_with_people_together():
    """Two people of three say "a": the judge's "a" agrees with 2/3 of a vote."""
    cat = Rater("cat", "person")
    records = [
        verdict(f"p{i}", ("a", "b"), rater, winner)
        for i in range(6)
        for rater, winner in ((ANN, 0), (BOB, 0), (cat, 1), (JUDGE, 0))
    ]
    row = only(quality(records, **FAST)["agreement"]["comparisons"]["judges"], rater="judge")
    assert (row["count"], row["agreement"]["value"]) == (6, pytest.approx(2 / 3))
