"""The API judge against a real HTTP server on loopback."""

from __future__ import annotations

import json
import logging
import math
import random
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.api.builtin_templates import CORRECTION, CRITIQUE, PAIRWISE, RATING, REVISION, RUBRIC
from rlaif_jax.feedback.api.cache import CallCache
from rlaif_jax.feedback.api.config import ApiConfig
from rlaif_jax.feedback.api.judge import JudgeClient
from rlaif_jax.feedback.api.templates import Question, parse_template
from rlaif_jax.feedback.records.forms import Comment, Correction, Ranking, Rating
from rlaif_jax.feedback.records.store import Store
from tests.feedback.api_server import BIAS, Wrong, completion, right, serve

pytest.importorskip("openai", reason="the API judge needs the extra: pip install 'rlaif-jax[api]'")
PAIR = Question("Say something.", ("quality 2.0", "quality 1.2"))
ONE = Question("Say something.", ("quality 7",))


def config(url: str, **settings: Any) -> ApiConfig:
    return ApiConfig(**({"server": url, "model": "judge", "timeout_s": 5.0} | settings))


def ones(count: int) -> list[Question]:
    return [Question(f"{i}", ("quality 7",)) for i in range(count)]


def pairs(count: int) -> list[Question]:
    rng = random.Random(0)
    return [Question(f"prompt {i}", tuple(f"quality {rng.uniform(0, 3):.2f}" for _ in range(2))) for i in range(count)]


def test_a_pair_is_asked_in_both_orders_and_its_position_bias_cancels_exactly(tmp_path: Path):
    with serve() as server, JudgeClient(config(server.url), store=tmp_path / "f.sqlite") as judge:
        [outcome] = judge.judge([PAIR], PAIRWISE)
    assert [entry.shown for entry in outcome.judgements] == [(0, 1), (1, 0)]
    found = outcome.preference
    assert (found is not None and found.consistent is False) or found.probability > 0.5
    # A label that was not shown (C, a tie) has what little is left over: nearly nothing here.
    assert found.probability == pytest.approx(1 / (1 + math.exp(-0.8)), abs=1e-6)
    assert found.bias == pytest.approx(BIAS, abs=1e-6)
    first, second = outcome.judgements
    assert first.label_mass == pytest.approx(0.9)
    assert sum(first.probabilities) == pytest.approx(1)
    assert first.rater.model == "judge" and first.rater.source == "ai" and first.rater.prompt_hash == PAIRWISE.hash
    assert first.call.prompt_tokens > 0 and first.call.latency_s > 0
    with Store(tmp_path / "f.sqlite") as store:
        assert store.judgements() == [first, second] or store.judgements() == [second, first]


def test_without_logprobs_reasons_come_first_and_the_verdict_is_read(tmp_path: Path):
    with (
        serve(lambda body, number: right(body, logprobs=False)) as server,
        JudgeClient(config(server.url), store=tmp_path / "f.sqlite") as judge,
    ):
        [outcome] = judge.judge([PAIR], PAIRWISE)
        assert "[reasons]" not in server.requests[-1]["messages"][-1]["content"]
    assert all(entry.probability is None and entry.ranks for entry in outcome.judgements)
    assert "Both say something." in outcome.judgements[0].raw
    assert outcome.preference.bias is None


def test_every_form():
    question = Question("Say it.", ("quality 7",), rubric="5 = fine", critique="too short")
    with serve() as server, JudgeClient(config(server.url)) as judge:
        rating, rubric, comment, revision, correction = (
            judge.judge([question], template)[0].judgements[0]
            for template in (RATING, RUBRIC, CRITIQUE, REVISION, CORRECTION)
        )
    assert isinstance(rating, Rating) and rating.value == pytest.approx(7, abs=1e-6) and rating.high == 10
    assert isinstance(rubric, Rating) and rubric.status == "abstained"  # G is no letter of five
    assert isinstance(comment, Comment) and comment.text == "It has a quality of 7.0."
    assert isinstance(revision, Correction) and revision.edited == "better 7.0"
    assert isinstance(correction, Correction) and correction.edited == "better 7.0"


def test_what_a_server_can_do_is_asked_once_and_remembered(tmp_path: Path):
    settings = {"cache": tmp_path / "calls.sqlite"}
    with serve() as server:
        for question in (ONE, PAIR):
            with JudgeClient(config(server.url, **settings)) as judge:
                judge.judge([question], RATING if question is ONE else PAIRWISE)
        assert [body["messages"][-1]["content"] for body in server.requests].count("Reply with the letter A.") == 1
        assert server.count == 4


@pytest.mark.parametrize("limit", [5, 0])
def test_fewer_or_no_logprobs_than_asked_for(limit: int):
    def behave(body: dict[str, Any], number: int) -> Any:
        return Wrong(400) if body.get("top_logprobs", 0) > limit or (limit == 0 and "logprobs" in body) else right(body)

    with serve(behave) as server, JudgeClient(config(server.url)) as judge:
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
        with JudgeClient(config(server.url)) as judge:
            assert judge.judge([ONE], RATING)[0].rating == pytest.approx(7)


def low_mass(body: dict[str, Any], number: int) -> Any:
    if "structured_outputs" in body:
        return completion("A", top=[("A", 0.6), ("B", 0.4)])
    if "quality" in body["messages"][-1]["content"]:
        return completion("Well", top=[("Well", 0.9), ("A", 0.06), ("B", 0.04)])
    return right(body)


def test_little_label_mass_is_asked_again_with_a_choice_then_abstained():
    with serve(low_mass) as server, JudgeClient(config(server.url)) as judge:
        [outcome] = judge.judge([PAIR], PAIRWISE)
        assert server.requests[-1]["structured_outputs"] == {"choice": ["A", "B", "C"]}
    assert outcome.judgements[0].answered and outcome.judgements[0].call.completion_tokens == 2
    ignores = lambda body, number: low_mass({k: v for k, v in body.items() if k != "structured_outputs"}, number)
    with serve(ignores) as server, JudgeClient(config(server.url)) as judge:
        [outcome] = judge.judge([PAIR], PAIRWISE)
    assert [entry.status for entry in outcome.judgements] == ["abstained"] * 2
    assert outcome.judgements[0].label_mass == pytest.approx(0.1)
    assert outcome.preference is None


def test_a_second_run_makes_no_call_and_records_nothing_twice(tmp_path: Path):
    store = tmp_path / "f.sqlite"
    with serve() as server:
        for _ in range(2):
            with JudgeClient(config(server.url), store=store) as judge:
                outcomes = judge.judge(pairs(20), PAIRWISE)
                assert not any(outcome.missing for outcome in outcomes)
        assert server.count == 41  # and one to see what the server can do
    with Store(store) as feedback:
        assert len(feedback) == 40


def test_the_same_question_is_asked_once_while_it_is_under_way():
    def slow(body: dict[str, Any], number: int) -> Any:
        time.sleep(0.05)
        return right(body)

    with serve(slow) as server, JudgeClient(config(server.url)) as judge:
        futures = judge.submit([ONE] * 10, RATING) + judge.submit([ONE], RATING)
        assert [future.result().rating for future in futures] == [pytest.approx(7)] * 11
        assert server.count == 2


def test_two_answers_of_the_same_words_are_two_orders(tmp_path: Path):
    with serve() as server, JudgeClient(config(server.url), store=tmp_path / "f.sqlite") as judge:
        [outcome] = judge.judge([Question("Say it.", ("quality 2", "quality 2"))], PAIRWISE)
    assert outcome.preference.probability == pytest.approx(0.5)
    with Store(tmp_path / "f.sqlite") as store:
        assert sorted(entry.shown for entry in store.judgements()) == [(0, 1), (1, 0)]


def test_a_reply_is_read_anew_without_a_call_and_supersedes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from rlaif_jax.feedback.api import judge as client

    with serve() as server:
        with JudgeClient(config(server.url), store=tmp_path / "f.sqlite") as judge:
            [old] = judge.judge([ONE], RATING)
        calls, read = server.count, client.read_verdict
        monkeypatch.setattr(client, "read_verdict", lambda *a, **k: read(*a, **k)._replace(value=3.0))
        for _ in range(2):
            with JudgeClient(config(server.url), store=tmp_path / "f.sqlite") as judge:
                [new] = judge.judge([ONE], RATING)
        assert server.count == calls
    with Store(tmp_path / "f.sqlite") as store:
        assert [entry.value for entry in store.judgements()] == [3.0] and len(store) == 2
    assert new.judgements[0].supersedes == old.judgements[0].id


def test_a_missing_judgement_is_recorded_asked_again_and_superseded(tmp_path: Path):
    store = tmp_path / "f.sqlite"
    down = [True]
    behave = lambda body, number: Wrong(500) if down[0] and "quality" in str(body) else right(body)
    with serve(behave) as server:
        settings = {"attempts": 2, "max_wait_s": 3.0}
        with JudgeClient(config(server.url, **settings), store=store) as judge:
            [outcome] = judge.judge([ONE], RATING)
        [missing] = outcome.missing
        assert missing.status == "error" and "status 500" in missing.raw and "2 attempts" in missing.raw
        assert outcome.rating is None
        down[0] = False
        with JudgeClient(config(server.url, **settings), store=store) as judge:
            [outcome] = judge.judge([ONE], RATING)
    with Store(store) as feedback:
        [entry] = feedback.judgements()
        assert entry.answered and entry.supersedes == missing.id


def test_retry_after_is_honoured_and_429_shrinks_the_concurrency():
    throttled_at: list[float] = []

    def behave(body: dict[str, Any], number: int) -> Any:
        if number == 5:
            throttled_at.append(time.monotonic())
            return Wrong(429, Retry_After="1")
        time.sleep(0.1)
        return right(body)

    with serve(behave) as server, JudgeClient(config(server.url, concurrency=5)) as judge:
        outcomes = judge.judge([Question(f"{i}", ("quality 7",)) for i in range(20)], RATING)
        assert judge.concurrency == 4 and judge.spent.throttled == 1
    assert all(outcome.rating for outcome in outcomes)
    # Not only the call that was told: all of them wait.
    assert [at for at in server.times if throttled_at[0] + 0.3 < at < throttled_at[0] + 1.0] == []
    assert len([at for at in server.times if at >= throttled_at[0] + 1.0]) > 8


@pytest.mark.parametrize("settings", [{"max_wait_s": 2.0}, {"budget_s": 3.0}])
def test_a_server_that_wants_a_longer_pause_than_allowed_stops_the_others_too(settings: dict[str, float]):
    behave = lambda body, number: Wrong(429, Retry_After="200") if "quality" in str(body) else right(body)
    with serve(behave) as server, JudgeClient(config(server.url, concurrency=2, **settings)) as judge:
        futures = judge.submit(ones(20), RATING)
        missing = [entry for future in futures for entry in future.result(timeout=6).missing]
        assert len(missing) == 20 and server.count <= 3
        assert any("the server wants no call for" in entry.raw for entry in missing)


def test_throttling_without_retry_after_backs_off_and_ends():
    behave = lambda body, number: Wrong(429) if "quality" in str(body) else right(body)
    with serve(behave) as server, JudgeClient(config(server.url, max_wait_s=2.0)) as judge:
        futures = judge.submit([ONE], RATING)
        [missing] = futures[0].result(timeout=10).missing
        assert "status 429" in missing.raw and 3 <= server.count <= 7  # not a dozen


def test_throttling_of_all_ends_by_the_clock_though_calls_queue():
    def behave(body: dict[str, Any], number: int) -> Any:
        if "quality" not in str(body):
            return right(body)
        time.sleep(0.04)
        return Wrong(429)

    with serve(behave) as server, JudgeClient(config(server.url, max_wait_s=2.0, concurrency=1)) as judge:
        futures = judge.submit(ones(60), RATING)  # over 2.4 s for one attempt each
        assert all(future.result(timeout=30).missing for future in futures)
        assert server.count <= 150  # by their pauses alone they might make three attempts each


def test_throttling_of_one_while_others_are_answered_counts_its_pauses(monkeypatch: pytest.MonkeyPatch):
    def behave(body: dict[str, Any], number: int) -> Any:
        seen.append("unlucky" in str(body))
        return Wrong(429, wait=0.5) if seen[-1] and sum(seen) <= 3 else right(body)

    seen: list[bool] = []
    with serve(behave) as server, JudgeClient(config(server.url, max_wait_s=2.2)) as judge:
        monkeypatch.setattr(judge._server._random, "uniform", lambda low, high: low)  # pauses: 1/4, 1/2, 1 s
        [future] = judge.submit([Question("unlucky", ("quality 7",))], RATING)
        number = 0
        while not future.done():
            judge.judge([Question(f"{number}", ("quality 7",))], RATING)
            number += 1
            time.sleep(0.02)
        assert future.result().rating and judge.spent.throttled == 3


def test_an_empty_account_is_said_once():
    behave = lambda body, number: Wrong(429, code="insufficient_quota") if "quality" in str(body) else right(body)
    with serve(behave) as server, JudgeClient(config(server.url, concurrency=1)) as judge:
        futures = judge.submit(ones(20), RATING)
        missing = [entry for future in futures for entry in future.result(timeout=10).missing]
        assert len(missing) == 20 and server.count == 2


@pytest.mark.parametrize("status", [403, 404])
def test_one_forbidden_call_is_not_the_end_of_all(status: int):
    behave = lambda body, number: Wrong(status) if "forbidden" in str(body) else right(body)
    questions = [Question("forbidden", ("quality 7",)), *ones(5)]
    with serve(behave) as server, JudgeClient(config(server.url, concurrency=1)) as judge:
        assert [outcome.rating is None for outcome in judge.judge(questions, RATING)] == [True] + [False] * 5
    with serve(lambda body, number: Wrong(status)) as server, JudgeClient(config(server.url)) as judge:
        assert all(outcome.missing for outcome in judge.judge(ones(5), RATING)) and server.count == 1


def test_what_is_wrong_with_one_question_or_reply_is_an_error_of_that_one(tmp_path: Path):
    def behave(body: dict[str, Any], number: int) -> Any:
        good = right(body)
        if "nan" in str(body):
            for top in good["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                top["logprob"] = math.nan
        return good

    questions = [Question("half \ud83d", ("quality 7",)), Question("nan", ("quality 7",)), ONE]
    with serve(behave) as server, JudgeClient(config(server.url), store=tmp_path / "f.sqlite") as judge:
        half, nan, one = judge.judge(questions, RATING)
    assert [entry.status for entry in (*half.missing, *nan.missing)] == ["error", "error"]
    assert "surrogates not allowed" in half.missing[0].raw and "nan" in nan.missing[0].raw
    assert one.rating == pytest.approx(7, abs=1e-6)


def test_a_cache_that_fails_is_an_error_without_the_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-555")

    def fails(self: CallCache, request: dict[str, Any]) -> None:
        raise sqlite3.OperationalError("disk I/O error at sk-secret-555")

    monkeypatch.setattr(CallCache, "get", fails)
    with serve() as server, JudgeClient(config(server.url, key_env="JUDGE_KEY")) as judge:
        [missing] = judge.judge([ONE], RATING)[0].missing
    assert missing.status == "error" and missing.raw == "disk I/O error at [key]"


def test_a_placeholder_of_one_ending():
    text = """form: rating
labels: A = 1, B = 2
verdict: Score {nonce}: {label}
[user]
{prompt} {answer}
[direct]
{rubric} Reply with A or B.
[reasons]
Give reasons, then say Score {nonce}: LETTER
"""
    template = parse_template(text, "mine")
    question = Question("p", ("quality 2",), where="items:3")
    with (
        serve() as server,
        JudgeClient(config(server.url, reading="direct")) as judge,
        pytest.raises(UserError, match=r"items:3: .* asks for \{rubric\}"),
    ):
        judge.submit([question], template)
    with serve() as server, JudgeClient(config(server.url, reading="reasons")) as judge:
        assert judge.judge([question], template)[0].rating == 2
    with serve() as server, JudgeClient(config(server.url)) as judge:  # the server's log-probabilities decide
        [missing] = judge.judge([question], template)[0].missing
        assert missing.status == "error" and "asks for {rubric}" in missing.raw


def test_two_judges_on_one_store_record_the_same_once(tmp_path: Path):
    store = tmp_path / "f.sqlite"
    down = [True]
    behave = lambda body, number: Wrong(400) if down[0] and "quality" in str(body) else right(body)
    with (
        serve(behave) as server,
        JudgeClient(config(server.url, attempts=1), store=store) as one,
        JudgeClient(config(server.url, attempts=1), store=store) as other,
    ):
        missing = [judge.judge([PAIR], PAIRWISE)[0].missing for judge in (one, other)]
        down[0] = False
        found = [judge.judge([PAIR], PAIRWISE)[0].judgements for judge in (one, other)]
    assert missing[0] == missing[1] and found[0] == found[1]
    with Store(store) as feedback:
        assert len(feedback) == 4 and len(feedback.judgements()) == 2


def test_errors_do_not_shrink_the_concurrency():
    behave = lambda body, number: Wrong(500) if number == 3 else right(body)
    with serve(behave) as server, JudgeClient(config(server.url)) as judge:
        assert judge.judge([Question(f"{i}", ("quality 7",)) for i in range(5)], RATING)[-1].rating
        assert judge.concurrency == 20 and judge.spent.retries == 1


def test_concurrency_is_limited():
    def slow(body: dict[str, Any], number: int) -> Any:
        time.sleep(0.02)
        return right(body)

    with serve(slow) as server, JudgeClient(config(server.url, concurrency=3)) as judge:
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
    with serve() as server, JudgeClient(config(server.url, **settings), store=tmp_path / "f.sqlite") as judge:
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
    with serve(slow) as server, JudgeClient(config(server.url, budget_s=1.0, concurrency=2)) as judge:
        outcomes = judge.judge([Question(f"{i}", ("quality 7",)) for i in range(30)], RATING)
    assert time.monotonic() - started < 3
    answered = sum(outcome.rating is not None for outcome in outcomes)
    assert 1 <= answered <= 6
    assert all("time budget" in entry.raw for outcome in outcomes for entry in outcome.missing)


@pytest.mark.parametrize("settings", [{"budget_s": 1.0}, {"budget_tokens": 800}])
def test_when_a_budget_is_over_no_call_waits_for_the_window(settings: dict[str, Any]):
    with serve() as server, JudgeClient(config(server.url, requests_per_minute=3, **settings)) as judge:
        futures = judge.submit(ones(30), RATING)
        outcomes = [future.result(timeout=5) for future in futures]
    assert all("budget" in entry.raw for outcome in outcomes for entry in outcome.missing)
    assert 1 <= sum(outcome.rating is not None for outcome in outcomes) <= 2


def test_what_a_budget_refuses_takes_no_room_in_the_window():
    settings = {"budget_tokens": 800, "requests_per_minute": 100}
    with serve() as server, JudgeClient(config(server.url, **settings)) as judge:
        judge.judge(ones(15), RATING)
        assert len(judge._server._window._uses) == judge.spent.requests == server.count


@pytest.mark.parametrize(("event", "told"), [("hang", "no answer within 0.3 s"), ("reset", "no connection")])
def test_a_call_that_hangs_or_is_cut_is_charged_what_it_may_have_cost(event: str, told: str):
    behave = lambda body, number: Wrong(event=event) if "quality" in str(body) else right(body)
    with serve(behave) as server, JudgeClient(config(server.url, timeout_s=0.3, attempts=1)) as judge:
        [outcome] = judge.judge([ONE], RATING)
        assert told in outcome.missing[0].raw
        assert judge.spent.tokens > 200


def test_a_wrong_key_is_said_once_not_two_thousand_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-123456")
    with (
        serve(lambda body, number: Wrong(401)) as server,
        JudgeClient(config(server.url, key_env="JUDGE_KEY"), store=tmp_path / "f.sqlite") as judge,
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
        JudgeClient(config(server.url, key_env="JUDGE_KEY"), store=tmp_path / "f.sqlite") as judge,
    ):
        [outcome] = judge.judge([ONE], CRITIQUE)
        assert outcome.judgements[0].raw == "Your key is [key]." and server.keys == {f"Bearer {key}"}
    assert caplog.records and key not in caplog.text and key not in f"{outcome}{judge!r}{judge.config}"
    assert not any(key.encode() in path.read_bytes() for path in tmp_path.rglob("*.sqlite*"))


def test_a_server_that_cannot_be_told_to_choose_is_told_once(tmp_path: Path):
    refuses = lambda body, number: Wrong(400) if "structured_outputs" in body else low_mass(body, number)
    with serve(refuses) as server:
        for expected in (4, 0):  # one to see what it can do, two orders, one of them told to choose
            calls = server.count
            with JudgeClient(config(server.url, concurrency=1), store=tmp_path / "f.sqlite") as judge:
                [outcome] = judge.judge([PAIR], PAIRWISE)
            assert {entry.status for entry in outcome.judgements} == {"abstained"}
            assert expected <= server.count - calls <= expected + (expected > 0)


def test_a_refusal_is_a_refusal_and_not_kept():
    behave = lambda body, number: (
        completion(None, refusal="I will not.") if "quality" in str(body) else right(body)  # type: ignore[arg-type]
    )
    with serve(behave) as server, JudgeClient(config(server.url)) as judge:
        assert [judge.judge([ONE], RATING)[0].missing[0].status for _ in range(2)] == ["refused"] * 2
        assert server.count == 3


def test_it_works_beside_the_caller():
    def slow(body: dict[str, Any], number: int) -> Any:
        time.sleep(0.1)
        return right(body)

    with serve(slow) as server, JudgeClient(config(server.url)) as judge:
        started = time.monotonic()
        futures = judge.submit([Question(f"{i}", ("quality 7",)) for i in range(20)], RATING)
        assert time.monotonic() - started < 0.08
        assert not any(future.done() for future in futures)
        assert all(future.result(timeout=5).rating for future in futures)


def test_closing_leaves_no_thread_and_keeps_what_was_answered(tmp_path: Path):
    before = threading.active_count()
    hang = lambda body, number: right(body) if number < 5 else Wrong(event="hang")
    with serve(hang) as server:
        running = threading.active_count()
        judge = JudgeClient(config(server.url), store=tmp_path / "f.sqlite")
        futures = judge.submit([Question(f"{i}", ("quality 7",)) for i in range(30)], RATING)
        time.sleep(0.5)
        judge.close()
        judge.close()
        assert sum(future.cancelled() for future in futures) == 26
        assert threading.active_count() <= running + 31  # the server's own are still there
    assert "judge" not in {thread.name for thread in threading.enumerate()} and before
    with Store(tmp_path / "f.sqlite") as store:
        assert len(store) == 4


def test_bad_settings(monkeypatch: pytest.MonkeyPatch):
    for settings, told in (
        ({"server": "localhost:8000"}, "http://"),
        ({"server": "https://me:key@host/v1"}, "environment variable"),
        ({"budget_usd": 1.0}, "prices"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"min_mass": 2.0}, "min_mass"),
    ):
        with pytest.raises(UserError, match=told):
            config("http://127.0.0.1:1", **settings)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(UserError, match="NO_SUCH_KEY is not set"):
        JudgeClient(config("http://127.0.0.1:1/v1", key_env="NO_SUCH_KEY"))
    with pytest.raises(UserError, match="model is missing"):
        JudgeClient(ApiConfig(server="http://127.0.0.1:1/v1"))
    with serve() as server, JudgeClient(config(server.url)) as judge:
        with pytest.raises(UserError, match=r"items:3: a ranking is of 2 answers, not 1"):
            judge.submit([Question("p", ("a",), where="items:3")], PAIRWISE)
        with pytest.raises(UserError, match=r"asks for \{rubric\}"):
            judge.submit([ONE], RUBRIC)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install \"rlaif-jax\[api\]\""):
        JudgeClient(config("http://127.0.0.1:1/v1"))


@pytest.mark.slow
def test_two_thousand_judgements_through_every_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Right, slow, 429 + Retry-After, 500, hang, reset, cut JSON, wrong schema, prose; then a second and a third run."""
    key = "sk-live-very-secret-0123456789"
    monkeypatch.setenv("JUDGE_KEY", key)
    caplog.set_level(logging.INFO)
    rng, lock = random.Random(1), threading.Lock()
    calm = [False]
    seen: dict[str, int] = {}

    def behave(body: dict[str, Any], number: int) -> Any:
        good = right(body)
        text = body["messages"][-1]["content"]
        if calm[0] or "quality" not in text:
            return good
        if "cursed" in text:  # never answered
            return Wrong(503)
        if "prosaic" in text:
            return completion("Both answers have their merits.", prompt_tokens=20, completion_tokens=6)
        with lock:
            trouble = rng.choices(
                ["", "slow", "429", "500", "hang", "reset", "cut", "schema"], [86, 4, 1.5, 2, 0.5, 2, 2, 2]
            )[0]
            seen[trouble] = seen.get(trouble, 0) + 1
        if trouble == "cut":
            return json.dumps(good).encode()[:-40]
        if trouble == "schema":
            return {"result": "A"}
        if trouble == "slow":
            time.sleep(0.2)
            return good
        ways = {"429": Wrong(429, Retry_After="0.2"), "500": Wrong(500), "hang": Wrong(event="hang")}
        return good if not trouble else ways.get(trouble, Wrong(event="reset"))

    names = ["cursed"] * 5 + ["prosaic"] * 5 + ["plain"] * 990
    questions = [
        Question(f"{name} {i}", pair.answers) for i, (name, pair) in enumerate(zip(names, pairs(1000), strict=True))
    ]
    budget = {
        "budget_tokens": 1_200_000,
        "budget_usd": 2.0,
        "usd_per_million_prompt": 1.0,
        "usd_per_million_completion": 1.0,
    }
    with serve(behave) as server:
        settings = budget | {"key_env": "JUDGE_KEY", "timeout_s": 1.0, "attempts": 4, "constrain": "none"}
        with JudgeClient(config(server.url, **settings), store=tmp_path / "f.sqlite") as judge:
            outcomes = judge.judge(questions, PAIRWISE)
            spent = judge.spent
        assert set(seen) == {"", "slow", "429", "500", "hang", "reset", "cut", "schema"}
        entries = [entry for outcome in outcomes for entry in outcome.judgements]
        assert len(entries) == 2000
        for entry in entries:
            assert isinstance(entry, Ranking)
            if entry.answered:  # and right
                q = [float(a.split()[1]) for a in entry.answers]
                sign = 1 if entry.shown == (0, 1) else -1
                assert entry.probability == pytest.approx(1 / (1 + math.exp(-(q[0] - q[1] + sign * BIAS))), abs=1e-5)
        missing = [entry for entry in entries if not entry.answered]
        errors = [entry for entry in missing if entry.prompt.startswith("cursed")]
        assert len(errors) == 10 and all(entry.status == "error" and "status 503" in entry.raw for entry in errors)
        prose = [entry for entry in missing if entry.prompt.startswith("prosaic")]
        assert len(prose) == 10 and {entry.status for entry in prose} == {"unparsed"}
        assert len(missing) <= 25  # four attempts are nearly always enough
        assert spent.tokens <= 1_200_000 and spent.usd <= 2.0 and server.tokens <= spent.tokens
        with Store(tmp_path / "f.sqlite") as store:
            assert {e.id for e in store.judgements()} == {e.id for e in entries} and len(store) == 2000

        calm[0] = True
        for expected in (len([e for e in missing if e.status == "error"]), 0):
            calls = server.count
            with JudgeClient(
                config(server.url, **settings | {"timeout_s": 60.0}), store=tmp_path / "f.sqlite"
            ) as judge:
                outcomes = judge.judge(questions, PAIRWISE)
            assert server.count - calls == expected
            assert sum(len(outcome.missing) for outcome in outcomes) == len(prose)
        with Store(tmp_path / "f.sqlite") as store:
            now = store.judgements()
            assert len(now) == 2000 and len({(e.item, e.shown) for e in now}) == 2000
    for path in tmp_path.rglob("*"):
        assert key.encode() not in path.read_bytes(), path
    assert key not in caplog.text and key not in str(outcomes) and key not in repr(judge)
