"""The optimiser of one part of a model: AdamW behind a global-norm clip, on a schedule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlaif_jax.config import check_choices, require
from rlaif_jax.parallel import psum
from rlaif_jax.types import Metrics, Params


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up, then a schedule over the updates of the run (N+ details, Huang 2024).

    Attributes:
        learning_rate: the peak.
        schedule: after the warm-up constant, linear to zero or cosine to zero.
        warmup_updates: updates of the linear warm-up from zero.
        b1: AdamW's decay of the mean gradient.
        b2: AdamW's decay of the mean square.
        eps: added to the root of the mean square.
        weight_decay: AdamW's decay of the weights to 0; 0: none.
        max_grad_norm: gradients of a larger global norm are scaled down to it.
    """

    learning_rate: float = 3e-6
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    warmup_updates: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        check_choices(self, "optimizer")
        for field in ("learning_rate", "max_grad_norm", "eps"):  # a norm of 0 scales every gradient to nothing
            require(self.__dict__[field] > 0, f"optimizer.{field} must be > 0, not {self.__dict__[field]}")
        require(self.learning_rate < math.inf, f"optimizer.learning_rate must be finite, not {self.learning_rate}")
        for field in ("warmup_updates", "weight_decay"):
            require(self.__dict__[field] >= 0, f"optimizer.{field} must be >= 0, not {self.__dict__[field]}")
        for field in ("b1", "b2"):
            require(0 <= self.__dict__[field] < 1, f"optimizer.{field} must lie in [0, 1), not {self.__dict__[field]}")


def make_optimizer(config: OptimizerConfig, updates: int) -> optax.GradientTransformationExtraArgs:
    """Returns the optimiser of a run of `updates` updates.

    Its `update` takes two optional keywords: `norm`, the gradient's global norm from a caller that has it, and
    `learning_rate`, a float32 scalar instead of the config's peak (`TrainState.hyper`).
    """
    return optax.chain(
        clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay),
        scale_by_learning_rate(config, updates),
    )


def learning_rate_schedule(
    config: OptimizerConfig, updates: int, peak: jax.Array | float
) -> Callable[[jax.Array], jax.Array]:
    """Returns the schedule of a learning rate: number of updates done -> learning rate.

    Args:
        config: the length of the warm-up and the shape of the schedule.
        updates: all updates of the run; a decay ends at the last.
        peak: the learning rate after the warm-up; may be a traced scalar.
    """
    warmup = min(config.warmup_updates, updates)
    rest = max(updates - warmup, 1)
    after = {
        "constant": optax.constant_schedule,
        "linear": lambda peak: optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda peak: optax.cosine_decay_schedule(peak, rest),
    }[config.schedule](peak)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])


class ScheduleState(NamedTuple):
    """The number of updates done, [] int32."""

    done: jax.Array


def scale_by_learning_rate(config: OptimizerConfig, updates: int) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that scales gradients by minus the scheduled learning rate.

    Its `update` takes the peak as `learning_rate`; without it the config's peak counts.

    Args:
        config: peak and schedule.
        updates: optimiser steps of the whole run.
    """

    def init(params: Any) -> ScheduleState:
        del params
        return ScheduleState(jnp.zeros([], jnp.int32))

    def update(
        grads: Any,
        state: ScheduleState,
        params: Any = None,
        *,
        learning_rate: jax.Array | None = None,
        **_: Any,
    ) -> tuple[Any, ScheduleState]:
        del params
        peak = config.learning_rate if learning_rate is None else learning_rate
        step = -1 * learning_rate_schedule(config, updates, peak)(state.done)
        scaled = jax.tree.map(lambda g: jnp.array(step, dtype=g.dtype) * g, grads)
        return scaled, ScheduleState(optax.safe_increment(state.done))

    return optax.GradientTransformationExtraArgs(init, update)


def restart_schedule(state: Any) -> Any:
    """Returns the state of an optimiser of `make_optimizer` with the number of updates done set to zero.

    Another schedule may then go on with the moments that are known.
    """
    clear = lambda part: ScheduleState(jnp.zeros_like(part.done)) if isinstance(part, ScheduleState) else part
    return jax.tree.map(clear, state, is_leaf=lambda part: isinstance(part, ScheduleState))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Returns optax's transformation of this name, computed as one factor; `update` also takes `norm`.

    optax's choice between a gradient and the same divided by the norm is an array that XLA writes and reads again before
    Adam's own pass.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, norm: jax.Array | None = None, **_: Any
    ) -> tuple[Any, Any]:
        del params
        norm = optax.tree.norm(updates) if norm is None else norm
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def descend(
    loss_fn: Callable[[Params], tuple[jax.Array, Metrics]],
    optimizer: optax.GradientTransformation | optax.GradientTransformationExtraArgs,
    state: tuple[Params, Any],
    axis_name: str | None,
    **options: Any,
) -> tuple[tuple[Params, Any], Metrics]:
    """Takes one optimiser step down a loss that is summed over devices.

    Args:
        loss_fn: parameters -> (this device's contribution to the loss, metrics that are already global).
        optimizer: the optimiser.
        state: (params, opt_state).
        axis_name: the mapped axis of the devices, or None.
        **options: further keywords of the optimiser's `update`.

    Returns:
        ((params, opt_state), metrics): the new state, and the metrics with the gradient's global norm as `grad_norm`.
    """
    params, opt_state = state
    grads, metrics = jax.grad(loss_fn, has_aux=True)(params)
    grads = psum(grads, axis_name)
    updates, opt_state = optimizer.update(grads, opt_state, params, **options)
    return (optax.apply_updates(params, updates), opt_state), metrics | {"grad_norm": optax.tree.norm(grads)}
