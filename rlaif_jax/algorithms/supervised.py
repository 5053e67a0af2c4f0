"""Maximum likelihood: the supervised step that makes base models, labelers and first policies."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlaif_jax.algorithms.optimizer import descend
from rlaif_jax.models.causal_lm import CausalLM
from rlaif_jax.parallel import psum
from rlaif_jax.types import Metrics, Params


def weighted_cross_entropy(
    model: CausalLM,
    params: Params,
    tokens: jax.Array,
    mask: jax.Array,
    weights: jax.Array,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (this device's contribution, global loss): next-token cross-entropy in nats, weighted.

    The loss is the global weighted sum over the global weight.

    Args:
        model: the language model.
        params: its parameters.
        tokens: [B, S] int32.
        mask: [B, S] bool.
        weights: [B, S] float32, of each token as a target; 0 where it is not to be learned.
        axis_name: the mapped axis of the devices, or None.
    """
    hidden = model.sequence_hidden(params, tokens[:, :-1], mask[:, :-1])
    logprobs, _ = model.token_logprobs(params, hidden, tokens[:, 1:])
    weights = jnp.where(mask[:, 1:].astype(bool), weights[:, 1:], 0.0)
    total = jnp.maximum(psum(weights.sum(), axis_name), 1e-8)
    loss = -jnp.sum(jnp.where(weights > 0, logprobs, 0.0) * weights) / total
    return loss, psum(jax.lax.stop_gradient(loss), axis_name)


def supervised_step(
    model: CausalLM,
    optimizer: optax.GradientTransformation,
    state: tuple[Params, Any],
    batch: dict[str, jax.Array],
    *,
    axis_name: str | None = None,
) -> tuple[tuple[Params, Any], Metrics]:
    """Takes one step of maximum likelihood: ((params, opt_state), metrics `loss` and `grad_norm`).

    Args:
        model: the language model.
        optimizer: the optimiser.
        state: (params, opt_state).
        batch: `tokens` int32, `mask` bool, `weights` float32, each [B, S].
        axis_name: the mapped axis of the devices, or None.
    """

    def loss_fn(params: Params) -> tuple[jax.Array, Metrics]:
        loss, total = weighted_cross_entropy(model, params, batch["tokens"], batch["mask"], batch["weights"], axis_name)
        return loss, {"loss": total}

    return descend(loss_fn, optimizer, state, axis_name)
