"""The feedback of a project in one SQLite file: append-only, content-addressed, several writers.

The key of a record is its id (`Judgement.id`), so the same record added twice is stored once. `add` returns after the
transaction is on disk; what it acknowledged survives kill -9. Nothing is changed or removed: a correction of a record is a
new record of the same rater that `supersedes` it, and readers see the newest; a record never hides one of another rater. A
superseded record stays superseded; to restore it, add it again as a new record (with another time).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.records.forms import Judgement, Source, canonical, record_id, to_json
from rlaif_jax.feedback.records.parsing import each_judgement, from_json
from rlaif_jax.feedback.records.sqlite import PATIENCE, Database, searchable
from rlaif_jax.files import atomic_write

SCHEMA = 1
IMPORT_STEP = 2_000
"""The number of records of one transaction of `Store.add_all`."""
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
_NEWER = (
    "SELECT 1 FROM judgement newer WHERE newer.supersedes = j.id AND newer.supersedes <> '' "
    "AND newer.rater = j.rater AND newer.source = j.source"
)
"""The records that supersede the record `j`: of the same rater only, so an import cannot hide other raters' records."""


class StoredJudgement(NamedTuple):
    """A judgement and its place in the store.

    `sequence` rises with every record added, so it serves as a cursor for readers.
    """

    sequence: int
    judgement: Judgement


class Store(Database):
    """The feedback in the SQLite file `path`, which is created where absent.

    One object per thread; any number of processes.

    Args:
        path: the file.
        patience_s: seconds for which a change waits for another writer.

    Raises:
        UserError: the file cannot be opened, or is a store of another version.
    """

    def __init__(self, path: Path, *, patience_s: float = PATIENCE) -> None:
        tables = f"{_TABLES}PRAGMA user_version = {SCHEMA}"
        super().__init__(path, tables, "no feedback store can be opened here", patience_s)

    def _create(self, tables: str) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        require(
            version in (0, SCHEMA), f"{self.path}: a feedback store of version {version}; this program reads {SCHEMA}"
        )
        if version == 0:
            super()._create(tables)

    def add(self, judgements: Iterable[Judgement]) -> int:
        """Appends all judgements in one transaction, on disk at return; returns the number of new ones.

        Raises:
            UserError: disk full, file read-only, or another writer that does not finish; none is stored then.
        """
        rows = [_row(judgement) for judgement in judgements]
        if not rows:
            return 0
        with self.write(f"{len(rows)} judgements") as db:
            before = db.total_changes
            # Not OR IGNORE, which also passes over records that break another rule of the table.
            db.executemany(
                "INSERT INTO judgement (id, form, item, rater, source, principle, status, time, cost, supersedes, "
                "record) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
                rows,
            )
            return db.total_changes - before

    def add_all(self, judgements: Iterable[Judgement]) -> tuple[int, int]:
        """Appends any number of judgements as they come; returns (their number, the number of new ones).

        Every `IMPORT_STEP` records are one transaction, between which other writers take their turn. What breaks off keeps
        what it added; the same judgements again add the rest.

        Raises UserError where the store cannot be written.
        """
        given = new = 0
        rest = iter(judgements)
        while step := list(itertools.islice(rest, IMPORT_STEP)):
            new += self.add(step)
            given += len(step)
        return given, new

    def read(
        self,
        *,
        form: str | None = None,
        source: Source | None = None,
        item: str | None = None,
        after: int = 0,
        superseded: bool = False,
    ) -> Iterator[StoredJudgement]:
        """Yields judgements in the order in which they were added.

        Args:
            form: only judgements of this form.
            source: only judgements of this kind of judge.
            item: only judgements with this `Judgement.item`.
            after: only judgements whose `sequence` is larger.
            superseded: yield superseded judgements and retractions as well.
        """
        conditions, values = ["sequence > ?"], [after]  # type: tuple[list[str], list[object]]
        for column, wanted in (("form", form), ("source", source), ("item", item)):
            if wanted is not None:
                conditions.append(f"{column} = ?")
                values.append(wanted)
        if not superseded:
            conditions.append("status <> 'retracted'")
            conditions.append(f"NOT EXISTS ({_NEWER})")
        query = f"SELECT sequence, record FROM judgement j WHERE {' AND '.join(conditions)} ORDER BY sequence"
        for sequence, record in self.each(query, values):
            yield StoredJudgement(sequence, _parse(record, f"{self.path}: record {sequence}"))

    def judgements(self, **selection: object) -> list[Judgement]:
        """Returns the judgements that `read` yields, without their sequence numbers.

        Args:
            **selection: the arguments of `read`, such as `form` and `item`; without them all judgements are returned.
        """
        return [stored.judgement for stored in self.read(**selection)]  # type: ignore[arg-type]

    def __contains__(self, identifier: str) -> bool:
        return self.row("SELECT 1 FROM judgement WHERE id = ?", (searchable(identifier),)) is not None

    def __len__(self) -> int:
        return self.row("SELECT count(*) FROM judgement")[0]

    def items(self, after: int) -> frozenset[str]:
        """Returns the `Judgement.item` of each record whose `sequence` is larger than `after`."""
        return frozenset(row[0] for row in self.rows("SELECT item FROM judgement WHERE sequence > ?", (after,)))

    @property
    def cursor(self) -> int:
        """Returns the sequence number of the newest record; 0 in an empty store."""
        return self.row("SELECT coalesce(max(sequence), 0) FROM judgement")[0]

    def export_jsonl(self, path: Path) -> int:
        """Writes all records, superseded ones included, as JSON lines; returns how many.

        Raises UserError where the file cannot be written; it appears whole or not at all.
        """
        count = 0
        with atomic_write(path) as file:
            for stored in self.read(superseded=True):
                file.write(canonical(to_json(stored.judgement)) + "\n")
                count += 1
        return count

    def import_jsonl(self, path: Path, known: Mapping[str, Collection[str]] | None = None) -> tuple[int, Sequence[str]]:
        """Adds the good lines of a JSONL file by `add_all`; returns (number of new records, messages).

        Args:
            path: the file.
            known: the prompts and answers that may be judged, as in `parsing.read_judgements`.

        Raises:
            UserError: the file cannot be read, or the store not written.
        """
        bad: list[str] = []
        return self.add_all(each_judgement(path, bad, known))[1], bad

    def export_tfds(self, folder: Path) -> Path:
        """Writes all records, also superseded ones, as a TFDS data set; returns its folder."""
        from rlaif_jax.feedback.records import dataset  # TFDS takes a second to import, and few stores are exported

        return dataset.write({"train": self.judgements(superseded=True)}, folder)

    def import_tfds(self, folder: Path, split: str = "train") -> tuple[int, Sequence[str]]:
        """Adds a split that `export_tfds` wrote; returns (number of new records, messages).

        Args:
            folder: the folder that `export_tfds` wrote.
            split: the name of the split.
        """
        from rlaif_jax.feedback.records import dataset

        good, bad = dataset.read(folder, split)
        return self.add_all(good)[1], bad


def _row(judgement: Judgement) -> tuple[Any, ...]:
    """Returns the columns of a record."""
    plain = to_json(judgement)  # NumPy's numbers are Python's in it
    return (
        record_id(plain),
        judgement.form,
        judgement.item,
        searchable(judgement.rater.name),
        judgement.rater.source,
        searchable(judgement.principle),
        judgement.status,
        plain["time"],
        plain["call"]["cost"],
        searchable(judgement.supersedes),
        canonical(plain),
    )


def _parse(record: str, where: str) -> Judgement:
    """Returns the judgement of a row; raises UserError, which begins with `where`, for a damaged one."""
    try:
        values = json.loads(record)
    except ValueError as error:
        raise UserError(f"{where} is damaged ({error}): restore the file from a copy") from error
    return from_json(values, where)
