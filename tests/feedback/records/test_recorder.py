"""What is on record after a judge is asked again: by the texts shown, in one transaction, each payment once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif_jax.feedback.api.builtin_templates import PAIRWISE
from rlaif_jax.feedback.api.templates import Question
from rlaif_jax.feedback.api.verdicts import ParsedVerdict, make_judgement, preference
from rlaif_jax.feedback.records.forms import Call, Judgement, Ranking, Rater, Rating
from rlaif_jax.feedback.records.recorder import Recorder, in_order_of
from rlaif_jax.feedback.records.store import Store

JUDGE = Rater("j", "ai")


def verdict(question: Question, order: tuple[int, int], p_first: float | None, time: float = 1.0) -> Judgement:
    """The judge's verdict with P(the answer shown first is better); None = it failed."""
    parsed = ParsedVerdict("error")
    if p_first is not None:
        parsed = ParsedVerdict("ok", "A" if p_first > 0.5 else "B", p_first, (p_first, 1 - p_first, 0.0), 1.0)
    return make_judgement(question, PAIRWISE, parsed, order=order, rater=JUDGE, seed=0, time=time)


def test_a_known_verdict_answers_the_question_with_its_answers_in_the_other_order(tmp_path: Path):
    recorder = Recorder(tmp_path / "f.sqlite")
    before, now = Question("p", ("b", "a"), generators=("x", "y")), Question("p", ("a", "b"), generators=("y", "x"))
    for order, p in (((0, 1), 0.95), ((1, 0), 0.05)):  # b is better, in both orders
        recorder.record(verdict(before, order, p))
    found = [recorder.record(verdict(now, order, None, 2.0)) for order in ((0, 1), (1, 0))]  # the server is down
    known = preference(found)
    assert known is not None and known.probability == pytest.approx(0.05) and known.consistent
    assert all(entry.answers == ("a", "b") and entry.generators == ("y", "x") for entry in found)
    # The same verdict again, asked in the new order, is no new record.
    again = [recorder.record(verdict(now, order, p, 3.0)) for order, p in (((1, 0), 0.95), ((0, 1), 0.05))]
    recorder.close()
    assert {entry.shown for entry in again} == {(0, 1), (1, 0)}
    with Store(tmp_path / "f.sqlite") as store:
        assert len(store) == 2


@given(st.permutations(["a", "b", "c", "b"]), st.data())
def test_a_turned_ranking_says_the_same(answers: list[str], data: st.DataObject):
    ranks = data.draw(st.lists(st.integers(1, 3), min_size=4, max_size=4))
    shown = tuple(data.draw(st.permutations(range(4))))
    entry = Ranking(prompt="p", answers=("a", "b", "c", "b"), rater=JUDGE, ranks=tuple(ranks), shown=shown)
    turned = in_order_of(tuple(answers), entry)
    assert isinstance(turned, Ranking) and turned.answers == tuple(answers)
    assert sorted(zip(turned.answers, turned.ranks)) == sorted(zip(entry.answers, entry.ranks))
    assert [turned.answers[i] for i in turned.shown] == [entry.answers[i] for i in entry.shown]
    assert [turned.ranks[i] for i in turned.shown] == [entry.ranks[i] for i in entry.shown]


def test_a_turned_pair_has_the_other_probability_and_winner():
    entry = Ranking(prompt="p", answers=("a", "b"), rater=JUDGE, beats=((1, 0),), probability=0.2, shown=(1, 0))
    turned = in_order_of(("b", "a"), entry)
    assert isinstance(turned, Ranking)
    assert (turned.beats, turned.probability, turned.shown) == (((0, 1),), 0.8, (0, 1))


def rating(value: float, call: Call = Call()) -> Rating:
    return Rating(prompt="p", answers=("a",), rater=JUDGE, value=value, time=1.0, call=call)


def test_a_payment_is_counted_once_however_often_its_reply_is_read(tmp_path: Path):
    recorder, paid = Recorder(tmp_path / "f.sqlite"), Call(1.0, 50, 10, 0.25)
    recorder.record(rating(3, paid), paid)
    for value in (4, 5):  # read anew from the cache
        recorder.record(rating(value, paid), Call())
    recorder.close()
    with Store(tmp_path / "f.sqlite") as store:
        entries = store.judgements(superseded=True)
    assert [entry.value for entry in entries] == [3, 4, 5]  # type: ignore[attr-defined]
    assert sum(entry.call.cost for entry in entries) == 0.25 and sum(e.call.prompt_tokens for e in entries) == 50
    # After a kill between the cache and the store, the first record has the whole cost.
    recorder = Recorder(tmp_path / "other.sqlite")
    assert recorder.record(rating(3, paid), Call()).call == paid
    recorder.close()


def test_recorders_at_the_same_time_leave_one_live_record(tmp_path: Path):
    path, ready = tmp_path / "f.sqlite", threading.Barrier(8)
    Store(path).close()

    def work(value: int) -> None:
        recorder = Recorder(path)
        ready.wait()
        for _ in range(5):
            recorder.record(rating(value))
        recorder.close()

    threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Store(path) as store:
        assert len(store.judgements()) == 1
