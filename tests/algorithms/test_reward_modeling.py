"""Learning from comparisons: numbers by hand, NumPy in float64, and a task that can be learned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.algorithms.reward_modeling import pairwise_cross_entropy, reward_step
from rlaif_jax.algorithms.supervised import make_optimizer
from rlaif_jax.config import OptimizerConfig, small_decoder
from rlaif_jax.models import ScalarModel

V, S, B = 9, 6, 8
MODEL = ScalarModel(small_decoder(V, num_layers=1, width=16, num_heads=2, context_length=16), "normal")
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, schedule="constant"), 1)


def random_params(model, seed=4, scale=0.2):
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
def step():
    return jax.jit(functools.partial(reward_step, MODEL, OPTIMIZER))


def side(rng, tokens, lengths, pad_side):
    """Sequences padded with junk on one side; `tokens` [n, S] are read from their start."""
    arrays, mask = rng.integers(0, V, (len(tokens), S)).astype(np.int32), np.zeros((len(tokens), S), bool)
    for row, length in enumerate(lengths):
        where = slice(0, length) if pad_side == "right" else slice(S - length, S)
        arrays[row, where], mask[row, where] = tokens[row, :length], True
    return arrays, mask


def make_batch(rng, pad_side="left", count=B, junk=0):
    """Pairs; the one with more of token 5 is better, with a certainty that grows with the difference."""
    tokens = rng.integers(1, V, (2, count, S))
    lengths = rng.integers(2, S + 1, (2, count))
    fives = ((tokens == 5) & (np.arange(S) < lengths[..., None])).sum(-1)
    batch = {
        "probability": (1 / (1 + np.exp(-2.0 * (fives[0] - fives[1])))).astype(np.float32),
        "weight": np.ones(count, np.float32),
    }
    filler = np.random.default_rng(junk)
    for i in (0, 1):
        batch[f"tokens{i + 1}"], batch[f"mask{i + 1}"] = side(filler, tokens[i], lengths[i], pad_side)
    return batch


def test_soft_labels_by_hand():
    first, second = jnp.array([1.0, 0.0, 2.0, -1.0]), jnp.array([0.0, 1.0, 2.0, 2.0])
    p = jnp.array([1.0, 1.0, 0.3, 0.8])
    # softplus(-1), softplus(1), log 2 whatever the label, .8 softplus(3) + .2 softplus(-3)
    np.testing.assert_allclose(
        pairwise_cross_entropy(first, second, p), [0.31326169, 1.31326169, 0.69314718, 2.44858735], rtol=1e-6
    )


def test_the_optimum_is_the_label():
    slope = jax.vmap(jax.grad(lambda m, p: pairwise_cross_entropy(m, 0.0, p)))
    p = jnp.array([0.1, 0.5, 0.9])
    np.testing.assert_allclose(slope(jnp.log(p / (1 - p)), p), 0, atol=1e-6)
    np.testing.assert_allclose(slope(jnp.array([200.0, -200.0]), jnp.array([0.25, 0.25])), [0.75, -0.25])


def test_both_orders_of_a_pair_cost_the_same():
    a, b, p = jnp.array([0.3]), jnp.array([-1.2]), jnp.array([0.7])
    np.testing.assert_allclose(pairwise_cross_entropy(a, b, p), pairwise_cross_entropy(b, a, 1 - p), rtol=1e-6)


def numpy_metrics(params, batch):
    scores = []
    for i in (1, 2):
        per_token = np.asarray(jax.jit(MODEL)(params, batch[f"tokens{i}"], batch[f"mask{i}"]), np.float64)
        scores.append(per_token[np.arange(len(per_token)), [np.flatnonzero(m)[-1] for m in batch[f"mask{i}"]]])
    margin, p, w = scores[0] - scores[1], batch["probability"].astype(np.float64), batch["weight"]
    kept = w > 0
    each = p * np.log1p(np.exp(-margin)) + (1 - p) * np.log1p(np.exp(margin))
    decided = kept & (p != 0.5)
    return (each * w)[kept].sum() / w[kept].sum(), ((margin > 0) == (p > 0.5))[decided].mean()


@pytest.mark.parametrize("pad_side", ["left", "right"])
def test_the_reward_is_read_at_the_last_real_token(params, step, pad_side):
    batch = make_batch(np.random.default_rng(0), pad_side)
    batch["weight"] = np.float32([1, 0.5, 2, 0, 1, 1, 0, 1])
    batch["probability"][[0, 3]] = 0.5
    _, metrics = step((params, OPTIMIZER.init(params)), batch)
    loss, accuracy = numpy_metrics(params, batch)
    np.testing.assert_allclose([metrics["loss"], metrics["accuracy"]], [loss, accuracy], rtol=1e-5)
    assert 0 < accuracy < 1


def test_padding_on_either_side_teaches_the_same(params, step):
    states = [
        step((params, OPTIMIZER.init(params)), make_batch(np.random.default_rng(0), pad_side, junk=junk))
        for pad_side, junk in (("left", 1), ("right", 2))
    ]
    np.testing.assert_allclose(states[0][1]["loss"], states[1][1]["loss"], rtol=1e-5)
    np.testing.assert_allclose(states[0][1]["accuracy"], states[1][1]["accuracy"])


def test_a_missing_judgement_teaches_nothing(params, step):
    batch = make_batch(np.random.default_rng(0))
    batch["weight"][[2, 5]] = 0
    clean, _ = step((params, OPTIMIZER.init(params)), batch)
    other = {name: x.copy() for name, x in batch.items()}
    other["probability"][[2, 5]] = [np.nan, 1e6]
    other["tokens1"][[2, 5]] = 3
    dirty, metrics = step((params, OPTIMIZER.init(params)), other)
    assert np.isfinite(metrics["loss"])
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty)):
        np.testing.assert_array_equal(a, b)
    none = batch | {"weight": np.zeros(B, np.float32)}
    (still, _), metrics = step((params, OPTIMIZER.init(params)), none)
    assert metrics["loss"] == metrics["accuracy"] == 0
    for a, b in zip(jax.tree.leaves(still), jax.tree.leaves(params)):
        np.testing.assert_array_equal(a, b)


def test_it_learns_what_separates_the_pairs(params, step):
    rng = np.random.default_rng(1)
    state, accuracies = (params, OPTIMIZER.init(params)), []
    for _ in range(60):
        state, metrics = step(state, make_batch(rng, count=64))
        accuracies.append(float(metrics["accuracy"]))
    assert np.mean(accuracies[:3]) < 0.75
    assert np.mean(accuracies[-5:]) > 0.9, accuracies
