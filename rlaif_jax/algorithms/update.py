"""The one update that all algorithms share: epochs x minibatches in a single scan.

An algorithm gives the update a token loss, a sequence loss, or both. A sequence loss reads the summed log-probs of whole
answers (pairs, groups, or everything in the minibatch). Its gradient with respect to these sums is taken first; then it is
propagated back through the tokens with the rest. That is exact in padded rows, in packed rows that come in several turns, and
over devices, however the answers of a pair are cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax

from rlaif_jax.algorithms.packing import Packed
from rlaif_jax.algorithms.scoring import fold_rows, gather_targets, packed_turns, packed_view, padded_view
from rlaif_jax.config import require
from rlaif_jax.models.base import View
from rlaif_jax.parallel import global_rows, pmax, psum
from rlaif_jax.policies.base import Policy
from rlaif_jax.types import PERMUTATION, Metrics, Params, TrainState, step_key

# Sums of this device's answers [M] -> (slopes of the sequence loss [M], (the loss, its metrics)).
Pull = Callable[[jax.Array], tuple[jax.Array, tuple[jax.Array, Metrics]]]


@flax.struct.dataclass
class Batch:
    """B answers to learn from.

    Attributes:
        tokens: [B, P + T] int32.
        prompt_mask: [B, P] bool.
        response_mask: [B, T] bool.
        mask: [B, T] bool, the response mask without answers whose judgement is missing.
        fields: pytree of [B, T] float32, what the token loss reads.
        sequences: pytree of [B, ...], what the sequence loss reads.
    """

    tokens: jax.Array
    prompt_mask: jax.Array
    response_mask: jax.Array
    mask: jax.Array
    fields: Any = None
    sequences: Any = None


class Totals(NamedTuple):
    """Counts over the whole minibatch, on all devices; at least 1.

    Attributes:
        tokens: valid tokens.
        sequences: answers with a valid token.
        groups: prompts.
    """

    tokens: jax.Array
    sequences: jax.Array
    groups: jax.Array


class Scored(NamedTuple):
    """What the models that learn compute for every target of a view, float32.

    Attributes:
        logprobs: of the policy at the sampling temperature.
        entropies: 0 unless the algorithm asks for them.
        values: of the critic; None without one.
    """

    logprobs: jax.Array
    entropies: jax.Array
    values: jax.Array | None = None


class TokenLoss(Protocol):
    """A loss that is a sum over tokens."""

    def __call__(self, scored: Scored, fields: Any, mask: jax.Array, totals: Totals) -> tuple[jax.Array, Metrics]:
        """Returns the contribution of some tokens to the minibatch's loss, and to its metrics.

        Contributions of all turns and devices add up, so each must already be divided by a count of `totals`. Metrics
        add up too, except those named `*_max`, which combine by maximum.

        Args:
            scored: of the targets [B, T] or [R, C].
            fields: the batch's fields in the layout of the targets.
            mask: true where a target counts.
            totals: counts of the whole minibatch.
        """


class SequenceLoss(Protocol):
    """A loss on the summed log-probs of whole answers."""

    def __call__(self, sums: jax.Array, sequences: Any, valid: jax.Array, totals: Totals) -> tuple[jax.Array, Metrics]:
        """Returns the loss of the whole minibatch and its metrics, the same on every device.

        Args:
            sums: [M] log-probs summed over the valid tokens of each of the minibatch's answers; the answers to a prompt
                are consecutive.
            sequences: the batch's `sequences`, [M, ...].
            valid: [M] bool, answers with a valid token.
            totals: counts of the whole minibatch.
        """


@dataclasses.dataclass(frozen=True)
class Update:
    """The update of an algorithm: its losses, its optimisers and its cut into minibatches.

    Attributes:
        score: (params, view) -> `Scored`.
        optimizers: one for each entry of the parameters, each with its own clip.
        learning_rates: one for each optimiser, [] float32.
        num_epochs: passes over the batch.
        num_minibatches: optimiser steps of a pass.
        packed_rows: 0: padded; else rows of a turn on each device.
        answers: K; the K answers to a prompt are consecutive rows of the batch.
        unit: what a minibatch must not cut.
        token_loss: None: no part of the loss is a sum over tokens.
        sequence_loss: None: no part of the loss reads whole answers.
    """

    score: Callable[[Params, View], Scored]
    optimizers: Mapping[str, optax.GradientTransformationExtraArgs]
    learning_rates: Mapping[str, jax.Array]
    num_epochs: int
    num_minibatches: int
    packed_rows: int
    answers: int
    unit: Literal["answer", "group"] = "answer"
    token_loss: TokenLoss | None = None
    sequence_loss: SequenceLoss | None = None

    def __call__(self, state: TrainState, batch: Batch, *, axis_name: str | None = None) -> tuple[TrainState, Metrics]:
        """Runs all epochs and returns the state with new parameters and the metrics of every minibatch.

        Minibatches are drawn from the global batch by a new permutation an epoch, from the state's (seed, step): of whole
        groups where they fit, so that a prompt is computed once for its answers, else of rows. A minibatch with a
        non-finite loss or gradient changes nothing; `nonfinite` marks it. Nor does one whose gradient is 0, because nothing
        was judged, say: moments from before would move the parameters all the same.

        Args:
            state: the state.
            batch: this device's rows of the global batch.
            axis_name: the mapped axis of the devices, or None.

        Returns:
            (state with new params, opt_state and step; metrics [epochs * minibatches] each).
        """
        mask = batch.mask
        devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
        rows = mask.shape[0] * devices
        size = rows // self.num_minibatches
        check_minibatches(rows, self.num_minibatches, devices, 1 if self.unit == "answer" else self.answers)
        key = step_key(state.seed, state.step, PERMUTATION)
        group = self.answers if size % self.answers == 0 else 1
        order = jax.vmap(lambda k: jax.random.permutation(k, rows // group))(jax.random.split(key, self.num_epochs))
        order = order[..., None] * group + jnp.arange(group)
        shared = group if size // devices % group == 0 else 1  # a device may hold a part of a group only
        above = 0 if axis_name is None else jax.lax.axis_index(axis_name) * mask.shape[0]
        prompt = (above + jnp.arange(mask.shape[0])) // self.answers

        def update(carry: tuple[Params, Any], chosen: jax.Array) -> tuple[tuple[Params, Any], Metrics]:
            minibatch, of_prompt = global_rows((batch, prompt), chosen, axis_name)
            grads, loss, metrics = self.gradients(carry[0], minibatch, axis_name, shared=shared, group=of_prompt)
            norms = {f"grad_norm/{part}": optax.tree.norm(grads[part]) for part in grads}
            finite = jnp.isfinite(loss) & jnp.all(jnp.isfinite(jnp.stack(list(norms.values()))))
            metrics |= norms | {"loss": loss, "nonfinite": 1.0 - finite.astype(jnp.float32)}
            # A branch works in place; choosing between old and new numbers one by one would hold both.
            teaches = finite & (sum(norms.values()) > 0)
            return jax.lax.cond(teaches, lambda c: self._descend(grads, norms, c), lambda c: c, carry), metrics

        (params, opt_state), history = jax.lax.scan(
            update, (state.params, state.opt_state), order.reshape(self.num_epochs * self.num_minibatches, size)
        )
        return dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1), history

    def _descend(self, grads: Params, norms: Metrics, carry: tuple[Params, Any]) -> tuple[Params, Any]:
        """Takes the optimiser step of every part."""
        new_params, new_opt = {}, {}
        for part, tx in self.optimizers.items():
            updates, new_opt[part] = tx.update(
                grads[part],
                carry[1][part],
                carry[0][part],
                norm=norms[f"grad_norm/{part}"],
                learning_rate=self.learning_rates[part],
            )
            new_params[part] = optax.apply_updates(carry[0][part], updates)
        return new_params, new_opt

    def gradients(
        self,
        params: Params,
        batch: Batch,
        axis_name: str | None = None,
        *,
        shared: int = 1,
        group: jax.Array | None = None,
    ) -> tuple[Params, jax.Array, Metrics]:
        """Returns (gradient, loss, metrics) of the global minibatch.

        Args:
            params: parameters by part.
            batch: this device's rows of the minibatch.
            axis_name: the mapped axis of the devices, or None.
            shared: consecutive rows that have the same prompt, which is then computed once.
            group: [M] int32, equal for rows of the same prompt, for packed rows; None: by `shared`.
        """
        totals = count_totals(batch, self.answers, axis_name)
        pull = lambda sums: self._pull(sums, batch, totals, axis_name)
        if not self.packed_rows:
            (loss, aux), grads = self._part(params, padded_view(batch, shared), batch.fields, batch.mask, totals, pull)
        else:
            if group is None:
                group = jnp.arange(batch.mask.shape[0]) // shared
            (loss, aux), grads = self._packed(params, batch, totals, group, pull)
        (extra_loss, of_sequences), of_tokens = aux
        metrics = {name: (pmax if name.endswith("_max") else psum)(x, axis_name) for name, x in of_tokens.items()}
        return psum(grads, axis_name), psum(loss, axis_name) + extra_loss, metrics | of_sequences

    def _pull(
        self, sums: jax.Array, batch: Batch, totals: Totals, axis_name: str | None
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        """Returns the sequence loss's slopes [M] of this device's answers, and (loss, metrics) of all."""
        assert self.sequence_loss is not None
        gather = lambda x: x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)
        everyone = jax.tree.map(gather, (jax.lax.stop_gradient(sums), batch.sequences, batch.mask.any(-1)))
        (loss, metrics), slope = jax.value_and_grad(self.sequence_loss, has_aux=True)(*everyone, totals)
        if axis_name is not None:
            start = jax.lax.axis_index(axis_name) * sums.shape[0]
            slope = jax.lax.dynamic_slice_in_dim(slope, start, sums.shape[0])
        return slope, (loss, jax.lax.stop_gradient(metrics))

    def _part(
        self,
        params: Params,
        view: View,
        fields: Any,
        mask: jax.Array,
        totals: Totals,
        pull: Pull,
        weights: jax.Array | None = None,
    ) -> tuple[tuple[jax.Array, tuple[tuple[jax.Array, Metrics], Metrics]], Params]:
        """Returns losses, metrics and gradient of some tokens.

        They come as ((token loss, ((sequence loss, its metrics), token metrics)), gradient of both losses).

        The slopes of a sequence loss with respect to the targets' log-probs are `weights` where they are known, else
        `pull` computes them from this pass.
        """

        def loss_fn(params: Params) -> tuple[jax.Array, Any]:
            scored = self.score(params, view)
            loss, metrics = jnp.zeros([]), dict[str, jax.Array]()
            if self.token_loss is not None:
                loss, metrics = self.token_loss(scored, fields, mask, totals)
            surrogate = loss
            of_sequences: tuple[jax.Array, Metrics] = (jnp.zeros([]), {})
            if self.sequence_loss is not None:
                logprobs = jnp.where(mask, scored.logprobs, 0.0)
                if weights is None:
                    of_answers, of_sequences = pull(logprobs.sum(-1))
                surrogate = loss + jnp.sum((of_answers[:, None] if weights is None else weights) * logprobs)
            return surrogate, (loss, (of_sequences, jax.lax.stop_gradient(metrics)))

        (_, (loss, aux)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return (loss, aux), grads

    def _packed(
        self,
        params: Params,
        batch: Batch,
        totals: Totals,
        group: jax.Array,
        pull: Pull,
    ) -> tuple[tuple[jax.Array, tuple[tuple[jax.Array, Metrics], Metrics]], Params]:
        """Returns what `_part` does, over packed rows that come in several turns."""
        packed, used, size = packed_turns(self.packed_rows, batch.prompt_mask, batch.mask, group, self.answers)
        of_sequences: tuple[jax.Array, Metrics] = (jnp.float32(0), {})
        slopes: jax.Array | None = None
        if self.sequence_loss is not None:

            def add_sums(sums: jax.Array, rows: Packed) -> jax.Array:
                logprobs = self.score(params, packed_view(batch, rows, self.answers)).logprobs
                return sums.at[rows.targets // batch.mask.shape[1]].add(logprobs, mode="drop")

            sums = fold_rows(size, packed, used, add_sums, jnp.zeros(batch.mask.shape[0]))
            of_answers, of_sequences = pull(sums)
            slopes = jnp.broadcast_to(of_answers[:, None], batch.mask.shape)

        def turn(rows: Packed) -> Any:
            fields, mask = jax.tree.map(lambda x: gather_targets(x, rows), (batch.fields, batch.mask))
            weights = None if slopes is None else gather_targets(slopes, rows)
            view = packed_view(batch, rows, self.answers)
            (loss, (_, metrics)), grads = self._part(params, view, fields, mask, totals, pull, weights)
            return (loss, metrics), grads

        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(turn, packed))
        (loss, metrics), grads = fold_rows(size, packed, used, lambda sums, rows: _added(sums, turn(rows)), zero)
        return (loss, (of_sequences, metrics)), grads


def _added(a: Any, b: Any) -> Any:
    """Returns the sum of two ((loss, metrics), gradient); metrics named `*_max` combine by maximum."""
    ((loss, metrics), grads), ((more, others), further) = a, b
    add = lambda name, x, y: jnp.maximum(x, y) if name.endswith("_max") else x + y
    together = {name: add(name, x, others[name]) for name, x in metrics.items()}
    return (loss + more, together), jax.tree.map(jnp.add, grads, further)


def count_totals(batch: Batch, answers: int, axis_name: str | None) -> Totals:
    """Returns the counts of a minibatch over all devices; a count of 0 becomes 1.

    Args:
        batch: this device's part of the minibatch.
        answers: K, the rows of a group.
        axis_name: the mapped axis of the devices, or None.
    """
    at_least_1 = lambda x: jnp.maximum(psum(x, axis_name), 1.0)
    return Totals(
        tokens=at_least_1(jnp.sum(batch.mask.astype(jnp.float32))),
        sequences=at_least_1(jnp.sum(batch.mask.any(-1).astype(jnp.float32))),
        groups=at_least_1(jnp.float32(batch.mask.shape[0] / answers)),
    )


def check_packed(packed_rows: int, policy: Policy) -> None:
    """Raises UserError where packed rows are asked of a policy that reads padded rows only."""
    require(
        not packed_rows or policy.reads_packed,
        f"packed_rows is {packed_rows}, but this policy's model reads padded rows only: set packed_rows=0 of the algorithm",
    )


def check_minibatches(sequences: int, num_minibatches: int, devices: int, unit: int) -> None:
    """Raises UserError where sequences cannot be cut into even minibatches of whole units.

    Args:
        sequences: answers of a step, over all devices.
        num_minibatches: minibatches of a pass.
        devices: they share each minibatch evenly.
        unit: answers that a minibatch must not cut, 1 or K.
    """
    size = sequences // num_minibatches
    require(
        size * num_minibatches == sequences and size % devices == 0,
        f"{sequences} sequences (prompts_per_step x answers to each) cannot be cut into {num_minibatches} minibatches "
        f"over {devices} devices: num_minibatches x devices must divide them",
    )
    require(
        size % unit == 0,
        f"a minibatch of {size} sequences cuts the {unit} answers to a prompt, which this algorithm compares: "
        f"use fewer minibatches than {num_minibatches}, or more prompts_per_step",
    )
