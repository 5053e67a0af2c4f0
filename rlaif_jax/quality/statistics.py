"""How far raters agree and what a judge's probabilities are worth: chance-corrected agreement, calibration, and means
debiased by a few labels.

Every statistic here is a function of *sums* over prompts (a confusion matrix, coincidences, moments), with any number
of leading axes. So a bootstrap that draws whole prompts is one matrix product (`Bootstrap`), whatever the statistic.
Plain NumPy in float64 on the host. What cannot be computed is NaN here; `Bootstrap.estimate` turns it into None and a
reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlaif_jax.evaluate import Estimate

Floats = NDArray[np.float64]
Level = Literal["nominal", "ordinal", "interval"]
MAX_CELLS = 20_000_000
"""Numbers that the weights of a bootstrap may hold (160 MB); with more prompts there are fewer resamples."""


# ---- Chance-corrected agreement


def _numbers(x: Any) -> tuple[Any, Any]:
    """(the array module of x, x as its floats): float64 on the host; float32 for JAX arrays, which stay on the device."""
    if type(x).__module__.startswith("jax"):
        import jax.numpy as jnp

        return jnp, jnp.asarray(x, jnp.float32)
    return np, np.asarray(x, np.float64)


def divide(a: Any, b: Any) -> Any:
    """a / b, NaN where b is 0; shapes broadcast."""
    (_, top), (xp, bottom) = _numbers(a), _numbers(b)
    return xp.where(bottom == 0, np.nan, top / xp.where(bottom == 0, 1.0, bottom))


def observed_agreement(confusion: ArrayLike) -> Floats:
    """Share of the diagonal of confusion matrices [..., C, C]."""
    counts = np.asarray(confusion, np.float64)
    return divide(np.trace(counts, axis1=-2, axis2=-1), counts.sum((-2, -1)))


def cohen_kappa(confusion: ArrayLike, values: ArrayLike | None = None) -> Floats:
    """Cohen's kappa of confusion matrices [..., C, C], rows one rater, columns the other (Cohen 1960).

    values [C]: numbers of the categories; then disagreement weighs (v_i - v_j)^2 (Cohen 1968, quadratic weights).
    NaN where nothing was judged by both, or where chance alone agrees always (both used one and the same category).
    """
    counts = np.asarray(confusion, np.float64)
    if values is None:
        weights = 1 - np.eye(counts.shape[-1])
    else:
        numbers = np.asarray(values, np.float64)
        weights = (numbers[:, None] - numbers[None, :]) ** 2
    total = counts.sum((-2, -1))
    expected = np.einsum("...i,...j,ij->...", counts.sum(-1), counts.sum(-2), weights)
    return 1 - divide((counts * weights).sum((-2, -1)) * total, expected)


def coincidences(votes: Any) -> Any:
    """Krippendorff's coincidence matrix [C, C] of one unit that A raters judged. Pure, of NumPy or JAX arrays.

    votes [A, C]: each rater's choice as a distribution over the categories; one of certainty is one-hot, one that
    changed its mind has its vote split, one that is missing is all 0. With fewer than two raters nothing can coincide:
    zeros.
    """
    xp, given = _numbers(votes)
    count = (given.sum(-1) > 0).sum()
    total = given.sum(0)
    pairs = total[:, None] * total[None, :] - given.T @ given
    return xp.where(count < 2, 0.0, pairs / xp.maximum(count - 1, 1))


def krippendorff_alpha(coincidence: Any, level: Level, values: ArrayLike | None = None) -> Any:
    """Krippendorff's alpha from summed `coincidences` [..., C, C] (Krippendorff 2011, "Computing Krippendorff's
    Alpha-Reliability"): 1 is agreement, 0 what chance gives.

    Categories must be in rising order for "ordinal"; values [C] are their numbers for "interval" (default 0, 1, ...).
    Ordinal distances are differences of mid-ranks, which is Krippendorff's sum of the counts in between.
    NaN where fewer than two values can be paired, or all are the same. Pure, of NumPy or JAX arrays.
    """
    xp, counts = _numbers(coincidence)
    marginal = counts.sum(-1)
    categories = counts.shape[-1]
    if level == "nominal":
        distance = xp.broadcast_to(1 - xp.eye(categories), counts.shape)
    else:
        if level == "ordinal":
            place = xp.cumsum(marginal, -1) - marginal / 2
        else:
            place = xp.asarray(np.arange(categories) if values is None else values, counts.dtype)
        distance = (place[..., :, None] - place[..., None, :]) ** 2
    total = marginal.sum(-1)
    observed = (counts * distance).sum((-2, -1))
    expected = xp.einsum("...i,...j,...ij->...", marginal, marginal, distance)
    return 1 - divide(observed * (total - 1), expected)


def interval_moments(values: ArrayLike) -> Floats:
    """[4] of one unit's ratings [A]: what `interval_alpha` needs summed, without a table of categories."""
    given = np.asarray(values, np.float64)
    count = len(given)
    if count < 2:
        return np.zeros(4)
    within = count * (given @ given) - given.sum() ** 2
    return np.array([count, given.sum(), given @ given, within / (count - 1)])


def interval_alpha(moments: ArrayLike) -> Floats:
    """Krippendorff's alpha with interval distances from summed `interval_moments` [..., 4]."""
    count, total, squares, within = np.moveaxis(np.asarray(moments, np.float64), -1, 0)
    spread = count * squares - total**2
    return 1 - divide(within * (count - 1), np.where(spread <= 1e-12 * count * squares, 0.0, spread))


# ---- Calibration


def folded(probability: ArrayLike, outcome: ArrayLike) -> tuple[Floats, Floats]:
    """(confidence in [.5, 1], share right) of predictions about pairs.

    Which answer of a pair stands first has no meaning, so a prediction of .2 that the first is better is one of .8 that
    the second is.
    """
    p, y = np.asarray(probability, np.float64), np.asarray(outcome, np.float64)
    return np.maximum(p, 1 - p), np.where(p >= 0.5, y, 1 - y)


def calibration_columns(confidence: ArrayLike, right: ArrayLike, bins: int = 10) -> Floats:
    """[n, 1 + 3 bins] whose sums are what `brier`, `calibration_error` and `reliability` read.

    Squared error; then for each of `bins` equally wide bins over [.5, 1] its count, sum of confidences, sum right. A bin
    holds its lower edge, the last one both.
    """
    c, y = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    place = np.searchsorted(0.5 + np.arange(1, bins) / (2 * bins), c, side="right")
    here = np.eye(bins)[place]
    return np.concatenate([((c - y) ** 2)[:, None], here, here * c[:, None], here * y[:, None]], axis=1)


def _bins(sums: ArrayLike) -> tuple[Floats, Floats, Floats]:
    count, confidence, right = np.split(np.asarray(sums, np.float64)[..., 1:], 3, axis=-1)
    return count, confidence, right


def brier(sums: ArrayLike) -> Floats:
    """Mean squared error of the probabilities (Brier 1950): 0 is perfect, .25 is always saying one half."""
    return divide(np.asarray(sums, np.float64)[..., 0], _bins(sums)[0].sum(-1))


def calibration_error(sums: ArrayLike) -> Floats:
    """Expected calibration error (Guo et al. 2017, eq. 3) over the bins. Never negative, so noise makes it larger."""
    count, confidence, right = _bins(sums)
    return divide(np.abs(confidence - right).sum(-1), count.sum(-1))


def reliability(sums: ArrayLike) -> list[dict[str, float | None]]:
    """The reliability plot: of each bin `low`, `high`, `count`, mean `confidence` and share `right` (None if empty)."""
    count, confidence, right = _bins(sums)
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


# ---- A mean that a few labels debias


def powered_columns(judge: ArrayLike, person: ArrayLike) -> Floats:
    """[n, 8] whose sums `powered_mean` reads: judge [n] on all pairs, person [n] with NaN where there is no label."""
    f, y = np.asarray(judge, np.float64), np.asarray(person, np.float64)
    has = ~np.isnan(y)
    y = np.where(has, y, 0.0)
    inside = has * f
    return np.stack([np.ones_like(f), f, has, y, inside, y * f, inside * f, y * y], axis=-1)


def _powered(sums: ArrayLike) -> tuple[Floats, ...]:
    """(n all, n labelled, mean f, mean y, mean f where labelled, covariance, variance of f, variance of y)."""
    count, f, n, y, g, yg, gg, yy = np.moveaxis(np.asarray(sums, np.float64), -1, 0)
    mean_y, mean_g = divide(y, n), divide(g, n)
    covariance = divide(yg, n) - mean_y * mean_g
    return (
        count,
        n,
        divide(f, count),
        mean_y,
        mean_g,
        covariance,
        divide(gg, n) - mean_g**2,
        np.maximum(divide(yy, n) - mean_y**2, 0),
    )


def power_lambda(sums: ArrayLike) -> Floats:
    """The weight of the judge that makes `powered_mean` vary least: Cov(y, f) / Var(f), 0 if f does not vary.

    (Angelopoulos, Duchi & Zrnic 2023, "PPI++", section 6, for predictions on all pairs, the labelled among them.)
    """
    *_, covariance, variance, _ = _powered(sums)
    return np.where(variance > 1e-12, divide(covariance, np.where(variance > 1e-12, variance, 0)), 0.0)


def powered_mean(sums: ArrayLike) -> Floats:
    """The people's mean over all pairs, from a judge on all and people on some (prediction-powered inference):

        mean_labelled y + lambda (mean_all f - mean_labelled f),   lambda = `power_lambda`

    Without bias for any lambda if the labelled pairs are a random part of all; lambda = 1 is the judge's mean plus the
    mean error (Angelopoulos et al. 2023, "Prediction-powered inference"), lambda = 0 the labels alone.
    """
    _, _, f, y, g, *_ = _powered(sums)
    return y + power_lambda(sums) * (f - g)


def label_budget(sums: ArrayLike, labels: Sequence[int], *, level: float = 0.95) -> list[dict[str, float | None]]:
    """What so many `labels`, drawn at random, would buy: half-widths of the interval of labels alone and of `powered_mean`.

    With rho the correlation of judge and people: alone z s sqrt(d / n); powered z s sqrt(d (1 - rho^2) / n + d rho^2 / N),
    n of the N pairs labelled; `worth`: the number of labels that would be as good alone at the same d. Each d is a design
    effect (Kish 1965): of people, of what the judge leaves unexplained, and of the judge, for pairs of one prompt may be
    alike.

    sums: [G, 8], `powered_columns` summed by prompt. level: coverage.
    """
    groups = np.asarray(sums, np.float64)
    pairs, _, n, y, g, *_ = groups.T
    count, _, _, mean_y, mean_g, covariance, variance, spread = (float(x) for x in _powered(groups.sum(0)))
    if not (spread > 0 and count > 0):
        return []
    weight = covariance / variance if variance > 1e-12 else 0.0
    explained = min(spread, weight * covariance)
    left = spread - explained
    errors_y, errors_f = y - n * mean_y, g - n * mean_g
    alike_y, alike_f = _alike(errors_y, n, spread), _alike(errors_f, n, variance)
    alike_left = _alike(errors_y - weight * errors_f, n, left)
    company = float((pairs * (pairs - 1)).sum()) / max(count * (count - 1), 1.0)  # chance that two pairs share a prompt
    design = lambda alike, size: 1 + alike * company * (size - 1)
    z = NormalDist().inv_cdf((1 + level) / 2)
    rows: list[dict[str, float | None]] = []
    for size in labels:
        if size <= count:
            alone = spread * design(alike_y, size) / size
            powered = left * design(alike_left, size) / size + explained * design(alike_f, count) / count
            rows.append(
                {
                    "labels": size,
                    "alone": z * math.sqrt(alone),
                    "powered": z * math.sqrt(powered),
                    "worth": size * alone / powered,
                }
            )
    return rows


def _alike(errors: Floats, counts: Floats, variance: float) -> float:
    """Intraclass correlation, 0 .. 1, from errors [G] summed by group: how alike two values of one group are."""
    couples, total = float((counts * (counts - 1)).sum()), float(counts.sum())
    if couples <= 0 or variance <= 1e-12:
        return 0.0
    return min(1.0, max(0.0, (float(errors @ errors) / variance - total) / couples))


class Powered(NamedTuple):
    """`powered_mean` with its interval, that of the labels alone, the weight of the judge, how many of the pairs are
    labelled, and how many there are."""

    debiased: Estimate
    alone: Estimate
    weight: float
    labelled: int
    pairs: int


def prediction_powered(
    judge: ArrayLike,
    person: ArrayLike,
    *,
    seed: int = 0,
    groups: ArrayLike | None = None,
    resamples: int = 1000,
    level: float = 0.95,
) -> Powered:
    """People's mean over n pairs from a judge's values on all and people's on some.

    Args:
        judge: [n], finite.
        person: [n], NaN where no person was asked. These must be a *random* part of the pairs.
        groups: [n], the prompt of each pair; intervals draw whole prompts.

    Raises:
        ValueError: wrong shapes, a judge's value that is not finite, no label at all.
    """
    f, y = np.asarray(judge, np.float64), np.asarray(person, np.float64)
    if f.ndim != 1 or f.shape != y.shape:
        raise ValueError(f"judge and person should both be of shape [n], got {list(f.shape)} and {list(y.shape)}")
    if not np.isfinite(f).all() or np.isnan(y).all():
        raise ValueError("the judge's values should all be finite, and at least one pair should have a person's label")
    member = np.unique(np.arange(len(f)) if groups is None else np.asarray(groups), return_inverse=True)[1]
    sums = summed(powered_columns(f, y), member, int(member.max()) + 1)
    bootstrap = Bootstrap(len(sums), seed=seed, resamples=resamples, level=level)
    alone = lambda s: divide(s[..., 3], s[..., 2])
    found = [
        Estimate(*(math.nan if e[k] is None else e[k] for k in ("value", "low", "high")))
        for e in (bootstrap.estimate(sums, powered_mean), bootstrap.estimate(sums, alone))
    ]
    return Powered(found[0], found[1], float(power_lambda(sums.sum(0))), int((~np.isnan(y)).sum()), len(f))


# ---- The bootstrap


def summed(columns: ArrayLike, member: ArrayLike, count: int) -> Floats:
    """Rows [n, ...] added up by the group `member` [n] that each belongs to: [count, ...]."""
    rows = np.asarray(columns, np.float64)
    total = np.zeros((count, *rows.shape[1:]))
    np.add.at(total, np.asarray(member, np.int64), rows)
    return total


class Bootstrap:
    """Percentile intervals that draw whole groups (prompts) with replacement (Efron & Tibshirani 1993, ch. 13).

    All estimates of one object share their draws. groups: how many there are; level: coverage.
    """

    def __init__(self, groups: int, *, seed: int = 0, resamples: int = 1000, level: float = 0.95) -> None:
        self.level = level
        self.resamples = max(100, min(resamples, MAX_CELLS // max(groups, 1)))
        even = np.full(max(groups, 1), 1 / max(groups, 1))
        self._weights = np.random.default_rng(seed).multinomial(max(groups, 1), even, size=self.resamples).astype(float)

    def estimate(
        self,
        columns: Floats,
        statistic: Callable[[Floats], Floats],
        *,
        share: bool = False,
        reason: str = "nothing to compute it from",
    ) -> dict[str, Any]:
        """{"value", "low", "high"} of `statistic` on the sums of `columns` [groups, ...]; the statistic maps [..., *]
        sums to [...] values. None, with `reason`, where there is no number.

        share: the statistic is a share of independent groups. At 0 or 1 resampling sees no variation, so the interval is
        Wilson's for so many groups.
        """
        whole = float(statistic(columns.sum(0)))
        if not math.isfinite(whole):
            return {"value": None, "low": None, "high": None, "reason": reason}
        used = columns.reshape(len(columns), -1)
        groups = int((used != 0).any(1).sum())
        if groups < 2:
            return {"value": whole, "low": None, "high": None, "reason": "one prompt has no interval"}
        drawn = (self._weights @ used).reshape(self.resamples, *columns.shape[1:])
        values = statistic(drawn)
        values = values[np.isfinite(values)]
        if len(values) < self.resamples / 2:
            return {"value": whole, "low": None, "high": None, "reason": "too few prompts for an interval"}
        low, high = (float(x) for x in np.quantile(values, [(1 - self.level) / 2, (1 + self.level) / 2]))
        if share and low == high and whole in (0.0, 1.0):
            edge = _wilson_edge(groups, self.level)
            low, high = (0.0, edge) if whole == 0 else (1 - edge, 1.0)
        return {"value": whole, "low": low, "high": high}


def _wilson_edge(n: int, level: float) -> float:
    """Upper end of Wilson's interval for 0 of n."""
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    return z2 / (n + z2)
