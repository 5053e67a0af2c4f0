"""The supervised stages: batches, logging, stopping, and the two models they fit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.algorithms.fit import FitConfig, bucketed_minibatches, fit, fit_model, minibatches
from rlaif_jax.algorithms.reward_modeling import reward_step
from rlaif_jax.algorithms.supervised import supervised_step
from rlaif_jax.checkpoint import StagePart
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


def buckets_of(*sizes):
    starts = np.cumsum([0, *sizes])
    return [{"x": np.arange(a, b), "wide": np.ones((b - a, b - a))} for a, b in itertools.pairwise(starts)]


def test_buckets_are_drawn_in_proportion_and_every_example_once_a_pass():
    batches = list(itertools.islice(bucketed_minibatches(buckets_of(12, 4, 8), 4, [0]), 12))
    assert all(batch["x"].shape == (4, 1) for batch in batches)
    widths = [batch["wide"].shape[-1] for batch in batches]
    assert [widths.count(n) for n in (12, 4, 8)] == [6, 2, 4]
    assert sorted(widths[:6]) == [4, 8, 8, 12, 12, 12], "each pass has every bucket"
    for half in (batches[:6], batches[6:]):
        assert sorted(np.concatenate([batch["x"][:, 0] for batch in half])) == list(range(24))
    largest = [batch["x"].tolist() for batch in batches if batch["wide"].shape[-1] == 12]
    assert largest[:3] != largest[3:], "shuffled anew in each pass"


def test_the_batches_of_a_member_are_those_of_its_seed_alone():
    take = lambda seeds: list(itertools.islice(bucketed_minibatches(buckets_of(10, 3), 4, seeds), 9))
    for both, zero, one in zip(take([0, 1]), take([0]), take([1])):
        np.testing.assert_array_equal(both["x"], np.concatenate([zero["x"], one["x"]], axis=1))
        np.testing.assert_array_equal(both["wide"][:, 1], one["wide"][:, 0])
    assert any((batch["x"][:, 0] != batch["x"][:, 1]).any() for batch in take([0, 1]))


def test_a_bucket_smaller_than_a_batch_loses_no_example():
    batches = list(itertools.islice(bucketed_minibatches(buckets_of(3, 9), 4, [0]), 12))
    drawn = np.bincount(np.concatenate([batch["x"][:, 0] for batch in batches]), minlength=12)
    assert drawn.tolist() == [4] * 12


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


class Kept:
    """A fit of 13 updates with a check and a kept state every 4, and what it logged."""

    def __init__(self, folder, stop_after=1000, check=True):
        self.part, self.log, self.stop_after, self.check = StagePart(folder), [], stop_after, check

    def run(self):
        return fit(
            counting_step,
            {"total": jnp.float32(0)},
            stream(range(1, 14)),
            13,
            runner=JitRunner(),
            log=lambda update, values: self.log.append((update, {k: v for k, v in values.items() if "time" not in k})),
            log_every=3,
            stop=lambda: len(self.log) >= self.stop_after,
            check=(lambda state: {"checked": float(state["total"])}) if self.check else None,
            part=self.part,
            every=4,
        )


def test_fit_checks_the_state_before_and_after_every_part(tmp_path):
    kept = Kept(tmp_path)
    assert float(kept.run()["total"]) == 2 * sum(range(14))
    checks = [(update, values["checked"]) for update, values in kept.log if "checked" in values]
    assert checks == [(n, float(n * (n + 1))) for n in (0, 4, 8, 12, 13)]
    assert [update for update, values in kept.log if "loss" in values] == [3, 4, 6, 8, 9, 12, 13]
    assert kept.part.done == 13


@pytest.mark.parametrize("check", [True, False])
def test_a_fit_that_is_stopped_anywhere_goes_on_to_the_same_numbers(check, tmp_path):
    whole = Kept(tmp_path / "whole", check=check)
    expected = whole.run()
    for stop_after in range(1, len(whole.log) + 1):
        stopped = Kept(tmp_path / str(stop_after), stop_after, check)
        stopped.run()
        done = stopped.part.done
        rest = Kept(tmp_path / str(stop_after), check=check)
        np.testing.assert_array_equal(rest.run()["total"], expected["total"])
        assert [line for line in stopped.log if line[0] <= done] + rest.log == whole.log


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
