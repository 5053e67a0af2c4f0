"""Tiny runs through the real loop and the command line: a healthy one, and one for each way to go wrong."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlaif_jax.algorithms.advantages import LeaveOneOut
from rlaif_jax.algorithms.optimizer import OptimizerConfig
from rlaif_jax.command_line import command_line
from rlaif_jax.data.prompts import prompt_batches
from rlaif_jax.data.readers import FileRecords
from rlaif_jax.evaluate import Evaluation
from rlaif_jax.feedback.sources import FeedbackSource, FunctionSource
from rlaif_jax.parallel import JitRunner
from rlaif_jax.rewards.shaping import Shaping
from rlaif_jax.train import train
from rlaif_jax.types import Feedback
from tests import tiny

PROMPTS = [{"prompt": f"{a} {b} {c}"} for a in "bcde" for b in "fgh" for c in "ijk"]


def says_a(record: Any, answer: str) -> float:
    """A reward that leaves much of an answer free."""
    return float("a" in answer.split())


def says_a_only(record: Any, answer: str) -> float:
    """A reward for one answer, which is endless."""
    return float(answer.split().count("a"))


class Late:
    """A constant reward for the first steps of 32 answers, then the number of a's."""

    def __init__(self, steps: int) -> None:
        self.calls, self.quiet = 0, 32 * steps

    def __call__(self, record: Any, answer: str) -> float:
        self.calls += 1
        return 1.0 if self.calls <= self.quiet else says_a_only(record, answer)


class TwoScales(FeedbackSource):
    """Two rewards, of which the second is a hundred times as large."""

    def __call__(self, records, answers, rollout):
        a = [[answer.split().count("a"), 100 * answer.split().count("c")] for answer in answers]
        return Feedback(np.array(a, np.float32), np.ones((len(answers), 2), bool))


class Outcome(NamedTuple):
    """What a process leaves: its exit code, its stderr, the run's summary."""

    code: int
    errors: str
    summary: dict[str, Any]


def settings(folder: Path, *, rate: float = 5e-3, steps: int = 20, penalty: bool = True, **train_: Any) -> Any:
    """The settings of a healthy tiny run, or with another learning rate or without the penalty for endless answers."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))
    base, fast = tiny.TinyConfig(), OptimizerConfig(learning_rate=rate, schedule="constant")
    shaping = Shaping(missing_eos="penalty") if penalty else Shaping()
    ppo = dataclasses.replace(base.ppo, shaping=shaping, policy_optimizer=fast, value_optimizer=fast)
    loop = dataclasses.replace(base.train, steps=steps, **train_)
    return dataclasses.replace(base, prompts=prompts, out=folder / "run", train=loop, ppo=ppo)


def quiet_at_first(folder: Path, **given: Any) -> Any:
    """The settings of a run that learns nothing from equal rewards: two answers a prompt, compared with each other."""
    config = settings(folder, penalty=False, **given)
    ppo = dataclasses.replace(
        config.ppo, advantage=LeaveOneOut(), answers_per_prompt=2, kl_in="loss", kl_target=None, kl_coef=0.0
    )
    return dataclasses.replace(config, ppo=ppo)


def with_second_opinion(opinion: Callable[[Any, str], float | None]) -> Callable[..., Any]:
    """`train` with an evaluation on 36 prompts that asks another judge."""

    def evaluated(config, run, writer, **given):
        records = FileRecords(tuple(PROMPTS), tuple(map(str, range(len(PROMPTS)))))
        prompts = next(prompt_batches(records, given["tokenizer"], batch_size=36, seed=1, prompt_length=6))
        evaluation = Evaluation(
            given["policy"],
            given["tokenizer"],
            JitRunner(),
            prompts,
            0,
            source=FunctionSource(says_a),
            name="judge",
            second=FunctionSource(opinion),
        )
        return train(config, run, writer, evaluate=evaluation.during(run), **given)

    return evaluated


def outcome(monkeypatch, capsys, config: Any, *options: str) -> Outcome:
    """Runs the tiny experiment as a process would, on one device."""
    monkeypatch.setattr("rlaif_jax.train.make_runner", lambda parallel, rules: JitRunner())
    monkeypatch.setattr(sys, "argv", ["tiny", *options])
    capsys.readouterr()
    code = 0
    try:
        command_line(tiny.main, config)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    summary = json.loads((config.out / "summary.json").read_text())
    return Outcome(code, " ".join(capsys.readouterr().err.split()), summary)
