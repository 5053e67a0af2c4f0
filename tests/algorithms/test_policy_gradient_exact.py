"""Policy gradients on a vocabulary so small that every group of answers can be listed: expectations and variances, exactly.

The answers to a prompt are drawn independently, so the gradient of a group depends on which answers it holds, not on their
order: the multisets of K answers with their multinomial probabilities are all that can happen.
"""

import functools
import itertools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from rlaif_jax.algorithms.advantages import (
    Advantage,
    GreedyBaseline,
    GroupMean,
    GroupNormalised,
    LeaveOneOut,
    MovingBaseline,
    ReturnToGo,
)
from rlaif_jax.algorithms.objectives import NoRatio
from rlaif_jax.algorithms.ppo import PPO, PPOConfig
from rlaif_jax.algorithms.surrogate import OverAnswers, OverLength
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.policies.text import TextPolicy
from rlaif_jax.types import Frozen, Prompts, RewardBatch, Rollout, StepData
from tests.helpers import random_params

pytestmark = pytest.mark.slow  # as a whole: many programs to compile

V, P, T, TEMPERATURE = 3, 2, 2, 0.8
MODEL = CausalLM(small_decoder(V, num_layers=1, width=8, num_heads=2, context_length=8))
POLICY = TextPolicy(MODEL, SamplingConfig(max_new_tokens=T, temperature=TEMPERATURE), eos_id=None, pad_id=0)
PARAMS = {"policy": random_params(MODEL)}
PROMPT = np.int32([2, 1])
ANSWERS = np.int32(list(itertools.product(range(V), repeat=T)))  # all nine
REWARDS = np.float32([1, -0.5, 0.25, 2, 0, -1, 0.75, 3, -2])
DATA = StepData(Prompts(PROMPT[None], np.ones((1, P), bool), np.zeros(1, np.uint32)))


def token_logprobs(policy):
    """Log-probs [9, T] of the tokens of all nine answers, by a plain forward pass over whole sequences."""
    tokens = np.concatenate([np.tile(PROMPT, (len(ANSWERS), 1)), ANSWERS], axis=1)
    logits = MODEL(policy, tokens, np.ones(tokens.shape, bool))[:, P - 1 : -1] / TEMPERATURE
    return jnp.take_along_axis(jax.nn.log_softmax(logits), ANSWERS[..., None], axis=-1)[..., 0]


def answer_logprobs(policy):
    """log p(answer) [9] of all nine answers."""
    return token_logprobs(policy).sum(-1)


class Exact:
    """What RLOO estimates, and the moments that its variance is made of; all in float64 from the scores of nine answers."""

    def __init__(self) -> None:
        flat, unravel = ravel_pytree(PARAMS["policy"])
        of = lambda x: answer_logprobs(unravel(x))
        logprobs, scores = jax.jit(lambda x: (of(x), jax.jacobian(of)(x)))(flat)
        self.probabilities = np.exp(np.asarray(logprobs, np.float64))
        self.probabilities /= self.probabilities.sum()
        scores, p = np.asarray(scores, np.float64), self.probabilities
        expected = lambda p: jnp.sum(jnp.exp(answer_logprobs(p)) * REWARDS)
        self.each = scores
        self.gradient = np.asarray(ravel_pytree(jax.jit(jax.grad(expected))(PARAMS["policy"]))[0], np.float64)
        centred = REWARDS - p @ REWARDS.astype(np.float64)
        self.both = p @ (centred**2 * (scores**2).sum(-1))
        self.rewards, self.scores = p @ centred**2, p @ (scores**2).sum(-1)

    def variance(self, answers: int) -> float:
        """The variance of a sample covariance of K draws, here of reward and score, added up over all parameters."""
        covariance = self.gradient @ self.gradient
        return (self.both - covariance) / answers + (covariance + self.rewards * self.scores) / (
            answers * (answers - 1)
        )


@pytest.fixture(scope="module")
def exact() -> Exact:
    return Exact()


@functools.cache
def all_groups(answers: int, packed_rows: int, advantage: Advantage = LeaveOneOut(), length: int = T, greedy: int = -1):
    """(gradient [N, D] of the loss for each multiset of K answers; how often each answer is in it).

    `greedy` is the answer that every group ends with, where there is one; it is not counted.
    """
    config = PPOConfig(
        advantage=advantage,
        objective=NoRatio(),
        average=OverLength(length),
        answers_per_prompt=answers,
        num_epochs=1,
        kl_coef=0.0,
        packed_rows=packed_rows,
    )
    algorithm = PPO(POLICY, None, config)
    state, frozen = algorithm.init(PARAMS, np.uint32(0)), Frozen(reference=PARAMS["policy"])
    state.extra["baseline"] = jnp.array([0.35, 0.5])  # of earlier steps whose mean reward was .7
    sampled = jax.jit(token_logprobs)(PARAMS["policy"])

    def one(chosen: jax.Array) -> jax.Array:
        rows = jnp.append(chosen, greedy) if greedy >= 0 else chosen
        count = len(rows)
        rollout = Rollout(
            tokens=jnp.concatenate([jnp.tile(PROMPT, (count, 1)), jnp.asarray(ANSWERS)[rows]], axis=1),
            prompt_mask=jnp.ones((count, P), bool),
            response_mask=jnp.ones((count, T), bool),
            logprobs=sampled[rows],
            finished=jnp.zeros(count, bool),
        )
        rewards = RewardBatch(jnp.asarray(REWARDS)[rows], jnp.ones(count, bool), jnp.zeros((count, T)))
        batch = algorithm.prepare(state, frozen, DATA, rollout, rewards)
        batch = batch.replace(sequences=None)
        grads, _, _ = algorithm.update(state, Frozen()).gradients(state.params, batch, shared=count)
        return ravel_pytree(grads)[0]

    groups = np.array(list(itertools.combinations_with_replacement(range(len(ANSWERS)), answers)))
    grads = jax.jit(lambda x: jax.lax.map(one, x, batch_size=None if packed_rows else 256))(groups)
    return np.asarray(grads, np.float64), [Counter(group.tolist()) for group in groups]


def chances(counts: list[Counter], probabilities: np.ndarray) -> np.ndarray:
    """The multinomial probability of each multiset."""
    ways = lambda count: math.factorial(count.total()) / math.prod(map(math.factorial, count.values()))
    return np.array([ways(c) * math.prod(probabilities[i] ** n for i, n in c.items()) for c in counts])


@pytest.mark.parametrize(("answers", "packed_rows"), [(2, 0), (2, 1), (4, 0), (8, 0)])
def test_the_expected_gradient_is_that_of_the_expected_reward(exact, answers, packed_rows):
    """The loss is a mean over tokens, T of them in every answer: its expected gradient is -1/T d E[reward] / d theta."""
    grads, counts = all_groups(answers, packed_rows)
    chance = chances(counts, exact.probabilities)
    assert len(chance) == math.comb(len(ANSWERS) + answers - 1, answers)
    np.testing.assert_allclose(chance.sum(), 1, rtol=1e-12)
    expected = -T * (chance @ grads)
    norm = np.linalg.norm(exact.gradient)
    assert norm > 0.1
    assert np.linalg.norm(expected - exact.gradient) < 1e-5 * norm
    # ... which no single group has
    assert np.linalg.norm(-T * grads - exact.gradient, axis=1).min() > 0.01 * norm


def test_the_variance_falls_with_the_number_of_answers(exact):
    """It is that of a sample covariance of reward and score: for large K as 1 / K, before that faster."""
    found = []
    for answers in (2, 4, 8):
        grads, counts = all_groups(answers, 0)
        chance = chances(counts, exact.probabilities)
        variance = chance @ ((-T * grads - exact.gradient) ** 2).sum(-1)
        np.testing.assert_allclose(variance, exact.variance(answers), rtol=1e-4)
        found.append(variance)
    assert found[1] < 0.5 * found[0]
    assert found[2] < 0.5 * found[1]


UNBIASED = {
    "no baseline": (ReturnToGo(), 1),
    "moving baseline": (MovingBaseline(), 1),
    "leave one out": (LeaveOneOut(), 3),
    "group mean": (GroupMean(), 3),
    "greedy baseline": (GreedyBaseline(), 2),
}


@pytest.mark.parametrize("name", UNBIASED)
def test_baselines_leave_the_expected_gradient_as_it_is(exact, name):
    """An answer that is in its own baseline, as in the group's mean, shortens it to (K - 1) / K."""
    advantage, answers = UNBIASED[name]
    greedy = int(exact.probabilities.argmax()) if advantage.greedy else -1
    grads, counts = all_groups(answers, 0, advantage, 1, greedy)
    expected = -(chances(counts, exact.probabilities) @ grads)
    if isinstance(advantage, GroupMean):
        expected *= answers / (answers - 1)
    assert np.linalg.norm(expected - exact.gradient) < 1e-5 * np.linalg.norm(exact.gradient)


@pytest.mark.parametrize("answers", [2, 3])
def test_the_bias_of_the_groups_deviation_is_that_of_its_formula(exact, answers):
    """Sum over all K-tuples of their chance times mean_i (r_i - mean) / (std + eps) d log p_i, in float64.

    For K = 2 and differences well above eps it is half the gradient of P(one answer beats another).
    """
    grads, counts = all_groups(answers, 0, GroupNormalised(), 1)
    expected = -(chances(counts, exact.probabilities) @ grads)
    formula, wins = np.zeros_like(expected), np.zeros_like(expected)
    for chosen in itertools.product(range(len(ANSWERS)), repeat=answers):
        of = list(chosen)
        rewards, chance = REWARDS[of].astype(np.float64), exact.probabilities[of].prod()
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        formula += chance * advantages @ exact.each[of] / answers
        if answers == 2:
            wins += chance * np.sign(rewards[0] - rewards[1]) * exact.each[of[0]]
    norm = np.linalg.norm(exact.gradient)
    assert np.linalg.norm(expected - formula) < 1e-5 * norm
    along = expected @ exact.gradient / norm**2
    assert np.linalg.norm(expected - along * exact.gradient) > 0.05 * norm, "it is no multiple of the true one"
    if answers == 2:
        assert np.linalg.norm(expected - wins) < 1e-2 * norm


def test_equal_rewards_teach_nothing():
    config = PPOConfig(advantage=GroupNormalised(), answers_per_prompt=3, num_epochs=1, kl_coef=0.0)
    algorithm = PPO(POLICY, None, config)
    state = algorithm.init(PARAMS, np.uint32(0))
    rollout = Rollout(
        jnp.tile(jnp.append(PROMPT, ANSWERS[5]), (3, 1)), jnp.ones((3, P), bool), jnp.ones((3, T), bool),
        jnp.zeros((3, T)), jnp.zeros(3, bool),
    )  # fmt: skip
    rewards = RewardBatch(jnp.full(3, 0.3), jnp.ones(3, bool), jnp.zeros((3, T)))
    batch = algorithm.prepare(state, Frozen(reference=PARAMS["policy"]), DATA, rollout, rewards)
    grads, _, _ = algorithm.update(state, Frozen()).gradients(state.params, batch.replace(sequences=None), shared=3)
    np.testing.assert_array_equal(ravel_pytree(grads)[0], 0)


def test_the_bias_of_averaging_over_answers_is_that_of_its_formula():
    """Answers end with token 0: seven of one or two tokens. Divided by its length, a long answer's gradient is too short."""
    listed = [[0], *([a, b] for a in (1, 2) for b in range(V))]
    length = np.array([len(answer) for answer in listed])
    padded = np.int32([answer + [0] * (T - len(answer)) for answer in listed])
    mask = np.arange(T) < length[:, None]
    tokens = np.concatenate([np.tile(PROMPT, (7, 1)), padded], axis=1)
    rewards = REWARDS[:7]

    def logprobs(policy):
        logits = MODEL(policy, tokens, np.ones(tokens.shape, bool))[:, P - 1 : -1] / TEMPERATURE
        return jnp.take_along_axis(jax.nn.log_softmax(logits), padded[..., None], axis=-1)[..., 0]

    flat, unravel = ravel_pytree(PARAMS["policy"])
    of = lambda x: jnp.where(mask, logprobs(unravel(x)), 0).sum(-1)
    found, scores = jax.jit(lambda x: (of(x), jax.jacobian(of)(x)))(flat)
    chance, scores = np.exp(np.float64(found)), np.float64(scores)
    np.testing.assert_allclose(chance.sum(), 1, rtol=1e-5)

    def expected(average) -> np.ndarray:
        config = PPOConfig(advantage=ReturnToGo(), objective=NoRatio(), average=average, num_epochs=1, kl_coef=0.0)
        algorithm = PPO(POLICY, None, config)
        state = algorithm.init(PARAMS, np.uint32(0))

        def one(row: jax.Array) -> jax.Array:
            take = lambda x: jnp.asarray(x)[row][None]
            rollout = Rollout(
                take(tokens), jnp.ones((1, P), bool), take(mask), take(logprobs(PARAMS["policy"])), jnp.ones(1, bool)
            )
            judged = RewardBatch(take(rewards), jnp.ones(1, bool), jnp.zeros((1, T)))
            batch = algorithm.prepare(state, Frozen(reference=PARAMS["policy"]), DATA, rollout, judged)
            grads, _, _ = algorithm.update(state, Frozen()).gradients(state.params, batch.replace(sequences=None))
            return ravel_pytree(grads)[0]

        return -(chance @ np.float64(jax.jit(lambda: jax.lax.map(one, jnp.arange(7)))()))

    exact, norm = (chance * rewards) @ scores, np.linalg.norm((chance * rewards) @ scores)
    assert np.linalg.norm(expected(OverLength(1)) - exact) < 1e-5 * norm
    biased = expected(OverAnswers())
    assert np.linalg.norm(biased - (chance * rewards / length) @ scores) < 1e-5 * norm
    assert np.linalg.norm(biased - exact) > 0.05 * norm
