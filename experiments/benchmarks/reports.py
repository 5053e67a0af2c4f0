"""Measures time and memory of reports and fits at many records: `python -m experiments.benchmarks.reports`.

    python -m experiments.benchmarks.reports                    # all sizes; each in a process, for its memory
    python -m experiments.benchmarks.reports pairs --count 4000 --reliability

`pairs`, `ratings` (40 levels) and `crowd` (200 raters an item) are reports of `quality` on planted judgements; `utilities`
is a fit of Bradley-Terry to ten comparisons an item.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial

import numpy as np

from rlaif_jax.feedback.records.forms import Judgement, Ranking, Rater, Rating
from rlaif_jax.quality.quality import quality

JUDGE = Rater("judge", "ai")
PEOPLE = [Rater(f"person {i}", "person") for i in range(200)]


def pairs(count: int) -> Iterator[Judgement]:
    """Yields `count` judgements: of each pair those of a judge in both orders and of two of twenty people."""
    rng = np.random.default_rng(0)
    for i in range(count // 4):
        answers = ("x " * int(rng.integers(5, 50)) + str(i), "y " * int(rng.integers(5, 50)) + str(i))
        better = rng.normal()
        verdict = partial(Ranking, prompt=f"prompt {i}", answers=answers, generators=("new", "old"))
        for shown, bias in (((0, 1), 0.3), ((1, 0), -0.3)):
            chance = float(1 / (1 + np.exp(-better - bias)))
            ranks = (1, 2) if chance > 0.5 else (2, 1)
            yield verdict(rater=JUDGE, ranks=ranks, probability=chance, shown=shown)
        for who in rng.permutation(20)[:2]:
            ranks = (1, 2) if better + rng.normal() > 0 else (2, 1)
            yield verdict(rater=PEOPLE[who], ranks=ranks, shown=(0, 1))


def ratings(count: int) -> Iterator[Judgement]:
    """Yields `count` ratings from 0 to 39: two of twenty people rate each answer."""
    rng = np.random.default_rng(0)
    for i in range(count // 2):
        quality = rng.normal(20, 8)
        for who in rng.permutation(20)[:2]:
            value = float(np.clip(np.rint(quality + rng.normal(0, 4)), 0, 39))
            yield Rating(prompt=f"prompt {i}", answers=(f"answer {i}",), rater=PEOPLE[who], value=value, low=0, high=39)


def crowd(count: int) -> Iterator[Judgement]:
    """Yields `count` judgements: 200 people judge each pair."""
    rng = np.random.default_rng(0)
    for i in range(count // 200):
        for person in PEOPLE:
            ranks = (1, 2) if rng.random() < 0.6 else (2, 1)
            yield Ranking(prompt=f"prompt {i}", answers=(f"a {i}", f"b {i}"), rater=person, ranks=ranks)


def fit_utilities(items: int) -> None:
    """Fits utilities of `items` to ten planted comparisons each."""
    import jax
    import jax.numpy as jnp

    from rlaif_jax.rewards.rankings import fit_bradley_terry

    rng = np.random.default_rng(0)
    first = rng.integers(0, items, 10 * items)
    second = (first + rng.integers(1, items, 10 * items)) % items
    truth = rng.normal(size=items)
    won = (rng.random(10 * items) < 1 / (1 + np.exp(truth[second] - truth[first]))).astype(np.float32)
    jax.block_until_ready(fit_bradley_terry(*map(jnp.asarray, (first, second, won)), num_items=items))


REPORTS = {"pairs": pairs, "ratings": ratings, "crowd": crowd}
SIZES = (
    ("pairs", 100_000, False), ("pairs", 100_000, True), ("ratings", 100_000, False), ("crowd", 10_000, False),
    ("utilities", 20_000, False), ("utilities", 100_000, False),
)  # fmt: skip


def measure(what: str, count: int, reliability: bool) -> None:
    """Prints seconds and memory of one size.

    Args:
        what: a name in REPORTS, or "utilities".
        count: number of judgements, or of items.
        reliability: whether the report fits the rater model.
    """
    records = list(REPORTS[what](count)) if what in REPORTS else []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    started, busy = time.perf_counter(), time.process_time()
    if what in REPORTS:
        quality(records, reliability=reliability)
    else:
        fit_utilities(count)
    wall, cpu = time.perf_counter() - started, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    name = what + (" with the rater model" if reliability else "")
    print(f"| {name} | {count:,} | {wall:.1f} | {cpu:.1f} | {before:.2f} | {peak:.2f} |", flush=True)


def main() -> None:
    """Runs one size here, or all of them in a process each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "what", nargs="?", choices=[*REPORTS, "utilities"], help="what to measure; all sizes if left out"
    )
    parser.add_argument("--count", type=int, default=100_000, help="number of judgements, or of items")
    parser.add_argument("--reliability", action="store_true", help="fit the rater model, too")
    options = parser.parse_args()
    if options.what:
        measure(options.what, options.count, options.reliability)
        return
    print("| what | judgements, items | seconds | a processor's seconds | GB before | GB at most |")
    print("|---|---|---|---|---|---|", flush=True)
    for what, count, reliability in SIZES:
        command = [sys.executable, "-m", "experiments.benchmarks.reports", what, "--count", str(count)]
        subprocess.run(command + ["--reliability"] * reliability, check=True)


if __name__ == "__main__":
    main()
