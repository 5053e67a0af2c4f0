"""The `Algorithm` contract, and its settings as arrays of the training state."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeVar

import jax
import jax.numpy as jnp
import optax

from rlaif_jax.algorithms.optimizer import OptimizerConfig
from rlaif_jax.policies.base import Draw, draw_count
from rlaif_jax.rewards.shaping import Shaping, identity_normaliser, shaped_rewards
from rlaif_jax.types import (
    Feedback,
    Frozen,
    Metrics,
    Params,
    RewardBatch,
    Rollout,
    StepData,
    TrainState,
)

C = TypeVar("C")


class Algorithm(Protocol):
    """How a policy learns from rewards: a frozen dataclass; all that changes is in `TrainState`.

    Attributes:
        draws: who answers each prompt, how often; empty where the data brings recorded answers.
        unit: what a minibatch must not cut, single answers or the group of answers to a prompt.
        shaping: how judgements become rewards.
    """

    @property
    def draws(self) -> tuple[Draw, ...]:
        """Returns who answers each prompt, how often; empty where the data brings recorded answers."""

    @property
    def unit(self) -> Literal["answer", "group"]:
        """Returns what a minibatch must not cut."""

    @property
    def shaping(self) -> Shaping:
        """Returns how judgements become rewards."""

    def check(self, prompts_per_step: int, devices: int, staleness: int) -> None:
        """Raises UserError where the algorithm cannot learn from a step of these sizes.

        Args:
            prompts_per_step: prompts of a step, over all devices.
            devices: number of devices that share each minibatch.
            staleness: steps between the policy that answers and the policy that learns, 0 or 1.
        """

    def init(self, params: Params, seed: jax.Array) -> TrainState:
        """Returns the state at step 0; is traced, so that the state is split from its birth.

        Args:
            params: the parameters of each part, such as {"policy": ..., "value": ...}.
            seed: [] integer, the seed of the run.
        """

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
        """Returns the rewards of a step: by default judgements after normaliser, weights and shaping.

        Args:
            state: without its optimiser.
            frozen: weights that do not learn.
            data: the step's data.
            rollout: B answers.
            judged: their judgements.
            axis_name: the mapped axis of the devices, or None.
        """
        del frozen, data, axis_name
        count = draw_count(self.draws)
        return shaped_rewards(self.shaping, state.extra["normaliser"], judged, rollout, answers=count)

    def prepare(
        self,
        state: TrainState,
        frozen: Frozen,
        data: StepData,
        rollout: Rollout,
        rewards: RewardBatch,
        *,
        axis_name: str | None = None,
    ) -> Any:
        """Returns all that `step` reads of a rollout, such as advantages; leading axes are split.

        Args:
            state: without its optimiser.
            frozen: weights that do not learn.
            data: the step's data.
            rollout: B answers.
            rewards: their rewards.
            axis_name: the mapped axis of the devices, or None.
        """

    def step(
        self, state: TrainState, frozen: Frozen, batch: Any, *, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        """Returns the state after a policy step and its metrics, float32 scalars of the whole batch.

        Args:
            state: the state; donated.
            frozen: the weights under an adapter alone (`Frozen.base`).
            batch: this device's rows of what `prepare` returned.
            axis_name: the mapped axis of the devices, or None.
        """

    def checks(self, metrics: dict[str, float], *, step: int, tolerance: float) -> dict[str, bool]:
        """Returns the checks of a step by name.

        Args:
            metrics: the metrics of the step.
            step: the step, counted from 1.
            tolerance: the largest gap of a log-prob, in nats, that rounding explains.

        Returns:
            name -> whether the check holds; one that does not hold stops the run.
        """


# ---- Settings that are arrays


def hyper_settings(config: Any, prefix: str = "") -> dict[str, float]:
    """Returns the float settings of a config by dotted name, such as "objective.clip_range".

    Settings of nested dataclasses are included; of an optimiser only the learning rate is.

    Args:
        config: a dataclass of settings.
        prefix: what the names begin with.
    """
    if isinstance(config, OptimizerConfig):
        return {f"{prefix}learning_rate": config.learning_rate}
    found: dict[str, float] = {}
    for field in dataclasses.fields(config):
        value = config.__dict__[field.name]
        if dataclasses.is_dataclass(value):
            found |= hyper_settings(value, f"{prefix}{field.name}.")
        elif isinstance(value, float):
            found[f"{prefix}{field.name}"] = value
    return found


def with_hyper(config: C, hyper: Mapping[str, jax.Array], prefix: str = "") -> C:
    """Returns a copy of a config in which float settings are arrays, which may be traced.

    Args:
        config: a dataclass of settings.
        hyper: dotted name of a setting -> its array, as in `TrainState.hyper`; other settings stay.
        prefix: what the names begin with.
    """
    bound = copy.copy(config)
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        name, value = f"{prefix}{field.name}", config.__dict__[field.name]
        if dataclasses.is_dataclass(value) and not isinstance(value, OptimizerConfig):
            object.__setattr__(bound, field.name, with_hyper(value, hyper, f"{name}."))
        elif name in hyper:  # not by `replace`, whose validation cannot read a traced number
            object.__setattr__(bound, field.name, hyper[name])
    return bound


def initial_state(
    params: Params,
    optimizers: Mapping[str, optax.GradientTransformation],
    config: Any,
    seed: jax.Array,
    **extra: Any,
) -> TrainState:
    """Returns the state at step 0 from parameters by part.

    Args:
        params: parameters by part; copied, because the state is donated later.
        optimizers: the optimiser of each part.
        config: the algorithm's settings; its floats become `hyper`.
        seed: [] uint32.
        **extra: further entries of `extra` besides the normaliser, which leaves scores as they are.
    """
    params = jax.tree.map(jnp.array, {part: params[part] for part in optimizers})
    return TrainState(
        params=params,
        opt_state={part: optimizer.init(params[part]) for part, optimizer in optimizers.items()},
        extra={"normaliser": identity_normaliser(), **extra},
        hyper={name: jnp.float32(value) for name, value in hyper_settings(config).items()},
        step=jnp.int32(0),
        seed=jnp.asarray(seed, jnp.uint32),
    )
