"""Measures how often the report's intervals cover: `python -m experiments.benchmarks.coverage`.

Judgements of a known truth are drawn again and again; the table says how often the 95 % interval holds the truth, and how
often the number had a note that warns of the interval.

    python -m experiments.benchmarks.coverage                        # 1,000 repetitions, n = 50, 200, 1,000
    python -m experiments.benchmarks.coverage --repetitions 100 --sizes 50
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit

import rlaif_jax.quality.statistics as stats
from rlaif_jax.quality.calibration import debiased_calibration_error
from rlaif_jax.quality.debiasing import powered_columns, powered_mean
from rlaif_jax.quality.intervals import Jackknife, share_interval
from rlaif_jax.quality.win_rates import length_controlled_win_rate

Draw = Callable[[np.random.Generator, int], Mapping[str, Any]]


class Case(NamedTuple):
    """A number of a known truth.

    Attributes:
        name: what is drawn.
        truth: the number in the population.
        draw: (generator, n) -> the estimate {"value", "low", "high"} from n prompts, with a "note" where it warns.
    """

    name: str
    truth: float
    draw: Draw


def win_rate(rng: np.random.Generator, n: int, rate: float, ties: float = 0.0, alike: float = 0.0) -> Mapping[str, Any]:
    """Draws a win rate; with `alike` each prompt has four pairs of this intraclass correlation."""
    if not alike:
        outcome = np.where(rng.random(n) < ties, 0.5, rng.random(n) < rate)
        return share_interval(outcome)._asdict()
    counts = (1 - alike) / alike
    chance = rng.beta(rate * counts, (1 - rate) * counts, n).repeat(4)
    return share_interval((rng.random(4 * n) < chance).astype(float), groups=np.arange(n).repeat(4))._asdict()


def at_equal_lengths(rng: np.random.Generator, n: int, quality: float, slope: float) -> Mapping[str, Any]:
    """Draws a length-controlled win rate; answers are longer by one standard deviation on average."""
    difference = rng.normal(1, 1, n)
    chance = expit(quality + slope * np.tanh(difference / difference.std()))
    found = length_controlled_win_rate((rng.random(n) < chance).astype(float), difference)._asdict()
    return found if found["note"] else {key: found[key] for key in ("value", "low", "high")}


def debiased(rng: np.random.Generator, n: int, rate: float, labelled: float) -> Mapping[str, Any]:
    """Draws a judge that is right in four of five pairs, on all, and people on a part of them."""
    person = (rng.random(n) < rate).astype(float)
    judge = 0.1 + 0.8 * np.where(rng.random(n) < 0.8, person, 1 - person)
    person[rng.permutation(n)[round(labelled * n) :]] = np.nan
    columns = powered_columns(judge, person)
    return Jackknife().estimate(columns, powered_mean, share=True, informative=columns[:, 2] > 0)


def calibration(rng: np.random.Generator, n: int, least: float, right: Callable[[Any], Any]) -> Mapping[str, Any]:
    """Draws confidences from `least` to 1 that are right with probability right(confidence)."""
    confidence = rng.uniform(least, 1, n)
    correct = (rng.random(n) < right(confidence)).astype(float)
    return debiased_calibration_error(stats.calibration_columns(confidence, correct))


def kappa(rng: np.random.Generator, n: int, agreement: float, margins: tuple[float, ...]) -> Mapping[str, Any]:
    """Draws two raters who agree on a share of the items and are independent on the others."""
    size = len(margins)
    one, other = rng.choice(size, (2, n), p=margins)
    other = np.where(rng.random(n) < agreement, one, other)
    confusion = np.eye(size * size)[one * size + other].reshape(n, size, size)
    return Jackknife().estimate(confusion, stats.cohen_kappa, lowest=stats.lowest_kappa)


def alpha(
    rng: np.random.Generator, n: int, agreement: float, level: stats.Level, margins: tuple[float, ...]
) -> Mapping[str, Any]:
    """Draws three raters, each rating missing with probability .3; pairs agree on a share and are independent else."""
    size = len(margins)
    truth = rng.choice(size, (n, 1), p=margins)
    said = np.where(rng.random((n, 3)) < np.sqrt(agreement), truth, rng.choice(size, (n, 3), p=margins))
    votes = np.eye(size)[said] * (rng.random((n, 3, 1)) > 0.3)
    given, total = votes.sum((1, 2)), votes.sum(1)
    pairs = total[:, :, None] * total[:, None, :] - np.einsum("nac,nad->ncd", votes, votes)
    units = np.where(given[:, None, None] < 2, 0.0, pairs / np.maximum(given - 1, 1)[:, None, None])
    statistic = lambda sums: stats.krippendorff_alpha(sums, level)
    return Jackknife().estimate(units, statistic, lowest=lambda sums: stats.lowest_alpha(sums, level))


def cases() -> Iterator[Case]:
    """Yields all numbers whose coverage is measured."""
    for rate in (0.5, 0.9):
        yield Case(f"win rate {rate:g}", rate, partial(win_rate, rate=rate))
    yield Case("win rate .9, half ties", 0.7, partial(win_rate, rate=0.9, ties=0.5))
    yield Case("win rate .8, four pairs a prompt", 0.8, partial(win_rate, rate=0.8, alike=0.3))
    for slope in range(4):
        yield Case(f"at equal lengths .5, slope {slope}", 0.5, partial(at_equal_lengths, quality=0.0, slope=slope))
    yield Case("at equal lengths .9, slope 1", 0.9, partial(at_equal_lengths, quality=float(np.log(9)), slope=1))
    for rate in (0.5, 0.8, 0.9):
        yield Case(f"debiased {rate:g}, 40 % labelled", rate, partial(debiased, rate=rate, labelled=0.4))
    yield Case("ECE, calibrated", 0.0, partial(calibration, least=0.5, right=lambda c: c))
    yield Case("ECE, too sure by half", 0.125, partial(calibration, least=0.5, right=lambda c: 0.5 + (c - 0.5) / 2))
    yield Case("ECE, too sure by .05", 0.05, partial(calibration, least=0.6, right=lambda c: c - 0.05))
    yield Case("ECE, calibrated above .9", 0.0, partial(calibration, least=0.9, right=lambda c: c))
    for agreement, margins in ((0.2, (0.5, 0.5)), (0.9, (0.5, 0.5)), (0.2, (0.85, 0.15)), (0.8, (0.85, 0.15))):
        name = f"kappa {agreement:g}, categories {margins[0]:g} and {margins[1]:g}"
        yield Case(name, agreement, partial(kappa, agreement=agreement, margins=margins))
    yield Case("kappa .9, categories .45, .1, .45", 0.9, partial(kappa, agreement=0.9, margins=(0.45, 0.1, 0.45)))
    for level in ("nominal", "ordinal", "interval"):
        for agreement, size in ((0.3, 3), (0.9, 3), (0.6, 5)):
            name = f"alpha {agreement:g}, {level}, {size} categories"
            yield Case(name, agreement, partial(alpha, agreement=agreement, level=level, margins=(1 / size,) * size))


class Coverage(NamedTuple):
    """How an interval did.

    Attributes:
        covered: share of the repetitions with an interval that holds the truth.
        noted: share of the repetitions with a note.
        failed: share of the repetitions without an interval.
    """

    covered: float
    noted: float
    failed: float


def measure(case: Case, n: int, repetitions: int, seed: int = 0) -> Coverage:
    """Draws a case again and again.

    Args:
        case: the number.
        n: number of prompts.
        repetitions: number of draws.
        seed: of the draws.
    """
    found = [case.draw(np.random.default_rng([seed, n, i]), n) for i in range(repetitions)]
    whole = [estimate for estimate in found if estimate["low"] is not None]
    covered = sum(e["low"] - 1e-9 <= case.truth <= e["high"] + 1e-9 for e in whole)
    noted = sum("note" in estimate for estimate in found)
    return Coverage(covered / max(len(whole), 1), noted / repetitions, 1 - len(whole) / repetitions)


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=1000, help="draws of each number and size")
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 200, 1000], help="numbers of prompts")
    options = parser.parse_args()
    started = time.perf_counter()
    print("| 95 % interval of | " + " | ".join(f"n = {n:,}" for n in options.sizes) + " |")
    print("|---|" + "---|" * len(options.sizes))
    for case in cases():
        row = []
        for n in options.sizes:
            found = measure(case, n, options.repetitions)
            warned = f" (note in {100 * found.noted:.0f} %)" if found.noted else ""
            row.append(f"{100 * found.covered:.1f}{warned}" + (f" ({found.failed:.3f} none)" if found.failed else ""))
        print(f"| {case.name} | " + " | ".join(row) + " |", flush=True)
    print(f"\n{options.repetitions} repetitions, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
