"""Which groups of answers teach something: those whose rewards differ.

Dynamic sampling (DAPO, Yu 2025, section 3.2): a step draws more prompts than it learns from. The number that is kept is fixed,
so that one compiled program serves all steps.
"""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp

from rlaif_jax.config import require
from rlaif_jax.parallel import global_rows
from rlaif_jax.types import RewardBatch

T = TypeVar("T")


def check_oversample(oversample: int, answers: int) -> None:
    """Raises UserError where prompts cannot be chosen by the spread of their answers' rewards.

    Args:
        oversample: prompts drawn for each prompt that is learned from.
        answers: K, the answers that are drawn for a prompt; 0: the answers are recorded ones.
    """
    require(
        oversample == 1 or answers >= 2,
        f"train.oversample is {oversample}: it keeps the prompts whose answers have different rewards, but "
        f"{'the answers are recorded' if answers == 0 else 'each prompt gets one answer'}: draw 2 or more answers to each "
        "prompt, or set train.oversample=1",
    )


@partial(jax.jit, static_argnames="answers")
def group_spread(rewards: RewardBatch, answers: int) -> jax.Array:
    """Returns whether the rewards of each prompt's K answers differ, [G] bool.

    The reward is the whole one, after weights and shaping. A group with fewer than 2 known rewards has no spread. Where the
    feedback compares answers in pairs, a verdict other than a tie is a spread, too.

    Args:
        rewards: of B answers; the K answers to a prompt are consecutive rows.
        answers: K.
    """
    known = rewards.valid.astype(bool).reshape(-1, answers)
    total = rewards.total.reshape(-1, answers)
    lowest = jnp.where(known, total, jnp.inf).min(-1)
    highest = jnp.where(known, total, -jnp.inf).max(-1)
    spread = lowest < highest
    if rewards.pairs is not None:
        pairs = jnp.asarray(rewards.pairs)
        decided = (pairs != 0.5) & ~jnp.eye(answers, dtype=bool)
        if rewards.pairs_valid is not None:
            decided &= jnp.asarray(rewards.pairs_valid, bool)
        spread |= decided.any((1, 2))
    return spread


def spread_first(spread: jax.Array, count: int) -> jax.Array:
    """Returns the places of `count` groups, [count] int32: those with spread, then others.

    Both kinds come in their order.

    Args:
        spread: [G] bool.
        count: how many are kept, at most G.
    """
    return jnp.argsort(~spread, stable=True)[:count].astype(jnp.int32)


def keep_groups(tree: T, spread: jax.Array, oversample: int, axis_name: str | None = None) -> T:
    """Returns the arrays of the groups that a step learns from, 1 in `oversample`, by `spread_first`.

    The groups of all devices are ordered together: another number of devices keeps the same ones, and the kept ones are
    split evenly over the devices.

    Args:
        tree: a pytree of arrays, each with the same number of consecutive rows for each of this device's groups.
        spread: [G] bool, of this device's groups.
        oversample: groups for each that is kept.
        axis_name: the mapped axis of the devices, or None.
    """
    groups = spread.shape[0]
    of_all = spread if axis_name is None else jax.lax.all_gather(spread, axis_name, tiled=True)
    chosen = spread_first(of_all, of_all.shape[0] // oversample)
    grouped = jax.tree.map(lambda x: x.reshape(groups, x.shape[0] // groups, *x.shape[1:]), tree)
    kept: T = global_rows(grouped, chosen, axis_name)
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), kept)
