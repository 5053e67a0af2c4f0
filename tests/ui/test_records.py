"""From what the page sends to records: the order on the screen is undone, bad input is named."""

import time

import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.people import kinds
from rlaif_jax.feedback.people.chats import Turn
from rlaif_jax.feedback.people.tasks import PersonTask
from rlaif_jax.feedback.records.forms import Ranking, Rater, Rating, to_json
from rlaif_jax.feedback.records.parsing import from_json
from rlaif_jax.ui.records import AnswerContext, in_words, retraction, shown_order

ANNA = Rater("anna", "person")
COMPARE = PersonTask(kind=kinds.COMPARE, prompt="p", answers=("left", "right"), generators=("m1", "m2"))
RANK = PersonTask(kind=kinds.RANK, prompt="p", answers=("a", "b", "c", "d"))
RATE = PersonTask(kind=kinds.RATE, prompt="p", answers=("a",), low=1, high=10, principle="How kind?")
EDIT = PersonTask(kind=kinds.EDIT, prompt="p", answers=("héllo\r\nwörld 🎉 end",), labels=("fact",))
COMMENT = PersonTask(kind=kinds.COMMENT, prompt="p", answers=("a",), labels=("tone",))
CHAT = PersonTask(kind=kinds.CHAT, prompt="mills")


def records(task, payload, shown=None, turns=(), informed=False):
    order = tuple(range(len(task.answers))) if shown is None else shown
    return AnswerContext(task, ANNA, order, 12.34, 1000.0, tuple(turns), informed).records(payload)


@pytest.mark.parametrize("shown", [(0, 1), (1, 0)])
@pytest.mark.parametrize("choice, place", [("first", 0), ("second", 1)])
def test_a_comparison_names_the_answer_whatever_its_side(shown, choice, place):
    (record,) = records(COMPARE, {"choice": choice, "margin": 4}, shown)
    assert isinstance(record, Ranking)
    assert record.ranks[shown[place]] == 1 and record.ranks[shown[1 - place]] == 2
    assert (record.strength, record.shown, record.call.latency_s, record.time) == (4.0, shown, 12.3, 1000.0)
    assert record.answers == COMPARE.answers and record.generators == ("m1", "m2")
    assert in_words(record, shown) == f"the {choice} is better, by 4 of 5"
    assert from_json(to_json(record)).id == record.id


def test_ties_and_both_bad():
    (tie,) = records(COMPARE, {"choice": "tie"})
    (bad,) = records(COMPARE, {"choice": "both_bad", "note": "no"})
    assert (tie.status, tie.both_bad, list(tie.pairs())) == ("tie", False, [(0, 1, 0.5)])
    assert (bad.status, bad.both_bad, bad.raw) == ("tie", True, "no")


def test_a_ranking_by_places_on_the_screen():
    # On the screen c, a, d, b; best is place 1 (a), then places 0 and 3 tied (c, b); place 2 (d) is left out.
    (record,) = records(RANK, {"order": [[1], [0, 3]]}, shown=(2, 0, 3, 1))
    assert record.ranks == (1, 2, 2, None)
    (two_firsts,) = records(RANK, {"order": [[0, 1], [2], [3]]})
    assert two_firsts.ranks == (1, 1, 3, 4)
    (even,) = records(RANK, {"order": [[0, 1, 2, 3]]})
    assert even.status == "tie" and even.ranks == (1, 1, 1, 1)
    assert "“a” = “b” > “c” > “d”" in in_words(two_firsts)


def test_marks_count_characters_and_line_ends_come_back():
    answer = EDIT.answers[0]
    start = answer.index("wörld")
    (record,) = records(
        EDIT, {"edited": None, "spans": [{"start": start, "end": start + 7, "value": -2, "category": "fact"}]}
    )
    assert answer[record.spans[0].start : record.spans[0].end] == "wörld 🎉"
    (unchanged,) = records(EDIT, {"edited": answer.replace("\r\n", "\n")})
    assert unchanged.edited == answer and in_words(unchanged) == "nothing to change"


def test_ratings_comments_and_conversations():
    (rating,) = records(RATE, {"value": 7})
    assert isinstance(rating, Rating) and (rating.value, rating.low, rating.high) == (7.0, 1.0, 10.0)
    assert rating.principle == "How kind?"
    (comment,) = records(COMMENT, {"text": " too curt ", "aspects": ["tone"]})
    assert (comment.text, comment.aspects) == ("too curt", ("tone",))
    turns = (Turn("hi", "hello"), Turn("mill?", "old"))
    rated, said = records(CHAT, {"turns": [{"turn": 1, "value": 4, "comment": "short"}]}, turns=turns)
    assert rated.answers == ("old",) and rated.value == 4
    assert rated.prompt == "[mills]\n\nHuman: hi\n\nAssistant: hello\n\nHuman: mill?\n\nAssistant:"
    assert said.text == "short"


def test_a_skip_and_a_retraction_are_records():
    (skip,) = AnswerContext(COMPARE, ANNA, (0, 1), 1.0, 5.0).skipped("not my topic")
    assert (skip.status, skip.raw, skip.answered) == ("abstained", "not my topic", False)
    back = retraction(skip, 6.0)
    assert (back.status, back.supersedes, back.form) == ("retracted", skip.id, "ranking")


def test_an_answer_after_the_suggestion_says_so():
    (record,) = records(RATE, {"value": 7, "note": "hm"}, informed=True)
    assert record.raw == "[after seeing the suggestion] hm"


@pytest.mark.parametrize(
    "task, payload, words",
    [
        (COMPARE, {"choice": "left"}, "choice is 'left'; it is one of first, second, tie, both_bad"),
        (COMPARE, {"choice": "first", "margin": 6}, "margin is 6; it is 1 to 5"),
        (COMPARE, {"choice": "first", "margin": True}, "margin"),
        (RANK, {"order": [[0], [4]]}, "order names the place 4; there are 0 .. 3"),
        (RANK, {"order": [[0], [0]]}, "an answer twice"),
        (RANK, {"order": [[0]]}, "fewer than two"),
        (RANK, {"order": "012"}, "order must be a list"),
        (RATE, {"value": 11}, "value is 11, off the scale 1 .. 10"),
        (RATE, {"value": 7.5}, "whole number"),
        (EDIT, {"spans": []}, "edited answer or marked spans"),
        (EDIT, {"spans": [{"start": 3, "end": 99}]}, "does not lie in the answer"),
        (EDIT, {"spans": [{"start": 0, "end": 2, "category": "x"}]}, "unknown kind 'x'; this task knows fact"),
        (COMMENT, {"text": "  "}, "the comment is empty"),
        (COMMENT, {"text": "x", "aspects": ["y"]}, "aspects must be among tone"),
        (CHAT, {"turns": [{"turn": 0, "value": 3}]}, "there is no turn 0"),
        (CHAT, {"turns": [{"turn": "0" * 100}]}, "there is no turn 0{40} in"),
        (CHAT, {"turns": []}, "rate at least one reply"),
    ],
)
def test_what_the_task_does_not_allow_is_named(task, payload, words):
    with pytest.raises(UserError, match=words):
        records(task, payload)


def test_each_rater_has_an_own_order_and_keeps_it():
    orders = [shown_order(RANK, f"rater {i}", 0) for i in range(200)]
    assert orders == [shown_order(RANK, f"rater {i}", 0) for i in range(200)]
    counts = [sum(order[0] == i for order in orders) for i in range(4)]
    assert min(counts) > 25  # 50 expected; 25 is 4 deviations away
    assert orders != [shown_order(RANK, f"rater {i}", 1) for i in range(200)]
    turned = PersonTask(kind=kinds.RANK, prompt="p", answers=("d", "c", "b", "a"))
    for i in range(20):  # the order in which answers were put does not influence their places
        first, second = shown_order(RANK, f"rater {i}", 0), shown_order(turned, f"rater {i}", 0)
        assert [RANK.answers[k] for k in first] == [turned.answers[k] for k in second]


def test_a_post_of_many_turns_holds_nobody_up():
    """Looked for among all others, 20,000 turns take seconds of the one thread that serves all raters."""
    payload = {"turns": [{"turn": turn} for turn in range(20_000)]}
    started = time.thread_time()
    with pytest.raises(UserError, match="there is no turn 1 in this conversation"):
        records(CHAT, payload, turns=(Turn("hi", "hello"),))
    assert time.thread_time() - started < 0.5
