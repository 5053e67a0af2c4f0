"""Shared parts of the readers: rows of files with their places, typed fields, common judgements."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.records.forms import Judgement, Ranking, Rater
from rlaif_jax.files import atomic_write, parquet_rows, printable, read_bytes

_SHAPE_ERRORS = (
    KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, SyntaxError,
)  # fmt: skip


class ReadResult(tuple[list[Judgement], list[str]]):
    """(judgements, a message "FILE:LINE: fault" for each bad row): what a reader returns.

    Attributes:
        unused: what else of the file is in no judgement, and how often: "field NAME", "empty annotation" ...
    """

    unused: Counter[str]

    def __new__(cls, good: list[Judgement], bad: list[str], unused: Counter[str]) -> ReadResult:
        made = super().__new__(cls, (good, bad))
        made.unused = unused
        return made


class Row(dict[str, Any]):
    """A row of a file that remembers which of its fields were read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Returns the value of a field, or `default` where the row lacks it."""
        self._read.add(name)
        return super().get(name, default)

    def items(self) -> Any:
        """Returns all (name, value); all fields count as read."""
        self._read.update(self)
        return super().items()

    @property
    def unread(self) -> list[str]:
        """Returns the names of the fields that hold something and were not read."""
        return [name for name, value in super().items() if name not in self._read and value not in (None, "", [], {})]


class Collector:
    """The judgements read so far (`good`), messages on faults (`bad`), counts of what was left (`unused`)."""

    def __init__(self) -> None:
        self.good: list[Judgement] = []
        self.bad: list[str] = []
        self.unused: Counter[str] = Counter()

    @contextlib.contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Turns an error inside the block into a message about `where`.

        Judgements that were added before the error are kept.
        """
        try:
            yield
        except UserError as error:
            self.bad.append(printable(f"{where}: {error}"))
        except _SHAPE_ERRORS as error:
            self.bad.append(printable(f"{where}: not of this shape ({type(error).__name__}: {error})"))

    def rows(self, places: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Yields the (place, row) of `places` and counts the fields that the reader of a good row left.

        Args:
            places: what `json_rows` or `table_rows` yields, with `bad` as its messages.
        """
        for where, value in places:
            row = Row(value) if isinstance(value, dict) else value
            before = len(self.bad)
            yield where, row
            if isinstance(row, Row) and len(self.bad) == before:
                self.unused.update(f"field {printable(str(name))}" for name in row.unread)

    @property
    def result(self) -> ReadResult:
        """Returns (judgements, messages), with the counts."""
        return ReadResult(self.good, self.bad, self.unused)


# ---- Files


def read_text(path: Path) -> str:
    """Returns the text of a file or a .gz; `damaged` finds the bytes that are no UTF-8."""
    return read_bytes(path).decode(errors="surrogateescape")


def damaged(piece: str) -> bool:
    """Returns whether a piece of `read_text` held bytes that are no UTF-8."""
    return any("\udc80" <= character <= "\udcff" for character in piece)


_NO_UTF8 = "it holds bytes that are no UTF-8"
_TOKENS = re.compile(r'"(?:[^"\\\n]|\\.)*+"?|[{}\[\]]')  # JSON strings, closed or cut by the line's end, and brackets
_CLOSES = {"{": "}", "[": "]"}


def json_rows(path: Path, bad: list[str]) -> Iterator[tuple[str, Any]]:
    """Yields (place, value) of each element of a JSON array, JSON value of a file, or row of a .parquet.

    A value that is no JSON, such as one cut short, becomes a message in `bad`; reading goes on behind it.

    Args:
        path: the file, or a .gz of it.
        bad: receives the messages.

    Raises:
        UserError: the file cannot be read.
    """
    if path.suffix == ".parquet":
        return (yield from parquet_rows(path))
    text = read_text(path)
    some_damage = damaged(text)
    array = re.match(r"\s*\[", text)
    blanks = re.compile(r"[\s,]*" if array else r"\s*")
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
            require(not some_damage or not damaged(text[position:end]), f"no valid JSON ({_NO_UTF8})")
            yield where, value
            position = end
        except (UserError, ValueError, RecursionError) as error:
            fault = str(error) if isinstance(error, UserError) else f"no valid JSON ({error})"
            behind = (_end_of_value(text, position) if array else None) or _next_value(text, position) or len(text)
            left = len(text[position:behind].rstrip().split("\n"))
            bad.append(f"{where}: {fault}" + (f"; {left} lines are left out" if left > 1 else ""))
            position = behind


def _end_of_value(text: str, position: int) -> int | None:
    """Returns where the brackets that open at `position` are all closed again; None where they are not."""
    expected: list[str] = []
    for token in _TOKENS.finditer(text, position):
        if token[0] in _CLOSES:
            expected.append(_CLOSES[token[0]])
        elif token[0] in "]}" and (not expected or token[0] != expected.pop()):
            return None
        if not expected:
            return token.end()
    return None


def _next_value(text: str, position: int) -> int | None:
    """Returns the beginning of the next line that may be a row, behind a damaged value at `position`.

    It is indented no deeper than the line of `position` and closes nothing: a part of a value over several lines is no row.
    """
    start = text.rfind("\n", 0, position) + 1
    indent = re.compile(r"[ \t]*").match(text, start).end() - start  # type: ignore[union-attr]
    found = re.compile(rf"\n(?=[ \t]{{0,{indent}}}[^ \t\r\n\]}}])").search(text, position)
    return found.end() if found else None


def table_rows(
    path: Path, bad: list[str], columns: Sequence[str], *, delimiter: str = ",", header: bool = True,
    text: str | None = None,
) -> Iterator[tuple[str, dict[str, str]]]:  # fmt: skip
    """Yields (place, row) of each row of a table; a row of another width becomes a message in `bad`.

    A row ends at a line feed (or CR LF) outside quotes, and nowhere else. Cells of a table with tabs are not quoted: a
    quotation mark is a character of the cell. Blank cells behind the last column are left out.

    Args:
        path: the file.
        bad: receives the messages.
        columns: the columns that the table must have.
        delimiter: the character between columns.
        header: the first line names the columns; else the table has just `columns`, in this order.
        text: the content of the file, if it is read already.

    Raises:
        UserError: the file cannot be read, or lacks a column.
    """
    records = _records(read_text(path) if text is None else text, delimiter, quoted=delimiter != "\t")
    names = list(columns)
    if header:
        _, first = next(records, (1, []))
        names = [name.strip() for name in first] if isinstance(first, list) else [first]
        missing = [column for column in columns if column not in names]
        shown = printable(", ".join(names))[:300]
        require(not missing, f"{path}:1: no column {', '.join(missing)}; the columns are {shown}")
        twice = [column for column in columns if names.count(column) > 1]
        require(not twice, f"{path}:1: the column {', '.join(twice)} is there twice; the columns are {shown}")
    for line, row in records:
        where = f"{path}:{line}"
        if isinstance(row, str):
            bad.append(f"{where}: {row}")
            continue
        while len(row) > len(names) and not row[-1].strip():
            row.pop()
        if any(map(damaged, row)):
            bad.append(f"{where}: no text ({_NO_UTF8})")
        elif len(row) == len(names):
            yield where, dict(zip(names, row))
        elif any(row):
            bad.append(f"{where}: {len(row)} columns; the {len(names)} are {printable(', '.join(names))[:300]}")


def _records(text: str, delimiter: str, quoted: bool) -> Iterator[tuple[int, list[str] | str]]:
    """Yields (line, cells) of each record, or (line, fault) where a quoted cell has no right end.

    The csv module cannot do this: it ends rows at a lone carriage return, refuses cells above a limit that is global to
    the process, and reads on at a place inside such a cell.
    """
    if not quoted:
        lines = text.split("\n")
        for number, content in enumerate(lines[:-1] if lines[-1] == "" else lines, 1):
            yield number, content.removesuffix("\r").split(delimiter)
        return
    mark = re.escape(delimiter)
    end = rf"({mark}|\r?\n|\Z)"
    inside, plain = re.compile(r'"((?:[^"]|"")*+)"'), re.compile(rf"([^{mark}\n]*?){end}")
    behind = re.compile(end)
    position, line = 0, 1
    while position < len(text):
        start, cells, fault, separator = position, [], "", delimiter
        while separator == delimiter and not fault:
            cell = inside.match(text, position) if text.startswith('"', position) else None
            if cell is None and text.startswith('"', position):
                left = text.count("\n", position)
                fault = f"a quoted cell begins here and ends nowhere; the {left} lines behind it are not read"
                position = len(text)
            elif cell is None:
                found = plain.match(text, position)
                assert found is not None  # the end of the text ends a cell
                cells.append(found[1])
                position, separator = found.end(), found[2]
            elif (after := behind.match(text, cell.end())) is None:
                fault = "text behind a quoted cell; a quotation mark inside a cell is written twice"
                position = text.find("\n", cell.end()) + 1 or len(text)
            else:
                cells.append(cell[1].replace('""', '"'))
                position, separator = after.end(), after[1]
        yield line, fault or cells
        line += text.count("\n", start, position)


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
    for where, row in found.rows(json_rows(path, found.bad)):
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


def amount(value: Any) -> float | None:
    """Returns a number from 0 up (a time, a cost) as a float; None for NaN, infinity and other values."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value < math.inf else None


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

    A label that differs from one option by its case and blanks alone is that option.

    Raises:
        UserError: `chosen` is not among the options.
    """
    if chosen not in options:
        alike = [option for option in options if option.strip().casefold() == chosen.strip().casefold()]
        require(len(alike) == 1, f"the label {chosen!r} is not among {', '.join(options)}")
        chosen = alike[0]
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


def write_jsonl(rows: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Writes rows as JSON lines to the file `path`, the whole file or nothing; returns the number of rows.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(path) as file:
        return sum(bool(file.write(json.dumps(row, ensure_ascii=True) + "\n")) for row in rows)


def write_table(rows: Iterable[Sequence[str]], columns: Sequence[str], path: Path) -> int:
    """Writes rows as CSV under a header, the whole file or nothing; returns the number of rows.

    A row that UTF-8 cannot hold (half a surrogate pair) is left out.

    Args:
        rows: the cells of each row.
        columns: the names of the columns, which make the header.
        path: the file; it is replaced.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(path) as file:
        count = -1  # the header is no row
        for cells in itertools.chain([columns], rows):
            line = ",".join(map(_quoted, cells)) + "\n"
            if encodable(line):
                file.write(line)
                count += 1
    return count


def _quoted(cell: str) -> str:
    """Returns a cell as a table holds it: in quotes where it has a comma, a quotation mark or a line end."""
    return f'"{cell.replace(chr(34), chr(34) * 2)}"' if re.search(r'[",\r\n]', cell) else cell


def encodable(text: str) -> bool:
    """Returns whether UTF-8 can hold a text: not so half a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
