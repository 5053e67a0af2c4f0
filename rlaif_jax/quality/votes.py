"""Records of feedback as votes: who said what about which pair, or gave which answer what mark."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from rlaif_jax.feedback.forms import Judgement, Ranking, Rating

FIRST, TIE, SECOND = 0, 1, 2
"""The categories of a verdict on a pair, in rising order of the second answer's worth."""


class Pair(NamedTuple):
    """Two answers to a prompt under a principle; which of them is called first has no meaning (the order of the texts).

    cluster: index of the prompt. answers: of the two texts, under this prompt and principle. longer: characters of the
    first minus those of the second. generators: who wrote them.
    """

    cluster: int
    answers: tuple[int, int]
    longer: int
    generators: tuple[str, str]


class Vote(NamedTuple):
    """One verdict on a pair. chance: P(the first is better), NaN if not given. front: the first answer was shown first."""

    pair: int
    rater: int
    category: int
    chance: float
    front: bool


class Mark(NamedTuple):
    """One rating: `value` in [0, 1] of the answer number `answer`."""

    answer: int
    rater: int
    value: float


@dataclasses.dataclass(frozen=True)
class Votes:
    """All that records say, indexed.

    used: the records that count (not superseded, not retracted), `clusters` [used] their prompts' indices; pairs and
    votes of rankings; answers (the prompt's index of each) and marks of ratings; raters: (name, source) of each.
    """

    used: tuple[Judgement, ...]
    clusters: tuple[int, ...]
    count: int
    pairs: tuple[Pair, ...]
    votes: tuple[Vote, ...]
    answers: tuple[int, ...]
    marks: tuple[Mark, ...]
    raters: tuple[tuple[str, str], ...]


def current(judgements: Sequence[Judgement]) -> list[int]:
    """Indices of the records that no other one supersedes and that are no retraction; of equal records the first."""
    gone = {judgement.supersedes for judgement in judgements if judgement.supersedes}
    kept: dict[Judgement, int] = {}
    for index, judgement in enumerate(judgements):
        if judgement.status != "retracted" and not (gone and judgement.id in gone):
            kept.setdefault(judgement, index)
    return list(kept.values())


def read_votes(judgements: Sequence[Judgement], items: Sequence[str] | None = None) -> Votes:
    """The votes of records. items: what is resampled together, a name for each record; None: its prompt."""
    clusters: dict[str, int] = {}
    raters: dict[tuple[str, str], int] = {}
    pairs: dict[tuple[str, str, str, str], int] = {}
    described: list[Pair] = []
    texts_known: dict[tuple[str, str, str], int] = {}
    answers: dict[tuple[str, str, str], int] = {}
    homes: list[int] = []
    votes: list[Vote] = []
    marks: list[Mark] = []
    kept = current(judgements)
    for index in kept:
        record = judgements[index]
        cluster = clusters.setdefault(record.prompt if items is None else items[index], len(clusters))
        rater = raters.setdefault((record.rater.name, record.rater.source), len(raters))
        if not record.answered:
            continue
        if isinstance(record, Rating):
            answer = answers.setdefault((record.prompt, record.answers[0], record.principle), len(answers))
            homes += [cluster] * (answer == len(homes))
            marks.append(Mark(answer, rater, record.unit))
        elif isinstance(record, Ranking):
            for first, second, chance in _oriented(record):
                texts = record.answers[first], record.answers[second]
                pair = pairs.setdefault((record.prompt, *texts, record.principle), len(pairs))
                writers = (record.generators[first], record.generators[second]) if record.generators else ("", "")
                if pair == len(described):
                    places = [
                        texts_known.setdefault((record.prompt, t, record.principle), len(texts_known)) for t in texts
                    ]
                    described.append(Pair(cluster, (places[0], places[1]), len(texts[0]) - len(texts[1]), writers))
                elif not all(described[pair].generators) and all(writers):
                    described[pair] = described[pair]._replace(generators=writers)
                tie = chance == 0.5 or (record.status == "tie" and len(record.answers) == 2)
                votes.append(
                    Vote(
                        pair,
                        rater,
                        TIE if tie else FIRST if chance > 0.5 else SECOND,
                        chance if record.probability is not None else np.nan,
                        _place(record, first) < _place(record, second),
                    )
                )
    return Votes(
        used=tuple(judgements[index] for index in kept),
        clusters=tuple(clusters[judgements[i].prompt if items is None else items[i]] for i in kept),
        count=len(clusters),
        pairs=tuple(described),
        votes=tuple(votes),
        answers=tuple(homes),
        marks=tuple(marks),
        raters=tuple(raters),
    )


def _oriented(record: Ranking) -> Iterable[tuple[int, int, float]]:
    """The comparisons of a ranking, the answer whose text comes first in the alphabet first; equal answers are none."""
    for i, j, chance in record.pairs():
        if record.answers[i] < record.answers[j]:
            yield i, j, chance
        elif record.answers[i] > record.answers[j]:
            yield j, i, 1 - chance


def _place(record: Ranking, answer: int) -> int:
    return record.shown.index(answer) if record.shown else answer
