"""Reads records of feedback as votes on pairs of answers and marks of single answers.

Prompts, answers, raters and pairs are numbered.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from rlaif_jax.feedback.records.forms import Judgement, Ranking, Rating

FIRST, TIE, SECOND = 0, 1, 2
"""The categories of a verdict on a pair, from the first answer's win to the second's."""


class Pair(NamedTuple):
    """Two answers of two writers to a prompt under a principle.

    The first answer is the one whose text sorts first.

    Attributes:
        cluster: index of the prompt.
        answers: indices of the two texts, under this prompt and principle.
        longer: characters of the first minus those of the second.
        generators: who wrote them, ("", "") unless both are known.
    """

    cluster: int
    answers: tuple[int, int]
    longer: int
    generators: tuple[str, str]


class Vote(NamedTuple):
    """One verdict on a pair.

    Attributes:
        pair: index of the pair.
        rater: index of the rater.
        category: FIRST, TIE or SECOND.
        chance: P(the first is better), NaN if not given.
        front: whether the first answer was shown first; None where the order was not recorded.
    """

    pair: int
    rater: int
    category: int
    chance: float
    front: bool | None


class Mark(NamedTuple):
    """One rating.

    Attributes:
        answer: index of the answer.
        rater: index of the rater.
        value: the rating, in [0, 1].
    """

    answer: int
    rater: int
    value: float


@dataclasses.dataclass(frozen=True)
class Votes:
    """The judgements as votes and marks; indices instead of names and texts.

    Attributes:
        used: the records that count: neither superseded nor retracted.
        clusters: [used], the index of each record's prompt.
        count: number of prompts.
        pairs: the pairs of answers that rankings compare.
        votes: the verdicts on pairs.
        equal: (pair, rater) where two generators wrote the same text, which is their tie and no verdict.
        answers: the prompt's index of each rated answer.
        marks: the ratings.
        raters: (name, source) of each rater.
    """

    used: tuple[Judgement, ...]
    clusters: tuple[int, ...]
    count: int
    pairs: tuple[Pair, ...]
    votes: tuple[Vote, ...]
    equal: tuple[tuple[int, int], ...]
    answers: tuple[int, ...]
    marks: tuple[Mark, ...]
    raters: tuple[tuple[str, str], ...]


def current(judgements: Sequence[Judgement]) -> list[int]:
    """Returns the indices of the records that are neither superseded nor a retraction.

    Of equal records only the first counts. As in the store, a record supersedes none of another rater.
    """
    gone = {(j.supersedes, j.rater.name, j.rater.source) for j in judgements if j.supersedes}
    kept: dict[Judgement, int] = {}
    for index, judgement in enumerate(judgements):
        rater = judgement.rater
        if judgement.status != "retracted" and not (gone and (judgement.id, rater.name, rater.source) in gone):
            kept.setdefault(judgement, index)
    return list(kept.values())


def read_votes(judgements: Sequence[Judgement], items: Sequence[str] | None = None) -> Votes:
    """Reads judgements as votes and marks.

    Args:
        judgements: records of any form.
        items: a name for each record; records of one name form a cluster. None: records of one prompt do.
    """
    clusters: dict[str, int] = {}
    raters: dict[tuple[str, str], int] = {}
    pairs: dict[tuple[str, ...], int] = {}
    described: list[Pair] = []
    texts_known: dict[tuple[str, str, str], int] = {}
    answers: dict[tuple[str, str, str], int] = {}
    homes: list[int] = []
    votes: list[Vote] = []
    equal: dict[tuple[int, int], None] = {}
    marks: list[Mark] = []
    kept = current(judgements)
    writers = _writers(judgements[index] for index in kept)

    def pair_of(record: Ranking, first: int, second: int, cluster: int) -> int:
        key = _key(record, first, second)
        names = _names(record, first, second)
        if not all(names) and len(writers[key]) == 1:  # a record without writers means the only known ones
            (names,) = writers[key]
        pair = pairs.setdefault((*key, *names), len(pairs))
        if pair == len(described):
            texts = record.answers[first], record.answers[second]
            one, two = (texts_known.setdefault((record.prompt, t, record.principle), len(texts_known)) for t in texts)
            described.append(Pair(cluster, (one, two), len(texts[0]) - len(texts[1]), names))
        return pair

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
                pair = pair_of(record, first, second, cluster)
                front = record.shown.index(first) < record.shown.index(second) if record.shown else None
                probability = chance if record.probability is not None else np.nan
                votes.append(Vote(pair, rater, _category(record, chance), probability, front))
            for first, second in _equal(record):
                equal[pair_of(record, first, second, cluster), rater] = None
    return Votes(
        used=tuple(judgements[index] for index in kept),
        clusters=tuple(clusters[judgements[i].prompt if items is None else items[i]] for i in kept),
        count=len(clusters),
        pairs=tuple(described),
        votes=tuple(votes),
        equal=tuple(equal),
        answers=tuple(homes),
        marks=tuple(marks),
        raters=tuple(raters),
    )


def _category(record: Ranking, chance: float) -> int:
    """Returns the verdict on two answers of a ranking, from P(the first is better)."""
    if chance == 0.5 or (record.status == "tie" and len(record.answers) == 2):
        return TIE
    return FIRST if chance > 0.5 else SECOND


def _oriented(record: Ranking) -> Iterable[tuple[int, int, float]]:
    """Yields the comparisons of unequal answers in a ranking.

    The first answer of each is the one whose text sorts first.
    """
    for i, j, chance in record.pairs():
        if record.answers[i] < record.answers[j]:
            yield i, j, chance
        elif record.answers[i] > record.answers[j]:
            yield j, i, 1 - chance


def _equal(record: Ranking) -> Iterable[tuple[int, int]]:
    """Yields the equal answers of two known generators in a ranking.

    The first generator of each is the one whose name sorts first.
    """
    for i, j in itertools.permutations(range(len(record.answers)), 2):
        one, two = _names(record, i, j)
        if record.answers[i] == record.answers[j] and one and one < two:
            yield i, j


def _writers(records: Iterable[Judgement]) -> dict[tuple[str, ...], set[tuple[str, str]]]:
    """Returns the known generators of every two texts."""
    found: dict[tuple[str, ...], set[tuple[str, str]]] = defaultdict(set)
    for record in records:
        if isinstance(record, Ranking) and record.answered:
            for first, second, _ in _oriented(record):
                names = _names(record, first, second)
                if all(names):
                    found[_key(record, first, second)].add(names)
    return found


def _key(record: Ranking, first: int, second: int) -> tuple[str, ...]:
    return record.prompt, record.answers[first], record.answers[second], record.principle


def _names(record: Ranking, first: int, second: int) -> tuple[str, str]:
    names = (record.generators[first], record.generators[second]) if record.generators else ("", "")
    return names if all(names) else ("", "")
