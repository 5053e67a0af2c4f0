"""The parts of the losses: hand numbers, and expectations over small distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.algorithms.objectives import (
    Clipped,
    adapt_kl,
    importance_weights,
    kl_estimates,
    policy_loss,
    value_loss,
)
from rlaif_jax.config import UserError


def test_policy_loss_hand_numbers():
    log_ratio = jnp.log(jnp.array([1.0, 1.5, 1.5, 0.5, 0.5, 1.1]))
    advantages = jnp.array([2.0, 2.0, -2.0, 2.0, -2.0, -1.0])
    # the clip bites only where it lowers the objective: a good action made likelier, a bad one made rarer
    np.testing.assert_allclose(policy_loss(log_ratio, advantages, 0.2), [-2, -2.4, 3, -1, 1.6, 1.1], rtol=1e-6)
    slope = jax.vmap(jax.grad(lambda r, a: policy_loss(r, a, 0.2)))(log_ratio, advantages)
    np.testing.assert_allclose(slope, [-2, 0, 3, -1, 0, 1.1], rtol=1e-6)


def test_the_clipped_objective_marks_ratios_outside_its_range():
    log_ratio = jnp.log(jnp.array([1.0, 1.19, 1.21, 0.81, 0.79]))
    advantages = jnp.array([1.0, -2.0, 3.0, -4.0, 5.0])
    loss, outside = Clipped(0.2)(log_ratio, jnp.full(5, jnp.nan), advantages)
    np.testing.assert_array_equal(loss, policy_loss(log_ratio, advantages, 0.2))
    np.testing.assert_array_equal(outside, [False, False, True, False, True])
    with pytest.raises(UserError, match="clip_range must be > 0, not 0"):
        Clipped(0.0)


def test_value_loss_hand_numbers():
    values = jnp.array([1.0, 2.0, 0.0, 0.05])
    old, returns = jnp.zeros(4), jnp.array([0.0, 3.0, 1.0, 1.0])
    # clipped to +-0.2: 0.2, 0.2, 0, 0.05; the larger of the two errors counts
    np.testing.assert_allclose(
        value_loss(values, old, returns, 0.2), [0.5, 0.5 * 2.8**2, 0.5, 0.5 * 0.95**2], rtol=1e-6
    )


def test_kl_estimates_hand_numbers():
    k1, k2, k3 = kl_estimates(jnp.array([0.0, 0.5, -1.0, 30.0, -30.0]))
    np.testing.assert_allclose(k1, [0, 0.5, -1, 20, -20])
    np.testing.assert_allclose(k2, [0, 0.125, 0.5, 200, 200])
    np.testing.assert_allclose(
        k3, np.exp([0, -0.5, 1, -20, 20]) - 1 + np.array([0, 0.5, -1, 20, -20]), rtol=1e-6, atol=1e-7
    )
    assert (k3 >= 0).all()


def test_kl_estimates_are_unbiased_as_said():
    p, q = np.array([0.2, 0.5, 0.3]), np.array([0.4, 0.4, 0.2])
    exact = (p * np.log(p / q)).sum()
    k1, k2, k3 = (float((p * np.asarray(k)).sum()) for k in kl_estimates(jnp.log(p / q)))
    np.testing.assert_allclose([k1, k3], exact, rtol=1e-5)
    assert abs(k2 - exact) > 1e-3


def test_importance_weights():
    weights = importance_weights(jnp.log(jnp.array([0.5, 1.0, 1.9, 8.0])), 2.0)
    np.testing.assert_allclose(weights, [0.5, 1, 1.9, 2], rtol=1e-6)
    assert jax.grad(lambda x: importance_weights(x, 2.0))(0.3) == 0


def test_adapt_kl():
    for kl, factor in ((4.0, 1), (40.0, 1 + 0.2 * 64 / 1000), (0.0, 1 - 0.2 * 64 / 1000), (4.4, 1 + 0.1 * 64 / 1000)):
        got = adapt_kl(jnp.float32(0.5), jnp.float32(kl), 64, target=4.0, horizon=1000.0)
        np.testing.assert_allclose(got, 0.5 * factor, rtol=1e-6)


def test_an_adaptive_kl_coefficient_stays_positive_and_bounded():
    """The sixty-five thousand sequences of a step at the default horizon would give -.0155."""
    follow = lambda coef, kl, n: float(adapt_kl(jnp.float32(coef), jnp.float32(kl), n, target=1.0, horizon=10_000.0))
    assert follow(0.05, 0.0, 65_536) == pytest.approx(0.025)
    assert follow(0.05, 9.0, 65_536) == pytest.approx(0.1)
    low, high = 0.05, 0.05
    for _ in range(200):
        low, high = follow(low, 0.0, 65_536), follow(high, 9.0, 65_536)
    assert (low, high) == (pytest.approx(1e-6), pytest.approx(1e3))
