"""Confidence intervals over groups (prompts).

`Jackknife` is for functions of sums over groups. The variance is that of the jackknife over whole groups (Efron & Stein
1981, "The jackknife estimate of variance"), with Student's t. A share has Wilson's score interval for the number of
independent trials that would have this variance (Franco, Little, Louis & Slud 2019, "Comparative study of confidence
intervals for proportions in complex sample surveys"): it covers where a percentile bootstrap does not, near 0 and 1 and
where no group differs from another. An agreement above chance, 1 - disagreement / disagreement by chance, has the same
interval on a scale that ends where all disagree.

`bootstrap_ci` is for the mean of unbounded values, `resampled_rows` for statistics that need the rows themselves, such as
a rank correlation: percentile intervals (Efron & Tibshirani 1993, chapter 13), functions of their data and a seed.

`experiments/benchmarks/coverage.py` measures how often the intervals cover. NumPy in float64 on the host.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.special import stdtrit

from rlaif_jax.quality.values import Floats, group_index, judged_values, sum_by_group, vector

MAX_LEFT_OUT = 1000
"""With more groups the statistic is taken as linear in the weight of a group: the two then agree, at a cost of G + K."""
MIN_CARRIERS = 5
"""An agreement whose variance rests on fewer groups has a note."""
_FEW = f"its spread rests on fewer than {MIN_CARRIERS} prompts: the interval may be too narrow"
_DRAWN = 4_000_000  # numbers that `draw_counts` yields at once (32 MB)
_CHUNK = 2_000_000  # numbers that are made at once where groups are left out (16 MB)

Statistic = Callable[[Floats], Floats]
"""Sums [..., *] -> values [...]."""


class Estimate(NamedTuple):
    """A value with its confidence interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Jackknife:
    """Intervals of functions of sums over groups.

    Attributes:
        level: coverage of the intervals, between 0 and 1.
    """

    level: float = 0.95

    def __post_init__(self) -> None:
        check_level(self.level)

    def estimate(
        self,
        columns: Any,
        statistic: Statistic,
        *,
        share: bool = False,
        lowest: float | Statistic | None = None,
        informative: ArrayLike | None = None,
        reason: str = "nothing to compute it from",
    ) -> dict[str, Any]:
        """Computes `statistic` on the sums of `columns` over all groups, with its interval.

        Args:
            columns: [groups, ...], the rows of each group summed; or a SciPy sparse matrix [groups, K].
            statistic: maps sums [..., *] to values [...], smoothly.
            share: the statistic is a share, in [0, 1].
            lowest: the statistic is 1 - a disagreement, and this is its value (or a function of the sums) if all
                disagreed as far as they can; -1 for a correlation. None: it has no bounds.
            informative: [groups] bool, the groups that decide how much is known. None: those that are not 0.
            reason: given where the statistic has no value.

        Returns:
            {"value", "low", "high"}; None, with a "reason", where there is no number. An agreement whose variance rests on
            a few groups has a "note", because its interval then covers less often than it says.
        """
        shape = columns.shape[1:]
        total = np.asarray(columns.sum(0), np.float64).reshape(shape)
        whole = float(statistic(total))
        if not math.isfinite(whole):
            return {"value": None, "low": None, "high": None, "reason": reason}
        rows: Any = columns if sparse.issparse(columns) else np.asarray(columns, np.float64).reshape(len(columns), -1)
        used = np.diff(rows.tocsr().indptr) > 0 if sparse.issparse(rows) else (rows != 0).any(1)
        groups = int((used if informative is None else used & np.asarray(informative, bool)).sum())
        if groups < 2:
            return {"value": whole, "low": None, "high": None, "reason": "one prompt has no interval"}
        variance, carriers = _variance(rows[used], total, statistic)
        if not math.isfinite(variance):
            return {"value": whole, "low": None, "high": None, "reason": "too few prompts for an interval"}
        score = student(self.level, groups)
        if share or lowest is not None:
            floor = 0.0 if share else float(lowest(total) if callable(lowest) else lowest)  # type: ignore[arg-type]
            scale = 1 - floor
            place = min(max((whole - floor) / scale, 0.0), 1.0)  # a debiased share may be outside
            low, high = _score_interval(place, variance / scale**2, groups, score)
            found = {"value": min(max(whole, floor), 1.0), "low": floor + scale * low, "high": floor + scale * high}
            return found | ({"note": _FEW} if not share and 0 < carriers < MIN_CARRIERS else {})
        width = score * math.sqrt(variance)
        return {"value": whole, "low": whole - width, "high": whole + width}


def share_interval(values: ArrayLike, *, level: float = 0.95, groups: ArrayLike | None = None) -> Estimate:
    """Computes the mean of values in [0, 1] with its interval.

    Args:
        values: [n], such as outcomes 0, .5 and 1; NaN is left out.
        level: coverage, between 0 and 1.
        groups: [n], which values belong together (the prompt's index or text). None: each value is a group.

    Returns:
        The mean and its bounds; the bounds are NaN for a single group.

    Raises:
        ValueError: all values are NaN, one is outside [0, 1], a shape is wrong, or level is outside (0, 1).
    """
    numbers = vector(values, "values")
    member, count = group_index(groups, numbers)
    kept = ~np.isnan(numbers)
    given = judged_values(numbers)
    if given.min() < 0 or given.max() > 1:
        raise ValueError(f"values should be in [0, 1], got {given.min():g} to {given.max():g}")
    sums = sum_by_group(np.stack([given, np.ones_like(given)], 1), member[kept], count)
    return as_estimate(Jackknife(level).estimate(sums, lambda s: s[..., 0] / s[..., 1], share=True))


def as_estimate(fields: dict[str, Any]) -> Estimate:
    """Returns the fields of `Jackknife.estimate` as numbers, NaN for None."""
    return Estimate(*(math.nan if fields[key] is None else fields[key] for key in ("value", "low", "high")))


def check_level(level: float) -> None:
    """Raises ValueError for a level outside (0, 1)."""
    if not 0 < level < 1:
        raise ValueError(f"level should be between 0 and 1, got {level}")


def student(level: float, groups: float) -> float:
    """Returns the two-sided quantile of Student's t for an interval from this number of groups."""
    return float(stdtrit(max(groups - 1, 1), (1 + level) / 2))


def _variance(rows: Any, total: Floats, statistic: Statistic) -> tuple[float, float]:
    """Returns the jackknife variance of statistic(total), and on how many groups it rests.

    It is NaN where most of the groups cannot be left out. The number is (sum d^2)^2 / sum d^4 of the changes d
    by leaving out a group: all of them where they change it alike, 0 where none does.

    Args:
        rows: [groups, K], dense or sparse, whose sum is `total`.
        total: the sums, in the shape that `statistic` reads.
        statistic: sums -> value.
    """
    groups, width = rows.shape
    if groups > MAX_LEFT_OUT:
        influence = rows @ _gradient(rows, total, statistic)
    else:
        chunk = max(1, _CHUNK // width)
        dense = lambda part: part.toarray() if sparse.issparse(part) else part
        left = (total - dense(rows[i : i + chunk]).reshape(-1, *total.shape) for i in range(0, groups, chunk))
        influence = np.concatenate([np.asarray(statistic(sums)) for sums in left])
    influence = influence[np.isfinite(influence)]
    if len(influence) < max(2, groups / 2):
        return math.nan, 0.0
    factor = groups / (groups - 1) if groups > MAX_LEFT_OUT else (groups - 1) / groups
    squares = (influence - influence.mean()) ** 2
    total_squares, fourths = float(squares.sum()), float(squares @ squares)
    return factor * total_squares, total_squares**2 / fourths if fourths > 0 else 0.0


def _gradient(rows: Any, total: Floats, statistic: Statistic) -> Floats:
    """Returns the derivatives [K] of the statistic with respect to the sums of `rows`.

    They are central differences. The step of a column is a thousandth of what chance changes its sum by.
    """
    squares = rows.multiply(rows) if sparse.issparse(rows) else rows**2
    steps = 1e-3 * np.sqrt(np.asarray(squares.sum(0)).ravel())
    steps[steps == 0] = 1.0
    chunk = max(1, _CHUNK // total.size)
    parts = []
    for start in range(0, total.size, chunk):
        step = steps[start : start + chunk]
        moves = np.zeros((len(step), total.size))
        moves[np.arange(len(step)), start + np.arange(len(step))] = step
        moves = moves.reshape(-1, *total.shape)
        parts.append((np.asarray(statistic(total + moves)) - np.asarray(statistic(total - moves))) / (2 * step))
    return np.concatenate(parts)


def _score_interval(share: float, variance: float, groups: int, score: float) -> tuple[float, float]:
    """Returns Wilson's interval of a share for the number of trials that gives it this variance.

    Where no group differs from another, as many groups as Wilson's interval of 0 in `groups` allows may yet differ.
    """
    spread = share * (1 - share)
    if variance <= 1e-12 * max(spread, 1e-12):
        unseen = score**2 / (groups + score**2)
        return share * (1 - unseen), share + (1 - share) * unseen
    if variance > spread / 2:  # less than two trials: a debiased share at its bound, or two prompts
        return max(0.0, share - score * math.sqrt(variance)), min(1.0, share + score * math.sqrt(variance))
    trials = spread / variance
    centre = (share + score**2 / (2 * trials)) / (1 + score**2 / trials)
    width = score / (1 + score**2 / trials) * math.sqrt(spread / trials + (score / (2 * trials)) ** 2)
    return max(0.0, centre - width), min(1.0, centre + width)


# ---- Percentile bootstrap, for what is neither bounded nor a function of sums


def draw_counts(seed: int, resamples: int, groups: int) -> Iterator[Floats]:
    """Yields chunks [r, groups] of how often each group is drawn in each of `resamples` resamples.

    Args:
        seed: of the draws, which do not depend on the size of a chunk.
        resamples: number of resamples in all chunks together.
        groups: number of groups, and of draws in a resample.
    """
    generator = np.random.default_rng(seed)
    chunk = max(1, _DRAWN // groups)
    even = np.full(groups, 1 / groups)
    for start in range(0, resamples, chunk):
        yield generator.multinomial(groups, even, size=min(chunk, resamples - start)).astype(np.float64)


def percentile_interval(values: Floats | Sequence[float], level: float) -> tuple[float, float]:
    """Returns the bounds (low, high) of the middle of resampled values.

    Args:
        values: [r], the resampled values.
        level: the share of the values between the bounds, between 0 and 1.
    """
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_ci(
    values: ArrayLike,
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
    groups: ArrayLike | None = None,
) -> tuple[float, float]:
    """Computes the percentile bootstrap interval of the mean.

    Args:
        values: [n]; NaN is left out. For a paired comparison give the pairs' differences or outcomes.
        seed: the interval is a pure function of the values and the seed.
        resamples: number of resamples.
        level: coverage, between 0 and 1.
        groups: [n], which values belong together (the prompt's index or text); whole groups are drawn, each value
            weighing the same. None: each value is a group.

    Returns:
        (low, high). Both equal the mean when all values are equal: the bootstrap cannot see beyond its sample, so
        mistrust it below about 30 values or groups.

    Raises:
        ValueError: all values are NaN, a shape is wrong, or level is outside (0, 1).
    """
    numbers = vector(values, "values")
    check_level(level)
    member, count = group_index(groups, numbers)
    kept = ~np.isnan(numbers)
    judged_values(numbers)
    sums = np.bincount(member[kept], weights=numbers[kept], minlength=count)
    sizes = np.bincount(member[kept], minlength=count).astype(np.float64)
    draws = draw_counts(seed, resamples, count)
    means = np.concatenate([(draw @ sums) / (draw @ sizes) for draw in draws])  # no group is empty: no size is zero
    return percentile_interval(means, level)


def resampled_rows(groups: ArrayLike, *, seed: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """Yields the row numbers of each resample of n rows, drawn by whole groups.

    Args:
        groups: [n] int, the group number of each row, from 0 without gaps.
        seed: of the draws.
        resamples: number of resamples.
    """
    group = np.asarray(groups)
    generator = np.random.default_rng(seed)
    members = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])
    for _ in range(resamples):
        yield np.concatenate([members[g] for g in generator.integers(0, len(members), len(members))])
