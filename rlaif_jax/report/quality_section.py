"""The section of a run's page about the quality of its feedback: tables and reliability plots."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlaif_jax.quality.quality import quality_of_store
from rlaif_jax.quality.text import Table, clean, sentences, tables
from rlaif_jax.report.curves import Plot, draw_reliability
from rlaif_jax.report.glossary import Label
from rlaif_jax.report.numbers import share_text

MAX_PLOTS = 6
"""Judges that have a reliability plot, those with most verdicts first."""
_ORDER = (
    "Win rates", "Win rates of the judge", "Judges against people", "Ratings against people", "Agreement of sources",
    "Krippendorff",
)  # what a reader wants first  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FeedbackPage:
    """The section about feedback, as data.

    All of it is plain text except the plots' SVG, which holds only numbers and this package's labels.

    Attributes:
        records: number of records in the store.
        note: sentences about them; what a reader should know before the tables.
        plots: reliability plots.
        tables: the tables of the quality report, the most wanted first.
    """

    records: int
    note: str
    plots: tuple[Plot, ...]
    tables: tuple[Table, ...]


def feedback_page(path: Path, *, reliability: bool = True) -> FeedbackPage:
    """Returns the section about the feedback store `path`.

    Args:
        path: the store's file.
        reliability: whether the rater model is fitted, which runs on JAX.

    Raises:
        UserError: the store cannot be read.
    """
    return page_of(quality_of_store(path, reliability=reliability))


def page_of(report: Mapping[str, Any]) -> FeedbackPage:
    """Returns the section that shows a report of `quality`."""
    found = tables(report)
    rank = lambda table: max(
        (i for i, title in enumerate(_ORDER) if table.title.startswith(title)), default=len(_ORDER)
    )
    note = (
        f"{report['used']:,} judgements about {report['prompts']:,} prompts. Brackets: {100 * report['level']:g} % intervals, "
        "over whole prompts."
    )
    note = " ".join([note, *sentences(report)])
    return FeedbackPage(report["records"], note, _plots(report["calibration"]), tuple(sorted(found, key=rank)))


def _plots(rows: Sequence[Mapping[str, Any]]) -> tuple[Plot, ...]:
    return tuple(
        Plot(
            stage="",
            label=Label(f"{clean(row['rater'])}: is it as often right as it says?"),
            last=f"off by {share_text(row['ece']['value'])}",
            svg=draw_reliability(
                [(b["confidence"], b["right"], b["count"]) for b in row["bins"] if b["count"]], f"reliability-{number}"
            ),
        )
        for number, row in enumerate(rows[:MAX_PLOTS])
        if row["ece"]["value"] is not None
    )
