"""A reward model as judge: the scalar at the last token of an answer, on the devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.data.prompts import Record
from rlaif_jax.feedback.sources import FeedbackSource
from rlaif_jax.models.heads import ScalarModel, gather_last
from rlaif_jax.parallel import Runner
from rlaif_jax.types import Feedback, Params, Rollout


def score_sequences(
    model: ScalarModel, params: Params, batch: tuple[jax.Array, jax.Array], *, axis_name: str | None = None
) -> jax.Array:
    """Scalar [B] at the last real token of (tokens, mask) [B, S]."""
    del axis_name
    tokens, mask = batch
    return gather_last(model(params, tokens, mask), mask)


@dataclasses.dataclass(frozen=True, eq=False)
class RewardModelSource(FeedbackSource):
    """A reward model that shares the policy's tokenizer: reads the rollout's tokens, never leaves the devices."""

    model: ScalarModel
    params: Params
    runner: Runner

    @cached_property
    def _placed(self) -> Params:
        """The weights where the compiled function wants them, moved once."""
        return self.runner.place(self.params)

    @cached_property
    def _score(self) -> Any:
        def run(params: Params, batch: Any, *, axis_name: str | None = None) -> jax.Array:
            return score_sequences(self.model, params, batch, axis_name=axis_name)

        return self.runner.map(run)

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout) -> Feedback:
        mask = jnp.concatenate([rollout.prompt_mask, rollout.response_mask], axis=1)
        return Feedback.single(self._score(self._placed, (rollout.tokens, mask)), np.ones(len(answers), bool))
