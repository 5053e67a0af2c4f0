"""Labelling tools' shapes, on small hand-made files."""

from __future__ import annotations

from typing import Any

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
    about = {"comment": "answer_1", "faults": "answer_1", "quality": "answer_1"}
    found = tools.read_argilla(path, answers=TWO, about=about)
    good, bad = found
    assert found.unused == {"draft of a response": 1}
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
    good, bad = tools.read_argilla(path, answers=TWO, about={"quality": "answer_1"})
    assert [(j.form, j.rater.name, j.principle) for j in good] == [
        ("rating", "u", "quality"),
        ("ranking", "llm", "better"),
    ]
    assert good[1].ranks == (2, 1) and good[1].confidence == 0.9
    assert bad == [f"{path}:1, question ranking: ranks the unknown answer answer_9; the answers are answer_1, answer_2"]


def test_questions_name_the_answer_that_they_are_about(write):
    """The longest answer's name after a separator counts; where no name fits, nothing is guessed."""
    fields = {"prompt": "p", "answer": "SHORT", "best_answer": "LONG"}

    def read(*questions, **more):
        responses = {question: [{"value": 5, "user_id": "u"}] for question in questions}
        return tools.read_argilla(
            write("a.json", [{"fields": fields, "responses": responses}]), answers=("answer", "best_answer"), **more
        )

    good, bad = read("quality_best_answer", "tone answer", "best_answer", "answer")
    assert bad == [] and [(j.answers[0], j.principle) for j in good] == [
        ("LONG", "quality"), ("SHORT", "tone"), ("LONG", ""), ("SHORT", "")
    ]  # fmt: skip
    good, bad = read("quality", "noanswer")
    assert good == [] and [message.split(": ", 1)[1] for message in bad] == [
        f"which of answer, best_answer is it about? {name!r} names none: give about={{{name!r}: ANSWER}}"
        for name in ("quality", "noanswer")
    ]
    good, bad = read("quality", about={"quality": "best_answer"})
    assert bad == [] and [(j.answers[0], j.principle) for j in good] == [("LONG", "quality")]
    assert "about names worst; the answers are answer, best_answer" in read(about={"quality": "worst"})[1][0]


def test_argilla_rankings_by_names(write):
    def read(*values):
        row = {"prompt": "p", "one": "a", "two": "b", "three": "c", "order.responses": list(values)}
        return tools.read_argilla(write("a.jsonl", row), answers=("one", "two", "three"))

    good, bad = read(["two", "three", "one"], ["one", "two", "three"])
    assert bad == [] and [j.ranks for j in good] == [(3, 1, 2), (1, 2, 3)]
    good, bad = read(["two", "one"], ["two", "two", "one"], ["x", "y"], [{"value": "one"}, {"value": "two"}], [3],
                     [{"value": "one", "rank": 1}, {"value": "one", "rank": 2}])  # fmt: skip
    assert good == [] and [message.split(": ", 1)[1][:32] for message in bad] == [
        "the texts 'two, one' are no rank", "the texts 'two, two, one' are no", "the texts 'x, y' are no ranking:",
        "a ranking without places: \"[{'va", "a value of no form: '[3]'", "ranks an answer twice: one, one",
    ]  # fmt: skip


def test_argilla_1_and_discarded_responses(write):
    old = {"user_id": "u", "values": {"quality": {"value": 4}, "comment": {"value": "good"}}, "status": "submitted"}
    rows_ = [
        {"fields": {"prompt": "p", "answer": "x"}, "responses": [old, {"user_id": "v", "values": None, "status": "discarded"}],
         "suggestions": [{"question_name": "quality", "value": 2, "agent": "llm"}]},
        {"fields": {"prompt": "q", "answer": "x"},
         "responses": {"quality": [{"value": None, "user_id": "u", "status": "discarded"}]}},
        {"fields": {"prompt": "r", "answer": "x"}, "responses": {}},
    ]  # fmt: skip
    found = tools.read_argilla(write("a.jsonl", *rows_))
    assert found[1] == [] and [(j.form, j.status, j.prompt, j.rater.name) for j in found[0]] == [
        ("rating", "ok", "p", "u"), ("comment", "ok", "p", "u"), ("rating", "abstained", "p", "v"),
        ("rating", "ok", "p", "llm"), ("rating", "abstained", "q", "u"),
    ]  # fmt: skip
    assert found[0][4].principle == "quality" and found.unused == {"record without a response": 1}


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
            result("pairwise", "pw", {"selected": "right"}, "answer_1,answer_2"),
            result("choices", "choices", {"choices": ["tie"]}),
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
        "result": [result("pairwise", "pairwise", {"selected": "left"}, "a,b")],
    }
    cancelled = {"completed_by": 7, "was_cancelled": True, "result": []}
    task = {"id": 1, "data": FIELDS, "annotations": [annotation, cancelled], "predictions": [prediction]}
    path = write("l.json", [task, {"id": 2}])
    good, bad = tools.read_label_studio(path, answers=TWO, about={"a": "answer_1", "b": "answer_2"})
    assert [(j.form, j.status, j.principle, j.rater.name, j.answers) for j in good] == [
        ("ranking", "ok", "pw", "anna", ("abc", "xyz")), ("ranking", "tie", "", "anna", ("abc", "xyz")),
        ("rating", "ok", "tone", "anna", ("xyz",)), ("comment", "ok", "why", "anna", ("abc",)),
        ("correction", "ok", "", "anna", ("abc",)), ("correction", "ok", "", "anna", ("abc",)),
        ("ranking", "abstained", "", "7", ("abc", "xyz")), ("ranking", "ok", "", "llm", ("abc", "xyz")),
    ]  # fmt: skip
    assert good[0].ranks == (2, 1) and good[7].ranks == (1, 2) and good[7].confidence == 0.5
    assert good[2].value == 4 and good[3].text == "too\nlong" and good[4].edited == "ab"
    assert [(s.start, s.end, s.category) for s in good[5].spans] == [(0, 1, "typo"), (2, 3, "tone")]
    assert good[0].time == 1615328168 and good[0].call.latency_s == 4.5
    assert [m[len(str(path)) :][:50] for m in bad] == [
        ":1: span 2 .. 4 does not lie in answer_1", ":1: a result of type 'video'; read are labels, pai",
        ":1: no field 'data'; the fields are id",
    ]  # fmt: skip


def label_studio(write, *results, data=FIELDS, answers=TWO, **more):
    """Reads one annotation with these (type, value, to_name)."""
    made = [{"type": kind, "from_name": "q", "to_name": to, "value": value} for kind, value, to in results]
    task = {"data": data, "annotations": [{"completed_by": 1, "result": made} | more.pop("annotation", {})]}
    return tools.read_label_studio(write("l.json", [task]), answers=answers, **more)


def test_label_studio_tags_name_the_answer(write):
    rating, text, spans = {"rating": 5}, {"text": ["bad"]}, {"start": 0, "end": 1, "labels": ["x"]}
    kinds = (("rating", rating), ("textarea", text), ("labels", spans), ("choices", {"choices": ["good"]}))
    results = [(kind, value, "text_two") for kind, value in kinds] + [
        ("pairwise", {"selected": "left"}, "text_two,answer_1")
    ]
    good, bad = label_studio(write, *results)
    assert good == [] and len(bad) == 5
    assert all("which of answer_1, answer_2 is it about?" in m and "about={'text_two': ANSWER}" in m for m in bad)
    good, bad = label_studio(write, *results, about={"text_two": "answer_2"})
    assert bad == [] and {j.answers for j in good if not isinstance(j, Ranking)} == {("xyz",)} and len(good) == 5
    assert [j.ranks for j in good if isinstance(j, Ranking)] == [(2, 1)]  # the left one is answer_2
    one = {"data": {"prompt": "p", "answer": "abc"}, "answers": ("answer",)}
    good, bad = label_studio(write, ("rating", rating, "any"), ("rating", rating, "prompt"), **one)
    assert [j.answers for j in good] == [("abc",)] and len(bad) == 1
    suffix = {"data": {"prompt": "p", "answer": "SHORT", "best_answer": "LONG"}, "answers": ("answer", "best_answer")}
    good, bad = label_studio(write, ("rating", rating, "best_answer"), **suffix)
    assert bad == [] and [(j.answers, j.principle) for j in good] == [(("LONG",), "q")]


def test_label_studio_comparisons(write):
    data, names = FIELDS | {"answer_3": "c"}, (*TWO, "answer_3")
    results = [("pairwise", {"selected": side}, "answer_3,answer_1") for side in ("left", "right", "tie", "both", None)]
    results += [("choices", {"choices": chosen}, "x") for chosen in (["answer_2"], ["answer_2", "answer_1"], [])]
    good, bad = label_studio(write, *results, ("pairwise", {"selected": "left"}, "answer_1"), data=data, answers=names)
    assert [(j.ranks, j.status) for j in good] == [
        ((2, None, 1), "ok"), ((1, None, 2), "ok"), ((1, None, 1), "tie"), ((2, 1, 2), "ok"), ((1, 1, 2), "ok")
    ]  # fmt: skip
    assert [message.split(": ", 1)[1][:36] for message in bad] == [
        "selected is 'both'; it is left, righ", "selected must be text, not 'None'", "choices is empty",
        "to_name is 'answer_1'; a pairwise re",
    ]  # fmt: skip


def test_label_studio_without_results_and_without_zones(write):
    found = label_studio(write)
    assert found == ([], []) and found.unused == {"annotation without a result": 1}
    found = tools.read_label_studio(write("t.json", [{"data": FIELDS, "drafts": [{"x": 1}]}]), answers=TWO)
    assert found == ([], []) and found.unused == {"task without an annotation": 1, "field drafts": 1}
    stamped = {"annotation": {"created_at": "2024-01-01T12:00:00", "lead_time": float("nan")}}
    good, _ = label_studio(write, ("rating", {"rating": 5}, "answer_1"), **stamped)
    assert good[0].time == 1704110400 and good[0].call.latency_s is None


@pytest.mark.parametrize("count", [lambda text: len(text.encode("utf-16-le")) // 2, len])
def test_label_studio_spans_behind_an_emoji(write, count):
    """In UTF-16 units, as the tool counts, or in characters, as programs do that write predictions."""
    answer = "\N{GRINNING FACE} bad \N{GRINNING FACE}\n\nThis is bad."
    data, places = {"prompt": "p", "answer": answer}, [answer.index("bad"), answer.rindex("bad")]
    marks = [
        {"start": count(answer[:p]), "end": count(answer[: p + 3]), "text": "bad", "labels": ["x"]} for p in places
    ]
    good, bad = label_studio(write, *(("labels", mark, "answer") for mark in marks), data=data, answers=("answer",))
    assert bad == [] and [(s.start, s.end) for s in good[0].spans] == [(p, p + 3) for p in places]
    wrong = marks[0] | {"text": "other"}
    good, bad = label_studio(write, ("labels", wrong, "answer"), data=data, answers=("answer",))
    assert good == [] and "is not its text 'other'" in bad[0]


def test_label_studio_there_and_back(tmp_path):
    llm, text = Rater("llm", "ai"), "\N{GRINNING FACE} abc"
    one: dict[str, Any] = {"prompt": "p", "answers": (text,), "rater": ANNA}
    two: dict[str, Any] = {"prompt": "p", "answers": ("abc", "xyz"), "rater": ANNA}
    first: list[Judgement] = [
        Rating(**one, value=4, high=5, principle="tone", time=1704110400.5),
        Comment(**one | {"rater": llm}, text="good", principle="why", confidence=0.5),
        Correction(**one, edited="ab"),
        Correction(**one, spans=(Span(2, 4, -1.0, "typo"), Span(0, 1, -1.0, "odd"))),
    ]
    second: list[Judgement] = [rows.pair(winner=winner, **two) for winner in (0, 1, None)]
    left_out = [Rating(**one, status="error"), Ranking(**two | {"answers": ("a", "b", "c")}, ranks=(1, 2, 3))]
    assert tools.write_label_studio([*first, *left_out], tmp_path / "a") == 4
    assert tools.read_label_studio(tmp_path / "a") == (first, [])
    assert tools.write_label_studio(second, tmp_path / "b") == 3
    assert tools.read_label_studio(tmp_path / "b", answers=TWO) == (second, [])


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


def test_quotation_marks_and_trailing_tabs_of_labels(write):
    """A field may begin with a quotation mark, and an empty last column is ignored."""
    labels = write("labels.txt", 'anna\t"quoted item\tYES', "ben\titem two\tNO\t", "anna\titem two\tYES\r", "")
    gold = write("gold.txt", "item two\tno\t", '"quoted item\tYes')
    good, bad = tools.read_get_another_label(labels, gold=gold)
    assert bad == [] and [(j.rater.name, j.prompt, j.answers[rows.chosen(j)]) for j in good] == [
        ("anna", '"quoted item', "YES"), ("ben", "item two", "NO"), ("anna", "item two", "YES"),
        ("gold", "item two", "NO"), ("gold", '"quoted item', "YES"),
    ]  # fmt: skip
