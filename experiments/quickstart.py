"""From nothing to a better language model in under ten minutes on two CPU cores.

    python experiments/quickstart.py --out runs/quickstart --seed 0

A base language model of the built-in text world is trained, and from it two models: an AI labeler, trained on the
transcripts of simulated people and then frozen, and a supervised policy that imitates a mediocre writer. The labeler
writes its reasons about each of the policy's answers and scores it; from the two score distributions of a pair comes a
soft label (its verdicts in both orders are reported beside); a reward model learns them; PPO improves the policy;
held-out towns, with the world's exact gold score, tell by how much. Nothing but the last step knows the gold score.

Expected (seeds 0, 1, 2): see experiments/RESULTS.md.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.algorithms.fit import FitConfig, fit_model
from rlaif_jax.algorithms.ppo import PPOConfig
from rlaif_jax.algorithms.reward_modeling import reward_step
from rlaif_jax.algorithms.scoring import policy_logprobs
from rlaif_jax.config import require
from rlaif_jax.data.prompts import TfdsRecords
from rlaif_jax.data.text import pair_arrays
from rlaif_jax.data.world import corpus, scene_from_json, templates
from rlaif_jax.data.world.gold import scores as gold
from rlaif_jax.data.world.tasks import dialogue, summarisation
from rlaif_jax.data.world.tasks.base import Task
from rlaif_jax.evaluate import agreement, length_controlled_win_rate, same_position_rate, win_rate_ci
from rlaif_jax.feedback.judges.language_model import DirectScoreSource, LanguageModelJudge, Scores, preference
from rlaif_jax.feedback.judges.reward_model import RewardModelSource, score_sequences
from rlaif_jax.feedback.sources import FeedbackSource
from rlaif_jax.metrics import MetricsWriter
from rlaif_jax.models import ScalarModel
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import make_runner
from rlaif_jax.policies.base import to_prompts
from rlaif_jax.policies.text import TextPolicy, answer_texts, make_generator
from rlaif_jax.recipes.world import ANSWER_LENGTH, PPO, PROMPT_LENGTH, SAMPLING, ModelsConfig, WorldModels
from rlaif_jax.rewards.shaping import fit_normaliser
from rlaif_jax.run import Run, StopRequested, command_line
from rlaif_jax.train import TrainConfig, train
from rlaif_jax.types import EVALUATION, FEEDBACK, INIT, Params, step_key


@dataclasses.dataclass(frozen=True)
class QuickstartConfig:
    """All settings of the quickstart.

    task: which of the world's tasks. shortcuts: whether its writers plant features that look like quality (length, a
    confident word, flattery). reward: what PPO maximises, the reward model or the judge's own score. resume: go on with
    the run in `out` where it stopped. pair_prompts: prompts whose answers the judge compares, two pairs each.
    eval_prompts: held-out prompts of the final evaluation.
    """

    seed: int = 0
    out: Path = Path("runs/quickstart")
    resume: bool = False
    task: Literal["summarisation", "dialogue"] = "summarisation"
    shortcuts: bool = False
    reward: Literal["reward_model", "direct"] = "reward_model"
    models: ModelsConfig = ModelsConfig()
    reward_model: FitConfig = FitConfig(updates=200, learning_rate=1e-3)
    principle: templates.Principle = "<overall>"
    pair_prompts: int = 2_000
    eval_prompts: int = 512
    train: TrainConfig = TrainConfig(
        steps=60,
        prompts_per_step=128,
        prompt_length=PROMPT_LENGTH,
        eval_every=20,
        save_every=20,
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
    """The default settings."""
    return QuickstartConfig()


def labeler_mix(principle: templates.Principle) -> corpus.LabelerMix:
    """What the labeler is trained on: scores after reasons, and comparisons."""
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


def main(config: QuickstartConfig) -> None:
    task = {"summarisation": summarisation.TASK, "dialogue": dialogue.TASK}[config.task]
    with (
        Run(
            config.out, "quickstart", dataclasses.replace(config, resume=False), seed=config.seed, resume=config.resume
        ) as run,
        MetricsWriter(config.out) as writer,
    ):
        quickstart(config, task, run, writer)


def quickstart(config: QuickstartConfig, task: Task, run: Run, writer: MetricsWriter) -> None:
    seed = config.seed
    runner = make_runner(config.train.parallel)
    world = WorldModels(task, config.shortcuts, config.models, run, writer, runner)
    model, tokenizer = world.model, world.tokenizer
    training, held_out = world.records("train"), world.records("test_entities")

    # ---- A language model, an AI labeler frozen before any policy exists, a supervised policy
    base = world.base()
    labeler = world.labeler(base, labeler_mix(config.principle))
    judge = world.judge(labeler, config.principle)
    frozen_hash = judge.hash
    sft = world.sft(base, training)

    # ---- AI feedback on its answers, and a reward model of it
    reward_model = ScalarModel(model.config, "normal")
    pairs_path = run.folder / "feedback.npz"
    if not (run.resuming and pairs_path.exists()):
        pairs, labels = compare_answers(config, world, judge, sft, training)
        run.metrics |= labels
        run.report()
        np.savez(run.folder / "feedback.tmp.npz", **pairs)  # type: ignore[arg-type]
        (run.folder / "feedback.tmp.npz").replace(pairs_path)
    pairs = dict(np.load(pairs_path))
    held = len(pairs["weight"]) // 10
    fresh = reward_model.init(step_key(seed, 1, INIT), trunk=labeler["trunk"])

    def fit_rewards() -> Params:
        with writer.stage("reward_model", config.reward_model.updates) as log:
            return fit_model(
                reward_step,
                reward_model,
                fresh,
                {k: v[held:] for k, v in pairs.items()},
                config.reward_model,
                seed,
                runner=runner,
                log=log.write,
                stop=run.stopped,
            )

    rewards = run.stage("reward_model", fresh, fit_rewards)
    learned = RewardModelSource(reward_model, rewards, runner)
    source: FeedbackSource = learned if config.reward == "reward_model" else DirectScoreSource(judge)

    # ---- PPO
    eval_sampling = config.sampling
    generator = make_generator(runner, model, tokenizer, eval_sampling)
    prompts = world.first_prompts(held_out, config.eval_prompts)
    scenes = [scene_from_json(record["scene"]) for record in prompts.records]

    def answers_of(params: Params) -> tuple[Any, list[str], np.ndarray]:
        rollout = generator((params, step_key(seed, 0, EVALUATION)), to_prompts(prompts))
        texts = answer_texts(rollout, tokenizer)
        return rollout, texts, gold.gold_scores(task, scenes, texts)

    def evaluate(params: Params, step: int) -> dict[str, float]:
        rollout, texts, scores = answers_of(params)
        for i in range(min(4, len(texts))):
            run.sample(
                step=step,
                stage="rl",
                index=i,
                prompt=prompts.records[i]["prompt"],
                response=texts[i],
                gold=float(scores[i]),
                reward=None,
            )
        return {"gold": float(scores.mean()), "eval_length": float(rollout.response_mask.sum(-1).mean())}

    before, before_texts, before_gold = answers_of(sft)
    records = list(prompts.records)
    before_told = source(records, before_texts, before)
    normaliser = fit_normaliser(jnp.asarray(before_told.values), jnp.asarray(before_told.valid))
    critic = ScalarModel(model.config, "zero") if config.ppo.advantage.needs_critic else None
    params = {"policy": sft}
    if critic is not None:
        params["value"] = critic.init(step_key(seed, 2, INIT), trunk=rewards["trunk"])
    writer_policy = TextPolicy(model, config.sampling, tokenizer.eos_id, tokenizer.pad_id)
    policy = train(
        config.train,
        run,
        writer,
        algorithm=config.ppo.build(writer_policy, critic, steps=config.train.steps),
        policy=writer_policy,
        params=params,
        tokenizer=tokenizer,
        prompts=world.prompts(training, config.train.prompts_per_step),
        feedback=source,
        normaliser=normaliser,
        evaluate=evaluate,
    )
    if run.stop_requested:
        raise StopRequested

    # ---- What it was worth, by the gold score that nobody has seen
    after, after_texts, after_gold = answers_of(policy)
    after_told = source(records, after_texts, after)
    won = win_rate_ci(after_gold, before_gold, seed=seed)
    lengths = [np.asarray(r.response_mask.sum(-1), np.float64) for r in (before, after)]
    controlled = length_controlled_win_rate(
        (after_gold > before_gold) + 0.5 * (after_gold == before_gold), lengths[1] - lengths[0], seed=seed
    )
    texts_of = [record["prompt"] for record in records]
    judged, judged_valid = preference(judge.score(texts_of, after_texts), judge.score(texts_of, before_texts))
    decided = judged_valid & (after_gold != before_gold)
    kl = jax.jit(partial(policy_logprobs, writer_policy))
    divergence = (np.asarray(after.logprobs) - np.asarray(kl(sft, after))).sum(-1).mean()
    run.check(
        "labeler_weights_unchanged",
        world.judge(labeler, config.principle).hash == frozen_hash,
    )
    for name, texts, scores, told in (
        ("before", before_texts, before_gold, before_told),
        ("after", after_texts, after_gold, after_told),
    ):
        for i in range(min(24, len(texts))):
            run.sample(
                step=0 if name == "before" else config.train.steps,
                stage=name,
                index=i,
                prompt=texts_of[i],
                response=texts[i],
                gold=float(scores[i]),
                reward=float(told.values[i, 0]) if told.valid[i, 0] else None,
            )
    run.metrics |= {
        "win_rate_gold": won.value,
        "win_rate_gold_ci95": [won.low, won.high],
        "win_rate_gold_length_controlled": controlled.value,
        "win_rate_gold_length_controlled_ci95": [controlled.low, controlled.high],
        "gold_sft": float(before_gold.mean()),
        "gold_ppo": float(after_gold.mean()),
        "judge_agreement_final": agreement_or_none((judged > 0.5)[decided], (after_gold > before_gold)[decided]),
        "judge_win_rate": float(judged[judged_valid].mean()) if judged_valid.any() else None,
        "rm_accuracy": reward_accuracy(learned, {k: v[:held] for k, v in pairs.items()}),
        "kl": float(divergence),
        "length_sft": float(lengths[0].mean()),
        "length_ppo": float(lengths[1].mean()),
        "labeler_sha256": frozen_hash,
        "wall_s": round(run.wall_s, 1),
    }
    print(
        f"gold {before_gold.mean():.3f} -> {after_gold.mean():.3f}, win rate {won.value:.3f} "
        f"[{won.low:.3f}, {won.high:.3f}]; {config.out / 'report.html'}"
    )


def compare_answers(
    config: QuickstartConfig, world: WorldModels, judge: LanguageModelJudge, policy: Params, training: TfdsRecords
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The judge's soft labels on pairs of the policy's answers, and how good they are by the gold score (for the report
    only: the labels are what the reward model sees)."""
    tokenizer = world.tokenizer
    size = min(200, config.pair_prompts)
    generator = make_generator(world.runner, world.model, tokenizer, config.sampling, answers=4)
    stream = world.prompts(training, size)
    records: list[Any] = []
    texts: list[str] = []
    finished: list[np.ndarray] = []
    for step in range(config.pair_prompts // size):
        batch = next(stream)
        rollout = generator((policy, step_key(config.seed, step, FEEDBACK)), to_prompts(batch))
        texts += answer_texts(rollout, tokenizer)
        finished.append(np.asarray(rollout.finished))
        records += [record for record in batch.records for _ in range(2)]
    first, second, prompts = texts[0::2], texts[1::2], [record["prompt"] for record in records]
    verdict = judge.compare(prompts, first, second)
    scored = judge.score(prompts + prompts, first + second)
    half = len(prompts)
    one, two = (Scores(*(part[rows] for part in scored)) for rows in (slice(half), slice(half, None)))
    probability, valid = preference(one, two)
    scenes = [scene_from_json(record["scene"]) for record in records]
    better = gold.gold_scores(world.task, scenes, first) - gold.gold_scores(world.task, scenes, second)
    decided, both = valid & (better != 0), verdict.valid & (better != 0)
    same = np.array([a == b for a, b in zip(first, second)])
    labels = {
        "judge_agreement": agreement_or_none((probability > 0.5)[decided], (better > 0)[decided]),
        "judge_agreement_pairwise": agreement_or_none((verdict.probability > 0.5)[both], (better > 0)[both]),
        "same_position_rate": same_position_rate(
            verdict.forward[verdict.valid & ~same], verdict.swapped[verdict.valid & ~same]
        ),
        "judge_missing": float((~valid).mean()),
    }
    ended = np.concatenate(finished)
    pairs = pair_arrays(
        tokenizer,
        prompts,
        first,
        second,
        probability,
        valid & ~same,
        length=PROMPT_LENGTH + ANSWER_LENGTH,
        finished=(ended[0::2], ended[1::2]),
    )
    return pairs, labels


def agreement_or_none(labels: np.ndarray, truth: np.ndarray) -> float | None:
    """The share of equal entries, None where there is nothing to compare."""
    return agreement(labels, truth) if len(labels) else None


def reward_accuracy(source: RewardModelSource, pairs: dict[str, np.ndarray]) -> float | None:
    """Share of held-out pairs that the reward model orders as the judge does."""
    score = jax.jit(lambda tokens, mask: score_sequences(source.model, source.params, (tokens, mask)))
    kept = (pairs["weight"] > 0) & (pairs["probability"] != 0.5)
    first, second = (np.asarray(score(pairs[f"tokens{i}"], pairs[f"mask{i}"])) for i in (1, 2))
    return agreement_or_none((first > second)[kept], (pairs["probability"] > 0.5)[kept])


if __name__ == "__main__":
    command_line(main, get_config(), __doc__)
