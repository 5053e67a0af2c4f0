"""The conversations of raters with a model, kept in the file of the tasks."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from rlaif_jax.config import UserError
from rlaif_jax.feedback.records.sqlite import Database, searchable

TABLES = """
CREATE TABLE IF NOT EXISTS page_turn (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, task TEXT NOT NULL, rater TEXT NOT NULL, request TEXT NOT NULL,
    message TEXT NOT NULL, reply TEXT, UNIQUE (rater, request));
CREATE INDEX IF NOT EXISTS page_turn_task ON page_turn (task, rater);
"""


class Conflict(UserError):
    """A post that contradicts an earlier one."""


class Turn(NamedTuple):
    """One exchange of a chat; reply is None until the model has answered."""

    message: str
    reply: str | None


@dataclasses.dataclass(frozen=True, eq=False)
class Chats:
    """The conversations in a `TaskQueue`'s file."""

    database: Database

    def turns(self, task: str, rater: str) -> list[Turn]:
        """Returns the rater's conversation about the task with this id, oldest turn first."""
        rows = self.database.rows(
            "SELECT message, reply FROM page_turn WHERE task = ? AND rater = ? ORDER BY sequence", (task, rater)
        )
        return [Turn(*row) for row in rows]

    def say(self, task: str, rater: str, request: str, message: str) -> int:
        """Stores a message of the rater to the model and returns its place in the conversation, 0 = first.

        The same request twice is stored once and has the place of the first.

        Args:
            task: the id of the chat task.
            rater: the rater's name.
            request: the id that the sender made for this message.
            message: the text.

        Raises:
            Conflict: the request's id was used before for another message or another task.
        """
        with self.database.write("the message") as db:
            db.execute(
                "INSERT INTO page_turn (task, rater, request, message) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (rater, request) DO NOTHING",
                (task, rater, request, message),
            )
            known = "SELECT sequence, task, message FROM page_turn WHERE rater = ? AND request = ?"
            sequence, *stored = db.execute(known, (rater, request)).fetchone()
            if stored != [task, message]:
                raise Conflict(f"request {request[:40]!r} was used before for another message; make a new id")
            before = "SELECT count(*) FROM page_turn WHERE task = ? AND rater = ? AND sequence < ?"
            return int(db.execute(before, (task, rater, sequence)).fetchone()[0])

    def reply(self, rater: str, request: str, reply: str) -> None:
        """Stores the model's reply to a message; the first reply stays.

        A lone surrogate, which SQLite cannot hold, becomes a question mark.

        Args:
            rater: who wrote the message.
            request: the id of the post that held the message.
            reply: the model's text.
        """
        reply = searchable(reply)
        with self.database.write("the reply") as db:
            db.execute(
                "UPDATE page_turn SET reply = ? WHERE rater = ? AND request = ? AND reply IS NULL",
                (reply, rater, request),
            )
