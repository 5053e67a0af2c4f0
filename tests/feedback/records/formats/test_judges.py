"""AI judges' verdicts in other tools' shapes, on small hand-made files."""

from __future__ import annotations

import json

import pytest

from rlaif_jax.feedback.records.formats import judges
from rlaif_jax.feedback.records.forms import Call, Ranking, Rater
from tests.feedback.records.formats.verdicts import verdicts


def test_alpaca_eval(write):
    row = {
        "instruction": "i",
        "output_1": "a",
        "output_2": "b",
        "generator_1": "m",
        "generator_2": "n",
        "annotator": "gpt",
    }
    found = [1, 2, 1.5, 0, 1.2, None]
    path = write(
        "a.json",
        json.dumps([row | {"preference": p, "price_per_example": 0.5} for p in [*found, 3]]).replace("null", "NaN"),
    )
    good, bad = judges.read_alpaca_eval(path)
    assert [(j.ranks, j.probability, j.status) for j in good] == [
        ((1, 2), 1, "ok"), ((2, 1), 0, "ok"), ((1, 1), 0.5, "tie"), ((1, 1), 0.5, "tie"), ((1, 2), 0.8, "ok"),
        ((), None, "unparsed"),
    ]  # fmt: skip
    assert bad == [f"{path}:1: preference is 3.0; it runs from 1 to 2"]
    assert good[0].rater == Rater("gpt", "ai") and good[0].generators == ("m", "n") and good[0].call.cost == 0.5
    unknown = write("n.json", [row | {"preference": 1, "price_per_example": float("nan"), "time_per_example": -1}])
    assert [j.call for j in judges.read_alpaca_eval(unknown)[0]] == [Call()]
    assert judges.write_alpaca_eval(good, path) == 6
    assert judges.read_alpaca_eval(path) == (good, [])


def test_fastchat_pairs_scores_and_votes(write):
    questions = write("q.jsonl", {"question_id": 81, "turns": ["ask", "more"]})
    said = [
        write(f"{m}.jsonl", {"model_id": m, "question_id": 81, "choices": [{"turns": [m + "1", m + "2"]}]})
        for m in "mn"
    ]
    game = {"question_id": 81, "model_1": "m", "model_2": "n", "judge": ["gpt-4", "pair-v2"], "tstamp": 5.0}
    vote = {"question_id": 81, "model_a": "m", "model_b": "n", "judge": "author_1", "turn": 2}
    path = write(
        "j.jsonl",
        game | {"g1_winner": "model_1", "g2_winner": "model_2", "turn": 1, "g1_judgment": "[[A]]"},
        game | {"g1_winner": "tie", "g2_winner": "error", "turn": 2},
        {"question_id": 81, "model": "m", "judge": ["gpt-4", "single-v1"], "score": 7, "judgment": "[[7]]"},
        {"question_id": 81, "model": "m", "judge": ["gpt-4", "single-v1"], "score": -1},
        vote | {"winner": "model_b"},
        vote | {"winner": "tie (bothbad)"},
        game | {"g1_winner": "A", "g2_winner": "tie"},
    )
    good, bad = judges.read_fastchat(path, questions, said)
    second = ("m1\n\nHuman: more\n\nAssistant: m2", "n1\n\nHuman: more\n\nAssistant: n2")
    assert [(j.prompt, j.answers, j.status, isinstance(j, Ranking) and j.ranks, j.shown) for j in good] == [
        ("ask", ("m1", "n1"), "ok", (1, 2), (0, 1)),
        ("ask", ("m1", "n1"), "ok", (2, 1), (1, 0)),
        ("ask", second, "tie", (1, 1), (0, 1)),
        ("ask", second, "unparsed", (), (1, 0)),
        ("ask", ("m1",), "ok", False, ()),
        ("ask", ("m1",), "unparsed", False, ()),
        ("ask", second, "ok", (2, 1), ()),
        ("ask", second, "tie", (1, 1), ()),
    ]
    assert good[0].raw == "[[A]]" and good[0].time == 5 and good[4].value == 7 and good[7].both_bad
    assert good[0].rater.source == "ai" and good[6].rater == Rater("author_1", "person")
    assert bad == [f"{path}:7: g1_winner is 'A'"]
    assert judges.read_fastchat(path)[0][0].prompt == "question 81, turn 1"
    assert judges.read_fastchat(path)[0][0].answers == ("m", "n")


def test_pandalm_people_and_judges(write):
    row = {"instruction": "i", "input": "x", "response1": "a", "response2": "b", "cmp_key": "m_n"}
    votes = {"annotator1": 0, "annotator2": 1, "annotator3": 2}
    path = write("p.jsonl", {"idx": 0} | row | votes, {"idx": 1} | row | votes | {"annotator2": 3, "response1": True})
    judge = write(
        "g.jsonl",
        {"idx": 0, "gpt_result": "Tie", "gpt_reason": "since"},
        {"idx": 1, "gpt_result": "garbage", "gpt_reason": ""},
        {"idx": 2, "gpt_result": 1, "gpt_reason": ""},
    )
    good, bad = judges.read_pandalm(path, [judge])
    assert [(j.rater.name, j.answers, j.ranks, j.status, j.raw) for j in good] == [
        ("annotator1", ("a", "b"), (1, 1), "tie", ""),
        ("annotator2", ("a", "b"), (1, 2), "ok", ""),
        ("annotator3", ("a", "b"), (2, 1), "ok", ""),
        ("annotator1", ("True", "b"), (1, 1), "tie", ""),
        ("annotator3", ("True", "b"), (2, 1), "ok", ""),
        ("gpt", ("a", "b"), (1, 1), "tie", "since"),
        ("gpt", ("True", "b"), (), "unparsed", "garbage"),
    ]
    assert good[0].prompt == "i\n\nx" and good[0].generators == ("m", "n") and good[-1].rater.source == "ai"
    assert bad == [
        f"{path}:2: annotator2 is 3; 0 is a tie, 1 and 2 are the responses", f"{judge}:3: idx 2 is no pair of {path}"
    ]  # fmt: skip
    both = write("b.jsonl", {"idx": 0, "gpt_result": 1, "llama_result": 2})
    good, bad = judges.read_pandalm(path, [both])
    assert len(good) == 5 and bad[1] == f"{both}:1: verdicts of several judges: gpt_result, llama_result"


@pytest.mark.parametrize("raw, value", [("7.", 7), ("Score: 8/10", 8), ("7.5 out of 10", 7.5), ("Output 1: 8", None)])
def test_llmbar_scores_are_one_number(write, raw, value):
    result = {"score_1": [raw], "score_2": [raw]}
    path = write("s.json", [{"input": "p", "output_1": "a", "output_2": "b", "results": [result]}])
    good, _ = judges.read_llmbar_judge(path, "m")
    assert [j.value if j.answered else None for j in good] == [value, value]


def test_fastchat_takes_no_other_text_for_an_answer(write):
    """Neither a model's name nor its answer of the first turn."""
    questions = write("q.jsonl", {"question_id": 81, "turns": ["ask", "more"]})
    said = [write("m.jsonl", {"model_id": "m", "question_id": 81, "choices": [{"turns": ["m1", "m2"]}]})]
    score = {"question_id": 81, "model": "m", "score": 7}
    path = write(
        "j.jsonl", score | {"turn": 2}, score | {"model": "n"}, score | {"turn": 3}, score | {"question_id": 82}
    )
    good, bad = judges.read_fastchat(path, None, said)
    assert [(j.prompt, j.answers) for j in good] == [("question 81, turn 2", ("m2",))]
    assert [message.split(": ", 1)[1] for message in bad] == [
        "the files of answers have none of n to question 81", "turn 3 of 2, by m",
        "the files of answers have none of m to question 82",
    ]  # fmt: skip
    good, bad = judges.read_fastchat(path, questions, said)
    assert [j.answers for j in good] == [("m1\n\nHuman: more\n\nAssistant: m2",)]
    assert bad[-1].endswith("the file of questions has no question 82")
    assert [j.answers for j in judges.read_fastchat(path)[0]] == [("m",), ("n",), ("m",), ("m",)]


def test_llmbar_gold_and_judges_in_both_orders(write):
    row = {"input": "i", "output_1": "a", "output_2": "b", "label": 2}
    orders = {"swap = False": {"completion": ["Output (a)", "stop"], "winner": "1"}}
    orders["swap = True"] = {"completion": ["Both", "stop"], "winner": None}
    path = write("l.json", [row | {"results": [orders]}, row | {"results": [{"score_1": ["7."], "score_2": ["none"]}]}])
    assert verdicts(judges.read_llmbar(path)) == [("i", ("a", "b"), (2, 1), "ok")] * 2
    good, bad = judges.read_llmbar_judge(path, "m")
    assert bad == [] and [(j.form, j.status, j.shown, j.raw) for j in good] == [
        ("ranking", "ok", (0, 1), "Output (a)"), ("ranking", "unparsed", (1, 0), "Both"),
        ("rating", "ok", (), "7."), ("rating", "unparsed", (), "none"),
    ]  # fmt: skip
    assert good[0].ranks == (1, 2) and good[2].value == 7
    given = {"input": "p", "output_1": "a", "output_2": "b"}
    one = [{"swap = True": {"completion": ["x"]}}]
    empty = judges.read_llmbar_judge(write("e.json", [given | {"results": []}, given | {"results": one}]), "m")
    assert empty[1] == [] and empty.unused == {"row without a result": 1, "order without a completion": 1}
    reread, _ = judges.read_llmbar_judge(path, "m", verdict=lambda raw: 0)
    assert [j.ranks for j in reread[:2]] == [(1, 2), (2, 1)]  # the one shown first, in both orders


def test_prometheus_and_autoj(write):
    shown = "###Task Description:\nGrade.\n\n###The instruction to evaluate:\nSay ###hi: now\n\n###Response to evaluate:\nhi\n"
    shown += "\n###Reference Answer (Score 5):\nHi!\n\n###Score Rubrics:\n[Is it polite?]\nScore 1: no\n\n###Feedback: "
    row = {"instruction": shown, "gpt4_score": [4, None, 6], "gpt4_feedback": ["Good.", "?", "Best."]}
    path = write("p.json", [row, row | {"gpt4_score": [1]}, row | {"instruction": "Grade."}])
    good, bad = judges.read_prometheus(path)
    assert [(j.form, j.status, j.seed, j.raw) for j in good] == [
        ("rating", "ok", 0, "Good."), ("comment", "ok", 0, ""), ("rating", "unparsed", 1, "?")
    ]  # fmt: skip
    assert (good[0].prompt, good[0].answers, good[0].principle) == ("Say ###hi: now", ("hi",), "Is it polite?")
    assert good[0].value == 4 and good[0].high == 5 and good[1].text == "Good."
    assert [m[len(str(path)) :] for m in bad] == [
        ":1: value is 6.0, off the scale 1 .. 5", ":1: 1 scores but 3 pieces of feedback",
        ":1: no field 'Score Rubrics'; the fields are ",
    ]  # fmt: skip
    row = {"prompt": "p", "response 1": "a", "response 2": "b"}
    found = judges.read_autoj_pairs(write("a.jsonl", *(row | {"label": label} for label in (0, 1, 2))))
    assert [(ranks, status) for _, _, ranks, status in verdicts(found)] == [
        ((1, 2), "ok"),
        ((2, 1), "ok"),
        ((1, 1), "tie"),
    ]
