"""Tasks as JSON: read back, and every fault named."""

import json

import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.people.kinds import COMPARE
from rlaif_jax.feedback.people.tasks import PersonTask, read_tasks, task_from_json, task_to_json

HALF = "\ud83d"


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


@pytest.mark.parametrize(
    "wrong",
    [{"prompt": HALF}, {"answers": ["a" + HALF]}, {"labels": [HALF]}, {"principle": HALF}, {"generators": [HALF]}],
)
def test_half_a_character_is_refused_where_tasks_are_read(tmp_path, wrong):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({"kind": "rate", "prompt": "p 🎉", "answers": ["a"]} | wrong))
    good, (message,) = read_tasks(path)
    assert good == [] and f"{path}:1: {next(iter(wrong))} holds half a character" in message
