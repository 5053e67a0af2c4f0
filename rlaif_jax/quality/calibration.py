"""Calibration of a judge's probabilities on pairs: Brier score, expected calibration error, reliability bins.

Each statistic reads the sums of `calibration_columns`, with any number of leading axes. NumPy in float64 on the host.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from rlaif_jax.quality.values import Floats, divide


def fold_predictions(probability: ArrayLike, outcome: ArrayLike) -> tuple[Floats, Floats]:
    """Returns (confidence in [.5, 1], share right), each [n], of predictions [n] about pairs.

    Which answer of a pair is called first has no meaning, so a prediction of .2 that the first is better is one of .8
    that the second is.
    """
    p, y = np.asarray(probability, np.float64), np.asarray(outcome, np.float64)
    return np.maximum(p, 1 - p), np.where(p >= 0.5, y, 1 - y)


def calibration_columns(confidence: ArrayLike, right: ArrayLike, bins: int = 10) -> Floats:
    """Returns rows [n, 1 + 3 bins] whose sums `brier`, `calibration_error` and `reliability_bins` read.

    A row holds the squared error; then for each of `bins` equally wide bins over [.5, 1] its count, sum of confidences
    and sum right. A bin holds its lower edge, the last one both.
    """
    c, y = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    place = np.searchsorted(0.5 + np.arange(1, bins) / (2 * bins), c, side="right")
    here = np.eye(bins)[place]
    return np.concatenate([((c - y) ** 2)[:, None], here, here * c[:, None], here * y[:, None]], axis=1)


def _split_bins(sums: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """Returns (count, sum of confidences, sum right), each [..., bins], of sums [..., 1 + 3 bins]."""
    count, confidence, right = np.split(np.asarray(sums, np.float64)[..., 1:], 3, axis=-1)
    return count, confidence, right


def brier(sums: ArrayLike) -> Floats:
    """Computes the mean squared error of the probabilities (Brier 1950): 0 is perfect, .25 is always saying one half."""
    return divide(np.asarray(sums, np.float64)[..., 0], _split_bins(sums)[0].sum(-1))


def calibration_error(sums: ArrayLike) -> Floats:
    """Computes the expected calibration error over the bins (Guo et al. 2017, eq. 3); noise makes it larger."""
    count, confidence, right = _split_bins(sums)
    return divide(np.abs(confidence - right).sum(-1), count.sum(-1))


def reliability_bins(sums: ArrayLike) -> list[dict[str, float | None]]:
    """Returns each bin's `low`, `high`, `count`, mean `confidence` and share `right` (None if empty)."""
    count, confidence, right = _split_bins(sums)
    width = 0.5 / len(count)
    return [
        {
            "low": 0.5 + i * width,
            "high": 0.5 + (i + 1) * width,
            "count": float(count[i]),
            "confidence": float(confidence[i] / count[i]) if count[i] else None,
            "right": float(right[i] / count[i]) if count[i] else None,
        }
        for i in range(len(count))
    ]
