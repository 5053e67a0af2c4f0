"""Figures about published feedback, and the small tools that all of them use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from rich.console import Console

from rlaif_jax.evaluate import spearman
from rlaif_jax.feedback.records.forms import Judgement


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


def kept(found: tuple[list[Judgement], list[str]]) -> list[Judgement]:
    """Returns the judgements that a reader found; prints how many rows could not be read, and one of them."""
    good, bad = found
    if bad:
        Console(stderr=True).print(f"{len(bad)} rows could not be read, such as {bad[0]}")
    return good


def index(names: Iterable[Any]) -> tuple[np.ndarray, list[Any]]:
    """Returns (the number of each name, [n] int32; the distinct names in order of appearance)."""
    numbers: dict[Any, int] = {}
    places = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int32)
    return places, list(numbers)


def spearman_interval(a: np.ndarray, b: np.ndarray, seed: int, groups: np.ndarray | None = None) -> tuple[float, float]:
    """Returns the 95 % bootstrap interval of Spearman's correlation, over items or over groups."""
    drawn = [spearman(a[rows], b[rows]) for rows in draws(len(a), seed, groups)]
    return float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))


def draws(count: int, seed: int, groups: np.ndarray | None = None, resamples: int = 400) -> Iterator[np.ndarray]:
    """Yields the row numbers of each bootstrap resample, drawn one by one or by whole groups."""
    rng = np.random.default_rng(seed)
    group = np.arange(count) if groups is None else groups
    members = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])
    for _ in range(resamples):
        yield np.concatenate([members[g] for g in rng.integers(0, len(members), len(members))])
