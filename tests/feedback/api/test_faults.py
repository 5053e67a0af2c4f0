"""Faults that users of judges behind an API have reported: reasoning models, cut replies, dead servers, full disks, costs."""

from __future__ import annotations

import re
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from rlaif_jax.feedback.api.builtin_templates import CORRECTION, CRITIQUE, PAIRWISE, RATING
from rlaif_jax.feedback.api.cache import CallCache
from rlaif_jax.feedback.api.command import summarise_outcomes
from rlaif_jax.feedback.api.judge import ApiJudge
from rlaif_jax.feedback.api.templates import Question
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.quality.quality import quality
from tests.feedback.api.questions import ONE, PAIR, config, low_mass, ones
from tests.feedback.api_server import Wrong, completion, right, serve

pytest.importorskip("openai", reason="the API judge needs the extra: pip install -e '.[api]'")
PRICES = {"usd_per_million_prompt": 1000.0, "usd_per_million_completion": 1000.0}


def judged(behave: Any, store: Path | None = None, **settings: Any) -> tuple[int, str, list[dict[str, Any]]]:
    """(how many of the two judgements of one pair have a value, the tool's summary, the requests)."""
    with serve(behave) as server:
        fixed = {"attempts": 2, "max_wait_s": 3.0}
        with ApiJudge(config(server.url, **(fixed | settings)), store=store) as judge:
            outcomes = judge.judge([Question("Name a moor.", ("quality 2", "quality 1"))], PAIRWISE)
            summary = summarise_outcomes(outcomes, judge.spent)
        return sum(entry.answered for o in outcomes for entry in o.judgements), summary, server.requests


def limit(body: dict[str, Any]) -> int:
    return body.get("max_tokens") or body["max_completion_tokens"]


@pytest.mark.parametrize("settings", [{}, {"reading": "reasons", "temperature": 1.0}])
@pytest.mark.parametrize("refusal", [400, 403])
def test_a_reasoning_model_without_log_probabilities(refusal: int, settings: dict[str, Any]):
    def behave(body: dict[str, Any], number: int) -> Any:
        refuse = lambda status, message: Wrong(status, body={"error": {"message": message}})
        if "max_tokens" in body:
            return refuse(400, "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.")
        if body.get("logprobs"):
            return refuse(refusal, "You are not allowed to request logprobs from this model")
        if body.get("temperature", 1) != 1:
            return refuse(400, "'temperature' does not support this value with this model. Only the default (1) is.")
        if limit(body) < 16:
            return refuse(400, "Could not finish the message because max_tokens was reached. Try higher max_tokens.")
        return right(body, logprobs=False)

    answered, summary, requests = judged(behave, **settings)
    assert answered == 2 and len(requests) <= 6, summary
    assert ("does not take temperature" in summary) == (not settings)


@pytest.mark.parametrize("where", ["tags", "reasoning_content"])
@pytest.mark.parametrize("reading", ["auto", "direct", "reasons"])
def test_a_model_that_thinks_before_it_speaks(where: str, reading: str):
    def behave(body: dict[str, Any], number: int) -> Any:
        made = right(body, logprobs=False)
        message = made["choices"][0]["message"]
        said, short = message["content"], limit(body) < 100
        if where == "tags":
            message["content"] = "<think>Which is" if short else f"<think>Which is better? B?</think>\n{said}"
        else:
            message |= {"content": None if short else said, "reasoning_content": "Which is"}
        if short:
            made["choices"][0]["finish_reason"] = "length"
        if body.get("logprobs"):
            top = [{"token": "<think>", "logprob": -0.03, "bytes": None}]
            made["choices"][0]["logprobs"] = {"content": [{"token": "<think>", "logprob": -0.03, "top_logprobs": top}]}
        return made

    answered, summary, _ = judged(behave, reading=reading)
    assert answered == 2, summary


def test_a_model_that_begins_to_think_at_some_questions_only():
    def behave(body: dict[str, Any], number: int) -> Any:
        made = right(body)
        if "quality" in str(body):
            made["choices"][0]["message"]["content"] = f"<think>Hm</think>{made['choices'][0]['message']['content']}"
            if limit(body) < 100:
                top = [{"token": "<think>", "logprob": -0.01}]
                made["choices"][0] = {
                    "message": {"content": "<think>"},
                    "finish_reason": "length",
                    "logprobs": {"content": [{"token": "<think>", "top_logprobs": top}]},
                }
        return made

    assert judged(behave)[0] == 2


def test_a_reply_that_was_cut_says_so():
    cut = completion("The first answer names a moor, and the second") | {}
    cut["choices"][0]["finish_reason"] = "length"
    silent = completion("", reasoning_content="So")
    silent["choices"][0]["finish_reason"] = "length"
    for reply in (cut, silent):
        behave = lambda body, number, reply=reply: right(body, logprobs=False) if number == 0 else reply
        answered, summary, _ = judged(behave)
        assert answered == 0 and re.search(r"cut at max_tokens = \d+ \(--max-tokens raises the limit\)", summary), (
            summary
        )


def test_what_could_not_be_read_is_asked_again_in_the_next_run_and_a_better_parser_needs_no_call(tmp_path: Path):
    store = tmp_path / "f.sqlite"
    vague = lambda body, number: right(body, logprobs=False) if number == 0 else completion("Hm.")
    clear = lambda body, number: right(body, logprobs=False)
    behaviour = [vague, clear, lambda body, number: Wrong(500)]
    asked, answered = [], []
    with serve(lambda body, number: behaviour[0](body, number)) as server:
        for _ in range(3):
            before = server.count
            with ApiJudge(config(server.url, attempts=1), store=store) as judge:
                [outcome] = judge.judge([PAIR], PAIRWISE)
            asked.append(server.count - before)
            answered.append(2 - len(outcome.missing))
            del behaviour[0]
    assert asked == [3, 2, 0] and answered == [0, 2, 2]


def test_an_explicit_setting_wins_over_what_is_remembered(tmp_path: Path):
    cache = tmp_path / "calls.sqlite"
    with serve() as server:
        for settings in ({"top_logprobs": 1}, {"top_logprobs": 20, "token_field": "max_completion_tokens"}, {}):
            with ApiJudge(config(server.url, cache=cache, **settings)) as judge:
                judge.judge([PAIR], PAIRWISE)
            assert server.requests[-1]["top_logprobs"] == settings.get("top_logprobs", 20)
            assert settings.get("token_field", "max_tokens") in server.requests[-1]


def test_what_is_known_of_the_chat_api_is_not_taken_for_the_other(tmp_path: Path):
    def behave(body: dict[str, Any], number: int) -> Any:
        if "messages" in body:
            return right(body)
        if body.get("logprobs", 0) > 5:
            return Wrong(400)
        logprobs = {"tokens": ["A"], "top_logprobs": [{"A": -0.1, "B": -3}]}
        return {"choices": [{"text": "A", "finish_reason": "length", "logprobs": logprobs}]}

    with serve(behave) as server:
        for api in ("chat", "completion"):
            with ApiJudge(config(server.url, cache=tmp_path / "calls.sqlite", api=api)) as judge:
                assert not judge.judge([PAIR], PAIRWISE)[0].missing


def test_a_server_that_has_changed_since_it_was_remembered(tmp_path: Path):
    """It gave log-probabilities; now it refuses them, by name."""
    refuse = Wrong(400, body={"error": {"message": "logprobs are not supported"}})
    behaviours = [
        lambda body: right(body),
        lambda body: refuse if body.get("logprobs") else right(body, logprobs=False),
    ]
    with serve(lambda body, number: behaviours[0](body)) as server:
        for question in (PAIR, Question("Another.", PAIR.answers)):
            with ApiJudge(config(server.url, cache=tmp_path / "calls.sqlite")) as judge:
                assert not judge.judge([question], PAIRWISE)[0].missing
            del behaviours[:-1]


@pytest.mark.parametrize("concurrency", [1, 20])
def test_a_full_disk_under_the_cache_throws_no_paid_reply_away(
    concurrency: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(self: CallCache, *arguments: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(CallCache, "put", full)
    with (
        serve() as server,
        ApiJudge(config(server.url, concurrency=concurrency), store=tmp_path / "f.sqlite") as judge,
    ):
        outcomes = judge.judge(ones(10), RATING)
        assert sum(not outcome.missing for outcome in outcomes) == server.count - 1 >= 1
        assert concurrency == 20 or server.count <= 3  # it does not go on paying
        summary = summarise_outcomes(outcomes, judge.spent)
    assert "note: the cache" in summary and "disk is full" in summary
    assert all("disk is full" in entry.raw for outcome in outcomes for entry in outcome.missing)


def test_a_full_disk_at_the_first_call_is_not_asked_again_and_again(monkeypatch: pytest.MonkeyPatch):
    def full(self: CallCache, *arguments: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(CallCache, "put_capabilities", full)
    with serve() as server, ApiJudge(config(server.url)) as judge:
        outcomes = judge.judge(ones(10), RATING)
        assert server.count == 1 and all("disk is full" in o.missing[0].raw for o in outcomes)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_one_forbidden_question_of_a_known_server_does_not_stop_the_others(status: int, tmp_path: Path):
    behave = lambda body, number: Wrong(status) if "flagged" in str(body) else right(body)
    questions = [Question("flagged", ONE.answers), *ones(5)]
    with serve(behave) as server:
        for asked in ([ONE], questions):
            with ApiJudge(config(server.url, cache=tmp_path / "calls.sqlite", concurrency=1)) as judge:
                outcomes = judge.judge(asked, RATING)
    assert [bool(outcome.missing) for outcome in outcomes] == [True] + [False] * 5


def test_a_key_that_is_revoked_stops_a_known_servers_calls(tmp_path: Path):
    good = [True]
    with serve(lambda body, number: right(body) if good[0] else Wrong(403)) as server:
        for asked in ([ONE], ones(50)):
            before = server.count
            with ApiJudge(config(server.url, cache=tmp_path / "calls.sqlite", concurrency=4)) as judge:
                outcomes = judge.judge(asked, RATING)
            good[0] = False
        assert server.count - before <= 3 * 4 and all("status 403" in outcome.missing[0].raw for outcome in outcomes)


@pytest.mark.parametrize("dead", [Wrong(500), Wrong(event="reset")], ids=["500", "reset"])
def test_a_dead_server_is_not_asked_for_every_question_and_found_again(
    dead: Wrong, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from rlaif_jax.feedback.api import transport

    monkeypatch.setattr(transport, "CHECK_AGAIN_S", 0.5)
    alive = [True]
    settings = {"cache": tmp_path / "calls.sqlite", "attempts": 2, "concurrency": 8}
    behave = lambda body, number: right(body) if alive[0] else dead
    with serve(behave) as server, ApiJudge(config(server.url, **settings)) as judge:
        judge.judge([ONE], RATING)
        alive[0] = False
        before = server.count
        outcomes = judge.judge(ones(300), RATING)
        assert all(outcome.missing for outcome in outcomes) and server.count - before <= 4 * 8
        assert "answered none of the last calls, so this one was not made" in outcomes[-1].missing[0].raw
        alive[0] = True
        time.sleep(0.6)
        assert not any(outcome.missing for outcome in judge.judge(ones(20), RATING))


def test_a_server_that_is_down_for_a_moment_loses_nothing(tmp_path: Path):
    alive = [True]
    settings = {"cache": tmp_path / "calls.sqlite", "attempts": 6, "concurrency": 8}
    with (
        serve(lambda body, number: right(body) if alive[0] else Wrong(503)) as server,
        ApiJudge(config(server.url, **settings)) as judge,
    ):
        judge.judge([ONE], RATING)
        alive[0] = False
        futures = judge.submit(ones(100), RATING)
        time.sleep(0.5)
        alive[0] = True
        assert all(future.result(timeout=30).rating for future in futures)
        assert server.count <= 100 + 4 * 8


def test_questions_that_always_fail_do_not_look_like_a_dead_server():
    behave = lambda body, number: Wrong(503) if "cursed" in str(body) else right(body)
    cursed = [Question(f"cursed {i}", ONE.answers) for i in range(8)]
    with serve(behave) as server, ApiJudge(config(server.url, attempts=1, concurrency=1)) as judge:
        assert not judge.judge([ONE], RATING)[0].missing
        assert all(outcome.missing for outcome in judge.judge(cursed, RATING))  # more in a row than BREAK_AFTER
        assert not any(outcome.missing for outcome in judge.judge(ones(10), RATING))


def test_the_rate_limit_is_by_an_estimate_that_is_learned():
    with serve() as server, ApiJudge(config(server.url, tokens_per_minute=30_000)) as judge:
        [outcome] = judge.judge([Question("\u4f60\u597d" * 6000, ("quality 7",))], RATING)  # about 12,000 tokens
        assert outcome.rating
        seen = judge._transport._tokens_per_byte
        judge.judge(ones(20), RATING)  # this server counts the last message only, four bytes a token
        assert 0.12 < judge._transport._tokens_per_byte < 0.2 < seen


def test_failed_attempts_are_in_the_record(tmp_path: Path):
    late: list[int] = []

    def behave(body: dict[str, Any], number: int) -> Any:
        late.extend([number] * ("late" in str(body)))
        if "lost" in str(body) or ("late" in str(body) and len(late) < 3):
            return b'{"choices": [{"message": {"content": "A'
        return right(body)

    settings, store = {"attempts": 3, "max_wait_s": 5.0} | PRICES, tmp_path / "f.sqlite"
    with serve(behave) as server, ApiJudge(config(server.url, **settings), store=store) as judge:
        judge.judge([ONE], RATING)
        probe = judge.spent.usd - sum_of(store)
        judged = judge.judge([Question("lost", ONE.answers), Question("late", ONE.answers)], RATING)
        spent = judge.spent.usd
    assert judged[0].missing and judged[0].missing[0].call.cost > 0.5
    assert judged[1].rating and judged[1].judgements[0].call.cost > 0.5
    checked = spent - sum_of(store) - probe  # the failures may have made it ask whether the server answers at all
    assert probe > 0 and min(abs(checked), abs(checked - probe)) < 1e-9


def sum_of(store: Path) -> float:
    """The money in the report of a store."""
    with Store(store) as feedback:
        return sum(row["cost"] for row in quality(feedback.judgements(superseded=True), reliability=False)["cost"])


def test_a_kept_reply_that_is_read_anew_costs_nothing_in_the_report(tmp_path: Path):
    store, spent = tmp_path / "f.sqlite", 0.0
    with serve(low_mass) as server:
        for min_mass in (0.99, 0.5, 0.05):
            with ApiJudge(config(server.url, min_mass=min_mass, **PRICES), store=store) as judge:
                judge.judge([PAIR], PAIRWISE)
                spent += judge.spent.usd
    probe = spent - sum_of(store)
    assert 0 < probe < spent / 2 and probe == pytest.approx(1000.0 / 1e6 * (1 + 24 // 4), rel=0.5)


def test_a_server_without_system_messages():
    def behave(body: dict[str, Any], number: int) -> Any:
        if body["messages"][0]["role"] == "system":
            return Wrong(400, body={"error": {"message": "System role not supported"}})
        return right(body)

    answered, summary, requests = judged(behave)
    assert answered == 2 and "does not take system" in summary
    assert "impartial judge" in requests[-1]["messages"][0]["content"]


def test_a_megabyte_of_anything_lets_the_others_go_on():
    def behave(body: dict[str, Any], number: int) -> Any:
        text = body["messages"][-1]["content"]
        if unit := re.search("echo (.+?) echo", text, re.DOTALL):
            tag = re.search(r"<corrected-[0-9a-f]{6}>", text)
            return completion((tag[0] if tag else "") + unit[1] * (1_000_000 // len(unit[1])))
        return right(body)

    with serve(behave) as server, ApiJudge(config(server.url, attempts=1)) as judge:
        judge.judge([ONE], RATING)
        for unit in ("\n\n", "<", "</think>"):
            long = judge.submit([Question(f"echo {unit} echo", ("quality 1",))], CORRECTION)
            long += judge.submit([Question("p", (unit * (1_000_000 // len(unit)) + " quality 7",))], RATING)
            started = time.monotonic()
            judge.judge([Question(f"short {unit}", ("quality 7",))], RATING)
            assert time.monotonic() - started < 2  # a quadratic reader takes minutes
            assert [bool(future.result(timeout=20).missing) for future in long] == [True, False]


@pytest.mark.parametrize("reason", ["length", "stop"])
def test_a_critique_that_was_cut_is_kept_and_counted(reason):
    """Its words are worth having, but nobody may take them for the whole critique."""
    reply = completion("The first answer names a moor, and the second")
    reply["choices"][0]["finish_reason"] = reason
    with serve(lambda body, number: reply) as server, ApiJudge(config(server.url, max_tokens=9)) as judge:
        outcomes = judge.judge([Question("p", ("quality 3",))], CRITIQUE)
        summary = summarise_outcomes(outcomes, judge.spent)
    (entry,) = outcomes[0].judgements
    assert entry.answered
    assert ("1 of the answered texts break off at max_tokens" in summary) == (reason == "length")
    assert entry.raw.startswith("cut at max_tokens = 9 (--max-tokens") == (reason == "length")
