"""Rankings to rewards: Bradley-Terry, ties, Plackett-Luce, ListNet, as losses for a reward model and as utilities. Pure jnp.

The losses take scores and give one loss a comparison, in nats, computed in float32. What a mask takes out costs nothing
and gets no gradient, whatever it holds. `mean_loss` joins them with weights over all devices. The fits find the utility
of each item directly from comparisons of numbered items.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from rlaif_jax.parallel import psum

NEGATIVE = -1e30  # the log of nothing: finite, so that its gradient is 0 and not NaN


def mean_loss(losses: jax.Array, weight: jax.Array, axis_name: str | None = None) -> jax.Array:
    """Weighted mean of losses [...], [] float32: this device's part of it, which sums to the mean over `axis_name`.

    Rows of weight 0 are missing. Without any weight the mean is 0.
    """
    weight = weight.astype(jnp.float32)
    total = jnp.maximum(psum(weight.sum(), axis_name), 1e-8)
    return jnp.sum(jnp.where(weight > 0, losses * weight, 0.0)) / total


# ---- one comparison in both orders


def both_orders(
    forward: jax.Array, swapped: jax.Array, *, how: Literal["logit", "mean"] = "logit"
) -> tuple[jax.Array, jax.Array]:
    """(P(the first answer is better), position bias), each [...] float32, of a judge asked in both orders.

    forward, swapped [...]: P(the answer shown first is better) in each order. logit: sigmoid((logit forward - logit
    swapped) / 2); a bias that is additive in the log-odds cancels exactly. mean: (forward + 1 - swapped) / 2 (Lee 2023,
    section 2.2); one that is additive in the probability does. The bias (logit forward + logit swapped) / 2, in nats, is
    above 0 for whoever stands first. Probabilities closer than 1e-6 to 0 or 1 are taken for that close.
    """
    forward, swapped = _float(forward), _float(swapped)
    first, second = (jax.scipy.special.logit(jnp.clip(p, 1e-6, 1 - 1e-6)) for p in (forward, swapped))
    better = jax.nn.sigmoid((first - second) / 2) if how == "logit" else (forward + 1 - swapped) / 2
    return better, (first + second) / 2


# ---- losses


def bradley_terry(
    first: jax.Array, second: jax.Array, probability: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """-p log sigmoid(s1 - s2) - (1 - p) log sigmoid(s2 - s1) for soft labels p = P(first is better); all arrays [...].

    Bradley-Terry with soft labels (Lee 2023, section 2.1.2: cross-entropy to softmax(s1, s2)). A tie is p = 1/2.
    """
    p, margin = jnp.asarray(probability, jnp.float32), _float(first) - _float(second)
    if mask is not None:
        p, margin = jnp.where(mask, p, 0.5), jnp.where(mask, margin, 0.0)
    loss = -p * jax.nn.log_sigmoid(margin) - (1 - p) * jax.nn.log_sigmoid(-margin)
    return loss if mask is None else jnp.where(mask, loss, 0.0)


def davidson(
    first: jax.Array,
    second: jax.Array,
    outcome: jax.Array,
    log_tie: jax.Array | float,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Cross-entropy [...] of Bradley-Terry with ties to outcome [..., 3] = P(first better, second better, tie).

    Davidson (1970, "On extending the Bradley-Terry model to accommodate ties in paired comparison
    experiments"): the three are as exp(s1) : exp(s2) : nu sqrt(exp(s1) exp(s2)). log_tie = log nu, a number to be
    learned with the scores; two equal items tie with probability nu / (2 + nu). Without ties (nu -> 0) this is
    `bradley_terry`.
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
    """-log P(order) [...] of scores [..., K] under Plackett-Luce: sum_j [logsumexp_{l not better than j} s_l - s_j].

    Plackett (1975), as a loss Xia (2008, ListMLE). Two answers make it `bradley_terry`.

    Args:
        ranks: [..., K] int, place of each answer, 1 = best; gaps do not matter (1, 1, 3 is 1, 1, 2). 0 = not placed.
        mask: [..., K], false for answers that are not there (padding).
        unplaced: an answer of rank 0 takes no part (`out`: nobody looked at it), or it stands below all placed ones,
            in no order of its own (`below`: the list names the best few).

    Answers of equal rank are tied: their loss is the mean over all orders in which they could stand, so that their
    scores are drawn together (two tied answers: Bradley-Terry with the soft label 1/2). This is exact for up to three
    tied answers; of more, the middle choices take the log of the mean for the mean of the log, an upper bound (Efron
    1977, for tied survival times). Memory: O(K^2) a list, O(K^3) where more than three can tie.
    """
    chex.assert_equal_shape([scores, ranks])
    present = jnp.ones(scores.shape, bool) if mask is None else jnp.asarray(mask, bool)
    placed = present & (ranks > 0)
    present = placed if unplaced == "out" else present
    scores = jnp.where(present, _float(scores), 0.0)
    place = jnp.where(placed, _float(ranks), jnp.inf)  # the unplaced stand last

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
    """Cross-entropy [...] of softmax(scores) to softmax(relevance), both [..., K] (Cao 2007: top-one ListNet).

    relevance: higher = better, on the scale of the scores: ratings, or -ranks. mask [..., K]: false for padding. A
    list without answers costs 0.
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
    """Utilities [num_items] float32 with mean 0, in nats, from N comparisons, by Newton's method.

    Minimises sum_n weight_n `bradley_terry`_n + ridge / 2 sum_i u_i^2.

    Args:
        first, second: [N] int, item numbers.
        probability: [N], P(first is better): 1 or 0 for a win or a loss, 1/2 for a tie, or a judge's soft label.
        weight: [N], how often each was seen; 0 = missing, whatever it holds. None: 1.
        ridge: inverse variance of a Gaussian prior around 0. It keeps items finite that won or lost everything; with 0
            each item must be reachable from each other by wins (Ford 1957), or the result means nothing.
        axis_name: the comparisons are split over the devices of this pmap axis; all get the same utilities.

    May be differentiated in probability, weight and ridge (implicitly, at the optimum).
    """
    chex.assert_equal_shape([first, second, probability])

    def loss(scores: jax.Array, p: jax.Array, seen: jax.Array) -> jax.Array:
        return bradley_terry(scores[0], scores[1], p, seen)

    items = jnp.stack([first, second], axis=-1)
    return _newton(loss, items, (probability,), _seen(weight, first), num_items, num_items, ridge, axis_name)


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
    """(utilities [num_items] with mean 0, log_tie []) from N comparisons with outcome [N, 3] as in `davidson`.

    As `fit_bradley_terry`; the ridge is also on log_tie, which keeps it finite where nobody or everybody tied.
    """
    chex.assert_shape(outcome, (*first.shape, 3))

    def loss(scores: jax.Array, outcome: jax.Array, seen: jax.Array) -> jax.Array:
        return davidson(scores[0], scores[1], outcome, scores[2], seen)

    items = jnp.stack([first, second, jnp.full_like(first, num_items)], axis=-1)  # the tie is one item more
    seen = _seen(weight, first)
    fitted = _newton(loss, items, (outcome,), seen, num_items + 1, num_items, ridge, axis_name)
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
    """Utilities [num_items] float32 with mean 0, in nats, from N lists, by Newton's method.

    Minimises sum_n weight_n `plackett_luce`_n + ridge / 2 sum_i u_i^2; items [N, K] int are the numbers of the items
    in each list, ranks and mask [N, K] and `unplaced` as in `plackett_luce`, the rest as in `fit_bradley_terry`.
    """
    chex.assert_equal_shape([items, ranks])
    present = jnp.ones(items.shape, bool) if mask is None else jnp.asarray(mask, bool)

    def loss(scores: jax.Array, ranks: jax.Array, present: jax.Array, seen: jax.Array) -> jax.Array:
        return plackett_luce(scores, ranks, present & seen, unplaced=unplaced)

    items = jnp.where(present, items, 0)  # padding may hold any number
    seen = _seen(weight, items[..., 0])
    return _newton(loss, items, (ranks, present), seen, num_items, num_items, ridge, axis_name)


_Given = tuple[jax.Array, tuple[jax.Array, ...], jax.Array]  # weight [N], the data of each comparison, ridge []
_Search = tuple[
    jax.Array, jax.Array, jax.Array, jax.Array
]  # x [I], steps [], size of the last step [], curvature [I, I]


def _seen(weight: jax.Array | None, like: jax.Array) -> jax.Array:
    weight = jnp.ones(like.shape, jnp.float32) if weight is None else _float(weight)
    chex.assert_equal_shape([weight, like])
    return jnp.where(weight > 0, weight, 0.0)


def _newton(
    loss: Callable[..., jax.Array],
    items: jax.Array,
    data: tuple[jax.Array, ...],
    weight: jax.Array,
    size: int,
    free: int,
    ridge: float | jax.Array,
    axis_name: str | None,
    *,
    max_steps: int = 100,
    tolerance: float = 1e-5,
) -> jax.Array:
    """Minimise sum_n weight_n loss(x[items_n], *data_n, weight_n > 0) + ridge / 2 |x|^2 over x [size].

    The loss is convex and does not change when the same number is added to the first `free` entries; their mean is
    kept at 0. Each step's length is the first of 1, 1/2, 1/4 ... that lowers the objective.
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

    def curvature(x: jax.Array, given: _Given) -> jax.Array:
        weight, data, ridge = given
        each = jax.vmap(jax.hessian(loss))(x[items], *data, weight > 0) * weight[:, None, None]
        matrix = psum(jnp.zeros((size, size)).at[items[:, :, None], items[:, None, :]].add(each), axis_name)
        scale = jnp.maximum(jnp.max(jnp.diagonal(matrix)), 1e-6)
        # Constant shifts cost nothing in the loss: any positive curvature along them makes the system regular.
        return matrix + (ridge + 1e-6 * scale) * jnp.eye(size) + scale / free * jnp.outer(constant, constant)

    def move(matrix: jax.Array, slope: jax.Array) -> jax.Array:
        step = -jax.scipy.linalg.solve(matrix, slope, assume_a="pos")
        return step - constant * jnp.sum(step * constant) / free

    given: _Given = (weight, data, jnp.float32(ridge))
    frozen = jax.lax.stop_gradient(given)
    lengths = 0.5 ** jnp.arange(12.0)

    def iterate(state: _Search) -> _Search:
        x, count, _, _ = state
        matrix = curvature(x, frozen)
        full = move(matrix, gradient(x, frozen))
        now = objective(x, frozen)
        then = jax.lax.map(lambda length: objective(x + length * full, frozen), lengths)
        lower = then <= now + 1e-6 * jnp.abs(now)  # float32 cannot tell less
        x += jnp.where(lower.any(), lengths[jnp.argmax(lower)], 0.0) * full
        return x, count + 1, jnp.max(jnp.abs(full)), matrix

    def unfinished(state: _Search) -> jax.Array:
        x, count, moved, _ = state
        return (moved > tolerance * (1 + jnp.max(jnp.abs(x)))) & (count < max_steps)

    # The search is not differentiated. One more step from its end is, with the curvature held: its derivative is that
    # of the optimum (implicit function theorem).
    start = (jnp.zeros(size), jnp.int32(0), jnp.float32(jnp.inf), jnp.eye(size))
    optimum, _, _, matrix = jax.lax.while_loop(unfinished, iterate, start)
    return optimum + move(matrix, gradient(optimum, given))
