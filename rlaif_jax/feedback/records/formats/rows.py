"""Shared parts of the readers: rows of files with their places, typed fields, common judgements."""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.records.forms import Judgement, Ranking, Rater
from rlaif_jax.files import atomic_write, read_bytes

ReadResult = tuple[list[Judgement], list[str]]
"""(judgements, a message "FILE:LINE: fault" for each bad row): what a reader returns."""

_SHAPE_ERRORS = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


class Collector:
    """The judgements read so far (`good`), and a message for each fault (`bad`)."""

    def __init__(self) -> None:
        self.good: list[Judgement] = []
        self.bad: list[str] = []

    @contextlib.contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Turns an error inside the block into a message about `where`.

        Judgements that were added before the error are kept.
        """
        try:
            yield
        except UserError as error:
            self.bad.append(f"{where}: {error}")
        except _SHAPE_ERRORS as error:
            self.bad.append(f"{where}: not of this shape ({type(error).__name__}: {error})")

    @property
    def result(self) -> ReadResult:
        """Returns (judgements, messages)."""
        return self.good, self.bad


# ---- Files


def _read_text(path: Path) -> str:
    """Returns the text of a file or a .gz; `_no_text` finds the bytes that are no UTF-8."""
    return read_bytes(path).decode(errors="surrogateescape")


def _no_text(piece: str) -> bool:
    return any("\udc80" <= character <= "\udcff" for character in piece)


def json_rows(path: Path, bad: list[str]) -> Iterator[tuple[str, Any]]:
    """Yields (place, value) of each element of a JSON array, or of each value of a file of JSON values.

    A value that is no JSON, such as one cut short, becomes a message in `bad`; reading goes on at the next line.

    Args:
        path: the file, or a .gz of it.
        bad: receives the messages.

    Raises:
        UserError: the file cannot be read.
    """
    text = _read_text(path)
    damaged = _no_text(text)
    blanks = re.compile(r"[\s,]*" if text.lstrip().startswith("[") else r"\s*")
    array = re.match(r"\s*\[", text)
    decoder = json.JSONDecoder()
    position = array.end() if array else 0
    counted, line = 0, 1
    while True:
        position = blanks.match(text, position).end()  # type: ignore[union-attr]
        line += text.count("\n", counted, position)
        counted = position
        if position == len(text) or (array and text[position] == "]"):
            return
        where = f"{path}:{line}"
        try:
            value, end = decoder.raw_decode(text, position)
            require(not damaged or not _no_text(text[position:end]), "no valid JSON (it holds bytes that are no UTF-8)")
            yield where, value
            position = end
        except (UserError, ValueError, RecursionError) as error:
            bad.append(f"{where}: {error if isinstance(error, UserError) else f'no valid JSON ({error})'}")
            following = text.find("\n", position)
            if following < 0:
                return
            position = following + 1


def table_rows(
    path: Path, bad: list[str], columns: Sequence[str], *, delimiter: str = ",", header: bool = True, quoted: bool = True,
    text: str | None = None,
) -> Iterator[tuple[str, dict[str, str]]]:  # fmt: skip
    """Yields (place, row) of each row of a table; a row of another width becomes a message in `bad`.

    Args:
        path: the file.
        bad: receives the messages.
        columns: the columns that the table must have.
        delimiter: the character between columns.
        header: the first line names the columns; else the table has just `columns`, in this order.
        quoted: cells may be quoted.
        text: the content of the file, if it is read already.

    Raises:
        UserError: the file cannot be read, or lacks a column.
    """
    lines = (_read_text(path) if text is None else text).splitlines(keepends=True)
    reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
    names = list(columns)
    if header:
        names = next(reader, [])
        missing = [column for column in columns if column not in names]
        require(not missing, f"{path}:1: no column {', '.join(missing)}; the columns are {', '.join(names)}")
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            bad.append(f"{where}: no row of a table ({error})")
            continue
        if len(row) == len(names):
            yield where, dict(zip(names, row))
        elif row:
            bad.append(f"{where}: {len(row)} columns; the {len(names)} are {', '.join(names)}")


def parse_rows(path: Path, parse: Callable[[Any], Iterable[Judgement]]) -> ReadResult:
    """Returns the judgements that `parse` makes of each row of a JSON file, and the messages.

    Args:
        path: the file (a JSON array or JSON lines), or a .gz of it.
        parse: row -> its judgements; where it raises an error, the row becomes a message.

    Returns:
        (judgements, a message "FILE:LINE: fault" for each bad row).

    Raises:
        UserError: the file cannot be read.
    """
    found = Collector()
    for where, row in json_rows(path, found.bad):
        with found.at(where):
            found.good.extend(parse(row))
    return found.result


# ---- Fields

_TYPE_NAMES: dict[type, str] = {
    str: "text",
    list: "a list",
    dict: "an object",
    int: "a whole number",
    float: "a number",
}


def field(row: Any, name: str, expected: type | tuple[type, ...] = str) -> Any:
    """Returns the value of a field of a row; an int where a float is expected is converted.

    Args:
        row: a value read from a file, such as a JSON object.
        name: the key of the field.
        expected: the type of the value, or a tuple of allowed types.

    Raises:
        UserError: the row is no object, lacks the field, or holds a value of another type.
    """
    require(isinstance(row, Mapping), f"a row must be an object, not {str(row)[:40]!r}")
    require(name in row, f"no field {name!r}; the fields are {', '.join(map(str, row))}"[:300])
    value = row[name]
    types = expected if isinstance(expected, tuple) else (expected,)
    if float in types and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    is_right = isinstance(value, types) and (not isinstance(value, bool) or bool in types)
    require(is_right, f"{name} must be {_TYPE_NAMES.get(types[0], types[0].__name__)}, not {str(value)[:40]!r}")
    return value


# ---- Judgements


def pair(prompt: str, answers: Sequence[str], winner: int | None, rater: Rater, **more: Any) -> Ranking:
    """Returns the comparison of two answers.

    Args:
        prompt: the prompt.
        answers: the two answers.
        winner: the index of the better answer; None for a tie.
        rater: the judge.
        more: further fields of the record.
    """
    ranks = {0: (1, 2), 1: (2, 1), None: (1, 1)}[winner]
    status = "ok" if winner is not None else "tie"
    return Ranking(prompt=prompt, answers=tuple(answers), rater=rater, ranks=ranks, status=status, **more)  # type: ignore[arg-type]


def unscored_pair(prompt: str, answers: Sequence[str], rater: Rater, **more: Any) -> Ranking:
    """Returns the record of a comparison of two answers whose verdict could not be read.

    Args:
        prompt: the prompt.
        answers: the two answers.
        rater: the judge.
        more: further fields of the record, such as `raw`.
    """
    return Ranking(prompt=prompt, answers=tuple(answers), rater=rater, status="unparsed", **more)


def choice(prompt: str, options: Sequence[str], chosen: str, rater: Rater) -> Ranking:
    """Returns a label as a ranking of the options: the chosen option is first, the others are tied.

    Args:
        prompt: what was labelled.
        options: all labels that could be chosen.
        chosen: the label.
        rater: who chose.

    Raises:
        UserError: `chosen` is not among the options.
    """
    require(chosen in options, f"the label {chosen!r} is not among {', '.join(options)}")
    ranks = tuple(1 if option == chosen else 2 for option in options)
    return Ranking(prompt=prompt, answers=tuple(options), rater=rater, ranks=ranks)


def chosen(judgement: Judgement) -> int | None:
    """Returns the index of the single best answer of a ranking, such as the label of a `choice`.

    None for a tie at the top, a partial order, a record of another form or a record without a value.
    """
    if not isinstance(judgement, Ranking) or not judgement.answered or not judgement.ranks:
        return None
    placed = [rank for rank in judgement.ranks if rank is not None]
    return judgement.ranks.index(min(placed)) if placed.count(min(placed)) == 1 else None


def locate(text: str, quote: str, near: int = 0) -> tuple[int, int]:
    """Returns (start, end) of the occurrence of `quote` that begins nearest to `near`.

    All blanks and line ends count as equal.

    Raises UserError where the text does not contain the quote.
    """
    words = quote.split()
    require(bool(words), "the quoted words are empty")
    matches = list(re.finditer(r"\s+".join(map(re.escape, words)), text))
    require(bool(matches), f"the quoted words {quote[:60]!r} do not occur in the answer")
    best = min(matches, key=lambda match: abs(match.start() - near))
    return best.start(), best.end()


HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def conversation_prompt(turns: Iterable[tuple[bool, str]]) -> str:
    """Returns a conversation as one prompt that ends where the assistant speaks.

    Args:
        turns: (whether the assistant speaks, text) of each turn.
    """
    return "".join(f"{ASSISTANT if assistant else HUMAN} {text}" for assistant, text in turns) + ASSISTANT


def write_jsonl(rows: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Writes rows as JSON lines to the file `path`, the whole file or nothing; returns the number of rows.

    Raises:
        UserError: the file cannot be written.
    """
    lines = [json.dumps(row, ensure_ascii=True) + "\n" for row in rows]
    with atomic_write(path) as file:
        file.writelines(lines)
    return len(lines)


def write_table(rows: Iterable[Sequence[str]], columns: Sequence[str], path: Path) -> int:
    """Writes rows as CSV under a header, the whole file or nothing; returns the number of rows.

    Args:
        rows: the cells of each row.
        columns: the names of the columns, which make the header.
        path: the file; it is replaced.

    Raises:
        UserError: the file cannot be written.
    """
    table = list(rows)
    with atomic_write(path) as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *table])
    return len(table)
