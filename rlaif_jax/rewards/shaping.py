"""Scores to rewards: normalise, clip, penalise, combine. Pure jnp: masked throughout, float32 inside, floats stay floats.

What is missing teaches nothing: it is never read (not even a NaN in its place), and a result without anything to rest
on is marked as missing in its turn.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp

from rlaif_jax.config import check_choices
from rlaif_jax.parallel import masked_mean, masked_whiten
from rlaif_jax.types import Array, Feedback, RewardBatch, Rollout


class Masked(NamedTuple):
    """values [...] float32 and valid [...] bool of the same shape; where not valid the value is 0 and means nothing."""

    values: jax.Array
    valid: jax.Array


def masked(values: jax.Array, valid: jax.Array) -> Masked:
    """Values in float32, 0 where they are missing; a value that is not finite counts as missing."""
    valid = valid.astype(bool) & jnp.isfinite(values)
    return Masked(jnp.where(valid, values, 0).astype(jnp.float32), valid)


# ---- Normalise


@flax.struct.dataclass
class Normaliser:
    """mean [] and std [] of raw scores on samples of the reference policy; part of every checkpoint."""

    mean: jax.Array
    std: jax.Array


def fit_normaliser(scores: jax.Array, valid: jax.Array, axis_name: str | None = None) -> Normaliser:
    """Returns mean and standard deviation of the valid scores, which bring them to 0 and 1 (Ziegler 2019, section 2.1).

    Scores that do not differ (a spread below a millionth of their size, which is rounding), a single score and no score at
    all define no scale: their std is 1, not 0, so that the rewards are the scores less their mean and never a difference
    blown up.

    Args:
        scores: [B], or [B, R] for the mean [R] and std [R] of each reward.
        valid: of the same shape.
        axis_name: the mapped axis of the devices, or None.
    """
    if scores.ndim == 2:
        return jax.vmap(lambda x, y: fit_normaliser(x, y, axis_name), in_axes=1)(scores, valid)
    scores, valid = masked(scores, valid)
    mean = masked_mean(scores, valid, axis_name)
    std = jnp.sqrt(masked_mean((scores - mean) ** 2, valid, axis_name))
    size = jnp.sqrt(masked_mean(scores**2, valid, axis_name))
    return Normaliser(mean=mean, std=jnp.where(std > 1e-6 * size, std, 1.0))


def identity_normaliser() -> Normaliser:
    """Leaves scores as they are."""
    return Normaliser(mean=jnp.float32(0.0), std=jnp.float32(1.0))


@dataclasses.dataclass(frozen=True)
class Shaping:
    """How the judgements of an answer become its reward.

    Attributes:
        weights: one for each reward of the feedback, may be negative; empty: all 1.
        missing_eos: what an answer that was cut by the length limit gets: its `score`, its score minus
            `missing_eos_value` (`penalty`), or the constant `missing_eos_value` instead of its score (`constant`).
        missing_eos_value: see `missing_eos`.
    """

    weights: tuple[float, ...] = ()
    missing_eos: Literal["score", "penalty", "constant"] = "score"
    missing_eos_value: float = 1.0

    def __post_init__(self) -> None:
        check_choices(self, "shaping")


def shaped_rewards(shaping: Shaping, normaliser: Normaliser, judged: Feedback, rollout: Rollout) -> RewardBatch:
    """Returns the rewards of B answers: all that is done to a judgement before an algorithm learns from it.

    Each reward is normalised, the present ones are combined by their weights (`combine`), and answers without a stop
    token go by the missing-EOS rule. Dense rewards stay as they are.

    Args:
        shaping: weights and rules.
        normaliser: mean and std of each reward.
        judged: feedback with values [B, R].
        rollout: the answers.
    """
    chex.assert_rank([judged.values, judged.valid], 2)
    count = judged.values.shape[1]
    normalised = sequence_rewards(judged.values, judged.valid, normaliser)
    if count == 1:
        score, valid = normalised.values[:, 0], normalised.valid[:, 0]
    elif count == 0:  # nobody judges: recorded preferences, or rewards that the algorithm makes
        score, valid = jnp.zeros(rollout.finished.shape), jnp.ones(rollout.finished.shape, bool)
    else:
        weights = jnp.asarray(shaping.weights or (1.0,) * count)
        score, valid = combine(normalised.values, normalised.valid, weights)
    mask = rollout.response_mask
    if judged.token_rewards is None:
        dense = jnp.zeros(mask.shape, jnp.float32)
    else:
        dense = jnp.where(mask & valid[:, None], judged.token_rewards, 0.0).astype(jnp.float32)
    return RewardBatch(
        score=missing_eos_score(shaping, score.astype(jnp.float32), rollout.finished),
        valid=valid,
        token_rewards=dense,
        pairs=judged.pairs,
        pairs_valid=judged.pairs_valid,
    )


def sequence_rewards(values: Array, valid: Array, normaliser: Normaliser, *, clip: float | None = None) -> Masked:
    """Returns (value - mean) / std of scores of any shape, clipped to +-clip if asked; 0 where missing.

    A value that is not finite counts as missing: its answer teaches nothing.

    Args:
        values: scores of whole answers.
        valid: false where a judgement is missing.
        normaliser: mean and std.
        clip: the largest absolute reward; None: no limit.
    """
    valid = jnp.asarray(valid, bool) & jnp.isfinite(values)
    reward = (jnp.where(valid, values, normaliser.mean) - normaliser.mean) / jnp.maximum(normaliser.std, 1e-6)
    if clip is not None:
        reward = jnp.clip(reward, -clip, clip)
    return Masked(reward.astype(jnp.float32), valid)


def missing_eos_score(shaping: Shaping, score: jax.Array, finished: jax.Array) -> jax.Array:
    """Returns scores [B] after the rule for answers without a stop token; finished [B] bool."""
    if shaping.missing_eos == "penalty":
        return jnp.where(finished, score, score - shaping.missing_eos_value)
    if shaping.missing_eos == "constant":
        return jnp.where(finished, score, shaping.missing_eos_value)
    return score


def whiten(scores: jax.Array, valid: jax.Array, axis_name: str | None = None, *, shift_mean: bool = True) -> Masked:
    """(score - mean) / std over the valid scores [...] of all devices; the mean added back with shift_mean=False.

    The statistics are global sums over a global count, never a mean of the devices' means. Scores that do not differ
    become 0.
    """
    scores, valid = masked(scores, valid)
    mean = masked_mean(scores, valid, axis_name)
    # What is left of equal scores is rounding: whitened it would be a difference blown up.
    offset = jnp.where(jnp.abs(scores - mean) <= 1e-6 * jnp.abs(mean), 0.0, scores - mean)
    white = masked_whiten(offset, valid, axis_name)
    return Masked(jnp.where(valid, white if shift_mean else white + mean, 0.0), valid)


def clip(scores: jax.Array, valid: jax.Array, low: float, high: float) -> Masked:
    """Scores [...] held between `low` and `high`."""
    scores, valid = masked(scores, valid)
    return Masked(jnp.where(valid, jnp.clip(scores, low, high), 0.0), valid)


# ---- Penalise


def kl_penalty(logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array, coef: jax.Array | float) -> jax.Array:
    """Dense rewards [B, T]: -coef (logp_t - ref_logp_t) per token in nats, clamped to +-20 (Stiennon 2020, section 3.4).

    PPO subtracts this itself (`kl_coef`); this is for other algorithms and for a second reference: not for both at once.
    """
    chex.assert_equal_shape([logprobs, ref_logprobs, mask])
    mask = mask.astype(bool)
    log_ratio = jnp.where(mask, logprobs, 0).astype(jnp.float32) - jnp.where(mask, ref_logprobs, 0).astype(jnp.float32)
    return -coef * jnp.clip(log_ratio, -20.0, 20.0)


def length_penalty(
    response_mask: jax.Array, *, per_token: float, free: float = 0.0, most: float = jnp.inf
) -> jax.Array:
    """A term of the reward [B], <= 0: -per_token (length - free) for answers [B, T] longer than `free` tokens.

    It falls no lower than -most. DAPO's soft overlong punishment (Yu 2025, eq. 13) is free = L_max - L_cache,
    per_token = 1 / L_cache, most = 1.
    """
    length = response_mask.astype(jnp.float32).sum(-1)
    return -jnp.minimum(per_token * jnp.maximum(length - free, 0.0), most)


# ---- Combine


def combine(rewards: jax.Array, valid: jax.Array, weights: jax.Array, *, least_share: float = 0.0) -> Masked:
    """The weighted sum [...] of R rewards [..., R], some of them missing.

    The present ones speak for the missing ones: sum_present w r times (sum of all |w| / sum of the present |w|), so that
    the scale does not fall with each reward that is absent; with none absent it is sum w r. weights [R] or [..., R] may
    be negative.

    least_share: the share of the weight, sum_present |w| / sum |w|, that must be exceeded. By default any present reward
    of a weight other than 0 makes the result valid.
    """
    rewards, valid = masked(rewards, valid)
    weights = jnp.broadcast_to(jnp.asarray(weights).astype(jnp.float32), rewards.shape)
    total = jnp.abs(weights).sum(-1)
    present = jnp.where(valid, jnp.abs(weights), 0.0).sum(-1)
    some = present > least_share * total
    scale = total / jnp.where(some, present, 1.0)
    return Masked(jnp.where(some, (weights * rewards).sum(-1) * scale, 0.0), some)


# ---- Ensembles of M reward models (Coste 2023, section 3.3)


def _enough(valid: jax.Array, least: int) -> jax.Array:
    return valid.sum(-1) >= max(least, 1)


def ensemble_mean(scores: jax.Array, valid: jax.Array, *, least: int = 1) -> Masked:
    """The mean [...] of the present scores [..., M]; valid where at least `least` members are present."""
    scores, valid = masked(scores, valid)
    some = _enough(valid, least)
    return Masked(jnp.where(some, scores.sum(-1) / jnp.maximum(valid.sum(-1), 1), 0.0), some)


def ensemble_worst(scores: jax.Array, valid: jax.Array, *, least: int = 1) -> Masked:
    """Worst case: the smallest present score of [..., M] (Coste 2023, eq. 3)."""
    scores, valid = masked(scores, valid)
    some = _enough(valid, least)
    return Masked(jnp.where(some, jnp.where(valid, scores, jnp.inf).min(-1), 0.0), some)


def ensemble_cautious(scores: jax.Array, valid: jax.Array, coef: jax.Array | float, *, least: int = 1) -> Masked:
    """mean - coef * variance of the present scores [..., M], the variance over their number (Coste 2023, eq. 4).

    A single present score has no variance and passes unpunished: `least` = 2 calls it missing.
    """
    mean, some = ensemble_mean(scores, valid, least=least)
    scores, valid = masked(scores, valid)
    deviation = jnp.where(valid, scores - mean[..., None], 0.0)
    variance = (deviation**2).sum(-1) / jnp.maximum(valid.sum(-1), 1)
    return Masked(jnp.where(some, mean - coef * variance, 0.0), some)
