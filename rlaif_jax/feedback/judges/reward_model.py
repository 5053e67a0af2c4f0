"""A reward model as a reward inside the compiled program: the scalar at the last token of an answer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from rlaif_jax.models.heads import ScalarModel, gather_last
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
