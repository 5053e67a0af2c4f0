"""Failed calls of an API: what failed, whether and when to try again."""

from __future__ import annotations

import dataclasses
import math
import time
from email.utils import parsedate_to_datetime
from typing import Any


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
    """

    message: str
    retry: bool = False
    throttled: bool = False
    retry_after: float | None = None
    status: int | None = None
    free: bool = False
    fatal: bool = False

    def __post_init__(self) -> None:
        self.free = self.free or self.status is not None

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
        pause = min(30.0, 0.25 * 2.0 ** (failures + throttles)) * jitter
        if failed.retry_after is not None:
            pause = max(pause, failed.retry_after * (1.5 - jitter / 2) + 0.01)  # never earlier than asked
        throttled_since = min(before.throttled_since, now) if failed.throttled else before.throttled_since
        wait = before.waited_s + pause
        if failed.throttled:
            wait = max(wait, now + pause - max(throttled_since, last_answer))
        again = failed.retry and failures < self.attempts and wait <= self.max_wait_s and pause < seconds_left
        waited_s = before.waited_s + (pause if again else 0.0)
        return Attempts(failures, throttles, waited_s, throttled_since), pause if again else None


def error_message(response: Any) -> str:
    """Returns the message of an error response, in at most 300 characters."""
    try:
        body = response.json()
        error = body.get("error", body) if isinstance(body, dict) else body
        text = error.get("message", error) if isinstance(error, dict) else error
    except ValueError:
        text = response.text
    return " ".join(str(text).split())[:300]


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
