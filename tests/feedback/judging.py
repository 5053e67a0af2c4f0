"""A judge's process that asks for ever: `python judging.py STORE SERVER ACKNOWLEDGED`.

It asks about numbered pairs, five at a time, and appends "ID NUMBER ORDER" to the file ACKNOWLEDGED for each judgement that
the judge has reported. Begun again it goes on with the first pair that is not acknowledged in both orders.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rlaif_jax.feedback.api.builtin_templates import PAIRWISE
from rlaif_jax.feedback.api.config import ApiConfig
from rlaif_jax.feedback.api.judge import ApiJudge
from rlaif_jax.feedback.api.templates import Question
from rlaif_jax.feedback.records.forms import Judgement


def main(store: str, server: str, acknowledged: str) -> None:
    path = Path(acknowledged)
    known = {tuple(line.split()[1:]) for line in path.read_text().splitlines()} if path.exists() else set()
    number = 0
    while {(str(number), "01"), (str(number), "10")} <= known:
        number += 1
    file = os.open(acknowledged, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def report(judgement: Judgement) -> None:
        order = "".join(map(str, judgement.shown))
        os.write(file, f"{judgement.id} {judgement.prompt.split()[1]} {order}\n".encode())

    config = ApiConfig(server=server, model="model", concurrency=4)
    with ApiJudge(config, store=Path(store), listener=report) as judge:
        while True:
            pairs = [
                Question(f"question {n}", (f"quality {n % 7}", f"quality {n % 5}.5")) for n in range(number, number + 5)
            ]
            judge.judge(pairs, PAIRWISE)
            number += 5


if __name__ == "__main__":
    main(*sys.argv[1:])
