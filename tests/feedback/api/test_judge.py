"""The API judge against a real HTTP server on loopback: what is asked, judged and recorded."""

from __future__ import annotations

import math
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
from rlaif_jax.feedback.api.judge import ApiJudge
from rlaif_jax.feedback.api.template_files import parse_template
from rlaif_jax.feedback.api.templates import Question
from rlaif_jax.feedback.records.forms import Comment, Correction, Rating
from rlaif_jax.feedback.records.store import Store
from tests.feedback.api.questions import ONE, PAIR, config, low_mass, pairs
from tests.feedback.api_server import BIAS, Wrong, completion, right, serve

pytest.importorskip("openai", reason="the API judge needs the extra: pip install -e '.[api]'")


def test_a_pair_is_asked_in_both_orders_and_its_position_bias_cancels_exactly(tmp_path: Path):
    with serve() as server, ApiJudge(config(server.url), store=tmp_path / "f.sqlite") as judge:
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
        ApiJudge(config(server.url), store=tmp_path / "f.sqlite") as judge,
    ):
        [outcome] = judge.judge([PAIR], PAIRWISE)
        assert "[reasons]" not in server.requests[-1]["messages"][-1]["content"]
    assert all(entry.probability is None and entry.ranks for entry in outcome.judgements)
    assert "Both say something." in outcome.judgements[0].raw
    assert outcome.preference.bias is None


def test_every_form():
    question = Question("Say it.", ("quality 7",), rubric="5 = fine", critique="too short")
    with serve() as server, ApiJudge(config(server.url)) as judge:
        rating, rubric, comment, revision, correction = (
            judge.judge([question], template)[0].judgements[0]
            for template in (RATING, RUBRIC, CRITIQUE, REVISION, CORRECTION)
        )
    assert isinstance(rating, Rating) and rating.value == pytest.approx(7, abs=1e-6) and rating.high == 10
    assert isinstance(rubric, Rating) and rubric.status == "abstained"  # G is no letter of five
    assert isinstance(comment, Comment) and comment.text == "It has a quality of 7.0."
    assert isinstance(revision, Correction) and revision.edited == "better 7.0"
    assert isinstance(correction, Correction) and correction.edited == "better 7.0"


def test_little_label_mass_is_asked_again_with_a_choice_then_abstained():
    with serve(low_mass) as server, ApiJudge(config(server.url)) as judge:
        [outcome] = judge.judge([PAIR], PAIRWISE)
        assert server.requests[-1]["structured_outputs"] == {"choice": ["A", "B", "C"]}
    assert outcome.judgements[0].answered and outcome.judgements[0].call.completion_tokens == 2
    ignores = lambda body, number: low_mass({k: v for k, v in body.items() if k != "structured_outputs"}, number)
    with serve(ignores) as server, ApiJudge(config(server.url)) as judge:
        [outcome] = judge.judge([PAIR], PAIRWISE)
    assert [entry.status for entry in outcome.judgements] == ["abstained"] * 2
    assert outcome.judgements[0].label_mass == pytest.approx(0.1)
    assert outcome.preference is None


def test_a_second_run_makes_no_call_and_records_nothing_twice(tmp_path: Path):
    store = tmp_path / "f.sqlite"
    with serve() as server:
        for _ in range(2):
            with ApiJudge(config(server.url), store=store) as judge:
                outcomes = judge.judge(pairs(20), PAIRWISE)
                assert not any(outcome.missing for outcome in outcomes)
        assert server.count == 41  # and one to see what the server can do
    with Store(store) as feedback:
        assert len(feedback) == 40


def test_the_same_question_is_asked_once_while_it_is_under_way():
    def slow(body: dict[str, Any], number: int) -> Any:
        time.sleep(0.05)
        return right(body)

    with serve(slow) as server, ApiJudge(config(server.url)) as judge:
        futures = judge.submit([ONE] * 10, RATING) + judge.submit([ONE], RATING)
        assert [future.result().rating for future in futures] == [pytest.approx(7)] * 11
        assert server.count == 2


def test_two_answers_of_the_same_words_are_two_orders(tmp_path: Path):
    with serve() as server, ApiJudge(config(server.url), store=tmp_path / "f.sqlite") as judge:
        [outcome] = judge.judge([Question("Say it.", ("quality 2", "quality 2"))], PAIRWISE)
    assert outcome.preference.probability == pytest.approx(0.5)
    with Store(tmp_path / "f.sqlite") as store:
        assert sorted(entry.shown for entry in store.judgements()) == [(0, 1), (1, 0)]


def test_a_reply_is_read_anew_without_a_call_and_supersedes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from rlaif_jax.feedback.api import judge as module

    with serve() as server:
        with ApiJudge(config(server.url), store=tmp_path / "f.sqlite") as judge:
            [old] = judge.judge([ONE], RATING)
        calls, read = server.count, module.read_verdict
        monkeypatch.setattr(module, "read_verdict", lambda *a, **k: read(*a, **k)._replace(value=3.0))
        for _ in range(2):
            with ApiJudge(config(server.url), store=tmp_path / "f.sqlite") as judge:
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
        with ApiJudge(config(server.url, **settings), store=store) as judge:
            [outcome] = judge.judge([ONE], RATING)
        [missing] = outcome.missing
        assert missing.status == "error" and "status 500" in missing.raw and "2 attempts" in missing.raw
        assert outcome.rating is None
        down[0] = False
        with ApiJudge(config(server.url, **settings), store=store) as judge:
            [outcome] = judge.judge([ONE], RATING)
    with Store(store) as feedback:
        [entry] = feedback.judgements()
        assert entry.answered and entry.supersedes == missing.id


def test_what_is_wrong_with_one_question_or_reply_is_an_error_of_that_one(tmp_path: Path):
    def behave(body: dict[str, Any], number: int) -> Any:
        good = right(body)
        if "nan" in str(body):
            for top in good["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                top["logprob"] = math.nan
        return good

    questions = [Question("half \ud83d", ("quality 7",)), Question("nan", ("quality 7",)), ONE]
    with serve(behave) as server, ApiJudge(config(server.url), store=tmp_path / "f.sqlite") as judge:
        half, nan, one = judge.judge(questions, RATING)
    assert [entry.status for entry in (*half.missing, *nan.missing)] == ["error", "error"]
    assert "surrogates not allowed" in half.missing[0].raw and "nan" in nan.missing[0].raw
    assert one.rating == pytest.approx(7, abs=1e-6)


def test_a_cache_that_fails_is_an_error_without_the_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-555")

    def fails(self: CallCache, request: dict[str, Any]) -> None:
        raise sqlite3.OperationalError("disk I/O error at sk-secret-555")

    monkeypatch.setattr(CallCache, "get", fails)
    with serve() as server, ApiJudge(config(server.url, key_env="JUDGE_KEY")) as judge:
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
        ApiJudge(config(server.url, reading="direct")) as judge,
        pytest.raises(UserError, match=r"items:3: .* asks for \{rubric\}"),
    ):
        judge.submit([question], template)
    with serve() as server, ApiJudge(config(server.url, reading="reasons")) as judge:
        assert judge.judge([question], template)[0].rating == 2
    with serve() as server, ApiJudge(config(server.url)) as judge:  # the server's log-probabilities decide
        [missing] = judge.judge([question], template)[0].missing
        assert missing.status == "error" and "asks for {rubric}" in missing.raw


def test_two_judges_on_one_store_record_the_same_once(tmp_path: Path):
    store = tmp_path / "f.sqlite"
    down = [True]
    behave = lambda body, number: Wrong(400) if down[0] and "quality" in str(body) else right(body)
    with (
        serve(behave) as server,
        ApiJudge(config(server.url, attempts=1), store=store) as one,
        ApiJudge(config(server.url, attempts=1), store=store) as other,
    ):
        missing = [judge.judge([PAIR], PAIRWISE)[0].missing for judge in (one, other)]
        down[0] = False
        found = [judge.judge([PAIR], PAIRWISE)[0].judgements for judge in (one, other)]
    assert missing[0] == missing[1] and found[0] == found[1]
    with Store(store) as feedback:
        assert len(feedback) == 4 and len(feedback.judgements()) == 2


def test_a_refusal_is_a_refusal_and_not_kept():
    behave = lambda body, number: (
        completion(None, refusal="I will not.") if "quality" in str(body) else right(body)  # type: ignore[arg-type]
    )
    with serve(behave) as server, ApiJudge(config(server.url)) as judge:
        assert [judge.judge([ONE], RATING)[0].missing[0].status for _ in range(2)] == ["refused"] * 2
        assert server.count == 3


def test_it_works_in_the_background():
    def slow(body: dict[str, Any], number: int) -> Any:
        time.sleep(0.1)
        return right(body)

    with serve(slow) as server, ApiJudge(config(server.url)) as judge:
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
        judge = ApiJudge(config(server.url), store=tmp_path / "f.sqlite")
        futures = judge.submit([Question(f"{i}", ("quality 7",)) for i in range(30)], RATING)
        deadline = time.monotonic() + 30
        while sum(future.done() for future in futures) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        judge.close()
        judge.close()
        assert sum(future.cancelled() for future in futures) == 26
        assert threading.active_count() <= running + 31  # the server's own are still there
    assert "judge" not in {thread.name for thread in threading.enumerate()} and before
    with Store(tmp_path / "f.sqlite") as store:
        assert len(store) == 4


def test_bad_settings(monkeypatch: pytest.MonkeyPatch):
    for settings, message in (
        ({"server": "localhost:8000"}, "http://"),
        ({"server": "https://me:key@host/v1"}, "environment variable"),
        ({"budget_usd": 1.0}, "prices"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"min_mass": 2.0}, "min_mass"),
    ):
        with pytest.raises(UserError, match=message):
            config("http://127.0.0.1:1", **settings)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(UserError, match="NO_SUCH_KEY is not set"):
        ApiJudge(config("http://127.0.0.1:1/v1", key_env="NO_SUCH_KEY"))
    with pytest.raises(UserError, match="model is missing"):
        ApiJudge(ApiConfig(server="http://127.0.0.1:1/v1"))
    with serve() as server, ApiJudge(config(server.url)) as judge:
        with pytest.raises(UserError, match=r"items:3: a ranking is of 2 answers, not 1"):
            judge.submit([Question("p", ("a",), where="items:3")], PAIRWISE)
        with pytest.raises(UserError, match=r"asks for \{rubric\}"):
            judge.submit([ONE], RUBRIC)


def test_the_wording_of_a_rater_is_the_templates_and_what_an_item_adds_is_kept_apart(tmp_path: Path):
    with serve() as server, ApiJudge(config(server.url), store=tmp_path / "f.sqlite") as judge:
        bare, one, two = (judge.rater(Question("q", ("a",), reference=text), PAIRWISE) for text in ("", "x", "y"))
    assert bare.prompt_hash == bare.wording == one.wording == two.wording == PAIRWISE.hash
    assert len({rater.prompt_hash for rater in (bare, one, two)}) == 3
