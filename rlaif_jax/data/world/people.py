"""Simulated people with known parameters: they train labelers and test estimators, and are never called AI feedback.

Each is a frozen dataclass; a numpy Generator goes in, judgements come out. They look at exact quality (gold.py)
through noise, so nothing that judges a policy may import this module.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from rlaif_jax.config import UserError
from rlaif_jax.data.world.gold import scores as gold
from rlaif_jax.data.world.grammar import CONFIDENCE, FLATTERY, SEALED, parse, summary
from rlaif_jax.data.world.scenes import SALIENCE_WORDS, Scene
from rlaif_jax.data.world.tasks.base import Task
from rlaif_jax.data.world.tasks.dialogue import reply
from rlaif_jax.data.world.tasks.summarisation import MAX_FACTS
from rlaif_jax.data.world.templates import Principle


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))


@dataclass(frozen=True)
class Comparer:
    """Compares two answers by Bradley-Terry on the difference of their qualities.

    P(first wins) = lapse / 2 + (1 - lapse) sigmoid((q1 - q2) / temperature + first_bias + length_bias (n1 - n2)),
    q in [0, 1], n in words: ``first_bias`` favours the answer read first, ``length_bias`` (log-odds a word) the
    longer one, ``lapse`` is the share of comparisons answered by a coin.
    """

    temperature: float = 0.15
    first_bias: float = 0.0
    length_bias: float = 0.0
    lapse: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 <= self.lapse <= 1:
            raise UserError(f"a Comparer needs temperature > 0 and lapse in [0, 1], got {self}")

    def probability(self, first: ArrayLike, second: ArrayLike, longer: ArrayLike = 0.0) -> np.ndarray:
        """P(first wins) for arrays of qualities of one shape; ``longer`` is n1 - n2 in words."""
        gap = (np.asarray(first, float) - np.asarray(second, float)) / self.temperature
        logit = gap + self.first_bias + self.length_bias * np.asarray(longer, float)
        return self.lapse / 2 + (1 - self.lapse) * _sigmoid(logit)

    def compare(
        self, rng: np.random.Generator, first: ArrayLike, second: ArrayLike, longer: ArrayLike = 0.0
    ) -> np.ndarray:
        """1 where the first answer was preferred, else 2; int array of the qualities' shape."""
        chance = self.probability(first, second, longer)
        return np.where(rng.random(chance.shape) < chance, 1, 2)


@dataclass(frozen=True)
class Ranker:
    """Ranks K answers by Plackett-Luce with strengths exp(quality / temperature)."""

    temperature: float = 0.15

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(f"a Ranker needs temperature > 0, got {self.temperature}")

    def rank(self, rng: np.random.Generator, qualities: ArrayLike) -> np.ndarray:
        """Answer indices, best first: [..., K] qualities -> int [..., K]. (Gumbel noise sorts like Plackett-Luce.)"""
        strength = np.asarray(qualities, float) / self.temperature
        return np.argsort(-(strength + rng.gumbel(size=strength.shape)), axis=-1)


@dataclass(frozen=True)
class Rater:
    """Rates 1-10: round(5.5 + 9 scale (quality - 1/2) + bias + noise N(0, 1)), cut to 1..10; units are points."""

    bias: float = 0.0
    scale: float = 1.0
    noise: float = 1.0

    def __post_init__(self) -> None:
        if self.noise < 0:
            raise UserError(f"a Rater's noise must not be negative, got {self.noise}")

    def rate(self, rng: np.random.Generator, qualities: ArrayLike) -> np.ndarray:
        """Ratings, int array of the qualities' shape."""
        quality = np.asarray(qualities, float)
        raw = 5.5 + 9 * self.scale * (quality - 0.5) + self.bias + self.noise * rng.normal(size=quality.shape)
        return np.clip(np.rint(raw), 1, 10).astype(int)


def raters(
    rng: np.random.Generator, number: int, *, bias_sd: float = 1.0, scale_sd: float = 0.2, noise: float = 1.0
) -> tuple[Rater, ...]:
    """A crowd whose biases are N(0, bias_sd) and whose scales are exp(N(0, scale_sd))."""
    biases, scales = rng.normal(0, bias_sd, number), np.exp(rng.normal(0, scale_sd, number))
    return tuple(Rater(float(bias), float(scale), noise) for bias, scale in zip(biases, scales, strict=True))


def _claim_notes(task: Task, principle: Principle, scene: Scene, answer: str) -> list[tuple[str, str]]:
    """(what, judgement) for each claim and refusal of an answer, in order."""
    parsed = parse(answer)
    notes: list[tuple[str, str]] = []
    said: set[str] = set()
    for claim in parsed.claims:
        if scene.value_of(claim.aspect) != claim.value:
            note = "wrong"
        elif task.name == "dialogue" and scene.is_sealed(claim.aspect):
            note = "leak"
        elif claim.aspect in said:
            note = "again"
        elif task.name == "summarisation" and principle in ("<helpful>", "<overall>"):
            note = SALIENCE_WORDS[scene.salience_of(claim.aspect) - 1]
        else:
            note = "right"
        notes.append((f"{claim.aspect} {claim.value}", note))
        said.add(claim.aspect)
    if task.name == "dialogue":
        refused = [str(sentence.aspect) for sentence in parsed.sentences if sentence.kind == "refuse"]
        notes += [(f"{aspect} {SEALED}", "right" if scene.is_sealed(aspect) else "wrong") for aspect in refused]
    return notes


def _general_notes(task: Task, principle: Principle, scene: Scene, answer: str) -> list[str]:
    """Words about the answer as a whole."""
    parsed = parse(answer)
    notes = []
    if principle != "<brief>" and (
        gold.false_names(scene, parsed) or (task.name == "summarisation" and not parsed.names)
    ):
        notes.append("town")
    too_much = gold.overlong(parsed) if task.name == "summarisation" else gold.besides(scene, parsed)
    if principle in ("<brief>", "<overall>") and (too_much or gold.ornaments(parsed)):
        notes.append("long")
    if task.name == "dialogue" and principle in ("<helpful>", "<overall>"):
        if not gold.acknowledges(scene, parsed):
            notes.append("rude")
        if not gold.follows_up(parsed):
            notes.append("curt")
    return notes


@dataclass(frozen=True)
class Commenter:
    """Writes a short critique from templates, such as ``mill old right inn warm wrong long``.

    ``error_rate`` is the chance, for each judged claim, that right and wrong are mixed up.
    """

    error_rate: float = 0.0

    def comment(self, rng: np.random.Generator, task: Task, principle: Principle, scene: Scene, answer: str) -> str:
        """Judges each claim, then the whole; ``fine`` where there is nothing to say."""
        words: list[str] = []
        if principle != "<brief>":
            for what, note in _claim_notes(task, principle, scene, answer):
                if rng.random() < self.error_rate:
                    note = "right" if note == "wrong" else "wrong"
                words += [what, note]
        words += _general_notes(task, principle, scene, answer)
        return " ".join(words) if words else "fine"


def _edit_summary(rng: np.random.Generator, scene: Scene, answer: str, miss: float) -> str:
    parsed = parse(answer)
    told = [(claim.aspect, claim.value) for claim in parsed.claims]
    kept: list[tuple[str, str]] = []
    for aspect, value in told:
        truth = scene.value_of(aspect)
        if rng.random() < miss:
            kept.append((aspect, value))
        elif truth is not None and all(aspect != other for other, _ in kept):
            kept.append((aspect, truth))  # a repeated or an invented aspect goes, a false value is mended
    while len(kept) > MAX_FACTS and rng.random() >= miss:
        kept.remove(min(kept, key=lambda fact: scene.salience_of(fact[0])))
    unsaid = [fact for fact in scene.facts if all(fact.aspect != aspect for aspect, _ in kept)]
    if unsaid:
        best = max(unsaid, key=lambda fact: fact.salience)
        if len(kept) < min(2, len(told)) or not kept:
            kept.append((best.aspect, best.value))
        elif rng.random() >= miss:  # the one swap that gains most
            worst = min(range(len(kept)), key=lambda i: scene.salience_of(kept[i][0]))
            if scene.salience_of(kept[worst][0]) < best.salience:
                kept[worst] = (best.aspect, best.value)
    return summary(kept, scene.entity, confident=parsed.confidence > 0, flatter=parsed.flattery > 0)


def _edit_reply(rng: np.random.Generator, scene: Scene, answer: str, miss: float) -> str:
    parsed = parse(answer)
    if gold.answers(scene, parsed) or rng.random() >= miss:
        value = None if scene.is_sealed(scene.question) else scene.value_of(scene.question)
    else:  # leaves the slip as it is
        value = parsed.claims[0].value if parsed.claims else None
    acknowledge = gold.acknowledges(scene, parsed) or rng.random() >= miss
    follow_up = gold.follows_up(parsed) or rng.random() >= miss
    return reply(
        scene.question,
        value,
        acknowledge=bool(acknowledge),
        follow_up=bool(follow_up),
        confident=CONFIDENCE in parsed.words,
        flatter=FLATTERY[0] in parsed.words,
    )


@dataclass(frozen=True)
class Editor:
    """Mends an answer with few changes; ``miss`` is the chance that a mistake goes unseen."""

    miss: float = 0.0

    def edit(self, rng: np.random.Generator, task: Task, scene: Scene, answer: str) -> str:
        """The corrected answer; takes any text. Raises UserError for a task that it cannot edit."""
        match task.name:
            case "summarisation":
                return _edit_summary(rng, scene, answer, self.miss)
            case "dialogue":
                return _edit_reply(rng, scene, answer, self.miss)
        raise UserError(f"the world's Editor knows summarisation and dialogue, not {task.name!r}")
