"""RLOO on a vocabulary so small that every group of answers can be listed: expectation and variance of its gradient, exactly.

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

from rlaif_jax.algorithms.advantages import LeaveOneOut
from rlaif_jax.algorithms.ppo import PPO, PPOConfig
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
def all_groups(answers: int, packed_rows: int):
    """(gradient [N, D] of the RLOO loss for each multiset of K answers; how often each answer is in it)."""
    config = PPOConfig(
        advantage=LeaveOneOut(), answers_per_prompt=answers, num_epochs=1, kl_coef=0.0, packed_rows=packed_rows
    )
    algorithm = PPO(POLICY, None, config)
    state, frozen = algorithm.init(PARAMS, np.uint32(0)), Frozen(reference=PARAMS["policy"])
    sampled = jax.jit(token_logprobs)(PARAMS["policy"])

    def one(chosen: jax.Array) -> jax.Array:
        rollout = Rollout(
            tokens=jnp.concatenate([jnp.tile(PROMPT, (answers, 1)), jnp.asarray(ANSWERS)[chosen]], axis=1),
            prompt_mask=jnp.ones((answers, P), bool),
            response_mask=jnp.ones((answers, T), bool),
            logprobs=sampled[chosen],
            finished=jnp.zeros(answers, bool),
        )
        rewards = RewardBatch(jnp.asarray(REWARDS)[chosen], jnp.ones(answers, bool), jnp.zeros((answers, T)))
        batch = algorithm.prepare(state, frozen, DATA, rollout, rewards)
        grads, _, _ = algorithm.update(state, Frozen()).gradients(state.params, batch, shared=answers)
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
