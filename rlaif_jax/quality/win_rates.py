"""Win rates of paired scores, plain and at equal lengths, with intervals over whole prompts.

NumPy on host arrays of one number for each pair (n of them). NaN means "not judged": such a pair is left out.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit

from rlaif_jax.quality.intervals import Estimate, check_level, share_interval, student
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


def win_rate_ci(a: ArrayLike, b: ArrayLike, *, level: float = 0.95, groups: ArrayLike | None = None) -> Estimate:
    """Computes `win_rate` with its interval, that of `share_interval`.

    Args:
        a: [n], scores of one answer to each prompt.
        b: [n], scores of the other answer to the same prompts, in the same order.
        level: coverage, between 0 and 1.
        groups: [n], the prompt of each pair. None: each pair is a group.

    Raises:
        ValueError: a shape is wrong, no pair is left, or level is outside (0, 1).
    """
    return share_interval(pair_outcomes(a, b), level=level, groups=groups)


class LengthControlled(NamedTuple):
    """A win rate at equal lengths with its interval.

    Attributes:
        value: the win rate.
        low: the lower end.
        high: the upper end.
        note: what the number cannot show, or "".
    """

    value: float
    low: float
    high: float
    note: str = ""


SEPARATED = "length alone separates wins from losses: the value rests on the prior of Firth's method"


def length_controlled_win_rate(
    wins: ArrayLike, length_difference: ArrayLike, *, level: float = 0.95, groups: ArrayLike | None = None
) -> LengthControlled:
    """Estimates the win rate that is left when both answers have the same length.

    Fits `P(win) = sigmoid(quality + length * tanh(d / std(d)))` and returns `sigmoid(quality)`, the probability at no
    difference: the idea of length-controlled AlpacaEval (Dubois et al. 2024, "Length-Controlled AlpacaEval: A Simple
    Way to Debias Automatic Evaluators"), without its term for the prompt's difficulty.

    The fit has the penalty of Firth 1993, "Bias reduction of maximum likelihood estimates": without bias to first order,
    and finite where length separates wins from losses. The interval is that of the profile of the penalised likelihood
    (Heinze & Schemper 2002, "A solution to the problem of separation in logistic regression"), widened by the design
    effect of pairs that share a prompt and narrowed where outcomes are no plain wins and losses.

    Args:
        wins: [n], in [0, 1] (1 win, .5 tie, or a judge's probability); NaN is left out.
        length_difference: [n], length of this answer minus length of the other, in tokens.
        level: coverage, between 0 and 1.
        groups: [n], the prompt of each pair. None: each pair is a group.

    Returns:
        Estimate of a probability; three NaN when all pairs have much the same difference, far from 0, where length and quality
        cannot be separated. The bounds are NaN for a single group.

    Raises:
        ValueError: a shape is wrong, wins are outside [0, 1], no pair is left, or level is outside (0, 1).
    """
    outcome, difference = vector_pair(wins, length_difference, "wins", "length_difference")
    check_level(level)
    member, _ = group_index(groups, outcome)
    kept = ~(np.isnan(outcome) | np.isnan(difference))
    judged_values(np.where(kept, outcome, np.nan))
    y, difference, member = outcome[kept], difference[kept], np.unique(member[kept], return_inverse=True)[1]
    if y.min() < 0 or y.max() > 1:
        raise ValueError(f"wins should be in [0, 1], got {y.min():g} to {y.max():g}")
    spread = float(np.std(difference))
    if not difference.any():
        return LengthControlled(*share_interval(y, level=level, groups=member))
    x = np.tanh(difference / spread) if spread else np.ones_like(y)
    if float(np.ptp(x)) < 1e-6:
        return LengthControlled(math.nan, math.nan, math.nan)
    fit = _firth(x, y)
    note = SEPARATED if _is_separated(x, y) else ""
    count = int(member.max()) + 1
    if count < 2:
        return LengthControlled(float(expit(fit.quality)), math.nan, math.nan, note)
    variance, effect = _design_effect(x, y, fit, member, count)
    drop = student(level, count) ** 2 * effect / 2

    def end(step: float) -> float:
        """Returns where the profile has fallen by `drop`, in the direction of `step`."""
        fallen = lambda quality: fit.likelihood - drop - _firth(x, y, quality, fit.length).likelihood
        near, far = fit.quality, fit.quality + step
        while fallen(far) < 0 and abs(far) < 40:
            near, far = far, far + step
        return float(expit(far if fallen(far) < 0 else brentq(fallen, near, far, xtol=1e-6)))

    step = math.sqrt(2 * drop * variance)
    return LengthControlled(float(expit(fit.quality)), end(-step), end(step), note)


class _Fit(NamedTuple):
    """A logistic fit: P(win) = sigmoid(quality + length x).

    Attributes:
        quality: the log odds at x = 0.
        length: the slope.
        likelihood: the penalised log likelihood.
        win: [n], P(win).
        moments: the sums of w, w x and w x^2 with w = P(win) P(loss), and the determinant of the information.
    """

    quality: float
    length: float
    likelihood: float
    win: Floats
    moments: tuple[float, float, float, float]


def _firth(x: Floats, y: Floats, quality: float | None = None, length: float = 0.0) -> _Fit:
    """Fits y [n] on x [n] by Newton's method with the length of a step capped, from zero.

    In float64 NumPy, because a report on a run must not start JAX (`rewards.optimise` has the JAX optimisers).

    Args:
        x: [n].
        y: [n], in [0, 1].
        quality: the value at which it is held. None: it is fitted.
        length: where the search for the slope starts.
    """
    theta = np.array([quality or 0.0, length if quality is not None else 0.0])
    squares = x * x
    for _ in range(200):
        win = expit(theta[0] + theta[1] * x)
        weight = win * (1 - win)
        a, b, c = float(weight.sum()), float(weight @ x), float(weight @ squares)
        determinant = max(a * c - b * b, 1e-300)
        leverage = weight * (c - 2 * b * x + a * squares) / determinant
        residual = y - win + leverage * (0.5 - win)
        first, second = float(residual.sum()), float(residual @ x)
        if quality is None:
            step = np.array([c * first - b * second, a * second - b * first]) / determinant
        else:
            step = np.array([0.0, second / max(c, 1e-300)])
        size = float(np.abs(step).max())
        if size < 1e-8:
            break
        theta += step / max(1.0, size)
    margin = theta[0] + theta[1] * x
    likelihood = float(y @ margin - np.logaddexp(0, margin).sum()) + math.log(determinant) / 2
    return _Fit(float(theta[0]), float(theta[1]), likelihood, win, (a, b, c, determinant))


def _is_separated(x: Floats, y: Floats) -> bool:
    """Returns whether a threshold of x parts wins from losses; a tie is both."""
    wins, losses = x[y > 0], x[y < 1]
    return not len(wins) or not len(losses) or wins.min() >= losses.max() or losses.min() >= wins.max()


def _design_effect(x: Floats, y: Floats, fit: _Fit, member: NDArray[np.int64], groups: int) -> tuple[float, float]:
    """Returns the model's variance of `fit.quality`, and by what factor the true one exceeds it.

    The true one is a sandwich over groups with the leverages taken out. Of wins and losses the factor is at least 1,
    because near 0 and 1 a sandwich sees too few of the rarer outcomes; soft outcomes may spread less.

    Args:
        x: [n].
        y: [n].
        fit: of y on x.
        member: [n], the group of each pair.
        groups: number of groups.
    """
    a, b, c, determinant = fit.moments
    weight = fit.win * (1 - fit.win)
    leverage = weight * (c - 2 * b * x + a * x * x) / determinant
    influence = (c - b * x) / determinant * (y - fit.win) / np.sqrt(np.maximum(1 - leverage, 1e-6))
    sums = np.bincount(member, weights=influence, minlength=groups)
    variance, sandwich = c / determinant, float(sums @ sums) * groups / (groups - 1)
    hardness = 1 - float((y * (1 - y)).sum()) / a  # 1 of wins and losses
    return variance, max(sandwich / variance, hardness, 1e-6)


def verdict_of(low: float, high: float, even: float = 0.5) -> Verdict:
    """Returns what an interval says of a policy after training.

    Args:
        low: the lower end, such as of the win rate against the policy before training.
        high: the upper end.
        even: the value of no difference: .5 of a win rate, 0 of a gain.
    """
    return "better" if low > even else "worse" if high < even else "no different"
