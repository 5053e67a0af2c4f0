"""Rows of files: JSON in every arrangement, tables, and texts found again in other texts."""

from __future__ import annotations

import gzip
import json

import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.records.formats import judges, pairs, rows, texts, tools
from rlaif_jax.feedback.records.forms import Ranking, Rater

ANNA = Rater("anna", "person")


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
    with pytest.raises(UserError, match="'maybe' is not among no, yes"):
        rows.choice("task", ("no", "yes"), "maybe", ANNA)


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
