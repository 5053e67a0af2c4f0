"""Settings of an algorithm as arrays of its state, and a population that is vmapped over them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from rlaif_jax.algorithms.base import hyper_settings, with_hyper
from rlaif_jax.types import Frozen
from tests.algorithms.cases import ACTOR_CRITIC, GROUP
from tests.helpers import assert_same_leaves, relative_distance

pytestmark = pytest.mark.slow  # as a whole: many programs to compile


def test_hyper_settings_are_the_floats():
    assert hyper_settings(ACTOR_CRITIC) == {
        "advantage.gamma": 0.95,
        "advantage.gae_lambda": 0.95,
        "objective.clip_range": 0.2,
        "value_clip_range": 0.2,
        "value_coef": 0.3,
        "entropy_coef": 0.01,
        "kl_coef": 0.1,
        "kl_horizon": 10_000.0,
        "importance.most": 2.0,
        "shaping.missing_eos_value": 1.0,
        "policy_optimizer.learning_rate": 3e-3,
        "value_optimizer.learning_rate": 3e-3,
    }
    assert "kl_target" in hyper_settings(dataclasses.replace(GROUP, kl_target=2.0))


def test_with_hyper_replaces_floats_and_nothing_else():
    hyper = {name: np.float32(7 + i) for i, name in enumerate(hyper_settings(ACTOR_CRITIC))}
    bound = with_hyper(ACTOR_CRITIC, hyper)
    for name, value in hyper.items():
        if not name.endswith("learning_rate"):
            assert functools.reduce(lambda config, part: config.__dict__[part], name.split("."), bound) == value
    assert bound.policy_optimizer is ACTOR_CRITIC.policy_optimizer, (
        "an optimiser takes its learning rate at each update"
    )
    assert (bound.num_epochs, bound.kl_in, bound.kl_target) == (2, "reward", None)
    assert type(bound) is type(ACTOR_CRITIC)
    assert ACTOR_CRITIC.kl_coef == 0.1, "the config itself is as it was"


def test_a_population_is_vmapped_over_hyper(gae_case):
    """Three members: no learning, the settings of the case, another clip range and learning rate of the critic."""
    members = {
        "policy_optimizer.learning_rate": jnp.array([0.0, 3e-3, 3e-3]),
        "value_optimizer.learning_rate": jnp.array([0.0, 3e-3, 1e-3]),
        "objective.clip_range": jnp.array([0.2, 0.2, 0.01]),
    }
    one = lambda hyper, batch: gae_case.algorithm.step(
        gae_case.state.replace(hyper=gae_case.state.hyper | hyper), Frozen(), batch
    )
    states, metrics = jax.device_get(jax.jit(jax.vmap(one, in_axes=(0, None)))(members, gae_case.batch))
    member = lambda i: jax.tree.map(lambda x: x[i], states.params)
    assert_same_leaves(member(0), gae_case.state.params)
    assert relative_distance(member(1), gae_case.stepped[0].params) < 1e-6
    np.testing.assert_allclose(metrics["clip_fraction"][1], gae_case.stepped[1]["clip_fraction"], rtol=1e-5)
    assert metrics["clip_fraction"][2] > metrics["clip_fraction"][1]
    moved = [ravel_pytree(jax.tree.map(np.subtract, member(i)["value"], member(0)["value"]))[0] for i in (1, 2)]
    assert np.linalg.norm(moved[1]) < 0.5 * np.linalg.norm(moved[0])
