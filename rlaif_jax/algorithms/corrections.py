"""Importance weights for answers of another policy than the one that learns: truncated or masked, of tokens or answers.

The weights correct for tokens that were drawn by another policy than the one the ratio is measured against: the same
parameters in the sampler's arithmetic (Yao 2025, "Your efficient RL framework secretly brings you off-policy RL training"), or
older ones (the decoupled objective of Hilton 2022, eq. 5, with pi_old as the proximal policy).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from rlaif_jax.config import check_choices, require

LARGEST = 20.0  # nats; beyond it an exponential says no more than that two policies have nothing in common


@dataclasses.dataclass(frozen=True)
class Truncated:
    """min(pi_old / pi_sampler, most): every token counts, none more than `most` times.

    Attributes:
        level: whose probabilities are compared, a token's or the whole answer's.
        most: the largest weight.
    """

    level: Literal["token", "answer"] = "token"
    most: float = 2.0

    def __post_init__(self) -> None:
        check_choices(self, "importance")
        require(self.most >= 1, f"importance.most must be >= 1, not {self.most}")

    def __call__(self, log_weight: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns the weight of each token [B, T], without a gradient; see `_weights`."""
        return jnp.minimum(_weights(self.level, log_weight, mask), self.most)


@dataclasses.dataclass(frozen=True)
class Masked:
    """pi_old / pi_sampler where it lies in [least, most], else 0: what differs too much teaches nothing (Liu 2025, MIS).

    Attributes:
        level: whose probabilities are compared, a token's or the whole answer's.
        least: the smallest weight that counts.
        most: the largest weight that counts.
    """

    level: Literal["token", "answer"] = "token"
    least: float = 0.5
    most: float = 2.0

    def __post_init__(self) -> None:
        check_choices(self, "importance")
        require(
            0 <= self.least <= 1 <= self.most,
            f"importance.least ({self.least}) and importance.most ({self.most}) must lie on both sides of 1",
        )

    def __call__(self, log_weight: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns the weight of each token [B, T], without a gradient; see `_weights`."""
        weights = _weights(self.level, log_weight, mask)
        return jnp.where((weights >= self.least) & (weights <= self.most), weights, 0.0)


Importance = Truncated | Masked


def _weights(level: str, log_weight: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns pi_old / pi_sampler [B, T] of each token, or of its whole answer.

    Args:
        level: "token" or "answer".
        log_weight: [B, T], log pi_old - log pi_sampler in nats.
        mask: [B, T] bool, the answers' tokens.
    """
    log_weight = jnp.where(mask, log_weight, 0.0)
    if level == "answer":
        log_weight = jnp.broadcast_to(log_weight.sum(-1, keepdims=True), log_weight.shape)
    return jax.lax.stop_gradient(jnp.exp(jnp.clip(log_weight, -LARGEST, LARGEST)))
