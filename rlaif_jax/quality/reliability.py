"""People, rules and AI judges in one rater model: who can be relied on, by what the others say."""

from __future__ import annotations

import math
from functools import partial
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.quality.clusters import SOURCES, WORTH, Estimate, Shares, nothing, who
from rlaif_jax.quality.statistics import Floats
from rlaif_jax.quality.votes import Votes
from rlaif_jax.rewards.raters import crowd_bt, hierarchical_dawid_skene

MIN_SHARED = 10
"""With fewer pairs that two raters judged there is nothing to go by."""
PARTS = 10
"""Of the jackknife: the models are fitted so many times, each without one part of the prompts."""


def rater_model(votes: Votes, shares: Shares, level: float) -> dict[str, Any]:
    """{"rows": a rater each, "note"} or {"rows": [], "reason"}.

    `accuracy`: P(its verdict on a pair is right), by Dawid-Skene with first, tie, second as classes, raters of one source
    taken for kin. `eta`: P(it reports what it sees), by Crowd-BT on the utilities of the answers. Truth is what the raters
    together make most likely: raters that err alike are believed. Intervals: delete-a-group jackknife over prompts, on the
    logit scale (a resample that doubles an item would count its raters twice). Runs on JAX, on the host's CPU.
    """
    shared = sum(len(by) >= 2 for by in shares.values())
    if shared < MIN_SHARED:
        return {"rows": [], "reason": f"{shared} pairs were judged by two raters or more; {MIN_SHARED} are needed"}
    pairs = np.array([pair for pair, by in shares.items() for _ in by])
    workers = np.array([rater for by in shares.values() for rater in by])
    given = np.array([vote for by in shares.values() for vote in by.values()])
    cluster = np.array([votes.pairs[pair].cluster for pair in pairs])
    answers = np.array([votes.pairs[pair].answers for pair in pairs])
    names, part = np.unique(cluster, return_inverse=True)
    order = np.random.default_rng(0).permutation(len(names))
    parts = min(PARTS, len(names))
    weights = np.stack([np.ones(len(pairs)), *((order[part] % parts != k) for k in range(parts))])
    sources = np.array([SOURCES.index(source) for _, source in votes.raters])
    count = _padded(len(pairs))
    fill = lambda x: np.concatenate([x, np.zeros((count - len(x), *x.shape[1:]), x.dtype)])
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        accuracy, eta = _fit(
            fill(pairs),
            fill(workers),
            fill(given.astype(np.float32)),
            fill(answers),
            fill((given @ WORTH).astype(np.float32)),
            fill(weights.T.astype(np.float32)).T,
            np.resize(np.concatenate([sources, np.zeros(_padded(len(sources)), int)]), _padded(len(sources))),
            num_items=_padded(len(votes.pairs)),
            num_answers=_padded(int(answers.max()) + 1),
        )
    told = np.bincount(workers, minlength=len(votes.raters))
    alone = [np.unique(cluster[workers == rater]) for rater in range(len(votes.raters))]
    rows = [
        who(votes, rater)
        | {"count": int(told[rater])}
        | {
            name: _jackknife(np.asarray(values)[:, rater], level) if len(alone[rater]) > 1 else nothing("one prompt")
            for name, values in (("accuracy", accuracy), ("eta", eta))
        }
        for rater in np.argsort(-told, kind="stable").tolist()
        if told[rater]
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
    """(accuracy, eta) [fits, W] for each row of weights [fits, N]."""

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


def _padded(size: int) -> int:
    """The next power of two: a store that grows is not compiled anew for every record."""
    return 1 << max(size - 1, 1).bit_length()


def _jackknife(values: Floats, level: float) -> Estimate:
    """values: the fit on all, then those without a part each."""
    p = np.clip(np.asarray(values, np.float64), 1e-4, 1 - 1e-4)
    logits = np.log(p / (1 - p))
    whole, parts = logits[0], logits[1:]
    if not np.isfinite(logits).all():
        return nothing("the model did not converge")
    count = len(parts)
    if count < 5:
        return {"value": float(values[0]), "low": None, "high": None, "reason": "too few prompts for an interval"}
    error = math.sqrt((count - 1) / count * float(((parts - parts.mean()) ** 2).sum()))
    z = NormalDist().inv_cdf((1 + level) / 2)
    squash = lambda x: float(0.5 + 0.5 * np.tanh(0.5 * x))
    return {"value": float(values[0]), "low": squash(whole - z * error), "high": squash(whole + z * error)}
