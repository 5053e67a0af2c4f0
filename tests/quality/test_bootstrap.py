"""Bootstrap intervals against SciPy, by simulation and by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from rlaif_jax.quality import bootstrap
from rlaif_jax.quality.bootstrap import Bootstrap, bootstrap_ci
from rlaif_jax.quality.values import divide, sum_by_group

NAN = float("nan")


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
    monkeypatch.setattr(bootstrap, "_CHUNK", 40 * 7)
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


def test_intervals_draw_whole_groups_and_cover():
    rng = np.random.default_rng(6)
    hits = 0
    for seed in range(150):
        level = rng.normal(0.5, 0.2, 40)
        values = rng.normal(np.repeat(level, 5), 0.02)  # five near-copies in each of 40 groups
        sums = sum_by_group(np.stack([values, np.ones(200)], 1), np.repeat(np.arange(40), 5), 40)
        found = Bootstrap(40, seed=seed, resamples=300).estimate(sums, lambda s: divide(s[..., 0], s[..., 1]))
        hits += found["low"] <= 0.5 <= found["high"]
        naive = 1.96 * values.std() / math.sqrt(200)
        assert found["high"] - found["low"] > 1.5 * 2 * naive
    assert hits / 150 > 0.87


def test_an_estimate_is_a_function_of_its_seed():
    sums = np.random.default_rng(7).random((30, 2))
    ratio = lambda s: divide(s[..., 0], s[..., 1])
    one, same, other = (Bootstrap(30, seed=s).estimate(sums, ratio) for s in (1, 1, 2))
    assert one == same
    assert one["low"] != other["low"]


def test_a_share_of_everything_has_wilsons_interval():
    sums = np.ones((20, 2))
    found = Bootstrap(20).estimate(sums, lambda s: divide(s[..., 0], s[..., 1]), share=True)
    assert (found["value"], found["high"]) == (1.0, 1.0)
    from statsmodels.stats.proportion import proportion_confint

    assert found["low"] == pytest.approx(proportion_confint(20, 20, method="wilson")[0])


def test_no_number_is_none_with_a_reason():
    resampled = Bootstrap(5)
    nothing = resampled.estimate(np.zeros((5, 2)), lambda s: divide(s[..., 0], s[..., 1]), reason="why")
    assert nothing == {"value": None, "low": None, "high": None, "reason": "why"}
    one = np.zeros((5, 2))
    one[2] = [1, 2]
    found = resampled.estimate(one, lambda s: divide(s[..., 0], s[..., 1]))
    assert found == {"value": 0.5, "low": None, "high": None, "reason": "one prompt has no interval"}
    assert Bootstrap(0).estimate(np.zeros((0, 2)), lambda s: divide(s[..., 0], s[..., 1]))["value"] is None
