"""The sampler against exact distributions: chi-square, float64 inverse CDF, and promises that hold for every input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

from rlaif_jax.models.sampling import BLOCK, SamplingConfig, inverse_cdf, sample, truncate
from rlaif_jax.parallel import make_mesh

ROWS = 64
draw = jax.jit(
    lambda weights, uniforms: jax.lax.map(
        lambda u: inverse_cdf(jnp.broadcast_to(weights, (ROWS, weights.shape[0])), u), uniforms.reshape(-1, ROWS, 2)
    ).reshape(-1)
)
pick = jax.jit(inverse_cdf)


def softmax(x):
    e = np.exp(np.asarray(x, np.float64) - np.max(x))
    return e / e.sum()


def chi_square(tokens, probabilities):
    """p-value of the counts, outcomes that are expected less than ten times taken together."""
    expected = probabilities * len(tokens)
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert not counts[probabilities == 0].any()
    rare = expected < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    return stats.chisquare(observed[keep], expected[keep] * observed.sum() / expected[keep].sum()).pvalue


def spread(vocab):
    """Weights: all of five, a skewed thousand, or a few points of 152,000, some at the edges of blocks."""
    rng = np.random.default_rng(vocab)
    if vocab < 152_000:
        return softmax(1.5 * rng.normal(size=vocab))
    weights = np.zeros(vocab)
    support = [0, 1, BLOCK - 1, BLOCK, 7 * BLOCK + 13, 100 * BLOCK - 1, 100 * BLOCK, vocab - 1]
    weights[support] = rng.uniform(0.2, 1.0, len(support))
    return weights / weights.sum()


@pytest.mark.parametrize("vocab", [5, 300, 1000, 152_000])
def test_inverse_cdf_draws_from_the_weights(vocab):
    weights = spread(vocab)
    uniforms = jax.random.uniform(jax.random.key(vocab), (ROWS * (60 if vocab == 152_000 else 400), 2))
    tokens = np.asarray(draw(jnp.asarray(7 * weights, jnp.float32), uniforms))
    assert chi_square(tokens, weights) > 1e-3
    # and one by one it is the inverse CDF, where float32 can tell: of the tokens, or of blocks and then of their tokens
    first, second = np.asarray(uniforms, np.float64).T
    if vocab <= 2 * BLOCK:
        found, clear = exact(np.broadcast_to(weights, (len(first), vocab)), first)
    else:
        blocks = np.pad(weights, (0, -vocab % BLOCK)).reshape(-1, BLOCK)
        block, clear = exact(np.broadcast_to(blocks.sum(-1), (len(first), len(blocks))), first)
        inside, clear_inside = exact(blocks[block], second)
        found, clear = block * BLOCK + inside, clear & clear_inside
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(tokens[clear], found[clear])


def exact(weights, u):
    """The inverse CDF in float64, a row of weights a number, and where no bound is too near for float32 to tell."""
    cumulated = np.cumsum(weights, axis=1) / weights.sum(1, keepdims=True)
    return (cumulated <= u[:, None]).sum(1), np.abs(cumulated - u[:, None]).min(1) > 2e-6


@pytest.mark.parametrize("vocab", [1024, 1000])
def test_a_vocabulary_over_tensor_devices_draws_the_same(vocab):
    """Of 1,024 tokens each device has whole tiles; of 1,000 it has not, and the last tile and the last block are not full."""
    rng = np.random.default_rng(0)
    weights, uniforms = np.exp(rng.normal(size=(16, vocab))).astype(np.float32), rng.uniform(size=(16, 2))
    uniforms[:2] = 1 - 2**-24  # the last token
    alone = pick(weights, uniforms.astype(np.float32))
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        split = jax.device_put(weights, NamedSharding(mesh, PartitionSpec(None, "tensor")))
        np.testing.assert_array_equal(
            jax.jit(lambda *args: inverse_cdf(*args))(split, uniforms.astype(np.float32)), alone
        )
    np.testing.assert_array_equal(alone[:2], vocab - 1)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([5, 300, 512, 513, 1500]),
    st.integers(0, 2**31),
    st.floats(0, 0.99),
    st.sampled_from([0.0, 0.25, 0.5, 1 - 2**-24, 1e-30, None]),
)
def test_a_token_of_weight_zero_is_never_drawn(vocab, seed, zeros, uniform):
    rng = np.random.default_rng(seed)
    weights = np.exp(rng.normal(scale=6, size=(8, vocab))).astype(np.float32)
    weights[rng.uniform(size=weights.shape) < zeros] = 0
    weights[np.arange(8), rng.integers(vocab, size=8)] = 1e-3  # at least one
    u = rng.uniform(size=8).astype(np.float32) if uniform is None else np.full(8, uniform, np.float32)
    tokens = np.asarray(pick(weights, np.minimum(u, np.float32(1 - 2**-24))[:, None].repeat(2, 1)))
    assert (weights[np.arange(8), tokens] > 0).all()


@pytest.mark.parametrize("vocab", [512, 140_000])
def test_a_rounding_of_the_cumulated_sum_draws_no_token_of_weight_zero(vocab):
    """A parallel cumulated sum may rise where nothing is added. Uniform numbers that fall into such a step are
    looked for, right below the value of every entry (or block) of weight zero."""
    rng = np.random.default_rng(0)
    block = BLOCK if vocab > 2 * BLOCK else 1
    cumulate = jax.jit(
        lambda w: jnp.cumsum(jnp.pad(w, ((0, 0), (0, -vocab % block))).reshape(8, -1, block).sum(-1), -1)
    )
    for _ in range(4):
        weights = np.exp(rng.normal(scale=3, size=(8, vocab))).astype(np.float32)
        full = np.pad(weights, ((0, 0), (0, -vocab % block))).reshape(8, -1, block)
        full[rng.uniform(size=full.shape[:2]) < 0.6] = 0
        full[:, 0] += 1 / block
        weights = full.reshape(8, -1)[:, :vocab]
        cumulated = np.asarray(cumulate(weights))
        rises = (np.diff(cumulated, axis=1) > 0) & (full.sum(-1)[:, 1:] == 0)
        for row, at in np.argwhere(rises)[:40]:
            between = np.float32(cumulated[row, at].astype(np.float64) / cumulated[row, -1])
            u = np.array([np.nextafter(between, s, dtype=np.float32) for s in (0, 0, 1, 1)] + [between] * 4, np.float32)
            tokens = np.asarray(
                pick(
                    np.repeat(weights[row : row + 1], 8, 0), np.minimum(u, np.float32(1 - 2**-24))[:, None].repeat(2, 1)
                )
            )
            assert (weights[row, tokens] > 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 7},
        {"top_p": 0.8},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    ],
    ids=str,
)
def test_sample_draws_from_the_truncated_distribution_and_reports_the_full_one(options):
    sampling = SamplingConfig(**options)
    logits = (2 * np.random.default_rng(1).normal(size=40)).astype(np.float32)
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled)
    kept = order[: sampling.top_k or None]
    mass = np.cumsum(softmax(scaled[kept]))
    kept = kept[: 1 + np.searchsorted(mass, sampling.top_p)]  # up to and with the token that reaches p
    expected = np.zeros(40)
    expected[kept] = softmax(scaled[kept])
    uniforms = jax.random.uniform(jax.random.key(1), (20_000, 2))
    tokens, logprobs = jax.jit(lambda u: sample(jnp.broadcast_to(logits, (20_000, 40)), u, sampling))(uniforms)
    assert tokens.dtype == jnp.int32
    assert chi_square(np.asarray(tokens), expected) > 1e-3
    np.testing.assert_allclose(logprobs, np.log(softmax(scaled))[np.asarray(tokens)], atol=1e-5)


def test_greedy_takes_the_first_maximum_and_reports_temperature_one():
    logits = jnp.array([[1.0, 3.0, 3.0, 0.0], [0.5, 0.1, 0.2, 0.9]])
    tokens, logprobs = sample(logits, jnp.array([[0.999] * 2, [0.0] * 2]), SamplingConfig(temperature=0))
    np.testing.assert_array_equal(tokens, [1, 3])
    np.testing.assert_allclose(logprobs, [np.log(softmax(logits[0]))[1], np.log(softmax(logits[1]))[3]], rtol=1e-6)


def test_truncation_keeps_the_token_that_reaches_p_and_never_nothing():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    for p, left in ((1e-6, 1), (0.49, 1), (0.6, 2), (0.79, 2), (0.9, 3), (0.97, 4), (1.0, 4)):
        assert int(jnp.isfinite(truncate(logits, SamplingConfig(top_p=p))).sum()) == left, p
    # top-p is taken of what top-k left: 0.5 / 0.8 = 0.625
    assert int(jnp.isfinite(truncate(logits, SamplingConfig(top_k=2, top_p=0.6))).sum()) == 1
    np.testing.assert_array_equal(truncate(logits, SamplingConfig(top_k=100)), logits)


def test_logits_of_minus_infinity_are_never_drawn_and_change_no_logprob():
    logits = jnp.array([[-jnp.inf, 0.0, -jnp.inf, 1.0]]).repeat(6, 0)
    uniforms = jnp.array([0, 0.1, 0.26, 0.27, 0.5, 1 - 2**-24])[:, None].repeat(2, 1)
    tokens, logprobs = sample(logits, uniforms, SamplingConfig())
    np.testing.assert_array_equal(tokens, [1, 1, 1, 3, 3, 3])  # P(1) = 1 / (1 + e) = 0.2689
    np.testing.assert_allclose(logprobs, np.log(softmax([0, 1]))[[0, 0, 0, 1, 1, 1]], rtol=1e-5)
