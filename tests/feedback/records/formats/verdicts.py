"""What rankings say, in short."""

from __future__ import annotations

from typing import Any

from rlaif_jax.feedback.records.formats import rows
from rlaif_jax.feedback.records.forms import Ranking


def verdicts(found: rows.ReadResult) -> list[tuple[Any, ...]]:
    """(prompt, answers, ranks, status) of rankings, without messages."""
    good, bad = found
    assert bad == []
    return [(j.prompt, j.answers, j.ranks, j.status) for j in good if isinstance(j, Ranking)]
