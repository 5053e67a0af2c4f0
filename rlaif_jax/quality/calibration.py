"""The expected calibration error without the part that chance makes, with an interval that covers.

The mean distance of confidence and share right over bins is a sum of absolute values: the noise of each bin makes it
larger, so that a perfectly calibrated judge has an error far from 0, and a bootstrap adds the noise once more. Here the
distances of the bins are kept in the proportions of what was observed and its noise, and the plug-in error that noise
makes of a true error is compared with the observed one: the estimate is the true error whose mean plug-in error is the
observed one, and the ends of the interval are the true errors for which the observed one is just improbable.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import erf

from rlaif_jax.quality.intervals import student
from rlaif_jax.quality.statistics import calibration_error, split_bins
from rlaif_jax.quality.values import Floats

MIN_ERRORS = 10
"""With fewer wrong (or right) predictions the interval covers about 90 % instead of 95 %, and has a note."""


def debiased_calibration_error(columns: ArrayLike, level: float = 0.95) -> dict[str, Any]:
    """Computes the expected calibration error without bias by noise, with its interval.

    Args:
        columns: [groups, 1 + 3 bins], `calibration_columns` summed by group (prompt).
        level: coverage of the interval.

    Returns:
        {"value", "low", "high", "plain"}, and a "note" where the interval is too narrow. `plain` is `calibration_error`,
        which noise makes larger. None, with a "reason", where there is no number. The value is 0 where noise alone
        would give the plain error or more.
    """
    rows = np.asarray(columns, np.float64)
    plain = float(calibration_error(rows.sum(0)))
    if not math.isfinite(plain):
        return {"value": None, "low": None, "high": None, "plain": None, "reason": "no predictions"}
    count, confidence, right = split_bins(rows)
    judged = count.sum(1) > 0
    groups = int(judged.sum())
    if groups < 2:
        return {"value": plain, "low": None, "high": None, "plain": plain, "reason": "one prompt has no interval"}
    gaps, sizes = (confidence - right)[judged], count[judged].sum(1)
    gap = gaps.sum(0) / sizes.sum()
    errors = (gaps - sizes[:, None] * gap) / sizes.sum()
    covariance = _see_unanimous_bins(errors.T @ errors * (groups / (groups - 1)), rows.sum(0))
    deviation = np.sqrt(np.diag(covariance))
    score = student(level, groups)

    # The observed proportions are more uneven than the true ones, by the noise: without it, too small an error would do.
    shape = np.where(gap < 0, -1, 1) * np.sqrt(gap**2 + deviation**2)
    if not shape.any():  # each prediction was right as often as it said
        return {"value": 0.0, "low": 0.0, "high": 0.0, "plain": plain}
    shape = shape / np.abs(shape).sum()

    def excess(error: float, score: float) -> float:
        mean, noise = _absolute_sum(error * shape, deviation, covariance)
        return mean + score * noise - plain

    def solve(score: float) -> float:
        """Returns the error at which the plain one is `score` standard errors below its mean."""
        if excess(0.0, score) >= 0:
            return 0.0
        return 1.0 if excess(1.0, score) < 0 else float(brentq(excess, 0.0, 1.0, (score,)))

    found = {"value": solve(0.0), "low": solve(score), "high": solve(-score), "plain": plain}
    wrong = float((count - right).sum())
    few = min(wrong, float(count.sum()) - wrong) < MIN_ERRORS
    return found | ({"note": f"fewer than {MIN_ERRORS} predictions were wrong or right: too narrow"} if few else {})


def _absolute_sum(gap: Floats, deviation: Floats, covariance: Floats) -> tuple[float, float]:
    """Returns mean and standard deviation of sum_b |x_b| for normal x.

    Args:
        gap: [bins], the means of x.
        deviation: [bins], the standard deviations of x.
        covariance: [bins, bins]; that of two absolute values is taken to first order.
    """
    noisy = np.where(deviation > 0, deviation, 1.0)
    slope = np.where(deviation > 0, erf(gap / noisy / math.sqrt(2)), np.sign(gap))
    bell = deviation * math.sqrt(2 / math.pi) * np.exp(-((gap / noisy) ** 2) / 2)
    mean = bell + gap * slope
    joint = np.outer(slope, slope) * covariance
    np.fill_diagonal(joint, np.maximum(gap**2 + deviation**2 - mean**2, 0.0))
    return float(mean.sum()), math.sqrt(max(float(joint.sum()), 0.0))


def _see_unanimous_bins(covariance: Floats, sums: Floats) -> Floats:
    """Returns the covariance with some variance in bins whose predictions were all right or all wrong.

    Such a bin shows no spread, and its share right is uncertain all the same: as if a quarter of a prediction had been
    the other way, and at most as the confidences say.
    """
    count, confidence, right = split_bins(sums)
    mean = np.divide(confidence, count, out=np.zeros_like(count), where=count > 0)
    unanimous = (count > 0) & ((right <= 0) | (right >= count))
    other = 0.25 / (count + 0.5)
    unseen = np.where(unanimous, count * np.minimum(mean * (1 - mean), other * (1 - other)), 0.0) / count.sum() ** 2
    found = covariance.copy()
    np.fill_diagonal(found, np.maximum(np.diag(covariance), unseen))
    return found
