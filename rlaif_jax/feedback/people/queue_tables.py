"""The tables of the queue, with what makes it quick at any number of tasks: counts, places, indexes.

Triggers keep the counts, so they agree with the posts whichever program writes them.
"""

from __future__ import annotations

import sqlite3

LIVE = "is_undone = 0 AND act IN ('answer', 'skip')"
"""A post that holds: its rater has handled the task. Written as in the indexes, else SQLite does not use them."""

WANTED = "is_open AND answers < overlap"
"""A task that is still to be answered; written as in the index."""

_NEW, _OLD = "(NEW.is_open AND NEW.answers < NEW.overlap)", "(OLD.is_open AND OLD.answers < OLD.overlap)"
_LOWER = "UPDATE page_place SET urgency = NEW.urgency, sequence = NEW.sequence"

TABLES = """
CREATE TABLE IF NOT EXISTS page_task (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, task TEXT NOT NULL, overlap INTEGER NOT NULL,
    priority REAL NOT NULL, origin TEXT NOT NULL, is_open INTEGER NOT NULL DEFAULT 1);
CREATE TABLE IF NOT EXISTS page_lease (
    task TEXT NOT NULL, rater TEXT NOT NULL, granted REAL NOT NULL, expires REAL NOT NULL, PRIMARY KEY (task, rater));
CREATE TABLE IF NOT EXISTS page_post (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, rater TEXT NOT NULL, request TEXT NOT NULL, body TEXT NOT NULL,
    act TEXT NOT NULL, task TEXT NOT NULL, payload TEXT NOT NULL, records TEXT NOT NULL, seconds REAL NOT NULL,
    time REAL NOT NULL, informed INTEGER NOT NULL, is_undone INTEGER NOT NULL DEFAULT 0,
    is_delivered INTEGER NOT NULL DEFAULT 0, UNIQUE (rater, request));
CREATE TABLE IF NOT EXISTS page_count (
    rater TEXT PRIMARY KEY, answered INTEGER NOT NULL, skipped INTEGER NOT NULL, seconds REAL NOT NULL,
    handled_wanted INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS page_place (rater TEXT PRIMARY KEY, urgency REAL NOT NULL, sequence INTEGER NOT NULL);
"""

_COLUMNS = {
    "kind": "TEXT NOT NULL DEFAULT ''",
    "answers": "INTEGER NOT NULL DEFAULT 0",
    "handled": "INTEGER NOT NULL DEFAULT 0",
    "until": "REAL",
    "urgency": "REAL GENERATED ALWAYS AS (-priority) VIRTUAL",
}
"""Columns that `page_task` got later."""

INDEXES = f"""
CREATE INDEX IF NOT EXISTS page_task_wanted ON page_task (urgency, sequence) WHERE {WANTED};
CREATE INDEX IF NOT EXISTS page_task_group ON page_task (is_open, kind, origin, overlap, answers, handled);
CREATE INDEX IF NOT EXISTS page_task_until ON page_task (until) WHERE until IS NOT NULL AND is_open;
CREATE INDEX IF NOT EXISTS page_lease_rater ON page_lease (rater, expires);
CREATE INDEX IF NOT EXISTS page_post_task ON page_post (task, rater);
CREATE INDEX IF NOT EXISTS page_post_live ON page_post (task, rater) WHERE {LIVE};
CREATE INDEX IF NOT EXISTS page_post_rater ON page_post (rater, sequence) WHERE {LIVE};
CREATE INDEX IF NOT EXISTS page_post_decided ON page_post (task) WHERE act = 'adjudicate';
CREATE INDEX IF NOT EXISTS page_post_waiting ON page_post (sequence) WHERE is_delivered = 0;
CREATE TRIGGER IF NOT EXISTS page_post_counts AFTER INSERT ON page_post BEGIN
    INSERT INTO page_count VALUES (NEW.rater, 0, 0, 0, 0) ON CONFLICT (rater) DO NOTHING;
    UPDATE page_count SET seconds = seconds + NEW.seconds WHERE rater = NEW.rater;
END;
CREATE TRIGGER IF NOT EXISTS page_post_made AFTER INSERT ON page_post
WHEN NEW.is_undone = 0 AND NEW.act IN ('answer', 'skip') BEGIN
    INSERT INTO page_count VALUES (NEW.rater, 0, 0, 0, 0) ON CONFLICT (rater) DO NOTHING;
    UPDATE page_count SET answered = answered + (NEW.act = 'answer'), skipped = skipped + (NEW.act = 'skip'),
        handled_wanted = handled_wanted + (SELECT count(*) FROM page_task WHERE id = NEW.task AND {WANTED})
        WHERE rater = NEW.rater;
    UPDATE page_task SET answers = answers + (NEW.act = 'answer'), handled = handled + 1 WHERE id = NEW.task;
END;
CREATE TRIGGER IF NOT EXISTS page_post_undone AFTER UPDATE OF is_undone ON page_post
WHEN NEW.is_undone AND NOT OLD.is_undone AND NEW.act IN ('answer', 'skip') BEGIN
    UPDATE page_count SET answered = answered - (NEW.act = 'answer'), skipped = skipped - (NEW.act = 'skip'),
        handled_wanted = handled_wanted - (SELECT count(*) FROM page_task WHERE id = NEW.task AND {WANTED})
        WHERE rater = NEW.rater;
    UPDATE page_task SET answers = answers - (NEW.act = 'answer'), handled = handled - 1 WHERE id = NEW.task;
    UPDATE page_place SET (urgency, sequence) = (SELECT urgency, sequence FROM page_task WHERE id = NEW.task)
        WHERE rater = NEW.rater
        AND (urgency, sequence) > (SELECT urgency, sequence FROM page_task WHERE id = NEW.task);
END;
CREATE TRIGGER IF NOT EXISTS page_task_flipped AFTER UPDATE OF is_open, overlap, answers ON page_task
WHEN {_NEW} <> {_OLD} BEGIN
    UPDATE page_count SET handled_wanted = handled_wanted + {_NEW} - {_OLD}
        WHERE rater IN (SELECT rater FROM page_post WHERE task = NEW.id AND {LIVE});
END;
CREATE TRIGGER IF NOT EXISTS page_task_wanted_again AFTER UPDATE OF is_open, overlap, answers, priority ON page_task
WHEN {_NEW} AND (NOT {_OLD} OR NEW.priority > OLD.priority) BEGIN
    {_LOWER} WHERE (urgency, sequence) > (NEW.urgency, NEW.sequence);
END;
CREATE TRIGGER IF NOT EXISTS page_task_put AFTER INSERT ON page_task BEGIN
    {_LOWER} WHERE (urgency, sequence) > (NEW.urgency, NEW.sequence);
END
"""


def upgrade(db: sqlite3.Connection) -> None:
    """Adds to a file of an older version the columns and counts that it lacks."""
    known = {row[1] for row in db.execute("PRAGMA table_xinfo(page_task)")}
    missing = {name: form for name, form in _COLUMNS.items() if name not in known}
    for name, form in missing.items():
        db.execute(f"ALTER TABLE page_task ADD COLUMN {name} {form}")
    if "answers" not in missing:
        return
    live = f"FROM page_post p WHERE p.task = page_task.id AND {LIVE}"
    db.execute(
        "UPDATE page_task SET kind = coalesce(json_extract(task, '$.kind'), ''), "
        f"answers = (SELECT count(DISTINCT rater) {live} AND p.act = 'answer'), "
        f"handled = (SELECT count(DISTINCT rater) {live})"
    )
    db.execute(
        "INSERT INTO page_count SELECT rater, sum(is_undone = 0 AND act = 'answer'), sum(is_undone = 0 AND act = 'skip'), "
        f"sum(seconds), sum({LIVE} AND task IN (SELECT id FROM page_task WHERE {WANTED})) FROM page_post GROUP BY rater"
    )
