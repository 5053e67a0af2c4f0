"""Parts that tables of the quality report share: votes on pairs, and sums of rows over prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from rlaif_jax.quality.values import Floats, divide, sum_by_group
from rlaif_jax.quality.votes import Votes

SOURCES = ("ai", "rule", "simulated", "person")
"""In this order: of a pair of sources the rows of a confusion matrix are the first's."""
MAX_ROWS = 40
"""Pairs of raters or of generators that are listed, those with most in common first."""
PREFERENCE = np.array([1.0, 0.5, 0.0])
"""How much a verdict (first, tie, second) prefers the first answer."""
EstimateFields = dict[str, Any]
"""{"value", "low", "high"} in the report's JSON; None, with a "reason", where there is no number."""
VoteShares = Mapping[int, Mapping[int, Floats]]
"""pair -> rater -> its vote, a distribution over (first, tie, second)."""


def vote_shares_by_pair(votes: Votes) -> dict[int, dict[int, Floats]]:
    """Returns pair -> rater -> its vote: the share of its verdicts that say (first, tie, second)."""
    given: dict[int, dict[int, Floats]] = defaultdict(dict)
    for vote in votes.votes:
        given[vote.pair].setdefault(vote.rater, np.zeros(3))[vote.category] += 1
    return {pair: {rater: v / v.sum() for rater, v in by_rater.items()} for pair, by_rater in given.items()}


def sort_by_source(votes: Votes, raters: Iterable[int]) -> list[int]:
    """Returns rater numbers in the order of `SOURCES`, then of their numbers.

    Args:
        votes: holds the label and source of each rater.
        raters: the rater numbers.
    """
    return sorted(raters, key=lambda rater: (SOURCES.index(votes.raters[rater].source), rater))


class GroupedRows:
    """Rows of numbers under keys, each row of one cluster (prompt); a `Jackknife` reads their `sums`."""

    def __init__(self, clusters: int) -> None:
        self._clusters = clusters
        self._rows: dict[Any, list[Floats]] = defaultdict(list)
        self._members: dict[Any, list[int]] = defaultdict(list)

    def add(self, key: Any, cluster: int, row: Any) -> None:
        """Adds a row of numbers under `key`.

        Args:
            key: any hashable.
            cluster: number of the prompt that the row belongs to.
            row: the numbers; rows of one key have one length.
        """
        self._rows[key].append(np.asarray(row, np.float64))
        self._members[key].append(cluster)

    def largest_first(self) -> list[Any]:
        """Returns the keys, those with most rows first."""
        return sorted(self._rows, key=lambda key: -len(self._rows[key]))

    def size(self, key: Any) -> int:
        """Returns the number of rows under `key`; 0 for a key that has none."""
        return len(self._rows[key])

    def sums(self, key: Any) -> Floats:
        """Returns the rows under `key` summed by cluster, [clusters, ...]."""
        return sum_by_group(np.stack(self._rows[key]), self._members[key], self._clusters)


def ratio(top: int, bottom: int) -> Callable[[Floats], Floats]:
    """Returns a statistic for `Jackknife`: column `top` of the sums divided by column `bottom`; NaN for 0."""
    return lambda sums: divide(sums[..., top], sums[..., bottom])


def missing_estimate(reason: str) -> EstimateFields:
    """Returns the fields of an estimate that could not be computed: no value, no bounds, the `reason`."""
    return {"value": None, "low": None, "high": None, "reason": reason}


def rater_fields(votes: Votes, rater: int) -> dict[str, Any]:
    """Returns the label and source of a rater, the first fields of its row in a table.

    Args:
        votes: holds the label and source of each rater.
        rater: the number of the rater.
    """
    return {"rater": votes.raters[rater].label, "source": votes.raters[rater].source}


def is_judge(votes: Votes, rater: int) -> bool:
    """Returns whether a rater is one that is compared with people: an AI or a rule.

    Args:
        votes: holds the label and source of each rater.
        rater: the number of the rater.
    """
    return votes.raters[rater].source in ("ai", "rule")


def source_shares(votes: Votes, shares: VoteShares, source: str | None) -> dict[int, Floats]:
    """Returns pair -> the vote of a source [3], a distribution over (first, tie, second).

    It is the mean vote of the source's raters; where the source adjudicated the pair, it is the adjudication alone.
    Pairs that the source did not judge are left out.

    Args:
        votes: all votes.
        shares: pair -> rater -> shares of first, tie and second, from `votes`.
        source: one of `SOURCES`; None gives no pairs.
    """
    found = {}
    for pair, by_rater in shares.items():
        given = [vote for rater, vote in by_rater.items() if votes.raters[rater].source == source]
        if given:
            found[pair] = np.mean(given, axis=0)
    return found | {pair: np.eye(3)[category] for (of, pair), category in votes.decided.items() if of == source}


def mean_preference(votes: Votes, shares: VoteShares, source: str | None) -> dict[int, float]:
    """Returns pair -> preference of one source for the first answer.

    The preference is wins plus half the ties, from `source_shares`.

    Args:
        votes: all votes.
        shares: pair -> rater -> shares of first, tie and second, from `votes`.
        source: one of `SOURCES`; None gives no pairs.
    """
    return {pair: float(vote @ PREFERENCE) for pair, vote in source_shares(votes, shares, source).items()}
