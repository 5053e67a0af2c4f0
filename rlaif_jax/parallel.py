"""Many devices: a pure step is written once and run by one of two thin wrappers.

`pmap`: the state is on every device, the batch is split over them, collectives are named `AXIS`.
`shard`: `jax.jit` over a mesh ("data", "fsdp", "tensor"); the compiler places the collectives.

A step is `step(state, batch, *, axis_name=None) -> (state, metrics)`; a map is `fn(replicated, batch) -> batch-shaped`.
Minibatches are drawn from the *global* batch (`global_rows`), and every mean is a global sum over a global count
(`masked_mean`), so the number of devices changes no result beyond rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlaif_jax.config import check_choices, require
from rlaif_jax.memory import compiler_options
from rlaif_jax.models.base import COLUMN_AND_ROW, Rules
from rlaif_jax.types import Metrics

AXIS = "data"
BATCH = PartitionSpec(("data", "fsdp"))  # a batch is split over both; tensor devices share their rows


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the devices are used.

    Attributes:
        mode: `pmap`: every local device holds the whole state and a share of the batch. `shard`: a mesh of
            data x fsdp x tensor devices; parameters are split over fsdp and tensor.
        data: devices of the mesh that share the batch; 0: those that fsdp and tensor leave.
        fsdp: devices that share the batch and hold a part of the parameters each.
        tensor: devices that share each matrix product.
    """

    mode: Literal["pmap", "shard"] = "pmap"
    data: int = 0
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        check_choices(self, "parallel")
        require(
            self.data >= 0 and self.fsdp >= 1 and self.tensor >= 1,
            f"parallel: data must be >= 0, fsdp and tensor >= 1, not {self.data}, {self.fsdp} and {self.tensor}",
        )
        require(
            self.mode == "shard" or (self.data, self.fsdp, self.tensor) == (0, 1, 1),
            "parallel.data, fsdp and tensor shape a mesh: set parallel.mode='shard' with them",
        )


def psum(x: Any, axis_name: str | None) -> Any:
    """Returns the sum over the devices of `axis_name`, or x itself where it is None."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def masked_mean(x: jax.Array, mask: jax.Array, axis_name: str | None = None) -> jax.Array:
    """Computes the mean [] of x over the entries where `mask` is true, on all devices.

    It is the sum of the devices' sums divided by the sum of their counts, and 0 where no entry counts. `x` has any shape,
    `mask` the same; `axis_name` is the mapped axis of the devices, or None.
    """
    total = psum(jnp.sum(jnp.where(mask, x, 0.0)), axis_name)
    return total / jnp.maximum(psum(jnp.sum(mask.astype(jnp.float32)), axis_name), 1.0)


def masked_whiten(x: jax.Array, mask: jax.Array, axis_name: str | None = None, *, eps: float = 1e-8) -> jax.Array:
    """Returns (x - mean) / sqrt(var + eps) over the valid entries of all devices; masked entries become 0.

    One valid entry gives 0 (its variance is 0), not NaN.

    Args:
        x: any shape.
        mask: of the same shape, true where x is valid.
        axis_name: the mapped axis of the devices, or None.
        eps: added to the variance.
    """
    mean = masked_mean(x, mask, axis_name)
    variance = masked_mean((x - mean) ** 2, mask, axis_name)
    return jnp.where(mask, (x - mean) * jax.lax.rsqrt(variance + eps), 0.0)


def global_rows(batch: Any, rows: jax.Array, axis_name: str | None) -> Any:
    """Returns this device's share of the rows [M] of every array of a batch.

    Under pmap the token arrays, which are small next to the model's activations, are gathered and each device
    takes its slice of the minibatch; under jit the result is marked as split over the mesh's batch axes.

    Args:
        batch: a pytree of arrays [B, ...]; under pmap each device holds its part.
        rows: [M] int, indices into the batch of all devices.
        axis_name: the mapped axis of the devices, or None.
    """
    if axis_name is not None:
        share = rows.shape[0] // jax.lax.axis_size(axis_name)
        rows = jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(axis_name) * share, share)
        return jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True)[rows], batch)
    return over_mesh(jax.tree.map(lambda x: x[rows], batch))


def over_mesh(batch: Any) -> Any:
    """Returns `batch` marked as split over the mesh's batch axes, where the program has a mesh."""
    return jax.lax.with_sharding_constraint(batch, BATCH) if mesh_shares() > 1 else batch


def mesh_shares() -> int:
    """Returns the number of batch shards that the current program sees: data x fsdp on a mesh, else 1.

    pmap runs a program for each device's own share.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    return shape["data"] * shape["fsdp"] if "fsdp" in shape else 1


def pmax(x: Any, axis_name: str | None) -> Any:
    """Returns the maximum over the devices of `axis_name`, or x itself where it is None."""
    return x if axis_name is None else jax.lax.pmax(x, axis_name)


def on_own_rows(fn: Callable[[Any, Any], Any], replicated: Any, batch: Any) -> Any:
    """Returns `fn(replicated, batch)`, computed on each device's own rows and split like the batch.

    Under `jax.jit` over a mesh every group of tensor devices runs `fn` by itself: weights that are split over "fsdp" are
    gathered once, before; loops in `fn` end when this group's rows are done, and no row is sent anywhere. Elsewhere (one
    device, pmap) it is `fn`. Matrices stay split over "tensor".
    """
    if "fsdp" not in jax.sharding.get_abstract_mesh().axis_names:
        return fn(replicated, batch)
    split = jax.shard_map(
        fn, in_specs=(PartitionSpec(), BATCH), out_specs=BATCH, axis_names={"data", "fsdp"}, check_vma=False
    )
    return split(replicated, batch)


S = TypeVar("S")
B = TypeVar("B")
T = TypeVar("T")
R = TypeVar("R")


class Runner(Protocol):
    """Runs pure functions on all devices.

    Attributes:
        devices: number of shards that a batch is split into.
    """

    devices: int

    def step(self, fn: Callable[..., tuple[S, Metrics]]) -> Callable[..., tuple[S, Metrics]]:
        """Compiles `fn(state, *replicated, batch, *, axis_name) -> (state, metrics)`; the state is donated."""

    def map(self, fn: Callable[..., T]) -> Callable[[R, B], T]:
        """Compiles `fn(replicated, batch, *, axis_name)`, whose result is split like the batch."""

    def init(self, fn: Callable[..., S], *args: Any) -> S:
        """Runs `fn(*args)`, compiled, and returns its arrays; a split state is never whole on one device."""

    def template(self, fn: Callable[..., S], *args: Any) -> S:
        """Returns what `init(fn, *args)` would, as arrays without memory: how a checkpoint is to be read."""

    def place(self, state: S) -> S:
        """Puts a state where `step` expects it."""

    def fetch(self, state: S) -> S:
        """Returns a state as a checkpoint keeps it: host arrays, or arrays split over the mesh."""


def _check_divisible(batch: Any, devices: int) -> None:
    rows = jax.tree.leaves(batch)[0].shape[0]
    require(
        rows % devices == 0,
        f"a batch of {rows} rows cannot be split over {devices} devices: "
        f"make the batch size (prompts_per_step, minibatch) a multiple of {devices}",
    )


def _settled(result: T, device: jax.Device) -> T:
    """Returns the result of a program of several devices; on CPUs it waits for it.

    XLA's CPU client holds 32 programs a device. With more under way some devices may wait for a place and the others, in a
    collective, for these devices: the process stops, and XLA aborts it after 40 s.
    """
    return jax.block_until_ready(result) if device.platform == "cpu" else result


class pmap_step:
    """A pure function under `jax.pmap`: replicated state without a device axis, batch [B, ...] split.

    The last argument of the function is the batch, the others are replicated, the first is donated.

    Args:
        fn: `fn(*replicated, batch, *, axis_name)`.
        devices: all local devices by default.
        out: "replicated" for steps (state and metrics are equal on all devices), "split" for maps.
        donate: whether the first argument's buffers may be reused.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        devices: list[jax.Device] | None = None,
        *,
        out: Literal["replicated", "split"] = "replicated",
        donate: bool = True,
    ) -> None:
        self.devices = devices or jax.local_devices()
        self._fn = partial(fn, axis_name=AXIS)
        self._split = out == "split"
        self._donate = (0,) if donate else ()
        self._mapped: dict[int, Callable[..., Any]] = {}  # by the number of arguments

    def __call__(self, *arguments: Any) -> Any:
        *replicated, batch = arguments
        count = len(self.devices)
        _check_divisible(batch, count)
        batch = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)
        if len(arguments) not in self._mapped:
            self._mapped[len(arguments)] = jax.pmap(
                self._fn,
                axis_name=AXIS,
                in_axes=(*[None] * len(replicated), 0),
                out_axes=0 if self._split else None,
                devices=self.devices,
                donate_argnums=self._donate,
            )
        out = _settled(self._mapped[len(arguments)](*replicated, batch), self.devices[0])
        return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), out) if self._split else out


def make_mesh(data: int = 0, fsdp: int = 1, tensor: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with the axes ("data", "fsdp", "tensor").

    Args:
        data: devices of the axis "data"; 0: as many as the other two axes leave.
        fsdp: devices of the axis "fsdp".
        tensor: devices of the axis "tensor".
        devices: the devices, of which the first data * fsdp * tensor are used; None: all.

    Raises:
        UserError: the mesh needs more devices.
    """
    devices = devices or jax.devices()
    data = data or max(len(devices) // (fsdp * tensor), 1)
    require(
        data * fsdp * tensor <= len(devices),
        f"parallel: a mesh {data}x{fsdp}x{tensor} needs {data * fsdp * tensor} devices, there are {len(devices)}",
    )
    shape, used = (data, fsdp, tensor), devices[: data * fsdp * tensor]
    if used[0].platform == "tpu" and len(used) == len(devices):
        # By the torus: the last axis, whose devices exchange most, gets neighbours.
        grid = mesh_utils.create_device_mesh(shape, used, allow_split_physical_axes=True)
    else:
        grid = np.array(used).reshape(shape)
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def state_shardings(state: Any, mesh: Mesh, rules: Rules = COLUMN_AND_ROW) -> Any:
    """Returns the sharding of every array of a state.

    Matrices go by `rules` (optimiser moments like their parameter), everything else is replicated. A dimension that its
    mesh axis does not divide stays whole.
    """

    def one(path: tuple[Any, ...], x: Any) -> NamedSharding:
        above, name = ("", "", *map(_name, path))[-2:]
        spec: list[str | None] = [None] * np.ndim(x)
        if (above, name) in rules and np.ndim(x) >= 2:
            for dim, axis in zip((-2, -1), rules[above, name]):
                spec[dim] = axis if axis and x.shape[dim] % mesh.shape[axis] == 0 else None
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(one, state)


def _name(key: Any) -> str:
    """Returns the name of a path's entry: the key of a dict, the field of a dataclass; "" for a position."""
    if isinstance(key, jax.tree_util.DictKey):
        return str(key.key)
    return key.name if isinstance(key, jax.tree_util.GetAttrKey) else ""


def _jit(fn: Callable[..., Any], donate_argnums: Any = ()) -> Any:
    return jax.jit(fn, donate_argnums=donate_argnums, compiler_options=compiler_options(jax.default_backend()))


class shard_step:
    """A pure function under `jax.jit` on a mesh: state by `state_shardings`, batch split over data x fsdp.

    Args:
        fn: `fn(*replicated, batch, *, axis_name)`; the last argument is the batch, the first is donated.
        mesh: the mesh.
        rules: how matrices are split.
        out: "replicated" for steps, whose result is (state, metrics); "split" for maps.
        donate: whether the first argument's buffers may be reused.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        mesh: Mesh,
        rules: Rules = COLUMN_AND_ROW,
        *,
        out: Literal["replicated", "split"] = "replicated",
        donate: bool = True,
    ) -> None:
        self.mesh = mesh
        self._rows = NamedSharding(mesh, BATCH)

        def run(*arguments: Any) -> Any:
            result = fn(*arguments, axis_name=None)
            if out == "split":
                return jax.lax.with_sharding_constraint(result, self._rows)
            new_state, metrics = result
            return jax.lax.with_sharding_constraint(new_state, state_shardings(new_state, mesh, rules)), metrics

        self._jitted = _jit(run, donate_argnums=(0,) if donate else ())

    def __call__(self, *arguments: Any) -> Any:
        *replicated, batch = arguments
        _check_divisible(batch, self.mesh.shape["data"] * self.mesh.shape["fsdp"])
        with jax.set_mesh(self.mesh):
            result = self._jitted(*replicated, jax.device_put(batch, self._rows))
        return _settled(result, self.mesh.devices.flat[0])


def _host_template(fn: Callable[..., S], *args: Any) -> S:
    """Returns arrays of the shapes of `fn(*args)`, each one number seen many times."""
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), jax.eval_shape(fn, *args))


class JitRunner:
    """`Runner` on one device: plain `jax.jit`."""

    devices = 1

    def step(self, fn: Callable[..., tuple[S, Metrics]]) -> Callable[..., tuple[S, Metrics]]:
        """Compiles a step; see `Runner`."""
        return _jit(partial(fn, axis_name=None), donate_argnums=0)

    def map(self, fn: Callable[..., T]) -> Callable[[R, B], T]:
        """Compiles `fn(replicated, batch, *, axis_name)` for one device, with axis_name=None."""
        return _jit(partial(fn, axis_name=None))

    def init(self, fn: Callable[..., S], *args: Any) -> S:
        """Runs `fn(*args)`, compiled."""
        return jax.jit(fn)(*args)

    def template(self, fn: Callable[..., S], *args: Any) -> S:
        """Returns host arrays without memory of the shapes of `fn(*args)`."""
        return _host_template(fn, *args)

    def place(self, state: S) -> S:
        """Puts a state on the device."""
        return jax.device_put(state)

    def fetch(self, state: S) -> S:
        """Returns the state with its arrays on the host."""
        return jax.device_get(state)


class PmapRunner:
    """`Runner` over all local devices by pmap."""

    def __init__(self, devices: list[jax.Device] | None = None) -> None:
        self._devices = devices or jax.local_devices()
        self.devices = len(self._devices)
        # What is on one device only would be sent to the others with every call.
        self._everywhere = NamedSharding(Mesh(np.array(self._devices), (AXIS,)), PartitionSpec())

    def step(self, fn: Callable[..., tuple[S, Metrics]]) -> Callable[..., tuple[S, Metrics]]:
        """Compiles a step; see `Runner`."""
        return pmap_step(fn, self._devices)

    def map(self, fn: Callable[..., T]) -> Callable[[R, B], T]:
        """Compiles `fn(replicated, batch, *, axis_name)` with pmap; its result is split like the batch."""
        return pmap_step(fn, self._devices, out="split", donate=False)

    def init(self, fn: Callable[..., S], *args: Any) -> S:
        """Runs `fn(*args)`, compiled, and returns the state on every device."""
        return self.place(jax.jit(fn)(*args))

    def template(self, fn: Callable[..., S], *args: Any) -> S:
        """Returns host arrays without memory of the shapes of `fn(*args)`."""
        return _host_template(fn, *args)

    def place(self, state: S) -> S:
        """Puts a copy of the state on every device."""
        return jax.device_put(state, self._everywhere)

    def fetch(self, state: S) -> S:
        """Returns the state with its arrays on the host."""
        return jax.device_get(state)


class ShardRunner:
    """`Runner` on a mesh; `rules` say how matrices are split."""

    def __init__(self, mesh: Mesh, rules: Rules = COLUMN_AND_ROW) -> None:
        self.mesh, self.rules = mesh, rules
        self.devices = mesh.shape["data"] * mesh.shape["fsdp"]

    def step(self, fn: Callable[..., tuple[S, Metrics]]) -> Callable[..., tuple[S, Metrics]]:
        """Compiles a step; see `Runner`."""
        return shard_step(fn, self.mesh, self.rules)

    def map(self, fn: Callable[..., T]) -> Callable[[R, B], T]:
        """Compiles `fn(replicated, batch, *, axis_name)` over the mesh; its result is split like the batch."""
        return shard_step(fn, self.mesh, self.rules, out="split", donate=False)

    def init(self, fn: Callable[..., S], *args: Any) -> S:
        """Runs `fn(*args)`, which makes a state, and returns the state split over the mesh by `rules`."""
        with jax.set_mesh(self.mesh):
            split = state_shardings(jax.eval_shape(fn, *args), self.mesh, self.rules)
            return jax.jit(fn, out_shardings=split)(*args)

    def template(self, fn: Callable[..., S], *args: Any) -> S:
        """Returns the shapes of `fn(*args)` with the places of their parts on the mesh."""
        with jax.set_mesh(self.mesh):
            shapes = jax.eval_shape(fn, *args)
        split = state_shardings(shapes, self.mesh, self.rules)
        return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, split)

    def place(self, state: S) -> S:
        """Splits a state over the mesh."""
        return jax.device_put(state, state_shardings(state, self.mesh, self.rules))

    def fetch(self, state: S) -> S:
        """Returns the arrays as they are split."""
        return state


def make_runner(config: ParallelConfig, rules: Rules = COLUMN_AND_ROW) -> Runner:
    """Returns the runner that a config asks for; a single device gets plain `jax.jit`.

    `rules` say how parameters are split over a mesh: see `LanguageModel.rules`.
    """
    if config.mode == "pmap":
        return PmapRunner() if jax.local_device_count() > 1 else JitRunner()
    return ShardRunner(make_mesh(config.data, config.fsdp, config.tensor), rules)
