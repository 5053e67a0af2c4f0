"""What is of policy gradients with a critic alone."""

import dataclasses

import jax
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.types import Frozen
from tests.algorithms.cases import ACTOR_CRITIC, GROUP, build
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
