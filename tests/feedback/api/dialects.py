"""Servers that speak the dialects of the OpenAI API, for `test_dialects.py`: one row a server, one a behaviour.

The shapes are those of public bug reports and of the servers' own pages; the words are ours.
"""

from __future__ import annotations

import dataclasses
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from tests.feedback.api_server import LETTERS, Wrong, qualities

SCORE = 7


def openai_error(status: int, message: str) -> Any:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


def vllm_error(status: int, message: str) -> Any:
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}


def flat_error(status: int, message: str) -> Any:
    return {"object": "error", "message": message, "type": "BadRequestError", "param": None, "code": status}


def llama_error(status: int, message: str) -> Any:
    return {"error": {"code": status, "message": message, "type": "invalid_request_error"}}


def ollama_error(status: int, message: str) -> Any:
    return {"error": message}


def tgi_error(status: int, message: str) -> Any:
    return {"error": message, "error_type": "overloaded" if status in (429, 503) else "validation"}


def litellm_error(status: int, message: str) -> Any:
    return {"error": {"message": f"litellm.APIError: {message}", "type": None, "param": None, "code": str(status)}}


def openrouter_error(status: int, message: str) -> Any:
    raw = {"provider_name": "a provider", "raw": message}
    return {"error": {"message": "Provider returned error", "code": status, "metadata": raw}, "user_id": "user"}


def mistral_error(status: int, message: str) -> Any:
    detail = [{"type": "extra_forbidden", "loc": ["body"], "msg": message}]
    return {"object": "error", "message": {"detail": detail}, "type": "invalid_request_error", "code": status}


def gemini_error(status: int, message: str) -> Any:
    return [{"error": {"code": status, "message": message, "status": "INVALID_ARGUMENT"}}]


def fastapi_error(status: int, message: str) -> Any:
    return {"detail": message}


@dataclasses.dataclass(frozen=True)
class Dialect:
    """A server.

    Attributes:
        error: the body of an error, of (status, message).
        most_logprobs: how many log-probabilities it gives; None = it does not look at the field.
        no_logprobs: (status, message) with which it refuses more.
        impossible: how it writes the log-probability of a token that cannot come.
        refuses: fields that it does not take, each with its (status, message).
        least_tokens: it writes no fewer, with this message.
        thoughts: where the thoughts before an answer are: a field of the message, parts, tags, or the end of tags.
        finish: why a reply that reached the limit ended.
        usage: the tokens as it reports them, of (prompt, completion).
    """

    error: Callable[[int, str], Any] = openai_error
    most_logprobs: int | None = 20
    no_logprobs: tuple[int, str] = (400, "")
    impossible: float | None = -9999.0
    refuses: Mapping[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    least_tokens: tuple[int, str] = (1, "")
    thoughts: str = ""
    finish: str = "length"
    usage: Callable[[int, int], dict[str, Any]] = lambda prompt, completion: {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _no(name: str) -> tuple[int, str]:
    return 400, f"Unsupported parameter: '{name}' is not supported with this model."


REASONING = {
    "max_tokens": (400, "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."),
    "temperature": (400, "'temperature' does not support 0 with this model. Only the default (1) value is supported."),
    "top_p": _no("top_p"),
    "structured_outputs": (400, "Unrecognized request argument supplied: structured_outputs"),
}

DIALECTS: dict[str, Dialect] = {
    "openai chat": Dialect(refuses={"structured_outputs": REASONING["structured_outputs"]}),
    "openai reasoning": Dialect(  # confident-ai/deepeval 2805, comet-ml/opik 1477, BerriAI/litellm 30708
        most_logprobs=0,
        no_logprobs=(403, "You are not allowed to request logprobs from this model"),
        refuses=REASONING,
        least_tokens=(
            16,
            "Could not finish the message because max_tokens was reached. Please try again with higher max_tokens.",
        ),
        thoughts="counted",
    ),
    "azure, few tokens refused": Dialect(
        most_logprobs=5,
        no_logprobs=(400, "Invalid value for 'top_logprobs': must be less than or equal to 5."),
        least_tokens=(
            16,
            "Invalid 'max_tokens': integer below minimum value. Expected a value >= 16, but got 1 instead.",
        ),
        refuses={"structured_outputs": REASONING["structured_outputs"]},
    ),
    "vllm": Dialect(vllm_error, impossible=None),
    "vllm, reasoning parser": Dialect(vllm_error, thoughts="reasoning_content"),  # vllm-project/vllm 13125, 22507
    "vllm, ten log-probabilities": Dialect(
        flat_error, 10, (400, "Requested sample logprobs of 20, which is greater than max allowed: 10")
    ),
    "vllm, deepseek r1": Dialect(vllm_error, thoughts="end of tags"),  # the chat template opens the tag itself
    "sglang": Dialect(flat_error, thoughts="tags"),
    "llama.cpp": Dialect(llama_error, impossible=None, refuses={"structured_outputs": (400, "Unknown field")}),
    "ollama": Dialect(ollama_error, None, thoughts="reasoning"),
    "tgi": Dialect(
        tgi_error,
        5,
        (422, "Input validation error: `top_logprobs` must be >= 0 and <= 5. Given: 20"),
    ),
    "litellm": Dialect(
        litellm_error,
        0,
        (400, "a provider does not support parameters: ['logprobs', 'top_logprobs'], for model=judge"),
    ),
    "openrouter": Dialect(openrouter_error, None, thoughts="reasoning"),
    "mistral": Dialect(
        mistral_error,
        0,
        (422, "Extra inputs are not permitted: top_logprobs"),
        refuses={"seed": (422, "Extra inputs are not permitted: seed")},
        thoughts="parts",
        finish="model_length",
    ),
    "gemini": Dialect(
        gemini_error,
        0,
        (400, 'Unknown name "logprobs": Cannot find field.'),
        finish="MAX_TOKENS",
        usage=lambda prompt, completion: {"prompt_tokens": prompt, "total_tokens": prompt + completion},
    ),
    "gateway": Dialect(fastapi_error, 0, (403, "Forbidden")),  # names nothing
}

ANSWERED = ("ok", "")
BEHAVIOURS: dict[str, tuple[str, str]] = {  # how it ends: the status, and words that the record has
    "well": ANSWERED,
    "busy once": ANSWERED,
    "overloaded once": ANSWERED,
    "busy inside a 200": ANSWERED,  # UKGovernmentBEIS/inspect_ai 1534, Aider-AI/aider 3550
    "broken off inside a 200": ANSWERED,  # OpenRouter: choices[0].error
    "no choices once": ANSWERED,
    "a proxy's page once": ANSWERED,
    "impossible tokens": ANSWERED,  # null, -9999
    "bold": ANSWERED,
    "in a box": ANSWERED,
    "quotes itself": ANSWERED,
    "too long": ("error", "maximum context length is 10 tokens"),
    "moderated": ("error", "flagged by the provider"),
    "cut": ("unparsed", "--max-tokens"),  # lobu-ai/lobu 3293, BerriAI/litellm 39817
    "prose": ("unparsed", "merits"),
    "refuses": ("refused", "I can't help"),
    "refuses by field": ("refused", "I will not"),
    "filtered": ("refused", "content filter"),
    "no content": ("error", "no content"),  # and nothing else
    "wrong scale": ("unparsed", "Z"),
}


class Server:
    """Answers as a dialect does; the prompt "N BEHAVIOUR" names the behaviour. Counts the tokens that it reports."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect, self.tokens = dialect, 0
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, body: dict[str, Any], number: int) -> Any:
        dialect, text = self.dialect, body["messages"][-1]["content"]
        if (refused := self._refusal(body)) is not None:
            status, message = refused
            return Wrong(status, body=dialect.error(status, message))
        found = re.search(r"case:([a-z ,0-9']+)\.", text)
        behaviour = found[1] if found else "well"
        with self._lock:
            self._seen[behaviour] += 1
            first = self._seen[behaviour] == 1
        error = lambda status, message, **headers: Wrong(status, body=dialect.error(status, message), **headers)
        if behaviour == "busy once" and first:
            return error(429, "slow down", Retry_After="0.05")
        if behaviour == "overloaded once" and first:
            return error(503, "busy")
        if behaviour == "a proxy's page once" and first:
            return Wrong(502, body=b"<html>Bad Gateway</html>")
        if behaviour == "too long":
            return error(400, "This model's maximum context length is 10 tokens. However, you requested 99 tokens.")
        if behaviour == "moderated":
            return error(403, "the input was flagged by the provider")
        if behaviour == "busy inside a 200" and first:
            return {"id": None, "choices": None, "error": {"message": "slow down", "code": 429}}
        reply = self._reply(body, behaviour)
        if behaviour == "broken off inside a 200" and first:
            reply["choices"][0] |= {"finish_reason": "error", "error": {"code": 502, "message": "provider gone"}}
        if behaviour == "no choices once" and first:
            reply["choices"] = []
        with self._lock:
            self.tokens += 60
        return reply

    def _refusal(self, body: dict[str, Any]) -> tuple[int, str] | None:
        """Returns the status and the message with which this request is refused; None = it is taken."""
        dialect = self.dialect
        for name, refused in dialect.refuses.items():
            if name in body and not (name == "temperature" and body[name] == 1):
                return refused
        most = math.inf if dialect.most_logprobs is None else dialect.most_logprobs
        if body.get("logprobs") and (body.get("top_logprobs", 0) > most or not most):
            return dialect.no_logprobs
        least, message = dialect.least_tokens
        return (400, message) if (body.get("max_tokens") or body["max_completion_tokens"]) < least else None

    def _reply(self, body: dict[str, Any], behaviour: str) -> dict[str, Any]:
        dialect, text = self.dialect, body["messages"][-1]["content"]
        label = LETTERS[SCORE - 1] if qualities(text) else "A"
        limit = body.get("max_tokens") or body["max_completion_tokens"]
        wanted = re.search(r"Score [0-9a-f]{6}:(?= LETTER)", text)
        frame = wanted[0] if wanted else ""
        said, finish = f"It is fine.\n{frame} {label}" if wanted else label, "stop"
        if wanted and behaviour == "bold":
            said = f"Fine.\n**{frame}** {label}"
        elif wanted and behaviour == "in a box":
            said = f"Fine.\n{frame} $\\boxed{{{label}}}$"
        elif wanted and behaviour == "quotes itself":
            said = f"I first thought of {frame} A, but no.\n{frame} {label}"
        elif behaviour == "prose":
            said = "It has its merits, as many answers do."
        elif behaviour == "refuses":
            said = "I'm sorry, but I can't help with that."
        elif behaviour == "cut":
            said, finish = "It is fine, and the", dialect.finish
        elif behaviour == "wrong scale":
            said = f"Fine.\n{frame} Z" if wanted else "Z"
        message: dict[str, Any] = {"role": "assistant", "content": said}
        if behaviour == "refuses by field":
            message |= {"content": None, "refusal": "I will not."}
        if behaviour == "no content":
            message["content"] = None
        elif dialect.thoughts and behaviour not in ("refuses by field",):
            finish = self._think(message, said, behaviour, finish, limit)
        if behaviour == "filtered":
            finish = "content_filter"
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "message": message}
        if body.get("logprobs") and dialect.most_logprobs:
            choice["logprobs"] = {"content": self._tokens(str(message["content"]), behaviour, label)}
        usage = dialect.usage(50, 10)
        if dialect.thoughts == "counted":
            usage["completion_tokens_details"] = {"reasoning_tokens": 8}
        return {"object": "chat.completion", "choices": [choice], "usage": usage}

    def _think(self, message: dict[str, Any], said: str, behaviour: str, finish: str, limit: int) -> str:
        """Puts thoughts before the answer; with few tokens or where the reply is cut, there is nothing else."""
        way, thoughts = self.dialect.thoughts, "Is it A? Not quite."
        short = limit < 100 or behaviour == "cut"
        said = "" if short else said
        if way == "counted":
            message["content"] = said
        elif way == "parts":
            parts = [{"type": "thinking", "thinking": [{"type": "text", "text": thoughts}]}]
            message["content"] = parts + ([{"type": "text", "text": said}] if said else [])
        elif way in ("tags", "end of tags"):
            opened = "<think>" if way == "tags" else ""
            message["content"] = f"{opened}{thoughts}" + ("" if short else f"</think>\n\n{said}")
        else:
            message |= {"content": said or None, way: thoughts}
        return self.dialect.finish if short else finish

    def _tokens(self, text: str, behaviour: str, label: str) -> list[dict[str, Any]]:
        """Returns the log-probabilities of the tokens of a text: each word is one."""
        found = []
        for piece in re.findall(r"\s*\S+|\s+$", text) or [text]:
            chosen = {"token": piece, "logprob": math.log(0.9), "bytes": list(piece.encode())}
            other = {"token": "The", "logprob": math.log(0.05), "bytes": None}
            tops = [chosen, other]
            if behaviour == "impossible tokens":
                tops += [{"token": letter, "logprob": self.dialect.impossible} for letter in "AB" if letter != label]
            found.append(chosen | {"top_logprobs": tops})
        return found
