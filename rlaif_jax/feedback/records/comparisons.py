"""Rankings and ratings as comparisons of two answers, for a reward model to learn from.

A ranking becomes its pairs and no list of Plackett-Luce: ties, partial orders, probabilities and strengths of preference are
all properties of pairs, and one loss and one layout of batches serve every form of feedback.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from rlaif_jax.data.conversations import HUMAN
from rlaif_jax.feedback.records.forms import Judgement, Ranking, Rater, Rating


class Comparison(NamedTuple):
    """All that is known about two answers to a prompt.

    Attributes:
        prompt: the prompt.
        answers: the two answers, in alphabetical order, which carries no meaning.
        probability: of the first answer being better: the mean over the judgements; a tie counts 1/2.
        degree: by how much the better answer is better, in [0, 1]: the difference of ratings on their scale, or the strength
            of the preference from barely (0) to far (1); 0 where nobody has said it.
        weight: the number of independent judgements.
    """

    prompt: str
    answers: tuple[str, str]
    probability: float
    degree: float
    weight: float


class Comparisons(NamedTuple):
    """Comparisons, and what was not used for them.

    Attributes:
        pairs: one entry for each two answers, in the order in which they were first judged.
        unused: reason -> number of judgements or answers.
    """

    pairs: list[Comparison]
    unused: Counter[str]


class _Verdict(NamedTuple):
    """A judge's comparison of two answers; `degree` is None where it is unknown."""

    probability: float
    degree: float | None
    weight: float


_Verdicts = dict[tuple[str, str, str], dict[tuple[Rater, str], _Verdict]]
"""(prompt, first answer, second answer) -> (judge, criterion) -> verdict."""
_SEVERAL = Rater("several", "person")


def comparisons(judgements: Iterable[Judgement], principles: Collection[str] = ()) -> Comparisons:
    """Returns the comparisons that rankings and ratings imply, one for each two answers.

    Each of the C(K, 2) pairs of a ranking of K answers has the weight 2 / K, because they come from K - 1 independent
    comparisons. Ratings are compared within a judge who rated several answers to the prompt; where every judge rated one,
    the mean ratings of the answers are compared. A judge who both ranked and rated two answers has one verdict, with the
    ranking's order and the ratings' difference.

    Args:
        judgements: judgements that count: none that others replace.
        principles: the criteria that count; empty: all.
    """
    unused: Counter[str] = Counter()
    ranked: _Verdicts = defaultdict(dict)
    ratings: dict[tuple[str, str], list[Rating]] = defaultdict(list)
    for judgement in judgements:
        if reason := _not_comparing(judgement, principles):
            unused[reason] += 1
        elif isinstance(judgement, Ranking):
            _add_ranking(judgement, ranked, unused)
        elif isinstance(judgement, Rating):
            ratings[judgement.prompt, judgement.principle].append(judgement)
    rated: _Verdicts = defaultdict(dict)
    for (prompt, principle), given in ratings.items():
        _add_ratings(prompt, principle, given, rated, unused)
    for key, by_judge in rated.items():
        for judge, verdict in by_judge.items():
            known = ranked[key].get(judge)
            if known is not None:
                verdict = known if known.degree is not None else known._replace(degree=verdict.degree)
            ranked[key][judge] = verdict
    return Comparisons([_merged(key, list(by_judge.values())) for key, by_judge in ranked.items() if by_judge], unused)


def _not_comparing(judgement: Judgement, principles: Collection[str]) -> str:
    """Returns why a judgement compares no answers; "" where it may."""
    if not isinstance(judgement, (Ranking, Rating)):
        return f"{judgement.form}: it does not compare answers"
    if not judgement.answered:
        return f"{judgement.form} without a value ({judgement.status})"
    if principles and judgement.principle not in principles:
        return f"{judgement.form} by another criterion"
    if judgement.prompt.endswith(HUMAN):
        return f"{judgement.form} of what a person says next"
    return ""


def _add_ranking(ranking: Ranking, verdicts: _Verdicts, unused: Counter[str]) -> None:
    pairs = list(ranking.pairs())
    places = {i for first, second, _ in pairs for i in (first, second)}
    if left := len(ranking.answers) - len(places):
        unused["answer without a place in its ranking"] += left
    weight = min(1.0, (len(places) - 1) / max(len(pairs), 1))
    degree = None if ranking.strength is None else (ranking.strength - 1) / 4
    for first, second, p in pairs:
        texts = ranking.answers[first], ranking.answers[second]
        if texts[0] == texts[1]:
            unused["comparison of two equal answers"] += 1
        else:
            _add(verdicts, ranking.prompt, texts, (ranking.rater, ranking.principle), _Verdict(p, degree, weight))


def _add(verdicts: _Verdicts, prompt: str, texts: tuple[str, str], judge: tuple[Rater, str], verdict: _Verdict) -> None:
    """Adds a verdict; the mean of two by one judge, such as in both orders, is one judgement."""
    if texts[0] > texts[1]:
        texts, verdict = (texts[1], texts[0]), verdict._replace(probability=1 - verdict.probability)
    by_judge = verdicts[prompt, *texts]
    known = by_judge.get(judge)
    if known is not None:
        verdict = known._replace(probability=(known.probability + verdict.probability) / 2)
    by_judge[judge] = verdict


def _add_ratings(prompt: str, principle: str, ratings: list[Rating], verdicts: _Verdicts, unused: Counter[str]) -> None:
    by_judge: dict[Rater, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    together: dict[str, list[float]] = defaultdict(list)
    for rating in ratings:
        by_judge[rating.rater][rating.answers[0]].append(rating.unit)
        together[rating.answers[0]].append(rating.unit)
    judges = {judge: units for judge, units in by_judge.items() if len(units) > 1}
    if not judges and len(together) > 1:
        judges = {_SEVERAL: together}
    elif alone := sum(len(values) for judge in by_judge.keys() - judges.keys() for values in by_judge[judge].values()):
        unused["rating that no other of its judge to this prompt can be compared with"] += alone
    for judge, units in judges.items():
        for texts, difference in _differences(units):
            p = 0.5 if difference == 0 else float(difference > 0)
            _add(verdicts, prompt, texts, (judge, principle), _Verdict(p, abs(difference), 2 / len(units)))


def _differences(units: Mapping[str, list[float]]) -> Iterator[tuple[tuple[str, str], float]]:
    means = {answer: sum(values) / len(values) for answer, values in units.items()}
    for first, second in itertools.combinations(means, 2):
        yield (first, second), means[first] - means[second]


def _merged(key: tuple[str, str, str], verdicts: list[_Verdict]) -> Comparison:
    weight = sum(verdict.weight for verdict in verdicts)
    p = sum(verdict.weight * verdict.probability for verdict in verdicts) / weight
    known = [verdict for verdict in verdicts if verdict.degree is not None]
    signed = sum(v.weight * (2 * v.probability - 1) * (v.degree or 0.0) for v in known)
    degree = signed / max(sum(verdict.weight for verdict in known), 1e-9)
    # Where the larger differences are on the side of the minority, nothing is known about the degree.
    return Comparison(key[0], key[1:], p, abs(degree) if degree * (p - 0.5) > 0 else 0.0, weight)
