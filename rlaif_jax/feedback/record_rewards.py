"""Turns the judgements recorded for a step into `Feedback`; the maths is in `rewards/`.

Each function here is a `RewardFn`. An answer that nobody has judged, or whose judgements have no value, is missing.
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
from rlaif_jax.feedback.sources import CountingSource
from rlaif_jax.rewards.comments import pool_comments, valence
from rlaif_jax.rewards.corrections import correction_rewards, span_rewards
from rlaif_jax.rewards.rankings import fit_plackett_luce
from rlaif_jax.rewards.ratings import z_score_mean
from rlaif_jax.types import Feedback, Rollout

JudgementsPerRow = Sequence[Sequence[Judgement]]
"""The judgements of each of B answers; empty for an answer that nobody has judged."""


class RewardFn(Protocol):
    """Turns the judgements of B answers into rewards.

    Args:
        records: the source records of the B prompts, with the prompt's text in "prompt".
        answers: the B decoded answers.
        rollout: the answers' tokens.
        judgements: the judgements of each answer, as `group_by_answer` returns them.

    Returns:
        Feedback on the B answers, on the host.
    """

    def __call__(
        self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout, judgements: JudgementsPerRow
    ) -> Feedback: ...


def group_by_answer(
    records: Sequence[Record], answers: Sequence[str], judgements: Sequence[Judgement]
) -> list[list[Judgement]]:
    """Returns the judgements of each of B answers.

    A judgement of several answers is listed at each of them.

    Args:
        records: the source records of the B prompts.
        answers: the B answers.
        judgements: judgements of any prompts and answers, in any order.
    """
    found: dict[tuple[str, str], list[Judgement]] = {}
    for judgement in judgements:
        for answer in judgement.answers:
            found.setdefault((judgement.prompt, answer), []).append(judgement)
    return [found.get((str(record["prompt"]), answer), []) for record, answer in zip(records, answers)]


# ---- Ratings


def mean_rating(
    records: Sequence[Record], answers: Sequence[str], rollout: Rollout, judgements: JudgementsPerRow
) -> Feedback:
    """Returns the mean of each answer's ratings, scaled to [0, 1].

    An answer without ratings is missing.

    Args:
        records: not read.
        answers: the B answers; not read.
        rollout: not read.
        judgements: the judgements of each answer; only ratings count.
    """
    return _means([[j.unit for j in given if isinstance(j, Rating) and j.answered] for given in judgements])


def standard_rating(
    records: Sequence[Record], answers: Sequence[str], rollout: Rollout, judgements: JudgementsPerRow
) -> Feedback:
    """Returns the mean of each answer's ratings in standard deviations of their raters.

    Mean and deviation of a rater are those of the step's ratings. This removes differences between raters in
    generosity and spread (`rewards.ratings.z_score_mean`). An answer without such ratings is missing.

    Args:
        records: not read.
        answers: the B answers.
        rollout: not read.
        judgements: the judgements of each answer; only ratings count.
    """
    ratings = [(row, j) for row, given in enumerate(judgements) for j in given if isinstance(j, Rating) and j.answered]
    key = lambda rater: (rater.name, rater.source, rater.model, rater.wording)  # two wordings are two raters
    names = {name: i for i, name in enumerate(sorted({key(j.rater) for _, j in ratings}))}
    # A power of two of ratings and raters, so that few programs are compiled.
    size, num_raters = next_power_of_two(max(len(ratings), len(answers))), next_power_of_two(len(names))
    item, rater, value, weight = (np.zeros(size, t) for t in (np.int32, np.int32, np.float32, np.float32))
    for i, (row, j) in enumerate(ratings):
        item[i], rater[i], value[i], weight[i] = row, names[key(j.rater)], j.unit, 1.0
    fitted = _z_score_mean(item, rater, value, weight, num_items=len(answers), num_raters=num_raters)
    return Feedback.single(np.asarray(fitted.value, np.float32), np.asarray(fitted.valid))


_z_score_mean = jax.jit(z_score_mean, static_argnames=("num_items", "num_raters"))


def next_power_of_two(n: int) -> int:
    """Returns the smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


# ---- Rankings


def win_share(
    records: Sequence[Record], answers: Sequence[str], rollout: Rollout, judgements: JudgementsPerRow
) -> Feedback:
    """Returns the share of comparisons that each answer wins, in [0, 1]; a tie counts half.

    An answer without comparisons is missing.

    Args:
        records: not read.
        answers: the B answers.
        rollout: not read.
        judgements: the judgements of each answer; only rankings count.
    """
    return _means([_wins(answer, given) for answer, given in zip(answers, judgements)])


@dataclasses.dataclass(frozen=True)
class RankingUtility:
    """Computes the Plackett-Luce utility of each answer among those to its prompt, in nats, mean 0.

    Ties and partial lists are used as they are (`rewards.rankings.fit_plackett_luce`). Rankings with `beats` instead of
    `ranks` are not used; see `win_share`.

    Attributes:
        most: the expected number of different answers to a prompt; more answers compile another program.
        ridge: precision of the prior N(0, 1 / ridge) on a utility.
    """

    most: int
    ridge: float = 1.0

    def __call__(
        self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout, judgements: JudgementsPerRow
    ) -> Feedback:
        rankings = {
            j.id: j for given in judgements for j in given if isinstance(j, Ranking) and j.answered and len(j.ranks) > 1
        }
        by_prompt: dict[str, list[Ranking]] = {}
        for ranking in rankings.values():
            by_prompt.setdefault(ranking.prompt, []).append(ranking)
        # The index of each answer to each ranked prompt.
        index = {
            prompt: {text: i for i, text in enumerate(sorted({a for ranking in given for a in ranking.answers}))}
            for prompt, given in by_prompt.items()
        }
        longest = max((len(given) for given in by_prompt.values()), default=1)
        width = max([self.most, *(next_power_of_two(len(texts)) for texts in index.values() if len(texts) > self.most)])
        # Never more prompts than answers: one compiled program.
        shape = (len(answers), next_power_of_two(longest), width)
        items, ranks, weight = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape[:2], np.float32)
        placed = np.zeros((len(answers), width), bool)
        for number, (prompt, given) in enumerate(by_prompt.items()):
            for place, ranking in enumerate(given):
                weight[number, place] = 1.0
                for k, (answer, rank) in enumerate(zip(ranking.answers, ranking.ranks)):
                    items[number, place, k], ranks[number, place, k] = index[prompt][answer], rank or 0
                placed[number, items[number, place][ranks[number, place] > 0]] = True
        fitted = np.asarray(_utilities(items, ranks, weight, width, self.ridge))
        numbers = {prompt: number for number, prompt in enumerate(by_prompt)}
        values, valid = np.zeros(len(answers), np.float32), np.zeros(len(answers), bool)
        for row, (record, answer) in enumerate(zip(records, answers)):
            prompt = str(record["prompt"])
            if prompt in numbers and answer in index[prompt]:
                at = numbers[prompt], index[prompt][answer]
                values[row], valid[row] = fitted[at], placed[at]
        return Feedback.single(np.where(valid, values, 0.0), valid)


@partial(jax.jit, static_argnums=(3,))
def _utilities(items: jax.Array, ranks: jax.Array, weight: jax.Array, num_items: int, ridge: float) -> jax.Array:
    return jax.vmap(partial(fit_plackett_luce, num_items=num_items, ridge=ridge))(items, ranks, weight)


# ---- Comments


@dataclasses.dataclass(frozen=True, eq=False)
class CommentValence:
    """Computes the mean valence in [-1, 1] of the comments on each answer.

    Attributes:
        sentiment: reads the valence of a comment.
    """

    sentiment: SentimentJudge

    def __call__(
        self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout, judgements: JudgementsPerRow
    ) -> Feedback:
        comments = [
            (row, j.text)
            for row, given in enumerate(judgements)
            for j in given
            if isinstance(j, Comment) and j.answered
        ]
        if not comments:
            return Feedback.single(np.zeros(len(answers), np.float32), np.zeros(len(answers), bool))
        odds = self.sentiment.log_odds([text for _, text in comments])
        values, valid = valence(jnp.asarray(odds.values), jnp.asarray(odds.valid))
        pooled = pool_comments(values, valid, jnp.array([row for row, _ in comments]), len(answers))
        return Feedback.single(np.asarray(pooled.values), np.asarray(pooled.valid))


# ---- Corrections


@dataclasses.dataclass(frozen=True, eq=False)
class CorrectionRewards:
    """Computes minus the edit rate of each answer as score, and blame of tokens as dense rewards.

    Of several corrections of an answer the last one counts. A correction with marked spans and no edits scores 0, and each
    span's value is paid at the span's last token (Wu 2023, "Fine-grained human feedback gives better rewards"). The maths
    is in `rewards.corrections`.

    Attributes:
        tokenizer: the policy's tokenizer.
        length: the number of tokens of a correction that are read.
        dense: minus the reward of a token that was removed, and the reward of a span of value 1; an insertion costs half.
        kept: the reward of a token that stayed, as a share of `dense`. Without it the safest answer is the shortest,
            because short answers are seldom corrected.
    """

    tokenizer: Tokenizer
    length: int
    dense: float = 0.1
    kept: float = 0.0

    def __call__(
        self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout, judgements: JudgementsPerRow
    ) -> Feedback:
        found = [[j for j in given if isinstance(j, Correction) and j.answered] for given in judgements]
        ids, masks = np.asarray(rollout.responses), np.asarray(rollout.response_mask, bool)
        finished = np.asarray(rollout.finished)
        rows: list[list[int]] = []
        marks: list[list[tuple[int, int, float]]] = []
        for given, answer, response, mask, ended in zip(found, answers, ids, masks, finished):
            written = response[mask].tolist()
            rows.append(self._corrected(given[-1], answer, written, bool(ended))[: self.length] if given else [])
            marks.append(self._marked(given[-1], answer, written) if given else [])
        corrected, corrected_mask = padded(rows, self.length, self.tokenizer.pad_id, "right")
        valid = np.array([bool(given) for given in found])
        spans = np.zeros((3, len(answers), next_power_of_two(max(map(len, marks), default=1))), np.float32)
        for row, places in enumerate(marks):
            for k, place in enumerate(places):
                spans[:, row, k] = place
        rewards = _correction_rewards(spans, self.dense, self.kept, ids, masks, corrected, corrected_mask, valid)
        return Feedback.single(*map(np.asarray, rewards))

    def _corrected(self, correction: Correction, answer: str, written: list[int], ended: bool) -> list[int]:
        """Returns the tokens of the edited answer; the written ones where nothing was edited."""
        if correction.edited is None or correction.edited == answer:
            return written
        text = self.tokenizer.decode(written)
        blank = text[: len(text) - len(text.lstrip())]  # records hold the answer without the blanks around it
        ends = written[-1:] if ended else []  # the stop token that was drawn: it is no edit
        return [*self.tokenizer.encode(blank + correction.edited), *ends]

    def _marked(self, correction: Correction, answer: str, written: list[int]) -> list[tuple[int, int, float]]:
        """Returns (first token, token after the last, value) of each marked span."""
        places = token_spans(self.tokenizer, written, [(s.start, s.end) for s in correction.spans], text=answer)
        return [(start, end, span.value) for (start, end), span in zip(places, correction.spans)]


@jax.jit
def _correction_rewards(spans: jax.Array, dense: float, kept: float, *texts: jax.Array) -> tuple[jax.Array, ...]:
    """Returns (score, valid, token_rewards). texts: the arrays that `correction_rewards` takes."""
    rewards = correction_rewards(*texts, dense=dense, kept=kept)
    starts, ends = spans[:2].astype(jnp.int32)
    marked = dense * span_rewards(starts, ends, spans[2], ends > starts, texts[1])
    return rewards.score, rewards.valid, rewards.token_rewards + marked


# ---- A source for any form


@dataclasses.dataclass(frozen=True, eq=False)
class JudgementSource(CountingSource):
    """A `FeedbackSource` from any judge that gives records, and from a function of the records.

    The source keeps the records in the store.

    Attributes:
        judge: (prompts [B], answers [B]) -> judgements; of rankings, one for each prompt.
        reward_fn: makes rewards of the judgements.
        store: keeps the judgements.
    """

    judge: Callable[[Sequence[str], Sequence[str]], Sequence[Judgement]]
    reward_fn: RewardFn
    store: Store

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout) -> Feedback:
        judged = self.judge([str(record["prompt"]) for record in records], answers)
        self.store.add(judged)
        rewards = self.reward_fn(records, answers, rollout, group_by_answer(records, answers, judged))
        return self.counted(rewards, "no judgement of the answer has a value")


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
