"""Comments to rewards: from their valence and aspects, and from the weights of the aspects.

A comment reaches this file as two things: its valence v in [-1, 1], how good it says the answer is, and its aspects x
[A] in [0, 1], how much it is about each topic. Both come from classifiers (`feedback.judges.sentiment`) or from the
rater. A comment that was not obtained is missing; a comment about no aspect still has a valence.
Letters: C comments, A aspects, B answers.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp

from rlaif_jax.parallel import psum
from rlaif_jax.rewards.shaping import Masked, masked


def valence(log_odds: jax.Array, valid: jax.Array) -> Masked:
    """Computes the valence [...] in [-1, 1] of comments from log-odds.

    It is P(positive) - P(negative) = tanh(l / 2).

    Args:
        log_odds: l [...] of "positive", in nats.
        valid: [...] bool, false where missing.
    """
    log_odds, valid = masked(log_odds, valid)
    return Masked(jnp.tanh(0.5 * log_odds), valid)


class CommentRewards(NamedTuple):
    """Rewards of answers according to their comments.

    Attributes:
        overall: [C], the scalar reward, in [-1, 1].
        by_aspect: [C, A], the reward in each aspect, valid where the comment is about it.
    """

    overall: Masked
    by_aspect: Masked


def comment_rewards(
    valence: jax.Array, aspects: jax.Array, valid: jax.Array, *, threshold: float = 0.5
) -> CommentRewards:
    """Computes scalar and per-aspect rewards of C comments.

    Args:
        valence: [C], of the whole comment: the reward overall and in each aspect that the comment is about. Or [C, A], of
            each aspect (aspect-based sentiment): the overall reward is then their mean over the aspects that the comment
            is about, weighted by how much it is about them; a comment about no aspect has no overall reward.
        aspects: [C, A] in [0, 1], how much the comment is about each aspect.
        valid: like `valence`, false where the comment, or its valence in an aspect, is missing.
        threshold: a comment is about the aspects of this value or more.
    """
    chex.assert_rank(aspects, 2)
    chex.assert_equal_shape([valence, valid])
    values, valid = masked(valence, valid)
    aspects = aspects.astype(jnp.float32)
    about = aspects >= threshold  # false for NaN
    if valence.ndim == 1:
        by_aspect = masked(jnp.broadcast_to(values[:, None], aspects.shape), valid[:, None] & about)
        return CommentRewards(Masked(values, valid), by_aspect)
    by_aspect = masked(values, valid & about)
    weights = jnp.where(by_aspect.valid, aspects, 0.0)
    total = weights.sum(-1)
    mean = (weights * by_aspect.values).sum(-1) / jnp.where(total > 0, total, 1.0)
    return CommentRewards(masked(mean, total > 0), by_aspect)


def pool_comments(
    values: jax.Array,
    valid: jax.Array,
    answer: jax.Array,
    answers: int,
    *,
    weights: jax.Array | None = None,
    axis_name: str | None = None,
) -> Masked:
    """Computes the weighted mean [B, ...] of the comments on each answer.

    An answer without comments is missing.

    Args:
        values: [C, ...], of the comments.
        valid: [C, ...] bool.
        answer: [C] int, number of the answer that each comment is on.
        answers: B, static.
        weights: [C], not negative, such as a rater's reliability. None: 1 each.
        axis_name: the comments are split over the devices of this pmap axis; all get the means of all comments.
    """
    values, valid = masked(values, valid)
    weight = jnp.ones(values.shape[0]) if weights is None else weights.astype(jnp.float32)
    weight = jnp.where(valid, weight.reshape(-1, *[1] * (values.ndim - 1)), 0.0)
    total = psum(jax.ops.segment_sum(weight * values, answer, answers), axis_name)
    mass = psum(jax.ops.segment_sum(weight, answer, answers), axis_name)
    return masked(total / jnp.where(mass > 0, mass, 1.0), mass > 0)


# ---- The weights of the aspects (Sumers 2021)


@flax.struct.dataclass
class AspectPosterior:
    """A Gaussian over the weights of A aspects.

    Attributes:
        mean: [A], valence per unit of aspect.
        precision: [A, A].
    """

    mean: jax.Array
    precision: jax.Array


@dataclasses.dataclass(frozen=True)
class Pragmatic:
    """Evidence from aspects that a comment leaves out: people mention first what is good.

    Every aspect that a comment does not mention is observed with a slightly negative valence. The idea is Sumers 2021's
    pragmatic learner; the two numbers are ours and small, so that mentioned aspects outweigh the others.

    Attributes:
        valence: of an aspect that is not mentioned.
        precision: of that observation, times the comment's precision.
    """

    valence: float = -0.1
    precision: float = 0.1


def aspect_prior(aspects: int, precision: float = 1.0) -> AspectPosterior:
    """Returns the posterior of the aspect weights before any comment.

    Args:
        aspects: A, number of aspects.
        precision: the same for each aspect; the mean of each is 0.
    """
    return AspectPosterior(mean=jnp.zeros(aspects), precision=precision * jnp.eye(aspects))


class _Evidence(NamedTuple):
    """Contributions of comments to the posterior, or the sums of the contributions.

    outer [C, A, A] adds to the precision, shift [C, A] to precision x mean.
    """

    outer: jax.Array
    shift: jax.Array


def _observed(
    valence: jax.Array,
    aspects: jax.Array,
    valid: jax.Array,
    precision: jax.Array | float,
    pragmatic: Pragmatic | None,
    summed: bool,
) -> _Evidence:
    """Returns the evidence of each comment, or with `summed` of all comments together.

    Other arguments are those of `aspect_posterior`.
    """
    chex.assert_shape(aspects, (*valence.shape, None))
    v, valid = masked(valence, valid & jnp.isfinite(aspects).all(-1))
    x = jnp.where(valid[:, None], aspects, 0).astype(jnp.float32)
    p = jnp.where(valid, jnp.asarray(precision).astype(jnp.float32), 0.0)
    out = "" if summed else "c"
    exact = jax.lax.Precision.HIGHEST  # a TPU would multiply in bfloat16, and a precision matrix feels it
    outer = jnp.einsum(f"c,ca,cb->{out}ab", p, x, x, precision=exact)
    shift = jnp.einsum(f"c,c,ca->{out}a", p, v, x, precision=exact)
    if pragmatic is not None:
        said = jnp.clip(x, 0.0, 1.0)
        left_out = (
            pragmatic.precision * (p * said.max(-1))[:, None] * (1.0 - said)
        )  # a comment about nothing implies nothing
        left_out = left_out.sum(0) if summed else left_out
        outer += left_out[..., None] * jnp.eye(x.shape[-1])
        shift += pragmatic.valence * left_out
    return _Evidence(outer, shift)


def aspect_posterior(
    prior: AspectPosterior,
    valence: jax.Array,
    aspects: jax.Array,
    valid: jax.Array,
    *,
    precision: jax.Array | float = 1.0,
    pragmatic: Pragmatic | None = None,
    axis_name: str | None = None,
) -> AspectPosterior:
    """Computes the posterior over aspect weights after C comments, all at once.

    Bayesian regression, as in Sumers 2021:

    L' = L + sum_c p_c x_c x_c^T,  mu' = L'^-1 (L mu + sum_c p_c v_c x_c), for v_c = w . x_c + noise of variance 1 / p_c.
    The order of the comments does not matter: `aspect_posterior_scan` gives the same. `vmap` over a leading axis keeps a
    posterior for each rater.

    Args:
        prior: mean mu and precision L.
        valence: v [C].
        aspects: x [C, A]; a comment about no aspect changes nothing.
        valid: [C] bool; a missing comment changes nothing.
        precision: p, one number or [C], such as a rater's reliability.
        pragmatic: also learn from the aspects that comments leave out. None: do not.
        axis_name: the comments are split over the devices of this pmap axis; all get the posterior of all comments.
    """
    return _updated(prior, psum(_observed(valence, aspects, valid, precision, pragmatic, summed=True), axis_name))


def _updated(prior: AspectPosterior, evidence: _Evidence) -> AspectPosterior:
    """Returns the posterior after summed evidence."""
    new = prior.precision + evidence.outer
    shift = jnp.einsum("ab,b->a", prior.precision, prior.mean, precision=jax.lax.Precision.HIGHEST) + evidence.shift
    return AspectPosterior(mean=_solve(new, shift), precision=new)


def aspect_posterior_scan(
    prior: AspectPosterior,
    valence: jax.Array,
    aspects: jax.Array,
    valid: jax.Array,
    *,
    precision: jax.Array | float = 1.0,
    pragmatic: Pragmatic | None = None,
) -> tuple[AspectPosterior, jax.Array]:
    """Computes `aspect_posterior` one comment at a time, for learning online.

    Args:
        prior: the posterior before the comments.
        valence: [C].
        aspects: [C, A].
        valid: [C] bool.
        precision: one number or [C].
        pragmatic: also learn from the aspects that comments leave out. None: do not.

    Returns:
        (posterior after all comments, means [C, A] after each comment).
    """

    def step(state: AspectPosterior, evidence: _Evidence) -> tuple[AspectPosterior, jax.Array]:
        state = _updated(state, evidence)
        return state, state.mean

    return jax.lax.scan(step, prior, _observed(valence, aspects, valid, precision, pragmatic, summed=False))


def aspect_rewards(posterior: AspectPosterior, features: jax.Array, valid: jax.Array) -> tuple[Masked, jax.Array]:
    """Computes rewards of answers from their aspects and the learned weights of the aspects.

    Args:
        posterior: mean mu and precision L of the weights.
        features: x [B, A], how much each answer has of each aspect.
        valid: [B] bool, false where an answer's features are missing.

    Returns:
        (rewards mu . x [B], their variances x^T L^-1 x [B], 0 where not valid).
    """
    chex.assert_shape(features, (None, *posterior.mean.shape))
    valid = valid.astype(bool) & jnp.isfinite(features).all(-1)
    x = jnp.where(valid[:, None], features, 0).astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    reward = jnp.einsum("ba,a->b", x, posterior.mean, precision=exact)
    variance = jnp.einsum("ba,ba->b", x, _solve(posterior.precision, x.T).T, precision=exact)
    return Masked(reward, valid), variance


def _solve(precision: jax.Array, right: jax.Array) -> jax.Array:
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(precision, lower=True), right)
