"""Newton and L-BFGS against SciPy, and where a full Newton step would overshoot."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

from rlaif_jax.rewards.optimise import capped, halved, lbfgs, newton

X = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
Y = (X[:, 0] > 0.2).astype(np.float32)  # separated, so that only the penalty keeps the optimum finite
RIDGE = 0.01


def loss(c):
    margin = X @ c
    return (jnp.logaddexp(0.0, margin) - Y * margin).sum() + RIDGE / 2 * (c**2).sum()


def optimum():
    def loss(c):
        margin = X.astype(float) @ c
        return (np.logaddexp(0, margin) - Y * margin).sum() + RIDGE / 2 * (c**2).sum()

    return minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-8}).x


def test_newton_finds_the_optimum_with_either_damping():
    gradient, curvature = jax.grad(loss), jax.hessian(loss)
    for damping in (capped, halved(loss)):
        search = jax.jit(lambda start, damping=damping: newton(gradient, curvature, start, damping=damping))
        x, matrix = search(jnp.zeros(3))
        np.testing.assert_allclose(x, optimum(), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(matrix, curvature(x), rtol=1e-2, atol=1e-3)


def test_newton_takes_no_more_steps_than_asked_for():
    x, _ = newton(jax.grad(loss), jax.hessian(loss), jnp.zeros(3), damping=capped, max_steps=1, tolerance=0.0)
    assert np.abs(x).max() <= 1
    assert loss(x) > loss(jnp.asarray(optimum(), jnp.float32)) + 0.1


def test_halved_takes_the_first_length_that_lowers_the_objective():
    damping = halved(lambda x: jnp.sum(x**2))
    np.testing.assert_allclose(
        damping(jnp.array([1.0]), jnp.array([-6.0])), [-1.5]
    )  # to -5, -2: higher; to -0.5: lower
    np.testing.assert_allclose(damping(jnp.array([1.0]), jnp.array([6.0])), [0.0])  # uphill


def test_capped_keeps_the_direction_of_a_long_step():
    np.testing.assert_allclose(capped(jnp.zeros(2), jnp.array([4.0, -1.0])), [1, -0.25])
    np.testing.assert_allclose(capped(jnp.zeros(2), jnp.array([0.5, -0.1])), [0.5, -0.1])


def test_lbfgs_finds_the_optimum_whatever_the_scale():
    for scale in (0.1, 30.0):
        params, steps, gradient = lbfgs(
            lambda p: jax.value_and_grad(lambda p: loss(p["c"]))(p),
            {"c": jnp.zeros(3)},
            {"c": jnp.full(3, scale)},
            tol=1e-3 * scale,
        )
        np.testing.assert_allclose(params["c"], optimum(), rtol=0.01, atol=0.01)
        assert 0 < steps < 200
        assert gradient <= 1e-3 * scale
