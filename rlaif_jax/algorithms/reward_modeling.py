"""Learning a reward model from comparisons."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlaif_jax.models.heads import ScalarModel, last_real
from rlaif_jax.parallel import psum
from rlaif_jax.types import Metrics, Params


def pairwise_cross_entropy(first: jax.Array, second: jax.Array, probability: jax.Array) -> jax.Array:
    """-p log sigmoid(r1 - r2) - (1 - p) log sigmoid(r2 - r1), per pair [B], for soft labels p = P(first is better).

    Bradley-Terry with soft labels (Lee 2023, section 2.1.2: cross-entropy to softmax(r1, r2)).
    """
    margin = first - second
    return -probability * jax.nn.log_sigmoid(margin) - (1 - probability) * jax.nn.log_sigmoid(-margin)


def reward_step(
    model: ScalarModel,
    optimizer: optax.GradientTransformation,
    state: tuple[Params, Any],
    batch: dict[str, jax.Array],
    *,
    axis_name: str | None = None,
) -> tuple[tuple[Params, Any], Metrics]:
    """One update of (params, opt_state) on pairs.

    batch: tokens1, mask1, tokens2, mask2 [B, S], probability [B] that the first is better, weight [B] (0 = missing).
    The reward is read at the last real token. Accuracy counts pairs whose label is not a tie.
    """
    params, opt_state = state

    def loss_fn(params: Params) -> tuple[jax.Array, Metrics]:
        tokens = jnp.concatenate([batch["tokens1"], batch["tokens2"]])
        mask = jnp.concatenate([batch["mask1"], batch["mask2"]])
        first, second = jnp.split(last_real(model(params, tokens, mask), mask), 2)
        weight = batch["weight"]
        p = jnp.where(weight > 0, batch["probability"], 0.5)  # a missing label may hold anything, and NaN x 0 is NaN
        total = jnp.maximum(psum(weight.sum(), axis_name), 1e-8)
        loss = jnp.sum(jnp.where(weight > 0, pairwise_cross_entropy(first, second, p) * weight, 0.0)) / total
        decided = (weight > 0) & (p != 0.5)
        right = psum(jnp.sum(decided & ((first > second) == (p > 0.5))), axis_name)
        return loss, {
            "loss": psum(jax.lax.stop_gradient(loss), axis_name),
            "accuracy": right / jnp.maximum(psum(decided.sum(), axis_name), 1),
        }

    grads, metrics = jax.grad(loss_fn, has_aux=True)(params)
    grads = psum(grads, axis_name)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), metrics
