"""Agreement among the raters of the page, by kind of task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlaif_jax.feedback.people.queue import Post
from rlaif_jax.feedback.records.forms import Judgement, Ranking, Rating


def agreement(posts: Sequence[Post], kinds: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row a kind of task that two or more raters shared.

    posts: answers. kinds: task id -> kind. A row has `kind`; `units`, what was judged twice or more (pairs of answers in
    rankings, else answers); `same`, the share of pairs of raters that said the same; and Krippendorff's `alpha` (1 =
    agreement, 0 = chance; nominal over better, worse and tie for rankings, interval for ratings), None where undefined.
    """
    from rlaif_jax.quality.statistics import coincidences, interval_alpha, interval_moments, krippendorff_alpha

    by_kind: dict[str, dict[Any, dict[str, float]]] = {}  # kind -> unit -> rater -> value
    for post in posts:
        kind = kinds.get(post.task, "")
        if kind not in ("compare", "rank", "rate"):
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
        if kind == "rate":
            alpha = float(interval_alpha(np.sum([interval_moments(votes) for votes in shared], axis=0)))
        else:
            table = sum(coincidences(np.eye(3)[np.round(2 * np.asarray(votes)).astype(int)]) for votes in shared)
            alpha = float(krippendorff_alpha(np.asarray(table), "nominal"))
        same = float(np.mean([a == b for a, b in pairs]))
        rows.append({"kind": kind, "units": len(shared), "same": same, "alpha": None if np.isnan(alpha) else alpha})
    return sorted(rows, key=lambda row: row["kind"])


def _values(record: Judgement) -> list[tuple[Any, float]]:
    """(part of the task, value) of everything that a record says in numbers."""
    if isinstance(record, Rating) and record.answered:
        return [(0, record.value)]
    if isinstance(record, Ranking) and record.answered:
        return [((i, j), chance) for i, j, chance in record.pairs()]
    return []
