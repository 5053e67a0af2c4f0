"""Sources of judgements: what a function sees, and what a missing judgement is."""

import numpy as np

from rlaif_jax.feedback.sources import FunctionSource

RECORDS = [{"prompt": f"prompt {i}"} for i in range(3)]
ANSWERS = ["one", "two", "three"]


def test_a_function_that_has_no_judgement_returns_none():
    source = FunctionSource(lambda record, answer: None if answer == "two" else len(answer) / 10)
    feedback = source(RECORDS, ANSWERS, rollout=None)
    np.testing.assert_allclose(feedback.values[[0, 2]], [0.3, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(feedback.valid, [True, False, True])
    assert feedback.values.dtype == np.float32


def test_a_function_sees_record_and_answer_and_a_zero_is_a_judgement():
    seen = []
    feedback = FunctionSource(lambda record, answer: seen.append((record["prompt"], answer)) or 0.0)(
        RECORDS, ANSWERS, None
    )
    assert seen == [("prompt 0", "one"), ("prompt 1", "two"), ("prompt 2", "three")]
    assert feedback.valid.all()
    assert not feedback.values.any()
