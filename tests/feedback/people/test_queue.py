"""The queue of tasks: who gets what, nothing twice, nothing lost."""

import sqlite3
import tempfile
import unittest.mock
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlaif_jax.config import UserError
from rlaif_jax.feedback.people.kinds import RATE
from rlaif_jax.feedback.people.queue import Conflict, Post, TaskQueue
from rlaif_jax.feedback.people.tasks import PersonTask
from rlaif_jax.feedback.records.forms import Rater, Rating
from rlaif_jax.feedback.records.store import Store


def task(n=0, **more):
    return PersonTask(kind=RATE, prompt=f"p{n}", answers=(f"a{n}",), **more)


def rating(task, rater="anna", value=3.0, time=1.0):
    return Rating(
        prompt=task.prompt, answers=task.answers, rater=Rater(rater, "person"), value=value, high=5.0, time=time
    )


def answer(asked, rater="anna", **more):
    return Post(rater, "answer", asked.id, {"value": 3}, (rating(asked, rater, **more),), 2.0, False)


@pytest.fixture
def files(tmp_path):
    with Store(tmp_path / "f.sqlite") as store, TaskQueue(tmp_path / "f.sqlite", lease_s=100) as queue:
        yield store, queue


def test_a_task_goes_to_as_many_raters_as_wanted_and_to_none_twice(files):
    store, queue = files
    assert queue.put([task(0), task(1)], overlap=2) == 2
    assert queue.put([task(0)], overlap=1) == 0
    first = queue.lease("anna", at=0)
    assert first == queue.lease("anna", at=1) == queue.lease("ben", at=2) == task(0)
    assert queue.lease("eve", at=3) == task(1)  # two have the first in hand
    queue.post(answer(task(0)), "r1", "body", store)
    assert queue.lease("anna", at=4) == task(1)
    assert queue.lease("finn", at=5) is None
    assert queue.lease("finn", at=102.5) == task(0)  # ben's lease is over, anna's answer stays


def test_priority_first_and_what_is_withdrawn_last_never(files):
    _, queue = files
    queue.put([task(0)])
    queue.put([task(1)], priority=1.0)
    assert queue.lease("anna") == task(1)
    queue.withdraw([task(0).id, task(1).id])
    assert queue.lease("ben") is None and queue.lease("anna") is None
    queue.put([task(0)])
    assert queue.lease("ben") == task(0)


def test_the_same_post_twice_is_one_and_another_with_its_id_is_refused(files):
    store, queue = files
    queue.put([task(0)])
    queue.post(answer(task(0)), "r1", "body", store)
    again = queue.posted("anna", "r1", "body")
    assert again is not None and again.records == answer(task(0)).records
    with pytest.raises(Conflict, match="used before for something else"):
        queue.posted("anna", "r1", "other")
    assert queue.posted("ben", "r1", "other") is None  # ids are a rater's own
    with pytest.raises(Conflict, match="has your answer already"):
        queue.post(answer(task(0), value=4.0), "r2", "body 2", store)
    assert len(store) == 1


def test_a_crash_between_queue_and_store_loses_nothing(files, monkeypatch):
    store, queue = files
    queue.put([task(0)])
    with monkeypatch.context() as broken:
        broken.setattr(store, "add", lambda records: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            queue.post(answer(task(0)), "r1", "body", store)
    assert len(store) == 0
    assert queue.deliver(store) == 1 and len(store) == 1
    queue._db.execute("UPDATE page_post SET is_delivered = 0")  # killed after the store had it
    assert queue.deliver(store) == 1 and len(store) == 1
    assert queue.deliver(store) == 0


def test_undo_gives_the_task_back_to_the_same_hands(files):
    store, queue = files
    queue.put([task(0), task(1)])
    queue.post(answer(task(0)), "r1", "b", store)
    assert queue.lease("anna") == task(1)
    sequence, last = queue.last("anna")
    queue.post(Post("anna", "undo", last.task, {}, (), 0.0, False), "r2", "b2", store, undoes=sequence)
    assert queue.last("anna") is None
    assert queue.undone("anna", task(0).id).payload == {"value": 3}
    assert queue.lease("ben") is None  # anna holds both
    queue.post(answer(task(0), value=4.0), "r3", "b3", store)
    assert [queued.answered for queued in queue.tasks()] == [("anna",), ()]


def test_a_skip_passes_the_task_on(files):
    store, queue = files
    queue.put([task(0)])
    queue.post(Post("anna", "skip", task(0).id, {"skip": "?"}, (), 1.0, False), "r1", "b", store)
    assert queue.lease("anna") is None and queue.lease("ben") == task(0)
    anna, ben = queue.progress(["anna", "ben"])
    assert (anna.skipped, anna.left, ben.left, ben.in_hand) == (1, 0, 1, 1)


def test_half_a_character_that_a_run_asks_about_is_asked(files):
    _, queue = files
    asked = PersonTask(kind=RATE, prompt="p", answers=("\ud83d",))
    queue.put([asked])
    assert queue.lease("anna") == queue.task(asked.id) == queue.tasks()[0].task == asked


class Failing:
    """A connection on which one statement fails, once."""

    def __init__(self, db, statement):
        self.db, self.statement = db, statement

    def __getattr__(self, name):
        return getattr(self.db, name)

    def execute(self, statement, *values):
        if statement == self.statement:
            self.statement = None
            raise sqlite3.OperationalError("disk full")
        return self.db.execute(statement, *values)


@pytest.mark.parametrize("statement", ["BEGIN IMMEDIATE", "COMMIT"])
def test_what_fails_leaves_nothing_behind_and_says_where(files, monkeypatch, statement):
    _, queue = files
    monkeypatch.setattr(queue, "_db", Failing(queue._db, statement))
    with pytest.raises(UserError, match=r"f\.sqlite: .*disk full"):
        queue.put([task(0)])
    assert queue.tasks() == [] and queue.put([task(1)]) == 1


def test_a_rollback_hides_no_error(files):
    _, queue = files
    queue.put([task(0)])
    queue._db.execute(
        "CREATE TRIGGER full BEFORE INSERT ON page_lease BEGIN SELECT raise(ROLLBACK, 'disk full'); END"
    )  # SQLite itself has rolled back by then
    with pytest.raises(UserError, match=r"f\.sqlite: .*disk full"):
        queue.lease("anna")


def test_a_file_that_cannot_be_read_is_named(files):
    _, queue = files
    queue._db.execute("DROP TABLE page_count")
    queue._db.execute("DROP TABLE page_post")
    for ask in (lambda: queue.lease("anna"), lambda: queue.progress(["anna"]), queue.tasks, queue.posts):
        with pytest.raises(UserError, match=r"f\.sqlite: .*page_(post|count)"):
            ask()


def test_of_an_origin_only_its_own_tasks_are_withdrawn(files):
    _, queue = files
    queue.put([task(0)], origin="items.jsonl")
    queue.put([task(0), task(1)], origin="training")
    queue.withdraw([task(0).id, task(1).id], origin="training")
    assert [queued.task for queued in queue.tasks()] == [task(0)]


# ---- The counts and places agree with a plain reading of all tasks and posts, whatever happened

RATERS = ("anna", "ben", "eve")
ACTS = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 5), st.integers(1, 3), st.sampled_from([0.0, 1.0, 2.5])),
    st.tuples(st.just("withdraw"), st.integers(0, 5)),
    st.tuples(st.just("lease"), st.sampled_from(RATERS)),
    st.tuples(st.sampled_from(["answer", "skip"]), st.sampled_from(RATERS), st.integers(0, 5)),
    st.tuples(st.just("undo"), st.sampled_from(RATERS)),
    st.tuples(st.just("wait"), st.integers(1, 150)),
)


class Plain:
    """The queue in words: lists that are read from the beginning for every question."""

    def __init__(self):
        self.tasks, self.posts, self.leases, self.time = {}, [], {}, 1000.0

    def put(self, number, overlap, priority):
        row = self.tasks.setdefault(number, {"place": len(self.tasks), "overlap": 0})
        row |= {"overlap": max(row["overlap"], overlap), "priority": priority, "open": True}

    def by(self, number, acts=("answer", "skip")):
        return {post["rater"] for post in self.posts if post["task"] == number and post["act"] in acts}

    def wanted(self, number):
        row = self.tasks[number]
        return row["open"] and len(self.by(number, ("answer",))) < row["overlap"]

    def next(self, rater):
        found = []
        for number, row in self.tasks.items():
            others = [who for (task, who), end in self.leases.items() if task == number and end > self.time]
            mine = rater in others
            hands = len(set(others) - {rater}) + len(self.by(number, ("answer",)))
            if row["open"] and rater not in self.by(number) and hands < row["overlap"]:
                found.append((not mine, -row["priority"], row["place"], number))
        number = min(found)[-1] if found else None
        if number is not None:
            self.leases[number, rater] = self.time + 100
        return number


REOPENED = [("put", 0, 1, 0.0), ("put", 1, 1, 0.0), ("answer", "ben", 0), ("lease", "anna"), ("undo", "ben")]
RAISED = [("put", 0, 1, 0.0), ("put", 1, 1, 0.0), ("answer", "anna", 0), ("lease", "anna"), ("put", 1, 1, 1.0)]


@given(st.lists(ACTS, max_size=40))
@example([*REOPENED, ("wait", 120), ("lease", "anna")])
@example([*RAISED, ("wait", 120), ("lease", "anna")])
@example([*RAISED[:4], ("undo", "anna"), ("wait", 120), ("lease", "anna")])
@settings(max_examples=60, deadline=None)
def test_quick_answers_are_those_of_a_plain_reading(acts):
    plain = Plain()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = Path(folder) / "f.sqlite"
        store = stack.enter_context(Store(path))
        queue = stack.enter_context(TaskQueue(path, lease_s=100))
        stack.enter_context(unittest.mock.patch("rlaif_jax.feedback.people.queue.now", side_effect=lambda: plain.time))
        for count, (act, *given_to) in enumerate(acts):
            if act == "put":
                number, overlap, priority = given_to
                queue.put([task(number)], overlap=overlap, priority=priority)
                plain.put(number, overlap, priority)
            elif act == "withdraw":
                queue.withdraw([task(given_to[0]).id])
                plain.tasks.get(given_to[0], {})["open"] = False
            elif act == "wait":
                plain.time += given_to[0]
            elif act == "lease":
                number = plain.next(given_to[0])
                assert queue.lease(given_to[0], at=plain.time) == (None if number is None else task(number))
            elif act == "undo":
                if (found := queue.last(given_to[0])) is not None:
                    number, last = found
                    queue.post(
                        Post(last.rater, "undo", last.task, {}, (), 0.0, False), f"{count}", "", store, undoes=number
                    )
                    (kept,) = [post for post in plain.posts if post["number"] == number]
                    plain.posts.remove(kept)
                    plain.leases[kept["task"], last.rater] = plain.time + 100
            elif given_to[1] in plain.tasks and given_to[0] not in plain.by(given_to[1]):
                rater, number = given_to
                queue.post(Post(rater, act, task(number).id, {}, (), 1.5, False), f"{count}", "", store)
                plain.posts.append({"rater": rater, "task": number, "act": act, "number": queue.last_number()})
                plain.leases.pop((number, rater), None)
        for row in queue.progress(RATERS):
            mine = [post for post in plain.posts if post["rater"] == row.rater]
            assert row.answered == sum(post["act"] == "answer" for post in mine)
            assert row.skipped == sum(post["act"] == "skip" for post in mine)
            left = [n for n in plain.tasks if plain.wanted(n) and row.rater not in plain.by(n)]
            assert row.left == len(left)
            assert queue.offered([task(n).id for n in range(6)], row.rater) == {task(n).id for n in left}
        opened = {n: row for n, row in plain.tasks.items() if row["open"]}
        expected = [("rate", "", len(opened), sum(row["overlap"] for row in opened.values()))] if opened else []
        assert [(g.kind, g.origin, g.tasks, g.wanted) for g in queue.groups()] == expected
        assert sum(g.answers for g in queue.groups()) == sum(
            min(len(plain.by(n, ("answer",))), row["overlap"]) for n, row in opened.items()
        )
        for raters in (RATERS, RATERS[:2], RATERS[:1]):
            assert queue.stuck(raters) == sum(plain.wanted(n) and set(raters) <= plain.by(n) for n in plain.tasks)
        upgraded = copied_from_an_old_file(queue, Path(folder) / "old.sqlite")
        with TaskQueue(upgraded) as again:
            for table in ("page_task", "page_count"):
                query = f"SELECT * FROM {table} ORDER BY 1"
                rows = [tuple(row) for row in queue.rows(query) if table == "page_task" or row[1:] != (0, 0, 0.0, 0)]
                assert [tuple(row) for row in again.rows(query)] == rows


def copied_from_an_old_file(queue, path):
    """A file as version 0.4 made it, without counts, of the same tasks and posts."""
    with sqlite3.connect(path) as old:
        old.executescript(OLD_TABLES)
        for table, columns in {
            "page_task": "sequence, id, task, overlap, priority, origin, is_open",
            "page_post": "sequence, rater, request, body, act, task, payload, records, seconds, time, informed, is_undone, "
            "is_delivered",
        }.items():
            rows = queue.rows(f"SELECT {columns} FROM {table}")
            old.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(columns.split(',')))})", rows)
    old.close()
    return path


OLD_TABLES = """
CREATE TABLE page_task (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, task TEXT NOT NULL, overlap INTEGER NOT NULL,
    priority REAL NOT NULL, origin TEXT NOT NULL, is_open INTEGER NOT NULL DEFAULT 1);
CREATE TABLE page_lease (
    task TEXT NOT NULL, rater TEXT NOT NULL, granted REAL NOT NULL, expires REAL NOT NULL, PRIMARY KEY (task, rater));
CREATE TABLE page_post (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, rater TEXT NOT NULL, request TEXT NOT NULL, body TEXT NOT NULL,
    act TEXT NOT NULL, task TEXT NOT NULL, payload TEXT NOT NULL, records TEXT NOT NULL, seconds REAL NOT NULL,
    time REAL NOT NULL, informed INTEGER NOT NULL, is_undone INTEGER NOT NULL DEFAULT 0,
    is_delivered INTEGER NOT NULL DEFAULT 0, UNIQUE (rater, request));
CREATE INDEX page_post_task ON page_post (task, rater);
CREATE INDEX page_post_waiting ON page_post (sequence) WHERE is_delivered = 0;
"""


def test_no_question_of_the_page_reads_all_tasks(files):
    """SQLite's steps for a rater's requests, at 15 times as many tasks, most of them done: nearly the same number."""
    _, queue = files
    done = 0

    def steps(action):
        counted = 0

        def step():
            nonlocal counted
            counted += 1

        queue._db.set_progress_handler(step, 10)
        action()
        queue._db.set_progress_handler(None, 0)
        return counted

    costs = []
    for size in (100, 1500):
        queue.put((task(n) for n in range(size)), overlap=2)
        with queue.write() as db:
            for number in range(done, size - 50):
                # Half of them by anna alone: she is ahead, and her next task is far behind the first open one.
                for rater in ("anna", "ben")[: 1 + number % 2]:
                    db.execute(
                        "INSERT INTO page_post (rater, request, body, act, task, payload, records, seconds, time, informed, "
                        "is_delivered) VALUES (?, ?, '', 'answer', ?, '{}', '[]', 1, 1, 0, 1)",
                        (rater, f"r{number}", task(number).id),
                    )
        done = size - 50
        queue.lease("anna")  # finds her place, once
        queue._db.execute("DELETE FROM page_lease")
        costs.append([steps(ask) for ask in (lambda: queue.lease("anna"), lambda: queue.lease("eve"))])
    for few, many in zip(*costs):
        assert many < few + 40
