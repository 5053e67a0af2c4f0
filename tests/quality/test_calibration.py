"""Calibration against scikit-learn."""

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics
from sklearn.calibration import calibration_curve

from rlaif_jax.quality.calibration import (
    brier,
    calibration_columns,
    calibration_error,
    fold_predictions,
    reliability_bins,
)


def test_brier_and_reliability_are_scikit_learns():
    rng = np.random.default_rng(2)
    confidence = rng.uniform(0.5, 1, 500)
    right = (rng.random(500) < confidence**2).astype(float)
    sums = calibration_columns(confidence, right).sum(0)
    assert float(brier(sums)) == pytest.approx(sklearn_metrics.brier_score_loss(right, confidence), abs=1e-12)
    share, mean = calibration_curve(right, confidence, n_bins=20, strategy="uniform")
    bins = [b for b in reliability_bins(sums) if b["count"]]
    np.testing.assert_allclose([b["right"] for b in bins], share)
    np.testing.assert_allclose([b["confidence"] for b in bins], mean)
    weights = np.array([b["count"] for b in bins]) / 500
    assert float(calibration_error(sums)) == pytest.approx(float(weights @ np.abs(share - mean)))


def test_which_answer_is_called_first_does_not_matter():
    p, y = np.array([0.2, 0.9, 0.5, 1.0, 0.0]), np.array([0, 1, 1, 0.5, 0])
    for one, other in zip(fold_predictions(p, y), fold_predictions(1 - p, 1 - y)):
        np.testing.assert_allclose(np.delete(one, 2), np.delete(other, 2))  # a toss-up has no side
    confidence, right = fold_predictions(p, y)
    assert calibration_columns(confidence, right)[:, 1:11].sum() == 5  # the last bin holds 1.0
