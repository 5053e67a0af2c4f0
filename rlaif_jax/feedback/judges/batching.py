"""Batches of one shape: a compiled function applied to any number of rows."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import TypeVar

import jax
import numpy as np

from rlaif_jax.config import require
from rlaif_jax.parallel import Runner
from rlaif_jax.progress.count import Count, count_nothing

B = TypeVar("B")
T = TypeVar("T")

AHEAD = 4  # batches that are dispatched before the oldest one is waited for


def check_batch_size(name: str, size: int, runner: Runner) -> None:
    """Raises UserError unless a batch of `size` rows can be split over the devices of `runner`.

    `name` is the owner of the setting `batch_size`, for the message.
    """
    require(
        size >= 1 and size % runner.devices == 0,
        f"{name}.batch_size ({size}) must be a multiple of the {runner.devices} devices",
    )


def in_batches(fn: Callable[[B], T], rows: B, size: int, progress: Count = count_nothing) -> T:
    """Applies a compiled function to N rows, `size` rows at a time, so that it is compiled for one shape.

    The last batch is filled up with copies of the first row, and the results of the copies are dropped. Some
    batches are always dispatched ahead of the one that is waited for, so the devices never wait for the host.

    Args:
        fn: a function of a batch, a pytree of arrays [size, ...]; it returns a pytree of arrays [size, ...]
            in which a row depends on the same row of the batch alone.
        rows: a pytree of host arrays [N, ...]. Where N is 0, `fn` is called with one batch of zeros for its
            shapes.
        size: the number of rows of a batch, a multiple of the number of devices.
        progress: called after each batch with (rows that are done, N).

    Returns:
        The results of `fn` as a pytree of host arrays [N, ...].
    """
    count = len(jax.tree.leaves(rows)[0])
    filling = size if count == 0 else -count % size

    def filled(x: np.ndarray) -> np.ndarray:
        first = x[:1] if count else np.zeros((1, *x.shape[1:]), x.dtype)
        return np.concatenate([x, np.repeat(first, filling, axis=0)])

    rows = jax.tree.map(filled, rows)
    batches = [slice(start, start + size) for start in range(0, count + filling, size)]
    results: list[T] = []
    for at in range(len(batches) + AHEAD):
        if at < len(batches):
            results.append(fn(jax.tree.map(itemgetter(batches[at]), rows)))
        if at >= AHEAD:
            jax.block_until_ready(results[at - AHEAD])
            progress(min(batches[at - AHEAD].stop, count), count)
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *jax.device_get(results))
