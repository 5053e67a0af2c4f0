"""Reliability of people, rules and AI judges in one rater model; runs on JAX.

Each rater is judged by the verdicts of the others; where there are people, by people.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from rlaif_jax.quality.clusters import PREFERENCE, SOURCES, EstimateFields, VoteShares, missing_estimate, rater_fields
from rlaif_jax.quality.values import Floats
from rlaif_jax.quality.votes import Votes
from rlaif_jax.rewards.crowd_bt import crowd_bt, reliability_given
from rlaif_jax.rewards.log_odds import log_odds
from rlaif_jax.rewards.raters import hierarchical_dawid_skene

Bools = NDArray[np.bool_]
MIN_SHARED = 10
"""With fewer pairs that two raters judged, no model is fitted."""
PARTS = 10
"""Parts of the jackknife: each further fit of the models leaves out one part of the prompts."""
CONVERGED = 1e-3
"""Crowd-BT has converged if its largest derivative is at most this, in nats a comparison by a parameter's scale."""
LESS_THAN_PEOPLE = 0.5
"""All other raters of a pair together count as this part of a person less than its people in what is believed of it."""
FINAL_VOICE = 100.0
"""An adjudication counts as this number of votes in the utilities of its pair's answers."""
_EM_STEPS = 400


def rater_model(votes: Votes, shares: VoteShares, people: str | None, level: float) -> dict[str, Any]:
    """Fits Dawid-Skene and Crowd-BT to the verdicts and returns every rater's reliability.

    `accuracy`: P(a verdict of the rater on a pair is right), by Dawid-Skene with first, tie and second as
    classes; raters of one source share a prior. `eta`: P(the rater reports what it sees), by Crowd-BT on the
    utilities of the answers. Without people, truth is what the raters together make most likely: raters that err alike
    are believed. With people it is anchored on them: pairs that no person judged do not count, all other raters of a pair
    together have half a voice less than its people in what is believed of it, and an adjudication is its truth.
    Intervals: delete-a-group jackknife over prompts, on the logit scale (a resample that doubles an
    item would count its raters twice). Runs on the host's CPU.

    Args:
        votes: all votes.
        shares: pair -> rater -> shares of first, tie and second, from `votes`.
        people: the source on which truth is anchored, "person" or "simulated", or None without people.
        level: coverage of the intervals, between 0 and 1.

    Returns:
        {"rows": a row for each rater, "note"}, or {"rows": [], "reason"} with too few pairs in common.
    """
    used, final, is_anchored = _used_pairs(votes, shares, people)
    shared = sum(len(shares[pair]) >= 2 for pair in used)
    if not is_anchored and shared < MIN_SHARED:
        return {"rows": [], "reason": f"{shared} pairs were judged by two raters or more; {MIN_SHARED} are needed"}
    adjudicator = len(votes.raters)  # its verdicts are evidence, and it has no row
    found: list[tuple[int, int, Floats, float]] = []
    for pair in used:
        voice = _voices(votes, shares[pair], people if is_anchored else None, pair in final)
        found += [(pair, rater, vote, voice[rater]) for rater, vote in shares[pair].items()]
        if pair in final:
            found.append((pair, adjudicator, np.eye(3)[final[pair]], FINAL_VOICE))
    pairs, workers = (np.array([entry[i] for entry in found]) for i in (0, 1))
    given, voices = np.array([entry[2] for entry in found]), np.array([entry[3] for entry in found])
    cluster = np.array([votes.pairs[pair].cluster for pair in pairs])
    answers = np.array([votes.pairs[pair].answers for pair in pairs])
    answers = np.unique(answers, return_inverse=True)[1].reshape(answers.shape)
    names, part = np.unique(cluster, return_inverse=True)
    order = np.random.default_rng(0).permutation(len(names))
    parts = min(PARTS, len(names))
    weights = np.stack([np.ones(len(pairs)), *((order[part] % parts != k) for k in range(parts))])
    sources = np.array([SOURCES.index(source) for source in (*(v.source for v in votes.raters), people or "person")])
    count = _next_power_of_two(len(pairs))
    settled = np.array([final.get(pair, -1) for pair in pairs])
    fill = lambda x: np.concatenate([x, np.zeros((count - len(x), *x.shape[1:]), x.dtype)])
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        accuracy, eta, steps, gradient = _fit(
            fill(pairs),
            fill(workers),
            fill(given.astype(np.float32)),
            fill(voices.astype(np.float32)),
            fill(settled),
            fill(answers),
            fill((given @ PREFERENCE).astype(np.float32)),
            fill(weights.T.astype(np.float32)).T,
            np.pad(sources, (0, _next_power_of_two(len(sources)) - len(sources))),
            num_items=_next_power_of_two(len(votes.pairs)),
            num_answers=_next_power_of_two(int(answers.max()) + 1),
        )
    converged = {"accuracy": np.asarray(steps) < _EM_STEPS, "eta": np.asarray(gradient) <= CONVERGED}
    verdicts = np.bincount(workers, minlength=adjudicator + 1)[:adjudicator]
    rows = [
        rater_fields(votes, rater)
        | {"count": int(verdicts[rater])}
        | {
            name: _estimate(np.asarray(values)[:, rater], converged[name], level)
            if len(np.unique(cluster[workers == rater])) > 1
            else missing_estimate("one prompt")
            for name, values in (("accuracy", accuracy), ("eta", eta))
        }
        for rater in np.argsort(-verdicts, kind="stable").tolist()
        if verdicts[rater]
    ]
    return {"rows": rows, "note": _note(is_anchored, converged)}


def _used_pairs(votes: Votes, shares: VoteShares, people: str | None) -> tuple[Iterable[int], Mapping[int, int], bool]:
    """Returns (the pairs to fit, verdicts of the adjudicated ones, whether truth is anchored on people).

    With fewer than `MIN_SHARED` pairs of people and others, truth is not anchored and all pairs are used.
    """
    final = {pair: verdict for (source, pair), verdict in votes.decided.items() if source == people and pair in shares}
    anchored = [pair for pair, by_rater in shares.items() if pair in final or _of_source(votes, by_rater, people)]
    if people is None or sum(len(shares[pair]) + (pair in final) >= 2 for pair in anchored) < MIN_SHARED:
        return shares, {}, False
    return anchored, final, True


def _of_source(votes: Votes, raters: Iterable[int], source: str | None) -> list[int]:
    return [rater for rater in raters if votes.raters[rater].source == source]


def _voices(votes: Votes, raters: Iterable[int], people: str | None, is_final: bool) -> dict[int, float]:
    """Returns by how much each rater's vote counts in what is believed of a pair.

    `raters` are those of the pair. With `people` None all count alike.
    """
    persons = _of_source(votes, raters, people)
    others = [rater for rater in raters if rater not in persons]
    if is_final:
        return dict.fromkeys(raters, 0.0)
    voice = (len(persons) - LESS_THAN_PEOPLE) / max(len(others), 1) if people is not None else 1.0
    return dict.fromkeys(persons, 1.0) | dict.fromkeys(others, min(voice, 1.0))


def _note(is_anchored: bool, converged: Mapping[str, Bools]) -> str:
    """Returns what the table should be read with."""
    anchor = "Truth is what all raters together make most likely: raters that err alike are believed."
    if is_anchored:
        anchor = (
            "Truth is anchored on people: the others together count for less than the people of a pair, pairs that no person "
            "judged do not count, and an adjudication is the truth of its pair."
        )
    names = {"accuracy": "Dawid-Skene", "eta": "Crowd-BT"}
    failed = [
        f"{model} did NOT converge in {int((~converged[name]).sum())} of {len(converged[name])} fits."
        for name, model in names.items()
        if not converged[name].all()
    ]
    return " ".join([anchor, *failed])


@partial(jax.jit, static_argnames=("num_items", "num_answers"))
def _fit(
    pairs: jax.Array,
    workers: jax.Array,
    given: jax.Array,
    voices: jax.Array,
    settled: jax.Array,
    answers: jax.Array,
    wins: jax.Array,
    weights: jax.Array,
    sources: jax.Array,
    *,
    num_items: int,
    num_answers: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Fits both models once for each row of weights.

    Args:
        pairs: [N] int, the pair that each vote is on.
        workers: [N] int, the rater of each vote.
        given: [N, 3], the vote as a distribution over (first, tie, second).
        voices: [N], by how much the vote counts in what is believed of the pair.
        settled: [N] int, the adjudicated verdict on the pair; -1: not adjudicated.
        answers: [N, 2] int, the two answers of the pair.
        wins: [N], the vote's preference for the first answer.
        weights: [fits, N], 0 where a fit leaves a vote out.
        sources: [W] int, the source of each rater.
        num_items: number of pairs, or more.
        num_answers: number of answers, or more.

    Returns:
        (accuracy [fits, W], eta [fits, W], steps of Dawid-Skene [fits], largest derivative of Crowd-BT [fits]).
    """

    def one(weight: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        count = sources.shape[0]
        by_worker = lambda x: jax.ops.segment_sum(x, workers, count)
        is_open = settled < 0
        consensus = hierarchical_dawid_skene(
            pairs,
            workers,
            given,
            weight * is_open,
            num_items=num_items,
            num_classes=3,
            group=sources,
            num_groups=len(SOURCES),
            num_workers=count,
            evidence=voices,
            max_iterations=_EM_STEPS,
        )
        # Adjudicated pairs were chosen because their verdicts are doubtful: they count in a rater's accuracy, and teach
        # nothing about the rater's verdicts on other pairs.
        right = by_worker(jnp.where(is_open, 0.0, weight * given[jnp.arange(len(given)), settled]))
        opened, closed = by_worker(weight * is_open), by_worker(weight * ~is_open)
        accuracy = (consensus.accuracy * opened + right) / jnp.maximum(opened + closed, 1e-9)
        compared = (answers[:, 0], answers[:, 1], workers, wins)
        ranked = crowd_bt(*compared, weight * voices, num_items=num_answers, num_workers=count)
        eta = reliability_given(ranked.items.value, *compared, weight, num_workers=count)
        return accuracy, eta, consensus.iterations, ranked.gradient

    return jax.lax.map(one, jnp.asarray(weights))


def _next_power_of_two(size: int) -> int:
    """Returns the next power of two, so that a store that grows is not compiled anew for every record."""
    return 1 << max(size - 1, 1).bit_length()


def _estimate(values: Floats, converged: Bools, level: float) -> EstimateFields:
    """Returns the jackknife estimate of `values` [1 + parts].

    The first value is the fit on all votes, the others are the fits without one part. Of a fit that has not `converged`
    nothing is made.
    """
    if not (converged[0] and np.isfinite(values[0])):
        return missing_estimate("the model did not converge")
    bare = {"value": float(values[0]), "low": None, "high": None}
    if not (converged.all() and np.isfinite(values).all()):
        return bare | {"reason": "the model did not converge without a part of the prompts"}
    if len(values) - 1 < 5:
        return bare | {"reason": "too few prompts for an interval"}
    whole, *parts = map(log_odds, values)
    error = math.sqrt((len(parts) - 1) / len(parts) * float(((np.array(parts) - np.mean(parts)) ** 2).sum()))
    z = NormalDist().inv_cdf((1 + level) / 2)
    return {"value": float(values[0]), "low": float(expit(whole - z * error)), "high": float(expit(whole + z * error))}
