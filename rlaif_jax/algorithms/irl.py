"""Inverse RL: the reward is a discriminator of demonstrations, trained together with the policy."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlaif_jax.algorithms.base import Algorithm
from rlaif_jax.algorithms.optimizer import OptimizerConfig, descend, make_optimizer
from rlaif_jax.config import require
from rlaif_jax.models.heads import ScalarModel, gather_last
from rlaif_jax.parallel import masked_mean, psum
from rlaif_jax.policies.base import Draw
from rlaif_jax.rewards.shaping import Shaping
from rlaif_jax.types import Feedback, Frozen, Metrics, Params, RewardBatch, Rollout, StepData, TrainState


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Settings of a discriminator (GAIL, Ho & Ermon 2016; AIRL, Fu 2018).

    Attributes:
        updates_per_step: optimiser steps of the discriminator in each policy step.
        optimizer: its optimiser.
    """

    updates_per_step: int = 1
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4, schedule="constant")

    def __post_init__(self) -> None:
        require(self.updates_per_step >= 1, f"discriminator.updates_per_step must be >= 1, not {self.updates_per_step}")

    def build(self, algorithm: Algorithm, discriminator: ScalarModel, *, steps: int) -> Adversarial:
        """Returns an algorithm whose reward includes the discriminator's logit.

        Args:
            algorithm: the inner algorithm, which trains the policy.
            discriminator: the reward model that tells answers from demonstrations.
            steps: steps of the run, over which the learning rate is scheduled.
        """
        return Adversarial(algorithm, discriminator, self, steps * self.updates_per_step)


class AdversarialBatch(NamedTuple):
    """What a step reads: the inner algorithm's batch, the policy's answers and the demonstrations."""

    inner: Any
    answers: Rollout
    demonstrations: Rollout


@dataclasses.dataclass(frozen=True)
class Adversarial(Algorithm):
    """An `Algorithm` whose reward is a discriminator's logit, log D - log (1 - D), on whole answers.

    The discriminator learns to tell demonstrations (label 1) from the policy's answers (label 0); at its optimum the logit
    is log p_demonstrations - log p_policy. Its parameters are the entry `discriminator` of the parameters that training
    starts from.

    Attributes:
        algorithm: updates the policy.
        discriminator: a scalar model that shares the policy's tokenizer.
        config: the settings.
        updates: optimiser steps of the discriminator in the whole run, for its schedule.
    """

    algorithm: Algorithm
    discriminator: ScalarModel
    config: DiscriminatorConfig
    updates: int = 1

    @property
    def draws(self) -> tuple[Draw, ...]:
        """Returns the inner algorithm's draws."""
        return self.algorithm.draws

    @property
    def unit(self) -> Literal["answer", "group"]:
        """Returns what the inner algorithm's minibatches must not cut."""
        return self.algorithm.unit

    @property
    def shaping(self) -> Shaping:
        """Returns the inner algorithm's shaping."""
        return self.algorithm.shaping

    @cached_property
    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """Returns the discriminator's optimiser, made from `config.optimizer` for `updates` updates."""
        return make_optimizer(self.config.optimizer, self.updates)

    def check(self, prompts_per_step: int, devices: int, staleness: int) -> None:
        """Raises UserError where the inner algorithm cannot learn from a step of these sizes.

        Args:
            prompts_per_step: prompts of a step, over all devices.
            devices: number of devices that share each minibatch.
            staleness: steps between the policy that answers and the policy that learns, 0 or 1.
        """
        self.algorithm.check(prompts_per_step, devices, staleness)

    def init(self, params: Params, seed: jax.Array) -> TrainState:
        """Returns the inner algorithm's state with the discriminator and its optimiser in `extra`.

        Args:
            params: the inner algorithm's parameters and "discriminator".
            seed: [] integer, the seed of the run.
        """
        state = self.algorithm.init(params, seed)
        own = jax.tree.map(jnp.array, params["discriminator"])
        hyper = {"discriminator.learning_rate": jnp.float32(self.config.optimizer.learning_rate)}
        return dataclasses.replace(
            state, extra=state.extra | {"discriminator": (own, self.optimizer.init(own))}, hyper=state.hyper | hyper
        )

    def rewards(
        self,
        state: TrainState,
        frozen: Frozen,
        data: StepData,
        rollout: Rollout,
        judged: Feedback,
        *,
        axis_name: str | None = None,
    ) -> RewardBatch:
        """Returns the rewards of a step: the discriminator's logit as one more column of the feedback.

        Args:
            state: with the discriminator in `extra`.
            frozen: weights that do not learn.
            data: the step's data.
            rollout: B answers.
            judged: their judgements; may have no column.
            axis_name: the mapped axis of the devices, or None.
        """
        logits = answer_logits(self.discriminator, state.extra["discriminator"][0], rollout)
        judged = judged.join(Feedback.single(logits, jnp.ones(logits.shape, bool)))
        return self.algorithm.rewards(state, frozen, data, rollout, judged, axis_name=axis_name)

    def prepare(
        self,
        state: TrainState,
        frozen: Frozen,
        data: StepData,
        rollout: Rollout,
        rewards: RewardBatch,
        *,
        axis_name: str | None = None,
    ) -> AdversarialBatch:
        """Returns the inner algorithm's batch, the answers and the demonstrations.

        Args:
            state: without its optimiser.
            frozen: weights that do not learn.
            data: must have demonstrations.
            rollout: B answers.
            rewards: their rewards.
            axis_name: the mapped axis of the devices, or None.

        Raises:
            UserError: the data has no demonstrations.
        """
        require(data.demonstrations is not None, "inverse RL needs demonstrations, and the data has none")
        inner = self.algorithm.prepare(state, frozen, data, rollout, rewards, axis_name=axis_name)
        return AdversarialBatch(inner, rollout, data.demonstrations)  # type: ignore[arg-type]

    def step(
        self, state: TrainState, frozen: Frozen, batch: AdversarialBatch, *, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        """Updates the policy on the present rewards, then the discriminator on the same answers.

        Args:
            state: the state; donated.
            frozen: the weights under an adapter.
            batch: this device's rows.
            axis_name: the mapped axis of the devices, or None.
        """
        own = state.extra["discriminator"]
        new, metrics = self.algorithm.step(state, frozen, batch.inner, axis_name=axis_name)

        def loss_fn(params: Params) -> tuple[jax.Array, Metrics]:
            return discriminator_loss(self.discriminator, params, batch.answers, batch.demonstrations, axis_name)

        rate = state.hyper["discriminator.learning_rate"]
        for _ in range(self.config.updates_per_step):
            own, of_discriminator = descend(loss_fn, self.optimizer, own, axis_name, learning_rate=rate)
        metrics |= {f"discriminator/{name}": x for name, x in of_discriminator.items()}
        return dataclasses.replace(new, extra=new.extra | {"discriminator": own}), metrics

    def checks(self, metrics: dict[str, float], *, step: int, tolerance: float) -> dict[str, bool]:
        """Returns the inner algorithm's checks, and that the discriminator's loss is finite.

        Args:
            metrics: the metrics of the step.
            step: the step, counted from 1.
            tolerance: the largest gap of a log-prob, in nats, that rounding explains.

        Returns:
            name -> whether the check holds.
        """
        finite = jnp.isfinite(metrics["discriminator/loss"])
        return self.algorithm.checks(metrics, step=step, tolerance=tolerance) | {
            "discriminator_loss_is_finite": bool(finite)
        }


def answer_logits(discriminator: ScalarModel, params: Params, rollout: Rollout) -> jax.Array:
    """Computes the discriminator's logit [B] float32 at the last token of each answer.

    Args:
        discriminator: the model.
        params: its parameters.
        rollout: B answers with their prompts.
    """
    mask = jnp.concatenate([rollout.prompt_mask, rollout.response_mask], axis=1)
    return gather_last(discriminator(params, rollout.tokens, mask), mask)


def discriminator_loss(
    discriminator: ScalarModel, params: Params, answers: Rollout, demonstrations: Rollout, axis_name: str | None
) -> tuple[jax.Array, Metrics]:
    """Returns (this device's contribution, global metrics) of the discriminator's logistic loss.

    Both kinds have half of the weight, whatever their numbers (Goodfellow 2014, eq. 1).

    Args:
        discriminator: the model.
        params: its parameters.
        answers: of the policy, label 0.
        demonstrations: label 1.
        axis_name: the mapped axis of the devices, or None.
    """
    loss, right = jnp.zeros([]), jnp.zeros([])
    for rollout, sign in ((answers, -1.0), (demonstrations, 1.0)):
        logits = sign * answer_logits(discriminator, params, rollout)
        count = psum(jnp.float32(logits.shape[0]), axis_name)
        loss = loss - 0.5 * jnp.sum(jax.nn.log_sigmoid(logits)) / count
        right = right + 0.5 * masked_mean((logits > 0).astype(jnp.float32), jnp.ones(logits.shape, bool), axis_name)
    return loss, {"loss": psum(jax.lax.stop_gradient(loss), axis_name), "accuracy": right}
