"""Agreement among the raters of the annotation page, for each kind of task."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from rlaif_jax.feedback.people.kinds import COMPARE, RANK, RATE, Kind
from rlaif_jax.feedback.people.queue import Post
from rlaif_jax.feedback.records.forms import Judgement, Ranking, Rating
from rlaif_jax.quality.statistics import coincidences, interval_alpha, interval_moments, krippendorff_alpha


def annotator_agreement(posts: Sequence[Post], kinds: Mapping[str, Kind]) -> list[dict[str, Any]]:
    """Returns the agreement for each kind of task that two or more raters shared.

    Args:
        posts: the raters' answers.
        kinds: task id -> kind.

    Returns:
        Rows with `kind`, its name; `units`, the number of things judged twice or more (pairs of answers in rankings, else
        answers); `same`, the share of pairs of raters with the same verdict; and Krippendorff's `alpha` (1 = agreement, 0 =
        chance; nominal over better, worse and tie for rankings, interval for ratings, whose scales all count as 0 .. 1),
        None where it is undefined.
    """
    by_kind: dict[Kind, dict[Hashable, dict[str, float]]] = {}  # kind -> unit -> rater -> value
    for post in posts:
        kind = kinds.get(post.task)
        if kind not in (COMPARE, RANK, RATE):
            continue
        for record in post.records:
            for part, value in _values(record):
                by_kind.setdefault(kind, {}).setdefault((post.task, part), {})[post.rater] = value
    rows = []
    for kind, units in by_kind.items():
        shared = [list(votes.values()) for votes in units.values() if len(votes) >= 2]
        if not shared:
            continue
        pairs = [(a, b) for votes in shared for i, a in enumerate(votes) for b in votes[i + 1 :]]
        if kind is RATE:
            alpha = float(interval_alpha(np.sum([interval_moments(votes) for votes in shared], axis=0)))
        else:
            table = sum(coincidences(np.eye(3)[np.round(2 * np.asarray(votes)).astype(int)]) for votes in shared)
            alpha = float(krippendorff_alpha(np.asarray(table), "nominal"))
        same = float(np.mean([a == b for a, b in pairs]))
        row = {"kind": kind.name, "units": len(shared), "same": same, "alpha": None if np.isnan(alpha) else alpha}
        rows.append(row)
    return sorted(rows, key=lambda row: row["kind"])


def _values(record: Judgement) -> list[tuple[Hashable, float]]:
    """Returns (part of the task, value) of each number that a record holds."""
    if isinstance(record, Rating) and record.answered:
        return [(0, record.unit)]  # tasks may differ in their scales
    if isinstance(record, Ranking) and record.answered:
        return [((i, j), chance) for i, j, chance in record.pairs()]
    return []
