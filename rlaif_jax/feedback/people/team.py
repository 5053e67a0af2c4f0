"""The raters of an annotation page: names, passed checks, and requests to stop a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from time import time as now

from rlaif_jax.feedback.records.sqlite import Database

TABLES = """
CREATE TABLE IF NOT EXISTS page_passed (rater TEXT NOT NULL, questions TEXT NOT NULL, PRIMARY KEY (rater, questions));
CREATE TABLE IF NOT EXISTS page_stop (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, rater TEXT NOT NULL, stop INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS page_rater (name TEXT PRIMARY KEY);
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Team:
    """The raters in a `TaskQueue`'s file."""

    database: Database

    def register(self, raters: Iterable[str]) -> None:
        """Replaces the names of the raters who answer."""
        with self.database.write() as db:
            db.execute("DELETE FROM page_rater")
            db.executemany("INSERT INTO page_rater VALUES (?) ON CONFLICT DO NOTHING", [(name,) for name in raters])

    @property
    def raters(self) -> frozenset[str]:
        """Returns the raters that the page registered when it last started; none before the first start."""
        return frozenset(row[0] for row in self.database.rows("SELECT name FROM page_rater"))

    def has_passed(self, rater: str, questions: str) -> bool:
        """Returns whether the rater has passed the check whose hash is `questions`."""
        query = "SELECT 1 FROM page_passed WHERE rater = ? AND questions = ?"
        return self.database.row(query, (rater, questions)) is not None

    def record_pass(self, rater: str, questions: str) -> None:
        """Stores that the rater has passed the check whose hash is `questions`."""
        with self.database.write() as db:
            db.execute("INSERT INTO page_passed VALUES (?, ?) ON CONFLICT DO NOTHING", (rater, questions))

    def request_stop(self, rater: str, stop: bool = True) -> None:
        """Stores the request of `rater` to stop asking people, or (`stop` false) to go on."""
        with self.database.write() as db:
            db.execute("INSERT INTO page_stop (time, rater, stop) VALUES (?, ?, ?)", (now(), rater, stop))

    @property
    def last_stop(self) -> int:
        """Returns the number of the newest request to stop or to go on; 0 where nobody ever made one."""
        return self.database.row("SELECT coalesce(max(sequence), 0) FROM page_stop")[0]

    def stop_requested(self, after: int = 0) -> bool:
        """Returns whether the newest request with a number larger than `after` is one to stop."""
        found = self.database.row(
            "SELECT stop FROM page_stop WHERE sequence > ? ORDER BY sequence DESC LIMIT 1", (after,)
        )
        return found is not None and bool(found[0])
