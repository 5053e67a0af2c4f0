"""Scores to rewards: numbers by hand; a missing judgement is masked, never zero; the same under every transform."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.rewards.shaping import (
    Normaliser,
    Shaping,
    clip,
    combine,
    ensemble_cautious,
    ensemble_mean,
    ensemble_worst,
    fit_normaliser,
    identity_normaliser,
    length_penalty,
    missing_eos_score,
    sequence_rewards,
    shaped_rewards,
)
from rlaif_jax.types import Feedback, Rollout
from tests.rewards.everywhere import close, same_everywhere

NAN, INF = float("nan"), float("inf")
NORMALISER = Normaliser(mean=jnp.float32(2.0), std=jnp.float32(4.0))


def test_fit_normaliser_gives_mean_zero_and_std_one():
    scores = jnp.array([1.0, 2.0, 6.0, NAN, 1e9])
    normaliser = fit_normaliser(scores, jnp.array([True, True, True, False, False]))
    np.testing.assert_allclose(normaliser.mean, 3.0)
    np.testing.assert_allclose(normaliser.std, np.sqrt((4 + 1 + 9) / 3), rtol=1e-6)
    rewards = sequence_rewards(scores[:3], jnp.ones(3, bool), normaliser).values
    np.testing.assert_allclose([rewards.mean(), rewards.std()], [0, 1], atol=1e-6)


def test_scores_that_do_not_differ_have_std_one():
    for scores, valid, mean in (
        ([NAN, NAN], [False, False], 0.0),
        ([0.1] * 7, [True] * 7, 0.1),  # float32: the mean of seven 0.1 is not quite 0.1
        ([1e6 + 0.1] * 3, [True] * 3, 1e6 + 0.1),
        ([5.0, NAN, 7.0], [True, True, False], 5.0),
        ([0.0, 0.0], [True, True], 0.0),
    ):
        normaliser = fit_normaliser(jnp.array(scores), jnp.array(valid))
        np.testing.assert_allclose(normaliser.mean, mean, rtol=1e-6)
        assert float(normaliser.std) == 1, scores
    # What differs little, but does differ, keeps its scale.
    small = fit_normaliser(jnp.array([1e-7, -1e-7]), jnp.ones(2, bool))
    np.testing.assert_allclose(small.std, 1e-7, rtol=1e-5)
    # A new score far from the constant one is a reward of its distance, not of a million times that.
    rewards = sequence_rewards(
        jnp.array([0.1, 0.6]), jnp.ones(2, bool), fit_normaliser(jnp.full(7, 0.1), jnp.ones(7, bool))
    )
    np.testing.assert_allclose(rewards.values, [0.0, 0.5], atol=1e-6)


def test_identity_keeps_floats():
    scores = jnp.array([0.7, -0.3, 1e-4, 12.5])
    rewards = sequence_rewards(scores, jnp.ones(4, bool), identity_normaliser())
    np.testing.assert_array_equal(rewards.values, scores)
    assert rewards.values.dtype == jnp.float32


def test_hand_numbers():
    rewards = sequence_rewards(jnp.array([2.0, 6.0, -2.0, 3.0]), jnp.ones(4, bool), NORMALISER)
    np.testing.assert_allclose(rewards.values, [0, 1, -1, 0.25])
    assert rewards.valid.all()


def test_a_score_that_is_missing_or_not_finite_is_masked_out():
    rewards = sequence_rewards(jnp.array([NAN, INF, 5.0, -INF]), jnp.array([True, True, False, True]), NORMALISER)
    np.testing.assert_array_equal(rewards.valid, [False] * 4)
    assert np.isfinite(rewards.values).all()
    kept = sequence_rewards(jnp.array([NAN, 6.0, 5.0, 0.0]), jnp.array([True, True, False, True]), NORMALISER)
    np.testing.assert_array_equal(kept.valid, [False, True, False, True])
    np.testing.assert_allclose(kept.values[1::2], [1, -0.5])


def test_clip_is_symmetric_and_after_the_normaliser():
    rewards = sequence_rewards(jnp.array([2.0, 100.0, -100.0, 4.0]), jnp.ones(4, bool), NORMALISER, clip=0.75)
    np.testing.assert_allclose(rewards.values, [0, 0.75, -0.75, 0.5])


@pytest.mark.parametrize("transform", ["jit", "vmap", "pmap"])
def test_under_transforms(transform):
    scores = jnp.array([[NAN, 6.0, 5.0, 0.0], [1.0, 2.0, 3.0, INF]])
    valid = jnp.array([[True, True, False, True], [True] * 4])

    def one(score, ok):
        return sequence_rewards(score, ok, NORMALISER, clip=1.5)

    if transform == "jit":
        got = jax.jit(lambda s, v: jax.tree.map(lambda *x: jnp.stack(x), *map(one, s, v)))(scores, valid)
    else:
        got = (jax.vmap if transform == "vmap" else jax.pmap)(one)(scores, valid)
    for row in range(2):
        for a, b in zip(jax.tree.leaves(one(scores[row], valid[row])), jax.tree.leaves(got)):
            np.testing.assert_array_equal(a, b[row])


def test_no_gradient_is_poisoned_by_a_missing_score():
    gradient = jax.grad(lambda s: sequence_rewards(s, jnp.array([True, True, False, True]), NORMALISER).values.sum())(
        jnp.array([1.0, NAN, NAN, 3.0])
    )
    np.testing.assert_allclose(gradient, [0.25, 0, 0, 0.25])


# ---- From judgements to the rewards of a step


def test_an_answer_that_was_cut_goes_by_the_missing_eos_rule():
    score, finished = jnp.array([0.7, 0.7, -0.3]), jnp.array([True, False, False])
    for rule, expected in (("score", [0.7, 0.7, -0.3]), ("penalty", [0.7, -0.8, -1.8]), ("constant", [0.7, 1.5, 1.5])):
        shaping = Shaping(missing_eos=rule, missing_eos_value=1.5)
        np.testing.assert_allclose(missing_eos_score(shaping, score, finished), expected, rtol=1e-6)


ROLLOUT = Rollout(
    tokens=np.zeros((4, 5), np.int32),
    prompt_mask=np.ones((4, 2), bool),
    response_mask=np.arange(3) < np.array([3, 1, 2, 3])[:, None],
    logprobs=np.zeros((4, 3), np.float32),
    finished=np.array([True, True, False, False]),
)


def test_shaped_rewards_are_normalised_and_then_go_by_the_rule():
    judged = Feedback.single(np.float32([2, 6, -2, NAN]), np.array([True, True, True, True]))
    rewards = shaped_rewards(Shaping(missing_eos="penalty", missing_eos_value=0.5), NORMALISER, judged, ROLLOUT)
    np.testing.assert_allclose(rewards.score[:3], [0, 1, -1.5])
    np.testing.assert_array_equal(rewards.valid, [True, True, True, False])
    assert rewards.score.dtype == rewards.token_rewards.dtype == jnp.float32
    assert rewards.token_rewards.shape == (4, 3)
    assert not np.any(rewards.token_rewards)
    assert rewards.pairs is None and rewards.pairs_valid is None


def test_dense_rewards_are_kept_where_they_count_and_belong_to_the_total():
    dense = np.float32([[0.1, 0.2, 0.3], [1, NAN, NAN], [9, 9, 9], [-1, 0, 1]])
    judged = Feedback.single(np.float32([2, 6, 5, -2]), np.array([True, True, False, True]), dense)
    rewards = shaped_rewards(Shaping(), NORMALISER, judged, ROLLOUT)
    np.testing.assert_allclose(rewards.token_rewards, np.float32([[0.1, 0.2, 0.3], [1, 0, 0], [0] * 3, [-1, 0, 1]]))
    np.testing.assert_allclose(rewards.total, [0.6, 2, 0, -1], rtol=1e-6)


def test_several_rewards_are_combined_by_their_weights():
    """Each is normalised for itself first; where one is missing the others speak for it."""
    values = np.float32([[2, 10], [6, 20], [NAN, 30], [-2, 40]])
    valid = np.array([[True, True], [True, False], [True, True], [False, False]])
    normaliser = Normaliser(mean=jnp.array([2.0, 10.0]), std=jnp.array([4.0, 10.0]))
    rewards = shaped_rewards(Shaping(weights=(3.0, -1.0)), normaliser, Feedback(values, valid), ROLLOUT)
    np.testing.assert_allclose(rewards.score, [0, 3 * 4 / 3, -2 * 4, 0], rtol=1e-6)
    np.testing.assert_array_equal(rewards.valid, [True, True, True, False])
    plain = shaped_rewards(Shaping(), normaliser, Feedback(values, valid), ROLLOUT)
    np.testing.assert_allclose(plain.score, [0, 2, 4, 0], rtol=1e-6)


def test_each_reward_is_normalised_among_the_answers_to_its_prompt():
    """GDPO (Liu 2026): by hand, two prompts of two answers, two rewards of very different scale, one of them missing."""
    values = np.array([[0, 1000], [1, 3000], [5, 7], [5, NAN]], np.float32)
    valid = np.array([[1, 1], [1, 1], [1, 1], [1, 0]], bool)
    judged, shaping = Feedback(values, valid), Shaping(weights=(1.0, -0.5), per_group=True)
    rewards = shaped_rewards(shaping, identity_normaliser(), judged, ROLLOUT, answers=2)
    # Equal rewards of a prompt are 0; a present one represents a missing one, and here it is 0.
    np.testing.assert_allclose(rewards.score, [-0.5, 0.5, 0, 0], atol=2e-4)
    assert rewards.valid.all()
    other = shaped_rewards(
        shaping, Normaliser(jnp.array([3.0, -9.0]), jnp.array([7.0, 0.1])), judged, ROLLOUT, answers=2
    )
    np.testing.assert_allclose(other.score, rewards.score, atol=2e-3)  # whatever their scale
    with pytest.raises(UserError, match="per_group compares the answers to a prompt"):
        shaped_rewards(shaping, identity_normaliser(), judged, ROLLOUT)


def test_pairs_are_handed_on_and_nobody_else_needs_to_judge():
    nobody = np.zeros((4, 0), np.float32)
    pairs, seen = np.random.default_rng(0).random((2, 2, 2)).astype(np.float32), np.ones((2, 2, 2), bool)
    judged = Feedback(nobody, nobody.astype(bool), None, pairs, seen)
    rewards = shaped_rewards(Shaping(), identity_normaliser(), judged, ROLLOUT)
    assert rewards.pairs is pairs and rewards.pairs_valid is seen
    np.testing.assert_array_equal(rewards.score, 0)
    assert rewards.valid.all()


def test_shaped_rewards_are_the_same_everywhere():
    rng = np.random.default_rng(1)
    values, valid = rng.normal(size=(8, 2)).astype(np.float32), rng.random((8, 2)) < 0.7
    dense, finished = rng.normal(size=(8, 3)).astype(np.float32), rng.random(8) < 0.5
    mask = np.arange(3) < rng.integers(1, 4, 8)[:, None]
    shaping = Shaping(weights=(2.0, 1.0), missing_eos="constant", missing_eos_value=-1.0)

    def fn(values, valid, dense, mask, finished):
        zeros = jnp.zeros(mask.shape)
        rollout = Rollout(zeros, zeros, mask, zeros, finished)
        return shaped_rewards(shaping, identity_normaliser(), Feedback(values, valid, dense), rollout)

    rewards = same_everywhere(fn, values, valid, dense, mask, finished)
    np.testing.assert_array_equal(rewards.valid, valid.any(-1))


# ---- Devices and clip


def test_fit_normaliser_is_over_the_valid_scores_of_all_devices():
    rng = np.random.default_rng(0)
    scores = rng.normal(3, 2, size=16).astype(np.float32)
    valid = rng.random(16) > 0.4
    scores[~valid] = NAN
    split = jnp.asarray(scores).reshape(8, 2), jnp.asarray(valid).reshape(8, 2)
    normaliser = jax.pmap(partial(fit_normaliser, axis_name="data"), axis_name="data")(*split)
    close(jax.tree.map(lambda x: x[3], normaliser), fit_normaliser(scores, jnp.asarray(valid)), "pmap", 1e-5)


def test_clip_holds_what_is_there():
    got = clip(jnp.array([-9.0, 0.5, 9.0, NAN]), jnp.array([True, True, True, True]), -1.0, 2.0)
    np.testing.assert_array_equal(got.values, [-1, 0.5, 2, 0])
    assert got.valid.tolist() == [True, True, True, False]
    assert float(clip(jnp.array([NAN]), jnp.array([False]), 1.0, 2.0).values[0]) == 0


# ---- Penalties


def test_length_penalty_by_hand_and_as_dapo_has_it():
    lengths = np.array([0, 5, 8, 9, 10, 12])
    mask = jnp.asarray(np.arange(12) < lengths[:, None])
    np.testing.assert_allclose(length_penalty(mask, per_token=0.5, free=8), [0, 0, 0, -0.5, -1, -2])
    # Yu 2025, eq. 13 with L_max = 10, L_cache = 4: 0 up to 6, then (6 - length) / 4, -1 from 10 on.
    np.testing.assert_allclose(
        length_penalty(mask, per_token=1 / 4, free=10 - 4, most=1.0), [0, 0, -0.5, -0.75, -1, -1]
    )


@pytest.mark.parametrize("limit, cache", [(12, 4), (12, 12), (3, 1)])
def test_overlong_answers_lose_as_dapo_has_it(limit, cache):
    """Yu 2025, eq. 13, written out, for every length up to the limit; a judgement that is missing stays missing."""

    def punishment(length):
        if length <= limit - cache:
            return 0.0
        return ((limit - cache) - length) / cache if length <= limit else -1.0

    lengths = np.arange(limit + 1)
    mask = jnp.asarray(np.arange(limit) < lengths[:, None])
    rows = len(lengths)
    rollout = Rollout(jnp.zeros((rows, limit)), mask[:, :0], mask, jnp.zeros(mask.shape), jnp.asarray(lengths < limit))
    judged = Feedback.single(jnp.full(rows, 6.0), jnp.arange(rows) != 1)
    score = lambda shaping: shaped_rewards(shaping, NORMALISER, judged, rollout)
    found = score(Shaping(weights=(0.5,), overlong_from=limit - cache))
    expected = np.array([0.5 + punishment(length) for length in lengths])
    np.testing.assert_allclose(np.delete(found.score, 1), np.delete(expected, 1), rtol=1e-6)
    np.testing.assert_array_equal(found.valid, np.arange(rows) != 1)
    # An answer that was cut loses by its rule as well; where that is a constant, it gets the constant alone.
    cut = score(Shaping(overlong_from=limit - cache, missing_eos="penalty", missing_eos_value=0.25)).score[-1]
    assert cut == pytest.approx(1 - 1 - 0.25)
    assert score(Shaping(overlong_from=limit - cache, missing_eos="constant", missing_eos_value=-3.0)).score[-1] == -3


@pytest.mark.parametrize("length", [3, 4])
def test_a_length_that_no_answer_exceeds_is_refused(length):
    judged = Feedback.single(np.zeros(4, np.float32), np.ones(4, bool))
    with pytest.raises(UserError, match=f"shaping.overlong_from is {length}, but answers end at 3 tokens"):
        shaped_rewards(Shaping(overlong_from=length), NORMALISER, judged, ROLLOUT)
    with pytest.raises(UserError, match=r"shaping\.overlong_from must be >= 0, not -1"):
        Shaping(overlong_from=-1)


# ---- Combinations

REWARDS = jnp.array([[1.0, 2.0, -1.0], [1.0, NAN, -1.0], [NAN, NAN, 4.0], [NAN, NAN, NAN], [3.0, 1.0, 0.0]])
PRESENT = jnp.isfinite(REWARDS)
WEIGHTS = jnp.array([1.0, 2.0, -0.5])


def test_present_rewards_speak_for_missing_ones():
    got = combine(REWARDS, PRESENT, WEIGHTS)
    np.testing.assert_allclose(got.values, [5.5, 1.5 * 3.5 / 1.5, -2.0 * 3.5 / 0.5, 0.0, 5.0], rtol=1e-6)
    assert got.valid.tolist() == [True, True, True, False, True]


def test_a_share_of_the_weight_can_be_asked_for():
    got = combine(REWARDS, PRESENT, WEIGHTS, least_share=0.4)
    assert got.valid.tolist() == [True, True, False, False, True]
    nothing = combine(jnp.ones((2, 2)), jnp.array([[True, False], [True, True]]), jnp.array([0.0, 1.0]))
    assert nothing.valid.tolist() == [False, True]  # a reward of weight 0 says nothing
    np.testing.assert_array_equal(nothing.values, [0, 1])


def test_weights_may_differ_by_answer_and_learn():
    weights = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    np.testing.assert_allclose(combine(REWARDS[:2], PRESENT[:2], weights).values, [1.0, -1.0])
    gradient = jax.grad(lambda r: combine(r, PRESENT, WEIGHTS).values.sum())(REWARDS)
    np.testing.assert_allclose(gradient[:3], [[1, 2, -0.5], [3.5 / 1.5, 0, -0.5 * 3.5 / 1.5], [0, 0, -3.5]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda w: combine(REWARDS, PRESENT, w).values.sum())(WEIGHTS)).all()


def test_ensembles():
    scores = jnp.array([[1.0, 2.0, 6.0], [4.0, NAN, 2.0], [NAN, 5.0, NAN], [NAN, NAN, NAN]])
    present = jnp.isfinite(scores)
    variance = np.array([14 / 3, 1.0, 0.0])
    for got, expected in (
        (ensemble_mean(scores, present), [3.0, 3.0, 5.0]),
        (ensemble_worst(scores, present), [1.0, 2.0, 5.0]),
        (ensemble_cautious(scores, present, 0.5), np.array([3.0, 3.0, 5.0]) - 0.5 * variance),
    ):
        np.testing.assert_allclose(got.values, [*expected, 0.0], rtol=1e-6)
        assert got.valid.tolist() == [True, True, True, False]
    for got in (
        ensemble_mean(scores, present, least=2),
        ensemble_worst(scores, present, least=2),
        ensemble_cautious(scores, present, 0.5, least=2),
    ):
        assert got.valid.tolist() == [True, True, False, False]
        assert float(got.values[2]) == 0
    np.testing.assert_allclose(
        ensemble_cautious(scores, present, 0.5).values[0], scores[0].mean() - 0.5 * scores[0].var()
    )
    np.testing.assert_array_equal(jax.grad(lambda s: ensemble_worst(s, present).values.sum())(scores)[0], [1, 0, 0])


def test_all_of_it_everywhere():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(8, 3)).astype(np.float32)
    valid = rng.random((8, 3)) > 0.3
    valid[4] = False
    scores[~valid] = NAN

    def everything(scores, valid):
        return (
            combine(scores, valid, WEIGHTS),
            ensemble_mean(scores, valid),
            ensemble_worst(scores, valid),
            ensemble_cautious(scores, valid, 0.3, least=2),
            clip(scores, valid, -0.5, 0.5),
            length_penalty(valid, per_token=0.1),
        )

    same_everywhere(everything, scores, valid, rtol=1e-5)


def test_weights_count_for_a_single_reward_too_and_must_be_one_for_each():
    judged = Feedback.single(jnp.array([1.0, 2.0]), jnp.array([True, False]))
    rollout = jax.tree.map(lambda x: x[:2], ROLLOUT)
    rewards = shaped_rewards(Shaping(weights=(-2.0,)), identity_normaliser(), judged, rollout)
    np.testing.assert_allclose(rewards.score, [-2, 0])
    np.testing.assert_array_equal(rewards.valid, [True, False])
    with pytest.raises(UserError, match="2 entries, but the feedback gives 1 rewards"):
        shaped_rewards(Shaping(weights=(1.0, 2.0)), identity_normaliser(), judged, rollout)
