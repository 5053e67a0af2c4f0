"""Scores to rewards: normalise, clip, mask. Pure jnp; scores keep their floats."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from rlaif_jax.types import RewardBatch


@flax.struct.dataclass
class Normaliser:
    """mean [] and std [] of raw scores on samples of the reference policy; part of every checkpoint."""

    mean: jax.Array
    std: jax.Array


def fit_normaliser(scores: jax.Array, valid: jax.Array) -> Normaliser:
    """Mean and standard deviation of the valid scores [B], so that they become 0 and 1 (Ziegler 2019, section 2.1)."""
    count = jnp.maximum(valid.sum(), 1)
    mean = jnp.where(valid, scores, 0.0).sum() / count
    variance = jnp.where(valid, (scores - mean) ** 2, 0.0).sum() / count
    return Normaliser(mean=mean, std=jnp.sqrt(variance))


def identity_normaliser() -> Normaliser:
    """Leaves scores as they are."""
    return Normaliser(mean=jnp.float32(0.0), std=jnp.float32(1.0))


def sequence_rewards(
    score: jax.Array,
    valid: jax.Array,
    normaliser: Normaliser,
    response_mask: jax.Array,
    *,
    token_rewards: jax.Array | None = None,
    clip: float | None = None,
) -> RewardBatch:
    """Scores [B] of whole answers -> rewards: (score - mean) / std, clipped to +-clip if asked.

    token_rewards [B, T]: dense rewards, kept as they are where response_mask and the answer's judgement is valid, else
    0; None = none. A score that is not finite counts as missing: its answer teaches nothing.
    """
    valid = valid.astype(bool) & jnp.isfinite(score)
    reward = (jnp.where(valid, score, normaliser.mean) - normaliser.mean) / jnp.maximum(normaliser.std, 1e-6)
    if clip is not None:
        reward = jnp.clip(reward, -clip, clip)
    if token_rewards is None:
        dense = jnp.zeros(response_mask.shape, jnp.float32)
    else:
        dense = jnp.where(response_mask & valid[:, None], token_rewards, 0.0).astype(jnp.float32)
    return RewardBatch(score=reward.astype(jnp.float32), valid=valid, token_rewards=dense)
