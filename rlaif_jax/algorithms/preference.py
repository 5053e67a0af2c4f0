"""Preference optimisation: DPO on recorded pairs, or on answers of the policy that are judged."""

from __future__ import annotations

import dataclasses
from functools import cached_property, partial
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlaif_jax.algorithms.base import Algorithm, initial_state, with_hyper
from rlaif_jax.algorithms.optimizer import OptimizerConfig, make_optimizer
from rlaif_jax.algorithms.scoring import score_rollout
from rlaif_jax.algorithms.update import Batch, Scored, Totals, Update, check_minibatches, check_packed
from rlaif_jax.config import check_choices, require
from rlaif_jax.models.base import View
from rlaif_jax.parallel import masked_mean
from rlaif_jax.policies.base import Draw, Policy
from rlaif_jax.rewards.shaping import Shaping
from rlaif_jax.types import Frozen, Metrics, Params, RewardBatch, Rollout, StepData, TrainState


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """Settings of direct preference optimisation (Rafailov 2023).

    Attributes:
        answers: who answers: `recorded`, the data brings K = 2 answers to each prompt; `policy`, the policy draws them and
            the feedback orders them, by pairs where it has any, else by score.
        answers_per_prompt: K.
        beta: strength of the pull to the reference, in 1 / nats.
        num_epochs: passes over a step's answers.
        num_minibatches: optimiser steps of a pass; a minibatch never cuts the answers to a prompt.
        packed_rows: 0: padded; else rows of a turn on each device (see `PPOConfig`).
        shaping: how judgements become rewards.
        policy_optimizer: the optimiser.
    """

    answers: Literal["recorded", "policy"] = "recorded"
    answers_per_prompt: int = 2
    beta: float = 0.1
    num_epochs: int = 1
    num_minibatches: int = 1
    packed_rows: int = 0
    shaping: Shaping = Shaping()
    policy_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6)

    def __post_init__(self) -> None:
        check_choices(self, "dpo")
        for field in ("num_epochs", "num_minibatches"):
            require(self.__dict__[field] >= 1, f"dpo.{field} must be >= 1, not {self.__dict__[field]}")
        require(self.answers_per_prompt >= 2, f"dpo.answers_per_prompt must be >= 2, not {self.answers_per_prompt}")
        require(
            self.answers_per_prompt == 2 or self.answers == "policy",
            f"dpo.answers_per_prompt is {self.answers_per_prompt}, but recorded pairs have 2 answers to each prompt",
        )
        require(self.packed_rows >= 0, f"dpo.packed_rows must be >= 0 (0: not packed), not {self.packed_rows}")
        require(self.beta > 0, f"dpo.beta must be > 0, not {self.beta}")

    def build(self, policy: Policy, *, steps: int) -> DPO:
        """Returns the algorithm for a run.

        Args:
            policy: the policy that learns.
            steps: steps of the run, over which the learning rate is scheduled.
        """
        return DPO(policy, self, steps * self.num_epochs * self.num_minibatches)


class Preferences(NamedTuple):
    """What DPO's loss reads of every answer.

    Attributes:
        ref_sums: [B] log-probs of the whole answer under the reference.
        wins: [B, K] P(this answer is better than answer j to the same prompt).
        wins_valid: [B, K] bool, false where that verdict is missing.
    """

    ref_sums: jax.Array
    wins: jax.Array
    wins_valid: jax.Array


@dataclasses.dataclass(frozen=True)
class DPO(Algorithm):
    """An `Algorithm` that learns from pairs of answers without a reward model.

    Attributes:
        policy: the policy that learns.
        config: the settings.
        updates: optimiser steps of the whole run, for the schedule.
    """

    policy: Policy
    config: DPOConfig
    updates: int = 1
    unit: ClassVar[Literal["answer", "group"]] = "group"

    @property
    def draws(self) -> tuple[Draw, ...]:
        """Returns none for recorded answers, else one draw of K answers."""
        return () if self.config.answers == "recorded" else (Draw(self.config.answers_per_prompt),)

    @property
    def shaping(self) -> Shaping:
        """Returns how judgements become rewards."""
        return self.config.shaping

    @cached_property
    def optimizers(self) -> dict[str, optax.GradientTransformationExtraArgs]:
        """Returns the policy's optimiser."""
        return {"policy": make_optimizer(self.config.policy_optimizer, self.updates)}

    def check(self, prompts_per_step: int, devices: int, staleness: int) -> None:
        """Raises UserError where minibatches would cut groups, or answers would be stale.

        Args:
            prompts_per_step: prompts of a step, over all devices.
            devices: number of devices that share each minibatch.
            staleness: steps between the policy that answers and the policy that learns; must be 0.
        """
        answers = self.config.answers_per_prompt
        check_minibatches(prompts_per_step * answers, self.config.num_minibatches, devices, answers)
        check_packed(self.config.packed_rows, self.policy)
        require(not staleness, "train.staleness=1 is for policy gradients: set train.staleness=0 with DPO")

    def init(self, params: Params, seed: jax.Array) -> TrainState:
        """Returns the state at step 0.

        Args:
            params: {"policy": parameters}.
            seed: [] integer, the seed of the run.
        """
        return initial_state(params, self.optimizers, self.config, seed)

    def score(self, params: Params, frozen: Frozen, view: View) -> Scored:
        """Returns the log-probs and entropies, under the policy, of every target of a view.

        Args:
            params: {"policy": parameters}.
            frozen: weights that do not learn.
            view: padded or packed sequences; the results have the layout of its targets.
        """
        scores = self.policy.score(params["policy"], frozen, view)
        return Scored(scores.logprobs, scores.entropies)

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
        """Returns the batch of a step: the answers, their log-probs under the reference, who beats whom.

        Args:
            state: not read.
            frozen: the reference.
            data: not read.
            rollout: B answers, K for each prompt.
            rewards: with pairs, or with scores that order the answers.
            axis_name: the mapped axis of the devices, or None.
        """
        del state, data, axis_name
        mask = rollout.response_mask & rewards.valid.astype(bool)[:, None]
        scores = score_rollout(
            lambda view: {"logprobs": self.policy.score(frozen.reference, frozen, view).logprobs},
            rollout,
            answers=self.config.answers_per_prompt,
            packed_rows=self.config.packed_rows,
        )
        wins, valid = preferences(rewards, self.config.answers_per_prompt)
        sequences = Preferences(jnp.where(mask, scores["logprobs"], 0.0).sum(-1), wins, valid)
        return jax.lax.stop_gradient(
            Batch(rollout.tokens, rollout.prompt_mask, rollout.response_mask, mask, sequences=sequences)
        )

    def update(self, state: TrainState, frozen: Frozen) -> Update:
        """Returns the update of a step: its loss with the coefficients of `state` and weights of `frozen`."""
        config = self.config
        return Update(
            score=lambda params, view: self.score(params, frozen, view),
            optimizers=self.optimizers,
            learning_rates={"policy": state.hyper["policy_optimizer.learning_rate"]},
            num_epochs=config.num_epochs,
            num_minibatches=config.num_minibatches,
            packed_rows=config.packed_rows,
            answers=config.answers_per_prompt,
            unit=self.unit,
            sequence_loss=partial(dpo_loss, with_hyper(config, state.hyper).beta),
        )

    def step(
        self, state: TrainState, frozen: Frozen, batch: Batch, *, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        """Updates the policy by `num_epochs` passes over `num_minibatches` minibatches.

        Args:
            state: the state; donated.
            frozen: the weights under an adapter.
            batch: this device's rows of the global batch.
            axis_name: the mapped axis of the devices, or None.

        Returns:
            (the new state, name -> metric, float32 scalars of the global batch).
        """
        new, history = self.update(state, frozen)(state, batch, axis_name=axis_name)
        metrics = {name: x.mean() for name, x in history.items()}
        metrics["first/margin"] = history["margin_size"][0]
        metrics["nonfinite"] = history["nonfinite"].sum()
        length = batch.response_mask.sum(-1).astype(jnp.float32)
        return new, metrics | {"length": masked_mean(length, batch.mask.any(-1), axis_name)}

    def checks(self, metrics: dict[str, float], *, step: int, tolerance: float) -> dict[str, bool]:
        """Returns the checks of a step: finite losses, and a margin of 0 at step 1.

        At step 1 the policy is still the reference.

        Args:
            metrics: the metrics of the step.
            step: the step, counted from 1.
            tolerance: the largest gap of a log-prob in nats that rounding explains.

        Returns:
            name -> whether the check holds.
        """
        found = {"losses_are_finite": metrics["nonfinite"] == 0}
        if step == 1:
            most = 2 * self.config.beta * tolerance * metrics["length"]
            found["first_margin_is_0"] = metrics["first/margin"] <= most
        return found


def preferences(rewards: RewardBatch, answers: int) -> tuple[jax.Array, jax.Array]:
    """Returns the preference labels between the K answers to each prompt.

    Verdicts on pairs count where the feedback has them. Else scores decide: the higher one wins for certain,
    equal or missing ones leave the pair out.

    Args:
        rewards: rewards of B answers, K consecutive rows a prompt.
        answers: K.

    Returns:
        (P(the answer of the row beats answer j to the same prompt), whether that is known), each [B, K].
    """
    if rewards.pairs is not None:
        valid = jnp.ones(rewards.pairs.shape, bool) if rewards.pairs_valid is None else rewards.pairs_valid
        return jnp.asarray(rewards.pairs).reshape(-1, answers), jnp.asarray(valid, bool).reshape(-1, answers)
    score = rewards.total.reshape(-1, answers)
    known = rewards.valid.astype(bool).reshape(-1, answers)
    wins = (score[:, :, None] > score[:, None, :]).astype(jnp.float32)
    valid = known[:, :, None] & known[:, None, :] & (score[:, :, None] != score[:, None, :])
    return wins.reshape(-1, answers), valid.reshape(-1, answers)


def dpo_loss(
    beta: jax.Array | float, sums: jax.Array, sequences: Preferences, valid: jax.Array, totals: Totals
) -> tuple[jax.Array, Metrics]:
    """Returns the mean DPO loss over all judged pairs, and its metrics (Rafailov 2023, eq. 7).

    A `SequenceLoss`. With h = beta (log pi - log pi_ref) of a whole answer, the loss of a pair is
    -p log s(h_i - h_j) - (1 - p) log s(h_j - h_i), s the logistic function and p the label; p = 1 gives the paper's.

    Args:
        beta: of the settings.
        sums: [M] log-probs of whole answers under the policy.
        sequences: their `Preferences`.
        valid: [M] bool, answers with a token that counts.
        totals: not read: the mean is over pairs.
    """
    del totals
    answers = sequences.wins.shape[1]
    implicit = (beta * (sums - sequences.ref_sums)).reshape(-1, answers)
    margin = implicit[:, :, None] - implicit[:, None, :]
    wins = sequences.wins.reshape(-1, answers, answers)
    there = valid.reshape(-1, answers)
    upper = jnp.triu(jnp.ones((answers, answers), bool), 1)  # each pair once
    known = sequences.wins_valid.reshape(wins.shape) & there[:, :, None] & there[:, None, :] & upper
    count = jnp.maximum(known.sum(), 1)
    mean = lambda x: jnp.where(known, x, 0.0).sum() / count
    loss = mean(-wins * jax.nn.log_sigmoid(margin) - (1 - wins) * jax.nn.log_sigmoid(-margin))
    decided = known & (wins != 0.5)
    return loss, {
        "dpo_loss": loss,
        "accuracy": (decided & ((margin > 0) == (wins > 0.5))).sum() / jnp.maximum(decided.sum(), 1),
        "margin": mean(margin * (2 * wins - 1)),
        "margin_size": mean(jnp.abs(margin)),
        "pairs": known.sum().astype(jnp.float32),
    }
