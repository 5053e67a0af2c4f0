"""When a failed call is tried again, without a loop and without a clock."""

from __future__ import annotations

import math

import pytest

from rlaif_jax.feedback.api.failures import Attempts, CallFailed, RetryPolicy, error_in, read_error, retry_after_seconds

POLICY = RetryPolicy(attempts=3, max_wait_s=10.0)
ERROR = CallFailed("status 500", retry=True, status=500)
THROTTLED = CallFailed("status 429", retry=True, throttled=True, status=429)


def after(
    failed, before=Attempts(), *, policy=POLICY, now=0.0, last_answer=-math.inf, seconds_left=math.inf, jitter=1.0
):
    return policy.after(failed, before, now=now, last_answer=last_answer, seconds_left=seconds_left, jitter=jitter)


def test_pauses_double_and_the_attempts_end():
    attempts, pauses = Attempts(), []
    for _ in range(3):
        attempts, pause = after(ERROR, attempts)
        pauses.append(pause)
    assert pauses == [0.5, 1.0, None]
    assert attempts == Attempts(failures=3, waited_s=1.5)
    assert after(ERROR, jitter=0.5)[1] == 0.25
    assert after(ERROR, Attempts(failures=20), policy=RetryPolicy(99, 99.0))[1] == 30.0


def test_what_cannot_succeed_is_not_tried_again():
    assert after(CallFailed("status 400", status=400)) == (Attempts(failures=1), None)


@pytest.mark.parametrize("jitter", [0.5, 0.7, 1.0])
def test_a_pause_is_never_shorter_than_the_server_wants(jitter: float):
    _, pause = after(CallFailed("later", retry=True, status=503, retry_after=4.0), jitter=jitter)
    assert pause is not None and 4.0 < pause <= 4.0 * 1.25 + 0.01


def test_throttling_does_not_count_as_an_attempt_but_its_pauses_end():
    attempts, pause, pauses = Attempts(), 0.0, []
    while pause is not None:
        attempts, pause = after(THROTTLED, attempts, now=sum(pauses))
        pauses += [pause] if pause is not None else []
    assert attempts.failures == 0 and attempts.throttles == 5  # 0.5 + 1 + 2 + 4 s; 8 s more would pass 10 s
    assert attempts.waited_s == sum(pauses) == 7.5


def test_throttling_ends_by_the_clock_unless_other_calls_are_answered():
    before = Attempts(throttles=1, waited_s=0.5, throttled_since=0.0)
    assert after(THROTTLED, before, now=9.5)[1] is None
    assert after(THROTTLED, before, now=9.5, last_answer=9.0)[1] == 1.0


def test_a_pause_longer_than_the_time_budget_is_not_begun():
    assert after(ERROR, seconds_left=0.5)[1] is None
    assert after(ERROR, seconds_left=0.51)[1] == 0.5


class Response:
    def __init__(self, body: object, text: str = "") -> None:
        self.body, self.text = body, text

    def json(self) -> object:
        if self.body is None:
            raise ValueError("no JSON")
        return self.body


def test_the_message_of_an_error_response():
    said = lambda body, text="": read_error(Response(body, text)).message
    assert said({"error": {"message": "too  long\n text"}}) == "too long text"
    assert said({"error": "short"}) == "short"
    assert said({"detail": [3]}) == "[3]"
    assert said(["x"], '["x"]') == '["x"]'
    assert said(None, "<html>" + "x" * 400) == "<html>" + "x" * 294


def test_retry_after_is_a_number_or_a_date():
    assert retry_after_seconds({"retry-after-ms": "1500"}) == 1.5
    assert retry_after_seconds({"retry-after": "2.5"}) == 2.5
    assert retry_after_seconds({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert retry_after_seconds({"retry-after": "soon"}) is None
    assert retry_after_seconds({}) is None


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"error": {"message": "m", "code": 429}}, ("m", 429, False)),
        ({"error": {"message": "m", "code": "429"}, "choices": None}, ("m", 429, False)),
        ({"error": {"message": "m", "type": "rate_limit_error"}}, ("m", 429, False)),
        ({"error": {"message": "m", "code": "insufficient_quota"}}, ("m", None, True)),
        ({"error": {"message": "m", "metadata": {"raw": "why"}, "code": 502}}, ("m: why", 502, False)),
        ({"error": "m", "error_type": "validation"}, ("m", None, False)),
        ({"object": "error", "message": "m", "code": 40301}, ("m", None, False)),
        ({"detail": "m"}, ("m", None, False)),
        ([{"error": {"message": "m", "code": 503}}], ("m", 503, False)),
        ({"choices": [{"error": {"message": "m", "code": 502}}]}, ("m", 502, False)),
        ({"choices": [{"message": {}}], "error": None}, None),
        ({"choices": []}, None),
        ("text", None),
    ],
)
def test_errors_in_bodies(body: object, expected: object):
    assert error_in(body) == expected


def test_a_call_that_is_refused_for_hours_still_pauses():
    assert after(THROTTLED, Attempts(throttles=5000), policy=RetryPolicy(9, 1e9), jitter=1.0)[1] == 30.0
