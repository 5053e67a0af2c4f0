"""Replies of an OpenAI-compatible server: the body of a response as text with log-probabilities."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_CUT = ("length", "max_tokens", "model_length")  # OpenAI, vLLM ...; Anthropic and Gemini; Mistral
_THOUGHTS = ("reasoning_content", "reasoning")  # vLLM, SGLang, DeepSeek, LiteLLM; Ollama, OpenRouter, newer vLLM
_LEAST_LOGPROB = -1000.0  # servers write -9999, -inf or null for a token that cannot come
_OPEN = re.compile(
    r"\s*+(?:<(?:seed:)?think(?:ing)?>|<thought>|\[THINK\]|\u25c1think\u25b7|(?:<\|start\|>assistant)?<\|channel\|>analysis)"
)
_CLOSE = re.compile(
    r"</(?:seed:)?think(?:ing)?>|</thought>|\[/THINK\]|\u25c1/think\u25b7|<\|channel\|>final\s*+<\|message\|>"
)


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


class Usage(NamedTuple):
    """The tokens of a call.

    Attributes:
        prompt: the tokens of the prompt.
        completion: the tokens of the reply, thoughts included.
        thoughts: those of them that were thoughts, where the server counts them.
    """

    prompt: int
    completion: int
    thoughts: int = 0


@dataclasses.dataclass(frozen=True)
class Reply:
    """A completion.

    Attributes:
        text: the whole reply, without the thoughts before it.
        tokens: the tokens with log-probabilities; () where the server gave none.
        refusal: the model's refusal; "" = none.
        finish: why the reply ended, in the server's words.
        usage: the tokens of the call; None where the server did not report them.
        thoughts: what the model thought before its answer, with the tags around it; "" = nothing.
    """

    text: str
    tokens: tuple[Token, ...] = ()
    refusal: str = ""
    finish: str = ""
    usage: Usage | None = None
    thoughts: str = ""

    @property
    def cut(self) -> bool:
        """Returns whether the reply ended at the limit of tokens."""
        return self.finish.lower() in _CUT

    @property
    def thinks(self) -> bool:
        """Returns whether the model thinks before it answers."""
        return bool(self.thoughts) or (self.usage is not None and self.usage.thoughts > 0)


def read_reply(body: Any) -> Reply:
    """Reads the body of a response of /chat/completions or /completions.

    Each of them has its own shape of log-probabilities.

    Raises:
        BadReply: the body has another shape.
    """
    try:
        choice = body["choices"][0]
        finish = str(choice.get("finish_reason") or "")
        refusal, thoughts = "", ""
        if "message" in choice:
            message = choice["message"]
            content, refusal = message.get("content"), message.get("refusal") or ""
            thoughts = next((str(message[name]) for name in _THOUGHTS if message.get(name)), "")
        else:
            content = choice["text"]
        if finish == "content_filter":
            refusal = refusal or "stopped by the server's content filter"
        if not isinstance(body.get("usage") or {}, dict):
            raise BadReply("usage that is no object")
        text, inside = _read_content(content)
        thoughts += inside
        if content is None and not (refusal or thoughts or finish.lower() in _CUT):
            raise BadReply("no content")
        return Reply(
            text=text,
            tokens=_read_tokens(choice.get("logprobs") or {}),
            refusal=str(refusal),
            finish=finish,
            usage=read_usage(body),
            thoughts=thoughts,
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise BadReply(f"the response is no completion ({type(error).__name__}: {error})") from error


def read_usage(body: Any) -> Usage | None:
    """Returns the tokens that a response reports, also one that is no completion; None = it reports none."""
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return None
    counts = [_count(usage.get(f"{name}_tokens")) for name in ("prompt", "completion", "total")]
    prompt, completion, total = counts
    if counts.count(None) > 1:
        return None
    if prompt is None:
        prompt = max((total or 0) - (completion or 0), 0)
    if completion is None:
        completion = max((total or 0) - prompt, 0)
    details = usage.get("completion_tokens_details")
    thoughts = _count(details.get("reasoning_tokens")) if isinstance(details, dict) else None
    return Usage(prompt, completion, thoughts or 0)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _read_content(content: Any) -> tuple[str, str]:
    """Returns the text and the thoughts in the content of a message: text, or a list of parts."""
    if isinstance(content, list):  # Mistral: parts of the types thinking and text
        parts = [part for part in content if isinstance(part, dict)]
        thoughts = "".join(_read_content(part["thinking"])[0] for part in parts if "thinking" in part)
        text, inside = split_thoughts("".join(str(part["text"]) for part in parts if part.get("text")))
        return text, thoughts + inside
    if content is not None and not isinstance(content, str):
        raise BadReply("content that is no text")
    return split_thoughts(content or "")


def split_thoughts(text: str) -> tuple[str, str]:
    """Splits the thoughts before an answer from it: (answer, thoughts with their tags).

    Thoughts whose closing tag is missing fill the whole text. Some chat templates write the opening tag themselves, so
    that the reply has the closing one alone.
    """
    end, first = 0, True
    while (opened := _OPEN.match(text, end)) or first:
        closed = _CLOSE.search(text, end)
        if closed is None:
            return ("", text) if opened else (text[end:], text[:end])
        end, first = closed.end(), False
    return text[end:], text[:end]


def _read_tokens(logprobs: Mapping[str, Any]) -> tuple[Token, ...]:
    if logprobs.get("content"):
        return tuple(
            Token(_spelled(entry), _shown((_spelled(top), top["logprob"]) for top in entry.get("top_logprobs") or ()))
            for entry in logprobs["content"]
        )
    tops = logprobs.get("top_logprobs") or [{} for _ in logprobs.get("tokens") or ()]
    return tuple(Token(text, _shown((top or {}).items())) for text, top in zip(logprobs.get("tokens") or (), tops))


def _shown(tops: Any) -> tuple[tuple[str, float], ...]:
    """Returns the tokens that can come, each with its log-probability."""
    pairs = ((text, float(logprob)) for text, logprob in tops if logprob is not None)
    return tuple((text, logprob) for text, logprob in pairs if math.isnan(logprob) or logprob > _LEAST_LOGPROB)


def _spelled(entry: Mapping[str, Any]) -> str:
    """Returns a token's text, decoded from its bytes where the server gives them."""
    data = entry.get("bytes")
    return bytes(data).decode(errors="replace") if data else str(entry["token"])
