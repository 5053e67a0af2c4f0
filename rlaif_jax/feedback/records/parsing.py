"""Reads judgements from JSON and JSON lines; every fault is a message with file, line and field."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.records.forms import FIELD_TYPES, FORMS, VERSION, Call, Judgement, Rater, Span, field_names
from rlaif_jax.files import each_json_line

_NESTED: dict[str, type] = {"rater": Rater, "call": Call}
_SINGULAR = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_PLURAL = {str: "texts", int: "whole numbers", float: "numbers", type(None): "nulls"}


def from_json(values: Any, where: str = "") -> Judgement:
    """Returns the judgement that `forms.to_json` wrote as `values`.

    Raises:
        UserError: an unknown form, another version, a missing or unknown field, a wrong type, or a value that is not
            allowed; the message begins with `where`.
    """
    try:
        if not isinstance(values, Mapping):
            raise UserError(f"a judgement is a JSON object, not {_shortened(values)}")
        form: Any = values.get("form")
        require(
            isinstance(form, str) and form in FORMS,
            f"unknown form {_shortened(form)}; the forms are {', '.join(FORMS)}",
        )
        version = values.get("version", VERSION)
        require(
            version == VERSION, f"version {_shortened(version)} of the record; this program reads version {VERSION}"
        )
        return _parse_form(form, {k: v for k, v in values.items() if k not in ("form", "version")})
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from error


def _parse_form(form: str, values: Mapping[str, Any]) -> Judgement:
    fields = field_names(FORMS[form])  # type: ignore[arg-type]  # mypy takes the hash of its objects
    if unknown := sorted(values.keys() - fields):
        raise UserError(f"a {form} has no field {', '.join(unknown)}; it has {', '.join(fields)}")
    parsed: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        if name in _NESTED:
            parsed[name] = _parse_object(_NESTED[name], value, name)
        elif name == "spans":
            require(isinstance(value, (list, tuple)), f"spans must be a list of objects, not {_shortened(value)}")
            parsed[name] = tuple(_parse_object(Span, entry, "a span") for entry in value)
        elif name == "beats":
            parsed[name] = _parse_pairs(value)
        else:
            parsed[name] = _parse_field(name, value)
    for name in ("prompt", "answers", "rater"):
        require(name in parsed, f"a {form} needs {name}")
    return FORMS[form](**parsed)


def _parse_object(cls: type, values: Any, name: str) -> Any:
    """Returns a Rater, Call or Span from its JSON object. Raises UserError where it is malformed."""
    if not isinstance(values, Mapping):
        raise UserError(f"{name} must be an object, not {_shortened(values)}")
    if unknown := sorted(values.keys() - field_names(cls)):
        raise UserError(f"{name} has no field {', '.join(unknown)}; it has {', '.join(sorted(field_names(cls)))}")
    parsed = {key: _parse_field(key, value) for key, value in values.items() if value is not None}
    for needed in _needed(cls):
        require(needed in parsed, f"{name} needs {needed}")
    return cls(**parsed)


@functools.cache
def _needed(cls: type) -> tuple[str, ...]:
    """Returns the names of the fields without a default."""
    return tuple(field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING)


def _parse_field(name: str, value: Any) -> Any:
    """Returns the value of the field `name`. Raises UserError for a value of another type."""
    types = FIELD_TYPES[name]
    if type(value) is types[0] and types[0] is not list:  # most values: a million records have 25 million
        return value
    if types[0] is list:
        is_right = isinstance(value, (list, tuple)) and all(_is(entry, types[1:]) for entry in value)
        if not is_right:
            kinds = " or ".join(_PLURAL[t] for t in types[1:])
            raise UserError(f"{name} must be a list of {kinds}, not {_shortened(value)}")
        return tuple(_to_float(name, entry) if float in types else entry for entry in value)
    require(_is(value, types), f"{name} must be {_SINGULAR[types[0]]}, not {_shortened(value)}")
    return _to_float(name, value) if float in types else value


def _parse_pairs(value: Any) -> tuple[tuple[int, int], ...]:
    is_right = isinstance(value, (list, tuple)) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(_is(index, (int,)) for index in pair)
        for pair in value
    )
    require(is_right, f"beats must be a list of (better, worse) pairs of answer numbers, not {_shortened(value)}")
    return tuple((better, worse) for better, worse in value)


def _is(value: Any, types: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in types
    return isinstance(value, types) or (float in types and isinstance(value, int))


def _to_float(name: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise UserError(f"{name} is too large for a float: {_shortened(value)}") from error


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def require_known(judgement: Judgement, known: Mapping[str, Collection[str]]) -> None:
    """Raises UserError unless the judgement is of a known prompt and known answers to it.

    Args:
        judgement: the record.
        known: prompt -> its answers.
    """
    answers = known.get(judgement.prompt)
    if answers is None:
        raise UserError(
            f"a {judgement.form} of another prompt: {_shortened(judgement.prompt)} is not among the {len(known)} asked"
        )
    for answer in judgement.answers:
        require(
            answer in answers,
            f"a {judgement.form} of an unknown answer to {_shortened(judgement.prompt)}: {_shortened(answer)}",
        )


def read_judgements(
    path: Path, known: Mapping[str, Collection[str]] | None = None
) -> tuple[list[Judgement], list[str]]:
    """Returns (the judgements of a JSONL file, one message "FILE:LINE: fault" for each bad line).

    A line that a crash cut short is one bad line; the other lines are kept.

    Args:
        path: the file.
        known: prompt -> its answers; a line that judges another prompt or answer is bad. None allows all.

    Raises:
        UserError: the file cannot be read.
    """
    bad: list[str] = []
    return list(each_judgement(path, bad, known)), bad


def each_judgement(
    path: Path, bad: list[str], known: Mapping[str, Collection[str]] | None = None
) -> Iterator[Judgement]:
    """Yields the judgements of a JSONL file one by one.

    Args:
        path: the file.
        bad: gets a message "FILE:LINE: fault" for each bad line.
        known: as in `read_judgements`.

    Raises:
        UserError: the file cannot be read.
    """

    def parse(values: Any, place: str) -> Judgement:
        judgement = from_json(values)
        if known is not None:
            require_known(judgement, known)
        return judgement

    return each_json_line(path, parse, bad)
