"""Every form of feedback from every kind of source, each to a policy that is better for it.

    python experiments/feedback_forms.py --out runs/feedback_forms --seed 0

In the built-in text world a supervised policy answers prompts, and PPO improves it. The answers of each step are judged in
one of four forms (comments, ratings, corrections, rankings) by one of four kinds of source: an AI labeler (a language model
trained on simulated people's transcripts), rules (experiments/brindlemoor.toml), simulated people, and the same people at
work on the annotation page, over HTTP, while the run waits for them. Pure functions turn judgements into rewards; no reward
model stands between. The world's exact gold score, on towns that never occurred, says how much each of the sixteen runs
helps.

Each run has its own folder, store and page in OUT. `--resume` goes on where it stopped. Expected: see
experiments/RESULTS.md.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from world_feedback import (
    FORMS,
    Form,
    Pool,
    by_labeler,
    by_rules,
    crowd_at_the_page,
    people,
    pool_of,
    simulated,
)
from world_models import ANSWER_LENGTH, PPO, PROMPT_LENGTH, SAMPLING, ModelsConfig, StageConfig, WorldModels

from rlaif_jax.config import require
from rlaif_jax.data.world import corpus
from rlaif_jax.data.world.gold import scores as gold
from rlaif_jax.data.world.scenes import Scene, scene_from_json
from rlaif_jax.data.world.tasks import summarisation
from rlaif_jax.feedback.judges.sentiment import Sentences, SentimentConfig, SentimentJudge, train_judge
from rlaif_jax.feedback.people.kinds import kind_of_form
from rlaif_jax.feedback.people.source import PeopleSource
from rlaif_jax.feedback.record_rewards import (
    CommentValence,
    CorrectionRewards,
    JudgementSource,
    RankingUtility,
    RewardFn,
    standard_rating,
)
from rlaif_jax.feedback.records.forms import Comment, Judgement, Rating
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.feedback.sources import FeedbackSource
from rlaif_jax.metrics import MetricsWriter
from rlaif_jax.models import ScalarModel
from rlaif_jax.parallel import make_runner
from rlaif_jax.policies.text import answer_texts, make_generator, to_prompts
from rlaif_jax.quality.bootstrap import bootstrap_ci
from rlaif_jax.quality.win_rates import win_rate_ci
from rlaif_jax.rewards.shaping import fit_normaliser
from rlaif_jax.run import Run, StopRequested, command_line
from rlaif_jax.train import TrainConfig, train
from rlaif_jax.types import EVALUATION, FEEDBACK, INIT, Feedback, Params, Rollout, step_key

Origin = Literal["ai", "rule", "simulated", "page"]


@dataclasses.dataclass(frozen=True)
class FormsConfig:
    """All settings.

    forms, origins: which of the sixteen. calibration_prompts: prompts whose answers are judged before the first step, for
    the mean and spread of rewards; of comments they are rated as well, which is what a comment's valence is learned from.
    eval_prompts: held-out prompts of the gold score.
    """

    seed: int = 0
    out: Path = Path("runs/feedback_forms")
    resume: bool = False
    forms: tuple[Form, ...] = FORMS
    origins: tuple[Origin, ...] = ("ai", "rule", "simulated", "page")
    models: ModelsConfig = ModelsConfig(labeler=StageConfig(updates=3_000, examples=96_000))
    calibration_prompts: int = 256
    eval_prompts: int = 512
    train: TrainConfig = TrainConfig(
        steps=40,
        prompts_per_step=32,
        answers_per_prompt=4,
        prompt_length=PROMPT_LENGTH,
        sampling=SAMPLING,
        ppo=PPO,
        eval_every=20,
        save_every=20,
        keep_checkpoints=1,
    )

    def __post_init__(self) -> None:
        require(self.calibration_prompts >= 8, f"calibration_prompts must be >= 8, not {self.calibration_prompts}")
        require(
            self.train.answers_per_prompt >= 2,
            f"train.answers_per_prompt must be >= 2, not {self.train.answers_per_prompt}: a ranking is of two or more",
        )
        require(bool(self.forms) and bool(self.origins), "forms and origins must name at least one each")


def get_config() -> FormsConfig:
    """The default settings."""
    return FormsConfig()


def labeler_mix() -> corpus.LabelerMix:
    """A labeler that scores after reasons, and that revises."""
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


def learned_valence(
    comments: Sequence[Judgement], ratings: Sequence[Judgement], seed: int, runner: Any
) -> SentimentJudge:
    """A reader of comments, taught by the comments on answers that have been rated as well."""
    rated = {(j.prompt, j.answers[0]): j.unit for j in ratings if isinstance(j, Rating) and j.answered}
    taught = [
        (j.text, rated[j.prompt, j.answers[0]])
        for j in comments
        if isinstance(j, Comment) and j.answered and (j.prompt, j.answers[0]) in rated
    ]
    require(len(taught) >= 64, f"only {len(taught)} comments could be had on rated answers: too few to learn from")
    texts, units = zip(*taught)
    settings = SentimentConfig(updates=1200, learning_rate=1e-2, min_frequency=5, repeats=True)
    return train_judge(Sentences(texts, np.array(units, np.float32)), settings, seed, runner)


def main(config: FormsConfig) -> None:
    settings = dataclasses.replace(config, resume=False)
    with (
        Run(config.out, "feedback_forms", settings, seed=config.seed, resume=config.resume) as run,
        MetricsWriter(config.out) as writer,
    ):
        feedback_forms(config, run, writer)


def feedback_forms(config: FormsConfig, run: Run, writer: MetricsWriter) -> None:
    seed, runner = config.seed, make_runner(config.train.parallel)
    world = WorldModels(summarisation.TASK, False, config.models, run, writer, runner)
    training, held_out = world.records("train"), world.records("test_entities")

    # ---- A supervised policy, and an AI labeler
    base = world.base()
    labeler = world.labeler(base, labeler_mix())
    judge = world.judge(labeler.params, "<overall>")
    sft = world.sft(base, training).params
    run.settled()

    # ---- Those who judge
    scenes = {record["prompt"]: record["scene"] for record in (training[i] for i in range(len(training)))}
    crowd = people(world.task, seed)

    def scene_of(prompt: str) -> Scene:
        return scene_from_json(scenes[prompt])

    def judges(origin: Origin, form: Form, pool: Pool) -> Sequence[Judgement]:
        if origin == "ai":
            return by_labeler(form, pool, judge, world)
        return by_rules(form, pool) if origin == "rule" else simulated(form, pool, scene_of, crowd, seed)

    @contextmanager
    def asking(origin: Origin, store: Store) -> Iterator[Callable[[Form, RewardFn], FeedbackSource]]:
        """From a form and what it is worth to a source; within, the people at the page are at work."""

        def directly(form: Form, reward_fn: RewardFn) -> FeedbackSource:
            def told(prompts: Sequence[str], answers: Sequence[str]) -> Sequence[Judgement]:
                pool = pool_of(prompts, answers)
                if form == "ranking":  # one answer cannot be ranked
                    kept = [i for i, group in enumerate(pool.answers) if len(group) > 1]
                    pool = Pool(tuple(pool.prompts[i] for i in kept), tuple(pool.answers[i] for i in kept))
                return judges(origin, form, pool)

            return JudgementSource(told, reward_fn, store)

        def by_people(form: Form, reward_fn: RewardFn) -> FeedbackSource:
            return PeopleSource(
                store.path,
                kind_of_form(form),
                reward_fn=reward_fn,
                low=1,
                high=10,
                timeout_s=300,
                poll_s=0.02,
                interrupted=run.stopped,
            )

        if origin != "page":
            yield directly
        else:
            with crowd_at_the_page(store.path, scene_of, crowd, seed):
                yield by_people

    # ---- What each of the sixteen is worth
    prompts = world.first_prompts(held_out, config.eval_prompts)
    held_scenes = [scene_from_json(record["scene"]) for record in prompts.records]
    one_each = make_generator(runner, world.model, world.tokenizer, config.train.sampling)

    def gold_of(params: Params) -> np.ndarray:
        rollout = one_each((params, step_key(seed, 0, EVALUATION)), to_prompts(prompts))
        return gold.gold_scores(world.task, held_scenes, answer_texts(rollout, world.tokenizer))

    batch = next(world.prompts(training, config.calibration_prompts))
    answers = config.train.answers_per_prompt
    some = make_generator(runner, world.model, world.tokenizer, config.train.sampling, answers=answers)
    sample = some((sft, step_key(seed, 0, FEEDBACK)), to_prompts(batch))
    sample_records = [record for record in batch.records for _ in range(answers)]

    before = gold_of(sft)
    results: dict[str, Any] = run.metrics.setdefault("results", {})
    for form in config.forms:
        for origin in config.origins:
            name = f"{form}-{origin}"
            if name in results:
                continue
            policy, labels = improve(
                config, name, form, world, sft, (sample_records, sample), partial(asking, origin), gold_of
            )
            after = gold_of(policy)
            low, high = bootstrap_ci(after - before, seed=seed)
            won = win_rate_ci(after, before, seed=seed)
            results[name] = {
                "labels": labels,
                "gold_before": float(before.mean()),
                "gold_after": float(after.mean()),
                "gain": float((after - before).mean()),
                "gain_ci95": [low, high],
                "win_rate_gold": won.value,
                "win_rate_gold_ci95": [won.low, won.high],
            }
            print(row(name, results[name]))
            run.report()
    run.metrics["wall_s"] = round(run.wall_s, 1)
    print(json.dumps(results))


def improve(
    config: FormsConfig,
    name: str,
    form: Form,
    world: WorldModels,
    sft: Params,
    sample: tuple[Sequence[Any], Rollout],
    asking: Callable[[Store], Any],
    gold_of: Callable[[Params], np.ndarray],
) -> tuple[Params, int]:
    """(the policy after PPO on one form from one source, how many labels it cost); a run of its own in OUT/name."""
    folder, runner, seed = config.out / name, world.runner, config.seed
    resume = config.resume and (folder / "config.json").exists()
    records, rollout = sample
    texts = answer_texts(rollout, world.tokenizer)
    with (
        Run(folder, name, dataclasses.replace(config, resume=False), seed=seed, resume=resume) as run,
        MetricsWriter(folder) as writer,
        Store(folder / "feedback.sqlite") as store,
        asking(store) as source_of,
    ):
        run.settled()
        reward_fn: RewardFn
        if form == "rating":
            reward_fn = standard_rating
        elif form == "ranking":
            reward_fn = RankingUtility(most=config.train.answers_per_prompt)
        elif form == "correction":
            reward_fn = CorrectionRewards(world.tokenizer, length=ANSWER_LENGTH + 8, dense=0.3, kept=1.0)
        else:
            taught: dict[Form, list[Judgement]] = {"comment": [], "rating": []}

            def keep(asked: Form, *step: Any) -> Feedback:
                taught[asked] = [judgement for given in step[-1] for judgement in given]
                return Feedback.single(np.zeros(0), np.zeros(0, bool))

            for asked in taught:
                source_of(asked, partial(keep, asked))(records, texts, rollout)
            # Not from the store: after a resume that holds the comments of the steps, too.
            reward_fn = CommentValence(learned_valence(taught["comment"], taught["rating"], seed, runner))
        source = source_of(form, reward_fn)
        told = source(records, texts, rollout)
        critic = ScalarModel(world.model.config, "zero")
        policy = train(
            config.train,
            run,
            writer,
            tokenizer=world.tokenizer,
            policy=world.model,
            policy_params=sft,
            critic=critic,
            value_params=critic.init(step_key(seed, 2, INIT), trunk=sft["trunk"]),
            prompts=world.prompts(world.records("train"), config.train.prompts_per_step),
            feedback=source,
            normaliser=fit_normaliser(jnp.asarray(told.values), jnp.asarray(told.valid)),
            evaluate=lambda params, step: {"gold": float(gold_of(params).mean())},
        )
        labels = sum(judgement.answered for judgement in store.judgements())
    if run.stop_requested:
        raise StopRequested
    return policy, labels


def row(name: str, result: dict[str, Any]) -> str:
    """One line of the table."""
    low, high = result["gain_ci95"]
    return (
        f"{name:22} labels {result['labels']:5}  gold {result['gold_before']:.3f} -> {result['gold_after']:.3f}  "
        f"gain {result['gain']:+.3f} [{low:+.3f}, {high:+.3f}]  win rate {result['win_rate_gold']:.3f}"
    )


if __name__ == "__main__":
    command_line(main, get_config(), __doc__)
