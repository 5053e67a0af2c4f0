"""The loop: prompts, rollout, feedback, rewards, advantages, update, evaluate / checkpoint."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.algorithms.base import Algorithm
from rlaif_jax.checkpoint import Checkpointer
from rlaif_jax.config import CheckFailed, require, to_json
from rlaif_jax.data.prompts import PromptBatch, PromptIterator, Record
from rlaif_jax.data.tokenizers import Tokenizer
from rlaif_jax.feedback.sources import DeviceReward, FeedbackSource, collect_feedback
from rlaif_jax.metrics import MetricsWriter
from rlaif_jax.parallel import CompilationClock, ParallelConfig, make_runner
from rlaif_jax.policies.base import Policy, draw_count, to_prompts
from rlaif_jax.programs import programs
from rlaif_jax.rewards.shaping import Normaliser
from rlaif_jax.run import Run
from rlaif_jax.types import (
    Array,
    Feedback,
    Frozen,
    Params,
    RewardBatch,
    Rollout,
    StepData,
)


class ChecksSteps(Protocol):
    """What knows whether it can learn from steps of a given size: an algorithm or its settings."""

    def check(self, prompts_per_step: int, devices: int, staleness: int) -> None:
        """Raises UserError where it cannot learn from a step of these sizes; see `Algorithm.check`.

        Args:
            prompts_per_step: prompts of a step, over all devices.
            devices: number of devices that share each minibatch.
            staleness: steps between the policy that answers and the policy that learns, 0 or 1.
        """


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop: how many steps of which size, and how often the policy is evaluated and saved.

    Attributes:
        steps: policy steps.
        prompts_per_step: prompts of a step, over all devices; the algorithm says how many answers each gets.
        prompt_length: P, tokens that prompts are padded to.
        rollout_parts: parts in which a step's prompts are rolled out; a source that can `prefetch` (a judge behind an API)
            judges each while the next ones are generated. The answers are the same.
        staleness: 1: a step's answers are drawn by the policy of one update before, so that the devices generate while
            feedback for the step before is waited for; 0: never stale.
        parallel: how the devices are used.
        eval_every: steps between two evaluations.
        save_every: steps between two checkpoints.
        keep_checkpoints: newest checkpoints that are kept.
        target_reward: the mean reward of a step at which training ends early; None: no target.
    """

    steps: int = 100
    prompts_per_step: int = 64
    prompt_length: int = 64
    rollout_parts: int = 1
    staleness: int = 0
    parallel: ParallelConfig = ParallelConfig()
    eval_every: int = 20
    save_every: int = 20
    keep_checkpoints: int = 2
    target_reward: float | None = None

    def __post_init__(self) -> None:
        for field in ("steps", "prompts_per_step", "prompt_length", "rollout_parts"):
            require(self.__dict__[field] >= 1, f"train.{field} must be >= 1, not {self.__dict__[field]}")
        for field in ("eval_every", "save_every", "keep_checkpoints"):
            require(self.__dict__[field] >= 1, f"train.{field} must be >= 1, not {self.__dict__[field]}")
        require(self.staleness in (0, 1), f"train.staleness must be 0 or 1 (one step off-policy), not {self.staleness}")
        require(
            self.prompts_per_step % self.rollout_parts == 0,
            f"train.rollout_parts ({self.rollout_parts}) must divide train.prompts_per_step ({self.prompts_per_step})",
        )

    def check(self, algorithm: ChecksSteps, devices: int) -> None:
        """Raises UserError where a step cannot be shared by the devices, or cannot be learned from.

        Args:
            algorithm: an algorithm, or its settings where they can check themselves before anything is computed.
            devices: shards of a batch.
        """
        require(
            self.prompts_per_step % (self.rollout_parts * devices) == 0,
            f"train.prompts_per_step ({self.prompts_per_step}) / train.rollout_parts ({self.rollout_parts}) must be a "
            f"multiple of the {devices} devices",
        )
        algorithm.check(self.prompts_per_step, devices, self.staleness)


def train(
    config: TrainConfig,
    run: Run,
    writer: MetricsWriter,
    *,
    algorithm: Algorithm,
    policy: Policy,
    params: dict[str, Params],
    tokenizer: Tokenizer,
    prompts: PromptIterator,
    feedback: FeedbackSource | None,
    device_rewards: Sequence[tuple[DeviceReward, Params]] = (),
    normaliser: Normaliser | None = None,
    evaluate: Callable[[Params, int], dict[str, float]] | None = None,
    enough: Callable[[], bool] = lambda: False,
) -> Params:
    """Improves a policy from feedback and returns its new parameters.

    `run.stop_requested`, `config.target_reward`, `config.steps` and `enough` end the loop. A resumed run goes on from its
    newest checkpoint.

    Args:
        config: size and rhythm of the loop.
        run: the run's folder and life.
        writer: takes the metrics of every step.
        algorithm: how the policy learns.
        policy: the kind of output on its model.
        params: parameters by part: `policy`, which is also the frozen reference, and what else the algorithm names.
        tokenizer: of prompts and answers.
        prompts: yields the data of a step, resumable.
        feedback: judges on the host; None: rewards are computed on the devices, or the algorithm makes them.
        device_rewards: rewards inside the compiled program, each with its parameters.
        normaliser: of the rewards; None leaves them as they are.
        evaluate: (policy parameters, step) -> metrics; called before the first step, every `config.eval_every` steps and
            at the last.
        enough: asked after each step, True ends the loop: a person may say so on the annotation page.

    Raises:
        UserError: settings that do not fit together, or feedback that is not a number.
        CheckFailed: one of the checks does not hold; the newest checkpoint is then of a step that passed them.
    """
    # ---- Programs, devices
    policy.check(config.prompt_length, tokenizer)
    runner = make_runner(config.parallel, policy.rules)
    config.check(algorithm, runner.devices)
    pure = programs(algorithm, policy, [reward for reward, _ in device_rewards])
    sample, prepare, update = runner.map(pure.sample), runner.map(pure.prepare), runner.step(pure.step)

    # ---- State, from a checkpoint or new
    # Placed before they serve as the template of a restore, so that arrays come back where they belong.
    state = runner.init(algorithm.init, params, np.uint32(run.seed))
    if normaliser is not None:
        normaliser = runner.place(jax.tree.map(jnp.array, normaliser))  # a copy: the state is donated
        state = dataclasses.replace(state, extra=state.extra | {"normaliser": normaliser})
    frozen = runner.place(Frozen(jax.tree.map(jnp.array, params["policy"]), None, tuple(p for _, p in device_rewards)))
    # pmap sends every argument to all devices, so each program gets only what it reads of the frozen weights.
    adapter = dataclasses.replace(frozen, reference=None, rewards=())
    answering = frozen if any(draw.by == "reference" for draw in algorithm.draws) else adapter
    checkpoints = Checkpointer(run.folder / "checkpoints", to_json(config), keep=config.keep_checkpoints)
    empty = runner.place(empty_rollouts(config, algorithm, policy))
    found = checkpoints.restore(runner.fetch((state, *empty))) if run.resuming else None
    missing, start = 0, 0
    pending: PendingRollout | None = None  # the next step's rollout, where it is drawn before this step's update
    if found is not None:
        (state, *rollouts), start = found.arrays, found.step
        state = runner.place(state)
        run.steps_done = start
        prompts.set_state(found.host["prompts"])
        if feedback is not None:
            feedback.set_state(found.host["feedback"])
        if config.staleness and start < config.steps:
            pending = PendingRollout(found.host["prompts"], next(prompts), list(rollouts))
        missing, run.checks = int(found.host["missing"]), dict(found.host["checks"])
    compilations = CompilationClock()

    def dispatch(step: int) -> PendingRollout:
        """Starts the rollout of `step` by the present policy; nobody waits for it yet."""
        position, batch = prompts.get_state(), next(prompts)
        if not algorithm.draws:
            require(batch.recorded is not None, "this algorithm learns from recorded answers, and the data has none")
            return PendingRollout(position, batch, [batch.recorded])  # type: ignore[list-item]
        sampling_state = dataclasses.replace(state.without_optimizer(), step=jnp.int32(step - 1))
        size = config.prompts_per_step // config.rollout_parts
        parts = [batch.rows(slice(at, at + size)) for at in range(0, config.prompts_per_step, size)]
        return PendingRollout(
            position, batch, [sample((sampling_state, answering), to_prompts(part)) for part in parts]
        )

    def save(step: int) -> None:
        log.flush()
        host = {
            "prompts": pending.position if pending else prompts.get_state(),
            "feedback": None if feedback is None else feedback.get_state(),
            "missing": missing,
            "checks": run.checks,
        }
        checkpoints.save(step, runner.fetch((state, *(pending.rollouts if pending else empty))), host)

    # ---- Loop
    with (
        writer.stage("rl", config.steps, resume_from=start if found is not None else None) as log,
        closing(checkpoints),
    ):
        if evaluate is not None and start == 0:
            log.write(0, evaluate(state.params["policy"], 0))
        for step in range(start + 1, config.steps + 1):
            started = time.perf_counter()
            stale = pending is not None
            current = pending or dispatch(step)  # prompts
            rollout, records, answers = collect(current, policy, tokenizer, feedback)  # rollout
            # One step off-policy: while the judge thinks, the devices draw the next step's answers.
            pending = dispatch(step + 1) if config.staleness and step < config.steps else None
            rollout_done = time.perf_counter()
            judged = collect_feedback(feedback, records, answers, rollout, step)  # feedback
            feedback_done = time.perf_counter()
            data = step_data(current.batch)
            sampling_state = state.without_optimizer()
            batch, rewards, judged = prepare((sampling_state, frozen), (data, rollout, judged))  # rewards, advantages
            state, metrics = update(state, adapter, batch)  # update
            values = {name: float(x) for name, x in jax.device_get(metrics).items()}
            rewards, judged = jax.device_get((rewards, judged))
            values |= reward_metrics(rewards, judged)
            missing += int((~judged.valid).sum())
            run.missing["judgements of a step"] = missing
            values |= {
                "finished": float(np.mean(jax.device_get(rollout.finished))),
                "feedback_missing": float(missing),
                "staleness": float(stale),
            }
            if evaluate is not None and (step % config.eval_every == 0 or step == config.steps):  # evaluate
                values |= evaluate(state.params["policy"], step)
            update_done = time.perf_counter()
            values |= {
                "time/rollout_s": rollout_done - started,
                "time/feedback_s": feedback_done - rollout_done,
                "time/update_s": update_done - feedback_done,
                "time/tokens_per_s": float(np.sum(jax.device_get(rollout.response_mask))) / (update_done - started),
                "time/compilations": compilations.programs,
            }
            log.write(step, values)
            run.settled()
            run.steps_done = step
            checks = policy.checks(rollout) | algorithm.checks(values, step=step, tolerance=policy.tolerance)
            failed = [name for name, holds in checks.items() if not run.check(name, holds)]
            if failed:
                raise CheckFailed(
                    f"step {step}: {', '.join(failed)}: false. Nothing of this step was saved: the checkpoint in "
                    f"{checkpoints.folder} is of before; the step's numbers are the last line of {writer.path}"
                )
            reached = config.target_reward is not None and values.get("reward", float("-inf")) >= config.target_reward
            done = run.stop_requested or reached or enough()
            if step % config.save_every == 0 or step == config.steps or done:
                save(step)  # checkpoint
            if done:
                break
    return jax.tree.map(jnp.asarray, runner.fetch(state.params["policy"]))


class PendingRollout(NamedTuple):
    """A rollout on the devices: the iterator's position before its prompts, the prompts, the parts."""

    position: Any
    batch: PromptBatch
    rollouts: list[Rollout]


def empty_rollouts(config: TrainConfig, algorithm: Algorithm, policy: Policy) -> list[Rollout]:
    """Returns the zero rollouts that the checkpoint holds while no rollout is pending.

    Args:
        config: sizes of a step.
        algorithm: its draws give the answers of each prompt.
        policy: gives the shapes of a rollout.

    Returns:
        One rollout for each part of a step; an empty list for synchronous runs (`staleness` 0).
    """
    if not config.staleness:
        return []
    rows = config.prompts_per_step // config.rollout_parts * draw_count(algorithm.draws)
    return [policy.empty_rollout(rows, config.prompt_length)] * config.rollout_parts


def step_data(batch: PromptBatch) -> StepData:
    """Returns the arrays of a host batch that an algorithm may read."""
    return StepData(to_prompts(batch), batch.demonstrations, batch.recorded)


def collect(
    current: PendingRollout, policy: Policy, tokenizer: Tokenizer, feedback: FeedbackSource | None
) -> tuple[Rollout, list[Record], list[str]]:
    """Waits for the answers of a step and returns them as arrays and as texts.

    While the devices work on the later parts, the source may already judge the answers of the earlier ones.

    Args:
        current: the prompts and the rollouts that the devices work on.
        policy: turns tokens into texts.
        tokenizer: decodes the texts.
        feedback: its `prefetch` is called with each part; None where no source judges on the host.

    Returns:
        (rollout of all parts, the record of each answer's prompt, the texts).
    """
    batch, rollouts = current.batch, current.rollouts
    records: list[Record] = []
    answers: list[str] = []
    size = len(batch.records) // len(rollouts)
    for i, rollout in enumerate(rollouts):
        texts = policy.texts(rollout, tokenizer)
        part = batch.records[i * size : (i + 1) * size]
        of_answers: list[Record] = [record for record in part for _ in range(len(texts) // size)]
        if feedback is not None:
            feedback.prefetch(of_answers, texts)
        records, answers = records + of_answers, answers + texts
    whole = rollouts[0] if len(rollouts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *rollouts)
    return whole, records, answers


def reward_metrics(rewards: RewardBatch, judged: Feedback) -> dict[str, float]:
    """Returns the mean `reward` that is learned from, and the mean raw `score` of each judgement.

    Where answers are only compared in pairs they have no reward, which is not a reward of 0: it is left out.

    Args:
        rewards: the rewards of B answers, on the host.
        judged: the feedback [B, R] behind them, on the host.

    Returns:
        `reward`, and `score` (R = 1) or `score/0`, `score/1` ...; NaN where nothing is valid.
    """

    def mean(x: Array, valid: Array) -> float:
        return float(np.mean(x[valid])) if valid.any() else float("nan")

    count = judged.values.shape[1]
    names = ["score"] if count == 1 else [f"score/{i}" for i in range(count)]
    scores = {name: mean(judged.values[:, i], judged.valid[:, i]) for i, name in enumerate(names)}
    compared = rewards.pairs is not None and count == 0
    return scores if compared else {"reward": mean(rewards.total, rewards.valid)} | scores
