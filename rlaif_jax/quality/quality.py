"""The quality report on feedback: statistics with intervals, on any set of judgements.

Intervals come from a jackknife that leaves out whole prompts (`intervals.Jackknife`).

`quality(judgements)` returns plain JSON: agreement of raters with trivial baselines for comparison, order consistency and
position bias, repeat stability, length slope, calibration, missing answers, win rates (plain, length-controlled, debiased
by a few human labels), the reliability of every rater, and cost. Every number is {"value", "low", "high"}; a number that
cannot be computed has the value None and a "reason". `quality_of_store` reads a feedback store; `text.quality_text`
prints a report.

Comparisons are those of rankings, two answers at a time; ratings are compared with ratings of the same answer, on the
unit interval; a choice among three or more options that are the same for several prompts is a label and compared by what
was chosen. What a person adjudicated is the truth of its task and counts in no agreement between people. Several
verdicts of one rater on one pair (both orders, repeats) share its one vote: an order conflict is half a vote for each
side, not a tie.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlaif_jax.config import require
from rlaif_jax.feedback.records.forms import FORMS, Judgement
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.quality.agreement_tables import comparison_agreement, label_agreement, rating_agreement
from rlaif_jax.quality.clusters import MAX_ROWS, SOURCES, VoteShares, ratio, vote_shares_by_pair
from rlaif_jax.quality.intervals import Jackknife
from rlaif_jax.quality.judge_bias import (
    judge_calibration,
    length_slope,
    order_consistency,
    repeat_consistency,
    score_accuracy,
    verdict_habits,
)
from rlaif_jax.quality.values import sum_by_group
from rlaif_jax.quality.votes import Votes, adjudicates, rater_key, rater_labels, read_votes
from rlaif_jax.quality.win_rate_tables import win_rate_table


def quality(
    judgements: Sequence[Judgement],
    *,
    reference: str | None = None,
    items: Sequence[str] | None = None,
    level: float = 0.95,
    reliability: bool = True,
) -> dict[str, Any]:
    """Computes the quality report on `judgements`, as plain JSON (no NaN).

    Args:
        judgements: records of any forms, sources and raters; superseded ones count as spent money only.
        reference: a generator; win rates are then of the others against it. None: of every two.
        items: a name for each judgement; those of one name are one group of the intervals. None: those of one prompt are.
        level: coverage of the intervals.
        reliability: also fit the rater model, the only part that runs on JAX (on the host's CPU).

    Raises:
        UserError: items are of another length, or level is outside (0, 1).
    """
    require(items is None or len(items) == len(judgements), "items should name each judgement")
    require(0 < level < 1, f"level should be between 0 and 1, got {level}")
    votes = read_votes(judgements, items)
    jackknife = Jackknife(level)
    people = votes.people("comparisons")
    shares = vote_shares_by_pair(votes)
    return {
        "records": len(judgements),
        "used": len(votes.used),
        "prompts": votes.count,
        "level": level,
        "people": people,
        "counts": _counts(votes),
        "agreement": {
            "comparisons": comparison_agreement(votes, shares, jackknife),
            "ratings": rating_agreement(votes, jackknife),
            "labels": label_agreement(votes, jackknife),
        },
        "habits": verdict_habits(votes, jackknife),
        "order": order_consistency(votes, jackknife),
        "repeats": repeat_consistency(votes, jackknife),
        "length_slope": length_slope(votes, shares, people, jackknife),
        "calibration": judge_calibration(votes, shares, people, jackknife),
        "scores": score_accuracy(votes, shares, people, jackknife),
        "missing": _missing(votes, jackknife),
        "win_rates": win_rate_table(votes, shares, people, reference, jackknife),
        "raters": _raters(votes, shares, people, level) if reliability else {"rows": [], "reason": "not asked for"},
        "cost": _cost(judgements),
    }


def _raters(votes: Votes, shares: VoteShares, people: str | None, level: float) -> dict[str, Any]:
    from rlaif_jax.quality.reliability import rater_model  # here, so that a report without it does not import JAX

    return rater_model(votes, shares, people, level)


def quality_of_store(path: Path, **options: Any) -> dict[str, Any]:
    """Computes `quality` of all records in the feedback store `path`.

    `options` are keyword arguments of `quality`.

    Raises:
        UserError: the file does not exist or is no feedback store.
    """
    require(Path(path).is_file(), f"{path}: no such feedback store")
    with Store(path) as store:
        return quality(store.judgements(superseded=True), **options)


# ---- Missing answers, counts and cost


def _missing(votes: Votes, jackknife: Jackknife) -> list[dict[str, Any]]:
    """Returns the share of unanswered records of each source.

    The shares are of all records, by length of the answers, and by generator. Adjudications answer no question that
    was put to a rater.
    """
    rows = []
    for source in SOURCES:
        records = [i for i, record in enumerate(votes.used) if _is_asked(record, source)]
        if not records:
            continue
        lengths = np.array([sum(map(len, votes.used[i].answers)) for i in records])
        edges = np.unique(np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1]))
        place = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, max(len(edges) - 2, 0))
        by_length = [
            {"low": int(lengths[place == k].min()), "high": int(lengths[place == k].max())}
            | _unanswered(votes, jackknife, [records[j] for j in np.flatnonzero(place == k)])
            for k in sorted(set(place.tolist()))
        ]
        written: dict[str, list[int]] = defaultdict(list)
        for i in records:
            for name in sorted(set(votes.used[i].generators)):
                written[name].append(i)
        by_generator = [
            {"generator": name} | _unanswered(votes, jackknife, written[name])
            for name in sorted(written, key=lambda name: -len(written[name]))[:MAX_ROWS]
        ]
        every = _unanswered(votes, jackknife, records)
        rows.append({"source": source} | every | {"by_length": by_length, "by_generator": by_generator})
    return rows


def _is_asked(record: Judgement, source: str) -> bool:
    return record.rater.source == source and not adjudicates(record.rater)


def _unanswered(votes: Votes, jackknife: Jackknife, records: Sequence[int]) -> dict[str, Any]:
    """Returns how many of the records (indices into `votes.used`) have no answer, and why."""
    status = Counter(votes.used[i].status for i in records)
    columns = np.array([[not votes.used[i].answered, 1.0] for i in records])
    sums = sum_by_group(columns, [votes.clusters[i] for i in records], votes.count)
    return {
        "count": len(records),
        "unanswered": jackknife.estimate(sums, ratio(0, 1), share=True),
    } | {name: status[name] for name in ("unparsed", "refused", "error", "abstained")}


def _counts(votes: Votes) -> list[dict[str, Any]]:
    """Returns the number of records, answers, raters and adjudications of each source and form."""
    found: dict[tuple[str, str], list[Judgement]] = defaultdict(list)
    for record in votes.used:
        found[record.rater.source, record.form].append(record)
    return [
        {
            "source": source,
            "form": form,
            "records": len(records),
            "answered": sum(record.answered for record in records),
            "raters": len({rater_key(record.rater) for record in records if not adjudicates(record.rater)}),
            "adjudicated": sum(adjudicates(record.rater) for record in records),
        }
        for source in SOURCES
        for form in FORMS
        if (records := found[source, form])
    ]


def _cost(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """Returns cost, tokens, latency and failures of each rater over all records, the superseded too."""
    labels = rater_labels(record.rater for record in judgements)
    found: dict[tuple[str, str], list[Judgement]] = defaultdict(list)
    for record in judgements:
        found[record.rater.source, labels[rater_key(record.rater)]].append(record)
    rows = []
    for (source, name), records in sorted(
        found.items(), key=lambda entry: (SOURCES.index(entry[0][0]), -len(entry[1]))
    ):
        waits = [record.call.latency_s for record in records if record.call.latency_s is not None]
        status = Counter(record.status for record in records)
        rows.append(
            {
                "rater": name,
                "source": source,
                "records": len(records),
                "answered": sum(record.answered for record in records),
                "failures": {s: n for s, n in sorted(status.items()) if s not in ("ok", "tie", "retracted")},
                "cost": float(sum(record.call.cost for record in records)),
                "prompt_tokens": sum(record.call.prompt_tokens for record in records),
                "completion_tokens": sum(record.call.completion_tokens for record in records),
                "median_latency_s": float(statistics.median(waits)) if waits else None,
            }
        )
    return rows
