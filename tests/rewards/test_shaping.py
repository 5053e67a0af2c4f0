"""Scores to rewards: numbers by hand; a missing judgement is masked, never zero; the same under every transform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.rewards.shaping import Normaliser, fit_normaliser, identity_normaliser, sequence_rewards

NAN, INF = float("nan"), float("inf")
MASK = jnp.ones((4, 3), bool)
NORMALISER = Normaliser(mean=jnp.float32(2.0), std=jnp.float32(4.0))


def test_fit_normaliser_gives_mean_zero_and_std_one():
    scores = jnp.array([1.0, 2.0, 6.0, NAN, 1e9])
    normaliser = fit_normaliser(scores, jnp.array([True, True, True, False, False]))
    np.testing.assert_allclose(normaliser.mean, 3.0)
    np.testing.assert_allclose(normaliser.std, np.sqrt((4 + 1 + 9) / 3), rtol=1e-6)
    rewards = sequence_rewards(scores[:3], jnp.ones(3, bool), normaliser, MASK[:3]).score
    np.testing.assert_allclose([rewards.mean(), rewards.std()], [0, 1], atol=1e-6)


def test_fit_normaliser_without_scores_is_finite():
    normaliser = fit_normaliser(jnp.array([NAN, NAN]), jnp.zeros(2, bool))
    assert float(normaliser.mean) == 0
    assert float(normaliser.std) == 0


def test_identity_keeps_floats():
    scores = jnp.array([0.7, -0.3, 1e-4, 12.5])
    rewards = sequence_rewards(scores, jnp.ones(4, bool), identity_normaliser(), MASK)
    np.testing.assert_array_equal(rewards.score, scores)
    assert rewards.score.dtype == jnp.float32
    assert rewards.token_rewards.shape == MASK.shape
    assert not np.any(rewards.token_rewards)


def test_hand_numbers():
    rewards = sequence_rewards(jnp.array([2.0, 6.0, -2.0, 3.0]), jnp.ones(4, bool), NORMALISER, MASK)
    np.testing.assert_allclose(rewards.score, [0, 1, -1, 0.25])
    assert rewards.valid.all()


def test_a_score_that_is_missing_or_not_finite_is_masked_out():
    rewards = sequence_rewards(jnp.array([NAN, INF, 5.0, -INF]), jnp.array([True, True, False, True]), NORMALISER, MASK)
    np.testing.assert_array_equal(rewards.valid, [False] * 4)
    assert np.isfinite(rewards.score).all()
    kept = sequence_rewards(jnp.array([NAN, 6.0, 5.0, 0.0]), jnp.array([True, True, False, True]), NORMALISER, MASK)
    np.testing.assert_array_equal(kept.valid, [False, True, False, True])
    np.testing.assert_allclose(kept.score[1::2], [1, -0.5])


def test_clip_is_symmetric_and_after_the_normaliser():
    rewards = sequence_rewards(jnp.array([2.0, 100.0, -100.0, 4.0]), jnp.ones(4, bool), NORMALISER, MASK, clip=0.75)
    np.testing.assert_allclose(rewards.score, [0, 0.75, -0.75, 0.5])


@pytest.mark.parametrize("transform", ["jit", "vmap", "pmap"])
def test_under_transforms(transform):
    scores = jnp.array([[NAN, 6.0, 5.0, 0.0], [1.0, 2.0, 3.0, INF]])
    valid = jnp.array([[True, True, False, True], [True] * 4])
    masks = jnp.stack([MASK, MASK])

    def one(score, ok, mask):
        return sequence_rewards(score, ok, NORMALISER, mask, clip=1.5)

    if transform == "jit":
        got = jax.jit(lambda s, v, m: jax.tree.map(lambda *x: jnp.stack(x), *map(one, s, v, m)))(scores, valid, masks)
    else:
        got = (jax.vmap if transform == "vmap" else jax.pmap)(one)(scores, valid, masks)
    for row in range(2):
        for a, b in zip(jax.tree.leaves(one(scores[row], valid[row], masks[row])), jax.tree.leaves(got)):
            np.testing.assert_array_equal(a, b[row])


def test_no_gradient_is_poisoned_by_a_missing_score():
    gradient = jax.grad(
        lambda s: sequence_rewards(s, jnp.array([True, True, False, True]), NORMALISER, MASK).score.sum()
    )(jnp.array([1.0, NAN, NAN, 3.0]))
    np.testing.assert_allclose(gradient, [0.25, 0, 0, 0.25])
