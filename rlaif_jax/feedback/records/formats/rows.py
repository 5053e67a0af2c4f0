"""What the readers share: rows of files with their places, fields with their types, and judgements made of them."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.records.forms import Judgement, Ranking, Rater

Found = tuple[list[Judgement], list[str]]
SHAPE_ERRORS = (UserError, KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


class Collector:
    """The judgements read so far, and a message for each row that gave none."""

    def __init__(self) -> None:
        self.good: list[Judgement] = []
        self.bad: list[str] = []

    @contextlib.contextmanager
    def at(self, where: str) -> Iterator[None]:
        """What goes wrong inside is a message about `where`; what was added before stays."""
        try:
            yield
        except UserError as error:
            self.bad.append(f"{where}: {error}")
        except SHAPE_ERRORS as error:
            self.bad.append(f"{where}: not of this shape ({type(error).__name__}: {error})")

    @property
    def found(self) -> Found:
        return self.good, self.bad


# ---- Files


def read_text(path: Path) -> str:
    """A file's text, also of a `.gz`; bytes that are no UTF-8 become characters that `no_text` finds again."""
    try:
        data = Path(path).read_bytes()
        if Path(path).suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    return data.decode(errors="surrogateescape").removeprefix("\ufeff")


def _no_text(piece: str) -> bool:
    return any("\udc80" <= character <= "\udcff" for character in piece)


def json_rows(path: Path, bad: list[str]) -> Iterator[tuple[str, Any]]:
    """(place, value) of each element of a JSON array, or of each line of a JSONL file.

    A value that is no JSON, such as one cut short, is a message in `bad`; reading goes on at the next line.
    """
    text = read_text(path)
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
    """(place, row) of a table with at least these columns. header: the first line names them; else they are these, in
    this order. A row of another width is a message in `bad`. text: the file's, if it is read already."""
    lines = (read_text(path) if text is None else text).splitlines(keepends=True)
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


# ---- Fields

_KINDS: dict[type, str] = {str: "text", list: "a list", dict: "an object", int: "a whole number", float: "a number"}


def field(row: Any, name: str, kind: type | tuple[type, ...] = str) -> Any:
    """A field of a row; UserError if the row is no object, lacks it, or holds another type there."""
    require(isinstance(row, Mapping), f"a row must be an object, not {str(row)[:40]!r}")
    require(name in row, f"no field {name!r}; the fields are {', '.join(map(str, row))}"[:300])
    value = row[name]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    right = isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)
    require(right, f"{name} must be {_KINDS.get(kinds[0], kinds[0].__name__)}, not {str(value)[:40]!r}")
    return value


# ---- Judgements


def pair(prompt: str, answers: Sequence[str], winner: int | None, rater: Rater, **more: Any) -> Ranking:
    """Two answers, of which number `winner` (0 or 1) is better; None = a tie."""
    ranks = {0: (1, 2), 1: (2, 1), None: (1, 1)}[winner]
    status = "ok" if winner is not None else "tie"
    return Ranking(prompt=prompt, answers=tuple(answers), rater=rater, ranks=ranks, status=status, **more)  # type: ignore[arg-type]


def unscored_pair(prompt: str, answers: Sequence[str], rater: Rater, **more: Any) -> Ranking:
    """A comparison whose verdict could not be read."""
    return Ranking(prompt=prompt, answers=tuple(answers), rater=rater, status="unparsed", **more)


def choice(prompt: str, options: Sequence[str], chosen: str, rater: Rater) -> Ranking:
    """A label as a judgement: of the `options` that the rater could choose from, `chosen` is first, the others tie."""
    require(chosen in options, f"the label {chosen!r} is none of {', '.join(options)}")
    ranks = tuple(1 if option == chosen else 2 for option in options)
    return Ranking(prompt=prompt, answers=tuple(options), rater=rater, ranks=ranks)


def chosen(judgement: Judgement) -> int | None:
    """The index of the one best answer of a ranking: of a comparison the winner, of a `choice` the label; None for a tie,
    a partial order, another form, and where there is no value."""
    if not isinstance(judgement, Ranking) or not judgement.answered or not judgement.ranks:
        return None
    placed = [rank for rank in judgement.ranks if rank is not None]
    return judgement.ranks.index(min(placed)) if placed.count(min(placed)) == 1 else None


def locate(text: str, quote: str, near: int = 0) -> tuple[int, int]:
    """(start, end) of the occurrence of `quote` that begins nearest to `near`, blanks and line ends taken as equal."""
    words = quote.split()
    require(bool(words), "the quoted words are empty")
    matches = list(re.finditer(r"\s+".join(map(re.escape, words)), text))
    require(bool(matches), f"the quoted words {quote[:60]!r} do not occur in the answer")
    best = min(matches, key=lambda match: abs(match.start() - near))
    return best.start(), best.end()


HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def dialogue(turns: Iterable[tuple[bool, str]]) -> str:
    """A conversation as one prompt that ends where the assistant speaks. turns: (by the assistant, text)."""
    return "".join(f"{ASSISTANT if assistant else HUMAN} {text}" for assistant, text in turns) + ASSISTANT


def write_jsonl(rows: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Write rows as JSONL, whole or not at all; their number."""
    lines = [json.dumps(row, ensure_ascii=True) + "\n" for row in rows]
    _write(path, "".join(lines))
    return len(lines)


def write_table(rows: Iterable[Sequence[str]], columns: Sequence[str], path: Path) -> int:
    """Write rows as CSV under a header, whole or not at all; their number."""
    out, kept = io.StringIO(), list(rows)
    csv.writer(out, lineterminator="\n").writerows([columns, *kept])
    _write(path, out.getvalue())
    return len(kept)


def _write(path: Path, text: str) -> None:
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
