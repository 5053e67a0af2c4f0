"""The rewards of a run on a user's own model: each kind of feedback as settings that build its source.

To add a kind: write a frozen dataclass with a `build` and name it in `Reward`. On the command line a reward is a line of
words, `judge models/smollm2 form=ranking weight=0.5`.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import textwrap
import typing
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from rlaif_jax.config import UserError, explanations, from_words, require
from rlaif_jax.data.prompts import Record
from rlaif_jax.data.world.people import SimulatedRater, simulated_raters
from rlaif_jax.feedback.constitution.constitution import ConstitutionSource, load_constitution
from rlaif_jax.feedback.joined import JoinedSource
from rlaif_jax.feedback.judges.reward_model import Combine
from rlaif_jax.feedback.judges.reward_source import RewardModelSource
from rlaif_jax.feedback.people.kinds import COMPARE, RANK, RATE
from rlaif_jax.feedback.people.source import PeopleSource
from rlaif_jax.feedback.record_rewards import JudgementSource, standard_rating
from rlaif_jax.feedback.records.forms import Judgement, Rater, Rating, sha256
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.feedback.sources import FeedbackSource
from rlaif_jax.feedback.verifiers.constraints import Constraints
from rlaif_jax.feedback.verifiers.functions import PythonFunction
from rlaif_jax.feedback.verifiers.json_schema import JsonSchema
from rlaif_jax.feedback.verifiers.kinds import UserReward
from rlaif_jax.feedback.verifiers.number import Number
from rlaif_jax.feedback.verifiers.texts import ExactMatch, Regex
from rlaif_jax.feedback.verifiers.unit_tests import UnitTests
from rlaif_jax.models.hf.classifiers import load_ensemble
from rlaif_jax.recipes.judge_rewards import ApiReward, JudgeReward, Surroundings
from rlaif_jax.types import Feedback, Rollout

# ---- Models and rules

COEF = 0.5  # of the variance, where nothing else is given


@dataclasses.dataclass(frozen=True)
class ModelReward:
    """Reward models, classifiers with one label, as `python -m rlaif_jax reward-model` writes them.

    They read prompt and answer with their own tokenizer and chat template, all members in one compiled program.

    Attributes:
        model: the folder of such a run, of which all members (model_0, model_1 ...) score; a Hugging Face folder or a hub id.
        combine: how the scores of several members become one: their mean, the worst of them, or cautious: their mean
            minus `coef` times their variance (Coste 2023).
        coef: weight of the variance with combine=cautious, in units of 1 / score.
        dtype: of its matrix products.
        batch_size: texts of one compiled call, on each device.
        max_length: tokens of prompt and answer at most; 0 = the model's context, 2,048 at most.
    """

    model: str
    combine: Combine = "mean"
    coef: float = COEF
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 16
    max_length: int = 0

    def __post_init__(self) -> None:
        require(0 <= self.coef < np.inf, f"coef must be a number from 0 up, not {self.coef}")
        require(
            self.coef == COEF or self.combine == "cautious",
            f"coef={self.coef:g} is for combine=cautious; combine={self.combine} has no coefficient",
        )
        require(self.batch_size >= 1, f"batch_size must be >= 1, not {self.batch_size}")
        require(self.max_length >= 0, f"max_length must be >= 0, not {self.max_length}")

    def build(self, around: Surroundings) -> FeedbackSource:
        """Returns the source."""
        model, params, tokenizer = load_ensemble(self.model, compute_dtype=self.dtype)
        require(
            self.combine == "mean" or len(jax.tree.leaves(params)[0]) > 1,
            f"{self.model}: combine={self.combine} is for several members (`reward-model --members N`); here is one",
        )
        return RewardModelSource(
            model,
            params,
            around.on_its_day(tokenizer),
            around.runner,
            self.batch_size * around.runner.devices,
            self.max_length or min(2048, model.config.context_length),
            self.combine,
            self.coef,
        )


@dataclasses.dataclass(frozen=True)
class RulesReward:
    """The rules and formulas of a constitution file: no model is asked.

    Attributes:
        file: the constitution, a TOML file with [[rule]] and [[formula]].
    """

    file: Path

    def build(self, around: Surroundings) -> FeedbackSource:
        """Returns the source."""
        constitution = load_constitution(self.file)
        require(bool(constitution.formulas), f"{constitution.where(1)}: no [[formula]] makes a reward of the rules")
        return ConstitutionSource(constitution)


# ---- People


@dataclasses.dataclass(frozen=True)
class PeopleReward:
    """People at the annotation page: `python -m rlaif_jax annotate --store OUT/feedback.sqlite` serves it.

    Their time is dear. They judge the answers of training steps; those who rate also judge the held-out answers before and
    after training, where a single answer is left to be judged. Nobody is asked at evaluations during training, nor for the
    scale of the rewards: that is `PEOPLE_SCALE`.

    Attributes:
        kind: rate each answer, rank the answers to a prompt, or compare each with the next.
        principle: the criterion, a sentence; "" = overall quality.
        overlap: raters of each answer.
        limit: most tasks of a step; the other answers are missing.
        enough: the share of a step's judgements after which it goes on.
        timeout_s: seconds after which a step goes on with what has come.
    """

    kind: Literal["rate", "rank", "compare"] = "rate"
    principle: str = ""
    overlap: int = 1
    limit: int | None = None
    enough: float = 1.0
    timeout_s: float = 3600.0

    def build(self, around: Surroundings) -> FeedbackSource:
        """Returns the source."""
        kind = {"rate": RATE, "rank": RANK, "compare": COMPARE}[self.kind]
        return PeopleSource(
            around.store,
            kind,
            principle=self.principle,
            overlap=self.overlap,
            limit=self.limit,
            enough=self.enough,
            timeout_s=self.timeout_s,
            interrupted=around.stopped,
        )


PEOPLE_SCALE = (0.5, 12**-0.5)
"""Mean and deviation of judgements that are spread evenly over [0, 1], the range of people's rewards."""


class NotAsked(FeedbackSource):
    """A source of one reward that nobody is asked for: no judgement is there, and none is counted."""

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout) -> Feedback:
        return Feedback.single(np.zeros(len(answers), np.float32), np.zeros(len(answers), bool))


def sparing(source: JoinedSource, rewards: Sequence[Reward], *, held_out: bool = False) -> JoinedSource:
    """Returns a source without the people, whose time is dear.

    Args:
        source: the rewards of a run.
        rewards: their settings, in the same order.
        held_out: people who rate stay: it is for the held-out answers before and after training.
    """
    left_out = [isinstance(part, PeopleReward) and not (held_out and part.kind == "rate") for part in rewards]
    parts = tuple(NotAsked() if out else part for out, part in zip(left_out, source.sources))
    return JoinedSource(parts, source.names)


def people_words(rewards: Sequence[Reward]) -> str:
    """Returns a sentence about what people will be asked in a run; "" where nobody is.

    Args:
        rewards: the rewards of the run and its second opinion.
    """
    kinds = {part.kind for part in rewards if isinstance(part, PeopleReward)}
    if not kinds:
        return ""
    also = ", and who rates also about the held-out answers before and after it" if "rate" in kinds else " alone"
    return f"People are asked about the answers of training steps{also}; evaluations in between do not wait for them."


def people_scales(names: Sequence[str], rewards: Sequence[Reward]) -> dict[str, tuple[float, float]]:
    """Returns name -> (mean, deviation) of the rewards that come from people."""
    return {name: PEOPLE_SCALE for name, part in zip(names, rewards) if isinstance(part, PeopleReward)}


@dataclasses.dataclass(frozen=True)
class SimulatedReward:
    """Simulated people with biases, spreads and noise, to try a study with people before it is paid for.

    They rate from 1 to 10; the reward is each answer's mean rating in standard deviations of its raters.

    Attributes:
        quality: module:function or file.py:function of (prompt, answer): the true quality in [0, 1].
        raters: people in the crowd.
        overlap: ratings of each answer.
        noise: the standard deviation of a rating's noise, in points.
    """

    quality: str
    raters: int = 5
    overlap: int = 1
    noise: float = 1.0

    def __post_init__(self) -> None:
        require(1 <= self.overlap <= self.raters, f"overlap ({self.overlap}) must lie in 1 .. raters ({self.raters})")

    def build(self, around: Surroundings) -> FeedbackSource:
        """Returns the source: the ratings go to the run's store."""
        crowd = simulated_raters(np.random.default_rng((around.seed, 7)), self.raters, noise=self.noise)
        rate = partial(_rate, self, PythonFunction(self.quality).build(), crowd, around.seed)
        return JudgementSource(rate, standard_rating, around.open.enter_context(Store(around.store)))


def _rate(
    config: SimulatedReward,
    quality: FeedbackSource,
    crowd: Sequence[SimulatedRater],
    seed: int,
    prompts: Sequence[str],
    answers: Sequence[str],
) -> list[Judgement]:
    """Returns the ratings of a simulated crowd, which depend on the seed, the prompt and the answer alone."""
    true = quality([{"prompt": prompt} for prompt in prompts], answers, None)  # type: ignore[arg-type]
    found: list[Judgement] = []
    for prompt, answer, value, known in zip(prompts, answers, true.values[:, 0], true.valid[:, 0]):
        if not known:
            continue
        require(0 <= value <= 1, f"{config.quality}: the quality of an answer lies in 0 .. 1, not {value}")
        rng = np.random.default_rng((seed, int(sha256([prompt, answer])[:15], 16)))
        for number in rng.choice(len(crowd), config.overlap, replace=False):
            rater = Rater(f"person {number + 1}", "simulated", model=config.quality)
            points = float(crowd[number].rate(rng, value))
            found.append(Rating(prompt=prompt, answers=(answer,), rater=rater, value=points))
    return found


Judging = JudgeReward | ApiReward
"""The kinds that can compare two answers."""

Reward = JudgeReward | ApiReward | ModelReward | RulesReward | PeopleReward | SimulatedReward | UserReward


def build_reward(reward: Reward, around: Surroundings) -> FeedbackSource:
    """Returns the source of a reward. Raises UserError where its settings, files or functions are faulty."""
    return reward.build() if isinstance(reward, UserReward) else reward.build(around)


# ---- Several, with weights


@dataclasses.dataclass(frozen=True)
class WeightedReward:
    """A reward and its part in the sum.

    Attributes:
        reward: where the reward comes from.
        weight: the reward's factor in the weighted sum; below 0 where less is better.
        name: the reward's name in metrics and on the page; "" = its kind.
    """

    reward: Reward
    weight: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        require(
            np.isfinite(self.weight) and self.weight != 0,
            f"the weight of a reward is a number other than 0, not {self.weight}",
        )


KINDS: Mapping[str, type[Reward]] = {
    "judge": JudgeReward,
    "api": ApiReward,
    "model": ModelReward,
    "rules": RulesReward,
    "people": PeopleReward,
    "simulated": SimulatedReward,
    "function": PythonFunction,
    "exact-match": ExactMatch,
    "number": Number,
    "regex": Regex,
    "json-schema": JsonSchema,
    "constraints": Constraints,
    "unit-tests": UnitTests,
}
"""The word that begins a reward's line -> its settings."""


def read_reward(line: str, where: str = "--feedback") -> WeightedReward:
    """Returns the reward of a line, such as `judge models/smollm2 form=ranking weight=0.5`.

    Args:
        line: the kind, its first setting, and further settings as NAME=VALUE; `weight` and `name` are those of
            `WeightedReward`.
        where: what messages call it.

    Raises:
        UserError: an unknown kind or setting, or a value of another type.
    """
    own: list[str] = ["reward"]
    words: list[str] = []
    try:
        for word in shlex.split(line):
            (own if word.partition("=")[0] in ("weight", "name") and "=" in word else words).append(word)
    except ValueError as error:
        raise UserError(f"{where} {line!r} cannot be split into words: {error}") from None
    require(bool(words), f"{where} {line!r} names no reward; it begins with one of {', '.join(KINDS)}")
    reward = from_words(KINDS, shlex.join(words), where)
    share = from_words({"reward": _Share}, shlex.join(own), f"{where} {line!r}:")
    try:
        return WeightedReward(reward, share.weight, share.name)
    except UserError as error:
        raise UserError(f"{where} {line!r}: {error}") from None


@dataclasses.dataclass(frozen=True)
class _Share:
    """The settings of `WeightedReward` that a line may hold."""

    weight: float = 1.0
    name: str = ""


def reward_line(reward: WeightedReward) -> str:
    """Returns the line that `read_reward` reads as this reward, without settings that are defaults."""
    word = next(word for word, kind in KINDS.items() if type(reward.reward) is kind)
    words = [word]
    for part in (reward.reward, reward):
        for field in dataclasses.fields(part):
            value = vars(part)[field.name]
            if field.name != "reward" and value != field.default:
                words.append(f"{field.name}={_shown(value)}")
    return shlex.join(words)


def _shown(value: Any) -> str:
    """Returns a value as a line of words holds it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def reward_names(rewards: Sequence[WeightedReward]) -> tuple[str, ...]:
    """Returns a name for each reward: its own or its kind, with a number where several are alike."""
    names: list[str] = []
    for reward in rewards:
        name = reward.name or next(word for word, kind in KINDS.items() if type(reward.reward) is kind)
        taken = sum(known == name or known.startswith(f"{name}_") for known in names)
        names.append(f"{name}_{taken + 1}" if taken else name)
    return tuple(names)


# ---- Help


def rewards_help() -> str:
    """Returns the kinds of rewards with the names and defaults of their settings, for --help."""
    width = shutil.get_terminal_size().columns
    lines = []
    for word, kind in KINDS.items():
        lines.append(_wrapped(f"  {word}: {_first_line(kind)}", width, 6))
        lines.append(_wrapped(f"      {', '.join(_labels(kind).values())}", width, 6))
    return "\n".join(lines)


def settings_help() -> str:
    """Returns the kinds of rewards with what each of their settings does, a line each, for --help-rewards."""
    width = shutil.get_terminal_size().columns
    head = (
        "A reward is a line of words: KIND [TARGET] [SETTING=VALUE ...]. The target is the kind's first setting, which "
        "needs no name there. After = is the default."
    )
    parts = [_wrapped(head, width, 0), f"Of every kind:\n{_explained(WeightedReward, width)}"]
    for word, kind in KINDS.items():
        parts.append(f"{_wrapped(f'{word}: {_first_line(kind)}', width, 4)}\n{_explained(kind, width)}")
    return "\n\n".join(parts)


WIDEST = 26
"""Characters of a setting and its default that have their explanation on the same line."""


def _explained(kind: type, width: int) -> str:
    """Returns a line for each setting of a dataclass, wrapped: its name, its default and its explanation."""
    labels, said, hints = _labels(kind), explanations(kind), typing.get_type_hints(kind)
    column = 4 + min(max(map(len, labels.values())), WIDEST)
    lines = []
    for name, label in labels.items():
        text, choices = said[name], typing.get_args(hints[name])
        if typing.get_origin(hints[name]) is Literal and not all(choice in text for choice in choices):
            text = f"{text.removesuffix('.')} ({', '.join(choices)})."
        begin = f"  {label}".ljust(column)
        if len(label) > WIDEST:
            lines.append(begin)
            begin = " " * column
        lines.append(_wrapped(begin + text, width, column))
    return "\n".join(lines)


def _labels(kind: type) -> dict[str, str]:
    """Returns the name of each setting of a reward -> how it is written with its default."""
    fields = [field for field in dataclasses.fields(kind) if field.name != "reward"]
    return {f.name: f.name if f.default is dataclasses.MISSING else f"{f.name}={_shown(f.default)}" for f in fields}


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().partition("\n")[0]


def _wrapped(text: str, width: int, indent: int) -> str:
    """Returns a text in lines of at most `width` characters; those after the first are indented."""
    begin, rest = text[:indent], text[indent:]
    return textwrap.fill(rest, width, initial_indent=begin, subsequent_indent=" " * indent, break_on_hyphens=False)
