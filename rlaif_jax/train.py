"""The loop: prompts -> rollout -> feedback -> rewards -> advantages -> update -> evaluate / checkpoint."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import jax
import numpy as np

from rlaif_jax.algorithms.ppo import Agent, PPOConfig, ppo_step, prepare
from rlaif_jax.checkpoint import Checkpointer
from rlaif_jax.config import CheckFailed, UserError, require, to_json
from rlaif_jax.data.prompts import PromptBatch, PromptIterator, Record
from rlaif_jax.data.tokenizers import Tokenizer, check_tokenizer
from rlaif_jax.feedback.sources import FeedbackSource
from rlaif_jax.types import Feedback
from rlaif_jax.metrics import MetricsWriter
from rlaif_jax.models.causal_lm import CausalLM
from rlaif_jax.models.heads import ScalarModel, ValueHead
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import CompilationClock, ParallelConfig, Runner, make_runner
from rlaif_jax.policies.text import answer_texts, generate, to_prompts
from rlaif_jax.rewards.shaping import Normaliser, identity_normaliser, sequence_rewards
from rlaif_jax.run import Run
from rlaif_jax.types import ROLLOUT, Metrics, Params, Rollout, TrainState, step_key


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop: how many steps, of what size, and how often it looks up.

    One step rolls out `prompts_per_step` x `answers_per_prompt` sequences (over all devices) and updates the policy
    `ppo.num_epochs` x `ppo.num_minibatches` times on them. Training ends early at `target_reward` (mean reward of a
    step) when it is set. With `rollout_parts` a step's prompts are rolled out in so many parts, and a feedback source
    that can `prefetch` (a judge behind an API) judges each while the next ones are generated; the answers are the same.
    `decode_slots` answers are decoded at a time on each device, and whenever some have ended the next ones take their
    places: faster where answers are many and of uneven length, and the same answers up to rounding. 0: all at once.
    With `staleness` 1 a step's answers are drawn by the policy of one update before, so that the devices generate while
    feedback for the step before is waited for; the loss is then the decoupled one (`ppo.importance_cap`). 0: never stale.
    """

    steps: int = 100
    prompts_per_step: int = 64
    answers_per_prompt: int = 1
    rollout_parts: int = 1
    decode_slots: int = 0
    staleness: int = 0
    prompt_length: int = 64
    sampling: SamplingConfig = SamplingConfig()
    ppo: PPOConfig = PPOConfig()
    parallel: ParallelConfig = ParallelConfig()
    eval_every: int = 20
    save_every: int = 20
    keep_checkpoints: int = 2
    target_reward: float | None = None

    def __post_init__(self) -> None:
        for field in ("steps", "prompts_per_step", "answers_per_prompt", "prompt_length", "rollout_parts"):
            require(getattr(self, field) >= 1, f"train.{field} must be >= 1, not {getattr(self, field)}")
        for field in ("eval_every", "save_every", "keep_checkpoints"):
            require(getattr(self, field) >= 1, f"train.{field} must be >= 1, not {getattr(self, field)}")
        require(self.decode_slots >= 0, f"train.decode_slots must be >= 0 (0: all at once), not {self.decode_slots}")
        require(self.staleness in (0, 1), f"train.staleness must be 0 or 1 (one step off-policy), not {self.staleness}")
        require(
            not self.staleness or self.ppo.behaviour == "recompute",
            "train.staleness=1 corrects for the older policy by importance weights and needs the current one's "
            "log-probs beside the sampler's: set ppo.behaviour='recompute'",
        )
        require(
            self.ppo.advantage != "group" or self.answers_per_prompt >= 2,
            "train.answers_per_prompt is 1, but ppo.advantage='group' compares the answers to one prompt: "
            "set answers_per_prompt to 2 or more, or ppo.advantage='gae'",
        )
        require(
            self.prompts_per_step % self.rollout_parts == 0,
            f"train.rollout_parts ({self.rollout_parts}) must divide train.prompts_per_step ({self.prompts_per_step})",
        )
        sequences = self.prompts_per_step * self.answers_per_prompt
        require(
            sequences % self.ppo.num_minibatches == 0,
            f"ppo.num_minibatches ({self.ppo.num_minibatches}) must divide the {sequences} sequences of a step "
            f"(prompts_per_step x answers_per_prompt)",
        )


def compile_steps(config: TrainConfig, agent: Agent, runner: Runner, tokenizer: Tokenizer) -> tuple[Any, Any, Any]:
    """(rollout, advantages, update), compiled: `rollout(state, prompts)`, `advantages((state, reference, normaliser),
    (rollout, feedback))`, `update(state, experience)`; the first two take a state without optimiser."""

    def rollout(state: TrainState, prompts: Any, *, axis_name: str | None = None) -> Rollout:
        return generate(
            agent.policy,
            state.params["policy"],
            prompts,
            step_key(state.seed, state.step, ROLLOUT),
            sampling=config.sampling,
            answers=agent.answers,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            slots=config.decode_slots,
        )

    def advantages(replicated: Any, batch: Any, *, axis_name: str | None = None) -> Any:
        state, reference, normaliser = replicated
        rolled, judged = batch
        rewards = sequence_rewards(
            judged.values, judged.valid, normaliser, rolled.response_mask, token_rewards=judged.token_rewards
        )
        total = rewards.score + rewards.token_rewards.sum(-1)
        return prepare(agent, state, reference, rolled, rewards), total

    def update(state: TrainState, experience: Any, *, axis_name: str | None = None) -> tuple[TrainState, Metrics]:
        return ppo_step(agent, state, experience, axis_name=axis_name)

    return runner.map(rollout), runner.map(advantages), runner.step(update)


def train(
    config: TrainConfig,
    run: Run,
    writer: MetricsWriter,
    *,
    tokenizer: Tokenizer,
    policy: CausalLM,
    policy_params: Params,
    critic: ScalarModel | ValueHead | None,
    value_params: Params | None,
    prompts: PromptIterator,
    feedback: FeedbackSource,
    normaliser: Normaliser | None = None,
    evaluate: Callable[[Params, int], dict[str, float]] | None = None,
    enough: Callable[[], bool] = lambda: False,
) -> Params:
    """Improve `policy_params` from feedback and return the new parameters.

    The reference policy is `policy_params` itself, frozen. `evaluate(policy_params, step)` is called before the first
    step, every `config.eval_every` steps and at `config.steps`; what it returns is logged. `run.stop_requested`,
    `config.target_reward`, `config.steps` and `enough` (asked after each step: a person may say so on the annotation
    page) end the loop. A resumed run goes on from its newest checkpoint.

    Raises UserError for settings that do not fit together and for feedback that is not a number; CheckFailed when
    one of the checks of `check_step` fails; the newest checkpoint is then of a step that passed them.
    """
    # ---- Model, step, mesh
    check_tokenizer(tokenizer, policy.config.vocab_size, "the policy")
    longest = config.prompt_length + config.sampling.max_new_tokens
    require(
        longest <= policy.config.context_length,
        f"train.prompt_length ({config.prompt_length}) + sampling.max_new_tokens ({config.sampling.max_new_tokens}) "
        f"= {longest} is more than the policy's context of {policy.config.context_length} tokens",
    )
    require(config.sampling.temperature > 0, "sampling.temperature is 0 (greedy): a policy learns only from samples")
    runner = make_runner(config.parallel)
    sequences = config.prompts_per_step * config.answers_per_prompt
    minibatch = sequences // config.ppo.num_minibatches
    require(
        config.prompts_per_step % (config.rollout_parts * runner.devices) == 0 and minibatch % runner.devices == 0,
        f"train.prompts_per_step ({config.prompts_per_step}) / train.rollout_parts ({config.rollout_parts}) and the "
        f"minibatch ({sequences} sequences / "
        f"ppo.num_minibatches {config.ppo.num_minibatches} = {minibatch}) must be multiples of the {runner.devices} devices",
    )
    updates = config.steps * config.ppo.num_epochs * config.ppo.num_minibatches
    agent = Agent(policy, critic, config.ppo, config.sampling.temperature, updates, config.answers_per_prompt)
    roll, advantages, update = compile_steps(config, agent, runner, tokenizer)

    # ---- State, from a checkpoint or new
    # Placed before they serve as the template of a restore, so that arrays come back where they belong.
    normaliser = runner.place(normaliser or identity_normaliser())
    state = runner.place(agent.init(policy_params, value_params, run.seed))
    reference = runner.place(jax.tree.map(jax.numpy.array, policy_params))
    checkpoints = Checkpointer(run.folder / "checkpoints", to_json(config), keep=config.keep_checkpoints)
    nothing = runner.place(no_rollouts(config))
    found = checkpoints.restore(runner.fetch((state, normaliser, *nothing))) if run.resuming else None
    missing, start = 0, 0
    ahead: Sent | None = None  # the next step's rollout, where it is made before this step's update
    if found is not None:
        (state, normaliser, *rolled_out), start = found.arrays, found.step
        state, normaliser = runner.place((state, normaliser))
        run.steps_done = start
        prompts.set_state(found.host["prompts"])
        if config.staleness and start < config.steps:
            ahead = Sent(found.host["prompts"], next(prompts), list(rolled_out))
        missing, run.checks = int(found.host["missing"]), dict(found.host["checks"])
    compilations = CompilationClock()

    def send(step: int) -> Sent:
        """Start the rollout of `step` by the policy there is now; nobody waits for it yet."""
        position, batch = prompts.get_state(), next(prompts)
        light = dataclasses.replace(state, opt_state=None, step=jax.numpy.int32(step - 1))
        return Sent(position, batch, dispatch(config, roll, light, batch))

    def save(step: int) -> None:
        log.flush()
        checkpoints.save(
            step,
            runner.fetch((state, normaliser, *(ahead.rollouts if ahead else nothing))),
            {"prompts": ahead.position if ahead else prompts.get_state(), "missing": missing, "checks": run.checks},
        )

    # ---- Loop
    with (
        writer.stage("rl", config.steps, resume_from=start if found is not None else None) as log,
        closing(checkpoints),
    ):
        if evaluate is not None and start == 0:
            log.write(0, evaluate(state.params["policy"], 0))
        for step in range(start + 1, config.steps + 1):
            begun = time.perf_counter()
            stale = ahead is not None
            sent = ahead or send(step)  # prompts
            rollout, records, answers = collect(sent.batch, sent.rollouts, tokenizer, feedback)  # rollout
            # One step off-policy: while the judge thinks, the devices are at the next step's answers.
            ahead = send(step + 1) if config.staleness and step < config.steps else None
            rolled = time.perf_counter()
            judged = checked(feedback(records, answers, rollout), records, answers, step)  # feedback
            missing += int((~judged.valid).sum())
            told = time.perf_counter()
            light = dataclasses.replace(state, opt_state=None)
            experience, rewards = advantages((light, reference, normaliser), (rollout, judged))  # rewards, advantages
            state, metrics = update(state, experience)  # update
            values = {name: float(x) for name, x in jax.device_get(metrics).items()}
            valid = judged.valid
            values |= {
                "reward": float(np.mean(jax.device_get(rewards)[valid])) if valid.any() else float("nan"),
                "score": float(np.mean(judged.values[valid])) if valid.any() else float("nan"),
                "finished": float(np.mean(jax.device_get(rollout.finished))),
                "feedback_missing": float(missing),
                "staleness": float(stale),
            }
            if evaluate is not None and (step % config.eval_every == 0 or step == config.steps):  # evaluate
                values |= evaluate(state.params["policy"], step)
            now = time.perf_counter()
            tokens = values["length"] * len(answers)
            values |= {
                "time/rollout_s": rolled - begun,
                "time/feedback_s": told - rolled,
                "time/update_s": now - told,
                "time/tokens_per_s": tokens / (now - begun),
                "time/compilations": compilations.programs,
            }
            log.write(step, values)
            run.settled()
            run.steps_done = step
            if not check_step(run, step, values, rollout, tokenizer, float32=policy.config.compute_dtype == "float32"):
                failed = ", ".join(name for name, holds in run.checks.items() if not holds)
                raise CheckFailed(
                    f"step {step}: {failed}: false. Nothing of this step was saved: the checkpoint in "
                    f"{checkpoints.folder} is of before; the step's numbers are the last line of {writer.path}"
                )
            reached = config.target_reward is not None and values["reward"] >= config.target_reward
            over = run.stop_requested or reached or enough()
            if step % config.save_every == 0 or step == config.steps or over:
                save(step)  # checkpoint
            if over:
                break
    return jax.tree.map(jax.numpy.asarray, runner.fetch(state.params["policy"]))


class Sent(NamedTuple):
    """A rollout on its way: its prompts, where their iterator stood before them, and the parts."""

    position: Any
    batch: PromptBatch
    rollouts: list[Rollout]


def no_rollouts(config: TrainConfig) -> list[Rollout]:
    """What stands in a checkpoint where no rollout is on its way: the parts of a step, empty. None in synchronous runs."""
    if not config.staleness:
        return []
    rows = config.prompts_per_step // config.rollout_parts * config.answers_per_prompt
    prompt, length = config.prompt_length, config.sampling.max_new_tokens
    part = Rollout(
        tokens=jax.numpy.zeros((rows, prompt + length), jax.numpy.int32),
        prompt_mask=jax.numpy.zeros((rows, prompt), bool),
        response_mask=jax.numpy.zeros((rows, length), bool),
        logprobs=jax.numpy.zeros((rows, length)),
        finished=jax.numpy.zeros(rows, bool),
    )
    return [part] * config.rollout_parts


def dispatch(config: TrainConfig, roll: Any, state: TrainState, batch: PromptBatch) -> list[Rollout]:
    """The rollout of a step in `config.rollout_parts` parts, all of them handed to the devices at once."""
    size = config.prompts_per_step // config.rollout_parts
    return [roll(state, to_prompts(batch.rows(slice(at, at + size)))) for at in range(0, config.prompts_per_step, size)]


def collect(
    batch: PromptBatch, rollouts: list[Rollout], tokenizer: Tokenizer, feedback: FeedbackSource
) -> tuple[Rollout, list[Record], list[str]]:
    """(rollout, records, answers) of a step. While the devices work on the later parts, a source that can `prefetch` has
    the earlier ones' answers already."""
    prefetch = getattr(feedback, "prefetch", None)
    records: list[Record] = []
    answers: list[str] = []
    each = len(batch.records) // len(rollouts)
    for i, rollout in enumerate(rollouts):
        texts = answer_texts(rollout, tokenizer)
        of_part = batch.records[i * each : (i + 1) * each]
        told: list[Record] = [record for record in of_part for _ in range(len(texts) // each)]
        if prefetch is not None:
            prefetch(told, texts)
        records, answers = records + told, answers + texts
    whole = rollouts[0] if len(rollouts) == 1 else jax.tree.map(lambda *x: jax.numpy.concatenate(x), *rollouts)
    return whole, records, answers


def checked(judged: Feedback, records: Any, answers: list[str], step: int) -> Feedback:
    """The feedback as NumPy arrays; UserError for a judgement that claims to be valid and is no number."""
    values, valid = jax.device_get(judged.values), np.asarray(jax.device_get(judged.valid), bool)
    dense = None if judged.token_rewards is None else np.asarray(jax.device_get(judged.token_rewards), np.float32)
    finite = np.isfinite(values) if dense is None else np.isfinite(values) & np.isfinite(dense).all(-1)
    require(
        np.shape(values) == (len(answers),) and valid.shape == (len(answers),),
        f"step {step}: the feedback source returned values of shape {np.shape(values)} for {len(answers)} answers",
    )
    wrong = np.flatnonzero(valid & ~finite)
    if wrong.size:
        raise UserError(
            f"step {step}: the reward of answer {wrong[0]} is {values[wrong[0]]}"
            f"{'' if dense is None else f' with dense rewards {dense[wrong[0]]}'} (prompt "
            f"{str(records[wrong[0]].get('prompt'))[:60]!r}, answer {answers[wrong[0]][:60]!r}). A source that has "
            "no judgement must mark it as missing (valid = False), not return NaN"
        )
    return Feedback(np.asarray(values, np.float32), valid, dense)


def check_step(
    run: Run, step: int, values: dict[str, float], rollout: Rollout, tokenizer: Tokenizer, *, float32: bool
) -> bool:
    """What must hold of every step, whatever is learned; recorded in the run's checks. True while all hold."""
    tolerance = 1e-3 if float32 else 5e-2
    tokens, mask, finished = jax.device_get((rollout.responses, rollout.response_mask, rollout.finished))
    last = tokens[np.arange(len(tokens)), mask.sum(-1) - 1]
    run.check("first_minibatch_ratio_is_1", values["first/ratio_error"] < tolerance)
    run.check("first_minibatch_clip_fraction_is_0", values["first/clip_fraction"] == 0)
    run.check("first_minibatch_approx_kl_is_0", abs(values["first/approx_kl"]) < tolerance)
    if not values["staleness"]:  # else the sampler was another policy
        run.check("sampler_and_trainer_logprobs_agree", values["first/sampler_gap"] < tolerance)
    run.check("eos_is_kept_in_the_mask", bool(np.all(last[finished] == tokenizer.eos_id)))
    run.check("losses_are_finite", values["nonfinite"] == 0)
    if step == 1:
        run.check("kl_at_step_0_is_0", abs(values["kl"]) <= tolerance * values["length"])
    return all(run.checks.values())
