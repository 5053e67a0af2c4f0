"""Who has which task in hand and who has done it; kept beside the judgements in the same SQLite file.

A task is leased to a rater for a while and comes back when the lease runs out. A rater's post carries a request id made
by the sender: the same post twice is one. The records of a post are written here, on disk, then into the store, and only
then is the post acknowledged; `deliver` finishes what a crash cut short between the two.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import time as now
from types import TracebackType
from typing import Any, Literal, NamedTuple

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.people.tasks import Task, task_from_json, task_to_json
from rlaif_jax.feedback.records.forms import Judgement, canonical, from_json, to_json
from rlaif_jax.feedback.records.sqlite import connect, transaction
from rlaif_jax.feedback.records.store import Store

Act = Literal["answer", "skip", "undo", "adjudicate"]
ADJUDICATED = "adjudicated by "
"""How the names of raters begin that decided where others disagreed."""

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
CREATE TABLE IF NOT EXISTS page_turn (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, task TEXT NOT NULL, rater TEXT NOT NULL, request TEXT NOT NULL,
    message TEXT NOT NULL, reply TEXT, UNIQUE (rater, request));
CREATE TABLE IF NOT EXISTS page_passed (rater TEXT NOT NULL, questions TEXT NOT NULL, PRIMARY KEY (rater, questions));
CREATE TABLE IF NOT EXISTS page_stop (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, rater TEXT NOT NULL, stop INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS page_rater (name TEXT PRIMARY KEY)
"""

# Of one task: the posts that count.
_DONE = "SELECT count(DISTINCT rater) FROM page_post p WHERE p.task = t.id AND p.act = 'answer' AND p.is_undone = 0"
_MINE = "SELECT 1 FROM page_post p WHERE p.task = t.id AND p.rater = :rater AND p.act IN ('answer', 'skip') AND p.is_undone = 0"
_HELD = "SELECT count(*) FROM page_lease l WHERE l.task = t.id AND l.rater <> :rater AND l.expires > :now"


class Post(NamedTuple):
    """What a rater sent. payload: as it came. records: what was made of it. seconds: time spent. informed: sent after
    the AI's suggestion had been seen."""

    rater: str
    act: Act
    task: str
    payload: dict[str, Any]
    records: tuple[Judgement, ...]
    seconds: float
    informed: bool


class Turn(NamedTuple):
    """One exchange of a chat; reply is None while the model is thinking, or was when the page died."""

    message: str
    reply: str | None


class Progress(NamedTuple):
    """A rater's tasks. left: those that still need this rater or another one. seconds: time spent in all."""

    rater: str
    answered: int
    skipped: int
    left: int
    in_hand: int
    seconds: float


class Waiting(NamedTuple):
    """An open task and where it stands."""

    task: Task
    overlap: int
    answered: tuple[str, ...]
    skipped: tuple[str, ...]
    origin: str


class Conflict(UserError):
    """A post that contradicts an earlier one."""


class TaskQueue:
    """The tasks in the SQLite file `path`, which may be a Store's. One object a thread; any number of processes.

    lease_s: seconds after which a task that a rater took and did not answer is offered to others.
    """

    def __init__(self, path: Path, *, lease_s: float = 900.0) -> None:
        self.path, self.lease_s = Path(path), lease_s
        try:
            self._db = connect(self.path)
            with self._write():
                for statement in _TABLES.split(";"):
                    self._db.execute(statement)
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"{path}: no tasks can be kept here ({error})") from error

    def __enter__(self) -> TaskQueue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    @contextmanager
    def _write(self) -> Iterator[None]:
        """A transaction; what SQLite says against it as a UserError."""
        try:
            with transaction(self._db):
                yield
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: this could not be kept ({error}); nothing was") from error

    def _rows(self, query: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: the tasks cannot be read ({error})") from error

    def _row(self, query: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> Any:
        """The first row; None if there is none."""
        return next(iter(self._rows(query, values)), None)

    # ---- Asking

    def put(self, tasks: Iterable[Task], *, overlap: int = 1, priority: float = 0.0, origin: str = "") -> int:
        """Ask; the number of tasks that were not there yet. A known one is opened again and its overlap raised to
        `overlap`, the number of raters who are to answer. Higher priorities come first. origin: who asks, for the page."""
        require(overlap >= 1, f"overlap must be at least 1, not {overlap}")
        rows = [(task.id, canonical(task_to_json(task)), overlap, priority, origin) for task in tasks]
        with self._write():
            before = self._db.execute("SELECT count(*) FROM page_task").fetchone()[0]
            self._db.executemany(
                "INSERT INTO page_task (id, task, overlap, priority, origin) VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) "
                "DO UPDATE SET overlap = max(overlap, excluded.overlap), priority = excluded.priority, is_open = 1",
                rows,
            )
            return self._db.execute("SELECT count(*) FROM page_task").fetchone()[0] - before

    def withdraw(self, ids: Iterable[str], *, origin: str | None = None) -> None:
        """Offer these tasks no longer, of an `origin` only those that it was the first to put; what was answered stays."""
        with self._write():
            self._db.executemany(
                "UPDATE page_task SET is_open = 0 WHERE id = ? AND origin = coalesce(?, origin)",
                [(identifier, origin) for identifier in ids],
            )

    def register(self, raters: Iterable[str]) -> None:
        """Name those who answer from now on, in place of those named before."""
        with self._write():
            self._db.execute("DELETE FROM page_rater")
            self._db.executemany("INSERT OR IGNORE INTO page_rater VALUES (?)", [(name,) for name in raters])

    @property
    def raters(self) -> frozenset[str]:
        """Those who answer, as the page named them when it was last started; empty if none ever was."""
        return frozenset(row[0] for row in self._rows("SELECT name FROM page_rater"))

    def handled(self, task: str) -> frozenset[str]:
        """The raters who have answered or skipped the task."""
        query = "SELECT rater FROM page_post WHERE task = ? AND act IN ('answer', 'skip') AND is_undone = 0"
        return frozenset(row[0] for row in self._rows(query, (task,)))

    def task(self, identifier: str) -> Task:
        """The task of that id; UserError if there is none."""
        row = self._row("SELECT task FROM page_task WHERE id = ?", (identifier,))
        require(row is not None, f"there is no task {str(identifier)[:64]!r}")
        return self._task(identifier, row[0])

    def _task(self, identifier: str, text: str) -> Task:
        return task_from_json(json.loads(text), f"{self.path}: task {identifier[:12]}", surrogates=True)

    # ---- Answering

    def lease(self, rater: str, *, at: float | None = None) -> Task | None:
        """The rater's next task, its own unexpired one first; None when there is nothing to do for now."""
        at = now() if at is None else at
        with self._write():
            row = self._row(
                "SELECT t.id, t.task FROM page_task t LEFT JOIN page_lease mine ON mine.task = t.id AND mine.rater = :rater "
                f"AND mine.expires > :now WHERE t.is_open AND NOT EXISTS ({_MINE}) AND ({_DONE}) + ({_HELD}) < t.overlap "
                "ORDER BY mine.rater IS NULL, t.priority DESC, t.sequence LIMIT 1",
                {"rater": rater, "now": at},
            )
            if row is None:
                return None
            self._db.execute(
                "INSERT INTO page_lease VALUES (:task, :rater, :now, :until) ON CONFLICT (task, rater) DO UPDATE SET "
                "granted = CASE WHEN expires > :now THEN granted ELSE :now END, expires = :until",
                {"task": row[0], "rater": rater, "now": at, "until": at + self.lease_s},
            )
        return self._task(*row)

    def held_since(self, task: str, rater: str) -> float | None:
        """When the rater took the task (Unix seconds); None if it is not in the rater's hands."""
        row = self._row("SELECT granted FROM page_lease WHERE task = ? AND rater = ?", (task, rater))
        return None if row is None else row[0]

    def posted(self, rater: str, request: str, body: str) -> Post | None:
        """The rater's post of that request id, if it came before. Conflict if it said something else then."""
        row = self._row(
            "SELECT body, rater, act, task, payload, records, seconds, informed FROM page_post WHERE rater = ? AND request = ?",
            (rater, request),
        )
        if row is None:
            return None
        if row[0] != hashlib.sha256(body.encode()).hexdigest():
            raise Conflict(f"request {request[:40]!r} was used before for something else; make a new id for a new post")
        return self._post(row[1:])

    def post(self, post: Post, request: str, body: str, store: Store, *, undoes: int | None = None) -> None:
        """Keep what a rater sent: here, then its records in the store; on disk in both when this returns.

        Conflict when the rater has answered this task already (and the post undoes nothing).
        """
        with self._write():
            if post.act in ("answer", "skip"):
                again = self._row(
                    "SELECT 1 FROM page_post WHERE task = ? AND rater = ? AND act IN ('answer', 'skip') AND is_undone = 0",
                    (post.task, post.rater),
                )
                if again:
                    raise Conflict("this task has your answer already; undo it first")
            records = canonical([to_json(record) for record in post.records])
            digest, payload = hashlib.sha256(body.encode()).hexdigest(), canonical(post.payload)
            self._db.execute(
                "INSERT INTO page_post (rater, request, body, act, task, payload, records, seconds, informed, time) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    post.rater,
                    request,
                    digest,
                    post.act,
                    post.task,
                    payload,
                    records,
                    post.seconds,
                    post.informed,
                    now(),
                ),
            )
            if undoes is not None:
                self._db.execute("UPDATE page_post SET is_undone = 1 WHERE sequence = ?", (undoes,))
            if post.act == "undo":  # comes back to the same hands
                self._db.execute(
                    "INSERT OR REPLACE INTO page_lease VALUES (?, ?, ?, ?)",
                    (post.task, post.rater, now(), now() + self.lease_s),
                )
            elif post.act in ("answer", "skip"):
                self._db.execute("DELETE FROM page_lease WHERE task = ? AND rater = ?", (post.task, post.rater))
        self.deliver(store)

    def deliver(self, store: Store) -> int:
        """Records of posts that the store has not been given for sure, once more; the number of posts. Call at start."""
        rows = self._rows("SELECT sequence, records FROM page_post WHERE is_delivered = 0 ORDER BY sequence")
        for sequence, records in rows:
            store.add(from_json(record, f"{self.path}: post {sequence}") for record in json.loads(records))
            with self._write():
                self._db.execute("UPDATE page_post SET is_delivered = 1 WHERE sequence = ?", (sequence,))
        return len(rows)

    def last(self, rater: str, acts: Sequence[Act] = ("answer", "skip")) -> tuple[int, Post] | None:
        """The rater's newest post that stands, with its number; None if there is none."""
        marks = ", ".join("?" * len(acts))
        row = self._row(
            "SELECT sequence, rater, act, task, payload, records, seconds, informed FROM page_post "
            f"WHERE rater = ? AND is_undone = 0 AND act IN ({marks}) ORDER BY sequence DESC LIMIT 1",
            (rater, *acts),
        )
        return None if row is None else (row[0], self._post(row[1:]))

    def undone(self, rater: str, task: str) -> Post | None:
        """The rater's newest answer to the task that was taken back."""
        row = self._row(
            "SELECT rater, act, task, payload, records, seconds, informed FROM page_post WHERE rater = ? AND task = ? "
            "AND is_undone = 1 ORDER BY sequence DESC LIMIT 1",
            (rater, task),
        )
        return None if row is None else self._post(row)

    def has_answered(self, rater: str, task: str) -> bool:
        """Whether the rater has ever answered the task, taken back or not."""
        query = "SELECT 1 FROM page_post WHERE rater = ? AND task = ? AND act = 'answer' LIMIT 1"
        return self._row(query, (rater, task)) is not None

    def _post(self, row: Sequence[Any]) -> Post:
        rater, act, task, payload, records, seconds, informed = row
        made = tuple(from_json(record, f"{self.path}: post of {rater}") for record in json.loads(records))
        return Post(rater, act, task, json.loads(payload), made, seconds, bool(informed))

    # ---- Where things stand

    def progress(self, raters: Sequence[str], *, at: float | None = None) -> list[Progress]:
        """One row a rater."""
        at, found = now() if at is None else at, []
        for rater in raters:
            values = {"rater": rater, "now": at}
            counted = dict(
                self._rows(
                    "SELECT act, count(*) FROM page_post WHERE rater = :rater AND is_undone = 0 GROUP BY act", values
                )
            )
            left = self._row(
                f"SELECT count(*) FROM page_task t WHERE t.is_open AND NOT EXISTS ({_MINE}) AND ({_DONE}) < t.overlap",
                values,
            )[0]
            in_hand, seconds = self._row(
                "SELECT (SELECT count(*) FROM page_lease WHERE rater = :rater AND expires > :now), "
                "(SELECT coalesce(sum(seconds), 0) FROM page_post WHERE rater = :rater)",
                values,
            )
            found.append(Progress(rater, counted.get("answer", 0), counted.get("skip", 0), left, in_hand, seconds))
        return found

    def tasks(self, *, only_open: bool = True) -> list[Waiting]:
        """The tasks in their order, and who has answered or skipped each."""
        by_task: dict[str, dict[str, list[str]]] = {}
        for task, act, rater in self._rows(
            "SELECT DISTINCT task, act, rater FROM page_post WHERE is_undone = 0 AND act IN ('answer', 'skip') "
            "ORDER BY sequence"
        ):
            by_task.setdefault(task, {}).setdefault(act, []).append(rater)
        query = (
            f"SELECT id, task, overlap, origin FROM page_task {'WHERE is_open' if only_open else ''} ORDER BY sequence"
        )
        found = []
        for identifier, task, overlap, origin in self._rows(query):
            acts = by_task.get(identifier, {})
            done, skipped = tuple(acts.get("answer", ())), tuple(acts.get("skip", ()))
            found.append(Waiting(self._task(identifier, task), overlap, done, skipped, origin))
        return found

    def posts(self, task: str | None = None, acts: Sequence[Act] = ("answer", "adjudicate")) -> list[Post]:
        """The posts that stand, of one task or of all, oldest first."""
        marks = ", ".join("?" * len(acts))
        rows = self._rows(
            "SELECT rater, act, task, payload, records, seconds, informed FROM page_post "
            f"WHERE is_undone = 0 AND act IN ({marks}) AND (? IS NULL OR task = ?) ORDER BY sequence",
            (*acts, task, task),
        )
        return [self._post(row) for row in rows]

    def answered(self, ids: Sequence[str]) -> int:
        """How many answers to these tasks are in, none counted beyond a task's overlap."""
        total = 0
        for identifier in ids:
            query = f"SELECT min(t.overlap, ({_DONE})) FROM page_task t WHERE t.id = ?"
            row = self._row(query, (identifier,))
            total += row[0] if row else 0
        return total

    # ---- Chats, the check, the stop

    def turns(self, task: str, rater: str) -> list[Turn]:
        """The rater's conversation, oldest first."""
        rows = self._rows(
            "SELECT message, reply FROM page_turn WHERE task = ? AND rater = ? ORDER BY sequence", (task, rater)
        )
        return [Turn(*row) for row in rows]

    def say(self, task: str, rater: str, request: str, message: str) -> None:
        """Keep what the rater says to the model; the same request twice is one."""
        with self._write():
            self._db.execute(
                "INSERT OR IGNORE INTO page_turn (task, rater, request, message) VALUES (?, ?, ?, ?)",
                (task, rater, request, message),
            )

    def reply(self, rater: str, request: str, reply: str) -> None:
        """Keep what the model answered; the first reply stays. Half a character (a lone surrogate), which SQLite cannot
        hold, becomes a question mark."""
        reply = reply.encode(errors="replace").decode()
        with self._write():
            self._db.execute(
                "UPDATE page_turn SET reply = ? WHERE rater = ? AND request = ? AND reply IS NULL",
                (reply, rater, request),
            )

    def passed(self, rater: str, questions: str) -> bool:
        """Whether the rater has passed the check whose hash is `questions`."""
        query = "SELECT 1 FROM page_passed WHERE rater = ? AND questions = ?"
        return self._row(query, (rater, questions)) is not None

    def passes(self, rater: str, questions: str) -> None:
        """The rater has passed the check."""
        with self._write():
            self._db.execute("INSERT OR IGNORE INTO page_passed VALUES (?, ?)", (rater, questions))

    def stop(self, rater: str, stop: bool = True) -> None:
        """ "Good enough, stop" (or: go on)."""
        with self._write():
            self._db.execute("INSERT INTO page_stop (time, rater, stop) VALUES (?, ?, ?)", (now(), rater, stop))

    @property
    def stops(self) -> int:
        """The number of the newest press of stop or go on; 0 if there was none."""
        return self._row("SELECT coalesce(max(sequence), 0) FROM page_stop")[0]

    def stop_requested(self, after: int = 0) -> bool:
        """Whether the newest press behind the number `after` says stop."""
        found = self._row("SELECT stop FROM page_stop WHERE sequence > ? ORDER BY sequence DESC LIMIT 1", (after,))
        return found is not None and bool(found[0])
