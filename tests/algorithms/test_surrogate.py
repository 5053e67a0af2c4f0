"""Parts of the policy gradient's loss: shares of tokens, sums of answers, and tokens that are left out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.algorithms.ppo import PPOConfig
from rlaif_jax.algorithms.surrogate import (
    AnswerRatio,
    ClipCov,
    OverAnswers,
    OverLength,
    OverTokens,
    TokenFields,
    answer_fields,
)
from rlaif_jax.algorithms.update import Batch, count_totals
from rlaif_jax.config import UserError

B, T = 64, 12
MASK = np.arange(T) < np.random.default_rng(0).integers(0, T + 1, B)[:, None]


def batch(seed: int = 0) -> Batch:
    """Fields that are not a number outside the answers."""
    rng = np.random.default_rng(seed)
    fields = TokenFields(*(np.where(MASK, rng.normal(size=MASK.shape), np.nan).astype(np.float32) for _ in range(8)))
    return Batch(np.zeros((B, 2 + T), np.int32), np.ones((B, 2), bool), MASK, MASK, fields)


@pytest.mark.parametrize("average", [OverTokens(), OverAnswers(), OverLength(), OverLength(5)])
def test_shares_make_the_mean_that_is_said(average):
    x = np.random.default_rng(1).normal(size=MASK.shape)
    got = np.where(MASK, x * average.shares(jnp.asarray(MASK)), 0).sum() / average.count(count_totals(batch(), 1, None))
    answers = [row[: mask.sum()] for row, mask in zip(x, MASK) if mask.any()]
    expected = {
        OverTokens(): np.concatenate(answers).mean(),
        OverAnswers(): np.mean([answer.mean() for answer in answers]),
        OverLength(): np.mean([answer.sum() / T for answer in answers]),
        OverLength(5): np.mean([answer.sum() / 5 for answer in answers]),
    }
    np.testing.assert_allclose(got, expected[average], rtol=1e-5)


def test_fields_of_answers_are_sums_and_means_of_their_tokens():
    made = batch()
    found = answer_fields(made)
    for row in range(B):
        tokens = TokenFields(*(x[row][MASK[row]] for x in made.fields))
        count = max(MASK[row].sum(), 1)
        expected = [tokens.logprobs.sum(), count, tokens.advantages.sum() / count, tokens.weights.sum() / count]
        np.testing.assert_allclose([x[row] for x in found], [*expected, tokens.shares.sum()], rtol=1e-4, atol=1e-6)


def covariance(made: Batch) -> np.ndarray:
    far = lambda x: x - x[MASK].mean()
    return np.where(MASK, far(made.fields.logprobs.astype(float)) * far(made.fields.advantages.astype(float)), 0)


def test_tokens_of_high_covariance_are_left_out():
    made, key = batch(), jax.random.key(3)
    inside = MASK & (covariance(made) >= 0.5) & (covariance(made) <= 2)
    assert 20 < inside.sum() < MASK.sum() / 2
    np.testing.assert_array_equal(ClipCov(1.0, 0.5, 2.0).left_out(made, key, None), inside)
    drawn = jax.vmap(lambda k: ClipCov(0.02, 0.5, 2.0).left_out(made, k, None))(jax.random.split(key, 400))
    assert not np.any(np.asarray(drawn) & ~inside)
    np.testing.assert_allclose(np.asarray(drawn).sum((1, 2)).mean(), 0.02 * MASK.sum(), rtol=0.1)
    each = np.asarray(drawn).mean(0)[inside]
    np.testing.assert_allclose(each.std(), np.sqrt(each.mean() * (1 - each.mean()) / 400), rtol=0.5)


def test_the_same_tokens_are_left_out_on_any_number_of_devices():
    made, key = batch(), jax.random.key(3)
    one = ClipCov(0.05, 0.5, 2.0).left_out(made, key, None)
    shards = jax.tree.map(lambda x: x.reshape(8, B // 8, *x.shape[1:]), made)
    eight = jax.pmap(lambda x: ClipCov(0.05, 0.5, 2.0).left_out(x, key, "data"), axis_name="data")(shards)
    assert one.any()
    np.testing.assert_array_equal(np.asarray(eight).reshape(MASK.shape), one)


def test_what_cannot_be_left_out_is_refused():
    with pytest.raises(UserError, match=r"clip_cov\.least \(2\.0\) must be < clip_cov\.most"):
        ClipCov(least=2.0, most=1.0)
    with pytest.raises(UserError, match=r"clip_cov\.share must lie in \(0, 1\], not 0"):
        ClipCov(share=0.0)
    base = PPOConfig(clip_cov=ClipCov())
    with pytest.raises(UserError, match=r"ppo\.advantage=GAE has one for each token"):
        dataclasses.replace(base, ratio=AnswerRatio())
