"""Newton's method and L-BFGS for small smooth problems inside a compiled program.

Pure jnp, deterministic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

ValueAndGrad = Callable[[Any], tuple[jax.Array, Any]]
Damping = Callable[[jax.Array, jax.Array], jax.Array]
"""(x, full step) -> the step to take."""
_Search = tuple[jax.Array, jax.Array, jax.Array, Any]  # x [D], steps [], size of the last one [], curvature


def newton_step(curvature: jax.Array, gradient: jax.Array) -> jax.Array:
    """Computes the full Newton step [D], which is -curvature^-1 gradient.

    Args:
        curvature: [D, D], positive definite.
        gradient: [D].
    """
    return -jax.scipy.linalg.solve(curvature, gradient, assume_a="pos")


def newton(
    gradient: Callable[[jax.Array], jax.Array],
    curvature: Callable[[jax.Array], Any],
    start: jax.Array,
    *,
    damping: Damping,
    solve: Callable[[Any, jax.Array], jax.Array] = newton_step,
    max_steps: int = 100,
    tolerance: float = 1e-5,
) -> tuple[jax.Array, Any]:
    """Minimises a convex function of [D] numbers by Newton's method.

    The search is not meant to be differentiated. One more `solve` from its end, with the curvature held, has the
    derivative of the optimum (implicit function theorem).

    Args:
        gradient: x [D] -> gradient [D]. It may hold collectives.
        curvature: x [D] -> what `solve` reads: a positive definite matrix [D, D], the second derivative or an
            approximation. Likewise.
        start: [D], float.
        damping: shortens the full step; `halved` or `capped`.
        solve: (curvature, gradient) -> the full step [D].
        max_steps: most steps to take.
        tolerance: stops when no entry of the full step is larger than this times (1 + the largest entry of x).

    Returns:
        (x [D], the curvature at the last step).
    """

    def iterate(state: _Search) -> _Search:
        x, count, _, _ = state
        matrix = curvature(x)
        full = solve(matrix, gradient(x))
        return x + damping(x, full), count + 1, jnp.max(jnp.abs(full)), matrix

    def unfinished(state: _Search) -> jax.Array:
        x, count, size, _ = state
        return (size > tolerance * (1 + jnp.max(jnp.abs(x)))) & (count < max_steps)

    unknown = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(curvature, start))
    first: _Search = (start, jnp.int32(0), jnp.asarray(jnp.inf, start.dtype), unknown)
    x, _, _, matrix = jax.lax.while_loop(unfinished, iterate, first)
    return x, matrix


def halved(objective: Callable[[jax.Array], jax.Array]) -> Damping:
    """Returns a damping that takes the first of 1, 1/2, 1/4 ... 1/2048 of a step that lowers `objective`.

    A rise of less than 1e-6 of the value counts as lower, because float32 does not resolve it. If no part of the
    step lowers the objective, the damped step is 0.

    Args:
        objective: x [D] -> value [], the function that is minimised.

    Returns:
        A function (x [D], full step [D]) -> the step to take [D], for `newton`.
    """
    lengths = 0.5 ** jnp.arange(12.0)

    def damping(x: jax.Array, full: jax.Array) -> jax.Array:
        now = objective(x)
        then = jax.lax.map(lambda length: objective(x + length * full), lengths)
        lower = then <= now + 1e-6 * jnp.abs(now)  # float32 resolves no smaller difference
        return jnp.where(lower.any(), lengths[jnp.argmax(lower)], 0.0) * full

    return damping


def capped(x: jax.Array, full: jax.Array) -> jax.Array:
    """Scales a step down so that no entry is above 1 in absolute value; is a `Damping` for `newton`.

    The quadratic model of Newton's method holds nearby only.

    Args:
        x: [D], the present point; not used.
        full: [D], the full Newton step.

    Returns:
        [D]; `full` itself if no entry is above 1.
    """
    return full / jnp.maximum(1.0, jnp.abs(full).max())


def lbfgs(
    objective: ValueAndGrad, start: Any, scale: Any, *, max_steps: int = 200, tol: float = 1e-4
) -> tuple[Any, jax.Array, jax.Array]:
    """Minimises a smooth function of a pytree of parameters by L-BFGS with backtracking.

    It stops when no derivative is above `tol`, when 5 steps in a row lower the value by less than its rounding, or when
    no step lowers it.

    Args:
        objective: parameters -> (value [], gradient). Nothing differentiates it, so that it may hold collectives.
        start: first parameters.
        scale: like `start`, the typical change of each parameter, about 1 / sqrt(curvature).
        max_steps: most steps to take.
        tol: largest derivative with respect to parameter / scale at which the search ends.

    Returns:
        (parameters, number of steps [] int32, largest derivative [] with respect to parameter / scale at the end).
    """
    memory = optax.scale_by_lbfgs(memory_size=20)
    origin, unravel = ravel_pytree(start)  # one vector of all parameters: small programs compile faster
    ruler = ravel_pytree(scale)[0]

    def evaluate(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, gradient = objective(unravel(origin + ruler * x))
        return value, ruler * ravel_pytree(gradient)[0]

    def downhill(x: jax.Array, gradient: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        step, new = memory.update(gradient, state, x)
        fine = jnp.vdot(step, gradient) > 0  # not so after negative curvature: forget, and go down the gradient
        return -jnp.where(fine, step, gradient), select(fine, new, memory.init(x))

    def select(condition: jax.Array, a: Any, b: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(condition, a, b), a, b)

    def unfinished(carry: Any) -> jax.Array:
        _, _, gradient, _, _, length, steps, idle = carry
        return (steps < max_steps) & (jnp.max(jnp.abs(gradient)) > tol) & (idle < 5) & (length > 1e-6)

    def try_step(carry: Any) -> Any:
        x, value, gradient, direction, state, length, steps, idle = carry
        there = x + length * direction
        new_value, new_gradient = evaluate(there)
        rounding = jnp.finfo(value.dtype).eps * jnp.abs(value)
        lower = new_value <= value + 1e-4 * length * jnp.vdot(gradient, direction) + rounding  # false for NaN
        new_direction, new_state = downhill(there, new_gradient, state)
        idle = jnp.where(new_value < value - rounding, 0, idle + 1)
        after = (there, new_value, new_gradient, new_direction, new_state, jnp.ones_like(length), steps + 1, idle)
        return select(lower, after, (x, value, gradient, direction, state, length / 3, steps, carry[-1]))

    x = jnp.zeros_like(origin)
    value, gradient = evaluate(x)
    direction, state = downhill(x, gradient, memory.init(x))
    carry = (x, value, gradient, direction, state, jnp.ones_like(value), jnp.int32(0), jnp.int32(0))
    x, _, gradient, _, _, _, steps, _ = jax.lax.while_loop(unfinished, try_step, carry)
    return unravel(origin + ruler * x), steps, jnp.max(jnp.abs(gradient))
