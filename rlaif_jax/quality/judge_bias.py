"""Tables of single raters: habits, order, repeats, and judges compared with people."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import numpy as np

from rlaif_jax.quality.calibration import debiased_calibration_error
from rlaif_jax.quality.clusters import (
    PREFERENCE,
    GroupedRows,
    VoteShares,
    is_judge,
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
from rlaif_jax.quality.values import divide
from rlaif_jax.quality.votes import FIRST, SECOND, TIE, Votes
from rlaif_jax.rewards.log_odds import log_odds

# ---- Habits of raters


def verdict_habits(votes: Votes, jackknife: Jackknife) -> list[dict[str, Any]]:
    """Computes each rater's share of ties, and how often it prefers the longer and the first shown answer.

    Args:
        votes: all votes.
        jackknife: computes the intervals.

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
            "ties": jackknife.estimate(sums, ratio(0, 1), share=True),
            "longer": jackknife.estimate(sums, ratio(3, 2), share=True, reason="no verdict between unequal lengths"),
            "first": jackknife.estimate(
                sums, ratio(5, 4), share=True, reason="nothing but ties, or the order is not recorded"
            ),
        }
        for rater in groups.largest_first()
        for sums in (groups.sums(rater),)
    ]


def order_consistency(votes: Votes, jackknife: Jackknife) -> list[dict[str, Any]]:
    """Computes the consistency and position bias of each rater that judged pairs in both orders.

    With p12, p21 = P(the answer shown first wins) in each order, the bias is b = (logit p12 + logit p21) / 2, in
    nats: 0 without bias, positive for a rater that favours the answer shown first.

    Args:
        votes: all votes.
        jackknife: computes the intervals.

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
            bias = (log_odds(one.chance) + log_odds(1 - two.chance)) / 2 if known else 0.0
            rows.append([one.category == two.category, (one.category, two.category) in same, bias, known, 1])
        if rows:
            groups.add(rater, votes.pairs[pair].cluster, np.mean(np.array(rows, float), axis=0))
    return [
        rater_fields(votes, rater)
        | {
            "count": groups.size(rater),
            "consistent": jackknife.estimate(sums, ratio(0, 4), share=True),
            "same_position": jackknife.estimate(sums, ratio(1, 4), share=True),
            "bias": jackknife.estimate(sums, ratio(2, 3), reason="the judge gives no probabilities"),
        }
        for rater in groups.largest_first()
        for sums in (groups.sums(rater),)
    ]


def repeat_consistency(votes: Votes, jackknife: Jackknife) -> list[dict[str, Any]]:
    """Computes how often raters gave the same answer to a question that was repeated in the same order.

    Args:
        votes: all votes.
        jackknife: computes the intervals.

    Returns:
        A row for each rater and form with `count` and the share `same`; ratings also have the mean `distance` of
        two answers, as a share of the scale.
    """
    asked: dict[tuple[str, int, int, bool | None], list[float]] = defaultdict(list)
    homes = {"comparison": [pair.cluster for pair in votes.pairs], "rating": votes.answers, "label": votes.labelled}
    for vote in votes.votes:
        asked["comparison", vote.pair, vote.rater, vote.front].append(vote.category)
    for mark in votes.marks:
        asked["rating", mark.answer, mark.rater, False].append(mark.value)
    for label in votes.labels:
        asked["label", label.item, label.rater, False].append(label.option)
    groups = GroupedRows(votes.count)
    for (form, index, rater, _), values in asked.items():
        if len(values) >= 2:
            gaps = [abs(a - b) for a, b in itertools.combinations(values, 2)]
            groups.add((rater, form), homes[form][index], [np.mean([gap < 1e-9 for gap in gaps]), np.mean(gaps), 1])
    return [
        rater_fields(votes, rater)
        | {"form": form, "count": groups.size((rater, form))}
        | {"same": jackknife.estimate(groups.sums((rater, form)), ratio(0, 2), share=True)}
        | (
            {"distance": jackknife.estimate(groups.sums((rater, form)), ratio(1, 2), share=True)}
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


def length_slope(votes: Votes, shares: VoteShares, people: str | None, jackknife: Jackknife) -> list[dict[str, Any]]:
    """Computes how much each judge favours longer answers more than people do.

    The number is the slope of (judge's preference - people's) on the length difference, through the origin, on
    the pairs that both judged: the change of P(better) for an answer that is longer by one standard deviation.

    Args:
        votes: all votes.
        shares: pair -> rater -> shares of first, tie and second, from `votes`.
        people: the source that counts as people, "person" or "simulated", or None without people.
        jackknife: computes the intervals.

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
                if is_judge(votes, rater):
                    gap = float(vote @ PREFERENCE) - truth[index]
                    groups.add(rater, votes.pairs[index].cluster, [x * gap, x * x])
    return [
        rater_fields(votes, rater)
        | {
            "count": groups.size(rater),
            "characters": scale,
            "slope": jackknife.estimate(groups.sums(rater), ratio(0, 1), reason="all answers are of one length"),
        }
        for rater in groups.largest_first()
    ]


def judge_calibration(
    votes: Votes, shares: VoteShares, people: str | None, jackknife: Jackknife
) -> list[dict[str, Any]]:
    """Computes Brier score, ECE and reliability bins of every judge that gives probabilities.

    People's preferences on the same pairs are the truth.

    Args:
        votes: all votes.
        shares: pair -> rater -> shares of first, tie and second, from `votes`.
        people: the source that counts as people, "person" or "simulated", or None without people.
        jackknife: computes the intervals.

    Returns:
        A row for each AI judge and rule with `count`, `brier`, `ece` and `bins`.
    """
    truth = mean_preference(votes, shares, people)
    groups = GroupedRows(votes.count)
    for (rater, pair), probability in _mean_probabilities(votes).items():
        if pair in truth and is_judge(votes, rater):
            confidence, right = fold_predictions([probability], [truth[pair]])
            groups.add(rater, votes.pairs[pair].cluster, calibration_columns(confidence, right)[0])
    return [
        rater_fields(votes, rater)
        | {
            "count": groups.size(rater),
            "brier": jackknife.estimate(sums, brier, share=True),
            "ece": debiased_calibration_error(sums, jackknife.level),
            "bins": reliability_bins(sums.sum(0)),
        }
        for rater in groups.largest_first()
        for sums in (groups.sums(rater),)
    ]


def score_accuracy(votes: Votes, shares: VoteShares, people: str | None, jackknife: Jackknife) -> list[dict[str, Any]]:
    """Computes how often a judge's ratings of two answers are ordered as people's preference is.

    The ratings of an answer are averaged, on the unit interval; both answers were rated under the principle of the
    comparison. Pairs on which people are undecided are no test of the judge; they are counted.

    Args:
        votes: all votes.
        shares: pair -> rater -> shares of first, tie and second, from `votes`.
        people: the source that counts as people, "person" or "simulated", or None without people.
        jackknife: computes the intervals.

    Returns:
        A row for each AI judge and rule with `count`, the numbers `right`, `wrong` and `ties` (two equal ratings),
        `undecided` (pairs beyond `count` on which people are), and `accuracy` = (right + ties / 2) / count.
    """
    given: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))  # answer -> rater -> ratings
    for mark in votes.marks:
        if is_judge(votes, mark.rater):
            given[mark.answer][mark.rater].append(mark.value)
    groups = GroupedRows(votes.count)
    for index, preference in mean_preference(votes, shares, people).items():
        pair = votes.pairs[index]
        one, two = (given.get(answer, {}) for answer in pair.answers)
        for rater in sorted(one.keys() & two.keys()):
            lead, gap = preference - 0.5, float(np.mean(one[rater]) - np.mean(two[rater]))
            is_test, is_tie = abs(lead) > 1e-9, abs(gap) < 1e-9
            is_right = is_test and not is_tie and (gap > 0) == (lead > 0)
            groups.add(rater, pair.cluster, [is_right, is_test and is_tie, is_test, not is_test])
    rows = []
    for rater in groups.largest_first():
        sums = groups.sums(rater)
        right, ties, count, undecided = (int(number) for number in sums.sum(0))
        accuracy = lambda s: divide(s[..., 0] + s[..., 1] / 2, s[..., 2])
        rows.append(
            rater_fields(votes, rater)
            | {"count": count, "right": right, "wrong": count - right - ties, "ties": ties, "undecided": undecided}
            | {"accuracy": jackknife.estimate(sums, accuracy, share=True, reason="people are undecided on all pairs")}
        )
    return rows
