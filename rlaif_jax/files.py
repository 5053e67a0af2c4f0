"""Files: reads JSON lines with the place of every fault, writes files whole, locks folders."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import platform
import sys
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from rlaif_jax.config import UserError, require

T = TypeVar("T")

# The first bytes of files that are given in the place of others, and what to do with each.
SIGNATURES = (
    (b"version https://git-lfs", "a Git LFS pointer, a note in the place of the file: fetch the file (git lfs pull)"),
    (b"PAR1", "a Parquet file, of which rows are read (prompts, texts, pairs), under a name that ends in .parquet"),
    (b"PK\x03\x04", "a zip archive; PyTorch pickles weights so, which are never read: convert them to safetensors "
     "with transformers' save_pretrained"),
    (b"\x80", "a Python pickle, which is never read: convert weights to safetensors with transformers' save_pretrained"),
    (b"GGUF", "a GGUF file of llama.cpp, which is read under a name that ends in .gguf"),
    (b"\x89HDF", "an HDF5 file, Keras' export: take the folder with safetensors"),
    (b"ARROW1", "an Arrow file: convert it to JSON lines"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"<!doctype html", "a web page in the place of the file: download the file itself"),
    (b"<html", "a web page in the place of the file: download the file itself"),
)  # fmt: skip


def it_is(path: str | os.PathLike[str]) -> str:
    """Returns, for the end of a message, what kind of file it is instead; "" for a kind without a mark.

    Args:
        path: a file that is not what was asked for.
    """
    try:
        with Path(path).open("rb") as file:
            start = file.read(64).removeprefix(b"\xef\xbb\xbf")
    except OSError:
        return ""
    begins = lambda mark: start.lstrip().lower().startswith(mark) if mark.startswith(b"<") else start.startswith(mark)
    return next((f"; it is {kind}" for mark, kind in SIGNATURES if begins(mark)), "")


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Returns the content of a file (unpacked where its name ends in .gz) without a byte-order mark.

    Raises:
        UserError: the file cannot be read; the message names it.
    """
    path = Path(path)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise UserError(f"cannot read {path}: {reason or error}") from error
    return data.removeprefix(b"\xef\xbb\xbf")


def printable(text: str) -> str:
    """Returns text for a terminal: control codes, line ends and the like are escaped, as in a literal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_json_lines(
    path: str | os.PathLike[str], parse: Callable[[Any, str], T], *, skip_cut: bool = False
) -> tuple[list[T], list[str]]:
    """Reads a file of one JSON value per line and returns (parsed lines, one message for each bad line).

    Blank lines are skipped. A line that is no JSON (such as one that a crash cut short), or for which `parse` raises
    UserError, is a message "FILE:LINE: what is wrong"; the other lines are kept.

    Args:
        path: the file, or a .gz of it.
        parse: called with the decoded value and its place "FILE:LINE"; raises UserError for a value that is not right.
        skip_cut: ignore a bad last line without a newline: its writer was killed in the middle.

    Raises:
        UserError: the file cannot be read.
    """
    bad: list[str] = []
    return list(each_json_line(path, parse, bad, skip_cut=skip_cut)), bad


def each_json_line(
    path: str | os.PathLike[str], parse: Callable[[Any, str], T], bad: list[str], *, skip_cut: bool = False
) -> Iterator[T]:
    """Yields the parsed lines one by one, so that a file of any size needs the memory of a line.

    Args:
        path: the file, or a .gz of it.
        parse: as in `read_json_lines`.
        bad: gets a message for each bad line.
        skip_cut: as in `read_json_lines`.

    Raises:
        UserError: the file cannot be read; lines before a damaged part of a .gz have been yielded by then.
    """
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not line.strip():
                    continue
                place = f"{path}:{number}"
                try:
                    value = parse(json.loads(line.decode()), place)
                except (UserError, ValueError, RecursionError) as error:  # JSON and Unicode errors are ValueErrors
                    message = str(error) if isinstance(error, UserError) else f"no valid JSON ({error})"
                    if line.strip() in (b"[", b"{"):
                        message += "; a line holds a whole JSON value, and this one only begins one"
                    if not skip_cut or line.endswith(b"\n"):
                        bad.append(printable(message if message.startswith(place) else f"{place}: {message}"))
                else:
                    yield value
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise UserError(f"cannot read {path}: {reason or error}") from error


def parquet_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("FILE:ROW", row) of a Parquet file, in which data sets of the Hugging Face hub are kept.

    Values are those that JSON has: bytes become text, and what JSON does not know, such as a date, becomes its text.

    Raises:
        UserError: the file cannot be read.
    """
    import pyarrow  # here, because it takes a while and few files are Parquet
    from pyarrow import parquet

    def known(value: Any) -> str:
        return value.decode(errors="replace") if isinstance(value, bytes) else str(value)

    number = 0
    try:
        with open(path, "rb") as opened, parquet.ParquetFile(opened) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", json.loads(json.dumps(row, default=known))
    except (OSError, pyarrow.ArrowException) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise UserError(f"cannot read {path}: {reason or error}") from error


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w", *, private: bool = False) -> Iterator[IO[Any]]:
    """Opens a temporary file next to `path` and renames it to `path` when the block ends.

    A process that is killed, or an error inside the block, leaves the old file as it was.

    Args:
        path: the file that is replaced.
        mode: "w" for UTF-8 text with "\\n" line ends, "wb" for bytes.
        private: only the owner may read the file.

    Raises:
        UserError: the file cannot be written (no such folder, no permission, a full disk); the message names it.
    """
    path = Path(path)
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
        with os.fdopen(handle, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; an earlier file is unchanged") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


LOCK = "run.lock"
OF_A_RUN = (LOCK, "environment.json", "summary.json", "metrics.jsonl")


def require_folder(folder: Path, whose: str) -> None:
    """Raises UserError where a folder is a file or read-only, or one above it that is there.

    Args:
        folder: the folder.
        whose: what needs it, such as "a run needs".
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    require(there.is_dir(), f"{there} is a file; {whose} a folder")
    require(os.access(there, os.W_OK), f"{there}: this folder cannot be written; {whose} one that can")


def require_run_or_nothing(folder: Path) -> None:
    """Raises UserError where a folder holds something other than a run: a new run would move it away."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    require(
        not names or not names.isdisjoint(OF_A_RUN),
        f"{folder} is no run's folder and holds {', '.join(sorted(names)[:3])}{' ...' if len(names) > 3 else ''}: choose "
        "another --out",
    )
    # Nor has a run that is in the way another name to be moved to.
    require(names <= {LOCK} or folder.name not in ("", ".."), f"{folder}: name the folder of the run by --out")


class FolderLock:
    """The sole right to write a folder, held until `release` or the end of the process.

    The lock is one of the system on the file run.lock, which names the process for people; a process that is killed loses
    it, too.

    Args:
        folder: an existing folder.

    Raises:
        UserError: another run has the folder.
        OSError: the file of the lock cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._handle = -1
        while not self._holds(folder):  # the run before may remove its file while this one opens it
            self._close()
            self._handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(self._handle, 200).decode(errors="replace").strip()
                self._close()
                raise UserError(
                    f"{folder}: another run is writing this folder ({owner or 'it is just beginning'}). Nothing was "
                    "changed: choose another --out, or wait until that run has ended"
                ) from None
            except OSError as error:
                print(
                    f"warning: {folder}: this file system has no locks ({error.strerror}): a second run in the folder "
                    "would not be noticed",
                    file=sys.stderr,
                )
        os.truncate(self._handle, 0)
        try:
            os.pwrite(self._handle, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        except OSError:  # a full disk: the lock holds without the name of its process
            return

    def _holds(self, folder: Path) -> bool:
        """Returns whether the open file is still that in `folder`."""
        try:
            return self._handle >= 0 and os.path.samestat(os.fstat(self._handle), os.stat(folder / LOCK))
        except FileNotFoundError:
            return False

    def release(self, folder: Path) -> None:
        """Ends the lock and removes its file from where the folder is by now; a second call does nothing."""
        if self._holds(folder):
            (folder / LOCK).unlink()
        self._close()

    def _close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
