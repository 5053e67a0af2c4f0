"""A whole comparison: a policy's answers before training, the training, its answers after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.algorithms.base import Algorithm
from rlaif_jax.algorithms.ppo import PPO, PPOConfig
from rlaif_jax.algorithms.scoring import padded_view
from rlaif_jax.data.prompts import PromptIterator
from rlaif_jax.evaluate import Answers, Credit, Evaluation
from rlaif_jax.feedback.sources import DeviceReward, FeedbackSource
from rlaif_jax.metrics import RL_STAGE, MetricsWriter
from rlaif_jax.models import CausalLM, ScalarModel
from rlaif_jax.models.lora import LoRAConfig
from rlaif_jax.quality.intervals import Jackknife, bootstrap_ci, share_interval
from rlaif_jax.quality.win_rates import length_controlled_win_rate, pair_outcomes
from rlaif_jax.rewards.shaping import Normaliser, fit_normaliser
from rlaif_jax.run import Run
from rlaif_jax.train import TrainConfig, train
from rlaif_jax.types import Frozen, Params

SAMPLES = 24  # prompts drawn at random whose answers before and after are written to the samples
WORST = 6  # the same for the prompts that lost most


class Improvement(NamedTuple):
    """A trained policy, and its answers to the held-out prompts before and after.

    Attributes:
        params: the policy's parameters after training.
        before: its answers before.
        after: its answers after.
    """

    params: Params
    before: Answers
    after: Answers


def improve(
    config: TrainConfig,
    run: Run,
    writer: MetricsWriter,
    *,
    algorithm: Algorithm,
    evaluation: Evaluation,
    params: dict[str, Params],
    prompts: PromptIterator,
    feedback: FeedbackSource | None,
    device_rewards: Sequence[tuple[DeviceReward, Params]] = (),
    normaliser: Normaliser | None = None,
    before: Answers | None = None,
    enough: Callable[[], bool] = lambda: False,
) -> Improvement:
    """Trains a policy and compares its answers to held-out prompts before and after.

    The metrics go to `run.metrics` (see `comparison`, `kl` and `fluency`), answers before and after to its samples: to
    prompts drawn at random, and to those that lost most.

    Args:
        config: size and rhythm of the loop.
        run: the run's folder and life.
        writer: takes the metrics of every step.
        algorithm: how the policy learns.
        evaluation: the held-out prompts, the policy, and how its answers are scored.
        params: parameters by part, as `train` takes them; `policy` is also the reference of the KL. Of adapters,
            `evaluation.frozen.base` has the weights under them.
        prompts: yields the data of a step.
        feedback: judges on the host, or None.
        device_rewards: rewards inside the compiled program, each with its parameters.
        normaliser: of the rewards; None leaves them as they are.
        before: the answers before training, where they are known already.
        enough: asked after each step, True ends the training.

    Raises:
        StopRequested: the run was asked to stop; a resume goes on.
    """
    if before is None:
        if evaluation.source is not None:
            run.settled()  # judgements may cost money or people's time
        with run.interruptible(), run.display.wait("held-out answers before training"):
            before = evaluation.answers(params["policy"])
    run.display.begin(RL_STAGE)
    during = evaluation.during(run, before=before)
    trained = train(
        config,
        run,
        writer,
        algorithm=algorithm,
        policy=evaluation.policy,
        params=params,
        tokenizer=evaluation.tokenizer,
        prompts=prompts,
        feedback=feedback,
        device_rewards=device_rewards,
        base=evaluation.frozen.base,
        normaliser=normaliser,
        evaluate=during,
        enough=enough,
    )
    with run.interruptible(), run.display.wait("held-out answers after training"):
        after = during.at(trained["policy"], run.steps_done, judged=True)
        run.metrics |= comparison(evaluation.name, before, after, run.seed)
        log_ratio = evaluation.log_ratio(params["policy"], after)
        run.metrics["kl"] = float(log_ratio.sum(-1).mean())
        logprobs, tokens = zip(_logprobs_and_tokens(before), _logprobs_and_tokens(after, log_ratio))
        run.metrics |= fluency(np.stack(logprobs, 1), np.stack(tokens, 1))
        credit = token_credit(algorithm, evaluation.runner.place(trained), evaluation.frozen, after, log_ratio)
    for stage in ("before", "after"):
        run.drop_samples(stage)
    for chosen, indices in (
        ("random", evaluation.random_prompts(SAMPLES)),
        ("worst", worst_prompts(before, after, WORST)),
    ):
        evaluation.write_samples(run, before, step=0, stage="before", indices=indices, chosen=chosen)
        evaluation.write_samples(
            run, after, step=run.steps_done, stage="after", indices=indices, chosen=chosen, credit=credit
        )
    return Improvement(trained["policy"], before, after)


def fluency(logprobs: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """Returns a token's mean log-prob under the policy before training: before, after, and the change.

    The interval of the change is of 95 %, over prompts; left out where there is one prompt.

    Args:
        logprobs: [B, 2] of the answers to each prompt, before and after, under the policy before training.
        tokens: [B, 2] their lengths.
    """
    columns = np.concatenate([logprobs, tokens], 1)
    mean = lambda sums: sums[..., :2] / sums[..., 2:]
    change = Jackknife().estimate(columns, lambda sums: mean(sums)[..., 1] - mean(sums)[..., 0])
    first, second = mean(columns.sum(0)).tolist()
    found = {"before": first, "after": second, "change": second - first}
    if change["low"] is not None:
        found["change_ci95"] = [change["low"], change["high"]]
    return {f"reference_logprob_{name}": value for name, value in found.items()}


def _logprobs_and_tokens(answers: Answers, log_ratio: np.ndarray | float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Returns (log-probs [B] under the policy that drew the answers, less `log_ratio`, lengths [B])."""
    mask = np.asarray(answers.rollout.response_mask)
    logprobs = np.asarray(answers.rollout.logprobs, np.float64) - log_ratio
    return np.where(mask, logprobs, 0).sum(-1), mask.sum(-1)


def worst_prompts(before: Answers, after: Answers, count: int) -> list[int]:
    """Returns the places of at most `count` prompts whose score fell most, or rose least, the worst first.

    Args:
        before: the answers before.
        after: the answers after.
        count: at most this many; prompts without both scores are left out.
    """
    gained = after.scores - before.scores
    order = np.argsort(gained, kind="stable")
    return [int(i) for i in order if np.isfinite(gained[i])][:count]


def token_credit(
    algorithm: Algorithm, params: dict[str, Params], frozen: Frozen, answers: Answers, log_ratio: np.ndarray
) -> Credit:
    """Returns the credit of the tokens of a policy's answers: by its critic, where it has one.

    Args:
        algorithm: the algorithm that trained the policy.
        params: parameters by part, after training.
        frozen: weights under adapters.
        answers: B answers of the policy.
        log_ratio: [B, T] log policy - log policy before training, which is the credit without a critic.
    """
    if not isinstance(algorithm, PPO) or algorithm.critic is None:
        return Credit("log_ratio", log_ratio)
    score = lambda params, frozen, rollout: algorithm.score(params, frozen, padded_view(rollout)).values
    values = jax.jit(score)(params, frozen, answers.rollout)
    return Credit("value_change", value_changes(np.asarray(values), np.asarray(answers.rollout.response_mask)))


def value_changes(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns V(after the token) - V(before it) [B, T]: the one-step advantage of each token but the last.

    Schulman 2016, eq. 10, with gamma = 1 and without a reward; NaN for the last token, whose advantage the reward decides,
    and where masked.

    Args:
        values: [B, T] the critic's values before each token.
        mask: [B, T] bool, the answers' tokens.
    """
    changes = np.full(values.shape, np.nan)
    changes[:, :-1] = np.where(mask[:, 1:], values[:, 1:] - values[:, :-1], np.nan)
    return changes


def comparison(name: str, before: Answers, after: Answers, seed: int) -> dict[str, Any]:
    """Compares two sets of answers to the same prompts and returns metrics.

    `win_rate_NAME` is how often an answer after training scores higher, ties counting half, once more with the effect
    of length taken out; `gain` the mean difference of the scores. Pairs without both scores are left out; where all are,
    there are only lengths and `distinct2`. Intervals are of 95 %, over prompts.

    Args:
        name: of the score.
        before: the answers before.
        after: the answers after.
        seed: of the bootstrap of the gain.
    """
    of_texts = {
        "length_before": float(before.lengths.mean()),
        "length_after": float(after.lengths.mean()),
        "distinct2_before": before.distinct2,
        "distinct2_after": after.distinct2,
    }
    gained = after.scores - before.scores
    if not np.isfinite(gained).any():
        return of_texts
    return {
        **win_rates(name, pair_outcomes(after.scores, before.scores), after.lengths - before.lengths),
        f"{name}_before": float(np.nanmean(before.scores)),
        f"{name}_after": float(np.nanmean(after.scores)),
        "gain": float(np.nanmean(gained)),
        "gain_ci95": list(bootstrap_ci(gained, seed=seed)),
        **of_texts,
    }


def win_rates(name: str, outcomes: np.ndarray, longer: np.ndarray) -> dict[str, Any]:
    """Returns how often new answers win, once more with the effect of length taken out, with intervals.

    Args:
        name: of what compares them.
        outcomes: [B], 1 where the new answer wins, 0 where it loses, .5 for a tie, NaN where it is not known.
        longer: [B], by how many tokens the new answer is longer.
    """
    won = share_interval(outcomes)
    controlled = length_controlled_win_rate(outcomes, longer)
    return {
        f"win_rate_{name}": won.value,
        f"win_rate_{name}_ci95": [won.low, won.high],
        f"win_rate_{name}_length_controlled": controlled.value,
        f"win_rate_{name}_length_controlled_ci95": [controlled.low, controlled.high],
    }


def with_critic(
    config: PPOConfig,
    model: CausalLM,
    policy_params: Params,
    trunk: Params,
    key: jax.Array,
    lora: LoRAConfig | None = None,
) -> tuple[ScalarModel | None, dict[str, Params]]:
    """Returns (critic or None, parameters by part) for PPO and its relatives.

    Args:
        config: says whether a critic is needed.
        model: the policy's model, whose shape the critic has.
        policy_params: parameters of the policy.
        trunk: parameters that the critic's trunk starts from.
        key: for the critic's head.
        lora: of the policy; the critic then learns an adapter of the same base, and `trunk` is not read.
    """
    params = {"policy": policy_params}
    if not config.advantage.needs_critic:
        return None, params
    critic = ScalarModel(model.config, "zero", lora=lora)
    return critic, params | {"value": critic.init(key, trunk=trunk if lora is None else None)}


def normaliser_of(rewards: np.ndarray) -> Normaliser:
    """Returns the normaliser of rewards [B] of the policy before training, NaN where one is missing."""
    return fit_normaliser(jnp.asarray(rewards), jnp.isfinite(rewards))
