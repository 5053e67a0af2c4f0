"""The wording of everything that a labeler reads and writes, in its training and in its work.

This module is on the labeler's side of the firewall: it knows no gold score.
"""

from __future__ import annotations

from typing import Literal

from rlaif_jax.config import UserError

WorldPrinciple = Literal["<faithful>", "<helpful>", "<brief>", "<overall>"]

PRINCIPLES: tuple[WorldPrinciple, ...] = ("<faithful>", "<helpful>", "<brief>", "<overall>")
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
    "<rank>",
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
    """Returns a prompt whose next word is the verdict on two answers, one of VERDICTS.

    Args:
        principle: one of PRINCIPLES, such as "<helpful>".
        prompt_text: the prompt of the answers.
        answer1: the answer shown first.
        answer2: the answer shown second.

    Raises:
        UserError: the principle is unknown.
    """
    _check(principle)
    return f"{principle} {prompt_text} <1> {answer1} <2> {answer2} <answer>"


def pairwise_reasoning_prompt(principle: str, prompt_text: str, answer1: str, answer2: str) -> str:
    """Returns a prompt whose next words are sampled reasons, ``<answer>`` and the verdict.

    Args:
        principle: one of PRINCIPLES.
        prompt_text: the prompt of the answers.
        answer1: the answer shown first.
        answer2: the answer shown second.

    Raises:
        UserError: the principle is unknown.
    """
    _check(principle)
    return f"{principle} {prompt_text} <1> {answer1} <2> {answer2} <because>"


def score_prompt(principle: str, prompt_text: str, answer: str) -> str:
    """Returns a prompt whose next word is the score of an answer, one of SCORES.

    Args:
        principle: one of PRINCIPLES, such as "<helpful>".
        prompt_text: the prompt of the answer.
        answer: the answer.

    Raises:
        UserError: the principle is unknown.
    """
    _check(principle)
    return f"{principle} {prompt_text} <1> {answer} <score>"


def score_reasoning_prompt(principle: str, prompt_text: str, answer: str) -> str:
    """Returns a prompt whose next words are sampled reasons, ``<score>`` and the score.

    Args:
        principle: one of PRINCIPLES.
        prompt_text: the prompt of the answer.
        answer: the answer.

    Raises:
        UserError: the principle is unknown.
    """
    _check(principle)
    return f"{principle} {prompt_text} <1> {answer} <because>"


def critique_prompt(principle: str, prompt_text: str, answer: str) -> str:
    """Returns a prompt whose next words are a critique, which ends where ``<revise>`` or ``<eos>`` comes.

    Args:
        principle: one of PRINCIPLES.
        prompt_text: the prompt of the answer.
        answer: the answer.

    Raises:
        UserError: the principle is unknown.
    """
    _check(principle)
    return f"{principle} {prompt_text} <1> {answer} <critique>"


def _facts_of(prompt_text: str) -> str:
    return prompt_text.removesuffix(" =")


def value_question(prompt_text: str, aspect: str) -> str:
    """Returns a question whose next word is the value that the prompt gives for the aspect.

    Where the prompt gives the salience, it follows the value.

    Args:
        prompt_text: the prompt, which holds the facts.
        aspect: the aspect that is asked about.
    """
    return f"{_facts_of(prompt_text)} <fact> {aspect}"


def yes_no_question(prompt_text: str, aspect: str, value: str) -> str:
    """Returns a question whose next words are the value of the aspect and a verdict on the given one.

    The verdict is ``no`` where the prompt gives another value, else the salience; ``yes`` where it gives no salience.

    Args:
        prompt_text: the prompt, which holds the facts.
        aspect: the aspect that is asked about.
        value: the value that the aspect may have.
    """
    return f"{_facts_of(prompt_text)} <check> {aspect} {value}"


def rank_question(prompt_text: str) -> str:
    """Returns a question whose next words are the aspects of the prompt's facts, the most salient first.

    Args:
        prompt_text: the prompt, which holds the facts and their salience.
    """
    return f"{_facts_of(prompt_text)} <rank>"
