"""Which questions to ask a person: pairs of answers, a small reward model, an order of asking."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.config import require
from rlaif_jax.data.world.gold import scores as gold
from rlaif_jax.data.world.people import Comparer
from rlaif_jax.data.world.scenes import Split, sample_scene
from rlaif_jax.data.world.tasks.base import WorldTask
from rlaif_jax.data.world.vocabulary import VOCABULARY
from rlaif_jax.feedback.records.forms import sha256
from rlaif_jax.feedback.selection import Selection, choose, ensemble_disagreement, judge_margin
from rlaif_jax.rewards.optimise import capped, newton

Order = Literal["random", "ensemble", "undecided"]

_WORD = {word: i for i, word in enumerate(VOCABULARY)}
_WIDTH = 2 * len(VOCABULARY) + 7


@dataclasses.dataclass(frozen=True)
class AskingConfig:
    """How labels are asked for.

    Attributes:
        start: labels drawn at random before anything is chosen.
        budget: labels at the end.
        growth: each round's budget over the last one's.
        models: members of the ensemble.
        ridge: penalty of the reward model.
        temperature: of the simulated person (see `Comparer`).
        repeats: times of asking for each seed, each with its labels and order.
    """

    start: int = 64
    budget: int = 2000
    growth: float = 1.33
    models: int = 16
    ridge: float = 3.0
    temperature: float = 0.15
    repeats: int = 4

    def __post_init__(self) -> None:
        require(8 <= self.start < self.budget, f"start must lie in 8 .. budget ({self.budget}), not {self.start}")
        require(self.repeats >= 1, f"repeats must be >= 1, not {self.repeats}")
        require(self.growth > 1, f"growth must be > 1, not {self.growth}")
        require(self.models >= 2 and self.ridge > 0, "an ensemble needs models >= 2, the reward model a ridge > 0")

    @property
    def budgets(self) -> list[int]:
        """Labels at the end of each round."""
        found = [self.start]
        while found[-1] < self.budget:
            found.append(min(self.budget, max(found[-1] + 1, round(found[-1] * self.growth))))
        return found


# ---- Pairs and what the reward model sees of them


def features(prompt: str, answer: str) -> np.ndarray:
    """Computes [2 V + 7] numbers of an answer, float32: what a linear reward model can learn from.

    They are its words; the words after the places of the prompt where its word pairs come from (so that it can be learned
    what matters); its length, repeats, and how much of it is in the prompt.
    """
    said, words = prompt.split(), answer.split()
    after = {(said[i], said[i + 1]): said[i + 2] for i in range(len(said) - 2)}
    size = len(VOCABULARY)
    x = np.zeros(_WIDTH, np.float32)
    for word, count in Counter(words).items():
        x[_WORD[word]] += count
        x[2 * size + 1] += count - 1
    seen: set[tuple[str, str]] = set()
    for pair in itertools.pairwise(words):
        if pair in seen:
            x[2 * size + 2] += 1
        elif pair in after:
            seen.add(pair)
            x[size + _WORD[after[pair]]] += 1
            x[2 * size + 3] += 1
        else:
            x[2 * size + 4] += 1
    x[2 * size] = len(words)
    x[2 * size + 5] = sum(word in said for word in words)
    x[2 * size + 6] = bool(words) and words[-1] in (".", "?")
    return x


class Pairs(NamedTuple):
    """n pairs of answers.

    Attributes:
        x: [n, F] differences of their features.
        gap: [n] differences of their gold scores.
        prompts: the prompt of each.
        items: a key of each.
    """

    x: np.ndarray
    gap: np.ndarray
    prompts: list[str]
    items: list[str]


def make_pairs(rng: np.random.Generator, task: WorldTask, split: Split, count: int, scale: np.ndarray | None) -> Pairs:
    """Returns all six pairs of four answers to each prompt: two demonstrations and a corruption of each.

    Pairs of equal answers are left out.

    Args:
        rng: draws prompts and answers.
        task: the world's task.
        split: of the prompts.
        count: number of prompts.
        scale: [F] factors of the features; None: all 1.
    """
    rows, gaps, prompts, items = [], [], [], []
    for _ in range(count):
        scene = sample_scene(0, split, int(rng.integers(1_000_000)))
        prompt = task.prompt(scene)
        written = [task.demonstration(rng, scene, shortcuts=False) for _ in range(2)]
        answers = written + [task.corrupt(rng, scene, text) for text in written]
        seen = [features(prompt, text) for text in answers]
        quality = [gold.gold_score(task, scene, text) for text in answers]
        for i, j in itertools.combinations(range(len(answers)), 2):
            if answers[i] != answers[j]:
                rows.append(seen[i] - seen[j])
                gaps.append(quality[i] - quality[j])
                prompts.append(prompt)
                items.append(sha256([prompt, sorted((answers[i], answers[j]))]))
    x = np.stack(rows)
    return Pairs(x if scale is None else x * scale, np.array(gaps), prompts, items)


def pool_and_test(seed: int, task: WorldTask, prompts: int, test_prompts: int) -> tuple[Pairs, Pairs]:
    """Returns (pairs about training towns to ask about, pairs about held-out towns to test on).

    The features of both are scaled by the spread of the first.

    Args:
        seed: of prompts and answers.
        task: the world's task.
        prompts: number of prompts of the first pairs.
        test_prompts: number of prompts of the second pairs.
    """
    rng = np.random.default_rng((seed, 0))
    raw = make_pairs(rng, task, "train", prompts, None)
    scale = 1 / np.maximum(raw.x.std(0), 0.2).astype(np.float32)  # of inputs alone: no label is needed for it
    return raw._replace(x=raw.x * scale), make_pairs(rng, task, "test_entities", test_prompts, scale)


# ---- The reward model


@partial(jax.jit, static_argnames="steps")
def fit_rewards(x: jax.Array, wins: jax.Array, weights: jax.Array, ridge: float, *, steps: int = 10) -> jax.Array:
    """Fits linear Bradley-Terry reward models by Newton's method and returns their coefficients [M, F].

    Minimises sum_n w_n CE(wins_n, sigmoid(x_n c)) + ridge / 2 |c|^2.

    Args:
        x: [n, F] differences of features.
        wins: [n], 1 where the first answer won.
        weights: [M, n] of each comparison in each model.
        ridge: the penalty.
        steps: Newton steps.
    """

    def one(weight: jax.Array) -> jax.Array:
        def gradient(c: jax.Array) -> jax.Array:
            return x.T @ (weight * (jax.nn.sigmoid(x @ c) - wins)) + ridge * c

        def curvature(c: jax.Array) -> jax.Array:
            p = jax.nn.sigmoid(x @ c)
            return (x * (weight * p * (1 - p))[:, None]).T @ x + ridge * jnp.eye(x.shape[1])

        start = jnp.zeros(x.shape[1])
        return newton(gradient, curvature, start, damping=capped, max_steps=steps, tolerance=0.0)[0]

    return jax.lax.map(one, weights)


def accuracy(coefficients: np.ndarray, pairs: Pairs) -> float:
    """Returns the share of pairs that a linear reward model orders as the gold score does.

    Pairs of equal gold are left out.

    Args:
        coefficients: [F], the weights of the reward model.
        pairs: features [n, F] and gold differences [n].
    """
    decided = pairs.gap != 0
    return float(np.mean((pairs.x @ coefficients > 0)[decided] == (pairs.gap > 0)[decided]))


# ---- Asking


def accuracy_curve(config: AskingConfig, order: Order, seed: int, repeat: int, pool: Pairs, test: Pairs) -> list[float]:
    """Returns the reward model's accuracy at each budget when questions are asked in one order.

    All orders of a seed and repeat get the same answers to a question.

    Args:
        config: how labels are asked for.
        order: `random`; `ensemble`: where the ensemble disagrees; `undecided`: where its mean is undecided.
        seed: of the simulated person's answers and of the draws.
        repeat: which time of asking, in 0 .. repeats - 1.
        pool: the pairs to ask about.
        test: the pairs to measure on.
    """
    rng = np.random.default_rng((seed, 1, repeat))
    answers = Comparer(config.temperature).compare(rng, pool.gap, np.zeros(len(pool.gap)))
    wins = (answers == 1).astype(np.float32)  # what the person would say of each pair; read only when asked
    resampling = np.random.default_rng((seed, 2, repeat))
    asked: list[int] = []
    found = []
    margins: np.ndarray | None = None
    for number, budget in enumerate(config.budgets):
        left = np.setdiff1d(np.arange(len(wins)), asked)
        signals: dict[str, np.ndarray] = {}
        if margins is not None and order == "ensemble":
            signals = {"ensemble disagreement": ensemble_disagreement(margins[:, left])}
        elif margins is not None and order == "undecided":
            signals = {"judge margin": judge_margin(np.asarray(jax.nn.sigmoid(margins[:, left])).mean(0))}
        chosen = choose(
            budget - len(asked),
            signals,
            prompts=[pool.prompts[i] for i in left],
            items=[pool.items[i] for i in left],
            asked=Counter(pool.items[i] for i in asked),
            seed=(seed * config.repeats + repeat) * 1000 + number,
            selection=Selection(hard=0.9),
        )
        asked += left[[choice.index for choice in chosen]].tolist()
        x, y = pool.x[asked], wins[asked]
        found.append(accuracy(np.asarray(fit_rewards(x, y, np.ones((1, len(y)), np.float32), config.ridge))[0], test))
        if order != "random" and budget < config.budget:
            weights = resampling.exponential(size=(config.models, len(y))).astype(np.float32)
            margins = np.asarray(fit_rewards(x, y, weights, config.ridge)) @ pool.x.T
    return found
