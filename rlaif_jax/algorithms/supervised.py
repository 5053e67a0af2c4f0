"""Maximum likelihood: the supervised step that makes base models, labelers and the policy's starting point."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlaif_jax.models.heads import LanguageModel
from rlaif_jax.parallel import psum
from rlaif_jax.types import Metrics, Params


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
