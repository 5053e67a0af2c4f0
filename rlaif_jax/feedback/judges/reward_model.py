"""A reward model as a reward inside the compiled program: the scalar at the last token of an answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.data.prompts import padded
from rlaif_jax.feedback.judges.batching import in_batches
from rlaif_jax.feedback.judges.reward_pairs import bucket_widths
from rlaif_jax.models.heads import ScalarModel, gather_last
from rlaif_jax.models.lora import joined
from rlaif_jax.parallel import Runner
from rlaif_jax.rewards.shaping import ensemble_cautious, ensemble_mean, ensemble_worst
from rlaif_jax.types import Feedback, Params, Rollout


def score_sequences(
    model: ScalarModel, params: Params, batch: tuple[jax.Array, jax.Array], *, axis_name: str | None = None
) -> jax.Array:
    """Computes the scalar [B] float32 of a reward model at the last real token of each sequence.

    Args:
        model: the reward model.
        params: its parameters.
        batch: (tokens [B, S] int32, mask [B, S] bool); the padding may be on either side.
        axis_name: not used; `Runner.map` passes it.
    """
    del axis_name
    tokens, mask = batch
    return gather_last(model(params, tokens, mask), mask)


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A `DeviceReward`: a reward model's scalar at the last token of each answer.

    The reward model reads the rollout's tokens, so it has the policy's tokenizer.

    Attributes:
        model: the reward model.
    """

    model: ScalarModel

    def __call__(self, params: Params, rollout: Rollout, *, axis_name: str | None = None) -> Feedback:
        """Returns the score of each answer; `params` are the reward model's."""
        mask = jnp.concatenate([rollout.prompt_mask, rollout.response_mask], axis=1)
        scores = score_sequences(self.model, params, (rollout.tokens, mask), axis_name=axis_name)
        return Feedback.single(scores, jnp.ones(scores.shape, bool))


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores texts by every member of an ensemble.

    Attributes:
        model: the reward model.
        runner: the devices.
        batch_size: texts of a compiled call.
        pad_id: the token of empty columns.
        base: the weights under the members' adapters, where the runner has them; None: the members are whole.
    """

    model: ScalarModel
    runner: Runner
    batch_size: int
    pad_id: int
    base: Params = None

    @cached_property
    def _score(self) -> Any:
        return self.runner.map(partial(score_members, self.model))

    def __call__(self, params: Params, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> np.ndarray:
        """Returns scores [n, 2, N] float64 of n pairs of texts by the N members of an ensemble.

        Args:
            params: of the members, each array with a first axis N.
            pairs: the tokens of the first and the second text.
        """
        rows = [ids for both in pairs for ids in both]
        lengths = np.array([len(ids) for ids in rows])
        widths = bucket_widths(lengths)
        bucket = np.searchsorted(widths, lengths)
        scores = np.zeros((len(rows), len(jax.tree.leaves(params)[0])))
        for number, width in enumerate(widths):
            chosen = np.flatnonzero(bucket == number)
            batch = padded([rows[i] for i in chosen], width, self.pad_id, "left")
            scores[chosen] = in_batches(partial(self._score, (self.base, params)), batch, self.batch_size)
        return scores.reshape(len(pairs), 2, -1)


def score_members(
    model: ScalarModel,
    params: tuple[Params, Params],
    batch: tuple[jax.Array, jax.Array],
    *,
    axis_name: str | None = None,
) -> jax.Array:
    """Computes the scores [B, N] float32 of N members at the last real token of B texts.

    Args:
        model: the reward model.
        params: (the weights under the adapters or None, the members' parameters, each array with a first axis N).
        batch: (tokens [B, S] int32, mask [B, S] bool).
        axis_name: not used; `Runner.map` passes it.
    """
    del axis_name
    base, members = params
    one = lambda member: score_sequences(model, joined(model.lora, base, member), batch)
    if jax.tree.leaves(members)[0].shape[0] == 1:  # some attention kernels have no batched form
        return one(jax.tree.map(lambda x: x[0], members))[:, None]
    return jax.vmap(one, out_axes=1)(members)


Combine = Literal["mean", "worst", "cautious"]
"""How the scores of an ensemble become one; see `shaping.ensemble_mean`, `ensemble_worst`, `ensemble_cautious`."""


def score_ensemble(
    model: ScalarModel,
    combine: Combine,
    coef: float,
    members: Params,
    batch: tuple[jax.Array, jax.Array],
    *,
    axis_name: str | None = None,
) -> jax.Array:
    """Computes one score [B] float32 of N members; NaN where that of a member is not finite.

    Args:
        model: the reward model.
        combine: how the members' scores become one; a single member's score is taken as it is.
        coef: weight of the members' variance, where they are combined cautiously.
        members: their parameters, each array with a first axis N.
        batch: (tokens [B, S] int32, mask [B, S] bool).
        axis_name: not used; `Runner.map` passes it.
    """
    scores = score_members(model, (None, members), batch, axis_name=axis_name)
    if scores.shape[1] == 1:
        return scores[:, 0]
    valid, least = jnp.isfinite(scores), scores.shape[1]
    if combine == "cautious":
        found = ensemble_cautious(scores, valid, coef, least=least)
    else:
        found = (ensemble_worst if combine == "worst" else ensemble_mean)(scores, valid, least=least)
    return jnp.where(found.valid, found.values, jnp.nan)
