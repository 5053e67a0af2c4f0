"""Simulated people with known parameters, who train labelers and test estimators.

Their judgements are never called AI feedback. Each person is a frozen dataclass; a numpy Generator goes in, judgements
come out. They look at exact quality (`gold`) through noise, so nothing that judges a policy may import this module.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from rlaif_jax.config import UserError
from rlaif_jax.data.world.gold.scores import gold_task
from rlaif_jax.data.world.grammar import parse
from rlaif_jax.data.world.labeler_prompts import WorldPrinciple
from rlaif_jax.data.world.scenes import Scene
from rlaif_jax.data.world.tasks.base import WorldTask


@dataclass(frozen=True)
class Comparer:
    """Compares two answers by Bradley-Terry on the difference of their qualities.

    The model is::

        P(first wins) = lapse / 2 + (1 - lapse) sigmoid((q1 - q2) / temperature + first_bias + length_bias (n1 - n2))

    with qualities q in [0, 1] and lengths n in words.

    Attributes:
        temperature: difference of quality that counts as one log-odds.
        first_bias: log-odds in favour of the answer that is read first.
        length_bias: log-odds a word in favour of the longer answer.
        lapse: share of comparisons that are answered by a coin.
    """

    temperature: float = 0.15
    first_bias: float = 0.0
    length_bias: float = 0.0
    lapse: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 <= self.lapse <= 1:
            raise UserError(f"a Comparer needs temperature > 0 and lapse in [0, 1], got {self}")

    def probability(self, first: ArrayLike, second: ArrayLike, longer: ArrayLike = 0.0) -> np.ndarray:
        """Returns the probabilities [...] that the first answer wins, by the equation of the class.

        Args:
            first: [...], qualities of the answers read first, in [0, 1].
            second: [...], qualities of the answers read second.
            longer: [...] or a scalar, the length of the first minus that of the second answer, in words.
        """
        gap = (np.asarray(first, float) - np.asarray(second, float)) / self.temperature
        logit = gap + self.first_bias + self.length_bias * np.asarray(longer, float)
        return self.lapse / 2 + (1 - self.lapse) * expit(logit)

    def compare(
        self, rng: np.random.Generator, first: ArrayLike, second: ArrayLike, longer: ArrayLike = 0.0
    ) -> np.ndarray:
        """Draws the answers that a simulated person prefers.

        Args:
            rng: draws the verdicts.
            first: quality of the first answers, a number or an array.
            second: quality of the second answers.
            longer: how much longer the first answers are, as `probability` takes it.

        Returns:
            An int array of the qualities' shape: 1 where the first answer is preferred, else 2.
        """
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
        """Draws a ranking of each row of answers: returns answer indices, int [..., K], best first.

        Args:
            rng: draws the noise.
            qualities: [..., K], the qualities of K answers, in [0, 1].
        """
        strength = np.asarray(qualities, float) / self.temperature
        return np.argsort(-(strength + rng.gumbel(size=strength.shape)), axis=-1)  # Gumbel noise: Plackett-Luce


@dataclass(frozen=True)
class SimulatedRater:
    """Rates 1 to 10 points: round(5.5 + 9 scale (quality - 1/2) + bias + noise N(0, 1)), clipped."""

    bias: float = 0.0
    scale: float = 1.0
    noise: float = 1.0

    def __post_init__(self) -> None:
        if self.noise < 0:
            raise UserError(f"a SimulatedRater's noise must not be negative, got {self.noise}")

    def rate(self, rng: np.random.Generator, qualities: ArrayLike) -> np.ndarray:
        """Draws a rating, an integer from 1 to 10, of each answer; returns int [...].

        Args:
            rng: draws the noise.
            qualities: [...], the qualities of the answers, in [0, 1].
        """
        quality = np.asarray(qualities, float)
        raw = 5.5 + 9 * self.scale * (quality - 0.5) + self.bias + self.noise * rng.normal(size=quality.shape)
        return np.clip(np.rint(raw), 1, 10).astype(int)


def simulated_raters(
    rng: np.random.Generator, number: int, *, bias_sd: float = 1.0, scale_sd: float = 0.2, noise: float = 1.0
) -> tuple[SimulatedRater, ...]:
    """Returns a crowd whose biases are N(0, bias_sd) and whose scales are exp(N(0, scale_sd)).

    Args:
        rng: draws biases and scales.
        number: raters in the crowd.
        bias_sd: standard deviation of the biases, in points.
        scale_sd: standard deviation of the log scales.
        noise: of each rating, in points.
    """
    biases, scales = rng.normal(0, bias_sd, number), np.exp(rng.normal(0, scale_sd, number))
    return tuple(SimulatedRater(float(bias), float(scale), noise) for bias, scale in zip(biases, scales, strict=True))


@dataclass(frozen=True)
class Commenter:
    """Writes a short critique from templates, such as ``mill old right inn warm wrong long``.

    ``error_rate`` is the chance, for each judged claim, that right and wrong are mixed up.
    """

    error_rate: float = 0.0

    def comment(
        self, rng: np.random.Generator, task: WorldTask, principle: WorldPrinciple, scene: Scene, answer: str
    ) -> str:
        """Returns a judgement of each claim, then of the whole; ``fine`` where neither finds a word.

        Args:
            rng: draws the errors.
            task: the task that the answer is for.
            principle: what the critic pays attention to.
            scene: the truth.
            answer: any text.
        """
        claims, words = gold_task(task).notes(principle, scene, parse(answer))
        judged: list[str] = []
        for what, note in claims if principle != "<brief>" else ():
            if rng.random() < self.error_rate:
                note = "right" if note == "wrong" else "wrong"
            judged += [what, note]
        return " ".join(judged + words) or "fine"


@dataclass(frozen=True)
class Editor:
    """Mends an answer with few changes; ``miss`` is the chance that a mistake goes unseen."""

    miss: float = 0.0

    def edit(self, rng: np.random.Generator, task: WorldTask, scene: Scene, answer: str) -> str:
        """Returns the corrected answer.

        Args:
            rng: draws which mistakes the editor overlooks.
            task: the task of the answer.
            scene: the true facts.
            answer: the answer; any text is allowed.

        Raises:
            UserError: the task has no gold score.
        """
        return gold_task(task).edit(rng, scene, parse(answer), self.miss)
