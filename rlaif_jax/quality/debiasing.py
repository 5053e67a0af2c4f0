"""Means of a judge's values that a few labels of people debias: prediction-powered inference.

Each statistic reads the sums of `powered_columns` over prompts, with any number of leading axes. NumPy in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from rlaif_jax.quality.intervals import Estimate, Jackknife, as_estimate
from rlaif_jax.quality.values import Floats, divide, sum_by_group


def powered_columns(judge: ArrayLike, person: ArrayLike) -> Floats:
    """Returns rows [n, 8] whose sums `powered_mean` reads.

    Args:
        judge: [n], the judge's value of every pair.
        person: [n], a person's value, NaN where no person was asked.
    """
    f, y = np.asarray(judge, np.float64), np.asarray(person, np.float64)
    has = ~np.isnan(y)
    y = np.where(has, y, 0.0)
    inside = has * f
    return np.stack([np.ones_like(f), f, has, y, inside, y * f, inside * f, y * y], axis=-1)


class _Moments(NamedTuple):
    """Moments [...] of judge f and person y; all but `pairs` and `mean_all` are over the labelled pairs."""

    pairs: Any
    labelled: Any
    mean_all: Any
    mean_person: Any
    mean_judge: Any
    covariance: Any
    variance_judge: Any
    variance_person: Any


def _moments(sums: ArrayLike) -> _Moments:
    """Returns the moments of sums [..., 8] of `powered_columns`."""
    count, f, n, y, g, yg, gg, yy = np.moveaxis(np.asarray(sums, np.float64), -1, 0)
    mean_y, mean_g = divide(y, n), divide(g, n)
    return _Moments(
        pairs=count,
        labelled=n,
        mean_all=divide(f, count),
        mean_person=mean_y,
        mean_judge=mean_g,
        covariance=divide(yg, n) - mean_y * mean_g,
        variance_judge=divide(gg, n) - mean_g**2,
        variance_person=np.maximum(divide(yy, n) - mean_y**2, 0),
    )


def power_lambda(sums: ArrayLike) -> Floats:
    """Computes the judge's weight [...] that makes `powered_mean` vary least.

    It is Cov(y, f) / Var(f), and 0 if f does not vary. `sums` [..., 8] are those of `powered_columns`.

    Angelopoulos, Duchi & Zrnic 2023, "PPI++", section 6, for predictions on all pairs, the labelled among them.
    """
    moments = _moments(sums)
    variance = moments.variance_judge
    return np.where(variance > 1e-12, divide(moments.covariance, np.where(variance > 1e-12, variance, 0)), 0.0)


def powered_mean(sums: ArrayLike) -> Floats:
    """Computes the people's mean [...] over all pairs, from a judge on all and people on some of them.

        mean_labelled y + lambda (mean_all f - mean_labelled f),   lambda = `power_lambda`

    Without bias for any lambda if the labelled pairs are a random part of all; lambda = 1 is the judge's mean plus the
    mean error (Angelopoulos et al. 2023, "Prediction-powered inference"), lambda = 0 the labels alone. `sums` [..., 8]
    are those of `powered_columns`; f is the judge, y the people.
    """
    moments = _moments(sums)
    return moments.mean_person + power_lambda(sums) * (moments.mean_all - moments.mean_judge)


def label_budget(sums: ArrayLike, labels: Sequence[int], *, level: float = 0.95) -> list[dict[str, float | None]]:
    """Predicts the half-width of the interval for each number of `labels` drawn at random.

    With rho the correlation of judge and people: alone z s sqrt(d / n); powered z s sqrt(d (1 - rho^2) / n + d rho^2 / N),
    n of the N pairs labelled. The d are Kish (1965) design effects, because pairs of one prompt may be alike: of the
    labels, of the residuals of the judge, and of the judge.

    Args:
        sums: [G, 8], `powered_columns` summed by prompt.
        labels: numbers of labels; those above the number of pairs are left out.
        level: coverage.

    Returns:
        A row for each number: `labels`; half-widths `alone` (labels only) and `powered` (`powered_mean`); `worth`, the
        number of labels that would give the half-width `powered` without the judge. No rows where the labels do not vary.
    """
    groups = np.asarray(sums, np.float64)
    pairs, _, n, y, g, *_ = groups.T
    moments = _Moments(*(float(x) for x in _moments(groups.sum(0))))
    count, spread, variance = moments.pairs, moments.variance_person, moments.variance_judge
    if not (spread > 0 and count > 0):
        return []
    weight = moments.covariance / variance if variance > 1e-12 else 0.0
    explained = min(spread, weight * moments.covariance)
    residual = spread - explained
    errors_y, errors_f = y - n * moments.mean_person, g - n * moments.mean_judge
    alike_y = _intraclass_correlation(errors_y, n, spread)
    alike_f = _intraclass_correlation(errors_f, n, variance)
    alike_residual = _intraclass_correlation(errors_y - weight * errors_f, n, residual)
    same_prompt = float((pairs * (pairs - 1)).sum()) / max(count * (count - 1), 1.0)  # chance of two pairs
    design_effect = lambda alike, size: 1 + alike * same_prompt * (size - 1)
    z = NormalDist().inv_cdf((1 + level) / 2)
    rows: list[dict[str, float | None]] = []
    for size in labels:
        if size <= count:
            alone = spread * design_effect(alike_y, size) / size
            powered = residual * design_effect(alike_residual, size) / size
            powered += explained * design_effect(alike_f, count) / count
            widths = {"alone": z * math.sqrt(alone), "powered": z * math.sqrt(powered)}
            rows.append({"labels": size, **widths, "worth": size * alone / powered})
    return rows


def _intraclass_correlation(errors: Floats, counts: Floats, variance: float) -> float:
    """Returns the intraclass correlation, in [0, 1]: how alike two values of one group are.

    `errors` [G] are summed by group, `counts` [G] are the groups' numbers of values.
    """
    couples, total = float((counts * (counts - 1)).sum()), float(counts.sum())
    if couples <= 0 or variance <= 1e-12:
        return 0.0
    return min(1.0, max(0.0, (float(errors @ errors) / variance - total) / couples))


class PoweredMean(NamedTuple):
    """A debiased mean and what it is made of.

    Attributes:
        debiased: `powered_mean` with its interval.
        alone: the mean of the labels alone with its interval.
        weight: the judge's weight, `power_lambda`.
        labelled: number of pairs with a person's label.
        pairs: number of pairs.
    """

    debiased: Estimate
    alone: Estimate
    weight: float
    labelled: int
    pairs: int


def prediction_powered(
    judge: ArrayLike,
    person: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    level: float = 0.95,
) -> PoweredMean:
    """Estimates people's mean over n pairs from a judge's values on all and people's on some of them.

    Args:
        judge: [n], finite.
        person: [n], NaN where no person was asked. The labelled pairs must be a *random* part of all.
        groups: [n], the prompt of each pair; whole prompts are left out for the intervals. None: each pair is a group.
        level: coverage.

    Raises:
        ValueError: a shape is wrong, a judge's value is not finite, or no pair has a label.
    """
    f, y = np.asarray(judge, np.float64), np.asarray(person, np.float64)
    if f.ndim != 1 or f.shape != y.shape:
        raise ValueError(f"judge and person should both be of shape [n], got {list(f.shape)} and {list(y.shape)}")
    if not np.isfinite(f).all() or np.isnan(y).all():
        raise ValueError("the judge's values should all be finite, and at least one pair should have a person's label")
    member = np.unique(np.arange(len(f)) if groups is None else np.asarray(groups), return_inverse=True)[1]
    sums = sum_by_group(powered_columns(f, y), member, int(member.max()) + 1)
    alone = lambda s: divide(s[..., 3], s[..., 2])
    given = np.concatenate([f, y[~np.isnan(y)]])
    share, labelled = bool(given.min() >= 0 and given.max() <= 1), sums[:, 2] > 0
    estimate = lambda statistic: Jackknife(level).estimate(sums, statistic, share=share, informative=labelled)
    found = [as_estimate(estimate(statistic)) for statistic in (powered_mean, alone)]
    return PoweredMean(found[0], found[1], float(power_lambda(sums.sum(0))), int((~np.isnan(y)).sum()), len(f))
