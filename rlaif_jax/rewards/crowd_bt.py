"""Crowd-BT: utilities of items and reliability of raters from comparisons.

Comparisons are flat arrays, as in `rewards.raters`.

N comparisons, I items, W workers (people, AI judges and rules alike). Pure: under jit, vmap, pmap and sharded; with
`axis_name` each device holds a share of the comparisons and all get the result of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import optax

from rlaif_jax.parallel import psum
from rlaif_jax.rewards.optimise import ValueAndGrad, lbfgs
from rlaif_jax.rewards.ratings import Utilities, as_float, group_sum


@flax.struct.dataclass
class CrowdBT:
    """Utilities of items and reliabilities of workers, from comparisons.

    Attributes:
        items: utilities whose differences are log odds; the standard errors treat the other items and the workers as
            known.
        reliability: [W], eta = P(a worker reports what it should): 1/2 guesses, below 1/2 reports the opposite.
        log_likelihood: [] in nats.
        steps: [] int32, of the optimiser.
        gradient: [], largest derivative at the optimiser's end, as in `rating_models.RatingModel`.
    """

    items: Utilities
    reliability: jax.Array
    log_likelihood: jax.Array
    steps: jax.Array
    gradient: jax.Array


def crowd_bt_log_prob(difference: jax.Array, logit: jax.Array, first_wins: jax.Array) -> jax.Array:
    """Computes the log-probability of a worker's report on a comparison.

    It is log(eta sigma(D) + (1 - eta) sigma(-D)) where the first item wins, and the log of the complement where the
    second wins.

    Chen 2013, "Pairwise ranking aggregation in a crowdsourced setting", equation 4.

    Args:
        difference: D [...], utility of the first item minus that of the second.
        logit: log(eta / (1 - eta)) [...] of the worker.
        first_wins: [...] in [0, 1]; for a soft label or a tie (1/2) the result is its expectation.

    Returns:
        [...] in nats.
    """
    sigmoid = jax.nn.log_sigmoid
    agrees = jnp.logaddexp(sigmoid(logit) + sigmoid(difference), sigmoid(-logit) + sigmoid(-difference))
    differs = jnp.logaddexp(sigmoid(logit) + sigmoid(-difference), sigmoid(-logit) + sigmoid(difference))
    return first_wins * agrees + (1 - first_wins) * differs


def crowd_bt(
    first: Any,
    second: Any,
    worker: Any,
    first_wins: Any,
    weight: Any = None,
    *,
    num_items: int,
    num_workers: int,
    prior: Any = (4.0, 1.0),
    utility_std: float = 2.0,
    max_steps: int = 200,
    axis_name: str | None = None,
) -> CrowdBT:
    """Fits utilities and reliabilities to comparisons, at the maximum of their posterior.

    Chen 2013, section 3.

    Args:
        first: [N] int, item.
        second: [N] int, item. A comparison of an item with itself is missing.
        worker: [N] int.
        first_wins: [N] in [0, 1]: 1, 0, 1/2 for a tie, or the probability a judge gives; not finite = missing.
        weight: [N], number of equal comparisons; 0 = missing. None: 1 each.
        num_items: I.
        num_workers: W.
        prior: ([W] or [], [W] or []), eta's Beta pseudo-counts of right and wrong reports. The default expects workers
            to be better than chance, which also settles the sign.
        utility_std: prior standard deviation of the utilities, whose mean is 0.
        max_steps: of the optimiser.
        axis_name: the comparisons are split over the devices of this pmap axis; all get the same result.
    """
    wins = as_float(first_wins)
    weight = jnp.ones_like(wins) if weight is None else jnp.asarray(weight).astype(wins.dtype)
    first, second, worker = (jnp.asarray(x, jnp.int32) for x in (first, second, worker))
    chex.assert_equal_shape((first, second, worker, wins, weight))
    weight = jnp.where(jnp.isfinite(wins) & (first != second), weight, 0.0)
    wins = jnp.where(weight > 0, wins, 0.5)
    right, wrong = (jnp.broadcast_to(jnp.asarray(p, wins.dtype), (num_workers,)) for p in prior)
    total = jnp.maximum(psum(weight.sum(), axis_name), 1.0)

    def likelihood(params: Any) -> jax.Array:
        utility, logit = params
        found = crowd_bt_log_prob(utility[first] - utility[second], logit[worker], wins)
        return jnp.sum(jnp.where(weight > 0, weight * found, 0.0))

    def penalty(params: Any) -> jax.Array:
        # The Beta density of the logit, so that its mode is right / (right + wrong) and never on the border.
        utility, logit = params
        reliability = right * jax.nn.log_sigmoid(logit) + wrong * jax.nn.log_sigmoid(-logit)
        return 0.5 * jnp.sum((utility / utility_std) ** 2) - jnp.sum(reliability)

    def item_sum(x: jax.Array) -> jax.Array:
        return group_sum(x, first, num_items, axis_name) + group_sum(x, second, num_items, axis_name)

    shown = item_sum(weight)
    seen = group_sum(weight, worker, num_workers, axis_name)
    start = (jnp.zeros(num_items, wins.dtype), jnp.log(right / wrong))
    scale = (
        jnp.sqrt(total / (shown / 4 + utility_std**-2)),
        jnp.sqrt(total / ((seen + right + wrong) / 4)),
    )
    (utility, logit), steps, gradient = lbfgs(
        _per_comparison(likelihood, penalty, total, axis_name), start, scale, max_steps=max_steps
    )
    valid = shown > 0
    # At the maximum the utilities have mean 0; the optimiser is slowest along that direction, so make it exact.
    utility -= jnp.sum(jnp.where(valid, utility, 0.0)) / jnp.maximum(valid.sum(), 1)
    information = item_sum(_information(utility[first] - utility[second], logit[worker]) * weight)
    return CrowdBT(
        items=Utilities(
            value=jnp.where(valid, utility, 0.0),
            stderr=jnp.where(valid, jax.lax.rsqrt(information + utility_std**-2), jnp.inf),
            valid=valid,
        ),
        reliability=jax.nn.sigmoid(logit),
        log_likelihood=psum(likelihood((utility, logit)), axis_name),
        steps=steps,
        gradient=gradient,
    )


def reliability_given(
    utility: jax.Array,
    first: Any,
    second: Any,
    worker: Any,
    first_wins: Any,
    weight: Any,
    *,
    num_workers: int,
    prior: Any = (4.0, 1.0),
    steps: int = 200,
) -> jax.Array:
    """Computes the reliabilities [W] of workers by EM, from comparisons of items of known utility.

    Args:
        utility: [I], of the items, in nats.
        first: [N] int, item.
        second: [N] int, item.
        worker: [N] int.
        first_wins: [N] in [0, 1].
        weight: [N], number of equal comparisons; 0 = missing.
        num_workers: W.
        prior: as in `crowd_bt`.
        steps: of EM.
    """
    wins, weight = as_float(first_wins), as_float(weight)
    chance = pair_probability(utility, first, second)
    right, wrong = (jnp.broadcast_to(jnp.asarray(p, wins.dtype), (num_workers,)) for p in prior)
    seen = group_sum(weight, worker, num_workers, None)

    def step(_: Any, eta: jax.Array) -> jax.Array:
        reports = eta[worker]
        faithful_first = reports * chance / (reports * chance + (1 - reports) * (1 - chance))
        faithful_second = reports * (1 - chance) / (reports * (1 - chance) + (1 - reports) * chance)
        faithful = weight * (wins * faithful_first + (1 - wins) * faithful_second)
        return (group_sum(faithful, worker, num_workers, None) + right) / (seen + right + wrong)

    return jax.lax.fori_loop(0, steps, step, right / (right + wrong))


def _per_comparison(
    likelihood: Callable[[Any], jax.Array], penalty: Callable[[Any], jax.Array], total: jax.Array, axis_name: str | None
) -> ValueAndGrad:
    """Returns the function params -> (penalty - log likelihood of all devices, gradient).

    Both are divided by `total`.
    """

    def objective(params: Any) -> tuple[jax.Array, Any]:
        value, gradient = jax.value_and_grad(lambda p: -likelihood(p))(params)
        own_value, own = jax.value_and_grad(penalty)(params)
        value, gradient = psum(value, axis_name) + own_value, optax.tree.add(psum(gradient, axis_name), own)
        return value / total, optax.tree.scale(1 / total, gradient)

    return objective


def _information(difference: jax.Array, logit: jax.Array) -> jax.Array:
    """Returns the Fisher information of one comparison about D: p'(D)^2 / (p (1 - p))."""
    p = jnp.exp(crowd_bt_log_prob(difference, logit, jnp.ones_like(difference)))
    slope = jnp.tanh(logit / 2) * jax.nn.sigmoid(difference) * jax.nn.sigmoid(-difference)
    return slope**2 / jnp.maximum(p * (1 - p), 1e-12)


def pair_probability(utility: jax.Array, first: Any, second: Any) -> jax.Array:
    """Computes soft labels [...]: P(first is better) = sigmoid(s_first - s_second).

    Args:
        utility: s [I], in nats.
        first: [...] int, item.
        second: [...] int, item.
    """
    return jax.nn.sigmoid(utility[jnp.asarray(first)] - utility[jnp.asarray(second)])


def judgement_probability(fit: CrowdBT, first: Any, second: Any, worker: Any, first_wins: Any) -> jax.Array:
    """Computes the probability that the first item is better, given one worker's report.

    The prior is `pair_probability`. The report must be about a comparison that is not among those of the fit.

    Args:
        fit: utilities and reliabilities.
        first: [...] int, item.
        second: [...] int, item.
        worker: [...] int, who reports.
        first_wins: [...] in [0, 1], the report; a soft report gives the mean over both reports.

    Returns:
        [...] in [0, 1].
    """
    prior = pair_probability(fit.items.value, first, second)
    eta, wins = fit.reliability[jnp.asarray(worker)], as_float(first_wins)
    if_first = eta * prior / jnp.maximum(eta * prior + (1 - eta) * (1 - prior), 1e-10)
    if_second = (1 - eta) * prior / jnp.maximum((1 - eta) * prior + eta * (1 - prior), 1e-10)
    return wins * if_first + (1 - wins) * if_second
