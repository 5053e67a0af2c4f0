"""Win rates, plain and length-controlled, against SciPy and numbers worked out by hand."""

import numpy as np
import pytest
from scipy import optimize, stats

from rlaif_jax.quality.win_rates import length_controlled_win_rate, pair_outcomes, verdict_of, win_rate, win_rate_ci

NAN = float("nan")


def test_win_rate_counts_ties_half_and_leaves_out_what_was_not_judged():
    a = [3.0, 1.0, 2.0, NAN, 5.0]
    b = [1.0, 2.0, 2.0, 1.0, NAN]
    np.testing.assert_array_equal(pair_outcomes(a, b), [1, 0, 0.5, NAN, NAN])
    assert win_rate(a, b) == 0.5
    assert win_rate([2, 2, 2, 0], [1, 1, 1, 1]) == 0.75
    assert win_rate([np.inf, -np.inf], [np.inf, 0.0]) == 0.25


def test_win_rate_ci_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        estimate = win_rate_ci(rng.normal(0.3, 1.0, 100), rng.normal(0.0, 1.0, 100), seed=trial, resamples=400)
        covered += estimate.low <= stats.norm.cdf(0.3 / np.sqrt(2)) <= estimate.high
    assert 0.9 <= covered / 200 <= 0.99


def _reference_fit(x, y, ridge):
    def objective(theta):
        z = theta[0] + theta[1] * x
        penalty = 0.5 * (1e-3 * theta[0] ** 2 + ridge * theta[1] ** 2)
        return np.sum(np.logaddexp(0, z) - y * z) + penalty

    best = optimize.minimize(objective, np.zeros(2), method="BFGS", options={"gtol": 1e-8})
    return 1 / (1 + np.exp(-best.x[0]))


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_length_controlled_win_rate_equals_a_general_optimiser(ridge):
    rng = np.random.default_rng(1)
    difference = rng.normal(10, 20, 300).round()
    x = np.tanh(difference / difference.std())
    y = (rng.random(300) < 1 / (1 + np.exp(-(0.4 + 1.5 * x)))).astype(float)
    y[:20] = 0.5
    got = length_controlled_win_rate(y, difference, seed=0, resamples=200, ridge=ridge)
    assert got.value == pytest.approx(_reference_fit(x, y, ridge), abs=1e-6)
    assert got.low < got.value < got.high


def test_length_control_finds_nothing_where_length_did_it_all():
    rng = np.random.default_rng(2)
    difference = rng.normal(15, 15, 2000)
    wins = (rng.random(2000) < 1 / (1 + np.exp(-2 * np.tanh(difference / 15)))).astype(float)
    assert wins.mean() > 0.7
    got = length_controlled_win_rate(wins, difference, seed=0, resamples=300)
    assert got.low < 0.5 < got.high
    assert got.value == pytest.approx(0.5, abs=0.05)


def test_length_control_interval_equals_the_delta_method():
    # With no difference at all it is the win rate, whose standard error is known.
    wins = np.r_[np.ones(120), np.zeros(80)]
    got = length_controlled_win_rate(wins, np.zeros(200), seed=0, resamples=4000)
    error = np.sqrt(0.6 * 0.4 / 200)
    np.testing.assert_allclose(got, [0.6, 0.6 - 1.96 * error, 0.6 + 1.96 * error], atol=0.01)


@pytest.mark.parametrize(
    ("wins", "difference"),
    [
        ([1.0] * 10, list(range(10))),
        ([0.0] * 10, list(range(10))),
        ([0.0] * 5 + [1.0] * 5, [-9, -8, -7, -6, -5, 5, 6, 7, 8, 9]),
        ([1.0], [0.0]),
        ([0.0] * 50 + [1.0], [0.0] * 50 + [1e6]),
    ],
)
def test_length_control_survives_separation(wins, difference):
    x = np.asarray(difference, float)
    x = np.tanh(x / x.std()) if x.std() else x
    got = length_controlled_win_rate(wins, difference, seed=0, resamples=300)
    assert np.all(np.isfinite(got))
    assert 0 <= got.low <= got.high <= 1
    assert got.value == pytest.approx(_reference_fit(x, np.asarray(wins), 1.0), abs=1e-4)


def test_length_control_cannot_tell_a_constant_difference_from_quality():
    assert np.isnan(length_controlled_win_rate([1, 0, 1], [5, 5, 5], seed=0)).all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: win_rate([1, 2], [1]), "got 2 and 1"),
        (lambda: win_rate([NAN], [1]), "none of 1 values is judged"),
        (lambda: win_rate([[1, 2]], [[1, 2]]), r"got \[1, 2\]"),
        (lambda: length_controlled_win_rate([2.0], [0], seed=0), r"in \[0, 1\]"),
        (lambda: length_controlled_win_rate([1.0], [0], seed=0, ridge=0), "ridge"),
    ],
)
def test_impossible_input_is_refused_with_its_numbers(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(
    ("low", "high", "even", "verdict"),
    [
        (0.51, 0.6, 0.5, "better"),
        (0.5, 0.6, 0.5, "no different"),
        (0.4, 0.5, 0.5, "no different"),
        (0.4, 0.49, 0.5, "worse"),
        (0.1, 0.2, 0.0, "better"),
        (-0.2, -0.1, 0.0, "worse"),
    ],
)
def test_the_verdict_of_an_interval(low, high, even, verdict):
    assert verdict_of(low, high, even) == verdict
