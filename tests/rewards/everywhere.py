"""The same function of batched arrays, run in every way the package promises."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rlaif_jax.parallel import make_mesh

DEVICES = 8


def same_everywhere(fn: Callable[..., Any], *arrays: Any, rtol: float = 1e-6, atol: float = 1e-6) -> Any:
    """Checks `fn` of arrays [8, ...], which treats every row alike, under every transform; returns its plain result.

    The transforms are jit, vmap, pmap, arrays sharded over 8 devices, and bfloat16 input (against float32 input rounded
    to bfloat16).
    """
    arrays = tuple(jnp.asarray(a) for a in arrays)
    assert all(len(a) == DEVICES for a in arrays)
    plain = fn(*arrays)
    rows = [a[:, None] for a in arrays]
    sharding = NamedSharding(make_mesh(), PartitionSpec("data"))
    ways = {
        "jit": jax.jit(fn)(*arrays),
        "vmap": jax.tree.map(lambda x: x[:, 0], jax.jit(jax.vmap(fn))(*rows)),
        "pmap": jax.tree.map(lambda x: x[:, 0], jax.pmap(fn)(*rows)),
        "sharded": jax.jit(fn)(*(jax.device_put(a, sharding) for a in arrays)),
    }
    for way, result in ways.items():
        close(result, plain, way, rtol, atol)
    low = tuple(a.astype(jnp.bfloat16) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in arrays)
    rounded = tuple(a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in low)
    close(jax.jit(fn)(*low), jax.jit(fn)(*rounded), "bfloat16", rtol, atol)
    return plain


def fit_agrees_everywhere(fit: Callable[..., Any], problems: list[tuple[Any, ...]], rtol: float, atol: float) -> None:
    """Checks that `fit(*problem, axis_name=None)` finds the same on one device, sharded, by pmap and by vmap.

    Args:
        fit: takes flat arrays [N, ...], which each device may hold a share of.
        problems: two sets of its arrays; N is a multiple of 8.
        rtol: relative tolerance.
        atol: absolute tolerance.
    """
    alone = jax.jit(fit)(*problems[0])
    sharding = NamedSharding(make_mesh(), PartitionSpec("data"))
    sharded = jax.jit(fit)(*(jax.device_put(x, sharding) for x in problems[0]))
    parts = [x.reshape(DEVICES, -1) for x in problems[0]]
    pmapped = jax.pmap(partial(fit, axis_name="d"), axis_name="d", out_axes=None)(*parts)
    batched = jax.jit(jax.vmap(fit))(*(np.stack(x) for x in zip(*problems)))
    first = jax.tree.map(lambda x: x[0], batched)
    for a, *others in zip(*(jax.tree.leaves(x) for x in (alone, sharded, pmapped, first))):
        for b in others:
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
    assert any((x[0] != x[1]).any() for x in jax.tree.leaves(batched)), "each problem of a batch is its own"


def close(result: Any, expected: Any, way: str, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    leaves = jax.tree.leaves(result), jax.tree.leaves(expected)
    for a, b in zip(*leaves, strict=True):
        assert a.dtype == b.dtype, way
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=way)
