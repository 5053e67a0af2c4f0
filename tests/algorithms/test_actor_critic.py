"""What is of policy gradients with a critic alone."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from rlaif_jax.algorithms.advantages import GAE, ReturnToGo
from rlaif_jax.algorithms.objectives import Clipped, NoRatio
from rlaif_jax.algorithms.surrogate import OverLength
from rlaif_jax.config import UserError
from rlaif_jax.types import Frozen
from tests.algorithms.cases import ACTOR_CRITIC, DATA, GROUP, build
from tests.helpers import assert_same_leaves, relative_distance

pytestmark = pytest.mark.slow  # as a whole: many programs to compile


def test_at_first_the_critic_alone_may_learn(gae_case):
    algorithm = build(dataclasses.replace(ACTOR_CRITIC, value_warmup=1))
    step = jax.jit(lambda state, batch: algorithm.step(state, Frozen(), batch))
    first, _ = step(gae_case.state, gae_case.batch)
    assert_same_leaves(first.params["policy"], gae_case.state.params["policy"])
    moved = lambda a, b: relative_distance(a, b) > 1e-4
    assert moved(first.params["value"], gae_case.state.params["value"])
    second, _ = step(first, gae_case.batch)
    assert moved(second.params["policy"], first.params["policy"])
    with pytest.raises(UserError, match=r"value_warmup is for a critic, and ppo\.advantage=GroupNormalised has none"):
        dataclasses.replace(GROUP, value_warmup=1)


ONCE = dataclasses.replace(
    ACTOR_CRITIC,
    advantage=GAE(gae_lambda=1.0, whiten=False),
    average=OverLength(1),
    num_epochs=1,
    num_minibatches=1,
    entropy_coef=0.0,
    value_clip_range=None,
)


def policy_gradient(case, config, params):
    """The gradient of the policy, of the whole step as one minibatch."""
    algorithm = build(config)
    state = algorithm.init({part: params[part] for part in algorithm.optimizers}, np.uint32(3))
    batch = jax.jit(lambda: algorithm.prepare(state, case.frozen, DATA, case.rollout, case.rewards))()
    batch = dataclasses.replace(batch, sequences=None)
    return jax.jit(lambda: algorithm.update(state, Frozen()).gradients(state.params, batch)[0]["policy"])()


def test_ppo_with_one_epoch_is_a2c(gae_case):
    """At a ratio of 1 nothing is clipped, and the ratio's slope is that of the log-prob."""
    ppo, a2c = (
        policy_gradient(gae_case, dataclasses.replace(ONCE, objective=objective), gae_case.state.params)
        for objective in (Clipped(), NoRatio())
    )
    chex.assert_trees_all_close(ppo, a2c, rtol=1e-5, atol=1e-6)


def test_a2c_with_lambda_1_and_no_value_is_reinforce(gae_case):
    nothing = jax.tree.map(np.zeros_like, gae_case.state.params["value"])
    config = dataclasses.replace(ONCE, objective=NoRatio())
    a2c = policy_gradient(gae_case, config, {**gae_case.state.params, "value": nothing})
    reinforce = policy_gradient(gae_case, dataclasses.replace(config, advantage=ReturnToGo()), gae_case.state.params)
    chex.assert_trees_all_close(a2c, reinforce, rtol=1e-5, atol=1e-6)
    with_value = policy_gradient(gae_case, config, gae_case.state.params)
    assert relative_distance(with_value, reinforce) > 0.01
