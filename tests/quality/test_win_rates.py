"""Win rates, plain and length-controlled, against SciPy and numbers worked out by hand."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import optimize, special

from rlaif_jax.quality.intervals import student
from rlaif_jax.quality.win_rates import length_controlled_win_rate, pair_outcomes, verdict_of, win_rate, win_rate_ci

NAN = float("nan")


def test_win_rate_counts_ties_half_and_leaves_out_what_was_not_judged():
    a = [3.0, 1.0, 2.0, NAN, 5.0]
    b = [1.0, 2.0, 2.0, 1.0, NAN]
    np.testing.assert_array_equal(pair_outcomes(a, b), [1, 0, 0.5, NAN, NAN])
    assert win_rate(a, b) == 0.5
    assert win_rate([2, 2, 2, 0], [1, 1, 1, 1]) == 0.75
    assert win_rate([np.inf, -np.inf], [np.inf, 0.0]) == 0.25


def test_a_win_rate_of_all_or_nothing_has_an_interval():
    assert win_rate_ci([1] * 9, [0] * 9).low == pytest.approx(1 - student(0.95, 9) ** 2 / (9 + student(0.95, 9) ** 2))
    assert win_rate_ci([0] * 9, [1] * 9).high > 0.3
    even = win_rate_ci([1] * 9, [1] * 9)
    assert even.low < even.value == 0.5 < even.high


def _reference_fit(x, y):
    """The quality at the maximum of log likelihood + log det(information) / 2 (Firth 1993), and that maximum."""

    def objective(theta):
        z = theta[0] + theta[1] * x
        design = np.stack([np.ones_like(x), x], 1)
        weight = special.expit(z) * special.expit(-z)
        return np.sum(np.logaddexp(0, z) - y * z) - np.linalg.slogdet(design.T @ (weight[:, None] * design))[1] / 2

    best = optimize.minimize(objective, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
    return 1 / (1 + np.exp(-best.x[0])), objective


def planted(seed=1, n=300, ties=20):
    rng = np.random.default_rng(seed)
    difference = rng.normal(10, 20, n).round()
    x = np.tanh(difference / difference.std())
    y = (rng.random(n) < 1 / (1 + np.exp(-(0.4 + 1.5 * x)))).astype(float)
    y[:ties] = 0.5
    return x, y, difference


def test_length_controlled_win_rate_equals_a_general_optimiser():
    x, y, difference = planted()
    got = length_controlled_win_rate(y, difference)
    assert got.value == pytest.approx(_reference_fit(x, y)[0], abs=1e-6)
    assert got.low < got.value < got.high and got.note == ""


def test_the_interval_at_equal_lengths_is_where_the_profile_of_the_likelihood_has_fallen():
    x, y, difference = planted(2, 80, ties=0)
    got = length_controlled_win_rate(y, difference)
    value, objective = _reference_fit(x, y)
    at = lambda p: lambda slope: objective([special.logit(p), slope])
    profile = lambda p: optimize.minimize_scalar(at(p), bounds=(-9, 9), method="bounded").fun
    falls = [2 * (profile(end) - profile(value)) / student(0.95, 80) ** 2 for end in (got.low, got.high)]
    assert falls[0] == pytest.approx(falls[1], rel=1e-3)
    assert 1 - 1e-3 <= falls[0] < 1.3  # a design effect of single pairs is about 1, of wins and losses at least 1


def test_length_control_finds_nothing_where_length_did_it_all():
    rng = np.random.default_rng(2)
    difference = rng.normal(15, 15, 2000)
    wins = (rng.random(2000) < 1 / (1 + np.exp(-2 * np.tanh(difference / 15)))).astype(float)
    assert wins.mean() > 0.7
    got = length_controlled_win_rate(wins, difference)
    assert got.low < 0.5 < got.high
    assert got.value == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("slope", [1.0, 3.0])
@pytest.mark.parametrize("n", [30, 100])
def test_few_pairs_at_equal_lengths_are_without_bias(n, slope):
    """Truth .5; a ridge of 1 gave .642 at n = 30 and slope 3, with intervals that held .5 in 63 %."""
    found = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        difference = rng.normal(1, 1, n)
        chance = 1 / (1 + np.exp(-slope * np.tanh(difference / np.std(difference))))
        found.append(length_controlled_win_rate((rng.random(n) < chance).astype(float), difference))
    assert np.mean([e.value for e in found]) == pytest.approx(0.5, abs=0.035)
    assert np.mean([e.low <= 0.5 <= e.high for e in found]) >= 0.92


def test_pairs_of_one_prompt_widen_the_interval_at_equal_lengths():
    _, y, difference = planted(3, 100)
    alone = length_controlled_win_rate(y, difference)
    four = length_controlled_win_rate(np.repeat(y, 4), np.repeat(difference, 4), groups=np.arange(100).repeat(4))
    blind = length_controlled_win_rate(np.repeat(y, 4), np.repeat(difference, 4))
    width = lambda e: e.high - e.low
    assert width(four) == pytest.approx(width(alone), rel=0.1)
    assert width(blind) < 0.6 * width(alone)


def test_with_no_difference_at_all_it_is_the_win_rate():
    wins = np.r_[np.ones(120), np.zeros(80)]
    got = length_controlled_win_rate(wins, np.zeros(200))
    assert got[:3] == win_rate_ci(wins, np.full(200, 0.5))


@pytest.mark.parametrize(
    ("wins", "difference"),
    [
        ([1.0] * 10, list(range(10))),
        ([0.0] * 10, list(range(10))),
        ([0.0] * 5 + [1.0] * 5, [-9, -8, -7, -6, -5, 5, 6, 7, 8, 9]),
        ([0.0] * 50 + [1.0], [0.0] * 50 + [1e6]),
    ],
)
def test_length_control_survives_separation_and_says_so(wins, difference):
    x = np.asarray(difference, float)
    got = length_controlled_win_rate(wins, difference)
    assert 0 <= got.low <= got.value <= got.high <= 1
    assert got.value == pytest.approx(_reference_fit(np.tanh(x / x.std()), np.asarray(wins))[0], abs=1e-4)
    assert "separates" in got.note


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(-50, 50)), min_size=5, max_size=40),
)
@example([(0.0, 11), (0.0, 10), (0.0, 10), (0.0, 11), (0.0, 13)])
@settings(max_examples=60, deadline=None)
def test_length_control_always_has_an_ordered_interval_or_none(pairs):
    wins, difference = np.array(pairs, float).T
    got = length_controlled_win_rate(wins, difference)
    if difference.all() and np.ptp(np.tanh(difference / max(difference.std(), 1e-9))) < 1e-6:
        assert np.isnan(got[:3]).all()
    else:
        assert 0 <= got.low <= got.value + 1e-9 and got.value <= got.high + 1e-9 <= 1 + 2e-9
        if got.high - got.low < 0.9:  # else the fit is flat: all differences are nearly the same
            mirrored = length_controlled_win_rate(1 - wins, -difference)
            np.testing.assert_allclose(mirrored[:3], [1 - got.value, 1 - got.high, 1 - got.low], atol=1e-3)


def test_length_control_cannot_tell_a_constant_difference_from_quality():
    assert np.isnan(length_controlled_win_rate([1, 0, 1], [5, 5, 5])[:3]).all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: win_rate([1, 2], [1]), "got 2 and 1"),
        (lambda: win_rate([NAN], [1]), "none of 1 values is judged"),
        (lambda: win_rate([[1, 2]], [[1, 2]]), r"got \[1, 2\]"),
        (lambda: length_controlled_win_rate([2.0], [0]), r"in \[0, 1\]"),
        (lambda: length_controlled_win_rate([1.0], [0], level=95), "level"),
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
