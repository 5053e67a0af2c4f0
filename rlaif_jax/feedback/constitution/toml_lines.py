"""A TOML file of `[[section]]` entries, read so that every value knows its line.

The standard library's parser gives values without lines. However, a TOML statement ends with a line, so the
file is cut at the line ends outside texts and brackets, and each statement has the line of its beginning.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlaif_jax.config import UserError, require
from rlaif_jax.files import printable, read_bytes


@dataclass
class TomlEntry:
    """The fields of one `[[section]]`, or of the top of the file, each with its line.

    The methods `text`, `choice`, `texts`, `number` and `flag` read a field and raise UserError, with file and
    line, where it is missing or of another kind; `done` raises UserError for a field that none of them has
    read.

    Attributes:
        path: the file.
        section: the name of the section; "" = the top of the file.
        line: the line of its beginning.
        values: each field's value and line.
        read: the names that were asked for.
    """

    path: Path
    section: str
    line: int
    values: dict[str, tuple[Any, int]]
    read: set[str] = field(default_factory=set)

    def where(self, name: str = "") -> str:
        """Returns `file:line` of a field, or of the entry."""
        return f"{self.path}:{self.values[name][1] if name in self.values else self.line}"

    @property
    def label(self) -> str:
        """Returns the name of this entry in messages."""
        return f"[[{self.section}]]" if self.section else "the top of the file"

    def wrong(self, name: str, message: str) -> UserError:
        """Returns the error for a wrong field `name`; its text is file, line, section and `message`."""
        return UserError(printable(f"{self.where(name)}: {self.label}: {message}"))

    def has(self, name: str) -> bool:
        """Returns whether the entry has the field."""
        self.read.add(name)
        return name in self.values

    def _value(self, name: str, expected: str) -> Any:
        if not self.has(name):
            raise self.wrong(name, f"needs {name}, {expected}")
        return self.values[name][0]

    def text(self, name: str, default: str | None = None, *, empty: bool = False) -> str:
        """Returns the text of the field `name`.

        Args:
            name: the field.
            default: the value where the field is absent; None: the field is required.
            empty: whether a blank text is allowed.

        Raises:
            UserError: another type, a blank text that is not allowed, or a required field is absent.
        """
        if not self.has(name) and default is not None:
            return default
        value = self._value(name, "a text")
        if not isinstance(value, str):
            raise self.wrong(name, f"{name} must be a text in quotes, not {value!r}")
        if not value.strip() and not empty:
            raise self.wrong(name, f"{name} is empty")
        return value

    def choice(self, name: str, choices: Sequence[str], default: str | None = None) -> str:
        """Returns the text of the field `name`, which must be one of `choices`.

        Args:
            name: the field.
            choices: the texts that are allowed.
            default: the value where the field is absent; None: the field is required.

        Raises:
            UserError: another value, or a required field is absent.
        """
        value = self.text(name, default)
        if value not in choices:
            raise self.wrong(name, f"{name} is {value!r}; it is one of {', '.join(choices)}")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """Returns the field `name`, a list of one or more texts that are not blank.

        Raises:
            UserError: another value, or the field is absent.
        """
        value = self._value(name, "a list of texts")
        if not isinstance(value, list) or not value or not all(isinstance(v, str) and v.strip() for v in value):
            raise self.wrong(name, f'{name} must be a list of texts such as ["one", "two"], not {value!r}')
        return tuple(value)

    def number(self, name: str, default: float | None = None) -> float:
        """Returns the finite number of the field `name`.

        Args:
            name: the field.
            default: the value where the field is absent; None: the field is required.

        Raises:
            UserError: another type, a number that is not finite, or a required field is absent.
        """
        if not self.has(name) and default is not None:
            return default
        value = self._value(name, "a number")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.wrong(name, f"{name} must be a number, not {value!r}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Returns the Boolean field `name`, or `default` where it is absent; raises UserError for other types."""
        value = self.values[name][0] if self.has(name) else default
        if not isinstance(value, bool):
            raise self.wrong(name, f"{name} must be true or false, not {value!r}")
        return value

    def done(self) -> None:
        """Raises UserError for a field that was never asked for."""
        for name in self.values:
            if name not in self.read:
                near = difflib.get_close_matches(name, self.read, 1)
                hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(self.read))}"
                raise self.wrong(name, f"has no field {name}; {hint}")


def read_entries(path: Path, sections: Sequence[str]) -> tuple[str, list[TomlEntry]]:
    """Reads a TOML file; returns (its text, its entries: the top of the file, then every `[[section]]`).

    Args:
        path: the file.
        sections: the names of the sections that the file may have.

    Raises:
        UserError: the file cannot be read, is not UTF-8, is empty, is no TOML, or has another section.
    """
    path, data = Path(path), read_bytes(path)
    try:
        text = data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: this is no UTF-8 text (byte 0x{data[error.start]:02x})") from error
    expected = ", ".join(f"[[{section}]]" for section in sections)
    _check_syntax(path, text)
    entries = [TomlEntry(path, "", 1, {})]
    for line, statement, parsed in _statements(text):
        if statement.startswith("["):
            found = re.match(r"\[\[\s*([^\[\]]*?)\s*\]\]", statement)
            name = found[1].strip("\"'") if found else statement.strip("[] \t\r").split("]")[0]
            require(name in sections, f"{path}:{line}: unknown section {printable(statement)}; there are {expected}")
            require(found is not None, f"{path}:{line}: write [[{name}]], with two brackets: there may be several")
            entries.append(TomlEntry(path, name, line, {}))
        else:
            entries[-1].values |= {name: (value, line) for name, value in (parsed or {}).items()}
    require(len(entries) > 1 or bool(entries[0].values), f"{path}:1: the file is empty: expected {expected}")
    return text, entries


def _check_syntax(path: Path, text: str) -> None:
    """Raises UserError, with the line, unless the text is TOML."""
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        if place := re.search(r" \(at line (\d+), column (\d+)\)$", message):
            message = message[: place.start()]
            raise UserError(f"{path}:{place[1]}: no valid TOML at column {place[2]}: {message}") from error
        line = next((line for line, _, parsed in _statements(text) if parsed is None), 1)
        raise UserError(f"{path}:{line}: no valid TOML: {message.removesuffix(' (at end of document)')}") from error
    except RecursionError as error:
        raise UserError(f"{path}:1: no valid TOML: nested too deeply") from error


_TOKENS = re.compile(
    r""""{3}(?:[^"\\]|\\.|"(?!""))*+"{3,5}|'{3}(?:[^']|'(?!''))*+'{3,5}"""  # texts of several lines
    r"""|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+'|#[^\n]*+"""  # texts in a line, comments
    r"|[\[{]|[\]}]|\n",
    re.DOTALL,
)


def _statements(text: str) -> Iterator[tuple[int, str, dict[str, Any] | None]]:
    """Yields (first line, text, values) of every statement; blank lines and comments are not statements.

    A statement ends with the first line outside its texts and brackets. The values are None for one that is no TOML.
    """
    start, line, depth = 0, 1, 0
    ends = (match for match in _TOKENS.finditer(text + "\n") if match[0] in _BRACKETS or match[0] == "\n")
    for end in ends:
        depth += _BRACKETS.get(end[0], 0)
        if end[0] != "\n" or (depth > 0 and end.end() <= len(text)):
            continue
        statement = text[start : end.start()]
        try:
            parsed: dict[str, Any] | None = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            parsed = None
        if parsed is None or parsed or statement.lstrip().startswith("["):
            yield line, statement.strip(), parsed
        line += statement.count("\n") + 1
        start, depth = end.end(), 0


_BRACKETS = {"[": 1, "{": 1, "]": -1, "}": -1}
