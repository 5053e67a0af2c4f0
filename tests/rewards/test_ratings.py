"""Raw means and z-scores of ratings: numbers by hand; the same under every transform."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.rewards.ratings import raw_mean, z_score_mean
from tests.rewards.planted_ratings import continuous

NAN = float("nan")


def test_raw_mean_by_hand():
    found = raw_mean([0, 0, 1, 1, 2, 2], [0] * 6, [1.0, 3.0, 5.0, NAN, 8.0, 9.0], [1, 1, 1, 1, 0, 0], num_items=4)
    np.testing.assert_allclose(found.value, [2, 5, 0, 0])
    np.testing.assert_array_equal(found.valid, [True, True, False, False])
    # One degree of freedom: three ratings of two items; sum of squares 2.
    np.testing.assert_allclose(found.stderr, [np.sqrt(2 / 2), np.sqrt(2), np.inf, np.inf], rtol=1e-6)


def test_weights_are_copies():
    item, rater, value, weight = [0, 0, 1], [0, 1, 0], [1.0, 4.0, 2.0], np.array([1, 2, 3])
    copies = [np.repeat(x, weight) for x in (item, rater, value)]
    for method in (partial(raw_mean), partial(z_score_mean, num_raters=2)):
        for a, b in zip(
            jax.tree.leaves(method(item, rater, value, weight, num_items=2)),
            jax.tree.leaves(method(*copies, num_items=2)),
        ):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_z_scores_by_hand():
    # Rater 0 has mean 4 and standard deviation 2; rater 1 says one thing only, rater 2 one rating: no information.
    found = z_score_mean(
        [0, 1, 0, 1, 2, 0], [0, 0, 1, 1, 1, 2], [2.0, 6.0, 0.1, 0.1, 0.1, 9.0], num_items=3, num_raters=4
    )
    np.testing.assert_allclose(found.value, [-1, 1, 0], atol=1e-6)
    np.testing.assert_array_equal(found.valid, [True, True, False])
    assert np.isfinite(found.value).all()


def test_bfloat16_input_is_computed_in_float32():
    item, rater, value, *_ = continuous(items=20, raters=4, count=120)
    assert raw_mean(item, rater, jnp.asarray(value, jnp.bfloat16), num_items=20).value.dtype == jnp.float32
