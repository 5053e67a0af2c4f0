"""Settings are frozen dataclasses; this module writes them to JSON, reads them back and changes them.

A choice between things is a field whose type is a union of dataclasses (`advantage: GAE | LeaveOneOut`). JSON holds
the name of the class under "type", next to its fields.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shlex
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import numpy as np

T = TypeVar("T")


class CheckFailed(RuntimeError):
    """The run contradicts what must hold of any correct run; its numbers would mean nothing."""


class Diverged(RuntimeError):
    """The policy is ruined; the message says which checkpoint is of before."""


class StopRequested(BaseException):
    """SIGTERM or Ctrl-C ends the run as `stopped`; no Exception, which a source might catch."""


class UserError(Exception):
    """Input that a person can mend: the message says what is wrong, where, and what would be right."""


def require(condition: bool, message: str) -> None:
    """Raises `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def missing_extra(what: str, extra: str) -> UserError:
    """Returns the error of a package that is not installed, with the command that installs it.

    Args:
        what: the beginning of the message: who needs which package.
        extra: the extra of this package that brings it.
    """
    return UserError(
        f"{what}: pip install -e '.[{extra}]' in the project's folder, or pip install 'FILE.whl[{extra}]' with its wheel"
    )


def check_choices(config: Any, name: str) -> None:
    """Raises UserError if a field whose type is a Literal holds another value.

    Args:
        config: a dataclass.
        name: what messages call the dataclass, such as "ppo".
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        choices = typing.get_args(hints[field.name])
        value = vars(config)[field.name]
        if typing.get_origin(hints[field.name]) is Literal and value not in choices:
            raise UserError(f"{name}.{field.name} is {value!r}; it is one of {', '.join(map(str, choices))}")


def explanations(cls: type) -> dict[str, str]:
    """Returns what a dataclass and its bases say about each field, under `Attributes:`."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:\n")[2]
        for names, text in re.findall(r"^ {4}(\S[^:\n]*): (.+(?:\n {8}.+)*)", section, re.MULTILINE):
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


# ---- To JSON


def to_json(config: Any) -> Any:
    """Returns a config, or a dict or list of configs and values, as plain JSON types.

    A field whose type is a union of several dataclasses becomes {"type": "NameOfItsClass", ...its fields}. A path
    becomes a text, an array nested lists, a function or class its name. Raises TypeError for other objects.
    """
    return _to_json(config, type(config))


def _to_json(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {name: _to_json(vars(value)[name], inner) for name, inner in _hints(type(value)).items()}
        return {"type": type(value).__name__, **fields} if len(_dataclasses(hint)) > 1 else fields
    if isinstance(value, Mapping):
        inner = (typing.get_args(hint) or (Any, Any))[-1]
        return {str(key): _to_json(item, inner) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item, inner) for item, inner in zip(value, _item_hints(hint, len(value)), strict=True)]
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (type, types.FunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    if value is None or isinstance(value, (bool, int, float, str, Path)):
        return str(value) if isinstance(value, Path) else value
    raise TypeError(f"settings cannot hold {value!r:.80}: JSON has nothing for the type {type(value).__name__}")


def save_config(config: Any, path: Path) -> None:
    """Writes `config` as indented JSON to the file `path`, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(to_json(config), indent=1) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def differing(saved: Any, now: Any, prefix: str = "") -> list[str]:
    """Returns a message for each setting that differs between two nested dicts.

    The message holds the dotted name of the setting and both values.

    Args:
        saved: the earlier settings, as JSON values.
        now: the present settings, as JSON values.
        prefix: dotted name of the two values themselves; "" for whole settings.
    """
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        names = sorted(set(saved) | set(now))
        return [line for name in names for line in differing(saved.get(name), now.get(name), f"{prefix}{name}.")]
    return [] if saved == now else [f"{prefix[:-1]} was {saved!r} and is now {now!r}"]


def changed_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns how the settings of a resumed run differ from those that it has been going by.

    Where the run's files are (`out`, `stages`) and `resume` do not count.

    Args:
        saved: the earlier settings, as JSON values.
        now: the present settings, as JSON values.

    Raises:
        UserError: a setting differs that has to stay: all but when the run warns (`watch`), where it is shown
            (`tracking`), and the number of steps, which may be raised. All settings that differ are named.
    """
    wrong, allowed = [], []
    for line in differing(saved, now):
        names = line.split()[0].split(".")
        before, after = _at(saved, names), _at(now, names)
        if names[-1] == "steps" and type(before) is type(after) is int and after > before:
            rates = ", ".join(_schedules(now))
            allowed.append(
                f"{line} (from here on the rates follow the schedule over all of them: {rates})" if rates else line
            )
        elif "watch" in names or names[0] == "tracking":
            allowed.append(line)
        elif names[0] not in ("out", "resume", "stages"):
            wrong.append(line)
    require(not wrong, f"the run was started with another config: {'; '.join(wrong)}")
    return allowed


def _at(settings: Any, names: Sequence[str]) -> Any:
    """Returns the setting of a dotted name; None where there is no such setting."""
    for name in names:
        settings = settings.get(name) if isinstance(settings, Mapping) else None
    return settings


def _schedules(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields "NAME is SHAPE" of each learning rate that does not stay constant."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _schedules(value, f"{prefix}{name}.")
        elif name == "schedule" and value != "constant":
            yield f"{prefix}{name} is {value}"


# ---- Without secrets


def without_secrets(settings: Any) -> Any:
    """Returns settings, as JSON values, with "(hidden)" in the place of secrets.

    A secret is what is under a name that contains key, token, secret or password (apart from "tokenizer"), unless it is a
    number, true, false or null, as max_tokens is; and a user name and password inside a URL, under any name.
    """
    if isinstance(settings, Mapping):
        return {key: "(hidden)" if _is_secret(str(key), x) else without_secrets(x) for key, x in settings.items()}
    if isinstance(settings, list):
        return [without_secrets(item) for item in settings]
    return without_credentials(settings) if isinstance(settings, str) else settings


def without_credentials(text: str) -> str:
    """Returns a text in which user names and passwords inside URLs are hidden."""
    return re.sub(r"(?<=://)[^/@\s]+(?=@)", "(hidden)", text)


def _is_secret(name: str, value: Any) -> bool:
    plain = value is None or isinstance(value, (bool, int, float))
    return not plain and re.search("key|token(?!izer)|secret|password", name, re.IGNORECASE) is not None


# ---- From JSON, and from the texts of a command line


def from_json(config_class: type[T], values: Any, where: str = "config.json") -> T:
    """Rebuilds a config from the output of `to_json`; fields that are left out have their defaults.

    Args:
        config_class: the config's dataclass.
        values: the parsed JSON, as `to_json` returns it.
        where: the file's name, for messages.

    Raises:
        UserError: a field is unknown, missing or of another type; the message gives its dotted name and what is right.
    """
    return _parse(config_class, values, _Place(where), text=False)


def override(config: T, values: Mapping[str, Any]) -> T:
    """Returns `config` with some settings replaced, all at once: {"steps": 5, "ppo.kl_coef": "0.1"}.

    Args:
        config: a dataclass; it is not changed.
        values: dotted name -> the new value as a Python value, as JSON, or as its text on a command line. One of
            several dataclasses is chosen by its name ("LeaveOneOut") or as an object or dict of its settings; a tuple
            is a text with spaces or commas between the items.

    Raises:
        UserError: there is no such setting, or the value is not of its type; the message names it and what is right.
    """
    return _override(config, values, _Place(""))


def from_words(choices: Mapping[str, type[T]], text: str, where: str) -> T:
    """Returns a dataclass from a line of words.

    Such a line is `judge models/smollm2 form=ranking "principle=Be brief."`.
    The first word chooses the class, a word without `=` is its first setting, the others are NAME=VALUE. Quotes hold
    words with blanks together, as in a shell.

    Args:
        choices: the first word -> its dataclass.
        text: the line.
        where: what messages call it, such as "--feedback".

    Raises:
        UserError: an unknown word or setting, or a value of another type; the message names it and what is right.
    """
    place = _Place(f"{where} {text!r}")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise place.error(f"cannot be split into words: {error}") from None
    if not words:
        raise place.error(f"names nothing; begin with one of {', '.join(choices)}")
    kind, *words = words
    if kind not in choices:
        raise place.error(f"there is no {kind!r}; it is one of {', '.join(choices)}")
    hints = _hints(choices[kind])
    first, values = next(iter(hints), None), {}
    for word in words:
        name, found, value = word.partition("=")
        if not found or name.replace("-", "_") not in hints:  # an address or a pattern may hold "="
            require(
                bool(first) and first not in values and (not found or not name.isidentifier()),
                f"{place.file}: {word!r} is no setting of {kind}; it has {', '.join(hints)}",
            )
            name, value = str(first), word
        name = name.replace("-", "_")
        require(name not in values, f"{place.file}: {name} is given twice")
        values[name] = value
    try:
        return typing.cast(T, _build(choices[kind], values, place, text=True))
    except UserError as error:  # that of a class which checks itself does not know the line
        raise error if str(error).startswith(place.file) else place.error(str(error)) from None


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a value is: the file, and the dotted name of the setting."""

    file: str
    name: str = ""

    def __truediv__(self, name: object) -> _Place:
        return _Place(self.file, f"{self.name}.{name}" if self.name else str(name))

    def error(self, what: str) -> UserError:
        return UserError(": ".join(part for part in (self.file, self.name, what) if part))


def _override(config: Any, values: Mapping[str, Any], place: _Place) -> Any:
    hints = _hints(type(config))
    nested: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        first, _, rest = name.partition(".")
        if first not in hints:
            raise (place / first).error(f"{type(config).__name__} has no such field; it has {', '.join(hints)}")
        nested.setdefault(first, {})[rest] = value
    changed = {}
    for name, inner in nested.items():
        now = vars(config)[name]
        if "" in inner:
            now = _parse(hints[name], inner.pop(""), place / name, text=True)
        if inner and not dataclasses.is_dataclass(now):
            raise (place / name).error(
                f"this is {now!r} and has no field {', '.join(inner)}; it is {_said(hints[name])}"
            )
        changed[name] = _override(now, inner, place / name) if inner else now
    return dataclasses.replace(config, **changed)


def _parse(hint: Any, value: Any, place: _Place, *, text: bool) -> Any:
    """Returns `value` as the annotated type; with `text`, a str may also be what a person would type."""
    if hint is Any or (isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, hint)):
        return value
    if members := _members(hint):
        return _parse_union(members, value, place, text=text)
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, place, text=text)
    if origin is Literal:
        found = [choice for choice in arguments if choice == value or (text and str(choice) == value)]
        if found:
            return found[0]
    elif origin in (tuple, list) and arguments:
        items = [item for item in re.split(r"[,\s]+", value) if item] if text and isinstance(value, str) else value
        if isinstance(items, (list, tuple)):
            hints = _item_hints(hint, len(items))
            if len(hints) == len(items):
                return origin(_parse(h, item, place / i, text=text) for i, (h, item) in enumerate(zip(hints, items)))
    elif origin is dict and isinstance(value, Mapping):
        return {key: _parse((arguments or (Any, Any))[1], item, place / key, text=text) for key, item in value.items()}
    elif hint in (bool, int, float, str, None, type(None), Path):
        typed = _of_text(hint, value) if text and isinstance(value, str) else value
        right: Any = {float: (int, float), Path: (str, Path), None: type(None)}.get(hint, hint)
        if isinstance(typed, right) and (hint is bool or not isinstance(typed, bool)) and typed == typed:  # no NaN
            return hint(typed) if hint in (float, Path) else typed
    raise place.error(f"should be {_said(hint)}, not {value!r}")


def _of_text(hint: Any, text: str) -> Any:
    """Returns the value that a text on a command line means; the text itself where it means none."""
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            return text
    named: dict[Any, dict[str, Any]] = {
        bool: {"true": True, "false": False},
        None: {"none": None},
        type(None): {"none": None},
    }
    return named.get(hint, {}).get(text.lower(), text)


def _parse_union(members: Sequence[Any], value: Any, place: _Place, *, text: bool) -> Any:
    classes = {cls.__name__: cls for cls in _dataclasses(members)}
    if isinstance(value, Mapping) and len(classes) > 1:
        name = value.get("type")
        if not isinstance(name, str) or name not in classes:
            raise (place / "type").error(f"should be one of {', '.join(classes)}, not {name!r}")
        return _build(classes[name], {k: v for k, v in value.items() if k != "type"}, place, text=text)
    if isinstance(value, Mapping) and classes:
        return _build(next(iter(classes.values())), value, place, text=text)
    if text and isinstance(value, str) and value in classes:
        return _build(classes[value], {}, place, text=text)
    # A text that means None or a number is that one first, a text in itself last.
    for member in sorted((m for m in members if m not in classes.values()), key=lambda m: m in (str, Path)):
        try:
            return _parse(member, value, place, text=text)
        except UserError:
            continue
    if any(isinstance(value, cls) for cls in classes.values()):
        return value
    raise place.error(f"should be {_said(Union[tuple(members)])}, not {value!r}")  # noqa: UP007


def _build(cls: type, values: Any, place: _Place, *, text: bool) -> Any:
    if not isinstance(values, Mapping):
        raise place.error(f"should be the settings of {cls.__name__}, not {values!r}")
    hints = _hints(cls)
    for name in values:
        if name not in hints:
            raise (place / name).error(f"{cls.__name__} has no such field; it has {', '.join(hints)}")
    empty = dataclasses.MISSING
    needed = [f.name for f in dataclasses.fields(cls) if f.init and f.default is f.default_factory is empty]
    if missing := [name for name in needed if name not in values]:
        raise place.error(f"{cls.__name__} misses {', '.join(missing)}")
    return cls(**{name: _parse(hints[name], value, place / name, text=text) for name, value in values.items()})


# ---- Types


def _hints(cls: type) -> dict[str, Any]:
    """Returns the types of the fields that can be set."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else ()


def _dataclasses(hint: Any) -> list[type]:
    members: Iterable[Any] = hint if isinstance(hint, (list, tuple)) else _members(hint) or (hint,)
    return [member for member in members if isinstance(member, type) and dataclasses.is_dataclass(member)]


def _item_hints(hint: Any, count: int) -> Sequence[Any]:
    """Returns the types of `count` items of a tuple or list; fewer or more where its length is fixed."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and arguments[-1] is not ...:
        return [] if arguments == ((),) else arguments
    return [arguments[0] if arguments else Any] * count


def _said(hint: Any) -> str:
    """Returns how messages call a type."""
    if members := _members(hint):
        return " or ".join(map(_said, members))
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    said: Mapping[Any, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        Path: "a path",
    }
    return said.get(hint) or ("none" if hint in (None, type(None)) else re.sub(r"\b\w+\.|^<class '|'>$", "", str(hint)))
