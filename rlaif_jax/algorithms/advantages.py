"""From scores to advantages: pure, masked, float32."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp


def token_rewards(
    score: jax.Array,
    dense: jax.Array,
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    mask: jax.Array,
    kl_coef: jax.Array | float,
) -> jax.Array:
    """Per-token reward [B, T]: r_t = -kl_coef (logp_t - ref_logp_t) + dense_t + [t = end] score (Stiennon 2020).

    score [B] lands on the last real token of the response (the stop token where there is one); the log-ratio (k1) is
    clamped to +-20 nats. Masked entries are 0.
    """
    chex.assert_equal_shape([dense, logprobs, ref_logprobs, mask])
    chex.assert_type([score, dense, logprobs], jnp.floating)
    mask = mask.astype(bool)
    log_ratio = jnp.clip(jnp.where(mask, logprobs - ref_logprobs, 0.0), -20.0, 20.0)
    end = mask & ~jnp.concatenate([mask[:, 1:], jnp.zeros_like(mask[:, :1])], axis=1)
    rewards = dense - kl_coef * log_ratio + jnp.where(end, score[:, None], 0.0)
    return jnp.where(mask, rewards, 0.0).astype(jnp.float32)


def gae(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, *, gamma: float = 1.0, gae_lambda: float = 0.95
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation (Schulman 2016, eq. 16): (advantages, returns), each [B, T] float32.

    delta = r + gamma V' - V, A = delta + gamma lambda A'; masked steps carry V' and A' over unchanged, and after the
    last token both are 0 (no bootstrap, also for answers cut by the length limit). returns = A + V, before whitening.
    No gradient flows.
    """
    chex.assert_equal_shape([rewards, values, mask])
    mask = mask.astype(bool)

    def back(
        carry: tuple[jax.Array, jax.Array], step: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        next_value, next_advantage = carry
        reward, value, real = step
        advantage = reward + gamma * next_value - value + gamma * gae_lambda * next_advantage
        carry = (jnp.where(real, value, next_value), jnp.where(real, advantage, next_advantage))
        return carry, jnp.where(real, advantage, 0.0)

    zero = jnp.zeros_like(rewards[:, 0])
    _, advantages = jax.lax.scan(back, (zero, zero), (rewards.T, values.T, mask.T), reverse=True)
    advantages = advantages.T
    returns = jnp.where(mask, advantages + values, 0.0)
    return jax.lax.stop_gradient(advantages), jax.lax.stop_gradient(returns)


def group_normalised(score: jax.Array, valid: jax.Array, answers: int, *, eps: float = 1e-4) -> jax.Array:
    """(score - mean) / (std + eps) among the K answers of each prompt (GRPO, Shao 2024, section 4.1.2): [B] float32.

    score, valid [B] with the K answers of a prompt in K consecutive rows; invalid answers are left out of mean and
    standard deviation (population) and get 0, and so does a group of equal scores.
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
