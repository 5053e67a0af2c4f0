"""Crowd-BT by finite differences, against choix and from simulation; the same under every transform."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlaif_jax.rewards.crowd_bt as crowd_bt_module
from rlaif_jax.rewards.crowd_bt import (
    CrowdBT,
    crowd_bt,
    crowd_bt_log_prob,
    judgement_probability,
    pair_probability,
    reliability_given,
)
from rlaif_jax.rewards.ratings import Utilities
from tests.rewards.everywhere import fit_agrees_everywhere

pytestmark = pytest.mark.slow  # as a whole: many programs to compile


jitted_bt = jax.jit(crowd_bt, static_argnames=("num_items", "num_workers"))


def comparisons(seed=0, items=25, count=3000):
    rng = np.random.default_rng(seed)
    eta = np.r_[rng.uniform(0.6, 1, 12), [0.5] * 3, rng.uniform(0, 0.3, 5)]
    utility = 1.5 * rng.normal(size=items)
    first = rng.integers(0, items, count)
    second = (first + rng.integers(1, items, count)) % items
    worker = rng.integers(0, 20, count)
    better = rng.random(count) < 1 / (1 + np.exp(utility[second] - utility[first]))
    wins = np.where(rng.random(count) < eta[worker], better, ~better).astype(np.float32)
    return first, second, worker, wins, utility, eta


def test_crowd_bt_is_the_formula_and_its_gradient():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        difference, logit, wins = rng.normal(0, 3, 20), rng.normal(0, 2, 20), rng.random(20)
        sigma = lambda x: 1 / (1 + np.exp(-x))
        eta = sigma(logit)
        p = eta * sigma(difference) + (1 - eta) * sigma(-difference)
        found = crowd_bt_log_prob(*map(jnp.asarray, (difference, logit, wins)))
        np.testing.assert_allclose(found, wins * np.log(p) + (1 - wins) * np.log(1 - p), rtol=1e-10)
        total = lambda d, e: crowd_bt_log_prob(d, e, jnp.asarray(wins)).sum()
        jax.test_util.check_grads(total, (jnp.asarray(difference), jnp.asarray(logit)), 2, eps=1e-5)
        far = crowd_bt_log_prob(jnp.array([800.0]), jnp.array([900.0]), jnp.array([0.0]))
        assert np.isfinite(far).all()


def test_crowd_bts_objective_and_gradient_agree(monkeypatch):
    calls = []

    def spy(objective, start, scale, **_):
        calls.append((objective, start))
        return start, jnp.int32(0), jnp.zeros(())

    monkeypatch.setattr(crowd_bt_module, "lbfgs", spy)
    with jax.enable_x64(True):
        first, second, worker, wins, *_ = comparisons(items=6, count=40)
        crowd_bt(first, second, worker, wins.astype(float), num_items=6, num_workers=20)
        objective, start = calls[0]
        rng = np.random.default_rng(1)
        point, direction = (jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), start) for _ in range(2))
        at = lambda h: float(objective(jax.tree.map(lambda x, d: x + h * d, point, direction))[0])
        slope = sum(float(jnp.vdot(g, d)) for g, d in zip(objective(point)[1], direction))
        np.testing.assert_allclose(slope, (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-7)


def test_with_perfect_workers_it_is_bradley_terry():
    choix = pytest.importorskip("choix")
    first, second, worker, wins, *_ = comparisons(items=8, count=200)
    pairs = [(i, j) if w else (j, i) for i, j, w in zip(first, second, wins)]
    sure = jitted_bt(first, second, worker, wins, num_items=8, num_workers=20, prior=(1e6, 1e-3), utility_std=1.5)
    assert sure.reliability.min() > 0.9999
    oracle = choix.opt_pairwise(8, pairs, alpha=0.5 / 1.5**2)  # choix's penalty is alpha |s|^2
    np.testing.assert_allclose(sure.items.value, oracle, atol=1e-3)


def test_crowd_bt_finds_planted_workers():
    first, second, worker, wins, utility, eta = comparisons()
    found = jitted_bt(first, second, worker, wins, num_items=25, num_workers=20)
    assert np.corrcoef(found.reliability, eta)[0, 1] > 0.95
    assert np.corrcoef(found.items.value, utility)[0, 1] > 0.97
    assert found.gradient < 1e-3
    plain = jitted_bt(first, second, worker, wins, num_items=25, num_workers=20, prior=(1e6, 1e-3)).items.value
    assert np.corrcoef(found.items.value, utility)[0, 1] > np.corrcoef(plain, utility)[0, 1] + 0.005
    soft = pair_probability(found.items.value, first, second)
    truth = 1 / (1 + np.exp(utility[second] - utility[first]))
    assert np.abs(soft - truth).mean() < 0.08


def test_comparisons_that_are_missing_ties_and_soft():
    first, second, worker, wins, *_ = comparisons(items=6, count=60)
    fit = jax.jit(partial(crowd_bt, num_items=8, num_workers=21))
    pad = lambda x, *y: np.r_[x, y]
    clean = fit(*(pad(x, 0, 1, 1) for x in (first, second, worker)), pad(wins, 1, 1, 1), pad(np.ones(60), 0, 0, 0))
    dirty = fit(
        pad(first, 6, 2, 3),
        pad(second, 7, 2, 1),
        pad(worker, 20, 0, 0),
        pad(wins, 1, 1, np.nan),
        pad(np.ones(60), 0, 1, 1),
    )
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty)):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(clean.items.valid, np.arange(8) < 6)
    np.testing.assert_allclose(clean.reliability[20], 0.8, atol=1e-3)  # nobody knows: the prior's mode
    halves = fit(*(pad(x, 0, 1, 1) for x in (first, second, worker)), np.full(63, 0.5), np.ones(63))
    np.testing.assert_allclose(halves.items.value, 0, atol=1e-4)
    low = jitted_bt(first, second, worker, jnp.asarray(wins, jnp.bfloat16), num_items=8, num_workers=21)
    np.testing.assert_allclose(low.items.value, clean.items.value, atol=1e-3)
    assert low.items.value.dtype == jnp.float32


def test_one_judgement_moves_the_soft_label_by_bayes():
    fit = CrowdBT(
        items=Utilities(jnp.array([0.0, 0.0, 2.0]), jnp.ones(3), jnp.ones(3, bool)),
        reliability=jnp.array([0.9, 0.5, 0.1]),
        log_likelihood=jnp.zeros(()),
        steps=jnp.int32(0),
        gradient=jnp.zeros(()),
    )
    first, second, worker = np.array([0, 0, 0, 2]), np.array([1, 1, 1, 0]), np.array([0, 1, 2, 1])
    found = judgement_probability(fit, first, second, worker, np.array([1, 1, 1, 1.0]))
    np.testing.assert_allclose(found, [0.9, 0.5, 0.1, 1 / (1 + np.exp(-2))], rtol=1e-5)
    np.testing.assert_allclose(judgement_probability(fit, 0, 1, 0, 0.0), 0.1, rtol=1e-5)
    np.testing.assert_allclose(judgement_probability(fit, 0, 1, 0, 0.75), 0.75 * 0.9 + 0.25 * 0.1, rtol=1e-5)


def test_one_device_vmap_pmap_and_eight_shards_agree():
    problems = [comparisons(seed, items=6, count=64)[:4] for seed in (0, 1)]
    fit = partial(crowd_bt, num_items=6, num_workers=20, max_steps=10)
    fit_agrees_everywhere(fit, problems, rtol=2e-3, atol=2e-3)


def test_reliability_given_the_fits_utilities_is_the_fits_reliability():
    """Both are the optimum of one posterior: its maximum over the workers at the utilities of its joint maximum."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(10, size=(2, 400))
    worker = rng.integers(4, size=400)
    wins = rng.random(400) < np.where(
        rng.random(400) < np.array([0.95, 0.8, 0.5, 0.2])[worker], first < second, first > second
    )
    given = (first, second, worker, wins.astype(np.float32))
    fit = crowd_bt(*given, num_items=10, num_workers=4)
    weight = (first != second).astype(np.float32)
    eta = reliability_given(fit.items.value, *given, weight, num_workers=4, steps=2000)
    np.testing.assert_allclose(eta, fit.reliability, atol=5e-3)
