"""Losses of the policy gradient: pure functions, and objectives as frozen dataclasses.

An objective says how an advantage becomes a loss, of a token or of a whole answer; `Objective` is the union of all of them. To
add one, write its class and name it there.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from rlaif_jax.config import check_choices, require


@dataclasses.dataclass(frozen=True)
class NoRatio:
    """-A log pi, the plain policy gradient (Williams 1992); for one epoch and one minibatch."""

    def __call__(self, log_ratio: jax.Array, logprobs: jax.Array, advantages: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (loss, False), each of the shape of `logprobs`."""
        return -advantages * logprobs, jnp.zeros(log_ratio.shape, bool)


@dataclasses.dataclass(frozen=True)
class Clipped:
    """PPO's clipped surrogate (Schulman 2017, eq. 7), and its relatives.

    loss = max(-A rho, -A clip(rho, 1 - e, 1 + e')), and for A < 0 at most -A c.

    Attributes:
        clip_range: e; the ratio rho is clipped to [1 - e, 1 + e'].
        clip_higher: e', of DAPO's clip-higher (Yu 2025, eq. 10); None: e.
        dual_clip: c > 1 + e', of dual-clip PPO (Ye 2020, eq. 5): what a ratio counts at most where the advantage is
            negative; None: no limit.
    """

    clip_range: float = 0.2
    clip_higher: float | None = None
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        require(self.clip_range > 0, f"objective.clip_range must be > 0, not {self.clip_range}")
        higher = self.clip_range if self.clip_higher is None else self.clip_higher
        require(higher > 0, f"objective.clip_higher must be > 0, not {higher}")
        require(
            self.dual_clip is None or self.dual_clip > 1 + higher,
            f"objective.dual_clip must be > {1 + higher}, where the ratio is clipped already, not {self.dual_clip}",
        )

    def __call__(self, log_ratio: jax.Array, logprobs: jax.Array, advantages: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (loss, whether the ratio lies outside the clip range), each of the shape of `log_ratio`."""
        del logprobs
        ratio = jnp.exp(log_ratio)
        low, high = 1 - self.clip_range, 1 + (self.clip_range if self.clip_higher is None else self.clip_higher)
        counted = ratio if self.dual_clip is None else jnp.minimum(ratio, self.dual_clip)
        loss = jnp.maximum(-advantages * counted, -advantages * jnp.clip(ratio, low, high))
        return loss, (ratio < low) | (ratio > high)


@dataclasses.dataclass(frozen=True)
class CISPO:
    """-sg(min(rho, m)) A log pi: every token keeps a gradient, of a capped weight (MiniMax 2025, eq. 4).

    Attributes:
        most: m, the largest ratio.
    """

    most: float = 5.0

    def __post_init__(self) -> None:
        require(self.most >= 1, f"objective.most must be >= 1, not {self.most}")

    def __call__(self, log_ratio: jax.Array, logprobs: jax.Array, advantages: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (loss, whether the ratio is capped), each of the shape of `log_ratio`."""
        ratio = jnp.exp(log_ratio)
        return -jax.lax.stop_gradient(jnp.minimum(ratio, self.most)) * advantages * logprobs, ratio > self.most


@dataclasses.dataclass(frozen=True)
class SAPO:
    """-A (4 / t) s(t (rho - 1)), s the logistic function (Gao 2025, eq. 5 and 6): the clip, made smooth.

    At rho = 1 its gradient is that of -A rho; it fades with the distance of rho from 1 instead of ending at an edge.

    Attributes:
        positive: t of tokens with A > 0.
        negative: t of the others; larger, so that tokens of worse answers fade faster.
    """

    positive: float = 1.0
    negative: float = 1.05

    def __post_init__(self) -> None:
        for name in ("positive", "negative"):
            require(vars(self)[name] > 0, f"objective.{name} must be > 0, not {vars(self)[name]}")

    def __call__(self, log_ratio: jax.Array, logprobs: jax.Array, advantages: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (loss, whether less than half of the gradient is left), each of the shape of `log_ratio`."""
        del logprobs
        temperature = jnp.where(advantages > 0, self.positive, self.negative)
        gate = jax.nn.sigmoid(temperature * (jnp.exp(log_ratio) - 1))
        return -advantages * gate * 4 / temperature, 4 * gate * (1 - gate) < 0.5


Objective = Clipped | NoRatio | CISPO | SAPO


# ---- Answers of another policy

LARGEST = 20.0  # nats; beyond it an exponential says no more than that two policies have nothing in common


@dataclasses.dataclass(frozen=True)
class Truncated:
    """min(pi_old / pi_sampler, most): every token counts, none more than `most` times (Yao 2025).

    The weights correct for tokens that were drawn by another policy than the one the ratio is measured against: the same
    parameters in the sampler's arithmetic (Yao 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"), or older ones (the decoupled objective of Hilton 2022, eq. 5, with pi_old as the proximal policy).

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
    """pi_old / pi_sampler where it lies in [least, most], else 0 (masked importance sampling, Liu 2025).

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


# ---- Further parts of losses


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
