"""The page over HTTP, in another process: what raters see and send, and what is on disk when a post is acknowledged."""

import contextlib
import dataclasses
import json
import sqlite3
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="the annotation page is an extra: pip install -e '.[ui]'")
pytest.importorskip("uvicorn", reason="the annotation page is an extra: pip install -e '.[ui]'")

from rlaif_jax.config import UserError
from rlaif_jax.feedback.people.kinds import COMPARE, EDIT, RATE
from rlaif_jax.feedback.people.tasks import PersonTask
from rlaif_jax.feedback.records.forms import Ranking, Rater, Rating
from rlaif_jax.feedback.records.parsing import from_json
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.recipes.world.crowd import PageClient, answer_through_page
from tests.ui.page_requests import post_headers, put, raw, token_of

PAIRS = [PersonTask(kind=COMPARE, prompt=f"p{i}", answers=(f"good {i}", f"bad {i}")) for i in range(4)]
SUGGESTED = PersonTask(
    kind=COMPARE,
    prompt="suggested",
    answers=("one", "two"),
    suggestion=Ranking(
        prompt="suggested", answers=("one", "two"), rater=Rater("judge", "ai", "secret-model"), ranks=(1, 2)
    ),
    generators=("writer-one", "writer-two"),
)
RATED = [PersonTask(kind=RATE, prompt=f"q{i}", answers=(f"a{i}",), high=10) for i in range(3)]


def test_the_view_is_blind_and_the_suggestion_comes_after(fresh):
    store, urls = fresh
    put(store, [SUGGESTED])
    client = PageClient(urls["anna"])
    task = client.next()
    seen = json.dumps(task) + raw(urls["anna"], "/", Authorization="Bearer " + token_of(urls["anna"]))[2]
    assert "writer-" not in seen and "secret-model" not in seen and "suggestion" not in seen
    reply = client.answer(task, {"choice": "first"}, 3.0)
    better = task["answers"].index("one")
    assert reply["suggestion"] == {"judge": "secret-model", "says": f"the {('first', 'second')[better]} is better"}
    client.undo()
    again = client.answer(task, {"choice": "second"})
    with Store(store) as kept:
        (record,) = [j for j in kept.judgements() if j.id in again["recorded"]]
    assert record.raw == "[after seeing the suggestion]" and record.generators == ("writer-one", "writer-two")


def test_who_has_once_seen_the_suggestion_is_informed_for_good(fresh):
    store, urls = fresh
    asked = dataclasses.replace(SUGGESTED, principle="kind?", suggestion=dataclasses.replace(SUGGESTED.suggestion))
    put(store, [asked])
    client = PageClient(urls["anna"])
    task = client.next()
    client.answer(task, "not yet")  # a skip shows nothing
    client.undo()
    blind = client.answer(task, {"choice": "first"})
    client.undo()
    client.answer(task, "cannot tell")
    client.undo()
    seeing = client.answer(task, {"choice": "first"})
    with Store(store) as kept:
        notes = {e.judgement.id: e.judgement.raw for e in kept.read(superseded=True)}
    assert notes[blind["recorded"][0]] == "" and notes[seeing["recorded"][0]] == "[after seeing the suggestion]"


def test_half_a_character_locks_nobody_out(fresh):
    store, urls = fresh
    half = "\ud83d"
    put(store, [PersonTask(kind=EDIT, prompt=half, answers=("x" + half,), labels=(half,))])
    client = PageClient(urls["anna"])
    task = client.next()
    assert (task["prompt"], task["answers"], task["labels"]) == (half, ["x" + half], [half])
    with pytest.raises(UserError, match=r"400.*unknown kind"):
        client.answer(task, {"edited": "x", "spans": [{"start": 0, "end": 1, "category": "y" + half}]})
    client.answer(task, {"edited": "x", "note": half})
    assert client.undo()["task"]["before"]["note"] == half


def test_a_post_counts_once_and_is_on_disk_before_it_is_acknowledged(fresh):
    store, urls = fresh
    put(store, RATED[:2])
    client = PageClient(urls["anna"])
    task = client.next()
    body = {"request": "a" * 16, "task": task["id"], "seconds": 9999, "payload": {"value": 7}}
    first, second = client.call("/api/answer", body), client.call("/api/answer", body)
    assert first == second
    with Store(store) as kept:
        records = [j for j in kept.judgements(form="rating") if j.prompt == task["prompt"]]
    assert [(r.id, r.value, r.rater.source) for r in records] == [(first["recorded"][0], 7.0, "person")]
    assert records[0].call.latency_s < 60  # no longer than the task was in hand
    with pytest.raises(UserError, match=r"409.*used before"):
        client.call("/api/answer", body | {"payload": {"value": 8}})
    with pytest.raises(UserError, match=r"409.*undo it first"):
        client.call("/api/answer", body | {"request": "b" * 16, "payload": {"value": 8}})
    with pytest.raises(UserError, match=r"400.*value is 11, off the scale 1 \.\. 10"):
        client.answer(client.next(), {"value": 11})


def test_undo_is_a_record(fresh):
    store, urls = fresh
    task = PersonTask(kind=RATE, prompt="undone", answers=("x",))
    put(store, [task])
    client = PageClient(urls["anna"])
    made = client.answer(client.next(), {"value": 2, "note": "hasty"})
    back = client.undo()["task"]
    assert back["id"] == task.id and back["before"] == {"value": 2, "note": "hasty"}
    with Store(store) as kept:
        assert not [j for j in kept.judgements() if j.prompt == "undone"]
        everything = [e.judgement for e in kept.read(superseded=True) if e.judgement.prompt == "undone"]
    assert [j.status for j in everything] == ["ok", "retracted"] and everything[1].supersedes == made["recorded"][0]
    assert client.next()["id"] == task.id
    with pytest.raises(UserError, match=r"400.*skip needs its reason"):
        client.answer(back, " ")
    client.answer(back, "cannot tell")
    with Store(store) as kept:
        assert [(j.status, j.raw) for j in kept.judgements() if j.prompt == "undone"] == [("abstained", "cannot tell")]


def test_a_program_answers_through_the_page_and_is_called_simulated(fresh):
    store, urls = fresh
    put(store, PAIRS)

    def better(task):
        good = [answer.startswith("good") for answer in task["answers"]]
        return {"choice": ("first", "second")[good.index(True)], "margin": 2}

    assert answer_through_page(urls["robot"], better) == len(PAIRS)
    with Store(store) as kept:
        records = [j for j in kept.judgements(source="simulated") if j.prompt.startswith("p")]
    assert len(records) == len(PAIRS)
    for record in records:
        assert record.answers[record.ranks.index(1)].startswith("good") and record.rater.name == "robot"
    assert len({record.shown for record in records}) == 2  # not always the same side


def test_a_run_waits_for_the_page(fresh):
    from rlaif_jax.feedback.people.source import PeopleSource

    store, urls = fresh
    done = threading.Event()
    count = lambda task: {"value": len(task["answers"][0])}
    arguments = {"wait_s": 60.0, "done": done.is_set}
    robot = threading.Thread(target=answer_through_page, args=(urls["robot"], count), kwargs=arguments)
    robot.start()
    people = PeopleSource(store, low=0, high=10, timeout_s=30, poll_s=0.02)
    for step in range(3):  # the tasks come step by step
        judged = people([{"prompt": f"step {step}"}] * 3, ["x" * step, "xxxxx", "xxxxx"], None)
        assert judged.valid.all() and judged.values[:, 0].tolist() == pytest.approx([step / 10, 0.5, 0.5])
    done.set()
    robot.join()


def test_disagreement_is_counted_adjudicated_and_exported(fresh):
    store, urls = fresh
    tasks = [PersonTask(kind=RATE, prompt=f"shared {i}", answers=("x",)) for i in range(3)]
    put(store, tasks, overlap=2)
    given = {"anna": [1, 3, 5], "ben": [1, 3, 4]}
    for name, values in given.items():
        client = PageClient(urls[name])
        for value in values:
            client.answer(client.next(), {"value": value})
    anna, ben = PageClient(urls["anna"]), PageClient(urls["ben"])
    (row,) = [row for row in anna.call("/api/team")["agreement"] if row["kind"] == "rate"]
    assert row["units"] == 3 and row["same"] == pytest.approx(2 / 3)
    assert row["alpha"] == pytest.approx(
        0.935064935064935, abs=1e-9
    )  # krippendorff.alpha([[1, 3, 5], [1, 3, 4]], interval)
    (dispute,) = [d for d in ben.call("/api/disputes")["disputes"] if d["task"]["prompt"].startswith("shared")]
    assert [(o["rater"], o["says"][:1]) for o in dispute["opinions"]] == [("anna", "5"), ("ben", "4")]
    ben.call("/api/adjudicate", {"request": "c" * 16, "task": dispute["task"]["id"], "payload": {"value": 5}})
    assert not [d for d in ben.call("/api/disputes")["disputes"] if d["task"]["prompt"].startswith("shared")]
    token = {"Authorization": "Bearer " + token_of(urls["ben"])}
    everything = [from_json(json.loads(line)) for line in raw(urls["ben"], "/export.jsonl", **token)[2].splitlines()]
    final = [from_json(json.loads(line)) for line in raw(urls["ben"], "/export.jsonl?final=1", **token)[2].splitlines()]
    assert sum(isinstance(j, Rating) and j.prompt == "shared 2" for j in everything) == 3
    assert [(j.rater.name, j.value) for j in final if j.prompt == "shared 2"] == [("adjudicated by ben", 5.0)]
    assert sum(j.prompt.startswith("shared") for j in final) == 5
    for path in ("/api/disputes", "/export.jsonl"):
        with pytest.raises(UserError, match=r"403.*only the coordinator"):
            anna.call(path)
    with pytest.raises(UserError, match=r"403.*only the coordinator"):
        anna.call("/api/stop", {"stop": True})


def test_another_writer_delays_posts_and_nothing_else(fresh):
    """Another program writes for seconds: pages and looks go on, posts wait for it and are stored once."""
    store, urls = fresh
    put(store, RATED[:2])
    anna = PageClient(urls["anna"])
    token = {"Authorization": "Bearer " + token_of(urls["ben"])}
    task = anna.next()
    answers, threads = [], []
    with contextlib.closing(sqlite3.connect(store, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        body = {"request": "w" * 16, "task": task["id"], "seconds": 1, "payload": {"value": 7}}
        for _ in range(3):  # one post, sent three times
            threads.append(threading.Thread(target=lambda: answers.append(anna.call("/api/answer", body))))
            threads[-1].start()
        time.sleep(0.5)
        for path in ("/static/page.css", "/", "/progress", "/api/me", "/api/team"):
            started = time.monotonic()
            assert raw(urls["ben"], path, **token)[0] == 200
            assert time.monotonic() - started < 5, path
        assert answers == []
        other.execute("ROLLBACK")
    for thread in threads:
        thread.join(30)
    assert len(answers) == 3 and all(answer == answers[0] for answer in answers)
    with Store(store) as kept:
        assert [j.value for j in kept.judgements() if j.prompt == task["prompt"] and j.rater.name == "anna"] == [7.0]


def test_a_writer_that_does_not_finish_is_a_503_that_says_so(fresh):
    store, urls = fresh
    put(store, RATED)
    with contextlib.closing(sqlite3.connect(store, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        status, headers, text = raw(urls["anna"], "/api/next", method="POST", body=b"{}", **post_headers(urls["anna"]))
        other.execute("ROLLBACK")
    assert (status, headers["retry-after"]) == (503, "1") and "another program is writing" in text
    assert PageClient(urls["anna"]).next() is not None
