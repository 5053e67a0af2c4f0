"""Files: JSON lines read with the place of every fault, files written whole or not at all."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from rlaif_jax.config import UserError

T = TypeVar("T")


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Returns the content of a file (unpacked where its name ends in .gz) without a byte-order mark.

    Raises:
        UserError: the file cannot be read; the message names it.
    """
    path = Path(path)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    return data.removeprefix(b"\xef\xbb\xbf")


def read_json_lines(path: str | os.PathLike[str], parse: Callable[[Any, str], T]) -> tuple[list[T], list[str]]:
    """Reads a file of one JSON value a line and returns (parsed lines, one message for each bad line).

    Blank lines are skipped. A line that is no JSON (such as one that a crash cut short), or for which `parse` raises
    UserError, is a message "FILE:LINE: what is wrong"; the other lines are kept.

    Args:
        path: the file, or a .gz of it.
        parse: called with the decoded value and its place "FILE:LINE"; raises UserError for a value that is not right.

    Raises:
        UserError: the file cannot be read.
    """
    good: list[T] = []
    bad: list[str] = []
    for number, line in enumerate(read_bytes(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            good.append(parse(json.loads(line.decode()), place))
        except UserError as error:
            message = str(error)
            bad.append(message if message.startswith(place) else f"{place}: {message}")
        except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            bad.append(f"{place}: no valid JSON ({error})")
    return good, bad


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w", *, private: bool = False) -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path` for writing and renames it to `path` when the block ends without an error.

    A process that is killed, or an error inside the block, leaves the old file as it was and no new one.

    Args:
        path: the file that is replaced.
        mode: "w" for UTF-8 text with "\\n" line ends, "wb" for bytes.
        private: only the owner may read the file.

    Raises:
        UserError: the file cannot be written (no such folder, no permission, a full disk); the message names it.
    """
    path = Path(path)
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not private:  # mkstemp makes files that only their owner can read
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
