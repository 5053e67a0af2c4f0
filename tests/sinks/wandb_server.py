"""As much of W&B's server as a run of the real package needs, on loopback: runs, their history, files.

W&B's own server is no package that a test could start. Artifacts are refused; the package then goes on without them.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """The server, and what it has received.

    Attributes:
        history: run id -> the lines of its history; a line is a JSON object.
        runs: run id -> the variables of the request that began it.
        ended: the exit codes of finished runs.
        received: all bytes of all requests.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.ended: list[int] = []
        self.received = b""
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data
        self.server.received += data
        reply: Any = {}
        if self.path == "/graphql":
            reply = _graphql(self.server, json.loads(data))
        elif self.path.endswith("/file_stream"):
            _stream(self.server, self.path.split("/")[-2], json.loads(data))
        self._reply(reply)

    def do_PUT(self) -> None:
        self.server.received += self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._reply({})

    def _reply(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _graphql(server: Server, asked: dict[str, Any]) -> dict[str, Any]:
    query, given = asked["query"], asked.get("variables") or {}
    entity = {"id": "e", "name": "me"}
    if "Viewer" in query:
        viewer = {"id": "u", "entity": "me", "username": "me", "email": None, "admin": False, "flags": "{}"}
        return {"data": {"viewer": {**viewer, "teams": {"edges": []}}}}
    if "RunResumeStatus" in query:
        lines = server.history.get(given["name"])
        bucket = None
        if lines:
            bucket = {
                "id": given["name"], "name": given["name"], "displayName": None, "config": "{}",
                "summaryMetrics": json.dumps(lines[-1]),
                "historyLineCount": len(lines), "logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]",
                "historyTail": json.dumps([json.dumps(line) for line in lines[-1:]]), "tags": [], "notes": None,
                "wandbConfig": '{"t": 1}',
            }  # fmt: skip
        return {"data": {"model": {"id": "p", "name": given["project"], "entity": entity, "bucket": bucket}}}
    if "upsertBucket" in query:
        name = given["name"]
        is_new = name not in server.runs
        server.runs.setdefault(name, given)
        server.history.setdefault(name, [])
        project = {"id": "p", "name": given["project"], "entity": entity}
        bucket = {"id": name, "name": name, "displayName": given.get("displayName"), "description": "", "config": "{}"}
        bucket |= {"sweepName": None, "project": project, "historyLineCount": len(server.history[name])}
        return {"data": {"upsertBucket": {"inserted": is_new, "bucket": bucket}}}
    if "CreateRunFiles" in query:
        files = [{"name": name, "uploadUrl": f"{server.url}/up/{name}"} for name in given["files"]]
        return {"data": {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}}
    if "ArtifactType" in query:
        return {"data": {"project": None}}
    return {"errors": [{"message": "this server has no such thing"}]}


def _stream(server: Server, name: str, sent: dict[str, Any]) -> None:
    """Takes lines of a run's history, which begin at an offset and replace what is there."""
    part = (sent.get("files") or {}).get("wandb-history.jsonl")
    if part:
        kept = server.history[name][: part["offset"]]
        server.history[name] = [*kept, *map(json.loads, part["content"])]
    if sent.get("complete"):
        server.ended.append(sent["exitcode"])


@contextmanager
def serve() -> Iterator[Server]:
    """Serves until the block ends."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
