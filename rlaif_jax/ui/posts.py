"""Reads the fields of posts; what is wrong with one is a message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.records.forms import Judgement, canonical
from rlaif_jax.ui.records import AnswerContext

MAX_MESSAGE = 4_000
"""The largest number of characters of one message to the model."""


def records_of(context: AnswerContext, payload: Any, reason: Any) -> list[Judgement]:
    """Returns the judgements of an answer or, with a `reason`, of a skip. Raises UserError for neither."""
    if reason is not None:
        require(isinstance(reason, str) and bool(reason.strip()), "a skip needs its reason in words")
        return context.skipped(reason.strip()[:MAX_MESSAGE])
    require(isinstance(payload, Mapping), "payload must be an object")
    return context.records(payload)


def text_of(body: Mapping[str, Any]) -> str:
    """Returns a post as text, by which a repeated one is recognised."""
    try:
        return canonical(body)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the post holds a number that is not finite, or too many lists in lists ({error})") from error


def text_field(body: Mapping[str, Any], name: str) -> str:
    """Returns a field of a post. Raises UserError unless it is text that UTF-8 can hold."""
    value = body.get(name)
    require(isinstance(value, str), f"{name} must be text, not {str(value)[:40]!r}")
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} holds half a character (a lone surrogate)") from error
    return str(value)
