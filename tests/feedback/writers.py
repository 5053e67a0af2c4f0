"""A process that writes judgements into a store for ever: `python writers.py STORE ROLE ACKNOWLEDGED`.

Judgement n of a role is the same whenever it is made. A writer goes on where its acknowledgements end, as a client does
that posts again what nobody confirmed; it appends each id to the file ACKNOWLEDGED after `add` has returned.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from rlaif_jax.feedback.records.forms import Correction, Judgement, Ranking, Rater, Rating
from rlaif_jax.feedback.records.store import Store

ROLES = ("page", "judge", "trainer")


def made(role: str, number: int) -> list[Judgement]:
    """The judgements that the role adds in one go: the page one, the judge both orders, the trainer a batch of eight."""
    prompt = f"question {number}"
    answers = ("yes " * (number % 50), "no " * 40)
    if role == "page":
        rater = Rater("anna", "person")
        return [Correction(prompt=prompt, answers=answers[1:], rater=rater, edited="no", time=float(number))]
    if role == "judge":
        rater = Rater("model", "ai")
        orders = ((0, 1), (1, 0))
        return [Ranking(prompt=prompt, answers=answers, rater=rater, ranks=(1, 2), shown=shown) for shown in orders]
    rater = Rater("length", "rule")
    return [Rating(prompt=f"{prompt}/{i}", answers=answers[:1], rater=rater, value=float(i), low=0) for i in range(8)]


def main(path: str, role: str, acknowledged: str) -> None:
    done = Path(acknowledged).read_text().split() if Path(acknowledged).exists() else []
    number = len(done) // len(made(role, 0))
    file = os.open(acknowledged, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with Store(Path(path)) as store:
        cursor = store.cursor
        while True:
            batch = made(role, number)
            store.add(batch)
            os.write(file, "".join(f"{judgement.id}\n" for judgement in batch).encode())
            number += 1
            if role == "trainer":  # it reads what the others have written, too
                for entry in store.read(after=cursor):
                    cursor = entry.sequence
            time.sleep(0.001)


if __name__ == "__main__":
    main(*sys.argv[1:])
