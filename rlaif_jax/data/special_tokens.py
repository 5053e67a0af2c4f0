"""The special tokens that the files of a model's folder declare: which begin, end and pad a text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers as hf

from rlaif_jax.config import UserError
from rlaif_jax.data.tokenizer_files import read_json_object

CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"


def token_name(token: Any) -> str | None:
    """Returns a special token's name: the files hold a plain string or `{"content": "..."}`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def named_token(folder: Path, role: str) -> tuple[str, str] | None:
    """Returns (token, file) where a file of the folder names a token for a role, else None.

    Args:
        folder: the folder; tokenizer_config.json counts before special_tokens_map.json, as in transformers.
        role: bos, eos, pad or unk.
    """
    for file in (CONFIG, MAP):
        if name := token_name(read_json_object(folder / file).get(f"{role}_token")):
            return name, file
    return None


def declared_ids(folder: Path, role: str) -> list[int]:
    """Returns the ids that generation_config.json and config.json declare for a role, each once.

    Args:
        folder: the folder of the files.
        role: bos, eos, pad or unk.

    Raises:
        UserError: a declaration is no id and no list of ids.
    """
    found: list[int] = []
    for file in ("generation_config.json", "config.json"):
        value = read_json_object(folder / file).get(f"{role}_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int for i in ids):
            raise UserError(f"{folder / file}: {role}_token_id must be an id or a list of ids, not {value!r}")
        found += [i for i in ids if i >= 0]  # -1 is written for "no such token"
    return list(dict.fromkeys(found))


def added_tokens(folder: Path) -> dict[int, hf.AddedToken]:
    """Returns {id: token} of the tokens that a folder adds to its vocabulary.

    They are those of `added_tokens_decoder` in tokenizer_config.json and of added_tokens.json.

    Raises:
        UserError: an entry is not of the form that transformers writes.
    """
    found: dict[int, hf.AddedToken] = {}
    path = folder / "added_tokens.json"
    for name, index in read_json_object(path).items():
        if type(index) is not int:
            raise UserError(f"{path}: the id of {name!r} must be an integer, not {index!r}")
        found[index] = hf.AddedToken(name, normalized=False, special=True)
    path = folder / CONFIG
    entries = read_json_object(path).get("added_tokens_decoder") or {}
    for index, entry in entries.items() if isinstance(entries, Mapping) else ():
        content = token_name(entry)
        if content is None or not str(index).isdecimal():
            raise UserError(f"{path}: added_tokens_decoder[{index!r}] must be {{'content': token, ...}}, not {entry!r}")
        flags = ("lstrip", "rstrip", "single_word", "normalized", "special") if isinstance(entry, Mapping) else ()
        found[int(index)] = hf.AddedToken(content, **{flag: bool(entry.get(flag, False)) for flag in flags})
    return dict(sorted(found.items()))


def add_missing(backend: hf.Tokenizer, folder: Path) -> None:
    """Adds the tokens of `added_tokens` that the vocabulary lacks.

    Raises:
        UserError: the vocabulary would give a token another id than the folder does.
    """
    for index, token in added_tokens(folder).items():
        if backend.token_to_id(token.content) is not None:
            continue
        backend.add_tokens([token])
        got = backend.token_to_id(token.content)
        if got != index:
            raise UserError(
                f"{folder}: the added token {token.content!r} has id {index}, but the vocabulary ends at {got}, so ids "
                "between them have no token; the vocabulary and the added tokens are of different models, or files of "
                "the folder are missing"
            )


def not_in_vocabulary(folder: Path, name: str, file: str) -> UserError:
    """Returns the error for an end token that no vocabulary of the folder has.

    Args:
        folder: the folder.
        name: the token.
        file: the file that names the token.
    """
    return UserError(
        f"{folder / file}: eos_token is {name!r}, which is in no vocabulary of this folder (nor in added_tokens_decoder "
        "or added_tokens.json), so no answer could ever end with it; name a token of the vocabulary, or add the file "
        "that defines it"
    )
