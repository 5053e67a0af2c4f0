"""Intervals over prompts: against SciPy and statsmodels, by hand, and how often they cover."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats
from statsmodels.stats.proportion import proportion_confint

from experiments.benchmarks.coverage import cases, measure
from rlaif_jax.quality import intervals
from rlaif_jax.quality.intervals import Jackknife, bootstrap_ci, share_interval, student
from rlaif_jax.quality.statistics import (
    cohen_kappa,
    coincidences,
    interval_alpha,
    interval_moments,
    krippendorff_alpha,
    lowest_alpha,
    lowest_interval_alpha,
    lowest_kappa,
)
from rlaif_jax.quality.values import divide, sum_by_group

NAN = float("nan")
mean = lambda sums: divide(sums[..., 0], sums[..., 1])


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.name)
def test_intervals_cover_or_say_that_they_may_not(case):
    """A short form of experiments/benchmarks/coverage.py, whose table has the numbers of 1,000 draws."""
    found = measure(case, 50, 80, seed=1)
    assert found.failed == 0
    assert found.covered >= (0.85 if found.noted > 0.3 else 0.91)


def test_the_variance_of_a_mean_is_that_of_scipy():
    values = np.random.default_rng(0).gamma(2.0, 1.5, size=60)
    found = Jackknife(0.9).estimate(np.stack([values, np.ones(60)], 1), mean)
    low, high = stats.t.interval(0.9, 59, values.mean(), stats.sem(values))
    assert (found["value"], found["low"], found["high"]) == pytest.approx((values.mean(), low, high))


@pytest.mark.parametrize("wins", [0, 1, 7, 20])
def test_a_share_of_single_pairs_has_wilsons_interval(wins):
    found = share_interval([1.0] * wins + [0.0] * (20 - wins))
    alpha = 2 * stats.norm.sf(student(0.95, 20))  # statsmodels knows the normal quantile only
    trials = 20 if wins in (0, 20) else 19  # of the unbiased variance
    assert found[1:] == pytest.approx(proportion_confint(wins / 20 * trials, trials, alpha, "wilson"))


def test_groups_widen_the_interval_of_a_share_as_the_design_effect_says():
    # 4 equal answers a prompt: 200 values hold the information of 50.
    base = (np.random.default_rng(0).random(50) < 0.7).astype(float)
    assert share_interval(np.repeat(base, 4), groups=np.arange(50).repeat(4)) == pytest.approx(share_interval(base))
    assert share_interval([*base, NAN]) == share_interval(base)


def test_what_has_no_interval_says_why():
    nothing = Jackknife().estimate(np.zeros((5, 2)), mean, reason="why")
    assert nothing == {"value": None, "low": None, "high": None, "reason": "why"}
    assert Jackknife().estimate(np.zeros((0, 2)), mean)["value"] is None
    one = np.zeros((5, 2))
    one[2] = [1, 2]
    assert Jackknife().estimate(one, mean) == {
        "value": 0.5, "low": None, "high": None, "reason": "one prompt has no interval",
    }  # fmt: skip
    assert np.isnan(share_interval([1.0])[1:]).all()
    for bad, says in (([2.0], "0, 1"), ([NAN], "none of 1")):
        with pytest.raises(ValueError, match=says):
            share_interval(bad)
    with pytest.raises(ValueError, match="got 95"):
        Jackknife(95)


def confusion(rng, n, agreement=0.6, margins=(0.5, 0.3, 0.2)):
    one, other = rng.choice(3, (2, n), p=margins)
    return np.eye(9)[one * 3 + np.where(rng.random(n) < agreement, one, other)].reshape(n, 3, 3)


def test_many_groups_have_the_interval_of_leaving_out_each(monkeypatch):
    rows = confusion(np.random.default_rng(1), 3000)
    estimate = lambda: Jackknife().estimate(rows, cohen_kappa, lowest=lowest_kappa)
    linear = estimate()
    monkeypatch.setattr(intervals, "MAX_LEFT_OUT", 10**6)
    exact = estimate()
    assert linear["value"] == exact["value"]
    assert (linear["low"], linear["high"]) == pytest.approx((exact["low"], exact["high"]), abs=2e-5)


def test_kappa_has_the_delta_methods_standard_error():
    """Fleiss, Cohen & Everitt 1969, as statsmodels computes it."""
    from statsmodels.stats.inter_rater import cohens_kappa

    rows = confusion(np.random.default_rng(2), 4000)
    found = Jackknife().estimate(rows, cohen_kappa)
    expected = cohens_kappa(rows.sum(0))
    assert (found["high"] - found["low"]) / 2 == pytest.approx(1.96 * expected.std_kappa, rel=2e-3)


def test_a_rare_column_does_not_break_the_derivative():
    """Ten labelled pairs among 5,000: a step as large as the sum of the labels would divide by 0."""
    rng = np.random.default_rng(3)
    rows = np.stack([rng.random(5000), np.zeros(5000), np.full(5000, 1e6)], 1)
    rows[:10, 1] = 1
    found = Jackknife().estimate(rows, lambda s: divide(s[..., 0], s[..., 1]))
    ratio = found["value"]
    influence = (rows[:, 0] - ratio * rows[:, 1]) / 10
    assert found["high"] - found["low"] == pytest.approx(
        2 * student(0.95, 5000) * np.sqrt(5000 / 4999 * ((influence - influence.mean()) ** 2).sum()), rel=1e-3
    )


@pytest.mark.parametrize("groups", [40, 2500])
def test_sparse_rows_have_the_interval_of_dense_ones(groups):
    rows = confusion(np.random.default_rng(4), groups)
    table = lambda s: s.reshape(*s.shape[:-1], 3, 3)
    dense = Jackknife().estimate(rows, cohen_kappa, lowest=lowest_kappa)
    found = Jackknife().estimate(
        sparse.csr_matrix(rows.reshape(groups, 9)),
        lambda s: cohen_kappa(table(s)),
        lowest=lambda s: lowest_kappa(table(s)),
    )
    assert found == pytest.approx(dense)


def test_full_agreement_is_as_uncertain_as_its_margins_say():
    """With 50 of 50 alike, Wilson's bound of the disagreement over what chance would give."""
    rows = np.zeros((50, 2, 2))
    rows[:45, 0, 0], rows[45:, 1, 1] = 1, 1
    found = Jackknife().estimate(rows, cohen_kappa, lowest=lowest_kappa)
    unseen = student(0.95, 50) ** 2 / (50 + student(0.95, 50) ** 2)
    assert (found["value"], found["high"]) == (1, 1)
    assert found["low"] == pytest.approx(1 - unseen / (2 * 0.9 * 0.1))


def test_the_lowest_values_are_those_of_full_disagreement():
    """With margins that allow it: all pairs of units in the two extreme categories."""
    apart = coincidences(np.eye(3)[[0, 2]]) * 10
    for level in ("nominal", "ordinal", "interval"):
        assert float(lowest_alpha(apart, level)) == pytest.approx(float(krippendorff_alpha(apart, level)))
    moments = sum(interval_moments([0.0, 1.0]) for _ in range(10))
    assert float(lowest_interval_alpha(moments)) == pytest.approx(float(interval_alpha(moments)))
    both = np.zeros((3, 3))
    both[0, 2] = both[2, 0] = 5
    assert float(lowest_kappa(both)) == pytest.approx(float(cohen_kappa(both)))
    assert float(lowest_kappa(both, [0, 1, 2])) == pytest.approx(float(cohen_kappa(both, [0, 1, 2])))


def test_a_few_prompts_that_carry_an_agreement_are_named():
    rows = np.zeros((60, 2, 2))
    rows[:30, 0, 0], rows[30:, 1, 1] = 1, 1
    rows[0] = [[0, 1], [0, 0]]
    assert "fewer than 5 prompts" in Jackknife().estimate(rows, cohen_kappa, lowest=lowest_kappa)["note"]
    assert "note" not in Jackknife().estimate(
        confusion(np.random.default_rng(5), 200), cohen_kappa, lowest=lowest_kappa
    )


@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.0, 0.3, 0.5, 1.0])), min_size=1, max_size=60),
    st.floats(0.5, 0.99),
)
@settings(max_examples=200, deadline=None)
def test_a_share_is_inside_its_interval_and_in_any_order_the_same(pairs, level):
    groups, values = np.array(pairs, float).T
    found = share_interval(values, groups=groups, level=level)
    assert found.value == pytest.approx(values.mean())
    if len(set(groups)) < 2:
        assert np.isnan(found.low)
        return
    assert 0 <= found.low <= found.value + 1e-12 and found.value <= found.high + 1e-12 and found.high <= 1
    assert share_interval(values[::-1], groups=groups[::-1], level=level) == pytest.approx(found)
    mirrored = share_interval(1 - values, groups=groups, level=level)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high), abs=1e-9)


def test_whole_groups_are_left_out_and_the_interval_covers():
    rng = np.random.default_rng(6)
    hits = 0
    for _ in range(150):
        level = rng.normal(0.5, 0.2, 40)
        values = rng.normal(np.repeat(level, 5), 0.02)  # five near-copies in each of 40 groups
        sums = sum_by_group(np.stack([values, np.ones(200)], 1), np.repeat(np.arange(40), 5), 40)
        found = Jackknife().estimate(sums, mean)
        hits += found["low"] <= 0.5 <= found["high"]
        assert found["high"] - found["low"] > 1.5 * 2 * 1.96 * values.std() / np.sqrt(200)
    assert hits / 150 > 0.9


# ---- Percentile bootstrap


def test_bootstrap_ci_equals_scipy():
    values = np.random.default_rng(0).gamma(2.0, 1.5, size=120)
    low, high = bootstrap_ci(values, seed=1, resamples=20_000)
    reference = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(7)
    ).confidence_interval
    np.testing.assert_allclose([low, high], [reference.low, reference.high], rtol=0.01)
    narrow = bootstrap_ci(values, seed=1, resamples=20_000, level=0.5)
    assert low < narrow[0] < values.mean() < narrow[1] < high


def test_bootstrap_ci_is_a_function_of_the_seed_and_ignores_nan():
    values = np.random.default_rng(0).normal(size=50)
    first = bootstrap_ci(values, seed=3)
    assert first == bootstrap_ci(values, seed=3)
    assert first != bootstrap_ci(values, seed=4)
    assert first == bootstrap_ci(np.append(values, NAN), seed=3)
    assert bootstrap_ci(np.ones(9), seed=0) == (1.0, 1.0)


def test_bootstrap_ci_of_chunks_is_the_one_of_a_single_chunk(monkeypatch):
    values = np.random.default_rng(0).normal(size=40)
    whole = bootstrap_ci(values, seed=0, resamples=500)
    monkeypatch.setattr(intervals, "_DRAWN", 40 * 7)
    np.testing.assert_allclose(bootstrap_ci(values, seed=0, resamples=500), whole, rtol=1e-12)


def test_groups_widen_the_interval_as_the_design_effect_says():
    # 4 equal answers a prompt: 200 values hold the information of 50, so the interval is twice as wide.
    rng = np.random.default_rng(0)
    base = rng.normal(size=50)
    values, groups = np.repeat(base, 4), np.repeat([f"prompt {i}" for i in range(50)], 4)
    alone = np.diff(bootstrap_ci(values, seed=0, resamples=8000))[0]
    together = np.diff(bootstrap_ci(values, seed=0, resamples=8000, groups=groups))[0]
    exact = np.diff(bootstrap_ci(base, seed=0, resamples=8000))[0]
    assert together == pytest.approx(2 * alone, rel=0.05)
    assert together == pytest.approx(exact, rel=0.05)


def test_groups_of_unequal_size_weigh_every_value_the_same():
    # Two groups: a resample draws (1,1), (1,2), (2,1) or (2,2), so the mean is 0, 3/4 or 1.
    low, high = bootstrap_ci([0.0, 1, 1, 1], seed=0, groups=[0, 1, 1, 1], level=0.9)
    assert (low, high) == (0.0, 1.0)
    middle = bootstrap_ci([0.0, 1, 1, 1], seed=0, groups=[0, 1, 1, 1], level=0.1)
    assert middle == (0.75, 0.75)


@pytest.mark.parametrize(
    ("values", "options", "says"),
    [
        ([], {}, "none of 0"),
        ([1.0], {"level": 95}, "got 95"),
        ([1.0], {"groups": [1, 2]}, r"groups should have shape \[1\]"),
    ],
)
def test_impossible_input_is_refused_with_its_numbers(values, options, says):
    with pytest.raises(ValueError, match=says):
        bootstrap_ci(values, seed=0, **options)
