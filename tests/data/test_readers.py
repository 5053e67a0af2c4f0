from __future__ import annotations

import datetime
import decimal
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.data.prompts import prompt_batches
from rlaif_jax.data.readers import each_row, jsonl_records, pair_records, tfds_records
from rlaif_jax.data.tokenizers import word_level_tokenizer

WORDS = word_level_tokenizer(tuple(f"w{i}" for i in range(30)))


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


# ------------------------------------------------------------------------------------------- JSONL


def test_jsonl_keeps_fields_and_places(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a\\u2028b", "n": 1}\r\n\n{"prompt": ""}')
    records = jsonl_records(path)
    assert list(records.records) == [{"prompt": "a\u2028b", "n": 1}, {"prompt": ""}]
    assert records.place(1) == f"{path}:3"
    zipped = tmp_path / "p.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert jsonl_records(zipped).records == records.records


GOOD = {"prompt": "fine"}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ((GOOD, GOOD, '{"prompt": "cut'), r"p\.jsonl:3: no valid JSON"),
        ((GOOD, "", '{"prompt": "a"} {"prompt": "b"}'), r"p\.jsonl:3: no valid JSON .*Extra data"),
        ((GOOD, '["a"]'), r"p\.jsonl:2: expected a JSON object with \"prompt\", not \[\"a\"\]"),
        ((GOOD, {"text": "a", "id": 1}), r'p\.jsonl:2: field "prompt" is missing; the line has "text", "id"'),
        (({"prompt": 3},), r'p\.jsonl:1: field "prompt" should be a string, not 3'),
        (({"prompt": None},), r'p\.jsonl:1: field "prompt" should be a string, not null'),
        (('{"prompt": "\\ud83d"}',), r"p\.jsonl:1: .*surrogate"),
        ((), r"p\.jsonl is empty"),
        (("", "  "), r"p\.jsonl is empty"),
    ],
)
def test_bad_jsonl(tmp_path: Path, lines: tuple[object, ...], said: str):
    with pytest.raises(UserError, match=said):
        jsonl_records(write(tmp_path / "p.jsonl", *lines))


def test_jsonl_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(UserError, match=r"cannot read .*none\.jsonl: No such file"):
        jsonl_records(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"cannot read"):
        jsonl_records(tmp_path)
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 50)[:-10])
    with pytest.raises(UserError, match=r"cannot read .*p\.jsonl\.gz"):
        jsonl_records(tmp_path / "p.jsonl.gz")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(UserError, match=r"latin\.jsonl:2: no valid JSON .*utf-8"):
        jsonl_records(tmp_path / "latin.jsonl")


def test_pairs(tmp_path: Path):
    pair = {"prompt": "q", "chosen": "good", "rejected": ""}
    soft = {**pair, "probability": 0.75}
    assert [dict(r) for r in pair_records(write(tmp_path / "p.jsonl", pair, soft)).records] == [pair, soft]
    for wrong in (1.5, -0.1, "0.7", True, None, float("nan")):
        with pytest.raises(UserError, match=r'p\.jsonl:2: field "probability"'):
            pair_records(write(tmp_path / "p.jsonl", pair, {**pair, "probability": wrong}))
    with pytest.raises(UserError, match=r'p\.jsonl:1: field "rejected" is missing'):
        pair_records(write(tmp_path / "p.jsonl", {"prompt": "q", "chosen": "good"}))


def said(*texts: str, system: str = "") -> list[dict[str, str]]:
    head = [{"role": "system", "content": system}] if system else []
    return head + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def parquet(path: Path, *rows: dict[str, object]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def test_parquet_rows_are_read_as_json_lines(tmp_path: Path):
    """Rows of messages, too; bytes and dates become text; a damaged row has its number."""
    rows: list[dict[str, object]] = [{"prompt": said("q"), "n": 1}, {"prompt": said("a", "b", "c"), "n": None}]
    lines = jsonl_records(write(tmp_path / "p.jsonl", *rows))
    found = jsonl_records(parquet(tmp_path / "p.parquet", *rows))
    assert found.records == lines.records
    assert found.place(1) == f"{tmp_path}/p.parquet:2"
    odd = {"prompt": "q", "image": b"\xff", "day": datetime.date(2026, 1, 2), "price": decimal.Decimal("1.50")}
    assert jsonl_records(parquet(tmp_path / "odd.parquet", odd)).records == (
        {"prompt": "q", "image": "\ufffd", "day": "2026-01-02", "price": "1.50"},
    )
    pair = {"prompt": said("q"), "chosen": said("", "good")[1:], "rejected": said("", "bad")[1:], "score_chosen": 2.0}
    assert (
        pair_records(parquet(tmp_path / "pair.parquet", pair)).records
        == pair_records(write(tmp_path / "p.jsonl", pair)).records
    )
    assert [row["prompt"] for _, row in each_row([str(tmp_path / "odd.parquet")], "train")] == ["q"]


def test_bad_parquet(tmp_path: Path):
    with pytest.raises(UserError, match=r'p\.parquet:2: field "prompt" should be a string, not null'):
        jsonl_records(parquet(tmp_path / "p.parquet", {"prompt": "a"}, {"prompt": None}))
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"p\.parquet is empty: expected rows, with \"prompt\""):
        jsonl_records(tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"cannot read .*none\.parquet: No such file"):
        jsonl_records(tmp_path / "none.parquet")
    with pytest.raises(UserError, match=r"cannot read .*: "):
        jsonl_records(tmp_path)
    (tmp_path / "text.parquet").write_text('{"prompt": "a"}\n' * 9)
    with pytest.raises(UserError, match=r"cannot read .*text\.parquet: Parquet magic bytes not found"):
        jsonl_records(tmp_path / "text.parquet")


TALK = "Be brief.\n\nHuman: p\n\nAssistant: a\n\nHuman: q\n\nAssistant:"


def test_prompts_and_pairs_of_messages(tmp_path: Path):
    talk, answers = said("p", "a", "q", system="Be brief."), [said("", text)[1:] for text in ("good", "bad")]
    records = jsonl_records(write(tmp_path / "p.jsonl", {"prompt": talk, "id": 1}, {"prompt": said("q")})).records
    assert records == ({"prompt": TALK, "messages": talk, "id": 1}, {"prompt": "q", "messages": said("q")})
    assert jsonl_records(write(tmp_path / "p.jsonl", {"messages": talk})).records == (
        {"prompt": TALK, "messages": talk},
    )
    rows = [
        {"prompt": talk, "chosen": answers[0], "rejected": answers[1]},
        {"prompt": "q", "chosen": talk + answers[0], "rejected": talk + answers[1]},
    ]
    expected = {"prompt": TALK, "chosen": "good", "rejected": "bad"}
    assert pair_records(write(tmp_path / "p.jsonl", *rows)).records == (expected, expected)
    for wrong in ([], [{"role": "robot", "content": "x"}], [{"role": "user"}], 3):
        with pytest.raises(UserError, match=r"p\.jsonl:1: .*prompt"):
            jsonl_records(write(tmp_path / "p.jsonl", {"prompt": wrong}))
        with pytest.raises(UserError, match=r"p\.jsonl:1: .*prompt"):
            pair_records(write(tmp_path / "p.jsonl", {"prompt": wrong, "chosen": "a", "rejected": "b"}))


def test_pairs_that_are_rated_equally_are_no_certain_preference(tmp_path: Path):
    pair = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    rows = [pair | {"chosen-rating": 4, "rejected-rating": low} for low in (4, 3)]
    rows.append(rows[0] | {"probability": 0.9})
    records = pair_records(write(tmp_path / "p.jsonl", *rows)).records
    assert [record.get("probability", 1) for record in records] == [0.5, 1, 0.9]
    with pytest.raises(UserError, match=r"p\.jsonl:1: the chosen answer is rated 2.0, below the rejected one, 4.0"):
        pair_records(write(tmp_path / "p.jsonl", pair | {"score_chosen": 2, "score_rejected": 4}))


def test_real_jsonl(shared_data):
    records = jsonl_records(shared_data("gsm8k/train.jsonl"), required=("question", "answer"))
    assert len(records) == 7473
    pairs = jsonl_records(shared_data("hh_harmless/test.jsonl"), required=("chosen", "rejected"))
    assert len(pairs) == 1838


# ------------------------------------------------------------------------------------------- TFDS

MAKE_DATA_SET = """
import sys
import numpy as np
import tensorflow_datasets as tfds
tfds.core.utils.gcs_utils._is_gcs_disabled = True

class TinyNews(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        features = {"article": tfds.features.Text(), "meta": {"stars": np.int64},
                    "tags": tfds.features.Sequence(tfds.features.Text())}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))
    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(7), "test": self._generate_examples(2)}
    def _generate_examples(self, n):
        for i in range(n):
            yield i, {"article": f"w{i} w{i + 1} é", "meta": {"stars": i}, "tags": ["x"] * i}

TinyNews(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set prepared by another process: here only its files are known, not its code."""
    folder = tmp_path_factory.mktemp("tfds")
    script = folder / "make.py"
    script.write_text(MAKE_DATA_SET)
    done = subprocess.run([sys.executable, str(script), str(folder / "data")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "data"


def test_tfds_by_name(tfds_folder: Path):
    mapping = {"prompt": "article", "stars": "meta/stars", "tags": "tags"}
    records = tfds_records("tiny_news", "train", tfds_folder, mapping)
    found = sorted((records[i] for i in range(len(records))), key=lambda r: r["stars"])
    assert found == [{"prompt": f"w{i} w{i + 1} é", "stars": i, "tags": ["x"] * i} for i in range(7)]
    json.dumps(found)  # plain Python values
    assert records.place(3) == "tiny_news/train[3]"
    assert "tensorflow" not in sys.modules
    iterator = prompt_batches(records, WORDS, batch_size=7, seed=0, prompt_length=3)
    assert {r["prompt"] for r in next(iterator).records} == {r["prompt"] for r in found}
    with pytest.raises(UserError, match=r"tiny_news/train\[0\]: the prompt has 3 tokens"):
        prompt_batches(records, WORDS, batch_size=7, seed=0, prompt_length=2)
    everything = tfds_records("tiny_news:1.0.0", "test", tfds_folder)
    assert set(everything[0]) == {"article", "meta", "tags"}
    assert len(tfds_records("tiny_news", "train[:3]", tfds_folder)) == 3
    assert len(tfds_records(str(tfds_folder / "tiny_news" / "1.0.0"), "test")) == 2


@pytest.mark.parametrize(
    ("name", "split", "mapping", "said"),
    [
        ("no_such_data_set", "train", None, "there is no TFDS data set 'no_such_data_set'.*prepare it once"),
        ("someone:news", "train", None, "community data sets need a network"),
        ("tiny_news", "dev", None, "cannot read split 'dev'.*splits: .*train"),
        ("tiny_news", "train", {"prompt": "text"}, 'no field "text"; they have .*"article"'),
        ("tiny_news", "train", {"prompt": "meta/x"}, 'no field "meta/x"'),
        ("mnist", "train", None, "mnist is not prepared in .*download_and_prepare"),
    ],
)
def test_bad_tfds(tfds_folder: Path, name: str, split: str, mapping, said: str):
    with pytest.raises(UserError, match=said):
        tfds_records(name, split, tfds_folder, mapping)
