"""Measures of published crowds, on a few numbers: an item without a rating is left out."""

import numpy as np
import pytest

from rlaif_jax.recipes.published.crowds import compared, ranked


def test_an_item_that_no_rating_is_left_of_is_not_compared():
    item, rater = np.array([0, 0, 1, 1, 2, 2, 3], np.int32), np.array([0, 1, 0, 1, 0, 1, 0], np.int32)
    value = np.array([1, 2, 2, 3, 3, 4, 9], np.float32)
    utilities = ranked(item, rater, value, np.arange(7) != 6, 4, 2)
    assert all(np.isnan(scores).tolist() == [False, False, False, True] for scores in utilities.values())
    rows = list(compared(utilities, np.array([1.0, 2, 3, 9]), 0, ""))
    assert [row.value for row in rows[:3]] == pytest.approx([1, 1, 1])  # with item 3 as 0 it would be less
