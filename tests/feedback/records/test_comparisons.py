"""Comparisons out of rankings and ratings, by hand."""

from __future__ import annotations

import pytest

from rlaif_jax.data.conversations import HUMAN
from rlaif_jax.feedback.records.comparisons import Comparison, comparisons
from rlaif_jax.feedback.records.formats import pairs, rows
from rlaif_jax.feedback.records.forms import Comment, Correction, Ranking, Rater, Rating

ANNA, BELA = Rater("anna", "person"), Rater("bela", "person")


def rating(answer, value, rater=ANNA, **more):
    return Rating(prompt="p", answers=(answer,), rater=rater, value=value, low=0, high=10, **more)


def compared(*judgements, **options):
    """{answers: (probability, degree, weight)} of the comparisons, with rounded numbers."""
    return {c.answers: tuple(round(x, 6) for x in c[2:]) for c in comparisons(judgements, **options).pairs}


def test_a_pair_has_its_winner_in_either_order():
    for winner, p in ((0, 1.0), (1, 0.0), (None, 0.5)):
        assert compared(rows.pair("p", ("a", "b"), winner, ANNA)) == {("a", "b"): (p, 0.0, 1.0)}
        assert compared(rows.pair("p", ("b", "a"), winner, ANNA)) == {("a", "b"): (1 - p, 0.0, 1.0)}


def test_a_probability_and_a_strength_are_kept():
    assert compared(rows.pair("p", ("b", "a"), 0, ANNA, probability=0.7)) == {("a", "b"): (0.3, 0.0, 1.0)}
    for strength, degree in ((1, 0.0), (3, 0.5), (5, 1.0)):
        assert compared(rows.pair("p", ("a", "b"), 1, ANNA, strength=strength)) == {("a", "b"): (0.0, degree, 1.0)}


def test_a_list_of_four_counts_as_three_comparisons():
    ranking = Ranking(prompt="p", answers=tuple("abcd"), rater=ANNA, ranks=(2, 1, 2, None))
    found = comparisons([ranking])
    weight = pytest.approx(2 / 3)
    assert [c[1:] for c in found.pairs] == [
        (("a", "b"), 0.0, 0.0, weight), (("a", "c"), 0.5, 0.0, weight), (("b", "c"), 1.0, 0.0, weight)
    ]  # fmt: skip
    assert found.unused == {"answer without a place in its ranking": 1}
    assert sum(c.weight for c in found.pairs) == pytest.approx(2)


def test_a_partial_order_has_the_pairs_that_it_names():
    ranking = Ranking(prompt="p", answers=tuple("abc"), rater=ANNA, beats=((2, 0), (2, 1)))
    assert compared(ranking) == {("a", "c"): (0.0, 0.0, 1.0), ("b", "c"): (0.0, 0.0, 1.0)}


def test_ratings_are_compared_within_a_judge():
    given = [rating("a", 2), rating("b", 7), rating("c", 7), rating("a", 10, BELA)]
    found = comparisons(given)
    weight = 2 / 3
    assert {c.answers: c[2:] for c in found.pairs} == {
        ("a", "b"): pytest.approx((0.0, 0.5, weight)),
        ("a", "c"): pytest.approx((0.0, 0.5, weight)),
        ("b", "c"): pytest.approx((0.5, 0.0, weight)),
    }
    assert found.unused == {"rating that no other of its judge to this prompt can be compared with": 1}


def test_ratings_by_one_judge_each_are_compared_by_their_means():
    given = [rating("a", 2), rating("b", 9, BELA), rating("a", 4, Rater("carl", "person"))]
    assert compared(*given) == {("a", "b"): (0.0, 0.6, 1.0)}


def test_a_judge_who_ranks_and_rates_has_one_verdict():
    given = [rows.pair("p", ("a", "b"), 0, ANNA), rating("a", 9), rating("b", 4)]
    assert compared(*given) == {("a", "b"): (1.0, 0.5, 1.0)}
    against = [rows.pair("p", ("a", "b"), 0, ANNA), rating("a", 4), rating("b", 9)]
    assert compared(*against) == {("a", "b"): (1.0, 0.5, 1.0)}, "the order is the ranking's"


def test_judges_are_averaged_with_their_weights():
    given = [rows.pair("p", ("a", "b"), w, Rater(name, "person")) for name, w in zip("xyz", (0, 0, 1))]
    assert compared(*given) == {("a", "b"): (round(2 / 3, 6), 0.0, 3.0)}
    strong = [
        rows.pair("p", ("a", "b"), 0, Rater("x", "person"), strength=1),
        rows.pair("p", ("a", "b"), 0, Rater("y", "person"), strength=2),
        rows.pair("p", ("a", "b"), 1, Rater("z", "person"), strength=5),
    ]
    assert compared(*strong) == {("a", "b"): (round(2 / 3, 6), 0.0, 3.0)}, "the far preference is the minority's"


def test_both_orders_of_one_judge_are_one_judgement():
    both = [rows.pair("p", ("a", "b"), 0, ANNA), rows.pair("p", ("b", "a"), 0, ANNA)]
    assert compared(*both) == {("a", "b"): (0.5, 0.0, 1.0)}


def test_criteria_are_judgements_of_their_own_unless_some_are_chosen():
    given = [rating(a, v, principle=p) for a, v, p in (("a", 1, "x"), ("b", 3, "x"), ("a", 9, "y"), ("b", 4, "y"))]
    assert compared(*given) == {("a", "b"): (0.5, 0.0, 2.0)}
    assert compared(*given, principles=("y",)) == {("a", "b"): (1.0, 0.5, 1.0)}
    assert comparisons(given, principles=("y",)).unused == {"rating by another criterion": 2}


def test_what_compares_no_answers_is_counted_by_reason():
    given = [
        Comment(prompt="p", answers=("a",), rater=ANNA, text="good"),
        Correction(prompt="p", answers=("a",), rater=ANNA, edited="b"),
        rows.unscored_pair("p", ("a", "b"), ANNA),
        rows.unscored_pair("p", ("a", "c"), ANNA),
        Rating(prompt="p", answers=("a",), rater=ANNA, status="refused"),
        rows.pair(f"x{HUMAN}", ("a", "b"), 0, ANNA),
        rows.pair("p", ("a", "a"), 0, ANNA),
        rating("a", 3),
    ]
    found = comparisons(given)
    assert found.pairs == []
    assert found.unused == {
        "comment: it does not compare answers": 1,
        "correction: it does not compare answers": 1,
        "ranking without a value (unparsed)": 2,
        "rating without a value (refused)": 1,
        "ranking of what a person says next": 1,
        "comparison of two equal answers": 1,
        "rating that no other of its judge to this prompt can be compared with": 1,
    }


@pytest.mark.parametrize(
    "file, read, count",
    [
        ("hh_harmless/test.jsonl", pairs.read_hh, 1838),
        ("oasst/en_100_tree.jsonl", pairs.read_oasst, 300),
    ],
)
def test_real_files_become_comparisons(file, read, count, shared_data):
    found = comparisons(read(shared_data(file))[0])
    assert len(found.pairs) >= 0.98 * count
    assert all(isinstance(c, Comparison) and c.answers[0] < c.answers[1] and c.weight > 0 for c in found.pairs)
    assert len({(c.prompt, c.answers) for c in found.pairs}) == len(found.pairs)
