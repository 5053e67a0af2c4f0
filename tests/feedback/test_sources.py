"""Sources of judgements: what a function sees, and what a missing judgement is."""

import json

import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.sources import MAX_REASONS, CountingSource, FunctionSource, Missing, MixedSource
from rlaif_jax.types import Feedback

RECORDS = [{"prompt": f"prompt {i}"} for i in range(3)]
ANSWERS = ["one", "two", "three"]
FOUR, TEXTS = [{}] * 4, ["a"] * 4


def test_a_function_that_has_no_judgement_returns_none():
    source = FunctionSource(lambda record, answer: None if answer == "two" else len(answer) / 10)
    feedback = source(RECORDS, ANSWERS, rollout=None)
    np.testing.assert_allclose(feedback.values[[0, 2], 0], [0.3, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(feedback.valid[:, 0], [True, False, True])
    assert feedback.values.dtype == np.float32


def test_a_function_sees_record_and_answer_and_a_zero_is_a_judgement():
    seen = []
    feedback = FunctionSource(lambda record, answer: seen.append((record["prompt"], answer)) or 0.0)(
        RECORDS, ANSWERS, None
    )
    assert seen == [("prompt 0", "one"), ("prompt 1", "two"), ("prompt 2", "three")]
    assert feedback.valid.all()
    assert not feedback.values.any()


def test_a_source_that_counts_nothing_says_so():
    assert FunctionSource(lambda record, answer: None).missing() == {}


def test_missing_judgements_are_counted_by_reason_and_never_a_reward():
    source = CountingSource()
    feedback = source.feedback([0.5, Missing("late"), 0.0, Missing("late"), Missing("lost")])
    assert feedback.valid[:, 0].tolist() == [True, False, True, False, False]
    assert feedback.values[:, 0].tolist() == [0.5, 0.0, 0.0, 0.0, 0.0] and feedback.values.dtype == np.float32
    assert source.missing() == {"late": 2, "lost": 1}
    resumed = CountingSource()
    resumed.feedback([Missing("before the checkpoint was read")])
    resumed.set_state(json.loads(json.dumps(source.get_state())))
    resumed.feedback([Missing("late")])
    assert resumed.missing() == {"late": 3, "lost": 1} and source.missing() == {"late": 2, "lost": 1}
    resumed.set_state(None)
    assert resumed.missing() == {}


def test_reasons_do_not_grow_without_end():
    source = CountingSource()
    source.feedback([Missing(f"reason {i}") for i in range(MAX_REASONS + 10)] + [Missing("reason 0")])
    counts = source.missing()
    assert len(counts) == MAX_REASONS + 1 and counts["other reasons"] == 10 and counts["reason 0"] == 2


def fixed(values, dense=None):
    valid = np.array([v is not None for v in values])
    numbers = np.array([0.0 if v is None else v for v in values], np.float32)
    return lambda records, answers, rollout: Feedback.single(numbers, valid, dense)


def test_mixing_fills_gaps_and_weighs():
    mixed = MixedSource((fixed([1.0, None, 3.0, None]), fixed([5.0, 7.0, None, None])), (3.0, 1.0))
    judged = mixed(FOUR, TEXTS, None)
    np.testing.assert_allclose(judged.values[:, 0], [2.0, 7.0, 3.0, 0.0])
    assert judged.valid[:, 0].tolist() == [True, True, True, False] and judged.token_rewards is None


def test_a_missing_value_is_not_looked_at():
    poisoned = lambda records, answers, rollout: Feedback.single(
        np.array([np.nan, 1.0, 1.0, 1.0]), np.array([False, True, True, True])
    )
    assert MixedSource((poisoned, fixed([4.0] * 4)))(FOUR, TEXTS, None).values[:, 0].tolist() == [4.0, 2.5, 2.5, 2.5]


def test_sources_on_other_scales_are_standardised_first():
    mixed = MixedSource((fixed([100.0, 300.0, None, None]), fixed([0.1, 0.2, 0.1, 0.2])), standardise=True)
    np.testing.assert_allclose(mixed(FOUR, TEXTS, None).values[:, 0], [-1, 1, -1, 1], atol=1e-5)
    assert MixedSource((fixed([2.0] * 4),), standardise=True)(FOUR, TEXTS, None).values[:, 0].tolist() == [0.0] * 4


def test_dense_rewards_mix_like_scores():
    dense = np.array([[1.0, 2.0], [np.nan, np.nan], [3.0, 4.0], [5.0, 6.0]])
    mixed = MixedSource((fixed([1.0, None, 1.0, 1.0], dense), fixed([1.0] * 4)), (1.0, 3.0))
    expected = [[0.25, 0.5], [0.0, 0.0], [0.75, 1.0], [1.25, 1.5]]
    np.testing.assert_allclose(mixed(FOUR, TEXTS, None).token_rewards, expected)


def test_mixed_settings_that_cannot_be():
    for arguments, words in [
        (((),), "empty"),
        (((fixed([1.0]),), (1.0, 2.0)), "2 entries for 1"),
        (((fixed([1.0]),), (0.0,)), "positive"),
    ]:
        with pytest.raises(UserError, match=words):
            MixedSource(*arguments)
