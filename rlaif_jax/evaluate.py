"""What an evaluation's numbers say: win rates and their intervals, length control, agreement.

Plain NumPy on host arrays of one number a pair or answer (n of them). A NaN means "not judged": it is left
out, never counted as a loss. `groups` names the prompt of every value: answers to one prompt are not
independent, so intervals resample whole prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_CHUNK = 4_000_000  # numbers that a bootstrap holds at once (32 MB)


class Estimate(NamedTuple):
    """A value with its confidence interval."""

    value: float
    low: float
    high: float


def pair_outcomes(a: ArrayLike, b: ArrayLike) -> Floats:
    """Outcome of each pair for `a`: 1 it scores higher, 0 lower, .5 a tie, NaN not judged.

    Args:
        a, b: scores [n] of two answers to the same prompts, in the same order.

    Returns:
        [n].
    """
    first, second = _pairs(a, b, "a", "b")
    outcome = np.where(first == second, 0.5, (first > second).astype(np.float64))
    outcome[np.isnan(first) | np.isnan(second)] = np.nan
    return outcome


def win_rate(a: ArrayLike, b: ArrayLike) -> float:
    """How often `a` beats `b`, ties counting half; pairs with a NaN are left out.

    Raises:
        ValueError: the shapes differ, or no pair is left.
    """
    return float(np.mean(_judged(pair_outcomes(a, b))))


def win_rate_ci(
    a: ArrayLike,
    b: ArrayLike,
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
    groups: ArrayLike | None = None,
) -> Estimate:
    """`win_rate` with its `bootstrap_ci`; the pairs are resampled, so that both answers stay together."""
    outcome = pair_outcomes(a, b)
    low, high = bootstrap_ci(outcome, seed=seed, resamples=resamples, level=level, groups=groups)
    return Estimate(float(np.mean(_judged(outcome))), low, high)


def bootstrap_ci(
    values: ArrayLike,
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
    groups: ArrayLike | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron & Tibshirani 1993, ch. 13).

    Args:
        values: [n]; NaN is left out. For a paired comparison give the pairs' differences or outcomes.
        seed: the interval is a pure function of the values and the seed.
        resamples: number of resamples.
        level: coverage, between 0 and 1.
        groups: [n], which values belong together (the prompt's index or text); whole groups are drawn, each
            value weighing the same. None: every value on its own.

    Returns:
        (low, high). Both equal the mean when all values are equal: the bootstrap cannot see beyond its
        sample, so mistrust it below about 30 values or groups.

    Raises:
        ValueError: nothing but NaN, wrong shapes, level outside (0, 1).
    """
    numbers = _vector(values, "values")
    _check_level(level, resamples)
    member, count = _members(groups, numbers)
    kept = ~np.isnan(numbers)
    _judged(numbers)
    sums = np.bincount(member[kept], weights=numbers[kept], minlength=count)
    sizes = np.bincount(member[kept], minlength=count).astype(np.float64)
    means = np.concatenate(
        [(draw @ sums) / (draw @ sizes) for draw in _draws(seed, resamples, count)]
    )  # no group is empty, so no size is zero
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def length_controlled_win_rate(
    wins: ArrayLike,
    length_difference: ArrayLike,
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
    ridge: float = 1.0,
    groups: ArrayLike | None = None,
) -> Estimate:
    """The win rate that is left when both answers have the same length.

    Fits `P(win) = sigmoid(quality + length * tanh(d / std(d)))` and returns `sigmoid(quality)`, the
    probability at no difference: the idea of length-controlled AlpacaEval (Dubois et al. 2024,
    "Length-Controlled AlpacaEval: A Simple Way to Debias Automatic Evaluators"), without its term for the
    prompt's difficulty.

    Args:
        wins: [n], in [0, 1] (1 win, .5 tie, or a judge's probability); NaN is left out.
        length_difference: [n], length of this answer minus length of the other, in tokens.
        seed, resamples, level, groups: as `bootstrap_ci`.
        ridge: penalty `ridge / 2 * length**2` on the summed cross-entropy (a normal prior of variance
            1 / ridge). It keeps the fit finite when length alone separates wins from losses; the result then
            leans towards the plain win rate.

    Returns:
        Estimate of a probability; three NaN when all pairs have one and the same non-zero difference, where
        length and quality cannot be told apart.

    Raises:
        ValueError: wrong shapes, wins outside [0, 1], nothing but NaN, ridge not positive.
    """
    outcome, difference = _pairs(wins, length_difference, "wins", "length_difference")
    _check_level(level, resamples)
    if not ridge > 0:
        raise ValueError(f"ridge should be positive, got {ridge}")
    member, count = _members(groups, outcome)
    kept = ~(np.isnan(outcome) | np.isnan(difference))
    _judged(np.where(kept, outcome, np.nan))
    outcome, difference, member = outcome[kept], difference[kept], member[kept]
    if outcome.min() < 0 or outcome.max() > 1:
        raise ValueError(f"wins should be in [0, 1], got {outcome.min():g} to {outcome.max():g}")
    spread = float(np.std(difference))
    if spread == 0 and difference[0] != 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    squashed = np.tanh(difference / spread) if spread > 0 else np.zeros_like(difference)

    def fit(weights: Floats) -> Floats:
        return _sigmoid(_fit_logistic(squashed, outcome, weights, ridge)[:, 0])

    value = fit(np.ones((1, len(outcome))))[0]
    draws = _draws(seed, resamples, count, row=max(count, len(outcome)))
    rates = np.concatenate([fit(draw[:, member]) for draw in draws])
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(value), float(low), float(high))


def agreement(labels: ArrayLike, gold: ArrayLike) -> float:
    """How often a judge prefers the answer that the gold label prefers.

    Args:
        labels: [n], the judge's probability (or 0 / 1) that the first answer is better; .5 counts half.
        gold: [n], the same from the gold score; where it is .5 (a tie) or either is NaN the pair is left out.

    Raises:
        ValueError: the shapes differ, or no pair is left.
    """
    given, true = _pairs(labels, gold, "labels", "gold")
    given, true = np.sign(given - 0.5), np.sign(true - 0.5)
    same = np.where(given == 0, 0.5, (given == true).astype(np.float64))
    same[(true == 0) | np.isnan(given) | np.isnan(true)] = np.nan
    return float(np.mean(_judged(same)))


def same_position_rate(p_first_order: ArrayLike, p_swapped: ArrayLike) -> float:
    """How often a judge picks the same *position* in both orders: 0 is unbiased, 1 judges the position alone.

    Lee et al. 2023 (RLAIF, arXiv 2309.00267), appendix on position bias.

    Args:
        p_first_order: [n], probability of the answer *shown first* when the pair is shown as (a, b).
        p_swapped: [n], probability of the answer *shown first* when it is shown as (b, a), which is b. (For a
            judge that reports the probability of a in both orders, pass one minus the second.)

    Returns:
        The rate; a pair with a .5 picks no position and counts as not the same; NaN is left out.

    Raises:
        ValueError: the shapes differ, or no pair is left.
    """
    first, swapped = _pairs(p_first_order, p_swapped, "p_first_order", "p_swapped")
    product = (first - 0.5) * (swapped - 0.5)
    return float(np.mean(_judged(np.where(np.isnan(product), np.nan, product > 0))))


def distinct_n(sequences: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams of all sequences (Li et al. 2016): low when a model has collapsed.

    Args:
        sequences: token ids of each answer, without padding; lengths may differ. Compare only sets of about
            the same number of tokens: the value falls with the amount of text.
        n: length of the n-grams.

    Returns:
        In [0, 1]; 0 when no sequence is as long as n (nothing said is no diversity).
    """
    if n < 1:
        raise ValueError(f"n should be at least 1, got {n}")
    grams = [
        tuple(int(token) for token in sequence[start : start + n])
        for sequence in sequences
        for start in range(len(sequence) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; pairs with a NaN are left out.

    Returns:
        In [-1, 1]; NaN when one side is constant.

    Raises:
        ValueError: the shapes differ, or no pair is left.
    """
    first, second = _pairs(a, b, "a", "b")
    kept = ~(np.isnan(first) | np.isnan(second))
    _judged(np.where(kept, first, np.nan))
    x, y = _ranks(first[kept]), _ranks(second[kept])
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt(np.sum(x * x) * np.sum(y * y))
    return float(np.sum(x * y) / scale) if scale > 0 else float("nan")


def _vector(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} should have shape [n], got {list(array.shape)}")
    return array


def _pairs(a: ArrayLike, b: ArrayLike, name_a: str, name_b: str) -> tuple[Floats, Floats]:
    first, second = _vector(a, name_a), _vector(b, name_b)
    if first.shape != second.shape:
        raise ValueError(f"{name_a} and {name_b} should be of one length, got {len(first)} and {len(second)}")
    return first, second


def _judged(values: Floats) -> Floats:
    kept = values[~np.isnan(values)]
    if not len(kept):
        raise ValueError(f"nothing to average: none of {len(values)} values is judged")
    return kept


def _check_level(level: float, resamples: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level should be between 0 and 1, got {level}")
    if resamples < 1:
        raise ValueError(f"resamples should be at least 1, got {resamples}")


def _members(groups: ArrayLike | None, values: Floats) -> tuple[NDArray[np.int64], int]:
    """Group index of every value and the number of groups; groups that are all NaN are not counted."""
    names: NDArray[Any] = np.arange(len(values)) if groups is None else np.asarray(groups)
    if names.shape != values.shape:
        raise ValueError(f"groups should have shape [{len(values)}], got {list(names.shape)}")
    kept = ~np.isnan(values)
    member = np.zeros(len(values), np.int64)
    unique, member[kept] = np.unique(names[kept], return_inverse=True)
    return member, len(unique)


def _draws(seed: int, resamples: int, count: int, row: int | None = None) -> Iterator[Floats]:
    """Bootstrap weights in chunks [r, count]: how often each group was drawn, in each of r resamples."""
    generator = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // (row or count))
    even = np.full(count, 1 / count)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        yield generator.multinomial(count, even, size=size).astype(np.float64)


def _sigmoid(x: Floats) -> Floats:
    return 0.5 + 0.5 * np.tanh(0.5 * x)  # does not overflow


def _fit_logistic(x: Floats, y: Floats, weights: Floats, ridge: float) -> Floats:
    """Weighted logistic regressions of y [n] on x [n], one for each row of weights [r, n].

    Newton's method with the length of a step capped, from zero: the objective is strictly convex, and without
    the cap nearly separated data would throw the first steps out of the region where its quadratic model
    holds. The intercept has a tiny penalty of its own: with wins only it would go to infinity.

    Returns:
        [r, 2]: intercept and slope.
    """
    penalty = np.array([1e-3, ridge])
    theta = np.zeros((len(weights), 2))
    for _ in range(100):
        p = _sigmoid(theta[:, :1] + theta[:, 1:] * x)
        residual = weights * (p - y)
        gradient = np.stack([residual.sum(1), residual @ x], 1) + penalty * theta
        curvature = weights * p * (1 - p)
        h00 = curvature.sum(1) + penalty[0]
        h01 = curvature @ x
        h11 = curvature @ (x * x) + penalty[1]
        determinant = h00 * h11 - h01 * h01
        step = np.stack(
            [
                h11 * gradient[:, 0] - h01 * gradient[:, 1],
                h00 * gradient[:, 1] - h01 * gradient[:, 0],
            ],
            1,
        )
        step /= determinant[:, None]
        size = np.abs(step).max(1, keepdims=True)
        theta -= step / np.maximum(1.0, size)
        if size.max() < 1e-9:
            break
    return theta


def _ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]
