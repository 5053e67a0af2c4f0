"""Exact quality of the answers to any task, and by any principle, in [0, 1].

Labelers and judges may never import this module.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlaif_jax.config import UserError
from rlaif_jax.data.world.gold import base, dialogue, summarisation
from rlaif_jax.data.world.grammar import parse
from rlaif_jax.data.world.labeler_prompts import WorldPrinciple
from rlaif_jax.data.world.scenes import Scene
from rlaif_jax.data.world.tasks.base import MAX_ANSWER_WORDS, WorldTask

GOLD: dict[str, base.GoldTask] = {gold.task.name: gold for gold in (summarisation.GOLD, dialogue.GOLD)}


def gold_task(task: WorldTask) -> base.GoldTask:
    """Returns the exact knowledge about a task. Raises UserError for a task without a gold score."""
    if task.name not in GOLD:
        raise UserError(
            f"task {task.name!r} has no gold score: write data/world/gold/{task.name}.py and list it in "
            "data/world/gold/scores.py"
        )
    return GOLD[task.name]


def gold_score(task: WorldTask, scene: Scene, text: str) -> float:
    """Returns the gold quality of one answer, in [0, 1].

    Args:
        task: the task of the answer.
        scene: the true facts.
        text: the answer; any text is allowed.

    Raises:
        UserError: the task has no gold score.
    """
    return gold_task(task).score(scene, text)


def gold_scores(task: WorldTask, scenes: Sequence[Scene], texts: Sequence[str]) -> np.ndarray:
    """Returns the gold quality of each answer, float32 [B], in [0, 1].

    Args:
        task: the task of all answers.
        scenes: the B scenes.
        texts: the B answers.

    Raises:
        UserError: the lists have two lengths, or the task has no gold score.
    """
    if len(scenes) != len(texts):
        raise UserError(f"gold_scores got {len(scenes)} scenes and {len(texts)} texts: give one scene a text")
    pairs = zip(scenes, texts, strict=True)
    return np.array([gold_score(task, scene, text) for scene, text in pairs], dtype=np.float32)


def principle_score(task: WorldTask, principle: WorldPrinciple, scene: Scene, text: str) -> float:
    """Returns how well an answer keeps one principle, in [0, 1].

    ``<overall>`` is gold itself. ``<faithful>``: nothing false and nothing sealed is said (silence is faithful).
    ``<helpful>``: `GoldTask.helpful`. ``<brief>``: few words, nothing said twice.

    Args:
        task: the task of the answer.
        principle: the principle.
        scene: the true facts.
        text: the answer; any text is allowed.

    Raises:
        UserError: the task has no gold score.
    """
    gold = gold_task(task)
    if principle == "<overall>":
        return gold.score(scene, text)
    parsed = parse(text)
    if principle == "<faithful>":
        if gold.leaks(scene, parsed):
            return 0.0
        return base.clip(1 - base.WRONG * (base.false_claims(scene, parsed) + base.false_names(scene, parsed)))
    if principle == "<helpful>":
        return base.clip(gold.helpful(scene, parsed))
    shortness = 1 - len(parsed.words) / MAX_ANSWER_WORDS
    return base.clip(shortness - base.REPEAT * base.repeats(parsed) - base.ORNAMENT * base.ornaments(parsed))
