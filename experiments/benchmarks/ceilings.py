"""Measures what this machine can do: the ceilings of a roofline.

    python -m experiments.benchmarks.ceilings --dtype bfloat16

A large matrix product gives FLOP/s. A large matrix times a vector gives the bytes that are read per second.
An elementwise pass over the same matrix gives the bytes that a copy reads and writes per second. Decoding
reads weights and caches and writes little, so the read is its bound; on a CPU the copy, which also allocates
the pages of its result, is several times slower.

Each number is the median of five calls after one untimed call on one device. Other accelerators are assumed
to be equal, and CPU devices to share one CPU. Data that fits in a cache is read faster than this, so a small
model may exceed its bound.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Ceilings(NamedTuple):
    """What a machine can do.

    Attributes:
        flops: FLOP/s of a large matrix product; a multiply-add counts as 2.
        read: bytes per second of a read.
        copy: bytes per second of a copy, each byte counted twice.
    """

    flops: float
    read: float
    copy: float

    def __str__(self) -> str:
        return f"{self.flops / 1e9:.0f} GFLOP/s, read {self.read / 1e9:.1f} GB/s, copy {self.copy / 1e9:.1f} GB/s"


def seconds(function: Callable[..., jax.Array], *arrays: jax.Array) -> float:
    """Returns the median time of the compiled `function` in seconds."""
    compiled: Any = jax.jit(function)
    jax.block_until_ready(compiled(*arrays))
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def measure(dtype: str, *, side: int | None = None, size: int | None = None) -> Ceilings:
    """Returns the ceilings in `dtype`.

    Args:
        dtype: "float32" or "bfloat16".
        side: rows and columns of the matrices that are multiplied; default 2048 on a CPU, 8192 on an accelerator.
        size: bytes that are read and copied; default 256 MiB on a CPU, 2 GiB on an accelerator.
    """
    cpu = jax.default_backend() == "cpu"
    side = side or (2048 if cpu else 8192)
    size = size or (2**28 if cpu else 2**31)
    square = jnp.ones((side, side), dtype)
    large = jnp.ones((size // square.itemsize // 4096, 4096), dtype)
    devices = 1 if cpu else jax.device_count()
    return Ceilings(
        flops=devices * 2 * side**3 / seconds(jnp.matmul, square, square),
        read=devices * large.nbytes / seconds(jnp.matmul, large, large[0]),
        copy=devices * 2 * large.nbytes / seconds(lambda x: x + 1, large),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args(arguments)
    print(f"{jax.devices()[0].device_kind}, {options.dtype}: {measure(options.dtype)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
