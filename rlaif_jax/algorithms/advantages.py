"""Advantage estimators: from rewards to advantages. Pure, masked, float32.

An estimator is a frozen dataclass; `Advantage` is the union of all of them. To add one, write its class and name it there.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlaif_jax.config import require
from rlaif_jax.rewards.shaping import group_normalised


class AdvantageInputs(NamedTuple):
    """What an estimator may read of a step's B answers.

    Attributes:
        rewards: [B, T] per-token rewards: the KL penalty, dense rewards, and the score on the last token.
        totals: [B] the score and all dense rewards of an answer, without the KL penalty.
        values: [B, T] the critic's values before each token; zeros without a critic.
        mask: [B, T] bool, tokens of answers with a valid judgement.
        valid: [B] bool, answers with a valid judgement.
        answers: K; the K answers to a prompt are consecutive rows.
    """

    rewards: jax.Array
    totals: jax.Array
    values: jax.Array
    mask: jax.Array
    valid: jax.Array
    answers: int


@dataclasses.dataclass(frozen=True)
class GAE:
    """Generalised advantage estimation (Schulman 2016), with a critic.

    Attributes:
        gamma: discount of a token.
        gae_lambda: 0 is the one-step error of the critic, 1 the return less the value.
        whiten: whether advantages are brought to mean 0 and variance 1 over the whole step (Huang 2024).
    """

    gamma: float = 1.0
    gae_lambda: float = 0.95
    whiten: bool = True
    needs_critic: ClassVar[bool] = True
    min_answers: ClassVar[int] = 1

    def __post_init__(self) -> None:
        require(0 <= self.gae_lambda <= 1, f"advantage.gae_lambda must lie in [0, 1], not {self.gae_lambda}")
        require(0 < self.gamma <= 1, f"advantage.gamma must lie in (0, 1], not {self.gamma}")

    def __call__(self, inputs: AdvantageInputs) -> tuple[jax.Array, jax.Array]:
        """Returns (advantages, returns), each [B, T]."""
        return gae(inputs.rewards, inputs.values, inputs.mask, gamma=self.gamma, gae_lambda=self.gae_lambda)


@dataclasses.dataclass(frozen=True)
class GroupNormalised:
    """(total - mean) / std among the K answers to a prompt (GRPO, Shao 2024, section 4.1.2)."""

    whiten: ClassVar[bool] = False
    needs_critic: ClassVar[bool] = False
    min_answers: ClassVar[int] = 2

    def __call__(self, inputs: AdvantageInputs) -> tuple[jax.Array, jax.Array]:
        """Returns (advantages, zeros), each [B, T]: every token of an answer has the same advantage."""
        of_answers = group_normalised(inputs.totals, inputs.valid, inputs.answers)
        return over_tokens(of_answers, inputs.mask)


@dataclasses.dataclass(frozen=True)
class LeaveOneOut:
    """total - mean of the other answers to the prompt (RLOO, Ahmadian 2024, eq. 7)."""

    whiten: ClassVar[bool] = False
    needs_critic: ClassVar[bool] = False
    min_answers: ClassVar[int] = 2

    def __call__(self, inputs: AdvantageInputs) -> tuple[jax.Array, jax.Array]:
        """Returns (advantages, zeros), each [B, T]: every token of an answer has the same advantage."""
        return over_tokens(leave_one_out(inputs.totals, inputs.valid, inputs.answers), inputs.mask)


@dataclasses.dataclass(frozen=True)
class BatchNormalised:
    """The total itself, whitened over the tokens of the whole step.

    With `Shaping.per_group` it is GDPO (Liu 2026, "GDPO: group reward-decoupled normalization policy optimization", eq. 4 to
    6): each reward is normalised among the answers to a prompt, their weighted sum over the step.
    """

    whiten: ClassVar[bool] = True
    needs_critic: ClassVar[bool] = False
    min_answers: ClassVar[int] = 1

    def __call__(self, inputs: AdvantageInputs) -> tuple[jax.Array, jax.Array]:
        """Returns (advantages before whitening, zeros), each [B, T]: an answer's total on all its tokens."""
        return over_tokens(jnp.where(inputs.valid, inputs.totals, 0.0), inputs.mask)


Advantage = GAE | GroupNormalised | LeaveOneOut | BatchNormalised


def over_tokens(of_answers: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (advantages, returns), each [B, T]: each answer's advantage on all its tokens, and zeros.

    Args:
        of_answers: [B], the advantage of each answer.
        mask: [B, T] bool, the answers' tokens; other tokens have advantage 0.
    """
    advantages = jnp.where(mask, of_answers[:, None], 0.0)
    return advantages, jnp.zeros_like(advantages)


def token_rewards(
    score: jax.Array,
    dense: jax.Array,
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    mask: jax.Array,
    kl_coef: jax.Array | float,
) -> jax.Array:
    """Returns rewards [B, T]: r_t = -kl_coef (logp_t - ref_logp_t) + dense_t + [t = end] score.

    Stiennon 2020. The log-ratio (k1) is clamped to +-20 nats; masked entries are 0.

    Args:
        score: [B], lands on the last real token of the response (the stop token where the answer has one).
        dense: [B, T] dense rewards.
        logprobs: [B, T] of the behaviour policy.
        ref_logprobs: [B, T] of the reference policy.
        mask: [B, T], true where a token counts.
        kl_coef: the KL coefficient, >= 0.
    """
    chex.assert_equal_shape([dense, logprobs, ref_logprobs, mask])
    chex.assert_type([score, dense, logprobs], jnp.floating)
    mask = mask.astype(bool)
    log_ratio = jnp.clip(jnp.where(mask, logprobs - ref_logprobs, 0.0), -20.0, 20.0)
    end = mask & ~jnp.concatenate([mask[:, 1:], jnp.zeros_like(mask[:, :1])], axis=1)
    rewards = dense - kl_coef * log_ratio + jnp.where(end, score[:, None], 0.0)
    return jnp.where(mask, rewards, 0.0).astype(jnp.float32)


def gae(
    rewards: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    *,
    gamma: jax.Array | float = 1.0,
    gae_lambda: jax.Array | float = 0.95,
) -> tuple[jax.Array, jax.Array]:
    """Computes generalised advantage estimation (Schulman 2016, eq. 16): (advantages, returns), [B, T].

    delta = r + gamma V' - V, A = delta + gamma lambda A'; masked steps carry V' and A' over unchanged, and after the
    last token both are 0 (no bootstrap, also for answers cut by the length limit). returns = A + V, before whitening.
    No gradient flows.

    Args:
        rewards: [B, T].
        values: [B, T], the value before each token.
        mask: [B, T], true where a token counts.
        gamma: discount.
        gae_lambda: lambda.
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


def leave_one_out(score: jax.Array, valid: jax.Array, answers: int) -> jax.Array:
    """Computes score - mean of the other valid answers to the prompt (RLOO, Ahmadian 2024, eq. 7).

    Args:
        score: [B], the K answers of a prompt in K consecutive rows.
        valid: [B]; an invalid answer is no baseline for the others and gets 0.
        answers: K.

    Returns:
        [B] float32; 0 where no other answer to the prompt is valid.
    """
    real = valid.astype(bool).reshape(-1, answers)
    grouped = jnp.where(real, score.reshape(-1, answers), 0.0)
    others = real.sum(-1, keepdims=True) - real
    mean = (grouped.sum(-1, keepdims=True) - grouped) / jnp.maximum(others, 1)
    return jnp.where(real & (others > 0), grouped - mean, 0.0).reshape(-1).astype(jnp.float32)
