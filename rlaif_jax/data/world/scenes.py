"""Scenes: what is true about one invented moor town.

A scene is a pure function of ``(seed, split, index)``. The town's name is a pair of syllables; every syllable is
trained, but the *pairs* of ``test_entities`` never occur in training. In the same way the (aspect, value) pairs of
``test_combinations`` never occur in training though each word of them does, and ``test_length`` holds scenes with
more facts than any training scene.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from rlaif_jax.config import UserError

Split = Literal["train", "test_entities", "test_combinations", "test_length"]
SPLITS: tuple[Split, ...] = get_args(Split)

SYLLABLES: tuple[str, ...] = (
    "ash", "bren", "cor", "dal", "el", "fen", "gar", "hol", "ister", "jor",
    "kel", "lin", "mor", "nor", "oak", "pel", "rud", "sel", "tarn", "wick",
)  # fmt: skip

ASPECTS: tuple[str, ...] = (
    "mill", "inn", "river", "market", "bridge", "tower", "chapel", "road", "well", "garden", "forge", "wharf",
)  # fmt: skip

VALUES_BY_POLARITY: tuple[tuple[int, tuple[str, ...]], ...] = (
    (-2, ("ruined", "foul", "haunted", "cursed")),
    (-1, ("damp", "narrow", "noisy", "dull")),
    (0, ("old", "plain", "grey", "round")),
    (1, ("warm", "tidy", "wide", "quiet")),
    (2, ("splendid", "bright", "famous", "golden")),
)
VALUES: tuple[str, ...] = tuple(value for _, values in VALUES_BY_POLARITY for value in values)
SALIENCE_WORDS: tuple[str, ...] = ("minor", "notable", "vital")  # salience 1, 2, 3

TRAIN_FACTS = (2, 3, 4, 5, 6)  # facts in a scene, and how often each number is drawn
TRAIN_FACTS_PROBABILITY = (0.05, 0.10, 0.20, 0.30, 0.35)
LONG_FACTS = 7  # the longest scene whose dialogue prompt still leaves room for <bos> in 32 tokens
SALIENCE_PROBABILITY = (0.4, 0.3, 0.3)
QUESTION_SEALED_PROBABILITY = 0.35
OTHER_SEALED_PROBABILITY = 0.25
EARLIER_TURN_PROBABILITY = 0.5

_POLARITY = {value: polarity for polarity, values in VALUES_BY_POLARITY for value in values}
_SIDE_NAME = len(SYLLABLES)


@dataclass(frozen=True)
class Fact:
    """One truth: ``entity``'s ``aspect`` is ``value``; salience 1 to 3, polarity (goodness) -2 to 2."""

    entity: str
    aspect: str
    value: str
    salience: int
    polarity: int


@dataclass(frozen=True)
class Scene:
    """A town's facts, of distinct aspects and distinct values.

    Attributes:
        facts: the truth, in the order of the prompt.
        sealed: aspects that a reply must keep secret (dialogue only, as all that follows).
        question: the aspect asked about.
        earlier: an aspect asked about one turn before, or None.
    """

    facts: tuple[Fact, ...]
    sealed: tuple[str, ...] = ()
    question: str = ""
    earlier: str | None = None

    @property
    def entity(self) -> str:
        """Returns the town's name: two syllables with a space between them."""
        return self.facts[0].entity

    def value_of(self, aspect: str) -> str | None:
        """Returns the true value of an aspect, or None where the scene says nothing about it."""
        return next((fact.value for fact in self.facts if fact.aspect == aspect), None)

    def salience_of(self, aspect: str) -> int:
        """Returns the salience 1 to 3 of an aspect; 0 where the scene says nothing about it."""
        return next((fact.salience for fact in self.facts if fact.aspect == aspect), 0)

    def is_sealed(self, aspect: str) -> bool:
        """Returns whether a reply must keep the aspect secret."""
        return aspect in self.sealed


def is_test_name(first: int, second: int) -> bool:
    """Returns whether a town's name is held out: one in five, balanced over both syllables.

    `first` and `second` are the numbers of its syllables.
    """
    return (first + 2 * second) % 5 == 0


def is_test_combination(aspect: int, value: int) -> bool:
    """Returns whether a pair (aspect number, value number) is held out: two of 20 values for each aspect."""
    return (3 * aspect + value) % 10 == 0


def names(test: bool) -> tuple[str, ...]:
    """Returns all town names of training, or with `test` all that only the split ``test_entities`` has."""
    return tuple(
        f"{SYLLABLES[i]} {SYLLABLES[j]}"
        for i in range(_SIDE_NAME)
        for j in range(_SIDE_NAME)
        if i != j and is_test_name(i, j) == test
    )


def combinations(test: bool) -> tuple[tuple[str, str], ...]:
    """Returns all (aspect, value) pairs of training, or with `test` those of ``test_combinations`` only."""
    return tuple(
        (aspect, value)
        for i, aspect in enumerate(ASPECTS)
        for j, value in enumerate(VALUES)
        if is_test_combination(i, j) == test
    )


def _draw_values(rng: np.random.Generator, aspects: list[int], held_out_at: int | None) -> list[int]:
    """Draws distinct values for aspects from training pairs, but a held-out pair at ``held_out_at``."""
    chosen: list[int] = [-1] * len(aspects)
    order = rng.permutation(len(VALUES)).tolist()
    positions = list(range(len(aspects)))
    if held_out_at is not None:  # first, while every value is still free
        positions.remove(held_out_at)
        positions.insert(0, held_out_at)
    for position in positions:
        want_test = position == held_out_at
        value = next(v for v in order if is_test_combination(aspects[position], v) == want_test)
        order.remove(value)
        chosen[position] = value
    return chosen


def sample_scene(seed: int, split: Split, index: int) -> Scene:
    """Returns the ``index``-th scene of a split: the same for the same three arguments, on every machine.

    Raises UserError for an unknown split or a negative seed or index.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} of the world: use one of {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise UserError(f"the world's seed and index must not be negative, got seed={seed}, index={index}")
    rng = np.random.default_rng(np.random.SeedSequence([seed, SPLITS.index(split), index]))

    while True:
        first, second = rng.integers(_SIDE_NAME, size=2).tolist()
        if first != second and is_test_name(first, second) == (split == "test_entities"):
            break
    entity = f"{SYLLABLES[first]} {SYLLABLES[second]}"

    if split == "test_length":
        number = LONG_FACTS
    else:
        number = TRAIN_FACTS[int(np.searchsorted(np.cumsum(TRAIN_FACTS_PROBABILITY)[:-1], rng.random(), "right"))]
    aspects = rng.permutation(len(ASPECTS))[:number].tolist()
    values = _draw_values(rng, aspects, int(rng.integers(number)) if split == "test_combinations" else None)
    salience = np.searchsorted(np.cumsum(SALIENCE_PROBABILITY)[:-1], rng.random(number), "right") + 1
    facts = tuple(
        Fact(entity, ASPECTS[a], VALUES[v], int(s), _POLARITY[VALUES[v]])
        for a, v, s in zip(aspects, values, salience, strict=True)
    )

    asked = int(rng.integers(number))
    chance = np.where(np.arange(number) == asked, QUESTION_SEALED_PROBABILITY, OTHER_SEALED_PROBABILITY)
    sealed = tuple(fact.aspect for fact, hide in zip(facts, rng.random(number) < chance, strict=True) if hide)
    earlier = None
    # The longest scenes leave no room in the prompt for an earlier turn.
    if rng.random() < EARLIER_TURN_PROBABILITY and number < LONG_FACTS:
        earlier = facts[(asked + 1 + int(rng.integers(number - 1))) % number].aspect
    return Scene(facts, sealed, facts[asked].aspect, earlier)


def scene_to_json(scene: Scene) -> str:
    """Returns the scene as one line of JSON, which `scene_from_json` reads."""
    return json.dumps(asdict(scene), separators=(",", ":"))


def scene_from_json(text: str) -> Scene:
    """Returns the scene that `scene_to_json` wrote. Raises UserError for any other text."""
    try:
        fields: dict[str, Any] = json.loads(text)
        facts = tuple(Fact(**fact) for fact in fields["facts"])
        return Scene(facts, tuple(fields["sealed"]), fields["question"], fields["earlier"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"not a scene of the world in JSON ({error}): {text[:80]!r}") from error
