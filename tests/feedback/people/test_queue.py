"""The queue of tasks: who gets what, nothing twice, nothing lost."""

import sqlite3

import pytest

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
    queue._db.execute("DROP TABLE page_post")
    for ask in (lambda: queue.lease("anna"), lambda: queue.progress(["anna"]), queue.tasks, queue.posts):
        with pytest.raises(UserError, match=r"f\.sqlite: .*page_post"):
            ask()


def test_of_an_origin_only_its_own_tasks_are_withdrawn(files):
    _, queue = files
    queue.put([task(0)], origin="items.jsonl")
    queue.put([task(0), task(1)], origin="training")
    queue.withdraw([task(0).id, task(1).id], origin="training")
    assert [queued.task for queued in queue.tasks()] == [task(0)]
