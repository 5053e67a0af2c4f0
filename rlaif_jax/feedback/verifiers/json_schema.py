"""A verifier of JSON: the answer is JSON that satisfies a schema."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import regex

from rlaif_jax.config import UserError, missing_extra, require
from rlaif_jax.data.prompts import Record
from rlaif_jax.feedback.sources import FeedbackSource, Missing
from rlaif_jax.feedback.verifiers.base import RIGHT, WRONG, Verdict, VerifierSource, fenced, read_field, read_json
from rlaif_jax.files import read_bytes

SEARCH_S = 1.0  # after that the search of a "pattern" of the schema is given up


@lru_cache(maxsize=256)  # the K answers to a prompt have one schema, and its check takes milliseconds
def _validator(text: str) -> Any:
    """Returns the validator of a schema in JSON, by the draft that it names, else by the latest.

    A reference to another document is looked up among the drafts' own schemas alone, never in the network.

    Raises:
        ValueError: it is no schema.
    """
    import jsonschema
    from jsonschema_specifications import REGISTRY

    schema = read_json(text)
    if not isinstance(schema, dict | bool):
        raise ValueError(f"it is a {type(schema).__name__}, not an object")

    def pattern(validator: Any, pattern: str, value: Any, _: Any) -> Iterator[Any]:
        if validator.is_type(value, "string") and not regex.search(pattern, value, timeout=SEARCH_S):
            yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")

    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"{error.json_path}: {error.message}") from None
    return jsonschema.validators.extend(kind, {"pattern": pattern})(schema, registry=REGISTRY)


def answer_json(answer: str) -> Any:
    """Returns the JSON value of an answer: of its first fence (json, or no language), else of all of it.

    Raises:
        ValueError: it is no JSON.
    """
    code = fenced(answer, "json", "")
    return read_json(answer if code is None else code)


@dataclasses.dataclass(frozen=True)
class JsonSchema:
    """1 where the answer is JSON that satisfies a schema; needs the package `jsonschema`.

    The answer is JSON alone, or has it in a fence (```json).

    Attributes:
        schema: a JSON file with the schema for all records; None = each record has one in `field`.
        field: the record's field with its schema, as an object or as JSON text; "" = `schema` is for all records.
    """

    schema: Path | None = None
    field: str = ""

    def __post_init__(self) -> None:
        require(
            (self.schema is not None) != bool(self.field), "json_schema needs either a schema or a field, and not both"
        )

    @cached_property
    def _of_file(self) -> Any:
        assert self.schema is not None
        try:
            return _validator(read_bytes(self.schema).decode())
        except ValueError as error:
            raise UserError(f"{self.schema}: no JSON schema: {error}") from None

    def verify(self, record: Record, answer: str) -> Verdict:
        """Returns 1 where the answer satisfies the schema, 0 where not, `Missing` without a schema.

        Args:
            record: may have the schema.
            answer: the answer.

        Raises:
            UserError: the schema of the file refers to what is not in it.
        """
        from referencing.exceptions import Unresolvable

        if self.schema is not None:
            validator = self._of_file
        else:
            schema = read_field(record, self.field)
            if isinstance(schema, Missing):
                return schema
            try:
                validator = _validator(schema if isinstance(schema, str) else json.dumps(schema))
            except (ValueError, TypeError) as error:
                return Missing(f"the record's {self.field!r} is no JSON schema: {error}")
        try:
            value = answer_json(answer)
        except ValueError:
            return WRONG
        try:
            return RIGHT if validator.is_valid(value) else WRONG
        except (RecursionError, OverflowError):  # of numbers as no schema means them, such as 1e999
            return WRONG
        except TimeoutError:
            return Missing(f"the search of a pattern of the schema took more than {SEARCH_S:g} s")
        except Unresolvable as error:
            if self.schema is not None:
                raise UserError(f"{self.schema}: the schema has a reference that it cannot resolve: {error}") from None
            return Missing(f"the schema in the record's {self.field!r} has a reference that it cannot resolve")

    def build(self) -> FeedbackSource:
        """Reads the schema and returns the source of these verdicts.

        Raises:
            UserError: the package is not installed, or the file is no schema.
        """
        try:
            import jsonschema  # noqa: F401
        except ImportError:
            raise missing_extra("JsonSchema needs the package jsonschema", "verifiers") from None
        if self.schema is not None:
            _ = self._of_file
        return VerifierSource(self.verify)
