"""The loss of a policy gradient: an objective on ratios, averaged, with KL, critic and entropy."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from rlaif_jax.algorithms.objectives import kl_estimates, value_loss
from rlaif_jax.algorithms.update import Batch, Scored, Totals
from rlaif_jax.config import require
from rlaif_jax.parallel import masked_mean, psum
from rlaif_jax.types import Metrics


class TokenFields(NamedTuple):
    """What the loss reads of every token, each [B, T] float32.

    Attributes:
        logprobs: of the policy before the update, against which the ratio is measured.
        sampler_logprobs: as the sampler reported them.
        ref_logprobs: of the reference policy.
        values: the critic's, before the update.
        advantages: before or after whitening.
        returns: targets of the critic.
        weights: how much the token's objective counts: importance weights.
        shares: the token's share in the mean over the minibatch (`Average`).
    """

    logprobs: jax.Array
    sampler_logprobs: jax.Array
    ref_logprobs: jax.Array
    values: jax.Array
    advantages: jax.Array
    returns: jax.Array
    weights: jax.Array
    shares: jax.Array


class AnswerFields(NamedTuple):
    """What the loss reads of every answer, each [B] float32.

    Attributes:
        logprobs: of the whole answer under the policy before the update.
        lengths: tokens that count.
        advantages: of the answer.
        weights: the mean of its tokens' weights.
        shares: the sum of its tokens' shares.
    """

    logprobs: jax.Array
    lengths: jax.Array
    advantages: jax.Array
    weights: jax.Array
    shares: jax.Array


def answer_fields(batch: Batch) -> AnswerFields:
    """Returns the sums and means over the tokens of each answer of a batch with `TokenFields`."""
    fields, mask = batch.fields, batch.mask
    total = lambda x: jnp.where(mask, x, 0.0).sum(-1)
    lengths = jnp.maximum(mask.sum(-1).astype(jnp.float32), 1.0)
    return AnswerFields(
        total(fields.logprobs),
        lengths,
        total(fields.advantages) / lengths,
        total(fields.weights) / lengths,
        total(fields.shares),
    )


# ---- How the losses of a minibatch's tokens become one


@dataclasses.dataclass(frozen=True)
class OverTokens:
    """The mean over the tokens of the minibatch: long answers count more (DAPO, Yu 2025, eq. 12)."""

    def shares(self, mask: jax.Array) -> jax.Array:
        """Returns the share of each token [B, T]; the sum over `count` is the mean."""
        return jnp.ones(mask.shape)

    def count(self, totals: Totals) -> jax.Array:
        """Returns what the sum of the shares is divided by."""
        return totals.tokens


@dataclasses.dataclass(frozen=True)
class OverAnswers:
    """The mean over answers of the mean over their tokens (GRPO, Shao 2024, eq. 3).

    A token of a long answer counts less than one of a short answer.
    """

    def shares(self, mask: jax.Array) -> jax.Array:
        """Returns the share of each token [B, T]: 1 / tokens of its answer."""
        return jnp.broadcast_to(1 / jnp.maximum(mask.sum(-1, keepdims=True).astype(jnp.float32), 1), mask.shape)

    def count(self, totals: Totals) -> jax.Array:
        """Returns the number of answers."""
        return totals.sequences


@dataclasses.dataclass(frozen=True)
class OverLength:
    """The mean over answers of the sum over their tokens / a constant (Dr. GRPO, Liu 2025, section 3.2).

    Every token counts alike, whatever the lengths of the minibatch: up to the constant it is the policy gradient without bias.

    Attributes:
        length: the constant; None: the longest possible answer.
    """

    length: int | None = None

    def shares(self, mask: jax.Array) -> jax.Array:
        """Returns the share of each token [B, T]: 1 / length."""
        return jnp.full(mask.shape, 1.0 / (self.length or mask.shape[1]))

    def count(self, totals: Totals) -> jax.Array:
        """Returns the number of answers."""
        return totals.sequences


Average = OverTokens | OverAnswers | OverLength


# ---- Tokens that are left out


@dataclasses.dataclass(frozen=True)
class ClipCov:
    """Leaves out a few tokens that lower the entropy most (Clip-Cov, Cui 2025).

    A token's part in the fall of the entropy goes with (log pi - mean) (A - mean), over the tokens of the step. Among those
    in `least` .. `most` tokens are chosen at random, and have no gradient. Here log pi is that of before the update, where
    the paper takes each minibatch's, and each token is chosen for itself, so that the share holds on average.

    Attributes:
        share: of all tokens, those that are left out.
        least: the smallest covariance of a token that may be left out.
        most: the largest.
    """

    share: float = 2e-4
    least: float = 1.0
    most: float = 5.0

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, f"clip_cov.share must lie in (0, 1], not {self.share}")
        require(self.least < self.most, f"clip_cov.least ({self.least}) must be < clip_cov.most ({self.most})")

    def left_out(self, batch: Batch, key: jax.Array, axis_name: str | None) -> jax.Array:
        """Returns [B, T] bool, the tokens of this device that are left out; on any number of devices the same.

        Args:
            batch: this device's rows, with advantages as they are learned from.
            key: of the step.
            axis_name: the mapped axis of the devices, or None.
        """
        fields, mask = batch.fields, batch.mask
        far = lambda x: jnp.where(mask, x, 0.0) - masked_mean(jnp.where(mask, x, 0.0), mask, axis_name)
        covariance = far(fields.logprobs) * far(fields.advantages)
        inside = mask & (covariance >= self.least) & (covariance <= self.most)
        count = lambda x: psum(jnp.sum(x.astype(jnp.float32)), axis_name)
        chance = self.share * count(mask) / jnp.maximum(count(inside), 1.0)
        above = 0 if axis_name is None else jax.lax.axis_index(axis_name) * len(mask)
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(above + jnp.arange(len(mask)))
        return inside & (jax.vmap(lambda one: jax.random.uniform(one, mask.shape[1:]))(keys) < chance)


# ---- Whose ratio


@dataclasses.dataclass(frozen=True)
class TokenRatio:
    """Each token has its own ratio."""

    of_answers: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class AnswerRatio:
    """One ratio for all tokens of an answer.

    Attributes:
        normalised: the geometric mean of its tokens' ratios (GSPO, Zheng 2025, eq. 7); else their product, the ratio of the
            answer's probabilities.
    """

    normalised: bool = True
    of_answers: ClassVar[bool] = True


Ratio = TokenRatio | AnswerRatio


# ---- The losses


def token_loss(
    config: Any,
    kl_coef: jax.Array,
    scored: Scored,
    fields: TokenFields,
    mask: jax.Array,
    totals: Totals,
    *,
    entropy: bool = False,
) -> tuple[jax.Array, Metrics]:
    """Computes the contribution of some tokens to the minibatch's loss and metrics; is a `TokenLoss`.

    loss = policy objective (of tokens) + kl_coef * KL (with `kl_in` "loss"), both averaged by `config.average`, + value_coef *
    value loss (with a critic) - entropy_coef * entropy (with `entropy`), which are means over tokens.

    Args:
        config: a `PPOConfig` with coefficients that may be traced.
        kl_coef: [], the KL coefficient of the step.
        scored: log-probs, entropies and values of the targets by the models that learn, [B, T] padded or [R, C]
            packed.
        fields: log-probs, advantages and returns from before the update, in the layout of `scored`.
        mask: bool in the layout of `scored`, true where a target counts.
        totals: counts of the whole minibatch.
        entropy: whether the loss has an entropy bonus.

    Returns:
        (loss [], metrics); metrics add up too, except `sampler_gap_max`, which combines by maximum.
    """

    def partial_mean(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask, x, 0.0)) / totals.tokens

    def averaged(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask, x * fields.shares, 0.0)) / config.average.count(totals)

    # `where` comes before `exp`: a masked slot may hold anything, and NaN x 0 is NaN.
    log_ratio = jnp.where(mask, scored.logprobs - fields.logprobs, 0.0)
    gap = jnp.where(mask, scored.logprobs - fields.sampler_logprobs, 0.0)
    weight = jnp.exp(jnp.clip(gap, -20.0, 20.0))
    loss = jnp.zeros([])
    metrics = {
        "approx_kl": partial_mean(kl_estimates(-log_ratio)[2]),
        "ratio_error": partial_mean(jnp.abs(jnp.exp(log_ratio) - 1)),
        "sampler_gap": partial_mean(jnp.abs(gap)),
        "sampler_gap_max": jnp.max(jnp.abs(gap)),
        "sampler_weight": partial_mean(weight),
        "sampler_weight_squared": partial_mean(weight**2),
    }
    if not config.ratio.of_answers:
        logprobs, advantages = (jnp.where(mask, x, 0.0) for x in (scored.logprobs, fields.advantages))
        objective, clipped = config.objective(log_ratio, logprobs, advantages)
        loss = averaged(objective * fields.weights)
        metrics |= {"policy_loss": loss, "clip_fraction": partial_mean(clipped.astype(jnp.float32))}
    if scored.values is not None:
        values = jnp.where(mask, scored.values, 0.0)
        reach = jnp.inf if config.value_clip_range is None else config.value_clip_range
        vf = partial_mean(value_loss(values, fields.values, fields.returns, reach))
        # The critic's own trunk has its own optimiser, on a shared one the coefficient balances the two losses.
        loss = loss + config.value_coef * vf
        metrics["value_loss"] = vf
    if config.kl_in == "loss":
        _, k2, k3 = kl_estimates(jnp.where(mask, scored.logprobs - fields.ref_logprobs, 0.0))
        # k3 differentiated is not the KL's gradient, k2 is (Schulman 2020; Tang & Munos 2025): k3's value, k2's gradient.
        kl = averaged(k3 if config.kl_gradient == "k3" else jax.lax.stop_gradient(k3 - k2) + k2)
        loss = loss + kl_coef * kl
        metrics["kl_loss"] = kl
    if entropy:
        exact = partial_mean(scored.entropies)
        loss = loss - config.entropy_coef * exact
        metrics["entropy_exact"] = exact
    return loss, metrics


def answer_loss(
    config: Any, sums: jax.Array, answers: AnswerFields, valid: jax.Array, totals: Totals
) -> tuple[jax.Array, Metrics]:
    """Returns the averaged objective on ratios of whole answers, and its metrics; is a `SequenceLoss`.

    Args:
        config: a `PPOConfig` with coefficients that may be traced.
        sums: [M] log-probs of whole answers under the policy.
        answers: their fields.
        valid: [M] bool, answers with a token that counts.
        totals: counts of the whole minibatch.
    """
    sums = jnp.where(valid, sums, 0.0)
    log_ratio = jnp.where(valid, sums - answers.logprobs, 0.0)
    if config.ratio.normalised:
        log_ratio = log_ratio / answers.lengths
    advantages = jnp.where(valid, answers.advantages, 0.0)
    objective, clipped = config.objective(log_ratio, sums / answers.lengths, advantages)
    counted = jnp.where(valid, objective * answers.weights * answers.shares, 0.0)
    loss = counted.sum() / config.average.count(totals)
    return loss, {"policy_loss": loss, "clip_fraction": jnp.sum(clipped & valid) / totals.sequences}


# ---- Metrics of a step


def summarise(history: Metrics) -> Metrics:
    """Returns the metrics of a step: means over its minibatches, and `first/*` of the first minibatch.

    `history` has the same metrics of each minibatch, arrays [number of minibatches] in order.
    """
    # The sampler's log-probs are compared with the trainer's before it has moved: later the gap would mean nothing.
    metrics = {name: x.mean() for name, x in history.items() if not name.startswith("sampler_")}
    first = {name: x[0] for name, x in history.items()}
    for name in ("ratio_error", "approx_kl", "clip_fraction", "sampler_gap", "sampler_gap_max"):
        metrics[f"first/{name}"] = first[name]
    squared = jnp.maximum(first["sampler_weight_squared"], 1e-8)
    metrics["first/effective_sample_size"] = first["sampler_weight"] ** 2 / squared
    metrics["nonfinite"] = history["nonfinite"].sum()
    return metrics


def batch_metrics(batch: Batch, axis_name: str | None, *, with_critic: bool) -> Metrics:
    """Computes the metrics of a rollout.

    Args:
        batch: the rollout with its token fields.
        axis_name: the mapped axis of the devices, or None; means are over all devices.
        with_critic: whether to add `explained_variance` and the mean `return`.

    Returns:
        `kl` and `kl_k3` of a whole answer to the reference, in nats; `entropy` of a token, estimated from the
        sampled tokens; `length` of an answer in tokens.
    """
    mask, fields = batch.mask, batch.fields
    rows = mask.any(-1)
    log_ratio = jnp.where(mask, fields.logprobs - fields.ref_logprobs, 0.0)
    k1, _, k3 = kl_estimates(log_ratio)
    metrics = {
        "kl": masked_mean(jnp.where(mask, k1, 0.0).sum(-1), rows, axis_name),
        "kl_k3": masked_mean(jnp.where(mask, k3, 0.0).sum(-1), rows, axis_name),
        "entropy": masked_mean(-fields.logprobs, mask, axis_name),  # Monte Carlo, over the behaviour policy's tokens
        "length": masked_mean(batch.response_mask.sum(-1).astype(jnp.float32), rows, axis_name),
    }
    if with_critic:
        error = masked_mean((fields.returns - fields.values) ** 2, mask, axis_name)
        mean = masked_mean(fields.returns, mask, axis_name)
        variance = masked_mean((fields.returns - mean) ** 2, mask, axis_name)
        metrics |= {"explained_variance": 1 - error / jnp.maximum(variance, 1e-8), "return": mean}
    return metrics
