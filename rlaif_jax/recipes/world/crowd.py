"""Simulated annotators: start the annotation page and answer its tasks by functions, over HTTP."""

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
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from rlaif_jax.config import UserError

AnswerFunction = Callable[[Mapping[str, Any]], "Mapping[str, Any] | str"]
"""From a task as the page shows it (kind, prompt, principle, answers in the order shown, low, high, labels) to what a
person would send: {"choice": "first" | "second" | "tie" | "both_bad", "margin": 1..5} for a comparison, {"order": [[place],
...]} for a ranking, {"value": n} for a rating, {"edited": text, "spans": [...]} for an edit, {"text": ..., "aspects":
[...]} for a comment. A plain string skips the task for that reason."""


class RunningPage(NamedTuple):
    """A running page.

    Attributes:
        process: the server.
        urls: rater -> the rater's address with the token.
    """

    process: subprocess.Popen[str]
    urls: dict[str, str]


@contextmanager
def running_page(
    store: Path, raters: Sequence[str] = ("rater",), *arguments: str, timeout_s: float = 60.0
) -> Iterator[RunningPage]:
    """Runs the page on a free port in another process while the block runs.

    Args:
        store: the feedback store.
        raters: the names of the raters.
        arguments: further options of `python -m rlaif_jax annotate`, such as "--overlap", "2".
        timeout_s: seconds to wait for the page.

    Raises:
        UserError: the page does not start in time.
    """
    command = [sys.executable, "-m", "rlaif_jax", "annotate", "--store", str(store), "--raters", *raters, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield RunningPage(process, _printed_urls(process, raters, timeout_s))
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
                raise UserError(f"the page did not start{late} (exit code {process.poll()}); its output says why")
            name, separator, url = line.strip().partition(": http")
            if separator and name in raters:
                urls[name] = "http" + url
    finally:
        timer.cancel()
    return urls


@dataclasses.dataclass(frozen=True)
class PageClient:
    """A client of the page for one rater.

    Attributes:
        url: the rater's address, with the token.
        retries: how often a request that fails on the way is sent again.
    """

    url: str
    retries: int = 3

    @property
    def base(self) -> str:
        """Returns the address of the page: scheme, host and port."""
        return self.url.split("/?")[0].rstrip("/")

    @cached_property
    def _csrf(self) -> str:
        return self.call("/api/me")["csrf"]

    def call(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Sends GET `path`, or POST with `body`, and returns the decoded JSON reply.

        A post that fails on the way is sent again unchanged: because of its request id it counts once.

        Raises:
            UserError: the page refuses (the message has its words) or does not answer.
        """
        token = self.url.partition("token=")[2]
        headers = {"Authorization": f"Bearer {token}", "Origin": self.base}
        if body is not None:
            headers |= {"Content-Type": "application/json", "X-CSRF-Token": self._csrf}
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
                        if error.code == 503 and attempt < self.retries:  # another program is writing; it may soon end
                            raise OSError("busy") from error
                        reason = error.read().decode(errors="replace").strip()
                    raise UserError(f"{path}: {error.code} {reason}") from error
            except (OSError, http.client.HTTPException) as error:  # the latter when an answer breaks off
                if attempt == self.retries:
                    raise UserError(f"{self.base} does not answer ({error})") from error
                time.sleep(min(0.2 * 2**attempt, 1.0))
        raise AssertionError

    def next(self) -> dict[str, Any] | None:
        """Leases the next task and returns it; None where nothing is open for now."""
        return self.call("/api/next", {})["task"]

    def answer(self, task: Mapping[str, Any], answer: Mapping[str, Any] | str, seconds: float = 0.0) -> dict[str, Any]:
        """Sends an answer, or a skip with its reason, and returns the page's reply.

        The reply comes once the answer is on disk.

        Args:
            task: the task, as `next` returned it.
            answer: the fields of the answer, or the reason of a skip.
            seconds: the time that the rater took.

        Raises:
            UserError: the page refuses the answer or does not respond.
        """
        content = {"skip": answer} if isinstance(answer, str) else {"payload": dict(answer)}
        return self.call(
            "/api/answer", {"request": uuid.uuid4().hex, "task": task["id"], "seconds": seconds, **content}
        )

    def undo(self) -> dict[str, Any]:
        """Withdraws the last answer."""
        return self.call("/api/undo", {"request": uuid.uuid4().hex})


def answer_through_page(
    url: str,
    answer: AnswerFunction,
    *,
    check: Sequence[int] = (1, 2),
    most: int | None = None,
    wait_s: float = 0.0,
    done: Callable[[], bool] = lambda: False,
) -> int:
    """Answers a rater's tasks by a function over HTTP; returns the number of answers.

    Args:
        url: the rater's address, with the token.
        answer: makes the answer to a task.
        check: the answers to the check's questions; by default those of the built-in check.
        most: the largest number of answers; None for all.
        wait_s: seconds to wait for new tasks; a training run puts them step by step.
        done: asked before every look for a task; True ends the work at once (such as `is_set` of an Event, where this
            runs in a thread).

    Raises:
        UserError: the page refuses an answer or does not reply, or the check is not passed.
    """
    client, count, idle, pause = PageClient(url), 0, time.monotonic(), 0.0
    me = client.call("/api/me")
    if not me["passed"]:
        marked = client.call("/api/check", {"answers": list(check)})
        if not marked["passed"]:
            raise UserError(f"the check was not passed: {marked['wrong']}")
    while not done() and (most is None or count < most):
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
