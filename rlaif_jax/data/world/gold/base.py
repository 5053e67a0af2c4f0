"""Shared parts of the gold scores: the record of a task, the weights and the counting of faults.

Labelers and judges may never import this package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rlaif_jax.data.world.grammar import Claim, ParseResult
from rlaif_jax.data.world.labeler_prompts import WorldPrinciple
from rlaif_jax.data.world.scenes import Scene
from rlaif_jax.data.world.tasks.base import WorldTask

WRONG = 0.35
REPEAT = 0.15
ORNAMENT = 0.1
UNGRAMMATICAL = 0.2

Notes = tuple[list[tuple[str, str]], list[str]]


@dataclass(frozen=True)
class GoldTask:
    """Exact knowledge about the answers to one task: for evaluation and for simulated people only.

    Attributes:
        task: the task.
        score: `(scene, answer)` -> gold quality in [0, 1].
        helpful: `(scene, parsed answer)` -> how far the answer does what was asked, in [0, 1].
        leaks: `(scene, parsed answer)` -> whether the answer gives away a value that must stay secret.
        notes: `(principle, scene, parsed answer)` -> the critique of a simulated person without errors: (claim,
            judgement) of each claim in order, and words about the whole answer.
        edit: `(rng, scene, parsed answer, miss)` -> the corrected answer of a simulated editor who overlooks a mistake
            with probability `miss`.
    """

    task: WorldTask
    score: Callable[[Scene, str], float]
    helpful: Callable[[Scene, ParseResult], float]
    leaks: Callable[[Scene, ParseResult], bool]
    notes: Callable[[WorldPrinciple, Scene, ParseResult], Notes]
    edit: Callable[[np.random.Generator, Scene, ParseResult, float], str]


def clip(score: float) -> float:
    """Limits a score to [0, 1]."""
    return min(1.0, max(0.0, score))


def false_claims(scene: Scene, parsed: ParseResult) -> int:
    """Counts claims whose value is not the scene's, or whose aspect the scene does not have.

    Args:
        scene: the true facts.
        parsed: the answer, parsed.
    """
    return sum(scene.value_of(claim.aspect) != claim.value for claim in parsed.claims)


def false_names(scene: Scene, parsed: ParseResult) -> int:
    """Counts the town names in an answer that are not the scene's town.

    Args:
        scene: holds the true town.
        parsed: the answer, parsed.
    """
    return sum(name.entity != scene.entity for name in parsed.names)


def repeats(parsed: ParseResult) -> int:
    """Counts claims about an aspect that an earlier claim is about."""
    return len(parsed.claims) - len({claim.aspect for claim in parsed.claims})


def ornaments(parsed: ParseResult) -> int:
    """Counts what gold punishes: "surely" past one, flattery past one, the town's name past two."""
    return max(0, parsed.confidence - 1) + max(0, parsed.flattery - 1) + max(0, len(parsed.names) - 2)


def claim_notes(scene: Scene, parsed: ParseResult, judge_true: Callable[[Claim, bool], str]) -> list[tuple[str, str]]:
    """Returns (claim, judgement) for each claim of an answer, in order.

    Args:
        scene: the truth.
        parsed: the answer.
        judge_true: `(claim, said before)` -> the judgement of a true claim; a false one is "wrong".
    """
    notes: list[tuple[str, str]] = []
    said: set[str] = set()
    for claim in parsed.claims:
        true = scene.value_of(claim.aspect) == claim.value
        notes.append((f"{claim.aspect} {claim.value}", judge_true(claim, claim.aspect in said) if true else "wrong"))
        said.add(claim.aspect)
    return notes


def general_notes(principle: WorldPrinciple, parsed: ParseResult, *, bad_town: bool, too_much: int) -> list[str]:
    """Returns the remarks on a whole answer that are the same in all tasks: "town" and "long", or none.

    Args:
        principle: what the critic pays attention to.
        parsed: the answer.
        bad_town: whether the answer names another town, or no town where one is required.
        too_much: number of superfluous parts of the answer.
    """
    notes = ["town"] if principle != "<brief>" and bad_town else []
    if principle in ("<brief>", "<overall>") and (too_much or ornaments(parsed)):
        notes.append("long")
    return notes
