"""Judgements for the tests of the quality report."""

import numpy as np

from rlaif_jax.feedback.records.forms import Ranking, Rater, Rating

ANN, BOB, JUDGE = Rater("ann", "person"), Rater("bob", "person"), Rater("judge", "ai")
FAST = {"reliability": False}
"""Options of `quality` for a quick report."""


def verdict(prompt, answers, rater, winner, **more):
    """winner 0 or 1, or None for a tie."""
    ranks = (1, 1) if winner is None else (1, 2) if winner == 0 else (2, 1)
    more.setdefault("status", "tie" if winner is None else "ok")
    return Ranking(prompt=prompt, answers=tuple(answers), rater=rater, ranks=ranks, **more)


def probable(prompt, answers, shown, p, **more):
    return Ranking(
        prompt=prompt,
        answers=answers,
        rater=JUDGE,
        ranks=(1, 2) if p > 0.5 else (2, 1),
        probability=p,
        shown=shown,
        **more,
    )


def only(rows, **wanted):
    (row,) = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
    return row


def matches(rng, n=200, labelled=60):
    """Verdicts of a judge that leans to `new`, on all; of Ann on some, who thinks they are even."""
    records = []
    for i in range(n):
        answers = ("n" * int(rng.integers(5, 30)), "o" * int(rng.integers(5, 30)))
        truth = int(rng.random() < 0.5)
        judged = truth if rng.random() < 0.85 else 0
        records.append(verdict(f"p{i}", answers, JUDGE, judged, generators=("new", "old")))
        if i < labelled:
            records.append(verdict(f"p{i}", answers, ANN, truth, generators=("new", "old")))
    return records


def everything(seed=0):
    rng = np.random.default_rng(seed)
    records = matches(rng)
    records += [
        Rating(prompt=f"p{i}", answers=("x",), rater=r, value=int(rng.integers(1, 11)))
        for i in range(20)
        for r in (ANN, BOB)
    ]
    records += [
        probable(f"p{i}", ("a", "b"), s, float(rng.uniform())) for i in range(20) for s in ((0, 1), (1, 0), (1, 0))
    ]
    records += [verdict(f"p{i}", ("a", "b"), Rater("sim", "simulated"), int(rng.integers(2))) for i in range(20)]
    records += [verdict(f"p{i}", ("a", "b"), ANN, int(rng.integers(2))) for i in range(20)]
    return records
