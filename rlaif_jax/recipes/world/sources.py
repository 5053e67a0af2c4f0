"""Feedback sources for the world: from any origin, in any form, with the rewards of each form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from rlaif_jax.config import require
from rlaif_jax.data.prompts import Record
from rlaif_jax.data.tokenizers import Tokenizer
from rlaif_jax.feedback.constitution.constitution import Constitution
from rlaif_jax.feedback.judges.language_model import LanguageModelJudge
from rlaif_jax.feedback.judges.sentences import Sentences
from rlaif_jax.feedback.judges.sentiment import SentimentConfig, SentimentJudge, train_judge
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
from rlaif_jax.parallel import Runner
from rlaif_jax.recipes.world.judges import (
    Form,
    Person,
    Pool,
    SceneOf,
    by_crowd,
    by_labeler,
    by_rules,
    crowd_at_the_page,
    pool_of,
)
from rlaif_jax.recipes.world.models import ANSWER_LENGTH
from rlaif_jax.types import Feedback, Rollout

Origin = Literal["ai", "rule", "simulated", "page"]
SourceOf = Callable[[Form, RewardFn], FeedbackSource]
"""From a form, and the function that turns its judgements into rewards, to a source."""


class Sample(NamedTuple):
    """Answers that are judged before the first step.

    Attributes:
        records: the record of each answer's prompt.
        texts: the answers.
        rollout: the same as arrays.
    """

    records: Sequence[Record]
    texts: Sequence[str]
    rollout: Rollout


@dataclasses.dataclass(frozen=True, eq=False)
class WorldSources:
    """Makes feedback sources of every origin.

    Attributes:
        labeler: the AI labeler (origin `ai`).
        constitution: the rules (origin `rule`).
        crowd: simulated people (origins `simulated` and, at the annotation page, `page`).
        scene_of: the truth about a prompt, for the simulated people.
        seed: of their noise.
    """

    labeler: LanguageModelJudge
    constitution: Constitution
    crowd: tuple[Person, ...]
    scene_of: SceneOf
    seed: int

    def judge(self, origin: Origin, form: Form, pool: Pool) -> Sequence[Judgement]:
        """Returns the judgements of a pool of answers by one origin.

        Args:
            origin: "ai" asks the labeler, "rule" the constitution, any other the simulated people, without the
                page.
            form: the form of the judgements.
            pool: prompts and their answers.
        """
        if origin == "ai":
            return by_labeler(form, pool, self.labeler)
        if origin == "rule":
            return by_rules(form, pool, self.constitution)
        return by_crowd(form, pool, self.scene_of, self.crowd, self.seed)

    @contextmanager
    def open(self, origin: Origin, store: Store, interrupted: Callable[[], bool]) -> Iterator[SourceOf]:
        """Yields a maker of sources; for `page`, people work at the page of `store` while the block runs.

        Args:
            origin: who judges.
            store: keeps the judgements.
            interrupted: when it returns True the wait for people ends.
        """
        if origin != "page":
            yield lambda form, reward_fn: JudgementSource(partial(self._step, origin, form), reward_fn, store)
            return
        with crowd_at_the_page(store.path, self.scene_of, self.crowd, self.seed):
            yield lambda form, reward_fn: PeopleSource(
                store.path,
                kind_of_form(form),
                reward_fn=reward_fn,
                low=1,
                high=10,
                timeout_s=300,
                poll_s=0.02,
                interrupted=interrupted,
            )

    def _step(self, origin: Origin, form: Form, prompts: Sequence[str], answers: Sequence[str]) -> Sequence[Judgement]:
        pool = pool_of(prompts, answers)
        if form == "ranking":  # one answer cannot be ranked
            kept = [i for i, group in enumerate(pool.answers) if len(group) > 1]
            pool = Pool(tuple(pool.prompts[i] for i in kept), tuple(pool.answers[i] for i in kept))
        return self.judge(origin, form, pool)


def rewards_of_form(
    form: Form, source_of: SourceOf, sample: Sample, *, tokenizer: Tokenizer, answers: int, seed: int, runner: Runner
) -> RewardFn:
    """Returns the function that turns judgements of a form into rewards.

    For comments it is learned first: the sample's answers are commented on and rated.

    Args:
        form: of the judgements.
        source_of: makes sources.
        sample: the answers to learn from.
        tokenizer: of the answers.
        answers: K, answers to each prompt.
        seed: of the fit.
        runner: the devices.
    """
    if form == "rating":
        return standard_rating
    if form == "ranking":
        return RankingUtility(most=answers)
    if form == "correction":
        return CorrectionRewards(tokenizer, length=ANSWER_LENGTH + 8, dense=0.3, kept=1.0)
    # Not from the store: after a resume that holds the comments of the steps, too.
    judged: dict[Form, list[Judgement]] = {"comment": [], "rating": []}

    def keep(asked: Form, *step: Any) -> Feedback:
        judged[asked] = [judgement for given in step[-1] for judgement in given]
        return Feedback.single(np.zeros(0), np.zeros(0, bool))

    for asked in judged:
        source_of(asked, partial(keep, asked))(*sample)
    return CommentValence(learn_valence(judged["comment"], judged["rating"], seed, runner))


def learn_valence(
    comments: Sequence[Judgement], ratings: Sequence[Judgement], seed: int, runner: Runner
) -> SentimentJudge:
    """Fits a reader of comments to comments on answers that have been rated as well.

    Args:
        comments: records of comments.
        ratings: records of ratings, perhaps of the same answers.
        seed: of the training.
        runner: the devices.

    Raises:
        UserError: fewer than 64 comments are on rated answers.
    """
    rated = {(j.prompt, j.answers[0]): j.unit for j in ratings if isinstance(j, Rating) and j.answered}
    examples = [
        (j.text, rated[j.prompt, j.answers[0]])
        for j in comments
        if isinstance(j, Comment) and j.answered and (j.prompt, j.answers[0]) in rated
    ]
    require(len(examples) >= 64, f"only {len(examples)} comments are on rated answers: too few to learn from")
    texts, units = zip(*examples)
    settings = SentimentConfig(updates=1200, learning_rate=1e-2, min_frequency=5, repeats=True)
    return train_judge(Sentences(texts, np.array(units, np.float32)), settings, seed, runner)
