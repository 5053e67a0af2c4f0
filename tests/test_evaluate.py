"""Statistics of an evaluation against SciPy and against numbers worked out by hand."""

import numpy as np
import pytest
from scipy import optimize, stats

from rlaif_jax import evaluate
from rlaif_jax.config import UserError

NAN = float("nan")


def test_win_rate_counts_ties_half_and_leaves_out_what_was_not_judged():
    a = [3.0, 1.0, 2.0, NAN, 5.0]
    b = [1.0, 2.0, 2.0, 1.0, NAN]
    np.testing.assert_array_equal(evaluate.pair_outcomes(a, b), [1, 0, 0.5, NAN, NAN])
    assert evaluate.win_rate(a, b) == 0.5
    assert evaluate.win_rate([2, 2, 2, 0], [1, 1, 1, 1]) == 0.75
    assert evaluate.win_rate([np.inf, -np.inf], [np.inf, 0.0]) == 0.25


def test_bootstrap_ci_equals_scipy():
    values = np.random.default_rng(0).gamma(2.0, 1.5, size=120)
    low, high = evaluate.bootstrap_ci(values, seed=1, resamples=20_000)
    reference = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(7)
    ).confidence_interval
    np.testing.assert_allclose([low, high], [reference.low, reference.high], rtol=0.01)
    narrow = evaluate.bootstrap_ci(values, seed=1, resamples=20_000, level=0.5)
    assert low < narrow[0] < values.mean() < narrow[1] < high


def test_bootstrap_ci_is_a_function_of_the_seed_and_ignores_nan():
    values = np.random.default_rng(0).normal(size=50)
    first = evaluate.bootstrap_ci(values, seed=3)
    assert first == evaluate.bootstrap_ci(values, seed=3)
    assert first != evaluate.bootstrap_ci(values, seed=4)
    assert first == evaluate.bootstrap_ci(np.append(values, NAN), seed=3)
    assert evaluate.bootstrap_ci(np.ones(9), seed=0) == (1.0, 1.0)


def test_bootstrap_ci_of_chunks_is_the_one_of_a_single_chunk(monkeypatch):
    values = np.random.default_rng(0).normal(size=40)
    whole = evaluate.bootstrap_ci(values, seed=0, resamples=500)
    monkeypatch.setattr(evaluate, "_CHUNK", 40 * 7)
    np.testing.assert_allclose(evaluate.bootstrap_ci(values, seed=0, resamples=500), whole, rtol=1e-12)


def test_groups_widen_the_interval_as_the_design_effect_says():
    # 4 equal answers a prompt: 200 values hold the information of 50, so the interval is twice as wide.
    rng = np.random.default_rng(0)
    base = rng.normal(size=50)
    values, groups = np.repeat(base, 4), np.repeat([f"prompt {i}" for i in range(50)], 4)
    alone = np.diff(evaluate.bootstrap_ci(values, seed=0, resamples=8000))[0]
    together = np.diff(evaluate.bootstrap_ci(values, seed=0, resamples=8000, groups=groups))[0]
    exact = np.diff(evaluate.bootstrap_ci(base, seed=0, resamples=8000))[0]
    assert together == pytest.approx(2 * alone, rel=0.05)
    assert together == pytest.approx(exact, rel=0.05)


def test_groups_of_unequal_size_weigh_every_value_the_same():
    # Two groups: a resample draws (1,1), (1,2), (2,1) or (2,2), so the mean is 0, 3/4 or 1.
    low, high = evaluate.bootstrap_ci([0.0, 1, 1, 1], seed=0, groups=[0, 1, 1, 1], level=0.9)
    assert (low, high) == (0.0, 1.0)
    middle = evaluate.bootstrap_ci([0.0, 1, 1, 1], seed=0, groups=[0, 1, 1, 1], level=0.1)
    assert middle == (0.75, 0.75)


def test_win_rate_ci_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        estimate = evaluate.win_rate_ci(rng.normal(0.3, 1.0, 100), rng.normal(0.0, 1.0, 100), seed=trial, resamples=400)
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
    got = evaluate.length_controlled_win_rate(y, difference, seed=0, resamples=200, ridge=ridge)
    assert got.value == pytest.approx(_reference_fit(x, y, ridge), abs=1e-6)
    assert got.low < got.value < got.high


def test_length_control_finds_nothing_where_length_did_it_all():
    rng = np.random.default_rng(2)
    difference = rng.normal(15, 15, 2000)
    wins = (rng.random(2000) < 1 / (1 + np.exp(-2 * np.tanh(difference / 15)))).astype(float)
    assert wins.mean() > 0.7
    got = evaluate.length_controlled_win_rate(wins, difference, seed=0, resamples=300)
    assert got.low < 0.5 < got.high
    assert got.value == pytest.approx(0.5, abs=0.05)


def test_length_control_interval_equals_the_delta_method():
    # With no difference at all it is the win rate, whose standard error is known.
    wins = np.r_[np.ones(120), np.zeros(80)]
    got = evaluate.length_controlled_win_rate(wins, np.zeros(200), seed=0, resamples=4000)
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
    got = evaluate.length_controlled_win_rate(wins, difference, seed=0, resamples=300)
    assert np.all(np.isfinite(got))
    assert 0 <= got.low <= got.high <= 1
    assert got.value == pytest.approx(_reference_fit(x, np.asarray(wins), 1.0), abs=1e-4)


def test_length_control_cannot_tell_a_constant_difference_from_quality():
    assert np.isnan(evaluate.length_controlled_win_rate([1, 0, 1], [5, 5, 5], seed=0)).all()


def test_agreement_by_hand():
    # same, same, opposite, judge undecided (half); gold tie and NaN are left out.
    labels = [0.9, 0.2, 0.7, 0.5, 0.9, NAN]
    gold = [1, 0, 0, 1, 0.5, 1]
    assert evaluate.agreement(labels, gold) == 2.5 / 4


def test_same_position_rate_of_a_biased_judge():
    # PAPERS-style closed form: margin m ~ N(0, sqrt 2), bias b: P(same) = P(|m| < |b|).
    margin = np.random.default_rng(0).normal(0, np.sqrt(2), 200_000)
    first, swapped = stats.logistic.cdf(margin + 1), stats.logistic.cdf(-margin + 1)
    expected = 2 * stats.norm.cdf(1 / np.sqrt(2)) - 1
    assert evaluate.same_position_rate(first, swapped) == pytest.approx(expected, abs=0.005)
    assert evaluate.same_position_rate([0.9, 0.9, 0.5], [0.1, 0.8, 0.9]) == pytest.approx(1 / 3)


def test_distinct_n_by_hand():
    assert evaluate.distinct_n([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4
    assert evaluate.distinct_n([[1, 2, 3]], 1) == 1.0
    assert evaluate.distinct_n([[7] * 101], 2) == 0.01
    assert evaluate.distinct_n([[], [4]], 2) == 0.0
    assert evaluate.distinct_n([np.array([1, 2, 3], np.int32), [1, 2]], 2) == 2 / 3


def test_spearman_equals_scipy_with_ties():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 6, 80).astype(float)
    b = a + rng.integers(-3, 4, 80)
    assert evaluate.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    assert evaluate.spearman([1, 2, NAN, 3], [1, 8, 0, 27]) == pytest.approx(1.0)
    assert np.isnan(evaluate.spearman([1, 1, 1], [1, 2, 3]))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: evaluate.win_rate([1, 2], [1]), "got 2 and 1"),
        (lambda: evaluate.win_rate([NAN], [1]), "none of 1 values is judged"),
        (lambda: evaluate.win_rate([[1, 2]], [[1, 2]]), r"got \[1, 2\]"),
        (lambda: evaluate.bootstrap_ci([], seed=0), "none of 0"),
        (lambda: evaluate.bootstrap_ci([1.0], seed=0, level=95), "got 95"),
        (lambda: evaluate.bootstrap_ci([1.0], seed=0, groups=[1, 2]), r"groups should have shape \[1\]"),
        (lambda: evaluate.length_controlled_win_rate([2.0], [0], seed=0), r"in \[0, 1\]"),
        (lambda: evaluate.length_controlled_win_rate([1.0], [0], seed=0, ridge=0), "ridge"),
        (lambda: evaluate.distinct_n([[1]], 0), "at least 1"),
    ],
)
def test_impossible_input_is_refused_with_its_numbers(call, says):
    with pytest.raises((UserError, ValueError), match=says):
        call()
