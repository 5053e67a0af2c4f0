"""Agreement, calibration and debiased means against their independent implementations and by simulation."""

import math

import jax
import krippendorff
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics
from sklearn.calibration import calibration_curve

from rlaif_jax.config import UserError
from rlaif_jax.quality import statistics as stats
from tests.rewards.everywhere import same_everywhere


def ratings(seed, raters=5, units=40, categories=5, missing=0.3):
    rng = np.random.default_rng(seed)
    truth = rng.integers(categories, size=units)
    given = np.clip(truth + rng.integers(-1, 2, size=(raters, units)), 0, categories - 1).astype(float)
    given[rng.random(given.shape) < missing] = np.nan
    return given


def coincidence_sum(given, categories):
    total = np.zeros((categories, categories))
    for unit in given.T:
        values = unit[~np.isnan(unit)].astype(int)
        total += stats.coincidences(np.eye(categories)[values].reshape(-1, categories))
    return total


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
@pytest.mark.parametrize("seed", range(4))
def test_alpha_is_krippendorffs(seed, level):
    given = ratings(seed, raters=2 + seed, missing=0.1 * seed)
    expected = krippendorff.alpha(reliability_data=given, level_of_measurement=level)
    assert float(stats.krippendorff_alpha(coincidence_sum(given, 5), level)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
def test_alpha_on_devices_is_the_same_everywhere(level):
    given = [ratings(seed, raters=4, missing=0.3) for seed in range(8)]
    one_hot = [np.where(np.isnan(g)[..., None], 0, np.eye(5)[np.nan_to_num(g).astype(int)]) for g in given]
    units = np.stack(one_hot).swapaxes(1, 2).astype(np.float32)  # [8, units, raters, categories]

    def alpha(votes):
        together = jax.vmap(jax.vmap(stats.coincidences))(votes.reshape(-1, *units.shape[1:]))
        return stats.krippendorff_alpha(together.sum(1), level).reshape(votes.shape[:-3])

    found = same_everywhere(alpha, units, atol=1e-5)
    expected = [krippendorff.alpha(reliability_data=g, level_of_measurement=level) for g in given]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_alpha_of_uneven_values_and_unused_categories():
    given = ratings(9, categories=3)
    values = np.array([0.0, 1.0, 7.5, 100.0])  # the last one never occurs
    shown = np.where(np.isnan(given), np.nan, values[np.nan_to_num(given).astype(int)])
    expected = krippendorff.alpha(reliability_data=shown, level_of_measurement="interval")
    assert float(stats.krippendorff_alpha(coincidence_sum(given, 4), "interval", values)) == pytest.approx(expected)
    moments = sum(stats.interval_moments(unit[~np.isnan(unit)]) for unit in shown.T)
    assert float(stats.interval_alpha(moments)) == pytest.approx(expected)


def test_alpha_of_a_vote_that_is_split_lies_between_both():
    sure = np.eye(2)[[0, 0, 1]]
    split = np.array([[1, 0], [0.5, 0.5], [0, 1.0]])
    agree, differ = np.eye(2)[[0, 0]], np.eye(2)[[0, 1]]
    rest = stats.coincidences(agree) * 5 + stats.coincidences(np.eye(2)[[1, 1]]) * 5 + stats.coincidences(differ)
    alphas = [
        float(stats.krippendorff_alpha(rest + stats.coincidences(v), "nominal")) for v in (sure[:2], split[:2], differ)
    ]
    assert alphas == sorted(alphas, reverse=True)
    assert alphas[0] > alphas[1] > alphas[2]


@pytest.mark.parametrize("weights", [None, "quadratic"])
def test_kappa_is_scikit_learns(weights):
    rng = np.random.default_rng(0)
    a = rng.integers(4, size=200)
    b = np.where(rng.random(200) < 0.6, a, rng.integers(4, size=200))
    confusion = np.zeros((4, 4))
    np.add.at(confusion, (a, b), 1)
    values = None if weights is None else np.arange(4)
    expected = sklearn_metrics.cohen_kappa_score(a, b, weights=weights)
    assert float(stats.cohen_kappa(confusion, values)) == pytest.approx(expected, abs=1e-12)
    assert float(stats.observed_agreement(confusion)) == pytest.approx(np.mean(a == b))


def test_chance_that_cannot_be_wrong_gives_no_kappa_and_no_alpha():
    only = np.zeros((3, 3))
    only[0, 0] = 10
    assert math.isnan(stats.cohen_kappa(only))
    for level in ("nominal", "ordinal", "interval"):
        assert math.isnan(stats.krippendorff_alpha(only, level))
    assert math.isnan(stats.interval_alpha(stats.interval_moments([0.1, 0.1]) * 3))
    assert math.isnan(stats.cohen_kappa(np.zeros((3, 3))))


def test_leading_axes_are_so_many_statistics():
    rng = np.random.default_rng(1)
    tables = rng.integers(1, 9, size=(6, 3, 3)).astype(float)
    tables = tables + tables.swapaxes(1, 2)
    for statistic in (
        stats.observed_agreement,
        stats.cohen_kappa,
        lambda t: stats.krippendorff_alpha(t, "nominal"),
        lambda t: stats.krippendorff_alpha(t, "ordinal"),
        lambda t: stats.krippendorff_alpha(t, "interval", [0, 1, 5]),
    ):
        np.testing.assert_allclose(statistic(tables), [statistic(t) for t in tables])


def test_brier_and_reliability_are_scikit_learns():
    rng = np.random.default_rng(2)
    confidence = rng.uniform(0.5, 1, 500)
    right = (rng.random(500) < confidence**2).astype(float)
    sums = stats.calibration_columns(confidence, right).sum(0)
    assert float(stats.brier(sums)) == pytest.approx(sklearn_metrics.brier_score_loss(right, confidence), abs=1e-12)
    share, mean = calibration_curve(right, confidence, n_bins=20, strategy="uniform")
    bins = [b for b in stats.reliability(sums) if b["count"]]
    np.testing.assert_allclose([b["right"] for b in bins], share)
    np.testing.assert_allclose([b["confidence"] for b in bins], mean)
    weights = np.array([b["count"] for b in bins]) / 500
    assert float(stats.calibration_error(sums)) == pytest.approx(float(weights @ np.abs(share - mean)))


def test_which_answer_is_called_first_does_not_matter():
    p, y = np.array([0.2, 0.9, 0.5, 1.0, 0.0]), np.array([0, 1, 1, 0.5, 0])
    for one, other in zip(stats.folded(p, y), stats.folded(1 - p, 1 - y)):
        np.testing.assert_allclose(np.delete(one, 2), np.delete(other, 2))  # a toss-up has no side
    confidence, right = stats.folded(p, y)
    assert stats.calibration_columns(confidence, right)[:, 1:11].sum() == 5  # the last bin holds 1.0


# ---- A few labels


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
        found = stats.prediction_powered(f, y, seed=0, resamples=300)
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
    sums = stats.powered_columns(f, y).sum(0)
    weight = np.cov(f[:3], y[:3], bias=True)[0, 1] / np.var(f[:3])
    assert float(stats.power_lambda(sums)) == pytest.approx(weight)
    assert float(stats.powered_mean(sums)) == pytest.approx(0.5 + weight * (f.mean() - f[:3].mean()))
    rng = np.random.default_rng(4)
    means = {w: [] for w in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)}
    weights = []
    for _ in range(1500):
        judge, person = simulated(rng)
        has = ~np.isnan(person)
        weights.append(float(stats.power_lambda(stats.powered_columns(judge, person).sum(0))))
        for w in means:
            means[w].append(person[has].mean() + w * (judge.mean() - judge[has].mean()))
    best = min(means, key=lambda w: np.var(means[w]))
    assert abs(best - np.mean(weights)) <= 0.15
    assert all(abs(np.mean(m) - 0.55) < 0.006 for m in means.values())  # no weight brings bias


def test_what_labels_buy_is_what_they_bought():
    rng = np.random.default_rng(5)
    f, y = simulated(rng, n=4000, labelled=4000)
    sums = stats.powered_columns(f, y)
    rows = {row["labels"]: row for row in stats.label_budget(sums, (50, 200, 10_000))}
    assert set(rows) == {50, 200}
    draws = []
    for _ in range(1500):
        sample = rng.permutation(4000)[:400]  # 400 of a large world, 50 of them labelled
        seen = np.where(np.arange(400) < 50, y[sample], np.nan)
        s = stats.powered_columns(f[sample], seen).sum(0)
        draws.append((float(stats.powered_mean(s)), y[sample[:50]].mean()))
    (row,) = stats.label_budget(stats.powered_columns(f[:400], y[:400]), (50,))
    assert row["powered"] == pytest.approx(1.96 * np.std([d[0] for d in draws]), rel=0.12)
    assert row["alone"] == pytest.approx(1.96 * np.std([d[1] for d in draws]), rel=0.12)
    assert row["worth"] == pytest.approx(50 * (row["alone"] / row["powered"]) ** 2)


def test_what_labels_buy_counts_prompts_whose_pairs_are_alike():
    rng = np.random.default_rng(8)
    f, y = (np.repeat(values, 4) for values in simulated(rng, n=500, labelled=500))  # every prompt has four equal pairs
    single = stats.powered_columns(f, y)
    sums = stats.summed(single, np.repeat(np.arange(500), 4), 500)
    (alike,), (apart,) = stats.label_budget(sums, (2000,)), stats.label_budget(single, (2000,))
    for name in ("alone", "powered"):
        assert alike[name] == pytest.approx(2 * apart[name])  # four times the variance
    draws = []
    for _ in range(2000):
        world = rng.integers(0, 500, 500)  # of prompts; 300 of their 2,000 pairs are labelled
        draws.append(np.repeat(y[::4][world], 4)[rng.permutation(2000)[:300]].mean())
    (row,) = stats.label_budget(sums, (300,))
    assert row["alone"] == pytest.approx(1.96 * np.std(draws), rel=0.07)


def test_what_labels_buy_is_said_at_the_level_asked_for():
    f, y = simulated(np.random.default_rng(9), n=200, labelled=200)
    sums = stats.powered_columns(f, y)
    (wide,), (narrow,) = stats.label_budget(sums, (50,), level=0.99), stats.label_budget(sums, (50,), level=0.8)
    assert wide["alone"] / narrow["alone"] == pytest.approx(2.575829 / 1.281552, rel=1e-5)


def test_a_judge_that_says_nothing_leaves_the_labels_alone():
    y = np.array([1.0, 0, 1, 1, np.nan])
    found = stats.prediction_powered(np.full(5, 0.5), y)
    assert found.debiased == found.alone
    assert (found.weight, found.labelled, found.pairs) == (0.0, 4, 5)


@pytest.mark.parametrize(
    "f, y", [([1.0], [np.nan]), ([np.nan], [1.0]), ([1.0, 0.0], [1.0]), ([[1.0]], [[1.0]])], ids=str
)
def test_what_cannot_be_debiased_is_refused(f, y):
    with pytest.raises((UserError, ValueError)):
        stats.prediction_powered(f, y)


# ---- The bootstrap


def test_intervals_draw_whole_groups_and_cover():
    rng = np.random.default_rng(6)
    hits = 0
    for seed in range(150):
        level = rng.normal(0.5, 0.2, 40)
        values = rng.normal(np.repeat(level, 5), 0.02)  # five near-copies in each of 40 groups
        sums = stats.summed(np.stack([values, np.ones(200)], 1), np.repeat(np.arange(40), 5), 40)
        found = stats.Bootstrap(40, seed=seed, resamples=300).estimate(
            sums, lambda s: stats.divide(s[..., 0], s[..., 1])
        )
        hits += found["low"] <= 0.5 <= found["high"]
        naive = 1.96 * values.std() / math.sqrt(200)
        assert found["high"] - found["low"] > 1.5 * 2 * naive
    assert hits / 150 > 0.87


def test_an_estimate_is_a_function_of_its_seed():
    sums = np.random.default_rng(7).random((30, 2))
    ratio = lambda s: stats.divide(s[..., 0], s[..., 1])
    one, same, other = (stats.Bootstrap(30, seed=s).estimate(sums, ratio) for s in (1, 1, 2))
    assert one == same
    assert one["low"] != other["low"]


def test_a_share_of_everything_has_wilsons_interval():
    sums = np.ones((20, 2))
    found = stats.Bootstrap(20).estimate(sums, lambda s: stats.divide(s[..., 0], s[..., 1]), share=True)
    assert (found["value"], found["high"]) == (1.0, 1.0)
    from statsmodels.stats.proportion import proportion_confint

    assert found["low"] == pytest.approx(proportion_confint(20, 20, method="wilson")[0])


def test_no_number_is_none_with_a_reason():
    bootstrap = stats.Bootstrap(5)
    nothing = bootstrap.estimate(np.zeros((5, 2)), lambda s: stats.divide(s[..., 0], s[..., 1]), reason="why")
    assert nothing == {"value": None, "low": None, "high": None, "reason": "why"}
    one = np.zeros((5, 2))
    one[2] = [1, 2]
    found = bootstrap.estimate(one, lambda s: stats.divide(s[..., 0], s[..., 1]))
    assert found == {"value": 0.5, "low": None, "high": None, "reason": "one prompt has no interval"}
    assert stats.Bootstrap(0).estimate(np.zeros((0, 2)), lambda s: stats.divide(s[..., 0], s[..., 1]))["value"] is None
