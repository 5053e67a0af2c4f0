"""Losses of the policy gradient per token: pure functions, and objectives as frozen dataclasses.

An objective says how an advantage becomes a loss; `Objective` is the union of all of them. To add one, write its class and
name it there.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from rlaif_jax.config import require


@dataclasses.dataclass(frozen=True)
class Clipped:
    """PPO's clipped surrogate (Schulman 2017, eq. 7).

    Attributes:
        clip_range: e; the ratio is clipped to [1 - e, 1 + e].
    """

    clip_range: float = 0.2

    def __post_init__(self) -> None:
        require(self.clip_range > 0, f"objective.clip_range must be > 0, not {self.clip_range}")

    def __call__(self, log_ratio: jax.Array, logprobs: jax.Array, advantages: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (loss, whether the ratio lies outside the clip range), each of the shape of `log_ratio`."""
        del logprobs
        outside = jnp.abs(jnp.exp(log_ratio) - 1) > self.clip_range
        return policy_loss(log_ratio, advantages, self.clip_range), outside


Objective = Clipped


def policy_loss(log_ratio: jax.Array, advantages: jax.Array, clip_range: jax.Array | float) -> jax.Array:
    """Computes PPO's clipped surrogate loss per token (Schulman 2017, eq. 7, negated).

    loss = max(-A rho, -A clip(rho, 1 - e, 1 + e)), rho = exp(log_ratio).

    Args:
        log_ratio: [...], log-prob of the token under the policy minus that before the update, in nats.
        advantages: A [...].
        clip_range: e.
    """
    ratio = jnp.exp(log_ratio)
    return jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1 - clip_range, 1 + clip_range))


def value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, clip_range: jax.Array | float
) -> jax.Array:
    """Computes the clipped squared error of the critic per token.

    loss = 0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2).

    Args:
        values: V [...], of the critic that learns.
        old_values: V_old [...], of the critic before the update.
        returns: R [...].
        clip_range: c; infinity does not clip.
    """
    clipped = jnp.clip(values, old_values - clip_range, old_values + clip_range)
    return 0.5 * jnp.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def kl_estimates(log_ratio: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes (k1, k2, k3) of KL(policy || reference) per sampled token (Schulman 2020).

    `log_ratio` = logp - ref_logp, clamped to +-20 nats.
    """
    d = jnp.clip(log_ratio, -20.0, 20.0)
    return d, 0.5 * d**2, jnp.exp(-d) - 1 + d


def importance_weights(log_weight: jax.Array, cap: jax.Array | float) -> jax.Array:
    """Computes min(pi_old / pi_sampler, cap) per token, without a gradient.

    The weights correct for tokens that were drawn by another policy than the one the ratio is measured against:
    the same parameters in the sampler's arithmetic (Yao 2025, truncated importance sampling), or older ones (the
    decoupled objective of Hilton 2022, eq. 5, with pi_old as the proximal policy).

    Args:
        log_weight: [...], log pi_old - log pi_sampler in nats; clipped to +-20.
        cap: largest weight.
    """
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(jnp.clip(log_weight, -20.0, 20.0)), cap))


KL_COEF_RANGE = (1e-6, 1e3)  # of an adaptive coefficient


def adapt_kl(
    kl_coef: jax.Array,
    kl: jax.Array,
    sequences: jax.Array | int,
    *,
    target: jax.Array | float,
    horizon: jax.Array | float,
) -> jax.Array:
    """Returns the KL coefficient after a step: coef (1 + e n / horizon) (Ziegler 2019, section 2.2).

    e = clip(KL / target - 1, -.2, .2). So that a step of many sequences cannot turn its sign, the factor lies in 1/2 .. 2,
    and so that it can come back, the coefficient in `KL_COEF_RANGE`.

    Args:
        kl_coef: [] the coefficient of the step.
        kl: [] mean KL of a sequence to the reference, in nats.
        sequences: n, sequences of the step.
        target: the KL to hold.
        horizon: in sequences.
    """
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    factor = jnp.clip(1 + error * sequences / horizon, 0.5, 2.0)
    return jnp.clip(kl_coef * factor, *KL_COEF_RANGE)
