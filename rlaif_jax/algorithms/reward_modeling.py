"""Learning a reward model from comparisons and rankings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from rlaif_jax.algorithms.optimizer import descend
from rlaif_jax.models.heads import ScalarModel, gather_last
from rlaif_jax.parallel import psum
from rlaif_jax.rewards.rankings import bradley_terry, mean_loss, plackett_luce
from rlaif_jax.types import Metrics, Params


def reward_step(
    model: ScalarModel,
    optimizer: optax.GradientTransformation,
    state: tuple[Params, Any],
    batch: dict[str, jax.Array],
    *,
    weights: Callable[[Params], Params] = lambda params: params,
    center_coef: float = 0.0,
    axis_name: str | None = None,
) -> tuple[tuple[Params, Any], Metrics]:
    """Takes one step of a reward model on pairs, by the Bradley-Terry loss.

    The reward is read at the last real token. Comparisons leave the level of the scores open; the term
    `center_coef` (s1 + s2)^2 draws it to 0 (Eisenstein 2023, section 2; `center_rewards_coefficient` of TRL).

    Args:
        model: the reward model.
        optimizer: the optimiser.
        state: (params, opt_state).
        batch: tokens1, mask1, tokens2, mask2 [B, S]; probability [B] that the first is better; weight [B], 0 where
            the label is missing; optionally margin [B], as `bradley_terry` takes it.
        weights: the parameters that learn -> those that the model reads (`LoRAConfig.join`).
        center_coef: weight of the term that centres the scores.
        axis_name: the mapped axis of the devices, or None.

    Returns:
        ((params, opt_state), metrics): `loss`, `grad_norm`, and `accuracy` over pairs whose label is not a tie.
    """

    def loss_fn(params: Params) -> tuple[jax.Array, Metrics]:
        tokens = jnp.concatenate([batch["tokens1"], batch["tokens2"]])
        mask = jnp.concatenate([batch["mask1"], batch["mask2"]])
        first, second = jnp.split(gather_last(model(weights(params), tokens, mask), mask), 2)
        weight = batch["weight"]
        p, seen = batch["probability"], weight > 0  # a missing label may hold anything, and NaN x 0 is NaN
        losses = bradley_terry(first, second, p, seen, batch.get("margin", 0.0))
        if center_coef:
            losses += center_coef * (first + second) ** 2
        loss = mean_loss(losses, weight, axis_name)
        decided = seen & (p != 0.5)
        right = psum(jnp.sum(decided & ((first > second) == (p > 0.5))), axis_name)
        return loss, {
            "loss": psum(jax.lax.stop_gradient(loss), axis_name),
            "accuracy": right / jnp.maximum(psum(decided.sum(), axis_name), 1),
        }

    return descend(loss_fn, optimizer, state, axis_name)


def ranking_step(
    model: ScalarModel,
    optimizer: optax.GradientTransformation,
    state: tuple[Params, Any],
    batch: dict[str, jax.Array],
    *,
    weights: Callable[[Params], Params] = lambda params: params,
    unplaced: Literal["out", "below"] = "out",
    axis_name: str | None = None,
) -> tuple[tuple[Params, Any], Metrics]:
    """Takes one step of a reward model on ranked lists, by the Plackett-Luce loss.

    The reward is read at the last real token.

    Args:
        model: the reward model.
        optimizer: the optimiser.
        state: (params, opt_state).
        batch: tokens, mask [B, K, S]; ranks [B, K] int, 1 = best, equal = tied, 0 = not placed or no answer (then its
            mask is all false); weight [B], 0 where the ranking is missing.
        unplaced: what an answer without a place means; see `plackett_luce`, also for ties.
        weights: the parameters that learn -> those that the model reads (`LoRAConfig.join`).
        axis_name: the mapped axis of the devices, or None.

    Returns:
        ((params, opt_state), metrics): `loss`, `grad_norm`, and `accuracy` over the pairs whose places differ.
    """
    weight, mask, ranks = batch["weight"], batch["mask"].astype(bool), batch["ranks"]
    there = mask.any(axis=-1) & (weight > 0)[:, None]  # [B, K]

    def loss_fn(params: Params) -> tuple[jax.Array, Metrics]:
        rows = mask.reshape(-1, mask.shape[-1])
        tokens = batch["tokens"].reshape(rows.shape)
        scores = gather_last(model(weights(params), tokens, rows), rows).reshape(ranks.shape)
        loss = mean_loss(plackett_luce(scores, ranks, there, unplaced=unplaced), weight, axis_name)
        placed = there & (ranks > 0)
        better = (ranks[:, :, None] < ranks[:, None, :]) & placed[:, :, None] & placed[:, None, :]
        right = psum(jnp.sum(better & (scores[:, :, None] > scores[:, None, :])), axis_name)
        return loss, {
            "loss": psum(jax.lax.stop_gradient(loss), axis_name),
            "accuracy": right / jnp.maximum(psum(better.sum(), axis_name), 1),
        }

    return descend(loss_fn, optimizer, state, axis_name)


def members_step(
    step: Callable[..., tuple[tuple[Params, Any], Metrics]],
    model: ScalarModel,
    optimizer: optax.GradientTransformation,
    state: tuple[Params, Any],
    batch: dict[str, jax.Array],
    *,
    axis_name: str | None = None,
) -> tuple[tuple[Params, Any], Metrics]:
    """Takes one step of each of N models, each on its own batch, in one program.

    Args:
        step: `reward_step` or `ranking_step`, with its settings.
        model: the reward model, the same for all.
        optimizer: the optimiser.
        state: (params, opt_state), each array with a first axis N.
        batch: the arrays of the step's batch with a second axis N: [B, N, ...].
        axis_name: the mapped axis of the devices, or None.

    Returns:
        ((params, opt_state), metrics): the means over the models; of several models also `member_K/loss` and
        `member_K/accuracy`.
    """
    one = lambda state, batch: step(model, optimizer, state, batch, axis_name=axis_name)
    members = jax.tree.leaves(state)[0].shape[0]
    if members == 1:  # some attention kernels have no batched form
        alone, metrics = one(jax.tree.map(lambda x: x[0], state), {name: x[:, 0] for name, x in batch.items()})
        return jax.tree.map(lambda x: x[None], alone), metrics
    state, metrics = jax.vmap(one, in_axes=(0, 1))(state, batch)
    each = {f"member_{k}/{name}": metrics[name][k] for k in range(members) for name in ("loss", "accuracy")}
    return state, {name: x.mean() for name, x in metrics.items()} | each
