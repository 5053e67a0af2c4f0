"""Reliability of people, rules and AI judges in one rater model; runs on JAX.

Each rater is judged by the verdicts of the others.
"""

from __future__ import annotations

import math
from functools import partial
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit, logit

from rlaif_jax.quality.clusters import PREFERENCE, SOURCES, EstimateFields, VoteShares, missing_estimate, rater_fields
from rlaif_jax.quality.values import Floats
from rlaif_jax.quality.votes import Votes
from rlaif_jax.rewards.crowd_bt import crowd_bt
from rlaif_jax.rewards.raters import hierarchical_dawid_skene

MIN_SHARED = 10
"""With fewer pairs that two raters judged, no model is fitted."""
PARTS = 10
"""Parts of the jackknife: each further fit of the models leaves out one part of the prompts."""


def rater_model(votes: Votes, shares: VoteShares, level: float) -> dict[str, Any]:
    """Fits Dawid-Skene and Crowd-BT to all verdicts and returns every rater's reliability.

    `accuracy`: P(a verdict of the rater on a pair is right), by Dawid-Skene with first, tie and second as
    classes; raters of one source share a prior. `eta`: P(the rater reports what it sees), by Crowd-BT on the
    utilities of the answers. Truth is what the raters together make most likely: raters that err alike are
    believed. Intervals: delete-a-group jackknife over prompts, on the logit scale (a resample that doubles an
    item would count its raters twice). Runs on the host's CPU.

    Args:
        votes: all votes.
        shares: pair -> rater -> shares of first, tie and second, from `votes`.
        level: coverage of the intervals, between 0 and 1.

    Returns:
        {"rows": a row for each rater, "note"}, or {"rows": [], "reason"} with too few pairs in common.
    """
    shared = sum(len(by_rater) >= 2 for by_rater in shares.values())
    if shared < MIN_SHARED:
        return {"rows": [], "reason": f"{shared} pairs were judged by two raters or more; {MIN_SHARED} are needed"}
    pairs = np.array([pair for pair, by_rater in shares.items() for _ in by_rater])
    workers = np.array([rater for by_rater in shares.values() for rater in by_rater])
    given = np.array([vote for by_rater in shares.values() for vote in by_rater.values()])
    cluster = np.array([votes.pairs[pair].cluster for pair in pairs])
    answers = np.array([votes.pairs[pair].answers for pair in pairs])
    names, part = np.unique(cluster, return_inverse=True)
    order = np.random.default_rng(0).permutation(len(names))
    parts = min(PARTS, len(names))
    weights = np.stack([np.ones(len(pairs)), *((order[part] % parts != k) for k in range(parts))])
    sources = np.array([SOURCES.index(source) for _, source in votes.raters])
    count = _next_power_of_two(len(pairs))
    fill = lambda x: np.concatenate([x, np.zeros((count - len(x), *x.shape[1:]), x.dtype)])
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        accuracy, eta = _fit(
            fill(pairs),
            fill(workers),
            fill(given.astype(np.float32)),
            fill(answers),
            fill((given @ PREFERENCE).astype(np.float32)),
            fill(weights.T.astype(np.float32)).T,
            np.pad(sources, (0, _next_power_of_two(len(sources)) - len(sources))),
            num_items=_next_power_of_two(len(votes.pairs)),
            num_answers=_next_power_of_two(int(answers.max()) + 1),
        )
    verdicts = np.bincount(workers, minlength=len(votes.raters))
    alone = [np.unique(cluster[workers == rater]) for rater in range(len(votes.raters))]
    rows = [
        rater_fields(votes, rater)
        | {"count": int(verdicts[rater])}
        | {
            name: _jackknife(np.asarray(values)[:, rater], level)
            if len(alone[rater]) > 1
            else missing_estimate("one prompt")
            for name, values in (("accuracy", accuracy), ("eta", eta))
        }
        for rater in np.argsort(-verdicts, kind="stable").tolist()
        if verdicts[rater]
    ]
    note = "Truth is what all raters together make most likely: raters that err alike are believed."
    return {"rows": rows, "note": note}


@partial(jax.jit, static_argnames=("num_items", "num_answers"))
def _fit(
    pairs: jax.Array,
    workers: jax.Array,
    given: jax.Array,
    answers: jax.Array,
    wins: jax.Array,
    weights: jax.Array,
    sources: jax.Array,
    *,
    num_items: int,
    num_answers: int,
) -> tuple[jax.Array, jax.Array]:
    """Fits both models once for each row of weights.

    Args:
        pairs: [N] int, the pair that each vote is on.
        workers: [N] int, the rater of each vote.
        given: [N, 3], the vote as a distribution over (first, tie, second).
        answers: [N, 2] int, the two answers of the pair.
        wins: [N], the vote's preference for the first answer.
        weights: [fits, N], 0 where a fit leaves a vote out.
        sources: [W] int, the source of each rater.
        num_items: number of pairs, or more.
        num_answers: number of answers, or more.

    Returns:
        (accuracy [fits, W], eta [fits, W]).
    """

    def one(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        count = sources.shape[0]
        consensus = hierarchical_dawid_skene(
            pairs,
            workers,
            given,
            weight,
            num_items=num_items,
            num_classes=3,
            group=sources,
            num_groups=len(SOURCES),
            num_workers=count,
        )
        ranked = crowd_bt(answers[:, 0], answers[:, 1], workers, wins, weight, num_items=num_answers, num_workers=count)
        return consensus.accuracy, ranked.reliability

    return jax.lax.map(one, jnp.asarray(weights))


def _next_power_of_two(size: int) -> int:
    """Returns the next power of two, so that a store that grows is not compiled anew for every record."""
    return 1 << max(size - 1, 1).bit_length()


def _jackknife(values: Floats, level: float) -> EstimateFields:
    """Returns the jackknife estimate of `values` [1 + parts].

    The first value is the fit on all votes, the others are the fits without one part.
    """
    logits = logit(np.clip(np.asarray(values, np.float64), 1e-4, 1 - 1e-4))
    whole, parts = logits[0], logits[1:]
    if not np.isfinite(logits).all():
        return missing_estimate("the model did not converge")
    count = len(parts)
    if count < 5:
        return {"value": float(values[0]), "low": None, "high": None, "reason": "too few prompts for an interval"}
    error = math.sqrt((count - 1) / count * float(((parts - parts.mean()) ** 2).sum()))
    z = NormalDist().inv_cdf((1 + level) / 2)
    return {"value": float(values[0]), "low": float(expit(whole - z * error)), "high": float(expit(whole + z * error))}
