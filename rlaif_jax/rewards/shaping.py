"""Scores to rewards: normalise, clip, penalise, combine. Pure jnp, masked throughout, float32 inside.

A missing score teaches nothing: it is never read (not even a NaN in its place), and a result that only missing scores
would make is itself missing.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp

from rlaif_jax.config import check_choices, require
from rlaif_jax.parallel import masked_mean
from rlaif_jax.types import Array, Feedback, RewardBatch, Rollout


class Masked(NamedTuple):
    """Values of which some may be missing.

    Attributes:
        values: [...] float32, 0 where not valid.
        valid: [...] bool.
    """

    values: jax.Array
    valid: jax.Array


def masked(values: jax.Array, valid: jax.Array) -> Masked:
    """Returns values in float32 with missing ones as 0, and their validity.

    Args:
        values: [...]; a value that is not finite counts as missing.
        valid: [...], bool or 0 / 1, false where a value is missing.
    """
    valid = valid.astype(bool) & jnp.isfinite(values)
    return Masked(jnp.where(valid, values, 0).astype(jnp.float32), valid)


# ---- Normalise


@flax.struct.dataclass
class Normaliser:
    """Scale of raw scores on samples of the reference policy; part of every checkpoint.

    Attributes:
        mean: [] float32.
        std: [] float32, positive.
    """

    mean: jax.Array
    std: jax.Array


def fit_normaliser(scores: jax.Array, valid: jax.Array, axis_name: str | None = None) -> Normaliser:
    """Returns the normaliser that gives the valid scores [B] mean 0 and std 1 (Ziegler 2019, section 2.1).

    Over all devices of `axis_name`. Scores that do not differ (a spread below a millionth of their size, which is
    rounding), a single score and no score have no scale: their std is 1, not 0, so that the rewards are the scores less
    their mean and never a rounding difference blown up.
    """
    if scores.ndim == 2:
        return jax.vmap(lambda x, y: fit_normaliser(x, y, axis_name), in_axes=1)(scores, valid)
    scores, valid = masked(scores, valid)
    mean = masked_mean(scores, valid, axis_name)
    std = jnp.sqrt(masked_mean((scores - mean) ** 2, valid, axis_name))
    size = jnp.sqrt(masked_mean(scores**2, valid, axis_name))
    return Normaliser(mean=mean, std=jnp.where(std > 1e-6 * size, std, 1.0))


def group_normalised(score: jax.Array, valid: jax.Array, answers: int, *, eps: float = 1e-4) -> jax.Array:
    """Computes (score - mean) / (std + eps) among the K answers of each prompt (Shao 2024, section 4.1.2).

    Args:
        score: [B], the K answers of a prompt in K consecutive rows.
        valid: [B]; invalid answers are left out of mean and standard deviation (population) and get 0.
        answers: K.
        eps: added to the standard deviation.

    Returns:
        [B] float32; 0 for a group of equal scores.
    """
    grouped, real = score.reshape(-1, answers), valid.astype(bool).reshape(-1, answers)
    count = jnp.maximum(real.sum(-1, keepdims=True), 1)
    mean = jnp.where(real, grouped, 0.0).sum(-1, keepdims=True) / count
    # The mean of equal scores may miss them by a rounding, which the division by eps would blow up.
    lowest = jnp.where(real, grouped, jnp.inf).min(-1, keepdims=True)
    highest = jnp.where(real, grouped, -jnp.inf).max(-1, keepdims=True)
    centred = jnp.where(real & (lowest < highest), grouped - mean, 0.0)
    std = jnp.sqrt((centred**2).sum(-1, keepdims=True) / count)
    return (centred / (std + eps)).reshape(-1).astype(jnp.float32)


def identity_normaliser() -> Normaliser:
    """Returns the normaliser that leaves scores as they are."""
    return Normaliser(mean=jnp.float32(0.0), std=jnp.float32(1.0))


@dataclasses.dataclass(frozen=True)
class Shaping:
    """How the judgements of an answer become its reward.

    Attributes:
        weights: one for each reward of the feedback, may be negative; empty: all 1.
        per_group: normalise each reward among the answers to a prompt before the weighted sum, so that each counts by its
            weight whatever its scale and spread (GDPO, Liu 2026).
        missing_eos: what an answer that was cut by the length limit gets: its `score`, its score
            minus `missing_eos_value` (`penalty`), or the constant `missing_eos_value` instead of its score (`constant`).
        missing_eos_value: see `missing_eos`.
        overlong_from: tokens that an answer may have at no cost; from there to the length limit its reward falls linearly by
            up to 1 (soft overlong punishment, DAPO, Yu 2025, eq. 13: L_max is the limit, L_max - L_cache this number). The
            1 is in units of the reward after scale and weights. None: length costs nothing.
    """

    weights: tuple[float, ...] = ()
    per_group: bool = False
    missing_eos: Literal["score", "penalty", "constant"] = "score"
    missing_eos_value: float = 1.0
    overlong_from: int | None = None

    def __post_init__(self) -> None:
        check_choices(self, "shaping")
        require(
            self.overlong_from is None or self.overlong_from >= 0,
            f"shaping.overlong_from must be >= 0, not {self.overlong_from}",
        )

    def check(self, max_new_tokens: int) -> None:
        """Raises UserError where no answer can be as long as `overlong_from`.

        Args:
            max_new_tokens: T, tokens of an answer at most.
        """
        require(
            self.overlong_from is None or self.overlong_from < max_new_tokens,
            f"shaping.overlong_from is {self.overlong_from}, but answers end at {max_new_tokens} tokens "
            "(max_new_tokens): length costs something from a smaller number on",
        )


def shaped_rewards(
    shaping: Shaping, normaliser: Normaliser, judged: Feedback, rollout: Rollout, *, answers: int = 1
) -> RewardBatch:
    """Computes the rewards of B answers: all that is done to a judgement before an algorithm uses it.

    Each reward is normalised, the present ones are combined by their weights (`combine`), long answers lose by
    `shaping.overlong_from`, and answers without a stop token go by the missing-EOS rule. Dense rewards stay as they are.

    Args:
        shaping: weights and rules.
        normaliser: mean and std of each reward.
        judged: feedback with values [B, R].
        rollout: the answers.
        answers: K, for `shaping.per_group`; the K answers to a prompt are consecutive rows.

    Raises:
        UserError: the number of weights is not R, or no answer can be as long as `shaping.overlong_from`.
    """
    chex.assert_rank([judged.values, judged.valid], 2)
    count = judged.values.shape[1]
    normalised = sequence_rewards(judged.values, judged.valid, normaliser)
    if shaping.per_group:
        require(answers > 1, "shaping.per_group compares the answers to a prompt: draw at least 2 (answers_per_prompt)")
        of_groups = jax.vmap(lambda x, valid: group_normalised(x, valid, answers), in_axes=1, out_axes=1)
        normalised = normalised._replace(values=of_groups(*normalised))
    require(
        not shaping.weights or len(shaping.weights) == count,
        f"shaping.weights has {len(shaping.weights)} entries, but the feedback gives {count} rewards an answer",
    )
    if count == 1 and not shaping.weights:
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
    score = score.astype(jnp.float32)
    if shaping.overlong_from is not None:
        limit = mask.shape[1]
        shaping.check(limit)
        free = shaping.overlong_from
        score += length_penalty(mask, per_token=1 / (limit - free), free=free, most=1.0)
    return RewardBatch(
        score=missing_eos_score(shaping, score, rollout.finished),
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
    """Applies the rule for answers without a stop token to their scores.

    Args:
        shaping: its `missing_eos` is the rule and `missing_eos_value` the number for the rule: "penalty"
            subtracts the number, "constant" puts the number in place of the score, "score" changes nothing.
        score: [B].
        finished: [B] bool, whether the answer ends with its stop token.

    Returns:
        [B]; the scores of finished answers are unchanged.
    """
    if shaping.missing_eos == "penalty":
        return jnp.where(finished, score, score - shaping.missing_eos_value)
    if shaping.missing_eos == "constant":
        return jnp.where(finished, score, shaping.missing_eos_value)
    return score


def clip(scores: jax.Array, valid: jax.Array, low: float, high: float) -> Masked:
    """Clips scores to [low, high]; a missing one, or one that is not finite, is missing and 0.

    Args:
        scores: [...].
        valid: [...], false where a score is missing.
        low: the smallest score.
        high: the largest score.
    """
    scores, valid = masked(scores, valid)
    return Masked(jnp.where(valid, jnp.clip(scores, low, high), 0.0), valid)


# ---- Penalise


def length_penalty(
    response_mask: jax.Array, *, per_token: float, free: float = 0.0, most: float = jnp.inf
) -> jax.Array:
    """Computes a term [B] of the reward, at most 0, that punishes long answers.

    It is -per_token (length - free) for answers longer than `free` tokens, and at least -most.

    DAPO's soft overlong punishment (Yu 2025, eq. 13) is free = L_max - L_cache, per_token = 1 / L_cache, most = 1.

    Args:
        response_mask: [B, T] bool, the answers' tokens.
        per_token: penalty of each token after the first `free`.
        free: number of tokens without a penalty.
        most: largest penalty.
    """
    length = response_mask.astype(jnp.float32).sum(-1)
    return -jnp.minimum(per_token * jnp.maximum(length - free, 0.0), most)


# ---- Combine


def combine(rewards: jax.Array, valid: jax.Array, weights: jax.Array, *, least_share: float = 0.0) -> Masked:
    """Returns the weighted sum [...] of rewards of which some may be missing.

    The present rewards represent the missing ones: sum_present w r times (sum of all |w| / sum of the present |w|), so
    that the scale does not fall with each missing reward; without missing ones it is sum w r.

    Args:
        rewards: [..., R].
        valid: [..., R] bool.
        weights: [R] or [..., R]; may be negative.
        least_share: the share of the weight, sum_present |w| / sum |w|, that must be exceeded for a valid result. By
            default any present reward with a weight other than 0 is enough.
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
    """Computes the mean [...] of the present scores of M reward models.

    Args:
        scores: [..., M].
        valid: [..., M] bool, false where a score is missing.
        least: the result is valid where at least this many scores are present.
    """
    scores, valid = masked(scores, valid)
    some = _enough(valid, least)
    return Masked(jnp.where(some, scores.sum(-1) / jnp.maximum(valid.sum(-1), 1), 0.0), some)


def ensemble_worst(scores: jax.Array, valid: jax.Array, *, least: int = 1) -> Masked:
    """Computes the smallest present score [...] of M reward models (Coste 2023, eq. 3).

    Args:
        scores: [..., M].
        valid: [..., M] bool, false where a score is missing.
        least: the result is valid where at least this many scores are present.
    """
    scores, valid = masked(scores, valid)
    some = _enough(valid, least)
    return Masked(jnp.where(some, jnp.where(valid, scores, jnp.inf).min(-1), 0.0), some)


def ensemble_cautious(scores: jax.Array, valid: jax.Array, coef: jax.Array | float, *, least: int = 1) -> Masked:
    """Computes mean - coef * population variance [...] of the present scores (Coste 2023, eq. 4).

    A single present score has no variance and therefore no penalty; `least` = 2 makes it missing.

    Args:
        scores: [..., M], of M reward models.
        valid: [..., M] bool, false where a score is missing.
        coef: weight of the variance.
        least: the result is valid where at least this many scores are present.
    """
    mean, some = ensemble_mean(scores, valid, least=least)
    scores, valid = masked(scores, valid)
    deviation = jnp.where(valid, scores - mean[..., None], 0.0)
    variance = (deviation**2).sum(-1) / jnp.maximum(valid.sum(-1), 1)
    return Masked(jnp.where(some, mean - coef * variance, 0.0), some)
