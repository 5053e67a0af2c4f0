"""An OpenAI-compatible server on loopback that answers correctly or fails in every way, and counts its requests.

Its judge looks for a number in each answer ("quality 1.5"): the log-odds of the first answer are q1 - q2 plus a bias for
the first place.
"""

from __future__ import annotations

import json
import math
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BIAS = 0.7
LETTERS = "ABCDEFGHIJ"


def qualities(text: str) -> list[float]:
    """The numbers of the answers, as shown."""
    return [float(number) for number in re.findall(r"quality (-?\d+(?:\.\d+)?)", text)]


def completion(
    text: str,
    *,
    top: list[tuple[str, float]] | None = None,
    prompt_tokens: int = 50,
    completion_tokens: int = 1,
    **message: Any,
) -> dict[str, Any]:
    """A chat completion; `top` are the alternatives of its only token, with probabilities."""
    choice: dict[str, Any] = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": text} | message,
    }
    if top is not None:
        tops = [{"token": t, "logprob": math.log(p), "bytes": list(t.encode())} for t, p in top]
        choice["logprobs"] = {"content": [{"token": text, "logprob": tops[0]["logprob"], "top_logprobs": tops}]}
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return {"object": "chat.completion", "choices": [choice], "usage": usage | {"total_tokens": sum(usage.values())}}


def right(body: dict[str, Any], *, logprobs: bool = True) -> dict[str, Any]:
    """What a good judge says: a label with its log-probabilities, or reasons and a verdict in words."""
    text = body["messages"][-1]["content"]
    shown = qualities(text)
    tokens = len(text.encode()) // 4
    if not shown:  # the question whether there are log-probabilities
        return completion("A", top=[("A", 0.9), ("B", 0.1)] if logprobs else None, prompt_tokens=tokens)
    verdict = re.search(r"(?:Verdict|Score) [0-9a-f]{6}:(?= LETTER)", text)
    if len(shown) >= 2:
        p = 1 / (1 + math.exp(-(shown[0] - shown[1] + BIAS)))
        label = "A" if p > 0.5 else "B"
        top = [("A", 0.75 * p), ("B", 0.75 * (1 - p)), (" A", 0.15 * p), (" B", 0.15 * (1 - p)), ("The", 0.1)]
    else:
        label = LETTERS[round(shown[0]) - 1]
        top = [(label, 0.9), ("The", 0.1)]
    if verdict:
        return completion(f"Both say something.\n{verdict[0]} {label}", prompt_tokens=tokens, completion_tokens=12)
    if tag := re.search(r"<(?:revised|corrected)-[0-9a-f]{6}>", text):
        end = tag[0].replace("<", "</")
        return completion(f"Here: {tag[0]}better {shown[0]}{end}", prompt_tokens=tokens, completion_tokens=9)
    if "Write a critique" in text:
        return completion(f"It has a quality of {shown[0]}.", prompt_tokens=tokens, completion_tokens=9)
    return completion(
        label, top=sorted(top, key=lambda t: -t[1]) if logprobs and body.get("logprobs") else None, prompt_tokens=tokens
    )


Behaviour = Callable[[dict[str, Any], int], Any]
"""(request, its number) -> a response as JSON, or one of the wrong ways below."""


class Wrong:
    """A wrong way: status with headers and the error's code or the whole body, or what happens to the connection."""

    def __init__(
        self,
        status: int = 0,
        *,
        event: str = "",
        wait: float = 0.0,
        code: str = "",
        body: Any = None,
        **headers: str,
    ) -> None:
        self.status, self.event, self.wait, self.code, self.headers = status, event, wait, code, headers
        self.body = body


class ApiServer:
    """A server with its requests: `requests` (bodies), `keys` (Authorization headers), `times`, `most` at a time."""

    def __init__(self, behave: Behaviour) -> None:
        self.behave = behave
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.times: list[float] = []
        self.now = self.most = 0
        self.tokens = 0  # of all completions that were sent whole
        self._lock = threading.Lock()
        self._release = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # one packet a response
            disable_nagle_algorithm = True

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    number = len(outer.requests)
                    outer.requests.append(body)
                    outer.times.append(time.monotonic())
                    outer.keys.add(self.headers.get("Authorization", ""))
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                try:
                    outer._answer(self, outer.behave(body, number))
                finally:
                    with outer._lock:
                        outer.now -= 1

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *arguments: Any) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def _answer(self, handler: BaseHTTPRequestHandler, answer: Any) -> None:
        wrong = answer if isinstance(answer, Wrong) else Wrong()
        if wrong.event == "hang":
            self._release.wait(20)
            handler.close_connection = True
            return
        if wrong.event == "reset":
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
            handler.connection.close()
            return
        time.sleep(wrong.wait)
        if wrong.status:
            error = {"message": f"wrong with {handler.headers.get('Authorization')}", "code": wrong.code or None}
            body = {"error": error} if wrong.body is None else wrong.body
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
        elif isinstance(answer, bytes):
            data = answer
        else:
            data = json.dumps(answer).encode()
            with self._lock:
                self.tokens += answer.get("usage", {}).get("total_tokens", 0) if isinstance(answer, dict) else 0
        handler.send_response(wrong.status or 200)
        for name, value in wrong.headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)
        handler.wfile.flush()

    @property
    def count(self) -> int:
        return len(self.requests)


@contextmanager
def serve(behave: Behaviour = lambda body, number: right(body)) -> Iterator[ApiServer]:
    """A running server."""
    server = ApiServer(behave)
    thread = threading.Thread(target=server._server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server._release.set()
        server._server.shutdown()
        server._server.server_close()
        thread.join()
