"""The rules of the watch: when a run warns that it goes wrong, and when it has diverged.

A rule is a pure function of what was seen so far, on the host, of numbers that the loop has fetched anyway. It returns a
sentence on what happened and one that begins with "Try:", or None. Rules are cautious: a healthy run has no warning.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rlaif_jax.config import require

HISTORY = 50  # steps that the rules look back
ENOUGH_ANSWERS = 100  # below this number, that all answers of some steps share a property may be chance
CHANCE = 3.0  # standard errors that a difference must exceed
KL_LIMIT = 20.0  # nats an answer
LEAP = 5.0  # times the median
FIRST_LEAP = 0.1  # nats a token, of one step
ALIKE = 0.9  # share of the commonest answer
DWARFED = 20.0  # times the span of the second largest reward
NO_ENTROPY = 0.05  # nats a token


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """When a run warns that it goes wrong, and whether it stops when it has diverged.

    A step is bad if the KL is over its limit, if no answer finishes though half of those of the first step did, or if 90 %
    of the answers are the same text though fewer than half of those of the first step were. `patience` bad steps in a row:
    the run has diverged.

    Attributes:
        stop: end a run that has diverged with the status `diverged`; else only warn, and go on.
        kl_limit: of the mean KL of an answer to the reference, in nats. None: 20, or twice the entropy of an answer of the
            first step where that is more: answers that the reference would give with e^-(2 entropies) are not its own.
        patience: steps that a problem must last, where a single step may be chance.
    """

    stop: bool = True
    kl_limit: float | None = None
    patience: int = 3

    def __post_init__(self) -> None:
        require(self.kl_limit is None or self.kl_limit > 0, f"train.watch.kl_limit must be > 0, not {self.kl_limit}")
        require(1 <= self.patience <= HISTORY, f"train.watch.patience must be in 1 .. {HISTORY}, not {self.patience}")


class Seen(NamedTuple):
    """What the rules read of a step; None where the run has no such number.

    Attributes:
        step: counted from 1.
        answers: B.
        reward: the mean of the rewards.
        reward_error: its standard error; answers to one prompt count as one.
        varies: whether the rewards differ.
        missing: the share of answers without a judgement.
        finished: the share of answers that end with a stop token.
        commonest: the share of the commonest text; None where there are fewer than 4 different prompts.
        kl: to the reference, in nats an answer.
        entropy: in nats a token.
        length: in tokens.
        spans: largest minus smallest value of each reward, as it is weighted.
    """

    step: int
    answers: int
    reward: float | None = None
    reward_error: float | None = None
    varies: bool | None = None
    missing: float = 0.0
    finished: float | None = None
    commonest: float | None = None
    kl: float | None = None
    entropy: float | None = None
    length: float | None = None
    spans: Sequence[float] = ()


class Opinion(NamedTuple):
    """The second opinion at an evaluation, and the reward at that time, each with its standard error."""

    step: int
    second: float
    second_error: float
    reward: float | None = None
    reward_error: float | None = None


class Past(NamedTuple):
    """All that a rule reads.

    Attributes:
        config: the bounds.
        first: the first step.
        steps: the newest steps, the present one last.
        start: the first second opinion.
        best: the highest one before the present.
        latest: the one of this step; None if it has none.
    """

    config: WatchConfig
    first: Seen
    steps: Sequence[Seen]
    start: Opinion | None = None
    best: Opinion | None = None
    latest: Opinion | None = None


# ---- Rules


def second_opinion_falls(past: Past) -> str | None:
    """Warns when, since the first or the best second opinion, the reward rose and the opinion fell.

    Both changes must exceed three standard errors.
    """
    now = past.latest
    for then in (past.start, past.best):
        if now is None or then is None or None in (*now, *then):
            continue
        assert now.reward is not None and then.reward is not None
        assert now.reward_error is not None and then.reward_error is not None
        fell = then.second - now.second > CHANCE * math.hypot(then.second_error, now.second_error)
        rose = now.reward - then.reward > CHANCE * math.hypot(then.reward_error, now.reward_error)
        if fell and rose:
            return (
                f"step {now.step}: since step {then.step} the reward rose from {then.reward:.3g} to {now.reward:.3g}, but "
                f"the second opinion on held-out answers fell from {then.second:.3g} to {now.second:.3g}: the policy "
                "exploits the reward. Try: a larger ppo.kl_coef or a ppo.kl_target, fewer train.steps, or a reward that is "
                "learned anew from judgements of the present answers."
            )
    return None


def kl_leaps(past: Past) -> str | None:
    """Warns when the KL is over a quarter of its limit and five times its median of the ten steps before.

    In the first five steps: when one step adds more than 20 nats an answer and .1 nats a token, within the limit.
    """
    before = [seen.kl for seen in past.steps[:-1][-10:] if seen.kl is not None]
    now = past.steps[-1]
    if now.kl is None or not before:
        return None
    advice = "Try: a smaller ppo.policy_optimizer.learning_rate or ppo.num_epochs, or a ppo.kl_target."
    if len(before) < 5:
        # A KL over its limit has another warning.
        if now.kl - before[-1] <= max(KL_LIMIT, FIRST_LEAP * (now.length or 0.0)) or now.kl > kl_limit(past):
            return None
        return (
            f"step {now.step}: the KL to the reference leapt from {before[-1]:.3g} to {now.kl:.3g} nats an answer in one "
            f"step: the updates are too large for this model. {advice}"
        )
    median = statistics.median(before)
    if now.kl <= max(LEAP * median, kl_limit(past) / 4):
        return None
    return (
        f"step {now.step}: the KL to the reference leapt to {now.kl:.3g} nats an answer, from a median of {median:.3g} in the "
        f"{len(before)} steps before. {advice}"
    )


def kl_over_limit(past: Past) -> str | None:
    """Warns when the KL is over its limit (`WatchConfig.kl_limit`)."""
    now, limit = past.steps[-1], kl_limit(past)
    if now.kl is None or now.kl <= limit:
        return None
    return (
        f"step {now.step}: the KL to the reference is {now.kl:.3g} nats an answer, more than the limit of {limit:.3g}: the "
        "answers have little in common with those of the start. Try: a larger ppo.kl_coef, a ppo.kl_target, a smaller "
        "ppo.policy_optimizer.learning_rate; or a larger train.watch.kl_limit if this is wanted."
    )


def no_answer_finishes(past: Past) -> str | None:
    """Warns when no answer finished for `patience` steps with at least 100 answers."""
    steps = lasting(past, lambda seen: seen.finished == 0)
    if not steps:
        return None
    return (
        f"steps {steps[0].step} to {steps[-1].step}: none of {sum(seen.answers for seen in steps)} answers ended with its "
        f"stop token (of the first step's, {past.first.finished or 0:.0%} did). Try: ppo.shaping.missing_eos penalty, a "
        "reward that does not grow with the length, or a larger sampling.max_new_tokens."
    )


def answers_alike(past: Past) -> str | None:
    """Warns when 90 % of the answers are one text, whatever the prompt.

    For `patience` steps and 100 answers.
    """
    steps = lasting(past, lambda seen: seen.commonest is not None and seen.commonest >= ALIKE)
    if not steps:
        return None
    least = min(seen.commonest for seen in steps if seen.commonest is not None)
    share = "all" if least == 1 else f"at least {least:.0%} of the"
    return (
        f"steps {steps[0].step} to {steps[-1].step}: {share} answers are the same text, whatever the prompt. Try: a larger "
        "ppo.kl_coef or a ppo.kl_target, a ppo.entropy_coef > 0, and a look at whether the reward depends on the prompt."
    )


def rewards_constant(past: Past) -> str | None:
    """Warns when the rewards of a step do not differ, for `patience` steps and 100 answers.

    Rewards that are all higher than the first step's mean are a success, not a problem.
    """
    steps = lasting(past, lambda seen: seen.varies is False)
    if not steps or steps[-1].reward is None:
        return None
    first = past.first.reward
    if first is not None and steps[-1].reward > first + 1e-6 * abs(first):
        return None
    return (
        f"steps {steps[0].step} to {steps[-1].step}: all rewards of a step are equal ({steps[-1].reward:.3g}): nothing can "
        "be learned from them. Try: another prompt or scale for the judge, easier prompts, or more ppo.answers_per_prompt."
    )


def judgements_missing(past: Past) -> str | None:
    """Warns when all judgements of a step are missing, or more than half of those of `patience` steps."""
    steps, now = past.steps[-past.config.patience :], past.steps[-1]
    share = sum(seen.missing * seen.answers for seen in steps) / sum(seen.answers for seen in steps)
    if now.missing < 1 and (len(steps) < past.config.patience or share <= 0.5):
        return None
    of = f"step {now.step}: all" if now.missing == 1 else f"steps {steps[0].step} to {now.step}: {share:.0%} of the"
    return (
        f"{of} judgements are missing: such answers teach nothing. Try: a look at the judge's replies and at "
        "summary.json's `missing`, a longer timeout, fewer requests at a time, or a simpler form of verdict."
    )


def one_reward_dwarfs(past: Past) -> str | None:
    """Warns when, for `patience` steps, one reward spans 20 times as much as each other one.

    Rewards that do not vary are left out: a rule that every answer keeps is no problem.
    """
    steps = past.steps[-past.config.patience :]
    if len(steps) < past.config.patience or len(steps[-1].spans) < 2:
        return None
    largest = int(np.argmax(steps[-1].spans))
    ratios = []
    for seen in steps:
        others = max((span for i, span in enumerate(seen.spans) if i != largest), default=0.0)
        if not 0 < DWARFED * others <= seen.spans[largest]:
            return None
        ratios.append(seen.spans[largest] / others)
    return (
        f"steps {steps[0].step} to {steps[-1].step}: reward {largest} varies {min(ratios):.0f} times as much as any of the "
        f"other {len(steps[-1].spans) - 1}, so that they do not count. Try: ppo.shaping.weights, or a normaliser of each "
        "reward."
    )


def entropy_gone(past: Past) -> str | None:
    """Warns when the entropy is below .05 nats a token and a tenth of the first step's.

    For `patience` steps and 100 answers.
    """
    first = past.first.entropy
    if first is None:
        return None
    bound = min(NO_ENTROPY, first / 10)
    steps = lasting(past, lambda seen: seen.entropy is not None and seen.entropy < bound)
    if not steps:
        return None
    return (
        f"steps {steps[0].step} to {steps[-1].step}: the entropy of a token is below {bound:.2g} nats (it was {first:.2g}): "
        "the policy tries nothing new. Try: a ppo.entropy_coef > 0, a larger ppo.kl_coef, a smaller "
        "ppo.policy_optimizer.learning_rate, or fewer train.steps."
    )


def diverged(past: Past) -> str | None:
    """Warns when the last `patience` steps were all bad (`WatchConfig`)."""
    steps = past.steps[-past.config.patience :]
    reasons = [bad_step(seen, past.first, kl_limit(past)) for seen in steps]
    if len(steps) < past.config.patience or None in reasons:
        return None
    return (
        f"steps {steps[0].step} to {steps[-1].step}: the run has diverged: {reasons[-1]}. Try: a new run with "
        "a smaller ppo.policy_optimizer.learning_rate, a larger ppo.kl_coef or a ppo.kl_target; train.watch.stop=False goes "
        "on nevertheless."
    )


RULES: tuple[Callable[[Past], str | None], ...] = (
    second_opinion_falls,
    kl_leaps,
    kl_over_limit,
    no_answer_finishes,
    answers_alike,
    rewards_constant,
    judgements_missing,
    one_reward_dwarfs,
    entropy_gone,
    diverged,
)


def lasting(past: Past, holds: Callable[[Seen], bool]) -> Sequence[Seen]:
    """Returns the newest steps, `patience` or more with 100 answers, if `holds` of each, else nothing."""
    answers = 0
    for count, seen in enumerate(reversed(past.steps), start=1):
        if not holds(seen):
            return ()
        answers += seen.answers
        if count >= past.config.patience and answers >= ENOUGH_ANSWERS:
            return past.steps[-count:]
    return ()


def kl_limit(past: Past) -> float:
    """Returns the limit of the KL in nats an answer (`WatchConfig.kl_limit`)."""
    if past.config.kl_limit is not None:
        return past.config.kl_limit
    return max(KL_LIMIT, 2 * (past.first.entropy or 0.0) * (past.first.length or 0.0))


def bad_step(seen: Seen, first: Seen, limit: float) -> str | None:
    """Returns why a step is bad (`WatchConfig`), or None.

    Args:
        seen: the step.
        first: the first step of the run.
        limit: of the KL.
    """
    if seen.kl is not None and seen.kl > limit:
        return f"the KL to the reference is {seen.kl:.3g} nats an answer, over the limit of {limit:.3g}"
    if seen.finished == 0 and first.finished is not None and first.finished >= 0.5:
        return f"no answer ends with its stop token; of the first step's, {first.finished:.0%} did"
    if first.commonest is not None and first.commonest < 0.5 and (seen.commonest or 0.0) >= ALIKE:
        return f"{seen.commonest:.0%} of the answers are the same text, whatever the prompt"
    return None
