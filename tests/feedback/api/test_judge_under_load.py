"""Two thousand judgements of a server with every kind of trouble."""

from __future__ import annotations

import json
import logging
import math
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rlaif_jax.feedback.api.builtin_templates import PAIRWISE
from rlaif_jax.feedback.api.judge import ApiJudge
from rlaif_jax.feedback.api.templates import Question
from rlaif_jax.feedback.records.forms import Ranking
from rlaif_jax.feedback.records.store import Store
from tests.feedback.api.questions import config, pairs
from tests.feedback.api_server import BIAS, Wrong, completion, right, serve

pytest.importorskip("openai", reason="the API judge needs the extra: pip install -e '.[api]'")


KEY = "sk-live-very-secret-0123456789"


class TroubledServer:
    """Answers rightly or with one of seven kinds of trouble, drawn at random; with `calm` set, rightly only."""

    def __init__(self) -> None:
        self.rng, self.lock = random.Random(1), threading.Lock()
        self.calm = False
        self.seen: dict[str, int] = {}

    def __call__(self, body: dict[str, Any], number: int) -> Any:
        good = right(body)
        text = body["messages"][-1]["content"]
        if self.calm or "quality" not in text:
            return good
        if "cursed" in text:  # never answered
            return Wrong(503)
        if "prosaic" in text:
            return completion("Both answers have their merits.", prompt_tokens=20, completion_tokens=6)
        with self.lock:
            trouble = self.rng.choices(
                ["", "slow", "429", "500", "hang", "reset", "cut", "schema"], [86, 4, 1.5, 2, 0.5, 2, 2, 2]
            )[0]
            self.seen[trouble] = self.seen.get(trouble, 0) + 1
        if trouble == "cut":
            return json.dumps(good).encode()[:-40]
        if trouble == "schema":
            return {"result": "A"}
        if trouble == "slow":
            time.sleep(0.2)
            return good
        ways = {"429": Wrong(429, Retry_After="0.2"), "500": Wrong(500), "hang": Wrong(event="hang")}
        return good if not trouble else ways.get(trouble, Wrong(event="reset"))


@pytest.mark.slow
def test_two_thousand_judgements_through_every_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Right, slow, 429 + Retry-After, 500, hang, reset, cut JSON, wrong schema, prose; then a second and a third run."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.INFO)
    behave = TroubledServer()
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
        with ApiJudge(config(server.url, **settings), store=tmp_path / "f.sqlite") as judge:
            outcomes = judge.judge(questions, PAIRWISE)
            spent = judge.spent
        assert set(behave.seen) == {"", "slow", "429", "500", "hang", "reset", "cut", "schema"}
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

        behave.calm = True
        for expected in (len(missing), 0):  # what could not be read is asked again, too
            calls = server.count
            with ApiJudge(config(server.url, **settings | {"timeout_s": 60.0}), store=tmp_path / "f.sqlite") as judge:
                outcomes = judge.judge(questions, PAIRWISE)
            assert server.count - calls == expected
            assert not any(outcome.missing for outcome in outcomes)
        with Store(tmp_path / "f.sqlite") as store:
            now = store.judgements()
            assert len(now) == 2000 and len({(e.item, e.shown) for e in now}) == 2000
    for path in tmp_path.rglob("*"):
        assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in caplog.text and KEY not in str(outcomes) and KEY not in repr(judge)
