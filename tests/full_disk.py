"""The tiny run with a judge behind an API on a disk that is full from a given moment on.

python -m tests.full_disk DISK PROMPTS MOMENT
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlaif_jax import train as loop
from rlaif_jax.checkpoint import Checkpointer
from rlaif_jax.command_line import command_line
from rlaif_jax.feedback.api.builtin_templates import RATING
from rlaif_jax.feedback.api.config import ApiConfig
from rlaif_jax.feedback.api.judge import ApiJudge
from rlaif_jax.feedback.api.source import ApiJudgeSource
from rlaif_jax.metrics import MetricsWriter
from rlaif_jax.run import Run
from tests import tiny
from tests.feedback.api_server import serve
from tests.test_stops import scored

MOMENTS = ("config", "metrics", "judge", "checkpoint", "report")
DISK_BYTES = 4_000_000
WIDTH = 64  # of the model: several checkpoints fit on the disk


def settings(out: Path, prompts: Path) -> tiny.TinyConfig:
    """Returns the settings of the run: six steps, a checkpoint after every second one."""
    train = dataclasses.replace(tiny.TinyConfig().train, steps=6, save_every=2)
    return tiny.TinyConfig(prompts=prompts, out=out, width=WIDTH, train=train)


def judged(config: tiny.TinyConfig, store: Path) -> None:
    """Runs with an API judge, a server on loopback that scores by the words."""
    with (
        serve(lambda body, number: scored(body)) as server,
        ApiJudge(ApiConfig(server=server.url, model="j"), store=store) as judge,
    ):
        source = ApiJudgeSource(judge, RATING)
        tiny.FunctionSource = lambda function: source  # type: ignore
        tiny.main(config)


def main(disk: Path, prompts: Path, moment: str) -> None:
    """Runs until the disk is full, as a script does."""

    def fill() -> None:
        with open(disk / "filler", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"0" * 4096)
            except OSError:
                return

    def filled_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
        calls = iter(range(1, 1000))

        def called(*arguments: Any, **named: Any) -> Any:
            if next(calls) == call:
                fill()
            return function(*arguments, **named)

        return called

    report = Run.report

    def reported(self: Run, status: str = "running", *error: Any) -> None:
        if status == "done":
            fill()
        report(self, status, *error)

    if moment == "config":
        fill()
    elif moment == "metrics":
        MetricsWriter._write = filled_at(1, MetricsWriter._write)  # type: ignore[method-assign]
    elif moment == "judge":
        loop.collect_feedback = filled_at(5, loop.collect_feedback)  # type: ignore[attr-defined]
    elif moment == "checkpoint":
        Checkpointer.save = filled_at(2, Checkpointer.save)  # type: ignore[method-assign]
    elif moment == "report":
        Run.report = reported  # type: ignore[method-assign,assignment]
    sys.argv = ["tiny"]
    store = (disk if moment == "judge" else prompts.parent) / f"{moment}.sqlite"
    command_line(lambda config: judged(config, store), settings(disk / "run", prompts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
