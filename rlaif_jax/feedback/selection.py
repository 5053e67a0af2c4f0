"""Selects the questions to ask next: those from whose answers there is most to learn, within a budget.

Signals say how much there is to learn from each of a pool of n candidate questions; `choose` takes the best of them. All
of it is NumPy on the host, deterministic under a seed. A NaN in a signal means "unknown": that signal is ignored for that
question.

Questions chosen because they are hard are no random sample: estimates that need one (a win rate debiased by human labels)
should use the share drawn at random (`Selection.explore`, with the reason `RANDOM`).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from scipy.stats import rankdata

from rlaif_jax.config import require

Floats = NDArray[np.float64]
RANDOM = "drawn at random"


# ---- Signals: a larger value means more to learn


def ensemble_disagreement(margins: ArrayLike) -> Floats:
    """Computes how much the models of an ensemble disagree about each pair, in nats, [n].

    It is the mutual information of the verdict and the model, H(mean_m p) - mean_m H(p) with p = sigmoid(margin): high
    where models contradict each other, zero where all of them call the pair a toss-up, which no label would change (BALD:
    Houlsby et al. 2011, "Bayesian Active Learning for Classification and Preference Learning", eq. 2).

    Args:
        margins: [M, n], the reward of the first answer minus that of the second by each of M >= 2 models; NaN gives NaN.

    Raises:
        UserError: margins of another shape.
    """
    values = np.asarray(margins, np.float64)
    require(values.ndim == 2 and len(values) >= 2, f"margins should be [models >= 2, n], not {list(values.shape)}")
    p = expit(values)
    return np.maximum(_entropy(p.mean(0)) - _entropy(p).mean(0), 0.0)


def judge_margin(probability: ArrayLike) -> Floats:
    """Computes how undecided a judge is about each pair: 1 - |2 p - 1|, where 1 is a toss-up.

    Args:
        probability: p [n], P(the first answer is better).

    Returns:
        [n] in [0, 1].

    Raises:
        UserError: a value outside [0, 1].
    """
    return 1 - np.abs(2 * _probabilities(probability, "probability") - 1)


def order_disagreement(p12: ArrayLike, p21: ArrayLike) -> Floats:
    """Computes how far verdicts in the two orders contradict each other, |p12 + p21 - 1|, [n].

    Without position bias, p12 and p21 add up to one.

    Args:
        p12: [n], P(the answer shown first wins) in one order.
        p21: [n], P(the answer shown first wins) in the other order.

    Raises:
        UserError: a value is outside [0, 1].
    """
    return np.abs(_probabilities(p12, "p12") + _probabilities(p21, "p21") - 1)


# ---- Choosing


@dataclasses.dataclass(frozen=True)
class Selection:
    """Settings of `choose`.

    Attributes:
        weights: the weight of each signal by name; 1 for a signal that is not named.
        per_prompt: the largest number of questions about one prompt in a round.
        hard: a question that was answered before, or that is in the pool twice, is asked again only where its score is at
            least this (the share of the pool that is easier, 0 .. 1).
        max_asks: the largest number of times that a question is asked.
        explore: the share of the budget that is drawn at random.
        power: None takes the highest scores; p draws without replacement with probabilities in proportion to score ** p,
            so that a large round is not uniform (Kirsch et al. 2021, "Stochastic batch acquisition for deep active
            learning").
    """

    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    per_prompt: int = 1
    hard: float = 0.9
    max_asks: int = 3
    explore: float = 0.0
    power: float | None = None

    def __post_init__(self) -> None:
        require(all(w >= 0 for w in self.weights.values()), f"weights should not be negative, got {dict(self.weights)}")
        require(self.per_prompt >= 1, f"per_prompt should be at least 1, got {self.per_prompt}")
        require(self.max_asks >= 1, f"max_asks should be at least 1, got {self.max_asks}")
        require(0 <= self.hard <= 1, f"hard is a share from 0 to 1, got {self.hard}")
        require(0 <= self.explore <= 1, f"explore is a share from 0 to 1, got {self.explore}")
        require(self.power is None or self.power > 0, f"power should be positive, got {self.power}")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A question to ask.

    Attributes:
        index: its index in the pool.
        score: its score in [0, 1].
        reason: why it was chosen, in words.
    """

    index: int
    score: float
    reason: str


def choose(
    budget: float,
    signals: Mapping[str, ArrayLike],
    *,
    prompts: Sequence[str],
    items: Sequence[str] | None = None,
    asked: Mapping[str, int] | None = None,
    costs: ArrayLike | None = None,
    seed: int = 0,
    selection: Selection = Selection(),
) -> list[Choice]:
    """Chooses the questions to ask next, the highest score first.

    A question's score is the weighted mean of its ranks in the pool by each signal, 0 the easiest .. 1 the hardest.

    Args:
        budget: upper bound of the sum of the costs of the chosen questions.
        signals: name -> [n], larger = more to learn; the names appear in the reasons. Without signals the order is random.
        prompts: [n], the prompt of each question; a round has at most `selection.per_prompt` questions about each.
        items: [n], a name for each question, such as `Judgement.item`: equal names are duplicates. None: all differ.
        asked: item -> how often it has been answered already.
        costs: [n], the cost of each question, in the budget's unit; None: each costs 1.
        seed: seed of ties and random draws; the same pool, seed and selection give the same choice.
        selection: the settings.

    Returns:
        At most n choices; fewer than the budget allows where the other questions are too expensive, duplicates of easy
        questions, or about a prompt that has reached `per_prompt`.

    Raises:
        UserError: lengths that differ, infinite signals, costs that are not positive, a negative budget.
    """
    count = len(prompts)
    price = np.ones(count) if costs is None else np.asarray(costs, np.float64)
    require(math.isfinite(budget) and budget >= 0, f"the budget should be a number >= 0, got {budget}")
    require(price.shape == (count,), f"costs should have shape [{count}], not {list(price.shape)}")
    require(bool((price > 0).all() and np.isfinite(price).all()), "costs should be positive")
    require(items is None or len(items) == count, f"items should name each of the {count} questions")
    scores, reasons = _scores(signals, count, selection.weights)
    generator = np.random.default_rng(seed)
    noise, order_noise = generator.random(count), generator.gumbel(size=count)
    if selection.power is None:
        order = np.lexsort((noise, -scores))
    else:
        with np.errstate(divide="ignore"):
            order = np.lexsort((noise, -(selection.power * np.log(scores) + order_noise)))
    times = Counter(asked or {})
    used: Counter[str] = Counter()
    taken: set[int] = set()
    chosen: list[Choice] = []

    def take(order: Sequence[int], money: float, reason: str | None) -> float:
        """Takes the allowed questions in this order, as long as any is affordable; returns the money left."""
        cheapest = float(price.min()) if count else 0.0
        for index in order:
            if money < cheapest - 1e-9:
                break
            name = str(index) if items is None else items[index]
            again = times[name]
            allowed = again == 0 or (again < selection.max_asks and scores[index] >= selection.hard)
            fits = price[index] <= money + 1e-9 and used[prompts[index]] < selection.per_prompt
            if index in taken or not allowed or not fits:
                continue
            why = reason or reasons[index]
            chosen.append(Choice(index, float(scores[index]), f"{why}; asked {again} x before" if again else why))
            taken.add(index)
            times[name] += 1
            used[prompts[index]] += 1
            money -= price[index]
        return money

    at_random = budget * selection.explore if signals else budget
    left = take(generator.permutation(count).tolist(), at_random, RANDOM) if at_random > 0 else 0.0
    if signals:
        take(order.tolist(), budget - at_random + left, None)
    return sorted(chosen, key=lambda choice: -choice.score) if signals else chosen


def _scores(signals: Mapping[str, ArrayLike], count: int, weights: Mapping[str, float]) -> tuple[Floats, list[str]]:
    """Returns the weighted mean rank [n] over the known signals, and a reason for each question.

    The rank is .5 where all signals are unknown.
    """
    total, weight = np.zeros(count), np.zeros(count)
    best, reasons = np.full(count, -1.0), ["nothing known about it"] * count
    for name, given in signals.items():
        values = np.asarray(given, np.float64)
        require(values.shape == (count,), f"signal {name!r} should have shape [{count}], not {list(values.shape)}")
        known = ~np.isnan(values)
        require(bool(np.isfinite(values[known]).all()), f"signal {name!r} holds an infinite value")
        signal_weight = weights.get(name, 1.0)
        rank = np.zeros(count)
        # The share of the other questions that is easier; ties count half.
        rank[known] = (rankdata(values[known]) - 1) / (known.sum() - 1) if known.sum() > 1 else 0.5
        total += signal_weight * np.where(known, rank, 0.0)
        weight += signal_weight * known
        for index in np.flatnonzero(known & (rank * signal_weight > best)):
            best[index] = rank[index] * signal_weight
            reasons[index] = f"{name} {values[index]:.3g}, more than {100 * rank[index]:.0f} % of the pool"
    return np.where(weight > 0, total / np.where(weight > 0, weight, 1.0), 0.5), reasons


def _probabilities(values: ArrayLike, name: str) -> Floats:
    p = np.asarray(values, np.float64)
    known = p[~np.isnan(p)]
    require(not len(known) or (known.min() >= 0 and known.max() <= 1), f"{name} should lie between 0 and 1")
    return p


def _entropy(p: Floats) -> Floats:
    q = np.clip(p, 1e-12, 1 - 1e-12)
    return -(q * np.log(q) + (1 - q) * np.log1p(-q))
