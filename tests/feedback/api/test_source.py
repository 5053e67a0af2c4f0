"""The API judge as the loop's feedback source."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.api.builtin_templates import CRITIQUE, PAIRWISE, RATING
from rlaif_jax.feedback.api.config import ApiConfig
from rlaif_jax.feedback.api.judge import ApiJudge
from rlaif_jax.feedback.api.source import ApiJudgeSource, against_field
from tests.feedback.api_server import Wrong, right, serve

pytest.importorskip("openai", reason="the API judge needs the extra: pip install 'rlaif-jax[api]'")
RECORDS = [{"prompt": f"p{i}", "other": "quality 2"} for i in range(4)]
ANSWERS = ["quality 3", "quality 7", "quality 1", "quality 10"]


def test_scores_and_what_is_missing():
    behave = lambda body, number: Wrong(400) if "quality 1\n" in str(body["messages"][-1]["content"]) else right(body)
    with serve(behave) as server, ApiJudge(ApiConfig(server=server.url, model="j")) as judge:
        feedback = ApiJudgeSource(judge, RATING)(RECORDS, ANSWERS)
    np.testing.assert_array_equal(feedback.valid[:, 0], [True, True, False, True])
    np.testing.assert_allclose(feedback.values[:, 0], [3, 7, 0, 10], atol=1e-5)


def test_against_another_answer():
    with serve() as server, ApiJudge(ApiConfig(server=server.url, model="j")) as judge:
        feedback = ApiJudgeSource(judge, PAIRWISE, against_field("other"))(RECORDS, ANSWERS)
    q = np.array([3.0, 7.0, 1.0, 10.0])
    np.testing.assert_allclose(feedback.values[:, 0], 1 / (1 + np.exp(2 - q)), atol=1e-4)
    assert feedback.valid.all()


def test_prefetched_judgements_are_made_in_the_background_and_once():
    def slow(body: dict[str, Any], number: int) -> Any:
        time.sleep(0.25)
        return right(body)

    with serve(slow) as server, ApiJudge(ApiConfig(server=server.url, model="j")) as judge:
        source = ApiJudgeSource(judge, RATING)
        source.prefetch(RECORDS[:2], ANSWERS[:2])
        source.prefetch(RECORDS[2:], ANSWERS[2:])
        time.sleep(0.7)  # the next rollout
        started = time.monotonic()
        feedback = source(RECORDS, ANSWERS)
        assert time.monotonic() - started < 0.2
        assert feedback.valid.all() and server.count == 5


def test_words_are_no_reward():
    with (
        serve() as server,
        ApiJudge(ApiConfig(server=server.url, model="j")) as judge,
        pytest.raises(UserError, match="a comment is no reward"),
    ):
        ApiJudgeSource(judge, CRITIQUE)
