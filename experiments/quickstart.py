"""From nothing to a better language model in two to four minutes on two CPU cores.

    python experiments/quickstart.py --out runs/quickstart --seed 0

A base language model of the built-in text world is trained, and from it two models: an AI labeler, trained on the
transcripts of simulated people and then frozen, and a supervised policy that imitates a mediocre writer. Both the base model
and the labeler learn until a held-out check says that they can do what the next stage needs. PPO then improves the policy:
the labeler writes its reasons about each answer of each step and scores it, and the expected score is the reward. On
held-out towns the world's exact gold score measures by how much; nothing except this last step knows the gold score. Rules
that read only the prompt and the answer give a second opinion, and the run warns when it falls while the reward rises.

`--reward reward_model` learns a reward model from the labeler's scores of pairs of answers and maximises that; the labeler
is then the second opinion. `--shortcuts` shows how such a reward is exploited: writers have habits that look like quality,
and the reward model has seen few labels. `--reward oracle` and `--reward random` are the control arms.

Results for twenty seeds: experiments/RESULTS.md.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take seconds
    from rlaif_jax.progress.startup import Loading

    loading = Loading()

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from rlaif_jax.algorithms.fit import FitConfig
from rlaif_jax.algorithms.ppo import PPOConfig
from rlaif_jax.command_line import command_line, ended_worse
from rlaif_jax.config import require
from rlaif_jax.data.prompts import Record
from rlaif_jax.data.readers import TfdsRecords
from rlaif_jax.data.world import corpus, labeler_prompts
from rlaif_jax.data.world.people import Commenter
from rlaif_jax.data.world.tasks.all import WORLD_TASKS
from rlaif_jax.evaluate import Evaluation
from rlaif_jax.feedback.constitution.constitution import ConstitutionSource, load_constitution
from rlaif_jax.feedback.judges.language_model import DirectScoreSource, LanguageModelJudge
from rlaif_jax.feedback.judges.reward_model import RewardModel
from rlaif_jax.feedback.records.forms import sha256
from rlaif_jax.feedback.sources import DeviceReward, DeviceSource, FeedbackSource, FunctionSource
from rlaif_jax.metrics import MetricsWriter
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import make_runner
from rlaif_jax.progress.plan import PlannedStage
from rlaif_jax.quality.win_rates import pair_outcomes, verdict_of, win_rate
from rlaif_jax.recipes.improve import Improvement, improve, normaliser_of, with_critic
from rlaif_jax.recipes.world.models import ANSWER_LENGTH, PPO, PROMPT_LENGTH, SAMPLING, ModelsConfig, WorldModels
from rlaif_jax.recipes.world.rewards import agreement_or_none, learn_reward
from rlaif_jax.report.numbers import interval_text, share_text
from rlaif_jax.run import FinishedStage, Run
from rlaif_jax.train import TrainConfig
from rlaif_jax.types import INIT, Params, step_key

STAGES = (
    PlannedStage("lm", "a language model learns the language of the text world", 45, usual=1_600),
    PlannedStage("labeler", "from it, an AI labeler learns to judge, and is then frozen", 45, usual=1_000),
    PlannedStage("sft", "from it, a policy learns to imitate a mediocre writer", 10),
    PlannedStage("rl", "PPO improves the policy by the labeler's scores", 55),
)
LEARNED = (
    PlannedStage("pairs", "the labeler judges pairs of the policy's answers", 15),
    PlannedStage("reward_model", "a reward model learns the labeler's judgements", 15),
)
RULES = Path(__file__).with_name("brindlemoor.toml")
TASKS = {task.name: task for task in WORLD_TASKS}


@dataclasses.dataclass(frozen=True)
class QuickstartConfig:
    """All settings of the quickstart.

    Attributes:
        seed: of everything random.
        out: the run's folder.
        resume: go on with the run in `out` where it stopped.
        stages: the folder of finished stages, which runs may share; None: in `out`.
        task: which of the world's tasks.
        shortcuts: whether its writers plant features that look like quality (length, a confident word, flattery).
        reward: what PPO maximises: the judge's own score, that of a reward model that learned its judgements, gold
            itself (oracle) or nothing that means anything (random); None: judge, with shortcuts reward_model.
        models: the language models.
        reward_model: training of the reward model.
        principle: by which the labeler judges.
        pair_prompts: prompts whose answers the judge compares, two pairs each; None: 2,000, with shortcuts 40, from which
            a reward model learns habits rather than quality.
        eval_prompts: held-out prompts of the evaluation.
        train: the loop.
        sampling: how answers are drawn.
        ppo: the algorithm.
    """

    seed: int = 0
    out: Path = Path("runs/quickstart")
    resume: bool = False
    stages: Path | None = None
    task: Literal["summarisation", "dialogue"] = "summarisation"
    shortcuts: bool = False
    reward: Literal["judge", "reward_model", "oracle", "random"] | None = None
    models: ModelsConfig = ModelsConfig()
    reward_model: FitConfig = FitConfig(updates=200, learning_rate=1e-3)
    principle: labeler_prompts.WorldPrinciple = "<overall>"
    pair_prompts: int | None = None
    eval_prompts: int = 512
    train: TrainConfig = TrainConfig(
        steps=60, prompts_per_step=128, prompt_length=PROMPT_LENGTH, eval_every=20, save_every=20
    )
    sampling: SamplingConfig = SAMPLING
    ppo: PPOConfig = PPO

    def __post_init__(self) -> None:
        pairs = self.pair_prompts
        require(pairs is None or pairs >= 20, f"pair_prompts must be >= 20, not {pairs}")
        require(self.eval_prompts >= 8, f"eval_prompts must be >= 8, not {self.eval_prompts}")
        require(
            (self.train.prompt_length, self.sampling.max_new_tokens) == (PROMPT_LENGTH, ANSWER_LENGTH),
            f"the world's prompts have {PROMPT_LENGTH} tokens and its answers {ANSWER_LENGTH}: "
            "train.prompt_length and sampling.max_new_tokens cannot be changed here",
        )


def get_config() -> QuickstartConfig:
    """Returns the default settings."""
    return QuickstartConfig()


def labeler_mix(principle: labeler_prompts.WorldPrinciple, reasons: bool = True) -> corpus.LabelerMix:
    """Returns what the labeler is trained on: scores by the principle, after reasons or at first sight."""
    careful = corpus.only_reasons(corpus.LabelerMix())
    mix = careful if reasons else dataclasses.replace(careful, score=1.0, score_reasoning=0.0)
    return dataclasses.replace(mix, principles=(principle,), commenter=Commenter(0.02))


def main(config: QuickstartConfig) -> dict[str, Any]:
    """Runs the quickstart and returns the run's metrics."""
    with (
        Run(config.out, "quickstart", config, seed=config.seed, resume=config.resume, stages=config.stages) as run,
        MetricsWriter(config.out, display=run.display) as writer,
    ):
        runner = make_runner(config.train.parallel)
        config.train.check(config.ppo, runner.devices)
        kind = config.reward or ("reward_model" if config.shortcuts else "judge")
        run.display.plan([*STAGES[:-1], *(LEARNED if kind == "reward_model" else ()), STAGES[-1]])
        world = WorldModels(TASKS[config.task], config.shortcuts, config.models, run, writer, runner)
        world.policy(config.sampling).check(config.train.prompt_length, world.tokenizer)  # before any stage takes time
        training, held_out = world.records("train"), world.records("test_entities")

        # ---- A language model, an AI labeler that is frozen before any policy exists, a supervised policy
        base = world.base()
        labeler = world.labeler(base, labeler_mix(config.principle, config.models.reasons))
        judge = world.judge(labeler.params, config.principle)
        frozen_hash = judge.hash
        sft = world.sft(base, training)

        # ---- What PPO maximises, and a second opinion on it
        reward = make_reward(config, kind, world, judge, labeler, sft, training)

        # ---- PPO, and the gold score before and after
        policy = world.policy(config.sampling)
        prompts = world.first_prompts(held_out, config.eval_prompts)
        evaluation = Evaluation(
            policy,
            world.tokenizer,
            runner,
            prompts,
            config.seed,
            world.gold,
            reward.source,
            reasons=(lambda records, answers: judge.reasons([str(r["prompt"]) for r in records], answers)[0])
            if config.models.reasons
            else None,
            second=reward.second,
        )
        with run.interruptible(), run.display.wait("held-out answers before training"):
            before = evaluation.answers(sft.params)
        assert before.rewards is not None
        key = step_key(config.seed, 2, INIT)
        critic, params = with_critic(config.ppo, world.model, sft.params, reward.trunk, key)
        found = improve(
            config.train,
            run,
            writer,
            algorithm=config.ppo.build(policy, critic, steps=config.train.steps),
            evaluation=evaluation,
            params=params,
            prompts=world.prompts(training, config.train.prompts_drawn),
            feedback=None if reward.on_device else reward.source,
            device_rewards=reward.on_device,
            normaliser=normaliser_of(before.rewards),
            before=before,
        )

        # ---- What the judge, unchanged, says about the new answers; what came out, in words
        run.check("labeler_weights_unchanged", world.judge(labeler.params, config.principle).hash == frozen_hash)
        with run.display.wait("the labeler judges the answers before and after"):
            judged = judge_metrics(judge, [str(record["prompt"]) for record in prompts.records], found)
        run.metrics |= judged | {"labeler_sha256": frozen_hash, "wall_s": round(run.wall_s, 1)}
        tell(run, kind, config.shortcuts)
    return run.metrics | {"verdict": run.verdict}


class Reward(NamedTuple):
    """What PPO maximises.

    Attributes:
        source: the reward on the host.
        on_device: the same reward inside the compiled program, with its parameters; empty: `source` gives it.
        trunk: parameters that the critic's trunk starts from.
        second: another opinion on the answers.
    """

    source: FeedbackSource
    on_device: list[tuple[DeviceReward, Params]]
    trunk: Params
    second: FeedbackSource | None


def make_reward(
    config: QuickstartConfig,
    kind: str,
    world: WorldModels,
    judge: LanguageModelJudge,
    labeler: FinishedStage,
    sft: FinishedStage,
    training: TfdsRecords,
) -> Reward:
    """Returns what PPO maximises; a reward model is a stage of the run.

    Args:
        config: the settings.
        kind: judge, reward_model, oracle or random.
        world: the world's models.
        judge: the labeler as a judge.
        labeler: its parameters.
        sft: the supervised policy.
        training: scenes of training towns.
    """
    by_judge, trunk = DirectScoreSource(judge), labeler.params["trunk"]
    if kind == "judge":
        rules = ConstitutionSource(load_constitution(RULES)) if config.task == "summarisation" else None
        return Reward(by_judge, [], trunk, rules)
    if kind == "oracle":
        return Reward(
            FunctionSource(lambda record, answer: float(world.gold([record], [answer])[0])), [], trunk, by_judge
        )
    if kind == "random":
        return Reward(FunctionSource(partial(random_score, config.seed)), [], trunk, by_judge)
    learned = learn_reward(
        world,
        labeler,
        sft,
        training,
        principle=config.principle,
        pair_prompts=config.pair_prompts or (40 if config.shortcuts else 2_000),
        sampling=config.sampling,
        settings=config.reward_model,
    )
    world.run.metrics["rm_accuracy"] = learned.accuracy()
    model = RewardModel(learned.model)
    source = DeviceSource(model, learned.params, world.runner)
    return Reward(source, [(model, learned.params)], learned.params["trunk"], by_judge)


def random_score(seed: int, record: Record, answer: str) -> float:
    """Returns a score in [0, 1) that depends on prompt and answer as a hash does: nothing can be learned from it."""
    return int(sha256([seed, record["prompt"], answer])[:8], 16) / 2**32


def judge_metrics(judge: LanguageModelJudge, prompts: list[str], found: Improvement) -> dict[str, Any]:
    """Returns how often the judge scores the answer after training higher, and how often it agrees with gold on pairs."""
    after, before = judge.score(prompts, found.after.texts), judge.score(prompts, found.before.texts)
    first, second = (np.where(scores.valid, scores.expected, np.nan) for scores in (after, before))
    outcomes = pair_outcomes(first, second)
    better = found.after.scores - found.before.scores
    decided = np.isfinite(outcomes) & (better != 0)
    return {
        "judge_win_rate": win_rate(first, second) if np.isfinite(outcomes).any() else None,
        "judge_agreement_final": agreement_or_none((outcomes > 0.5)[decided], (better > 0)[decided]),
    }


def tell(run: Run, kind: str, shortcuts: bool) -> None:
    """Gives the run its verdict and says in three sentences what happened, by what measure, and what to do next."""
    numbers = run.metrics
    low, high = numbers["win_rate_gold_ci95"]
    run.verdict = verdict_of(low, high)
    by = {
        "judge": "an AI labeler's scores",
        "reward_model": "a reward model of an AI labeler's judgements",
        "oracle": "the gold score itself (control arm)",
        "random": "random scores (control arm)",
    }[kind]
    judge = numbers["judge_win_rate"]
    other = (
        "the labeler's own scores in the same world (--shortcuts --reward judge)"
        if shortcuts
        else "a world with planted habits and few labels (--shortcuts)"
    )
    run.story += [
        f"The policy was trained on {by} for {run.steps_done} steps, and its answers to prompts about new towns became "
        f"{run.verdict}: they win {share_text(numbers['win_rate_gold'])} of comparisons with those "
        f"before (95 % interval {interval_text(share_text(low), share_text(high))}).",
        f"Gold, the world's exact score from 0 to 1, which no model has seen, went from {numbers['gold_before']:.3f} to "
        f"{numbers['gold_after']:.3f}"
        + (f"; the labeler prefers the new answers in {share_text(judge)}." if judge is not None else "."),
        f"Next: open the page, try another seed (--seed {run.seed + 1}) or {other}; "
        "docs/guides/loop.md shows the loop with a model, prompts and a judge of your own.",
    ]


if __name__ == "__main__":
    command_line(main, get_config(), __doc__, loading=loading, failed=ended_worse)
