"""How good is the feedback: a report on any set of judgements, with intervals that draw whole prompts.

`quality(judgements)` returns plain JSON: agreement of raters beside trivial baselines, order consistency and position
bias, repeat stability, length slope, calibration, what is missing, win rates (plain, length-controlled, debiased by a few
human labels), the reliability of every rater, and cost. Every number is {"value", "low", "high"}; what cannot be computed
is None with a "reason". `quality_text` prints it; `quality_of_store` reads it off a feedback store.

Comparisons are those of rankings, two answers at a time; ratings are compared with ratings of the same answer. Several
verdicts of one rater on one pair (both orders, repeats) share its one vote: an order conflict is half a vote for each
side, not a tie.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlaif_jax.config import require
from rlaif_jax.feedback.records.forms import FORMS, Judgement
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.quality.agreement_tables import comparison_agreement, rating_agreement
from rlaif_jax.quality.clusters import MAX_ROWS, SOURCES, Shares, ratio, vote_shares
from rlaif_jax.quality.judge_bias import calibration, habits, length_slope, orders, repeats
from rlaif_jax.quality.statistics import Bootstrap, summed
from rlaif_jax.quality.text import quality_text as quality_text
from rlaif_jax.quality.votes import Votes, read_votes
from rlaif_jax.quality.win_rates import win_rates


def quality(
    judgements: Sequence[Judgement],
    *,
    seed: int = 0,
    reference: str | None = None,
    items: Sequence[str] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    reliability: bool = True,
) -> dict[str, Any]:
    """The quality report on `judgements`, as plain JSON (no NaN).

    Args:
        judgements: records of any forms, sources and raters; superseded ones count as spent money only.
        seed: of the bootstrap; the report is a function of the records and the seed.
        reference: a generator; win rates are then of the others against it. None: of every two.
        items: a name for each judgement; those of one name are resampled together. None: those of one prompt.
        level: coverage of the intervals; resamples: of each bootstrap (fewer where there are very many prompts).
        reliability: also fit the rater model, which runs on JAX (on the host's CPU).

    Raises:
        UserError: items of another length, level outside (0, 1).
    """
    require(items is None or len(items) == len(judgements), "items should name each judgement")
    require(0 < level < 1, f"level should be between 0 and 1, got {level}")
    votes = read_votes(judgements, items)
    bootstrap = Bootstrap(votes.count, seed=seed, resamples=resamples, level=level)
    people = next((s for s in ("person", "simulated") if any(votes.raters[v.rater][1] == s for v in votes.votes)), None)
    shares = vote_shares(votes)
    report = {
        "records": len(judgements),
        "used": len(votes.used),
        "prompts": votes.count,
        "seed": seed,
        "level": level,
        "resamples": bootstrap.resamples,
        "people": people,
        "counts": _counts(votes),
        "agreement": {
            "comparisons": comparison_agreement(votes, shares, bootstrap),
            "ratings": rating_agreement(votes, bootstrap),
        },
        "habits": habits(votes, bootstrap),
        "order": orders(votes, bootstrap),
        "repeats": repeats(votes, bootstrap),
        "length_slope": length_slope(votes, shares, people, bootstrap),
        "calibration": calibration(votes, shares, people, bootstrap),
        "missing": _missing(votes, bootstrap),
        "win_rates": win_rates(votes, shares, people, reference, bootstrap, seed),
        "raters": _raters(votes, shares, level) if reliability else {"rows": [], "reason": "not asked for"},
        "cost": _cost(judgements),
    }
    return report


def _raters(votes: Votes, shares: Shares, level: float) -> dict[str, Any]:
    from rlaif_jax.quality.reliability import rater_model  # the only part that needs JAX

    return rater_model(votes, shares, level)


def quality_of_store(path: Path, **options: Any) -> dict[str, Any]:
    """`quality` of the feedback store in the file `path`; options as there.

    Raises:
        UserError: no such file, or no feedback store.
    """
    require(Path(path).is_file(), f"{path}: no such feedback store")
    with Store(path) as store:
        return quality(store.judgements(superseded=True), **options)


# ---- What is missing


def _missing(votes: Votes, bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """Of each source: the share without an answer, over all, by the length of what was judged, by who wrote it."""
    rows = []
    for source in SOURCES:
        of = [i for i, record in enumerate(votes.used) if record.rater.source == source]
        if not of:
            continue
        lengths = np.array([sum(map(len, votes.used[i].answers)) for i in of])
        edges = np.unique(np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1]))
        place = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, max(len(edges) - 2, 0))
        told = partial(_unanswered, votes, bootstrap)
        by_length = [
            {"low": int(lengths[place == k].min()), "high": int(lengths[place == k].max())}
            | told([of[j] for j in np.flatnonzero(place == k)])
            for k in sorted(set(place.tolist()))
        ]
        writers: dict[str, list[int]] = defaultdict(list)
        for i in of:
            for name in sorted(set(votes.used[i].generators)):
                writers[name].append(i)
        most = sorted(writers, key=lambda name: -len(writers[name]))[:MAX_ROWS]
        rows.append(
            {"source": source}
            | told(of)
            | {"by_length": by_length, "by_generator": [{"generator": name} | told(writers[name]) for name in most]}
        )
    return rows


def _unanswered(votes: Votes, bootstrap: Bootstrap, of: Sequence[int]) -> dict[str, Any]:
    status = Counter(votes.used[i].status for i in of)
    columns = np.array([[not votes.used[i].answered, 1.0] for i in of])
    sums = summed(columns, [votes.clusters[i] for i in of], votes.count)
    return {
        "count": len(of),
        "unanswered": bootstrap.estimate(sums, ratio(0, 1), share=True),
        "unparsed": status["unparsed"],
        "refused": status["refused"],
        "error": status["error"],
        "abstained": status["abstained"],
    }


def _counts(votes: Votes) -> list[dict[str, Any]]:
    """Records and answers of each source and form."""
    found: dict[tuple[str, str], list[Judgement]] = defaultdict(list)
    for record in votes.used:
        found[record.rater.source, record.form].append(record)
    return [
        {
            "source": source,
            "form": form,
            "records": len(of),
            "answered": sum(record.answered for record in of),
            "raters": len({record.rater.name for record in of}),
        }
        for source in SOURCES
        for form in FORMS
        if (of := found[source, form])
    ]


def _cost(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """Of each rater, over all records, the superseded too: what it took and what failed."""
    found: dict[tuple[str, str], list[Judgement]] = defaultdict(list)
    for record in judgements:
        found[record.rater.source, record.rater.name].append(record)
    rows = []
    for (source, name), of in sorted(found.items(), key=lambda entry: (SOURCES.index(entry[0][0]), -len(entry[1]))):
        waits = [record.call.latency_s for record in of if record.call.latency_s is not None]
        status = Counter(record.status for record in of)
        rows.append(
            {
                "rater": name,
                "source": source,
                "records": len(of),
                "answered": sum(record.answered for record in of),
                "failures": {s: n for s, n in sorted(status.items()) if s not in ("ok", "tie", "retracted")},
                "cost": float(sum(record.call.cost for record in of)),
                "prompt_tokens": sum(record.call.prompt_tokens for record in of),
                "completion_tokens": sum(record.call.completion_tokens for record in of),
                "median_latency_s": float(statistics.median(waits)) if waits else None,
            }
        )
    return rows
