"""Supervised stages: a step is run over a fixed set of examples for a number of updates."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from rlaif_jax.algorithms.optimizer import OptimizerConfig, make_optimizer
from rlaif_jax.config import require
from rlaif_jax.parallel import Runner
from rlaif_jax.types import Params

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """A supervised stage: AdamW with a warm-up over a twentieth of the updates, then a cosine to zero.

    Attributes:
        updates: optimiser steps.
        batch_size: examples of a step.
        learning_rate: the peak.
    """

    updates: int
    batch_size: int = 32
    learning_rate: float = 1.5e-3

    def __post_init__(self) -> None:
        require(
            self.updates >= 1 and self.batch_size >= 1,
            f"a stage needs updates >= 1 and batch_size >= 1, not {self.updates} and {self.batch_size}",
        )
        require(self.learning_rate > 0, f"a stage needs a learning_rate > 0, not {self.learning_rate}")

    @property
    def optimizer(self) -> OptimizerConfig:
        """Returns the stage's optimiser settings."""
        return OptimizerConfig(
            learning_rate=self.learning_rate, schedule="cosine", warmup_updates=self.updates // 20, b2=0.98, eps=1e-8
        )


def minibatches(examples: Arrays, size: int, seed: int) -> Iterator[Arrays]:
    """Yields minibatches of the examples without end, shuffled anew in each pass.

    The rest of a pass that does not fill a minibatch is left out.

    Args:
        examples: name -> array [N, ...], with one N.
        size: rows of a minibatch.
        seed: of the order.

    Raises:
        UserError: fewer than `size` examples.
    """
    count = len(next(iter(examples.values())))
    require(count >= size, f"a batch of {size} examples was asked for, but there are only {count}")
    epoch = 0
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(count)
        for start in range(0, count - size + 1, size):
            chosen = order[start : start + size]
            yield {name: values[chosen] for name, values in examples.items()}
        epoch += 1


def fit(
    step: Callable[..., Any],
    state: Any,
    batches: Iterator[Arrays],
    updates: int,
    *,
    runner: Runner,
    log: Callable[[int, dict[str, float]], None],
    log_every: int = 10,
    stop: Callable[[], bool] = lambda: False,
) -> Any:
    """Runs `updates` steps over `batches` and returns the state.

    Args:
        step: `(state, batch, *, axis_name) -> (state, metrics)`, pure.
        state: the state to start from; it is copied, not donated.
        batches: yields a batch for each update.
        updates: number of updates.
        runner: the devices.
        log: called with (update, mean metrics since the last call) every `log_every` updates.
        log_every: updates between two calls of `log`.
        stop: asked after each call of `log`; True ends the stage early.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    compiled = runner.step(step)
    # The first step donates its input: the caller keeps its own arrays.
    state = runner.place(jax.tree.map(jax.numpy.array, state))
    pending: list[Any] = []
    since = time.perf_counter()
    for update in range(1, updates + 1):
        state, metrics = compiled(state, next(batches))
        pending.append(metrics)
        if update % log_every == 0 or update == updates:
            values = {k: float(np.mean([float(m[k]) for m in jax.device_get(pending)])) for k in metrics}
            if not np.isfinite(values["loss"]):
                raise FloatingPointError(f"the loss is not finite at update {update}: lower the learning rate")
            now = time.perf_counter()
            log(update, values | {"time/updates_per_s": len(pending) / (now - since)})
            pending, since = [], now
            if stop():
                break
    return state


def fit_model(
    step: Callable[..., Any],
    model: Any,
    params: Params,
    examples: Arrays,
    config: FitConfig,
    seed: int,
    *,
    runner: Runner,
    log: Callable[[int, dict[str, float]], None],
    stop: Callable[[], bool] = lambda: False,
) -> Params:
    """Fits a model to a fixed set of examples and returns its parameters on the host.

    Args:
        step: `supervised_step` (maximum likelihood), `reward_step` (pairs) or `ranking_step` (lists).
        model: what `step` takes as its model.
        params: the parameters to start from.
        examples: the arrays of `step`'s batch, with a common first axis.
        config: updates, batch size and optimiser.
        seed: of the order of the examples.
        runner: the devices.
        log: called with (update, mean metrics since the last call).
        stop: asked after each call of `log`; True ends the stage early.

    Raises:
        FloatingPointError: the loss is not finite.
        UserError: fewer examples than a batch has.
    """
    tx = make_optimizer(config.optimizer, config.updates)
    state = fit(
        partial(step, model, tx),
        (params, tx.init(params)),
        minibatches(examples, config.batch_size, seed),
        config.updates,
        runner=runner,
        log=log,
        stop=stop,
    )
    return jax.device_get(state[0])
