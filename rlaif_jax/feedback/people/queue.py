"""The queue of tasks for people: tasks, leases and posts, in the SQLite file of the judgements.

A task is leased to a rater for a while and is offered again when the lease ends. A rater's post carries a request id made
by the sender, so the same post sent twice counts once. The records of a post are written here, on disk, then into the
store, and only then is the post acknowledged; `deliver` completes a post that a crash cut short between the two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from time import time as now
from typing import Any, Literal, NamedTuple

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.people import chats, team
from rlaif_jax.feedback.people.tasks import PersonTask, task_from_json, task_to_json
from rlaif_jax.feedback.records.forms import Judgement, canonical, to_json
from rlaif_jax.feedback.records.parsing import from_json
from rlaif_jax.feedback.records.sqlite import Database
from rlaif_jax.feedback.records.store import Store

Act = Literal["answer", "skip", "undo", "adjudicate"]
ADJUDICATED = "adjudicated by "
"""Prefix of the rater's name in records that decide where other raters disagreed."""

_TABLES = """
CREATE TABLE IF NOT EXISTS page_task (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, task TEXT NOT NULL, overlap INTEGER NOT NULL,
    priority REAL NOT NULL, origin TEXT NOT NULL, is_open INTEGER NOT NULL DEFAULT 1);
CREATE TABLE IF NOT EXISTS page_lease (
    task TEXT NOT NULL, rater TEXT NOT NULL, granted REAL NOT NULL, expires REAL NOT NULL, PRIMARY KEY (task, rater));
CREATE TABLE IF NOT EXISTS page_post (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, rater TEXT NOT NULL, request TEXT NOT NULL, body TEXT NOT NULL,
    act TEXT NOT NULL, task TEXT NOT NULL, payload TEXT NOT NULL, records TEXT NOT NULL, seconds REAL NOT NULL,
    time REAL NOT NULL, informed INTEGER NOT NULL, is_undone INTEGER NOT NULL DEFAULT 0,
    is_delivered INTEGER NOT NULL DEFAULT 0, UNIQUE (rater, request));
CREATE INDEX IF NOT EXISTS page_post_task ON page_post (task, rater);
CREATE INDEX IF NOT EXISTS page_post_waiting ON page_post (sequence) WHERE is_delivered = 0;
"""

# Subqueries about one task `t`: how many raters have answered it; whether :rater has handled it; how many others hold it.
_ANSWERS = "SELECT count(DISTINCT rater) FROM page_post p WHERE p.task = t.id AND p.act = 'answer' AND p.is_undone = 0"
_HANDLED = (
    "SELECT 1 FROM page_post p "
    "WHERE p.task = t.id AND p.rater = :rater AND p.act IN ('answer', 'skip') AND p.is_undone = 0"
)
_LEASES = "SELECT count(*) FROM page_lease l WHERE l.task = t.id AND l.rater <> :rater AND l.expires > :now"
_POST = "rater, act, task, payload, records, seconds, informed"  # the columns that `_parse_post` reads


class Post(NamedTuple):
    """An action of a rater.

    Attributes:
        rater: the rater's name.
        act: what the rater did.
        task: the id of the task.
        payload: the answer as the rater sent it.
        records: the judgements made from the payload.
        seconds: the time that the rater spent.
        informed: whether the rater had seen the AI's suggestion before.
    """

    rater: str
    act: Act
    task: str
    payload: dict[str, Any]
    records: tuple[Judgement, ...]
    seconds: float
    informed: bool


class Progress(NamedTuple):
    """The state of a rater's work.

    Attributes:
        rater: the rater's name.
        answered: number of tasks answered.
        skipped: number of tasks skipped.
        left: number of open tasks that this rater could still answer.
        in_hand: number of tasks leased to this rater.
        seconds: the time spent on all tasks.
    """

    rater: str
    answered: int
    skipped: int
    left: int
    in_hand: int
    seconds: float


class QueuedTask(NamedTuple):
    """A task in the queue.

    Attributes:
        task: the question.
        overlap: the number of raters who are to answer it.
        answered: the raters who answered it.
        skipped: the raters who skipped it.
        origin: who asks, as given to `put`.
    """

    task: PersonTask
    overlap: int
    answered: tuple[str, ...]
    skipped: tuple[str, ...]
    origin: str


class Conflict(UserError):
    """A post that contradicts an earlier one."""


class TaskQueue(Database):
    """The tasks in the SQLite file `path`, which may be a Store's.

    One object per thread; any number of processes.

    Args:
        path: the file; created where absent.
        lease_s: seconds after which a task that a rater took and did not answer is offered to others.

    Attributes:
        chats: the conversations about chat tasks.
        team: the raters and their requests to stop a run.
    """

    def __init__(self, path: Path, *, lease_s: float = 900.0) -> None:
        tables = (_TABLES + chats.TABLES + team.TABLES).strip().removesuffix(";")
        super().__init__(path, tables, "no tasks can be stored here")
        self.lease_s, self.chats, self.team = lease_s, chats.Chats(self), team.Team(self)

    # ---- Asking

    def put(self, tasks: Iterable[PersonTask], *, overlap: int = 1, priority: float = 0.0, origin: str = "") -> int:
        """Adds tasks; returns the number of new ones.

        A known task is opened again and its overlap raised to `overlap`.

        Args:
            tasks: the questions.
            overlap: the number of raters who are to answer each task.
            priority: tasks of higher priority are offered first.
            origin: who asks, for the page.

        Raises:
            UserError: `overlap` is below 1.
        """
        require(overlap >= 1, f"overlap must be at least 1, not {overlap}")
        rows = [(task.id, canonical(task_to_json(task)), overlap, priority, origin) for task in tasks]
        with self.write() as db:
            before = db.execute("SELECT count(*) FROM page_task").fetchone()[0]
            db.executemany(
                "INSERT INTO page_task (id, task, overlap, priority, origin) VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) "
                "DO UPDATE SET overlap = max(overlap, excluded.overlap), priority = excluded.priority, is_open = 1",
                rows,
            )
            return db.execute("SELECT count(*) FROM page_task").fetchone()[0] - before

    def withdraw(self, ids: Iterable[str], *, origin: str | None = None) -> None:
        """Closes tasks, so that they are no longer offered; their answers stay.

        Args:
            ids: the ids of the tasks.
            origin: close only the tasks that this origin was the first to put; None closes all.
        """
        with self.write() as db:
            db.executemany(
                "UPDATE page_task SET is_open = 0 WHERE id = ? AND origin = coalesce(?, origin)",
                [(identifier, origin) for identifier in ids],
            )

    def handled(self, task: str) -> frozenset[str]:
        """Returns the raters who have answered or skipped the task with this id."""
        query = "SELECT rater FROM page_post WHERE task = ? AND act IN ('answer', 'skip') AND is_undone = 0"
        return frozenset(row[0] for row in self.rows(query, (task,)))

    def task(self, identifier: str) -> PersonTask:
        """Returns the task with this id. Raises UserError where the queue has no such task."""
        row = self.row("SELECT task FROM page_task WHERE id = ?", (identifier,))
        require(row is not None, f"there is no task {str(identifier)[:64]!r}")
        return self._parse_task(identifier, row[0])

    def _parse_task(self, identifier: str, text: str) -> PersonTask:
        return task_from_json(json.loads(text), f"{self.path}: task {identifier[:12]}", surrogates=True)

    # ---- Answering

    def lease(self, rater: str, *, at: float | None = None) -> PersonTask | None:
        """Leases the rater's next task, first one that the rater holds; None where nothing is open.

        Args:
            rater: who asks for a task.
            at: the time in Unix seconds; None: the clock's.
        """
        at = now() if at is None else at
        with self.write() as db:
            row = self.row(
                "SELECT t.id, t.task FROM page_task t "
                "LEFT JOIN page_lease mine ON mine.task = t.id AND mine.rater = :rater AND mine.expires > :now "
                f"WHERE t.is_open AND NOT EXISTS ({_HANDLED}) AND ({_ANSWERS}) + ({_LEASES}) < t.overlap "
                "ORDER BY mine.rater IS NULL, t.priority DESC, t.sequence LIMIT 1",
                {"rater": rater, "now": at},
            )
            if row is None:
                return None
            db.execute(
                "INSERT INTO page_lease VALUES (:task, :rater, :now, :until) ON CONFLICT (task, rater) DO UPDATE SET "
                "granted = CASE WHEN expires > :now THEN granted ELSE :now END, expires = :until",
                {"task": row[0], "rater": rater, "now": at, "until": at + self.lease_s},
            )
        return self._parse_task(*row)

    def held_since(self, task: str, rater: str) -> float | None:
        """Returns when the rater took the task (Unix seconds); None where the rater does not hold it."""
        row = self.row("SELECT granted FROM page_lease WHERE task = ? AND rater = ?", (task, rater))
        return None if row is None else row[0]

    def posted(self, rater: str, request: str, body: str) -> Post | None:
        """Returns the rater's earlier post with this request id, or None.

        Raises Conflict where the earlier post had another body.
        """
        row = self.row(f"SELECT body, {_POST} FROM page_post WHERE rater = ? AND request = ?", (rater, request))
        if row is None:
            return None
        if row[0] != _digest(body):
            raise Conflict(f"request {request[:40]!r} was used before for something else; make a new id for a new post")
        return self._parse_post(row[1:])

    def post(self, post: Post, request: str, body: str, store: Store, *, undoes: int | None = None) -> None:
        """Stores a post here, then its records in the store; both are on disk when this returns.

        Args:
            post: the rater's action.
            request: the id that the sender made for it.
            body: what the sender sent, by which a repeated request is recognised.
            store: where the records go.
            undoes: the number of the post that this one takes back.

        Raises:
            Conflict: the rater has answered or skipped this task already.
        """
        with self.write() as db:
            if post.act in ("answer", "skip") and post.rater in self.handled(post.task):
                raise Conflict("this task has your answer already; undo it first")
            records = canonical([to_json(record) for record in post.records])
            payload = canonical(post.payload)
            db.execute(
                f"INSERT INTO page_post (request, body, time, {_POST}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (request, _digest(body), now(), *post[:3], payload, records, post.seconds, post.informed),
            )
            if undoes is not None:
                db.execute("UPDATE page_post SET is_undone = 1 WHERE sequence = ?", (undoes,))
            if post.act == "undo":  # the rater holds the task again
                db.execute(
                    "INSERT OR REPLACE INTO page_lease VALUES (?, ?, ?, ?)",
                    (post.task, post.rater, now(), now() + self.lease_s),
                )
            elif post.act in ("answer", "skip"):
                db.execute("DELETE FROM page_lease WHERE task = ? AND rater = ?", (post.task, post.rater))
        self.deliver(store)

    def deliver(self, store: Store) -> int:
        """Adds the records of undelivered posts to the store; returns the number of posts.

        Call it when a page starts.

        After a crash the store may have the records already: adding them again changes nothing.
        """
        rows = self.rows("SELECT sequence, records FROM page_post WHERE is_delivered = 0 ORDER BY sequence")
        for sequence, records in rows:
            store.add(from_json(record, f"{self.path}: post {sequence}") for record in json.loads(records))
            with self.write() as db:
                db.execute("UPDATE page_post SET is_delivered = 1 WHERE sequence = ?", (sequence,))
        return len(rows)

    def last(self, rater: str) -> tuple[int, Post] | None:
        """Returns (number, post) of the rater's newest answer or skip that was not undone, or None."""
        row = self.row(
            f"SELECT sequence, {_POST} FROM page_post "
            "WHERE rater = ? AND is_undone = 0 AND act IN ('answer', 'skip') ORDER BY sequence DESC LIMIT 1",
            (rater,),
        )
        return None if row is None else (row[0], self._parse_post(row[1:]))

    def undone(self, rater: str, task: str) -> Post | None:
        """Returns the rater's newest answer to the task that was undone, or None."""
        row = self.row(
            f"SELECT {_POST} FROM page_post WHERE rater = ? AND task = ? AND is_undone = 1 ORDER BY sequence DESC LIMIT 1",
            (rater, task),
        )
        return None if row is None else self._parse_post(row)

    def has_answered(self, rater: str, task: str) -> bool:
        """Returns whether the rater has ever answered the task, undone or not."""
        query = "SELECT 1 FROM page_post WHERE rater = ? AND task = ? AND act = 'answer' LIMIT 1"
        return self.row(query, (rater, task)) is not None

    def _parse_post(self, row: Sequence[Any]) -> Post:
        rater, act, task, payload, records, seconds, informed = row
        parsed = tuple(from_json(record, f"{self.path}: post of {rater}") for record in json.loads(records))
        return Post(rater, act, task, json.loads(payload), parsed, seconds, bool(informed))

    # ---- Reading

    def progress(self, raters: Sequence[str]) -> list[Progress]:
        """Returns the progress of each rater."""
        found = []
        for rater in raters:
            values = {"rater": rater, "now": now()}
            acts = dict(
                self.rows(
                    "SELECT act, count(*) FROM page_post WHERE rater = :rater AND is_undone = 0 GROUP BY act", values
                )
            )
            left, in_hand, seconds = self.row(
                "SELECT (SELECT count(*) FROM page_task t "
                f"WHERE t.is_open AND NOT EXISTS ({_HANDLED}) AND ({_ANSWERS}) < t.overlap), "
                "(SELECT count(*) FROM page_lease WHERE rater = :rater AND expires > :now), "
                "(SELECT coalesce(sum(seconds), 0) FROM page_post WHERE rater = :rater)",
                values,
            )
            found.append(Progress(rater, acts.get("answer", 0), acts.get("skip", 0), left, in_hand, seconds))
        return found

    def tasks(self, *, only_open: bool = True) -> list[QueuedTask]:
        """Returns the open tasks in their order, each with the raters who answered or skipped it.

        With `only_open` false, closed tasks are included.
        """
        by_task: dict[str, dict[str, list[str]]] = {}
        for task, act, rater in self.rows(
            "SELECT DISTINCT task, act, rater FROM page_post WHERE is_undone = 0 AND act IN ('answer', 'skip') "
            "ORDER BY sequence"
        ):
            by_task.setdefault(task, {}).setdefault(act, []).append(rater)
        query = (
            f"SELECT id, task, overlap, origin FROM page_task {'WHERE is_open' if only_open else ''} ORDER BY sequence"
        )
        found = []
        for identifier, task, overlap, origin in self.rows(query):
            acts = by_task.get(identifier, {})
            answered, skipped = tuple(acts.get("answer", ())), tuple(acts.get("skip", ()))
            found.append(QueuedTask(self._parse_task(identifier, task), overlap, answered, skipped, origin))
        return found

    def posts(self, acts: Sequence[Act] = ("answer", "adjudicate")) -> list[Post]:
        """Returns the posts of these acts that were not undone, oldest first."""
        marks = ", ".join("?" * len(acts))
        rows = self.rows(
            f"SELECT {_POST} FROM page_post WHERE is_undone = 0 AND act IN ({marks}) ORDER BY sequence", acts
        )
        return [self._parse_post(row) for row in rows]


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()
