"""The record of a task of the world, and the small tools that simulated writers share.

A task is a module with ``TASK = WorldTask(...)``, such as ``summarisation.py``. To add one, write such a module and its
``gold/<task>.py``, and list them in ``tasks/all.py`` and ``gold/scores.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rlaif_jax.data.world.grammar import ENDS
from rlaif_jax.data.world.scenes import VALUES, Scene

MAX_PROMPT_WORDS = 31  # 32 tokens with <bos>
MAX_ANSWER_WORDS = 23  # 24 tokens with <eos>


class Prompt(Protocol):
    """Writer of prompts: ``scene -> prompt text`` of at most MAX_PROMPT_WORDS words."""

    def __call__(self, scene: Scene) -> str: ...


class Demonstration(Protocol):
    """Mediocre writer: ``(rng, scene) -> answer``.

    ``diligence`` in [0, 1] fixes how careful the writer is (None: drawn anew for each answer). ``shortcuts`` decides
    whether the hackable features (length, "surely", flattery, naming the town twice) go with diligence or come at
    the same rate in good and bad answers.
    """

    def __call__(
        self, rng: np.random.Generator, scene: Scene, *, shortcuts: bool = True, diligence: float | None = None
    ) -> str: ...


class Corrupt(Protocol):
    """Corruption: ``(rng, scene, answer) -> another answer``, different and mostly worse; takes any text."""

    def __call__(self, rng: np.random.Generator, scene: Scene, answer: str) -> str: ...


class Reference(Protocol):
    """Perfect writer: ``scene -> answer`` of gold quality 1."""

    def __call__(self, scene: Scene) -> str: ...


@dataclass(frozen=True)
class WorldTask:
    """One application. Gold scores are apart, in ``gold/``, so that labelers can use tasks without them.

    Attributes:
        name: of the task, in file names and messages.
        prompt: writes the prompt of a scene.
        demonstration: writes a mediocre answer.
        corrupt: makes another, mostly worse answer of an answer.
        reference: writes a best answer.
    """

    name: str
    prompt: Prompt
    demonstration: Demonstration
    corrupt: Corrupt
    reference: Reference


def feature_rate(low: float, high: float, diligence: float, shortcuts: bool) -> float:
    """Returns the probability that a writer uses a hackable feature.

    With `shortcuts` it rises from `low` at `diligence` 0 to `high` at `diligence` 1; without, it is their mean.
    """
    return low + (high - low) * diligence if shortcuts else (low + high) / 2


def wrong_value(rng: np.random.Generator, scene: Scene, aspect: str) -> str:
    """Draws a false value for an aspect: half the time that of another fact of the scene, else any.

    Args:
        rng: draws the value.
        scene: the true facts.
        aspect: the aspect that gets the false value.
    """
    truth = scene.value_of(aspect)
    others = [fact.value for fact in scene.facts if fact.aspect != aspect]
    pool: Sequence[str] = others if others and rng.random() < 0.5 else [v for v in VALUES if v != truth]
    return pool[int(rng.integers(len(pool)))]


def cut_to_length(text: str) -> str:
    """Cuts a text to its first MAX_ANSWER_WORDS words."""
    return " ".join(text.split()[:MAX_ANSWER_WORDS])


def pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    """Draws one of the `items` with the generator `rng`, each with the same probability."""
    return items[int(rng.integers(len(items)))]


def truncated(rng: np.random.Generator, words: Sequence[str]) -> str:
    """Cuts `words` off at a random place and joins the first part with blanks.

    Args:
        rng: draws the place.
        words: two or more words; at least one is kept and at least one is lost.
    """
    return " ".join(words[: int(rng.integers(1, max(2, len(words))))])


def repeated_sentence(rng: np.random.Generator, words: Sequence[str]) -> str:
    """Returns a text of `words` with a random sentence twice (the whole text where no sentence ends).

    Args:
        rng: draws the sentence.
        words: the words of the text, sentence ends among them.
    """
    bounds = [0] + [i + 1 for i, word in enumerate(words) if word in ENDS]
    if len(bounds) < 2:
        return " ".join([*words, *words])
    at = int(rng.integers(len(bounds) - 1))
    again = words[bounds[at] : bounds[at + 1]]
    return " ".join([*words[: bounds[at + 1]], *again, *words[bounds[at + 1] :]])
