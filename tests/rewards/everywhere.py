"""The same function of batched arrays, run in every way the package promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rlaif_jax.parallel import make_mesh

DEVICES = 8


def same_everywhere(fn: Callable[..., Any], *arrays: Any, rtol: float = 1e-6, atol: float = 1e-6) -> Any:
    """Check `fn` of arrays [8, ...], which treats every row alike, under jit, vmap, pmap, sharded over 8 devices, and
    with bfloat16 input (against float32 input rounded to bfloat16); its plain result."""
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


def close(result: Any, expected: Any, way: str, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    leaves = jax.tree.leaves(result), jax.tree.leaves(expected)
    for a, b in zip(*leaves, strict=True):
        assert a.dtype == b.dtype, way
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=way)
