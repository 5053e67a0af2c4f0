"""Records judgements of a judge that may be asked again: a new one supersedes the old one."""

from __future__ import annotations

import dataclasses
import sqlite3
from pathlib import Path
from typing import Any

from rlaif_jax.config import UserError
from rlaif_jax.feedback.records.forms import Call, Judgement, Ranking, sha256, to_json
from rlaif_jax.feedback.records.store import Store


class Recorder:
    """Records judgements in a store; a new judgement on the same subject supersedes the old one."""

    def __init__(self, store: Path | None) -> None:
        self._store = Store(store) if store is not None else None

    def close(self) -> None:
        """Closes the store's file, if there is one."""
        if self._store is not None:
            self._store.close()

    def record(self, made: Judgement, paid: Call | None = None) -> Judgement:
        """Records a judgement and returns what is on record now, with the answers in the order of `made`.

        A missing judgement never replaces an answer, and a judgement with the same content is not recorded
        twice.

        Args:
            made: the judgement; its call is of all replies that it was made of.
            paid: the call without replies that an earlier record on the subject has counted; None = made.call.

        Raises:
            UserError: the store cannot be written.
        """
        if self._store is None:
            return made
        subject = _subject(made)
        try:
            with self._store.write("1 judgement"):  # look-up and record in one: another process may record the same
                about = [entry.judgement for entry in self._store.read(source="ai", item=made.item)]
                known = next((entry for entry in reversed(about) if _subject(entry) == subject), None)
                if known is not None:
                    turned = in_order_of(made.answers, known)
                    if (known.answered and not made.answered) or _content(turned) == _content(made):
                        return turned
                    made = dataclasses.replace(made, supersedes=known.id, call=made.call if paid is None else paid)
                self._store.add([made])
        except sqlite3.Error as error:
            raise UserError(f"{self._store.path}: a judgement cannot be recorded ({error})") from error
        return made


def in_order_of(answers: tuple[str, ...], entry: Judgement) -> Judgement:
    """Returns `entry` with its answers in another order, and with all that refers to their places.

    Args:
        answers: the answers of `entry` in the order that is wanted.
        entry: a judgement.
    """
    if entry.answers == answers:
        return entry
    left = list(range(len(answers)))
    places = []  # places[new] = old
    for answer in answers:
        places.append(next(i for i in left if entry.answers[i] == answer))
        left.remove(places[-1])
    moved: dict[str, Any] = {"answers": answers, "shown": tuple(places.index(i) for i in entry.shown)}
    if entry.generators:
        moved["generators"] = tuple(entry.generators[i] for i in places)
    if isinstance(entry, Ranking):
        moved["ranks"] = tuple(entry.ranks[i] for i in places) if entry.ranks else ()
        moved["beats"] = tuple((places.index(a), places.index(b)) for a, b in entry.beats)
        if entry.probability is not None and places == [1, 0]:
            moved["probability"] = 1 - entry.probability
    return dataclasses.replace(entry, **moved)


def _subject(entry: Judgement) -> str:
    """Returns the key of what a judgement is about: rater, prompt, answers as shown, principle and seed."""
    shown = [entry.answers[i] for i in entry.shown] if entry.shown else list(entry.answers)
    if len(set(shown)) < len(shown):  # two answers of the same words still are two orders
        shown.append(str(entry.shown))
    rater = [entry.rater.name, entry.rater.model, entry.rater.prompt_hash]
    return sha256([entry.form, rater, entry.prompt, shown, entry.principle, entry.seed])


def _content(entry: Judgement) -> dict[str, Any]:
    """Returns the record without the data of its call, for comparing two judgements on the same subject."""
    values = to_json(entry)
    for name in ("call", "supersedes", "time"):
        del values[name]
    if values.get("probability") is not None:  # 1 - (1 - p) is not always p
        values["probability"] = round(values["probability"], 12)
    return values
