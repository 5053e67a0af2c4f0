"""Supervised stages: a step is run over examples for a number of updates, or until a check holds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np

from rlaif_jax.algorithms.optimizer import OptimizerConfig, make_optimizer, restart_schedule
from rlaif_jax.config import require
from rlaif_jax.models.lora import LoRAConfig, joined
from rlaif_jax.parallel import Runner
from rlaif_jax.types import Params

Arrays = dict[str, np.ndarray]
WARMUP = 40  # updates
LOG_EVERY = 10  # updates


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """A supervised stage: AdamW with a warm-up over a twentieth of the updates, then a cosine to zero.

    Attributes:
        updates: optimiser steps.
        batch_size: examples of a step; of packed texts, rows.
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


@dataclasses.dataclass(frozen=True)
class UntilConfig:
    """A supervised stage that learns until a check of the model holds, then cools down.

    AdamW with a warm-up over the first `WARMUP` updates, a constant rate until the check holds, and a linear decay to zero:
    how long a small model needs to find what it has to learn differs from seed to seed, and a rate that decays at a fixed
    time freezes the slow ones half-way.

    Attributes:
        updates: at most this number of updates at the constant rate; a multiple of `check_every`.
        check_every: updates between two checks.
        required: the value of the check, in [0, 1], at which the cool-down begins.
        cooldown: updates of the decay.
        batch_size: examples of a step; of packed texts, rows.
        learning_rate: the constant rate.
    """

    updates: int
    check_every: int = 200
    required: float = 0.95
    cooldown: int = 200
    batch_size: int = 32
    learning_rate: float = 1.5e-3

    def __post_init__(self) -> None:
        for field in ("updates", "check_every", "cooldown", "batch_size"):
            require(self.__dict__[field] >= 1, f"a stage needs {field} >= 1, not {self.__dict__[field]}")
        require(
            self.updates % self.check_every == 0,
            f"updates ({self.updates}) of a stage must be a multiple of its check_every ({self.check_every})",
        )
        require(0 <= self.required <= 1, f"required of a stage must lie in 0 .. 1, not {self.required}")
        require(self.learning_rate > 0, f"a stage needs a learning_rate > 0, not {self.learning_rate}")


class Part(Protocol):
    """Keeps how far a fit is, so that a run that was stopped goes on there; see `checkpoint.StagePart`."""

    @property
    def done(self) -> int:
        """Returns the number of updates of the state that is kept."""

    def load(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Returns the state and what was saved with it; `like` has its shapes."""

    def save(self, done: int, arrays: Any, values: dict[str, Any]) -> None:
        """Keeps the state after `done` updates, with JSON values."""


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
    base: Params = None,
    log_every: int = LOG_EVERY,
    stop: Callable[[], bool] = lambda: False,
) -> Any:
    """Runs `updates` steps over `batches` and returns the state.

    Args:
        step: `(state, batch, *, axis_name) -> (state, metrics)`, pure; with a base `(state, base, batch, *, axis_name)`.
        state: the state to start from; it is copied, not donated.
        batches: yields a batch for each update.
        updates: number of updates.
        runner: the devices.
        log: called with (update, mean metrics since the last call) every `log_every` updates.
        base: weights that `step` reads and that do not learn.
        log_every: updates between two calls of `log`.
        stop: asked after each call of `log`; True ends the stage early.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    # The first step donates its input: the caller keeps its own arrays.
    state = runner.place(jax.tree.map(jax.numpy.array, state))
    compiled, frozen = runner.step(step), () if base is None else (runner.place(base),)
    one = lambda state, batch: compiled(state, *frozen, batch)
    return _descend(one, state, batches, range(1, updates + 1), log, log_every, stop)


def _descend(
    compiled: Callable[..., Any],
    state: Any,
    batches: Iterator[Arrays],
    updates: range,
    log: Callable[[int, dict[str, float]], None],
    log_every: int,
    stop: Callable[[], bool],
) -> Any:
    """Runs a compiled step for the updates of these numbers, as `fit` does; `state` is donated."""
    pending: list[Any] = []
    since = time.perf_counter()
    for update in updates:
        state, metrics = compiled(state, next(batches))
        pending.append(metrics)
        if update % log_every == 0 or update == updates[-1]:
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
    lora: LoRAConfig | None = None,
    base: Params = None,
) -> Params:
    """Fits a model to a fixed set of examples and returns its parameters on the host.

    With `lora` and `base` an adapter learns, and what else `params` has, such as the head of a reward model.

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
        lora: settings of the adapter; None: `params` are whole.
        base: the weights under the adapter.

    Raises:
        FloatingPointError: the loss is not finite.
        UserError: fewer examples than a batch has; an adapter that does not fit its base.
    """
    require(
        (lora is None) == (base is None), "an adapter needs both `lora`, its settings, and `base`, the weights under it"
    )
    tx = make_optimizer(config.optimizer, config.updates)

    def adapted(state: Any, base: Params, batch: Any, *, axis_name: str | None = None) -> Any:
        return step(model, tx, state, batch, weights=partial(joined, lora, base), axis_name=axis_name)

    state = fit(
        partial(step, model, tx) if lora is None else adapted,
        (params, tx.init(params)),
        minibatches(examples, config.batch_size, seed),
        config.updates,
        runner=runner,
        log=log,
        base=base,
        stop=stop,
    )
    return jax.device_get(state[0])


def fit_until(
    step: Callable[..., Any],
    model: Any,
    params: Params,
    examples: Callable[[int, int], Arrays],
    check: Callable[[Params], dict[str, float]],
    config: UntilConfig,
    *,
    runner: Runner,
    log: Callable[[int, dict[str, float]], None],
    stop: Callable[[], bool] = lambda: False,
    part: Part | None = None,
) -> Params:
    """Fits a model until a check of it holds, cools down, and returns its parameters on the host.

    Args:
        step: as `fit_model` takes it.
        model: what `step` takes as its model.
        params: the parameters to start from.
        examples: (round, number) -> that many fresh examples; a round lasts until the next check, the last one is the
            cool-down.
        check: parameters on the host -> values in [0, 1], which are logged; the smallest one counts.
        config: updates, checks and optimiser.
        runner: the devices.
        log: called with (update, mean metrics since the last call, or the check's values).
        stop: asked after each call of `log`; True ends the stage early.
        part: keeps the state after each check; the fit goes on from a state that it has.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    rate = OptimizerConfig(config.learning_rate, "constant", WARMUP, b2=0.98, eps=1e-8)
    constant = make_optimizer(rate, config.updates)
    decaying = make_optimizer(dataclasses.replace(rate, schedule="linear", warmup_updates=0), config.cooldown)
    compiled = runner.step(partial(step, model, constant))
    state = runner.place(jax.tree.map(jax.numpy.array, (params, constant.init(params))))  # the caller keeps its own

    def learn(compiled: Callable[..., Any], state: Any, done: int, updates: int) -> Any:
        batches = minibatches(examples(done // config.check_every, updates * config.batch_size), config.batch_size, 0)
        return _descend(compiled, state, batches, range(done + 1, done + updates + 1), log, LOG_EVERY, stop)

    done, holds = 0, False
    if part is not None and (found := part.load(runner.fetch(state))) is not None:
        state, done, holds = runner.place(found[0]), part.done, found[1]["holds"]
    while done < config.updates and not holds:
        state = learn(compiled, state, done, config.check_every)
        if stop():
            break
        done += config.check_every
        values = check(jax.device_get(runner.fetch(state[0])))
        smallest = min(values.values())
        log(done, {"check": smallest} | {f"check/{name}": x for name, x in values.items()})
        holds = smallest >= config.required
        if part is not None:
            part.save(done, runner.fetch(state), {"holds": holds})
    if not stop():
        compiled = runner.step(partial(step, model, decaying))
        state = learn(compiled, (state[0], restart_schedule(state[1])), done, config.cooldown)
    return jax.device_get(state[0])
