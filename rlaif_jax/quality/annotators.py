"""Agreement among the raters of the annotation page, for each kind of task."""

from __future__ import annotations

import dataclasses
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
        The rows of `AgreementTally`.
    """
    tally = AgreementTally()
    for post in posts:
        if post.task in kinds:
            tally.add(kinds[post.task].name, post)
    return tally.rows()


@dataclasses.dataclass
class _Sums:
    """The sums over the shared units of one kind, from which its row is computed."""

    units: int = 0
    same: int = 0
    pairs: int = 0
    moments: Any = 0.0
    table: Any = 0.0

    def add(self, values: Sequence[float], kind: str, sign: int) -> None:
        """Adds (sign 1) or takes away (-1) a unit with these values, one of each rater."""
        count = len(values)
        if count < 2:
            return
        self.units += sign
        self.pairs += sign * (count * (count - 1) // 2)
        repeats = [values.count(value) for value in dict.fromkeys(values)]
        self.same += sign * sum(n * (n - 1) // 2 for n in repeats)
        if kind == RATE.name:
            self.moments = self.moments + sign * interval_moments(values)
        else:
            votes = np.eye(3)[np.round(2 * np.asarray(values)).astype(int)]
            self.table = self.table + sign * coincidences(votes)


class AgreementTally:
    """The agreement of raters, kept up to date: an answer costs the same after any number of answers."""

    def __init__(self) -> None:
        self._votes: dict[tuple[str, Hashable], dict[str, float]] = {}  # (task, part of it) -> rater -> value
        self._given: dict[tuple[str, str], tuple[str, tuple[Hashable, ...]]] = {}  # (task, rater) -> kind, its parts
        self._sums: dict[str, _Sums] = {}

    def add(self, kind: str, post: Post) -> None:
        """Takes up an answer in place of an earlier one of the same rater to the same task.

        Args:
            kind: the name of the task's kind; those that are not compared are passed over.
            post: the answer.
        """
        if kind not in (COMPARE.name, RANK.name, RATE.name):
            return
        self.remove(post.task, post.rater)
        values = dict(value for record in post.records for value in _values(record))
        self._given[post.task, post.rater] = kind, tuple(values)
        for part, value in values.items():
            self._change(kind, (post.task, part), post.rater, value)

    def remove(self, task: str, rater: str) -> None:
        """Forgets the rater's answer to the task, if there is one."""
        kind, parts = self._given.pop((task, rater), ("", ()))
        for part in parts:
            self._change(kind, (task, part), rater, None)

    def _change(self, kind: str, unit: tuple[str, Hashable], rater: str, value: float | None) -> None:
        sums, votes = self._sums.setdefault(kind, _Sums()), self._votes.setdefault(unit, {})
        sums.add(list(votes.values()), kind, -1)
        votes.pop(rater, None)
        if value is not None:
            votes[rater] = value
        sums.add(list(votes.values()), kind, 1)

    def rows(self) -> list[dict[str, Any]]:
        """Returns a row for each kind of task that two or more raters shared.

        Returns:
            Rows with `kind`, its name; `units`, the number of things judged twice or more (pairs of answers in rankings, else
            answers); `same`, the share of pairs of raters with the same verdict; and Krippendorff's `alpha` (1 = agreement,
            0 = chance; nominal over better, worse and tie for rankings, interval for ratings, whose scales all count as
            0 .. 1), None where it is undefined.
        """
        rows = []
        for kind, sums in sorted(self._sums.items()):
            if not sums.units:
                continue
            is_rate = kind == RATE.name
            alpha = float(interval_alpha(sums.moments) if is_rate else krippendorff_alpha(sums.table, "nominal"))
            row = {"kind": kind, "units": sums.units, "same": sums.same / sums.pairs}
            rows.append(row | {"alpha": None if np.isnan(alpha) else alpha})
        return rows


def _values(record: Judgement) -> list[tuple[Hashable, float]]:
    """Returns (part of the task, value) of each number that a record holds."""
    if isinstance(record, Rating) and record.answered:
        return [(0, round(record.unit, 9))]  # tasks may differ in their scales, and 2 of 0 .. 10 is 1.2 of 1 .. 2
    if isinstance(record, Ranking) and record.answered:
        return [((i, j), chance) for i, j, chance in record.pairs()]
    return []
