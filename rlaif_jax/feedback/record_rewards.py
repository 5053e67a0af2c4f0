"""What a step's judgements are worth: the border where records become arrays, and pure functions make rewards of them.

Each function here is a `Worth`: the judgements of each row's answer go in, `Feedback` comes out. A row that nobody has
judged, or whose judgements have no value, is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.data.prompts import Record, padded
from rlaif_jax.data.text import token_spans
from rlaif_jax.data.tokenizers import Tokenizer
from rlaif_jax.feedback.judges.sentiment import SentimentJudge
from rlaif_jax.feedback.records.forms import Comment, Correction, Judgement, Ranking, Rating
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.feedback.sources import FeedbackSource
from rlaif_jax.rewards.comments import pool_comments, valence
from rlaif_jax.rewards.corrections import correction_rewards, span_rewards
from rlaif_jax.rewards.rankings import fit_plackett_luce
from rlaif_jax.rewards.ratings import z_score_mean
from rlaif_jax.types import Feedback, Rollout

Rows = Sequence[Sequence[Judgement]]


class Worth(Protocol):
    """What judgements are worth. judgements [B]: those of each row's answer, none where nobody judged it."""

    def __call__(
        self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout, judgements: Rows
    ) -> Feedback: ...


def rows_of(
    records: Sequence[Record], answers: Sequence[str], judgements: Sequence[Judgement]
) -> list[list[Judgement]]:
    """The judgements of each of B answers, whatever other answers they are of, too."""
    found: dict[tuple[str, str], list[Judgement]] = {}
    for judgement in judgements:
        for answer in judgement.answers:
            found.setdefault((judgement.prompt, answer), []).append(judgement)
    return [found.get((str(record["prompt"]), answer), []) for record, answer in zip(records, answers)]


# ---- Ratings


def mean_rating(records: Sequence[Record], answers: Sequence[str], rollout: Rollout, judgements: Rows) -> Feedback:
    """The mean of an answer's ratings on [0, 1]; missing where it has none."""
    return _means([[j.unit for j in given if isinstance(j, Rating) and j.answered] for given in judgements])


def standard_rating(records: Sequence[Record], answers: Sequence[str], rollout: Rollout, judgements: Rows) -> Feedback:
    """The mean of an answer's ratings in standard deviations of their raters (`rewards.ratings.z_score_mean`), over the
    ratings of the step: raters may differ in generosity and stretch."""
    told = [(row, j) for row, given in enumerate(judgements) for j in given if isinstance(j, Rating) and j.answered]
    names = {name: i for i, name in enumerate(sorted({j.rater.name for _, j in told}))}
    # A power of two of ratings and raters, so that few programs are compiled.
    size, raters = _power(max(len(told), len(answers))), _power(len(names))
    item, rater, value, weight = (np.zeros(size, t) for t in (np.int32, np.int32, np.float32, np.float32))
    for i, (row, j) in enumerate(told):
        item[i], rater[i], value[i], weight[i] = row, names[j.rater.name], j.unit, 1.0
    fitted = _standardised(item, rater, value, weight, len(answers), raters)
    return Feedback.single(np.asarray(fitted.value, np.float32), np.asarray(fitted.valid))


@partial(jax.jit, static_argnums=(4, 5))
def _standardised(item, rater, value, weight, num_items, num_raters):  # type: ignore[no-untyped-def]
    return z_score_mean(item, rater, value, weight, num_items=num_items, num_raters=num_raters)


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


# ---- Rankings


def win_share(records: Sequence[Record], answers: Sequence[str], rollout: Rollout, judgements: Rows) -> Feedback:
    """The share of comparisons that an answer wins, a tie counting half, in [0, 1]; missing where it has none."""
    return _means([_wins(answer, given) for answer, given in zip(answers, judgements)])


@dataclasses.dataclass(frozen=True)
class RankingUtility:
    """The Plackett-Luce utility of each answer among those to its prompt, in nats, mean 0 (`fit_plackett_luce` with a
    prior N(0, 1 / ridge)); lists of up to `most` answers, ties and partial lists as they are. Without `ranks` (partial
    orders) see `win_share`."""

    most: int
    ridge: float = 1.0

    def __call__(
        self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout, judgements: Rows
    ) -> Feedback:
        lists = {
            j.id: j for given in judgements for j in given if isinstance(j, Ranking) and j.answered and len(j.ranks) > 1
        }
        by_prompt: dict[str, list[Ranking]] = {}
        for ranking in lists.values():
            by_prompt.setdefault(ranking.prompt, []).append(ranking)
        texts = {p: sorted({a for ranking in given for a in ranking.answers}) for p, given in by_prompt.items()}
        longest = max((len(given) for given in by_prompt.values()), default=1)
        width = max([self.most, *(_power(len(given)) for given in texts.values() if len(given) > self.most)])
        shape = (len(answers), _power(longest), width)  # never more prompts than answers: one compiled program
        items, ranks, weight = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape[:2], np.float32)
        for number, (prompt, given) in enumerate(by_prompt.items()):
            for place, ranking in enumerate(given):
                weight[number, place] = 1.0
                for k, (answer, rank) in enumerate(zip(ranking.answers, ranking.ranks)):
                    items[number, place, k], ranks[number, place, k] = texts[prompt].index(answer), rank or 0
        fitted = np.asarray(_utilities(items, ranks, weight, width, self.ridge))
        placed = np.zeros((len(answers), width), bool)
        for number, given in enumerate(by_prompt.values()):
            for place in range(len(given)):
                placed[number, items[number, place][ranks[number, place] > 0]] = True
        numbers = {prompt: number for number, prompt in enumerate(by_prompt)}
        values, valid = np.zeros(len(answers), np.float32), np.zeros(len(answers), bool)
        for row, (record, answer) in enumerate(zip(records, answers)):
            prompt = str(record["prompt"])
            if prompt in numbers and answer in texts[prompt]:
                at = numbers[prompt], texts[prompt].index(answer)
                values[row], valid[row] = fitted[at], placed[at]
        return Feedback.single(np.where(valid, values, 0.0), valid)


@partial(jax.jit, static_argnums=(3,))
def _utilities(items, ranks, weight, num_items, ridge):  # type: ignore[no-untyped-def]
    one = lambda i, r, w: fit_plackett_luce(i, r, w, num_items=num_items, ridge=ridge)
    return jax.vmap(one)(items, ranks, weight)


# ---- Comments


@dataclasses.dataclass(frozen=True, eq=False)
class CommentValence:
    """The mean valence in [-1, 1] of the comments on each answer, read by a sentiment judge."""

    sentiment: SentimentJudge

    def __call__(
        self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout, judgements: Rows
    ) -> Feedback:
        told = [
            (row, j.text)
            for row, given in enumerate(judgements)
            for j in given
            if isinstance(j, Comment) and j.answered
        ]
        if not told:
            return Feedback.single(np.zeros(len(answers), np.float32), np.zeros(len(answers), bool))
        read = self.sentiment.log_odds([text for _, text in told])
        values, valid = valence(jnp.asarray(read.values), jnp.asarray(read.valid))
        pooled = pool_comments(values, valid, jnp.array([row for row, _ in told]), len(answers))
        return Feedback.single(np.asarray(pooled.values), np.asarray(pooled.valid))


# ---- Corrections


@dataclasses.dataclass(frozen=True, eq=False)
class CorrectionRewards:
    """Minus the edit rate of each answer as its score, and blame of single tokens as dense rewards (`rewards.corrections`).

    Of several corrections of an answer the last one counts. One with marked spans only has no edits: its score is 0,
    and each span's value is paid at the span's last token (Wu 2023).

    Attributes:
        length: tokens of a correction that are read.
        dense: what a token that had to go costs, and what a span of value 1 earns; an insertion costs half.
        kept: what a token that stayed earns, as a share of that. Without it the safest answer is the shortest, for
          whoever says little is seldom corrected.
    """

    tokenizer: Tokenizer
    length: int
    dense: float = 0.1
    kept: float = 0.0

    def __call__(
        self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout, judgements: Rows
    ) -> Feedback:
        found = [[j for j in given if isinstance(j, Correction) and j.answered] for given in judgements]
        ids, masks = np.asarray(rollout.responses), np.asarray(rollout.response_mask, bool)
        finished = np.asarray(rollout.finished)
        rows: list[list[int]] = []
        marks: list[list[tuple[int, int, float]]] = []
        for given, answer, own, mask, ended in zip(found, answers, ids, masks, finished):
            written = own[mask].tolist()
            rows.append(self._corrected(given[-1], answer, written, bool(ended))[: self.length] if given else [])
            marks.append(self._marked(given[-1], answer, written) if given else [])
        corrected, corrected_mask = padded(rows, self.length, self.tokenizer.pad_id, "right")
        valid = np.array([bool(given) for given in found])
        most = _power(max(map(len, marks), default=1))
        spans = np.zeros((3, len(answers), most), np.float32)
        for row, places in enumerate(marks):
            for k, place in enumerate(places):
                spans[:, row, k] = place
        rewards = _corrected(ids, masks, corrected, corrected_mask, valid, spans, self.dense, self.kept)
        return Feedback.single(*map(np.asarray, rewards))

    def _corrected(self, correction: Correction, answer: str, written: list[int], ended: bool) -> list[int]:
        """The tokens of the answer as it should have been; the answer's own where nothing was edited."""
        if correction.edited is None or correction.edited == answer:
            return written
        text = self.tokenizer.decode(written)
        blank = text[: len(text) - len(text.lstrip())]  # records have the answer without the blanks around it
        ends = [] if self.tokenizer.eos_id is None or not ended else [self.tokenizer.eos_id]
        return [*self.tokenizer.encode(blank + correction.edited), *ends]

    def _marked(self, correction: Correction, answer: str, written: list[int]) -> list[tuple[int, int, float]]:
        places = token_spans(self.tokenizer, written, [(s.start, s.end) for s in correction.spans], text=answer)
        return [(start, end, span.value) for (start, end), span in zip(places, correction.spans)]


@jax.jit
def _corrected(answer, mask, corrected, corrected_mask, valid, spans, dense, kept):  # type: ignore[no-untyped-def]
    rewards = correction_rewards(answer, mask, corrected, corrected_mask, valid, dense=dense, kept=kept)
    starts, ends = spans[:2].astype(jnp.int32)
    marked = dense * span_rewards(starts, ends, spans[2], ends > starts, mask)
    return rewards.score, rewards.valid, rewards.token_rewards + marked


# ---- A source of any form


@dataclasses.dataclass(frozen=True, eq=False)
class JudgementSource(FeedbackSource):
    """Any judge that gives records, and what they are worth: a `FeedbackSource` that keeps them in the store.

    judge(prompts, answers) -> judgements of B answers side by side (of rankings: one a prompt).
    """

    judge: Callable[[Sequence[str], Sequence[str]], Sequence[Judgement]]
    worth: Worth
    store: Store

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout) -> Feedback:
        judged = self.judge([str(record["prompt"]) for record in records], answers)
        self.store.add(judged)
        return self.worth(records, answers, rollout, rows_of(records, answers, judged))


def _means(values: Sequence[Sequence[float]]) -> Feedback:
    return Feedback.single(
        np.array([float(np.mean(given)) if given else 0.0 for given in values], np.float32),
        np.array([bool(given) for given in values]),
    )


def _wins(answer: str, judgements: Sequence[Judgement]) -> list[float]:
    found = []
    for judgement in judgements:
        if isinstance(judgement, Ranking) and judgement.answered:
            for i, j, chance in judgement.pairs():
                if answer in (judgement.answers[i], judgement.answers[j]):
                    found.append(chance if judgement.answers[i] == answer else 1 - chance)
    return found
