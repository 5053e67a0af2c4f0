"""Means debiased by a few labels: by simulation and by hand."""

import numpy as np
import pytest

from rlaif_jax.quality.debiasing import label_budget, power_lambda, powered_columns, powered_mean, prediction_powered
from rlaif_jax.quality.values import sum_by_group


def simulated(rng, n=400, labelled=60, bias=0.25):
    """People's verdicts y and a judge that agrees with most but favours the first by `bias`."""
    y = (rng.random(n) < 0.55).astype(float)
    f = np.where(rng.random(n) < 0.9, y, 1 - y)
    f = np.where((f == 0) & (rng.random(n) < bias), 1.0, f)
    seen = np.full(n, np.nan)
    chosen = rng.permutation(n)[:labelled]
    seen[chosen] = y[chosen]
    return f, seen


def test_the_debiased_interval_covers_the_truth_and_is_narrower_than_labels_alone():
    rng = np.random.default_rng(3)
    covered, alone, widths, judge = 0, 0, [], []
    for _ in range(200):
        f, y = simulated(rng)
        found = prediction_powered(f, y)
        covered += found.debiased.low <= 0.55 <= found.debiased.high
        alone += found.alone.low <= 0.55 <= found.alone.high
        widths.append((found.debiased.high - found.debiased.low) / (found.alone.high - found.alone.low))
        judge.append(f.mean())
    assert np.mean(judge) > 0.6  # the judge by itself is wrong
    assert 0.89 <= covered / 200 <= 0.99
    assert 0.89 <= alone / 200 <= 0.99
    assert np.mean(widths) < 0.9


def test_the_powered_mean_by_hand_and_its_weight_by_search():
    f = np.array([1.0, 0, 1, 1, 0, 0.5])
    y = np.array([1.0, 0, 0.5, np.nan, np.nan, np.nan])
    sums = powered_columns(f, y).sum(0)
    weight = np.cov(f[:3], y[:3], bias=True)[0, 1] / np.var(f[:3])
    assert float(power_lambda(sums)) == pytest.approx(weight)
    assert float(powered_mean(sums)) == pytest.approx(0.5 + weight * (f.mean() - f[:3].mean()))
    rng = np.random.default_rng(4)
    means = {w: [] for w in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)}
    weights = []
    for _ in range(1500):
        judge, person = simulated(rng)
        has = ~np.isnan(person)
        weights.append(float(power_lambda(powered_columns(judge, person).sum(0))))
        for w in means:
            means[w].append(person[has].mean() + w * (judge.mean() - judge[has].mean()))
    best = min(means, key=lambda w: np.var(means[w]))
    assert abs(best - np.mean(weights)) <= 0.15
    assert all(abs(np.mean(m) - 0.55) < 0.006 for m in means.values())  # no weight brings bias


def test_what_labels_buy_is_what_they_bought():
    rng = np.random.default_rng(5)
    f, y = simulated(rng, n=4000, labelled=4000)
    sums = powered_columns(f, y)
    rows = {row["labels"]: row for row in label_budget(sums, (50, 200, 10_000))}
    assert set(rows) == {50, 200}
    draws = []
    for _ in range(1500):
        sample = rng.permutation(4000)[:400]  # 400 of a large world, 50 of them labelled
        seen = np.where(np.arange(400) < 50, y[sample], np.nan)
        s = powered_columns(f[sample], seen).sum(0)
        draws.append((float(powered_mean(s)), y[sample[:50]].mean()))
    (row,) = label_budget(powered_columns(f[:400], y[:400]), (50,))
    assert row["powered"] == pytest.approx(1.96 * np.std([d[0] for d in draws]), rel=0.12)
    assert row["alone"] == pytest.approx(1.96 * np.std([d[1] for d in draws]), rel=0.12)
    assert row["worth"] == pytest.approx(50 * (row["alone"] / row["powered"]) ** 2)


def test_what_labels_buy_counts_prompts_whose_pairs_are_alike():
    rng = np.random.default_rng(8)
    f, y = (np.repeat(values, 4) for values in simulated(rng, n=500, labelled=500))  # every prompt has four equal pairs
    single = powered_columns(f, y)
    sums = sum_by_group(single, np.repeat(np.arange(500), 4), 500)
    (alike,), (apart,) = label_budget(sums, (2000,)), label_budget(single, (2000,))
    for name in ("alone", "powered"):
        assert alike[name] == pytest.approx(2 * apart[name])  # four times the variance
    draws = []
    for _ in range(2000):
        world = rng.integers(0, 500, 500)  # of prompts; 300 of their 2,000 pairs are labelled
        draws.append(np.repeat(y[::4][world], 4)[rng.permutation(2000)[:300]].mean())
    (row,) = label_budget(sums, (300,))
    assert row["alone"] == pytest.approx(1.96 * np.std(draws), rel=0.07)


def test_what_labels_buy_is_said_at_the_level_asked_for():
    f, y = simulated(np.random.default_rng(9), n=200, labelled=200)
    sums = powered_columns(f, y)
    (wide,), (narrow,) = label_budget(sums, (50,), level=0.99), label_budget(sums, (50,), level=0.8)
    assert wide["alone"] / narrow["alone"] == pytest.approx(2.575829 / 1.281552, rel=1e-5)


def test_a_judge_that_says_nothing_leaves_the_labels_alone():
    y = np.array([1.0, 0, 1, 1, np.nan])
    found = prediction_powered(np.full(5, 0.5), y)
    assert found.debiased == found.alone
    assert (found.weight, found.labelled, found.pairs) == (0.0, 4, 5)


@pytest.mark.parametrize(
    "f, y", [([1.0], [np.nan]), ([np.nan], [1.0]), ([1.0, 0.0], [1.0]), ([[1.0]], [[1.0]])], ids=str
)
def test_what_cannot_be_debiased_is_refused(f, y):
    with pytest.raises(ValueError):
        prediction_powered(f, y)
