"""Policy gradients on token sequences: PPO with a critic, GRPO, RLOO and others without, by settings.

The settings are orthogonal: `advantage` chooses the estimator (`advantages.py`), `objective` the surrogate (`objectives.py`),
`ratio` whether it is of tokens or answers and `average` how it becomes one number (`surrogate.py`), `importance` what corrects
for another sampler. The details follow Huang 2024, "The N+ implementation details of RLHF with PPO".
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property, partial
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import optax

from rlaif_jax.algorithms.advantages import GAE, Advantage, AdvantageInputs, token_rewards
from rlaif_jax.algorithms.base import Algorithm, initial_state, with_hyper
from rlaif_jax.algorithms.objectives import Clipped, Importance, Objective, Truncated, adapt_kl
from rlaif_jax.algorithms.optimizer import OptimizerConfig, make_optimizer
from rlaif_jax.algorithms.scoring import score_rollout
from rlaif_jax.algorithms.surrogate import (
    Average,
    ClipCov,
    OverTokens,
    Ratio,
    TokenFields,
    TokenRatio,
    answer_fields,
    answer_loss,
    batch_metrics,
    summarise,
    token_loss,
)
from rlaif_jax.algorithms.update import Batch, Scored, Update, check_minibatches, check_packed
from rlaif_jax.config import check_choices, require
from rlaif_jax.models.base import Critic, View
from rlaif_jax.parallel import masked_mean, masked_whiten, psum
from rlaif_jax.policies.base import Draw, Policy, draw_count, learned_rows
from rlaif_jax.rewards.shaping import Shaping
from rlaif_jax.types import (
    CLIP_COV,
    Frozen,
    Metrics,
    Params,
    RewardBatch,
    Rollout,
    StepData,
    TrainState,
    step_key,
)


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Settings of PPO and its relatives.

    Schulman 2017; Stiennon 2020; Huang 2024; GRPO, Shao 2024; RLOO, Ahmadian 2024.

    Attributes:
        advantage: the estimator; `GAE` needs a critic, the others compare the answers to one prompt and need
            kl_in="loss" or kl_coef=0. On the command line it comes behind all options: ppo.advantage:leave-one-out.
        objective: the surrogate loss.
        ratio: whether it is of each token's ratio, or of one for the whole answer.
        average: how the losses of the tokens become one.
        answers_per_prompt: K, answers drawn for each prompt and learned from.
        num_epochs: passes over a step's answers.
        num_minibatches: optimiser steps of a pass.
        value_clip_range: how far a value may move from its old one before its error no longer shrinks; None: any way.
        value_coef: weight of the value loss; it matters where the critic shares the policy's trunk.
        value_warmup: the first steps in which the critic alone learns (value pretraining, VC-PPO, Yuan 2025).
        entropy_coef: weight of the entropy bonus; 0: entropies are not computed.
        clip_cov: which tokens are left out so that the entropy falls less; None: none.
        kl_in: where the KL to the reference enters: the per-token `reward`, or the `loss`.
        kl_gradient: of the KL in the loss: `k2`, the KL's own, or `k3`, that of the estimator which GRPO differentiates.
        kl_coef: its coefficient.
        kl_target: where set, the coefficient follows Ziegler 2019's controller.
        kl_horizon: of that controller, in sequences.
        behaviour: whose log-probs the ratio is measured against: `recompute` scores the answers once more by the trainer's
            forward pass, `sampler` takes what the sampler reported; the gap between the two is always logged.
            With `recompute` a token counts by its `importance`; with `sampler` the ratio itself corrects.
        importance: the weight of a token, from the trainer's / sampler's probability.
        packed_rows: 0: the sequences of a minibatch are padded to one length. Else every device packs its answers into rows
            and adds up the gradient over turns of `packed_rows` x (prompt_length + max_new_tokens - 1) columns: the same
            gradient with less work where lengths are uneven or prompts are shared, in the memory of these columns.
        shaping: how judgements become rewards.
        policy_optimizer: the policy's optimiser.
        value_optimizer: the critic's optimiser.
    """

    advantage: Advantage = GAE()
    objective: Objective = Clipped()
    ratio: Ratio = TokenRatio()
    average: Average = OverTokens()
    answers_per_prompt: int = 1
    num_epochs: int = 4
    num_minibatches: int = 1
    value_clip_range: float | None = 0.2
    value_coef: float = 0.1
    value_warmup: int = 0
    entropy_coef: float = 0.0
    clip_cov: ClipCov | None = None
    kl_in: Literal["reward", "loss"] = "reward"
    kl_gradient: Literal["k2", "k3"] = "k2"
    kl_coef: float = 0.05
    kl_target: float | None = None
    kl_horizon: float = 10_000.0
    behaviour: Literal["recompute", "sampler"] = "recompute"
    importance: Importance = Truncated()
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
            self.advantage.of_answers or not self.ratio.of_answers,
            f"ppo.ratio=AnswerRatio needs an advantage of whole answers, and ppo.advantage={name} has one for each token",
        )
        require(
            self.clip_cov is None or not self.ratio.of_answers,
            "ppo.clip_cov leaves out tokens, and ppo.ratio=AnswerRatio has one ratio for all of an answer's",
        )
        require(
            not (self.advantage.greedy and self.shaping.per_group),
            f"ppo.shaping.per_group compares answers that were sampled: not with the greedy ones of ppo.advantage={name}",
        )
        for field in ("kl_target", "kl_horizon", "value_clip_range"):
            value = self.__dict__[field]
            require(value is None or value > 0, f"ppo.{field} must be > 0, not {value}")
        require(self.value_warmup >= 0, f"ppo.value_warmup must be >= 0, not {self.value_warmup}")
        require(
            not self.value_warmup or self.advantage.needs_critic,
            f"ppo.value_warmup is for a critic, and ppo.advantage={name} has none",
        )
        require(self.packed_rows >= 0, f"ppo.packed_rows must be >= 0 (0: not packed), not {self.packed_rows}")
        for field in ("kl_coef", "value_coef"):
            value = self.__dict__[field]
            require(0 <= value < math.inf, f"ppo.{field} must be >= 0 and finite, not {value}")
        require(math.isfinite(self.entropy_coef), f"ppo.entropy_coef must be finite, not {self.entropy_coef}")

    @property
    def draws(self) -> tuple[Draw, ...]:
        """Returns who answers: the policy K times, and once more greedily where that is the baseline."""
        return (Draw(self.answers_per_prompt), *((Draw(greedy=True),) if self.advantage.greedy else ()))

    def check(self, prompts_per_step: int, devices: int, staleness: int) -> None:
        """Raises UserError where minibatches would be uneven, or staleness is not corrected.

        Args:
            prompts_per_step: prompts of a step, over all devices.
            devices: number of devices that share each minibatch.
            staleness: steps between the policy that answers and the policy that learns, 0 or 1.
        """
        check_minibatches(prompts_per_step * draw_count(self.draws), self.num_minibatches, devices, 1)
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
        """Returns who answers each prompt (`PPOConfig.draws`)."""
        return self.config.draws

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
        kl_coef = jnp.float32(self.config.kl_coef)
        return initial_state(params, self.optimizers, self.config, seed, kl_coef=kl_coef, baseline=jnp.zeros(2))

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

        answers = draw_count(self.draws)
        scores = score_rollout(score, rollout, answers=answers, packed_rows=self.config.packed_rows)
        logprobs, sampled, reference = (
            scores.get("logprobs", rollout.logprobs),
            rollout.logprobs,
            scores["ref_logprobs"],
        )
        values = jnp.where(mask, scores["values"], 0.0) if "values" in scores else jnp.zeros_like(logprobs)
        score_ = rewards.score.astype(jnp.float32)
        kl_coef = self.kl_coef(state) if config.kl_in == "reward" else 0.0
        of_tokens = token_rewards(score_, rewards.token_rewards, logprobs, reference, mask, kl_coef)
        totals, baseline = of_tokens.sum(-1), state.extra["baseline"]
        inputs = AdvantageInputs(of_tokens, totals, values, mask, rewards.valid, answers, baseline)
        advantages, returns = config.advantage(inputs)
        learned = mask & learned_rows(self.draws, len(mask))[:, None]
        corrected = config.behaviour == "recompute"
        weights = config.importance(logprobs - sampled, mask) if corrected else jnp.ones_like(logprobs)
        shares = config.average.shares(learned)
        fields = TokenFields(logprobs, sampled, reference, values, advantages, returns, weights, shares)
        return jax.lax.stop_gradient(
            Batch(rollout.tokens, rollout.prompt_mask, rollout.response_mask, learned, fields=fields, sequences=totals)
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
        config, bound = self.config, with_hyper(self.config, state.hyper)
        rates = {part: state.hyper[f"{part}_optimizer.learning_rate"] for part in self.optimizers}
        if config.value_warmup:
            rates["policy"] = jnp.where(state.step < config.value_warmup, 0.0, rates["policy"])
        return Update(
            score=lambda params, view: self.score(params, frozen, view),
            optimizers=self.optimizers,
            learning_rates=rates,
            num_epochs=config.num_epochs,
            num_minibatches=config.num_minibatches,
            packed_rows=config.packed_rows,
            answers=draw_count(self.draws),
            token_loss=partial(token_loss, bound, self.kl_coef(state), entropy=config.entropy_coef != 0),
            sequence_loss=partial(answer_loss, bound) if config.ratio.of_answers else None,
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
        old, totals = batch, batch.sequences
        if self.config.advantage.whiten:
            white = masked_whiten(batch.fields.advantages, batch.mask, axis_name)
            batch = dataclasses.replace(batch, fields=batch.fields._replace(advantages=white))
        clip_cov = with_hyper(self.config, state.hyper).clip_cov
        if clip_cov is not None:
            left_out = clip_cov.left_out(batch, step_key(state.seed, state.step, CLIP_COV), axis_name)
            fields = batch.fields._replace(weights=jnp.where(left_out, 0.0, batch.fields.weights))
            batch = dataclasses.replace(batch, fields=fields)
        batch = dataclasses.replace(batch, sequences=answer_fields(batch) if self.config.ratio.of_answers else None)
        new, history = self.update(state, frozen)(state, batch, axis_name=axis_name)
        metrics = summarise(history) | batch_metrics(old, axis_name, with_critic=self.critic is not None)
        kl_coef = self.kl_coef(state)
        config = with_hyper(self.config, state.hyper)
        if config.kl_target is not None:
            judged = psum(jnp.sum(old.mask.any(-1)), axis_name)
            kl_coef = adapt_kl(kl_coef, metrics["kl"], judged, target=config.kl_target, horizon=config.kl_horizon)
        metrics["kl_coef"] = kl_coef
        mean_total = masked_mean(totals, old.mask.any(-1), axis_name)
        kept = {"kl_coef": kl_coef, "baseline": config.advantage.follow(state.extra["baseline"], mean_total)}
        return dataclasses.replace(new, extra=state.extra | kept), metrics

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
