"""The optimiser of a part: AdamW behind a global-norm clip, on a schedule."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from rlaif_jax.config import check_choices, require


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up, then constant or linear to zero over the updates of the run (N+ details, Huang 2024)."""

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
        require(self.learning_rate > 0, f"optimizer.learning_rate must be > 0, not {self.learning_rate}")


def make_optimizer(config: OptimizerConfig, updates: int) -> optax.GradientTransformationExtraArgs:
    """AdamW behind a global-norm clip, its learning rate on the config's schedule over `updates` updates."""
    peak, warmup = config.learning_rate, min(config.warmup_updates, updates)
    rest = max(updates - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]
    schedule = (
        optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup]) if warmup else after
    )
    return optax.chain(
        clip_by_global_norm(config.max_grad_norm),
        optax.adamw(schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay),
    )


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """optax's, but as one factor: its choice between a gradient and the same divided by the norm is an array that XLA writes
    and reads again before Adam's own pass. `update(..., norm=)` takes the norm from a caller who has it."""

    def update(
        updates: Any, state: Any, params: Any = None, *, norm: jax.Array | None = None, **_: Any
    ) -> tuple[Any, Any]:
        del params
        norm = optax.tree.norm(updates) if norm is None else norm
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
