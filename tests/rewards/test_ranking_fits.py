"""Utilities from comparisons and lists: choix, SciPy, finite differences; the same under every transform."""

import math
from functools import partial

import choix
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from rlaif_jax.parallel import make_mesh, pmap_step, shard_step
from rlaif_jax.rewards import rankings
from rlaif_jax.rewards.rankings import fit_bradley_terry, fit_davidson, fit_plackett_luce

pytestmark = pytest.mark.slow  # as a whole: many programs to compile

NAN = float("nan")
ITEMS, LISTS, K = 7, 160, 4

fit_pairs = jax.jit(fit_bradley_terry, static_argnames="num_items")
fit_ties = jax.jit(fit_davidson, static_argnames="num_items")
fit_lists = jax.jit(fit_plackett_luce, static_argnames=("num_items", "unplaced"))


@pytest.fixture(scope="module")
def utilities():
    return np.linspace(-1.5, 1.5, ITEMS)[np.random.default_rng(3).permutation(ITEMS)]


@pytest.fixture(scope="module")
def pairs(utilities):
    """first, second, probability (0 or 1) of 300 comparisons, in float32."""
    rng = np.random.default_rng(4)
    first = rng.integers(0, ITEMS, 300)
    second = (first + rng.integers(1, ITEMS, 300)) % ITEMS
    won = rng.random(300) < 1 / (1 + np.exp(utilities[second] - utilities[first]))
    return first, second, won.astype(np.float32)


@pytest.fixture(scope="module")
def lists(utilities):
    """Items [LISTS, K] and their ranks; the last places of some lists are padding that holds any number."""
    rng = np.random.default_rng(5)
    items = np.stack([rng.permutation(ITEMS)[:K] for _ in range(LISTS)])
    noisy = utilities[items] + rng.gumbel(size=items.shape)
    ranks = np.argsort(np.argsort(-noisy, axis=1), axis=1) + 1
    mask = np.arange(K) < rng.integers(2, K + 1, (LISTS, 1))
    return np.where(mask, items, -77), ranks, mask


def won_pairs(pairs):
    return [(a, b) if won else (b, a) for a, b, won in zip(*pairs)]


def ordered(lists):
    return [sorted(i[m], key=dict(zip(i[m], r[m])).get) for i, r, m in zip(*lists)]


def test_bradley_terry_equals_choix(pairs):
    got = fit_pairs(*pairs, num_items=ITEMS, ridge=0.0)
    np.testing.assert_allclose(got, choix.ilsr_pairwise(ITEMS, won_pairs(pairs), tol=1e-10), atol=1e-5)
    assert abs(got.mean()) < 1e-6
    # choix's penalty is alpha |u|^2, ours ridge / 2 |u|^2
    expected = choix.opt_pairwise(ITEMS, won_pairs(pairs), alpha=1.5, tol=1e-10)
    np.testing.assert_allclose(fit_pairs(*pairs, num_items=ITEMS, ridge=3.0), expected, atol=1e-5)


def test_plackett_luce_equals_choix(lists):
    items, ranks, mask = lists
    got = fit_lists(items, ranks, None, mask, num_items=ITEMS, ridge=0.0)
    np.testing.assert_allclose(got, choix.ilsr_rankings(ITEMS, ordered(lists), tol=1e-10), atol=1e-5)
    expected = choix.opt_rankings(ITEMS, ordered(lists), alpha=1.5, tol=1e-10)
    np.testing.assert_allclose(
        fit_lists(items, ranks, None, mask, num_items=ITEMS, ridge=3.0), expected - expected.mean(), atol=1e-5
    )


def test_lists_of_two_fit_like_pairs(pairs):
    first, second, won = pairs
    ranks = np.stack([2 - won, 1 + won], axis=1).astype(int)
    ranks[::9] = 1
    soft = np.where(np.arange(len(won)) % 9 == 0, 0.5, won)
    got = fit_lists(np.stack([first, second], axis=1), ranks, num_items=ITEMS)
    np.testing.assert_allclose(got, fit_pairs(first, second, soft, num_items=ITEMS), atol=1e-5)


def test_the_best_of_a_list_equals_choix(lists):
    """Of each list only the best is known: Luce's choice axiom."""
    items, ranks, mask = lists
    best = np.where(ranks == np.where(mask, ranks, 9).min(1, keepdims=True), 1, 0)
    data = [(row[0], row[1:]) for row in ordered(lists)]
    got = fit_lists(items, best, None, mask, num_items=ITEMS, ridge=0.02, unplaced="below")
    np.testing.assert_allclose(got, choix.opt_top1(ITEMS, data, alpha=0.01, tol=1e-10), atol=1e-5)


def test_davidson_equals_scipy_and_finds_the_tie(utilities):
    rng = np.random.default_rng(6)
    first = rng.integers(0, ITEMS, 3000)
    second = (first + rng.integers(1, ITEMS, 3000)) % ITEMS
    half = (utilities[first] - utilities[second]) / 2
    chance = np.exp(np.stack([half, -half, np.full(3000, math.log(0.8))], 1))
    outcome = np.eye(3)[(chance.cumsum(1) / chance.sum(1, keepdims=True) < rng.random((3000, 1))).sum(1)]

    def objective(x):
        half = (x[first] - x[second]) / 2
        logits = np.stack([half, -half, np.full(3000, x[-1])], 1)
        return (np.log(np.exp(logits).sum(1)) - (outcome * logits).sum(1)).sum() + 0.5 * (x**2).sum()

    expected = minimize(objective, np.zeros(ITEMS + 1), method="BFGS", options={"gtol": 1e-4}).x
    got, log_tie = fit_ties(first, second, outcome, num_items=ITEMS, ridge=1.0)
    np.testing.assert_allclose([*got, log_tie], expected, atol=1e-4)
    assert math.exp(log_tie) == pytest.approx(0.8, rel=0.1)
    np.testing.assert_allclose(got, utilities, atol=0.2)
    # Nobody tied, everybody tied: the ridge keeps it finite.
    for each in (0, 2):
        got, log_tie = fit_ties(first, second, np.tile(np.eye(3)[each], (3000, 1)), num_items=ITEMS, ridge=1.0)
        assert np.isfinite(got).all() and abs(log_tie) > 2


def test_many_items_are_fitted_in_linear_memory_to_the_optimum():
    """2,000 items and 20,000 comparisons: the gradient in float64 vanishes; a dense curvature took ten seconds."""
    rng = np.random.default_rng(8)
    items, count = 2000, 20_000
    first = rng.integers(0, items, count)
    second = (first + rng.integers(1, items, count)) % items
    truth = rng.normal(size=items)
    won = (rng.random(count) < 1 / (1 + np.exp(truth[second] - truth[first]))).astype(np.float32)
    got = np.asarray(fit_pairs(first, second, won, num_items=items), np.float64)
    error = 1 / (1 + np.exp(got[second] - got[first])) - won
    gradient = np.bincount(first, error, items) - np.bincount(second, error, items) + 0.01 * got
    np.testing.assert_allclose(gradient, 0, atol=1e-4)
    assert abs(got.mean()) < 1e-6 and np.corrcoef(got, truth)[0, 1] > 0.8


def test_conjugate_gradients_give_the_numbers_of_the_direct_solver(pairs, lists, monkeypatch):
    first, second, won = pairs
    items, ranks, mask = lists
    ties = np.stack([0.8 * won, 0.8 * (1 - won), np.full(300, 0.2)], 1)

    def fits():
        slope = jax.grad(
            lambda p: fit_bradley_terry(first, second, p, num_items=ITEMS, ridge=0.5) @ jnp.arange(float(ITEMS))
        )
        return jax.jit(
            lambda: (
                fit_bradley_terry(first, second, won, num_items=ITEMS),
                fit_davidson(first, second, ties, num_items=ITEMS),
                fit_plackett_luce(items, ranks, None, mask, num_items=ITEMS),
                slope(jnp.asarray(won)),
            )
        )()

    direct = fits()
    monkeypatch.setattr(rankings, "MAX_DENSE", 0)
    for a, b in zip(jax.tree.leaves(direct), jax.tree.leaves(fits())):
        np.testing.assert_allclose(b, a, atol=2e-5)


def test_items_that_won_everything_or_nothing_or_never_met_stay_finite():
    first, second = np.array([0] * 40 + [1] * 40), np.array([1] * 40 + [2] * 40)
    got = fit_pairs(first, second, np.ones(80, np.float32), num_items=4, ridge=0.01)
    assert got[0] > got[1] > got[2] and np.abs(got).max() < 12
    assert abs(got[3]) < 1e-4  # the prior alone
    bare = fit_pairs(first, second, np.ones(80, np.float32), num_items=4, ridge=0.0)
    assert np.isfinite(bare).all() and bare[0] > bare[1] > bare[2]


def test_weights_count_and_soft_labels_are_shares(pairs):
    first, second, won = pairs
    twice = [np.concatenate([x, x[:50]]) for x in pairs]
    weight = np.where(np.arange(300) < 50, 2.0, 1.0)
    got = fit_pairs(first, second, won, weight, num_items=ITEMS)
    np.testing.assert_allclose(got, fit_pairs(*twice, num_items=ITEMS), atol=1e-5)
    dirty = np.concatenate([won, [NAN, 0]]).astype(np.float32), np.concatenate([weight, [0, NAN]])
    again = fit_pairs(np.append(first, [3, 3]), np.append(second, [5, 5]), *dirty, num_items=ITEMS)
    np.testing.assert_allclose(again, got, atol=1e-6)
    three_of_four = fit_pairs(np.zeros(4, int), np.ones(4, int), np.float32([1, 1, 1, 0]), num_items=2)
    share = fit_pairs(np.array([0]), np.array([1]), np.float32([0.75]), np.array([4.0]), num_items=2)
    np.testing.assert_allclose(share, three_of_four, atol=1e-6)


def test_one_list_says_more_than_one_pair(utilities):
    """Recovery from equally many judgements: lists of four against pairs, mean over ten draws."""
    rng = np.random.default_rng(7)
    items = np.stack([rng.permutation(ITEMS)[:K] for _ in range(10 * 30)]).reshape(10, 30, K)
    noisy = utilities[items] + rng.gumbel(size=items.shape)
    ranks = np.argsort(np.argsort(-noisy, axis=-1), axis=-1) + 1
    by_list = jax.vmap(partial(fit_lists, num_items=ITEMS, ridge=0.3))(items, ranks)
    better = (ranks[..., 0] < ranks[..., 1]).astype(np.float32)
    by_pair = jax.vmap(partial(fit_pairs, num_items=ITEMS, ridge=0.3))(items[..., 0], items[..., 1], better)
    error = [np.sqrt(((np.asarray(x) - utilities) ** 2).mean()) for x in (by_list, by_pair)]
    assert error[0] < 0.75 * error[1]


def test_the_fit_has_the_gradient_of_its_optimum(pairs):
    first, second, won = pairs
    soft = jnp.asarray(0.1 + 0.8 * won)
    weight = jnp.ones(300)

    def spread(p, weight, ridge):
        return fit_bradley_terry(first, second, p, weight, num_items=ITEMS, ridge=ridge) @ jnp.arange(ITEMS)

    slopes = jax.jit(jax.grad(spread, argnums=(0, 1, 2)))(soft, weight, 0.5)
    value, one = jax.jit(spread), jnp.zeros(300).at[11].set(1.0)
    numeric = [
        (value(soft + 0.3 * one, weight, 0.5) - value(soft - 0.3 * one, weight, 0.5)) / 0.6,
        (value(soft, weight + 0.3 * one, 0.5) - value(soft, weight - 0.3 * one, 0.5)) / 0.6,
        (value(soft, weight, 0.6) - value(soft, weight, 0.4)) / 0.2,
    ]
    np.testing.assert_allclose([slopes[0][11], slopes[1][11], slopes[2]], numeric, rtol=0.01, atol=1e-4)


def test_fits_under_transforms(pairs, lists):
    """The comparisons split over eight devices, by pmap and on a mesh, and several problems at once by vmap; labels and weights
    in bfloat16, which has these numbers exactly."""
    dtype = jnp.bfloat16
    first, second, won = (x[:296] for x in pairs)
    batch = {"pair": (first, second, jnp.asarray(won, dtype), jnp.ones(296, dtype))}
    items, ranks, mask = (x[:, :3] for x in lists)
    weight = jnp.asarray(np.arange(LISTS) % 3, dtype)
    batch["list"] = (items, ranks, weight, mask)

    def fit(state, batch, *, axis_name=None):
        pair = fit_bradley_terry(*batch["pair"], num_items=ITEMS, axis_name=axis_name)
        return state, (pair, fit_plackett_luce(*batch["list"], num_items=ITEMS, axis_name=axis_name))

    expected = (
        fit_pairs(first, second, won, num_items=ITEMS),
        fit_lists(items, ranks, np.arange(LISTS) % 3 * 1.0, mask, num_items=ITEMS),
    )
    state = jnp.zeros(())
    several = jax.jit(jax.vmap(fit, (None, 0)))(state, jax.tree.map(lambda x: jnp.stack([x, x]), batch))[1]
    runs = [
        pmap_step(fit, donate=False)(state, batch)[1],
        shard_step(fit, make_mesh(), donate=False)(state, batch)[1],
        jax.tree.map(lambda x: x[1], several),
    ]
    for got in runs:
        for a, b in zip(expected, got):
            assert b.dtype == jnp.float32
            np.testing.assert_allclose(b, a, atol=1e-5)
