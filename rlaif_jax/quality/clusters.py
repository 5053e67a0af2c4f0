"""Parts that tables of the report share: votes on pairs, pairs of raters, sums over prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

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
Ints = NDArray[np.int64]
Rows = Callable[[Ints, Ints], Floats]
"""Two entries [pairs] each -> rows [pairs, K] of what their raters gave."""
CHUNK = 1 << 18
"""Pairs whose rows are in memory at a time."""


def vote_shares_by_pair(votes: Votes) -> dict[int, dict[int, Floats]]:
    """Returns pair -> rater -> its vote: the share of its verdicts that say (first, tie, second)."""
    given: dict[int, dict[int, Floats]] = defaultdict(dict)
    for vote in votes.votes:
        given[vote.pair].setdefault(vote.rater, np.zeros(3))[vote.category] += 1
    return {pair: {rater: v / v.sum() for rater, v in by_rater.items()} for pair, by_rater in given.items()}


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


class Group(NamedTuple):
    """The pairs of two raters, or of two sources.

    Attributes:
        a: who the rows of a confusion matrix are, a label or a source.
        b: who the columns are.
        one: [pairs] the entries of `a`.
        two: [pairs] the entries of `b` about the same things.
        both_ways: whether neither is the first, because both are of one source; each pair then counts half both ways.
    """

    a: str
    b: str
    one: Ints
    two: Ints
    both_ways: bool = False


class RaterPairs:
    """The pairs of entries about one thing; an entry is what one rater gave to one thing.

    In a crowd hundreds judge one thing: the pairs are arrays, without a loop over them.

    Args:
        votes: whose raters the numbers mean.
        entries: [n] thing and rater of each entry; no two are alike.
        clusters: [n] the prompt of each entry.
    """

    def __init__(self, votes: Votes, entries: Sequence[tuple[int, int]], clusters: Sequence[int]) -> None:
        self._votes = votes
        thing, self._raters = np.array(entries, np.int64).reshape(-1, 2).T
        self._clusters = np.asarray(clusters, np.int64)
        self._source = np.array([SOURCES.index(rater.source) for rater in votes.raters], np.int64)
        order = np.lexsort((self._raters, self._source[self._raters], thing))
        ends = np.searchsorted(thing[order], thing[order], "right")
        later = ends - np.arange(len(order)) - 1  # entries about the same thing that follow
        one = np.repeat(np.arange(len(order)), later)
        two = np.arange(len(one)) - np.repeat(np.cumsum(later) - later, later) + one + 1
        self._one, self._two = order[one], order[two]

    def sources(self) -> list[Group]:
        """Returns the pairs of every two sources, those with most pairs first."""
        source = self._source[self._raters]
        return [
            Group(SOURCES[a], SOURCES[b], one, two, a == b) for a, b, one, two in self._groups(source, len(SOURCES))
        ]

    def raters(self) -> tuple[list[Group], int]:
        """Returns the pairs of every two raters, most first, and the number of groups left out."""
        label = [rater.label for rater in self._votes.raters]
        found = self._groups(self._raters, len(label))
        kept = [Group(label[a], label[b], one, two) for _, (a, b, one, two) in zip(range(MAX_ROWS), found)]
        return kept, sum(1 for _ in found)

    def _groups(self, names: Ints, count: int) -> Iterator[tuple[int, int, Ints, Ints]]:
        """Yields the pairs of every two names, those with most pairs first.

        Args:
            names: [n] the name of each entry.
            count: number of names.
        """
        code = names[self._one] * count + names[self._two]
        by_code = np.argsort(code, kind="stable")
        parts = np.split(by_code, np.flatnonzero(np.diff(code[by_code])) + 1) if len(code) else []
        for places in sorted(parts, key=lambda part: (-len(part), part[0])):
            a, b = divmod(int(code[places[0]]), count)
            yield a, b, self._one[places], self._two[places]

    def sums(self, group: Group, rows: Rows) -> Floats:
        """Returns the rows of a group's pairs summed by prompt, [prompts, K].

        Args:
            group: of these pairs.
            rows: the numbers of pairs of entries.
        """
        total = np.zeros(())
        for start in range(0, len(group.one), CHUNK):
            one, two = group.one[start : start + CHUNK], group.two[start : start + CHUNK]
            found = (rows(one, two) + rows(two, one)) / 2 if group.both_ways else rows(one, two)
            total = total + sum_by_group(found, self._clusters[one], self._votes.count)
        return total


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
