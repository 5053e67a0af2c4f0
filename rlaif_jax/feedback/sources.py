"""Where the loop's judgements come from: callables from a step's answers to values and a mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.data.prompts import Record
from rlaif_jax.feedback.judges.language_model import LanguageModelJudge
from rlaif_jax.models.heads import ScalarModel, gather_last
from rlaif_jax.parallel import Runner
from rlaif_jax.types import Params, Rollout


class Feedback(NamedTuple):
    """Judgements of B answers at the border to the device side.

    values [B]: scores of whole answers. valid [B]: false where a judgement is missing. token_rewards [B, T]: dense
    rewards of the response tokens, added where they belong beside the score; None = none. The scores are normalised by
    the run, dense rewards by whoever gives them.
    """

    values: np.ndarray | jax.Array
    valid: np.ndarray | jax.Array
    token_rewards: np.ndarray | jax.Array | None = None


class FeedbackSource(Protocol):
    """Judges a step's answers. records [B] are the source records of the prompts, answers [B] the decoded texts.

    A source that may be slow can also have `prefetch(records, answers)`, which begins to judge and returns at once.
    """

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout) -> Feedback: ...


def score_sequences(
    model: ScalarModel, params: Params, batch: tuple[jax.Array, jax.Array], *, axis_name: str | None = None
) -> jax.Array:
    """Scalar [B] at the last real token of (tokens, mask) [B, S]."""
    del axis_name
    tokens, mask = batch
    return gather_last(model(params, tokens, mask), mask)


@dataclasses.dataclass(frozen=True, eq=False)
class RewardModelSource:
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
        return Feedback(self._score(self._placed, (rollout.tokens, mask)), np.ones(len(answers), bool))


@dataclasses.dataclass(frozen=True, eq=False)
class DirectScoreSource:
    """Direct RLAIF: the judge's expected score of each answer is its reward (Lee 2023, section 2.2.2)."""

    judge: LanguageModelJudge

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout) -> Feedback:
        scores = self.judge.score([str(record["prompt"]) for record in records], answers)
        return Feedback(scores.expected, scores.valid)


@dataclasses.dataclass(frozen=True)
class FunctionSource:
    """Any function of (record, answer) -> number or None; None is a missing judgement."""

    function: Callable[[Record, str], float | None]

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout) -> Feedback:
        values = [self.function(record, answer) for record, answer in zip(records, answers)]
        return Feedback(
            np.array([0.0 if v is None else v for v in values], np.float32), np.array([v is not None for v in values])
        )
