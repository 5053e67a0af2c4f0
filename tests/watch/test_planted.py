"""Each wrong turn is planted in a tiny run and finds its warning, its status and its exit code."""

import dataclasses
import functools
import html
import json

import pytest

from rlaif_jax.metrics import read_metrics, without_time
from rlaif_jax.train import train
from rlaif_jax.watch.rules import WatchConfig
from tests import tiny
from tests.watch.planted import (
    Late,
    TwoScales,
    outcome,
    quiet_at_first,
    says_a,
    says_a_only,
    settings,
    with_second_opinion,
)


def rewarded(monkeypatch, function) -> None:
    monkeypatch.setattr(tiny, "reward", lambda config, record, answer: function(record, answer))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_a_healthy_run_has_no_warning(seed, tmp_path, monkeypatch, capsys):
    rewarded(monkeypatch, says_a)
    monkeypatch.setattr(tiny, "train", with_second_opinion(says_a))
    done = outcome(monkeypatch, capsys, dataclasses.replace(settings(tmp_path), seed=seed))
    assert (done.code, done.summary["status"], done.summary["warnings"]) == (0, "done", [])
    assert "warning" not in done.errors
    rewards = [line["reward"] for line in read_metrics(tmp_path / "run") if line["step"]]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3, "the run learns"


def planted(monkeypatch, name, folder):
    """Plants one wrong turn and returns the settings of the run."""
    if name == "reward for one endless answer":
        rewarded(monkeypatch, says_a_only)
        return settings(folder, penalty=False, rate=3e-2, prompts_per_step=32)
    if name == "constant rewards":
        rewarded(monkeypatch, lambda record, answer: 1.0)
        return settings(folder, penalty=False)
    if name == "all judgements missing":
        rewarded(monkeypatch, lambda record, answer: None)
        return settings(folder, steps=6)
    if name == "most judgements missing":
        rewarded(monkeypatch, lambda record, answer: says_a(record, answer) if record["prompt"][0] == "b" else None)
        return settings(folder, steps=6)
    if name == "two scales":
        monkeypatch.setattr(tiny, "FunctionSource", lambda function: TwoScales())
        return settings(folder, steps=6)
    if name == "the second opinion falls":
        rewarded(monkeypatch, says_a)
        monkeypatch.setattr(tiny, "train", with_second_opinion(lambda record, answer: -says_a(record, answer)))
        return settings(folder, rate=1e-2)
    if name == "the KL is over its limit":
        rewarded(monkeypatch, says_a_only)
        return settings(folder, penalty=False, rate=2e-2, steps=8, watch=WatchConfig(kl_limit=5.0))
    assert name == "the KL leaps"
    rewarded(monkeypatch, Late(steps=8))
    return quiet_at_first(folder, rate=5e-2, steps=14)


PLANTED = {
    "reward for one endless answer": [
        "ended with its stop token",
        "the run has diverged",
        "answers are the same text, whatever the prompt. Try: a larger",
        "the entropy of a token is below",
    ],
    "constant rewards": ["all rewards of a step are equal"],
    "all judgements missing": ["step 1: all judgements are missing"],
    "most judgements missing": ["of the judgements are missing"],
    "two scales": ["reward 1 varies"],
    "the second opinion falls": ["but the second opinion on held-out answers fell"],
    "the KL is over its limit": ["more than the limit of 5", "the run has diverged: the KL to the reference is"],
    "the KL leaps": ["leapt to"],
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_wrong_turn_is_said(name, tmp_path, monkeypatch, capsys):
    config = planted(monkeypatch, name, tmp_path)
    done = outcome(monkeypatch, capsys, config, "--train.watch.no-stop")
    assert (done.code, done.summary["status"]) == (0, "done")
    page = (tmp_path / "run" / "report.html").read_text()
    for sentence in PLANTED[name]:
        (text,) = [text for text in done.summary["warnings"] if sentence in text]
        assert ". Try: " in text
        assert done.errors.count(f"warning: {text}") == 1
        assert text.partition(" Try: ")[0] in html.unescape(page)


def ruined(folder, **train_):
    """A run that learns nothing for eight steps and is ruined after that by its learning rate."""
    return quiet_at_first(folder, rate=0.3, save_every=1, keep_checkpoints=1, **train_)


def test_a_run_that_has_diverged_stops_with_a_healthy_checkpoint(tmp_path, monkeypatch, capsys):
    rewarded(monkeypatch, Late(steps=8))
    done = outcome(monkeypatch, capsys, ruined(tmp_path))
    assert (done.code, done.summary["status"]) == (1, "diverged")
    assert any("the run has diverged" in text for text in done.summary["warnings"])
    assert f"error: step {done.summary['steps']}: the run has diverged" in done.errors
    assert (tmp_path / "run" / "report.html").exists()
    # Of three bad steps, the first one's answers are of the policy after the step before, which is not healthy either.
    saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == [done.summary["steps"] - 4]
    assert f"Of a healthy policy, the newest checkpoint that is left is that of step {saved[0]} in" in done.errors

    again = outcome(monkeypatch, capsys, ruined(tmp_path), "--resume")
    assert again.code == 2
    assert "with the same settings it would again" in again.errors
    assert again.summary["status"] == "diverged"

    rewarded(monkeypatch, Late(steps=max(0, 8 - saved[0])))
    onward = outcome(monkeypatch, capsys, ruined(tmp_path), "--resume", "--train.watch.no-stop")
    assert (onward.code, onward.summary["status"], onward.summary["steps"]) == (0, "done", 20)
    assert "train.watch.stop was True and is now False" in onward.errors
    assert not json.loads((tmp_path / "run" / "config.json").read_text())["train"]["watch"]["stop"]


def test_without_a_healthy_checkpoint_the_message_says_so(tmp_path, monkeypatch, capsys):
    rewarded(monkeypatch, says_a_only)
    done = outcome(monkeypatch, capsys, settings(tmp_path, rate=0.5, penalty=False, save_every=10))
    assert (done.code, done.summary["status"]) == (1, "diverged")
    assert "no checkpoint is left in" in done.errors


@pytest.mark.parametrize("killed", [False, True])
def test_a_resumed_run_warns_as_the_whole_run_did(killed, tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    given = {"rate": 5e-2, "penalty": False, "steps": 14, "save_every": 1, "watch": WatchConfig(stop=False)}
    monkeypatch.setattr(tiny, "train", with_second_opinion(lambda record, answer: -says_a(record, answer)))
    rewarded(monkeypatch, says_a_only)
    done = outcome(monkeypatch, capsys, settings(whole, **given))
    assert len(done.summary["warnings"]) >= 2

    asked = iter([False] * 8 + [True])
    evaluated = with_second_opinion(lambda record, answer: -says_a(record, answer))
    monkeypatch.setattr(tiny, "train", functools.partial(evaluated, enough=lambda: next(asked)))
    first = outcome(monkeypatch, capsys, settings(parts, **given))
    assert first.summary["steps"] == 9
    if killed:  # the summary of a killed process is not written
        (parts / "run" / "summary.json").unlink()
    monkeypatch.setattr(tiny, "train", evaluated)
    second = outcome(monkeypatch, capsys, settings(parts, **given), "--resume")
    assert second.summary["warnings"] == done.summary["warnings"]
    lines, others = (map(without_time, read_metrics(folder / "run")) for folder in (whole, parts))
    assert list(lines) == list(others)


def test_a_run_without_evaluation_has_samples(tmp_path, monkeypatch, capsys):
    assert tiny.train is train
    outcome(monkeypatch, capsys, settings(tmp_path, steps=7))
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [1] * 4 + [5] * 4 + [7] * 4
    assert {sample["stage"] for sample in samples} == {"rl"}
    assert len({sample["prompt"] for sample in samples[:4]}) == 4
    counted = lambda text: text.split().count("a") - 0.1 * text.split().count("b")
    cost = {round(sample["reward"] - counted(sample["response"]), 4) for sample in samples}
    assert cost <= {0.0, -1.0}, "the reward that is learned from: with the penalty for an answer that was cut"
