"""The loop: prompts, rollout, feedback, rewards, advantages, update, evaluate / checkpoint."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.algorithms.base import Algorithm
from rlaif_jax.checkpoint import Checkpointer, fingerprint
from rlaif_jax.config import CheckFailed, Diverged, StopRequested, require, to_json
from rlaif_jax.data.prompts import PromptIterator
from rlaif_jax.data.tokenizers import Tokenizer
from rlaif_jax.feedback.sources import DeviceReward, FeedbackSource, collect_feedback
from rlaif_jax.metrics import RL_STAGE, MetricsWriter
from rlaif_jax.parallel import ParallelConfig, make_runner
from rlaif_jax.policies.base import Policy, draw_count, to_prompts
from rlaif_jax.programs import CompilationClock, programs
from rlaif_jax.rewards.shaping import Normaliser
from rlaif_jax.rewards.spread import check_oversample
from rlaif_jax.run import Run
from rlaif_jax.steps import PendingRollout, collect, reward_metrics, spread_metrics, step_data, write_samples
from rlaif_jax.types import Frozen, Params, Rollout, TrainState
from rlaif_jax.watch.rules import WatchConfig
from rlaif_jax.watch.watch import Watch, reward_scale


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
        steps: policy steps; a resumed run may be given more.
        prompts_per_step: prompts that a step learns from, over all devices; the algorithm says how many answers each gets.
        oversample: prompts drawn for each prompt that is learned from. With 2 or more, all that are drawn are answered and
            judged, and the step learns from those whose answers have different rewards; others only fill up (dynamic
            sampling, DAPO, Yu 2025, section 3.2). Answers with equal rewards teach nothing by their comparison.
        prompt_length: P, tokens that prompts are padded to.
        rollout_parts: parts in which a step's prompts are rolled out; a source that can `prefetch` (a judge behind an API)
            judges each while the next ones are generated. The answers are the same.
        staleness: 1: a step's answers are drawn by the policy of one update before, so that the devices generate while
            feedback for the step before is waited for; 0: never stale.
        parallel: how the devices are used.
        eval_every: steps between two evaluations.
        save_every: steps between two checkpoints.
        keep_checkpoints: newest checkpoints that are kept; 2 + `staleness` at least, so that one of them is healthy when a
            run diverges.
        watch: when the run warns that it goes wrong, and whether it stops when it has diverged. A resumed run may change it.
        target_reward: the mean reward of a step at which training ends early; None: no target.
    """

    steps: int = 100
    prompts_per_step: int = 64
    oversample: int = 1
    prompt_length: int = 64
    rollout_parts: int = 1
    staleness: int = 0
    parallel: ParallelConfig = ParallelConfig()
    eval_every: int = 20
    save_every: int = 20
    keep_checkpoints: int = 2
    watch: WatchConfig = WatchConfig()
    target_reward: float | None = None

    def __post_init__(self) -> None:
        for field in ("steps", "prompts_per_step", "oversample", "prompt_length", "rollout_parts"):
            require(self.__dict__[field] >= 1, f"train.{field} must be >= 1, not {self.__dict__[field]}")
        for field in ("eval_every", "save_every", "keep_checkpoints"):
            require(self.__dict__[field] >= 1, f"train.{field} must be >= 1, not {self.__dict__[field]}")
        require(self.staleness in (0, 1), f"train.staleness must be 0 or 1 (one step off-policy), not {self.staleness}")
        require(
            self.prompts_per_step % self.rollout_parts == 0,
            f"train.rollout_parts ({self.rollout_parts}) must divide train.prompts_per_step ({self.prompts_per_step})",
        )

    @property
    def prompts_drawn(self) -> int:
        """Returns the number of prompts that are answered in a step, over all devices."""
        return self.prompts_per_step * self.oversample

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
    base: Params = None,
    normaliser: Normaliser | None = None,
    evaluate: Callable[[Params, int], dict[str, float]] | None = None,
    enough: Callable[[], bool] = lambda: False,
) -> dict[str, Params]:
    """Improves a policy from feedback and returns the new parameters by part, as `params` are given.

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
        prompts: yields the data of a step, resumable: batches of `config.prompts_drawn`.
        feedback: judges on the host; None: rewards are computed on the devices, or the algorithm makes them.
        device_rewards: rewards inside the compiled program, each with its parameters.
        base: weights under the adapters that learn, which then are the reference, too: an adapter that is not fresh is
            merged first (`LoRAConfig.merge`). None: `params` are whole.
        normaliser: of the rewards; None leaves them as they are.
        evaluate: (policy parameters, step) -> metrics; called before the first step, every `config.eval_every` steps and
            at the last.
        enough: asked after each step, True ends the loop: a person may say so on the annotation page.

    Raises:
        UserError: settings that do not fit together, or feedback that is not a number.
        StopRequested: SIGTERM or Ctrl-C came before the judgements of a step; the newest checkpoint is of the step before.
        CheckFailed: one of the checks does not hold; the newest checkpoint is then of a step that passed them.
        Diverged: the policy is ruined (`config.watch`); the newest checkpoint, if there is one, is of before.
    """
    # ---- Programs, devices
    policy.check(config.prompt_length, tokenizer)
    runner = make_runner(config.parallel, policy.rules)
    config.check(algorithm, runner.devices)
    check_oversample(config.oversample, draw_count(algorithm.draws))
    require(
        prompts.batches is None or prompts.batches >= config.steps,
        f"train.steps is {config.steps}, but the prompts end after {prompts.batches} batches: set epochs=None, or fewer steps",
    )
    pure = programs(algorithm, policy, [reward for reward, _ in device_rewards], oversample=config.oversample)
    sample, prepare, update = runner.map(pure.sample), runner.map(pure.prepare), runner.step(pure.step)

    # ---- State, from a checkpoint or new
    def initial(params: dict[str, Params], seed: jax.Array, normaliser: Normaliser | None) -> TrainState:
        state = algorithm.init(params, seed)
        kept = {} if normaliser is None else {"normaliser": jax.tree.map(jnp.array, normaliser)}
        return dataclasses.replace(state, extra=state.extra | kept)

    start_of_run = (initial, params, np.uint32(run.seed), normaliser)
    # An empty adapter is the base alone: there is no second copy of the base. The state has copies of `params`.
    reference = {} if base is not None else params["policy"]
    frozen = runner.place(Frozen(reference, base, tuple(p for _, p in device_rewards)))
    # Each program gets only what it reads of the frozen weights.
    adapter = dataclasses.replace(frozen, reference=None, rewards=())
    answering = frozen if any(draw.by == "reference" for draw in algorithm.draws) else adapter
    # What a resumed run may change is not in the settings of its checkpoints: `Run` has checked it.
    settings = {name: value for name, value in to_json(config).items() if name not in ("watch", "steps")}
    start_weights = frozen.reference if base is None else frozen.base
    weights = {"the policy to start from": start_weights, "the rewards": frozen.rewards}
    checkpoints = Checkpointer(
        run.folder / "checkpoints",
        settings,
        weights={name: fingerprint(arrays) for name, arrays in weights.items()},
        keep=max(config.keep_checkpoints, 2 + config.staleness),
    )
    empty = runner.place(empty_rollouts(config, algorithm, policy))
    # Of a state that is read back, none is made before: a run that fits can be resumed.
    like = (runner.template(*start_of_run), *runner.fetch(empty)) if run.resuming else None
    found = None if like is None else checkpoints.restore(like)
    state: TrainState = runner.init(*start_of_run) if found is None else runner.place(found.arrays[0])
    missing, start = 0, 0
    watch = Watch(
        config.watch,
        scale=reward_scale(algorithm.shaping, normaliser),
        staleness=config.staleness,
        drawn=bool(algorithm.draws),
        stops=bool(tokenizer.stop_ids),
    )
    evaluated = found is not None and found.host.get("evaluated", True)
    pending: PendingRollout | None = None  # the next step's rollout, where it is drawn before this step's update
    if found is not None:
        (_, *rollouts), start = found.arrays, found.step
        run.steps_done = start
        prompts.set_state(found.host["prompts"])
        if feedback is not None:
            feedback.set_state(found.host["feedback"])
        if found.host.get("ahead", False):
            pending = PendingRollout(found.host["prompts"], next(prompts), list(rollouts))
        missing = int(found.host["missing"])
        for text in watch.set_state(found.host["watch"]):
            run.warn(text)
    if run.resuming:  # a check that failed after the checkpoint is tried again
        run.checks = {} if found is None else dict(found.host["checks"])
        run.drop_samples(RL_STAGE, start if evaluated else start - 1)
    compilations = CompilationClock()

    def dispatch(step: int) -> PendingRollout:
        """Starts the rollout of `step` by the present policy; nobody waits for it yet."""
        position, batch = prompts.get_state(), next(prompts)
        require(
            len(batch.records) == config.prompts_drawn,
            f"the prompts come in batches of {len(batch.records)}, but a step draws {config.prompts_drawn} "
            "(train.prompts_per_step x train.oversample): make batches of `TrainConfig.prompts_drawn`",
        )
        if not algorithm.draws:
            require(batch.recorded is not None, "this algorithm learns from recorded answers, and the data has none")
            return PendingRollout(position, batch, [batch.recorded])  # type: ignore[list-item]
        sampling_state = dataclasses.replace(state.without_optimizer(), step=jnp.int32(step - 1))
        size = config.prompts_drawn // config.rollout_parts
        parts = [batch.rows(slice(at, at + size)) for at in range(0, config.prompts_drawn, size)]
        return PendingRollout(
            position, batch, [sample((sampling_state, answering), to_prompts(part)) for part in parts]
        )

    def save(step: int, ahead: PendingRollout | None, position: Any, feedback_state: Any, evaluated: bool) -> None:
        """Saves the state after `step`, with the next rollout where it is `ahead`, else its `position`."""
        log.flush()
        host = {
            "ahead": ahead is not None,
            "prompts": ahead.position if ahead else position,
            "feedback": feedback_state,
            "missing": missing,
            "checks": run.checks,
            "watch": watch.get_state(),
            "evaluated": evaluated,
        }
        checkpoints.save(step, runner.fetch((state, *(ahead.rollouts if ahead else empty))), host)

    def evaluation(step: int) -> dict[str, float]:
        assert evaluate is not None
        with run.interruptible(), run.display.wait(f"held-out answers after step {step}"):
            return evaluate(state.params["policy"], step)

    # ---- Loop
    with (
        writer.stage(RL_STAGE, config.steps, resume_from=start if found is not None else None) as log,
        checkpoints,
    ):
        if evaluate is not None and not evaluated:
            values = evaluation(start)
            watch.evaluated(start, values)
            log.write(start, values)
        for step in range(start + 1, config.steps + 1):
            started = time.perf_counter()
            stale = pending is not None
            current = pending or dispatch(step)  # prompts
            source_state = None if feedback is None else feedback.get_state()
            if feedback is not None:
                run.settled()  # judgements may cost money or people's time
            try:
                with run.interruptible():
                    rollout, records, answers = collect(current, policy, tokenizer, feedback)  # rollout
                    # One step off-policy: while the judge thinks, the devices draw the next step's answers.
                    pending = dispatch(step + 1) if config.staleness and step < config.steps else None
                    rollout_done = time.perf_counter()
                    judged = collect_feedback(feedback, records, answers, rollout, step)  # feedback
            except StopRequested:
                if step > 1:
                    save(step - 1, current if stale else None, current.position, source_state, True)
                raise
            feedback_done = time.perf_counter()
            data = step_data(current.batch)
            sampling_state = state.without_optimizer()
            batch, rewards, judged = prepare((sampling_state, frozen), (data, rollout, judged))  # rewards, advantages
            state, metrics = update(state, adapter, batch)  # update
            values = {name: float(x) for name, x in jax.device_get(metrics).items()}
            update_done = time.perf_counter()
            rewards, judged = jax.device_get((rewards, judged))
            lengths = np.asarray(jax.device_get(rollout.response_mask)).sum(-1)
            drawn, names = draw_count(algorithm.draws), () if feedback is None else feedback.reward_names()
            values |= reward_metrics(rewards, judged, lengths, algorithm.draws, names)
            values |= spread_metrics(rewards, drawn, config.oversample)
            missing += int((~judged.valid).sum())
            run.missing["judgements of a step"] = missing
            values |= {
                "finished": float(np.mean(jax.device_get(rollout.finished))),
                "feedback_missing": float(missing),
                "staleness": float(stale),
            }
            due = step % config.eval_every == 0 or step == config.steps
            evaluated = True
            if evaluate is not None and due:
                try:
                    values |= evaluation(step)  # evaluate
                except StopRequested:
                    evaluated = False  # a resumed run does it first
            elif evaluate is None and algorithm.draws and (due or step == 1):
                write_samples(run, step, records, answers, rewards)
            values |= {
                "time/rollout_s": rollout_done - started,
                "time/feedback_s": feedback_done - rollout_done,
                "time/update_s": update_done - feedback_done,
                "time/tokens_per_s": float(lengths.sum()) / (update_done - started),
                "time/compilations": compilations.programs,
            }
            log.write(step, values)
            run.settled()
            run.steps_done = step
            for text in watch.see(step, records, answers, rewards, judged, values):
                run.warn(text)
            checks = policy.checks(rollout) | algorithm.checks(values, step=step, tolerance=policy.tolerance)
            failed = [name for name, holds in checks.items() if not run.check(name, holds)]
            if failed:
                raise CheckFailed(
                    f"step {step}: {', '.join(failed)}: false. Nothing of this step was saved: the checkpoint in "
                    f"{checkpoints.folder} is of before; the step's numbers are the last line of {writer.path}"
                )
            if watch.diverged and config.watch.stop:
                left = checkpoints.drop_after(watch.healthy_step)
                raise Diverged(f"step {step}: the run has diverged and stops here. Of a healthy policy, {left}")
            reached = config.target_reward is not None and values.get("reward", float("-inf")) >= config.target_reward
            done = run.stop_requested or reached or enough()
            if (step % config.save_every == 0 and watch.healthy) or step == config.steps or done:
                source_state = None if feedback is None else feedback.get_state()
                save(step, pending, prompts.get_state(), source_state, evaluated)  # checkpoint
            if done:
                break
    return jax.tree.map(jnp.asarray, dict(runner.fetch(state.params)))


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
    rows = config.prompts_drawn // config.rollout_parts * draw_count(algorithm.draws)
    return [policy.empty_rollout(rows, config.prompt_length)] * config.rollout_parts
