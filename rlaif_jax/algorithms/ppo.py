"""Policy gradients on token sequences: PPO with a critic, GRPO and RLOO without one, by settings.

`PPOConfig.advantage` chooses the estimator (`advantages.py`), `PPOConfig.objective` the surrogate (`objectives.py`). The
details follow Huang 2024, "The N+ implementation details of RLHF with PPO".
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property, partial
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from rlaif_jax.algorithms.advantages import GAE, Advantage, AdvantageInputs, token_rewards
from rlaif_jax.algorithms.base import Algorithm, initial_state, with_hyper
from rlaif_jax.algorithms.objectives import (
    Clipped,
    Objective,
    adapt_kl,
    importance_weights,
    kl_estimates,
    value_loss,
)
from rlaif_jax.algorithms.optimizer import OptimizerConfig, make_optimizer
from rlaif_jax.algorithms.scoring import score_rollout
from rlaif_jax.algorithms.step_metrics import batch_metrics, summarise
from rlaif_jax.algorithms.update import Batch, Scored, Totals, Update, check_minibatches, check_packed
from rlaif_jax.config import check_choices, require
from rlaif_jax.models.base import Critic, View
from rlaif_jax.parallel import masked_whiten, psum
from rlaif_jax.policies.base import Draw, Policy
from rlaif_jax.rewards.shaping import Shaping
from rlaif_jax.types import Frozen, Metrics, Params, RewardBatch, Rollout, StepData, TrainState


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Settings of PPO and its relatives.

    Schulman 2017; Stiennon 2020; Huang 2024; GRPO, Shao 2024; RLOO, Ahmadian 2024.

    Attributes:
        advantage: the estimator; `GAE` needs a critic, the others compare the answers to one prompt and need
            kl_in="loss" or kl_coef=0. On the command line it comes behind all options: ppo.advantage:leave-one-out.
        objective: the surrogate loss.
        answers_per_prompt: K, answers drawn for each prompt.
        num_epochs: passes over a step's answers.
        num_minibatches: optimiser steps of a pass.
        value_clip_range: how far a value may move from its old one before its error no longer shrinks.
        value_coef: weight of the value loss; it matters where the critic shares the policy's trunk.
        entropy_coef: weight of the entropy bonus; 0: entropies are not computed.
        kl_in: where the KL to the reference enters: the per-token `reward`, or the `loss` (k3's value with k2's gradient).
        kl_coef: its coefficient.
        kl_target: where set, the coefficient follows Ziegler 2019's controller.
        kl_horizon: of that controller, in sequences.
        behaviour: whose log-probs the ratio is measured against: `recompute` scores the answers once more by the trainer's
            forward pass, `sampler` takes what the sampler reported; the gap between the two is always logged.
            With `recompute` a token counts by its importance weight min(trainer's / sampler's probability, `importance_cap`);
            with `sampler` the ratio itself corrects.
        importance_cap: see `behaviour`.
        packed_rows: 0: the sequences of a minibatch are padded to one length. Else every device packs its answers into rows
            and adds up the gradient over turns of `packed_rows` x (prompt_length + max_new_tokens - 1) columns: the same
            gradient with less work where lengths are uneven or prompts are shared, in the memory of these columns.
        shaping: how judgements become rewards.
        policy_optimizer: the policy's optimiser.
        value_optimizer: the critic's optimiser.
    """

    advantage: Advantage = GAE()
    objective: Objective = Clipped()
    answers_per_prompt: int = 1
    num_epochs: int = 4
    num_minibatches: int = 1
    value_clip_range: float = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    kl_in: Literal["reward", "loss"] = "reward"
    kl_coef: float = 0.05
    kl_target: float | None = None
    kl_horizon: float = 10_000.0
    behaviour: Literal["recompute", "sampler"] = "recompute"
    importance_cap: float = 2.0
    packed_rows: int = 0
    shaping: Shaping = Shaping()
    policy_optimizer: OptimizerConfig = OptimizerConfig()
    value_optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        check_choices(self, "ppo")
        for field in ("num_epochs", "num_minibatches", "answers_per_prompt"):
            value = self.__dict__[field]
            require(value >= 1, f"ppo.{field} must be >= 1, not {value}")
        name, needed = type(self.advantage).__name__, self.advantage.min_answers
        require(
            self.answers_per_prompt >= needed,
            f"ppo.answers_per_prompt is {self.answers_per_prompt}, but ppo.advantage={name} compares the answers to one "
            f"prompt: set answers_per_prompt to {needed} or more, or ppo.advantage=GAE",
        )
        require(
            self.advantage.needs_critic or self.kl_in == "loss" or self.kl_coef == 0,
            f"ppo.kl_in='reward' has no place with ppo.advantage={name}, whose advantages are of whole answers: "
            "set ppo.kl_in='loss', or ppo.kl_coef=0",
        )
        for field in ("kl_target", "kl_horizon", "value_clip_range"):
            value = self.__dict__[field]
            require(value is None or value > 0, f"ppo.{field} must be > 0, not {value}")
        require(self.importance_cap >= 1, f"ppo.importance_cap must be >= 1, not {self.importance_cap}")
        require(self.packed_rows >= 0, f"ppo.packed_rows must be >= 0 (0: not packed), not {self.packed_rows}")
        for field in ("kl_coef", "value_coef"):
            value = self.__dict__[field]
            require(0 <= value < math.inf, f"ppo.{field} must be >= 0 and finite, not {value}")
        require(math.isfinite(self.entropy_coef), f"ppo.entropy_coef must be finite, not {self.entropy_coef}")

    def check(self, prompts_per_step: int, devices: int, staleness: int) -> None:
        """Raises UserError where minibatches would be uneven, or staleness is not corrected.

        Args:
            prompts_per_step: prompts of a step, over all devices.
            devices: number of devices that share each minibatch.
            staleness: steps between the policy that answers and the policy that learns, 0 or 1.
        """
        check_minibatches(prompts_per_step * self.answers_per_prompt, self.num_minibatches, devices, 1)
        require(
            not staleness or self.behaviour == "recompute",
            "train.staleness=1 corrects for the older policy by importance weights and needs the log-probs of both "
            "policies: set ppo.behaviour='recompute'",
        )

    def build(self, policy: Policy, critic: Critic | None, *, steps: int) -> PPO:
        """Returns the algorithm that trains `policy`, with learning rates scheduled over `steps` steps.

        `critic` is None where the advantage needs none.
        """
        return PPO(policy, critic, self, steps * self.num_epochs * self.num_minibatches)


class TokenFields(NamedTuple):
    """What PPO's loss reads of every token, each [B, T] float32.

    Attributes:
        logprobs: of the policy before the update, against which the ratio is measured.
        sampler_logprobs: as the sampler reported them.
        ref_logprobs: of the reference policy.
        values: the critic's, before the update.
        advantages: before or after whitening.
        returns: targets of the critic.
    """

    logprobs: jax.Array
    sampler_logprobs: jax.Array
    ref_logprobs: jax.Array
    values: jax.Array
    advantages: jax.Array
    returns: jax.Array


@dataclasses.dataclass(frozen=True)
class PPO(Algorithm):
    """An `Algorithm`: a policy and, where the advantage needs one, a critic.

    Attributes:
        policy: the policy that learns.
        critic: on its own trunk (`ScalarModel`), on the policy's (`ValueHead`), or None.
        config: the settings.
        updates: optimiser steps of the whole run, for the schedules.
    """

    policy: Policy
    critic: Critic | None
    config: PPOConfig
    updates: int = 1
    unit = "answer"

    def __post_init__(self) -> None:
        name = type(self.config.advantage).__name__
        require(
            (self.critic is not None) == self.config.advantage.needs_critic,
            f"ppo.advantage={name} needs a critic" if self.critic is None else f"ppo.advantage={name} takes no critic",
        )

    @property
    def draws(self) -> tuple[Draw, ...]:
        """Returns one draw: the policy answers each prompt K times."""
        return (Draw(self.config.answers_per_prompt),)

    @property
    def shaping(self) -> Shaping:
        """Returns how judgements become rewards."""
        return self.config.shaping

    @cached_property
    def optimizers(self) -> dict[str, optax.GradientTransformationExtraArgs]:
        """Returns one optimiser for each part; each clips its own gradient."""
        made = {"policy": make_optimizer(self.config.policy_optimizer, self.updates)}
        if self.critic is not None:
            made["value"] = make_optimizer(self.config.value_optimizer, self.updates)
        return made

    def check(self, prompts_per_step: int, devices: int, staleness: int) -> None:
        """Raises UserError where minibatches would be uneven, or staleness is not corrected.

        Args:
            prompts_per_step: prompts of a step, over all devices.
            devices: number of devices that share each minibatch.
            staleness: steps between the policy that answers and the policy that learns, 0 or 1.
        """
        self.config.check(prompts_per_step, devices, staleness)
        check_packed(self.config.packed_rows, self.policy)

    def init(self, params: Params, seed: jax.Array) -> TrainState:
        """Returns the state at step 0 from `params` ("policy", and with a critic "value") and the run's seed."""
        return initial_state(params, self.optimizers, self.config, seed, kl_coef=jnp.float32(self.config.kl_coef))

    def score(self, params: Params, frozen: Frozen, view: View) -> Scored:
        """Computes log-probs, entropies and values of every target of a view.

        Args:
            params: {"policy": parameters} and, with a critic, also "value".
            frozen: weights that do not learn.
            view: padded or packed sequences; the results have the layout of its targets.
        """
        scores = self.policy.score(params["policy"], frozen, view, entropy=self.config.entropy_coef != 0)
        values = None if self.critic is None else self.critic.values(params["value"], frozen, view, scores.hidden)
        return Scored(scores.logprobs, scores.entropies, values)

    def prepare(
        self,
        state: TrainState,
        frozen: Frozen,
        data: StepData,
        rollout: Rollout,
        rewards: RewardBatch,
        *,
        axis_name: str | None = None,
    ) -> Batch:
        """Returns the batch of a step: scores under both policies, values, advantages, returns.

        Whitening of the advantages is left to `step`, which sees the global batch.

        Args:
            state: without its optimiser.
            frozen: the reference.
            data: not read.
            rollout: B answers.
            rewards: their rewards.
            axis_name: the mapped axis of the devices, or None.
        """
        del data, axis_name
        config = with_hyper(self.config, state.hyper)
        mask = rollout.response_mask & rewards.valid.astype(bool)[:, None]
        chex.assert_equal_shape([mask, rollout.logprobs, rewards.token_rewards])

        def score(view: View) -> dict[str, jax.Array]:
            out = {"ref_logprobs": self.policy.score(frozen.reference, frozen, view).logprobs}
            scored = self.score(state.params, frozen, view)
            if config.behaviour == "recompute":
                out["logprobs"] = scored.logprobs
            if scored.values is not None:
                out["values"] = scored.values
            return out

        scores = score_rollout(
            score, rollout, answers=self.config.answers_per_prompt, packed_rows=self.config.packed_rows
        )
        logprobs = scores.get("logprobs", rollout.logprobs)
        values = jnp.where(mask, scores["values"], 0.0) if "values" in scores else jnp.zeros_like(logprobs)
        score_ = rewards.score.astype(jnp.float32)
        kl_coef = self.kl_coef(state) if config.kl_in == "reward" else 0.0
        inputs = AdvantageInputs(
            rewards=token_rewards(score_, rewards.token_rewards, logprobs, scores["ref_logprobs"], mask, kl_coef),
            totals=score_ + jnp.where(mask, rewards.token_rewards, 0.0).sum(-1),
            values=values,
            mask=mask,
            valid=rewards.valid,
            answers=config.answers_per_prompt,
        )
        advantages, returns = config.advantage(inputs)
        fields = TokenFields(logprobs, rollout.logprobs, scores["ref_logprobs"], values, advantages, returns)
        return jax.lax.stop_gradient(
            Batch(rollout.tokens, rollout.prompt_mask, rollout.response_mask, mask, fields=fields)
        )

    def kl_coef(self, state: TrainState) -> jax.Array:
        """Returns the KL coefficient of the step: the controller's where it has a target, else the setting."""
        return state.extra["kl_coef"] if self.config.kl_target is not None else state.hyper["kl_coef"]

    def update(self, state: TrainState, frozen: Frozen) -> Update:
        """Returns the update of a step: its loss with the coefficients of `state`.

        Args:
            state: gives the coefficients and the learning rates.
            frozen: weights that do not learn.
        """
        config = self.config
        return Update(
            score=lambda params, view: self.score(params, frozen, view),
            optimizers=self.optimizers,
            learning_rates={part: state.hyper[f"{part}_optimizer.learning_rate"] for part in self.optimizers},
            num_epochs=config.num_epochs,
            num_minibatches=config.num_minibatches,
            packed_rows=config.packed_rows,
            answers=config.answers_per_prompt,
            token_loss=partial(
                ppo_loss, with_hyper(config, state.hyper), self.kl_coef(state), entropy=config.entropy_coef != 0
            ),
        )

    def step(
        self, state: TrainState, frozen: Frozen, batch: Batch, *, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        """Updates policy and critic by `num_epochs` passes over `num_minibatches` minibatches.

        Args:
            state: the state; donated.
            frozen: the weights under an adapter.
            batch: this device's rows of the global batch.
            axis_name: the mapped axis of the devices, or None.

        Returns:
            The new state and metrics. `first/*` are those of the very first minibatch, where the ratio must be 1 (see
            `checks`); `nonfinite` counts minibatches that were left out because a loss or gradient was not finite.
        """
        old = batch
        if self.config.advantage.whiten:
            white = masked_whiten(batch.fields.advantages, batch.mask, axis_name)
            batch = dataclasses.replace(batch, fields=batch.fields._replace(advantages=white))
        new, history = self.update(state, frozen)(state, batch, axis_name=axis_name)
        metrics = summarise(history) | batch_metrics(old, axis_name, with_critic=self.critic is not None)
        kl_coef = self.kl_coef(state)
        config = with_hyper(self.config, state.hyper)
        if config.kl_target is not None:
            judged = psum(jnp.sum(old.mask.any(-1)), axis_name)
            kl_coef = adapt_kl(kl_coef, metrics["kl"], judged, target=config.kl_target, horizon=config.kl_horizon)
        metrics["kl_coef"] = kl_coef
        return dataclasses.replace(new, extra=state.extra | {"kl_coef": kl_coef}), metrics

    def checks(self, metrics: dict[str, float], *, step: int, tolerance: float) -> dict[str, bool]:
        """Returns the checks of a step: on the first minibatch the policy is the one that answered.

        At step 1 the KL to the reference must be 0.

        Args:
            metrics: the metrics of the step.
            step: the step, counted from 1.
            tolerance: the largest gap of a log-prob, in nats, that rounding explains.

        Returns:
            name -> whether the check holds.
        """
        found = {
            "first_minibatch_ratio_is_1": metrics["first/ratio_error"] < tolerance,
            "first_minibatch_clip_fraction_is_0": metrics["first/clip_fraction"] <= rounded_away(tolerance),
            "first_minibatch_approx_kl_is_0": abs(metrics["first/approx_kl"]) < tolerance,
            "losses_are_finite": metrics["nonfinite"] == 0,
        }
        if not metrics["staleness"]:  # else the sampler was another policy
            found["sampler_and_trainer_logprobs_agree"] = metrics["first/sampler_gap"] < tolerance
        if step == 1:
            found["kl_at_step_0_is_0"] = abs(metrics["kl"]) <= tolerance * metrics["length"]
        return found


def rounded_away(tolerance: float) -> float:
    """Returns the share of tokens whose ratio may be clipped on the first minibatch, by rounding alone.

    In bfloat16 two forward passes of one model differ by more than the clip range in some of thousands of tokens.

    Args:
        tolerance: the largest gap of a log-prob in nats that rounding explains on average.
    """
    return 0.0 if tolerance < 1e-2 else 2e-2


def ppo_loss(
    config: PPOConfig,
    kl_coef: jax.Array,
    scored: Scored,
    fields: TokenFields,
    mask: jax.Array,
    totals: Totals,
    *,
    entropy: bool = False,
) -> tuple[jax.Array, Metrics]:
    """Computes the contribution of some tokens to the minibatch's loss and metrics; is a `TokenLoss`.

    loss = policy objective + value_coef * value loss (with a critic) + kl_coef * KL (with `kl_in` "loss") -
    entropy_coef * entropy (with `entropy`), each a sum over tokens divided by the tokens of the whole minibatch.

    Args:
        config: coefficients, which may be traced.
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

    # `where` comes before `exp`: a masked slot may hold anything, and NaN x 0 is NaN.
    log_ratio = jnp.where(mask, scored.logprobs - fields.logprobs, 0.0)
    advantages = jnp.where(mask, fields.advantages, 0.0)
    objective, clipped = config.objective(log_ratio, jnp.where(mask, scored.logprobs, 0.0), advantages)
    if config.behaviour == "recompute":
        objective = objective * importance_weights(
            jnp.where(mask, fields.logprobs - fields.sampler_logprobs, 0.0), config.importance_cap
        )
    pg = partial_mean(objective)
    loss = pg
    gap = jnp.where(mask, scored.logprobs - fields.sampler_logprobs, 0.0)
    weight = jnp.exp(jnp.clip(gap, -20.0, 20.0))
    metrics = {
        "policy_loss": pg,
        "approx_kl": partial_mean(kl_estimates(-log_ratio)[2]),
        "clip_fraction": partial_mean(clipped.astype(jnp.float32)),
        "ratio_error": partial_mean(jnp.abs(jnp.exp(log_ratio) - 1)),
        "sampler_gap": partial_mean(jnp.abs(gap)),
        "sampler_gap_max": jnp.max(jnp.abs(gap)),
        "sampler_weight": partial_mean(weight),
        "sampler_weight_squared": partial_mean(weight**2),
    }
    if scored.values is not None:
        values = jnp.where(mask, scored.values, 0.0)
        vf = partial_mean(value_loss(values, fields.values, fields.returns, config.value_clip_range))
        # The critic's own trunk has its own optimiser, on a shared one the coefficient balances the two losses.
        loss = loss + config.value_coef * vf
        metrics["value_loss"] = vf
    if config.kl_in == "loss":
        _, k2, k3 = kl_estimates(jnp.where(mask, scored.logprobs - fields.ref_logprobs, 0.0))
        # k3's value with k2's gradient: k3 differentiated is not the KL's gradient (Schulman 2020; Tang & Munos 2025).
        kl = partial_mean(jax.lax.stop_gradient(k3 - k2) + k2)
        loss = loss + kl_coef * kl
        metrics["kl_loss"] = kl
    if entropy:
        exact = partial_mean(scored.entropies)
        loss = loss - config.entropy_coef * exact
        metrics["entropy_exact"] = exact
    return loss, metrics
