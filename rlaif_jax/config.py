"""Settings: frozen dataclasses, the only schema. A config names a function or another dataclass, never a string key."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any, Literal


class CheckFailed(RuntimeError):
    """The run contradicts what must hold of any correct run; its numbers would mean nothing."""


class UserError(Exception):
    """Input that a person can mend: the message says what is wrong, where, and what would be right."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def check_choices(config: Any, name: str) -> None:
    """UserError when a field whose type is a Literal holds another value; `name` is how messages call the config."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        choices = typing.get_args(hints[field.name])
        if typing.get_origin(hints[field.name]) is Literal and getattr(config, field.name) not in choices:
            named = ", ".join(map(str, choices))
            raise UserError(f"{name}.{field.name} is {getattr(config, field.name)!r}; it is one of {named}")


def to_json(config: Any) -> dict[str, Any]:
    """The complete settings as plain JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_json(cls: type, values: dict[str, Any], where: str = "config.json") -> Any:
    """Rebuild a config dataclass from `to_json`'s output; unknown or missing fields are named."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    require(not unknown, f"{where}: {cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(fields)}")
    built = {}
    for name, value in values.items():
        nested = [t for t in (hints[name], *typing.get_args(hints[name])) if dataclasses.is_dataclass(t)]
        if nested and isinstance(value, dict):
            value = from_json(nested[0], value, f"{where}: {name}")  # type: ignore[arg-type]
        elif isinstance(value, list):
            value = tuple(value)
        built[name] = value
    missing = [
        n
        for n, f in fields.items()
        if n not in built and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    require(not missing, f"{where}: {cls.__name__} misses {', '.join(missing)}")
    return cls(**built)


def differing(saved: Any, now: Any, prefix: str = "") -> list[str]:
    """The dotted names of settings that differ between two nested dicts, with both values."""
    if isinstance(saved, dict) and isinstance(now, dict):
        found = []
        for name in sorted(set(saved) | set(now)):
            found += differing(saved.get(name), now.get(name), f"{prefix}{name}.")
        return found
    return [] if saved == now else [f"{prefix[:-1]} was {saved!r} and is now {now!r}"]


def save_config(config: Any, path: Path) -> None:
    """Write `config` as indented JSON."""
    path.write_text(json.dumps(to_json(config), indent=1) + "\n")
