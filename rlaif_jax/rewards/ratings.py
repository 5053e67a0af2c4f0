"""Ratings to utilities: raw means, per-rater z-scores, and two models of raters who differ in mean, stretch and noise.

N ratings, I items, R raters, C categories, Q nodes of the quadrature. Every function takes flat arrays item [N] int,
rater [N] int, value [N] (any float or integer type; computed in float32, in float64 if given so) and weight [N] or None
(= 1 each), a number of equal judgements; a rating of weight 0, or one that is not finite, is missing. `num_items` and
`num_raters` are static. Pure: under jit, vmap, pmap and sharded; with `axis_name` each device holds a share of the
ratings and all get the result of the whole. An item nobody has rated is `valid = False`, never 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from rlaif_jax.parallel import psum

ValueAndGrad = Callable[[Any], tuple[jax.Array, Any]]


@flax.struct.dataclass
class Utilities:
    """What I items are worth: value [I] float32 (0 where not valid), stderr [I] its standard error in the same unit
    (infinite where not valid), valid [I] bool, whether the item has a rating."""

    value: jax.Array
    stderr: jax.Array
    valid: jax.Array


@flax.struct.dataclass
class RatingModel:
    """A fitted model of ratings: what a rater feels is response = bias + scale * utility + noise * e.

    Attributes:
        items: utilities, in standard deviations of the items (prior N(0, 1)): posterior mean and standard deviation.
        rater_bias: [R] > 0 is generous. rater_scale: [R] 1 is typical, 0 does not see the item, < 0 judges the wrong
          way round. rater_noise: [R] tau of logistic noise (ordinal), standard deviation of normal noise (Gaussian).
          A rater without ratings has the typical 0, 1 and noise.
        thresholds: [C - 1] of responses, ascending (ordinal), [0] (Gaussian).
        centre, unit: [] value = centre + unit * response, in points of the scale (Gaussian); 0 and 1 (ordinal).
        log_likelihood: [] of the ratings, in nats, items integrated out.
        steps: [] int32, of the optimiser. gradient: [] the largest derivative at its end by a typical change of a
          parameter, in nats a rating: 1e-3 or less has converged.
    """

    items: Utilities
    rater_bias: jax.Array
    rater_scale: jax.Array
    rater_noise: jax.Array
    thresholds: jax.Array
    centre: jax.Array
    unit: jax.Array
    log_likelihood: jax.Array
    steps: jax.Array
    gradient: jax.Array


class _Ratings(NamedTuple):
    item: jax.Array
    rater: jax.Array
    value: jax.Array
    weight: jax.Array


def as_float(x: Any) -> jax.Array:
    """float32, or float64 where x is."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32)


def _ratings(item: Any, rater: Any, value: Any, weight: Any) -> _Ratings:
    value = as_float(value)
    weight = jnp.ones_like(value) if weight is None else jnp.asarray(weight).astype(value.dtype)
    item, rater = jnp.asarray(item, jnp.int32), jnp.asarray(rater, jnp.int32)
    chex.assert_equal_shape((item, rater, value, weight))
    chex.assert_rank(value, 1)
    weight = jnp.where(jnp.isfinite(value), weight, 0.0)
    return _Ratings(item, rater, jnp.where(weight > 0, value, 0.0), weight)


def group_sum(x: jax.Array, group: jax.Array, size: int, axis_name: str | None = None) -> jax.Array:
    """Sums [size, ...] of x [N, ...] by group [N], over all devices of `axis_name`."""
    return psum(jax.ops.segment_sum(x, group, size), axis_name)


def minimise(
    objective: ValueAndGrad, start: Any, scale: Any, *, max_steps: int = 200, tol: float = 1e-4
) -> tuple[Any, jax.Array, jax.Array]:
    """(parameters, steps [], largest derivative []) by L-BFGS with backtracking; deterministic.

    objective: params -> (value, gradient), which nothing differentiates: it may hold collectives. scale: the typical
    change of each parameter, about 1 / sqrt(curvature); derivatives are with respect to parameter / scale. Stops when
    none is above `tol`, when 5 steps in a row lower the value by less than its rounding, or when no step does.
    """
    memory = optax.scale_by_lbfgs(memory_size=20)
    origin, unravel = ravel_pytree(start)  # one vector of all parameters: small programs compile faster
    ruler = ravel_pytree(scale)[0]

    def evaluate(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, gradient = objective(unravel(origin + ruler * x))
        return value, ruler * ravel_pytree(gradient)[0]

    def downhill(x: jax.Array, gradient: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        step, new = memory.update(gradient, state, x)
        fine = jnp.vdot(step, gradient) > 0  # not so after negative curvature: forget, and go down the gradient
        return -jnp.where(fine, step, gradient), select(fine, new, memory.init(x))

    def select(condition: jax.Array, a: Any, b: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(condition, a, b), a, b)

    def more(carry: Any) -> jax.Array:
        _, _, gradient, _, _, length, steps, idle = carry
        return (steps < max_steps) & (jnp.max(jnp.abs(gradient)) > tol) & (idle < 5) & (length > 1e-6)

    def trial(carry: Any) -> Any:
        x, value, gradient, direction, state, length, steps, idle = carry
        there = x + length * direction
        new_value, new_gradient = evaluate(there)
        rounding = jnp.finfo(value.dtype).eps * jnp.abs(value)
        taken = new_value <= value + 1e-4 * length * jnp.vdot(gradient, direction) + rounding  # false for NaN
        new_direction, new_state = downhill(there, new_gradient, state)
        idle = jnp.where(new_value < value - rounding, 0, idle + 1)
        after = (there, new_value, new_gradient, new_direction, new_state, jnp.ones_like(length), steps + 1, idle)
        return select(taken, after, (x, value, gradient, direction, state, length / 3, steps, carry[-1]))

    x = jnp.zeros_like(origin)
    value, gradient = evaluate(x)
    direction, state = downhill(x, gradient, memory.init(x))
    carry = (x, value, gradient, direction, state, jnp.ones_like(value), jnp.int32(0), jnp.int32(0))
    x, _, gradient, _, _, _, steps, _ = jax.lax.while_loop(more, trial, carry)
    return unravel(origin + ruler * x), steps, jnp.max(jnp.abs(gradient))


# ---- without a model


def raw_mean(
    item: Any, rater: Any, value: Any, weight: Any = None, *, num_items: int, axis_name: str | None = None
) -> Utilities:
    """Mean rating of each item. Its standard error pools the spread of ratings within items, sigma / sqrt(weight)."""
    return _mean(_ratings(item, rater, value, weight), num_items, axis_name)


def _mean(ratings: _Ratings, num_items: int, axis_name: str | None) -> Utilities:
    item, _, value, weight = ratings
    count = group_sum(weight, item, num_items, axis_name)
    valid = count > 0
    mean = group_sum(weight * value, item, num_items, axis_name) / jnp.where(valid, count, 1.0)
    spread = psum(jnp.sum(weight * (value - mean[item]) ** 2), axis_name)
    freedom = jnp.maximum(count.sum() - valid.sum(), 1.0)
    stderr = jnp.sqrt(spread / freedom / jnp.where(valid, count, 1.0))
    return Utilities(value=mean, stderr=jnp.where(valid, stderr, jnp.inf), valid=valid)


def z_score_mean(
    item: Any,
    rater: Any,
    value: Any,
    weight: Any = None,
    *,
    num_items: int,
    num_raters: int,
    axis_name: str | None = None,
) -> Utilities:
    """Mean over raters of (value - rater's mean) / rater's standard deviation.

    A rater with one rating, or who gives the same to all, puts no item above another: these ratings count as missing.
    """
    ratings = _ratings(item, rater, value, weight)
    mean, std, _ = _by_rater(ratings, num_raters, axis_name)
    informs = std > 0
    z = (ratings.value - mean[ratings.rater]) / jnp.where(informs, std, 1.0)[ratings.rater]
    weights = jnp.where(informs[ratings.rater], ratings.weight, 0.0)
    return _mean(ratings._replace(value=z, weight=weights), num_items, axis_name)


def _by_rater(ratings: _Ratings, num_raters: int, axis_name: str | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean [R], standard deviation [R] (0 where it is rounding) and weight [R] of each rater."""
    _, rater, value, weight = ratings
    count = group_sum(weight, rater, num_raters, axis_name)
    safe = jnp.where(count > 0, count, 1.0)
    mean = group_sum(weight * value, rater, num_raters, axis_name) / safe
    std = jnp.sqrt(group_sum(weight * (value - mean[rater]) ** 2, rater, num_raters, axis_name) / safe)
    rounding = 8 * jnp.finfo(value.dtype).eps * jnp.maximum(jnp.abs(mean), 1e-30)
    return mean, jnp.where(std > rounding, std, 0.0), count


# ---- the ordinal model


def bin_values(value: Any, weight: Any = None, *, num_bins: int) -> jax.Array:
    """Categories [N] int32 in 0 .. num_bins - 1 of continuous ratings: bins of about equal weight, equal values together.

    All of the ratings at once (no `axis_name`): bins are cut on the pooled ratings.
    """
    zeros = jnp.zeros_like(jnp.asarray(value), jnp.int32)
    _, _, value, weight = _ratings(zeros, zeros, value, weight)
    keys = jnp.where(weight > 0, value, jnp.inf)
    order = jnp.argsort(keys)
    ranked, mass = keys[order], jnp.cumsum(weight[order])
    first = jnp.searchsorted(ranked, value, side="left", method="sort")
    last = jnp.searchsorted(ranked, value, side="right", method="sort")
    before = jnp.where(first > 0, mass[first - 1], 0.0)
    middle = (before + mass[jnp.maximum(last - 1, 0)]) / 2 / jnp.maximum(mass[-1], 1e-30)
    return jnp.clip(jnp.floor(middle * num_bins).astype(jnp.int32), 0, num_bins - 1)


def ordinal_log_prob(category: jax.Array, response: jax.Array, noise: jax.Array, thresholds: jax.Array) -> jax.Array:
    """log P(Y = category), P(Y <= c) = sigmoid((theta_c - response) / noise): McCullagh 1980.

    category, noise [...]; response, what the rater feels without noise, broadcasts against them; thresholds [C - 1]
    ascending. In nats; exact also where both tails round to 1: log(sigma(u) - sigma(l)) = log sigma(u)
    + log sigma(-l) + log(1 - exp(l - u)).
    """
    far = jnp.full(1, 1e4, thresholds.dtype)
    ends = jnp.concatenate([-far, thresholds, far])
    lower = (ends[category] - response) / noise
    upper = (ends[category + 1] - response) / noise
    width = (ends[category + 1] - ends[category]) / noise
    return jax.nn.log_sigmoid(upper) + jax.nn.log_sigmoid(-lower) + jnp.log(-jnp.expm1(-jnp.maximum(width, 1e-12)))


def fit_ordinal(
    item: Any,
    rater: Any,
    category: Any,
    weight: Any = None,
    *,
    num_items: int,
    num_raters: int,
    num_categories: int,
    bias_std: float = 1.0,
    scale_std: float = 0.5,
    noise_std: float = 0.5,
    num_nodes: int = 17,
    max_steps: int = 200,
    axis_name: str | None = None,
) -> RatingModel:
    """P(Y <= c) = sigmoid((theta_c - b_rater - c_rater s_item) / tau_rater), categories 0 .. C - 1, s ~ N(0, 1).

    The cumulative-logit (graded response) model of Samejima 1969 with a rater's own bias b, scale c and noise tau.
    With scale_std = 0 every c is 1, and a rater who gives the same to everything can only be explained as a sharp one
    (small tau) whom all others contradict: leave it free unless raters are known to use the whole scale.
    The items are integrated out by adaptive quadrature (Bock & Aitkin 1981), not maximised: with two or three ratings
    an item, the joint maximum lets single raters fit their items perfectly, tau -> 0. The rest is at the maximum of its
    posterior: b ~ N(0, bias_std^2), c ~ N(1, scale_std^2), log tau ~ N(a common level, noise_std^2); raters with few
    ratings shrink towards the others. category [N]; one that is not 0 .. C - 1 is missing; use `bin_values` for a
    continuous scale. Memory O(N num_nodes).
    """
    ratings = _ratings(item, rater, category, weight)
    present = (ratings.weight > 0) & (ratings.value >= 0) & (ratings.value < num_categories)
    ratings = ratings._replace(weight=jnp.where(present, ratings.weight, 0.0))
    index = jnp.where(present, ratings.value, 0).astype(jnp.int32)
    total = jnp.maximum(psum(ratings.weight.sum(), axis_name), 1.0)
    dtype = ratings.value.dtype
    cumulative = jnp.cumsum(group_sum(ratings.weight, index, num_categories, axis_name) + 0.5)
    cuts = jax.scipy.special.logit(cumulative[:-1] / cumulative[-1])
    start = {
        "first": cuts[:1],
        "steps": jnp.log(jnp.diff(cuts)),
        "bias": jnp.zeros(num_raters, dtype),
        "scale": jnp.zeros(num_raters, dtype),
        "level": jnp.zeros((), dtype),
        "noise": jnp.zeros(num_raters, dtype),
    }

    def named(params: Any) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Bias, scale and noise [R], thresholds [C - 1]."""
        thresholds = jnp.concatenate([params["first"], params["first"] + jnp.cumsum(jnp.exp(params["steps"]))])
        return (
            params["bias"],
            1 + scale_std * params["scale"],
            jnp.exp(params["level"] + noise_std * params["noise"]),
            thresholds,
        )

    def log_probs(params: Any, nodes: jax.Array) -> jax.Array:
        """[N, Q], times the weights."""
        bias, scale, noise, thresholds = named(params)
        row = lambda x: x[ratings.rater][:, None]
        response = row(bias) + row(scale) * nodes[ratings.item]
        found = ordinal_log_prob(index[:, None], response, row(noise), thresholds)
        return jnp.where(present[:, None], ratings.weight[:, None] * found, 0.0)

    def prior(params: Any) -> jax.Array:
        # The prior of the steps is weak; it keeps the edges of categories that nobody used from running away.
        penalty = jnp.sum((params["bias"] / bias_std) ** 2)
        penalty += jnp.sum(params["scale"] ** 2) + jnp.sum(params["noise"] ** 2)
        return 0.5 * (penalty + jnp.sum(((params["steps"] - start["steps"]) / 2) ** 2)) / total

    def posterior(params: Any, nodes: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """log evidence [I] and posterior weights [I, Q] of the items on their nodes."""
        normal = -0.5 * nodes**2 - 0.5 * jnp.log(2 * jnp.pi) + jnp.log(step)[:, None]
        joint = normal + group_sum(log_probs(params, nodes), ratings.item, num_items, axis_name)
        evidence = jax.nn.logsumexp(joint, axis=1)
        return evidence, jnp.exp(joint - evidence[:, None])

    count = group_sum(ratings.weight, ratings.rater, num_raters, axis_name)
    one, each = jnp.ones((), dtype), jnp.sqrt(total / (count + 1))
    typical = {
        "first": one,
        "steps": jnp.full(num_categories - 2, 4.0, dtype),
        "bias": each,
        "scale": each,
        "level": one,
        "noise": each,
    }
    valid = group_sum(ratings.weight, ratings.item, num_items, axis_name) > 0
    grid = jnp.linspace(-6.0, 6.0, num_nodes).astype(dtype)

    def quadrature(mean: jax.Array, std: jax.Array) -> tuple[jax.Array, jax.Array]:
        return mean[:, None] + std[:, None] * grid, std * (grid[1] - grid[0])

    def refined(params: Any, mean: jax.Array, std: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The items' posterior mean and standard deviation, on ever finer nodes."""

        def finer(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            nodes, step = quadrature(*carry)
            return _moments(posterior(params, nodes, step)[1], nodes, step)

        return jax.lax.fori_loop(0, 4, finer, (mean, std))

    def fit_round(_: Any, carry: Any) -> Any:
        params, mean, std, steps, _ = carry
        nodes, step = quadrature(mean, std)

        def objective(params: Any) -> tuple[jax.Array, Any]:
            evidence, weights = posterior(params, nodes, step)
            share = weights[ratings.item]
            # Fisher's identity: the gradient of the log evidence is the posterior mean of the gradient.
            gradient = jax.grad(lambda p: -jnp.sum(share * log_probs(p, nodes)) / total)(params)
            value, own = jax.value_and_grad(prior)(params)
            loss = -jnp.sum(jnp.where(valid, evidence, 0.0)) / total
            return loss + value, optax.tree.add(psum(gradient, axis_name), own)

        params, more, gradient = minimise(objective, params, typical, max_steps=max_steps)
        return params, *refined(params, mean, std), steps + more, gradient

    # Adaptive quadrature: after a first fit, each item's nodes go where its posterior is.
    mean, std = jnp.zeros(num_items, dtype), jnp.ones(num_items, dtype)
    carry = (start, mean, std, jnp.int32(0), jnp.zeros((), dtype))
    params, mean, std, steps, gradient = jax.lax.fori_loop(0, 2, fit_round, carry)
    evidence, _ = posterior(params, *quadrature(mean, std))
    bias, scale, noise, thresholds = named(params)
    return RatingModel(
        items=_items(mean, std, valid),
        rater_bias=bias,
        rater_scale=scale,
        rater_noise=noise,
        thresholds=thresholds,
        centre=jnp.zeros((), dtype),
        unit=jnp.ones((), dtype),
        log_likelihood=jnp.sum(jnp.where(valid, evidence, 0.0)),
        steps=steps,
        gradient=gradient,
    )


def _moments(weights: jax.Array, nodes: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Posterior mean [I] and standard deviation [I]; not below half a step, which is the finest a grid can tell."""
    mean = jnp.sum(weights * nodes, axis=1)
    variance = jnp.sum(weights * (nodes - mean[:, None]) ** 2, axis=1)
    return mean, jnp.maximum(jnp.sqrt(variance), step / 2)


def _items(mean: jax.Array, std: jax.Array, valid: jax.Array) -> Utilities:
    return Utilities(jnp.where(valid, mean, 0.0), jnp.where(valid, std, jnp.inf), valid)


# ---- the Gaussian model


def fit_gaussian(
    item: Any,
    rater: Any,
    value: Any,
    weight: Any = None,
    *,
    num_items: int,
    num_raters: int,
    bias_std: float = 1.0,
    scale_std: float = 0.5,
    noise_std: float = 0.5,
    max_steps: int = 200,
    axis_name: str | None = None,
) -> RatingModel:
    """value = centre + unit (b_rater + c_rater s_item + sigma_rater e), s ~ N(0, 1), e ~ N(0, 1): continuous scales.

    One factor with unequal loadings and noise (congeneric measures: Joreskog 1971) on incomplete data. The items are
    integrated out in closed form; the rest is at the maximum of its posterior: b ~ N(0, bias_std^2),
    c ~ N(1, scale_std^2), log sigma ~ N(a common level, noise_std^2). It believes the raters who agree with each other:
    where two camps measure different things, utilities follow one of them.
    """
    ratings = _ratings(item, rater, value, weight)
    item, rater, value, weight = ratings
    total = jnp.maximum(psum(weight.sum(), axis_name), 1.0)
    centre = psum(jnp.sum(weight * value), axis_name) / total
    spread = jnp.sqrt(psum(jnp.sum(weight * (value - centre) ** 2), axis_name) / total)
    unit = jnp.where(spread > 0, spread, 1.0)
    scaled = jnp.where(weight > 0, (value - centre) / unit, 0.0)
    dtype = value.dtype
    zeros = jnp.zeros(num_raters, dtype)
    half = jnp.asarray(0.5, dtype)
    start = {
        "centre": jnp.zeros((), dtype),
        "bias": zeros,
        "level": jnp.log(half) / 2,
        "scale": zeros,
        "noise_level": jnp.zeros((), dtype),
        "noise": zeros,
    }

    def named(params: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Intercept, loading and noise [R], in standard deviations of the ratings."""
        level = jnp.exp(params["level"])
        noise = level * jnp.exp(params["noise_level"] + noise_std * params["noise"])
        return params["centre"] + level * params["bias"], level * (1 + scale_std * params["scale"]), noise

    def posterior(params: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Mean, variance and log evidence [I] of the items."""
        intercept, loading, noise = named(params)
        residual, slope, variance = scaled - intercept[rater], loading[rater], noise[rater] ** 2
        precision = 1 + group_sum(weight * slope**2 / variance, item, num_items, axis_name)
        mean = group_sum(weight * slope * residual / variance, item, num_items, axis_name) / precision
        single = -0.5 * weight * (residual**2 / variance + jnp.log(2 * jnp.pi * variance))
        evidence = group_sum(single, item, num_items, axis_name) + 0.5 * (precision * mean**2 - jnp.log(precision))
        return mean, 1 / precision, evidence

    def prior(params: Any) -> jax.Array:
        penalty = jnp.sum((params["bias"] / bias_std) ** 2)
        penalty += jnp.sum(params["scale"] ** 2) + jnp.sum(params["noise"] ** 2)
        return 0.5 * penalty / total

    def objective(params: Any) -> tuple[jax.Array, Any]:
        mean, variance, evidence = posterior(params)

        def expected(params: Any) -> jax.Array:
            """Fisher's identity, as in the ordinal model."""
            intercept, loading, noise = named(params)
            residual = scaled - intercept[rater] - loading[rater] * mean[item]
            square = residual**2 + loading[rater] ** 2 * variance[item]
            return jnp.sum(weight * (0.5 * square / noise[rater] ** 2 + jnp.log(noise[rater]))) / total

        value, own = jax.value_and_grad(prior)(params)
        return value - evidence.sum() / total, optax.tree.add(psum(jax.grad(expected)(params), axis_name), own)

    one, each = jnp.ones((), dtype), jnp.sqrt(total / (group_sum(weight, rater, num_raters, axis_name) + 1))
    typical = {"centre": one, "bias": each, "level": one, "scale": each, "noise_level": one, "noise": each}
    params, steps, gradient = minimise(objective, start, typical, max_steps=max_steps)
    mean, variance, evidence = posterior(params)
    valid = group_sum(weight, item, num_items, axis_name) > 0
    return RatingModel(
        items=_items(mean, jnp.sqrt(variance), valid),
        rater_bias=params["bias"],
        rater_scale=1 + scale_std * params["scale"],
        rater_noise=jnp.exp(params["noise_level"] + noise_std * params["noise"]),
        thresholds=jnp.zeros(0, dtype),
        centre=centre + unit * params["centre"],
        unit=unit * jnp.exp(params["level"]),
        log_likelihood=evidence.sum() - total * jnp.log(unit),
        steps=steps,
        gradient=gradient,
    )
