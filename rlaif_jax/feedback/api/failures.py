"""Failed calls of an API: what failed, whether and when to try again."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from rlaif_jax.feedback.api.replies import Usage

_RETRIED = (408, 409, 425, 429)
_SPENT_ACCOUNT = ("insufficient_quota", "budget_exceeded")  # OpenAI; LiteLLM
_CODES = {
    "rate_limit_exceeded": 429,
    "rate_limit_error": 429,
    "too_many_requests": 429,
    "overloaded_error": 503,
    "server_error": 500,
    "api_error": 500,
    "authentication_error": 401,
    "invalid_request_error": 400,
}


class Charge(NamedTuple):
    """What calls took, as the budget counts it.

    That is the usage that the server reported, else the most it can have been.

    Attributes:
        prompt: tokens of prompts.
        completion: tokens of replies.
        usd: US dollars.
    """

    prompt: int = 0
    completion: int = 0
    usd: float = 0.0

    def plus(self, other: Charge) -> Charge:
        """Returns both together."""
        return Charge(self.prompt + other.prompt, self.completion + other.completion, self.usd + other.usd)


@dataclasses.dataclass(eq=False)
class CallFailed(Exception):
    """A call without a usable reply.

    Attributes:
        message: what failed; it holds no key.
        retry: whether another attempt may succeed.
        throttled: whether the server answered "too many requests".
        retry_after: the seconds until the server wants the next attempt; None = it names none.
        status: the HTTP status; None where no response came.
        free: whether nobody charges for the call: it was an error of the server, or it was never sent.
        fatal: whether every other call will fail, too.
        usage: the tokens that the server reported all the same; None = none.
        charge: what its attempts took.
    """

    message: str
    retry: bool = False
    throttled: bool = False
    retry_after: float | None = None
    status: int | None = None
    free: bool = False
    fatal: bool = False
    usage: Usage | None = None
    charge: Charge = Charge()

    def __post_init__(self) -> None:
        self.free = self.free or self.status is not None

    @property
    def unwell(self) -> bool:
        """Returns whether the server did not answer at all, or with an error of its side."""
        return self.retry and not self.throttled and (self.status is None or self.status >= 500)

    def __str__(self) -> str:
        return self.message


@dataclasses.dataclass(frozen=True)
class Attempts:
    """The failed attempts of one call so far.

    Attributes:
        failures: those that count: all except "too many requests".
        throttles: those that were answered with "too many requests".
        waited_s: the pauses so far, in seconds.
        throttled_since: the time of the first "too many requests".
    """

    failures: int = 0
    throttles: int = 0
    waited_s: float = 0.0
    throttled_since: float = math.inf


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """Decides whether and when to try again after a failure: exponential backoff with jitter.

    Attributes:
        attempts: the greatest number of attempts; "too many requests" does not count.
        max_wait_s: the longest sum of pauses of one call, and the longest time of "too many requests" in
            which no call at all is answered: a queue in which calls are answered is not such a wait.
    """

    attempts: int
    max_wait_s: float

    def after(
        self,
        failed: CallFailed,
        before: Attempts,
        *,
        now: float,
        last_answer: float,
        seconds_left: float,
        jitter: float,
    ) -> tuple[Attempts, float | None]:
        """Returns the attempts with this failure among them, and the pause in seconds; None = give up.

        Args:
            failed: the failure.
            before: the attempts before it.
            now: the time of the failure, in seconds.
            last_answer: the time when any call was last answered.
            seconds_left: what the time budget leaves.
            jitter: a random number in [0.5, 1], so that calls that failed together do not come back together.
        """
        failures = before.failures + (not failed.throttled)
        throttles = before.throttles + failed.throttled
        pause = min(30.0, 0.25 * 2.0 ** min(failures + throttles, 10)) * jitter
        if failed.retry_after is not None:
            pause = max(pause, failed.retry_after * (1.5 - jitter / 2) + 0.01)  # never earlier than asked
        throttled_since = min(before.throttled_since, now) if failed.throttled else before.throttled_since
        wait = before.waited_s + pause
        if failed.throttled:
            wait = max(wait, now + pause - max(throttled_since, last_answer))
        again = failed.retry and failures < self.attempts and wait <= self.max_wait_s and pause < seconds_left
        waited_s = before.waited_s + (pause if again else 0.0)
        return Attempts(failures, throttles, waited_s, throttled_since), pause if again else None


class ServerError(NamedTuple):
    """An error in the body of a response.

    Attributes:
        message: the server's words, in at most 300 characters.
        status: the HTTP status that its code or type means; None = none.
        spent: whether the account has nothing left to pay with.
    """

    message: str
    status: int | None
    spent: bool


def error_in(body: Any) -> ServerError | None:
    """Returns the error in a body that is no completion, or whose first choice broke off; None = no error.

    Knows the shapes of OpenAI, vLLM, SGLang, llama.cpp, Ollama, TGI, LiteLLM, OpenRouter, Gemini and FastAPI.
    """
    if isinstance(body, list) and body:  # Gemini
        body = body[0]
    if not isinstance(body, Mapping):
        return None
    choices = body.get("choices")
    found = body.get("error")
    if isinstance(choices, list) and choices and isinstance(choices[0], Mapping):
        found = found or choices[0].get("error")  # OpenRouter: the provider broke off
    elif not found:
        found = body if body.get("object") == "error" or body.get("message") else body.get("detail")
    if not found:
        return None
    fields = found if isinstance(found, Mapping) else {}
    message = found
    for name in ("message", "error", "detail"):
        message = message.get(name) or message if isinstance(message, Mapping) else message
    metadata = fields.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, Mapping) else None  # OpenRouter: what its provider said
    names = [str(fields.get(name) or "") for name in ("code", "type", "status")] + [str(body.get("error_type") or "")]
    statuses = [int(name) for name in names if re.fullmatch("[45][0-9][0-9]", name)]
    statuses += [_CODES[name.lower()] for name in names if name.lower() in _CODES]
    text = _beginning(f"{message}: {raw}" if raw else str(message))
    return ServerError(text, statuses[0] if statuses else None, any(name in _SPENT_ACCOUNT for name in names))


def read_error(response: Any) -> ServerError:
    """Reads the body of an error response, which may be anything."""
    try:
        found = error_in(response.json())
    except (ValueError, RecursionError):
        found = None
    return found or ServerError(_beginning(response.text), None, False)


def _beginning(text: str) -> str:
    """Returns at most 300 characters of a text, in one line."""
    return " ".join(text[:2000].split())[:300]


def failure_of(error: ServerError, status: int | None, headers: Any) -> CallFailed:
    """Builds the failure that an error response means.

    Args:
        error: the error in its body.
        status: its HTTP status; where that is a success, the status of the error in the body.
        headers: its headers.
    """
    retry = status is None or status in _RETRIED or status >= 500
    where = f"status {status}" if status is not None else "an error in the response"
    if error.spent:  # a 429 that no waiting ends
        return CallFailed(f"{where}: {error.message}", status=status, fatal=True, free=True)
    return CallFailed(
        f"{where}: {error.message}",
        retry=retry,
        throttled=status == 429,
        retry_after=retry_after_seconds(headers) if retry else None,
        status=status,
        free=True,
    )


def retry_after_seconds(headers: Any) -> float | None:
    """Reads the header retry-after-ms or Retry-After (a number or a date) in seconds; None = missing."""
    try:
        if "retry-after-ms" in headers:
            return max(float(headers["retry-after-ms"]) / 1000, 0.0)
        value = headers.get("retry-after", "")
        if value.strip().replace(".", "", 1).isdigit():
            return float(value)
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return None
