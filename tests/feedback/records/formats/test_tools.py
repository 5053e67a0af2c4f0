"""Labelling tools' shapes, on small hand-made files."""

from __future__ import annotations

import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.records.formats import rows, tools
from rlaif_jax.feedback.records.forms import Comment, Correction, Judgement, Ranking, Rater, Rating, Span

ANNA = Rater("anna", "person")


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
    assert tools.read_crowd_labels(path, ("dog", "bird"))[1][1] == f"{path}:2: the label 'cat' is not among dog, bird"
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
    assert bad == [f"{gold}:2: the label '2' is not among 0, 1"]
