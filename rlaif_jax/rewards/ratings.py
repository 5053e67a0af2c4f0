"""Ratings to utilities: raw means and per-rater z-scores.

`rating_models` has models of raters who differ.

N ratings, I items, R raters. Every function takes flat arrays item [N] int, rater [N] int, value [N] (any float or
integer type; computed in float32, in float64 if given so) and weight [N] or None (= 1 each), a number of equal
judgements; a rating of weight 0, or one that is not finite, is missing. `num_items` and `num_raters` are static. Pure:
under jit, vmap, pmap and sharded; with `axis_name` each device holds a share of the ratings and all get the result of
the whole. An item without a rating is `valid = False`, never 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp

from rlaif_jax.parallel import psum


@flax.struct.dataclass
class Utilities:
    """Estimated quality of I items.

    Attributes:
        value: [I] float32, 0 where not valid.
        stderr: [I], standard error in the unit of `value`, infinite where not valid.
        valid: [I] bool, whether the item has a rating.
    """

    value: jax.Array
    stderr: jax.Array
    valid: jax.Array


class RatingRows(NamedTuple):
    """Ratings as checked arrays [N]; weight and value are 0 where a rating is missing."""

    item: jax.Array
    rater: jax.Array
    value: jax.Array
    weight: jax.Array


def as_float(x: Any) -> jax.Array:
    """Returns x as float32, or as float64 where x is float64."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32)


def rating_rows(item: Any, rater: Any, value: Any, weight: Any) -> RatingRows:
    """Returns ratings as arrays of one shape; a value that is not finite gets weight 0 and value 0.

    Args:
        item: [N] int.
        rater: [N] int.
        value: [N], the ratings.
        weight: [N], number of equal ratings; None: 1 each.

    Raises:
        AssertionError: the arrays do not all have the shape [N].
    """
    value = as_float(value)
    weight = jnp.ones_like(value) if weight is None else jnp.asarray(weight).astype(value.dtype)
    item, rater = jnp.asarray(item, jnp.int32), jnp.asarray(rater, jnp.int32)
    chex.assert_equal_shape((item, rater, value, weight))
    chex.assert_rank(value, 1)
    weight = jnp.where(jnp.isfinite(value), weight, 0.0)
    return RatingRows(item, rater, jnp.where(weight > 0, value, 0.0), weight)


def group_sum(x: jax.Array, group: jax.Array, size: int, axis_name: str | None = None) -> jax.Array:
    """Computes the sums [size, ...] of the rows of x that have the same group number.

    Args:
        x: [N, ...].
        group: [N] int, in 0 .. size - 1.
        size: number of groups, static.
        axis_name: the rows are split over the devices of this pmap axis; all get the sums of all rows.
    """
    return psum(jax.ops.segment_sum(x, group, size), axis_name)


def raw_mean(
    item: Any, rater: Any, value: Any, weight: Any = None, *, num_items: int, axis_name: str | None = None
) -> Utilities:
    """Computes the mean rating of each item.

    Its standard error pools the spread within items: sigma / sqrt(weight).

    Args:
        item: [N] int.
        rater: [N] int; not used.
        value: [N], the ratings.
        weight: [N], number of equal ratings; 0 = missing. None: 1 each.
        num_items: I.
        axis_name: the ratings are split over the devices of this pmap axis; all get the same utilities.
    """
    return _item_means(rating_rows(item, rater, value, weight), num_items, axis_name)


def _item_means(ratings: RatingRows, num_items: int, axis_name: str | None) -> Utilities:
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
    """Computes the mean of each item's z-scores: (rating - rater's mean) / rater's standard deviation.

    A rater with one rating, or one who rates all items the same, puts no item above another: these ratings count
    as missing.

    Args:
        item: [N] int.
        rater: [N] int.
        value: [N], the ratings.
        weight: [N], number of equal ratings; 0 = missing. None: 1 each.
        num_items: I.
        num_raters: R.
        axis_name: the ratings are split over the devices of this pmap axis; all get the same utilities.
    """
    ratings = rating_rows(item, rater, value, weight)
    mean, std = _rater_moments(ratings, num_raters, axis_name)
    informs = std > 0
    z = (ratings.value - mean[ratings.rater]) / jnp.where(informs, std, 1.0)[ratings.rater]
    weights = jnp.where(informs[ratings.rater], ratings.weight, 0.0)
    return _item_means(ratings._replace(value=z, weight=weights), num_items, axis_name)


def _rater_moments(ratings: RatingRows, num_raters: int, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    """Returns mean [R] and standard deviation [R] (0 where it is only rounding) of each rater's ratings."""
    _, rater, value, weight = ratings
    count = group_sum(weight, rater, num_raters, axis_name)
    safe = jnp.where(count > 0, count, 1.0)
    mean = group_sum(weight * value, rater, num_raters, axis_name) / safe
    std = jnp.sqrt(group_sum(weight * (value - mean[rater]) ** 2, rater, num_raters, axis_name) / safe)
    rounding = 8 * jnp.finfo(value.dtype).eps * jnp.maximum(jnp.abs(mean), 1e-30)
    return mean, jnp.where(std > rounding, std, 0.0)
