"""The host's side of a step: rollouts that are on their way, texts, metrics of the rewards, samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.data.prompts import PromptBatch, Record
from rlaif_jax.data.tokenizers import Tokenizer
from rlaif_jax.feedback.sources import FeedbackSource
from rlaif_jax.policies.base import Draw, Policy, draw_count, learned_rows, to_prompts
from rlaif_jax.rewards.spread import group_spread
from rlaif_jax.run import Run
from rlaif_jax.types import Array, Feedback, RewardBatch, Rollout, StepData

SAMPLES = 4  # answers of a step on the page


class PendingRollout(NamedTuple):
    """A rollout on the devices: the iterator's position before its prompts, the prompts, the parts."""

    position: Any
    batch: PromptBatch
    rollouts: list[Rollout]


def step_data(batch: PromptBatch) -> StepData:
    """Returns the arrays of a host batch that an algorithm may read."""
    return StepData(to_prompts(batch), batch.demonstrations, batch.recorded)


def collect(
    current: PendingRollout, policy: Policy, tokenizer: Tokenizer, feedback: FeedbackSource | None
) -> tuple[Rollout, list[Record], list[str]]:
    """Waits for the answers of a step and returns them as arrays and as texts.

    While the devices work on the later parts, the source may already judge the answers of the earlier ones.

    Args:
        current: the prompts and the rollouts that the devices work on.
        policy: turns tokens into texts.
        tokenizer: decodes the texts.
        feedback: its `prefetch` is called with each part; None where no source judges on the host.

    Returns:
        (rollout of all parts, the record of each answer's prompt, the texts).
    """
    batch, rollouts = current.batch, current.rollouts
    records: list[Record] = []
    answers: list[str] = []
    size = len(batch.records) // len(rollouts)
    for i, rollout in enumerate(rollouts):
        texts = policy.texts(rollout, tokenizer)
        part = batch.records[i * size : (i + 1) * size]
        of_answers: list[Record] = [record for record in part for _ in range(len(texts) // size)]
        if feedback is not None:
            feedback.prefetch(of_answers, texts)
        records, answers = records + of_answers, answers + texts
    whole = rollouts[0] if len(rollouts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *rollouts)
    return whole, records, answers


def reward_metrics(
    rewards: RewardBatch,
    judged: Feedback,
    lengths: Array,
    draws: tuple[Draw, ...],
    names: Sequence[str] = (),
) -> dict[str, float]:
    """Returns the mean `reward` that is learned from, mean raw scores, and what was missing.

    Where answers are only compared in pairs they have no reward, which is not a reward of 0: it is left out.

    Args:
        rewards: the rewards of B answers, on the host.
        judged: the feedback [B, R] behind them, on the host.
        lengths: [B], the answers' tokens.
        draws: who answers each prompt: means are over the answers that are learned from.
        names: of the R judgements; without them they have numbers.

    Returns:
        `reward`, and `score` (R = 1) or `score/NAME` for each; NaN where nothing is valid. Where judgements are missing:
        the share of each, `missing/NAME`, and how much longer these answers are than the others, `missing_longer/NAME`, in
        tokens; of answers that have only a part of theirs, `missing/partly`, and how much higher their advantage is than
        that of complete ones, `missing/partly_advantage`: the reward less the mean over the prompt's answers (with K = 1
        over all), in standard deviations of all rewards.
    """
    count, answers = judged.values.shape[1], draw_count(draws)
    own = learned_rows(draws, len(judged.values))
    called = list(names) if len(names) == count else [str(i) for i in range(count)]
    keys = ["score"] if count == 1 else [f"score/{name}" for name in called]
    found = {key: _mean(judged.values[:, i], judged.valid[:, i] & own) for i, key in enumerate(keys)}
    if rewards.pairs is None or count:
        found = {"reward": _mean(rewards.total, rewards.valid & own)} | found
    whole: np.ndarray = np.all(np.asarray(judged.valid), axis=1, keepdims=False)
    if count and not whole.all():
        found |= {f"missing/{name}": float(1 - judged.valid[:, i].mean()) for i, name in enumerate(called)}
        for i, name in enumerate(called):
            valid = np.asarray(judged.valid[:, i])
            if not valid.all():
                found[f"missing_longer/{name}"] = _mean(lengths, ~valid) - _mean(lengths, valid)
        if count > 1:
            valid = np.asarray(rewards.valid)
            partly = valid & ~whole
            total = np.where(valid, np.asarray(rewards.total, np.float64), 0.0)
            groups = np.arange(len(total)) // answers if answers > 1 else np.zeros(len(total), int)
            means = np.bincount(groups, total) / np.maximum(np.bincount(groups, valid), 1)
            spread = total[valid].std() if valid.any() else 0.0
            advantage = (total - means[groups]) / spread if spread > 0 else np.full(len(total), np.nan)
            found["missing/partly"] = float(partly.mean())
            found["missing/partly_advantage"] = _mean(advantage, partly) - _mean(advantage, whole)
    return found


def spread_metrics(rewards: RewardBatch, answers: int, oversample: int) -> dict[str, float]:
    """Returns how many prompts have answers whose rewards differ: those that comparisons can learn from.

    Args:
        rewards: the rewards of all answers of a step, on the host.
        answers: K; nothing is returned for fewer than 2.
        oversample: prompts drawn for each that is learned from.

    Returns:
        `spread/drawn`, the share of all prompts; with `oversample` > 1 also `spread/kept`, the share of those learned from.
    """
    if answers < 2:
        return {}
    spread = np.asarray(group_spread(rewards, answers))
    found = {"spread/drawn": float(spread.mean())}
    if oversample > 1:
        kept = len(spread) // oversample
        found["spread/kept"] = min(int(spread.sum()), kept) / kept
    return found


def _mean(x: Array, valid: Array) -> float:
    """Returns the mean of the valid entries; NaN where there are none."""
    return float(np.mean(x[valid])) if valid.any() else float("nan")


def write_samples(run: Run, step: int, records: Sequence[Record], answers: Sequence[str], rewards: RewardBatch) -> None:
    """Appends a few answers of a step, to different prompts where it has them, to the run's samples.

    Args:
        run: the run.
        step: the step.
        records: the record of each answer's prompt.
        answers: the B texts.
        rewards: their rewards, on the host.
    """
    apart = max(1, len(answers) // SAMPLES)
    for index, row in enumerate(range(0, apart * min(SAMPLES, len(answers)), apart)):
        reward = float(rewards.total[row]) if rewards.valid[row] and rewards.pairs is None else None
        run.sample(
            step=step, stage="rl", index=index, prompt=records[row]["prompt"], response=answers[row], reward=reward
        )
