"""Rewards from judgements: numbers by hand, and missing judgements stay missing."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.data.tokenizers import word_level_tokenizer
from rlaif_jax.feedback.judges.sentiment import LogOdds
from rlaif_jax.feedback.record_rewards import (
    CommentValence,
    CorrectionRewards,
    JudgementSource,
    RankingUtility,
    group_by_answer,
    mean_rating,
    standard_rating,
    win_share,
)
from rlaif_jax.feedback.records.forms import Comment, Correction, Ranking, Rater, Rating, Span
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.rewards.rankings import fit_plackett_luce

ANNA, BEN = Rater("anna", "simulated"), Rater("ben", "simulated")
RECORDS = [{"prompt": "p"}, {"prompt": "p"}, {"prompt": "q"}, {"prompt": "q"}]
ANSWERS = ["one", "two", "one", "three"]


def rating(prompt, answer, value, rater=ANNA, **more):
    return Rating(prompt=prompt, answers=(answer,), rater=rater, value=value, **more)


def rewards_of(reward_fn, judgements, records=RECORDS, answers=ANSWERS, rollout=None):
    return reward_fn(records, answers, rollout, group_by_answer(records, answers, judgements))


def test_rows_are_found_by_prompt_and_answer():
    given = [rating("p", "one", 3), rating("q", "one", 4), rating("q", "four", 5)]
    assert group_by_answer(RECORDS, ANSWERS, given) == [[given[0]], [], [given[1]], []]


def test_standard_ratings_are_free_of_a_raters_generosity_and_stretch():
    given = [rating("p", "one", 2), rating("p", "two", 4), rating("q", "one", 9, BEN), rating("q", "three", 10, BEN)]
    feedback = rewards_of(standard_rating, given)
    np.testing.assert_allclose(feedback.values[:, 0], [-1, 1, -1, 1], atol=1e-6)
    assert feedback.valid.all()
    assert rewards_of(mean_rating, given).values[:, 0].tolist() == pytest.approx([1 / 9, 3 / 9, 8 / 9, 1])


def test_two_wordings_under_one_name_are_standardised_apart():
    kind, strict = (Rater("gpt", "ai", model="gpt", prompt_hash=wording) for wording in ("t1:item", "t2"))
    given = [rating("p", "one", 2, strict), rating("p", "two", 4, strict), rating("q", "one", 9, kind)]
    given += [rating("q", "three", 10, Rater("gpt", "ai", model="gpt", prompt_hash="t1:other"))]
    np.testing.assert_allclose(rewards_of(standard_rating, given).values[:, 0], [-1, 1, -1, 1], atol=1e-6)


def test_what_has_no_rating_or_no_value_is_missing():
    refused = Rating(prompt="p", answers=("two",), rater=ANNA, status="refused")
    for reward_fn in (standard_rating, mean_rating, win_share, RankingUtility(most=2)):
        feedback = rewards_of(reward_fn, [refused])
        assert not feedback.valid.any()
        assert not feedback.values.any()
    given = [rating("p", "one", 2), refused, rating("q", "one", 4), rating("q", "three", 6)]
    assert rewards_of(standard_rating, given).valid[:, 0].tolist() == [True, False, True, True]


def test_rankings_become_plackett_luce_utilities():
    records = [{"prompt": "p"}] * 3 + [{"prompt": "q"}] * 3
    answers = ["a", "b", "c", "c", "d", "e"]
    given = [
        Ranking(prompt="p", answers=("b", "a", "c"), rater=ANNA, ranks=(1, 2, 3)),
        Ranking(prompt="p", answers=("a", "b", "c"), rater=BEN, ranks=(1, 2, 3)),
        Ranking(prompt="q", answers=("c", "d", "e"), rater=ANNA, ranks=(None, 2, 1)),
    ]
    feedback = rewards_of(RankingUtility(most=3, ridge=0.5), given, records, answers)
    items, ranks = jnp.array([[1, 0, 2], [0, 1, 2]]), jnp.array([[1, 2, 3], [1, 2, 3]])
    np.testing.assert_allclose(
        feedback.values[:3, 0], fit_plackett_luce(items, ranks, num_items=3, ridge=0.5), atol=1e-5
    )
    assert feedback.values[0, 0] == pytest.approx(feedback.values[1, 0], abs=1e-5)
    assert feedback.values[0, 0] > feedback.values[2, 0]
    assert feedback.valid[:, 0].tolist() == [True, True, True, False, True, True]
    assert feedback.values[3, 0] == 0
    assert feedback.values[5, 0] > 0 > feedback.values[4, 0]
    assert rewards_of(win_share, given[:2], records, answers).values[:3, 0].tolist() == [0.75, 0.75, 0]


def test_comments_become_their_mean_valence():
    odds = {"good": 2.0, "bad": -1.0, "xyz": 0.0}
    sentiment = SimpleNamespace(
        log_odds=lambda texts: LogOdds(np.array([odds[t] for t in texts]), np.array([t != "xyz" for t in texts]))
    )
    given = [
        Comment(prompt="p", answers=(answer,), rater=ANNA, text=text)
        for answer, text in (("one", "good"), ("one", "bad"), ("two", "xyz"))
    ]
    feedback = rewards_of(CommentValence(sentiment), given)
    assert feedback.valid[:, 0].tolist() == [True, False, False, False]
    assert feedback.values[0, 0] == pytest.approx((np.tanh(1.0) + np.tanh(-0.5)) / 2)
    assert not rewards_of(CommentValence(sentiment), []).valid.any()


def test_corrections_become_edit_rates_and_blame_single_tokens():
    tokenizer = word_level_tokenizer(("a", "b", "c", "d"))
    eos = tokenizer.eos_id
    answers = ["a b c", "d d", "a", "b"]
    ids = np.full((4, 5), tokenizer.pad_id, np.int32)
    for row, answer in zip(ids, answers):
        own = [*tokenizer.encode(answer), eos]
        row[: len(own)] = own
    mask = np.arange(5) < np.array([4, 3, 2, 2])[:, None]
    rollout = SimpleNamespace(responses=ids, response_mask=mask, finished=np.ones(4, bool))
    given = [
        Correction(prompt="p", answers=("a b c",), rater=ANNA, edited="a d c"),
        Correction(prompt="p", answers=("d d",), rater=ANNA, edited="d"),
        Correction(prompt="q", answers=("a",), rater=ANNA, edited="a"),
        Correction(prompt="q", answers=("b",), rater=ANNA, status="refused"),
    ]
    feedback = rewards_of(CorrectionRewards(tokenizer, length=8, dense=0.5), given, RECORDS, answers, rollout)
    np.testing.assert_allclose(feedback.values[:, 0], [-1 / 4, -1 / 2, 0, 0])
    assert feedback.valid[:, 0].tolist() == [True, True, True, False]
    np.testing.assert_allclose(feedback.token_rewards[0], [0, -0.5, 0, 0, 0])
    assert feedback.token_rewards[1].sum() == pytest.approx(-0.5)
    assert not feedback.token_rewards[2:].any()


def test_a_correction_of_nothing_is_no_edit_however_the_answer_was_written():
    # A tokenizer may write one text in several ways: what was not edited is compared with what was sampled.
    letters = {"a": 3, "b": 4, "ab": 5}
    names = {number: name for name, number in letters.items()}
    tokenizer = SimpleNamespace(
        eos_id=1,
        pad_id=0,
        encode=lambda text: [letters[text]] if text in letters else [letters[c] for c in text if c in letters],
        decode=lambda ids: "".join(" " if i == 2 else names.get(i, "") for i in ids),
    )
    ids = np.array([[2, 3, 4, 1], [2, 3, 4, 1]], np.int32)
    rollout = SimpleNamespace(responses=ids, response_mask=np.ones((2, 4), bool), finished=np.ones(2, bool))
    given = [
        Correction(prompt="p", answers=("ab",), rater=ANNA, edited="ab"),
        Correction(prompt="q", answers=("ab",), rater=ANNA, spans=(Span(1, 2, -2.0),)),
    ]
    records = [{"prompt": "p"}, {"prompt": "q"}]
    feedback = rewards_of(
        CorrectionRewards(tokenizer, length=6, dense=0.5, kept=0.0), given, records, ["ab"] * 2, rollout
    )
    np.testing.assert_array_equal(feedback.values[:, 0], [0, 0])
    assert feedback.valid.all()
    np.testing.assert_allclose(feedback.token_rewards, [[0, 0, 0, 0], [0, 0, -1, 0]])


def test_more_answers_than_expected_are_ranked_all_the_same():
    given = [Ranking(prompt="p", answers=("one", "two", "three"), rater=ANNA, ranks=(1, 2, 3))]
    feedback = rewards_of(RankingUtility(most=2), given, [{"prompt": "p"}] * 3, ["one", "two", "three"])
    assert feedback.values[0, 0] > feedback.values[1, 0] > feedback.values[2, 0]


def test_a_source_of_records_keeps_them(tmp_path):
    def judge(prompts, answers):
        return [rating(p, a, 1 + len(a)) for p, a in zip(prompts, answers)]

    with Store(tmp_path / "feedback.sqlite") as store:
        source = JudgementSource(judge, mean_rating, store)
        feedback = source(RECORDS, ANSWERS, None)
        assert len(store) == 4
        source(RECORDS, ANSWERS, None)
        assert len(store) == 4, "the same judgement twice is one"
    np.testing.assert_allclose(feedback.values[:, 0], [3 / 9, 3 / 9, 3 / 9, 5 / 9])
