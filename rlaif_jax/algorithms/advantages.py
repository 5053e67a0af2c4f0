"""Advantage estimators: from rewards to advantages. Pure, masked, float32.

An estimator is a frozen dataclass; `Advantage` is the union of all of them. To add one, write its class and name it there.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.config import require
from rlaif_jax.rewards.shaping import group_normalised
from rlaif_jax.types import Array


class AdvantageInputs(NamedTuple):
    """What an estimator may read of a step's B answers.

    Attributes:
        rewards: [B, T] per-token rewards: the KL penalty, dense rewards, and the score on the last token.
        totals: [B] their sum over the tokens of an answer.
        values: [B, T] the critic's values before each token; zeros without a critic.
        mask: [B, T] bool, tokens of answers with a valid judgement.
        valid: [B] bool, answers with a valid judgement.
        answers: K; the K answers to a prompt are consecutive rows.
        baseline: what `Estimator.follow` has kept of the steps before.
    """

    rewards: jax.Array
    totals: jax.Array
    values: jax.Array
    mask: jax.Array
    valid: jax.Array
    answers: int
    baseline: Array = np.zeros(2, np.float32)


class Estimator(Protocol):
    """What all estimators share, with the answers that most give.

    Attributes:
        whiten: whether advantages are brought to mean 0 and variance 1 over the tokens of the whole step.
        needs_critic: whether it reads `AdvantageInputs.values`.
        min_answers: the fewest answers to a prompt, without greedy ones.
        of_answers: whether all tokens of an answer have the same advantage.
        greedy: whether the last of the answers to a prompt is the policy's most probable one, which is not learned from.
    """

    whiten: ClassVar[bool] = False
    needs_critic: ClassVar[bool] = False
    min_answers: ClassVar[int] = 1
    of_answers: ClassVar[bool] = True
    greedy: ClassVar[bool] = False

    def __call__(self, inputs: AdvantageInputs) -> tuple[jax.Array, jax.Array]:
        """Returns (advantages before whitening, returns for a critic to learn), each [B, T]."""

    def follow(self, baseline: jax.Array, mean_total: jax.Array) -> jax.Array:
        """Returns what the next step finds in `AdvantageInputs.baseline`, [2].

        Args:
            baseline: what was kept before.
            mean_total: [], the mean total of the step's valid answers.
        """
        del mean_total
        return baseline


@dataclasses.dataclass(frozen=True)
class GAE(Estimator):
    """Generalised advantage estimation (Schulman 2016), with a critic.

    Attributes:
        gamma: discount of a token.
        gae_lambda: 0 is the one-step error of the critic, 1 the return less the value.
        value_lambda: the same for the critic's targets (decoupled GAE, VC-PPO, Yuan 2025); None: `gae_lambda`.
        length_alpha: where set, a, an answer of l tokens has 1 - 1 / (a l) in place of `gae_lambda`, so that the end of a long
            answer still counts at its beginning (length-adaptive GAE, VAPO, Yue 2025; there .05).
        whiten: whether advantages are brought to mean 0 and variance 1 over the whole step (Huang 2024).
    """

    gamma: float = 1.0
    gae_lambda: float = 0.95
    value_lambda: float | None = None
    length_alpha: float | None = None
    whiten: bool = True  # type: ignore[misc]
    needs_critic: ClassVar[bool] = True
    of_answers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(0 <= self.gae_lambda <= 1, f"advantage.gae_lambda must lie in [0, 1], not {self.gae_lambda}")
        require(0 < self.gamma <= 1, f"advantage.gamma must lie in (0, 1], not {self.gamma}")
        value, alpha = self.value_lambda, self.length_alpha
        require(value is None or 0 <= value <= 1, f"advantage.value_lambda must lie in [0, 1], not {value}")
        require(alpha is None or alpha > 0, f"advantage.length_alpha must be > 0, not {alpha}")

    def __call__(self, inputs: AdvantageInputs) -> tuple[jax.Array, jax.Array]:
        """Returns (advantages, returns), each [B, T]."""
        of = partial(gae, inputs.rewards, inputs.values, inputs.mask, gamma=self.gamma)
        gae_lambda: jax.Array | float = self.gae_lambda
        if self.length_alpha is not None:
            lengths = jnp.maximum(inputs.mask.sum(-1).astype(jnp.float32), 1.0)
            gae_lambda = jnp.maximum(1 - 1 / (self.length_alpha * lengths), 0.0)
        advantages, returns = of(gae_lambda=gae_lambda)
        if self.value_lambda is not None:
            _, returns = of(gae_lambda=self.value_lambda)
        return advantages, returns


@dataclasses.dataclass(frozen=True)
class ReturnToGo(Estimator):
    """The sum of the rewards from a token on: without a baseline; with `whiten` REINFORCE++ (Hu 2025).

    Attributes:
        whiten: whether advantages are brought to mean 0 and variance 1 over the whole step.
    """

    whiten: bool = False  # type: ignore[misc]
    of_answers: ClassVar[bool] = False

    def __call__(self, inputs: AdvantageInputs) -> tuple[jax.Array, jax.Array]:
        """Returns (the return from each token on, zeros), each [B, T]."""
        rewards = jnp.where(inputs.mask, inputs.rewards, 0.0)
        to_go = jnp.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
        return jnp.where(inputs.mask, to_go, 0.0), jnp.zeros_like(rewards)


@dataclasses.dataclass(frozen=True)
class MovingBaseline(Estimator):
    """total - the moving mean of earlier steps (Williams 1992, reinforcement comparison).

    The step's own answers are not in its baseline, so the gradient has no bias; the first step has none.

    Attributes:
        decay: what a step keeps of the mean before it; corrected for the start as Adam's moments are.
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        require(0 <= self.decay < 1, f"advantage.decay must lie in [0, 1), not {self.decay}")

    def __call__(self, inputs: AdvantageInputs) -> tuple[jax.Array, jax.Array]:
        """Returns (advantages, zeros), each [B, T]: every token of an answer has the same advantage."""
        kept, weight = inputs.baseline
        mean = jnp.where(weight > 0, kept / jnp.maximum(weight, 1e-8), 0.0)
        return over_tokens(jnp.where(inputs.valid, inputs.totals - mean, 0.0), inputs.mask)

    def follow(self, baseline: jax.Array, mean_total: jax.Array) -> jax.Array:
        """Returns (decayed sum of means, decayed sum of ones).

        Args:
            baseline: of the steps before.
            mean_total: [], of this step.
        """
        return self.decay * baseline + (1 - self.decay) * jnp.stack([mean_total, jnp.ones_like(mean_total)])


@dataclasses.dataclass(frozen=True)
class GroupMean(Estimator):
    """total - mean of all K answers to the prompt (Dr. GRPO, Liu 2025, section 3.2).

    With `whiten` it is the baseline form of REINFORCE++ (Hu 2025, section 3.3). Its expectation is (K - 1) / K times the
    gradient: an answer is in its own baseline.

    Attributes:
        whiten: whether advantages are brought to mean 0 and variance 1 over the whole step.
    """

    whiten: bool = False  # type: ignore[misc]
    min_answers: ClassVar[int] = 2

    def __call__(self, inputs: AdvantageInputs) -> tuple[jax.Array, jax.Array]:
        """Returns (advantages, zeros), each [B, T]: every token of an answer has the same advantage."""
        return over_tokens(less_weighted_mean(inputs.totals, inputs.valid, inputs.answers), inputs.mask)


@dataclasses.dataclass(frozen=True)
class LengthWeighted(Estimator):
    """total - mean of the answers to the prompt, weighted by their lengths (OPO, Hao 2025, eq. 9).

    It approximates the baseline of least variance, sum |score|^2 R / sum |score|^2: the squared norm of an answer's score
    function grows with its tokens.
    """

    min_answers: ClassVar[int] = 2

    def __call__(self, inputs: AdvantageInputs) -> tuple[jax.Array, jax.Array]:
        """Returns (advantages, zeros), each [B, T]: every token of an answer has the same advantage."""
        lengths = inputs.mask.sum(-1).astype(jnp.float32)
        return over_tokens(less_weighted_mean(inputs.totals, inputs.valid, inputs.answers, lengths), inputs.mask)


@dataclasses.dataclass(frozen=True)
class GroupNormalised(Estimator):
    """(total - mean) / std among the K answers to a prompt (GRPO, Shao 2024, section 4.1.2)."""

    min_answers: ClassVar[int] = 2

    def __call__(self, inputs: AdvantageInputs) -> tuple[jax.Array, jax.Array]:
        """Returns (advantages, zeros), each [B, T]: every token of an answer has the same advantage."""
        of_answers = group_normalised(inputs.totals, inputs.valid, inputs.answers)
        return over_tokens(of_answers, inputs.mask)


@dataclasses.dataclass(frozen=True)
class LeaveOneOut(Estimator):
    """total - mean of the other answers to the prompt (RLOO, Ahmadian 2024, eq. 7)."""

    min_answers: ClassVar[int] = 2

    def __call__(self, inputs: AdvantageInputs) -> tuple[jax.Array, jax.Array]:
        """Returns (advantages, zeros), each [B, T]: every token of an answer has the same advantage."""
        return over_tokens(leave_one_out(inputs.totals, inputs.valid, inputs.answers), inputs.mask)


@dataclasses.dataclass(frozen=True)
class GreedyBaseline(Estimator):
    """total - total of the policy's greedy answer to the prompt (ReMax, Li 2024, eq. 3).

    The greedy answer is drawn and judged besides the K others. Without a judgement of it, its prompt teaches nothing.
    """

    greedy: ClassVar[bool] = True

    def __call__(self, inputs: AdvantageInputs) -> tuple[jax.Array, jax.Array]:
        """Returns (advantages, zeros), each [B, T]; 0 for the greedy answers, the last of each prompt's."""
        totals = inputs.totals.reshape(-1, inputs.answers)
        valid = inputs.valid.astype(bool).reshape(-1, inputs.answers)
        known = valid & valid[:, -1:]
        return over_tokens(jnp.where(known, totals - totals[:, -1:], 0.0).reshape(-1), inputs.mask)


@dataclasses.dataclass(frozen=True)
class BatchNormalised(Estimator):
    """The total itself, whitened over the tokens of the whole step.

    With `Shaping.per_group` it is GDPO (Liu 2026, "GDPO: group reward-decoupled normalization policy optimization", eq. 4 to
    6): each reward is normalised among the answers to a prompt, their weighted sum over the step.
    """

    whiten: ClassVar[bool] = True

    def __call__(self, inputs: AdvantageInputs) -> tuple[jax.Array, jax.Array]:
        """Returns (advantages before whitening, zeros), each [B, T]: an answer's total on all its tokens."""
        return over_tokens(jnp.where(inputs.valid, inputs.totals, 0.0), inputs.mask)


Advantage = (
    GAE
    | ReturnToGo
    | MovingBaseline
    | GroupMean
    | LengthWeighted
    | GroupNormalised
    | LeaveOneOut
    | GreedyBaseline
    | BatchNormalised
)


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
        gae_lambda: lambda, [] or [B].
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


def less_weighted_mean(score: jax.Array, valid: jax.Array, answers: int, weights: jax.Array | None = None) -> jax.Array:
    """Computes score - weighted mean of the valid answers to the prompt, the answer itself among them.

    Args:
        score: [B], the K answers of a prompt in K consecutive rows.
        valid: [B]; an invalid answer is in no mean and gets 0.
        answers: K.
        weights: [B], positive; None: all alike.

    Returns:
        [B] float32.
    """
    real = valid.astype(bool).reshape(-1, answers)
    grouped = jnp.where(real, score.reshape(-1, answers), 0.0)
    weight = jnp.where(real, 1.0 if weights is None else weights.reshape(-1, answers), 0.0)
    mean = (weight * grouped).sum(-1, keepdims=True) / jnp.maximum(weight.sum(-1, keepdims=True), 1e-8)
    return jnp.where(real, grouped - mean, 0.0).reshape(-1).astype(jnp.float32)
