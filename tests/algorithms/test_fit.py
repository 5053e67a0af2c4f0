"""The supervised stages: batches, logging, stopping, and the two models they fit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.algorithms.fit import FitConfig, fit, fit_model, minibatches
from rlaif_jax.algorithms.reward_modeling import reward_step
from rlaif_jax.algorithms.supervised import supervised_step
from rlaif_jax.config import UserError
from rlaif_jax.models import CausalLM, ScalarModel
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.parallel import JitRunner
from tests.helpers import random_params

DECODER = small_decoder(8, num_layers=1, width=16, num_heads=2, context_length=8)


def drawn(size, seed, count, examples=10):
    arrays = {"x": np.arange(examples), "y": 10 * np.arange(examples)}
    return [batch["x"].tolist() for batch in itertools.islice(minibatches(arrays, size, seed), count)]


def test_minibatches_are_deterministic_and_reshuffled():
    batches = drawn(5, seed=0, count=6)
    assert batches == drawn(5, seed=0, count=6)
    assert batches != drawn(5, seed=1, count=6)
    epochs = [batches[i] + batches[i + 1] for i in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_minibatches_keep_rows_together_and_have_one_size():
    arrays = {"x": np.arange(10), "y": 10 * np.arange(10)}
    for batch in itertools.islice(minibatches(arrays, 4, 0), 5):
        np.testing.assert_array_equal(batch["y"], 10 * batch["x"])
        assert len(batch["x"]) == 4
        assert len(set(batch["x"])) == 4


def test_too_few_examples_are_named():
    with pytest.raises(UserError, match=r"a batch of 11 .* only 10"):
        drawn(11, seed=0, count=1)


def counting_step(state, batch, *, axis_name=None):
    """Adds up its batches; the loss is the batch's value."""
    return {"total": state["total"] + batch["x"].sum()}, {"loss": batch["x"].mean(), "twice": 2 * batch["x"].mean()}


def stream(values):
    return ({"x": np.full(2, v, np.float32)} for v in values)


def test_fit_logs_means_over_the_interval():
    log = []
    state = fit(
        counting_step,
        {"total": jnp.float32(0)},
        stream([1, 2, 3, 4, 9]),
        5,
        runner=JitRunner(),
        log=lambda update, values: log.append((update, values)),
        log_every=2,
    )
    assert float(state["total"]) == 38
    assert [update for update, _ in log] == [2, 4, 5]
    assert [values["loss"] for _, values in log] == [1.5, 3.5, 9]
    assert [values["twice"] for _, values in log] == [3, 7, 18]
    assert all(values["time/updates_per_s"] > 0 for _, values in log)


def test_fit_keeps_the_callers_arrays():
    start = {"total": jnp.float32(7)}
    state = fit(counting_step, start, stream([1]), 1, runner=JitRunner(), log=lambda *_: None)
    assert float(start["total"]) == 7  # not donated away
    assert float(state["total"]) == 9


def test_fit_stops_when_asked():
    asked = []
    state = fit(
        counting_step,
        {"total": jnp.float32(0)},
        stream([1] * 10),
        10,
        runner=JitRunner(),
        log=lambda *_: None,
        log_every=2,
        stop=lambda: asked.append(1) or len(asked) == 2,
    )
    assert float(state["total"]) == 8


def test_fit_refuses_a_loss_that_is_not_finite():
    with pytest.raises(FloatingPointError, match="not finite at update 4"):
        fit(
            counting_step,
            {"total": jnp.float32(0)},
            stream([1, 1, np.nan, 1]),
            4,
            runner=JitRunner(),
            log=lambda *_: None,
            log_every=2,
        )


def test_fit_model_learns_sequences_and_repeats_itself():
    """The sequence 1 2 3 4 after any first token: only targets of weight are learned, twice the same bits."""
    rng = np.random.default_rng(0)
    tokens = np.concatenate([rng.integers(0, 8, (40, 1)), np.tile([1, 2, 3, 4], (40, 1))], axis=1).astype(np.int32)
    examples = {
        "tokens": tokens,
        "segments": np.ones((40, 5), np.int32),
        "positions": np.tile(np.arange(5, dtype=np.int32), (40, 1)),
        "weights": np.ones((40, 5), np.float32),
    }
    model = CausalLM(DECODER)
    start = random_params(model, scale=0.1)
    before = jax.device_get(start)
    runs = []
    for _ in range(2):
        log = []
        params = fit_model(
            supervised_step,
            model,
            start,
            examples,
            FitConfig(30, 8, 2e-2),
            seed=0,
            runner=JitRunner(),
            log=lambda update, values, log=log: log.append(values["loss"]),
        )
        assert log[-1] < 0.5 * log[0]
        runs.append(params)
    for a, b in zip(*map(jax.tree.leaves, runs)):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(start)):
        np.testing.assert_array_equal(a, b)


def test_fit_model_learns_comparisons():
    rng = np.random.default_rng(0)
    pairs = {
        "tokens1": rng.integers(1, 8, (48, 4)).astype(np.int32),
        "tokens2": rng.integers(1, 8, (48, 4)).astype(np.int32),
    }
    better = pairs["tokens1"][:, -1] - pairs["tokens2"][:, -1]
    pairs |= {
        "mask1": np.ones((48, 4), bool),
        "mask2": np.ones((48, 4), bool),
        "weight": np.ones(48, np.float32),
        "probability": np.where(better > 0, 1, np.where(better < 0, 0, 0.5)).astype(np.float32),
    }
    model = ScalarModel(DECODER, "normal")
    log = []
    fit_model(
        reward_step,
        model,
        random_params(model, scale=0.1),
        pairs,
        FitConfig(40, 16, 2e-2),
        seed=0,
        runner=JitRunner(),
        log=lambda update, values: log.append(values["accuracy"]),
    )
    assert log[-1] > 0.9
