"""Does choosing what to ask save labels? Random order against chosen order, on the built-in text world.

    python experiments/what_to_ask.py --seeds 5 --out runs/what_to_ask

A pool of pairs of answers (demonstrations and corrupted ones, as they come: near ties, repeats and easy cases among them)
about training towns; a simulated person compares them, at the price of one label each. A small reward model learns from the
labels so far, and its accuracy against the world's gold score is measured on pairs about towns that never occurred. Three
orders of asking, each from as many labels drawn at random, by feedback/selection.py: random; where an ensemble of reward
models disagrees (this is the claim); and where it is undecided as a whole, which asks for toss-ups, too.

The question: how many labels does a chosen order need for the accuracy that the random order ends with, and how many did
the random order itself need for it? Both are read off their curves by one rule. A curve is the mean of several times of
asking, each with answers and draws of its own, smoothed to the nearest one that never falls (isotonic regression: more
labels do not hurt, on average), so that no single dip decides. Between budgets it is interpolated in the logarithm. An
order that never gets there is charged the whole budget.

The reward model is linear in what the words of an answer are and share with its prompt (`features`), fitted by Newton's
method on the device; the ensemble is its Bayesian bootstrap. Expected: see experiments/RESULTS.md.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.config import require
from rlaif_jax.data.world.gold import scores as gold
from rlaif_jax.data.world.people import Comparer
from rlaif_jax.data.world.scenes import sample_scene
from rlaif_jax.data.world.tasks import summarisation
from rlaif_jax.data.world.tasks.base import WorldTask
from rlaif_jax.data.world.vocabulary import VOCABULARY
from rlaif_jax.feedback.records.forms import sha256
from rlaif_jax.feedback.selection import Selection, choose, ensemble_disagreement, judge_margin
from rlaif_jax.rewards.optimise import capped, newton
from rlaif_jax.run import Run, command_line

ORDERS = ("random", "ensemble", "undecided")
_WORD = {word: i for i, word in enumerate(VOCABULARY)}
_WIDTH = 2 * len(VOCABULARY) + 7


@dataclasses.dataclass(frozen=True)
class AskConfig:
    """All settings.

    seed: the first of `seeds` seeds; each draws its own towns, held-out ones too, answers, labels and orders. repeats: of
    the asking for each seed, with labels and orders of their own. prompts: of the pool, four answers each, six pairs.
    test_prompts: of held-out towns. budget: labels at the end; start: labels drawn at random
    before anything is chosen; growth: each round's budget over the last one's. models: of the ensemble. ridge: penalty of
    the reward model. temperature: of the simulated person (see `Comparer`).
    """

    seed: int = 0
    seeds: int = 5
    repeats: int = 4
    out: Path = Path("runs/what_to_ask")
    prompts: int = 1500
    test_prompts: int = 4000
    start: int = 64
    budget: int = 2000
    growth: float = 1.33
    models: int = 16
    ridge: float = 3.0
    temperature: float = 0.15

    def __post_init__(self) -> None:
        require(self.seeds >= 2, f"seeds must be >= 2 for an interval, not {self.seeds}")
        require(self.repeats >= 1, f"repeats must be >= 1, not {self.repeats}")
        require(8 <= self.start < self.budget, f"start must lie in 8 .. budget ({self.budget}), not {self.start}")
        require(self.growth > 1, f"growth must be > 1, not {self.growth}")
        require(self.models >= 2 and self.ridge > 0, "an ensemble needs models >= 2, the reward model a ridge > 0")
        require(self.test_prompts >= 1, "test_prompts must be >= 1")
        most = 6 * self.prompts
        require(self.budget <= self.prompts * 3, f"budget must be <= half of the pool's {most} pairs: raise prompts")


def get_config() -> AskConfig:
    """The default settings."""
    return AskConfig()


# ---- Pairs and what the reward model sees of them


def features(prompt: str, answer: str) -> np.ndarray:
    """[2 V + 7] numbers of an answer of the world: its words; which words stand before the places of the prompt that its
    word pairs come from (so that it can be learned what matters); length, repeats, what is in the prompt and what is not.
    """
    said, words = prompt.split(), answer.split()
    before = {(said[i], said[i + 1]): said[i - 1] for i in range(1, len(said) - 1)}
    size = len(VOCABULARY)
    x = np.zeros(_WIDTH, np.float32)
    for word, count in Counter(words).items():
        x[_WORD[word]] += count
        x[2 * size + 1] += count - 1
    told: set[tuple[str, str]] = set()
    for pair in itertools.pairwise(words):
        if pair in told:
            x[2 * size + 2] += 1
        elif pair in before:
            told.add(pair)
            x[size + _WORD[before[pair]]] += 1
            x[2 * size + 3] += 1
        else:
            x[2 * size + 4] += 1
    x[2 * size] = len(words)
    x[2 * size + 5] = sum(word in said for word in words)
    x[2 * size + 6] = bool(words) and words[-1] in (".", "?")
    return x


class Pairs(NamedTuple):
    """n pairs of answers: difference of their features [n, F] and of gold [n], the prompt and item of each."""

    x: np.ndarray
    gap: np.ndarray
    prompts: list[str]
    items: list[str]


def make_pairs(rng: np.random.Generator, task: WorldTask, split: Any, count: int, scale: np.ndarray | None) -> Pairs:
    """All six pairs of four answers to each of `count` prompts: two writers' and a corruption of each. Pairs of equal
    answers are none. scale [F]: what features are divided by; None: not at all."""
    rows, gaps, prompts, items = [], [], [], []
    for _ in range(count):
        scene = sample_scene(0, split, int(rng.integers(1_000_000)))
        prompt = task.prompt(scene)
        written = [task.demonstration(rng, scene, shortcuts=False) for _ in range(2)]
        answers = written + [task.corrupt(rng, scene, text) for text in written]
        seen = [features(prompt, text) for text in answers]
        worth = [gold.gold_score(task, scene, text) for text in answers]
        for i, j in itertools.combinations(range(len(answers)), 2):
            if answers[i] != answers[j]:
                rows.append(seen[i] - seen[j])
                gaps.append(worth[i] - worth[j])
                prompts.append(prompt)
                items.append(sha256([prompt, sorted((answers[i], answers[j]))]))
    x = np.stack(rows)
    return Pairs(x if scale is None else x * scale, np.array(gaps), prompts, items)


# ---- The reward model


@partial(jax.jit, static_argnames="steps")
def fit_rewards(x: jax.Array, wins: jax.Array, weights: jax.Array, ridge: float, *, steps: int = 10) -> jax.Array:
    """Bradley-Terry by Newton's method: coefficients [M, F] of rewards linear in the features, one row a model.

    x [n, F] differences of features, wins [n] (1: the first answer won), weights [M, n] of each comparison in each model.
    Minimises sum_n w_n CE(wins_n, sigmoid(x_n c)) + ridge / 2 |c|^2.
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
    """Share of the pairs with different gold that the reward model orders as gold does."""
    decided = pairs.gap != 0
    return float(np.mean((pairs.x @ coefficients > 0)[decided] == (pairs.gap > 0)[decided]))


# ---- Asking


def budgets(config: AskConfig) -> list[int]:
    """Labels at the end of each round."""
    found = [config.start]
    while found[-1] < config.budget:
        found.append(min(config.budget, max(found[-1] + 1, round(found[-1] * config.growth))))
    return found


def curve(config: AskConfig, order: str, seed: int, repeat: int, pool: Pairs, test: Pairs) -> list[float]:
    """Accuracy of the reward model at each budget when questions are asked in this order. All orders of a seed and repeat
    hear the same answers."""
    rng = np.random.default_rng((seed, 1, repeat))
    answers = Comparer(config.temperature).compare(rng, pool.gap, np.zeros(len(pool.gap)))
    wins = (answers == 1).astype(np.float32)  # what the person would say of each pair; told only when asked
    resampling = np.random.default_rng((seed, 2, repeat))
    asked: list[int] = []
    found = []
    margins: np.ndarray | None = None
    for number, budget in enumerate(budgets(config)):
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


def smoothed(curves: list[list[float]]) -> list[float]:
    """The mean of curves of accuracy, made the nearest one that never falls."""
    from scipy.optimize import isotonic_regression

    return [float(value) for value in isotonic_regression(np.mean(curves, 0)).x]


def labels_to_reach(target: float, labels: list[int], accuracies: list[float]) -> float | None:
    """The labels from which on the accuracy is `target` or more, interpolated in log labels; None: not in this budget."""
    below = [i for i, value in enumerate(accuracies) if value < target]
    if not below:
        return float(labels[0])
    last = below[-1]
    if last + 1 == len(labels):
        return None
    low, high = accuracies[last], accuracies[last + 1]
    share = (target - low) / (high - low)
    return math.exp((1 - share) * math.log(labels[last]) + share * math.log(labels[last + 1]))


def saving(needed: float | None, random: float, budget: int) -> float:
    """Share of the random order's labels that another one did without. None: it did not get there in the whole budget, so
    this is the most that it can have saved, 0 or less."""
    return 1 - (budget if needed is None else needed) / random


def t_interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high): Student's 95 % interval, for there are only a few seeds."""
    from scipy.stats import t

    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
    half = float(t.ppf(0.975, len(values) - 1)) * error
    return mean, mean - half, mean + half


def main(config: AskConfig) -> None:
    with Run(config.out, "what_to_ask", config, seed=config.seed) as run:
        what_to_ask(config, run)


def what_to_ask(config: AskConfig, run: Run) -> None:
    task, labels = summarisation.TASK, budgets(config)
    curves: dict[str, list[list[list[float]]]] = {order: [] for order in ORDERS}
    for seed in range(config.seed, config.seed + config.seeds):
        rng = np.random.default_rng((seed, 0))
        raw = make_pairs(rng, task, "train", config.prompts, None)
        scale = 1 / np.maximum(raw.x.std(0), 0.2).astype(np.float32)  # of inputs alone: no label is needed for it
        pool = raw._replace(x=raw.x * scale)
        test = make_pairs(rng, task, "test_entities", config.test_prompts, scale)
        for order in ORDERS:
            repeats = range(config.repeats)
            curves[order].append([curve(config, order, seed, repeat, pool, test) for repeat in repeats])
            run.settled()
        ends = {order: np.mean([c[-1] for c in curves[order][-1]]) for order in ORDERS}
        print(f"seed {seed}: " + ", ".join(f"{order} {end:.3f}" for order, end in ends.items()), flush=True)

    # ---- Labels to the accuracy that the random order ends with
    saved: dict[str, list[float]] = {order: [] for order in ORDERS[1:]}
    reached: dict[str, list[float | None]] = {order: [] for order in ORDERS}
    for number in range(config.seeds):
        smooth = {order: smoothed(curves[order][number]) for order in ORDERS}
        needs = {order: labels_to_reach(smooth["random"][-1], labels, smooth[order]) for order in ORDERS}
        random = needs["random"]
        assert random is not None  # its own last value is the target
        for order in ORDERS:
            reached[order].append(needs[order])
        for order in ORDERS[1:]:
            saved[order].append(saving(needs[order], random, config.budget))
    print(f"\naccuracy, mean of {config.seeds} seeds\nlabels  " + "  ".join(f"{order:>9}" for order in ORDERS))
    means = {order: np.mean(curves[order], (0, 1)) for order in ORDERS}
    for i, count in enumerate(labels):
        print(f"{count:6d}  " + "  ".join(f"{means[order][i]:9.3f}" for order in ORDERS))
    print(f"\nlabels to the random order's accuracy at {config.budget}, of each seed")
    for order in ORDERS:
        line = f"{order:>9}: " + ", ".join("not reached" if n is None else f"{n:.0f}" for n in reached[order])
        if order == "random":
            print(line)
            continue
        mean, low, high = t_interval(saved[order])
        print(f"{line}: {100 * mean:.0f} % fewer [{100 * low:.0f}, {100 * high:.0f}]")
        run.metrics |= {f"labels_saved_{order}": mean, f"labels_saved_{order}_ci95": [low, high]}
    mean, low, high = t_interval(saved["ensemble"])
    run.claims.append(
        {
            "claim": "Choosing by ensemble disagreement reaches the random order's accuracy with at least 30 % fewer labels",
            "paper": 0.3,
            "ours": mean,
            "ci95": [low, high],
            "verdict": "reproduced" if low >= 0.3 else "not reproduced" if high < 0.3 else "inconclusive",
        }
    )
    run.metrics |= {f"accuracy_{order}": float(means[order][-1]) for order in ORDERS}
    result = {
        "labels": labels,
        "accuracy": curves,
        "labels_needed": reached,
        "saved": saved,
        "saved_ci95": [mean, low, high],
    }
    (run.folder / "what_to_ask.json").write_text(json.dumps(result) + "\n")
    print(json.dumps({"saved": mean, "ci95": [low, high], "seeds": config.seeds}))


if __name__ == "__main__":
    command_line(main, get_config(), __doc__)
