"""What the judges of a run said about an answer, in words, for the samples on its page."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlaif_jax.data.prompts import Record
from rlaif_jax.feedback.records.forms import Judgement, Ranking, Rating

Reasons = Callable[[Sequence[Record], Sequence[str]], list[str]]
"""From (records of the prompts, answers) to what a judge said about each answer, "" where it said nothing."""

SHOWN = 3
"""Labels of a score that are named, the most probable ones."""


def rating_words(rating: Rating, labels: Sequence[str]) -> str:
    """Returns how a judge came to a score: the labels that it gave most probability.

    Args:
        rating: the score, with a probability for each label.
        labels: of the scale, in the order of the probabilities.
    """
    own = f"\nIts reasons: {rating.raw}" if rating.raw else ""
    if rating.status != "ok":
        return f"{_unread(rating)}{own}"
    likely = sorted(zip(rating.probabilities, labels), key=lambda pair: -pair[0])[:SHOWN]
    shown = ", ".join(f"{label} with {share:.0%}" for share, label in likely)
    return (
        f"Expected score {rating.value:.2f} on a scale from {rating.low:g} to {rating.high:g}: {shown}.{_mass(rating)}"
        f"{own}"
    )


def ranking_words(forward: Ranking, swapped: Ranking, other: str) -> str:
    """Returns how a judge came to a preference: what it said in both orders, and on which other answer.

    Args:
        forward: the verdict with the answer shown first.
        swapped: the verdict with the answer shown second.
        other: what the other answer is.
    """
    orders = (("first", forward.raw), ("second", swapped.raw))
    own = "".join(f"\nIts reasons where the answer is shown {place}: {raw}" for place, raw in orders if raw)
    if forward.probability is None or swapped.probability is None:
        return f"{_unread(forward)}{own}"
    mean = (forward.probability + swapped.probability) / 2
    return (
        f"Better than {other} with {mean:.0%}: with {forward.probability:.0%} where it is shown first, with "
        f"{swapped.probability:.0%} where it is shown second.{_mass(forward)} {_named(other, forward)}{own}"
    )


def reply_words(forward: Judgement, swapped: Judgement, other: str) -> str:
    """Returns what a judge replied to both orders of two answers.

    Args:
        forward: the judgement with the answer shown first.
        swapped: the judgement with the answer shown second.
        other: what the other answer is.
    """
    return (
        f"With the answer shown first: {forward.raw}\nWith the answer shown second: {swapped.raw}\n"
        f"{_named(other, forward)}"
    )


def _named(other: str, judgement: Judgement) -> str:
    return f"{other[:1].upper()}{other[1:]}: {judgement.answers[1]}"


def _mass(judgement: Judgement) -> str:
    mass = judgement.label_mass
    return "" if mass is None else f" The labels have {mass:.0%} of the judge's probability."


def _unread(judgement: Judgement) -> str:
    return (
        "No judgement: the question was too long." if not judgement.label_mass else f"No judgement.{_mass(judgement)}"
    )


def joined_reasons(parts: Sequence[tuple[str, Reasons]]) -> Reasons | None:
    """Returns what several judges say, each under the name of its reward; None without any.

    Args:
        parts: (name of the reward, what its judge says).
    """
    if len(parts) < 2:
        return parts[0][1] if parts else None

    def written(records: Sequence[Record], answers: Sequence[str]) -> list[str]:
        said = [reasons(records, answers) for _, reasons in parts]
        return ["\n".join(f"{name}: {text}" for (name, _), text in zip(parts, texts) if text) for texts in zip(*said)]

    return written
