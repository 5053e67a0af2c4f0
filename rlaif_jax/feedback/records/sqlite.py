"""SQLite as this package uses it: a file that several processes write at once, and that keeps what was acknowledged."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 60.0
"""Seconds to wait for another writer."""


def connect(path: Path | None) -> sqlite3.Connection:
    """Open `path`, created if absent with its folder; memory for None. Raises OSError or sqlite3.Error."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(path or ":memory:", timeout=PATIENCE, isolation_level=None)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:
            # SQLite does not wait here by itself when several open a new file.
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    db.execute("PRAGMA synchronous = FULL")  # an acknowledged record survives a power cut, too
    return db


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """BEGIN IMMEDIATE .. COMMIT: writers wait for each other here, and a failure leaves nothing behind."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    finally:
        if db.in_transaction:  # after an error, or a commit that failed
            db.execute("ROLLBACK")
