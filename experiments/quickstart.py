"""From nothing to a better language model in under ten minutes on two CPU cores.

    python experiments/quickstart.py --out runs/quickstart --seed 0

A base language model of the built-in text world is trained, and from it two models: an AI labeler, trained on the
transcripts of simulated people and then frozen, and a supervised policy that imitates a mediocre writer. The labeler
writes its reasons about each of the policy's answers and scores it. The two score distributions of a pair of answers
give a soft label (the labeler's verdicts on pairs in both orders are reported next to it). A reward model learns these
labels, and PPO improves the policy. On held-out towns the world's exact gold score measures by how much; nothing except
this last step knows the gold score.

Expected (seeds 0, 1, 2): see experiments/RESULTS.md.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take seconds
    from rlaif_jax.progress.startup import Loading

    loading = Loading()

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlaif_jax.algorithms.fit import FitConfig
from rlaif_jax.algorithms.ppo import PPOConfig
from rlaif_jax.command_line import command_line
from rlaif_jax.config import require
from rlaif_jax.data.world import corpus, labeler_prompts
from rlaif_jax.data.world.tasks.all import WORLD_TASKS
from rlaif_jax.evaluate import Evaluation
from rlaif_jax.feedback.judges.language_model import DirectScoreSource, LanguageModelJudge, preference_from_scores
from rlaif_jax.feedback.judges.reward_model import RewardModel
from rlaif_jax.feedback.sources import DeviceSource
from rlaif_jax.metrics import MetricsWriter
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import make_runner
from rlaif_jax.progress.plan import PlannedStage
from rlaif_jax.recipes.improve import Improvement, improve, normaliser_of, with_critic
from rlaif_jax.recipes.world import ANSWER_LENGTH, PPO, PROMPT_LENGTH, SAMPLING, ModelsConfig, WorldModels
from rlaif_jax.recipes.world_rewards import agreement_or_none, learn_reward
from rlaif_jax.run import Run
from rlaif_jax.train import TrainConfig
from rlaif_jax.types import INIT, step_key

STAGES = (
    PlannedStage("lm", "a language model learns the language of the text world", 25),
    PlannedStage("labeler", "from it, an AI labeler learns to judge, and is then frozen", 50),
    PlannedStage("sft", "from it, a policy learns to imitate a mediocre writer", 10),
    PlannedStage("pairs", "the labeler judges pairs of the policy's answers", 30),
    PlannedStage("reward_model", "a reward model learns the labeler's judgements", 15),
    PlannedStage("rl", "PPO improves the policy", 60),
)
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
        reward: what PPO maximises, the reward model's score or the judge's own.
        models: the language models.
        reward_model: training of the reward model.
        principle: by which the labeler judges.
        pair_prompts: prompts whose answers the judge compares, two pairs each.
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
    reward: Literal["reward_model", "direct"] = "reward_model"
    models: ModelsConfig = ModelsConfig()
    reward_model: FitConfig = FitConfig(updates=200, learning_rate=1e-3)
    principle: labeler_prompts.WorldPrinciple = "<overall>"
    pair_prompts: int = 2_000
    eval_prompts: int = 512
    train: TrainConfig = TrainConfig(
        steps=60, prompts_per_step=128, prompt_length=PROMPT_LENGTH, eval_every=20, save_every=20
    )
    sampling: SamplingConfig = SAMPLING
    ppo: PPOConfig = PPO

    def __post_init__(self) -> None:
        require(self.pair_prompts >= 20, f"pair_prompts must be >= 20, not {self.pair_prompts}")
        require(self.eval_prompts >= 8, f"eval_prompts must be >= 8, not {self.eval_prompts}")
        require(
            (self.train.prompt_length, self.sampling.max_new_tokens) == (PROMPT_LENGTH, ANSWER_LENGTH),
            f"the world's prompts have {PROMPT_LENGTH} tokens and its answers {ANSWER_LENGTH}: "
            "train.prompt_length and sampling.max_new_tokens cannot be changed here",
        )


def get_config() -> QuickstartConfig:
    """Returns the default settings."""
    return QuickstartConfig()


def labeler_mix(principle: labeler_prompts.WorldPrinciple) -> corpus.LabelerMix:
    """Returns what the labeler is trained on: scores after reasons, and comparisons."""
    return corpus.LabelerMix(
        principles=(principle,),
        score_reasoning=0.75,
        pairwise=0.25,
        pairwise_reasoning=0.0,
        score=0.0,
        revision=0.0,
        value_questions=0.0,
        yes_no_questions=0.0,
    )


def main(config: QuickstartConfig) -> dict[str, Any]:
    """Runs the quickstart and returns the run's metrics."""
    with (
        Run(config.out, "quickstart", config, seed=config.seed, resume=config.resume, stages=config.stages) as run,
        MetricsWriter(config.out, display=run.display) as writer,
    ):
        run.display.plan(STAGES)
        runner = make_runner(config.train.parallel)
        config.train.check(config.ppo, runner.devices)
        world = WorldModels(TASKS[config.task], config.shortcuts, config.models, run, writer, runner)
        training, held_out = world.records("train"), world.records("test_entities")

        # ---- A language model, an AI labeler that is frozen before any policy exists, a supervised policy
        base = world.base()
        labeler = world.labeler(base, labeler_mix(config.principle))
        judge = world.judge(labeler.params, config.principle)
        frozen_hash = judge.hash
        sft = world.sft(base, training)

        # ---- AI feedback on the policy's answers, and a reward model that learns it
        learned = learn_reward(
            world,
            labeler,
            sft,
            training,
            principle=config.principle,
            pair_prompts=config.pair_prompts,
            sampling=config.sampling,
            settings=config.reward_model,
        )
        reward = RewardModel(learned.model)
        by_model = config.reward == "reward_model"
        source = DeviceSource(reward, learned.params, runner) if by_model else DirectScoreSource(judge)

        # ---- PPO, and the gold score before and after
        policy = world.policy(config.sampling)
        prompts = world.first_prompts(held_out, config.eval_prompts)
        evaluation = Evaluation(policy, world.tokenizer, runner, prompts, config.seed, world.gold, source)
        run.display.begin("rl")
        with run.display.wait("held-out answers before training"):
            before = evaluation.answers(sft.params)
        assert before.rewards is not None
        key = step_key(config.seed, 2, INIT)
        critic, params = with_critic(config.ppo, world.model, sft.params, learned.params["trunk"], key)
        found = improve(
            config.train,
            run,
            writer,
            algorithm=config.ppo.build(policy, critic, steps=config.train.steps),
            evaluation=evaluation,
            params=params,
            prompts=world.prompts(training, config.train.prompts_per_step),
            feedback=None if by_model else source,
            device_rewards=[(reward, learned.params)] if by_model else [],
            normaliser=normaliser_of(before.rewards),
            before=before,
        )

        # ---- What the judge, unchanged, says about the new answers
        run.check("labeler_weights_unchanged", world.judge(labeler.params, config.principle).hash == frozen_hash)
        run.metrics |= judge_metrics(judge, [str(record["prompt"]) for record in prompts.records], found) | {
            "rm_accuracy": learned.accuracy(),
            "labeler_sha256": frozen_hash,
            "wall_s": round(run.wall_s, 1),
        }
        print("gold {gold_before:.3f} -> {gold_after:.3f}, win rate {win_rate_gold:.3f}".format(**run.metrics))
    return run.metrics


def judge_metrics(judge: LanguageModelJudge, prompts: list[str], found: Improvement) -> dict[str, Any]:
    """Returns how often the judge prefers the answers after training, and how often it agrees with gold on pairs."""
    preferred, valid = preference_from_scores(
        judge.score(prompts, found.after.texts), judge.score(prompts, found.before.texts)
    )
    better = found.after.scores - found.before.scores
    decided = valid & (better != 0)
    return {
        "judge_win_rate": float(np.mean(preferred[valid])) if valid.any() else None,
        "judge_agreement_final": agreement_or_none((preferred > 0.5)[decided], (better > 0)[decided]),
    }


if __name__ == "__main__":
    command_line(main, get_config(), __doc__, loading=loading)
