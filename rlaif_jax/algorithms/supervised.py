"""Maximum likelihood: the supervised step that makes base models, labelers and the policy's starting point."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlaif_jax.config import OptimizerConfig
from rlaif_jax.models.heads import LanguageModel
from rlaif_jax.parallel import psum
from rlaif_jax.types import Metrics, Params


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


def weighted_cross_entropy(
    model: LanguageModel,
    params: Params,
    tokens: jax.Array,
    mask: jax.Array,
    weights: jax.Array,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(share of the loss, global loss): next-token cross-entropy in nats, weighted.

    tokens, mask [B, S]; weights [B, S] of each token as a *target* (0 where it is not to be learned). The loss is the
    global weighted sum over the global weight.
    """
    hidden = model.hidden(params, tokens[:, :-1], mask[:, :-1])
    logprobs, _ = model.token_logprobs(params, hidden, tokens[:, 1:])
    weights = jnp.where(mask[:, 1:].astype(bool), weights[:, 1:], 0.0)
    total = jnp.maximum(psum(weights.sum(), axis_name), 1e-8)
    loss = -jnp.sum(jnp.where(weights > 0, logprobs, 0.0) * weights) / total
    return loss, psum(jax.lax.stop_gradient(loss), axis_name)


def supervised_step(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    state: tuple[Params, Any],
    batch: dict[str, jax.Array],
    *,
    axis_name: str | None = None,
) -> tuple[tuple[Params, Any], Metrics]:
    """One update of (params, opt_state) on a batch of `tokens`, `mask`, `weights` [B, S]."""
    params, opt_state = state
    grads, loss = jax.grad(
        lambda p: weighted_cross_entropy(model, p, batch["tokens"], batch["mask"], batch["weights"], axis_name),
        has_aux=True,
    )(params)
    grads = psum(grads, axis_name)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), {"loss": loss, "grad_norm": optax.tree.norm(grads)}
