"""Readers and writers of other tools' shapes, on small hand-made files; `test_formats_real.py` has the published ones."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.formats import judges, pairs, rows, texts, tools
from rlaif_jax.feedback.forms import Comment, Correction, Judgement, Ranking, Rater, Rating, Span

ANNA = Rater("anna", "person")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write("name", value, ...)`: a file of one JSON value a line, or of the text as it is."""

    def make(name: str, *values: Any) -> Path:
        path = tmp_path / name
        path.write_text("\n".join(v if isinstance(v, str) else json.dumps(v) for v in values))
        return path

    return make


def verdicts(found: rows.Found) -> list[tuple[Any, ...]]:
    """(prompt, answers, ranks, status) of rankings, without messages."""
    good, bad = found
    assert bad == []
    return [(j.prompt, j.answers, j.ranks, j.status) for j in good if isinstance(j, Ranking)]


# ---- Rows


def test_json_rows_of_arrays_lines_and_one_object_with_their_lines(write, tmp_path):
    bad: list[str] = []
    assert list(rows.json_rows(write("a", '[1,\n {"b": 2},\n\n 3]'), bad)) == [
        (f"{tmp_path}/a:1", 1), (f"{tmp_path}/a:2", {"b": 2}), (f"{tmp_path}/a:4", 3)
    ]  # fmt: skip
    assert list(rows.json_rows(write("b", "{}", "", "[5]".replace("[", '{"x": [').replace("]", "]}")), bad)) == [
        (f"{tmp_path}/b:1", {}), (f"{tmp_path}/b:3", {"x": [5]})
    ]  # fmt: skip
    assert [v for _, v in rows.json_rows(write("c", '\ufeff{\n "a":\n 1}'), bad)] == [{"a": 1}]
    assert list(rows.json_rows(write("d", ""), bad)) == list(rows.json_rows(write("e", "[]"), bad)) == [] == bad


def test_json_rows_go_on_behind_a_damaged_row(write, tmp_path):
    bad: list[str] = []
    path = write("a", '{"a": 1}', '{"a": "cut of', '{"a": 2}', '{"a": [1, 2', '{"a": 3}', "word")
    path.write_bytes(path.read_bytes() + b'\n{"a": "\xff"}\n{"a": 4}')
    assert [value["a"] for _, value in rows.json_rows(path, bad)] == [1, 2, 3, 4]
    assert [message.split(":")[1] for message in bad] == ["2", "4", "6", "7"]
    assert all("no valid JSON" in message for message in bad)
    bad.clear()
    assert [value for _, value in rows.json_rows(write("b", '[{"a": 1},\n{"a": 2},\n{"a": '), bad)] == [
        {"a": 1},
        {"a": 2},
    ]
    assert len(bad) == 1 and bad[0].startswith(f"{tmp_path}/b:3: no valid JSON")


def test_compressed_and_missing_files(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n'))
    assert [v for _, v in rows.json_rows(tmp_path / "a.jsonl.gz", [])] == [{"a": 1}]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 99)[:-9])
    for name in ("b.jsonl.gz", "none", "."):
        with pytest.raises(UserError, match="cannot read"):
            list(rows.json_rows(tmp_path / name, []))


def test_table_rows(write, tmp_path):
    bad: list[str] = []
    path = write("a.csv", "x,y", '1,"two\nlines"', "3", "", "4,5", "6,7,8")
    assert list(rows.table_rows(path, bad, ("y",))) == [
        (f"{path}:2", {"x": "1", "y": "two\nlines"}), (f"{path}:6", {"x": "4", "y": "5"})
    ]  # fmt: skip
    assert bad == [f"{path}:4: 1 columns; the 2 are x, y", f"{path}:7: 3 columns; the 2 are x, y"]
    with pytest.raises(UserError, match=r"a\.csv:1: no column z; the columns are x, y"):
        list(rows.table_rows(path, bad, ("z",)))


def test_locate_takes_the_nearest_and_ignores_line_ends():
    text = "one two\n one  two"
    assert rows.locate(text, "one two") == (0, 7)
    assert rows.locate(text, "one two", near=7) == (9, 17)
    assert rows.locate(text, "two one") == (4, 12)
    for words, message in (("three", "do not occur"), (" ", "are empty")):
        with pytest.raises(UserError, match=message):
            rows.locate(text, words)


def test_choice_and_chosen():
    label = rows.choice("task", ("no", "yes", "unsure"), "yes", ANNA)
    assert label.ranks == (2, 1, 2) and rows.chosen(label) == 1
    assert rows.chosen(rows.pair("p", ("a", "b"), None, ANNA)) is None
    assert rows.chosen(rows.unscored_pair("p", ("a", "b"), ANNA)) is None
    assert rows.chosen(Ranking(prompt="p", answers=("a", "b", "c"), rater=ANNA, ranks=(2, None, 1))) == 2
    with pytest.raises(UserError, match="'maybe' is none of no, yes"):
        rows.choice("task", ("no", "yes"), "maybe", ANNA)


# ---- Pairs


def test_hh_splits_at_the_last_place_that_both_share(write):
    start = "\n\nHuman: hi\n\nAssistant:"
    path = write(
        "hh.jsonl",
        {"chosen": f"{start} good", "rejected": f"{start} great"},
        {
            "chosen": f"{start} so\n\nHuman: why\n\nAssistant: x",
            "rejected": f"{start} no\n\nHuman: why\n\nAssistant: x",
        },
        {"chosen": f"{start} a\n\nHuman: b\n\nAssistant: c", "rejected": f"{start} a\n\nHuman: b\n\nAssistant:"},
        {"chosen": start, "rejected": start},
        {"chosen": "one", "rejected": "two"},
        {"chosen": "one"},
        ["one", "two"],
    )
    good, bad = pairs.read_hh(path)
    assert [(j.prompt, *j.answers) for j in good] == [
        (start, " good", " great"),
        (start, " so\n\nHuman: why\n\nAssistant: x", " no\n\nHuman: why\n\nAssistant: x"),
        (f"{start} a\n\nHuman: b\n\nAssistant:", " c", ""),
    ]
    assert [message.split(": ", 1) for message in bad] == [
        [f"{path}:4", "chosen and rejected are the same text"],
        [f"{path}:5", r"chosen and rejected share no beginning that ends in '\n\nAssistant:'"],
        [f"{path}:6", "no field 'rejected'; the fields are chosen"],
        [f"{path}:7", "a row must be an object, not \"['one', 'two']\""],
    ]


def test_hh_there_and_back(tmp_path):
    start = "\n\nHuman: hi\n\nAssistant:"
    records = [
        rows.pair(start, (" a", " b"), 0, pairs.CROWD),
        rows.pair(start, (" a", " c"), 1, pairs.CROWD),
        rows.pair(start, (" a", " d"), None, pairs.CROWD),
        Ranking(prompt=start, answers=(" x", " y", " z"), rater=pairs.CROWD, ranks=(1, 2, 2)),
        Rating(prompt=start, answers=(" a",), rater=pairs.CROWD, value=3),
    ]
    assert pairs.write_hh(records, tmp_path / "hh") == 4
    good, bad = pairs.read_hh(tmp_path / "hh")
    assert bad == [] and [j.answers for j in good] == [(" a", " b"), (" c", " a"), (" x", " y"), (" x", " z")]


def test_distilabel(write):
    path = write(
        "d.jsonl",
        {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_rating": 5, "rejected_rating": 2.5,
         "chosen_model": "m", "rejected_model": "n"},
        {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
         "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_rating": 4, "rejected_rating": 4},
        {"instruction": "i", "generations": ["a", "b", "c", None], "ratings": [4, None, 9, 1],
         "rationales": ["since", None, "", ""], "generation_models": ["m", "n", "o", "o"]},
        {"prompt": "p", "chosen": "a", "rejected": "a"},
        {"chosen": "a", "rejected": "b"},
    )  # fmt: skip
    good, bad = pairs.read_distilabel(path)
    assert [(j.form, j.status, j.prompt, j.answers) for j in good] == [
        ("ranking", "ok", "p", ("a", "b")), ("rating", "ok", "p", ("a",)), ("rating", "ok", "p", ("b",)),
        ("ranking", "ok", "q", ("a", "b")),
        ("ranking", "tie", "p", ("a", "b")), ("rating", "ok", "p", ("a",)), ("rating", "ok", "p", ("b",)),
        ("rating", "ok", "i", ("a",)), ("comment", "ok", "i", ("a",)), ("rating", "unparsed", "i", ("b",)),
    ]  # fmt: skip
    assert good[0].generators == ("m", "n") and good[2].value == 2.5 and good[2].generators == ("n",)
    assert [message[len(str(path)) :][:36] for message in bad] == [
        ":4: value is 9.0, off the scale 1 ..", ":5: chosen and rejected are the same", ":6: no prompt: there is no field pro"
    ]  # fmt: skip
    assert [m[:20] for m in pairs.read_distilabel(path, high=10)[1]] == [m[:20] for m in bad[1:]]


def test_distilabel_there_and_back(tmp_path):
    record = rows.pair("p", ("a", "b"), 1, pairs.DISTILABEL, generators=("m", "n"))
    assert pairs.write_distilabel([record], tmp_path / "d") == 1
    good, bad = pairs.read_distilabel(tmp_path / "d")
    assert bad == [] and good == [rows.pair("p", ("b", "a"), 0, pairs.DISTILABEL, generators=("n", "m"))]


def test_oasst_ranks_replies_at_every_depth(write):
    def node(role, text, *replies, rank=None):
        return {"role": role, "text": text, "replies": list(replies), "rank": rank}

    follow = [node("prompter", "q", rank=1), node("prompter", "r", rank=0)]
    tree = node(
        "prompter", "p", node("assistant", "a", *follow, rank=1), node("assistant", "b", rank=0), node("assistant", "c")
    )
    path = write("o.jsonl", {"prompt": tree}, {"prompt": node("prompter", "x", {"role": "assistant"})}, {"tree": 1})
    good, bad = pairs.read_oasst(path)
    assert [(j.prompt, j.answers, j.ranks) for j in good] == [
        ("\n\nHuman: p\n\nAssistant:", ("a", "b", "c"), (2, 1, None)),
        ("\n\nHuman: p\n\nAssistant: a\n\nHuman:", ("q", "r"), (2, 1)),
    ]
    assert [message.split(": ", 1)[1] for message in bad] == [
        "no field 'text'; the fields are role", "no field 'prompt'; the fields are tree"
    ]  # fmt: skip


def test_critique_requests(write):
    one = {"prompt": "What is wrong?", "edit_request": "Mend it."}
    path = write("c.json", json.dumps({"first": one, "second": {"prompt": "x"}}, indent=2), {"name": "third", **one})
    requests, bad = pairs.read_critique_requests(path)
    assert requests == [("first", "What is wrong?", "Mend it."), ("third", "What is wrong?", "Mend it.")]
    assert bad == [f"{path}:1, second: no field 'edit_request'; the fields are prompt"]


# ---- Judges


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
    assert [(j.prompt, j.answers, j.status, getattr(j, "ranks", None), j.shown) for j in good] == [
        ("ask", ("m1", "n1"), "ok", (1, 2), (0, 1)),
        ("ask", ("m1", "n1"), "ok", (2, 1), (1, 0)),
        ("ask", second, "tie", (1, 1), (0, 1)),
        ("ask", second, "unparsed", (), (1, 0)),
        ("ask", ("m1",), "ok", None, ()),
        ("ask", ("m1",), "unparsed", None, ()),
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


# ---- Tools

FIELDS = {"prompt": "p", "answer_1": "abc", "answer_2": "xyz"}
TWO = ("answer_1", "answer_2")


def test_argilla_nested_records(write):
    responses = {
        "quality_answer_2": [{"value": 4, "user_id": "u"}, {"value": 9, "user_id": "v"}],
        "ranking": [{"value": [{"value": "answer_2", "rank": 1}, {"value": "answer_1", "rank": 2}], "user_id": "u"}],
        "better": [{"value": "answer_1", "user_id": "u"}, {"value": "tie", "user_id": "v"},
                   {"value": "answer_2", "user_id": "w", "status": "draft"},
                   {"value": "answer_2", "user_id": "x", "status": "discarded"}],
        "comment": [{"value": "too long", "user_id": "u"}],
        "correction_answer_2": [{"value": "xy", "user_id": "u"}],
        "faults": [{"value": [{"start": 1, "end": 2, "label": "typo"}, {"start": 2, "end": 9}], "user_id": "u"}],
    }  # fmt: skip
    suggestions = {"quality": {"value": 2, "score": 0.75, "agent": "llm"}}
    path = write(
        "a.json", [{"fields": FIELDS, "responses": responses, "suggestions": suggestions}, {"fields": {"prompt": "p"}}]
    )
    good, bad = tools.read_argilla(path, answers=TWO)
    person = [j for j in good if j.rater.source == "person"]
    assert [(j.form, j.status, j.principle, j.answers) for j in person] == [
        ("rating", "ok", "quality", ("xyz",)), ("ranking", "ok", "", ("abc", "xyz")),
        ("ranking", "ok", "better", ("abc", "xyz")), ("ranking", "tie", "better", ("abc", "xyz")),
        ("ranking", "abstained", "better", ("abc", "xyz")),
        ("comment", "ok", "", ("abc",)), ("correction", "ok", "", ("xyz",)),
    ]  # fmt: skip
    assert [j.ranks for j in person[1:4]] == [(2, 1), (1, 2), (1, 1)] and person[6].edited == "xy"
    assert good[-1] == Rating(
        prompt="p", answers=("abc",), rater=Rater("llm", "ai"), principle="quality", value=2, high=5, confidence=0.75
    )
    assert [m[len(str(path)) :] for m in bad] == [
        ":1, question quality_answer_2: value is 9.0, off the scale 1 .. 5",
        ":1, question faults: span 2 .. 9 does not lie in the answer of 3 characters",
        ":1: no field 'answer_1'; the fields are prompt",
    ]


def test_argilla_flat_records(write):
    row = FIELDS | {
        "quality.responses": [3, 4], "quality.responses.users": ["u", "v"], "quality.responses.status": ["submitted", "draft"],
        "better.suggestion": "answer_2", "better.suggestion.agent": "llm", "better.suggestion.score": 0.9, "id": "x",
        "ranking.responses": [[{"value": "answer_9", "rank": 1}, {"value": "answer_1", "rank": 2}]],
    }  # fmt: skip
    path = write("a.jsonl", row)
    good, bad = tools.read_argilla(path, answers=TWO)
    assert [(j.form, j.rater.name, j.principle) for j in good] == [
        ("rating", "u", "quality"),
        ("ranking", "llm", "better"),
    ]
    assert good[1].ranks == (2, 1) and good[1].confidence == 0.9
    assert bad == [f"{path}:1, question ranking: ranks the unknown answer answer_9; the answers are answer_1, answer_2"]


def test_argilla_there_and_back(tmp_path):
    one = {"prompt": "p", "answers": ("abc",), "rater": ANNA}
    llm = Rater("llm", "ai")
    records: list[Judgement] = [
        Rating(**one, value=4, high=5),
        Comment(**one | {"rater": llm}, text="good", principle="tone", confidence=0.5),
        Correction(**one, edited="ab", principle=""),
        Correction(**one, spans=(Span(0, 2, -1.0, "typo"),)),
        Rating(**one, status="error"),
    ]
    assert tools.write_argilla(records, tmp_path / "a") == 4
    assert tools.read_argilla(tmp_path / "a") == (records[:4], [])
    ranking = Ranking(prompt="p", answers=("abc", "xyz"), rater=ANNA, ranks=(2, 1))
    assert tools.write_argilla([ranking], tmp_path / "b") == 1
    assert tools.read_argilla(tmp_path / "b", answers=TWO) == ([ranking], [])


def test_label_studio(write):
    def result(kind, name, value, to="answer_1"):
        return {"type": kind, "from_name": name, "to_name": to, "value": value}

    annotation = {
        "completed_by": {"id": 3, "email": "anna"}, "created_at": "2021-03-09T22:16:08.000000Z", "lead_time": 4.5,
        "result": [
            result("pairwise", "pw", {"selected": "right"}, "a,b"), result("choices", "choices", {"choices": ["tie"]}),
            result("rating", "tone", {"rating": 4}, "answer_2"), result("textarea", "why", {"text": ["too", "long"]}),
            result("textarea", "correction", {"text": ["ab"]}),
            result("labels", "faults", {"start": 0, "end": 1, "labels": ["typo"]}),
            result("labels", "faults", {"start": 2, "end": 3, "labels": ["tone"]}),
            result("labels", "faults", {"start": 2, "end": 4, "labels": ["tone"]}), result("video", "v", {}),
        ],
    }  # fmt: skip
    prediction = {
        "model_version": "llm",
        "score": 0.5,
        "result": [result("pairwise", "pairwise", {"selected": "left"})],
    }
    cancelled = {"completed_by": 7, "was_cancelled": True, "result": []}
    task = {"id": 1, "data": FIELDS, "annotations": [annotation, cancelled], "predictions": [prediction]}
    path = write("l.json", [task, {"id": 2}])
    good, bad = tools.read_label_studio(path, answers=TWO)
    assert [(j.form, j.status, j.principle, j.rater.name, j.answers) for j in good] == [
        ("ranking", "ok", "pw", "anna", ("abc", "xyz")), ("ranking", "tie", "choices", "anna", ("abc", "xyz")),
        ("rating", "ok", "tone", "anna", ("xyz",)), ("comment", "ok", "why", "anna", ("abc",)),
        ("correction", "ok", "", "anna", ("abc",)), ("correction", "ok", "", "anna", ("abc",)),
        ("ranking", "abstained", "", "7", ("abc", "xyz")), ("ranking", "ok", "pairwise", "llm", ("abc", "xyz")),
    ]  # fmt: skip
    assert good[0].ranks == (2, 1) and good[7].ranks == (1, 2) and good[7].confidence == 0.5
    assert good[2].value == 4 and good[3].text == "too\nlong" and good[4].edited == "ab"
    assert [(s.start, s.end, s.category) for s in good[5].spans] == [(0, 1, "typo"), (2, 3, "tone")]
    assert good[0].time == 1615328168 and good[0].call.latency_s == 4.5
    assert [m[len(str(path)) :][:50] for m in bad] == [
        ":1: span 2 .. 4 does not lie in answer_1", ":1: a result of type 'video'; read are labels, pai",
        ":1: no field 'data'; the fields are id",
    ]  # fmt: skip


def test_crowd_kit_labels_and_pairs(write, tmp_path):
    path = write("l.csv", "task,worker,label", "t1,w1,cat", "t1,w2,dog", "t2,w1", "t2,w2,cat")
    good, bad = tools.read_crowd_labels(path)
    assert [(j.prompt, j.rater.name, rows.chosen(j)) for j in good] == [
        ("t1", "w1", 0),
        ("t1", "w2", 1),
        ("t2", "w2", 0),
    ]
    assert good[0].answers == ("cat", "dog") and bad == [f"{path}:4: 2 columns; the 3 are task, worker, label"]
    assert tools.write_crowd_labels(good, tmp_path / "again.csv") == 3
    assert tools.read_crowd_labels(tmp_path / "again.csv") == (good, [])
    assert tools.read_crowd_labels(path, ("dog", "bird"))[1][1] == f"{path}:2: the label 'cat' is none of dog, bird"
    with pytest.raises(UserError, match="only the label a occurs; give the options"):
        tools.read_crowd_labels(write("one.csv", "task,worker,label", "t,w,a"))

    path = write("p.csv", "worker,left,right,label", "w,a,b,a", "w,a,c,c", "w,b,c,tie", "w,a,b,z", "w,a,a,a")
    good, bad = tools.read_crowd_pairs(path, "which?")
    assert [(j.prompt, j.ranks, j.status) for j in good] == [
        ("which?", (1, 2), "ok"), ("which?", (2, 1), "ok"), ("which?", (1, 1), "tie")
    ]  # fmt: skip
    assert bad == [
        f"{path}:5: the label 'z' is neither left, 'a', nor right, 'b'", f"{path}:6: left and right are both 'a'"
    ]  # fmt: skip
    assert tools.write_crowd_pairs(good, tmp_path / "again.csv") == 3
    assert tools.read_crowd_pairs(tmp_path / "again.csv", "which?") == (good, [])


def test_get_another_label(write):
    labels = write("labels.txt", "w1\tt1\t0", "w2\tt1\t1", "w2\tt2\t1")
    gold = write("gold.txt", "t1\t1", "t2\t2")
    good, bad = tools.read_get_another_label(labels, gold=gold)
    assert [(j.prompt, j.rater.name, rows.chosen(j)) for j in good] == [
        ("t1", "w1", 0), ("t1", "w2", 1), ("t2", "w2", 1), ("t1", "gold", 1)
    ]  # fmt: skip
    assert bad == [f"{gold}:2: the label '2' is none of 0, 1"]


# ---- Texts


def test_fine_grained(write):
    feedback = {
        "errors": [{"error type": "Redundant", "explanation": "twice", "start": 1, "end": 3}],
        "missing-info": [{"error type": "Missing-Answer", "passage_id": 1}],
        "corrected-prediction": "aXd",
    }
    row = {"question": "q", "passages": [["T", "s"]], "feedback": feedback, "preference": [0, 1, 2, 1, 1, 1]}
    row |= {f"prediction {i + 1}": text for i, text in enumerate(("abcd", "two", "three", "four"))}
    broken = row | {
        "preference": [9, 0, 0, 0, 0, 0],
        "feedback": feedback | {"errors": [{"error type": "x", "start": 3, "end": 9}]},
    }
    path = write("f.jsonl", row, broken)
    good, bad = texts.read_fine_grained(path)
    first = good[:9]
    assert first[0] == Correction(
        prompt="q\n\nT\ns", answers=("abcd",), rater=texts.WORKER, edited="aXd", spans=(Span(1, 3, -1.0, "Redundant"),)
    )
    assert [(j.text, j.aspects, j.quote) for j in first[1:3]] == [
        ("twice", ("Redundant",), "bc"),
        ("Missing-Answer",) * 1 + (("Missing-Answer",), ""),
    ]
    assert [(j.answers, j.status) for j in first[3:6]] == [
        (("abcd", "two"), "tie"), (("abcd", "three"), "ok"), (("abcd", "four"), "ok")
    ]  # fmt: skip
    assert [j.ranks for j in first[4:6]] == [(1, 2), (2, 1)]
    assert len(good) == 14 and [m[len(str(path)) :] for m in bad] == [
        ":2: span 3 .. 9 does not lie in the answer of 4 characters",
        ":2: preference holds 9; 0 is a tie, 1 and 2 are the predictions",
    ]


def test_squality(write):
    def review(worker, rating, rank, *annotations):
        marks = [{"selection": s, "annotation": a} for s, a in annotations]
        scores = {
            f"{n}-{k}": v
            for n in ("correctness", "selection", "overall")
            for k, v in (("rating", rating), ("rank", rank))
        }
        return {"worker_id": worker, "annotations": marks} | scores

    marks = (("short story", ["why?"]), ("a", []), ("zzz", ["x"]))
    systems = {
        "bart": {"response": "a short\nstory", "reviews": [review("3", 10, 2, *marks)]},
        "human": {"response": "other", "reviews": [review("3", 101, 1)]},
    }  # fmt: skip
    path = write("s.jsonl", {"passage-id": "77", "questions": {"0": systems}})
    stories = write("t.jsonl", {"metadata": {"passage_id": "77"}, "questions": [{"question_text": "What happens?"}]})
    good, bad = texts.read_squality(path, stories)
    assert {j.prompt for j in good} == {"Story 77: What happens?"}
    assert texts.read_squality(path)[0][0].prompt == "Story 77: question 0"
    assert [(j.form, j.principle) for j in good] == [
        ("rating", "correctness"), ("rating", "selection"), ("rating", "overall"), ("comment", ""), ("correction", ""),
        ("ranking", "correctness"), ("ranking", "selection"), ("ranking", "overall"),
    ]  # fmt: skip
    assert (good[3].text, good[3].quote) == ("why?", "short\nstory")
    assert [(s.start, s.end) for s in good[4].spans] == [(2, 13), (0, 1)]
    assert good[7].ranks == (2, 1) and good[7].generators == ("bart", "human")
    assert [m[len(str(path)) :] for m in bad] == [
        ":1, question 0: the quoted words 'zzz' do not occur in the answer",
        ":1, question 0: value is 101.0, off the scale 0 .. 100",
    ]


def test_mlqe_post_edits_of_a_folder_and_an_archive(tmp_path):
    files = {
        "dev.src": "a b\nc\n",
        "dev.mt": "x y\nz\n",
        "dev.pe": "x\nz\n",
        "dev.hter": "0.5\nmuch\n",
        "dev.tags": "OK",
    }
    (tmp_path / "dev").mkdir()
    with tarfile.open(tmp_path / "dev.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            (tmp_path / "dev" / name).write_text(text)
            info = tarfile.TarInfo(f"en-de/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    good, bad = texts.read_mlqe_post_edits(tmp_path / "dev")
    assert [(j.prompt, j.answers, j.form) for j in good] == [
        ("a b", ("x y",), "correction"), ("a b", ("x y",), "rating"), ("c", ("z",), "correction")
    ]  # fmt: skip
    assert good[0].edited == "x" and good[1].value == 0.5 and good[1].rater.source == "rule"
    assert len(bad) == 1 and bad[0].startswith(f"{tmp_path}/dev/dev.hter:2: ")
    assert texts.read_mlqe_post_edits(tmp_path / "dev.tar.gz")[0] == good
    (tmp_path / "dev" / "dev.pe").write_text("x\n")
    good, bad = texts.read_mlqe_post_edits(tmp_path / "dev")
    assert len(good) == 2 and "the files differ in length" in bad[0]
    (tmp_path / "dev" / "dev.pe").unlink()
    with pytest.raises(UserError, match=r"no file \*.pe"):
        texts.read_mlqe_post_edits(tmp_path / "dev")
    with pytest.raises(UserError, match="cannot read"):
        texts.read_mlqe_post_edits(tmp_path / "dev" / "dev.src")


def test_mlqe_raters_are_told_apart_by_their_z_scores(tmp_path):
    """Three raters of planted means and deviations, in shuffled columns; each score is on its rater's line."""
    generator = np.random.default_rng(0)
    mean, deviation = np.array([70.123, 80.456, 95.789]), np.array([20.0, 7.5, 12.25]) * np.pi / 3
    lines, planted = ["index\toriginal\ttranslation\tscores\tmean\tz_scores\tz_mean\tmodel_scores"], []
    for row in range(60):
        who = generator.permutation(3)[: 2 + row % 2]
        scores = generator.integers(0, 101, len(who))
        zs = (scores - mean[who]) / deviation[who]
        planted += who.tolist()
        lines.append(f'{row}\tsay "{row}\tword {row}\t{scores.tolist()}\t0\t{zs.tolist()}\t0\t0')
    (tmp_path / "dev.ende.df.short.tsv").write_text("\n".join([*lines, "60\tx\ty\t[1, 2]\t0\t[0.5]\t0\t0"]))
    good, bad = texts.read_mlqe_ratings(tmp_path)
    assert len(bad) == 1 and "differ in number" in bad[0]
    assert len(good) == len(planted) and good[0].prompt == 'say "0'
    names = [j.rater.name for j in good]
    assert set(names) == {"dev/1", "dev/2", "dev/3"}
    assert len(set(zip(names, planted))) == 3  # one name a rater
    assert np.diff([names.count(f"dev/{i}") for i in (1, 2, 3)]).max() <= 0


def test_xsum(write):
    head = "bbcid,system,summary,hallucination_type,hallucinated_span,hallucinated_span_start,hallucinated_span_end,worker_id"
    path = write(
        "h.csv", head,
        "1,m,a cat a cat,extrinsic,a cat,7,12,w0", "1,m,a cat a cat,intrinsic,cat,3,6,w0", "1,m,a cat a cat,NULL,NULL,-1,-1,w1",
        "1,m,a cat a cat,extrinsic,\\na cat,0,5,w2", "2,m,dog,extrinsic,bird,1,5,w0",
    )  # fmt: skip
    good, bad = texts.read_xsum_spans(path)
    assert [(j.rater.name, j.spans, j.edited) for j in good] == [
        ("w0", (Span(6, 11, -1.0, "extrinsic"), Span(2, 5, -1.0, "intrinsic")), None), ("w1", (), "a cat a cat"),
        ("w2", (Span(0, 5, -1.0, "extrinsic"),), None),
    ]  # fmt: skip
    assert bad == [
        f"{path}:6: the quoted words 'bird' do not occur in the answer"
    ]  # and no "nothing is wrong" of w0 on 2
    path = write(
        "f.csv", "bbcid,system,summary,is_factual,worker_id", "1,m,s,yes,w", "1,m,s,NULL,w", "1,m,s,no,v", "1,m,s,2,v"
    )
    good, bad = texts.read_xsum_factuality(path)
    assert [(j.status, j.rater.name) for j in good] == [("ok", "w"), ("abstained", "w"), ("ok", "v")]
    assert [good[0].value, good[2].value] == [1, 0] and bad == [f"{path}:5: is_factual is '2'; it is yes, no or NULL"]


def test_ilf(write):
    row = {"prompt": "def f():\n", "Feedback": "Return it.", "original_model_completion": "def f():\n  pass"}
    row |= {"unedited_annotator_completion": "def f():\n  return 1", "completion": "  return 2\r\n", "worker_id": None}
    path = write(
        "i.jsonl", row, row | {"unedited_annotator_completion": "new"}, row | {"original_model_completion": "x"}
    )
    good, bad = texts.read_ilf(path)
    assert [(j.form, j.answers) for j in good] == [("comment", ("  pass",)), ("correction", ("  pass",))] * 2
    assert good[0].text == "Return it." and good[1].edited == "  return 1" and good[3].edited == "  return 2\n"
    assert bad == [f"{path}:3: original_model_completion does not begin with the prompt"]


@pytest.mark.parametrize(
    "read",
    [pairs.read_hh, pairs.read_distilabel, pairs.read_oasst, pairs.read_critique_requests, judges.read_alpaca_eval,
     judges.read_fastchat, judges.read_pandalm, judges.read_llmbar, lambda path: judges.read_llmbar_judge(path, "m"),
     judges.read_prometheus, judges.read_autoj_pairs, tools.read_argilla, tools.read_label_studio,
     texts.read_fine_grained, texts.read_squality, texts.read_ilf],
)  # fmt: skip
def test_rows_of_any_other_shape_are_messages(read, write):
    odd = [
        1,
        "x",
        None,
        [],
        {},
        {"prompt": None},
        {"data": [], "fields": {}},
        {"chosen": {}, "rejected": 3},
        {"results": 1},
    ]
    path = write("odd.jsonl", *map(json.dumps, odd), '{"cut": ')
    good, bad = read(path)
    assert good == []
    assert {int(message[len(str(path)) + 1 :].split(":")[0].split(",")[0]) for message in bad} >= {1, 2, 3, 10} - (
        {5} if read is pairs.read_critique_requests else set()
    )
    assert all(message.startswith(str(path)) and len(message) < len(str(path)) + 330 for message in bad)
