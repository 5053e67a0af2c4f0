"""Win rates of paired scores, plain and at equal lengths, with intervals that resample whole prompts.

NumPy on host arrays of one number for each pair (n of them). NaN means "not judged": such a pair is left out.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from rlaif_jax.quality.bootstrap import Estimate, bootstrap_ci, check_resampling, draw_counts, percentile_interval
from rlaif_jax.quality.values import Floats, group_index, judged_values, vector_pair

Verdict = Literal["better", "no different", "worse"]


def pair_outcomes(a: ArrayLike, b: ArrayLike) -> Floats:
    """Returns the outcome [n] of each pair for `a`: 1 it scores higher, 0 lower, .5 a tie, NaN not judged.

    Args:
        a: [n], scores of one answer to each prompt.
        b: [n], scores of the other answer to the same prompts, in the same order.
    """
    first, second = vector_pair(a, b, "a", "b")
    outcome = np.where(first == second, 0.5, (first > second).astype(np.float64))
    outcome[np.isnan(first) | np.isnan(second)] = np.nan
    return outcome


def win_rate(a: ArrayLike, b: ArrayLike) -> float:
    """Computes how often `a` beats `b`; ties count half, pairs with a NaN are left out.

    Args:
        a: [n], scores of one answer to each prompt.
        b: [n], scores of the other answer to the same prompts, in the same order.

    Raises:
        ValueError: the shapes differ, or no pair is left.
    """
    return float(np.mean(judged_values(pair_outcomes(a, b))))


def win_rate_ci(
    a: ArrayLike,
    b: ArrayLike,
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
    groups: ArrayLike | None = None,
) -> Estimate:
    """Computes `win_rate` with its bootstrap interval.

    Pairs are resampled, so that both answers to a prompt stay together.

    Args:
        a: [n], scores of one answer to each prompt.
        b: [n], scores of the other answer to the same prompts, in the same order.
        seed: of the bootstrap.
        resamples: number of resamples.
        level: coverage, between 0 and 1.
        groups: [n], the prompt of each pair, as in `bootstrap_ci`.

    Raises:
        ValueError: a shape is wrong, no pair is left, or level is outside (0, 1).
    """
    outcome = pair_outcomes(a, b)
    low, high = bootstrap_ci(outcome, seed=seed, resamples=resamples, level=level, groups=groups)
    return Estimate(float(np.mean(judged_values(outcome))), low, high)


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
    """Estimates the win rate that is left when both answers have the same length.

    Fits `P(win) = sigmoid(quality + length * tanh(d / std(d)))` and returns `sigmoid(quality)`, the probability at no
    difference: the idea of length-controlled AlpacaEval (Dubois et al. 2024, "Length-Controlled AlpacaEval: A Simple
    Way to Debias Automatic Evaluators"), without its term for the prompt's difficulty.

    Args:
        wins: [n], in [0, 1] (1 win, .5 tie, or a judge's probability); NaN is left out.
        length_difference: [n], length of this answer minus length of the other, in tokens.
        seed: of the bootstrap.
        resamples: number of resamples.
        level: coverage, between 0 and 1.
        ridge: penalty `ridge / 2 * length**2` on the summed cross-entropy (a normal prior of variance 1 / ridge). It
            keeps the fit finite when length alone separates wins from losses; the result then leans towards the plain
            win rate.
        groups: [n], the prompt of each pair, as in `bootstrap_ci`.

    Returns:
        Estimate of a probability; three NaN when all pairs have one and the same non-zero difference, where length and
        quality cannot be separated.

    Raises:
        ValueError: a shape is wrong, wins are outside [0, 1], no pair is left, or ridge is not positive.
    """
    outcome, difference = vector_pair(wins, length_difference, "wins", "length_difference")
    check_resampling(level, resamples)
    if not ridge > 0:
        raise ValueError(f"ridge should be positive, got {ridge}")
    member, count = group_index(groups, outcome)
    kept = ~(np.isnan(outcome) | np.isnan(difference))
    judged_values(np.where(kept, outcome, np.nan))
    outcome, difference, member = outcome[kept], difference[kept], member[kept]
    if outcome.min() < 0 or outcome.max() > 1:
        raise ValueError(f"wins should be in [0, 1], got {outcome.min():g} to {outcome.max():g}")
    spread = float(np.std(difference))
    if spread == 0 and difference[0] != 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    squashed = np.tanh(difference / spread) if spread > 0 else np.zeros_like(difference)

    def rates(weights: Floats) -> Floats:
        return expit(_logistic_regressions(squashed, outcome, weights, ridge)[:, 0])

    value = rates(np.ones((1, len(outcome))))[0]
    draws = draw_counts(seed, resamples, count, row=max(count, len(outcome)))
    resampled = np.concatenate([rates(draw[:, member]) for draw in draws])
    return Estimate(float(value), *percentile_interval(resampled, level))


def _logistic_regressions(x: Floats, y: Floats, weights: Floats, ridge: float) -> Floats:
    """Fits weighted logistic regressions of y [n] on x [n], one for each row of weights [r, n].

    Newton's method with the length of a step capped, from zero: the objective is strictly convex, and without the cap
    nearly separated data would throw the first steps out of the region where its quadratic model holds. The intercept
    has a tiny penalty too: with wins only it would go to infinity. All rows at once in float64 NumPy, because a report
    on a run must not start JAX (`rewards.optimise` has the JAX optimisers).

    Returns:
        [r, 2]: intercept and slope.
    """
    penalty = np.array([1e-3, ridge])
    theta = np.zeros((len(weights), 2))
    for _ in range(100):
        p = expit(theta[:, :1] + theta[:, 1:] * x)
        residual = weights * (p - y)
        gradient = np.stack([residual.sum(1), residual @ x], 1) + penalty * theta
        curvature = weights * p * (1 - p)
        h00 = curvature.sum(1) + penalty[0]
        h01 = curvature @ x
        h11 = curvature @ (x * x) + penalty[1]
        hessian = np.stack([np.stack([h00, h01], 1), np.stack([h01, h11], 1)], 1)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        size = np.abs(step).max(1, keepdims=True)
        theta -= step / np.maximum(1.0, size)
        if size.max() < 1e-9:
            break
    return theta


def verdict_of(low: float, high: float, even: float = 0.5) -> Verdict:
    """Returns what an interval says of a policy after training.

    Args:
        low: the lower end, such as of the win rate against the policy before training.
        high: the upper end.
        even: the value of no difference: .5 of a win rate, 0 of a gain.
    """
    return "better" if low > even else "worse" if high < even else "no different"
