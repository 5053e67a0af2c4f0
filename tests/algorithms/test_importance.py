"""Importance weights: hand numbers, and what masked slots hold is never read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.algorithms.objectives import Masked, Truncated
from rlaif_jax.config import UserError

MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
RATIOS = np.array([[0.25, 1.0, 1.75, 8.0], [0.5, 1.5, np.nan, np.inf]])
ONLY = lambda got: np.where(MASK, got, 0)


def test_truncated_of_tokens():
    got = jax.jit(Truncated("token", 2.0))(jnp.log(RATIOS), MASK)
    np.testing.assert_allclose(ONLY(got), [[0.25, 1, 1.75, 2], [0.5, 1.5, 0, 0]], rtol=1e-6)


def test_masked_of_tokens():
    got = jax.jit(Masked("token", 0.5, 2.0))(jnp.log(RATIOS), MASK)
    np.testing.assert_allclose(ONLY(got), [[0, 1, 1.75, 0], [0.5, 1.5, 0, 0]], rtol=1e-6)


def test_of_answers_it_is_the_product_of_their_tokens():
    # .25 x 1.75 x 8 = 3.5 and .5 x 1.5 = .75
    np.testing.assert_allclose(Truncated("answer", 2.0)(jnp.log(RATIOS), MASK)[:, 0], [2, 0.75], rtol=1e-6)
    np.testing.assert_allclose(Truncated("answer", 5.0)(jnp.log(RATIOS), MASK)[:, 0], [3.5, 0.75], rtol=1e-6)
    np.testing.assert_allclose(Masked("answer", 0.5, 2.0)(jnp.log(RATIOS), MASK)[:, 0], [0, 0.75], rtol=1e-6)
    np.testing.assert_allclose(Masked("answer", 0.8, 4.0)(jnp.log(RATIOS), MASK)[:, 0], [3.5, 0], rtol=1e-6)


@pytest.mark.parametrize("importance", [Truncated(), Truncated("answer"), Masked(), Masked("answer")])
def test_no_gradient_flows_and_nothing_overflows(importance):
    far = jnp.where(MASK, jnp.array([[300.0], [-300.0]]), jnp.nan)
    assert np.isfinite(ONLY(importance(far, MASK))).all()
    assert not np.any(jax.grad(lambda x: ONLY_SUM(importance(x, MASK)))(jnp.log(jnp.full(MASK.shape, 1.5))))


ONLY_SUM = lambda x: jnp.where(MASK, x, 0.0).sum()


def test_limits_that_leave_no_room_are_refused():
    with pytest.raises(UserError, match=r"importance\.most must be >= 1, not 0\.5"):
        Truncated(most=0.5)
    with pytest.raises(
        UserError, match=r"importance\.least \(1\.1\) and importance\.most \(2\.0\) must lie on both sides"
    ):
        Masked(least=1.1)
    with pytest.raises(UserError, match=r"importance\.level is 'word'"):
        Truncated("word")
