"""Where the loop's judgements come from: callables from a step's answers to values and a mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

from rlaif_jax.data.prompts import Record
from rlaif_jax.types import Rollout


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


@dataclasses.dataclass(frozen=True)
class FunctionSource:
    """Any function of (record, answer) -> number or None; None is a missing judgement."""

    function: Callable[[Record, str], float | None]

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout) -> Feedback:
        values = [self.function(record, answer) for record, answer in zip(records, answers)]
        return Feedback(
            np.array([0.0 if v is None else v for v in values], np.float32), np.array([v is not None for v in values])
        )
