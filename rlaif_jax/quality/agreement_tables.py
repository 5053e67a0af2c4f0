"""Agreement of raters and of sources, beside the baselines that any rule of thumb reaches."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import numpy as np

import rlaif_jax.quality.statistics as stats
from rlaif_jax.quality.clusters import (
    MAX_ROWS,
    SOURCES,
    Estimate,
    Groups,
    Shares,
    by_source,
    nothing,
    ratio,
)
from rlaif_jax.quality.statistics import Bootstrap, Floats, divide
from rlaif_jax.quality.votes import FIRST, SECOND, Votes

MAX_LEVELS = 40
"""With more different values ratings are compared as numbers, not as categories."""


def comparison_agreement(votes: Votes, shares: Shares, bootstrap: Bootstrap) -> Any:
    """Row of a pair of raters: 9 cells of the confusion matrix; the longer answer's and the first shown's share of the
    second rater's verdict; 1; 1 if it is recorded what was shown first."""
    shown = _first_shown(votes)
    first_shown = lambda pair, rater: (shown.get((pair, rater), 0.0), 1.0, float((pair, rater) in shown))
    groups, alpha = Groups(votes.count), Groups(votes.count)
    for index, by in shares.items():
        pair = votes.pairs[index]
        longer = np.array([1.0, 0, 0]) if pair.longer > 0 else np.array([0, 0, 1.0])
        longer = longer if pair.longer else np.array([0.5, 0, 0.5])
        for one, two in itertools.combinations(by_source(votes, by), 2):
            row = [*np.outer(by[one], by[two]).ravel(), longer @ by[two], *first_shown(index, two)]
            groups.add(("raters", one, two), pair.cluster, row)
            sources = votes.raters[one][1], votes.raters[two][1]
            if sources[0] == sources[1]:  # neither is the rows': count both ways
                back = [*np.outer(by[two], by[one]).ravel(), longer @ by[one], *first_shown(index, one)]
                row = list((np.array(row) + back) / 2)
            groups.add(("sources", *sources), pair.cluster, row)
        for source in (*SOURCES, "all"):
            of = [vote for rater, vote in by.items() if source in ("all", votes.raters[rater][1])]
            if len(of) >= 2:
                alpha.add(source, pair.cluster, stats.coincidences(np.stack(of)))

    def described(key: Any) -> dict[str, Any]:
        sums = groups.sums(key)
        confusion = sums[:, :9].reshape(-1, 3, 3)
        return _named(votes, key) | {
            "count": groups.size(key),
            "agreement": bootstrap.estimate(confusion, stats.observed_agreement, share=True),
            "kappa": bootstrap.estimate(confusion, stats.cohen_kappa, reason="both used one and the same category"),
            "longer": bootstrap.estimate(sums[:, [9, 11]], ratio(0, 1), share=True),
            "first": bootstrap.estimate(sums[:, [10, 12]], ratio(0, 1), share=True, reason="the order is not recorded"),
        }

    return _agreement(groups, described) | {"alpha": _alphas(alpha, bootstrap, np.arange(3.0))}


def _named(votes: Votes, key: Any) -> dict[str, Any]:
    kind, one, two = key
    return {"a": one, "b": two} if kind == "sources" else {"a": votes.raters[one][0], "b": votes.raters[two][0]}


def _agreement(groups: Groups, described: Any) -> dict[str, Any]:
    keys = groups.names()
    raters = [key for key in keys if key[0] == "raters"]
    return {
        "sources": [described(key) for key in keys if key[0] == "sources"],
        "raters": [described(key) for key in raters[:MAX_ROWS]],
        "raters_left_out": max(0, len(raters) - MAX_ROWS),
    }


def _alphas(groups: Groups, bootstrap: Bootstrap, values: Floats) -> list[dict[str, Any]]:
    def alpha(source: str, kind: stats.Level) -> Estimate:
        statistic = lambda sums: stats.krippendorff_alpha(sums, kind, values)
        return bootstrap.estimate(groups.sums(source), statistic, reason="all values are the same")

    levels: tuple[stats.Level, ...] = ("nominal", "ordinal", "interval")
    return [
        {"source": source, "count": groups.size(source)} | {kind: alpha(source, kind) for kind in levels}
        for source in groups.names()
    ]


def _first_shown(votes: Votes) -> dict[tuple[int, int], float]:
    """(pair, rater) -> the share for the answer shown first, of its verdicts whose order was recorded."""
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    for vote in votes.votes:
        if vote.front is not None:
            found[vote.pair, vote.rater].append(float(vote.category == (FIRST if vote.front else SECOND)))
    return {key: float(np.mean(values)) for key, values in found.items()}


def _mean_marks(votes: Votes) -> dict[int, dict[int, float]]:
    """answer -> rater -> its mean rating."""
    given: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for mark in votes.marks:
        given[mark.answer][mark.rater].append(mark.value)
    return {answer: {rater: float(np.mean(v)) for rater, v in by.items()} for answer, by in given.items()}


def rating_agreement(votes: Votes, bootstrap: Bootstrap) -> Any:
    """Row of a pair of raters: same, 1, a, b, a^2, b^2, a b."""
    marks = _mean_marks(votes)
    groups, moments, tables = Groups(votes.count), Groups(votes.count), Groups(votes.count)
    levels = sorted({round(value, 9) for by in marks.values() for value in by.values()})
    place = {value: i for i, value in enumerate(levels)}
    for answer, by in marks.items():
        cluster = votes.answers[answer]
        for one, two in itertools.combinations(by_source(votes, by), 2):
            a, b = by[one], by[two]
            row = np.array([abs(a - b) < 1e-9, 1, a, b, a * a, b * b, a * b])
            groups.add(("raters", one, two), cluster, row)
            sources = votes.raters[one][1], votes.raters[two][1]
            groups.add(
                ("sources", *sources), cluster, (row + row[[0, 1, 3, 2, 5, 4, 6]]) / 2 if len({*sources}) == 1 else row
            )
        for source in (*SOURCES, "all"):
            of = [value for rater, value in by.items() if source in ("all", votes.raters[rater][1])]
            if len(of) >= 2:
                moments.add(source, cluster, stats.interval_moments(of))
                if len(levels) <= MAX_LEVELS:
                    chosen = np.eye(len(levels))[[place[round(value, 9)] for value in of]]
                    tables.add(source, cluster, stats.coincidences(chosen))

    def kappa(s: Floats) -> Floats:
        n, a, b, aa, bb, ab = (s[..., i] for i in range(1, 7))
        return 1 - divide(n * (aa + bb - 2 * ab), _positive(n * (aa + bb) - 2 * a * b, n * (aa + bb)))

    def correlation(s: Floats) -> Floats:
        n, a, b, aa, bb, ab = (s[..., i] for i in range(1, 7))
        spread = _positive(n * aa - a * a, n * aa) * _positive(n * bb - b * b, n * bb)
        return divide(n * ab - a * b, np.sqrt(spread))

    def described(key: Any) -> dict[str, Any]:
        sums = groups.sums(key)
        return _named(votes, key) | {
            "count": groups.size(key),
            "agreement": bootstrap.estimate(sums, ratio(0, 1), share=True),
            "kappa": bootstrap.estimate(sums, kappa, reason="all values are the same"),
            "correlation": bootstrap.estimate(sums, correlation, reason="one side gave always the same value"),
        }

    many = f"more than {MAX_LEVELS} different values: read the interval alpha"
    alphas = {a["source"]: a for a in _alphas(tables, bootstrap, np.array(levels))}
    rows = [
        {"source": source, "count": moments.size(source)}
        | {kind: alphas[source][kind] if source in alphas else nothing(many) for kind in ("nominal", "ordinal")}
        | {"interval": bootstrap.estimate(moments.sums(source), stats.interval_alpha, reason="all values are the same")}
        for source in moments.names()
    ]
    return _agreement(groups, described) | {"alpha": rows}


def _positive(value: Floats, scale: Floats) -> Floats:
    """0 for what is only the rounding of a difference of sums."""
    return np.where(value <= 1e-12 * scale, 0.0, value)
