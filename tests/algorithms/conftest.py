"""The cases of the policy-gradient algorithms, compiled once for all files that use them."""

from typing import Any

import jax
import pytest

from tests.algorithms import cases


@pytest.fixture(scope="session")
def gae_case() -> cases.Case:
    """PPO with a critic."""
    return cases.make_case(cases.ACTOR_CRITIC)


@pytest.fixture(scope="session")
def group_case() -> cases.Case:
    """GRPO."""
    return cases.make_case(cases.GROUP)


@pytest.fixture(scope="session")
def rloo_case() -> cases.Case:
    """RLOO."""
    return cases.make_case(cases.LEAVE_ONE_OUT)


@pytest.fixture(scope="session")
def moved(gae_case: cases.Case) -> Any:
    """Parameters some way from the behaviour policy's: ratios on both sides of the clip."""
    policy = gae_case.state.params["policy"]
    shift = jax.tree.map(lambda a, b: a + 0.05 * (b - a), policy, gae_case.frozen.reference)
    return gae_case.state.params | {"policy": shift}
