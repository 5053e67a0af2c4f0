"""Agreement tables of the quality report, with trivial baselines.

Raters are compared with raters, sources with sources, and judges with people.

Adjudications are no opinions: they take no part in the agreement of raters and of sources. Where judges are compared
with people as the truth ("judges"), an adjudication alone is the truth of its task.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy import sparse

import rlaif_jax.quality.statistics as stats
from rlaif_jax.quality.clusters import (
    SOURCES,
    EstimateFields,
    Group,
    GroupedRows,
    Ints,
    RaterPairs,
    Rows,
    VoteShares,
    is_judge,
    missing_estimate,
    rater_fields,
    ratio,
    source_shares,
)
from rlaif_jax.quality.intervals import Jackknife
from rlaif_jax.quality.values import Floats, divide
from rlaif_jax.quality.votes import FIRST, SECOND, Votes

MAX_LEVELS = 40
"""With more different values ratings are compared as numbers, not as categories."""
_SAME = "both used one and the same category"


def comparison_agreement(votes: Votes, shares: VoteShares, jackknife: Jackknife) -> dict[str, Any]:
    """Computes how far raters agree on pairs of answers.

    Args:
        votes: all votes.
        shares: pair -> rater -> shares of first, tie and second, from `votes`.
        jackknife: computes the intervals.

    Returns:
        Tables of JSON values. "sources" and "raters" have a row for each two sources and each two raters, with
        agreement and kappa; "raters_left_out" is the number of rows of raters left out; "judges" has a row for each
        judge, with its agreement with the people's vote as the truth; "alpha" is Krippendorff's alpha by source.
    """
    judges, alpha = GroupedRows(votes.count), GroupedRows(votes.count)
    truth = source_shares(votes, shares, votes.people("comparisons"))
    pairs, rows = _verdict_pairs(votes, shares)
    for index, by_rater in shares.items():
        pair = votes.pairs[index]
        for source, given in _shared_values(votes, by_rater):
            alpha.add(source, pair.cluster, stats.coincidences(np.stack(given)))
        for rater in filter(partial(is_judge, votes), by_rater if index in truth else ()):
            judges.add(rater, pair.cluster, np.outer(by_rater[rater], truth[index]))

    def agree(confusion: Floats) -> dict[str, Any]:
        return {
            "agreement": jackknife.estimate(confusion, stats.observed_agreement, share=True),
            "kappa": jackknife.estimate(confusion, stats.cohen_kappa, lowest=stats.lowest_kappa, reason=_SAME),
        }

    def described(group: Group) -> dict[str, Any]:
        sums = pairs.sums(group, rows)
        return agree(sums[:, :9].reshape(-1, 3, 3)) | {
            "longer": jackknife.estimate(sums[:, [9, 11]], ratio(0, 1), share=True),
            "first": jackknife.estimate(sums[:, [10, 12]], ratio(0, 1), share=True, reason="the order is not recorded"),
        }

    return _agreement_rows(pairs, described) | {
        "judges": _judge_rows(votes, judges, agree),
        "alpha": _alphas(alpha, jackknife),
    }


def _judge_rows(votes: Votes, groups: GroupedRows, agree: Callable[[Floats], dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for each judge: who it is, how much it judged, and `agree` of its sums."""
    return [
        rater_fields(votes, rater) | {"count": groups.size(rater)} | agree(groups.sums(rater))
        for rater in groups.largest_first()
    ]


def _verdict_pairs(votes: Votes, shares: VoteShares) -> tuple[RaterPairs, Rows]:
    """Returns the pairs of raters who judged the same answers, and what their rows are.

    A row [13] has the 9 cells of the confusion matrix; the longer answer's and the first shown's share of the second
    rater's verdict; 1; 1 if it is recorded which answer was shown first to the second rater.
    """
    entries = [(index, rater, votes.pairs[index]) for index, by_rater in shares.items() for rater in by_rater]
    verdicts = np.array([shares[index][rater] for index, rater, _ in entries]).reshape(-1, 3)
    longer = np.array([[0, 0, 1], [0.5, 0, 0.5], [1, 0, 0]])[[int(np.sign(pair.longer)) + 1 for *_, pair in entries]]
    known = _first_shown_shares(votes)
    shown = np.array([(known.get(entry[:2], 0.0), 1, entry[:2] in known) for entry in entries]).reshape(-1, 3)
    marks = np.column_stack([(longer * verdicts).sum(1), shown])

    def rows(one: Ints, two: Ints) -> Floats:
        confusion = verdicts[one, :, None] * verdicts[two, None, :]
        return np.column_stack([confusion.reshape(-1, 9), marks[two]])

    return RaterPairs(votes, [entry[:2] for entry in entries], [pair.cluster for *_, pair in entries]), rows


def _shared_values(votes: Votes, by_rater: Mapping[int, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Yields each source, and "all", with the values of its raters, where two or more gave one."""
    for source in (*SOURCES, "all"):
        given = [value for rater, value in by_rater.items() if source in ("all", votes.raters[rater].source)]
        if len(given) >= 2:
            yield source, given


def _agreement_rows(pairs: RaterPairs, described: Callable[[Group], dict[str, Any]]) -> dict[str, Any]:
    """Returns the rows of the pairs of sources, and of the pairs of raters with most in common."""
    raters, left_out = pairs.raters()
    row = lambda group: {"a": group.a, "b": group.b, "count": len(group.one)} | described(group)
    return {
        "sources": [row(group) for group in pairs.sources()],
        "raters": [row(group) for group in raters],
        "raters_left_out": left_out,
    }


def _alphas(groups: GroupedRows, jackknife: Jackknife) -> list[dict[str, Any]]:
    """Returns Krippendorff's alpha of verdicts of each source at every level."""
    levels: tuple[stats.Level, ...] = ("nominal", "ordinal", "interval")
    return [
        {"source": source, "count": groups.size(source)}
        | {kind: _alpha(groups.sums(source).reshape(-1, 9), jackknife, kind) for kind in levels}
        for source in groups.largest_first()
    ]


def _alpha(rows: Any, jackknife: Jackknife, kind: stats.Level) -> EstimateFields:
    """Returns Krippendorff's alpha of coincidences [clusters, C * C], dense or sparse, of 0, 1, ..."""
    size = math.isqrt(rows.shape[1])
    square = lambda sums: sums.reshape(*sums.shape[:-1], size, size)
    return jackknife.estimate(
        rows,
        lambda sums: stats.krippendorff_alpha(square(sums), kind),
        lowest=lambda sums: stats.lowest_alpha(square(sums), kind),
        reason="all values are the same",
    )


def _coincidence_rows(units: Sequence[tuple[int, Sequence[int]]], clusters: int, categories: int) -> Any:
    """Returns the sums of `statistics.coincidences` by cluster, a sparse matrix [clusters, categories^2].

    With many categories nearly all coincidences of a unit are 0.

    Args:
        units: (cluster, the category that each of two or more raters gave) of each unit.
        clusters: number of clusters.
        categories: number of categories.
    """
    places, numbers = [], []
    for cluster, given in units:
        found, counts = np.unique(given, return_counts=True)
        pairs = np.outer(counts, counts) - np.diag(counts)
        places.append(cluster * categories**2 + (found[:, None] * categories + found).ravel())
        numbers.append(pairs.ravel() / (len(given) - 1))
    row, column = np.divmod(np.concatenate(places), categories**2)
    return sparse.csr_matrix((np.concatenate(numbers), (row, column)), (clusters, categories**2))


def _first_shown_shares(votes: Votes) -> dict[tuple[int, int], float]:
    """Returns (pair, rater) -> the share of verdicts for the answer shown first.

    Only verdicts whose order was recorded count.
    """
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    for vote in votes.votes:
        if vote.front is not None:
            found[vote.pair, vote.rater].append(float(vote.category == (FIRST if vote.front else SECOND)))
    return {key: float(np.mean(values)) for key, values in found.items()}


def _mean_marks(votes: Votes) -> dict[int, dict[int, float]]:
    """Returns answer -> rater -> its mean rating."""
    given: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for mark in votes.marks:
        given[mark.answer][mark.rater].append(mark.value)
    return {answer: {rater: float(np.mean(v)) for rater, v in by_rater.items()} for answer, by_rater in given.items()}


def rating_agreement(votes: Votes, jackknife: Jackknife) -> dict[str, Any]:
    """Computes how far raters agree on ratings of the same answer: agreement, kappa, correlation, alpha.

    Args:
        votes: all votes; its marks are the ratings.
        jackknife: computes the intervals.

    Returns:
        Tables in the shape of `comparison_agreement`.
    """
    marks = _mean_marks(votes)
    truth = _true_marks(votes, marks)
    judges, moments = GroupedRows(votes.count), GroupedRows(votes.count)
    units: dict[str, list[tuple[int, list[int]]]] = defaultdict(list)
    levels = sorted({round(value, 9) for by_rater in marks.values() for value in by_rater.values()})
    place = {value: i for i, value in enumerate(levels)}
    for answer, by_rater in marks.items():
        cluster = votes.answers[answer]
        for source, given in _shared_values(votes, by_rater):
            moments.add(source, cluster, stats.interval_moments(given))
            if len(levels) <= MAX_LEVELS:
                units[source].append((cluster, [place[round(value, 9)] for value in given]))
        for rater in filter(partial(is_judge, votes), by_rater if answer in truth else ()):
            judges.add(rater, cluster, _rating_rows(by_rater[rater], truth[answer]))

    def chance(s: Floats) -> Floats:
        n, a, b, aa, bb = (s[..., i] for i in range(1, 6))
        return _positive(n * (aa + bb) - 2 * a * b, n * (aa + bb))

    def kappa(s: Floats) -> Floats:
        n, aa, bb, ab = s[..., 1], s[..., 4], s[..., 5], s[..., 6]
        return 1 - divide(n * (aa + bb - 2 * ab), chance(s))

    def lowest_kappa(s: Floats) -> Floats:  # a difference is at most the whole scale, 1
        return 1 - divide(s[..., 1] ** 2, chance(s))

    def correlation(s: Floats) -> Floats:
        n, a, b, aa, bb, ab = (s[..., i] for i in range(1, 7))
        spread = _positive(n * aa - a * a, n * aa) * _positive(n * bb - b * b, n * bb)
        return divide(n * ab - a * b, np.sqrt(spread))

    def agree(sums: Floats) -> dict[str, Any]:
        return {
            "agreement": jackknife.estimate(sums, ratio(0, 1), share=True),
            "kappa": jackknife.estimate(sums, kappa, lowest=lowest_kappa, reason="all values are the same"),
            "correlation": jackknife.estimate(
                sums, correlation, lowest=-1.0, reason="one side gave always the same value"
            ),
        }

    entries = [(answer, rater) for answer, by_rater in marks.items() for rater in by_rater]
    pairs = RaterPairs(votes, entries, [votes.answers[answer] for answer, _ in entries])
    given_marks = np.array([marks[answer][rater] for answer, rater in entries])
    described = lambda group: agree(pairs.sums(group, lambda a, b: _rating_rows(given_marks[a], given_marks[b])))
    many = f"more than {MAX_LEVELS} different values: read the interval alpha"
    kinds: tuple[stats.Level, ...] = ("nominal", "ordinal")
    alphas = {
        source: {kind: _alpha(_coincidence_rows(given, votes.count, len(levels)), jackknife, kind) for kind in kinds}
        for source, given in units.items()
    }
    rows = [
        {"source": source, "count": moments.size(source)}
        | {
            kind: alphas[source][kind] if source in alphas else missing_estimate(many)
            for kind in ("nominal", "ordinal")
        }
        | {
            "interval": jackknife.estimate(
                moments.sums(source),
                stats.interval_alpha,
                lowest=stats.lowest_interval_alpha,
                reason="all values are the same",
            )
        }
        for source in moments.largest_first()
    ]
    return _agreement_rows(pairs, described) | {"judges": _judge_rows(votes, judges, agree), "alpha": rows}


def _rating_rows(a: Any, b: Any) -> Floats:
    """Returns rows [..., 7] of two ratings [...] of an answer, whose sums the statistics read."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.stack([abs(a - b) < 1e-9, np.ones_like(a), a, b, a * a, b * b, a * b], axis=-1)


def _true_marks(votes: Votes, marks: Mapping[int, Mapping[int, float]]) -> dict[int, float]:
    """Returns answer -> the people's rating: the adjudication, or the mean of their ratings."""
    people = votes.people("ratings")
    found = {}
    for answer, by_rater in marks.items():
        given = [value for rater, value in by_rater.items() if votes.raters[rater].source == people]
        if given:
            found[answer] = float(np.mean(given))
    return found | {answer: value for (source, answer), value in votes.settled.items() if source == people}


def _positive(value: Floats, scale: Floats) -> Floats:
    """Returns `value`, 0 where it is only the rounding of a difference of sums of size `scale`."""
    return np.where(value <= 1e-12 * scale, 0.0, value)


# ---- Labels


def label_agreement(votes: Votes, jackknife: Jackknife) -> dict[str, Any]:
    """Computes how far raters agree on labels: choices among three or more options.

    Labels are compared by what was chosen; that two options were both not chosen is no agreement about them. Time and
    memory are linear in the number of options.

    Args:
        votes: all votes; its labels are compared.
        jackknife: computes the intervals.

    Returns:
        Tables in the shape of `comparison_agreement`. For comparison "most_common" is how often the other rater (or
        people) chose what it chose most often. The alpha is nominal.
    """
    given: dict[int, dict[int, Counter[int]]] = defaultdict(lambda: defaultdict(Counter))
    for label in votes.labels:
        given[label.item][label.rater][label.option] += 1
    shares = {item: {rater: _shares(counts) for rater, counts in by_rater.items()} for item, by_rater in given.items()}
    people = votes.people("labels")
    truth = {item: {option: 1.0} for (source, item), option in votes.chosen.items() if source == people}
    units: dict[str, list[tuple[int, list[Choice]]]] = defaultdict(list)
    for item, by_rater in shares.items():
        for source, choices in _shared_values(votes, by_rater):
            units[source].append((votes.labelled[item], choices))
        by_people = [choice for rater, choice in by_rater.items() if votes.raters[rater].source == people]
        if by_people and item not in truth:
            truth[item] = _mean_choice(by_people)
    entries = [(item, rater) for item, by_rater in shares.items() for rater in by_rater]
    clusters = [votes.labelled[item] for item, _ in entries]
    pairs = RaterPairs(votes, entries, clusters)
    # What was chosen: a row for each entry, then one for the truth of each item.
    chosen = _choice_rows([*(shares[item][rater] for item, rater in entries), *truth.values()])
    place_of_truth = {item: len(entries) + i for i, item in enumerate(truth)}
    judges: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for entry, (item, rater) in enumerate(entries):
        if item in truth and is_judge(votes, rater):
            judges[rater].append((entry, place_of_truth[item]))

    def agree(group: Group) -> dict[str, Any]:
        sums = _label_sums(chosen, group, np.asarray(clusters)[group.one], votes.count)
        size = (sums.shape[1] - 2) // 2
        expected = lambda s: divide((s[..., 2 : 2 + size] * s[..., 2 + size :]).sum(-1), s[..., 1] ** 2)
        chance = lambda s: _positive(1 - expected(s), np.ones(()))
        kappa = lambda s: 1 - divide(1 - divide(s[..., 0], s[..., 1]), chance(s))
        lowest = lambda s: 1 - divide(np.ones(()), chance(s))  # they never chose the same
        most_common = lambda s: divide(s[..., 2 + size :].max(-1), s[..., 1])
        return {
            "agreement": jackknife.estimate(sums, ratio(0, 1), share=True),
            "kappa": jackknife.estimate(sums, kappa, lowest=lowest, reason=_SAME),
            "most_common": jackknife.estimate(sums, most_common, share=True),
        }

    def alpha(source: str) -> EstimateFields:
        sums = _unit_sums(units[source], votes.count)
        never = lambda s: _label_alpha(np.concatenate([np.zeros_like(s[..., :1]), s[..., 1:]], axis=-1))
        return jackknife.estimate(sums, _label_alpha, lowest=never, reason="all labels are the same")

    largest = lambda found: sorted(found, key=lambda key: -len(found[key]))
    return _agreement_rows(pairs, agree) | {
        "judges": [
            rater_fields(votes, rater)
            | {"count": len(judges[rater])}
            | agree(Group("", "", *np.array(judges[rater], np.int64).T))
            for rater in largest(judges)
        ],
        "alpha": [
            {"source": source, "count": len(units[source]), "nominal": alpha(source)} for source in largest(units)
        ],
    }


Choice = Mapping[int, float]  # option -> share of a rater's labels of a thing


def _shares(counts: Counter[int]) -> dict[int, float]:
    return {option: count / counts.total() for option, count in counts.items()}


def _mean_choice(choices: Sequence[Choice]) -> dict[int, float]:
    options = dict.fromkeys(option for choice in choices for option in choice)
    return {option: sum(choice.get(option, 0.0) for choice in choices) / len(choices) for option in options}


def _same_choice(one: Choice, two: Choice) -> float:
    """Returns the probability that a label of each choice is the same."""
    return sum(share * two.get(option, 0.0) for option, share in one.items())


def _numbered(choices: Iterable[Choice]) -> dict[int, int]:
    """Returns option -> its column, for the options that occur."""
    return {option: column for column, option in enumerate(sorted({option for choice in choices for option in choice}))}


def _choice_rows(choices: Sequence[Choice]) -> Any:
    """Returns a sparse matrix [choices, options] of the shares of each choice."""
    column = _numbered(choices)
    found = [(row, column[option], share) for row, choice in enumerate(choices) for option, share in choice.items()]
    rows, columns, numbers = zip(*found) if found else ((), (), ())
    return sparse.csr_matrix((numbers, (rows, columns)), (len(choices), len(column)), dtype=np.float64)


def _label_sums(chosen: Any, group: Group, clusters: Ints, count: int) -> Floats:
    """Returns sums [count, 2 + 2 C] by prompt of the pairs of a group.

    The columns are: same choice, 1, the C options of the one, those of the other; C counts the options that they chose.

    Args:
        chosen: what was chosen in each entry, from `_choice_rows`.
        group: the pairs of entries.
        clusters: [pairs] the prompt of each pair.
        count: number of prompts.
    """
    one, two = chosen[group.one], chosen[group.two]
    options = np.unique(np.concatenate([one.indices, two.indices]))
    by_prompt = sparse.csr_matrix(
        (np.ones(len(clusters)), (clusters, np.arange(len(clusters)))), (count, len(clusters))
    )
    same = np.asarray(one.multiply(two).sum(1)).ravel()
    first, second = ((by_prompt @ side[:, options]).toarray() for side in (one, two))
    if group.both_ways:
        first = second = (first + second) / 2
    return np.column_stack([by_prompt @ same, by_prompt @ np.ones(len(clusters)), first, second])


def _unit_sums(units: Sequence[tuple[int, Sequence[Choice]]], count: int) -> Floats:
    """Returns the sums [count, 1 + C] by prompt that `_label_alpha` reads.

    `units` are the things that two or more raters labelled.
    """
    column = _numbered(choice for _, choices in units for choice in choices)
    sums = np.zeros((count, 1 + len(column)))
    for cluster, choices in units:
        total = _mean_choice(choices)
        pairs = len(choices) ** 2 * _same_choice(total, total) - sum(_same_choice(c, c) for c in choices)
        sums[cluster, 0] += pairs / (len(choices) - 1)
        for choice in choices:
            for option, share in choice.items():
                sums[cluster, 1 + column[option]] += share
    return sums


def _label_alpha(sums: Floats) -> Floats:
    """Computes Krippendorff's nominal alpha from the coincidence matrix's trace and margins [..., 1 + C].

    It is `statistics.krippendorff_alpha` without the matrix, whose size is the square of the number of options.
    """
    same, margins = sums[..., 0], sums[..., 1:]
    total = margins.sum(-1)
    spread = _positive(total**2 - (margins**2).sum(-1), total**2)
    return 1 - divide((total - same) * (total - 1), spread)
