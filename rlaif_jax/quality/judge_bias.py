"""Habits of single raters, and judges beside people: order, repeats, length, probabilities."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import numpy as np

import rlaif_jax.quality.statistics as stats
from rlaif_jax.quality.clusters import (
    WORTH,
    Groups,
    Shares,
    mean_worth,
    ratio,
    who,
)
from rlaif_jax.quality.statistics import Bootstrap
from rlaif_jax.quality.votes import FIRST, SECOND, TIE, Votes

# ---- Habits of raters


def habits(votes: Votes, bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """Of each rater's verdicts on pairs: ties, and of the rest the share for the longer and for the first shown (where the
    order was recorded)."""
    groups = Groups(votes.count)
    for vote in votes.votes:
        pair, decided = votes.pairs[vote.pair], vote.category != TIE
        placed = decided and vote.front is not None
        first = placed and vote.category == (FIRST if vote.front else SECOND)
        longer = decided and pair.longer != 0
        chosen = longer and (vote.category == FIRST) == (pair.longer > 0)
        groups.add(vote.rater, pair.cluster, [not decided, 1, longer, chosen, placed, first])
    return [
        who(votes, rater)
        | {
            "count": groups.size(rater),
            "ties": bootstrap.estimate(sums, ratio(0, 1), share=True),
            "longer": bootstrap.estimate(sums, ratio(3, 2), share=True, reason="no verdict between unequal lengths"),
            "first": bootstrap.estimate(
                sums, ratio(5, 4), share=True, reason="nothing but ties, or the order is not recorded"
            ),
        }
        for rater in groups.names()
        for sums in (groups.sums(rater),)
    ]


def _logit(p: float) -> float:
    p = min(max(p, 1e-4), 1 - 1e-4)  # one certain verdict should not be the whole mean
    return float(np.log(p / (1 - p)))


def orders(votes: Votes, bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """Raters that saw pairs in both orders. p12, p21: P(what is shown first wins) in each order; the position bias is
    b = (logit p12 + logit p21) / 2, in nats, 0 without bias, positive for what is shown first."""
    seen: dict[tuple[int, int], tuple[list[Any], list[Any]]] = defaultdict(lambda: ([], []))
    for vote in votes.votes:
        if vote.front is not None:
            seen[vote.pair, vote.rater][0 if vote.front else 1].append(vote)
    groups = Groups(votes.count)
    for (pair, rater), (front, back) in seen.items():
        rows = []
        for one, two in itertools.product(front, back):
            same = {(FIRST, SECOND), (SECOND, FIRST)}
            known = bool(np.isfinite(one.chance) and np.isfinite(two.chance))
            bias = (_logit(one.chance) + _logit(1 - two.chance)) / 2 if known else 0.0
            rows.append([one.category == two.category, (one.category, two.category) in same, bias, known, 1])
        if rows:
            groups.add(rater, votes.pairs[pair].cluster, np.mean(np.array(rows, float), axis=0))
    return [
        who(votes, rater)
        | {
            "count": groups.size(rater),
            "consistent": bootstrap.estimate(sums, ratio(0, 4), share=True),
            "same_position": bootstrap.estimate(sums, ratio(1, 4), share=True),
            "bias": bootstrap.estimate(sums, ratio(2, 3), reason="the judge gives no probabilities"),
        }
        for rater in groups.names()
        for sums in (groups.sums(rater),)
    ]


def repeats(votes: Votes, bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """Raters that were asked the same again (in the same order): how often they say the same, and of ratings by how much
    they differ, as a share of the scale."""
    asked: dict[tuple[str, int, int, bool | None], list[float]] = defaultdict(list)
    for vote in votes.votes:
        asked["comparison", vote.pair, vote.rater, vote.front].append(vote.category)
    for mark in votes.marks:
        asked["rating", mark.answer, mark.rater, False].append(mark.value)
    groups = Groups(votes.count)
    for (form, index, rater, _), values in asked.items():
        if len(values) >= 2:
            gaps = [abs(a - b) for a, b in itertools.combinations(values, 2)]
            cluster = votes.pairs[index].cluster if form == "comparison" else votes.answers[index]
            groups.add((rater, form), cluster, [np.mean([gap < 1e-9 for gap in gaps]), np.mean(gaps), 1])
    return [
        who(votes, rater)
        | {"form": form, "count": groups.size((rater, form))}
        | {"same": bootstrap.estimate(groups.sums((rater, form)), ratio(0, 2), share=True)}
        | ({"distance": bootstrap.estimate(groups.sums((rater, form)), ratio(1, 2))} if form == "rating" else {})
        for rater, form in groups.names()
    ]


# ---- The judge beside people


def _chances(votes: Votes) -> dict[tuple[int, int], float]:
    """(rater, pair) -> the mean of its probabilities over orders and repeats, where it gives any."""
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    for vote in votes.votes:
        if np.isfinite(vote.chance):
            found[vote.rater, vote.pair].append(vote.chance)
    return {key: float(np.mean(values)) for key, values in found.items()}


def length_slope(votes: Votes, shares: Shares, people: str | None, bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """Slope of (judge's preference - people's) on the length difference, through the origin, on the pairs that both
    judged: by how much a judge's P(better) exceeds people's for an answer longer by one standard deviation."""
    truth = mean_worth(votes, shares, people)
    scale = float(np.sqrt(np.mean([votes.pairs[p].longer ** 2 for p in truth]))) if truth else 0.0
    groups = Groups(votes.count)
    for index, by in shares.items():
        if index in truth:
            x = votes.pairs[index].longer / (scale or 1.0)
            for rater, vote in by.items():
                if votes.raters[rater][1] in ("ai", "rule"):
                    gap = float(vote @ WORTH) - truth[index]
                    groups.add(rater, votes.pairs[index].cluster, [x * gap, x * x])
    return [
        who(votes, rater)
        | {
            "count": groups.size(rater),
            "characters": scale,
            "slope": bootstrap.estimate(groups.sums(rater), ratio(0, 1), reason="all answers are of one length"),
        }
        for rater in groups.names()
    ]


def calibration(votes: Votes, shares: Shares, people: str | None, bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """Brier score, ECE and reliability plot of every judge that gives probabilities, against people's verdicts."""
    truth = mean_worth(votes, shares, people)
    groups = Groups(votes.count)
    for (rater, pair), chance in _chances(votes).items():
        if pair in truth and votes.raters[rater][1] in ("ai", "rule"):
            confidence, right = stats.folded([chance], [truth[pair]])
            groups.add(rater, votes.pairs[pair].cluster, stats.calibration_columns(confidence, right)[0])
    return [
        who(votes, rater)
        | {
            "count": groups.size(rater),
            "brier": bootstrap.estimate(sums, stats.brier),
            "ece": bootstrap.estimate(sums, stats.calibration_error),
            "bins": stats.reliability(sums.sum(0)),
        }
        for rater in groups.names()
        for sums in (groups.sums(rater),)
    ]
