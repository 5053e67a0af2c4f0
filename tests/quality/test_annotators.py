"""Agreement among the raters of the annotation page: by hand."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_jax.feedback.people.kinds import COMMENT, COMPARE, RATE
from rlaif_jax.feedback.people.queue import Post
from rlaif_jax.feedback.records.forms import Comment, Ranking, Rater, Rating
from rlaif_jax.quality.annotators import annotator_agreement


def post(rater, task, record, **fields):
    answers = ("a", "b") if record is Ranking else ("a",)
    made = record(prompt="p", answers=answers, rater=Rater(rater, "person"), **fields)
    return Post(rater, "answer", task, {}, (made,), 1.0, False)


def test_each_kind_that_two_raters_share_has_a_row():
    kinds = {"c1": COMPARE, "c2": COMPARE, "r1": RATE, "s1": COMMENT}
    posts = [
        post("anna", "c1", Ranking, ranks=(1, 2)),
        post("ben", "c1", Ranking, ranks=(1, 2)),
        post("anna", "c2", Ranking, ranks=(1, 2)),
        post("ben", "c2", Ranking, ranks=(2, 1)),
        post("anna", "r1", Rating, value=3.0),  # by one rater alone
        post("anna", "s1", Comment, text="x"),
        post("ben", "s1", Comment, text="x"),
        post("ben", "unknown", Comment, text="x"),
    ]
    (row,) = annotator_agreement(posts, kinds)
    assert (row["kind"], row["units"], row["same"]) == ("compare", 2, 0.5)
    # Three "first" and one "second": observed disagreement 1/2, expected 2 * 3 * 1 / (4 * 3) = 1/2.
    assert row["alpha"] == pytest.approx(0.0)


def test_ratings_on_different_scales_are_pooled_on_one():
    """Half the tasks on 1 .. 5, half on 1 .. 100, raters at random: there is no agreement, whatever the scales."""
    generator, posts, kinds = random.Random(0), [], {}
    units: list[list[float]] = [[], []]
    for number in range(60):
        low, high = ((1, 5), (1, 100))[number % 2]
        kinds[f"t{number}"] = RATE
        for rater, row in zip("ab", units):
            value = generator.randint(low, high)
            posts.append(post(rater, f"t{number}", Rating, value=float(value), low=float(low), high=float(high)))
            row.append((value - low) / (high - low))
    (row,) = annotator_agreement(posts, kinds)
    assert row["alpha"] == pytest.approx(interval_alpha_of_pairs(*map(np.array, units)))
    assert row["alpha"] < 0.3  # the raw values, pooled, give .70


def interval_alpha_of_pairs(first, second):
    """Krippendorff's alpha of two raters with squared distances, by its definition over all pairs of values."""
    values = np.concatenate([first, second])
    expected = np.mean([(a - b) ** 2 for i, a in enumerate(values) for j, b in enumerate(values) if i != j])
    return 1 - np.mean((first - second) ** 2) / expected


@settings(deadline=None)
@given(st.integers(0, 10), st.sampled_from([(0, 10), (1, 2), (1, 5), (-3, 3), (0.1, 0.7)]))
def test_one_place_on_two_scales_is_the_same_rating(tenths, scale):
    low, high = scale
    value = min(max(low + (high - low) * tenths / 10, low), high)
    posts = [
        post("anna", "r", Rating, value=float(tenths), low=0.0, high=10.0),
        post("ben", "r", Rating, value=value, low=float(low), high=float(high)),
    ]
    assert annotator_agreement(posts, {"r": RATE})[0]["same"] == 1
