"""Agreement tables of the quality report, of raters and of sources, with trivial baselines."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import sparse

import rlaif_jax.quality.statistics as stats
from rlaif_jax.quality.clusters import (
    MAX_ROWS,
    SOURCES,
    EstimateFields,
    GroupedRows,
    VoteShares,
    missing_estimate,
    ratio,
    sort_by_source,
)
from rlaif_jax.quality.intervals import Jackknife
from rlaif_jax.quality.values import Floats, divide
from rlaif_jax.quality.votes import FIRST, SECOND, Votes

MAX_LEVELS = 40
"""With more different values ratings are compared as numbers, not as categories."""


def comparison_agreement(votes: Votes, shares: VoteShares, bootstrap: Jackknife) -> dict[str, Any]:
    """Computes how far raters agree on pairs of answers.

    Args:
        votes: all votes.
        shares: pair -> rater -> shares of first, tie and second, from `votes`.
        bootstrap: computes the intervals.

    Returns:
        Tables of JSON values. "sources" and "raters" have a row for each two sources and each two raters, with
        agreement and kappa; "raters_left_out" is the number of rows of raters left out; "alpha" is Krippendorff's
        alpha by source.
    """
    # Row of two raters: 9 cells of the confusion matrix; the longer answer's and the first shown's share of the second
    # rater's verdict; 1; 1 if it is recorded which answer was shown first.
    shown = _first_shown_shares(votes)
    first_shown = lambda pair, rater: (shown.get((pair, rater), 0.0), 1.0, float((pair, rater) in shown))
    groups, alpha = GroupedRows(votes.count), GroupedRows(votes.count)
    for index, by_rater in shares.items():
        pair = votes.pairs[index]
        longer = np.array([1.0, 0, 0]) if pair.longer > 0 else np.array([0, 0, 1.0])
        longer = longer if pair.longer else np.array([0.5, 0, 0.5])
        for one, two in itertools.combinations(sort_by_source(votes, by_rater), 2):
            row, swapped = (
                np.array([*np.outer(by_rater[a], by_rater[b]).ravel(), longer @ by_rater[b], *first_shown(index, b)])
                for a, b in ((one, two), (two, one))
            )
            _add_rater_pair(groups, votes, (one, two), pair.cluster, row, swapped)
        for source, given in _shared_values(votes, by_rater):
            alpha.add(source, pair.cluster, stats.coincidences(np.stack(given)))

    def described(key: Any) -> dict[str, Any]:
        sums = groups.sums(key)
        confusion = sums[:, :9].reshape(-1, 3, 3)
        return _pair_names(votes, key) | {
            "count": groups.size(key),
            "agreement": bootstrap.estimate(confusion, stats.observed_agreement, share=True),
            "kappa": bootstrap.estimate(
                confusion,
                stats.cohen_kappa,
                lowest=stats.lowest_kappa,
                reason="both used one and the same category",
            ),
            "longer": bootstrap.estimate(sums[:, [9, 11]], ratio(0, 1), share=True),
            "first": bootstrap.estimate(sums[:, [10, 12]], ratio(0, 1), share=True, reason="the order is not recorded"),
        }

    return _agreement_rows(groups, described) | {"alpha": _alphas(alpha, bootstrap)}


def _add_rater_pair(
    groups: GroupedRows, votes: Votes, raters: tuple[int, int], cluster: int, row: Floats, swapped: Floats
) -> None:
    """Adds the row of two raters under their names and under their sources.

    `swapped` is the row with the two raters exchanged.
    """
    groups.add(("raters", *raters), cluster, row)
    first, second = (votes.raters[rater][1] for rater in raters)
    # Within one source neither rater is the rows': count both ways.
    groups.add(("sources", first, second), cluster, (row + swapped) / 2 if first == second else row)


def _shared_values(votes: Votes, by_rater: Mapping[int, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Yields each source, and "all", with the values of its raters, where two or more gave one."""
    for source in (*SOURCES, "all"):
        given = [value for rater, value in by_rater.items() if source in ("all", votes.raters[rater][1])]
        if len(given) >= 2:
            yield source, given


def _pair_names(votes: Votes, key: Any) -> dict[str, Any]:
    kind, one, two = key
    return {"a": one, "b": two} if kind == "sources" else {"a": votes.raters[one][0], "b": votes.raters[two][0]}


def _agreement_rows(groups: GroupedRows, described: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Returns the rows of the pairs of sources, and of the pairs of raters with most in common."""
    keys = groups.largest_first()
    raters = [key for key in keys if key[0] == "raters"]
    return {
        "sources": [described(key) for key in keys if key[0] == "sources"],
        "raters": [described(key) for key in raters[:MAX_ROWS]],
        "raters_left_out": max(0, len(raters) - MAX_ROWS),
    }


def _alphas(groups: GroupedRows, bootstrap: Jackknife) -> list[dict[str, Any]]:
    """Returns Krippendorff's alpha of verdicts of each source at every level."""
    levels: tuple[stats.Level, ...] = ("nominal", "ordinal", "interval")
    return [
        {"source": source, "count": groups.size(source)}
        | {kind: _alpha(groups.sums(source).reshape(-1, 9), bootstrap, kind) for kind in levels}
        for source in groups.largest_first()
    ]


def _alpha(rows: Any, bootstrap: Jackknife, kind: stats.Level) -> EstimateFields:
    """Returns Krippendorff's alpha of coincidences [clusters, C * C], dense or sparse, of 0, 1, ..."""
    size = math.isqrt(rows.shape[1])
    square = lambda sums: sums.reshape(*sums.shape[:-1], size, size)
    return bootstrap.estimate(
        rows,
        lambda sums: stats.krippendorff_alpha(square(sums), kind),
        lowest=lambda sums: stats.lowest_alpha(square(sums), kind),
        reason="all values are the same",
    )


def _coincidence_rows(units: Sequence[tuple[int, Sequence[int]]], clusters: int, categories: int) -> Any:
    """Returns the sums of `statistics.coincidences` by cluster, a sparse matrix [clusters, categories^2].

    With many categories nearly all coincidences of a unit are 0.

    Args:
        units: (cluster, the category that each of two or more raters gave) of each unit.
        clusters: number of clusters.
        categories: number of categories.
    """
    places, numbers = [], []
    for cluster, given in units:
        found, counts = np.unique(given, return_counts=True)
        pairs = np.outer(counts, counts) - np.diag(counts)
        places.append(cluster * categories**2 + (found[:, None] * categories + found).ravel())
        numbers.append(pairs.ravel() / (len(given) - 1))
    row, column = np.divmod(np.concatenate(places), categories**2)
    return sparse.csr_matrix((np.concatenate(numbers), (row, column)), (clusters, categories**2))


def _first_shown_shares(votes: Votes) -> dict[tuple[int, int], float]:
    """Returns (pair, rater) -> the share of verdicts for the answer shown first.

    Only verdicts whose order was recorded count.
    """
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    for vote in votes.votes:
        if vote.front is not None:
            found[vote.pair, vote.rater].append(float(vote.category == (FIRST if vote.front else SECOND)))
    return {key: float(np.mean(values)) for key, values in found.items()}


def _mean_marks(votes: Votes) -> dict[int, dict[int, float]]:
    """Returns answer -> rater -> its mean rating."""
    given: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for mark in votes.marks:
        given[mark.answer][mark.rater].append(mark.value)
    return {answer: {rater: float(np.mean(v)) for rater, v in by_rater.items()} for answer, by_rater in given.items()}


def rating_agreement(votes: Votes, bootstrap: Jackknife) -> dict[str, Any]:
    """Computes how far raters agree on ratings of the same answer: agreement, kappa, correlation, alpha.

    Args:
        votes: all votes; its marks are the ratings.
        bootstrap: computes the intervals.

    Returns:
        Tables in the shape of `comparison_agreement`.
    """
    marks = _mean_marks(votes)
    groups, moments = GroupedRows(votes.count), GroupedRows(votes.count)
    units: dict[str, list[tuple[int, list[int]]]] = defaultdict(list)
    levels = sorted({round(value, 9) for by_rater in marks.values() for value in by_rater.values()})
    place = {value: i for i, value in enumerate(levels)}
    for answer, by_rater in marks.items():
        cluster = votes.answers[answer]
        for one, two in itertools.combinations(sort_by_source(votes, by_rater), 2):
            a, b = by_rater[one], by_rater[two]
            row = np.array([abs(a - b) < 1e-9, 1, a, b, a * a, b * b, a * b])
            _add_rater_pair(groups, votes, (one, two), cluster, row, row[[0, 1, 3, 2, 5, 4, 6]])
        for source, given in _shared_values(votes, by_rater):
            moments.add(source, cluster, stats.interval_moments(given))
            if len(levels) <= MAX_LEVELS:
                units[source].append((cluster, [place[round(value, 9)] for value in given]))

    def chance(s: Floats) -> Floats:
        n, a, b, aa, bb = (s[..., i] for i in range(1, 6))
        return _positive(n * (aa + bb) - 2 * a * b, n * (aa + bb))

    def kappa(s: Floats) -> Floats:
        n, aa, bb, ab = s[..., 1], s[..., 4], s[..., 5], s[..., 6]
        return 1 - divide(n * (aa + bb - 2 * ab), chance(s))

    def lowest_kappa(s: Floats) -> Floats:  # a difference is at most the whole scale, 1
        return 1 - divide(s[..., 1] ** 2, chance(s))

    def correlation(s: Floats) -> Floats:
        n, a, b, aa, bb, ab = (s[..., i] for i in range(1, 7))
        spread = _positive(n * aa - a * a, n * aa) * _positive(n * bb - b * b, n * bb)
        return divide(n * ab - a * b, np.sqrt(spread))

    def described(key: Any) -> dict[str, Any]:
        sums = groups.sums(key)
        return _pair_names(votes, key) | {
            "count": groups.size(key),
            "agreement": bootstrap.estimate(sums, ratio(0, 1), share=True),
            "kappa": bootstrap.estimate(sums, kappa, lowest=lowest_kappa, reason="all values are the same"),
            "correlation": bootstrap.estimate(
                sums, correlation, lowest=-1.0, reason="one side gave always the same value"
            ),
        }

    many = f"more than {MAX_LEVELS} different values: read the interval alpha"
    kinds: tuple[stats.Level, ...] = ("nominal", "ordinal")
    alphas = {
        source: {kind: _alpha(_coincidence_rows(given, votes.count, len(levels)), bootstrap, kind) for kind in kinds}
        for source, given in units.items()
    }
    rows = [
        {"source": source, "count": moments.size(source)}
        | {
            kind: alphas[source][kind] if source in alphas else missing_estimate(many)
            for kind in ("nominal", "ordinal")
        }
        | {
            "interval": bootstrap.estimate(
                moments.sums(source),
                stats.interval_alpha,
                lowest=stats.lowest_interval_alpha,
                reason="all values are the same",
            )
        }
        for source in moments.largest_first()
    ]
    return _agreement_rows(groups, described) | {"alpha": rows}


def _positive(value: Floats, scale: Floats) -> Floats:
    """Returns `value`, 0 where it is only the rounding of a difference of sums of size `scale`."""
    return np.where(value <= 1e-12 * scale, 0.0, value)
