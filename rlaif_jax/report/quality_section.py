"""The quality of a run's feedback as a section of its page: tables, and the reliability plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlaif_jax.quality import quality_of_store
from rlaif_jax.quality.text import Table, clean, tables
from rlaif_jax.report.curves import Plot, draw_reliability, number_text

MAX_PLOTS = 6
"""Judges that have a reliability plot, those with most verdicts first."""
_ORDER = ("Win rates", "Win rates of the judge", "Agreement of sources", "Krippendorff")  # what a reader wants first


@dataclasses.dataclass(frozen=True)
class FeedbackPage:
    """records: how many were read. note: one sentence. Everything is plain text but the plots' SVG, which holds numbers
    and this package's own labels alone."""

    records: int
    note: str
    plots: tuple[Plot, ...]
    tables: tuple[Table, ...]


def feedback_page(path: Path, *, reliability: bool = True) -> FeedbackPage:
    """The section about the feedback store `path`. reliability: also fit the rater model, on JAX.

    Raises:
        UserError: the store cannot be read.
    """
    return page_of(quality_of_store(path, reliability=reliability))


def page_of(report: Mapping[str, Any]) -> FeedbackPage:
    """The section of a report of `quality`."""
    found = tables(report)
    place = {title: i for i, title in enumerate(_ORDER)}
    rank = lambda table: next((i for title, i in reversed(place.items()) if table.title.startswith(title)), len(place))
    simulated = (
        ' No person has compared answers: "people" are SIMULATED people.' if report["people"] == "simulated" else ""
    )
    note = (
        f"{report['used']:,} judgements about {report['prompts']:,} prompts. Brackets: {100 * report['level']:g} % intervals, "
        f"whole prompts resampled.{simulated}"
    )
    return FeedbackPage(report["records"], note, _plots(report["calibration"]), tuple(sorted(found, key=rank)))


def _plots(rows: Sequence[Mapping[str, Any]]) -> tuple[Plot, ...]:
    return tuple(
        Plot(
            title=f"{clean(row['rater'])}: is it as often right as it says?",
            last=f"ECE {number_text(row['ece']['value'])}",
            svg=draw_reliability(
                [(b["confidence"], b["right"], b["count"]) for b in row["bins"] if b["count"]], f"reliability-{number}"
            ),
        )
        for number, row in enumerate(rows[:MAX_PLOTS])
        if row["ece"]["value"] is not None
    )
