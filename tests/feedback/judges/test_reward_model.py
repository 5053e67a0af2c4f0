"""A reward model as source of feedback: which token it reads, on either padding."""

import functools

import jax
import numpy as np
import pytest

from rlaif_jax.feedback.judges.reward_model import RewardModel, score_sequences
from rlaif_jax.feedback.sources import DeviceSource
from rlaif_jax.models import ScalarModel
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.parallel import JitRunner, PmapRunner
from rlaif_jax.types import Rollout

V, P, T, B = 9, 3, 4, 8
MODEL = ScalarModel(small_decoder(V, num_layers=1, width=16, num_heads=2, context_length=16), "normal")


def random_params(model, seed=0, scale=0.3):
    """Parameters drawn by NumPy, none zero or one; an initialiser would have to be compiled first."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return (centre + scale * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(model.init, jax.random.key(0)))


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


@pytest.fixture(scope="module")
def rollout():
    rng = np.random.default_rng(0)
    mask = np.arange(T) < np.array([1, 2, 3, 4, 4, 3, 2, 1])[:, None]
    return Rollout(
        tokens=rng.integers(0, V, (B, P + T)).astype(np.int32),
        prompt_mask=np.arange(P) >= np.arange(B)[:, None] % 3,
        response_mask=mask,
        logprobs=np.zeros((B, T), np.float32),
        finished=np.ones(B, bool),
    )


@pytest.mark.parametrize("runner", [JitRunner, PmapRunner])
def test_a_reward_model_reads_the_last_token_of_the_answer(params, rollout, runner):
    feedback = DeviceSource(RewardModel(MODEL), params, runner())([{}] * B, [""] * B, rollout)
    alone = jax.jit(MODEL)
    for row in range(0, B, 3):
        real = np.concatenate([rollout.prompt_mask[row], rollout.response_mask[row]])
        tokens = np.full((1, P + T), 1, np.int32)
        tokens[0, : real.sum()] = rollout.tokens[row][real]  # the same tokens, padded on the other side
        expected = alone(params, tokens, np.arange(P + T)[None] < real.sum())[0, real.sum() - 1]
        np.testing.assert_allclose(feedback.values[row], expected, atol=1e-5)
    assert np.std(feedback.values) > 1e-2
    assert np.all(feedback.valid)
    assert np.shape(feedback.values) == np.shape(feedback.valid) == (B, 1)


def test_score_sequences_on_either_padding(params):
    rng = np.random.default_rng(1)
    real = rng.integers(0, V, 4)
    tokens, mask = np.zeros((2, 6), np.int32), np.zeros((2, 6), bool)
    tokens[0, :4], mask[0, :4], tokens[1, 2:], mask[1, 2:] = real, True, real, True
    scores = jax.jit(functools.partial(score_sequences, MODEL))(params, (tokens, mask))
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)
