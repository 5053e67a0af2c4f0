"""Maximum likelihood: the supervised step that makes base models, labelers and first policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlaif_jax.algorithms.optimizer import descend
from rlaif_jax.models.base import PackedView
from rlaif_jax.models.causal_lm import CausalLM
from rlaif_jax.parallel import psum
from rlaif_jax.types import Metrics, Params


def target_logprobs(model: CausalLM, params: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns (log-probs in nats, weights), each [R, C], of the token that follows each column.

    The weight is 0 where no token of the same text follows.

    Args:
        model: the language model.
        params: its parameters.
        batch: rows of packed texts, as `supervised_step` takes them.
    """
    segments = batch["segments"]
    # The last column wraps around to the first one, which may belong to a text of the same number.
    follows = (segments > 0) & (jnp.roll(segments, -1, axis=1) == segments).at[:, -1].set(False)
    targets = jnp.where(follows, jnp.roll(batch["tokens"], -1, axis=1), 0)
    weights = jnp.where(follows, jnp.roll(batch["weights"], -1, axis=1), 0.0)
    view = PackedView(batch["tokens"], batch["positions"], segments, None, targets)
    logprobs, _ = model.token_logprobs(params, model.hidden(params, view), targets)
    return jnp.where(weights > 0, logprobs, 0.0), weights


def weighted_cross_entropy(
    model: CausalLM, params: Params, batch: dict[str, jax.Array], axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns (this device's contribution, global loss): next-token cross-entropy in nats, weighted.

    The loss is the global weighted sum over the global weight.

    Args:
        model: the language model.
        params: its parameters.
        batch: rows of packed texts, as `supervised_step` takes them.
        axis_name: the mapped axis of the devices, or None.
    """
    logprobs, weights = target_logprobs(model, params, batch)
    total = jnp.maximum(psum(weights.sum(), axis_name), 1e-8)
    loss = -jnp.sum(logprobs * weights) / total
    return loss, psum(jax.lax.stop_gradient(loss), axis_name)


def supervised_step(
    model: CausalLM,
    optimizer: optax.GradientTransformation,
    state: tuple[Params, Any],
    batch: dict[str, jax.Array],
    *,
    weights: Callable[[Params], Params] = lambda params: params,
    axis_name: str | None = None,
) -> tuple[tuple[Params, Any], Metrics]:
    """Takes one step of maximum likelihood: ((params, opt_state), metrics `loss` and `grad_norm`).

    Args:
        model: the language model.
        optimizer: the optimiser.
        state: (params, opt_state).
        batch: rows of texts behind one another, as `packed_text_arrays` makes them, each [R, C]: `tokens`, `segments` (the
            number of a column's text within its row, 0 for an empty column) and `positions` int32; `weights` float32, of
            each token as a target, 0 where it is not to be learned.
        weights: the parameters that learn -> those that the model reads (`LoRAConfig.join`).
        axis_name: the mapped axis of the devices, or None.
    """

    def loss_fn(params: Params) -> tuple[jax.Array, Metrics]:
        loss, total = weighted_cross_entropy(model, weights(params), batch, axis_name)
        return loss, {"loss": total}

    return descend(loss_fn, optimizer, state, axis_name)
