"""A reward model of the world: a judge's labels on pairs of the policy's answers, and the model that learns them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from rlaif_jax.algorithms.fit import Arrays, FitConfig
from rlaif_jax.algorithms.reward_modeling import reward_step
from rlaif_jax.data.prompts import Record, TfdsRecords
from rlaif_jax.data.text import pair_arrays
from rlaif_jax.evaluate import agreement, same_position_rate
from rlaif_jax.feedback.judges.language_model import LanguageModelJudge, Scores, preference
from rlaif_jax.feedback.judges.reward_model import score_sequences
from rlaif_jax.files import atomic_write
from rlaif_jax.models import ScalarModel
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.policies.base import to_prompts
from rlaif_jax.policies.text import answer_texts, make_generator
from rlaif_jax.recipes.world import ANSWER_LENGTH, PROMPT_LENGTH, WorldModels
from rlaif_jax.types import FEEDBACK, INIT, Params, step_key


@dataclasses.dataclass(frozen=True, eq=False)
class LearnedReward:
    """A reward model that has learned a judge's labels.

    Attributes:
        model: the reward model.
        params: its parameters.
        held_out: pairs that it has not learned from, as `pair_arrays` makes them.
    """

    model: ScalarModel
    params: Params
    held_out: Arrays

    def accuracy(self) -> float | None:
        """Returns the share of the held-out pairs that it orders as the judge does; None without any."""
        score = jax.jit(lambda tokens, mask: score_sequences(self.model, self.params, (tokens, mask)))
        pairs = self.held_out
        kept = (pairs["weight"] > 0) & (pairs["probability"] != 0.5)
        first, second = (np.asarray(score(pairs[f"tokens{i}"], pairs[f"mask{i}"])) for i in (1, 2))
        return agreement_or_none((first > second)[kept], (pairs["probability"] > 0.5)[kept])


def learn_reward(
    world: WorldModels,
    judge: LanguageModelJudge,
    policy: Params,
    training: TfdsRecords,
    *,
    pair_prompts: int,
    sampling: SamplingConfig,
    settings: FitConfig,
) -> LearnedReward:
    """Lets the judge compare answers of the policy and fits a reward model to the labels.

    A tenth of the pairs is held out. The labels are kept in the run's folder, their quality in its metrics.

    Args:
        world: the world's models.
        judge: the labeler; the reward model starts from its trunk.
        policy: parameters of the policy.
        training: scenes of training towns.
        pair_prompts: prompts whose answers are compared, two pairs each.
        sampling: how answers are drawn.
        settings: training of the reward model.
    """
    path = world.run.folder / "feedback.npz"
    if not (world.run.resuming and path.exists()):
        pairs, labels = label_pairs(world, judge, policy, training, pair_prompts, sampling)
        world.run.metrics |= labels
        world.run.report()
        with atomic_write(path, "wb") as file:
            np.savez(file, **pairs)  # type: ignore[arg-type]
    pairs = dict(np.load(path))
    held = len(pairs["weight"]) // 10
    model = ScalarModel(world.model.config, "normal")
    fresh = model.init(step_key(world.run.seed, 1, INIT), trunk=judge.params["trunk"])

    def learn() -> Params:
        return world.fit("reward_model", reward_step, model, fresh, {k: v[held:] for k, v in pairs.items()}, settings)

    params = world.run.stage("reward_model", fresh, learn)
    return LearnedReward(model, params, {k: v[:held] for k, v in pairs.items()})


def label_pairs(
    world: WorldModels,
    judge: LanguageModelJudge,
    policy: Params,
    training: TfdsRecords,
    pair_prompts: int,
    sampling: SamplingConfig,
) -> tuple[Arrays, dict[str, Any]]:
    """Returns (pairs with the judge's soft labels, the quality of the labels by the gold score).

    The label of a pair comes from the score distributions of its two answers. The gold score is for the report only.

    Args:
        world: the world's models.
        judge: the labeler.
        policy: parameters of the policy, which answers each prompt four times: two pairs.
        training: scenes of training towns.
        pair_prompts: number of prompts.
        sampling: how answers are drawn.

    Returns:
        Arrays as `pair_arrays` makes them, with weight 0 for equal answers and missing labels; and metrics
        `judge_agreement` and `judge_agreement_pairwise` (with gold), `same_position_rate` and `judge_missing`.
    """
    size = min(200, pair_prompts)
    generator = make_generator(world.runner, world.model, world.tokenizer, sampling, answers=4)
    stream = world.prompts(training, size)
    records: list[Record] = []
    texts: list[str] = []
    finished: list[np.ndarray] = []
    for step in range(pair_prompts // size):
        batch = next(stream)
        rollout = generator((policy, step_key(world.run.seed, step, FEEDBACK)), to_prompts(batch))
        texts += answer_texts(rollout, world.tokenizer)
        finished.append(np.asarray(rollout.finished))
        records += [record for record in batch.records for _ in range(2)]
    first, second, prompts = texts[0::2], texts[1::2], [str(record["prompt"]) for record in records]
    verdict = judge.compare(prompts, first, second)
    scores = judge.score(prompts + prompts, first + second)
    half = len(prompts)
    one, two = (Scores(*(part[rows] for part in scores)) for rows in (slice(half), slice(half, None)))
    probability, valid = preference(one, two)
    better = world.gold(records, first) - world.gold(records, second)
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
        world.tokenizer,
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
    """Returns the share of equal entries, None where there is nothing to compare."""
    return agreement(labels, truth) if len(labels) else None
