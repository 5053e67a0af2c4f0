"""The cache of replies, by content: the same question to the same model is never paid for twice.

The key is the SHA-256 of the canonical JSON of the request: model and revision, rendered messages, decoding,
order and repeat. The server's whole response is kept, and how it is parsed is no part of the key, so that
parsing it in a new way costs nothing. Refusals and errors are not kept. A reply that could not be read is kept, for a
better parser, and replaced by the next one. `put` returns after the transaction is on disk.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any, NamedTuple

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.records.forms import canonical, sha256
from rlaif_jax.feedback.records.sqlite import connect

SCHEMA = 1


class CachedReply(NamedTuple):
    """A response of the server.

    Attributes:
        response: the body, JSON text.
        time: when it came, in Unix seconds.
        latency_s: how long it took, in seconds.
    """

    response: str
    time: float
    latency_s: float


class CallCache:
    """A cache in the SQLite file `path`, or in memory for None.

    An object belongs to one thread; any number of processes may use the file.
    """

    def __init__(self, path: Path | None) -> None:
        try:
            self._db = connect(path)
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            require(version in (0, SCHEMA), f"{path}: a cache of version {version}; this program reads {SCHEMA}")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS call (key TEXT PRIMARY KEY, request TEXT NOT NULL, response TEXT NOT NULL, "
                "time REAL NOT NULL, latency_s REAL NOT NULL)"
            )
            self._db.execute("CREATE TABLE IF NOT EXISTS server (key TEXT PRIMARY KEY, facts TEXT NOT NULL)")
            self._db.execute(f"PRAGMA user_version = {SCHEMA}")
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"{path}: no cache can be opened here ({error})") from error

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def get(self, request: dict[str, Any]) -> CachedReply | None:
        """Returns the response to the same request; None if the cache has none."""
        row = self._db.execute(
            "SELECT response, time, latency_s FROM call WHERE key = ?", (sha256(request),)
        ).fetchone()
        return CachedReply(*row) if row else None

    def put(self, request: dict[str, Any], reply: CachedReply, replace: bool = False) -> None:
        """Stores the `reply` to a `request`; a stored one stays, unless the new one is to `replace` it."""
        otherwise = "REPLACE" if replace else "IGNORE"
        self._db.execute(
            f"INSERT OR {otherwise} INTO call VALUES (?, ?, ?, ?, ?)", (sha256(request), canonical(request), *reply)
        )

    def capabilities(self, question: dict[str, Any]) -> dict[str, Any] | None:
        """Returns what `put_capabilities` stored under the same question."""
        row = self._db.execute("SELECT facts FROM server WHERE key = ?", (sha256(question),)).fetchone()
        return json.loads(row[0]) if row else None

    def put_capabilities(self, question: dict[str, Any], capabilities: dict[str, Any]) -> None:
        """Stores what a server can do, in place of what was stored before.

        Args:
            question: the settings that it depends on: server, model and what is asked of them.
            capabilities: the capabilities by name, JSON values.
        """
        self._db.execute("INSERT OR REPLACE INTO server VALUES (?, ?)", (sha256(question), canonical(capabilities)))

    def __len__(self) -> int:
        return self._db.execute("SELECT count(*) FROM call").fetchone()[0]
