"""Advantages against slow float64 loops written from the definitions, and numbers worked out by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.algorithms.advantages import (
    GAE,
    AdvantageInputs,
    BatchNormalised,
    GreedyBaseline,
    GroupMean,
    GroupNormalised,
    LeaveOneOut,
    LengthWeighted,
    MovingBaseline,
    ReturnToGo,
    gae,
    group_normalised,
    leave_one_out,
    token_rewards,
)
from rlaif_jax.config import UserError
from rlaif_jax.parallel import masked_whiten

NAN = float("nan")


def slow_gae(rewards, values, mask, gamma, lam):
    """A_t = sum over later real steps j of (gamma lambda)^(j - t) delta_j, as a double loop over real steps only."""
    advantages = np.zeros(rewards.shape)
    for row in range(len(rewards)):
        real = np.flatnonzero(mask[row])
        r, v = rewards[row, real].astype(np.float64), np.append(values[row, real].astype(np.float64), 0.0)  # V(end) = 0
        for t in range(len(real)):
            for j in range(t, len(real)):
                delta = r[j] + gamma * v[j + 1] - v[j]
                advantages[row, real[t]] += (gamma * lam) ** (j - t) * delta
    return advantages


@pytest.fixture(scope="module")
def episode():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 6, 9)).astype(np.float32)
    mask = np.arange(9) < np.array([9, 1, 4, 0, 7, 9])[:, None]
    mask[5, [0, 3, 4, 8]] = False  # holes, before, inside and after: masked steps carry over
    return rewards, values, mask


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.97, 1.0), (0.9, 0.0)])
def test_gae_equals_the_double_loop(episode, gamma, lam):
    rewards, values, mask = episode
    advantages, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=lam)
    expected = slow_gae(rewards, values, mask, gamma, lam)
    np.testing.assert_allclose(advantages, expected, atol=1e-5)
    np.testing.assert_allclose(returns, np.where(mask, expected + values, 0), atol=1e-5)
    assert advantages.dtype == returns.dtype == jnp.float32


def test_gae_defaults_and_hand_numbers():
    # One row, r = (0, 1), V = (0.5, 0.25): delta_1 = 1 + 0 - 0.25 (nothing after the end), delta_0 = 0 + 0.25 - 0.5.
    advantages, returns = gae(jnp.array([[0.0, 1.0]]), jnp.array([[0.5, 0.25]]), jnp.ones((1, 2), bool))
    np.testing.assert_allclose(advantages, [[-0.25 + 0.95 * 0.75, 0.75]], rtol=1e-6)
    np.testing.assert_allclose(returns, [[-0.25 + 0.95 * 0.75 + 0.5, 1.0]], rtol=1e-6)


def test_with_lambda_one_returns_are_discounted_rewards_to_go(episode):
    rewards, values, mask = episode
    _, returns = gae(rewards, values, mask, gamma=0.9, gae_lambda=1.0)
    row = rewards[2, :4].astype(np.float64)
    np.testing.assert_allclose(
        returns[2, :4], [sum(0.9**j * row[t + j] for j in range(4 - t)) for t in range(4)], atol=1e-5
    )


def test_gae_never_reads_masked_slots(episode):
    rewards, values, mask = episode
    clean = gae(rewards, values, mask, gamma=0.9)
    dirty = gae(np.where(mask, rewards, NAN), np.where(mask, values, np.inf), mask, gamma=0.9)
    for a, b in zip(clean, dirty):
        np.testing.assert_array_equal(a, b)
        assert not np.any(np.asarray(a)[~mask])


def test_no_gradient_flows_through_gae(episode):
    rewards, values, mask = episode
    gradient = jax.grad(lambda v: sum(x.sum() for x in gae(rewards, v, mask)))(jnp.asarray(values))
    assert not np.any(gradient)


def test_the_score_lands_on_the_last_valid_token():
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    zeros = jnp.zeros((4, 4))
    rewards = token_rewards(jnp.array([0.7, -1.5, 0.25, 9.0]), zeros, zeros, zeros, mask, 0.1)
    np.testing.assert_array_equal(rewards, np.float32([[0, 0, 0.7, 0], [0, 0, 0, -1.5], [0.25, 0, 0, 0], [0, 0, 0, 0]]))
    assert rewards.dtype == jnp.float32


def test_a_score_must_be_a_float():
    zeros, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
    with pytest.raises(AssertionError):
        token_rewards(jnp.array([1]), zeros, zeros, zeros, mask, 0.1)
    with pytest.raises(AssertionError):
        token_rewards(jnp.array([1.0]), zeros, zeros, jnp.zeros((1, 3)), mask, 0.1)


def test_the_kl_penalty_is_k1_clamped_at_20_nats():
    logprobs = jnp.array([[-1.0, -2.0, -90.0, -0.5]])
    reference = jnp.array([[-1.5, -1.0, -1.0, -70.0]])
    mask = jnp.array([[True, True, True, True]])
    rewards = token_rewards(jnp.array([3.0]), jnp.zeros((1, 4)), logprobs, reference, mask, 0.1)
    np.testing.assert_allclose(rewards, [[-0.05, 0.1, 2.0, -2.0 + 3.0]], rtol=1e-6)


def test_dense_rewards_stay_where_they_are_and_add_up():
    dense = jnp.array([[0.1, -0.2, 0.3, 0.4]])
    mask = jnp.array([[True, True, True, False]])
    rewards = token_rewards(jnp.array([1.0]), dense, jnp.zeros((1, 4)), jnp.zeros((1, 4)), mask, 0.1)
    np.testing.assert_allclose(rewards, [[0.1, -0.2, 1.3, 0.0]], rtol=1e-6)


def test_token_rewards_never_read_masked_slots():
    mask = jnp.array([[True, True, False, False]])
    junk = jnp.array([[-1.0, -2.0, NAN, jnp.inf]])
    rewards = token_rewards(jnp.array([0.7]), junk.at[:, :2].set(0.0), junk, -junk, mask, 0.5)
    np.testing.assert_allclose(rewards, [[1.0, 2.0 + 0.7, 0, 0]], rtol=1e-6)
    # nor does a gradient through them
    gradient = jax.grad(lambda x: token_rewards(jnp.array([0.7]), jnp.zeros((1, 4)), x, -junk, mask, 0.5).sum())(junk)
    np.testing.assert_allclose(gradient, [[-0.5, -0.5, 0, 0]])


def test_group_hand_numbers():
    # Scores 1, 2, 3, 6: mean 3, population variance (4 + 1 + 0 + 9) / 4 = 3.5.
    expected = np.array([-2, -1, 0, 3]) / (np.sqrt(3.5) + 1e-4)
    got = group_normalised(jnp.array([1.0, 2.0, 3.0, 6.0, 7.0, 7.0, 7.0, 7.0]), jnp.ones(8, bool), 4)
    np.testing.assert_allclose(got[:4], expected, rtol=1e-6)
    np.testing.assert_array_equal(got[4:], 0)


@pytest.mark.parametrize("score", [0.7, 1000.1, -12345.678])
def test_equal_scores_give_exactly_zero(score):
    # The mean of three equal floats may differ from them by a rounding, which the division would blow up.
    got = group_normalised(jnp.full(6, score, jnp.float32), jnp.array([True] * 5 + [False]), 3)
    np.testing.assert_array_equal(got, 0)


def test_invalid_answers_are_left_out_of_the_group():
    got = group_normalised(jnp.array([1.0, NAN, 3.0, 1e6, 5.0, NAN]), jnp.array([1, 0, 1, 0, 1, 0], bool), 3)
    np.testing.assert_allclose(got, [-1 / 1.0001, 0, 1 / 1.0001, 0, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(group_normalised(jnp.full(4, NAN), jnp.zeros(4, bool), 2), 0)


def test_leave_one_out_hand_numbers():
    # Scores 1, 2, 3, 6: the means of the others are 11/3, 10/3, 3, 2.
    got = leave_one_out(jnp.array([1.0, 2.0, 3.0, 6.0, 7.0, 7.0, 7.0, 7.0]), jnp.ones(8, bool), 4)
    np.testing.assert_allclose(got, [1 - 11 / 3, 2 - 10 / 3, 0, 4, 0, 0, 0, 0], rtol=1e-6)
    assert got.dtype == jnp.float32


def test_an_invalid_answer_is_no_baseline_and_gets_none():
    got = leave_one_out(jnp.array([1.0, NAN, 3.0, 1e6, 5.0, NAN]), jnp.array([1, 0, 1, 0, 1, 0], bool), 3)
    np.testing.assert_allclose(got, [-2, 0, 2, 0, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(leave_one_out(jnp.full(4, NAN), jnp.zeros(4, bool), 2), 0)
    gradient = jax.grad(lambda x: leave_one_out(x, jnp.array([1, 0, 1], bool), 3)[0])(jnp.array([1.0, NAN, 3.0]))
    np.testing.assert_allclose(gradient, [1, 0, -1])


@pytest.mark.parametrize("answers", [2, 3, 5])
def test_leave_one_out_equals_the_loop(answers):
    rng = np.random.default_rng(answers)
    score, valid = rng.normal(size=6 * answers).astype(np.float32), rng.random(6 * answers) < 0.7
    expected = np.zeros(6 * answers)
    for row in range(6 * answers):
        first = row // answers * answers
        others = [float(score[i]) for i in range(first, first + answers) if i != row and valid[i]]
        if valid[row] and others:
            expected[row] = float(score[row]) - np.mean(others)
    got = jax.jit(leave_one_out, static_argnums=2)(np.where(valid, score, NAN), valid, answers)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    whole = leave_one_out(score, np.ones(6 * answers, bool), answers).reshape(6, answers)
    np.testing.assert_allclose(whole.sum(-1), 0, atol=1e-5)


@pytest.mark.parametrize("estimator", [GroupNormalised(), LeaveOneOut()])
def test_an_answers_advantage_is_that_of_all_its_tokens(estimator):
    mask = jnp.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], bool)
    inputs = AdvantageInputs(
        rewards=jnp.full((4, 3), NAN),
        totals=jnp.array([1.0, 3.0, NAN, 5.0]),
        values=jnp.zeros((4, 3)),
        mask=mask,
        valid=jnp.array([True, True, False, True]),
        answers=2,
    )
    advantages, returns = estimator(inputs)
    unit = 2 if isinstance(estimator, LeaveOneOut) else 1 / 1.0001
    np.testing.assert_allclose(advantages, unit * jnp.array([[-1, -1, -1], [1, 0, 0], [0, 0, 0], [0, 0, 0]]), rtol=1e-6)
    np.testing.assert_array_equal(returns, 0)
    assert not estimator.needs_critic and not estimator.whiten and estimator.min_answers == 2


def test_totals_that_are_normalised_already_are_whitened_over_the_step():
    mask = jnp.array([[1, 1], [1, 0], [0, 0]], bool)
    inputs = AdvantageInputs(jnp.full((3, 2), NAN), jnp.array([2.0, 5.0, NAN]), jnp.zeros((3, 2)), mask, mask[:, 0], 1)
    advantages, returns = BatchNormalised()(inputs)
    np.testing.assert_array_equal(advantages, [[2, 2], [5, 0], [0, 0]])
    np.testing.assert_array_equal(returns, 0)
    # The update whitens: tokens 2, 2, 5 have the mean 3 and the population variance 2.
    np.testing.assert_allclose(masked_whiten(advantages, mask), [[-(0.5**0.5)] * 2, [2**0.5, 0], [0, 0]], rtol=1e-6)
    assert BatchNormalised.whiten and not BatchNormalised.needs_critic


def test_the_estimator_with_a_critic_is_gae(episode):
    rewards, values, mask = episode
    estimator = GAE(gamma=0.9, gae_lambda=0.8)
    inputs = AdvantageInputs(rewards, jnp.full(6, NAN), values, mask, mask.any(-1), answers=1)
    for got, want in zip(estimator(inputs), gae(rewards, values, mask, gamma=0.9, gae_lambda=0.8), strict=True):
        np.testing.assert_array_equal(got, want)
    assert estimator.needs_critic and estimator.whiten
    for bad in ({"gamma": 0.0}, {"gamma": 1.1}, {"gae_lambda": -0.1}, {"gae_lambda": 1.1}):
        with pytest.raises(UserError, match=f"advantage.{next(iter(bad))} must lie in"):
            GAE(**bad)


def test_the_critics_targets_may_have_their_own_lambda(episode):
    rewards, values, mask = episode
    inputs = AdvantageInputs(rewards, jnp.full(6, NAN), values, mask, mask.any(-1), answers=1)
    advantages, returns = GAE(gamma=0.9, gae_lambda=0.8, value_lambda=1.0)(inputs)
    np.testing.assert_allclose(advantages, slow_gae(rewards, values, mask, 0.9, 0.8), atol=1e-5)
    np.testing.assert_allclose(
        returns, np.where(mask, slow_gae(rewards, values, mask, 0.9, 1.0) + values, 0), atol=1e-5
    )


def test_lambda_may_follow_the_length_of_the_answer(episode):
    rewards, values, mask = episode
    inputs = AdvantageInputs(rewards, jnp.full(6, NAN), values, mask, mask.any(-1), answers=1)
    advantages, _ = jax.jit(lambda x: GAE(length_alpha=0.25)(x._replace(answers=1)))(inputs)
    # Lengths 9, 1, 4, 0, 7, 5: 1 - 4 / 9 .. and never below 0.
    for row, length in enumerate(mask.sum(-1)):
        lam = max(1 - 4 / max(length, 1), 0)
        expected = slow_gae(rewards[row : row + 1], values[row : row + 1], mask[row : row + 1], 1.0, lam)
        np.testing.assert_allclose(advantages[row : row + 1], expected, atol=1e-5)
    for bad, said in (
        ({"value_lambda": 1.1}, "value_lambda must lie in"),
        ({"length_alpha": 0.0}, "length_alpha must be > 0"),
    ):
        with pytest.raises(UserError, match=f"advantage.{said}"):
            GAE(**bad)


# ---- Estimators of whole answers

MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
VALID = np.array([1, 1, 1, 1, 0, 1], bool)
TOTALS = np.float32([1, 2, 6, -4, NAN, 3])
"""Two prompts with three answers each, one without a judgement."""


def of_answers(estimator, answers=3, **more):
    """The advantage of each answer, once it is seen to be that of all its tokens."""
    mask = MASK & VALID[:, None]
    inputs = AdvantageInputs(jnp.full(MASK.shape, NAN), TOTALS, np.zeros(MASK.shape), mask, VALID, answers, **more)
    advantages, returns = jax.jit(lambda x: estimator(x._replace(answers=answers)))(inputs)
    np.testing.assert_array_equal(returns, 0)
    first = np.asarray(advantages)[:, 0]
    np.testing.assert_array_equal(advantages, np.where(mask, first[:, None], 0))
    return first


def test_group_mean_hand_numbers():
    # The mean of 1, 2, 6 is 3; that of -4 and 3 is -1/2.
    np.testing.assert_allclose(of_answers(GroupMean()), [-2, -1, 3, -3.5, 0, 3.5], rtol=1e-6)
    assert GroupMean(whiten=True).whiten and not GroupMean().whiten and GroupMean.min_answers == 2


def test_the_length_weighted_mean_is_that_of_all_tokens():
    # Lengths 3, 1, 2: (3 + 2 + 12) / 6 = 17/6. Lengths 4 and 1: (-16 + 3) / 5 = -13/5.
    expected = [1 - 17 / 6, 2 - 17 / 6, 6 - 17 / 6, -4 + 13 / 5, 0, 3 + 13 / 5]
    np.testing.assert_allclose(of_answers(LengthWeighted()), expected, rtol=1e-6)


def test_the_greedy_answer_is_the_baseline_of_its_prompt():
    """The last of three answers is greedy; where it was not judged, the other two teach nothing."""
    np.testing.assert_allclose(of_answers(GreedyBaseline()), [-5, -4, 0, -7, 0, 0], rtol=1e-6)
    # In groups of two, the third prompt's greedy answer is the sixth, the first of them has no judgement.
    np.testing.assert_allclose(of_answers(GreedyBaseline(), answers=2), [-1, 0, 10, 0, 0, 0], rtol=1e-6)
    assert GreedyBaseline.greedy and GreedyBaseline.min_answers == 1


def test_the_moving_baseline_is_a_mean_of_earlier_steps_alone():
    estimator, kept = MovingBaseline(decay=0.5), jnp.zeros(2)
    np.testing.assert_allclose(of_answers(estimator), [1, 2, 6, -4, 0, 3])  # nothing is known yet
    kept = estimator.follow(kept, jnp.float32(4))
    np.testing.assert_allclose(of_answers(estimator, baseline=kept), [-3, -2, 2, -8, 0, -1])  # 4, not 4 / 2
    kept = estimator.follow(kept, jnp.float32(1))
    # (.5 x 4 x .5 + .5 x 1) / (.25 + .5) = 2
    np.testing.assert_allclose(of_answers(estimator, baseline=kept), [-1, 0, 4, -6, 0, 1], rtol=1e-6)
    np.testing.assert_array_equal(LeaveOneOut().follow(kept, jnp.float32(7)), kept)
    with pytest.raises(UserError, match=r"advantage\.decay must lie in \[0, 1\), not 1"):
        MovingBaseline(decay=1.0)


def test_return_to_go_is_gae_without_a_critic(episode):
    rewards, _, mask = episode
    inputs = AdvantageInputs(rewards, rewards.sum(-1), np.full(mask.shape, NAN), mask, mask.any(-1), 1)
    advantages, returns = ReturnToGo()(inputs)
    np.testing.assert_allclose(advantages, slow_gae(rewards, np.zeros(mask.shape), mask, 1.0, 1.0), atol=1e-5)
    np.testing.assert_array_equal(returns, 0)
    assert not ReturnToGo().of_answers and not ReturnToGo.needs_critic and ReturnToGo(whiten=True).whiten


def test_transforms_work_under_jit_and_vmap(episode):
    rewards, values, mask = episode
    batched = jax.jit(jax.vmap(lambda r, v, m: gae(r[None], v[None], m[None])))(rewards, values, mask)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[:, 0], batched), gae(rewards, values, mask), atol=1e-6)
