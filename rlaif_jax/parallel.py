"""Many devices: a pure step is written once and run by one of two thin wrappers.

`pmap`: the state on every device, the batch split over them, collectives named `AXIS`.
`shard`: `jax.jit` over a mesh ("data", "fsdp", "tensor"); the compiler places the collectives.

A step is `step(state, batch, *, axis_name=None) -> (state, metrics)`; a map is `fn(replicated, batch) -> batch-shaped`.
Minibatches are drawn from the *global* batch (`global_rows`), and every mean is a global sum over a global count
(`masked_mean`), so the number of devices changes no result beyond rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlaif_jax.config import check_choices, require

AXIS = "data"
BATCH = PartitionSpec(("data", "fsdp"))  # a batch is split over both; tensor devices share their rows

# The last two names of a parameter's path and the axes of its last two dimensions: Megatron's column/row split.
_RULES = {
    ("embed", "embedding"): ("tensor", "fsdp"),
    ("lm_head", "kernel"): ("fsdp", "tensor"),
    **{(name, "kernel"): ("fsdp", "tensor") for name in ("q", "k", "v", "gate", "up")},
    **{(name, "kernel"): ("tensor", "fsdp") for name in ("o", "down")},
}


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the devices are used.

    `pmap`: every device holds the whole state and a share of the batch (all local devices).
    `shard`: a mesh of data x fsdp x tensor devices; parameters are split over fsdp and tensor. `data=0` takes what
    fsdp and tensor leave.
    """

    mode: Literal["pmap", "shard"] = "pmap"
    data: int = 0
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        check_choices(self, "parallel")
        require(
            self.data >= 0 and self.fsdp >= 1 and self.tensor >= 1, "parallel: data must be >= 0, fsdp and tensor >= 1"
        )
        require(
            self.mode == "shard" or (self.data, self.fsdp, self.tensor) == (0, 1, 1),
            "parallel.data, fsdp and tensor shape a mesh: set parallel.mode='shard' with them",
        )


def psum(x: Any, axis_name: str | None) -> Any:
    """Sum over the devices of `axis_name`; the value itself without one."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def masked_mean(x: jax.Array, mask: jax.Array, axis_name: str | None = None) -> jax.Array:
    """The mean of x where mask, over all devices: the sum of sums over the sum of counts; 0 where nothing is."""
    total = psum(jnp.sum(jnp.where(mask, x, 0.0)), axis_name)
    return total / jnp.maximum(psum(jnp.sum(mask.astype(jnp.float32)), axis_name), 1.0)


def masked_whiten(
    x: jax.Array, mask: jax.Array, axis_name: str | None = None, *, shift_mean: bool = True, eps: float = 1e-8
) -> jax.Array:
    """(x - mean) / sqrt(var + eps) over the masked entries of all devices; with shift_mean=False the mean is added back.

    Masked entries become 0. One valid entry gives 0 (its variance is 0), not NaN.
    """
    mean = masked_mean(x, mask, axis_name)
    variance = masked_mean((x - mean) ** 2, mask, axis_name)
    white = (x - mean) * jax.lax.rsqrt(variance + eps)
    return jnp.where(mask, white if shift_mean else white + mean, 0.0)


def global_rows(batch: Any, rows: jax.Array, axis_name: str | None) -> Any:
    """Rows [M] (indices into the global batch) of every array of `batch`, this device's share of them.

    Under pmap the token arrays, which are small next to the model's activations, are gathered and each device takes
    its slice of the minibatch; under jit the result is marked as split over the mesh's batch axes.
    """
    if axis_name is not None:
        share = rows.shape[0] // jax.lax.axis_size(axis_name)
        rows = jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(axis_name) * share, share)
        return jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True)[rows], batch)
    return over_mesh(jax.tree.map(lambda x: x[rows], batch))


def over_mesh(batch: Any) -> Any:
    """`batch` marked as split over the mesh's batch axes, where there is a mesh."""
    return jax.lax.with_sharding_constraint(batch, BATCH) if mesh_shares() > 1 else batch


def mesh_shares() -> int:
    """Into how many shares a batch is split within this very program: under `jax.jit` over a mesh data x fsdp, else 1
    (pmap runs a program for each device's own share)."""
    shape = jax.sharding.get_abstract_mesh().shape
    return shape["data"] * shape["fsdp"] if "fsdp" in shape else 1


def pmax(x: Any, axis_name: str | None) -> Any:
    """Maximum over the devices of `axis_name`; the value itself without one."""
    return x if axis_name is None else jax.lax.pmax(x, axis_name)


def on_own_rows(fn: Callable[[Any, Any], Any], replicated: Any, batch: Any) -> Any:
    """`fn(replicated, batch)`, whose result is split like the batch, on each device's own rows.

    Under `jax.jit` over a mesh every group of tensor devices runs `fn` by itself: what is split over "fsdp" is gathered
    once, before; loops in `fn` end when this group's rows are done, and no row is sent anywhere. Elsewhere (one device,
    pmap) it is `fn`. Matrices stay split over "tensor".
    """
    if "fsdp" not in jax.sharding.get_abstract_mesh().axis_names:
        return fn(replicated, batch)
    split = jax.shard_map(
        fn, in_specs=(PartitionSpec(), BATCH), out_specs=BATCH, axis_names={"data", "fsdp"}, check_vma=False
    )
    return split(replicated, batch)


class Runner(Protocol):
    """Runs pure functions on all devices. `devices` is the number of shares a batch is split into."""

    devices: int

    def step(self, fn: Callable[..., tuple[Any, Any]]) -> Callable[[Any, Any], tuple[Any, Any]]:
        """Compile `fn(state, batch, *, axis_name)`; the state is donated."""

    def map(self, fn: Callable[..., Any]) -> Callable[[Any, Any], Any]:
        """Compile `fn(replicated, batch, *, axis_name)`, whose result is split like the batch."""

    def place(self, state: Any) -> Any:
        """Put a state where `step` wants it."""

    def fetch(self, state: Any) -> Any:
        """A state as a checkpoint keeps it: host arrays, or arrays split over the mesh."""


def _divisible(batch: Any, devices: int) -> None:
    rows = jax.tree.leaves(batch)[0].shape[0]
    require(
        rows % devices == 0,
        f"a batch of {rows} rows cannot be split over {devices} devices: "
        f"make the batch size (prompts_per_step, minibatch) a multiple of {devices}",
    )


class pmap_step:
    """`fn(state, batch, *, axis_name)` under `jax.pmap`: state replicated without a device axis, batch [B, ...] split.

    out: "replicated" for steps (state and metrics are the same on every device), "split" for maps.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        devices: list[jax.Device] | None = None,
        *,
        out: str = "replicated",
        donate: bool = True,
    ) -> None:
        self.devices = devices or jax.local_devices()
        self._mapped = jax.pmap(
            partial(fn, axis_name=AXIS),
            axis_name=AXIS,
            in_axes=(None, 0),
            out_axes=None if out == "replicated" else 0,
            devices=self.devices,
            donate_argnums=(0,) if donate else (),
        )
        self._split = out != "replicated"

    def __call__(self, state: Any, batch: Any) -> Any:
        count = len(self.devices)
        _divisible(batch, count)
        batch = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)
        out = self._mapped(state, batch)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out) if self._split else out


def make_mesh(data: int = 0, fsdp: int = 1, tensor: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh ("data", "fsdp", "tensor") over `devices` (default: all); data=0 takes what the others leave."""
    devices = devices or jax.devices()
    data = data or len(devices) // (fsdp * tensor)
    require(
        data * fsdp * tensor <= len(devices) and data >= 1,
        f"parallel: a mesh {data}x{fsdp}x{tensor} needs {data * fsdp * tensor} devices, there are {len(devices)}",
    )
    grid = np.array(devices[: data * fsdp * tensor]).reshape(data, fsdp, tensor)
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """The sharding of every array of a state: matrices by `_RULES` (optimiser moments like their parameter), all else
    replicated. A dimension that its mesh axis does not divide stays whole."""

    def one(path: tuple[Any, ...], x: Any) -> NamedSharding:
        names = tuple(str(getattr(p, "key", getattr(p, "name", ""))) for p in path[-2:])
        spec: list[str | None] = [None] * np.ndim(x)
        if names in _RULES and np.ndim(x) >= 2:
            for dim, axis in zip((-2, -1), _RULES[names]):
                spec[dim] = axis if x.shape[dim] % mesh.shape[axis] == 0 else None
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(one, state)


class shard_step:
    """`fn(state, batch, *, axis_name=None)` under `jax.jit` on a mesh: state by `state_shardings`, batch over data x fsdp."""

    def __init__(self, fn: Callable[..., Any], mesh: Mesh, *, out: str = "replicated", donate: bool = True) -> None:
        self.mesh, self._split = mesh, out != "replicated"
        self._rows = NamedSharding(mesh, BATCH)

        def run(state: Any, batch: Any) -> Any:
            result = fn(state, batch, axis_name=None)
            if self._split:
                return jax.lax.with_sharding_constraint(result, self._rows)
            new_state, metrics = result
            return jax.lax.with_sharding_constraint(new_state, state_shardings(new_state, mesh)), metrics

        self._jitted = jax.jit(run, donate_argnums=(0,) if donate else ())

    def __call__(self, state: Any, batch: Any) -> Any:
        _divisible(batch, self.mesh.shape["data"] * self.mesh.shape["fsdp"])
        with jax.set_mesh(self.mesh):
            return self._jitted(state, jax.device_put(batch, self._rows))


class JitRunner:
    """`Runner` on one device: plain `jax.jit`, nothing to map over."""

    devices = 1

    def step(self, fn: Callable[..., Any]) -> Callable[[Any, Any], Any]:
        return jax.jit(partial(fn, axis_name=None), donate_argnums=0)

    def map(self, fn: Callable[..., Any]) -> Callable[[Any, Any], Any]:
        return jax.jit(partial(fn, axis_name=None))

    def place(self, state: Any) -> Any:
        return jax.device_put(state)

    def fetch(self, state: Any) -> Any:
        return jax.device_get(state)


class PmapRunner:
    """`Runner` over all local devices by pmap."""

    def __init__(self, devices: list[jax.Device] | None = None) -> None:
        self._devices = devices or jax.local_devices()
        self.devices = len(self._devices)

    def step(self, fn: Callable[..., Any]) -> Callable[[Any, Any], Any]:
        return pmap_step(fn, self._devices)

    def map(self, fn: Callable[..., Any]) -> Callable[[Any, Any], Any]:
        return pmap_step(fn, self._devices, out="split", donate=False)

    def place(self, state: Any) -> Any:
        return state

    def fetch(self, state: Any) -> Any:
        return jax.device_get(state)


class ShardRunner:
    """`Runner` on a mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.devices = mesh.shape["data"] * mesh.shape["fsdp"]

    def step(self, fn: Callable[..., Any]) -> Callable[[Any, Any], Any]:
        return shard_step(fn, self.mesh)

    def map(self, fn: Callable[..., Any]) -> Callable[[Any, Any], Any]:
        return shard_step(fn, self.mesh, out="split", donate=False)

    def place(self, state: Any) -> Any:
        return jax.device_put(state, state_shardings(state, self.mesh))

    def fetch(self, state: Any) -> Any:
        return state


def make_runner(config: ParallelConfig) -> Runner:
    """The runner a config asks for; with a single device there is nothing to map over."""
    if config.mode == "pmap":
        return PmapRunner() if jax.local_device_count() > 1 else JitRunner()
    return ShardRunner(make_mesh(config.data, config.fsdp, config.tensor))


class CompilationClock:
    """Seconds that XLA compiled, and how many programs, since it was made: after the first steps both must stand still."""

    def __init__(self) -> None:
        self.seconds, self.programs = 0.0, 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.endswith("backend_compile_duration"):
            self.seconds, self.programs = self.seconds + duration_secs, self.programs + 1
