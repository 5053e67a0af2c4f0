"""What a family of Hugging Face models is, and typed reading of the fields of its config.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlaif_jax.config import UserError, require
from rlaif_jax.files import it_is
from rlaif_jax.models.decoder_config import DecoderConfig

REQUIRED = object()


class Fields:
    """A JSON object whose fields are read with their type checked; messages name file and field."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def get(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """Returns the field `key`, or `default` where it is absent or null.

        Args:
            key: name of the field.
            kind: type of the value; float also takes an int.
            default: without it the field is required.

        Raises:
            UserError: the field is missing or of another type.
        """
        value = self.values.get(key)
        if value is None:
            require(
                default is not REQUIRED, f"{self.where}: the field {key} is missing; it must be of type {kind.__name__}"
            )
            return default
        if kind is float and type(value) is int:
            value = float(value)
        require(type(value) is kind, f"{self.where}: {key} must be of type {kind.__name__}, not {value!r}")
        return value

    def size(self, key: str, default: Any = REQUIRED) -> int:
        """Returns the field `key`, an int of at least 1, or `default` where it is absent or null.

        Raises UserError for another value, and for a missing field without a default.
        """
        value: int = self.get(key, int, default)
        require(value >= 1, f"{self.where}: {key} must be at least 1, not {value}")
        return value

    def only(self, key: str, supported: tuple[Any, ...], default: Any) -> None:
        """Raises UserError unless the field `key` has one of the `supported` values.

        `default` is its value where it is absent.
        """
        value = self.values.get(key, default)
        require(
            value in supported,
            f"{self.where}: {key}={value!r} is not supported; supported: " + ", ".join(repr(s) for s in supported),
        )


def read_object(path: Path) -> Fields:
    """Returns the fields of a file that holds a JSON object. Raises UserError for other files."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON's and Unicode's errors say line or byte
        raise UserError(f"{path}: not JSON ({error}){it_is(path)}") from error
    require(isinstance(values, dict), f"{path}: expected a JSON object")
    return Fields(values, str(path))


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of Hugging Face model that `DecoderConfig` describes: its config.json and tensor names.

    Attributes:
        model_types: the values of config.json's `model_type` that are read; the first is written.
        architecture: the class of transformers.
        read_config: makes a `DecoderConfig` of config.json; raises UserError for what is not supported.
        flags: a `DecoderConfig` with these flags is of this family (of the first in `FAMILIES` that has such flags).
        write_config: makes the family's own fields of config.json; raises UserError naming a flag that does not fit.
        prefix: the beginning of all tensor names but the output matrix's.
        names: module of the decoder -> module in tensor names.
        transposed: whether matrices are stored as [out, in]; the parameters here are [in, out].
    """

    model_types: tuple[str, ...]
    architecture: str
    read_config: Callable[[Fields], DecoderConfig]
    flags: Mapping[str, Any]
    write_config: Callable[[DecoderConfig], dict[str, Any]]
    prefix: str
    names: Mapping[str, str]
    transposed: bool


def require_flags(config: DecoderConfig, architecture: str, **wanted: Any) -> None:
    """Raises UserError naming the first flag of `config` that differs from what an architecture needs.

    Args:
        config: the shape of the model.
        architecture: the name of the architecture, for the message.
        **wanted: the value that each flag of `DecoderConfig` must have.
    """
    for flag, value in wanted.items():
        ours = vars(config)[flag]
        require(
            ours == value,
            f"no Hugging Face architecture fits this model: {architecture} needs {flag}={value!r}, not {ours!r}",
        )
