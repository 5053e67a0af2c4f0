"""What the parts of the report share: votes of raters on pairs, and sums of rows over prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from rlaif_jax.quality.statistics import Floats, divide, summed
from rlaif_jax.quality.votes import Votes

SOURCES = ("ai", "rule", "simulated", "person")
"""In this order: of a pair of sources the rows of a confusion matrix are the first's."""
MAX_ROWS = 40
"""Pairs of raters or of generators that are listed, those with most in common first."""
WORTH = np.array([1.0, 0.5, 0.0])
"""Of a verdict (first, tie, second) for the first answer."""
Estimate = dict[str, Any]
Shares = Mapping[int, Mapping[int, Floats]]
"""pair -> rater -> its vote, a distribution over (first, tie, second)."""


def vote_shares(votes: Votes) -> dict[int, dict[int, Floats]]:
    """pair -> rater -> its vote, a distribution over (first, tie, second)."""
    given: dict[int, dict[int, Floats]] = defaultdict(dict)
    for vote in votes.votes:
        given[vote.pair].setdefault(vote.rater, np.zeros(3))[vote.category] += 1
    return {pair: {rater: v / v.sum() for rater, v in by.items()} for pair, by in given.items()}


def by_source(votes: Votes, of: Iterable[int]) -> list[int]:
    return sorted(of, key=lambda rater: (SOURCES.index(votes.raters[rater][1]), rater))


class Groups:
    """Rows of numbers gathered under keys, each of a cluster; `sums` are what a bootstrap wants."""

    def __init__(self, clusters: int) -> None:
        self._clusters = clusters
        self._rows: dict[Any, list[Floats]] = defaultdict(list)
        self._members: dict[Any, list[int]] = defaultdict(list)

    def add(self, key: Any, cluster: int, row: Any) -> None:
        self._rows[key].append(np.asarray(row, np.float64))
        self._members[key].append(cluster)

    def names(self) -> list[Any]:
        """Those with most rows first."""
        return sorted(self._rows, key=lambda key: -len(self._rows[key]))

    def size(self, key: Any) -> int:
        return len(self._rows[key])

    def sums(self, key: Any) -> Floats:
        return summed(np.stack(self._rows[key]), self._members[key], self._clusters)


def ratio(top: int, bottom: int) -> Any:
    return lambda sums: divide(sums[..., top], sums[..., bottom])


def nothing(reason: str) -> Estimate:
    return {"value": None, "low": None, "high": None, "reason": reason}


def who(votes: Votes, rater: int) -> dict[str, Any]:
    return {"rater": votes.raters[rater][0], "source": votes.raters[rater][1]}


def mean_worth(votes: Votes, shares: Shares, source: str | None) -> dict[int, float]:
    """pair -> mean worth of the first answer by the raters of a source: wins and half the ties."""
    found = {}
    for pair, by in shares.items():
        of = [float(vote @ WORTH) for rater, vote in by.items() if votes.raters[rater][1] == source]
        if of:
            found[pair] = float(np.mean(of))
    return found
