"""The contracts of feedback: sources on the host, rewards on the devices; and the plain sources."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from rlaif_jax.config import UserError, require
from rlaif_jax.data.prompts import Record
from rlaif_jax.parallel import Runner
from rlaif_jax.types import Feedback, Params, Rollout


class FeedbackSource(Protocol):
    """Judges a step's answers on the host; it may wait, fail and cost money.

    A source derives from this class and writes `__call__`; the other methods do nothing unless it writes them too.
    """

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout) -> Feedback:
        """Returns the feedback of B answers of this process, values and valid [B, R].

        Args:
            records: [B] the source record of each answer's prompt.
            answers: [B] decoded texts.
            rollout: the same answers as arrays.
        """

    def prefetch(self, records: Sequence[Record], answers: Sequence[str]) -> None:
        """Begins to judge answers and returns at once, while the devices draw further ones.

        Args:
            records: the record of each answer's prompt.
            answers: the texts.
        """
        return

    def reward_names(self) -> tuple[str, ...]:
        """Returns the names of the R rewards for metrics and the page; empty: they have numbers."""
        return ()

    def get_state(self) -> Any:
        """Returns what the checkpoint keeps of the source, as JSON; None: the source keeps nothing."""
        return None

    def set_state(self, state: Any) -> None:
        """Takes up the state of a resumed run."""
        return

    def missing(self) -> Mapping[str, int]:
        """Returns the number of missing judgements by reason since the source was built, over resumes too."""
        return {}


class Missing(NamedTuple):
    """A judgement that is missing; `reason` says why, in the words that the run counts."""

    reason: str


MAX_REASONS = 50  # a reason that quotes an answer must not let the checkpoint grow without end
OTHER_REASONS = "other reasons"


class CountingSource(FeedbackSource):
    """A source that counts its missing judgements by reason; the counts are part of the checkpoint."""

    @cached_property
    def _missing(self) -> Counter[str]:
        return Counter()

    def missing(self) -> Mapping[str, int]:
        """Returns the counts by reason; reasons after the first 50 count together as "other reasons"."""
        return dict(self._missing)

    def get_state(self) -> Any:
        """Returns the counts."""
        return {"missing": self.missing()}

    def set_state(self, state: Any) -> None:
        """Continues the counts of a resumed run; None is the state of a run that did not count."""
        self._missing.clear()
        self._missing.update({} if state is None else state["missing"])

    def feedback(self, judged: Sequence[float | Missing]) -> Feedback:
        """Returns one reward an answer as `Feedback`, and counts those that are missing.

        Args:
            judged: [B] the rewards; `Missing` where there is no judgement.
        """
        valid = [not isinstance(value, Missing) for value in judged]
        for value in judged:
            if isinstance(value, Missing):
                full = len(self._missing) >= MAX_REASONS and value.reason not in self._missing
                self._missing[OTHER_REASONS if full else value.reason] += 1
        numbers = [0.0 if isinstance(value, Missing) else value for value in judged]
        return Feedback.single(np.array(numbers, np.float32), np.array(valid, bool))

    def counted(self, feedback: Feedback, reason: str) -> Feedback:
        """Returns `feedback`, one reward an answer, and counts its missing ones under one reason."""
        missing = int(np.size(feedback.valid) - np.sum(feedback.valid))
        self._missing.update({reason: missing} if missing else {})
        return feedback


def other_answer(record: Record, field: str) -> str | Missing:
    """Returns the answer to compare with, in a field of a record; `Missing` without one."""
    other = record.get(field)
    return (
        other if isinstance(other, str) else Missing(f"the record has no text in its field {field!r} to compare with")
    )


class DeviceReward(Protocol):
    """A reward that is computed inside the compiled program: a reward model, a rule on tokens. Pure `jnp`."""

    def __call__(self, params: Params, rollout: Rollout, *, axis_name: str | None = None) -> Feedback:
        """Returns the feedback of B answers; `params` are its entry of `Frozen.rewards`."""


@dataclasses.dataclass(frozen=True, eq=False)
class DeviceSource(FeedbackSource):
    """A `DeviceReward` as a source of its feedback, in a separate compiled program.

    Evaluations use it to judge answers before and after training.

    Attributes:
        reward: the reward.
        params: its parameters.
        runner: the devices.
    """

    reward: DeviceReward
    params: Params
    runner: Runner

    @cached_property
    def _placed(self) -> Params:
        """The parameters on the devices of the runner, moved once."""
        return self.runner.place(self.params)

    @cached_property
    def _judge(self) -> Callable[[Params, Rollout], Feedback]:
        return self.runner.map(self.reward)

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout) -> Feedback:
        """Returns the reward of each answer; see `FeedbackSource`."""
        return self._judge(self._placed, rollout)


@dataclasses.dataclass(frozen=True)
class FunctionSource(FeedbackSource):
    """Feedback by a function of (record, answer) that returns a number, or None for a missing judgement."""

    function: Callable[[Record, str], float | None]

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout) -> Feedback:
        """Returns the function's numbers; see `FeedbackSource`."""
        values = [self.function(record, answer) for record, answer in zip(records, answers)]
        return Feedback.single(
            np.array([0.0 if v is None else v for v in values], np.float32), np.array([v is not None for v in values])
        )


@dataclasses.dataclass(frozen=True)
class RecordedPreferences(FeedbackSource):
    """Feedback on recorded pairs, for offline methods: P(the first answer is better) is in the record.

    Attributes:
        field: name of the field, a number in [0, 1]; a record without it prefers its first answer for certain.
    """

    field: str = "probability"

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout) -> Feedback:
        """Returns pairs [G, 2, 2] and no values; the two answers to a prompt are adjacent."""
        require(
            len(records) % 2 == 0, f"recorded preferences need two answers to each prompt, not {len(records)} in all"
        )
        first = np.array([float(record.get(self.field, 1.0)) for record in records[::2]], np.float32)
        pairs = np.full((len(first), 2, 2), 0.5, np.float32)
        pairs[:, 0, 1], pairs[:, 1, 0] = first, 1 - first
        valid = np.broadcast_to(~np.eye(2, dtype=bool), pairs.shape)
        none = np.zeros((len(records), 0), np.float32)
        return Feedback(none, none.astype(bool), None, pairs, np.ascontiguousarray(valid))


@dataclasses.dataclass(frozen=True, eq=False)
class MixedSource(FeedbackSource):
    """Several sources as one: the weighted mean of those that judged an answer; each gives one reward.

    Where no source judged it, the judgement is missing.

    Attributes:
        sources: asked one after the other.
        weights: one a source, positive; of an answer, those of the sources that judged it count.
        standardise: bring each source to mean 0 and deviation 1 over its valid answers of the step first. For sources on
            different scales: otherwise filling one's gaps with another's values moves them by the difference in scale.
    """

    sources: tuple[FeedbackSource, ...]
    weights: tuple[float, ...] = ()
    standardise: bool = False

    def __post_init__(self) -> None:
        require(len(self.sources) >= 1, "mixed.sources is empty")
        require(
            not self.weights or len(self.weights) == len(self.sources),
            f"mixed.weights has {len(self.weights)} entries for {len(self.sources)} sources",
        )
        require(
            all(w > 0 and math.isfinite(w) for w in self.weights), f"mixed.weights must be positive: {self.weights}"
        )

    def prefetch(self, records: Sequence[Record], answers: Sequence[str]) -> None:
        """Lets every source begin to judge; see `FeedbackSource.prefetch`.

        Args:
            records: the record of each answer's prompt.
            answers: the B answers.
        """
        for source in self.sources:
            source.prefetch(records, answers)

    def get_state(self) -> Any:
        """Returns the states of all sources."""
        return [source.get_state() for source in self.sources]

    def set_state(self, state: Any) -> None:
        """Gives every source its state."""
        for source, own in zip(self.sources, state):
            source.set_state(own)

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout) -> Feedback:
        """Returns the weighted mean of the sources that judged each answer; see `FeedbackSource`."""
        total, weight = np.zeros(len(answers)), np.zeros(len(answers))
        dense: np.ndarray | None = None
        for source, share in zip(self.sources, self.weights or (1.0,) * len(self.sources)):
            judged = jax.device_get(source(records, answers, rollout))
            require(judged.values.shape[1] == 1, "mixed.sources: each must give one reward an answer")
            valid = np.asarray(judged.valid[:, 0], bool)
            values = np.where(valid, np.asarray(judged.values[:, 0], float), 0.0)
            if self.standardise and valid.any():
                spread = values[valid].std()
                values = np.where(valid, (values - values[valid].mean()) / (spread if spread > 1e-8 else 1.0), 0.0)
            total, weight = total + share * values, weight + share * valid
            if judged.token_rewards is not None:
                part = share * np.where(valid[:, None], np.asarray(judged.token_rewards, float), 0.0)
                dense = part if dense is None else dense + part
        scale = np.where(weight > 0, weight, 1.0)
        return Feedback.single(
            (total / scale).astype(np.float32),
            weight > 0,
            None if dense is None else (dense / scale[:, None]).astype(np.float32),
        )


def collect_feedback(
    source: FeedbackSource | None, records: Sequence[Record], answers: Sequence[str], rollout: Rollout, step: int
) -> Feedback:
    """Returns the feedback on a step's answers as NumPy arrays; without a source it has no columns.

    Args:
        source: judges on the host, or None.
        records: the record of each answer's prompt.
        answers: the texts.
        rollout: the answers as arrays.
        step: for messages.

    Raises:
        UserError: wrong shapes, or a judgement that claims to be valid and is not a finite number.
    """
    if source is None:
        return Feedback(np.zeros((len(answers), 0), np.float32), np.zeros((len(answers), 0), bool))
    judged = jax.device_get(source(records, answers, rollout))
    values, valid = np.asarray(judged.values, np.float32), np.asarray(judged.valid, bool)
    require(
        values.ndim == 2 and values.shape == valid.shape and len(values) == len(answers),
        f"step {step}: the feedback source returned values of shape {values.shape} and valid of shape {valid.shape} for "
        f"{len(answers)} answers; both must be [answers, rewards]",
    )
    dense = None if judged.token_rewards is None else np.asarray(judged.token_rewards, np.float32)
    wrong = (valid & ~np.isfinite(values)).any(-1)
    if dense is not None:
        wrong |= valid.any(-1) & ~np.isfinite(dense).all(-1)
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        value = values[at, 0] if values.shape[1] == 1 else values[at].tolist()
        raise UserError(
            f"step {step}: the reward of answer {at} is {value}"
            f"{'' if dense is None else f' with dense rewards {dense[at]}'} (prompt "
            f"{str(records[at].get('prompt'))[:60]!r}, answer {answers[at][:60]!r}). A source that has "
            "no judgement must mark it as missing (valid = False), not return NaN"
        )
    return judged._replace(values=values, valid=valid, token_rewards=dense)
