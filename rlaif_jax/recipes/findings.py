"""Figures of published feedback with their intervals, and what the measures of them share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from rich.console import Console

from rlaif_jax.feedback.records.forms import Judgement
from rlaif_jax.quality.intervals import percentile_interval, resampled_rows
from rlaif_jax.quality.statistics import spearman


@dataclasses.dataclass(frozen=True)
class Finding:
    """One figure.

    Attributes:
        name: what was measured.
        value: the figure.
        low, high: its 95 % interval; None: not computed.
        reference: the same figure as others published it.
        note: how it was measured.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    reference: str = ""
    note: str = ""


Findings = Iterator[Finding]


def readable(found: tuple[list[Judgement], list[str]]) -> list[Judgement]:
    """Returns the judgements of a reader's result, and prints how many rows could not be read.

    `found` is (judgements, messages about unreadable rows); the first message is printed too.
    """
    good, bad = found
    if bad:
        Console(stderr=True).print(f"{len(bad)} rows could not be read, such as {bad[0]}")
    return good


def finding_of(name: str, estimate: Mapping[str, Any], note: str) -> Finding:
    """Returns an estimate of `Jackknife` as a finding; what it warns of is part of the note."""
    said = [note, *(estimate[key] for key in ("note", "reason") if key in estimate)]
    return Finding(name, estimate["value"], estimate["low"], estimate["high"], note="; ".join(said))


def index(names: Iterable[Any]) -> tuple[np.ndarray, list[Any]]:
    """Returns (the number of each name, [n] int32; the distinct names in order of appearance)."""
    numbers: dict[Any, int] = {}
    places = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int32)
    return places, list(numbers)


def spearman_interval(a: np.ndarray, b: np.ndarray, seed: int, groups: np.ndarray | None = None) -> tuple[float, float]:
    """Returns the 95 % bootstrap interval (low, high) of Spearman's correlation.

    Args:
        a: [n].
        b: [n].
        seed: of the bootstrap.
        groups: [n] int, resampled as wholes; None: each item is a group.
    """
    rows_of = resampled_rows(np.arange(len(a)) if groups is None else groups, seed=seed, resamples=400)
    return percentile_interval([spearman(a[rows], b[rows]) for rows in rows_of], 0.95)
