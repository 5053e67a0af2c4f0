"""Runs with a slow judge behind an API are stopped at twenty random moments and resumed after each."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rlaif_jax import train as loop
from rlaif_jax.checkpoint import Checkpointer
from rlaif_jax.feedback.api.builtin_templates import RATING
from rlaif_jax.feedback.api.config import ApiConfig
from rlaif_jax.feedback.api.judge import ApiJudge
from rlaif_jax.feedback.api.source import ApiJudgeSource
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.parallel import JitRunner
from tests import tiny
from tests.feedback.api_server import LETTERS, completion, serve
from tests.tiny import leaves, numbers

pytest.importorskip("openai", reason="the API judge needs the extra: pip install -e '.[api]'")

PHASES = ("rollout", "judge", "update", "save")
STOPS = 10  # of each of two runs
JUDGE_S = 0.2  # of each reply
LEAVE_S = 5.0  # seconds of the processor, which do not depend on what else the machine does


class Stops:
    """Sends SIGTERM at a random time after a phase of the run has begun; `sent` is the process's time of then."""

    def __init__(self) -> None:
        self.phase, self.wait, self.delay = "", 0, 0.0
        self.sent: float | None = None
        self._lock = threading.Lock()

    def arm(self, phase: str, wait: int, delay: float) -> None:
        self.phase, self.wait, self.delay, self.sent = phase, wait, delay, None

    def begins(self, phase: str) -> None:
        """Is called when a phase begins; the phase `wait` beginnings from now is that of the stop."""
        with self._lock:
            if phase == self.phase:
                self.wait -= 1
                if self.wait < 0:
                    self.phase = ""
                    threading.Timer(self.delay, self._send).start()

    def _send(self) -> None:
        self.sent = time.process_time()
        os.kill(os.getpid(), signal.SIGTERM)

    def before(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            self.begins(phase)
            return function(*arguments, **named)

        return called

    def after(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            result = function(*arguments, **named)
            self.begins(phase)
            return result

        return called


def scored(body: dict[str, Any]) -> dict[str, Any]:
    """A score that depends on the words of the question alone."""
    words = json.dumps(body["messages"]).encode()
    letter = LETTERS[int(hashlib.sha256(words).hexdigest(), 16) % len(LETTERS)]
    return completion(letter, top=[(letter, 0.9), ("The", 0.1)])


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_ten_stops_lose_nothing_buy_nothing_twice_and_change_no_number(staleness, tmp_path, monkeypatch):
    generator, stops = random.Random(staleness), Stops()
    monkeypatch.setattr(loop, "make_runner", lambda parallel, rules: JitRunner())
    monkeypatch.setattr(loop, "collect", stops.before("rollout", loop.collect))
    monkeypatch.setattr(loop, "collect_feedback", stops.after("update", loop.collect_feedback))
    monkeypatch.setattr(Checkpointer, "save", stops.before("save", Checkpointer.save))

    def slow(body: dict[str, Any], number: int) -> Any:
        stops.begins("judge")
        time.sleep(JUDGE_S)
        return scored(body)

    config = tiny.TinyConfig(
        prompts=tiny.write_prompts(tmp_path),
        train=dataclasses.replace(
            tiny.TinyConfig().train, steps=24, save_every=2, staleness=staleness, rollout_parts=1 + staleness
        ),
    )

    def run(out: Path, *, resume: bool) -> str:
        """One process's part of a run; returns how it ended."""

        def judged(*arguments: Any, **named: Any) -> Any:
            api = ApiConfig(server=server.url, model="j", concurrency=16)
            with ApiJudge(api, store=tmp_path / f"{out.name}.sqlite") as judge:
                return loop.train(*arguments, **named | {"feedback": ApiJudgeSource(judge, RATING)})

        monkeypatch.setattr(tiny, "train", judged)
        tiny.main(dataclasses.replace(config, out=out, resume=resume))
        return json.loads((out / "summary.json").read_text())["status"]

    out, whole, left = tmp_path / "stopped", tmp_path / "whole", []
    with serve(slow) as server:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # each part compiles the same programs
        try:
            for i in range(STOPS):
                delay = generator.uniform(0, 2 * JUDGE_S if PHASES[i % 4] == "judge" else 0.1)
                stops.arm(PHASES[i % 4], generator.randrange(16 if PHASES[i % 4] == "judge" else 2), delay)
                status = run(out, resume=(out / "config.json").exists())
                assert stops.sent is not None
                left.append(time.process_time() - stops.sent)
                assert status == "stopped", "the run is long enough for all stops"
            assert run(out, resume=True) == "done"
            asked = Counter(json.dumps(body) for body in server.requests)
            assert run(whole, resume=False) == "done"
        finally:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    assert max(left) < LEAVE_S, left
    assert set(asked.values()) == {1}
    assert set(asked) == {json.dumps(body) for body in server.requests[len(asked) :]}
    with Store(tmp_path / "stopped.sqlite") as store, Store(tmp_path / "whole.sqlite") as of_whole:
        kept = store.judgements(superseded=True)
        assert len(kept) == len(of_whole.judgements())
        assert all(judgement.answered and not judgement.supersedes for judgement in kept)
    assert numbers(out) == numbers(whole)
    assert (out / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert all(np.array_equal(a, b) for a, b in zip(leaves(out), leaves(whole), strict=True))
