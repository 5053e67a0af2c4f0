"""Accuracy by the number of labels learned from: how many labels one order of asking saves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def smoothed(curves: Sequence[Sequence[float]]) -> list[float]:
    """Returns the mean of curves [n, budgets], changed as little as possible so that it never falls."""
    from scipy.optimize import isotonic_regression

    return [float(value) for value in isotonic_regression(np.mean(curves, 0)).x]


def labels_to_reach(target: float, labels: Sequence[int], accuracies: Sequence[float]) -> float | None:
    """Returns the number of labels from which on the accuracy is at least `target`.

    It is interpolated in the logarithm of the labels. None: the accuracy does not get there within these labels.

    Args:
        target: the accuracy to reach.
        labels: numbers of labels, rising.
        accuracies: the accuracy at each number of labels.
    """
    below = [i for i, value in enumerate(accuracies) if value < target]
    if not below:
        return float(labels[0])
    last = below[-1]
    if last + 1 == len(labels):
        return None
    low, high = accuracies[last], accuracies[last + 1]
    share = (target - low) / (high - low)
    return math.exp((1 - share) * math.log(labels[last]) + share * math.log(labels[last + 1]))


def saved_share(needed: float | None, reference: float, budget: int) -> float:
    """Returns the share of the reference's labels that another order does without.

    Args:
        needed: labels that the other order needs; None: more than the budget, which then counts as needed. The result
            is then the most that it can have saved, 0 or less.
        reference: labels that the reference order needs.
        budget: labels in all.
    """
    return 1 - (budget if needed is None else needed) / reference


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns (mean, low, high) with Student's 95 % interval, which is right for few values too.

    `values` are two or more independent numbers, such as one for each seed.
    """
    from scipy.stats import t

    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
    half = float(t.ppf(0.975, len(values) - 1)) * error
    return mean, mean - half, mean + half
