"""Judgements read from JSON: bad input is named, and good lines are kept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.records.forms import Comment, Correction, Ranking, Rater, Rating, to_json
from rlaif_jax.feedback.records.parsing import from_json, read_judgements

ANNA = Rater("anna", "person")


GOOD = {
    "rating": {"form": "rating", "value": 7, "answers": ["a"]},
    "comment": {"form": "comment", "text": "fine", "answers": ["a"]},
    "correction": {"form": "correction", "edited": "b", "answers": ["abc"]},
    "ranking": {"form": "ranking", "ranks": [1, 2], "answers": ["a", "b"]},
}


SHARED = {"version": 1, "prompt": "p", "rater": {"name": "anna", "source": "person"}}


BAD = [
    ("rating", {"form": "grade"}, "unknown form 'grade'; the forms are comment, rating, correction, ranking"),
    ("rating", {"form": ["rating"]}, "unknown form"),
    ("rating", {"form": None}, "unknown form None"),
    ("rating", {"version": 2}, "version 2 of the record; this program reads version 1"),
    ("rating", {"colour": 1}, "a rating has no field colour"),
    ("rating", {"prompt": None}, "a rating needs prompt"),
    ("rating", {"prompt": 5}, "prompt must be text, not 5"),
    ("rating", {"answers": []}, "answers is empty"),
    ("rating", {"answers": "abc"}, "answers must be a list of texts"),
    ("rating", {"answers": ["a", 1]}, "answers must be a list of texts"),
    ("rating", {"answers": ["a", "b"]}, "a rating is of one answer, not 2"),
    ("rating", {"rater": None}, "a rating needs rater"),
    ("rating", {"rater": "anna"}, "rater must be an object"),
    ("rating", {"rater": {"source": "person"}}, "rater needs name"),
    ("rating", {"rater": {"name": 5, "source": "person"}}, "name must be text, not 5"),
    ("rating", {"rater": {"name": " ", "source": "person"}}, "rater.name is empty"),
    ("rating", {"rater": {"name": "a", "source": "ghost"}}, "rater.source is 'ghost'; it is one of ai, rule"),
    ("rating", {"rater": {"name": "a", "source": "ai", "age": 3}}, "rater has no field age"),
    ("rating", {"status": "good"}, "status is 'good'; it is one of ok, tie"),
    ("rating", {"status": "retracted"}, "a retracted judgement names what it takes back"),
    ("rating", {"value": 11}, "value is 11.0, off the scale 1 .. 10"),
    ("rating", {"value": 0.5}, "off the scale 1 .. 10"),
    ("rating", {"value": None}, "off the scale"),
    ("rating", {"value": math.nan}, "value is nan, off the scale"),
    ("rating", {"value": math.inf}, "value is inf, off the scale"),
    ("rating", {"value": "7"}, "value must be a number, not '7'"),
    ("rating", {"value": True}, "value must be a number, not True"),
    ("rating", {"value": 10**400}, "value is too large for a float"),
    ("rating", {"low": 10}, "low must be less"),
    ("rating", {"high": math.inf}, "both finite"),
    ("rating", {"confidence": 1.5}, "confidence is 1.5; it lies between 0 and 1"),
    ("rating", {"time": math.nan}, "time is nan; it is in Unix seconds"),
    ("rating", {"label_mass": 2}, "label_mass is 2.0; it lies between 0 and 1"),
    ("rating", {"probabilities": [0.5, 1.5]}, "each lies between 0 and 1"),
    ("rating", {"shown": [1]}, r"shown is \[1\]; it orders the 1 answers 0 .. 0"),
    ("rating", {"generators": ["m", "n"]}, "generators names 2 writers of 1 answers"),
    ("rating", {"seed": 1.5}, "seed must be a whole number, not 1.5"),
    ("rating", {"call": {"cost": -1}}, "call.cost is -1.0; it is a number from 0 up"),
    ("rating", {"call": {"cost": math.inf}}, "call.cost is inf"),
    ("comment", {"text": " "}, "text is empty"),
    ("comment", {"text": ["fine"]}, "text must be text"),
    ("comment", {"quote": "z"}, "quote 'z' does not occur in the answer"),
    ("comment", {"answers": ["a", "b"]}, "a comment is on one answer, not 2"),
    ("correction", {"edited": None}, "a correction needs the edited answer or marked spans"),
    ("correction", {"answers": ["a", "b"]}, "a correction is of one answer"),
    ("correction", {"spans": [{"start": 1, "end": 4}]}, "span 1 .. 4 does not lie in the answer of 3 characters"),
    ("correction", {"spans": [{"start": 2, "end": 2}]}, "span 2 .. 2 does not lie"),
    ("correction", {"spans": [{"start": -1, "end": 2}]}, "span -1 .. 2 does not lie"),
    ("correction", {"spans": [{"start": "0", "end": 2}]}, "start must be a whole number"),
    ("correction", {"spans": [{"end": 2}]}, "a span needs start"),
    ("correction", {"spans": [{"start": 0, "end": 2, "value": math.nan}]}, "the value of span 0 .. 2 is nan"),
    ("correction", {"spans": {"start": 0, "end": 2}}, "spans must be a list"),
    ("ranking", {"answers": ["a"], "ranks": [1]}, "a ranking is of two or more answers"),
    ("ranking", {"ranks": []}, "a ranking has either ranks or beats"),
    ("ranking", {"beats": [[0, 1]]}, "a ranking has either ranks or beats"),
    ("ranking", {"ranks": [1, 2, 3]}, "ranks places 3 of 2 answers"),
    ("ranking", {"ranks": [1, None]}, "ranks places fewer than two answers"),
    ("ranking", {"ranks": [0, 1]}, "rank 0: places begin at 1"),
    ("ranking", {"ranks": [1, "2"]}, "ranks must be a list of whole numbers or nulls"),
    ("ranking", {"ranks": [1.5, 2]}, "ranks must be a list of whole numbers or nulls"),
    ("ranking", {"status": "tie"}, r"the status is tie, but ranks is \[1, 2\]"),
    ("ranking", {"ranks": [], "beats": [[0, 2]]}, "beats names the unknown answer 2; there are 0 .. 1"),
    ("ranking", {"ranks": [], "beats": [[-1, 0]]}, "beats names the unknown answer -1"),
    ("ranking", {"ranks": [], "beats": [[0, 0]]}, "a pair is"),
    ("ranking", {"ranks": [], "beats": [[0, 1], [1, 0]]}, "beats goes in a circle"),
    ("ranking", {"answers": ["a", "b", "c", "d"], "ranks": [], "beats": [[0, 1], [1, 2], [2, 3], [3, 1]]}, "in a circle"),
    ("ranking", {"ranks": [], "beats": [0, 1]}, "beats must be a list of"),
    ("ranking", {"ranks": [], "beats": [["0", "1"]]}, "beats must be a list of"),
    ("ranking", {"ranks": [], "beats": [[0, 1, 1]]}, "beats must be a list of"),
    ("ranking", {"probability": 1.5}, "probability is 1.5"),
    ("ranking", {"answers": ["a", "b", "c"], "ranks": [1, 2, 3], "probability": 0.5}, "it is of two answers"),
    ("ranking", {"strength": 6}, "strength is 6.0; it lies between 1 and 5"),
    ("ranking", {"both_bad": 1}, "both_bad must be true or false"),
]  # fmt: skip


CUT = [
    (b'{"form": "rating", "value": 7, "ans', "no valid JSON"),
    (b"[1, 2]", "a judgement is a JSON object, not"),
    (b'"rating"', "a judgement is a JSON object"),
    (b'{"form": "rating", "prompt": "\xff"}', "no valid JSON"),
    (b"[" * 100_000, "no valid JSON"),
    (b"\x00\x00\x00\x00", "no valid JSON"),
    (b"1" * 10_000, "no valid JSON"),
]


@pytest.mark.parametrize("form", GOOD)
def test_the_good_records_of_the_bad_ones_are_good(form):
    assert from_json(SHARED | GOOD[form]).form == form


@pytest.mark.parametrize(
    "line, message",
    [(json.dumps(SHARED | GOOD[form] | change).encode(), message) for form, change, message in BAD] + CUT,
)
def test_bad_lines_are_named_and_the_good_ones_kept(line, message, tmp_path: Path):
    good = [json.dumps(SHARED | record).encode() for record in GOOD.values()]
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join([good[0], good[1], line, good[2], b"", good[3]]))
    read, bad = read_judgements(path)
    assert [judgement.form for judgement in read] == list(GOOD)
    assert len(bad) == 1
    with pytest.raises(UserError, match=message):
        raise UserError(bad[0])
    assert bad[0].startswith(f"{path}:3: ")
    assert len(bad[0]) < len(str(path)) + 300


def test_a_file_cut_in_the_middle_of_its_last_line(tmp_path: Path):
    lines = [
        json.dumps(to_json(Rating(prompt="p", answers=("a",), rater=ANNA, value=7.0, time=float(i)))) for i in range(10)
    ]
    path = tmp_path / "cut.jsonl"
    path.write_text("\ufeff" + "\r\n".join(lines))
    whole, none = read_judgements(path)
    assert len(whole) == 10 and none == []
    path.write_bytes(path.read_bytes()[:-40])
    read, bad = read_judgements(path)
    assert read == whole[:9]
    assert len(bad) == 1 and bad[0].startswith(f"{path}:10: no valid JSON")


def test_judgements_of_other_prompts_and_answers_are_bad_where_the_right_ones_are_known(tmp_path: Path):
    path = tmp_path / "in.jsonl"
    records = [
        Correction(prompt="p", answers=("a",), rater=ANNA, edited="b"),
        Correction(prompt="another", answers=("a",), rater=ANNA, edited="b"),
        Ranking(prompt="p", answers=("a", "z"), rater=ANNA, ranks=(1, 2)),
    ]
    path.write_text("\n".join(json.dumps(to_json(record)) for record in records))
    read, bad = read_judgements(path, {"p": ("a", "b"), "q": ("c",)})
    assert read == records[:1]
    assert bad == [
        f"{path}:2: a correction of another prompt: 'another' is not among the 2 asked",
        f"{path}:3: a ranking of an unknown answer to 'p': 'z'",
    ]


def test_a_file_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(UserError, match="cannot read"):
        read_judgements(tmp_path / "none.jsonl")


@pytest.mark.parametrize("status", ["unparsed", "refused", "error", "abstained"])
@pytest.mark.parametrize("form", [Comment, Rating, Correction, Ranking])
def test_a_judgement_without_a_value_is_a_record_too(form, status):
    record = form(prompt="p", answers=("a", "b"), rater=ANNA, status=status, raw="no idea")
    assert not record.answered
    assert from_json(json.loads(json.dumps(to_json(record), allow_nan=False))).id == record.id
