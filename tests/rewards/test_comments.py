"""Comments: the posterior against ridge regression and the formula in float64, missing comments, every transform."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlaif_jax.parallel import make_mesh
from rlaif_jax.rewards.comments import (
    AspectPosterior,
    Pragmatic,
    aspect_posterior,
    aspect_posterior_scan,
    aspect_prior,
    aspect_rewards,
    comment_rewards,
    pool_comments,
    valence,
)
from tests.rewards.everywhere import close, same_everywhere

NAN = float("nan")


def comments(count: int, aspects: int = 5, seed: int = 0, noise: float = 0.3):
    """(true weights, valences, aspects) of comments that speak of one or two aspects each."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=aspects)
    weights /= np.linalg.norm(weights)
    mentioned = np.zeros((count, aspects), np.float32)
    for row in mentioned:
        row[rng.choice(aspects, rng.integers(1, 3), replace=False)] = 1
    v = mentioned @ weights + noise * rng.normal(size=count)
    return weights, v.astype(np.float32), mentioned


def one_by_one(prior_precision, precisions, v, x):
    """Sumers 2021's update as printed, in float64."""
    size = x.shape[1]
    precision, mean = prior_precision * np.eye(size), np.zeros(size)
    for p, value, row in zip(precisions, v.astype(np.float64), x.astype(np.float64)):
        new = precision + p * np.outer(row, row)
        mean = np.linalg.inv(new) @ (precision @ mean + p * value * row)
        precision = new
    return mean, precision


def test_valence_is_the_difference_of_the_two_probabilities():
    got = valence(jnp.array([0.0, np.log(3.0), -50.0, NAN]), jnp.array([True, True, True, True]))
    np.testing.assert_allclose(got.values, [0, 0.75 - 0.25, -1, 0], atol=1e-6)
    assert got.valid.tolist() == [True, True, True, False]


# ---- The posterior


def test_the_posterior_is_ridge_regression_and_the_printed_formula():
    sklearn = pytest.importorskip("sklearn.linear_model")
    _, v, x = comments(40)
    valid = jnp.ones(40, bool)
    got = aspect_posterior(aspect_prior(5, 2.0), v, x, valid, precision=4.0)
    ridge = sklearn.Ridge(alpha=2.0 / 4.0, fit_intercept=False).fit(x, v)
    np.testing.assert_allclose(got.mean, ridge.coef_, rtol=1e-4)
    precisions = np.linspace(0.5, 3, 40)
    got = aspect_posterior(aspect_prior(5, 2.0), v, x, valid, precision=jnp.asarray(precisions))
    mean, precision = one_by_one(2.0, precisions, v, x)
    np.testing.assert_allclose(got.mean, mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.precision, precision, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pragmatic", [None, Pragmatic(), Pragmatic(valence=-0.3, precision=0.5)])
def test_one_at_a_time_and_all_at_once_are_equal_in_any_order(pragmatic):
    _, v, x = comments(30)
    valid = np.random.default_rng(1).random(30) > 0.2
    prior = AspectPosterior(mean=jnp.linspace(-1, 1, 5), precision=2 * jnp.eye(5) + 0.3)
    options = {"precision": jnp.linspace(0.5, 2, 30), "pragmatic": pragmatic}
    whole = aspect_posterior(prior, v, x, valid, **options)
    last, means = aspect_posterior_scan(prior, v, x, valid, **options)
    close(last, whole, "scan", 1e-4, 1e-5)
    np.testing.assert_allclose(means[-1], whole.mean, rtol=1e-4, atol=1e-5)
    assert means.shape == (30, 5)
    order = np.random.default_rng(2).permutation(30)
    shuffled = aspect_posterior(
        prior, v[order], x[order], valid[order], **options | {"precision": options["precision"][order]}
    )
    close(shuffled, whole, "shuffled", 1e-4, 1e-5)
    # In two parts: yesterday's posterior is today's prior.
    halves = prior
    for part in (slice(0, 11), slice(11, 30)):
        halves = aspect_posterior(
            halves, v[part], x[part], valid[part], **options | {"precision": options["precision"][part]}
        )
    close(halves, whole, "in two parts", 1e-4, 1e-5)


def test_a_missing_comment_and_one_about_nothing_change_nothing():
    _, v, x = comments(12)
    x[3] = 0
    v[5] = NAN
    x[6, 2] = NAN
    valid = np.ones(12, bool)
    valid[[0, 8]] = False
    v[8] = 1e9
    kept = [i for i in range(12) if i not in (0, 3, 5, 6, 8)]
    for pragmatic in (None, Pragmatic()):
        got = aspect_posterior(aspect_prior(5), v, x, valid, pragmatic=pragmatic)
        few = aspect_posterior(aspect_prior(5), v[kept], x[kept], np.ones(len(kept), bool), pragmatic=pragmatic)
        close(got, few, "kept", 1e-5, 1e-6)
    nothing = aspect_posterior(aspect_prior(5), v, x, np.zeros(12, bool), pragmatic=Pragmatic())
    close(nothing, aspect_prior(5), "nothing")


def test_pragmatic_is_the_literal_posterior_of_what_was_left_unsaid():
    _, v, x = comments(10)
    said = aspect_posterior(aspect_prior(5), v, x, np.ones(10, bool), precision=2.0, pragmatic=Pragmatic(-0.2, 0.25))
    unsaid = np.concatenate([np.eye(5, dtype=np.float32)[row == 0] for row in x])
    both = np.concatenate([v, np.full(len(unsaid), -0.2, np.float32)]), np.concatenate([x, unsaid])
    precision = jnp.array([2.0] * 10 + [0.5] * len(unsaid))
    literal = aspect_posterior(aspect_prior(5), *both, np.ones(len(both[0]), bool), precision=precision)
    close(said, literal, "pragmatic", 1e-4, 1e-5)
    never = np.concatenate([x[:, :4], np.zeros((10, 1), np.float32)], 1)
    assert float(aspect_posterior(aspect_prior(5), v, never, np.ones(10, bool)).mean[4]) == 0
    assert (
        -0.1
        < float(aspect_posterior(aspect_prior(5), v, never, np.ones(10, bool), pragmatic=Pragmatic()).mean[4])
        < -0.01
    )


@pytest.mark.parametrize("pragmatic", [None, Pragmatic()])
def test_the_true_weights_come_out_as_comments_come_in(pragmatic):
    cosines = []
    for seed in range(20):
        weights, v, x = comments(200, seed=seed)
        _, means = aspect_posterior_scan(aspect_prior(5), v, x, jnp.ones(200, bool), pragmatic=pragmatic)
        cosines.append([float(m @ weights / np.linalg.norm(m)) for m in np.asarray(means)[[1, 4, 19, 199]]])
    after = np.mean(cosines, 0)  # 2, 5, 20 and 200 comments
    assert np.all(np.diff(after) > 0)
    assert after[0] < 0.75
    assert after[2] > 0.9
    assert after[3] > 0.98


def test_a_rater_who_is_not_to_be_trusted_weighs_less():
    weights, v, x = comments(60)
    liar = np.arange(60) % 2 == 0
    v = np.where(liar, -v, v)

    def cosine(precision):
        mean = aspect_posterior(aspect_prior(5), v, x, jnp.ones(60, bool), precision=precision).mean
        return float(mean @ weights / np.linalg.norm(mean))

    assert cosine(jnp.where(jnp.asarray(liar), 0.01, 1.0)) > 0.95 > cosine(1.0)


def test_the_reward_of_an_answer_and_its_variance():
    _, v, x = comments(30)
    posterior = aspect_posterior(aspect_prior(5), v, x, jnp.ones(30, bool), precision=3.0)
    features = np.random.default_rng(3).normal(size=(4, 5)).astype(np.float32)
    features[2, 1] = NAN
    rewards, variance = aspect_rewards(posterior, features, jnp.array([True, False, True, True]))
    covariance = np.linalg.inv(np.asarray(posterior.precision, np.float64))
    assert rewards.valid.tolist() == [True, False, False, True]
    for i in (0, 3):
        np.testing.assert_allclose(rewards.values[i], features[i] @ np.asarray(posterior.mean), rtol=1e-4)
        np.testing.assert_allclose(variance[i], features[i] @ covariance @ features[i], rtol=1e-4)
    np.testing.assert_array_equal(rewards.values[1:3], 0)
    np.testing.assert_array_equal(variance[1:3], 0)
    before, _ = aspect_rewards(aspect_prior(5), features, jnp.ones(4, bool)), None
    assert np.all(np.asarray(before[1])[[0, 3]] > np.asarray(variance)[[0, 3]])


# ---- Rewards


def test_one_valence_a_comment():
    got = comment_rewards(
        jnp.array([0.8, -0.5, 0.3, NAN]),
        jnp.array([[1.0, 0.0], [0.6, 0.5], [0.1, 0.4], [1.0, 1.0]]),
        jnp.array([True, True, True, True]),
    )
    np.testing.assert_allclose(got.overall.values, [0.8, -0.5, 0.3, 0.0])
    assert got.overall.valid.tolist() == [True, True, True, False]
    np.testing.assert_allclose(got.by_aspect.values, [[0.8, 0], [-0.5, -0.5], [0, 0], [0, 0]])
    assert got.by_aspect.valid.tolist() == [[True, False], [True, True], [False, False], [False, False]]


def test_one_valence_an_aspect():
    got = comment_rewards(
        jnp.array([[0.8, -0.4], [0.5, 0.1], [0.9, 0.9], [0.6, NAN]]),
        jnp.array([[1.0, 0.5], [0.2, 1.0], [0.0, 0.1], [1.0, 1.0]]),
        jnp.array([[True, True], [True, True], [True, True], [True, False]]),
    )
    np.testing.assert_allclose(got.overall.values, [(0.8 - 0.2) / 1.5, 0.1, 0.0, 0.6], rtol=1e-6)
    assert got.overall.valid.tolist() == [True, True, False, True]
    assert got.by_aspect.valid.tolist() == [[True, True], [False, True], [False, False], [True, False]]


def test_comments_on_one_answer_are_pooled():
    values = jnp.array([1.0, 0.0, 0.5, NAN, -1.0])
    answer = jnp.array([0, 0, 2, 2, 1])
    valid = jnp.array([True, True, True, True, False])
    got = pool_comments(values, valid, answer, 4, weights=jnp.array([3.0, 1.0, 1.0, 1.0, 1.0]))
    np.testing.assert_allclose(got.values, [0.75, 0, 0.5, 0])
    assert got.valid.tolist() == [True, False, True, False]
    by_aspect = pool_comments(
        jnp.stack([values, -values], -1), jnp.stack([valid, valid & (answer == 0)], -1), answer, 4
    )
    np.testing.assert_allclose(by_aspect.values, [[0.5, -0.5], [0, 0], [0.5, 0], [0, 0]])
    assert by_aspect.valid.tolist() == [[True, True], [False, False], [True, False], [False, False]]


# ---- Everywhere


def test_row_by_row_everywhere():
    _, v, x = comments(8)
    v[2], x[4] = NAN, 0
    valid = np.arange(8) != 6
    posterior = aspect_posterior(aspect_prior(5), *comments(30)[1:], jnp.ones(30, bool))
    same_everywhere(valence, v, valid)
    same_everywhere(comment_rewards, v, x, valid)
    same_everywhere(partial(aspect_rewards, posterior), x, valid, rtol=1e-5)
    by_aspect = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    same_everywhere(comment_rewards, by_aspect, x, by_aspect > -1)


def test_sums_over_devices_are_those_of_one():
    _, v, x = comments(16)
    valid = np.random.default_rng(1).random(16) > 0.3
    answer = np.arange(16) % 3
    mesh = make_mesh()

    def both(v, x, valid, answer, axis_name=None):
        posterior = aspect_posterior(aspect_prior(5), v, x, valid, pragmatic=Pragmatic(), axis_name=axis_name)
        return posterior, pool_comments(v, valid, answer, 3, axis_name=axis_name)

    arrays = tuple(map(jnp.asarray, (v, x, valid, answer)))
    plain = both(*arrays)
    split = [a.reshape(8, 2, *a.shape[1:]) for a in arrays]
    mapped = jax.pmap(partial(both, axis_name="data"), axis_name="data")(*split)
    for device in (0, 7):
        close(jax.tree.map(lambda y, d=device: y[d], mapped), plain, "pmap", 1e-5, 1e-6)
    rows = [jax.device_put(a, NamedSharding(mesh, PartitionSpec("data"))) for a in arrays]
    close(jax.jit(both)(*rows), plain, "sharded", 1e-5, 1e-6)
    raters = [jnp.stack([a, a[::-1]]) for a in arrays]
    batched = jax.vmap(both)(*raters)
    close(jax.tree.map(lambda y: y[0], batched), plain, "vmap", 1e-5, 1e-6)
    low = both(arrays[0].astype(jnp.bfloat16), arrays[1].astype(jnp.bfloat16), *arrays[2:])
    assert {leaf.dtype for leaf in jax.tree.leaves(low[0])} == {jnp.dtype("float32")}
    close(low[0], plain[0], "bfloat16", 0.02, 0.02)


def test_gradients_reach_the_classifier_and_a_missing_comment_has_none():
    _, v, x = comments(6)
    v[1] = NAN

    def reward(v, x):
        posterior = aspect_posterior(aspect_prior(5), v, x, jnp.arange(6) != 4, pragmatic=Pragmatic())
        return aspect_rewards(posterior, jnp.ones((1, 5)), jnp.ones(1, bool))[0].values[0]

    by_valence, by_aspect = jax.grad(reward, (0, 1))(jnp.asarray(v), jnp.asarray(x))
    assert np.isfinite(by_valence).all()
    assert np.isfinite(by_aspect).all()
    np.testing.assert_array_equal(by_valence[jnp.array([1, 4])], 0)
    assert np.all(by_valence[jnp.array([0, 2, 3, 5])] != 0)
