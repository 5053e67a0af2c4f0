"""Tables of single raters: habits, order, repeats, and judges compared with people."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import numpy as np
from scipy.special import logit

from rlaif_jax.quality.calibration import debiased_calibration_error
from rlaif_jax.quality.clusters import (
    PREFERENCE,
    GroupedRows,
    VoteShares,
    mean_preference,
    rater_fields,
    ratio,
)
from rlaif_jax.quality.intervals import Jackknife
from rlaif_jax.quality.statistics import (
    brier,
    calibration_columns,
    fold_predictions,
    reliability_bins,
)
from rlaif_jax.quality.votes import FIRST, SECOND, TIE, Votes

# ---- Habits of raters


def verdict_habits(votes: Votes, bootstrap: Jackknife) -> list[dict[str, Any]]:
    """Computes each rater's share of ties, and how often it prefers the longer and the first shown answer.

    Args:
        votes: all votes.
        bootstrap: computes the intervals.

    Returns:
        A row for each rater with `count` and the shares `ties` (of all verdicts), `longer` (of verdicts between
        unequal lengths, without ties) and `first` (of verdicts whose order was recorded, without ties).
    """
    groups = GroupedRows(votes.count)
    for vote in votes.votes:
        pair, decided = votes.pairs[vote.pair], vote.category != TIE
        placed = decided and vote.front is not None
        first = placed and vote.category == (FIRST if vote.front else SECOND)
        longer = decided and pair.longer != 0
        chosen = longer and (vote.category == FIRST) == (pair.longer > 0)
        groups.add(vote.rater, pair.cluster, [not decided, 1, longer, chosen, placed, first])
    return [
        rater_fields(votes, rater)
        | {
            "count": groups.size(rater),
            "ties": bootstrap.estimate(sums, ratio(0, 1), share=True),
            "longer": bootstrap.estimate(sums, ratio(3, 2), share=True, reason="no verdict between unequal lengths"),
            "first": bootstrap.estimate(
                sums, ratio(5, 4), share=True, reason="nothing but ties, or the order is not recorded"
            ),
        }
        for rater in groups.largest_first()
        for sums in (groups.sums(rater),)
    ]


def _logit(p: float) -> float:
    return float(logit(min(max(p, 1e-4), 1 - 1e-4)))  # one certain verdict should not be the whole mean


def order_consistency(votes: Votes, bootstrap: Jackknife) -> list[dict[str, Any]]:
    """Computes the consistency and position bias of each rater that judged pairs in both orders.

    With p12, p21 = P(the answer shown first wins) in each order, the bias is b = (logit p12 + logit p21) / 2, in
    nats: 0 without bias, positive for a rater that favours the answer shown first.

    Args:
        votes: all votes.
        bootstrap: computes the intervals.

    Returns:
        A row for each rater with `count`, the shares `consistent` (same answer in both orders) and
        `same_position`, and the `bias` of judges that give probabilities.
    """
    seen: dict[tuple[int, int], tuple[list[Any], list[Any]]] = defaultdict(lambda: ([], []))
    for vote in votes.votes:
        if vote.front is not None:
            seen[vote.pair, vote.rater][0 if vote.front else 1].append(vote)
    groups = GroupedRows(votes.count)
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
        rater_fields(votes, rater)
        | {
            "count": groups.size(rater),
            "consistent": bootstrap.estimate(sums, ratio(0, 4), share=True),
            "same_position": bootstrap.estimate(sums, ratio(1, 4), share=True),
            "bias": bootstrap.estimate(sums, ratio(2, 3), reason="the judge gives no probabilities"),
        }
        for rater in groups.largest_first()
        for sums in (groups.sums(rater),)
    ]


def repeat_consistency(votes: Votes, bootstrap: Jackknife) -> list[dict[str, Any]]:
    """Computes how often raters gave the same answer to a question that was repeated in the same order.

    Args:
        votes: all votes.
        bootstrap: computes the intervals.

    Returns:
        A row for each rater and form with `count` and the share `same`; ratings also have the mean `distance` of
        two answers, as a share of the scale.
    """
    asked: dict[tuple[str, int, int, bool | None], list[float]] = defaultdict(list)
    for vote in votes.votes:
        asked["comparison", vote.pair, vote.rater, vote.front].append(vote.category)
    for mark in votes.marks:
        asked["rating", mark.answer, mark.rater, False].append(mark.value)
    groups = GroupedRows(votes.count)
    for (form, index, rater, _), values in asked.items():
        if len(values) >= 2:
            gaps = [abs(a - b) for a, b in itertools.combinations(values, 2)]
            cluster = votes.pairs[index].cluster if form == "comparison" else votes.answers[index]
            groups.add((rater, form), cluster, [np.mean([gap < 1e-9 for gap in gaps]), np.mean(gaps), 1])
    return [
        rater_fields(votes, rater)
        | {"form": form, "count": groups.size((rater, form))}
        | {"same": bootstrap.estimate(groups.sums((rater, form)), ratio(0, 2), share=True)}
        | (
            {"distance": bootstrap.estimate(groups.sums((rater, form)), ratio(1, 2), share=True)}
            if form == "rating"
            else {}
        )
        for rater, form in groups.largest_first()
    ]


# ---- The judge compared with people


def _mean_probabilities(votes: Votes) -> dict[tuple[int, int], float]:
    """Returns (rater, pair) -> the mean of its probabilities over orders and repeats, where it gives any."""
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    for vote in votes.votes:
        if np.isfinite(vote.chance):
            found[vote.rater, vote.pair].append(vote.chance)
    return {key: float(np.mean(values)) for key, values in found.items()}


def length_slope(votes: Votes, shares: VoteShares, people: str | None, bootstrap: Jackknife) -> list[dict[str, Any]]:
    """Computes how much each judge favours longer answers more than people do.

    The number is the slope of (judge's preference - people's) on the length difference, through the origin, on
    the pairs that both judged: the change of P(better) for an answer that is longer by one standard deviation.

    Args:
        votes: all votes.
        shares: pair -> rater -> shares of first, tie and second, from `votes`.
        people: the source that counts as people, "person" or "simulated", or None without people.
        bootstrap: computes the intervals.

    Returns:
        A row for each AI judge and rule with `count`, `characters` (one standard deviation of length) and
        `slope`.
    """
    truth = mean_preference(votes, shares, people)
    scale = float(np.sqrt(np.mean([votes.pairs[p].longer ** 2 for p in truth]))) if truth else 0.0
    groups = GroupedRows(votes.count)
    for index, by_rater in shares.items():
        if index in truth:
            x = votes.pairs[index].longer / (scale or 1.0)
            for rater, vote in by_rater.items():
                if votes.raters[rater][1] in ("ai", "rule"):
                    gap = float(vote @ PREFERENCE) - truth[index]
                    groups.add(rater, votes.pairs[index].cluster, [x * gap, x * x])
    return [
        rater_fields(votes, rater)
        | {
            "count": groups.size(rater),
            "characters": scale,
            "slope": bootstrap.estimate(groups.sums(rater), ratio(0, 1), reason="all answers are of one length"),
        }
        for rater in groups.largest_first()
    ]


def judge_calibration(
    votes: Votes, shares: VoteShares, people: str | None, bootstrap: Jackknife
) -> list[dict[str, Any]]:
    """Computes Brier score, ECE and reliability bins of every judge that gives probabilities.

    People's mean preferences on the same pairs are the truth.

    Args:
        votes: all votes.
        shares: pair -> rater -> shares of first, tie and second, from `votes`.
        people: the source that counts as people, "person" or "simulated", or None without people.
        bootstrap: computes the intervals.

    Returns:
        A row for each AI judge and rule with `count`, `brier`, `ece` and `bins`.
    """
    truth = mean_preference(votes, shares, people)
    groups = GroupedRows(votes.count)
    for (rater, pair), probability in _mean_probabilities(votes).items():
        if pair in truth and votes.raters[rater][1] in ("ai", "rule"):
            confidence, right = fold_predictions([probability], [truth[pair]])
            groups.add(rater, votes.pairs[pair].cluster, calibration_columns(confidence, right)[0])
    return [
        rater_fields(votes, rater)
        | {
            "count": groups.size(rater),
            "brier": bootstrap.estimate(sums, brier, share=True),
            "ece": debiased_calibration_error(sums, bootstrap.level),
            "bins": reliability_bins(sums.sum(0)),
        }
        for rater in groups.largest_first()
        for sums in (groups.sums(rater),)
    ]
