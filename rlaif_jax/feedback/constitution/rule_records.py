"""What a constitution's rules say, in every form of feedback: ratings, rankings, comments, corrections.

The records are those of a rater of source "rule", named after the constitution, and need no one's time: the same texts
give the same records. What the rules cannot tell is a record of status `abstained`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rlaif_jax.config import require
from rlaif_jax.feedback.constitution.constitution import Constitution, Predicates, constitution_rewards, evaluate
from rlaif_jax.feedback.constitution.rules import Pattern, Rule
from rlaif_jax.feedback.judges.embeddings import Encoder
from rlaif_jax.feedback.records.forms import Comment, Correction, Ranking, Rater, Rating, Span, Status

SAME = 1e-6  # rewards and degrees of truth closer than this are equal


def rule_rater(constitution: Constitution) -> Rater:
    """Who judges by this constitution; `prompt_hash` tells one wording of the file from the next."""
    return Rater(f"rule/{constitution.name}", "rule", prompt_hash=constitution.hash)


def rule_ratings(
    constitution: Constitution, prompts: Sequence[str], answers: Sequence[str], encoder: Encoder | None = None
) -> list[Rating]:
    """The reward of each of B answers, on the scale from the worst to the best that the formulas allow."""
    (values, valid), _ = _rewards(constitution, evaluate(constitution, prompts, answers, encoder))
    low, high = constitution.scale
    rater = rule_rater(constitution)
    return [
        Rating(
            prompt=prompt,
            answers=(answer,),
            rater=rater,
            low=low,
            high=high,
            value=float(np.clip(value, low, high)) if ok else math.nan,
            status="ok" if ok else "abstained",
        )
        for prompt, answer, value, ok in zip(prompts, answers, values, valid)
    ]


def rule_rankings(
    constitution: Constitution,
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    encoder: Encoder | None = None,
) -> list[Ranking]:
    """The answers to each of B prompts in the order of their rewards; equal rewards share a place, an answer whose reward
    is missing has none, and a ranking with fewer than two places is abstained from.

    Raises:
        UserError: a prompt with fewer than two answers.
    """
    for prompt, group in zip(prompts, answers, strict=True):
        require(len(group) >= 2, f"a ranking is of two or more answers; there are {len(group)} to {prompt[:60]!r}")
    flat = [(prompt, answer) for prompt, group in zip(prompts, answers) for answer in group]
    predicates = evaluate(constitution, [prompt for prompt, _ in flat], [answer for _, answer in flat], encoder)
    (values, valid), _ = _rewards(constitution, predicates)
    rater = rule_rater(constitution)
    rankings, start = [], 0
    for prompt, group in zip(prompts, answers):
        ranks = _places(values[start : start + len(group)], valid[start : start + len(group)])
        start += len(group)
        placed = [rank for rank in ranks if rank is not None]
        if len(placed) < 2:
            rankings.append(Ranking(prompt=prompt, answers=tuple(group), rater=rater, status="abstained"))
            continue
        status: Status = "tie" if len(set(placed)) == 1 else "ok"
        rankings.append(Ranking(prompt=prompt, answers=tuple(group), rater=rater, ranks=ranks, status=status))
    return rankings


def _places(values: np.ndarray, valid: np.ndarray) -> tuple[int | None, ...]:
    """1 + the number of answers that are clearly better."""
    better = values[None, :] > values[:, None] + SAME
    return tuple(1 + int(np.sum(row & valid)) if ok else None for row, ok in zip(better, valid))


def rule_comments(
    constitution: Constitution, prompts: Sequence[str], answers: Sequence[str], encoder: Encoder | None = None
) -> list[Comment]:
    """A comment on each of B answers by each formula, B x F of them: its praise where the answer is on the right side of
    the formula (true by more than a half, or false where its weight is negative), its blame where not.

    The formula's name is the comment's aspect and principle.
    """
    _, (truths, valid) = _rewards(constitution, evaluate(constitution, prompts, answers, encoder))
    rater = rule_rater(constitution)
    comments = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers)):
        for column, formula in enumerate(constitution.formulas):
            right = truths[row, column] if formula.weight > 0 else 1 - truths[row, column]
            known = bool(valid[row, column])
            comments.append(
                Comment(
                    prompt=prompt,
                    answers=(answer,),
                    rater=rater,
                    principle=formula.name,
                    aspects=(formula.name,),
                    confidence=float(abs(2 * right - 1)) if known else None,
                    text="" if not known else formula.praise if right > 0.5 else formula.blame,
                    status="ok" if known else "abstained",
                )
            )
    return comments


def rule_corrections(
    constitution: Constitution, prompts: Sequence[str], answers: Sequence[str], encoder: Encoder | None = None
) -> list[Correction]:
    """The places of each of B answers that words and patterns find, with what they cost or earn.

    A span's value is the reward with its rule true less the reward with it false, all else as it is: negative where the
    match is a fault, positive where it is what was wanted. A match of a rule that `at_most` bounds is a fault only if
    there are too many. An answer is edited where every fault has a `replace`. An answer without a fault stands as it
    is if its reward is the best there is; if it is not, the rules cannot say where, and abstain.
    """
    predicates = evaluate(constitution, prompts, answers, encoder)
    (rewards, valid), _ = _rewards(constitution, predicates)
    worth = _worth(constitution, predicates)
    best = constitution.scale[1]
    rater = rule_rater(constitution)
    corrections = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers)):
        spans: list[tuple[Span, Rule]] = []
        for column, rule in enumerate(constitution.rules):
            if rule.of == "answer" and isinstance(rule.measure, Pattern) and predicates.valid[row, column]:
                places = rule.measure.spans(answer)
                value = _match_worth(rule, len(places)) * float(worth[row, column])
                if abs(value) > SAME:
                    spans += [(Span(start, end, value, rule.name), rule) for start, end in places]
        spans.sort(key=lambda pair: (pair[0].start, pair[0].end, pair[0].category))
        faults = [(span, rule) for span, rule in spans if span.value < 0]
        edited = None
        if faults and all(rule.replace is not None for _, rule in faults):
            edited = _replaced(answer, faults)
        elif not faults and valid[row] and rewards[row] >= best - SAME:
            edited = answer
        told = spans or edited is not None
        corrections.append(
            Correction(
                prompt=prompt,
                answers=(answer,),
                rater=rater,
                spans=tuple(span for span, _ in spans),
                edited=edited,
                status="ok" if told else "abstained",
            )
        )
    return corrections


def _match_worth(rule: Rule, matches: int) -> int:
    """Whether a match helps the rule to be true (1), keeps it from being true (-1), or neither (0)."""
    if rule.at_most is not None and matches > rule.at_most:
        return -1
    return int(rule.at_least is not None)


def _replaced(text: str, faults: Sequence[tuple[Span, Rule]]) -> str:
    parts, end = [], 0
    for span, rule in faults:
        if span.start >= end:
            parts += [text[end : span.start], rule.replace or ""]
            end = span.end
    return "".join(parts) + text[end:]


def _rewards(
    constitution: Constitution, predicates: Predicates
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    rewards, truths = constitution_rewards(constitution, predicates.values, predicates.valid)
    return tuple(map(np.asarray, rewards)), tuple(map(np.asarray, truths))


def _worth(constitution: Constitution, predicates: Predicates) -> np.ndarray:
    """[B, P]: the reward of each answer with one rule true less that with it false; 0 where it cannot be told."""
    count = len(constitution.rules)
    one = np.eye(count, dtype=bool)[:, None, :]
    known = predicates.valid[None] | one
    with_it, without = (np.where(one, truth, predicates.values[None]) for truth in (1.0, 0.0))
    (high, high_known), _ = _rewards(constitution, Predicates(with_it, known))
    (low, low_known), _ = _rewards(constitution, Predicates(without, known))
    return np.where(high_known & low_known, high - low, 0.0).T
