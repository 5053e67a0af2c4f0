"""Vectors of judged values on the host: shape checks, missing values, division and sums by group.

NaN means "not judged": such a value is left out and never counted as a loss. `groups` names the prompt of every value,
because answers to one prompt are not independent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def vector(values: ArrayLike, name: str) -> Floats:
    """Returns `values` as float64 [n]. Raises ValueError, with `name`, for any other shape."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} should have shape [n], got {list(array.shape)}")
    return array


def vector_pair(a: ArrayLike, b: ArrayLike, name_a: str, name_b: str) -> tuple[Floats, Floats]:
    """Returns `a` and `b` as float64 arrays [n].

    `name_a` and `name_b` are their names in messages. Raises ValueError if a shape is not [n] or the lengths
    differ.
    """
    first, second = vector(a, name_a), vector(b, name_b)
    if first.shape != second.shape:
        raise ValueError(f"{name_a} and {name_b} should be of one length, got {len(first)} and {len(second)}")
    return first, second


def judged_values(values: Floats) -> Floats:
    """Returns the values that are not NaN. Raises ValueError if all are NaN."""
    kept = values[~np.isnan(values)]
    if not len(kept):
        raise ValueError(f"nothing to average: none of {len(values)} values is judged")
    return kept


def group_index(groups: ArrayLike | None, values: Floats) -> tuple[NDArray[np.int64], int]:
    """Returns the group number of every value [n], and the number of groups.

    Groups that are all NaN are not counted.

    Args:
        groups: [n], the name of each value's group; None: each value is a group.
        values: [n], NaN where not judged; the group number of such a value is 0.

    Raises:
        ValueError: `groups` is not of shape [n].
    """
    names: NDArray[Any] = np.arange(len(values)) if groups is None else np.asarray(groups)
    if names.shape != values.shape:
        raise ValueError(f"groups should have shape [{len(values)}], got {list(names.shape)}")
    kept = ~np.isnan(values)
    member = np.zeros(len(values), np.int64)
    unique, member[kept] = np.unique(names[kept], return_inverse=True)
    return member, len(unique)


def sum_by_group(columns: ArrayLike, member: ArrayLike, count: int) -> Floats:
    """Returns the sums [count, ...] float64 of rows [n, ...] within each group.

    Args:
        columns: [n, ...], the rows.
        member: [n], the group number of each row, from 0.
        count: the number of groups; a group without rows has the sum 0.
    """
    rows = np.asarray(columns, np.float64)
    total = np.zeros((count, *rows.shape[1:]))
    np.add.at(total, np.asarray(member, np.int64), rows)
    return total


def array_module(x: Any) -> tuple[Any, Any]:
    """Returns the array module of x, and x as floats.

    A JAX array becomes float32 on its device; all else becomes float64 on the host.
    """
    if type(x).__module__.startswith("jax"):  # the type's name, because a report must not import JAX
        import jax.numpy as jnp

        return jnp, jnp.asarray(x, jnp.float32)
    return np, np.asarray(x, np.float64)


def divide(a: Any, b: Any) -> Any:
    """Returns a / b, NaN where b is 0; shapes broadcast; NumPy or JAX arrays."""
    (_, top), (xp, bottom) = array_module(a), array_module(b)
    return xp.where(bottom == 0, np.nan, top / xp.where(bottom == 0, 1.0, bottom))
