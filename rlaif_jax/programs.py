"""The pure functions of a training step, which a runner compiles, and a count of what was compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from rlaif_jax.algorithms.base import Algorithm
from rlaif_jax.feedback.sources import DeviceReward
from rlaif_jax.policies.base import Policy, draw_count
from rlaif_jax.rewards.spread import group_spread, keep_groups
from rlaif_jax.types import (
    ROLLOUT,
    Feedback,
    Frozen,
    Metrics,
    Prompts,
    RewardBatch,
    Rollout,
    StepData,
    TrainState,
    step_key,
)


class Programs(NamedTuple):
    """The pure functions of a step. They need shapes only, so they can be compiled for an absent pod.

    Attributes:
        sample: ((state, frozen), prompts) -> rollout.
        prepare: ((state, frozen), (data, rollout, judged)) -> (batch, rewards, judged): rewards and advantages in one
            program; `judged` with the rewards that are computed on the devices. `batch` is of the groups that are kept,
            `rewards` and `judged` are of all.
        step: (state, frozen, batch) -> (state, metrics).
    """

    sample: Callable[..., Rollout]
    prepare: Callable[..., tuple[Any, RewardBatch, Feedback]]
    step: Callable[..., tuple[TrainState, Metrics]]


def programs(
    algorithm: Algorithm, policy: Policy, device_rewards: Sequence[DeviceReward] = (), *, oversample: int = 1
) -> Programs:
    """Returns the pure functions of a step, which a runner compiles.

    Args:
        algorithm: prepares batches and updates the state.
        policy: draws the answers.
        device_rewards: rewards that are computed inside `prepare`, one for each entry of `Frozen.rewards`.
        oversample: prompts of a step for each that the algorithm learns from (`TrainConfig.oversample`).

    Returns:
        `sample`, `prepare` and `step`; the first two take a state without its optimiser.
    """

    def sample(replicated: tuple[TrainState, Frozen], prompts: Prompts, *, axis_name: str | None = None) -> Rollout:
        state, frozen = replicated
        key = step_key(state.seed, state.step, ROLLOUT)
        return policy.sample(state.params["policy"], frozen, prompts, key, algorithm.draws)

    def prepare(
        replicated: tuple[TrainState, Frozen],
        inputs: tuple[StepData, Rollout, Feedback],
        *,
        axis_name: str | None = None,
    ) -> tuple[Any, RewardBatch, Feedback]:
        (state, frozen), (data, rollout, judged) = replicated, inputs
        for reward, params in zip(device_rewards, frozen.rewards, strict=True):
            judged = judged.join(reward(params, rollout, axis_name=axis_name))
        rewards = algorithm.rewards(state, frozen, data, rollout, judged, axis_name=axis_name)
        kept = (data, rollout, rewards)
        if oversample > 1:
            spread = group_spread(rewards, draw_count(algorithm.draws))
            kept = keep_groups(kept, spread, oversample, axis_name)
        batch = algorithm.prepare(state, frozen, *kept, axis_name=axis_name)
        return batch, rewards, judged

    return Programs(sample, prepare, algorithm.step)


class CompilationClock:
    """Counts compiled programs and the seconds they took; after the first steps neither may grow."""

    def __init__(self) -> None:
        self.seconds, self.programs = 0.0, 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.endswith("backend_compile_duration"):
            self.seconds, self.programs = self.seconds + duration_secs, self.programs + 1
