"""Replies of an OpenAI-compatible server: the body of a response as text with log-probabilities."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple


class BadReply(ValueError):
    """A response that is not a completion."""


class Token(NamedTuple):
    """One token of a reply.

    Attributes:
        text: the token's text.
        top: the most probable tokens at its place, each with its log-probability in nats.
    """

    text: str
    top: tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Reply:
    """A completion.

    Attributes:
        text: the whole reply.
        tokens: the tokens with log-probabilities; () where the server gave none.
        refusal: the model's refusal; "" = none.
        finish: why the reply ended, in the server's words.
        prompt_tokens, completion_tokens: the usage; None where the server did not report it.
    """

    text: str
    tokens: tuple[Token, ...] = ()
    refusal: str = ""
    finish: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def read_reply(body: Any) -> Reply:
    """Reads the body of a response of /chat/completions or /completions.

    Each of them has its own shape of log-probabilities.

    Raises:
        BadReply: the body has another shape.
    """
    try:
        choice = body["choices"][0]
        refusal = ""
        if "message" in choice:
            message = choice["message"]
            text, refusal = message.get("content"), message.get("refusal") or ""
        else:
            text = choice["text"]
        finish = choice.get("finish_reason") or ""
        if finish == "content_filter":
            refusal = refusal or "stopped by the server's content filter"
        if text is None and not refusal and finish != "length":
            raise BadReply("no content")
        text = text or ""
        if not isinstance(text, str):
            raise BadReply("content that is no text")
        usage = body.get("usage") or {}
        return Reply(
            text=text,
            tokens=_read_tokens(choice.get("logprobs") or {}),
            refusal=str(refusal),
            finish=str(finish),
            prompt_tokens=_count(usage.get("prompt_tokens")),
            completion_tokens=_count(usage.get("completion_tokens")),
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise BadReply(f"the response is no completion ({type(error).__name__}: {error})") from error


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _read_tokens(logprobs: Mapping[str, Any]) -> tuple[Token, ...]:
    if logprobs.get("content"):
        return tuple(
            Token(
                _spelled(entry),
                tuple((_spelled(top), float(top["logprob"])) for top in entry.get("top_logprobs") or ()),
            )
            for entry in logprobs["content"]
        )
    tops = logprobs.get("top_logprobs") or [{} for _ in logprobs.get("tokens") or ()]
    return tuple(
        Token(text, tuple((t, float(p)) for t, p in (top or {}).items()))
        for text, top in zip(logprobs.get("tokens") or (), tops)
    )


def _spelled(entry: Mapping[str, Any]) -> str:
    """Returns a token's text, decoded from its bytes where the server gives them."""
    data = entry.get("bytes")
    return bytes(data).decode(errors="replace") if data else str(entry["token"])
