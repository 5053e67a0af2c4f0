"""Win rates of generators: plain, at equal lengths, and debiased by a few labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import rlaif_jax.quality.statistics as stats
from rlaif_jax.evaluate import length_controlled_win_rate
from rlaif_jax.quality.clusters import (
    MAX_ROWS,
    SOURCES,
    Estimate,
    Shares,
    mean_worth,
    nothing,
    ratio,
)
from rlaif_jax.quality.statistics import Bootstrap, Floats, summed
from rlaif_jax.quality.votes import TIE, Votes

MIN_LABELS = 10
"""Fewer human labels debias nothing."""
_BUDGETS = (25, 50, 100, 200, 400, 800, 1600, 3200)


def win_rates(
    votes: Votes,
    shares: Shares,
    people: str | None,
    reference: str | None,
    bootstrap: Bootstrap,
    seed: int,
) -> dict[str, Any]:
    """Of every two generators by every source: (wins + ties / 2) / n, the same at equal lengths, and by the AI judges
    debiased with the people's labels. Equal answers of the two are a tie. `a` against `b`; `b` is the reference if there
    is one."""
    equal: dict[str, dict[int, float]] = defaultdict(dict)
    for index, rater in votes.equal:
        equal[votes.raters[rater][1]][index] = 0.5
    sources = [s for s in SOURCES if s in equal or any(votes.raters[v.rater][1] == s for v in votes.votes)]
    worth = {source: mean_worth(votes, shares, source) | equal[source] for source in sources}
    matches: dict[tuple[str, str], list[tuple[int, bool]]] = defaultdict(list)
    for index, pair in enumerate(votes.pairs):
        first, second = pair.generators
        if first and second and first != second and (reference is None or reference in pair.generators):
            straight = second == reference if reference is not None else first < second
            matches[(first, second) if straight else (second, first)].append((index, straight))
    most = sorted(matches, key=lambda names: -len(matches[names]))
    rows = []
    for names in most[:MAX_ROWS]:
        mine = matches[names]
        for source in sources:
            of = [(i, straight) for i, straight in mine if i in worth[source]]
            if of:
                value = np.array([worth[source][i] if straight else 1 - worth[source][i] for i, straight in of])
                longer = np.array([votes.pairs[i].longer * (1 if straight else -1) for i, straight in of], float)
                member = [votes.pairs[i].cluster for i, _ in of]
                ties = np.array([1.0 if i in equal[source] else _tied(votes, shares[i], source) for i, _ in of])
                sums = summed(np.stack([value, np.ones(len(of))], 1), member, votes.count)
                rows.append(
                    {"a": names[0], "b": names[1], "source": source, "count": len(of)}
                    | {"wins": float((value - ties / 2).sum()), "ties": float(ties.sum())}
                    | {"losses": float((1 - value - ties / 2).sum())}
                    | {"rate": bootstrap.estimate(sums, ratio(0, 1), share=True)}
                    | {"length_controlled": _controlled(value, longer, member, bootstrap, seed)}
                )
        judge = next((s for s in ("ai", "rule") if s in worth), None)
        if judge is not None and people in worth:
            rows += _debiased(votes, names, mine, worth[judge], worth[people], judge, bootstrap)
    return {"rows": rows, "left_out": max(0, len(most) - MAX_ROWS)}


def _tied(votes: Votes, by: Mapping[int, Floats], source: str) -> float:
    """The share of ties in the verdicts of a source on a pair."""
    return float(np.mean([vote[TIE] for rater, vote in by.items() if votes.raters[rater][1] == source]))


def _controlled(value: Floats, longer: Floats, member: Sequence[int], bootstrap: Bootstrap, seed: int) -> Estimate:
    found = length_controlled_win_rate(
        value, longer, seed=seed, resamples=min(400, bootstrap.resamples), level=bootstrap.level, groups=member
    )
    if not np.isfinite(found.value):
        return nothing("all pairs differ in length by the same: length and quality cannot be told apart")
    if len(set(member)) < 2:
        return {"value": found.value, "low": None, "high": None, "reason": "one prompt has no interval"}
    return {"value": found.value, "low": found.low, "high": found.high}


def _debiased(
    votes: Votes,
    names: tuple[str, str],
    mine: Sequence[tuple[int, bool]],
    judge: Mapping[int, float],
    person: Mapping[int, float],
    source: str,
    bootstrap: Bootstrap,
) -> list[dict[str, Any]]:
    of = [(i, straight) for i, straight in mine if i in judge]
    if not of:
        return []
    turned = lambda value, straight: value if straight else 1 - value
    f = np.array([turned(judge[i], straight) for i, straight in of])
    y = np.array([turned(person.get(i, np.nan), straight) for i, straight in of])
    labelled = int((~np.isnan(y)).sum())
    row = {"a": names[0], "b": names[1], "source": f"{source}, debiased", "count": len(of), "labelled": labelled}
    if labelled < MIN_LABELS:
        few = f"{labelled} of these pairs have a person's label; {MIN_LABELS} are needed"
        return [row | {"rate": nothing(few), "alone": nothing(few), "weight": None, "budget": []}]
    sums = summed(stats.powered_columns(f, y), [votes.pairs[i].cluster for i, _ in of], votes.count)
    return [
        row
        | {
            "rate": bootstrap.estimate(sums, stats.powered_mean),
            "alone": bootstrap.estimate(sums, ratio(3, 2)),
            "weight": float(stats.power_lambda(sums.sum(0))),
            "budget": stats.label_budget(sums, _BUDGETS, level=bootstrap.level),
        }
    ]
