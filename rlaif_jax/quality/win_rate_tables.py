"""Win-rate tables of the quality report, for every two generators.

Win rates are plain, at equal lengths, and debiased by labels of people.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlaif_jax.quality.clusters import (
    MAX_ROWS,
    PREFERENCE,
    SOURCES,
    EstimateFields,
    VoteShares,
    missing_estimate,
    ratio,
    source_shares,
)
from rlaif_jax.quality.debiasing import label_budget, power_lambda, powered_columns, powered_mean
from rlaif_jax.quality.intervals import Jackknife
from rlaif_jax.quality.values import Floats, sum_by_group
from rlaif_jax.quality.votes import TIE, Votes
from rlaif_jax.quality.win_rates import length_controlled_win_rate

MIN_LABELS = 10
"""With fewer human labels nothing is debiased."""
_BUDGETS = (25, 50, 100, 200, 400, 800, 1600, 3200)


class _Match(NamedTuple):
    """Two generators and their pairs.

    Attributes:
        a: the generator whose win rate it is.
        b: its opponent.
        pairs: (index, whether a wrote the first answer) of each pair.
    """

    a: str
    b: str
    pairs: list[tuple[int, bool]]


def win_rate_table(
    votes: Votes,
    shares: VoteShares,
    people: str | None,
    reference: str | None,
    jackknife: Jackknife,
) -> dict[str, Any]:
    """Returns the win rates (wins + ties / 2) / n of every two generators by every source.

    Equal answers of two generators are a tie. An adjudication alone is its source's verdict. The AI judges' rates are
    also debiased with the people's labels.

    Args:
        votes: the judgements as votes.
        shares: pair -> rater -> its vote.
        people: the source whose verdicts count as people's labels; None: no source does.
        reference: the generator that all others are matched against; None: every two generators are matched.
        jackknife: computes the intervals.

    Returns:
        {"rows": a row for each match and source, "left_out": number of matches that are not listed}.
    """
    equal: dict[str, dict[int, Floats]] = defaultdict(dict)
    for index, source in votes.equal:
        equal[source][index] = np.eye(3)[TIE]
    given = {source: source_shares(votes, shares, source) | equal[source] for source in SOURCES}
    sources = [source for source in SOURCES if given[source]]
    preference = {source: {i: float(vote @ PREFERENCE) for i, vote in given[source].items()} for source in sources}
    ties = {source: {i: float(vote[TIE]) for i, vote in given[source].items()} for source in sources}
    matches = _matches(votes, reference)
    rows = []
    for match in matches[:MAX_ROWS]:
        for source in sources:
            rows += _plain_row(votes, match, preference[source], ties[source], source, jackknife)
        judge = next((s for s in ("ai", "rule") if s in preference), None)
        if judge is not None and people in preference:
            rows += _debiased_row(votes, match, preference[judge], preference[people], judge, jackknife)
    return {"rows": rows, "left_out": max(0, len(matches) - MAX_ROWS)}


def _matches(votes: Votes, reference: str | None) -> list[_Match]:
    """Returns the matches of generators, those with most pairs first."""
    found: dict[tuple[str, str], list[tuple[int, bool]]] = defaultdict(list)
    for index, pair in enumerate(votes.pairs):
        first, second = pair.generators
        if first and second and first != second and (reference is None or reference in pair.generators):
            straight = second == reference if reference is not None else first < second
            found[(first, second) if straight else (second, first)].append((index, straight))
    return [_Match(*names, found[names]) for names in sorted(found, key=lambda names: -len(found[names]))]


def _plain_row(
    votes: Votes,
    match: _Match,
    preference: Mapping[int, float],
    ties: Mapping[int, float],
    source: str,
    jackknife: Jackknife,
) -> list[dict[str, Any]]:
    """Returns the row of a match by a source, or no row if the source judged none of its pairs.

    Args:
        votes: the judgements as votes.
        match: the two generators.
        preference: pair -> the source's preference for the first answer.
        ties: pair -> share of ties among the source's verdicts; 1 where the answers are equal.
        source: whose verdicts they are.
        jackknife: computes the intervals.
    """
    judged = [(i, straight) for i, straight in match.pairs if i in preference]
    if not judged:
        return []
    value = np.array([preference[i] if straight else 1 - preference[i] for i, straight in judged])
    longer = np.array([votes.pairs[i].longer * (1 if straight else -1) for i, straight in judged], float)
    member = [votes.pairs[i].cluster for i, _ in judged]
    tied = np.array([ties[i] for i, _ in judged])
    sums = sum_by_group(np.stack([value, np.ones(len(judged))], 1), member, votes.count)
    return [
        {"a": match.a, "b": match.b, "source": source, "count": len(judged)}
        | {"wins": float((value - tied / 2).sum()), "ties": float(tied.sum())}
        | {"losses": float((1 - value - tied / 2).sum())}
        | {"rate": jackknife.estimate(sums, ratio(0, 1), share=True)}
        | {"length_controlled": _length_controlled(value, longer, member, jackknife)}
    ]


def _length_controlled(value: Floats, longer: Floats, member: Sequence[int], jackknife: Jackknife) -> EstimateFields:
    """Returns the fields of `length_controlled_win_rate`."""
    found = length_controlled_win_rate(value, longer, level=jackknife.level, groups=member)
    if not np.isfinite(found.value):
        return missing_estimate("all pairs differ in length by the same: length and quality cannot be separated")
    if len(set(member)) < 2:
        return {"value": found.value, "low": None, "high": None, "reason": "one prompt has no interval"}
    fields = {"value": found.value, "low": found.low, "high": found.high}
    return fields | {"note": found.note} if found.note else fields


def _debiased_row(
    votes: Votes,
    match: _Match,
    judge: Mapping[int, float],
    person: Mapping[int, float],
    source: str,
    jackknife: Jackknife,
) -> list[dict[str, Any]]:
    """Returns the row of a match by a judge debiased with people's labels.

    The list is empty if the judge judged none of the match's pairs.
    """
    judged = [(i, straight) for i, straight in match.pairs if i in judge]
    if not judged:
        return []
    turned = lambda value, straight: value if straight else 1 - value
    f = np.array([turned(judge[i], straight) for i, straight in judged])
    y = np.array([turned(person.get(i, np.nan), straight) for i, straight in judged])
    labelled = int((~np.isnan(y)).sum())
    row = {"a": match.a, "b": match.b, "source": f"{source}, debiased", "count": len(judged), "labelled": labelled}
    if labelled < MIN_LABELS:
        few = missing_estimate(f"{labelled} of these pairs have a person's label; {MIN_LABELS} are needed")
        return [row | {"rate": few, "alone": few, "weight": None, "budget": []}]
    sums = sum_by_group(powered_columns(f, y), [votes.pairs[i].cluster for i, _ in judged], votes.count)
    return [
        row
        | {
            "rate": jackknife.estimate(sums, powered_mean, share=True, informative=sums[:, 2] > 0),
            "alone": jackknife.estimate(sums, ratio(3, 2), share=True, informative=sums[:, 2] > 0),
            "weight": float(power_lambda(sums.sum(0))),
            "budget": label_budget(sums, _BUDGETS, level=jackknife.level),
        }
    ]
