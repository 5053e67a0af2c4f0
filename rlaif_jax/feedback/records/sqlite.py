"""SQLite files that several processes write at once and that keep what was acknowledged."""

from __future__ import annotations

import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rlaif_jax.config import UserError

PATIENCE = 60.0
"""Seconds to wait for another writer."""


def connect(path: Path | None) -> sqlite3.Connection:
    """Opens the file `path`, created with its folder where absent; a database in memory for None.

    Raises OSError or sqlite3.Error; the latter also where the file is the database of another program, which stays as it is.
    """
    if path is not None:
        _require_own(path)
        path.parent.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(path or ":memory:", timeout=PATIENCE, isolation_level=None)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            break
        except sqlite3.OperationalError as error:
            # SQLite does not wait here by itself when several processes open a new file.
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    if path is not None and (reason := _unsafe(path, mode)):
        message = f"{path}: {reason}; keep it on a local disk, or let one program at a time use it"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    # 64 MiB: with the default of 2 MiB the indexes of a large file are read again and again.
    db.execute("PRAGMA cache_size = -65536")
    db.execute(
        "PRAGMA wal_autocheckpoint = 16384"
    )  # 64 MiB as well: pages that several transactions write are moved once
    db.execute("PRAGMA synchronous = FULL")  # an acknowledged record survives a power cut, too
    return db


OWN = ("judgement", "call", "server", "page_")
"""What the names of the tables of stores and caches begin with."""


def _require_own(path: Path) -> None:
    """Raises sqlite3.DatabaseError where a file has tables, and none of a store or cache."""
    if not path.is_file():
        return
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=PATIENCE)
    try:
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    except sqlite3.OperationalError:  # locked or not readable: what follows says it
        names = []
    finally:
        db.close()
    if names and not any(name.startswith(OWN) for name in names):
        raise sqlite3.DatabaseError(f"it is the database of another program, with the table {names[0]}")


NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "fuse.gcsfuse", "fuse.s3fs", "lustre", "beegfs")
"""Kinds of file systems that several machines share: SQLite's locks do not hold between them."""


def _unsafe(path: Path, mode: str, mounts: Path = Path("/proc/self/mounts")) -> str:
    """Returns why several programs may not use the file at once; "" where they may.

    Args:
        path: the database.
        mode: the journal mode that SQLite has set.
        mounts: the table of file systems; on a system without one no network is recognised.
    """
    if mode != "wal":
        return f"SQLite keeps the journal {mode!r} here instead of a write-ahead log"
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return ""
    kinds: dict[Path, str] = {}
    for _, folder, kind, *_ in map(str.split, lines):
        kinds[Path(folder.replace("\\040", " "))] = kind  # a later line of one folder covers an earlier one
    kind = next((kinds[folder] for folder in path.resolve().parents if folder in kinds), "")
    return f"it lies on a network file system ({kind}), where several machines may damage it" if kind in NETWORK else ""


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Runs the block as one transaction: it waits for other writers, and is undone by an error.

    Inside another transaction the block is a part of that.
    """
    if db.in_transaction:
        yield
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    finally:
        if db.in_transaction:  # after an error, or a commit that failed
            db.execute("ROLLBACK")


class Busy(UserError):
    """Another program is writing into the file for too long; the same call may succeed later."""


class Database:
    """A SQLite file whose errors are UserErrors that name it.

    One object per thread; any number of processes.

    Args:
        path: the file; created with its folder where absent.
        tables: SQL statements, separated by ";", that create what is missing.
        failure: what cannot be done if the file cannot be opened, for the message.
        patience_s: seconds for which a change waits for another writer, once the file is open.
    """

    def __init__(self, path: Path, tables: str, failure: str, patience_s: float = PATIENCE) -> None:
        self.path = Path(path)
        try:
            self._db = connect(self.path)
            self._create(tables)
            self._db.execute(f"PRAGMA busy_timeout = {round(1000 * patience_s)}")
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"{path}: {failure} ({error})") from error

    def _create(self, tables: str) -> None:
        with transaction(self._db):
            for statement in statements(tables):
                self._db.execute(statement)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    @contextmanager
    def write(self, what: str = "the change", *, is_durable: bool = True) -> Iterator[sqlite3.Connection]:
        """Yields the connection inside a transaction.

        A change that is not durable survives a crash of the program; a power cut may undo it.

        Raises UserError, which says that `what` could not be stored, where SQLite fails; nothing is stored then. It is
        `Busy` where another writer does not finish in time.
        """
        try:
            if not is_durable:
                self._db.execute("PRAGMA synchronous = NORMAL")
            try:
                with transaction(self._db):
                    yield self._db
            finally:
                if not is_durable:
                    self._db.execute("PRAGMA synchronous = FULL")
        except (sqlite3.Error, UnicodeEncodeError) as error:  # the latter of half a character in a column
            kind = Busy if "locked" in str(error) else UserError
            raise kind(f"{self.path}: {what} could not be stored ({error}); nothing was") from error

    def rows(self, query: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        """Returns all rows of a query; raises UserError where SQLite fails.

        `values` fill the placeholders of the query.
        """
        try:
            return self._db.execute(query, values).fetchall()
        except (sqlite3.Error, UnicodeEncodeError) as error:
            kind = Busy if "locked" in str(error) else UserError
            raise kind(f"{self.path}: cannot be read ({error})") from error

    def each(self, query: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> Iterator[Any]:
        """Yields the rows of a query one by one; raises UserError where SQLite fails, also on the way.

        `values` fill the placeholders of the query.
        """
        try:
            yield from self._db.execute(query, values)
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: cannot be read ({error})") from error

    def row(self, query: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> Any:
        """Returns the first row of a query, or None; raises UserError where SQLite fails.

        `values` fill the placeholders of the query.
        """
        return next(iter(self.rows(query, values)), None)


def searchable(text: str) -> str:
    """Replaces lone surrogates, which SQLite cannot hold, by "?"."""
    return text.encode(errors="replace").decode()


def statements(text: str) -> Iterator[str]:
    """Yields the SQL statements of a text; the ";" inside a trigger ends none."""
    statement = ""
    for part in text.split(";"):
        statement += part + ";"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
