"""Values between the process of the answer and that of its tests, as JSON.

Plain data goes by value and arrives as exactly Python's own types. Everything else stays in the answer's process, and
its number goes. So no object of the answer, which could claim to equal everything, ever meets a test.
"""

from __future__ import annotations

import importlib
import numbers
import sys
import types
from collections.abc import Callable
from typing import Any

_EXACT = 1 << 53  # beyond it, whole numbers go as hexadecimal text: JSON's digits are limited


class CannotPass(Exception):
    """A value of the tests that cannot be handed to the answer's code, such as a function."""


def encode(value: Any, keep: Callable[[Any], Any]) -> Any:
    """Returns a value as JSON.

    Args:
        value: any value.
        keep: returns the JSON of what is no plain data.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, numbers.Integral):
        whole = int(value)
        return whole if abs(whole) < _EXACT else {"int": hex(whole)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, list):
        return [encode(item, keep) for item in value]
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item, keep) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, keep), encode(item, keep)] for key, item in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {type(value).__name__: value.hex()} if type(value) in (bytes, bytearray) else {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [encode(part, keep) for part in (value.start, value.stop, value.step)]}
    for module, name in (("fractions", "Fraction"), ("decimal", "Decimal")):
        if module in sys.modules and isinstance(value, vars(sys.modules[module])[name]):
            return {name: str(value)}
    if isinstance(value, numbers.Real):  # numpy's
        return float(value)
    if isinstance(value, types.ModuleType):
        return {"module": value.__name__}
    return keep(value)


def decode(value: Any, known: Callable[[int], Any]) -> Any:
    """Returns the value of its JSON, whoever wrote it.

    Args:
        value: JSON of `encode`.
        known: returns what a number means that `keep` gave.

    Raises:
        ValueError, TypeError, KeyError, ImportError: it is no JSON of `encode`.
    """
    if isinstance(value, list):
        return [decode(item, known) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, data),) = value.items()
    if kind in ("tuple", "set", "frozenset"):
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](decode(item, known) for item in data)
    if kind == "dict":
        return {decode(key, known): decode(item, known) for key, item in data}
    if kind in ("bytes", "bytearray"):
        plain = bytes.fromhex(data)
        return plain if kind == "bytes" else bytearray(plain)
    if kind == "int":
        return int(data, 16)
    if kind == "complex":
        return complex(float(data[0]), float(data[1]))
    if kind == "range":
        return range(*(decode(part, known) for part in data))
    if kind in ("Fraction", "Decimal"):
        return vars(importlib.import_module({"Fraction": "fractions", "Decimal": "decimal"}[kind]))[kind](data)
    if kind == "module":
        return importlib.import_module(data)  # the tests' own: the answer may have changed its one
    if kind == "object":
        return known(int(data))
    raise ValueError(f"unknown kind {kind!r}")
