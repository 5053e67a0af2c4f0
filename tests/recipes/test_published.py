"""Measures of published feedback, on small files: what the intervals draw, and what is left out."""

import numpy as np
import pytest

from rlaif_jax.quality.intervals import Jackknife, share_interval
from rlaif_jax.quality.statistics import interval_alpha, interval_moments, lowest_interval_alpha
from rlaif_jax.recipes.published import compare_models, ranked, summaries
from tests.recipes.squality_file import turning, upwards, write_squality


def test_the_interval_of_workers_agreement_is_over_questions(tmp_path):
    """In even questions the second worker agrees in everything, in odd ones in nothing."""
    rows = list(summaries(write_squality(tmp_path, upwards, turning)))
    alphas, alike = rows[:3], rows[3:]
    moments = [
        sum(interval_moments([0.9 - 0.3 * k, 0.9 - 0.3 * (2 - k if q % 2 else k)]) for k in range(3)) for q in range(12)
    ]
    expected = Jackknife().estimate(np.array(moments), interval_alpha, lowest=lowest_interval_alpha)
    for row in alphas:
        assert (row.value, row.low, row.high) == pytest.approx(tuple(expected[k] for k in ("value", "low", "high")))
    by_question = [float(q % 2 == 0) for q in range(12)]
    for row in alike:
        assert (row.value, row.low, row.high) == pytest.approx(share_interval(by_question))


def test_an_item_that_no_rating_is_left_of_is_not_compared():
    item, rater = np.array([0, 0, 1, 1, 2, 2, 3], np.int32), np.array([0, 1, 0, 1, 0, 1, 0], np.int32)
    value = np.array([1, 2, 2, 3, 3, 4, 9], np.float32)
    utilities = ranked(item, rater, value, np.arange(7) != 6, 4, 2)
    assert all(np.isnan(scores).tolist() == [False, False, False, True] for scores in utilities.values())
    rows = list(compare_models(utilities, np.array([1.0, 2, 3, 9]), 0, ""))
    assert [row.value for row in rows[:3]] == pytest.approx([1, 1, 1])  # with item 3 as 0 it would be less
