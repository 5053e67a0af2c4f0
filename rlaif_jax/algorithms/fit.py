"""Supervised stages: a step is run over examples for a number of updates, or until a check holds."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
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
        require(0 < self.learning_rate < np.inf, f"a stage needs a finite learning_rate > 0, not {self.learning_rate}")

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
        require(0 < self.learning_rate < np.inf, f"a stage needs a finite learning_rate > 0, not {self.learning_rate}")


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


def bucketed_minibatches(buckets: Sequence[Arrays], size: int, seeds: Sequence[int]) -> Iterator[Arrays]:
    """Yields minibatches without end, each of examples of one bucket, for one or several models at once.

    Every bucket is drawn from in proportion to its examples, in an order of the buckets that depends on their sizes alone;
    within a bucket all examples come once before one comes again, in an order by the seed. Examples of similar length in one
    bucket need little padding, and models of different seeds have minibatches of the same shape.

    Args:
        buckets: name -> array [n, ...], with one n in a bucket; trailing axes may differ between buckets.
        size: rows of a minibatch.
        seeds: N seeds of the order, one a model.

    Yields:
        name -> array [size, N, ...].
    """
    counts = np.array([len(next(iter(bucket.values()))) for bucket in buckets], np.float64)
    shares, taken = counts / counts.sum(), np.zeros(len(buckets))
    orders = [[_endless_order(int(count), (seed, b)) for seed in seeds] for b, count in enumerate(counts)]
    for update in itertools.count(1):
        b = int(np.argmax(update * shares - taken))
        taken[b] += 1
        rows = np.stack([list(itertools.islice(order, size)) for order in orders[b]], axis=1)
        yield {name: values[rows] for name, values in buckets[b].items()}


def _endless_order(count: int, seed: tuple[int, ...]) -> Iterator[int]:
    for epoch in itertools.count():
        yield from np.random.default_rng((*seed, epoch)).permutation(count).tolist()


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
    check: Callable[[Any], dict[str, float]] | None = None,
    part: Part | None = None,
    every: int | None = None,
) -> Any:
    """Runs `updates` steps over `batches` and returns the state.

    A fit that goes on from a state of `part` computes the same numbers, bit for bit, as one that was never stopped: the
    batches of the updates that are done are passed over.

    Args:
        step: `(state, batch, *, axis_name) -> (state, metrics)`, pure; with a base `(state, base, batch, *, axis_name)`.
        state: the state to start from; it is copied, not donated.
        batches: yields a batch for each update, from the first on.
        updates: number of updates.
        runner: the devices.
        log: called with (update, mean metrics since the last call) every `log_every` updates, and with the check's values.
        base: weights that `step` reads and that do not learn.
        log_every: updates between two calls of `log`.
        stop: asked after each call of `log`; True ends the stage early, and `part` keeps the state.
        check: state -> values that are logged, before the first update and after every `every` updates.
        part: keeps the state after every `every` updates; the fit goes on from a state that it has.
        every: updates between two checks and two states that are kept; None: all of them.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    # The first step donates its input: the caller keeps its own arrays.
    state, done = runner.place(jax.tree.map(jax.numpy.array, state)), 0
    if part is not None and (found := part.load(runner.fetch(state))) is not None:
        state, done = runner.place(found[0]), part.done
    for _ in range(done):
        next(batches)
    if check is not None and done == 0:
        log(0, check(state))
    compiled, every = runner.step(step), every or updates
    frozen = () if base is None else (runner.place(base),)
    one = lambda state, batch: compiled(state, *frozen, batch)
    while done < updates:
        end = min(done - done % every + every, updates)
        state, done, stopped = _descend(one, state, batches, range(done + 1, end + 1), log, log_every, stop)
        if check is not None and done == end:
            log(done, check(state))
        if part is not None:
            part.save(done, runner.fetch(state), {})
        if stopped:
            break
    return state


def _descend(
    compiled: Callable[..., Any],
    state: Any,
    batches: Iterator[Arrays],
    updates: range,
    log: Callable[[int, dict[str, float]], None],
    log_every: int,
    stop: Callable[[], bool],
) -> tuple[Any, int, bool]:
    """Runs a compiled step for the updates of these numbers, as `fit` does; `state` is donated.

    Returns:
        (state, number of the last update, whether `stop` has ended the updates).
    """
    pending: list[Any] = []
    since = time.perf_counter()
    for update in updates:
        state, metrics = compiled(state, next(batches))
        if jax.default_backend() == "cpu":  # updates under way would hold their memory twice
            jax.block_until_ready(metrics)
        pending.append(metrics)
        if update % log_every == 0 or update == updates[-1]:
            values = {k: float(np.mean([float(m[k]) for m in jax.device_get(pending)])) for k in metrics}
            if not np.isfinite(values["loss"]):
                raise FloatingPointError(f"the loss is not finite at update {update}: lower the learning rate")
            now = time.perf_counter()
            log(update, values | {"time/updates_per_s": len(pending) / (now - since)})
            pending, since = [], now
            if stop():
                return state, update, True
    return state, updates[-1], False


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
    check: Callable[[Params], dict[str, float]] | None = None,
    part: Part | None = None,
    every: int | None = None,
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
        check: parameters where the runner has them -> values that are logged; see `fit`, as for the next two.
        part: keeps the state of the fit.
        every: updates between two checks and two states that are kept; None: all of them.

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
        check=None if check is None else lambda state: check(state[0]),
        part=part,
        every=every,
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
        numbers = range(done + 1, done + updates + 1)
        return _descend(compiled, state, batches, numbers, log, LOG_EVERY, stop)[0]

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
