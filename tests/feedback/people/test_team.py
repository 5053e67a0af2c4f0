"""The raters of a page, and their requests to stop a run."""

import pytest

from rlaif_jax.feedback.people.queue import TaskQueue


@pytest.fixture
def queue(tmp_path):
    with TaskQueue(tmp_path / "f.sqlite") as queue:
        yield queue


def test_stop_is_heard_by_those_who_came_before_it(queue):
    assert not queue.team.stop_requested()
    queue.team.request_stop("anna")
    early, late = 0, queue.team.last_stop
    assert queue.team.stop_requested(early) and not queue.team.stop_requested(late)
    queue.team.request_stop("anna", False)
    assert not queue.team.stop_requested(early)


def test_those_who_answer_are_those_named_last(queue):
    assert queue.team.raters == frozenset()
    queue.team.register(["anna", "ben"])
    queue.team.register(["ben", "eve"])
    assert queue.team.raters == {"ben", "eve"}
