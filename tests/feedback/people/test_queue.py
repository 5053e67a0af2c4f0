"""The queue of tasks: who gets what, nothing twice, nothing lost."""

import json
import sqlite3

import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.people.kinds import CHAT, COMPARE, RATE
from rlaif_jax.feedback.people.queue import Conflict, Post, TaskQueue
from rlaif_jax.feedback.people.tasks import PersonTask, read_tasks, task_from_json, task_to_json
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
def desk(tmp_path):
    with Store(tmp_path / "f.sqlite") as store, TaskQueue(tmp_path / "f.sqlite", lease_s=100) as queue:
        yield store, queue


def test_a_task_goes_to_as_many_raters_as_wanted_and_to_none_twice(desk):
    store, queue = desk
    assert queue.put([task(0), task(1)], overlap=2) == 2
    assert queue.put([task(0)], overlap=1) == 0
    first = queue.lease("anna", at=0)
    assert first == queue.lease("anna", at=1) == queue.lease("ben", at=2) == task(0)
    assert queue.lease("eve", at=3) == task(1)  # two have the first in hand
    queue.post(answer(task(0)), "r1", "body", store)
    assert queue.lease("anna", at=4) == task(1)
    assert queue.lease("finn", at=5) is None
    assert queue.lease("finn", at=102.5) == task(0)  # ben's lease is over, anna's answer stays


def test_priority_first_and_what_is_withdrawn_last_never(desk):
    _, queue = desk
    queue.put([task(0)])
    queue.put([task(1)], priority=1.0)
    assert queue.lease("anna") == task(1)
    queue.withdraw([task(0).id, task(1).id])
    assert queue.lease("ben") is None and queue.lease("anna") is None
    queue.put([task(0)])
    assert queue.lease("ben") == task(0)


def test_the_same_post_twice_is_one_and_another_with_its_id_is_refused(desk):
    store, queue = desk
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


def test_a_crash_between_queue_and_store_loses_nothing(desk, monkeypatch):
    store, queue = desk
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


def test_undo_gives_the_task_back_to_the_same_hands(desk):
    store, queue = desk
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


def test_a_skip_passes_the_task_on(desk):
    store, queue = desk
    queue.put([task(0)])
    queue.post(Post("anna", "skip", task(0).id, {"skip": "?"}, (), 1.0, False), "r1", "b", store)
    assert queue.lease("anna") is None and queue.lease("ben") == task(0)
    anna, ben = queue.progress(["anna", "ben"])
    assert (anna.skipped, anna.left, ben.left, ben.in_hand) == (1, 0, 1, 1)


def test_stop_is_heard_by_those_who_came_before_it(desk):
    _, queue = desk
    assert not queue.team.stop_requested()
    queue.team.request_stop("anna")
    early, late = 0, queue.team.last_stop
    assert queue.team.stop_requested(early) and not queue.team.stop_requested(late)
    queue.team.request_stop("anna", False)
    assert not queue.team.stop_requested(early)


def test_tasks_are_the_same_whatever_the_order_of_their_answers():
    one = PersonTask(kind=COMPARE, prompt="p", answers=("a", "b"))
    other = PersonTask(kind=COMPARE, prompt="p", answers=("b", "a"))
    assert one.id == other.id != PersonTask(kind=COMPARE, prompt="p", answers=("a", "c")).id
    assert task_from_json(json.loads(json.dumps(task_to_json(one)))) == one


def test_bad_lines_are_named_and_the_good_ones_kept(tmp_path):
    path = tmp_path / "items.jsonl"
    lines = [
        {"kind": "rate", "prompt": "p", "answers": ["a"]},
        {"kind": "guess", "prompt": "p"},
        {"kind": "compare", "prompt": "p", "answers": ["a"]},
        {"kind": "compare", "prompt": "p", "answers": ["a", "a"]},
        {"kind": "rate", "prompt": "p", "answers": ["a"], "high": "5"},
        {"prompt": "p"},
        {"kind": "rate", "prompt": "p", "answers": ["a"], "answer": 1},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"kind": "rate", "pro')
    good, bad = read_tasks(path)
    assert len(good) == 1 and len(bad) == 7
    for message, words in zip(
        bad,
        [
            ":2: unknown kind 'guess'",
            ":3: a task to compare shows 2 answers, not 1",
            ":4: two of the answers are the same",
            ":5: high must be a whole number",
            ":6: a task needs kind",
            ":7: a task has no field answer",
            ":8: no valid JSON",
        ],
    ):
        assert words in message
    with pytest.raises(UserError, match="cannot read"):
        read_tasks(tmp_path / "none.jsonl")


HALF = "\ud83d"


@pytest.mark.parametrize(
    "wrong",
    [{"prompt": HALF}, {"answers": ["a" + HALF]}, {"labels": [HALF]}, {"principle": HALF}, {"generators": [HALF]}],
)
def test_half_a_character_is_refused_where_tasks_are_read(tmp_path, wrong):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({"kind": "rate", "prompt": "p 🎉", "answers": ["a"]} | wrong))
    good, (message,) = read_tasks(path)
    assert good == [] and f"{path}:1: {next(iter(wrong))} holds half a character" in message


def test_a_reply_with_half_a_character_is_kept_and_the_first_one_stays(desk):
    _, queue = desk
    chat = PersonTask(kind=CHAT, prompt="talk")
    queue.put([chat])
    queue.chats.say(chat.id, "anna", "r1", "hello")
    queue.chats.reply("anna", "r1", "half \ud83d of it")
    queue.chats.reply("anna", "r1", "another")
    assert [turn.reply for turn in queue.chats.turns(chat.id, "anna")] == ["half ? of it"]


def test_half_a_character_that_a_run_asks_about_is_asked(desk):
    _, queue = desk
    asked = PersonTask(kind=RATE, prompt="p", answers=(HALF,))
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
def test_what_fails_leaves_nothing_behind_and_says_where(desk, monkeypatch, statement):
    _, queue = desk
    monkeypatch.setattr(queue, "_db", Failing(queue._db, statement))
    with pytest.raises(UserError, match=r"f\.sqlite: .*disk full"):
        queue.put([task(0)])
    assert queue.tasks() == [] and queue.put([task(1)]) == 1


def test_a_rollback_hides_no_error(desk):
    _, queue = desk
    queue.put([task(0)])
    queue._db.execute(
        "CREATE TRIGGER full BEFORE INSERT ON page_lease BEGIN SELECT raise(ROLLBACK, 'disk full'); END"
    )  # SQLite itself has rolled back by then
    with pytest.raises(UserError, match=r"f\.sqlite: .*disk full"):
        queue.lease("anna")


def test_a_file_that_cannot_be_read_is_named(desk):
    _, queue = desk
    queue._db.execute("DROP TABLE page_post")
    for ask in (lambda: queue.lease("anna"), lambda: queue.progress(["anna"]), queue.tasks, queue.posts):
        with pytest.raises(UserError, match=r"f\.sqlite: .*page_post"):
            ask()


def test_of_an_origin_only_its_own_tasks_are_withdrawn(desk):
    _, queue = desk
    queue.put([task(0)], origin="items.jsonl")
    queue.put([task(0), task(1)], origin="training")
    queue.withdraw([task(0).id, task(1).id], origin="training")
    assert [queued.task for queued in queue.tasks()] == [task(0)]


def test_those_who_answer_are_those_named_last(desk):
    _, queue = desk
    assert queue.team.raters == frozenset()
    queue.team.register(["anna", "ben"])
    queue.team.register(["ben", "eve"])
    assert queue.team.raters == {"ben", "eve"}
