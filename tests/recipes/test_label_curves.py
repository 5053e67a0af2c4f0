"""Curves of accuracy by labels: smoothing, the labels that reach a target, savings and their interval."""

import numpy as np
import pytest

from rlaif_jax.recipes.label_curves import labels_to_reach, saved_share, smoothed, t_interval


@pytest.mark.parametrize(
    "accuracies, expected",
    [
        ([0.5, 0.7, 0.9], 200.0),
        ([0.5, 0.6, 0.8], 282.8427),  # half-way between 200 and 400, in the logarithm
        ([0.5, 0.8, 0.6], None),  # it fell below again
        ([0.8, 0.6, 0.8], 282.8427),
        ([0.7, 0.7, 0.7], 100.0),
    ],
)
def test_labels_to_reach(accuracies, expected):
    found = labels_to_reach(0.7, [100, 200, 400], accuracies)
    assert found == (None if expected is None else pytest.approx(expected))


def test_an_order_that_is_the_random_one_saves_nothing():
    labels, level = [100, 200, 400], [0.5, 0.7, 0.7]  # at its end 200 labels early
    needed = labels_to_reach(level[-1], labels, level)
    assert saved_share(needed, needed, 400) == 0
    assert saved_share(100, 200, 400) == 0.5
    assert saved_share(None, 200, 400) == -1.0  # at least the whole budget


def test_a_late_dip_decides_nothing():
    labels = [100, 200, 400, 800]
    curves = [[0.5, 0.8, 0.8, 0.79], [0.5, 0.8, 0.8, 0.79]]
    smooth = smoothed(curves)
    assert smooth == pytest.approx([0.5, 2.39 / 3, 2.39 / 3, 2.39 / 3])
    assert labels_to_reach(0.795, labels, smooth) < 200
    assert labels_to_reach(0.795, labels, curves[0]) is None


def test_the_interval_is_students():
    from scipy.stats import ttest_1samp

    values = [0.3, 0.5, 0.4, 0.45, 0.6]
    interval = ttest_1samp(values, 0).confidence_interval()
    assert t_interval(values) == pytest.approx((np.mean(values), interval.low, interval.high))
