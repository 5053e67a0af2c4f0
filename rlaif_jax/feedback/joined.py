"""Several sources of feedback side by side: one reward each, in a column with a name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rlaif_jax.config import require
from rlaif_jax.data.prompts import Record
from rlaif_jax.feedback.sources import FeedbackSource
from rlaif_jax.types import Feedback, Rollout


@dataclasses.dataclass(frozen=True, eq=False)
class JoinedSource(FeedbackSource):
    """R sources as the R columns of one feedback; a column is missing where its source has not judged.

    Dense rewards are added; a source adds none to an answer that it has not judged.

    Attributes:
        sources: asked one after the other; each gives one reward an answer and no pairs.
        names: the name of each source's reward, for messages and for the counts of missing judgements.
    """

    sources: tuple[FeedbackSource, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        require(len(self.sources) >= 1, "joined.sources is empty")
        require(
            len(self.names) == len(self.sources),
            f"joined.names has {len(self.names)} entries for {len(self.sources)} sources",
        )
        require(all(self.names), "joined.names has an empty name")
        repeated = next((name for name in self.names if self.names.count(name) > 1), None)
        require(repeated is None, f"joined.names has {repeated!r} twice; each reward needs another name")

    def prefetch(self, records: Sequence[Record], answers: Sequence[str]) -> None:
        """Lets every source begin to judge; see `FeedbackSource.prefetch`.

        Args:
            records: the record of each answer's prompt.
            answers: the B answers.
        """
        for source in self.sources:
            source.prefetch(records, answers)

    def reward_names(self) -> tuple[str, ...]:
        """Returns the names of the R rewards."""
        return self.names

    def get_state(self) -> Any:
        """Returns the state of each source, by the name of its reward."""
        return {name: source.get_state() for name, source in zip(self.names, self.sources)}

    def set_state(self, state: Any) -> None:
        """Gives each source its state."""
        for name, source in zip(self.names, self.sources):
            source.set_state(state[name])

    def missing(self) -> Mapping[str, int]:
        """Returns the counts of all sources; each reason begins with the name of its reward."""
        return {
            f"{name}: {reason}": count
            for name, source in zip(self.names, self.sources)
            for reason, count in source.missing().items()
        }

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout) -> Feedback:
        """Returns values and valid [B, R], one column a source; see `FeedbackSource`.

        Raises:
            UserError: a source gives pairs, or not exactly one reward an answer; the message has its name.
        """
        values, columns = [], []
        dense: np.ndarray | None = None
        for name, source in zip(self.names, self.sources):
            judged = jax.device_get(source(records, answers, rollout))
            require(judged.pairs is None, f"reward {name}: the source compares answers in pairs; it cannot be a column")
            shape = np.shape(judged.values)
            require(
                shape == np.shape(judged.valid) == (len(answers), 1),
                f"reward {name}: the source gave values of shape {shape} and valid of shape {np.shape(judged.valid)} for "
                f"{len(answers)} answers; a column needs one reward an answer",
            )
            valid = np.asarray(judged.valid, bool)
            values.append(np.where(valid, np.asarray(judged.values, np.float32), np.float32(0)))
            columns.append(valid)
            if judged.token_rewards is not None:
                part = np.where(valid, np.asarray(judged.token_rewards, np.float32), np.float32(0))
                dense = part if dense is None else dense + part
        return Feedback(np.concatenate(values, axis=1), np.concatenate(columns, axis=1), dense)
