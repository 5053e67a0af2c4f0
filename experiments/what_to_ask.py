"""Does choosing what to ask save labels? Random order against chosen order, on the built-in text world.

    python experiments/what_to_ask.py --seeds 5 --out runs/what_to_ask

A pool of pairs of answers (demonstrations and corrupted ones, as they come: near ties, repeats and easy cases among them)
about training towns; a simulated person compares them, at the price of one label each. A small reward model learns from the
labels so far, and its accuracy against the world's gold score is measured on pairs about towns that never occurred. Three
orders of asking, each from as many labels drawn at random, by feedback/selection.py: random; where an ensemble of reward
models disagrees (this is the claim); and where it is undecided as a whole, which asks for toss-ups, too.

The question: how many labels does a chosen order need for the accuracy that the random order ends with, and how many did
the random order itself need for it? Both are read off their curves by one rule. A curve is the mean of several times of
asking, each with other answers and draws, smoothed to the nearest one that never falls (isotonic regression: more
labels do not hurt, on average), so that no single dip decides. Between budgets it is interpolated in the logarithm. An
order that never gets there is charged the whole budget.

The reward model is linear in what the words of an answer are and share with its prompt (`features`), fitted by Newton's
method on the device; the ensemble is its Bayesian bootstrap. Expected: see experiments/RESULTS.md.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take seconds
    from rlaif_jax.progress.startup import Loading

    loading = Loading()

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np

from rlaif_jax.command_line import command_line
from rlaif_jax.config import require
from rlaif_jax.data.world.tasks import summarisation
from rlaif_jax.files import atomic_write
from rlaif_jax.progress.plan import PlannedStage
from rlaif_jax.recipes.asking import AskingConfig, Order, accuracy_curve, pool_and_test
from rlaif_jax.recipes.label_curves import labels_to_reach, saved_share, smoothed, t_interval
from rlaif_jax.run import Run

ORDERS: tuple[Order, ...] = get_args(Order)
Curves = dict[Order, list[list[list[float]]]]  # order -> [seeds, repeats, budgets]


@dataclasses.dataclass(frozen=True)
class AskConfig:
    """All settings.

    Attributes:
        seed: the first of `seeds` seeds; each draws other towns (held-out ones too), answers, labels and orders.
        seeds: number of seeds.
        out: the run's folder.
        prompts: prompts of the pool, four answers each, six pairs.
        test_prompts: prompts of held-out towns.
        asking: how labels are asked for.
    """

    seed: int = 0
    seeds: int = 5
    out: Path = Path("runs/what_to_ask")
    prompts: int = 1500
    test_prompts: int = 4000
    asking: AskingConfig = AskingConfig()

    def __post_init__(self) -> None:
        require(self.seeds >= 2, f"seeds must be >= 2 for an interval, not {self.seeds}")
        require(self.test_prompts >= 1, "test_prompts must be >= 1")
        require(
            self.asking.budget <= self.prompts * 3,
            f"asking.budget must be <= half of the pool's {6 * self.prompts} pairs: raise prompts",
        )


def get_config() -> AskConfig:
    """Returns the default settings."""
    return AskConfig()


def main(config: AskConfig) -> dict[str, Any]:
    """Asks in all orders, writes the curves to OUT/what_to_ask.json and returns the run's metrics."""
    with Run(config.out, "what_to_ask", config, seed=config.seed) as run:
        seeds = range(config.seed, config.seed + config.seeds)
        run.display.plan([PlannedStage(f"seed {seed}", f"all orders of asking, with seed {seed}", 1) for seed in seeds])
        curves: Curves = {order: [] for order in ORDERS}
        for seed in seeds:
            run.display.begin(f"seed {seed}")
            pool, test = pool_and_test(seed, summarisation.TASK, config.prompts, config.test_prompts)
            for order in ORDERS:
                repeats = range(config.asking.repeats)
                curves[order].append(
                    [accuracy_curve(config.asking, order, seed, repeat, pool, test) for repeat in repeats]
                )
                run.settled()
            ends = {order: np.mean([c[-1] for c in curves[order][-1]]) for order in ORDERS}
            print(f"seed {seed}: " + ", ".join(f"{order} {end:.3f}" for order, end in ends.items()), flush=True)

        # ---- Labels to the accuracy that the random order ends with
        labels = config.asking.budgets
        needed: dict[Order, list[float | None]] = {order: [] for order in ORDERS}
        saved: dict[Order, list[float]] = {order: [] for order in ORDERS[1:]}
        for number in range(config.seeds):
            smooth = {order: smoothed(curves[order][number]) for order in ORDERS}
            needs = {order: labels_to_reach(smooth["random"][-1], labels, smooth[order]) for order in ORDERS}
            random = needs["random"]
            assert random is not None  # its last value is the target
            for order in ORDERS:
                needed[order].append(needs[order])
            for order in saved:
                saved[order].append(saved_share(needs[order], random, config.asking.budget))
        intervals = {order: t_interval(values) for order, values in saved.items()}
        mean, low, high = intervals["ensemble"]
        run.claims.append(
            {
                "claim": "Choosing by ensemble disagreement reaches the random order's accuracy with at least 30 % fewer "
                "labels",
                "paper": 0.3,
                "ours": mean,
                "ci95": [low, high],
                "verdict": "reproduced" if low >= 0.3 else "not reproduced" if high < 0.3 else "inconclusive",
            }
        )
        for order, (average, *interval) in intervals.items():
            run.metrics |= {f"labels_saved_{order}": average, f"labels_saved_{order}_ci95": interval}
        run.metrics |= {f"accuracy_{order}": float(np.mean(curves[order], (0, 1))[-1]) for order in ORDERS}
        result = {"labels": labels, "accuracy": curves, "labels_needed": needed, "saved": saved}
        with atomic_write(run.folder / "what_to_ask.json") as file:
            file.write(json.dumps(result | {"saved_ci95": [mean, low, high]}) + "\n")
        print_tables(labels, curves, needed, intervals)
    return run.metrics


def print_tables(
    labels: list[int],
    curves: Curves,
    needed: dict[Order, list[float | None]],
    intervals: dict[Order, tuple[float, float, float]],
) -> None:
    """Prints accuracies by the number of labels, and how many labels each order needs and saves."""
    print(f"\naccuracy, mean of {len(needed['random'])} seeds\nlabels  " + "  ".join(f"{order:>9}" for order in ORDERS))
    means = {order: np.mean(curves[order], (0, 1)) for order in ORDERS}
    for i, count in enumerate(labels):
        print(f"{count:6d}  " + "  ".join(f"{means[order][i]:9.3f}" for order in ORDERS))
    print(f"\nlabels to the random order's accuracy at {labels[-1]}, of each seed")
    for order in ORDERS:
        line = f"{order:>9}: " + ", ".join("not reached" if n is None else f"{n:.0f}" for n in needed[order])
        if order in intervals:
            mean, low, high = intervals[order]
            line += f": {100 * mean:.0f} % fewer [{100 * low:.0f}, {100 * high:.0f}]"
        print(line)


if __name__ == "__main__":
    command_line(main, get_config(), __doc__, loading=loading)
