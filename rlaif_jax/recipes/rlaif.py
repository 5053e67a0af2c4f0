"""A user's own model, prompts and feedback: the model answers, is judged and learns.

`python -m rlaif_jax train` runs it; `experiments/rlaif.py` is the same as a script.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from rlaif_jax.algorithms.advantages import GroupNormalised
from rlaif_jax.algorithms.named import NAMED
from rlaif_jax.algorithms.optimizer import OptimizerConfig
from rlaif_jax.algorithms.ppo import PPOConfig
from rlaif_jax.checkpoint import fingerprint, require_weights
from rlaif_jax.config import require, to_json
from rlaif_jax.data.chat.config import ChatConfig
from rlaif_jax.data.tokenizers import Tokenizer
from rlaif_jax.evaluate import Answers, Combination, Evaluation
from rlaif_jax.feedback.joined import JoinedSource
from rlaif_jax.feedback.people.kinds import RANK
from rlaif_jax.feedback.sources import FeedbackSource
from rlaif_jax.files import atomic_write
from rlaif_jax.metrics import MetricsWriter
from rlaif_jax.models.hf.adapters import save_adapter
from rlaif_jax.models.hf.files import save_model
from rlaif_jax.models.lora import LoRAConfig
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import Runner, make_runner
from rlaif_jax.policies.base import draw_count
from rlaif_jax.policies.text import TextPolicy
from rlaif_jax.progress.plan import PlannedStage
from rlaif_jax.recipes.improve import Improvement, improve, with_critic
from rlaif_jax.recipes.judge_rewards import Compare, Surroundings
from rlaif_jax.recipes.own_prompts import OwnPrompts, read_prompts
from rlaif_jax.recipes.reasons import Reasons, joined_reasons
from rlaif_jax.recipes.rewards import (
    Judging,
    PeopleReward,
    Reward,
    WeightedReward,
    build_reward,
    people_scales,
    people_words,
    read_reward,
    reward_line,
    reward_names,
    rewards_help,
    settings_help,
    sparing,
)
from rlaif_jax.recipes.start import (
    LoadedPolicy,
    Start,
    as_bytes,
    day_of,
    keep_day,
    keep_fingerprints,
    load_policy,
    most_frequent,
    on_day_of_run,
    scale_of,
)
from rlaif_jax.recipes.verdicts import JUDGE, SCORE, SECOND, AgainstStart, audit, by_opinion, conclude
from rlaif_jax.rewards.shaping import identity_normaliser
from rlaif_jax.rewards.spread import check_oversample
from rlaif_jax.run import Run
from rlaif_jax.sinks.wandb import Tracking, tracked
from rlaif_jax.train import TrainConfig
from rlaif_jax.types import INIT, Frozen, step_key

STAGES = (
    PlannedStage(
        "start", "the policy answers before training: the scale of the rewards, and what it is compared with", 20
    ),
    PlannedStage("rl", "the policy learns from the rewards", 100),
)

RewardLine = Annotated[
    tuple[WeightedReward, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar='"KIND [TARGET] [SETTING=VALUE ...]"',
        instance_from_str=lambda lines: tuple(read_reward(line) for line in lines),
        is_instance=lambda x: isinstance(x, tuple) and all(isinstance(part, WeightedReward) for part in x),
        str_from_instance=lambda rewards: [reward_line(reward) for reward in rewards],
    ),
]


@dataclasses.dataclass(frozen=True)
class RlaifConfig:
    """All settings.

    Attributes:
        policy: the model to train: a Hugging Face folder, a hub id (org/name or org/name@revision), a .gguf file, or a
            llama2.c .bin file.
        prompts: what it answers: a .jsonl or .parquet file with a field `prompt` (a text or a list of messages), a .txt file
            with one prompt a line, or tfds:NAME/SPLIT.
        feedback: the rewards, a line of words each: `KIND [TARGET] [SETTING=VALUE ...] weight=W name=NAME`. Above is
            what there is.
        second: a judge that training never sees, as a line of words: it compares the answers after training with those
            before, and its opinion is followed during training; "" = none.
        tokenizer: the tokenizer's file or folder, where the model's folder holds none.
        eval_prompts: held-out prompts, as `prompts`; None = `held_out` of the prompts.
        held_out: prompts that are held out, where `eval_prompts` gives none.
        template: auto: prompts become messages in the model's chat template where it has one; chat: they must; plain: the
            prompt itself is continued.
        system: the system message before each prompt of a chat; "" = that of the record, if any.
        chat: another chat template than the model's, and values for its variables.
        scale: the scale of each reward: start: mean 0 and deviation 1 over answers of the start; none: as it is. People are
            not asked for it: judgements spread evenly over their range have mean 0 and deviation 1.
        scale_answers: number of these answers; each is judged.
        lora: train a low-rank adapter instead of all weights.
        adapter: rank and matrices of the adapter, with `lora`.
        dtype: of matrix products.
        remat: recompute blocks in the backward pass: less memory, more time.
        seed: of everything random.
        out: the run's folder.
        resume: go on with the run in `out` where it stopped.
        tracking: where the run is shown besides its folder: Weights & Biases.
        train: the loop.
        sampling: how answers are drawn.
        ppo: the algorithm: GRPO by default, PPO with `ppo.advantage:gae`.
    """

    policy: str = ""
    prompts: str = ""
    feedback: RewardLine = ()
    second: str = ""
    tokenizer: Path | None = None
    eval_prompts: str | None = None
    held_out: int = 64
    template: Literal["auto", "chat", "plain"] = "auto"
    system: str = ""
    chat: ChatConfig = ChatConfig()
    scale: Literal["start", "none"] = "start"
    scale_answers: int = 128
    lora: bool = False
    adapter: LoRAConfig = LoRAConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    seed: int = 0
    out: Path = Path("runs/rlaif")
    resume: bool = False
    tracking: Tracking = Tracking()
    train: TrainConfig = TrainConfig(steps=100, prompts_per_step=8, prompt_length=256, eval_every=20, save_every=20)
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=128)
    ppo: PPOConfig = PPOConfig(
        advantage=GroupNormalised(),
        answers_per_prompt=8,
        num_epochs=1,
        kl_in="loss",
        kl_coef=0.02,
        kl_horizon=1280.0,  # 20 default steps: of a hundred, with the usual 10,000 a target would change nothing
        packed_rows=4,
        policy_optimizer=OptimizerConfig(learning_rate=1e-6, schedule="constant", warmup_updates=5, eps=1e-8),
    )

    def __post_init__(self) -> None:
        require(self.scale_answers >= 2, f"scale_answers must be >= 2, not {self.scale_answers}")
        require(self.held_out >= 2, f"held_out must be >= 2, not {self.held_out}")
        self.ppo.shaping.check(self.sampling.max_new_tokens)
        check_oversample(self.train.oversample, self.ppo.answers_per_prompt)
        ranked = any(isinstance(part.reward, PeopleReward) and part.reward.kind == "rank" for part in self.feedback)
        require(
            not ranked or self.ppo.answers_per_prompt <= RANK.max_answers,
            f"people kind=rank: people rank at most {RANK.max_answers} answers at once, not the "
            f"{self.ppo.answers_per_prompt} of ppo.answers_per_prompt: draw fewer, or take kind=rate",
        )
        require(
            not self.ppo.shaping.weights,
            "ppo.shaping.weights are given with the rewards here: --feedback 'KIND ... weight=W'",
        )
        self.adapter.check_used(self.lora)


def get_config() -> RlaifConfig:
    """Returns the default settings."""
    return RlaifConfig()


def help_text() -> str:
    """Returns the description of --help: what the tool does, an example, and the kinds of rewards."""
    return (
        "Trains your own model on your own prompts by feedback.\n\n"
        "  python -m rlaif_jax train --policy models/smollm2 --prompts prompts.jsonl \\\n"
        '      --feedback "judge models/smollm2 min_mass=0.1" "function rewards.py:brevity weight=0.5"\n\n'
        f"Rewards (--feedback, --second); `python -m rlaif_jax train {HELP_REWARDS}` explains their settings:\n{rewards_help()}"
    )


HELP_REWARDS = "--help-rewards"
PAGES = {HELP_REWARDS: settings_help}
"""Options of the command line that print a text."""

NAMED_SETTINGS = {name: {"ppo": to_json(ppo)} for name, ppo in NAMED.items()}
"""The settings of `--config NAME`."""


def main(config: RlaifConfig) -> dict[str, Any]:
    """Trains the policy and returns the metrics.

    The policy is written to OUT/model, its adapter to OUT/adapter, the held-out answers to OUT/answers.jsonl.
    """
    config.tracking.check()
    require(bool(config.prompts), "no prompts: give --prompts, a .jsonl, .parquet or .txt file or tfds:NAME/SPLIT")
    require(
        bool(config.feedback),
        f"no feedback: give --feedback 'KIND ...'; --help lists the kinds, {HELP_REWARDS} their settings",
    )
    second = read_reward(config.second, "--second").reward if config.second else None
    require(
        not isinstance(second, PeopleReward) or second.kind == "rate",
        "--second people: a second opinion is of one answer alone: people can only rate (kind=rate)",
    )
    policy = load_policy(config.policy, config.tokenizer, config.chat, dtype=config.dtype, remat=config.remat)
    if config.lora:
        jax.eval_shape(
            config.adapter.init, jax.random.key(0), policy.params
        )  # whether it fits, before there is a folder
    own = on_day_of_run(policy.tokenizer, config.out, resume=config.resume)
    policy = dataclasses.replace(policy, tokenizer=own)
    with (
        Run(config.out, "rlaif", config, seed=config.seed, resume=config.resume) as run,
        tracked(run, config.tracking) as sinks,
        MetricsWriter(config.out, display=run.display, sinks=sinks) as writer,
        ExitStack() as opened,
    ):
        run.display.plan(STAGES)
        # Before the first judgement, which may cost money; the loop looks again, at its checkpoints.
        now = fingerprint(policy.params)
        require_weights(run.folder, {"policy": run.metrics.get("policy_sha256", now)}, {"policy": now})
        run.metrics["policy_sha256"] = now
        keep_day(run, policy.tokenizer)
        if words := people_words([part.reward for part in config.feedback] + ([second] if second else [])):
            run.display.print(words)
        _train(config, policy, second, run, writer, opened)
    return run.metrics | {"verdict": run.verdict}


def _train(
    config: RlaifConfig,
    policy: LoadedPolicy,
    second: Reward | None,
    run: Run,
    writer: MetricsWriter,
    opened: ExitStack,
) -> None:
    """Trains `policy`; everything that the rewards open is closed with `opened`."""
    runner = make_runner(config.train.parallel)
    config.train.check(config.ppo, runner.devices)
    lora = config.adapter if config.lora else None
    texts = TextPolicy(policy.model, config.sampling, policy.tokenizer.stop_ids, policy.tokenizer.pad_id, lora)
    texts.check(config.train.prompt_length, policy.tokenizer)
    prompts = _prompts(config, policy.tokenizer, runner.devices, run)
    judges = _judges(config, second, run, runner, opened)
    run.report()

    # ---- What the policy answers before training
    run.display.begin("start")
    run.settled()  # judgements may cost money or people's time
    rows = config.train.prompts_drawn * draw_count(config.ppo.draws)
    start = Start(policy, runner, config.sampling, config.train.prompt_length, rows, prompts.add_bos, config.seed)
    if judges.baseline != "nowhere":
        prompts = start.with_baseline(run, prompts, training=judges.baseline == "everywhere")
    normaliser = scale_of(run, start, prompts.training, judges.sparing, config.scale_answers, judges.scales)
    if config.scale == "none":
        normaliser = jax.tree.map(lambda fitted, plain: jnp.full_like(fitted, plain), normaliser, identity_normaliser())
    shaping = dataclasses.replace(config.ppo.shaping, weights=tuple(part.weight for part in config.feedback))
    ppo = dataclasses.replace(config.ppo, shaping=shaping)
    held_out = next(start.batches(prompts.held_out, len(prompts.held_out), shuffle=False))
    asked = [str(record["prompt"]) for record in held_out.records]
    against = AgainstStart(judges.compare, SECOND if second else JUDGE, asked) if judges.compare else None
    learned = policy.params if lora is None else lora.init(step_key(config.seed, 1, INIT), policy.params)
    base = None if lora is None else runner.place(policy.params)
    evaluation = Evaluation(
        texts,
        policy.tokenizer,
        runner,
        held_out,
        config.seed,
        source=judges.held_out,
        name=SCORE,
        frozen=Frozen(base=base),
        second=judges.opinion,
        during_training=judges.during_training,
        reasons=judges.reasons,
        combination=Combination(judges.source.names, shaping, normaliser),
        further=against,
    )
    with run.interruptible(), run.display.wait("held-out answers before training"):
        before = evaluation.answers(learned)
    _is_heard(run, second, judges.opinion, before)
    if against is not None:
        against.start = before

    # ---- The policy learns, and answers again
    critic, params = with_critic(
        ppo, policy.model, learned, policy.params["trunk"], step_key(config.seed, 0, INIT), lora
    )
    found = improve(
        config.train,
        run,
        writer,
        algorithm=ppo.build(texts, critic, steps=config.train.steps),
        evaluation=evaluation,
        params=params,
        prompts=start.batches(prompts.training, config.train.prompts_drawn),
        feedback=judges.source,
        normaliser=normaliser,
        before=before,
    )
    _save(run.folder, asked, found, policy, lora, config.policy)  # the judges may yet fail
    with run.interruptible(), run.display.wait("both answers compared by the judges"):
        run.metrics |= by_opinion(before, found.after) if against is None else against.metrics(found.after)
        if judges.audit is not None:
            judges.audit(asked, before, found.after)
    run.metrics["wall_s"] = round(run.wall_s, 1)
    run.missing |= judges.source.missing()
    conclude(run, SECOND if second else None if against is None else JUDGE)


def _is_heard(run: Run, second: Reward | None, opinion: FeedbackSource | None, before: Answers) -> None:
    """Warns where the second judge judges few answers. Raises UserError where it judges none."""
    if opinion is None or before.second is None or isinstance(second, PeopleReward):  # people may come later
        return
    judged, size = int(np.isfinite(before.second).sum()), len(before.texts)
    said = f"--second judged {judged} of {size} held-out answers before training ({most_frequent(opinion)})"
    require(judged > 0, f"{said}: it would tell nothing about the policy")
    if judged < size / 2:
        run.warn(f"{said}. Try: a smaller min_mass, or another judge.")


def _save(
    folder: Path,
    prompts: Sequence[str],
    found: Improvement,
    policy: LoadedPolicy,
    lora: LoRAConfig | None,
    base_name: str,
) -> None:
    """Writes model, adapter, and the held-out answers before and after, as `judge --items` reads them.

    Args:
        folder: of the run.
        prompts: the held-out prompts.
        found: answers and parameters.
        policy: the policy before training.
        lora: the adapter's settings; None: all weights have learned.
        base_name: of the policy before training, for the adapter.
    """
    with atomic_write(folder / "answers.jsonl") as file:
        for prompt, *answers in zip(prompts, found.before.texts, found.after.texts, strict=True):
            row = {"prompt": prompt, "answers": answers, "generators": ["before", "after"]}
            file.write(json.dumps(row) + "\n")
    whole = found.params if lora is None else lora.merge(policy.params, found.params)
    save_model(folder / "model", policy.model, whole, policy.tokenizer)
    if lora is not None:
        save_adapter(folder / "adapter", policy.model, lora, found.params, base_name=base_name)


class _Judges(NamedTuple):
    """What judges the answers.

    Attributes:
        source: the rewards.
        held_out: judges the held-out answers before and after training.
        sparing: judges all that people are not asked about.
        during_training: the rewards and the second opinion of evaluations during training; None where no people judge.
        scales: of the rewards that have one without asking.
        opinion: the second opinion.
        compare: who compares answers with those before training: the second judge, or the first one without a second.
        audit: looks at how the first judge compares (prompts, answers before, answers after), where there is a second one.
        baseline: which prompts need the answer before training as a field.
        reasons: why an answer got its reward.
    """

    source: JoinedSource
    held_out: JoinedSource
    sparing: JoinedSource
    during_training: tuple[FeedbackSource | None, FeedbackSource | None] | None
    scales: dict[str, tuple[float, float]]
    opinion: FeedbackSource | None
    compare: Compare | None
    audit: Callable[[Sequence[str], Answers, Answers], None] | None
    baseline: Literal["everywhere", "held out", "nowhere"]
    reasons: Reasons | None


def _judges(config: RlaifConfig, second: Reward | None, run: Run, runner: Runner, opened: ExitStack) -> _Judges:
    around = Surroundings(run.folder, config.seed, runner, run.stopped, opened, day=lambda: day_of(run))
    rewards, names = [part.reward for part in config.feedback], reward_names(config.feedback)
    said = [(name, reward.reasons(around)) for name, reward in zip(names, rewards) if isinstance(reward, Judging)]
    first = next((reward for reward in rewards if isinstance(reward, Judging)), None)
    asked = second or first
    source = JoinedSource(tuple(build_reward(reward, around) for reward in rewards), names)
    opinion = build_reward(second, around) if second else None
    spared, people = sparing(source, rewards), isinstance(second, PeopleReward)
    return _Judges(
        source,
        sparing(source, rewards, held_out=True),
        spared,
        (spared, None if people else opinion) if people or people_scales(names, rewards) else None,
        people_scales(names, rewards),
        opinion,
        asked.comparer(around) if isinstance(asked, Judging) else None,
        partial(audit, run, first.comparer(around), first.form == "ranking") if second and first else None,
        "everywhere" if any(map(_compares, rewards)) else "held out" if _compares(second) else "nowhere",
        joined_reasons(said),
    )


def _compares(reward: Reward | None) -> bool:
    """Returns whether a reward compares answers with those of the policy before training."""
    return isinstance(reward, Judging) and reward.needs_baseline


def _prompts(config: RlaifConfig, tokenizer: Tokenizer, devices: int, run: Run) -> OwnPrompts:
    """Returns the prompts; a resumed run must have those that it began with."""
    prompts = read_prompts(
        config.prompts,
        tokenizer,
        eval_source=config.eval_prompts,
        held_out=config.held_out,
        multiple_of=devices,
        template=config.template,
        system=config.system,
        prompt_length=config.train.prompt_length,
        seed=config.seed,
    )
    drawn = config.train.prompts_drawn
    require(
        len(prompts.training) >= drawn,
        f"{config.prompts}: {len(prompts.training)} prompts are left to learn on, fewer than the {drawn} of a step "
        "(train.prompts_per_step x train.oversample): give more prompts, or draw fewer",
    )
    keep_fingerprints(run, prompts=as_bytes(prompts.training), held_out_prompts=as_bytes(prompts.held_out))
    run.missing |= {f"prompts: {reason}": count for reason, count in prompts.left_out.items()}
    return prompts
