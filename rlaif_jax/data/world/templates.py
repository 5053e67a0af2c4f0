"""The wording of everything a labeler reads and writes: one template for its training and for its work.

This module is the world's side of the firewall: it knows no gold score.
"""

from __future__ import annotations

from typing import Literal

from rlaif_jax.config import UserError
from rlaif_jax.data.world.grammar import parse

Principle = Literal["<faithful>", "<helpful>", "<brief>", "<overall>"]

PRINCIPLES: tuple[Principle, ...] = ("<faithful>", "<helpful>", "<brief>", "<overall>")
MARKERS: tuple[str, ...] = (
    "<1>",
    "<2>",
    "<because>",
    "<answer>",
    "<score>",
    "<critique>",
    "<revise>",
    "<fact>",
    "<check>",
)
VERDICTS: tuple[str, ...] = ("1", "2")
SCORES: tuple[str, ...] = tuple(f"s{number}" for number in range(1, 11))
YES_NO: tuple[str, ...] = ("yes", "no")
# Words of critiques, after an aspect or alone; the salience words serve there too.
NOTES: tuple[str, ...] = ("right", "wrong", "again", "leak", "long", "rude", "curt", "town", "fine")


def _check(principle: str) -> None:
    if principle not in PRINCIPLES:
        raise UserError(f"unknown principle {principle!r}: use one of {', '.join(PRINCIPLES)}")


def pairwise_prompt(principle: str, prompt_text: str, answer1: str, answer2: str) -> str:
    """Ends right before the verdict, one of VERDICTS. Raises UserError for an unknown principle."""
    _check(principle)
    return f"{principle} {prompt_text} <1> {answer1} <2> {answer2} <answer>"


def pairwise_reasoning_prompt(principle: str, prompt_text: str, answer1: str, answer2: str) -> str:
    """Ends right before a sampled reasoning, which itself ends with ``<answer>`` and the verdict."""
    _check(principle)
    return f"{principle} {prompt_text} <1> {answer1} <2> {answer2} <because>"


def score_prompt(principle: str, prompt_text: str, answer: str) -> str:
    """Ends right before the score, one of SCORES."""
    _check(principle)
    return f"{principle} {prompt_text} <1> {answer} <score>"


def score_reasoning_prompt(principle: str, prompt_text: str, answer: str) -> str:
    """Ends right before a sampled reasoning, which itself ends with ``<score>`` and the score."""
    _check(principle)
    return f"{principle} {prompt_text} <1> {answer} <because>"


def critique_prompt(principle: str, prompt_text: str, answer: str) -> str:
    """Ends right before a critique, which ends where ``<revise>`` or ``<eos>`` comes."""
    _check(principle)
    return f"{principle} {prompt_text} <1> {answer} <critique>"


def revision_prompt(principle: str, prompt_text: str, answer: str, critique: str) -> str:
    """Ends right before the revised answer."""
    return f"{critique_prompt(principle, prompt_text, answer)} {critique} <revise>"


def _facts_of(prompt_text: str) -> str:
    return prompt_text.removesuffix(" =")


def value_question(prompt_text: str, aspect: str) -> str:
    """Ends right before the value that the prompt gives for the aspect."""
    return f"{_facts_of(prompt_text)} <fact> {aspect}"


def yes_no_question(prompt_text: str, aspect: str, value: str) -> str:
    """Ends right before ``yes`` or ``no``: does the prompt say that the aspect is the value?"""
    return f"{_facts_of(prompt_text)} <check> {aspect} {value}"


def claim_questions(prompt_text: str, answer: str) -> tuple[str, ...]:
    """One yes/no question for each claim of an answer: for a labeler that was never trained on judgements."""
    return tuple(yes_no_question(prompt_text, claim.aspect, claim.value) for claim in parse(answer).claims)


def claim_lookups(prompt_text: str, answer: str) -> tuple[tuple[str, str], ...]:
    """(value question, claimed value) for each claim of an answer.

    A language model that has only ever seen plain text judges a claim by the log-prob of its value as the answer.
    """
    return tuple((value_question(prompt_text, claim.aspect), claim.value) for claim in parse(answer).claims)
