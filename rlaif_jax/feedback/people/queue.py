"""The queue of tasks for people: tasks, leases and posts, in the SQLite file of the judgements.

A task is leased to a rater for a while and is offered again when the lease ends. A rater's post carries a request id made
by the sender, so the same post sent twice counts once. The records of a post are written here, on disk, then into the
store, and only then is the post acknowledged; `deliver` completes a post that a crash cut short between the two.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from time import time as now
from typing import Any

from rlaif_jax.config import require
from rlaif_jax.feedback.people import chats, queue_tables, team
from rlaif_jax.feedback.people.chats import Conflict
from rlaif_jax.feedback.people.queue_rows import Act, Post, Progress, QueuedTask, TaskGroup
from rlaif_jax.feedback.people.queue_tables import LIVE, WANTED
from rlaif_jax.feedback.people.tasks import PersonTask, task_from_json, task_to_json
from rlaif_jax.feedback.records.forms import Judgement, canonical, to_json
from rlaif_jax.feedback.records.parsing import from_json
from rlaif_jax.feedback.records.sqlite import PATIENCE, Database, searchable, statements, transaction
from rlaif_jax.feedback.records.store import Store

ADJUDICATED = "adjudicated by "
"""Prefix of the rater's name in records that decide where other raters disagreed."""

_HANDLED = f"EXISTS (SELECT 1 FROM page_post WHERE task = t.id AND rater = :rater AND {LIVE})"
# A lease that ends much later than any could is of before the clock was set back.
_VALID = "expires > :now AND expires <= :now + 2 * :lease_s"
_FREE = f"t.answers + (SELECT count(*) FROM page_lease WHERE task = t.id AND rater <> :rater AND {_VALID}) < t.overlap"
_POST = "rater, act, task, payload, records, seconds, informed"  # the columns that `_parse_post` reads


def is_later(one: Judgement, two: Judgement) -> bool:
    """Returns whether `one` was made after `two`, which comes after it in the store."""
    return one.time is not None and two.time is not None and one.time > two.time


class TaskQueue(Database):
    """The tasks in the SQLite file `path`, which may be a Store's.

    One object per thread; any number of processes.

    Args:
        path: the file; created where absent.
        lease_s: seconds after which a task that a rater took and did not answer is offered to others.
        patience_s: seconds for which a change waits for another writer.

    Attributes:
        chats: the conversations about chat tasks.
        team: the raters and their requests to stop a run.
    """

    def __init__(self, path: Path, *, lease_s: float = 900.0, patience_s: float = PATIENCE) -> None:
        tables = queue_tables.TABLES + chats.TABLES + team.TABLES
        super().__init__(path, tables, "no tasks can be stored here", patience_s)
        self.lease_s, self.chats, self.team = lease_s, chats.Chats(self), team.Team(self)

    def _create(self, tables: str) -> None:
        with transaction(self._db):
            for statement in statements(tables):
                self._db.execute(statement)
            queue_tables.upgrade(self._db)
            for statement in statements(queue_tables.INDEXES):
                self._db.execute(statement)

    # ---- Asking

    def put(
        self,
        tasks: Iterable[PersonTask],
        *,
        overlap: int = 1,
        priority: float = 0.0,
        origin: str = "",
        until: float | None = None,
    ) -> int:
        """Adds tasks; returns the number of new ones.

        A known task is opened again and its overlap raised to `overlap`.

        Args:
            tasks: the questions.
            overlap: the number of raters who are to answer each task.
            priority: tasks of higher priority are offered first.
            origin: who asks, for the page.
            until: when the tasks close by themselves (Unix seconds) unless `keep` sets a later time: those of a run that
                was killed. None: never. A task that is open for good stays so.

        Raises:
            UserError: `overlap` is below 1.
        """
        require(overlap >= 1, f"overlap must be at least 1, not {overlap}")
        rows = [
            (task.id, canonical(task_to_json(task)), overlap, priority, searchable(origin), task.kind.name, until)
            for task in tasks
        ]
        with self.write(f"{len(rows)} tasks") as db:
            before = db.execute("SELECT count(*) FROM page_task").fetchone()[0]
            db.executemany(
                "INSERT INTO page_task (id, task, overlap, priority, origin, kind, until) VALUES (?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET overlap = max(overlap, excluded.overlap), priority = excluded.priority, "
                "is_open = 1, until = CASE WHEN is_open AND until IS NULL THEN NULL ELSE excluded.until END",
                rows,
            )
            return db.execute("SELECT count(*) FROM page_task").fetchone()[0] - before

    def keep(self, ids: Iterable[str], until: float) -> None:
        """Keeps tasks that were put with a time `until` open for longer.

        Args:
            ids: the ids of the tasks.
            until: the new time, Unix seconds.
        """
        with self.write() as db:
            db.executemany(
                "UPDATE page_task SET until = ?, is_open = 1 WHERE id = ? AND until IS NOT NULL",
                [(until, identifier) for identifier in ids],
            )

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
        query = f"SELECT rater FROM page_post WHERE task = ? AND {LIVE}"
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
        values = {"rater": rater, "now": at, "lease_s": self.lease_s}
        with self.write("the lease", is_durable=False) as db:
            db.execute(f"UPDATE page_task SET is_open = 0 WHERE until IS NOT NULL AND is_open AND until < {at!r}")
            found = self.row(
                f"SELECT t.id FROM page_lease l CROSS JOIN page_task t ON t.id = l.task WHERE l.rater = :rater AND {_VALID} "
                f"AND t.is_open AND t.answers < t.overlap AND NOT {_HANDLED} AND {_FREE} "
                "ORDER BY t.urgency, t.sequence LIMIT 1",
                values,
            ) or self._next(values)
            if found is None:
                return None
            db.execute(
                "INSERT INTO page_lease VALUES (:task, :rater, :now, :now + :lease_s) ON CONFLICT (task, rater) "
                f"DO UPDATE SET granted = CASE WHEN {_VALID} THEN granted ELSE :now END, expires = :now + :lease_s",
                values | {"task": found[0]},
            )
        return self.task(found[0])

    def _next(self, values: dict[str, Any]) -> tuple[str] | None:
        """Returns the id of the first task that is free for a rater.

        `page_place` keeps, for each rater, the place before which the rater has handled all tasks that are still wanted:
        without it a rater who is ahead of the others would go through all of them again for each task.
        """
        place = self.row("SELECT urgency, sequence FROM page_place WHERE rater = :rater", values)
        first, found = None, None
        start = place or (float("-inf"), 0)
        # The task itself is not read here: most of the rows may be passed over. Two queries, as SQLite uses the index of
        # (urgency, sequence) for the first part only of a comparison of both.
        query = (
            f"SELECT t.urgency, t.sequence, t.id, {_FREE} FROM page_task t WHERE t.is_open AND t.answers < t.overlap "
        )
        rest = f"AND NOT {_HANDLED} ORDER BY t.urgency, t.sequence"
        rows = itertools.chain.from_iterable(
            self.each(f"{query} AND {part} {rest}", values | {"urgency": start[0], "start": start[1]})
            for part in ("t.urgency = :urgency AND t.sequence >= :start", "t.urgency > :urgency")
        )
        for *here, identifier, is_free in rows:
            first = first or tuple(here)
            if is_free:
                found = (identifier,)
                break
        first = first or (float("inf"), 0)
        if first != place:
            query = "INSERT INTO page_place VALUES (?, ?, ?) ON CONFLICT (rater) DO UPDATE SET "
            query += "urgency = excluded.urgency, sequence = excluded.sequence"
            self._db.execute(query, (values["rater"], *first))
        return found

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
            with self.write(is_durable=False) as db:  # if it is lost, the records are added once more: no change
                db.execute("UPDATE page_post SET is_delivered = 1 WHERE sequence = ?", (sequence,))
        return len(rows)

    def last(self, rater: str) -> tuple[int, Post] | None:
        """Returns (number, post) of the rater's newest answer or skip that was not undone, or None."""
        row = self.row(
            f"SELECT sequence, {_POST} FROM page_post WHERE rater = ? AND {LIVE} ORDER BY sequence DESC LIMIT 1",
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
        wanted = self.row(f"SELECT count(*) FROM page_task WHERE {WANTED}")[0]
        found = []
        for rater in raters:
            values = {"rater": rater, "now": now(), "lease_s": self.lease_s}
            answered, skipped, seconds, handled = self.row(
                "SELECT answered, skipped, seconds, handled_wanted FROM page_count WHERE rater = :rater", values
            ) or (0, 0, 0.0, 0)
            in_hand = self.row(f"SELECT count(*) FROM page_lease WHERE rater = :rater AND {_VALID}", values)[0]
            found.append(Progress(rater, answered, skipped, wanted - handled, in_hand, seconds))
        return found

    def groups(self) -> list[TaskGroup]:
        """Returns the counts of open tasks of each kind and origin, in the order of their first task."""
        query = (
            "SELECT kind, origin, count(*), sum(min(answers, overlap)), sum(overlap) FROM page_task WHERE is_open = 1 "
            "GROUP BY kind, origin ORDER BY min(sequence)"
        )
        return [TaskGroup(*row) for row in self.rows(query)]

    def stuck(self, raters: Sequence[str]) -> int:
        """Returns the number of wanted tasks that each of these raters has answered or skipped already."""
        marks = ", ".join("?" * len(raters))
        query = (
            f"SELECT count(*) FROM page_task t WHERE is_open = 1 AND answers < overlap AND handled >= ? AND "
            f"(SELECT count(DISTINCT rater) FROM page_post WHERE task = t.id AND {LIVE} AND rater IN ({marks})) = ?"
        )
        return self.row(query, (len(raters), *raters, len(raters)))[0]

    def offered(self, tasks: Sequence[str], rater: str) -> frozenset[str]:
        """Returns those of the tasks (ids) that the rater may still answer."""
        query = (
            "SELECT t.id FROM json_each(:tasks) CROSS JOIN page_task t ON t.id = value "
            f"WHERE t.is_open AND t.answers < t.overlap AND NOT {_HANDLED}"
        )
        return frozenset(row[0] for row in self.rows(query, {"tasks": canonical(list(tasks)), "rater": rater}))

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

    def posts(self, acts: Sequence[Act] = ("answer", "adjudicate"), *, task: str | None = None) -> list[Post]:
        """Returns the posts of these acts that were not undone, oldest first; with `task`, those on this task."""
        marks = ", ".join("?" * len(acts))
        about, values = ("", acts) if task is None else ("AND task = ?", (*acts, task))
        rows = self.rows(
            f"SELECT {_POST} FROM page_post WHERE is_undone = 0 AND act IN ({marks}) {about} ORDER BY sequence", values
        )
        return [self._parse_post(row) for row in rows]

    def decided(self) -> list[str]:
        """Returns the ids of the adjudicated tasks."""
        return [row[0] for row in self.rows("SELECT DISTINCT task FROM page_post WHERE act = 'adjudicate'")]

    def last_number(self) -> int:
        """Returns the number of the newest post; 0 before the first."""
        return self.row("SELECT coalesce(max(sequence), 0) FROM page_post")[0]

    def touched(self, after: int) -> frozenset[str]:
        """Returns the ids of the tasks of the posts after the one with this number."""
        return frozenset(row[0] for row in self.rows("SELECT task FROM page_post WHERE sequence > ?", (after,)))

    def news(self, after: int, limit: int) -> list[tuple[int, str, bool, Post]]:
        """Returns (number, kind of the task, whether it was undone since, post) of the posts after a number.

        Args:
            after: the number of the last post that is known.
            limit: the largest number of posts to return.
        """
        query = (
            f"SELECT p.sequence, coalesce(t.kind, ''), p.is_undone, {', '.join(f'p.{c}' for c in _POST.split(', '))} "
            "FROM page_post p LEFT JOIN page_task t ON t.id = p.task WHERE p.sequence > ? ORDER BY p.sequence LIMIT ?"
        )
        rows = self.rows(query, (after, limit))
        return [(row[0], row[1], bool(row[2]), self._parse_post(row[3:])) for row in rows]


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()
