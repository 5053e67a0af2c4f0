"""Records of a constitution's rules: ratings, rankings, comments and corrections.

The rater of the records has the source "rule" and is named after the constitution; the same texts give the
same records. Where the rules give no judgement, the record has the status `abstained`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rlaif_jax.config import require
from rlaif_jax.feedback.constitution.constitution import Constitution, RuleValues, constitution_rewards, evaluate_rules
from rlaif_jax.feedback.constitution.rules import Pattern, Rule
from rlaif_jax.feedback.judges.embeddings import Encoder
from rlaif_jax.feedback.records.forms import Comment, Correction, Ranking, Rater, Rating, Span, Status

SAME = 1e-6  # rewards and degrees of truth closer than this are equal


def rule_rater(constitution: Constitution) -> Rater:
    """Returns the rater of a constitution; its `prompt_hash` identifies the wording of the file."""
    return Rater(f"rule/{constitution.name}", "rule", prompt_hash=constitution.hash)


def rule_ratings(
    constitution: Constitution, prompts: Sequence[str], answers: Sequence[str], encoder: Encoder | None = None
) -> list[Rating]:
    """Rates each of B answers by its reward, on the scale of the constitution.

    An answer whose reward is missing has the status `abstained`.

    Args:
        constitution: the rules and formulas.
        prompts: the B prompts.
        answers: the B answers.
        encoder: embeds texts for the rules that compare with an exemplar; None if there are no such rules.
    """
    (values, valid), _ = _rewards(constitution, evaluate_rules(constitution, prompts, answers, encoder))
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
    """Ranks the answers to each of B prompts by their rewards.

    Equal rewards share a place, an answer whose reward is missing has no place, and a ranking with fewer than
    two places is `abstained`.

    Args:
        constitution: the rules and formulas.
        prompts: the B prompts.
        answers: two or more answers to each prompt.
        encoder: embeds texts for the rules that compare with an exemplar; None if there are no such rules.

    Raises:
        UserError: a prompt with fewer than two answers.
    """
    for prompt, group in zip(prompts, answers, strict=True):
        require(len(group) >= 2, f"a ranking is of two or more answers; there are {len(group)} to {prompt[:60]!r}")
    flat = [(prompt, answer) for prompt, group in zip(prompts, answers) for answer in group]
    rule_values = evaluate_rules(constitution, [prompt for prompt, _ in flat], [answer for _, answer in flat], encoder)
    (values, valid), _ = _rewards(constitution, rule_values)
    rater = rule_rater(constitution)
    rankings, start = [], 0
    for prompt, group in zip(prompts, answers):
        ranks = _ranks(values[start : start + len(group)], valid[start : start + len(group)])
        start += len(group)
        placed = [rank for rank in ranks if rank is not None]
        if len(placed) < 2:
            rankings.append(Ranking(prompt=prompt, answers=tuple(group), rater=rater, status="abstained"))
            continue
        status: Status = "tie" if len(set(placed)) == 1 else "ok"
        rankings.append(Ranking(prompt=prompt, answers=tuple(group), rater=rater, ranks=ranks, status=status))
    return rankings


def _ranks(values: np.ndarray, valid: np.ndarray) -> tuple[int | None, ...]:
    """Returns 1 + the number of clearly better answers for each answer; None where not valid."""
    better = values[None, :] > values[:, None] + SAME
    return tuple(1 + int(np.sum(row & valid)) if ok else None for row, ok in zip(better, valid))


def rule_comments(
    constitution: Constitution, prompts: Sequence[str], answers: Sequence[str], encoder: Encoder | None = None
) -> list[Comment]:
    """Comments on each of B answers by each of F formulas, B x F comments in all.

    The comment is the formula's praise where the answer is right by it (the formula is true by more than a
    half, or false where its weight is negative), else its blame. The formula's name is the comment's aspect
    and principle.

    Args:
        constitution: the rules and formulas.
        prompts: the B prompts.
        answers: the B answers.
        encoder: embeds texts for the rules that compare with an exemplar; None if there are no such rules.
    """
    _, (truths, valid) = _rewards(constitution, evaluate_rules(constitution, prompts, answers, encoder))
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
    """Marks the spans of each of B answers that words and patterns match, with their effect on the reward.

    A span's value is the reward with its rule true minus the reward with its rule false, all other rules as
    they are: negative where the match is a fault, positive where the match is wanted. A match of a rule that
    `at_most` bounds is a fault only if the answer has too many matches. An answer is edited where every fault
    has a `replace`. An answer without a fault is left unchanged if its reward is the best possible; otherwise
    the rules cannot locate the fault, and the correction is `abstained`.

    Args:
        constitution: the rules and formulas.
        prompts: the B prompts.
        answers: the B answers.
        encoder: embeds texts for the rules that compare with an exemplar; None if there are no such rules.
    """
    rule_values = evaluate_rules(constitution, prompts, answers, encoder)
    (rewards, valid), _ = _rewards(constitution, rule_values)
    effects = _rule_effects(constitution, rule_values)
    best = constitution.scale[1]
    rater = rule_rater(constitution)
    corrections = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers)):
        spans: list[tuple[Span, Rule]] = []
        for column, rule in enumerate(constitution.rules):
            if rule.of == "answer" and isinstance(rule.measure, Pattern) and rule_values.valid[row, column]:
                places = rule.measure.spans(answer)
                value = _match_effect(rule, len(places)) * float(effects[row, column])
                if abs(value) > SAME:
                    spans += [(Span(start, end, value, rule.name), rule) for start, end in places]
        spans.sort(key=lambda pair: (pair[0].start, pair[0].end, pair[0].category))
        faults = [(span, rule) for span, rule in spans if span.value < 0]
        edited = None
        if faults and all(rule.replace is not None for _, rule in faults):
            edited = _replaced(answer, faults)
        elif not faults and valid[row] and rewards[row] >= best - SAME:
            edited = answer
        corrections.append(
            Correction(
                prompt=prompt,
                answers=(answer,),
                rater=rater,
                spans=tuple(span for span, _ in spans),
                edited=edited,
                status="ok" if spans or edited is not None else "abstained",
            )
        )
    return corrections


def _match_effect(rule: Rule, matches: int) -> int:
    """Returns 1 where a match helps the rule to be true, -1 where it prevents that, else 0."""
    if rule.at_most is not None and matches > rule.at_most:
        return -1
    return int(rule.at_least is not None)


def _replaced(text: str, faults: Sequence[tuple[Span, Rule]]) -> str:
    """Replaces every fault by its rule's `replace`; a fault that overlaps an earlier fault is skipped."""
    parts, end = [], 0
    for span, rule in faults:
        if span.start >= end:
            parts += [text[end : span.start], rule.replace or ""]
            end = span.end
    return "".join(parts) + text[end:]


def _rewards(
    constitution: Constitution, rule_values: RuleValues
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Computes ((rewards [B], valid [B]), (truths [B, F], valid [B, F])) on the host."""
    rewards, truths = constitution_rewards(constitution, rule_values.values, rule_values.valid)
    return tuple(map(np.asarray, rewards)), tuple(map(np.asarray, truths))


def _rule_effects(constitution: Constitution, rule_values: RuleValues) -> np.ndarray:
    """Computes the reward with each rule true minus the reward with it false, [B, P].

    The difference is 0 where a reward is missing.
    """
    count = len(constitution.rules)
    one = np.eye(count, dtype=bool)[:, None, :]
    known = rule_values.valid[None] | one
    with_it, without = (np.where(one, truth, rule_values.values[None]) for truth in (1.0, 0.0))
    (high, high_known), _ = _rewards(constitution, RuleValues(with_it, known))
    (low, low_known), _ = _rewards(constitution, RuleValues(without, known))
    return np.where(high_known & low_known, high - low, 0.0).T
