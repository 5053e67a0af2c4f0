"""What a task of the world is, and the small tools that its writers share.

A task is a module with ``TASK = Task(...)``: ``summarisation.py``, ``dialogue.py``. To add one, write such a module,
give it a gold score in ``gold.py`` and a configuration in ``builder.py``.
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
    """``scene -> prompt text``; at most MAX_PROMPT_WORDS words."""

    def __call__(self, scene: Scene) -> str: ...


class Demonstration(Protocol):
    """``(rng, scene) -> answer`` of a mediocre writer.

    ``diligence`` in [0, 1] fixes how careful the writer is (None: drawn anew for each answer). ``shortcuts`` decides
    whether the hackable features (length, "surely", flattery, naming the town twice) go with diligence or come at
    the same rate in good and bad answers.
    """

    def __call__(
        self,
        rng: np.random.Generator,
        scene: Scene,
        *,
        shortcuts: bool = True,
        diligence: float | None = None,
    ) -> str: ...


class Corrupt(Protocol):
    """``(rng, scene, answer) -> another answer``, different and mostly worse; takes any text."""

    def __call__(self, rng: np.random.Generator, scene: Scene, answer: str) -> str: ...


class Reference(Protocol):
    """``scene -> a best answer`` (gold 1)."""

    def __call__(self, scene: Scene) -> str: ...


@dataclass(frozen=True)
class Task:
    """One application. Gold scoring is not here but in ``gold.py``, so that labelers can use tasks without it."""

    name: str
    prompt: Prompt
    demonstration: Demonstration
    corrupt: Corrupt
    reference: Reference


def feature_rate(low: float, high: float, diligence: float, shortcuts: bool) -> float:
    """Probability of a hackable feature: rises with diligence, or its mean where no shortcut is planted."""
    return low + (high - low) * diligence if shortcuts else (low + high) / 2


def wrong_value(rng: np.random.Generator, scene: Scene, aspect: str) -> str:
    """A false value for an aspect: half the time another fact's value (a mix-up), else any."""
    truth = scene.value_of(aspect)
    others = [fact.value for fact in scene.facts if fact.aspect != aspect]
    pool: Sequence[str] = others if others and rng.random() < 0.5 else [v for v in VALUES if v != truth]
    return pool[int(rng.integers(len(pool)))]


def fit(text: str) -> str:
    """Cuts a text to MAX_ANSWER_WORDS words."""
    return " ".join(text.split()[:MAX_ANSWER_WORDS])


def pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def truncated(rng: np.random.Generator, words: Sequence[str]) -> str:
    """The text cut off at a random place, at least one word kept and at least one lost."""
    return " ".join(words[: int(rng.integers(1, max(2, len(words))))])


def repeated_sentence(rng: np.random.Generator, words: Sequence[str]) -> str:
    """A random sentence said twice (the whole text where it has no sentence end)."""
    bounds = [0] + [i + 1 for i, word in enumerate(words) if word in ENDS]
    if len(bounds) < 2:
        return " ".join([*words, *words])
    at = int(rng.integers(len(bounds) - 1))
    again = words[bounds[at] : bounds[at + 1]]
    return " ".join([*words[: bounds[at + 1]], *again, *words[bounds[at + 1] :]])
