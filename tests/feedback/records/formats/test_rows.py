"""Rows of files: JSON in every arrangement, tables, and texts found again in other texts."""

from __future__ import annotations

import csv
import gzip
import io
import json

import hypothesis
import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.records.formats import judges, pairs, rows, texts, tools
from rlaif_jax.feedback.records.forms import Ranking, Rater
from rlaif_jax.feedback.records.parsing import read_judgements

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


def test_json_rows_of_parquet(tmp_path):
    values = [{"a": [{"b": "c"}]}, {"a": None}]
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "a.parquet")
    found = list(rows.json_rows(tmp_path / "a.parquet", []))
    assert found == [(f"{tmp_path}/a.parquet:1", values[0]), (f"{tmp_path}/a.parquet:2", values[1])]
    with pytest.raises(UserError, match="cannot read"):
        list(rows.json_rows(tmp_path / "b.parquet", []))


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


def test_json_rows_take_no_part_of_a_damaged_value_for_a_row(write):
    inner = {"chosen": "x", "rejected": "y"}
    good = {"a": 1, "meta": inner}
    for indent in (0, 1, 2, None):
        whole = json.dumps([good, good | {"a": 2}, good | {"a": 3}], indent=indent)
        at = whole.index('"a": 2')
        for broken in ("broken", '"a" 2', '"cut', "2, }{"):
            bad: list[str] = []
            path = write("a", whole[:at] + broken + whole[at + 6 :])
            found = [value for _, value in rows.json_rows(path, bad)]
            assert inner not in found and found[0] == good, (indent, broken)
            assert bad and all("no valid JSON" in message for message in bad), (indent, broken, bad)
            if broken in ("broken", '"a" 2'):  # the brackets are whole: the next row is found
                assert found == [good, good | {"a": 3}] and len(bad) == 1, (indent, broken)
    bad = []
    text = "\n".join(json.dumps(value, indent=2) for value in (good, good | {"a": 2}, good | {"a": 3}))
    path = write("b", text.replace('"a": 2', '"a" 2'))
    assert [value["a"] for _, value in rows.json_rows(path, bad)] == [1, 3] and len(bad) == 1
    assert bad[0].endswith("7 lines are left out")


def test_compressed_and_missing_files(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n'))
    assert [v for _, v in rows.json_rows(tmp_path / "a.jsonl.gz", [])] == [{"a": 1}]
    packed = gzip.compress(b'{"a": 1}\n' * 99)
    (tmp_path / "b.jsonl.gz").write_bytes(packed[:-9])
    (tmp_path / "c.jsonl.gz").write_bytes(packed[:12] + b"\xff" * 8 + packed[20:])
    for name in ("b.jsonl.gz", "c.jsonl.gz", "none", "."):
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


MARKS = ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r", "\n", "\r\n", '"', ",", "\t")
CELLS = st.lists(st.sampled_from([*"ab ", *MARKS])).map("".join) | st.text(st.characters(exclude_categories=["Cs"]))


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=4))
def test_tables_come_back_whole(tmp_path, cells):
    """From our writer and from the csv module's; and the csv module reads ours."""
    table, columns = tmp_path / "table.csv", ("x", "y", "z")
    assert rows.write_table(cells, columns, table) == len(cells)
    other = io.StringIO()
    csv.writer(other, quoting=csv.QUOTE_ALL).writerows([columns, *cells])
    with table.open(encoding="utf-8", newline="") as file:
        assert [tuple(row) for row in csv.reader(file)] == [columns, *cells]
    for text in (None, other.getvalue()):
        bad: list[str] = []
        found = list(rows.table_rows(table, bad, columns, text=text))
        assert ([tuple(row.values()) for _, row in found], bad) == (cells, [])


@pytest.mark.parametrize("mark", MARKS[:9])
def test_unquoted_cells_end_at_line_feeds_only(write, mark):
    """pandas quotes none of these marks: the same text as `pandas.DataFrame(...).to_csv`."""
    path = write("a.csv", "task,worker,label", f"Is the moor{mark}wet?,ann,yes", "t2,ann,no")
    good, bad = tools.read_crowd_labels(path, ("yes", "no"))
    assert bad == [] and [j.prompt for j in good] == [f"Is the moor{mark}wet?", "t2"]


def test_long_cells_and_cells_with_a_wrong_end(write):
    long = "x" * 200_000
    path = write("a.csv", "task,label", f'"{long}\nsecond, line",cat', 't2,"dog"')
    assert [tuple(row.values()) for _, row in rows.table_rows(path, [], ())] == [
        (f"{long}\nsecond, line", "cat"), ("t2", "dog")
    ]  # fmt: skip
    bad: list[str] = []
    path = write("b.csv", "x,y", '"He said "hi" to me",1', "a,2", '"open,3', "b,4", "c,5", "")
    assert list(rows.table_rows(path, bad, ("x",))) == [(f"{path}:3", {"x": "a", "y": "2"})]
    assert bad == [
        f"{path}:2: text behind a quoted cell; a quotation mark inside a cell is written twice",
        f"{path}:4: a quoted cell begins here and ends nowhere; the 3 lines behind it are not read",
    ]
    path.write_bytes(b"x,y\ns\xf6,1\nb,2\n")
    bad.clear()
    assert [row["x"] for _, row in rows.table_rows(path, bad, ("x",))] == ["b"]
    assert bad == [f"{path}:2: no text (it holds bytes that are no UTF-8)"]
    with pytest.raises(
        UserError, match=r"no column y; the columns are x\\r1\\r"
    ) as raised:  # lines of an old Macintosh
        list(rows.table_rows(write("d.csv", "x" + "\r1" * 1000), [], ("y",)))
    assert len(str(raised.value)) < 500
    with pytest.raises(UserError, match="the column x is there twice"):
        list(rows.table_rows(write("c.csv", "x,x", "1,2"), [], ("x",)))


def test_half_a_surrogate_pair_is_left_out_of_tables(tmp_path):
    labels = [rows.choice(task, ("cat", "dog"), "cat", ANNA) for task in ("t\ud800", "t2")]
    assert tools.write_crowd_labels(labels, tmp_path / "c.csv") == 1
    assert tools.read_crowd_labels(tmp_path / "c.csv", ("cat", "dog")) == (labels[1:], [])


def test_fields_that_no_reader_used_are_counted(write):
    path = write("a.jsonl", *({"prompt": "p", "chosen": "a", "rejected": "b", "source": name, "empty": []}
                              for name in ("x", "y", None)), {"prompt": "p", "source": "z"})  # fmt: skip
    found = pairs.read_distilabel(path)
    assert len(found[0]) == 3 and len(found[1]) == 1 and found.unused == {"field source": 2}
    path = write("b.csv", "task,worker,label,seconds", "t1,w,a,5", "t2,w,b,", "t3,w,,7")
    assert tools.read_crowd_labels(path).unused == {"field seconds": 2, "row without a label": 1}


def test_names_from_a_file_reach_no_terminal_raw(write):
    name = "a\x1b[31mb\x9bc\n"
    path = write("a.jsonl", {name: 1}, {"responses": {name: [{"value": {}}]}, "prompt": "p", "answer": "a"})
    table = write("b.csv", f"task,worker,label,x{name[:-1]}", "1,2")
    tasks = write("c.jsonl", {"form": "rating", name: 1})
    for messages in (pairs.read_hh(path)[1], tools.read_argilla(path)[1], tools.read_crowd_labels(table)[1],
                     read_judgements(tasks)[1]):  # fmt: skip
        assert messages and all(message.isprintable() for message in messages)
    extra = write("d.jsonl", {"chosen": "a", "rejected": "b", "prompt": "p", name: 1})
    assert all(reason.isprintable() for reason in pairs.read_distilabel(extra).unused)


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
    assert rows.choice("task", ("NO", "YES"), " No", ANNA) == rows.choice("task", ("NO", "YES"), "NO", ANNA)
    with pytest.raises(UserError, match="'No' is not among NO, no"):
        rows.choice("task", ("NO", "no"), "No", ANNA)
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
