"""Statistics of agreement, calibration, ranks and diversity.

The statistics of confusion matrices, coincidences, moments and calibration are functions of *sums* over prompts, with
any number of leading axes, so that `intervals.Jackknife` can leave groups out. What cannot be computed is NaN. NumPy in float64
on the host; coincidences and alpha also take JAX arrays, which stay on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from rlaif_jax.quality.values import Floats, array_module, divide, judged_values, vector_pair

Level = Literal["nominal", "ordinal", "interval"]

# ---- Chance-corrected agreement of raters


def observed_agreement(confusion: ArrayLike) -> Floats:
    """Returns the share [...] of the diagonal of confusion matrices [..., C, C]."""
    counts = np.asarray(confusion, np.float64)
    return divide(np.trace(counts, axis1=-2, axis2=-1), counts.sum((-2, -1)))


def cohen_kappa(confusion: ArrayLike, values: ArrayLike | None = None) -> Floats:
    """Computes Cohen's kappa of confusion matrices.

    Cohen 1960; with `values`, the quadratic weights of Cohen 1968.

    Args:
        confusion: [..., C, C], rows are one rater's categories, columns the other's.
        values: [C], numbers of the categories; disagreement then weighs (v_i - v_j)^2. None: all weigh the same.

    Returns:
        [...]; NaN where nothing was judged by both, or where both used one and the same category.
    """
    counts = np.asarray(confusion, np.float64)
    weights, expected = _chance_disagreement(counts, values)
    return 1 - divide((counts * weights).sum((-2, -1)) * counts.sum((-2, -1)), expected)


def lowest_kappa(confusion: ArrayLike, values: ArrayLike | None = None) -> Floats:
    """Returns what `cohen_kappa` of the same margins would be if all disagreed as far as they can.

    Args:
        confusion: [..., C, C].
        values: [C], as in `cohen_kappa`.
    """
    counts = np.asarray(confusion, np.float64)
    weights, expected = _chance_disagreement(counts, values)
    return 1 - divide(weights.max() * counts.sum((-2, -1)) ** 2, expected)


def _chance_disagreement(counts: Floats, values: ArrayLike | None) -> tuple[Floats, Floats]:
    """Returns the weights [C, C] of disagreement, and its sum [...] by chance times the number of pairs."""
    if values is None:
        weights = 1 - np.eye(counts.shape[-1])
    else:
        numbers = np.asarray(values, np.float64)
        weights = (numbers[:, None] - numbers[None, :]) ** 2
    return weights, np.einsum("...i,...j,ij->...", counts.sum(-1), counts.sum(-2), weights)


def coincidences(votes: Any) -> Any:
    """Computes Krippendorff's coincidence matrix [C, C] of one unit that A raters judged.

    NumPy arrays give NumPy arrays, JAX arrays give JAX arrays.

    Args:
        votes: [A, C], each rater's choice as a distribution over the categories: one-hot for a certain choice, split
            for a rater who changed the choice, all 0 for a missing one. Fewer than two raters give zeros.
    """
    xp, given = array_module(votes)
    count = (given.sum(-1) > 0).sum()
    total = given.sum(0)
    pairs = total[:, None] * total[None, :] - given.T @ given
    return xp.where(count < 2, 0.0, pairs / xp.maximum(count - 1, 1))


def krippendorff_alpha(coincidence: Any, level: Level, values: ArrayLike | None = None) -> Any:
    """Computes Krippendorff's alpha: 1 is agreement, 0 is what chance gives. NumPy or JAX arrays.

    Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability". Ordinal distances are differences of mid-ranks,
    which is Krippendorff's sum of the counts in between.

    Args:
        coincidence: [..., C, C], sums of `coincidences`; for "ordinal" the categories are in rising order.
        level: how far two categories are apart: differing or not, by rank, or by number.
        values: [C], numbers of the categories for "interval". None: 0, 1, ...

    Returns:
        [...]; NaN where fewer than two values can be paired, or all are the same.
    """
    xp, counts = array_module(coincidence)
    marginal = counts.sum(-1)
    distance = _distances(xp, counts, level, values)
    observed = (counts * distance).sum((-2, -1))
    expected = xp.einsum("...i,...j,...ij->...", marginal, marginal, distance)
    return 1 - divide(observed * (marginal.sum(-1) - 1), expected)


def lowest_alpha(coincidence: ArrayLike, level: Level, values: ArrayLike | None = None) -> Floats:
    """Returns what `krippendorff_alpha` would be if all disagreed as far as they can.

    Args:
        coincidence: [..., C, C].
        level: as in `krippendorff_alpha`.
        values: [C], as in `krippendorff_alpha`.
    """
    counts = np.asarray(coincidence, np.float64)
    marginal = counts.sum(-1)
    total, distance = marginal.sum(-1), _distances(np, counts, level, values)
    expected = np.einsum("...i,...j,...ij->...", marginal, marginal, distance)
    return 1 - divide(distance.max((-2, -1)) * total * (total - 1), expected)


def _distances(xp: Any, counts: Any, level: Level, values: ArrayLike | None) -> Any:
    """Returns how far categories are apart, [..., C, C]."""
    categories = counts.shape[-1]
    if level == "nominal":
        return xp.broadcast_to(1 - xp.eye(categories), counts.shape)
    if level == "ordinal":
        marginal = counts.sum(-1)
        place = xp.cumsum(marginal, -1) - marginal / 2
    else:
        place = xp.asarray(np.arange(categories) if values is None else values, counts.dtype)
    return (place[..., :, None] - place[..., None, :]) ** 2


def interval_moments(values: ArrayLike) -> Floats:
    """Computes the moments [4] of one unit's ratings: count, sum, sum of squares, spread within the unit.

    `interval_alpha` reads their sums over units. A unit with fewer than two ratings gives zeros.

    Args:
        values: [A], the ratings of A raters, without missing ones.
    """
    given = np.asarray(values, np.float64)
    count = len(given)
    if count < 2:
        return np.zeros(4)
    within = count * (given @ given) - given.sum() ** 2
    return np.array([count, given.sum(), given @ given, within / (count - 1)])


def interval_alpha(moments: ArrayLike) -> Floats:
    """Computes Krippendorff's alpha [...] with interval distances from summed `interval_moments` [..., 4]."""
    count, total, squares, within = np.moveaxis(np.asarray(moments, np.float64), -1, 0)
    spread = count * squares - total**2
    return 1 - divide(within * (count - 1), np.where(spread <= 1e-12 * count * squares, 0.0, spread))


def lowest_interval_alpha(moments: ArrayLike, span: float = 1.0) -> Floats:
    """Returns what `interval_alpha` [...] would be if all disagreed by the whole scale.

    Args:
        moments: [..., 4], summed `interval_moments`.
        span: highest minus lowest value of the scale.
    """
    count, total, squares, _ = np.moveaxis(np.asarray(moments, np.float64), -1, 0)
    return 1 - divide(span**2 * count * (count - 1) / 2, count * squares - total**2)


# ---- A judge against gold labels, and in both orders


def agreement_with_gold(labels: ArrayLike, gold: ArrayLike) -> float:
    """Returns how often a judge prefers the answer that the gold label prefers.

    Args:
        labels: [n], the judge's probability (or 0 / 1) that the first answer is better; .5 counts half.
        gold: [n], the same from the gold score; where it is .5 (a tie) or either is NaN the pair is left out.

    Raises:
        ValueError: the shapes differ, or no pair is left.
    """
    given, true = vector_pair(labels, gold, "labels", "gold")
    given, true = np.sign(given - 0.5), np.sign(true - 0.5)
    same = np.where(given == 0, 0.5, (given == true).astype(np.float64))
    same[(true == 0) | np.isnan(given) | np.isnan(true)] = np.nan
    return float(np.mean(judged_values(same)))


def same_position_rate(p_first_order: ArrayLike, p_swapped: ArrayLike) -> float:
    """Computes how often a judge picks the same *position* in both orders.

    0 is unbiased; 1 is a judge that looks at the position alone.

    Lee et al. 2023 (RLAIF, arXiv 2309.00267), appendix on position bias.

    Args:
        p_first_order: [n], probability of the answer *shown first* when the pair is shown as (a, b).
        p_swapped: [n], probability of the answer *shown first* when it is shown as (b, a), which is b. (For a judge
            that reports the probability of a in both orders, pass one minus the second.)

    Returns:
        The rate; a pair with a .5 picks no position and counts as not the same; NaN is left out.

    Raises:
        ValueError: the shapes differ, or no pair is left.
    """
    first, swapped = vector_pair(p_first_order, p_swapped, "p_first_order", "p_swapped")
    product = (first - 0.5) * (swapped - 0.5)
    return float(np.mean(judged_values(np.where(np.isnan(product), np.nan, product > 0))))


# ---- Calibration of a judge's probabilities on pairs


def fold_predictions(probability: ArrayLike, outcome: ArrayLike) -> tuple[Floats, Floats]:
    """Returns predictions about pairs as confidences in the more likely answer.

    Which answer of a pair is called first has no meaning, so a prediction of .2 that the first is better is one
    of .8 that the second is.

    Args:
        probability: [n], of the first answer being better.
        outcome: [n], 1 where the first answer is better, 0 where the second is, .5 for a tie.

    Returns:
        (confidence [n] in [.5, 1]; share right [n], which is 1, 0 or .5).
    """
    p, y = np.asarray(probability, np.float64), np.asarray(outcome, np.float64)
    return np.maximum(p, 1 - p), np.where(p >= 0.5, y, 1 - y)


def calibration_columns(confidence: ArrayLike, right: ArrayLike, bins: int = 10) -> Floats:
    """Returns rows [n, 1 + 3 bins] whose sums `brier`, `calibration_error` and `reliability_bins` read.

    A row holds the squared error; then for each of `bins` equally wide bins over [.5, 1] its count, sum of
    confidences and sum right. A bin holds its lower edge, the last one both.

    Args:
        confidence: [n] in [.5, 1], from `fold_predictions`.
        right: [n] in [0, 1], from `fold_predictions`.
        bins: number of bins.
    """
    c, y = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    place = np.searchsorted(0.5 + np.arange(1, bins) / (2 * bins), c, side="right")
    here = np.eye(bins)[place]
    return np.concatenate([((c - y) ** 2)[:, None], here, here * c[:, None], here * y[:, None]], axis=1)


def split_bins(sums: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """Returns (count, sum of confidences, sum right), each [..., bins], of sums [..., 1 + 3 bins]."""
    count, confidence, right = np.split(np.asarray(sums, np.float64)[..., 1:], 3, axis=-1)
    return count, confidence, right


def brier(sums: ArrayLike) -> Floats:
    """Computes the mean squared error [...] of the probabilities (Brier 1950); NaN without predictions.

    0 is perfect; a judge that always gives one half has .25. `sums` [..., 1 + 3 bins] are those of
    `calibration_columns`.
    """
    return divide(np.asarray(sums, np.float64)[..., 0], split_bins(sums)[0].sum(-1))


def calibration_error(sums: ArrayLike) -> Floats:
    """Computes the expected calibration error [...] over the bins (Guo et al. 2017, eq. 3).

    Noise makes it larger: `calibration.debiased_calibration_error` takes that out. `sums` [..., 1 + 3 bins] are those of
    `calibration_columns`; NaN without predictions.
    """
    count, confidence, right = split_bins(sums)
    return divide(np.abs(confidence - right).sum(-1), count.sum(-1))


def reliability_bins(sums: ArrayLike) -> list[dict[str, float | None]]:
    """Returns each bin's `low`, `high`, `count`, mean `confidence` and share `right` (None if empty).

    `sums` [1 + 3 bins] are those of `calibration_columns`.
    """
    count, confidence, right = split_bins(sums)
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


# ---- Ranks and diversity


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Computes Spearman's rank correlation.

    Args:
        a: [n].
        b: [n]; equal values share their mean rank, pairs with a NaN are left out.

    Returns:
        In [-1, 1]; NaN when one side is constant.

    Raises:
        ValueError: the shapes differ, or no pair is left.
    """
    from scipy.stats import rankdata  # scipy.stats takes half a second to import; no report needs it

    first, second = vector_pair(a, b, "a", "b")
    kept = ~(np.isnan(first) | np.isnan(second))
    judged_values(np.where(kept, first, np.nan))
    x, y = rankdata(first[kept]), rankdata(second[kept])
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt(np.sum(x * x) * np.sum(y * y))
    return float(np.sum(x * y) / scale) if scale > 0 else float("nan")


def distinct_n(sequences: Sequence[Sequence[int]], n: int) -> float:
    """Computes the number of different n-grams over the number of all n-grams (Li et al. 2016).

    The n-grams are those of all sequences. A low value shows that a model has collapsed.

    Args:
        sequences: token ids of each answer, without padding; lengths may differ. Compare only sets of about the same
            number of tokens: the value falls with the amount of text.
        n: length of the n-grams.

    Returns:
        In [0, 1]; 0 when no sequence is as long as n (an empty answer is no diversity).

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n should be at least 1, got {n}")
    grams = [
        tuple(int(token) for token in sequence[start : start + n])
        for sequence in sequences
        for start in range(len(sequence) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0
