"""Stages that learn until a check holds: computed by hand for a model of one parameter.

The loss is w times the batch's mean, whose gradient is that mean. While it is 1, Adam's steps have exactly the size of the
learning rate: t / 40 of the peak .1 at update t = 0 .. 39, the peak afterwards, and (1 - t / 10) of it in a cool-down of ten.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlaif_jax.algorithms.fit import WARMUP, UntilConfig, fit_until
from rlaif_jax.algorithms.optimizer import OptimizerConfig, descend, make_optimizer, restart_schedule
from rlaif_jax.checkpoint import StagePart
from rlaif_jax.config import UserError
from rlaif_jax.parallel import JitRunner, PmapRunner, ShardRunner, make_mesh, psum
from tests.helpers import assert_same_leaves, relative_distance

CONFIG = UntilConfig(updates=60, check_every=20, required=0.9, cooldown=10, batch_size=4, learning_rate=0.1)
WARMED = 0.1 * sum(range(WARMUP)) / WARMUP  # how far the first 40 updates go
COOLED = 0.1 * sum(1 - t / 10 for t in range(10))


def linear_step(model: Any, tx: Any, state: Any, batch: dict[str, jax.Array], *, axis_name: str | None = None) -> Any:
    """Takes a step down w times the mean of `x`."""

    def loss_fn(w: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss = w * batch["x"].sum() / psum(jnp.float32(batch["x"].size), axis_name)
        return loss, {"loss": psum(jax.lax.stop_gradient(loss), axis_name)}

    return descend(loss_fn, tx, state, axis_name)


@dataclasses.dataclass
class Stage:
    """A stage of the one-parameter model, and what it was asked and said.

    `check` and `means` give the check's value and the mean of the examples by round.
    """

    config: UntilConfig = CONFIG
    check: tuple[float, ...] = (0.0, 0.0, 0.0)
    means: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    stop_after: int = 1000  # calls of `log`

    def __post_init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.checked: list[float] = []
        self.log: list[tuple[int, dict[str, float]]] = []

    def examples(self, number: int, size: int) -> dict[str, np.ndarray]:
        self.asked.append((number, size))
        return {"x": np.full(size, self.means[number], np.float32)}

    def value(self, w: Any) -> dict[str, float]:
        assert isinstance(w, np.ndarray), "the check gets parameters on the host"
        self.checked.append(float(w))
        return {"good": 1.0, "poor": self.check[len(self.checked) - 1]}

    def run(self, part: StagePart | None = None) -> float:
        start = jnp.float32(0.0)
        w = fit_until(
            linear_step,
            None,
            start,
            self.examples,
            self.value,
            self.config,
            runner=JitRunner(),
            log=lambda update, values: self.log.append((update, values)),
            stop=lambda: len(self.log) >= self.stop_after,
            part=part,
        )
        assert float(start) == 0.0, "the caller's parameters are not donated away"
        return float(w)


def test_the_constant_rate_lasts_until_the_check_holds():
    stage = Stage(check=(0.89, 0.9))
    assert stage.run() == pytest.approx(-(WARMED + COOLED), rel=1e-5)
    assert stage.checked == pytest.approx([-0.1 * sum(range(20)) / WARMUP, -WARMED], rel=1e-5)
    assert stage.asked == [(0, 80), (1, 80), (2, 40)], "fresh examples of each round, the cool-down's last"
    assert [update for update, _ in stage.log] == [10, 20, 20, 30, 40, 40, 50]
    assert stage.log[2][1] == {"check": 0.89, "check/good": 1.0, "check/poor": 0.89}
    assert stage.log[5][1] == {"check": 0.9, "check/good": 1.0, "check/poor": 0.9}
    assert stage.log[6][1]["loss"] == pytest.approx(
        -WARMED - np.mean([0.1 * (t - t * (t - 1) / 20) for t in range(10)])
    )


def test_without_a_holding_check_all_updates_are_made_and_cooled():
    stage = Stage()
    assert stage.run() == pytest.approx(-(WARMED + 20 * 0.1 + COOLED), rel=1e-5)
    assert len(stage.checked) == 3
    assert stage.asked == [(0, 80), (1, 80), (2, 80), (3, 40)]
    assert [update for update, _ in stage.log][-2:] == [60, 70]


def test_the_cool_down_knows_the_moments():
    """Its gradients are zero: all it moves by is what the moments of forty gradients of 1 still say."""
    w = Stage(check=(0.0, 1.0), means=(1.0, 1.0, 0.0)).run()
    want = -WARMED
    for t in range(10):
        mean = (1 - 0.9**40) * 0.9 ** (t + 1) / (1 - 0.9 ** (41 + t))
        square = (1 - 0.98**40) * 0.98 ** (t + 1) / (1 - 0.98 ** (41 + t))
        want -= 0.1 * (1 - t / 10) * mean / np.sqrt(square)
    assert want < -WARMED - 0.2
    assert w == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    "stop_after, updates, checks, rounds",
    [(1, 10, 0, 1), (2, 20, 0, 1), (3, 30, 1, 2)],
    ids=["in a round", "before a check", "after a check"],
)
def test_stop_ends_the_stage_early(stop_after, updates, checks, rounds):
    """After a check the question comes again at the next call of `log`."""
    stage = Stage(stop_after=stop_after)
    assert stage.run() == pytest.approx(-0.1 * sum(range(updates)) / WARMUP, rel=1e-5)
    assert (len(stage.checked), len(stage.asked)) == (checks, rounds)


def test_stop_leaves_out_the_cool_down():
    stage = Stage(check=(1.0,), stop_after=3)
    assert stage.run() == pytest.approx(-0.1 * sum(range(20)) / WARMUP, rel=1e-5)
    assert stage.asked == [(0, 80)]


@pytest.mark.parametrize("number, update", [(0, 10), (1, 30), (2, 50)])
def test_a_loss_that_is_not_finite_raises(number, update):
    """In a round, and in the cool-down; the message counts the updates of the whole stage."""
    means = [1.0] * 3
    means[number] = np.nan
    with pytest.raises(FloatingPointError, match=f"not finite at update {update}:"):
        Stage(check=(0.0, 1.0), means=tuple(means)).run()


def quadratic_step(
    model: Any, tx: Any, state: Any, batch: dict[str, jax.Array], *, axis_name: str | None = None
) -> Any:
    """Takes a step of least squares."""

    def loss_fn(params: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        count = psum(jnp.float32(len(batch["x"])), axis_name)
        loss = jnp.sum((batch["x"] @ params["kernel"] - batch["y"]) ** 2) / count
        return loss, {"loss": psum(jax.lax.stop_gradient(loss), axis_name)}

    return descend(loss_fn, tx, state, axis_name)


def test_all_devices_find_the_same_parameters():
    truth = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)

    def examples(number: int, size: int) -> dict[str, np.ndarray]:
        x = np.random.default_rng(number).normal(size=(size, 16)).astype(np.float32)
        return {"x": x, "y": x @ truth}

    def learn(runner: Any) -> tuple[np.ndarray, list[float], list[int]]:
        errors: list[float] = []
        updates: list[int] = []

        def check(params: dict[str, np.ndarray]) -> dict[str, float]:
            errors.append(relative_distance(params["kernel"], truth))
            return {"near": 1 - errors[-1]}

        config = UntilConfig(80, check_every=20, required=0.4, cooldown=10, batch_size=16, learning_rate=0.05)
        log = lambda update, values: updates.append(update)
        start = {"kernel": np.zeros((16, 8), np.float32)}
        found = fit_until(quadratic_step, None, start, examples, check, config, runner=runner, log=log)
        return found["kernel"], errors, updates

    kernel, errors, updates = learn(JitRunner())
    assert updates[-1] < 90, "the check has held early"
    assert relative_distance(kernel, truth) < errors[-1] <= 0.6 < errors[-2]
    for runner in (PmapRunner(), ShardRunner(make_mesh(8, 1, 1)), ShardRunner(make_mesh(2, 2, 2))):
        other, other_errors, other_updates = learn(runner)
        assert isinstance(other, np.ndarray)
        np.testing.assert_allclose(other, kernel, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(other_errors, errors, rtol=1e-5)
        assert other_updates == updates


def test_a_restarted_schedule_begins_again_with_the_same_moments():
    tx = make_optimizer(OptimizerConfig(0.1, "linear", warmup_updates=0), 10)
    params, gradient = {"a": jnp.float32(1.0), "b": jnp.ones(3)}, {"a": jnp.float32(0.2), "b": jnp.full(3, -0.1)}
    state = tx.init(params)
    assert_same_leaves(restart_schedule(state), state)
    sizes = []
    for _ in range(4):
        moves, state = tx.update(gradient, state, params)
        sizes.append(float(-moves["a"]))
    np.testing.assert_allclose(sizes, [0.1, 0.09, 0.08, 0.07], rtol=1e-3)
    again = restart_schedule(state)
    adam = lambda tree: next(part for part in tree if isinstance(part, optax.ScaleByAdamState))
    assert int(adam(again).count) == 4
    assert_same_leaves(adam(again), adam(state))
    moves, _ = tx.update(gradient, again, params)
    assert float(-moves["a"]) == pytest.approx(0.1, rel=1e-3)
    moves, _ = tx.update(gradient, state, params)
    assert float(-moves["a"]) == pytest.approx(0.06, rel=1e-3)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"updates": 0}, "updates >= 1, not 0"),
        ({"check_every": 0}, "check_every >= 1, not 0"),
        ({"cooldown": 0}, "cooldown >= 1, not 0"),
        ({"batch_size": 0}, "batch_size >= 1, not 0"),
        ({"updates": 50}, r"updates \(50\) .* multiple of its check_every \(20\)"),
        ({"required": 1.01}, r"0 \.\. 1, not 1\.01"),
        ({"required": -0.1}, r"0 \.\. 1, not -0\.1"),
        ({"learning_rate": 0.0}, "learning_rate > 0, not 0.0"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **wrong)


@pytest.mark.parametrize("check", [(0.0, 1.0), (0.0, 0.0, 0.0)])
def test_stopped_anywhere_it_goes_on_from_the_last_check_to_the_same_numbers(check, tmp_path):
    means = (1.0, -0.5, 2.0, 0.7)
    whole = Stage(check=check, means=means)
    expected = whole.run()
    for stop_after in range(1, len(whole.log) + 1):
        part = StagePart(tmp_path / str(stop_after))
        stopped = Stage(check=check, means=means, stop_after=stop_after)
        stopped.run(part)
        done = part.done
        rest = Stage(check=check[done // CONFIG.check_every :], means=means)
        assert rest.run(part) == expected
        assert done == max((update for update, values in stopped.log if "check" in values), default=0)
        kept = [line for line in stopped.log if line[0] <= done]
        names = lambda log: [(update, sorted(values)) for update, values in log]
        assert names(kept + rest.log) == names(whole.log), "no update is done twice, and no check"


def test_a_damaged_part_of_a_stage_is_made_again(tmp_path, capsys):
    part = StagePart(tmp_path / "part")
    Stage(stop_after=4).run(part)
    assert part.done == 20
    (tmp_path / "part" / "20" / "settings.json").write_text("{")
    again = Stage()
    assert again.run(part) == Stage().run()
    assert again.asked[0][0] == 0
    assert "part/20: these parameters do not fit or cannot be read" in capsys.readouterr().err
