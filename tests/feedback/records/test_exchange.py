"""Feedback of other tools into a store and out of it, on the command line."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from rlaif_jax.__main__ import tool
from rlaif_jax.config import UserError
from rlaif_jax.feedback.records import exchange
from rlaif_jax.feedback.records import store as store_module
from rlaif_jax.feedback.records.formats import rows
from rlaif_jax.feedback.records.forms import Comment, Rater, Rating, canonical, to_json
from rlaif_jax.feedback.records.store import Store

ANNA = Rater("anna", "person")
START = "\n\nHuman: hi\n\nAssistant:"


def test_what_a_reader_left_is_printed_with_its_number(tmp_path: Path, capsys):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "source": "web"}
    table = [pair, pair | {"chosen": "c", "chosen_score": 3}, {"prompt": "p"}, *[{"x": 1}] * 25]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    config = exchange.ImportConfig((path,), exchange.Distilabel(rater="judge"), tmp_path / "f.sqlite")
    assert exchange.import_feedback(config) == 26
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"{path}: 2 judgements, 2 of them new in {config.store}",
        "  not used: 2 x field source",
        "  not used: 1 x field chosen_score",
    ]
    lines = err.splitlines()
    assert lines[0] == f"{path}:3: no field 'chosen'; the fields are prompt" and len(lines) == exchange.NAMED_BAD + 1
    assert lines[-1] == f"{path}: 26 faults, whose rows or values are left out, of which 20 are named here"
    with Store(config.store) as store:
        assert [(j.rater.name, j.answers) for j in store.judgements()] == [("judge", ("a", "b")), ("judge", ("c", "b"))]
    exchange.import_feedback(config)
    assert "2 judgements, 0 of them new" in capsys.readouterr().out
    assert exchange.import_feedback(exchange.ImportConfig((path,), store=config.store)) == 26, "known by its first row"
    assert "2 judgements, 2 of them new" in capsys.readouterr().out, "of a rater of another name"
    assert exchange.import_feedback(exchange.ImportConfig((path,), exchange.Records(), config.store)) == 28
    hint = f"no row is a record of this project. {exchange.NAME_FORMAT}"
    assert capsys.readouterr().err.splitlines()[-1] == f"{path}: {hint}"


SHAPES = [
    (exchange.Records(), True), (exchange.HH(rater="anna"), False), (exchange.Distilabel(), False),
    (exchange.Argilla(answers=("answer_1", "answer_2")), True), (exchange.LabelStudio(answers=("answer_1", "answer_2")), True),
    (exchange.AlpacaEval(), False), (exchange.CrowdLabels(options=(" a", " b")), True), (exchange.CrowdPairs(START), True),
]  # fmt: skip


@pytest.mark.parametrize("shape, same_rater", SHAPES, ids=lambda shape: type(shape).__name__)
def test_a_comparison_goes_out_and_comes_back(tmp_path: Path, capsys, shape, same_rater):
    record = rows.pair(START, (" a", " b"), 0, ANNA)
    with Store(tmp_path / "f.sqlite") as store:
        store.add([record, Rating(prompt="p", answers=("x",), rater=ANNA, status="error")])
    file = tmp_path / "out"
    exchange.export_feedback(exchange.ExportConfig(file, shape, tmp_path / "f.sqlite"))
    count = 2 if shape == exchange.Records() else 1
    listed = "1 x ranking, 1 x rating; 1 without a value"
    assert capsys.readouterr().out == f"{file}: {count} rows of 2 judgements ({listed})\n"
    assert exchange.import_feedback(exchange.ImportConfig((file,), shape, tmp_path / "g.sqlite")) == 0
    with Store(tmp_path / "g.sqlite") as store:
        (found,) = store.judgements(form="ranking")
    assert (found.prompt, found.answers, rows.chosen(found)) == (START, (" a", " b"), 0)
    assert not same_rater or found.rater == ANNA


def test_the_tools_and_their_errors(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"chosen": "x"}\n')
    with pytest.raises(SystemExit) as ended:
        tool(["import-feedback", "--files", "a.jsonl", "format:hh"])
    assert ended.value.code == 1 and "a.jsonl:1: no field 'rejected'" in capsys.readouterr().err
    Path("l.csv").write_text("task,worker,label\nt,w,yes\n")
    tool(["import-feedback", "--files", "l.csv", "format:crowd-labels", "--format.options", "yes", "no"])
    with Store(Path("feedback.sqlite")) as store:
        store.add([Comment(prompt="p", answers=("a",), rater=ANNA, text="good")])
    tool(["export-feedback", "--file", "out.csv", "format:crowd-labels"])
    assert capsys.readouterr().out.endswith(
        "out.csv: 1 rows of 2 judgements (1 x ranking, 1 x comment; 0 without a value)\n"
    )
    assert Path("out.csv").read_text() == "task,worker,label\nt,w,yes\n"
    for arguments, message in (
        (["import-feedback"], "files is missing"),
        (["import-feedback", "--files", "none"], "none: there is no such file of feedback"),
        (["export-feedback"], "file is missing"),
        (["export-feedback", "--file", "x", "--store", "none"], "there is no feedback store none"),
    ):
        with pytest.raises(SystemExit) as ended:
            tool(arguments)
        assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not Path("none").exists()
    with pytest.raises(UserError, match="there is no feedback store"):
        exchange.export_feedback(exchange.ExportConfig(Path("x"), store=Path("none")))
    with Store(tmp_path / "f.sqlite"):
        pass
    with pytest.raises(UserError, match=r"f\.sqlite is the store, which the rows would replace"):
        exchange.export_feedback(exchange.ExportConfig(tmp_path / "f.sqlite", store=tmp_path / "f.sqlite"))


@pytest.mark.parametrize("shape", [shape for shape, _ in SHAPES], ids=lambda shape: type(shape).__name__)
def test_the_memory_of_an_export_is_not_that_of_the_store(tmp_path: Path, shape):
    peaks = []
    for count in (200, 1_000):
        with Store(tmp_path / f"{count}.sqlite") as store:
            store.add(rows.pair(f"{START}{i}\n\nHuman: x\n\nAssistant:", (" a", " b"), 0, ANNA) for i in range(count))
        config = exchange.ExportConfig(tmp_path / "out", shape, tmp_path / f"{count}.sqlite")
        peaks.append(peak_bytes(lambda config=config: exchange.export_feedback(config)))
    assert peaks[1] < 2 * peaks[0], peaks


def test_the_memory_of_an_import_is_that_of_a_transaction(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(store_module, "IMPORT_STEP", 200)
    peaks = []
    for count in (200, 1_000):
        file = tmp_path / f"{count}.jsonl"
        file.write_text(
            "".join(canonical(to_json(rows.pair(f"p{i}", ("a", "b"), 0, ANNA))) + "\n" for i in range(count))
        )
        config = exchange.ImportConfig((file,), exchange.Records(), tmp_path / f"{count}.sqlite")
        peaks.append(peak_bytes(lambda config=config: exchange.import_feedback(config)))
    assert peaks[1] < 1.5 * peaks[0], peaks


def peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


REPLIES = [{"text": text, "role": "assistant", "rank": rank} for rank, text in enumerate("ab")]
ROWS = {
    "HH": {"chosen": f"{START} a", "rejected": f"{START} b"},
    "Distilabel": {"prompt": "p", "chosen": "a", "rejected": "b"},
    "Distilabel of messages": {"chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}],
                               "rejected": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "b"}]},
    "Distilabel of ratings": {"instruction": "p", "generations": ["a", "b"], "ratings": [5, 1]},
    "HelpSteer": {"prompt": "p", "response": "a", "helpfulness": 3, "verbosity": 1},
    "HelpSteer of preferences": {"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": -2},
    "AlpacaEval": {"instruction": "p", "output_1": "a", "output_2": "b", "preference": 1},
    "Argilla": {"fields": {"prompt": "p", "answer": "a"}, "responses": {"rating": [{"value": 4, "user_id": "u"}]}},
    "Oasst": {"prompt": {"text": "q", "role": "prompter", "replies": REPLIES}},
    "Records": to_json(rows.pair("p", ("a", "b"), 0, ANNA)),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_format_is_known_by_its_first_row(tmp_path: Path, name):
    path = tmp_path / "file.jsonl"
    path.write_text(json.dumps(ROWS[name]) + "\n")
    assert type(exchange.detect_format(path)).__name__ == name.split()[0]
    good, bad = exchange.Detected().read(path)
    assert bad == [] and good and all(j.answered for j in good)


def test_a_store_and_a_tfds_folder_are_known(tmp_path: Path):
    record = rows.pair("p", ("a", "b"), 0, ANNA)
    with Store(tmp_path / "any.name") as store:
        store.add([record])
        folder = store.export_tfds(tmp_path / "tfds")
    assert exchange.Detected().read(tmp_path / "any.name")[0] == [record]
    assert exchange.Detected().read(folder)[0] == [record]


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"x": 1}', r"known by its fields \(x\); name it after all options, such as format:hh"),
        ("[1, 2]", r"no object: '1'"),
        ("", r"no object: 'None'"),
    ],
)
def test_an_unknown_format_is_asked_for(tmp_path: Path, content, message):
    path = tmp_path / "file.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        exchange.Detected().read(path)
    with pytest.raises(UserError, match="no such file of feedback"):
        exchange.Detected().read(tmp_path / "none.jsonl")
