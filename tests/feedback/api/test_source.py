"""The API judge as the loop's feedback source."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest

from rlaif_jax.config import StopRequested, UserError
from rlaif_jax.feedback.api.builtin_templates import CRITIQUE, PAIRWISE, RATING
from rlaif_jax.feedback.api.config import ApiConfig
from rlaif_jax.feedback.api.judge import ApiJudge
from rlaif_jax.feedback.api.source import ApiJudgeSource, against_field, prompt_and_answer
from rlaif_jax.feedback.records.store import Store
from tests.feedback.api_server import Wrong, right, serve

pytest.importorskip("openai", reason="the API judge needs the extra: pip install -e '.[api]'")
RECORDS = [{"prompt": f"p{i}", "other": "quality 2"} for i in range(4)]
ANSWERS = ["quality 3", "quality 7", "quality 1", "quality 10"]


def test_scores_and_what_is_missing():
    behave = lambda body, number: Wrong(400) if "quality 1\n" in str(body["messages"][-1]["content"]) else right(body)
    with serve(behave) as server, ApiJudge(ApiConfig(server=server.url, model="j")) as judge:
        source = ApiJudgeSource(judge, RATING)
        feedback = source(RECORDS, ANSWERS)
    assert source.missing() == {"the judge's call failed: status 400: wrong with Bearer none": 1}
    np.testing.assert_array_equal(feedback.valid[:, 0], [True, True, False, True])
    np.testing.assert_allclose(feedback.values[:, 0], [3, 7, 0, 10], atol=1e-5)


def test_against_another_answer():
    with serve() as server, ApiJudge(ApiConfig(server=server.url, model="j")) as judge:
        feedback = ApiJudgeSource(judge, PAIRWISE, against_field("other"))(RECORDS, ANSWERS)
    q = np.array([3.0, 7.0, 1.0, 10.0])
    np.testing.assert_allclose(feedback.values[:, 0], 1 / (1 + np.exp(2 - q)), atol=1e-4)
    assert feedback.valid.all()


def test_a_record_without_another_answer_is_not_asked_about():
    records = [RECORDS[0], {"prompt": "p1"}, *RECORDS[2:]]
    with serve() as server, ApiJudge(ApiConfig(server=server.url, model="j")) as judge:
        source = ApiJudgeSource(judge, PAIRWISE, against_field("other"))
        source.prefetch(records, ANSWERS)
        feedback = source(records, ANSWERS)
        assert not any("p1" in str(body["messages"]) for body in server.requests)
    assert feedback.valid[:, 0].tolist() == [True, False, True, True]
    np.testing.assert_allclose(feedback.values[2:, 0], 1 / (1 + np.exp(2 - np.array([1.0, 10.0]))), atol=1e-4)
    assert source.missing() == {"the record has no text in its field 'other' to compare with": 1}


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


def test_a_stop_keeps_the_replies_under_way_and_sends_no_further_request(tmp_path):
    """Two calls at a time, a stop during the first two: they are paid for, and are there when the run resumes."""
    answering = threading.Event()

    def slow(body: dict[str, Any], number: int) -> Any:
        if number == 2:  # the second after the question what the server can do
            threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGUSR1]).start()
        if number > 0:
            answering.wait()
        return right(body)

    def stopped(number: int, frame: Any) -> None:
        threading.Timer(0.5, answering.set).start()
        raise StopRequested

    config = lambda: ApiConfig(server=server.url, model="j", concurrency=2)
    before = signal.signal(signal.SIGUSR1, stopped)
    try:
        with serve(slow) as server:
            with ApiJudge(config(), store=tmp_path / "s.sqlite") as judge:
                source = ApiJudgeSource(judge, RATING)
                with pytest.raises(StopRequested):
                    source(RECORDS, ANSWERS)
                assert server.count == 3
                with pytest.raises(UserError, match="this judge is closed"):
                    source.prefetch(RECORDS, ANSWERS)
            with Store(tmp_path / "s.sqlite") as store:
                assert [judgement.status for judgement in store.judgements()] == ["ok"] * 2
            assert server.count == 3
            with ApiJudge(config(), store=tmp_path / "s.sqlite") as judge:
                feedback = ApiJudgeSource(judge, RATING)(RECORDS, ANSWERS)
            assert feedback.valid.all() and server.count == 5
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_stop_waits_for_a_reply_only_for_a_short_time():
    with serve(lambda body, number: right(body) if number == 0 else Wrong(event="hang")) as server:
        judge = ApiJudge(ApiConfig(server=server.url, model="j"))
        judge.submit([prompt_and_answer(RECORDS[0], ANSWERS[0])], RATING)
        while server.count < 2:
            time.sleep(0.01)
        started = time.monotonic()
        judge.finish(0.3)
        assert 0.25 < time.monotonic() - started < 2
        judge.close()
        assert time.monotonic() - started < 2


def test_a_stop_while_questions_are_handed_over_leaves_nothing_behind(monkeypatch):
    """A signal may come in the middle of `prefetch`; a coroutine that nobody awaits would be a warning, an error here."""
    with serve() as server, ApiJudge(ApiConfig(server=server.url, model="j")) as judge:

        def stopped(*arguments: Any) -> None:
            raise StopRequested

        with monkeypatch.context() as patch:
            patch.setattr(judge._loop, "call_soon_threadsafe", stopped)
            with pytest.raises(StopRequested):
                ApiJudgeSource(judge, RATING).prefetch(RECORDS, ANSWERS)
        gc.collect()
        assert ApiJudgeSource(judge, RATING)(RECORDS, ANSWERS).valid.all()
