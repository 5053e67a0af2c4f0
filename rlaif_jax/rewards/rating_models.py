"""Models of raters who differ in mean, stretch and noise: utilities from ratings.

Ratings are ordinal or continuous.

N ratings, I items, R raters, C categories, Q nodes of the quadrature; flat arrays as in `rewards.ratings`. The items are
integrated out; the raters' parameters are at the maximum of their posterior. Pure: under jit, vmap, pmap and sharded;
with `axis_name` each device holds a share of the ratings and all get the result of the whole.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from rlaif_jax.parallel import psum
from rlaif_jax.rewards.optimise import ValueAndGrad, lbfgs
from rlaif_jax.rewards.ratings import RatingRows, Utilities, group_sum, rating_rows

Params = dict[str, jax.Array]


@flax.struct.dataclass
class RatingModel:
    """A fitted model of ratings: a rater's response to an item is bias + scale * utility + noise * e.

    Attributes:
        items: utilities, in standard deviations of the items (prior N(0, 1)): posterior mean and standard deviation.
        rater_bias: [R], positive for a generous rater; 0 for a rater without ratings.
        rater_scale: [R], 1 is typical (and for a rater without ratings), 0 does not see the item, negative judges the
            wrong way round.
        rater_noise: [R], tau of logistic noise (ordinal), standard deviation of normal noise (Gaussian).
        thresholds: [C - 1] of responses, ascending (ordinal); [0] (Gaussian).
        centre: [], value = centre + unit * response, in points of the scale (Gaussian); 0 (ordinal).
        unit: [], as there; 1 (ordinal).
        log_likelihood: [] of the ratings, in nats, items integrated out.
        steps: [] int32, of the optimiser.
        gradient: [], the largest derivative at the optimiser's end by a typical change of a parameter, in nats a
            rating: 1e-3 or less has converged.
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


@dataclasses.dataclass(frozen=True)
class RaterSpread:
    """Prior standard deviations of how raters differ: of bias, of scale, and of the logarithm of noise."""

    bias: float
    scale: float
    noise: float

    def penalty(self, params: Params) -> jax.Array:
        """Returns twice the negative log prior of the raters' parameters, up to a constant."""
        penalty = jnp.sum((params["bias"] / self.bias) ** 2)
        return penalty + (jnp.sum(params["scale"] ** 2) + jnp.sum(params["noise"] ** 2))


def _items(mean: jax.Array, std: jax.Array, valid: jax.Array) -> Utilities:
    return Utilities(jnp.where(valid, mean, 0.0), jnp.where(valid, std, jnp.inf), valid)


# ---- the ordinal model


def bin_values(value: Any, weight: Any = None, *, num_bins: int) -> jax.Array:
    """Returns categories [N] int32 in 0 .. num_bins - 1 of continuous ratings [N].

    Bins have about equal weight.

    Equal values share a bin. Bins are cut on the pooled ratings, so give all of them at once (no `axis_name`).
    """
    zeros = jnp.zeros_like(jnp.asarray(value), jnp.int32)
    _, _, value, weight = rating_rows(zeros, zeros, value, weight)
    keys = jnp.where(weight > 0, value, jnp.inf)
    order = jnp.argsort(keys)
    ranked, mass = keys[order], jnp.cumsum(weight[order])
    first = jnp.searchsorted(ranked, value, side="left", method="sort")
    last = jnp.searchsorted(ranked, value, side="right", method="sort")
    before = jnp.where(first > 0, mass[first - 1], 0.0)
    middle = (before + mass[jnp.maximum(last - 1, 0)]) / 2 / jnp.maximum(mass[-1], 1e-30)
    return jnp.clip(jnp.floor(middle * num_bins).astype(jnp.int32), 0, num_bins - 1)


def ordinal_log_prob(category: jax.Array, response: jax.Array, noise: jax.Array, thresholds: jax.Array) -> jax.Array:
    """Computes log P(Y = category) in nats of the cumulative-logit model (McCullagh 1980).

    P(Y <= c) = sigmoid((theta_c - response) / noise).

    Exact also where both tails round to 1: log(sigma(u) - sigma(l)) = log sigma(u) + log sigma(-l) + log(1 - exp(l - u)).

    Args:
        category: [...] int.
        response: the rater's response without noise; broadcasts against `category`.
        noise: [...], positive.
        thresholds: theta [C - 1], ascending.
    """
    far = jnp.full(1, 1e4, thresholds.dtype)
    ends = jnp.concatenate([-far, thresholds, far])
    lower = (ends[category] - response) / noise
    upper = (ends[category + 1] - response) / noise
    width = (ends[category + 1] - ends[category]) / noise
    return jax.nn.log_sigmoid(upper) + jax.nn.log_sigmoid(-lower) + jnp.log(-jnp.expm1(-jnp.maximum(width, 1e-12)))


@dataclasses.dataclass(frozen=True)
class _OrdinalModel:
    """The ordinal model of some ratings: its posterior as a function of parameters.

    The parameters are those of the raters and the thresholds.

    Attributes:
        ratings: the ratings; weight 0 where the category is missing.
        category: [N] int32, 0 where missing.
        valid: [I] bool, whether the item has a rating.
        total: [], weight of all ratings on all devices.
        cuts: [C - 1], thresholds that would give the observed shares of the categories.
        spread: prior of the raters' parameters.
        num_raters: R.
        num_items: I.
        axis_name: pmap axis that the ratings are split over, or None.
    """

    ratings: RatingRows
    category: jax.Array
    valid: jax.Array
    total: jax.Array
    cuts: jax.Array
    spread: RaterSpread
    num_raters: int
    num_items: int
    axis_name: str | None

    def start(self) -> Params:
        """Returns the parameters of typical raters, with thresholds at the cuts."""
        zero, zeros = (jnp.zeros(shape, self.ratings.value.dtype) for shape in ((), self.num_raters))
        steps = jnp.log(jnp.diff(self.cuts))
        return {"first": self.cuts[:1], "steps": steps, "bias": zeros, "scale": zeros, "level": zero, "noise": zeros}

    def typical_change(self) -> Params:
        """Returns the typical change of each parameter, the `scale` of `lbfgs`."""
        count = group_sum(self.ratings.weight, self.ratings.rater, self.num_raters, self.axis_name)
        dtype = self.ratings.value.dtype
        one, each = jnp.ones((), dtype), jnp.sqrt(self.total / (count + 1))
        steps = jnp.full(len(self.cuts) - 1, 4.0, dtype)
        return {"first": one, "steps": steps, "bias": each, "scale": each, "level": one, "noise": each}

    def raters(self, params: Params) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Returns bias, scale and noise [R], thresholds [C - 1]."""
        thresholds = jnp.concatenate([params["first"], params["first"] + jnp.cumsum(jnp.exp(params["steps"]))])
        noise = jnp.exp(params["level"] + self.spread.noise * params["noise"])
        return params["bias"], 1 + self.spread.scale * params["scale"], noise, thresholds

    def log_probs(self, params: Params, nodes: jax.Array) -> jax.Array:
        """Returns weight x log probability [N, Q] of each rating with its item at each of its nodes [I, Q]."""
        bias, scale, noise, thresholds = self.raters(params)
        row = lambda x: x[self.ratings.rater][:, None]
        response = row(bias) + row(scale) * nodes[self.ratings.item]
        found = ordinal_log_prob(self.category[:, None], response, row(noise), thresholds)
        return jnp.where(self.ratings.weight[:, None] > 0, self.ratings.weight[:, None] * found, 0.0)

    def prior(self, params: Params) -> jax.Array:
        """Returns the negative log prior, in nats a rating."""
        # The prior of the steps is weak; it keeps the edges of categories that nobody used from running away.
        steps = jnp.sum(((params["steps"] - jnp.log(jnp.diff(self.cuts))) / 2) ** 2)
        return 0.5 * (self.spread.penalty(params) + steps) / self.total

    def posterior(self, params: Params, nodes: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns log evidence [I] and posterior weights [I, Q] of the items on their nodes, `step` [I] apart."""
        normal = -0.5 * nodes**2 - 0.5 * jnp.log(2 * jnp.pi) + jnp.log(step)[:, None]
        joint = normal + group_sum(self.log_probs(params, nodes), self.ratings.item, self.num_items, self.axis_name)
        evidence = jax.nn.logsumexp(joint, axis=1)
        return evidence, jnp.exp(joint - evidence[:, None])

    def objective(self, nodes: jax.Array, step: jax.Array) -> ValueAndGrad:
        """Returns the function params -> (negative log posterior in nats a rating, gradient) on fixed nodes."""

        def value_and_grad(params: Params) -> tuple[jax.Array, Params]:
            evidence, weights = self.posterior(params, nodes, step)
            share = weights[self.ratings.item]
            # Fisher's identity: the gradient of the log evidence is the posterior mean of the gradient.
            gradient = jax.grad(lambda p: -jnp.sum(share * self.log_probs(p, nodes)) / self.total)(params)
            value, own = jax.value_and_grad(self.prior)(params)
            loss = -jnp.sum(jnp.where(self.valid, evidence, 0.0)) / self.total
            return loss + value, optax.tree.add(psum(gradient, self.axis_name), own)

        return value_and_grad


def _ordinal_model(
    ratings: RatingRows,
    num_categories: int,
    spread: RaterSpread,
    num_raters: int,
    num_items: int,
    axis_name: str | None,
) -> _OrdinalModel:
    """Returns the model of ratings whose values are categories; a value that is no category is missing."""
    present = (ratings.weight > 0) & (ratings.value >= 0) & (ratings.value < num_categories)
    ratings = ratings._replace(weight=jnp.where(present, ratings.weight, 0.0))
    category = jnp.where(present, ratings.value, 0).astype(jnp.int32)
    valid = group_sum(ratings.weight, ratings.item, num_items, axis_name) > 0
    total = jnp.maximum(psum(ratings.weight.sum(), axis_name), 1.0)
    cumulative = jnp.cumsum(group_sum(ratings.weight, category, num_categories, axis_name) + 0.5)
    cuts = jax.scipy.special.logit(cumulative[:-1] / cumulative[-1])
    return _OrdinalModel(ratings, category, valid, total, cuts, spread, num_raters, num_items, axis_name)


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
    """Fits the ordinal model of ratings, whose raters have a bias, a scale and a noise.

    P(Y <= c) = sigmoid((theta_c - b_rater - c_rater s_item) / tau_rater), categories 0 .. C - 1, s ~ N(0, 1).

    The cumulative-logit (graded response) model of Samejima 1969 with each rater's bias b, scale c and noise tau. The
    items are integrated out by adaptive quadrature (Bock & Aitkin 1981), not maximised: with two or three ratings an
    item, the joint maximum lets single raters fit their items perfectly, tau -> 0. The other parameters are at the
    maximum of their posterior, b ~ N(0, bias_std^2), c ~ N(1, scale_std^2), log tau ~ N(a common level, noise_std^2), so
    that raters with few ratings shrink towards the others. Memory O(N num_nodes).

    Args:
        item: [N] int.
        rater: [N] int.
        category: [N]; one that is not 0 .. C - 1 is missing. Use `bin_values` for a continuous scale.
        weight: [N], number of equal ratings; 0 = missing. None: 1 each.
        num_items: I.
        num_raters: R.
        num_categories: C.
        bias_std: prior standard deviation of b.
        scale_std: prior standard deviation of c. With 0 every c is 1, and a rater who gives the same to everything can
            only be explained as a sharp one (small tau) whom all others contradict: use 0 only where raters are known
            to use the whole scale.
        noise_std: prior standard deviation of log tau.
        num_nodes: Q, of the quadrature of each item.
        max_steps: of the optimiser, in each of its two rounds.
        axis_name: the ratings are split over the devices of this pmap axis; all get the same model.
    """
    ratings = rating_rows(item, rater, category, weight)
    spread = RaterSpread(bias_std, scale_std, noise_std)
    model = _ordinal_model(ratings, num_categories, spread, num_raters, num_items, axis_name)
    dtype = ratings.value.dtype
    typical = model.typical_change()
    grid = jnp.linspace(-6.0, 6.0, num_nodes).astype(dtype)

    def quadrature(mean: jax.Array, std: jax.Array) -> tuple[jax.Array, jax.Array]:
        return mean[:, None] + std[:, None] * grid, std * (grid[1] - grid[0])

    def fit_round(_: Any, carry: Any) -> Any:
        params, mean, std, steps, _ = carry
        objective = model.objective(*quadrature(mean, std))
        params, more, gradient = lbfgs(objective, params, typical, max_steps=max_steps)

        def refine(_: Any, moments: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            nodes, step = quadrature(*moments)
            return _moments(model.posterior(params, nodes, step)[1], nodes, step)

        return params, *jax.lax.fori_loop(0, 4, refine, (mean, std)), steps + more, gradient

    # Adaptive quadrature: after a first fit, each item's nodes go where its posterior is.
    mean, std = jnp.zeros(num_items, dtype), jnp.ones(num_items, dtype)
    carry = (model.start(), mean, std, jnp.int32(0), jnp.zeros((), dtype))
    params, mean, std, steps, gradient = jax.lax.fori_loop(0, 2, fit_round, carry)
    evidence, _ = model.posterior(params, *quadrature(mean, std))
    bias, scale, noise, thresholds = model.raters(params)
    zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)
    likelihood = jnp.sum(jnp.where(model.valid, evidence, 0.0))
    items = _items(mean, std, model.valid)
    return RatingModel(items, bias, scale, noise, thresholds, zero, one, likelihood, steps, gradient)


def _moments(weights: jax.Array, nodes: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns posterior mean [I] and standard deviation [I] of the items.

    The standard deviation is at least half a step, which is the grid's resolution.
    """
    mean = jnp.sum(weights * nodes, axis=1)
    variance = jnp.sum(weights * (nodes - mean[:, None]) ** 2, axis=1)
    return mean, jnp.maximum(jnp.sqrt(variance), step / 2)


# ---- the Gaussian model


@dataclasses.dataclass(frozen=True)
class _GaussianModel:
    """The Gaussian model of ratings in standard units: its posterior as a function of parameters.

    The parameters are those of the raters.

    Attributes:
        ratings: the ratings, value = (rating - centre) / unit, 0 where missing.
        total: [], weight of all ratings on all devices.
        spread: prior of the raters' parameters.
        num_items: I.
        axis_name: pmap axis that the ratings are split over, or None.
    """

    ratings: RatingRows
    total: jax.Array
    spread: RaterSpread
    num_items: int
    axis_name: str | None

    def raters(self, params: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns intercept, loading and noise [R], in standard deviations of the ratings."""
        level = jnp.exp(params["level"])
        noise = level * jnp.exp(params["noise_level"] + self.spread.noise * params["noise"])
        return params["centre"] + level * params["bias"], level * (1 + self.spread.scale * params["scale"]), noise

    def posterior(self, params: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns mean, variance and log evidence [I] of the items."""
        item, rater, value, weight = self.ratings
        sum_items = lambda x: group_sum(x, item, self.num_items, self.axis_name)
        intercept, loading, noise = self.raters(params)
        residual, slope, variance = value - intercept[rater], loading[rater], noise[rater] ** 2
        precision = 1 + sum_items(weight * slope**2 / variance)
        mean = sum_items(weight * slope * residual / variance) / precision
        single = -0.5 * weight * (residual**2 / variance + jnp.log(2 * jnp.pi * variance))
        evidence = sum_items(single) + 0.5 * (precision * mean**2 - jnp.log(precision))
        return mean, 1 / precision, evidence

    def prior(self, params: Params) -> jax.Array:
        """Returns the negative log prior, in nats a rating."""
        return 0.5 * self.spread.penalty(params) / self.total

    def objective(self, params: Params) -> tuple[jax.Array, Params]:
        """Returns (negative log posterior in nats a rating, gradient)."""
        item, rater, value, weight = self.ratings
        mean, variance, evidence = self.posterior(params)

        def expected(params: Params) -> jax.Array:
            """Fisher's identity, as in the ordinal model."""
            intercept, loading, noise = self.raters(params)
            residual = value - intercept[rater] - loading[rater] * mean[item]
            square = residual**2 + loading[rater] ** 2 * variance[item]
            return jnp.sum(weight * (0.5 * square / noise[rater] ** 2 + jnp.log(noise[rater]))) / self.total

        penalty, own = jax.value_and_grad(self.prior)(params)
        gradient = psum(jax.grad(expected)(params), self.axis_name)
        return penalty - evidence.sum() / self.total, optax.tree.add(gradient, own)


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
    """Fits value = centre + unit (b_rater + c_rater s_item + sigma_rater e), s ~ N(0, 1), e ~ N(0, 1).

    For continuous scales. One factor with unequal loadings and noise (congeneric measures: Joreskog 1971) on incomplete
    data. The items are integrated out in closed form; the other parameters are at the maximum of their posterior:
    b ~ N(0, bias_std^2), c ~ N(1, scale_std^2), log sigma ~ N(a common level, noise_std^2). The model believes the
    raters who agree with each other: where two camps measure different things, utilities follow one of them.

    Args:
        item: [N] int.
        rater: [N] int.
        value: [N]; one that is not finite is missing.
        weight: [N], number of equal ratings; 0 = missing. None: 1 each.
        num_items: I.
        num_raters: R.
        bias_std: prior standard deviation of b.
        scale_std: prior standard deviation of c.
        noise_std: prior standard deviation of log sigma.
        max_steps: of the optimiser.
        axis_name: the ratings are split over the devices of this pmap axis; all get the same model.
    """
    ratings = rating_rows(item, rater, value, weight)
    item, rater, value, weight = ratings
    total = jnp.maximum(psum(weight.sum(), axis_name), 1.0)
    centre = psum(jnp.sum(weight * value), axis_name) / total
    spread = jnp.sqrt(psum(jnp.sum(weight * (value - centre) ** 2), axis_name) / total)
    unit = jnp.where(spread > 0, spread, 1.0)
    scaled = ratings._replace(value=jnp.where(weight > 0, (value - centre) / unit, 0.0))
    model = _GaussianModel(scaled, total, RaterSpread(bias_std, scale_std, noise_std), num_items, axis_name)
    dtype = value.dtype
    zeros, zero, one = jnp.zeros(num_raters, dtype), jnp.zeros((), dtype), jnp.ones((), dtype)
    level = jnp.log(jnp.asarray(0.5, dtype)) / 2
    start = {"centre": zero, "bias": zeros, "level": level, "scale": zeros, "noise_level": zero, "noise": zeros}
    each = jnp.sqrt(total / (group_sum(weight, rater, num_raters, axis_name) + 1))
    typical = {"centre": one, "bias": each, "level": one, "scale": each, "noise_level": one, "noise": each}
    params, steps, gradient = lbfgs(model.objective, start, typical, max_steps=max_steps)
    mean, variance, evidence = model.posterior(params)
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
