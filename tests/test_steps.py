"""What a step says of its rewards: means, and what was missing."""

import math

import numpy as np

from rlaif_jax.policies.base import Draw
from rlaif_jax.steps import reward_metrics, spread_metrics
from rlaif_jax.types import Feedback, RewardBatch

LENGTHS = np.array([10, 20, 30, 40])


def batch(score, valid):
    return RewardBatch(np.array(score, np.float32), np.array(valid, bool), np.zeros((4, 3), np.float32))


def test_one_complete_reward_has_two_means():
    judged = Feedback.single(np.array([1.0, 2, 3, 6]), np.ones(4, bool))
    found = reward_metrics(batch([0, 1, 2, 5], [1] * 4), judged, LENGTHS, (Draw(2),), ("judge",))
    assert found == {"reward": 2.0, "score": 3.0}
    greedy = (Draw(), Draw(greedy=True))  # the baseline of ReMax is no answer to learn from
    assert reward_metrics(batch([0, 1, 2, 5], [1] * 4), judged, LENGTHS, greedy) == {"reward": 1.0, "score": 2.0}


def test_what_is_missing_is_counted_by_reward_and_length():
    values = np.array([[1, 10], [np.nan, 20], [3, np.nan], [np.nan, np.nan]])
    valid = np.isfinite(values)
    feedback, rewards = Feedback(values, valid), batch([1, 4, 1, np.nan], valid.any(1))
    found = reward_metrics(rewards, feedback, LENGTHS, (Draw(),), ("rule", "judge"))
    assert found["reward"] == 2.0
    assert (found["score/rule"], found["score/judge"]) == (2.0, 15.0)
    assert (found["missing/rule"], found["missing/judge"]) == (0.5, 0.5)
    assert (found["missing_longer/rule"], found["missing_longer/judge"]) == (30 - 20, 35 - 15)
    assert found["missing/partly"] == 0.5
    # The two answers with a part have 4 and 1, the complete one 1; the population deviation of 1, 4, 1 is sqrt(2).
    assert math.isclose(found["missing/partly_advantage"], 1.5 / math.sqrt(2), rel_tol=1e-6)
    # Two answers a prompt: 1 and 4 are 1.5 from their mean, 1 is alone with an answer that has nothing.
    found = reward_metrics(rewards, feedback, LENGTHS, (Draw(2),), ("rule", "judge"))
    assert math.isclose(found["missing/partly_advantage"], ((1.5 + 0) / 2 + 1.5) / math.sqrt(2), rel_tol=1e-6)


def test_without_names_rewards_have_numbers_and_pairs_alone_no_reward():
    judged = Feedback(np.ones((4, 2)), np.ones((4, 2), bool))
    assert set(reward_metrics(batch([0] * 4, [1] * 4), judged, LENGTHS, (Draw(2),))) == {"reward", "score/0", "score/1"}
    pairs = np.full((2, 2, 2), 0.5)
    compared = batch([0] * 4, [1] * 4).replace(pairs=pairs)
    nothing = np.zeros((4, 0))
    assert reward_metrics(compared, Feedback(nothing, nothing.astype(bool), None, pairs), LENGTHS, (Draw(2),)) == {}
    none_valid = Feedback.single(np.zeros(4), np.zeros(4, bool))
    assert math.isnan(reward_metrics(batch([0] * 4, [0] * 4), none_valid, LENGTHS, (Draw(2),))["reward"])


def test_the_share_of_prompts_whose_rewards_differ():
    """Of four prompts with two answers, one has two known rewards that differ; it is half of the two that are kept."""
    rewards = RewardBatch(
        np.array([1, 1, 0, 1, 0, 1, 2, 2], np.float32), np.array([1, 1, 1, 1, 1, 0, 1, 1], bool), np.zeros((8, 3))
    )
    assert spread_metrics(rewards, 2, 1) == {"spread/drawn": 0.25}
    assert spread_metrics(rewards, 2, 2) == {"spread/drawn": 0.25, "spread/kept": 0.5}
    assert spread_metrics(rewards, 2, 4) == {"spread/drawn": 0.25, "spread/kept": 1.0}
    assert spread_metrics(rewards, 1, 1) == {}
    more = rewards.replace(score=np.array([1, 0, 0, 1, 0, 1, 2, 2], np.float32), valid=np.ones(8, bool))
    assert spread_metrics(more, 2, 2) == {"spread/drawn": 0.75, "spread/kept": 1.0}
