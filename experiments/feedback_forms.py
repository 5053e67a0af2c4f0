"""Every form of feedback from every kind of source, each to a policy that is better for it.

    python experiments/feedback_forms.py --out runs/feedback_forms --seed 0

In the built-in text world a supervised policy answers prompts, and PPO improves it. The answers of each step are judged in
one of four forms (comments, ratings, corrections, rankings) by one of four kinds of source: an AI labeler (a language model
trained on simulated people's transcripts), rules (experiments/brindlemoor.toml), simulated people, and the same people at
work on the annotation page, over HTTP, while the run waits for them. Pure functions turn judgements into rewards; no reward
model is in between. The world's exact gold score, on towns that never occurred, measures how much each of the sixteen runs
helps.

Each run has its own folder, store and page in OUT. `--resume` goes on where it stopped. Expected: see
experiments/RESULTS.md.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take seconds
    from rlaif_jax.progress.startup import Loading

    loading = Loading()

import dataclasses
from pathlib import Path
from typing import Any

from rlaif_jax.algorithms.ppo import PPOConfig
from rlaif_jax.command_line import command_line
from rlaif_jax.config import StopRequested, require
from rlaif_jax.data.world import corpus
from rlaif_jax.data.world.scenes import scene_from_json
from rlaif_jax.data.world.tasks import summarisation
from rlaif_jax.evaluate import Answers, Evaluation, rewards_of
from rlaif_jax.feedback.constitution.constitution import load_constitution
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.metrics import MetricsWriter
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import make_runner
from rlaif_jax.policies.base import to_prompts
from rlaif_jax.policies.text import answer_texts, make_generator
from rlaif_jax.progress.plan import PlannedStage
from rlaif_jax.recipes.improve import improve, normaliser_of, with_critic
from rlaif_jax.recipes.world.judges import FORMS, Form, make_crowd
from rlaif_jax.recipes.world.models import PPO, PROMPT_LENGTH, SAMPLING, ModelsConfig, WorldModels
from rlaif_jax.recipes.world.sources import Origin, Sample, WorldSources, rewards_of_form
from rlaif_jax.run import Run
from rlaif_jax.train import TrainConfig
from rlaif_jax.types import FEEDBACK, INIT, Params, step_key

RULES = Path(__file__).with_name("brindlemoor.toml")
MODEL_STAGES = (
    PlannedStage("lm", "a language model learns the language of the text world", 20, usual=1_600),
    PlannedStage("labeler", "from it, an AI labeler learns to judge", 80),
    PlannedStage("sft", "from it, a policy learns to imitate a mediocre writer", 10),
)


@dataclasses.dataclass(frozen=True)
class FormsConfig:
    """All settings.

    Attributes:
        seed: of everything random.
        out: the run's folder.
        resume: go on with the run in `out` where it stopped.
        stages: the folder of finished stages, which runs may share; None: in `out`.
        forms: the forms of feedback that are run, each from all `origins`.
        origins: the kinds of source: the AI labeler, rules, simulated people, the same people at the annotation page.
        models: the language models.
        calibration_prompts: prompts whose answers are judged before the first step, for the mean and spread of rewards;
            of comments they are rated as well, which is what a comment's valence is learned from.
        eval_prompts: held-out prompts of the gold score.
        train: the loop.
        sampling: how answers are drawn.
        ppo: the algorithm.
    """

    seed: int = 0
    out: Path = Path("runs/feedback_forms")
    resume: bool = False
    stages: Path | None = None
    forms: tuple[Form, ...] = FORMS
    origins: tuple[Origin, ...] = ("ai", "rule", "simulated", "page")
    models: ModelsConfig = ModelsConfig()
    calibration_prompts: int = 256
    eval_prompts: int = 512
    train: TrainConfig = TrainConfig(
        steps=40, prompts_per_step=32, prompt_length=PROMPT_LENGTH, eval_every=20, save_every=20, keep_checkpoints=1
    )
    sampling: SamplingConfig = SAMPLING
    ppo: PPOConfig = dataclasses.replace(PPO, answers_per_prompt=4)

    def __post_init__(self) -> None:
        require(self.calibration_prompts >= 8, f"calibration_prompts must be >= 8, not {self.calibration_prompts}")
        require(
            self.ppo.answers_per_prompt >= 2,
            f"ppo.answers_per_prompt must be >= 2, not {self.ppo.answers_per_prompt}: a ranking is of two or more",
        )
        require(bool(self.forms) and bool(self.origins), "forms and origins must name at least one each")
        require(self.models.reasons, "models.reasons must be True here: the labeler's comments are its reasons")


def get_config() -> FormsConfig:
    """Returns the default settings."""
    return FormsConfig()


def labeler_mix() -> corpus.LabelerMix:
    """Returns the transcripts of a labeler that scores after reasons, and that revises."""
    return corpus.LabelerMix(
        principles=("<overall>",),
        score_reasoning=0.6,
        revision=0.4,
        pairwise=0.0,
        pairwise_reasoning=0.0,
        score=0.0,
        value_questions=0.0,
        yes_no_questions=0.0,
    )


def comparison_stages(config: FormsConfig) -> list[PlannedStage]:
    """Returns a stage for each form and origin."""
    return [
        PlannedStage(f"{form}-{origin}", f"PPO on feedback of form {form} and origin {origin}", 60)
        for form in config.forms
        for origin in config.origins
    ]


def main(config: FormsConfig) -> dict[str, Any]:
    """Runs all forms and origins and returns the metrics: `results` by "FORM-ORIGIN"."""
    seed = config.seed
    with (
        Run(config.out, "feedback_forms", config, seed=seed, resume=config.resume, stages=config.stages) as run,
        MetricsWriter(config.out, display=run.display) as writer,
    ):
        run.display.plan([*MODEL_STAGES, *comparison_stages(config)])
        runner = make_runner(config.train.parallel)
        config.train.check(config.ppo, runner.devices)
        world = WorldModels(summarisation.TASK, False, config.models, run, writer, runner)
        world.policy(config.sampling).check(config.train.prompt_length, world.tokenizer)  # before any stage takes time
        training, held_out = world.records("train"), world.records("test_entities")

        # ---- A supervised policy, and those who judge it
        base = world.base()
        judge = world.judge(world.labeler(base, labeler_mix()).params, "<overall>")
        sft = world.sft(base, training).params
        run.settled()
        scenes = {record["prompt"]: record["scene"] for record in (training[i] for i in range(len(training)))}
        sources = WorldSources(
            judge,
            load_constitution(RULES),
            make_crowd(world.task, seed),
            lambda prompt: scene_from_json(scenes[prompt]),
            seed,
        )

        # ---- Answers that are judged before the first step, and the held-out ones
        batch = next(world.prompts(training, config.calibration_prompts))
        answers = config.ppo.answers_per_prompt
        generator = make_generator(runner, world.model, world.tokenizer, config.sampling, answers=answers)
        rollout = generator((sft, step_key(seed, 0, FEEDBACK)), to_prompts(batch))
        records = [record for record in batch.records for _ in range(answers)]
        sample = Sample(records, answer_texts(rollout, world.tokenizer), rollout)
        prompts = world.first_prompts(held_out, config.eval_prompts)
        evaluation = Evaluation(
            world.policy(config.sampling), world.tokenizer, runner, prompts, seed, measure=world.gold
        )
        before = evaluation.answers(sft)

        # ---- What each of the sixteen improves
        results: dict[str, Any] = run.metrics.setdefault("results", {})
        for form in config.forms:
            for origin in config.origins:
                name = f"{form}-{origin}"
                run.display.begin(name, skipped=name in results)
                if name not in results:
                    results[name] = improve_by(config, form, origin, world, sources, sft, sample, evaluation, before)
                    print(row(name, results[name]))
                    run.report()
        run.metrics["wall_s"] = round(run.wall_s, 1)
    return run.metrics


def improve_by(
    config: FormsConfig,
    form: Form,
    origin: Origin,
    world: WorldModels,
    sources: WorldSources,
    sft: Params,
    sample: Sample,
    evaluation: Evaluation,
    before: Answers,
) -> dict[str, Any]:
    """Runs PPO on one form of feedback from one origin, in a folder in OUT, and returns the run's metrics.

    Args:
        config: the settings.
        form: of the feedback.
        origin: who judges.
        world: the world's models.
        sources: makes the feedback sources.
        sft: parameters of the policy before training.
        sample: answers that are judged before the first step.
        evaluation: the held-out prompts.
        before: the answers to them before training.
    """
    name, seed = f"{form}-{origin}", config.seed
    folder = config.out / name
    with (
        Run(
            folder,
            name,
            config,
            seed=seed,
            resume=config.resume and (folder / "config.json").exists(),
            display=world.run.display,
        ) as run,
        MetricsWriter(folder, display=run.display) as writer,
        Store(folder / "feedback.sqlite") as store,
        sources.open(origin, store, run.stopped) as source_of,
    ):
        run.settled()
        answers = config.ppo.answers_per_prompt
        reward_fn = rewards_of_form(
            form, source_of, sample, tokenizer=world.tokenizer, answers=answers, seed=seed, runner=world.runner
        )
        source = source_of(form, reward_fn)
        rewards = rewards_of(source, *sample)
        critic, params = with_critic(config.ppo, world.model, sft, sft["trunk"], step_key(seed, 2, INIT))
        improve(
            config.train,
            run,
            writer,
            algorithm=config.ppo.build(evaluation.policy, critic, steps=config.train.steps),
            evaluation=evaluation,
            params=params,
            prompts=world.prompts(world.records("train"), config.train.prompts_drawn),
            feedback=source,
            normaliser=normaliser_of(rewards),
            before=before,
        )
        run.metrics["labels"] = sum(judgement.answered for judgement in store.judgements())
    if run.stop_requested:  # else the next of the sixteen would begin
        raise StopRequested
    return run.metrics


def row(name: str, result: dict[str, Any]) -> str:
    """Returns one line of the table."""
    low, high = result["gain_ci95"]
    return (
        f"{name:22} labels {result['labels']:5}  gold {result['gold_before']:.3f} -> {result['gold_after']:.3f}  "
        f"gain {result['gain']:+.3f} [{low:+.3f}, {high:+.3f}]  win rate {result['win_rate_gold']:.3f}"
    )


if __name__ == "__main__":
    command_line(main, get_config(), __doc__, loading=loading)
