"""Rewards side by side: columns, gaps, dense rewards, counts and states by name."""

import json

import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.joined import JoinedSource
from rlaif_jax.feedback.sources import CountingSource, FeedbackSource, Missing, RecordedPreferences
from rlaif_jax.types import Feedback

RECORDS, ANSWERS = [{}] * 4, ["a", "b", "c", "d"]


class Fixed(CountingSource):
    """Gives the same rewards at each call; a text is the reason of a missing one."""

    def __init__(self, *judged, dense=None):
        self.judged, self.dense, self.prefetched = judged, dense, []

    def prefetch(self, records, answers):
        self.prefetched += answers

    def __call__(self, records, answers, rollout):
        judged = self.feedback([Missing(value) if isinstance(value, str) else value for value in self.judged])
        return judged._replace(token_rewards=self.dense)


class Wide(FeedbackSource):
    def __call__(self, records, answers, rollout):
        return Feedback(np.zeros((len(answers), 2)), np.ones((len(answers), 2), bool))


def test_columns_keep_their_values_and_gaps():
    judged = JoinedSource((Fixed(1.0, "late", 3.0, 0.0), Fixed(5.0, 7.0, "late", "lost")), ("style", "facts"))(
        RECORDS, ANSWERS, None
    )
    np.testing.assert_array_equal(judged.values, [[1, 5], [0, 7], [3, 0], [0, 0]])
    np.testing.assert_array_equal(judged.valid, [[1, 1], [0, 1], [1, 0], [1, 0]])
    assert judged.values.dtype == np.float32 and judged.valid.dtype == bool
    assert judged.token_rewards is None and judged.pairs is None


def test_dense_rewards_are_added_where_their_source_judged():
    first = np.array([[1.0, 2.0], [np.nan, np.nan], [3.0, 4.0], [5.0, 6.0]])
    second = np.array([[10.0, 0.0], [0.0, 20.0], [np.inf, 0.0], [30.0, 30.0]])
    source = JoinedSource(
        (Fixed(0.0, "x", 0.0, 0.0, dense=first), Fixed(0.0, 0.0, "x", 0.0, dense=second), Fixed(*[1.0] * 4)),
        ("a", "b", "c"),
    )
    expected = [[11, 2], [0, 20], [3, 4], [35, 36]]
    np.testing.assert_array_equal(source(RECORDS, ANSWERS, None).token_rewards, expected)


def test_counts_have_the_name_of_their_reward_and_continue_after_a_resume():
    build = lambda: JoinedSource((Fixed(1.0, "late", "late", 0.0), Fixed(5.0, 7.0, "late", "lost")), ("style", "facts"))
    source = build()
    assert source.missing() == {}
    source(RECORDS, ANSWERS, None)
    once = {"style: late": 2, "facts: late": 1, "facts: lost": 1}
    assert source.missing() == once
    resumed = build()
    resumed.set_state(json.loads(json.dumps(source.get_state())))
    assert resumed.missing() == once
    resumed(RECORDS, ANSWERS, None)
    assert resumed.missing() == {"style: late": 4, "facts: late": 2, "facts: lost": 2}


def test_each_source_begins_early():
    first, second = Fixed(1.0), Fixed(2.0)
    JoinedSource((first, second), ("a", "b")).prefetch([{}], ["x"])
    assert first.prefetched == second.prefetched == ["x"]


@pytest.mark.parametrize(
    "sources, names, words",
    [
        ((), (), "joined.sources is empty"),
        ((Fixed(1.0),), ("a", "b"), "joined.names has 2 entries for 1 sources"),
        ((Fixed(1.0), Fixed(1.0)), ("a", "a"), "joined.names has 'a' twice"),
        ((Fixed(1.0),), ("",), "empty name"),
    ],
)
def test_settings_that_are_not_right(sources, names, words):
    with pytest.raises(UserError, match=words):
        JoinedSource(sources, names)


@pytest.mark.parametrize(
    "source, words",
    [
        (RecordedPreferences(), "reward facts: the source compares answers in pairs"),
        (Wide(), r"reward facts: the source gave values of shape \(4, 2\) .* one reward an answer"),
        (Fixed(1.0), r"reward facts: the source gave values of shape \(1, 1\) .* for 4 answers"),
    ],
)
def test_sources_that_are_no_column(source, words):
    with pytest.raises(UserError, match=words):
        JoinedSource((Fixed(*[1.0] * 4), source), ("style", "facts"))(RECORDS, ANSWERS, None)
