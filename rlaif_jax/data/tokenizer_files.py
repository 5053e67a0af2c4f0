"""Helpers of all kinds of tokenizer: finding and reading their files, hashing, and their errors."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from rlaif_jax.config import UserError
from rlaif_jax.data.hub import folder_is
from rlaif_jax.files import atomic_write, it_is, read_bytes

PathLike: TypeAlias = str | os.PathLike[str]

# In the order in which `load_tokenizer` looks for them in a folder; then comes the only file of a pattern.
FILE_NAMES = (
    "tokenizer.json",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.bin",
    "tok512.bin",
)
PATTERNS = ("*.model", "tok*.bin")  # "tok4096.bin", "tok105.model": llama2.c names them by the size of the vocabulary


def merges_of(vocab: Path) -> Path:
    """Returns the path of the merges of a `vocab.json`: the same name with `merges.txt`."""
    return vocab.with_name(vocab.name.removesuffix("vocab.json") + "merges.txt")


def holds(folder: Path, name: str) -> bool:
    """Returns whether a folder holds the tokenizer file of this name, with its merges where it needs some."""
    return (folder / name).is_file() and (name != "vocab.json" or merges_of(folder / name).is_file())


def has_tokenizer(folder: Path) -> bool:
    """Returns whether a folder holds a tokenizer file of one of the usual names."""
    return any(holds(folder, name) for name in FILE_NAMES)


def find(folder: Path) -> Path:
    """Returns the tokenizer's file in a folder.

    Raises:
        UserError: nothing there is a tokenizer, or several files are and no name decides between them.
    """
    for name in FILE_NAMES:
        if holds(folder, name):
            return folder / name
    for pattern in PATTERNS:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise UserError(
                f"{folder} holds several tokenizers, {names}: give the file of the one that the model reads"
            )
        if found:
            return found[0]
    looked_for = ", ".join(name if name != "vocab.json" else "vocab.json with merges.txt" for name in FILE_NAMES)
    raise UserError(
        f"no tokenizer in the folder {folder}: looked for {looked_for}, {', '.join(PATTERNS)}{folder_is(folder)}"
    )


def choose_pad_id(ids: Mapping[str, int]) -> int:
    """Returns the id to pad with, given the ids of the roles that the vocabulary has."""
    return next((ids[role] for role in ("pad", "unk", "eos") if role in ids), 0)


def without_padding(ids: Iterable[int], pad_id: int, bos_id: int | None, stop_ids: Sequence[int]) -> list[int]:
    """Returns a row of tokens without the padding before its BOS and after its end.

    Where <unk> serves as padding, it is a word of the text everywhere else.

    Args:
        ids: the tokens.
        pad_id: the padding.
        bos_id: the token that begins a text, or None.
        stop_ids: the tokens that end a text.
    """
    row = list(ids)
    real = [at for at, i in enumerate(row) if i != pad_id]
    if real and row[real[-1]] in stop_ids:
        row = row[: real[-1] + 1]
    return row[real[0] :] if real and row[real[0]] == bos_id else row


def continued(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """Returns the ids of a text within another: without the blank that a vocabulary puts before a text.

    The text is encoded after a line break, whose ids are left out. A vocabulary that knows no line break, or that joins it to
    what follows, gives the ids of the text alone.

    Args:
        encode: encodes a whole text.
        text: the text.
    """
    mark, whole = encode("\n"), encode("\n" + text)
    return whole[len(mark) :] if mark and whole[: len(mark)] == mark else encode(text)


def require_unicode(text: str) -> None:
    """Raises UserError where a text holds half of a surrogate pair: JSON can carry it, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError("a text holds half of a Unicode surrogate pair") from error


def bos_prefix(bos_id: int | None, wanted: bool) -> list[int]:
    """Returns `[bos_id]` if it is wanted, else []. Raises UserError where it is wanted and missing."""
    if not wanted:
        return []
    if bos_id is None:
        raise UserError("add_bos was asked for, but this tokenizer has no BOS token; leave add_bos off")
    return [bos_id]


def byte_name(token: str) -> str:
    """Returns the name of the byte token of a one-byte text (`"\\n"` is `<0x0A>`), else the text itself."""
    raw = token.encode(errors="replace")
    return f"<0x{raw[0]:02X}>" if len(raw) == 1 else token


def not_one_token(token: str, pieces: Sequence[str | None]) -> UserError:
    """Returns the error of `Tokenizer.token_id` for a text that is not one token.

    Args:
        token: the text.
        pieces: the tokens that the text becomes, which the message shows.
    """
    return UserError(
        f"{token!r} is not one token of this tokenizer: it becomes {list(pieces)!r}; choose a text that is one token"
    )


def hash_vocabulary(entries: Iterable[bytes]) -> str:
    """Returns a short hash of all tokens, in the order of their ids."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(struct.pack("<q", len(entry)) + entry)
    return digest.hexdigest()[:16]


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file. Raises UserError when it cannot be read."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}{it_is(path)}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, {} where the file is missing. Raises UserError for other content."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}{it_is(path)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, not {type(value).__name__}")
    return value


def own_place(folder: PathLike, name: str) -> Path:
    """Makes the folder where missing and returns `folder/name`, the path of a tokenizer's file.

    Raises UserError where the folder cannot be made, or holds another tokenizer that would be found first.
    """
    folder = Path(folder)
    for rival in FILE_NAMES[: FILE_NAMES.index(name)]:
        if holds(folder, rival):
            raise UserError(
                f"{folder} already holds another tokenizer, {rival}, which would be read instead of {name}; "
                "save elsewhere"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror or error}") from error
    return folder / name


def write_stop_ids(folder: Path, ids: Sequence[int]) -> None:
    """Writes the tokens that end an answer into the generation_config.json of a folder.

    Args:
        folder: the tokenizer's folder.
        ids: the tokens' ids; without any the tokenizer's own file says it all, and nothing is written.
    """
    if ids:
        path = folder / "generation_config.json"
        values = read_json_object(path) | {"eos_token_id": ids[0] if len(ids) == 1 else list(ids)}
        with atomic_write(path) as file:
            file.write(json.dumps(values, indent=1) + "\n")
