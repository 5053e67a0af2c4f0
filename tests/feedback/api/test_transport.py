"""Calls of a real HTTP server on loopback: its capabilities, throttling, limits, failures and the key."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.api.builtin_templates import CRITIQUE, PAIRWISE, RATING
from rlaif_jax.feedback.api.judge import ApiJudge
from rlaif_jax.feedback.api.templates import Question
from tests.feedback.api.questions import ONE, PAIR, config, low_mass, ones, pairs
from tests.feedback.api_server import Wrong, completion, right, serve

pytest.importorskip("openai", reason="the API judge needs the extra: pip install -e '.[api]'")


def test_what_a_server_can_do_is_asked_once_and_remembered(tmp_path: Path):
    settings = {"cache": tmp_path / "calls.sqlite"}
    with serve() as server:
        for question in (ONE, PAIR):
            with ApiJudge(config(server.url, **settings)) as judge:
                judge.judge([question], RATING if question is ONE else PAIRWISE)
        assert [body["messages"][-1]["content"] for body in server.requests].count("Reply with the letter A.") == 1
        assert server.count == 4


@pytest.mark.parametrize("limit", [5, 0])
def test_fewer_or_no_logprobs_than_asked_for(limit: int):
    def behave(body: dict[str, Any], number: int) -> Any:
        return Wrong(400) if body.get("top_logprobs", 0) > limit or (limit == 0 and "logprobs" in body) else right(body)

    with serve(behave) as server, ApiJudge(config(server.url)) as judge:
        [outcome] = judge.judge([ONE], RATING)
        assert server.requests[-1].get("top_logprobs", 0) == limit
    assert outcome.rating == pytest.approx(7)


def test_a_server_that_names_its_token_limit_otherwise():
    def behave(body: dict[str, Any], number: int) -> Any:
        if "max_tokens" in body:
            return Wrong(400)
        return right(body)

    with serve(behave) as server:
        original = server._answer

        def answer(handler: Any, given: Any) -> None:
            if isinstance(given, Wrong):
                data = b'{"error": {"message": "use max_completion_tokens instead"}}'
                handler.send_response(400)
                handler.send_header("Content-Length", str(len(data)))
                handler.end_headers()
                handler.wfile.write(data)
            else:
                original(handler, given)

        server._answer = answer
        with ApiJudge(config(server.url)) as judge:
            assert judge.judge([ONE], RATING)[0].rating == pytest.approx(7)


def test_a_server_that_cannot_constrain_replies_is_asked_to_once(tmp_path: Path):
    refuses = lambda body, number: Wrong(400) if "structured_outputs" in body else low_mass(body, number)
    with serve(refuses) as server:
        for expected in (4, 0):  # one to see what it can do, two orders, one of them with a choice
            calls = server.count
            with ApiJudge(config(server.url, concurrency=1), store=tmp_path / "f.sqlite") as judge:
                [outcome] = judge.judge([PAIR], PAIRWISE)
            assert {entry.status for entry in outcome.judgements} == {"abstained"}
            assert expected <= server.count - calls <= expected + (expected > 0)


def test_retry_after_is_honoured_and_429_shrinks_the_concurrency():
    throttled_at: list[float] = []

    def behave(body: dict[str, Any], number: int) -> Any:
        if number == 5:
            throttled_at.append(time.monotonic())
            return Wrong(429, Retry_After="1")
        time.sleep(0.1)
        return right(body)

    with serve(behave) as server, ApiJudge(config(server.url, concurrency=5)) as judge:
        outcomes = judge.judge([Question(f"{i}", ("quality 7",)) for i in range(20)], RATING)
        assert judge.concurrency == 4 and judge.spent.throttled == 1
    assert all(outcome.rating for outcome in outcomes)
    # Not only the refused call: all of them wait.
    assert [at for at in server.times if throttled_at[0] + 0.3 < at < throttled_at[0] + 1.0] == []
    assert len([at for at in server.times if at >= throttled_at[0] + 1.0]) > 8


@pytest.mark.parametrize("settings", [{"max_wait_s": 2.0}, {"budget_s": 3.0}])
def test_a_server_that_wants_a_longer_pause_than_allowed_stops_the_others_too(settings: dict[str, float]):
    behave = lambda body, number: Wrong(429, Retry_After="200") if "quality" in str(body) else right(body)
    with serve(behave) as server, ApiJudge(config(server.url, concurrency=2, **settings)) as judge:
        futures = judge.submit(ones(20), RATING)
        missing = [entry for future in futures for entry in future.result(timeout=6).missing]
        assert len(missing) == 20 and server.count <= 3
        assert any("the server wants no call for" in entry.raw for entry in missing)


def test_throttling_without_retry_after_backs_off_and_ends():
    behave = lambda body, number: Wrong(429) if "quality" in str(body) else right(body)
    with serve(behave) as server, ApiJudge(config(server.url, max_wait_s=2.0)) as judge:
        futures = judge.submit([ONE], RATING)
        [missing] = futures[0].result(timeout=10).missing
        assert "status 429" in missing.raw and 3 <= server.count <= 7  # not a dozen


def test_throttling_of_all_ends_by_the_clock_though_calls_queue():
    def behave(body: dict[str, Any], number: int) -> Any:
        if "quality" not in str(body):
            return right(body)
        time.sleep(0.04)
        return Wrong(429)

    with serve(behave) as server, ApiJudge(config(server.url, max_wait_s=2.0, concurrency=1)) as judge:
        futures = judge.submit(ones(60), RATING)  # over 2.4 s for one attempt each
        assert all(future.result(timeout=30).missing for future in futures)
        assert server.count <= 150  # by their pauses alone they might make three attempts each


def test_throttling_of_one_while_others_are_answered_counts_its_pauses(monkeypatch: pytest.MonkeyPatch):
    def behave(body: dict[str, Any], number: int) -> Any:
        seen.append("unlucky" in str(body))
        return Wrong(429, wait=0.5) if seen[-1] and sum(seen) <= 3 else right(body)

    seen: list[bool] = []
    with serve(behave) as server, ApiJudge(config(server.url, max_wait_s=2.2)) as judge:
        monkeypatch.setattr(judge._transport._random, "uniform", lambda low, high: low)  # pauses: 1/4, 1/2, 1 s
        [future] = judge.submit([Question("unlucky", ("quality 7",))], RATING)
        number = 0
        while not future.done():
            judge.judge([Question(f"{number}", ("quality 7",))], RATING)
            number += 1
            time.sleep(0.02)
        assert future.result().rating and judge.spent.throttled == 3


def test_an_empty_account_is_said_once():
    behave = lambda body, number: Wrong(429, code="insufficient_quota") if "quality" in str(body) else right(body)
    with serve(behave) as server, ApiJudge(config(server.url, concurrency=1)) as judge:
        futures = judge.submit(ones(20), RATING)
        missing = [entry for future in futures for entry in future.result(timeout=10).missing]
        assert len(missing) == 20 and server.count == 2


@pytest.mark.parametrize("status", [403, 404])
def test_one_forbidden_call_is_not_the_end_of_all(status: int):
    behave = lambda body, number: Wrong(status) if "forbidden" in str(body) else right(body)
    questions = [Question("forbidden", ("quality 7",)), *ones(5)]
    with serve(behave) as server, ApiJudge(config(server.url, concurrency=1)) as judge:
        assert [outcome.rating is None for outcome in judge.judge(questions, RATING)] == [True] + [False] * 5
    with serve(lambda body, number: Wrong(status)) as server, ApiJudge(config(server.url)) as judge:
        assert all(outcome.missing for outcome in judge.judge(ones(5), RATING))
        assert server.count == (2 if status == 403 else 1)  # 403 may have been about the log-probabilities


def test_errors_do_not_shrink_the_concurrency():
    behave = lambda body, number: Wrong(500) if number == 3 else right(body)
    with serve(behave) as server, ApiJudge(config(server.url)) as judge:
        assert judge.judge([Question(f"{i}", ("quality 7",)) for i in range(5)], RATING)[-1].rating
        assert judge.concurrency == 20 and judge.spent.retries == 1


def test_concurrency_is_limited():
    def slow(body: dict[str, Any], number: int) -> Any:
        time.sleep(0.02)
        return right(body)

    with serve(slow) as server, ApiJudge(config(server.url, concurrency=3)) as judge:
        judge.judge(pairs(10), PAIRWISE)
        assert server.most == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"budget_tokens": 3_000},
        {"budget_usd": 0.003, "usd_per_million_prompt": 1.0, "usd_per_million_completion": 2.0},
    ],
)
def test_a_budget_stops_before_it_is_exceeded(settings: dict[str, Any], tmp_path: Path):
    with serve() as server, ApiJudge(config(server.url, **settings), store=tmp_path / "f.sqlite") as judge:
        outcomes = judge.judge(pairs(40), PAIRWISE)
        spent = judge.spent
        assert spent.tokens == server.tokens
    missing = [entry for outcome in outcomes for entry in outcome.missing]
    assert 0 < len(missing) < 80
    assert all(entry.status == "error" and "budget" in entry.raw and "not made" in entry.raw for entry in missing)
    assert spent.tokens <= settings.get("budget_tokens", math.inf) and spent.usd <= settings.get("budget_usd", math.inf)
    assert len(missing) + spent.requests == 81


def test_a_time_budget_ends_even_calls_under_way():
    def slow(body: dict[str, Any], number: int) -> Any:
        if "quality" in str(body):
            time.sleep(0.4)
        return right(body)

    started = time.monotonic()
    with serve(slow) as server, ApiJudge(config(server.url, budget_s=1.0, concurrency=2)) as judge:
        outcomes = judge.judge([Question(f"{i}", ("quality 7",)) for i in range(30)], RATING)
    assert time.monotonic() - started < 3
    answered = sum(outcome.rating is not None for outcome in outcomes)
    assert 1 <= answered <= 6
    assert all("time budget" in entry.raw for outcome in outcomes for entry in outcome.missing)


@pytest.mark.parametrize("settings", [{"budget_s": 1.0}, {"budget_tokens": 800}])
def test_when_a_budget_is_over_no_call_waits_for_the_rate_limit(settings: dict[str, Any]):
    with serve() as server, ApiJudge(config(server.url, requests_per_minute=3, **settings)) as judge:
        futures = judge.submit(ones(30), RATING)
        outcomes = [future.result(timeout=5) for future in futures]
    assert all("budget" in entry.raw for outcome in outcomes for entry in outcome.missing)
    assert 1 <= sum(outcome.rating is not None for outcome in outcomes) <= 2


def test_what_a_budget_refuses_takes_no_room_in_the_rate_limit():
    settings = {"budget_tokens": 800, "requests_per_minute": 100}
    with serve() as server, ApiJudge(config(server.url, **settings)) as judge:
        judge.judge(ones(15), RATING)
        assert len(judge._transport._rate._reservations) == judge.spent.requests == server.count


@pytest.mark.parametrize(("event", "message"), [("hang", "no answer within 0.3 s"), ("reset", "no connection")])
def test_a_call_that_hangs_or_is_cut_is_charged_what_it_may_have_cost(event: str, message: str):
    behave = lambda body, number: Wrong(event=event) if "quality" in str(body) else right(body)
    with serve(behave) as server, ApiJudge(config(server.url, timeout_s=0.3, attempts=1)) as judge:
        [outcome] = judge.judge([ONE], RATING)
        assert message in outcome.missing[0].raw
        assert judge.spent.tokens > 200


def test_a_wrong_key_is_said_once_not_two_thousand_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-123456")
    with (
        serve(lambda body, number: Wrong(401)) as server,
        ApiJudge(config(server.url, key_env="JUDGE_KEY"), store=tmp_path / "f.sqlite") as judge,
    ):
        outcomes = judge.judge(pairs(50), PAIRWISE)
        assert server.count == 1 and server.keys == {"Bearer sk-secret-123456"}
    assert all("status 401" in entry.raw for outcome in outcomes for entry in outcome.missing)
    assert "sk-secret" not in str(outcomes)


def test_no_key_in_logs_even_when_everything_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    key = "sk-secret-7890"
    monkeypatch.setenv("JUDGE_KEY", key)
    caplog.set_level(logging.DEBUG)
    echo = lambda body, number: completion(f"Your key is {key}.") if "quality" in str(body) else right(body)
    with (
        serve(echo) as server,
        ApiJudge(config(server.url, key_env="JUDGE_KEY"), store=tmp_path / "f.sqlite") as judge,
    ):
        [outcome] = judge.judge([ONE], CRITIQUE)
        assert outcome.judgements[0].raw == "Your key is [key]." and server.keys == {f"Bearer {key}"}
    assert caplog.records and key not in caplog.text and key not in f"{outcome}{judge!r}{judge.config}"
    assert not any(key.encode() in path.read_bytes() for path in tmp_path.rglob("*.sqlite*"))


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(UserError, match=r"the package openai: pip install -e '\.\[api\]' in"):
        ApiJudge(config("http://127.0.0.1:1/v1"))
