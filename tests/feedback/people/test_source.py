"""People as a source: what they are asked, what is waited for, what is missing, and how they are mixed with judges."""

import dataclasses
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from rlaif_jax.config import StopRequested, UserError
from rlaif_jax.feedback.people.kinds import CHAT, COMPARE, EDIT, RANK
from rlaif_jax.feedback.people.queue import ADJUDICATED, Post, TaskQueue
from rlaif_jax.feedback.people.source import PeopleSource, mean_rating, win_share
from rlaif_jax.feedback.records.forms import Ranking, Rater
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.feedback.sources import FunctionSource, MixedSource
from tests.feedback.people.crowd import Crowd, rating

ROLLOUT = SimpleNamespace()
RECORDS = [{"prompt": "p"}, {"prompt": "p"}, {"prompt": "q"}, {"prompt": "q"}]
ANSWERS = ["long one", "x", "same", "same"]


def rank(task, rater="anna", **more):
    order = sorted(task.answers, key=len, reverse=True)
    ranks = tuple(order.index(answer) + 1 for answer in task.answers)
    return Ranking(prompt=task.prompt, answers=task.answers, rater=Rater(rater, "simulated"), ranks=ranks, **more)


def source(tmp_path, **more):
    return PeopleSource(tmp_path / "f.sqlite", **({"timeout_s": 20.0, "poll_s": 0.01} | more))


def test_ratings_of_each_text_once(tmp_path):
    people = source(tmp_path, overlap=2)
    marks = {
        ("long one", "anna"): 5,
        ("long one", "ben"): 4,
        ("x", "anna"): 1,
        ("x", "ben"): 2,
        ("same", "anna"): 3,
        ("same", "ben"): 3,
    }
    with Crowd(people.store, lambda t, who: rating(t, marks[t.answers[0], who], who), ("anna", "ben")) as crowd:
        judged = people(RECORDS, ANSWERS, ROLLOUT)
        asked = len(crowd.seen)
        again = people(RECORDS, ANSWERS, ROLLOUT)  # known by now: nobody is asked
        assert len(crowd.seen) == asked == 6
    np.testing.assert_allclose(judged.values[:, 0], [0.875, 0.125, 0.5, 0.5])
    assert judged.valid.all() and judged.values.dtype == np.float32
    np.testing.assert_array_equal(again.values, judged.values)


def test_what_does_not_come_in_time_is_missing(tmp_path):
    people = source(tmp_path, timeout_s=0.3)
    with Store(people.store) as store:
        (first, *_) = people.tasks(RECORDS, ANSWERS)
        store.add([rating(first, 5)])
    started = time.monotonic()
    judged = people(RECORDS, ANSWERS, ROLLOUT)
    assert 0.3 <= time.monotonic() - started < 5
    assert judged.valid[:, 0].tolist() == [True, False, False, False] and judged.values[:, 0].tolist() == [1, 0, 0, 0]
    with TaskQueue(people.store) as queue:
        assert queue.lease("anna") is None  # nobody works on what no run waits for


def test_what_nobody_is_left_to_answer_is_not_waited_for(tmp_path):
    people = source(tmp_path, overlap=2, timeout_s=30.0)
    with TaskQueue(people.store) as queue:
        queue.team.register(["anna", "ben"])

    def judge(task, who):
        skipped = {"anna": ("long one", "x"), "ben": ("x",)}[who]
        return rating(task, 5, who, status="abstained" if task.answers[0] in skipped else "ok")

    started = time.monotonic()
    with Crowd(people.store, judge, ("anna", "ben")) as crowd:
        for _ in range(2):  # the second time everything is known
            judged = people(RECORDS, ANSWERS, ROLLOUT)
            assert judged.valid[:, 0].tolist() == [True, False, True, True] and judged.values[:, 0].tolist() == [
                1,
                0,
                1,
                1,
            ]
    assert len(crowd.seen) == 6 and time.monotonic() - started < 15


def test_a_skip_is_waited_for_while_another_may_answer(tmp_path):
    people = source(tmp_path, timeout_s=0.3, limit=1)
    (task,) = people.tasks(RECORDS, ANSWERS)
    with Store(people.store) as store, TaskQueue(people.store) as queue:
        queue.put([task])
        queue.post(Post("anna", "skip", task.id, {}, (), 1.0, False), "r1", "", store)
        for raters in ((), ("anna", "ben")):
            queue.team.register(raters)
            started = time.monotonic()
            assert not people(RECORDS, ANSWERS, ROLLOUT).valid.any()
            assert time.monotonic() - started >= 0.3
        timer = threading.Timer(0.2, register, (people.store, "anna"))  # the page is started anew, without ben
        timer.start()
        started = time.monotonic()
        assert not dataclasses.replace(people, timeout_s=30.0)(RECORDS, ANSWERS, ROLLOUT).valid.any()
        assert time.monotonic() - started < 15
        timer.join()


def register(store, *raters):
    with TaskQueue(store) as queue:
        queue.team.register(raters)


def test_a_run_withdraws_what_it_asked_and_nothing_else(tmp_path):
    def broken():
        raise RuntimeError("lost")

    people = source(tmp_path, interrupted=broken)
    first, *_ = people.tasks(RECORDS, ANSWERS)
    with TaskQueue(people.store) as queue:
        queue.put([first], origin="items.jsonl")
        with pytest.raises(RuntimeError, match="lost"):
            people(RECORDS, ANSWERS, ROLLOUT)
        assert [queued.task for queued in queue.tasks()] == [first]


def test_enough_is_enough(tmp_path):
    people = source(tmp_path, enough=0.6)
    done = []

    def one_of_them_never(task, who):
        done.append(task)
        if len(done) > 2:
            time.sleep(1.0)
        return rating(task, 5, who)

    with Crowd(people.store, one_of_them_never):
        judged = people(RECORDS, ANSWERS, ROLLOUT)  # 2 of 3 tasks
    assert 0 < judged.valid.sum() < 4


def test_stop_ends_the_wait_and_an_old_stop_does_not(tmp_path):
    with TaskQueue(tmp_path / "f.sqlite") as queue:
        queue.team.request_stop("anna")
        people = source(tmp_path)
        assert not people.stop_requested()
        timer = threading.Timer(0.2, lambda: press(people.store))
        timer.start()
        judged = people(RECORDS, ANSWERS, ROLLOUT)
        timer.join()
    assert people.stop_requested() and not judged.valid.any()
    assert not source(tmp_path).stop_requested()


def test_an_interrupted_wait_returns_nothing_and_the_resumed_one_finds_what_came(tmp_path):
    stopped = threading.Event()
    people = source(tmp_path, interrupted=stopped.is_set)

    def two_answers(task, who):
        if len(crowd.seen) == 3:
            stopped.set()
            time.sleep(0.3)
        return rating(task, 4, who)

    with Crowd(people.store, two_answers) as crowd:
        for asked in (people, MixedSource((people, FunctionSource(lambda record, answer: 0.0)))):
            with pytest.raises(StopRequested):  # not feedback that lacks the rest: a step would learn from it
                asked(RECORDS, ANSWERS, ROLLOUT)
    with TaskQueue(people.store) as queue, Store(people.store) as store:
        assert queue.groups() == [] and len(store) == 3
    resumed = source(tmp_path, timeout_s=0.1)(RECORDS, ANSWERS, ROLLOUT)
    assert resumed.valid.all() and resumed.values[:, 0].tolist() == [0.75] * 4


def test_what_is_all_known_is_returned_even_to_a_run_that_stops(tmp_path):
    people = source(tmp_path, interrupted=lambda: True)
    with Store(people.store) as store:
        store.add(rating(task, 5) for task in people.tasks(RECORDS, ANSWERS))
    assert people(RECORDS, ANSWERS, ROLLOUT).valid.all()


def test_the_tasks_of_a_killed_run_close_and_those_of_a_living_one_stay(tmp_path):
    people = source(tmp_path)
    tasks = people.tasks(RECORDS, ANSWERS)

    def offered(at):
        queue.lease("anna", at=at)
        return [queued.task for queued in queue.tasks()]

    with TaskQueue(people.store) as queue:
        queue.put(tasks[:1], origin="items.jsonl")
        queue.put(tasks, origin="training", until=1000.0)
        assert offered(at=999.0) == tasks
        queue.keep([task.id for task in tasks], 2000.0)
        assert offered(at=1999.0) == tasks
        assert offered(at=2001.0) == tasks[:1]  # the file's are open for good
        queue.put(tasks, origin="training", until=3000.0)  # the run is started again
        queue.put(tasks[1:2], origin="items.jsonl")
        assert offered(at=2999.0) == tasks and offered(at=3001.0) == tasks[:2]


def test_a_run_says_in_time_that_it_lives(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr("rlaif_jax.feedback.people.source.KEPT_S", 0.06)
    monkeypatch.setattr(TaskQueue, "keep", lambda queue, ids, until: kept.append((set(ids), until - time.time())))
    people = source(tmp_path, timeout_s=0.3)
    people(RECORDS, ANSWERS, ROLLOUT)
    assert len(kept) >= 3 and {len(ids) for ids, _ in kept} == {3} and min(left for _, left in kept) > 0.03


def test_a_look_asks_only_about_what_something_happened_to(tmp_path, monkeypatch):
    """200 tasks, answered one by one: the number of look-ups is not tasks x answers."""
    looked = []
    judgements = PeopleSource._judgements
    monkeypatch.setattr(PeopleSource, "_judgements", lambda *given: looked.append(given) or judgements(*given))
    people = source(tmp_path, poll_s=0.001)
    records, answers = [{"prompt": f"p{i}"} for i in range(200)], [f"a{i}" for i in range(200)]
    with Crowd(people.store, lambda task, who: rating(task, 3, who)):
        assert people(records, answers, ROLLOUT).valid.all()
    assert len(looked) <= 4 * 200  # before, for each task, once more than needed at most, at the end


def press(store):
    with TaskQueue(store) as queue:
        queue.team.request_stop("anna")


@pytest.mark.parametrize("kind", [RANK, COMPARE])
def test_rankings_become_shares_of_comparisons_won(tmp_path, kind):
    people = source(tmp_path, kind=kind)
    records, answers = [{"prompt": "p"}] * 3 + RECORDS[2:], ["ccc", "a", "bb", "same", "same"]
    with Crowd(people.store, rank) as crowd:
        judged = people(records, answers, ROLLOUT)
    assert len(crowd.seen) == (1 if kind is RANK else 2)
    # compared in pairs a-bb, bb-ccc; as a list of three, each against two
    expected = [1, 0, 0.5]
    np.testing.assert_allclose(judged.values[:3, 0], expected)
    assert judged.valid[:, 0].tolist() == [True] * 3 + [False] * 2  # one text twice: nothing to compare


def test_only_people_about_this_principle_count_and_an_adjudication_alone(tmp_path):
    people = source(tmp_path, principle="How kind?", timeout_s=0.1)
    (task, *_) = people.tasks(RECORDS, ANSWERS)
    with Store(people.store) as store:
        store.add([rating(task, 1), rating(task, 2, "judge", "ai", principle="How kind?")])
        assert not people(RECORDS, ANSWERS, ROLLOUT).valid.any()
        store.add([rating(task, 2, principle="How kind?"), rating(task, 3, "ben", principle="How kind?")])
        assert people(RECORDS, ANSWERS, ROLLOUT).values[0, 0] == pytest.approx(0.375)
        store.add([rating(task, 5, ADJUDICATED + "ben", principle="How kind?")])
        assert people(RECORDS, ANSWERS, ROLLOUT).values[0, 0] == 1
        made = rating(task, 4, ADJUDICATED + "ann", principle="How kind?", time=2000.0)
        earlier = rating(task, 1, ADJUDICATED + "ann", principle="How kind?", time=1000.0)
        store.add([made, earlier])  # as a file of another store brings them
        assert people(RECORDS, ANSWERS, ROLLOUT).values[0, 0] == pytest.approx(0.75)


def test_a_reward_function_gets_the_judgements_of_each_row(tmp_path):
    rows = []

    def keep(records, answers, rollout, judgements):
        rows.extend(judgements)
        return mean_rating(records, answers, rollout, judgements)

    people = source(tmp_path, timeout_s=0.1, limit=1, reward_fn=keep)
    (task,) = people.tasks(RECORDS, ANSWERS)
    with Store(people.store) as store:
        store.add([rating(task, 5)])
    assert people(RECORDS, ANSWERS, ROLLOUT).valid[:, 0].tolist() == [True, False, False, False]
    assert [len(row) for row in rows] == [1, 0, 0, 0]


def test_a_tie_counts_half():
    tie = Ranking(prompt="p", answers=("a", "b"), rater=Rater("r", "person"), status="tie", ranks=(1, 1), both_bad=True)
    judged = win_share([{}] * 2, ["b", "c"], ROLLOUT, [[tie], [tie]])
    assert judged.values[:, 0].tolist() == [0.5, 0.0] and judged.valid[:, 0].tolist() == [True, False]


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"kind": CHAT}, "people.kind"),
        ({"kind": EDIT}, "people.reward_fn"),
        ({"enough": 0}, "enough"),
        ({"overlap": 0}, "overlap"),
        ({"limit": 0}, "limit"),
    ],
)
def test_settings_that_cannot_be(tmp_path, wrong, words):
    with pytest.raises(UserError, match=words):
        source(tmp_path, **wrong)


def test_people_and_a_rule_together(tmp_path):
    people = source(tmp_path, limit=1)
    rule = FunctionSource(lambda record, answer: float(len(answer)))
    with Crowd(people.store, lambda task, who: rating(task, 5, who)):
        judged = MixedSource((people, rule), (1.0, 1.0))(RECORDS, ANSWERS, ROLLOUT)
    assert judged.valid.all() and judged.values[:, 0].tolist() == [4.5, 1.0, 4.0, 4.0]
