"""Measures of published feedback, on small files: what the intervals draw, and what is left out."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_jax.feedback.records.forms import Ranking, Rater
from rlaif_jax.quality.intervals import Jackknife, share_interval
from rlaif_jax.quality.statistics import interval_alpha, interval_moments, lowest_interval_alpha
from rlaif_jax.recipes.published import compare_models, judge_in_both_orders, order_agreement, ranked, summaries
from tests.recipes.squality_file import turning, upwards, write_squality


def test_the_interval_of_workers_agreement_is_over_questions(tmp_path):
    """In even questions the second worker agrees in everything, in odd ones in nothing."""
    rows = list(summaries(write_squality(tmp_path, upwards, turning)))
    alphas, alike = rows[:3], rows[3:]
    moments = [
        sum(interval_moments([0.9 - 0.3 * k, 0.9 - 0.3 * (2 - k if q % 2 else k)]) for k in range(3)) for q in range(12)
    ]
    expected = Jackknife().estimate(np.array(moments), interval_alpha, lowest=lowest_interval_alpha)
    for row in alphas:
        assert (row.value, row.low, row.high) == pytest.approx(tuple(expected[k] for k in ("value", "low", "high")))
    by_question = [float(q % 2 == 0) for q in range(12)]
    for row in alike:
        assert (row.value, row.low, row.high) == pytest.approx(share_interval(by_question))


def test_an_item_that_no_rating_is_left_of_is_not_compared():
    item, rater = np.array([0, 0, 1, 1, 2, 2, 3], np.int32), np.array([0, 1, 0, 1, 0, 1, 0], np.int32)
    value = np.array([1, 2, 2, 3, 3, 4, 9], np.float32)
    utilities = ranked(item, rater, value, np.arange(7) != 6, 4, 2)
    assert all(np.isnan(scores).tolist() == [False, False, False, True] for scores in utilities.values())
    rows = list(compare_models(utilities, np.array([1.0, 2, 3, 9]), 0, ""))
    assert [row.value for row in rows[:3]] == pytest.approx([1, 1, 1])  # with item 3 as 0 it would be less


# ---- Judges in both orders


def reply(prompt, shown, says):
    """A judge's reply: 0 or 1 is better, "tie", or None: not read."""
    ranks = {0: (1, 2), 1: (2, 1), "tie": (1, 1), None: ()}[says]
    status = {None: "unparsed", "tie": "tie"}.get(says, "ok")
    return Ranking(prompt=prompt, answers=("a", "b"), rater=Rater("j", "ai"), ranks=ranks, status=status, shown=shown)


def test_two_unread_replies_are_no_agreement():
    replies = [(None, None), (None, 1), (0, 0), (0, 1), ("tie", "tie"), ("tie", 0)]
    records = [reply(f"p{i}", s, v) for i, pair in enumerate(replies) for s, v in zip(((0, 1), (1, 0)), pair)]
    assert order_agreement(records) == ([True, False, True, False], 2)
    assert order_agreement([reply("p", (0, 1), 0)]) == ([], 1)  # one order alone
    assert order_agreement([reply("p", (0, 1), 0), reply("p", (0, 1), 0)]) == ([], 1)  # one order twice
    assert order_agreement([]) == ([], 0)


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from([0, 1, "tie", None])] * 2)))
def test_a_pair_agrees_where_both_replies_were_read_and_are_equal(replies):
    records = [reply(f"p{i}", s, v) for i, pair in enumerate(replies) for s, v in zip(((0, 1), (1, 0)), pair)]
    same, left_out = order_agreement(records)
    assert same == [one == two for one, two in replies if one is not None and two is not None]
    assert left_out == len(replies) - len(same)


def test_every_subset_is_read_and_unread_replies_are_neither_right_nor_alike(tmp_path):
    """Of 4 pairs of another subset: agreed and right, agreed and wrong, one unread, both unread."""
    says = [("Output (a)", "Output (b)"), ("Output (b)", "Output (a)"), ("?", "Output (b)"), ("?", "?")]
    place = {"Output (a)": 0, "Output (b)": 1}
    item = lambda i: {"input": f"q{i}", "output_1": f"one {i}", "output_2": f"two {i}"}
    gold = [item(i) | {"label": 1} for i in range(4)]
    winner = lambda text, swapped: None if text not in place else str(1 + (place[text] ^ swapped))
    rows = [
        item(i)
        | {"results": [{f"swap = {bool(k)}": {"completion": [t], "winner": winner(t, k)} for k, t in enumerate(pair)}]}
        for i, pair in enumerate(says)
    ]
    (tmp_path / "LLMBar_Adversarial_Manual.json").write_text(json.dumps(gold))
    (tmp_path / "judges").mkdir()
    (tmp_path / "judges" / "Adversarial_Manual.gpt-3.5.Vanilla.json").write_text(json.dumps(rows))
    (tmp_path / "judges" / "Natural.gpt-3.5.Vanilla.json").write_text("[]")
    (row,) = judge_in_both_orders(tmp_path / "LLMBar_Adversarial_Manual.json", tmp_path / "judges")
    assert (row.name, row.value) == ("gpt-3.5 Vanilla: both orders agree", 1.0)
    assert "right 0.600" in row.note and "re-read alike 1.000" in row.note  # 3 of 5 verdicts that were read
    assert "2 of 4 pairs with an unread reply are left out" in row.note
