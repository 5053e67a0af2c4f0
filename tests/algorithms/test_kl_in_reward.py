"""The KL in the reward goes with every advantage: of groups it is that of whole answers, as in RLOO."""

import dataclasses

import jax
import numpy as np
import pytest

from rlaif_jax.algorithms.advantages import GroupMean, LeaveOneOut, ReturnToGo
from tests.algorithms.cases import GROUP, K, build, make_case

pytestmark = pytest.mark.slow  # as a whole: many programs to compile


@pytest.mark.parametrize("advantage", [GroupMean(), LeaveOneOut(), ReturnToGo()])
def test_the_kl_is_taken_from_the_reward(advantage):
    case = make_case(dataclasses.replace(GROUP, advantage=advantage, kl_in="reward", kl_coef=0.3))
    fields, mask, rewards = case.batch.fields, case.batch.mask, case.rewards
    kl = np.where(mask, fields.logprobs.astype(float) - fields.ref_logprobs, 0)
    dense = np.where(mask, rewards.token_rewards, 0)
    for row in np.flatnonzero(np.asarray(rewards.valid)):
        totals = {
            other: rewards.score[other] + (dense[other] - 0.3 * kl[other]).sum()
            for other in range(row // K * K, row // K * K + K)
            if rewards.valid[other]
        }
        rest = [total for other, total in totals.items() if other != row]
        if isinstance(advantage, ReturnToGo):
            per_token = (dense[row] - 0.3 * kl[row])[mask[row]]
            expected = rewards.score[row] + per_token[::-1].cumsum()[::-1]
        elif isinstance(advantage, GroupMean):
            expected = totals[row] - np.mean([*totals.values()])
        else:
            expected = totals[row] - np.mean(rest) if rest else 0.0
        np.testing.assert_allclose(fields.advantages[row][mask[row]], expected, atol=1e-5)
    assert "kl_loss" not in jax.device_get(case.stepped[1])
    assert build(case.algorithm.config).kl_coef(case.state) == pytest.approx(0.3)
