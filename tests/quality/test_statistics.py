"""Agreement, calibration and ranks against their independent implementations and by hand."""

import math

import jax
import krippendorff
import numpy as np
import pytest
import scipy.stats
from sklearn import metrics as sklearn_metrics
from sklearn.calibration import calibration_curve

from rlaif_jax.quality import statistics as stats
from tests.rewards.everywhere import same_everywhere

NAN = float("nan")


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


def test_each_leading_index_is_one_statistic():
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


def test_agreement_by_hand():
    # same, same, opposite, judge undecided (half); gold tie and NaN are left out.
    labels = [0.9, 0.2, 0.7, 0.5, 0.9, NAN]
    gold = [1, 0, 0, 1, 0.5, 1]
    assert stats.agreement_with_gold(labels, gold) == 2.5 / 4


def test_same_position_rate_of_a_biased_judge():
    # PAPERS-style closed form: margin m ~ N(0, sqrt 2), bias b: P(same) = P(|m| < |b|).
    margin = np.random.default_rng(0).normal(0, np.sqrt(2), 200_000)
    first, swapped = scipy.stats.logistic.cdf(margin + 1), scipy.stats.logistic.cdf(-margin + 1)
    expected = 2 * scipy.stats.norm.cdf(1 / np.sqrt(2)) - 1
    assert stats.same_position_rate(first, swapped) == pytest.approx(expected, abs=0.005)
    assert stats.same_position_rate([0.9, 0.9, 0.5], [0.1, 0.8, 0.9]) == pytest.approx(1 / 3)


def test_distinct_n_by_hand():
    assert stats.distinct_n([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4
    assert stats.distinct_n([[1, 2, 3]], 1) == 1.0
    assert stats.distinct_n([[7] * 101], 2) == 0.01
    assert stats.distinct_n([[], [4]], 2) == 0.0
    assert stats.distinct_n([np.array([1, 2, 3], np.int32), [1, 2]], 2) == 2 / 3


def test_spearman_equals_scipy_with_ties():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 6, 80).astype(float)
    b = a + rng.integers(-3, 4, 80)
    assert stats.spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)
    assert stats.spearman([1, 2, NAN, 3], [1, 8, 0, 27]) == pytest.approx(1.0)
    assert np.isnan(stats.spearman([1, 1, 1], [1, 2, 3]))


def test_ngrams_have_a_length():
    with pytest.raises(ValueError, match="at least 1"):
        stats.distinct_n([[1]], 0)


def test_brier_and_reliability_are_scikit_learns():
    rng = np.random.default_rng(2)
    confidence = rng.uniform(0.5, 1, 500)
    right = (rng.random(500) < confidence**2).astype(float)
    sums = stats.calibration_columns(confidence, right).sum(0)
    assert float(stats.brier(sums)) == pytest.approx(sklearn_metrics.brier_score_loss(right, confidence), abs=1e-12)
    share, mean = calibration_curve(right, confidence, n_bins=20, strategy="uniform")
    bins = [b for b in stats.reliability_bins(sums) if b["count"]]
    np.testing.assert_allclose([b["right"] for b in bins], share)
    np.testing.assert_allclose([b["confidence"] for b in bins], mean)
    weights = np.array([b["count"] for b in bins]) / 500
    assert float(stats.calibration_error(sums)) == pytest.approx(float(weights @ np.abs(share - mean)))


def test_which_answer_is_called_first_does_not_matter():
    p, y = np.array([0.2, 0.9, 0.5, 1.0, 0.0]), np.array([0, 1, 1, 0.5, 0])
    for one, other in zip(stats.fold_predictions(p, y), stats.fold_predictions(1 - p, 1 - y)):
        np.testing.assert_allclose(np.delete(one, 2), np.delete(other, 2))  # a toss-up has no side
    confidence, right = stats.fold_predictions(p, y)
    assert stats.calibration_columns(confidence, right)[:, 1:11].sum() == 5  # the last bin holds 1.0
