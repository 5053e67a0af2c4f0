"""A judge's labels on pairs of the policy's answers, and a reward model that learns them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from rlaif_jax.algorithms.fit import Arrays, FitConfig
from rlaif_jax.algorithms.reward_modeling import reward_step
from rlaif_jax.data.prompts import Record
from rlaif_jax.data.readers import TfdsRecords
from rlaif_jax.data.text import answer_ids, pair_arrays
from rlaif_jax.data.world import labeler_prompts
from rlaif_jax.feedback.judges.language_model import AnswerScores, LanguageModelJudge, preference_from_scores
from rlaif_jax.feedback.judges.reward_model import score_sequences
from rlaif_jax.models import ScalarModel
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.policies.base import to_prompts
from rlaif_jax.policies.text import answer_texts, make_generator
from rlaif_jax.quality.statistics import agreement_with_gold
from rlaif_jax.recipes.world.models import ANSWER_LENGTH, PROMPT_LENGTH, WorldModels
from rlaif_jax.run import FinishedStage
from rlaif_jax.types import FEEDBACK, INIT, Params, step_key

BATCH = 200  # prompts
LENGTH = PROMPT_LENGTH + ANSWER_LENGTH
LEARNED = ("tokens1", "mask1", "tokens2", "mask2", "probability", "weight")  # what the reward model sees of a pair


@dataclasses.dataclass(frozen=True, eq=False)
class LearnedReward:
    """A reward model that has learned a judge's labels.

    Attributes:
        model: the reward model.
        params: its parameters.
        held_out: pairs that it has not learned from, as `label_pairs` makes them.
    """

    model: ScalarModel
    params: Params
    held_out: Arrays

    def accuracy(self) -> float | None:
        """Returns the share of the held-out pairs that this reward orders as the judge does.

        Ties and pairs of weight 0 do not count; None if no pair is left.
        """
        score = jax.jit(lambda tokens, mask: score_sequences(self.model, self.params, (tokens, mask)))
        pairs = self.held_out
        kept = (pairs["weight"] > 0) & (pairs["probability"] != 0.5)
        first, second = (np.asarray(score(pairs[f"tokens{i}"], pairs[f"mask{i}"])) for i in (1, 2))
        return agreement_or_none((first > second)[kept], (pairs["probability"] > 0.5)[kept])


def learn_reward(
    world: WorldModels,
    labeler: FinishedStage,
    sft: FinishedStage,
    training: TfdsRecords,
    *,
    principle: labeler_prompts.WorldPrinciple,
    pair_prompts: int,
    sampling: SamplingConfig,
    settings: FitConfig,
) -> LearnedReward:
    """Lets the labeler compare the policy's answers and fits a reward model to the labels.

    Both are stages of the run. A tenth of the pairs is held out. The quality of the labels goes to the run's metrics.

    Args:
        world: the world's models.
        labeler: the AI labeler; the reward model starts from its trunk.
        sft: the supervised policy, whose answers are compared.
        training: scenes of training towns.
        principle: by which the labeler judges.
        pair_prompts: prompts whose answers are compared, two pairs each.
        sampling: how answers are drawn.
        settings: training of the reward model.
    """

    def label(labeler: Params, sft: Params) -> Arrays:
        judge = world.judge(labeler, principle)
        return label_pairs(world, judge, sft, training, pair_prompts=pair_prompts, sampling=sampling)

    labeled = world.run.stage(
        "pairs",
        pair_shapes(pair_prompts),
        label,
        settings=world.stage_settings(principle=principle, pair_prompts=pair_prompts, sampling=sampling),
        after=(labeler, sft),
    )
    pairs = {name: np.asarray(x) for name, x in labeled.params.items()}
    world.run.metrics |= label_quality(pairs)
    held = len(pairs["weight"]) // 10
    model = ScalarModel(world.model.config, "normal")

    def learn(labeler: Params, pairs: Arrays) -> Params:
        start = model.init(step_key(world.run.seed, 1, INIT), trunk=labeler["trunk"])
        examples = {name: np.asarray(pairs[name])[held:] for name in LEARNED}
        return world.fit("reward_model", reward_step, model, start, examples, settings)

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    fitted = world.run.stage(
        "reward_model", shapes, learn, settings=world.stage_settings(fit=settings), after=(labeler, labeled)
    )
    return LearnedReward(model, fitted.params, {name: x[:held] for name, x in pairs.items()})


def label_pairs(
    world: WorldModels,
    judge: LanguageModelJudge,
    policy: Params,
    training: TfdsRecords,
    *,
    pair_prompts: int,
    sampling: SamplingConfig,
) -> Arrays:
    """Lets the judge label pairs of the policy's answers, by the two score distributions of a pair.

    Args:
        world: the world's models.
        judge: the labeler.
        policy: parameters of the policy, which answers each prompt four times: two pairs.
        training: scenes of training towns.
        pair_prompts: number of prompts, rounded down to whole batches.
        sampling: how answers are drawn.

    Returns:
        The arrays of `pair_arrays`, with weight 0 for equal answers and missing labels, and those of `label_quality`.
    """
    size = min(BATCH, pair_prompts)
    generator = make_generator(world.runner, world.model, world.tokenizer, sampling, answers=4)
    stream = world.prompts(training, size)
    records: list[Record] = []
    texts: list[str] = []
    tokens: list[list[int]] = []
    steps = pair_prompts // size
    with world.run.display.wait("answers to judge", "batch") as count:
        for step in range(steps):
            batch = next(stream)
            rollout = generator((policy, step_key(world.run.seed, step, FEEDBACK)), to_prompts(batch))
            texts += answer_texts(rollout, world.tokenizer)
            tokens += answer_ids(rollout)
            records += [record for record in batch.records for _ in range(2)]
            count(step + 1, steps)
    first, second, prompts = texts[0::2], texts[1::2], [str(record["prompt"]) for record in records]
    with world.run.display.wait("answers, judged one by one", "question") as count:
        scores = judge.score(prompts + prompts, first + second, progress=count)
    half = len(prompts)
    one, two = (AnswerScores(*(part[rows] for part in scores)) for rows in (slice(half), slice(half, None)))
    probability, valid = preference_from_scores(one, two)
    same = np.array([a == b for a, b in zip(first, second)])
    pairs = pair_arrays(world.tokenizer, prompts, tokens[0::2], tokens[1::2], probability, valid & ~same, length=LENGTH)
    return pairs | {
        "valid": valid,
        "better": world.gold(records, first) - world.gold(records, second),
    }


def pair_shapes(pair_prompts: int) -> Params:
    """Returns the shapes of what `label_pairs` returns."""
    count = 2 * (pair_prompts - pair_prompts % min(BATCH, pair_prompts))
    shape = lambda dtype, *axes: jax.ShapeDtypeStruct((count, *axes), dtype)
    return {
        **{name: shape(np.int32, LENGTH) for name in ("tokens1", "tokens2")},
        **{name: shape(np.bool_, LENGTH) for name in ("mask1", "mask2")},
        **{name: shape(np.bool_) for name in ("valid",)},
        **{name: shape(np.float32) for name in ("probability", "weight", "better")},
    }


def label_quality(pairs: Arrays) -> dict[str, Any]:
    """Returns how good labels are by the gold score, and how many are missing; for the report.

    Args:
        pairs: `probability` [n] that the first answer is better, with `valid` [n]; `better` [n], the gold difference.
    """
    better, valid = pairs["better"], pairs["valid"]
    decided = valid & (better != 0)
    return {
        "judge_agreement": agreement_or_none((pairs["probability"] > 0.5)[decided], (better > 0)[decided]),
        "judge_missing": float((~valid).mean()),
    }


def agreement_or_none(labels: np.ndarray, truth: np.ndarray) -> float | None:
    """Returns the share of verdicts that agree with the truth; None for empty arrays.

    `labels` and `truth` [n] are probabilities or bools that the first answer is better: see
    `agreement_with_gold`.
    """
    return agreement_with_gold(labels, truth) if len(labels) else None
