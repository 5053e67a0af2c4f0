"""The parts of the losses: hand numbers, and expectations over small distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.algorithms.objectives import (
    CISPO,
    SAPO,
    Clipped,
    NoRatio,
    adapt_kl,
    kl_estimates,
    value_loss,
)
from rlaif_jax.config import UserError


def test_clipped_hand_numbers():
    log_ratio = jnp.log(jnp.array([1.0, 1.5, 1.5, 0.5, 0.5, 1.1]))
    advantages = jnp.array([2.0, 2.0, -2.0, 2.0, -2.0, -1.0])
    # the clip bites only where it lowers the objective: a good action made likelier, a bad one made rarer
    loss = lambda log_ratio, advantages: Clipped(0.2)(log_ratio, jnp.nan, advantages)[0]
    np.testing.assert_allclose(loss(log_ratio, advantages), [-2, -2.4, 3, -1, 1.6, 1.1], rtol=1e-6)
    slope = jax.vmap(jax.grad(loss))(log_ratio, advantages)
    np.testing.assert_allclose(slope, [-2, 0, 3, -1, 0, 1.1], rtol=1e-6)


def test_the_clipped_objective_marks_ratios_outside_its_range():
    log_ratio = jnp.log(jnp.array([1.0, 1.19, 1.21, 0.81, 0.79]))
    advantages = jnp.array([1.0, -2.0, 3.0, -4.0, 5.0])
    _, outside = Clipped(0.2)(log_ratio, jnp.full(5, jnp.nan), advantages)
    np.testing.assert_array_equal(outside, [False, False, True, False, True])
    with pytest.raises(UserError, match="clip_range must be > 0, not 0"):
        Clipped(0.0)


RATIOS, A = np.array([1.0, 1.25, 1.5, 4.0, 1.25, 1.5, 4.0, 0.5]), np.array([2.0, 2.0, 2.0, 2.0, -2.0, -2.0, -2.0, -2.0])


def slopes(objective):
    """(loss, whether clipped, d loss / d log pi) at `RATIOS` and log pi = -3."""
    each = lambda logprob, old, a: objective(logprob - old, logprob, a)
    old = -3 - jnp.log(RATIOS)
    loss, clipped = each(jnp.full(8, -3.0), old, A)
    return loss, clipped, jax.vmap(jax.grad(lambda *x: each(*x)[0]))(jnp.full(8, -3.0), old, A)


def test_clip_higher_moves_the_upper_edge_alone():
    loss, clipped, slope = slopes(Clipped(0.2, clip_higher=0.28))
    np.testing.assert_allclose(loss, [-2, -2.5, -2.56, -2.56, 2.5, 3, 8, 1.6], rtol=1e-6)
    np.testing.assert_array_equal(clipped, [0, 0, 1, 1, 0, 1, 1, 1])
    np.testing.assert_allclose(slope, [-2, -2.5, 0, 0, 2.5, 3, 8, 0], rtol=1e-6)


def test_dual_clip_bounds_what_a_bad_token_counts():
    loss, _, slope = slopes(Clipped(0.2, dual_clip=3.0))
    np.testing.assert_allclose(loss, [-2, -2.4, -2.4, -2.4, 2.5, 3, 6, 1.6], rtol=1e-6)
    np.testing.assert_allclose(slope, [-2, 0, 0, 0, 2.5, 3, 0, 0], rtol=1e-6)
    with pytest.raises(UserError, match=r"objective\.dual_clip must be > 1\.28"):
        Clipped(0.2, 0.28, dual_clip=1.2)
    with pytest.raises(UserError, match=r"objective\.clip_higher must be > 0"):
        Clipped(0.2, 0.0)


def test_without_a_ratio_the_slope_is_the_advantage():
    loss, clipped, slope = slopes(NoRatio())
    np.testing.assert_allclose(loss, 3 * A)
    np.testing.assert_allclose(slope, -A)
    assert not clipped.any()


def test_cispo_caps_the_weight_and_keeps_the_slope():
    loss, clipped, slope = slopes(CISPO(1.5))
    weight = np.minimum(RATIOS, 1.5)
    np.testing.assert_allclose(loss, 3 * weight * A, rtol=1e-6)
    np.testing.assert_allclose(slope, -weight * A, rtol=1e-6)
    np.testing.assert_array_equal(clipped, RATIOS > 1.5)
    with pytest.raises(UserError, match=r"objective\.most must be >= 1"):
        CISPO(0.9)


def test_sapo_fades_with_the_distance_of_the_ratio():
    loss, clipped, slope = slopes(SAPO(1.0, 2.0))
    t = np.where(A > 0, 1.0, 2.0)
    gate = 1 / (1 + np.exp(-t * (RATIOS - 1)))
    np.testing.assert_allclose(loss, -A * gate * 4 / t, rtol=1e-6)
    np.testing.assert_allclose(slope, -A * 4 * gate * (1 - gate) * RATIOS, rtol=1e-4)
    np.testing.assert_allclose(slope[0], -2)  # as without a clip where the ratio is 1
    np.testing.assert_array_equal(clipped, [0, 0, 0, 1, 0, 0, 1, 0])  # s'(3) 4 = .18, s'(6) 4 = .01
    with pytest.raises(UserError, match=r"objective\.negative must be > 0"):
        SAPO(negative=0.0)


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
