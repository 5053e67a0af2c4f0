"""The page without HTTP: clocks, conversations, adjudication, and files that other programs write."""

import asyncio
import json
import time
import uuid

import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.people.chats import Conflict
from rlaif_jax.feedback.people.kinds import CHAT, COMMENT, COMPARE, RATE
from rlaif_jax.feedback.people.queue import TaskQueue
from rlaif_jax.feedback.people.tasks import PersonTask
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.ui import service as module
from rlaif_jax.ui.check import CheckQuestion
from rlaif_jax.ui.service import AnnotationService, Forbidden

RATED = PersonTask(kind=RATE, prompt="p", answers=("x",))
PAIR = PersonTask(kind=COMPARE, prompt="p", answers=("x", "y"))
CHATS = [PersonTask(kind=CHAT, prompt=f"topic {i}") for i in range(2)]


@pytest.fixture
def desk(tmp_path):
    """Makes a service of three raters, of whom anna coordinates."""
    opened = []

    def make(tasks, overlap=1, **more):
        store, queue = Store(tmp_path / "f.sqlite"), TaskQueue(tmp_path / "f.sqlite")
        opened.append(AnnotationService(store, queue, ("anna", "ben", "eve"), "anna", **more))
        queue.put(tasks, overlap=overlap)
        return opened[-1]

    yield make
    for service in opened:
        service.close()


def send(desk, rater, task, **content):
    """Answers a task with these fields of the post; returns the reply."""
    return desk.answer(rater, uuid.uuid4().hex, {"task": task.id, "seconds": 5.0, **content})


def export(desk, *, final=False):
    """The records of an export, in several steps."""
    found, after = [], -1
    overruled = desk.overruled("anna") if final else frozenset()
    while after:
        part, after = desk.export(final, overruled, max(after, 0))
        found += part
    return found


# ---- Clocks and numbers


@pytest.mark.parametrize(
    "jump, least, most", [(-30.0, 5.0, 5.0), (-1e9, 5.0, 5.0), (3600.0, 5.0, 5.0), (0.0, 0.0, 1.0)]
)
def test_the_clock_may_jump_while_a_task_is_in_hand(desk, monkeypatch, jump, least, most):
    page = desk([RATED])
    page.next("ben")
    monkeypatch.setattr(module, "now", lambda: time.time() + jump)
    send(page, "ben", RATED, payload={"value": 3})
    (record,) = page.store.judgements()
    assert least <= record.call.latency_s <= most  # what the page measured; no longer than in hand, where that is known


def test_a_task_in_hand_comes_back_though_the_clock_was_set_back(desk):
    page = desk([RATED])
    assert page.queue.lease("ben", at=1e9) == RATED
    assert page.queue.lease("eve", at=1e9 - 60) is None  # a small step: ben has it
    assert page.queue.lease("eve", at=1e9 - 86_400) == RATED  # not a day later than now


@pytest.mark.parametrize(
    "seconds", ["1e999", "-1e999", "1e308", "-1", "null", "true", '"5"', "1" + 300 * "0", "[1e999]"]
)
def test_any_number_of_seconds_is_an_answer_or_a_message(desk, seconds):
    page = desk([RATED])
    body = json.loads(f'{{"task": "{RATED.id}", "payload": {{"value": 3}}, "seconds": {seconds}}}')
    if "1e999" in seconds:
        with pytest.raises(UserError, match="not finite"):
            page.answer("ben", "r" * 8, body)
        assert len(page.store) == 0
    else:
        page.answer("ben", "r" * 8, body)
        assert 0 <= page.store.judgements()[0].call.latency_s <= 86_400


# ---- Conversations


class Model:
    """A chat model that fails while `fails`."""

    fails = False

    def __call__(self, prompt, turns):
        if self.fails:
            raise UserError("no model")
        return f"reply to {turns[-1].message} after {len(turns) - 1}"


async def directly(function, *arguments):
    return function(*arguments)


def say(desk, request, task, message):
    return asyncio.run(desk.say("ben", request * 4, {"task": task.id, "message": message}))["turns"]


def test_a_reply_goes_under_its_own_message(desk):
    model = Model()
    page = desk(CHATS, chat=model, in_thread=directly)
    model.fails = True
    for request, message in (("r1", "one"), ("r2", "two")):
        with pytest.raises(UserError, match="no model"):
            say(page, request, CHATS[0], message)
    model.fails = False
    turns = say(page, "r1", CHATS[0], "one")  # the older message is sent again, after the newer one
    assert [(t["message"], t["reply"]) for t in turns] == [("one", "reply to one after 0"), ("two", None)]
    turns = say(page, "r2", CHATS[0], "two")
    assert [t["reply"] for t in turns] == ["reply to one after 0", "reply to two after 1"]
    model.fails = True  # answered ones need no model
    assert say(page, "r1", CHATS[0], "one") == turns == say(page, "r2", CHATS[0], "two")


def test_an_id_is_of_one_message(desk):
    page = desk(CHATS, chat=Model(), in_thread=directly)
    turns = say(page, "r1", CHATS[0], "one")
    for task, message in ((CHATS[1], "one"), (CHATS[0], "other"), (CHATS[1], "other")):
        with pytest.raises(Conflict, match="used before for another message; make a new id"):
            say(page, "r1", task, message)
    assert page.queue.chats.turns(CHATS[1].id, "ben") == []
    assert [turn._asdict() for turn in page.queue.chats.turns(CHATS[0].id, "ben")] == turns


def test_before_the_check_nobody_works_or_talks(desk):
    page = desk([*CHATS, RATED], chat=Model(), in_thread=directly, questions=(CheckQuestion("?", ("a", "b"), 1),))
    for ask in (
        lambda: say(page, "r1", CHATS[0], "hello"),
        lambda: page.next("ben"),
        lambda: send(page, "ben", RATED, payload={"value": 3}),
    ):
        with pytest.raises(Forbidden, match="pass the check"):
            ask()
    assert page.queue.chats.turns(CHATS[0].id, "ben") == [] and len(page.store) == 0


# ---- Adjudication


def test_the_coordinator_answers_before_seeing_what_others_said(desk):
    page = desk([PAIR], overlap=3)
    for rater, choice in (("ben", "first"), ("eve", "tie")):
        send(page, rater, PAIR, payload={"choice": choice})
    assert page.disputes("anna")["count"] == 0  # anna may still answer it
    send(page, "anna", PAIR, payload={"choice": "tie"})
    (dispute,) = page.disputes("anna")["disputes"]
    assert [opinion["rater"] for opinion in dispute["opinions"]] == ["ben", "eve", "anna"]


def test_a_task_that_has_its_answers_or_that_she_skipped_is_shown(desk):
    page = desk([PAIR], overlap=3)
    for rater, choice in (("ben", "first"), ("eve", "tie")):
        send(page, rater, PAIR, payload={"choice": choice})
    send(page, "anna", PAIR, skip="cannot tell")
    assert page.disputes("anna")["count"] == 1
    page.undo("anna", "u" * 8, {})
    assert page.disputes("anna")["count"] == 0
    page.queue.withdraw([PAIR.id])
    assert page.disputes("anna")["count"] == 1


def test_two_comments_are_no_dispute(desk):
    comment = PersonTask(kind=COMMENT, prompt="c", answers=("x",))
    page = desk([comment], overlap=2)
    for rater in ("ben", "eve"):
        send(page, rater, comment, payload={"text": f"{rater} says"})
    assert page.disputes("anna")["count"] == 0


def test_a_dispute_ends_with_an_undo_and_a_new_adjudication_replaces_the_old_one(desk):
    page = desk([PAIR], overlap=2)
    for rater, choice in (("ben", "tie"), ("eve", "both_bad")):
        send(page, rater, PAIR, payload={"choice": choice})
    assert page.disputes("anna")["count"] == 1
    page.undo("eve", "u" * 8, {})
    assert page.disputes("anna")["count"] == 0
    send(page, "eve", PAIR, payload={"choice": "first", "margin": 2})
    assert page.disputes("anna")["count"] == 1
    made = [
        page.adjudicate("anna", choice * 8, {"task": PAIR.id, "payload": {"choice": choice}})["recorded"]
        for choice in ("first", "second")
    ]
    assert page.disputes("anna")["count"] == 0
    live = [record.id for record in page.store.judgements() if record.rater.name == "adjudicated by anna"]
    assert live == made[1]
    assert (
        page.adjudicate("anna", "first" * 8, {"task": PAIR.id, "payload": {"choice": "first"}})["recorded"] == made[0]
    )
    assert [record["rater"]["name"] for record in export(page, final=True)] == ["adjudicated by anna"]


def test_disputes_come_in_pages(desk):
    tasks = [PersonTask(kind=RATE, prompt=f"p{i}", answers=("x",)) for i in range(module.MOST_DISPUTES + 5)]
    page = desk(tasks, overlap=2)
    for task in tasks:
        send(page, "ben", task, payload={"value": 1})
        send(page, "eve", task, payload={"value": 2})

    def shown(skip):
        asyncio.run(page.count_posts())
        found = page.disputes("anna", skip)
        assert found["count"] == len(tasks) and found["uncounted"] == 0
        return [dispute["task"]["prompt"] for dispute in found["disputes"]]

    assert shown(0) == [task.prompt for task in tasks[: module.MOST_DISPUTES]]
    assert shown(20) == [task.prompt for task in tasks[20:]] and shown(len(tasks) + 1)[0] == "p1"


def test_an_export_in_steps_has_every_record_once(desk, monkeypatch):
    monkeypatch.setattr(module, "EXPORT_STEP", 2)
    tasks = [PersonTask(kind=RATE, prompt=f"p{i}", answers=("x",)) for i in range(4)]
    page = desk(tasks)
    assert export(page) == []
    for count, task in enumerate(tasks):
        send(page, "ben", task, payload={"value": 1})
        assert [record["prompt"] for record in export(page)] == [task.prompt for task in tasks[: count + 1]]
