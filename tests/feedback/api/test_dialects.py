"""The API judge with servers of many dialects: each question is answered or its failure is named; none stops the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlaif_jax.feedback.api.builtin_templates import RATING
from rlaif_jax.feedback.api.judge import ApiJudge
from rlaif_jax.feedback.api.templates import Question
from rlaif_jax.feedback.records.store import Store
from tests.feedback.api.dialects import BEHAVIOURS, DIALECTS, SCORE, Server
from tests.feedback.api.questions import config
from tests.feedback.api_server import Wrong, serve

pytest.importorskip("openai", reason="the API judge needs the extra: pip install -e '.[api]'")
SETTINGS = {"attempts": 3, "max_wait_s": 5.0, "usd_per_million_prompt": 2.0, "usd_per_million_completion": 8.0}


def questions(*behaviours: str) -> list[Question]:
    return [Question(f"case:{behaviour}.", (f"quality {SCORE}",)) for behaviour in behaviours]


@pytest.mark.parametrize("name", DIALECTS)
def test_every_question_is_answered_or_named(name: str, tmp_path: Path):
    server = Server(DIALECTS[name])
    with serve(server) as running, ApiJudge(config(running.url, **SETTINGS), store=tmp_path / "f.sqlite") as judge:
        outcomes = judge.judge(questions(*BEHAVIOURS), RATING)
        spent = judge.spent
    thinks = DIALECTS[name].thoughts != ""
    reasons = thinks or not DIALECTS[name].most_logprobs
    for (behaviour, (status, words)), outcome in zip(BEHAVIOURS.items(), outcomes, strict=True):
        [entry] = outcome.judgements
        if not reasons and behaviour in ("cut", "prose", "wrong scale", "refuses"):
            status, words = "abstained", ""  # the log-probabilities have no label
        if thinks and behaviour == "filtered":
            words = ""
        assert (entry.status, words in entry.raw) == (status, True), (behaviour, entry.status, entry.raw)
        if entry.answered:
            assert entry.value == pytest.approx(SCORE, abs=0.4), behaviour  # type: ignore[attr-defined]
    assert spent.tokens == server.tokens  # to the token: no error was paid for, and each reply once
    assert spent.usd == pytest.approx((50 * 2.0 + 10 * 8.0) / 1e6 * server.tokens / 60)
    with Store(tmp_path / "f.sqlite") as store:
        recorded = sum(e.judgement.call.cost for e in store.read(superseded=True))
    assert 0 < spent.usd - recorded < 3 * (50 * 2.0 + 10 * 8.0) / 1e6  # all but the probe is in the records


@pytest.mark.parametrize("name", DIALECTS)
def test_a_wrong_key_is_said_after_one_request(name: str):
    wrong = Wrong(401, body=DIALECTS[name].error(401, "this key is unknown"))
    with serve(lambda body, number: wrong) as running, ApiJudge(config(running.url, **SETTINGS)) as judge:
        outcomes = judge.judge(questions(*BEHAVIOURS), RATING)
        assert running.count == 1
    assert all("status 401: " in entry.raw for outcome in outcomes for entry in outcome.missing)
    assert all(outcome.missing and "this key is unknown" in outcome.missing[0].raw for outcome in outcomes)


@pytest.mark.parametrize("name", ["openai chat", "vllm, deepseek r1", "mistral"])
def test_a_second_run_asks_only_what_was_missing(name: str, tmp_path: Path):
    with serve(Server(DIALECTS[name])) as running:
        for _ in range(2):
            calls = running.count
            with ApiJudge(config(running.url, **SETTINGS), store=tmp_path / "f.sqlite") as judge:
                judge.judge(questions("well", "bold", "impossible tokens", "moderated"), RATING)
        assert len(running.requests[calls:]) == 2 and judge.spent.cached == 3  # and whether others are answered
        assert sum("case:moderated" in str(body) for body in running.requests[calls:]) == 1
