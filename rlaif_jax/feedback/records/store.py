"""All feedback of a project in one local file: SQLite, append-only, content-addressed, several writers at once.

A record's key is its id (`Judgement.id`): the same record added twice is one. `add` returns after the transaction is on
disk; what it acknowledged survives kill -9. Nothing is changed or removed: a correction of a record is a new record that
`supersedes` it, and readers see the newest. What was superseded stays so: to have it back, add it again as a new record
(with its own time).
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.records.forms import Judgement, Source, canonical, from_json, read_jsonl, to_json
from rlaif_jax.feedback.records.sqlite import connect, transaction

SCHEMA = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS judgement (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    form TEXT NOT NULL,
    item TEXT NOT NULL,
    rater TEXT NOT NULL,
    source TEXT NOT NULL,
    principle TEXT NOT NULL,
    status TEXT NOT NULL,
    time REAL,
    cost REAL NOT NULL,
    supersedes TEXT NOT NULL,
    record TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS judgement_item ON judgement (item);
CREATE INDEX IF NOT EXISTS judgement_supersedes ON judgement (supersedes) WHERE supersedes <> '';
"""


class Entry(NamedTuple):
    """A stored judgement and its place: `sequence` rises with every record added, so it is a cursor for readers."""

    sequence: int
    judgement: Judgement


class Store:
    """The feedback in the SQLite file `path`, created if absent. One object a thread; any number of processes."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            self._db = connect(self.path)
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            require(
                version in (0, SCHEMA), f"{path}: a feedback store of version {version}; this program reads {SCHEMA}"
            )
            if version == 0:
                with self._write():
                    for statement in _TABLES.split(";"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version = {SCHEMA}")
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"{path}: no feedback store can be opened here ({error})") from error

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    def _write(self) -> AbstractContextManager[None]:
        return transaction(self._db)

    def add(self, judgements: Iterable[Judgement]) -> int:
        """Append all in one transaction, on disk before this returns; the number that was not there already.

        Either all are in the store or, with a UserError (disk full, read-only, another writer never done), none.
        """
        rows = [
            (
                j.id,
                j.form,
                j.item,
                _column(j.rater.name),
                j.rater.source,
                _column(j.principle),
                j.status,
                j.time,
                j.call.cost,
                j.supersedes,
                canonical(to_json(j)),
            )
            for j in judgements
        ]
        if not rows:
            return 0
        try:
            with self._write():
                before = self._db.total_changes
                self._db.executemany(
                    "INSERT OR IGNORE INTO judgement (id, form, item, rater, source, principle, status, time, cost, "
                    "supersedes, record) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    rows,
                )
                return self._db.total_changes - before
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: {len(rows)} judgements could not be stored ({error}); none was") from error

    def read(
        self,
        *,
        form: str | None = None,
        source: Source | None = None,
        item: str | None = None,
        after: int = 0,
        superseded: bool = False,
    ) -> Iterator[Entry]:
        """The judgements in the order of their coming, those behind the cursor `after`, without those that a later one
        supersedes and without retractions (with both if `superseded`)."""
        conditions, values = ["sequence > ?"], [after]  # type: tuple[list[str], list[object]]
        for column, wanted in (("form", form), ("source", source), ("item", item)):
            if wanted is not None:
                conditions.append(f"{column} = ?")
                values.append(wanted)
        if not superseded:
            conditions.append("status <> 'retracted'")
            conditions.append("id NOT IN (SELECT supersedes FROM judgement WHERE supersedes <> '')")
        query = f"SELECT sequence, record FROM judgement WHERE {' AND '.join(conditions)} ORDER BY sequence"
        for sequence, record in self._db.execute(query, values):
            yield Entry(sequence, from_json(json.loads(record), f"{self.path}: record {sequence}"))

    def judgements(self, **wanted: object) -> list[Judgement]:
        """What `read` yields, without the cursors."""
        return [entry.judgement for entry in self.read(**wanted)]  # type: ignore[arg-type]

    def __contains__(self, identifier: str) -> bool:
        return self._db.execute("SELECT 1 FROM judgement WHERE id = ?", (identifier,)).fetchone() is not None

    def __len__(self) -> int:
        return self._db.execute("SELECT count(*) FROM judgement").fetchone()[0]

    @property
    def cursor(self) -> int:
        """The sequence number of the newest record; 0 in an empty store."""
        return self._db.execute("SELECT coalesce(max(sequence), 0) FROM judgement").fetchone()[0]

    def counts(self) -> list[tuple[str, str, str, int, float]]:
        """(form, source, status, records, cost) of every combination that occurs."""
        return self._db.execute(
            "SELECT form, source, status, count(*), sum(cost) FROM judgement GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
        ).fetchall()

    def export_jsonl(self, path: Path) -> int:
        """Write all records, the superseded too, one a line; the number written. The file appears whole or not at all."""
        temporary = Path(path).with_name(f"{Path(path).name}.{os.getpid()}.tmp")
        count = 0
        try:
            with open(temporary, "w") as file:
                for entry in self.read(superseded=True):
                    file.write(canonical(to_json(entry.judgement)) + "\n")
                    count += 1
            temporary.replace(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        finally:
            temporary.unlink(missing_ok=True)
        return count

    def import_jsonl(self, path: Path, known: Mapping[str, Collection[str]] | None = None) -> tuple[int, Sequence[str]]:
        """(records added, a message for each bad line); the good lines are kept. known: see `forms.read_jsonl`."""
        good, bad = read_jsonl(path, known)
        return self.add(good), bad

    def export_tfds(self, folder: Path) -> Path:
        """Write all records, the superseded too, as a TFDS data set; the folder of its files. See `dataset.write`."""
        from rlaif_jax.feedback.records import dataset  # TFDS takes a second to import, and few stores are exported

        return dataset.write({"train": self.judgements(superseded=True)}, folder)

    def import_tfds(self, folder: Path, split: str = "train") -> tuple[int, Sequence[str]]:
        """(records added, a message for each bad record) of a split that `export_tfds` wrote."""
        from rlaif_jax.feedback.records import dataset

        good, bad = dataset.read(folder, split)
        return self.add(good), bad


def _column(text: str) -> str:
    """Text that SQLite can hold: half a surrogate pair, which JSON can carry, is a question mark in the columns that
    are searched; the record keeps it."""
    return text.encode(errors="replace").decode()
