"""Readers of prompts and pairs: JSON lines, Parquet and TFDS data sets as random-access records."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from rlaif_jax.config import UserError, require
from rlaif_jax.data.conversations import ANSWERED, prompt_text, read_pair, read_ratings, read_turns
from rlaif_jax.files import parquet_rows, printable, read_bytes, read_json_lines

PathLike: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True)
class FileRecords:
    """Records in memory, each with its place in a file.

    Attributes:
        records: the decoded lines.
        places: "FILE:LINE" of each record.
    """

    records: tuple[dict[str, Any], ...]
    places: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        return self.records[index]

    def place(self, index: int) -> str:
        """Returns the name of a record for messages: "FILE:LINE"."""
        return self.places[index]


def plain_text(path: PathLike) -> str:
    """Returns the text of a file, with lines that end with a newline alone.

    Raises:
        UserError: it cannot be read, is no UTF-8, or holds nothing but blanks.
    """
    try:
        text = read_bytes(Path(path)).decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: {error}") from error
    require(bool(text.strip()), f"{path} holds no text")
    return text


def jsonl_records(path: PathLike, *, required: Sequence[str] = ("prompt",)) -> FileRecords:
    """Reads and checks a file of one JSON object a line (`.jsonl`, `.jsonl.gz`), or of rows (`.parquet`).

    A `prompt` that is a list of messages, or the `messages` of a record without a prompt, become text
    (`conversations.prompt_text`), and the record keeps the list in `messages`.

    Args:
        path: the file.
        required: fields that every record must have, each a string. Other fields are kept as they are.

    Raises:
        UserError: the file is missing or empty, or a line is not as it should be (names file, line and field).
    """

    def parse(value: Any, place: str) -> tuple[dict[str, Any], str]:
        if isinstance(value, dict) and "prompt" in required:
            name = "messages" if "prompt" not in value else "prompt"
            if isinstance(said := value.get(name), list):
                turns = read_turns(said, name)
                require(turns[-1].role != "assistant", f"the last message of {name} is by the assistant: {ANSWERED}")
                value = value | {"prompt": prompt_text(turns), "messages": said}
        return _checked(value, place, required), place

    return _read(path, parse, required)


def pair_records(path: PathLike) -> FileRecords:
    """Reads preference pairs from JSON lines: `prompt`, `chosen`, `rejected` and optionally `probability`.

    The three are texts or lists of messages; see `conversations.read_pair` for where else the prompt may be.
    `probability`, in [0, 1], is the probability that `chosen` is the better answer (a soft label). Its default is 1, or 1/2
    where the record rates both answers equally (`conversations.rating_columns`).

    Raises:
        UserError: as `jsonl_records`, a probability that is not a number from 0 to 1, or a chosen answer with the lower
            rating.
    """
    return _read(path, _pair, ("prompt", "chosen", "rejected"))


def _pair(value: Any, place: str) -> tuple[dict[str, Any], str]:
    if not isinstance(value, dict) or not value.keys() >= {"chosen", "rejected"}:
        _checked(value, place, ("chosen", "rejected"))  # raises the error for what is missing
    prompt, answers, _ = read_pair(value)
    record = _checked(value | dict(zip(("prompt", "chosen", "rejected"), (prompt, *answers))), place, ("prompt",))
    better, worse = read_ratings(value)
    if better is not None and worse is not None and "probability" not in value:
        if better < worse:
            raise UserError(f"{place}: the chosen answer is rated {better}, below the rejected one, {worse}")
        record |= {"probability": 0.5} if better == worse else {}
    probability = record.get("probability", 1.0)
    is_number = isinstance(probability, int | float) and not isinstance(probability, bool)
    if not is_number or not 0.0 <= probability <= 1.0:
        raise UserError(f'{place}: field "probability" should be a number from 0 to 1, not {shown(probability)}')
    return _checked(record, place, ("chosen", "rejected")), place


def _read(
    path: PathLike, parse: Callable[[Any, str], tuple[dict[str, Any], str]], required: Sequence[str]
) -> FileRecords:
    parquet = Path(path).suffix == ".parquet"
    if parquet:
        good = [parse(row, place) for place, row in parquet_rows(path)]
    else:
        good, bad = read_json_lines(path, parse)
        if bad:
            raise UserError(bad[0])
    if not good:
        fields = f", with {listed(required)}" if required else ""
        raise UserError(f"{path} is empty: expected {'rows' if parquet else 'one JSON object a line'}{fields}")
    records, places = zip(*good, strict=True)
    return FileRecords(records, places)


def _checked(record: Any, place: str, required: Sequence[str]) -> dict[str, Any]:
    if not isinstance(record, dict):
        fields = f" with {listed(required)}" if required else ""
        hint = "; write the items of a list one a line" if isinstance(record, list) else ""
        raise UserError(f"{place}: expected a JSON object{fields}, not {shown(record)}{hint}")
    for name in required:
        if name not in record:
            raise UserError(f'{place}: field "{name}" is missing; the line has {listed(record)}')
        if not isinstance(record[name], str):
            raise UserError(f'{place}: field "{name}" should be a string, not {shown(record[name])}')
        try:
            record[name].encode()
        except UnicodeEncodeError as error:  # "\ud83d" alone is valid JSON, but no text; tokenizers fail on it later
            raise UserError(f'{place}: field "{name}" holds half of a Unicode surrogate pair') from error
    return record


def listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    """Returns field names as a message shows them."""
    return ", ".join(f'"{printable(name)}"' for name in names) or "no fields"


def shown(value: Any) -> str:
    """Returns a JSON value as a message shows it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True, eq=False)
class TfdsRecords:
    """Records of one split of a TFDS data set, read from disk one at a time.

    Byte strings become text, arrays lists, and NumPy scalars Python numbers.

    Attributes:
        source: TFDS's random-access data source.
        name: data set and split, for messages.
        mapping: our field -> the data set's field ("a/b" for a nested one); None keeps all fields.
    """

    source: Any
    name: str
    mapping: Mapping[str, str] | None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        record = self.source[index]
        if self.mapping is None:
            return {name: plain(value) for name, value in record.items()}
        return {ours: plain(_field(record, theirs)) for ours, theirs in self.mapping.items()}

    def place(self, index: int) -> str:
        """Returns the name of a record for messages: "NAME/SPLIT[INDEX]"."""
        return f"{self.name}[{index}]"


def tfds_records(
    name: str, split: str, data_dir: PathLike | None = None, mapping: Mapping[str, str] | None = None
) -> TfdsRecords:
    """Opens a prepared TFDS data set by its name, without TensorFlow and without a network.

    Args:
        name: `"data_set"`, `"data_set/config"` or `"data_set/config:1.0.0"`; or the folder of one prepared version.
        split: such as `"train"` or `"train[:10%]"`.
        data_dir: where data sets are prepared; by default TFDS's own (`TFDS_DATA_DIR`, `~/tensorflow_datasets`).
        mapping: our field -> the data set's field, such as `{"prompt": "article"}`; a nested field is spelled `"a/b"`.
            None keeps all fields under their own names.

    Raises:
        UserError: unknown data set, split or field; not prepared; or prepared in a file format without random access
            (TFDS's default, tfrecord).
    """
    from rlaif_jax.data.tfds_offline import tfds  # here, because it takes seconds and only this function needs it

    remedy = (
        f'prepare it once with tfds.builder("{name}", file_format="array_record").download_and_prepare()'
        " and give its data_dir"
    )
    if name.partition("/")[0].count(":") and not name.partition(":")[2][:1].isdigit():
        raise UserError(f"TFDS data set {name}: community data sets need a network; {remedy}")
    try:
        if Path(name).is_dir():
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name, data_dir=None if data_dir is None else os.fspath(data_dir))
    except Exception as error:  # TFDS raises many kinds, from its own, from the builder's code and from the disk
        raise UserError(f"there is no TFDS data set {name!r}: {_first_line(error)}; {remedy}") from error
    if not builder.info.splits:
        raise UserError(f"the TFDS data set {name} is not prepared in {builder.data_dir}; {remedy}")
    try:
        source = builder.as_data_source(split=split)
    except Exception as error:
        raise UserError(
            f"cannot read split {split!r} of the TFDS data set {name} in {builder.data_dir} (splits: "
            f"{', '.join(builder.info.splits)}; file format: {builder.info.file_format}): "
            f"{_first_line(error)}; random access needs the file format array_record"
        ) from error
    records = TfdsRecords(source, f"{name}/{split}", None if mapping is None else dict(mapping))
    if len(records) == 0:
        raise UserError(f"split {split!r} of the TFDS data set {name} holds no records")
    records[0]  # a wrong mapping shows before the run starts
    return records


def _field(record: Mapping[str, Any], path: str) -> Any:
    value: Any = record
    for part in path.split("/"):
        if not isinstance(value, Mapping) or part not in value:
            raise UserError(f'the TFDS records have no field "{path}"; they have {listed(record)}')
        value = value[part]
    return value


def plain(value: Any) -> Any:
    """Converts a TFDS value to plain Python: bytes of UTF-8 to text, arrays to lists, scalars to numbers."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def each_row(data: Sequence[str], split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, row) of JSON lines, Parquet and TFDS data sets; a .txt file is a row with `text`.

    Args:
        data: paths of files, or names or folders of data sets.
        split: the split of data sets.

    Raises:
        UserError: a file or data set cannot be read.
    """
    for name in data:
        if Path(name).suffix == ".txt":
            yield name, {"text": plain_text(name)}
            continue
        is_file = Path(name).is_file() or Path(name).suffix in (".jsonl", ".json", ".gz", ".parquet")
        records = jsonl_records(name, required=()) if is_file else tfds_records(name, split)
        for index in range(len(records)):
            yield records.place(index), plain(records[index])


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
