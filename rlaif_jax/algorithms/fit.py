"""Supervised stages: a step, a fixed set of examples, so many updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from rlaif_jax.algorithms.optimizer import OptimizerConfig, make_optimizer
from rlaif_jax.algorithms.reward_modeling import reward_step
from rlaif_jax.algorithms.supervised import supervised_step
from rlaif_jax.config import require
from rlaif_jax.models.heads import LanguageModel, ScalarModel
from rlaif_jax.parallel import Runner
from rlaif_jax.types import Params

Arrays = dict[str, np.ndarray]


def minibatches(examples: Arrays, size: int, seed: int) -> Iterator[Arrays]:
    """Endless batches of `size` rows of `examples` (arrays with a common first axis), reshuffled each epoch."""
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
    """Run `updates` steps over `batches` and return the state. `step` has the form that `Runner.step` compiles.

    Metrics go to `log(update, values)` every `log_every` updates, means over the interval; `stop` is asked each time
    and ends the stage early (the caller sees to what that means). Raises FloatingPointError on a non-finite loss.
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


def fit_language_model(
    model: LanguageModel,
    params: Params,
    examples: Arrays,
    updates: int,
    batch_size: int,
    optimizer: OptimizerConfig,
    seed: int,
    **options: Any,
) -> Params:
    """Maximum likelihood on `tokens, mask, weights` [n, S] from `params`; options as in `fit`."""
    tx = make_optimizer(optimizer, updates)
    state = fit(
        partial(supervised_step, model, tx),
        (params, tx.init(params)),
        minibatches(examples, batch_size, seed),
        updates,
        **options,
    )
    return jax.device_get(state[0])


def fit_reward_model(
    model: ScalarModel,
    params: Params,
    examples: Arrays,
    updates: int,
    batch_size: int,
    optimizer: OptimizerConfig,
    seed: int,
    *,
    step: Callable[..., Any] = reward_step,
    **options: Any,
) -> Params:
    """A reward model of `examples` from `params`, by one of the steps of `reward_modeling`: `reward_step` (pairs),
    `ranking_step` (lists); options as in `fit`."""
    tx = make_optimizer(optimizer, updates)
    state = fit(
        partial(step, model, tx),
        (params, tx.init(params)),
        minibatches(examples, batch_size, seed),
        updates,
        **options,
    )
    return jax.device_get(state[0])
