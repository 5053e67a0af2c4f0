"""Percentile bootstrap intervals that draw whole groups (prompts) with replacement.

Efron & Tibshirani 1993, chapter 13.

A statistic of *sums* over groups is resampled by one matrix product: `bootstrap_ci` for a mean, `Bootstrap` for any
function of sums. `resampled_rows` serves statistics that need the rows themselves, such as a rank correlation.
Every interval is a pure function of its data and its seed. NumPy in float64 on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlaif_jax.quality.values import Floats, group_index, judged_values, vector

MAX_CELLS = 20_000_000
"""Numbers that the weights of a `Bootstrap` may hold (160 MB); with more prompts it makes fewer resamples."""
_CHUNK = 4_000_000  # numbers that `draw_counts` yields at once (32 MB)


class Estimate(NamedTuple):
    """A value with its confidence interval."""

    value: float
    low: float
    high: float


def draw_counts(seed: int, resamples: int, groups: int, row: int | None = None) -> Iterator[Floats]:
    """Yields chunks [r, groups] of how often each group is drawn in each of `resamples` resamples.

    Args:
        seed: of the draws, which do not depend on the size of a chunk.
        resamples: number of resamples in all chunks together.
        groups: number of groups, and of draws in a resample.
        row: numbers that the caller holds for a resample; it bounds the size of a chunk. None: `groups`.
    """
    generator = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // (row or groups))
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


def check_resampling(level: float, resamples: int) -> None:
    """Raises ValueError for a level outside (0, 1) or fewer than one resample."""
    if not 0 < level < 1:
        raise ValueError(f"level should be between 0 and 1, got {level}")
    if resamples < 1:
        raise ValueError(f"resamples should be at least 1, got {resamples}")


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
    check_resampling(level, resamples)
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


class Bootstrap:
    """Percentile intervals of functions of sums over groups.

    All estimates of one object share their draws.

    Attributes:
        level: coverage of the intervals.
        resamples: number of resamples; fewer than asked for where there are very many groups.
    """

    def __init__(self, groups: int, *, seed: int = 0, resamples: int = 1000, level: float = 0.95) -> None:
        self.level = level
        self.resamples = max(100, min(resamples, MAX_CELLS // max(groups, 1)))
        self._counts = np.concatenate(list(draw_counts(seed, self.resamples, max(groups, 1))))

    def estimate(
        self,
        columns: Floats,
        statistic: Callable[[Floats], Floats],
        *,
        share: bool = False,
        reason: str = "nothing to compute it from",
    ) -> dict[str, Any]:
        """Computes `statistic` on the sums of `columns` over all groups, with its interval.

        Args:
            columns: [groups, ...], the rows of each group summed.
            statistic: maps sums [..., *] to values [...].
            share: the statistic is a share of independent groups. At 0 or 1 resampling sees no variation, so the
                interval is then Wilson's for that number of groups.
            reason: given where the statistic has no value.

        Returns:
            {"value", "low", "high"}; None, with a "reason", where there is no number.
        """
        whole = float(statistic(columns.sum(0)))
        if not math.isfinite(whole):
            return {"value": None, "low": None, "high": None, "reason": reason}
        used = columns.reshape(len(columns), -1)
        groups = int((used != 0).any(1).sum())
        if groups < 2:
            return {"value": whole, "low": None, "high": None, "reason": "one prompt has no interval"}
        drawn = (self._counts @ used).reshape(self.resamples, *columns.shape[1:])
        values = statistic(drawn)
        values = values[np.isfinite(values)]
        if len(values) < self.resamples / 2:
            return {"value": whole, "low": None, "high": None, "reason": "too few prompts for an interval"}
        low, high = percentile_interval(values, self.level)
        if share and low == high and whole in (0.0, 1.0):
            edge = _wilson_edge(groups, self.level)
            low, high = (0.0, edge) if whole == 0 else (1 - edge, 1.0)
        return {"value": whole, "low": low, "high": high}


def _wilson_edge(n: int, level: float) -> float:
    """Returns the upper end of Wilson's interval for 0 of n."""
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    return z2 / (n + z2)
