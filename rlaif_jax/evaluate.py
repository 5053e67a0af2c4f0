"""Evaluates a policy: answers to held-out prompts, their scores, samples for the page, the KL."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.algorithms.scoring import policy_logprobs
from rlaif_jax.config import require
from rlaif_jax.data.prompts import PromptBatch, Record
from rlaif_jax.data.text import token_texts
from rlaif_jax.data.tokenizers import Tokenizer
from rlaif_jax.feedback.sources import FeedbackSource
from rlaif_jax.parallel import Runner
from rlaif_jax.policies.base import Draw, Policy, to_prompts
from rlaif_jax.quality.statistics import distinct_n
from rlaif_jax.rewards.shaping import Normaliser, Shaping, combine, sequence_rewards
from rlaif_jax.run import Run
from rlaif_jax.types import EVALUATION, SAMPLES, Feedback, Frozen, Params, Prompts, Rollout, step_key


class Measure(Protocol):
    """Scores answers for an evaluation, such as the world's gold score."""

    def __call__(self, records: Sequence[Record], answers: Sequence[str]) -> np.ndarray:
        """Returns the scores [B] of answers, NaN where one is missing; `records` are their prompts'."""


class Answers(NamedTuple):
    """One answer of a policy to each prompt of an evaluation.

    Attributes:
        rollout: the answers as arrays.
        texts: the answers as text.
        scores: [B] float, NaN where an answer has no score.
        rewards: [B] float, what the source of the evaluation gives them, NaN where missing; None: not asked.
        second: [B] float, the second opinion, NaN where missing; None: the evaluation has none.
        parts: name -> [B] float, each of several rewards before they are combined, NaN where missing.
    """

    rollout: Rollout
    texts: list[str]
    scores: np.ndarray
    rewards: np.ndarray | None
    second: np.ndarray | None = None
    parts: Mapping[str, np.ndarray] = MappingProxyType({})

    @property
    def lengths(self) -> np.ndarray:
        """Returns the number of tokens of each answer, [B] float64."""
        return np.asarray(self.rollout.response_mask.sum(-1), np.float64)

    @property
    def distinct2(self) -> float:
        """Returns the number of different token pairs over the number of all token pairs."""
        tokens, mask = np.asarray(self.rollout.responses), np.asarray(self.rollout.response_mask)
        return distinct_n([row[real].tolist() for row, real in zip(tokens, mask)], 2)


class Credit(NamedTuple):
    """A number for each token of B answers, which the page shows as the token's colour.

    Attributes:
        kind: `log_ratio`: the token's log-prob less that before training, in nats; their sum is an answer's share of the KL.
            `value_change`: by how much the token changed the reward that the critic expects.
        values: [B, T], NaN where a token has no number.
    """

    kind: Literal["log_ratio", "value_change"]
    values: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Combination:
    """How the rewards of a source become one, as training combines them.

    Attributes:
        names: of the source's R rewards.
        shaping: its weights.
        normaliser: of each reward.
    """

    names: tuple[str, ...]
    shaping: Shaping
    normaliser: Normaliser

    def total(self, judged: Feedback) -> np.ndarray:
        """Returns the combined reward [B] float64 of each answer, NaN where it is missing."""
        normalised = sequence_rewards(jnp.asarray(judged.values), jnp.asarray(judged.valid), self.normaliser)
        weights = jnp.asarray(self.shaping.weights or (1.0,) * len(self.names))
        score, valid = jax.device_get(combine(normalised.values, normalised.valid, weights))
        return np.where(valid, score.astype(np.float64), np.nan)


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Held-out prompts, and how a policy's answers to them are drawn and scored.

    Attributes:
        policy: the policy without its parameters.
        tokenizer: of prompts and answers.
        runner: the devices.
        prompts: the held-out prompts.
        seed: of the answers; all evaluations of a run draw with the same random numbers.
        measure: scores the answers; None: what `source` gives is the score.
        source: judges answers on the host as training does; None: answers have a score only.
        name: of the score in metrics.
        frozen: weights under an adapter; those that `Runner.place` returned are the ones that training reads, too.
        reasons: from (records of the prompts, answers) to what the judges say about each answer, for the samples; None:
            they say nothing.
        second: another judge of the answers, such as the judge itself where a reward model is what is learned from. The
            run warns when its opinion falls while the reward rises.
        combination: how several rewards of `source` become one; None: it gives one.
        further: answers -> further metrics, such as how often they win against those before training.
        during_training: (`source`, `second`) of the evaluations during training, where the others cost people's time;
            None: the same ones.
    """

    policy: Policy
    tokenizer: Tokenizer
    runner: Runner
    prompts: PromptBatch
    seed: int
    measure: Measure | None = None
    source: FeedbackSource | None = None
    name: str = "gold"
    frozen: Frozen = Frozen()
    reasons: Callable[[Sequence[Record], Sequence[str]], Sequence[str]] | None = None
    second: FeedbackSource | None = None
    combination: Combination | None = None
    further: Callable[[Answers], dict[str, float]] | None = None
    during_training: tuple[FeedbackSource | None, FeedbackSource | None] | None = None

    def __post_init__(self) -> None:
        require(self.measure is not None or self.source is not None, "an evaluation needs a measure or a source")

    @cached_property
    def _sample(self) -> Any:
        def sample(
            replicated: tuple[Params, Frozen, jax.Array], prompts: Prompts, *, axis_name: str | None = None
        ) -> Rollout:
            params, frozen, key = replicated
            return self.policy.sample(params, frozen, prompts, key, (Draw(),))

        return self.runner.map(sample)

    @cached_property
    def _logprobs(self) -> Any:
        return jax.jit(partial(policy_logprobs, self.policy))

    def answers(self, params: Params, *, judged: bool = True) -> Answers:
        """Returns the answers of the policy with these parameters.

        Args:
            params: the policy's parameters.
            judged: whether `source` judges the answers even if there is a measure; false during training.
        """
        source, second_source = self.source, self.second
        if not judged and self.during_training is not None:
            source, second_source = self.during_training
        params = self.runner.place(params)  # each device would get the whole of weights that are on one
        rollout = self._sample((params, self.frozen, step_key(self.seed, 0, EVALUATION)), to_prompts(self.prompts))
        texts = self.policy.texts(rollout, self.tokenizer)
        records, rewards, parts = list(self.prompts.records), None, {}
        if source is not None and (judged or self.measure is None):
            if self.combination is None:
                rewards = rewards_of(source, records, texts, rollout)
            else:
                found = jax.device_get(source(records, texts, rollout))
                rewards = self.combination.total(found)
                columns = np.where(found.valid, found.values, np.nan).T
                parts = dict(zip(self.combination.names, columns, strict=True))
        scores = rewards if self.measure is None else self.measure(records, texts)
        assert scores is not None
        second = None if second_source is None else rewards_of(second_source, records, texts, rollout)
        return Answers(rollout, texts, scores, rewards, second, parts)

    def log_ratio(self, reference: Params, answers: Answers) -> np.ndarray:
        """Returns log policy - log reference of each token [B, T] in nats; 0 where masked.

        Those of the policy are the sampler's.
        """
        of_reference = self._logprobs(self.runner.place(reference), answers.rollout, frozen=self.frozen)
        return np.asarray(answers.rollout.logprobs) - np.asarray(of_reference)

    def metrics(self, answers: Answers) -> dict[str, float]:
        """Returns the mean score (under `name`), the mean length `eval_length` in tokens, and `distinct2`.

        With a second opinion also its mean, `second_opinion`, and the standard error of that, `second_opinion_se`. Without a
        known score there is no mean of it.
        """
        known = answers.scores[np.isfinite(answers.scores)]
        found = {
            **({self.name: float(known.mean())} if len(known) else {}),
            "eval_length": float(answers.lengths.mean()),
            "distinct2": answers.distinct2,
        }
        if answers.second is not None:
            second = answers.second[np.isfinite(answers.second)]
            enough = len(second) > 1
            found["second_opinion"] = float(second.mean()) if enough else float("nan")
            found["second_opinion_se"] = float(second.std(ddof=1) / np.sqrt(len(second))) if enough else float("nan")
        for name, values in answers.parts.items():
            if np.isfinite(values).any():
                found[f"eval/{name}"] = float(np.nanmean(values))
        return found | (self.further(answers) if self.further is not None else {})

    def random_prompts(self, count: int) -> list[int]:
        """Returns the places of at most `count` held-out prompts drawn at random, the same at every call."""
        places = jax.random.permutation(step_key(self.seed, 0, SAMPLES), len(self.prompts.records))
        return sorted(places[:count].tolist())

    def write_samples(
        self,
        run: Run,
        answers: Answers,
        *,
        step: int,
        stage: str,
        indices: Sequence[int],
        chosen: str = "random",
        credit: Credit | None = None,
    ) -> None:
        """Appends the answers to some of the prompts to the run's samples.

        Args:
            run: the run.
            answers: the answers.
            step: the policy step after which they were drawn.
            stage: of the page: `rl` during training, `before` and `after` in its comparison.
            indices: places of the prompts.
            chosen: how the prompts were chosen, `random` or `worst`.
            credit: of the tokens of `answers`; None: the samples have none.
        """
        records = [self.prompts.records[i] for i in indices]
        texts = [answers.texts[i] for i in indices]
        reasons = self.reasons(records, texts) if self.reasons is not None and texts else [None] * len(texts)
        for i, record, text, said in zip(indices, records, texts, reasons):
            tokens = (
                None if credit is None else token_values(self.tokenizer, answers.rollout, i, text, credit.values[i])
            )
            scores = {} if self.measure is None else {self.name: number_or_none(answers.scores[i])}
            run.sample(
                step=step,
                stage=stage,
                index=i,
                chosen=chosen,
                prompt=str(record["prompt"]),
                response=text,
                **scores,
                reward=None if answers.rewards is None else number_or_none(answers.rewards[i]),
                **({} if answers.second is None else {"second_opinion": number_or_none(answers.second[i])}),
                **{f"eval/{name}": number_or_none(values[i]) for name, values in answers.parts.items()},
                **({} if said is None else {"reasons": said}),
                **({} if credit is None or tokens is None else {"credit": credit.kind, "tokens": tokens}),
            )

    def during(self, run: Run, *, samples: int = 4, before: Answers | None = None) -> During:
        """Returns the function `evaluate` of `train`.

        Args:
            run: the run.
            samples: number of answers that each evaluation appends to the run's samples, always to the same prompts.
            before: the answers before the first step, where they are known already.
        """
        known = (0, before) if before is not None else None
        return During(self, run, self.random_prompts(samples), known)


@dataclasses.dataclass(eq=False)
class During:
    """Evaluates the policy between the steps of a run: (policy parameters, step) -> metrics.

    Attributes:
        evaluation: how.
        run: takes the samples.
        indices: places of the prompts whose answers are samples.
        known: (step, answers) of the newest evaluation; their answers are not drawn and judged twice.
    """

    evaluation: Evaluation
    run: Run
    indices: Sequence[int]
    known: tuple[int, Answers] | None

    def __call__(self, params: Params, step: int) -> dict[str, float]:
        """Returns the metrics of the policy after `step` steps."""
        answers = self.at(params, step, judged=False)
        if self.evaluation.measure is not None:  # then rewards are asked for before and after training alone
            answers = answers._replace(rewards=None)
        self.evaluation.write_samples(self.run, answers, step=step, stage="rl", indices=self.indices)
        return self.evaluation.metrics(answers)

    def at(self, params: Params, step: int, *, judged: bool) -> Answers:
        """Returns the answers of the policy after `step` steps.

        Args:
            params: the policy's parameters.
            step: steps that it has learned.
            judged: whether the evaluation's source must have judged them even if there is a measure.
        """
        spared = self.evaluation.during_training is not None  # then the same answers are judged by others
        if self.known is not None and self.known[0] == step and not spared:
            answers = self.known[1]
            if answers.rewards is not None or not judged or self.evaluation.source is None:
                return answers
        answers = self.evaluation.answers(params, judged=judged)
        self.known = (step, answers)
        return answers


def rewards_of(
    source: FeedbackSource, records: Sequence[Record], answers: Sequence[str], rollout: Rollout
) -> np.ndarray:
    """Returns the rewards [B] of a source with one reward, NaN where a judgement is missing.

    Args:
        source: gives one reward an answer.
        records: the record of each answer's prompt.
        answers: the B texts.
        rollout: the same answers as arrays.

    Raises:
        UserError: the source gives another number of rewards.
    """
    judged = jax.device_get(source(records, answers, rollout))
    require(judged.values.shape[1] == 1, f"an evaluation reads one reward an answer, not {judged.values.shape[1]}")
    return np.where(judged.valid[:, 0], judged.values[:, 0], np.nan)


def token_values(
    tokenizer: Tokenizer, rollout: Rollout, row: int, answer: str, values: np.ndarray
) -> list[tuple[str, float | None]] | None:
    """Returns (text, number) of each token of an answer, the stop token included, whose text is "".

    Args:
        tokenizer: decodes the tokens.
        rollout: has the answer.
        row: its place.
        answer: its text: that of the tokens, or a part of it.
        values: [T], NaN where a token has no number.

    Returns:
        The pairs, whose texts together are `answer`; None where `answer` is not the text of the tokens.
    """
    ids = np.asarray(rollout.responses)[row][np.asarray(rollout.response_mask)[row]].tolist()
    stop = ids[len(ids) - int(rollout.finished[row]) :]
    texts = token_texts(tokenizer, ids[: len(ids) - len(stop)])
    start = "".join(texts).find(answer)
    if start < 0:
        return None
    places = np.clip(np.cumsum([0, *map(len, texts)]) - start, 0, len(answer)).tolist()
    texts = [answer[begin:end] for begin, end in pairwise(places)] + [""] * len(stop)
    numbers = [number_or_none(round(float(value), 4)) for value in values[: len(ids)]]
    return list(zip(texts, numbers, strict=True))


def number_or_none(value: float) -> float | None:
    """Returns `value` as a float, or None where it is NaN or infinite, for which JSON has no number."""
    return float(value) if np.isfinite(value) else None
