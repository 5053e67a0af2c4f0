"""Views of a batch, padded or packed, and what models compute for its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp

from rlaif_jax.algorithms.packing import Packed, pack, row_answers
from rlaif_jax.models.base import PackedView, PaddedView, View
from rlaif_jax.parallel import mesh_shares, over_mesh
from rlaif_jax.policies.base import Policy
from rlaif_jax.types import Frozen, Params, Rollout

Carry = TypeVar("Carry")


class Sequences(Protocol):
    """Prompts and responses of B rows, as `Rollout` and `Batch` hold them."""

    @property
    def tokens(self) -> jax.Array:
        """Returns the tokens of prompts and answers, [B, P + T] int32."""

    @property
    def prompt_mask(self) -> jax.Array:
        """Returns which tokens of the prompts are real, [B, P] bool."""

    @property
    def response_mask(self) -> jax.Array:
        """Returns which tokens of the answers are real, [B, T] bool."""


def padded_view(batch: Sequences, answers: int = 1) -> PaddedView:
    """Returns the sequences of a batch as a view with one sequence a row.

    Args:
        batch: B sequences of P + T tokens.
        answers: K; K consecutive rows have the same prompt.
    """
    targets = jnp.where(batch.response_mask, batch.tokens[:, batch.prompt_mask.shape[1] :], 0)
    return PaddedView(batch.tokens, batch.prompt_mask, batch.response_mask, targets, answers)


def packed_view(batch: Sequences, rows: Packed, answers: int) -> PackedView:
    """Returns the sequences of a batch as a view with several sequences a row.

    Args:
        batch: B sequences of P + T tokens.
        rows: where each column [R, C] of the packed rows comes from (`packing.pack`).
        answers: K, the most answers to a prompt.
    """
    return PackedView(
        tokens=batch.tokens.reshape(-1)[rows.tokens],
        positions=rows.positions,
        segments=rows.segments,
        answers=rows.answers if answers > 1 else None,
        targets=gather_targets(batch.tokens[:, batch.prompt_mask.shape[1] :], rows),
    )


def gather_targets(x: jax.Array, rows: Packed) -> jax.Array:
    """Gathers x [M, T], a number of each response token, into packed columns [R, C].

    A column of `rows` without a target becomes 0.
    """
    return x.reshape(-1).at[rows.targets].get(mode="fill", fill_value=0)


def packed_turns(
    packed_rows: int, prompt_mask: jax.Array, mask: jax.Array, group: jax.Array, answers: int
) -> tuple[Packed, jax.Array, int]:
    """Returns (the place of every token, [] int32 number of rows used, rows of a turn on each device).

    A turn has at most the columns of `packed_rows` rows of P - 1 + T columns; rows are longer where the K answers to a
    prompt then share it at less cost (`packing.row_answers`).

    Args:
        packed_rows: the setting of that name.
        prompt_mask: [M, P] bool, left padded.
        mask: [M, T] bool, right padded.
        group: [M] int32, equal for answers to the same prompt.
        answers: K, the most answers to a prompt.
    """
    prompt, length = prompt_mask.shape[1], mask.shape[1]
    each = row_answers(packed_rows, prompt, length, answers)
    size = packed_rows * (prompt - 1 + length) // (prompt - 1 + each * length)
    return *pack(prompt_mask, mask, group, each), size


def fold_rows(size: int, packed: Packed, used: jax.Array, fn: Callable[[Carry, Packed], Carry], carry: Carry) -> Carry:
    """Folds `fn(carry, rows)` over the packed rows in use, `size` rows a device at a time.

    The number of turns is that of this step's tokens; the program is the same for all.

    Args:
        size: rows of a turn on each device.
        packed: all rows; the rows in use come first.
        used: [] int32, how many are in use.
        fn: takes the carry and the rows of one turn; empty rows fill up the last turn.
        carry: the value at the start.
    """
    size = size * mesh_shares()
    empty = Packed(tokens=0, targets=jnp.iinfo(jnp.int32).max, positions=0, segments=0, answers=0)  # type: ignore[arg-type]

    def turn(i: jax.Array, carry: Carry) -> Carry:
        rows = i * size + jnp.arange(size)
        part = jax.tree.map(lambda x, fill: x.at[rows].get(mode="fill", fill_value=fill), packed, empty)
        return fn(carry, over_mesh(part))

    return jax.lax.fori_loop(0, (used + size - 1) // size, turn, carry)


def score_rollout(
    fn: Callable[[View], dict[str, jax.Array]], rollout: Rollout, *, answers: int, packed_rows: int
) -> dict[str, jax.Array]:
    """Computes per-token scores of a rollout in either layout, each [B, T] float32 and 0 where masked.

    Args:
        fn: the scores by name of every target of a view.
        rollout: [B, P + T].
        answers: K; the K answers to a prompt are consecutive rows.
        packed_rows: 0: padded; else rows of a turn on each device.
    """
    if not packed_rows:
        out = fn(padded_view(rollout, answers))
        return {name: jnp.where(rollout.response_mask, x, 0.0) for name, x in out.items()}
    shape = rollout.response_mask.shape
    packed, used, size = packed_turns(
        packed_rows, rollout.prompt_mask, rollout.response_mask, jnp.arange(shape[0]) // answers, answers
    )

    def one(carry: dict[str, jax.Array], rows: Packed) -> dict[str, jax.Array]:
        out = fn(packed_view(rollout, rows, answers))
        return {name: x.at[rows.targets].set(out[name], mode="drop") for name, x in carry.items()}

    names = jax.eval_shape(lambda: fn(packed_view(rollout, packed, answers)))
    flat = fold_rows(size, packed, used, one, {name: jnp.zeros(shape[0] * shape[1]) for name in names})
    return {name: x.reshape(shape) for name, x in flat.items()}


def policy_logprobs(
    policy: Policy, params: Params, rollout: Rollout, *, answers: int = 1, frozen: Any = None
) -> jax.Array:
    """Computes the log-probs [B, T] float32 of a rollout's responses under a policy; 0 where masked.

    They are in nats, at the sampling temperature.

    Args:
        policy: the policy.
        params: its parameters.
        rollout: [B, P + T].
        answers: K; the K answers to a prompt are consecutive rows.
        frozen: the `Frozen` whose weights the policy reads (with LoRA, the base weights); None where it reads
            none.
    """
    scores = policy.score(params, frozen or Frozen(), padded_view(rollout, answers))
    return jnp.where(rollout.response_mask, scores.logprobs, 0.0)
