"""The page without a browser: start it in a process of its own, answer its tasks by a function. Standard library only."""

from __future__ import annotations

import dataclasses
import http.client
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rlaif_jax.config import UserError
from rlaif_jax.ui.tokens import csrf_token

AnswerFunction = Callable[[Mapping[str, Any]], "Mapping[str, Any] | str"]
"""From a task as the page shows it (kind, prompt, principle, answers in the order shown, low, high, labels) to what a
person would send: {"choice": "first" | "second" | "tie" | "both_bad", "margin": 1..5} of a comparison, {"order": [[place],
...]} of a ranking, {"value": n} of a rating, {"edited": text, "spans": [...]} of an edit, {"text": ..., "aspects": [...]}
of a comment. A plain string skips the task for that reason."""


class Page(NamedTuple):
    """A running page. urls: rater -> address with the token, as printed."""

    process: subprocess.Popen[str]
    urls: dict[str, str]


@contextmanager
def running_page(
    store: Path, raters: Sequence[str] = ("rater",), *arguments: str, timeout_s: float = 60.0
) -> Iterator[Page]:
    """Start the page on a free port in a process of its own, and end it afterwards.

    arguments: further ones of `annotate`, as on the command line ("--overlap", "2"). UserError if it does not come up.
    """
    command = [sys.executable, "-m", "rlaif_jax.ui.annotate", "--store", str(store), "--raters", *raters, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield Page(process, _printed_urls(process, raters, timeout_s))
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()


def _printed_urls(process: subprocess.Popen[str], raters: Sequence[str], timeout_s: float) -> dict[str, str]:
    urls: dict[str, str] = {}
    started = time.monotonic()
    assert process.stdout is not None
    timer = threading.Timer(timeout_s, process.kill)  # ends the wait for a line that never comes
    timer.start()
    try:
        while len(urls) < len(raters):
            line = process.stdout.readline()
            if not line:
                late = f" within {timeout_s:g} s" if time.monotonic() - started >= timeout_s else ""
                raise UserError(f"the page did not start{late} (exit code {process.poll()}); what it printed tells why")
            name, separator, url = line.strip().partition(": http")
            if separator and name in raters:
                urls[name] = "http" + url
    finally:
        timer.cancel()
    return urls


@dataclasses.dataclass(frozen=True)
class PageClient:
    """One rater's side of the page's HTTP interface. url: the address as printed, with its token."""

    url: str
    retries: int = 3

    @property
    def base(self) -> str:
        """Scheme, host and port."""
        return self.url.split("/?")[0].rstrip("/")

    def call(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """GET `path`, or POST `body` to it; the JSON answer. A post that fails on the way is sent again as it is: with its
        request id it counts once. UserError with the page's own words when it refuses."""
        token = self.url.partition("token=")[2]
        headers = {"Authorization": f"Bearer {token}", "Origin": self.base}
        if body is not None:
            headers |= {"Content-Type": "application/json", "X-CSRF-Token": csrf_token(token)}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, headers)
        for attempt in range(self.retries + 1):
            try:
                try:
                    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
                    with opener.open(request, timeout=60) as response:
                        return json.load(response)
                except urllib.error.HTTPError as error:
                    with error:
                        words = error.read().decode(errors="replace").strip()
                    raise UserError(f"{path}: {error.code} {words}") from error
            except (OSError, http.client.HTTPException) as error:  # the latter when an answer breaks off
                if attempt == self.retries:
                    raise UserError(f"{self.base} does not answer ({error})") from error
                time.sleep(min(0.2 * 2**attempt, 1.0))
        raise AssertionError

    def next(self) -> dict[str, Any] | None:
        """The next task, leased; None when there is none for now."""
        return self.call("/api/next", {})["task"]

    def answer(self, task: Mapping[str, Any], answer: Mapping[str, Any] | str, seconds: float = 0.0) -> dict[str, Any]:
        """Send an answer, or a skip with its reason; returns once it is on disk."""
        said = {"skip": answer} if isinstance(answer, str) else {"payload": dict(answer)}
        return self.call("/api/answer", {"request": uuid.uuid4().hex, "task": task["id"], "seconds": seconds, **said})

    def undo(self) -> dict[str, Any]:
        """Take the last answer back."""
        return self.call("/api/undo", {"request": uuid.uuid4().hex})


def answer_through_page(
    url: str,
    answer: AnswerFunction,
    *,
    check: Sequence[int] = (1, 2),
    most: int | None = None,
    wait_s: float = 0.0,
    over: Callable[[], bool] = lambda: False,
) -> int:
    """Answer a rater's tasks by a function over HTTP, as a simulated annotator does; the number answered.

    url: the rater's address. check: answers to the check's questions (default: of the built-in ones). most: stop after
    that many. wait_s: how long to look for new tasks before giving up; a training run puts them step by step. over: asked
    before every look; True ends it at once (an Event's `is_set` where this runs in a thread beside the training).
    """
    client, count, idle, pause = PageClient(url), 0, time.monotonic(), 0.0
    me = client.call("/api/me")
    if not me["passed"]:
        marked = client.call("/api/check", {"answers": list(check)})
        if not marked["passed"]:
            raise UserError(f"the check was not passed: {marked['wrong']}")
    while not over() and (most is None or count < most):
        task = client.next()
        if task is None:
            if time.monotonic() - idle >= wait_s:
                break
            # A training run is at work meanwhile: look less and less often.
            pause = min(0.02 + 1.5 * pause, 0.5, wait_s)
            time.sleep(pause)
            continue
        started = time.monotonic()
        client.answer(task, answer(task), time.monotonic() - started)
        count, idle, pause = count + 1, time.monotonic(), 0.0
    return count
