"""Reads records of feedback as votes on pairs of answers, marks of single answers, and labels.

Prompts, answers, raters and pairs are numbered. A rater is a name with its source, model and wording: two revisions of a
template under one name are two judges. Where several raters have a name, each has a label that says what differs.

An adjudication (`people.queue.ADJUDICATED`) is the truth and no opinion of one more rater: it is kept apart from the
votes, and the latest one of a task is the only one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from rlaif_jax.feedback.people.queue import ADJUDICATED, is_later
from rlaif_jax.feedback.records.forms import Judgement, Ranking, Rater, Rating

PEOPLE = ("person", "simulated")
"""The sources that can be people, those of flesh and blood first."""
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


class Label(NamedTuple):
    """One choice among three or more options that are the same for many prompts.

    Attributes:
        item: index of what was labelled.
        rater: index of the rater.
        option: index of the chosen option; the index after the last one where all options were tied.
    """

    item: int
    rater: int
    option: int


class Voter(NamedTuple):
    """A rater as the tables show it.

    Attributes:
        label: the name, with what differs where several raters have the name.
        source: the kind of judge.
    """

    label: str
    source: str


@dataclasses.dataclass(frozen=True)
class Votes:
    """The judgements as votes, marks and labels; indices instead of names and texts.

    Attributes:
        used: the records that count: neither superseded nor retracted, and no adjudication before the latest.
        clusters: [used], the index of each record's prompt.
        count: number of prompts.
        pairs: the pairs of answers that rankings compare.
        votes: the verdicts on pairs.
        equal: (pair, source) where two generators wrote the same text, which is their tie and no verdict.
        answers: the prompt's index of each answer that was compared or rated.
        marks: the ratings.
        labelled: the prompt's index of each thing that was labelled.
        labels: the labels.
        raters: label and source of each rater who is no adjudicator.
        decided: (source, pair) -> FIRST, TIE or SECOND: the adjudications of pairs.
        settled: (source, answer) -> the rating that an adjudication gives, in [0, 1].
        chosen: (source, labelled thing) -> the option that an adjudication chooses.
    """

    used: tuple[Judgement, ...]
    clusters: tuple[int, ...]
    count: int
    pairs: tuple[Pair, ...]
    votes: tuple[Vote, ...]
    equal: tuple[tuple[int, str], ...]
    answers: tuple[int, ...]
    marks: tuple[Mark, ...]
    labelled: tuple[int, ...]
    labels: tuple[Label, ...]
    raters: tuple[Voter, ...]
    decided: Mapping[tuple[str, int], int]
    settled: Mapping[tuple[str, int], float]
    chosen: Mapping[tuple[str, int], int]

    def people(self, form: Literal["comparisons", "ratings", "labels"]) -> str | None:
        """Returns the source that counts as people in judgements of a form; None without people."""
        given: Mapping[str, Iterable[Vote | Mark | Label]]
        given = {"comparisons": self.votes, "ratings": self.marks, "labels": self.labels}
        final = {"comparisons": self.decided, "ratings": self.settled, "labels": self.chosen}[form]
        found = {self.raters[entry.rater].source for entry in given[form]} | {source for source, _ in final}
        return next((source for source in PEOPLE if source in found), None)


# ---- Raters


class RaterKey(NamedTuple):
    """What makes two records those of one rater: all four are equal.

    Attributes:
        name: of the rater.
        source: the kind of judge.
        model: name and revision of an AI judge's weights.
        wording: hash of the template or of the rules.
    """

    name: str
    source: str
    model: str
    wording: str


def rater_key(rater: Rater) -> RaterKey:
    """Returns the identity of a rater."""
    return RaterKey(rater.name, rater.source, rater.model, rater.wording)


def adjudicates(rater: Rater) -> bool:
    """Returns whether the records of a rater decide where other people disagreed."""
    return rater.source in PEOPLE and rater.name.startswith(ADJUDICATED)


def rater_labels(raters: Iterable[Rater]) -> dict[RaterKey, str]:
    """Returns a different label for each rater.

    It is the rater's name, followed by what differs where several raters have the name.
    """
    by_name: dict[str, list[RaterKey]] = {}
    for key in dict.fromkeys(map(rater_key, raters)):
        by_name.setdefault(key.name, []).append(key)
    labels = {same[0]: name for name, same in by_name.items() if len(same) == 1}
    taken = set(by_name)
    for same in by_name.values():
        sources, models, wordings = ({key[field] for key in same} for field in (1, 2, 3))
        length = next((n for n in range(8, 64) if len({w[:n] for w in wordings}) == len(wordings)), 64)
        for key in same if len(same) > 1 else ():
            parts = [key.source] if len(sources) > 1 else []
            parts += [f"model {key.model}"] if len(models) > 1 and key.model else []
            parts += [f"prompt {key.wording[:length]}"] if len(wordings) > 1 and key.wording else []
            label = f"{key.name} ({', '.join(parts)})" if parts else f"{key.name} (no model, no prompt)"
            while label in taken:
                label += " again"
            taken.add(label)
            labels[key] = label
    return labels


# ---- Records that count


def current(judgements: Sequence[Judgement]) -> list[int]:
    """Returns the indices of the records that are neither superseded nor a retraction.

    Of equal records only the first counts. As in the store, a record supersedes none of another rater. Of several
    adjudications of a task, whoever made them, only the latest counts.
    """
    gone = {(j.supersedes, j.rater.name, j.rater.source) for j in judgements if j.supersedes}
    kept: dict[Judgement, int] = {}
    for index, judgement in enumerate(judgements):
        rater = judgement.rater
        if judgement.status != "retracted" and not (gone and (judgement.id, rater.name, rater.source) in gone):
            kept.setdefault(judgement, index)
    final: dict[tuple[str, str, str, str], Judgement] = {}
    for judgement in list(kept):
        if judgement.answered and adjudicates(judgement.rater):
            task = judgement.rater.source, judgement.form, judgement.item, judgement.principle
            earlier = final.get(task)
            if earlier is not None and is_later(earlier, judgement):
                del kept[judgement]
                continue
            if earlier is not None:
                del kept[earlier]
            final[task] = judgement
    return list(kept.values())


def _label_sets(records: Iterable[Judgement]) -> set[frozenset[str]]:
    """Returns the sets of three or more options from which records choose labels.

    Such a set is offered for two prompts or more, none of its answers has a writer, and each ranking of it is a single
    best option with all others tied (or all tied): the others were not chosen, which is no verdict between them.
    """
    prompts: dict[frozenset[str], set[str]] = defaultdict(set)
    ranked: set[frozenset[str]] = set()
    for record in records:
        if isinstance(record, Ranking) and record.answered and len(record.answers) > 2:
            options = frozenset(record.answers)
            prompts[options].add(record.prompt)
            places = Counter(record.ranks)
            is_choice = len(places) == 1 or (len(places) == 2 and None not in places and places[min(places)] == 1)  # type: ignore[type-var]
            if record.generators or not is_choice or len(options) < len(record.answers):
                ranked.add(options)
    return {options for options, found in prompts.items() if len(found) > 1 and options not in ranked}


def read_votes(judgements: Sequence[Judgement], items: Sequence[str] | None = None) -> Votes:
    """Reads judgements as votes, marks and labels.

    Args:
        judgements: records of any form.
        items: a name for each record; records of one name form a cluster. None: records of one prompt do.
    """
    kept = current(judgements)
    reader = _Reader([judgements[index] for index in kept])
    names = [judgements[index].prompt if items is None else items[index] for index in kept]
    clusters = {name: number for number, name in enumerate(dict.fromkeys(names))}
    for record, name in zip(reader.records, names):
        reader.read(record, clusters[name])
    labels = rater_labels(judgement.rater for judgement in judgements)
    return Votes(
        used=tuple(reader.records),
        clusters=tuple(clusters[name] for name in names),
        count=len(clusters),
        pairs=tuple(reader.described),
        votes=tuple(reader.votes),
        equal=tuple(reader.equal),
        answers=tuple(reader.homes),
        marks=tuple(reader.marks),
        labelled=tuple(reader.labelled),
        labels=tuple(reader.labels),
        raters=tuple(Voter(labels[key], key.source) for key in reader.raters),
        decided=reader.decided,
        settled=reader.settled,
        chosen=reader.chosen,
    )


class _Reader:
    """Numbers what records speak of and collects their votes, marks and labels; see `Votes`."""

    def __init__(self, records: Sequence[Judgement]) -> None:
        self.records = records
        self.raters: dict[RaterKey, int] = {}
        self.described: list[Pair] = []
        self.votes: list[Vote] = []
        self.equal: dict[tuple[int, str], None] = {}
        self.homes: list[int] = []
        self.marks: list[Mark] = []
        self.labelled: list[int] = []
        self.labels: list[Label] = []
        self.decided: dict[tuple[str, int], int] = {}
        self.settled: dict[tuple[str, int], float] = {}
        self.chosen: dict[tuple[str, int], int] = {}
        self._writers = _writers(records)
        self._label_sets = _label_sets(records)
        self._options = {text: i for i, text in enumerate(sorted({t for texts in self._label_sets for t in texts}))}
        self._pairs: dict[tuple[str, ...], int] = {}
        self._answers: dict[tuple[str, str, str], int] = {}
        self._things: dict[tuple[str, str, frozenset[str]], int] = {}

    def read(self, record: Judgement, cluster: int) -> None:
        """Takes up a record about the prompt `cluster`."""
        is_final = adjudicates(record.rater)
        # A rater without an answer is numbered, too: what it did not answer is counted.
        rater = -1 if is_final else self.raters.setdefault(rater_key(record.rater), len(self.raters))
        source = record.rater.source
        if not record.answered:
            return
        if isinstance(record, Rating):
            answer = self._answer(record, record.answers[0], cluster)
            if is_final:
                self.settled[source, answer] = record.unit
            else:
                self.marks.append(Mark(answer, rater, record.unit))
        elif isinstance(record, Ranking) and frozenset(record.answers) in self._label_sets:
            thing, option = self._label(record, cluster)
            if is_final:
                self.chosen[source, thing] = option
            else:
                self.labels.append(Label(thing, rater, option))
        elif isinstance(record, Ranking):
            for first, second, chance in _oriented(record):
                pair = self._pair(record, first, second, cluster)
                if is_final:
                    self.decided[source, pair] = _category(record, chance)
                    continue
                front = record.shown.index(first) < record.shown.index(second) if record.shown else None
                probability = chance if record.probability is not None else np.nan
                self.votes.append(Vote(pair, rater, _category(record, chance), probability, front))
            for first, second in _equal(record):
                self.equal[self._pair(record, first, second, cluster), source] = None

    def _answer(self, record: Judgement, text: str, cluster: int) -> int:
        answer = self._answers.setdefault((record.prompt, text, record.principle), len(self._answers))
        self.homes += [cluster] * (answer == len(self.homes))
        return answer

    def _pair(self, record: Ranking, first: int, second: int, cluster: int) -> int:
        key = _key(record, first, second)
        names = _names(record, first, second)
        if not all(names) and len(self._writers[key]) == 1:  # a record without writers means the only known ones
            (names,) = self._writers[key]
        pair = self._pairs.setdefault((*key, *names), len(self._pairs))
        if pair == len(self.described):
            texts = record.answers[first], record.answers[second]
            one, two = (self._answer(record, text, cluster) for text in texts)
            self.described.append(Pair(cluster, (one, two), len(texts[0]) - len(texts[1]), names))
        return pair

    def _label(self, record: Ranking, cluster: int) -> tuple[int, int]:
        """Returns the index of what a record labels, and of the option that it chooses."""
        key = record.prompt, record.principle, frozenset(record.answers)
        thing = self._things.setdefault(key, len(self._things))
        self.labelled += [cluster] * (thing == len(self.labelled))
        best = min(rank for rank in record.ranks if rank is not None)
        is_tie = record.ranks.count(best) > 1
        return thing, len(self._options) if is_tie else self._options[record.answers[record.ranks.index(best)]]


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
        if isinstance(record, Ranking) and record.answered and record.generators:
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
