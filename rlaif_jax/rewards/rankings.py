"""Rankings to rewards: losses of a reward model and utilities of items. Pure jnp.

Both start from comparisons and from lists.

The losses take scores and give one loss a comparison, in nats, computed in float32. What a mask takes out costs nothing
and gets no gradient, whatever it holds. `mean_loss` averages them with weights over all devices. The fits find the
utility of each item directly from comparisons of numbered items.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from rlaif_jax.parallel import psum
from rlaif_jax.rewards.log_odds import CLIP
from rlaif_jax.rewards.optimise import halved, newton, newton_step

MAX_DENSE = 500
"""With more items the fits solve by conjugate gradients, in memory that is linear in comparisons and items."""
NEGATIVE = -1e30  # instead of log 0: finite, so that its gradient is 0 and not NaN


def mean_loss(losses: jax.Array, weight: jax.Array, axis_name: str | None = None) -> jax.Array:
    """Computes this device's part [] float32 of the weighted mean of losses.

    The parts of all devices sum to the mean. Without any weight the mean is 0.

    Args:
        losses: [...].
        weight: [...], not negative; 0 = missing, whatever the loss is.
        axis_name: the losses are split over the devices of this pmap axis; None: they are not.
    """
    weight = weight.astype(jnp.float32)
    total = jnp.maximum(psum(weight.sum(), axis_name), 1e-8)
    return jnp.sum(jnp.where(weight > 0, losses * weight, 0.0)) / total


# ---- one comparison in both orders


def both_orders(
    forward: jax.Array, swapped: jax.Array, *, how: Literal["logit", "mean"] = "logit"
) -> tuple[jax.Array, jax.Array]:
    """Combines a judge's verdicts in both orders of a pair.

    Args:
        forward: [...], P(the answer shown first is better) when the first answer is shown first. Probabilities closer
            than `log_odds.CLIP` to 0 or 1 count as that close.
        swapped: [...], the same when the second answer is shown first.
        how: "logit": sigmoid((logit forward - logit swapped) / 2), where a bias that is additive in the log-odds cancels
            exactly. "mean": (forward + 1 - swapped) / 2 (Lee 2023, section 2.2), where a bias that is additive in the
            probability cancels.

    Returns:
        (P(the first answer is better), position bias), each [...] float32. The bias (logit forward + logit swapped) / 2,
        in nats, is positive for a judge that favours the answer shown first.
    """
    forward, swapped = _float(forward), _float(swapped)
    first, second = (jnp.log(jnp.maximum(p, CLIP)) - jnp.log(jnp.maximum(1 - p, CLIP)) for p in (forward, swapped))
    better = jax.nn.sigmoid((first - second) / 2) if how == "logit" else (forward + 1 - swapped) / 2
    return better, (first + second) / 2


# ---- losses


def bradley_terry(
    first: jax.Array,
    second: jax.Array,
    probability: jax.Array,
    mask: jax.Array | None = None,
    margin: jax.Array | float = 0.0,
) -> jax.Array:
    """Computes the Bradley-Terry loss with soft labels and a margin.

    loss = -p log sigmoid(s1 - s2 - m) - (1 - p) log sigmoid(s2 - s1 - m).

    Lee 2023, section 2.1.2: cross-entropy to softmax(s1, s2); the margin is that of Llama 2 (Touvron 2023, eq. 2).

    Args:
        first: scores s1 [...].
        second: scores s2 [...].
        probability: p = P(first is better) [...]; a tie is 1/2.
        mask: [...], false where a comparison is missing.
        margin: m >= 0 [...], by which the better answer's score should exceed the other; 0 for a tie.

    Returns:
        [...] float32, in nats.
    """
    p, gap = jnp.asarray(probability, jnp.float32), _float(first) - _float(second)
    if mask is not None:
        p, gap = jnp.where(mask, p, 0.5), jnp.where(mask, gap, 0.0)
    loss = -p * jax.nn.log_sigmoid(gap - margin) - (1 - p) * jax.nn.log_sigmoid(-gap - margin)
    return loss if mask is None else jnp.where(mask, loss, 0.0)


def davidson(
    first: jax.Array,
    second: jax.Array,
    outcome: jax.Array,
    log_tie: jax.Array | float,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Computes the cross-entropy of Bradley-Terry with ties.

    Davidson (1970, "On extending the Bradley-Terry model to accommodate ties in paired comparison experiments"): first
    better, second better and tie are as exp(s1) : exp(s2) : nu sqrt(exp(s1) exp(s2)). Two equal items tie with
    probability nu / (2 + nu). Without ties (nu -> 0) this is `bradley_terry`.

    Args:
        first: scores s1 [...].
        second: scores s2 [...].
        outcome: [..., 3], P(first better, second better, tie).
        log_tie: log nu, a number that is learned with the scores.
        mask: [...], false where a comparison is missing.

    Returns:
        [...] float32, in nats.
    """
    half = (_float(first) - _float(second)) / 2
    outcome = jnp.asarray(outcome, jnp.float32)
    if mask is not None:
        half, outcome = jnp.where(mask, half, 0.0), jnp.where(mask[..., None], outcome, 0.0)
    logits = jnp.stack([half, -half, jnp.broadcast_to(_float(log_tie), half.shape)], axis=-1)
    return -jnp.sum(outcome * jax.nn.log_softmax(logits, axis=-1), axis=-1)


def plackett_luce(
    scores: jax.Array,
    ranks: jax.Array,
    mask: jax.Array | None = None,
    *,
    unplaced: Literal["out", "below"] = "out",
) -> jax.Array:
    """Computes -log P(order) under Plackett-Luce: sum_j [logsumexp_{l not better than j} s_l - s_j].

    Plackett (1975), as a loss Xia (2008, ListMLE). Two answers make it `bradley_terry`. Answers of equal rank are tied:
    their loss is the mean over all orders in which they could come, so that their scores are drawn together (two tied
    answers: Bradley-Terry with the soft label 1/2). This is exact for up to three tied answers; of more, the middle
    choices take the log of the mean for the mean of the log, an upper bound (Efron 1977, for tied survival times).
    Memory: O(K^2) a list, O(K^3) where more than three can tie.

    Args:
        scores: [..., K], of the answers.
        ranks: [..., K] int, place of each answer, 1 = best; gaps do not matter (1, 1, 3 is 1, 1, 2). 0 = not placed.
        mask: [..., K], false for padding.
        unplaced: an answer of rank 0 takes no part (`out`: nobody looked at it), or is below all placed ones, without an
            order among the unplaced (`below`: the list names the best few).

    Returns:
        [...] float32, in nats.
    """
    chex.assert_equal_shape([scores, ranks])
    present = jnp.ones(scores.shape, bool) if mask is None else jnp.asarray(mask, bool)
    placed = present & (ranks > 0)
    present = placed if unplaced == "out" else present
    scores = jnp.where(present, _float(scores), 0.0)
    place = jnp.where(placed, _float(ranks), jnp.inf)  # the unplaced come last

    ahead, behind = place[..., :, None], place[..., None, :]  # [..., i, l]
    there, oneself = present[..., None, :], jnp.eye(scores.shape[-1], dtype=bool)
    below = there & (behind > ahead)
    tied = placed[..., :, None] & (behind == ahead)
    count = jnp.maximum(jnp.sum(tied, axis=-1), 1)  # how many share the place

    # Of m tied answers the first choice is among all of them, the second among m - 1 ... the last has one left. Each
    # choice's mean over the orders is shared out evenly over the m answers. Logs of summed strengths, [..., K] each:
    among = jnp.stack([below | tied, below | (tied & oneself), below | (tied & ~oneself), below, tied])
    everyone, alone, others, lower, level = jax.nn.logsumexp(jnp.where(among, scores[..., None, :], NEGATIVE), axis=-1)
    choices = everyone + jnp.where(count >= 2, alone, 0.0) + jnp.where(count >= 3, others, 0.0)
    if scores.shape[-1] > 3:
        left = jnp.arange(2, scores.shape[-1] - 1)  # answers left at a middle choice
        middle = jnp.logaddexp(lower[..., None], level[..., None] + jnp.log(left / count[..., None]))
        choices += jnp.sum(jnp.where(left <= count[..., None] - 2, middle, 0.0), axis=-1)
    return jnp.sum(jnp.where(placed, choices / count - scores, 0.0), axis=-1)


def listnet(scores: jax.Array, relevance: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Computes the cross-entropy of softmax(scores) to softmax(relevance) (Cao 2007: top-one ListNet).

    Args:
        scores: [..., K], of the answers.
        relevance: [..., K], higher = better, on the scale of the scores: ratings, or -ranks.
        mask: [..., K], false for padding.

    Returns:
        [...] float32, in nats; 0 for a list without answers.
    """
    chex.assert_equal_shape([scores, relevance])
    present = jnp.ones(scores.shape, bool) if mask is None else jnp.asarray(mask, bool)
    target = jax.nn.softmax(jnp.where(present, _float(relevance), NEGATIVE), axis=-1)
    logprobs = jax.nn.log_softmax(jnp.where(present, _float(scores), NEGATIVE), axis=-1)
    return -jnp.sum(jnp.where(present, target * logprobs, 0.0), axis=-1)


def _float(x: jax.Array | float) -> jax.Array:
    return jnp.asarray(x).astype(jnp.float32)


# ---- utilities


def fit_bradley_terry(
    first: jax.Array,
    second: jax.Array,
    probability: jax.Array,
    weight: jax.Array | None = None,
    *,
    num_items: int,
    ridge: float | jax.Array = 0.01,
    axis_name: str | None = None,
) -> jax.Array:
    """Finds utilities of items from N comparisons by Newton's method.

    A step is solved directly for up to `MAX_DENSE` items, else by conjugate gradients: 20,000 items and 200,000
    comparisons take seconds on two cores. The fit gives no standard errors.

    Minimises sum_n weight_n `bradley_terry`_n + ridge / 2 sum_i u_i^2. May be differentiated in probability, weight and
    ridge (implicitly, at the optimum).

    Args:
        first: [N] int, number of the first item.
        second: [N] int, number of the second item.
        probability: [N], P(first is better): 1 or 0 for a win or a loss, 1/2 for a tie, or a judge's soft label.
        weight: [N], how often each was seen; 0 = missing, whatever it holds. None: 1.
        num_items: number of items, static.
        ridge: inverse variance of a Gaussian prior around 0. It keeps items finite that won or lost everything; with 0
            each item must be reachable from each other by wins (Ford 1957), or the result means nothing.
        axis_name: the comparisons are split over the devices of this pmap axis; all get the same utilities.

    Returns:
        Utilities [num_items] float32 with mean 0, in nats.
    """
    chex.assert_equal_shape([first, second, probability])

    def loss(scores: jax.Array, p: jax.Array, seen: jax.Array) -> jax.Array:
        return bradley_terry(scores[0], scores[1], p, seen)

    items = jnp.stack([first, second], axis=-1)
    return _fit_utilities(loss, items, (probability,), _seen(weight, first), num_items, num_items, ridge, axis_name)


def fit_davidson(
    first: jax.Array,
    second: jax.Array,
    outcome: jax.Array,
    weight: jax.Array | None = None,
    *,
    num_items: int,
    ridge: float | jax.Array = 0.01,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Fits utilities of items to N comparisons with ties, by Newton's method.

    The model is `davidson`; the method is that of `fit_bradley_terry`.

    Args:
        first: [N] int, number of the first item.
        second: [N] int, number of the second item.
        outcome: [N, 3], P(first better, second better, tie).
        weight: [N], how often each was seen; 0 = missing. None: 1.
        num_items: number of items, static.
        ridge: penalty of the utilities and of log_tie, which keeps it finite where nobody or everybody tied.
        axis_name: the comparisons are split over the devices of this pmap axis; all get the same result.

    Returns:
        (utilities [num_items] float32 with mean 0, in nats; log_tie []).
    """
    chex.assert_shape(outcome, (*first.shape, 3))

    def loss(scores: jax.Array, outcome: jax.Array, seen: jax.Array) -> jax.Array:
        return davidson(scores[0], scores[1], outcome, scores[2], seen)

    items = jnp.stack([first, second, jnp.full_like(first, num_items)], axis=-1)  # the tie is one item more
    seen = _seen(weight, first)
    fitted = _fit_utilities(loss, items, (outcome,), seen, num_items + 1, num_items, ridge, axis_name)
    return fitted[:num_items], fitted[num_items]


def fit_plackett_luce(
    items: jax.Array,
    ranks: jax.Array,
    weight: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    num_items: int,
    unplaced: Literal["out", "below"] = "out",
    ridge: float | jax.Array = 0.01,
    axis_name: str | None = None,
) -> jax.Array:
    """Finds utilities of items from N ranked lists by Newton's method.

    Minimises sum_n weight_n `plackett_luce`_n + ridge / 2 sum_i u_i^2.

    Args:
        items: [N, K] int, numbers of the items in each list.
        ranks: [N, K] int, place of each item, as in `plackett_luce`.
        weight: [N], how often each list was seen; 0 = missing. None: 1.
        mask: [N, K], false for padding.
        num_items: number of items, static.
        unplaced: as in `plackett_luce`.
        ridge: inverse variance of a Gaussian prior around 0, as in `fit_bradley_terry`.
        axis_name: the lists are split over the devices of this pmap axis; all get the same utilities.

    Returns:
        Utilities [num_items] float32 with mean 0, in nats.
    """
    chex.assert_equal_shape([items, ranks])
    present = jnp.ones(items.shape, bool) if mask is None else jnp.asarray(mask, bool)

    def loss(scores: jax.Array, ranks: jax.Array, present: jax.Array, seen: jax.Array) -> jax.Array:
        return plackett_luce(scores, ranks, present & seen, unplaced=unplaced)

    items = jnp.where(present, items, 0)  # padding may hold any number
    seen = _seen(weight, items[..., 0])
    return _fit_utilities(loss, items, (ranks, present), seen, num_items, num_items, ridge, axis_name)


def _seen(weight: jax.Array | None, like: jax.Array) -> jax.Array:
    """Returns the weights in float32, 1 where None and 0 where not positive."""
    weight = jnp.ones(like.shape, jnp.float32) if weight is None else _float(weight)
    chex.assert_equal_shape([weight, like])
    return jnp.where(weight > 0, weight, 0.0)


_Given = tuple[jax.Array, tuple[jax.Array, ...], jax.Array]  # weight [N], the data of each comparison, ridge []


def _fit_utilities(
    loss: Callable[..., jax.Array],
    items: jax.Array,
    data: tuple[jax.Array, ...],
    weight: jax.Array,
    size: int,
    free: int,
    ridge: float | jax.Array,
    axis_name: str | None,
) -> jax.Array:
    """Minimises sum_n weight_n loss(x[items_n], *data_n, weight_n > 0) + ridge / 2 |x|^2 over x [size].

    Args:
        loss: convex; it does not change when the same number is added to the first `free` entries of x.
        items: [N, K] int, the entries of x that each comparison is about.
        data: arrays [N, ...], further arguments of the loss.
        weight: [N], not negative.
        size: number of entries of x.
        free: number of entries whose mean is kept at 0.
        ridge: penalty.
        axis_name: the comparisons are split over the devices of this pmap axis.
    """
    constant = (jnp.arange(size) < free).astype(jnp.float32)

    def objective(x: jax.Array, given: _Given) -> jax.Array:
        weight, data, ridge = given
        losses = jax.vmap(loss)(x[items], *data, weight > 0)
        return psum(jnp.sum(losses * weight), axis_name) + ridge / 2 * jnp.sum(x**2)

    def gradient(x: jax.Array, given: _Given) -> jax.Array:
        weight, data, ridge = given
        each = jax.vmap(jax.grad(loss))(x[items], *data, weight > 0) * weight[:, None]
        return psum(jnp.zeros(size).at[items].add(each), axis_name) + ridge * x

    def curvatures(x: jax.Array, given: _Given) -> jax.Array:
        weight, data, _ = given
        return jax.vmap(jax.hessian(loss))(x[items], *data, weight > 0) * weight[:, None, None]

    def dense(x: jax.Array, given: _Given) -> jax.Array:
        each = curvatures(x, given)
        matrix = psum(jnp.zeros((size, size)).at[items[:, :, None], items[:, None, :]].add(each), axis_name)
        scale = jnp.maximum(jnp.max(jnp.diagonal(matrix)), 1e-6)
        # Constant shifts cost nothing in the loss: any positive curvature along them makes the system regular.
        return matrix + (given[2] + 1e-6 * scale) * jnp.eye(size) + scale / free * jnp.outer(constant, constant)

    def sparse(x: jax.Array, given: _Given) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the curvature of each comparison, the diagonal of all of them, and the ridge."""
        each = curvatures(x, given)
        own = jnp.diagonal(each, axis1=1, axis2=2)
        return each, psum(jnp.zeros(size).at[items].add(own), axis_name), given[2]

    def conjugate_gradients(curvature: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array) -> jax.Array:
        each, diagonal, ridge = curvature
        scale = jnp.maximum(jnp.max(diagonal), 1e-6)
        ridge = ridge + 1e-6 * scale

        def times(v: jax.Array) -> jax.Array:
            parts = jnp.einsum("nij,nj->ni", each, v[items])
            shift = scale / free * constant * jnp.sum(constant * v)
            return psum(jnp.zeros(size).at[items].add(parts), axis_name) + ridge * v + shift

        preconditioner = lambda v: v / (diagonal + ridge + scale / free * constant)
        return -jax.scipy.sparse.linalg.cg(times, gradient, tol=1e-5, maxiter=1000, M=preconditioner)[0]

    given: _Given = (weight, data, jnp.float32(ridge))
    frozen = jax.lax.stop_gradient(given)
    curvature, solve = (dense, newton_step) if size <= MAX_DENSE else (sparse, conjugate_gradients)
    optimum, matrix = newton(
        lambda x: gradient(x, frozen),
        lambda x: curvature(x, frozen),
        jnp.zeros(size),
        damping=halved(lambda x: objective(x, frozen)),
        solve=solve,
    )
    # One more step from the end of the search is differentiated, with the curvature held: its derivative is that of the
    # optimum (implicit function theorem).
    x = optimum + solve(matrix, gradient(optimum, given))
    return x - constant * jnp.sum(x * constant) / free
