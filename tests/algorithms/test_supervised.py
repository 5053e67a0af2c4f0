"""Maximum likelihood against NumPy in float64, and the optimiser's schedule by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlaif_jax.algorithms.optimizer import OptimizerConfig, clip_by_global_norm, make_optimizer
from rlaif_jax.algorithms.supervised import supervised_step, weighted_cross_entropy
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import small_decoder
from tests.helpers import random_params

V, C = 9, 10  # columns of a row
MODEL = CausalLM(small_decoder(V, num_layers=1, width=16, num_heads=2, context_length=16))
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, schedule="constant"), 1)


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL, scale=0.2)


LENGTHS = (6, 2, 4, 5)


def make_texts():
    """Returns (tokens, weights) of each text."""
    rng = np.random.default_rng(0)
    return [
        (rng.integers(0, V, n).astype(np.int32), rng.choice([0.0, 0.1, 1.0, 2.0], n).astype(np.float32))
        for n in LENGTHS
    ]


def rows_of(*rows, columns=C):
    """Lays texts out in rows: each argument is the numbers of the texts of a row."""
    texts = make_texts()
    batch = {name: np.zeros((len(rows), columns), np.int32) for name in ("tokens", "segments", "positions")}
    batch["weights"] = np.zeros((len(rows), columns), np.float32)
    for row, numbers in enumerate(rows):
        start = 0
        for segment, number in enumerate(numbers, start=1):
            tokens, weights = texts[number]
            at = (row, slice(start, start + len(tokens)))
            batch["tokens"][at], batch["weights"][at] = tokens, weights
            batch["segments"][at], batch["positions"][at] = segment, np.arange(len(tokens))
            start += len(tokens)
    return batch


def make_batch():
    return rows_of((0, 1), (2, 3))


def numpy_loss(params):
    """sum of weight x -log p(next token) over all targets, over the sum of their weights; text by text, in float64."""
    total = weight = 0.0
    for tokens, weights in make_texts():
        logits = np.asarray(jax.jit(MODEL)(params, tokens[None], np.ones((1, len(tokens)), bool)), np.float64)[0]
        for s in range(1, len(tokens)):
            w, scores = float(weights[s]), logits[s - 1]
            total += w * (np.log(np.exp(scores).sum()) - scores[tokens[s]])
            weight += w
    return total / weight


@pytest.fixture(scope="module")
def step():
    return jax.jit(functools.partial(supervised_step, MODEL, OPTIMIZER))


def test_the_loss_is_the_weighted_cross_entropy(params, step):
    batch = make_batch()
    _, metrics = step((params, OPTIMIZER.init(params)), batch)
    np.testing.assert_allclose(metrics["loss"], numpy_loss(params), rtol=1e-5)
    doubled = batch | {"weights": 2 * batch["weights"]}
    np.testing.assert_allclose(step((params, OPTIMIZER.init(params)), doubled)[1]["loss"], metrics["loss"], rtol=1e-5)
    other = batch | {"weights": (batch["weights"] > 0).astype(np.float32)}
    assert abs(step((params, OPTIMIZER.init(params)), other)[1]["loss"] - metrics["loss"]) > 1e-3


@pytest.mark.parametrize(
    "rows, columns",
    [([(0,), (1,), (2,), (3,)], C), ([(3, 0), (1, 2)], 11), ([(1, 2, 3, 0)], 17), ([(2, 0), (3, 1), ()], C)],
)
def test_the_layout_of_the_rows_changes_nothing(params, step, rows, columns):
    """One text a row, another order, a full row, an empty row: loss and new parameters stay the same."""
    state = (params, OPTIMIZER.init(params))
    (new, _), metrics = step(state, rows_of(*rows, columns=columns))
    (expected, _), expected_metrics = step(state, make_batch())
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_a_full_row_does_not_predict_its_first_token(params, step):
    full = rows_of((0,), columns=LENGTHS[0])
    heavy = full | {"weights": np.where(np.arange(LENGTHS[0]) == 0, 7, full["weights"]).astype(np.float32)}
    state = (params, OPTIMIZER.init(params))
    assert step(state, full)[1]["loss"] == step(state, heavy)[1]["loss"]


def test_empty_columns_may_hold_anything(params, step):
    batch, rng = make_batch(), np.random.default_rng(1)
    empty = batch["segments"] == 0
    assert empty.any()
    dirty = batch | {
        "tokens": np.where(empty, rng.integers(-3, 3 * V, empty.shape), batch["tokens"]).astype(np.int32),
        "positions": np.where(empty, rng.integers(0, C, empty.shape), batch["positions"]).astype(np.int32),
        "weights": np.where(empty, np.nan, batch["weights"]).astype(np.float32),
    }
    clean = step((params, OPTIMIZER.init(params)), batch)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(step((params, OPTIMIZER.init(params)), dirty))):
        np.testing.assert_array_equal(a, b)


def test_a_batch_without_weights_is_finite_and_moves_nothing(params, step):
    batch = make_batch() | {"weights": np.zeros((2, C), np.float32)}
    (new, _), metrics = step((params, OPTIMIZER.init(params)), batch)
    assert metrics["loss"] == 0
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(params)):
        np.testing.assert_array_equal(a, b)


def test_the_shares_of_the_devices_add_up(params):
    batch = make_batch()
    halves = jax.tree.map(lambda x: x.reshape(2, 1, C), batch)
    share, loss = jax.jit(
        jax.vmap(
            lambda rows: weighted_cross_entropy(MODEL, params, rows, "data"),
            axis_name="data",
        )
    )(halves)
    expected = numpy_loss(params)
    np.testing.assert_allclose(share.sum(), expected, rtol=1e-5)
    np.testing.assert_allclose(loss, [expected] * 2, rtol=1e-5)


def test_it_learns_a_batch(params, step):
    batch, state = make_batch(), (params, OPTIMIZER.init(params))
    losses = []
    for _ in range(40):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.3 * losses[0]


def moves(config, updates, gradient=1.0):
    """By how much each update moves a scalar: with a constant gradient Adam moves by the learning rate itself."""
    tx = make_optimizer(config, updates)
    x = jnp.float32(0)
    state = tx.init(x)
    out = []
    for _ in range(updates):
        change, state = tx.update(jnp.float32(gradient), state, x)
        out.append(-float(change))
    return out


def test_schedules():
    plain = OptimizerConfig(learning_rate=0.8, schedule="linear", eps=1e-12)
    np.testing.assert_allclose(moves(plain, 4), [0.8, 0.6, 0.4, 0.2], rtol=1e-4)
    constant = OptimizerConfig(learning_rate=0.8, schedule="constant", eps=1e-12, warmup_updates=2)
    np.testing.assert_allclose(moves(constant, 4), [0, 0.4, 0.8, 0.8], rtol=1e-4, atol=1e-9)
    warm = OptimizerConfig(learning_rate=0.8, schedule="linear", eps=1e-12, warmup_updates=2)
    np.testing.assert_allclose(moves(warm, 6), [0, 0.4, 0.8, 0.6, 0.4, 0.2], rtol=1e-4, atol=1e-9)
    cosine = OptimizerConfig(learning_rate=0.8, schedule="cosine", eps=1e-12)
    np.testing.assert_allclose(moves(cosine, 4), 0.4 * (1 + np.cos(np.pi * np.arange(4) / 4)), rtol=1e-4)
    assert len(moves(OptimizerConfig(warmup_updates=10), 3)) == 3  # a warm-up longer than the run


def test_the_gradient_is_clipped_by_its_global_norm_and_eps_is_heard():
    config = OptimizerConfig(learning_rate=1.0, schedule="constant", max_grad_norm=0.5, eps=0.5)
    np.testing.assert_allclose(moves(config, 1, gradient=100.0), [0.5 / (0.5 + 0.5)], rtol=1e-5)
    assert OptimizerConfig().eps == 1e-5


@pytest.mark.parametrize("size", [0.0, 0.1, 10.0])
def test_one_factor_clips_as_optax_does(size):
    gradient = {"a": size * jnp.array([1.0, -2.0]), "b": size * jnp.array([[2.0]], jnp.bfloat16)}
    got, _ = clip_by_global_norm(1.0).update(gradient, clip_by_global_norm(1.0).init(gradient))
    want, _ = optax.clip_by_global_norm(1.0).update(gradient, optax.EmptyState())
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-2), got, want)
    np.testing.assert_allclose(got["a"], want["a"], rtol=1e-6)
    assert got["b"].dtype == jnp.bfloat16
