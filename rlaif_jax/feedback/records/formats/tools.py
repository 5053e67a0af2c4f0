"""Formats of annotation tools: Argilla, label-studio, crowd-kit, get-another-label."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.records.formats.annotations import EDITS, Item, confidence, judgement_of
from rlaif_jax.feedback.records.formats.label_studio import read_label_studio as read_label_studio
from rlaif_jax.feedback.records.formats.label_studio import write_label_studio as write_label_studio
from rlaif_jax.feedback.records.formats.rows import (
    Collector,
    ReadResult,
    choice,
    chosen,
    field,
    json_rows,
    pair,
    table_rows,
    write_jsonl,
    write_table,
)
from rlaif_jax.feedback.records.forms import (
    FORMS,
    Comment,
    Correction,
    Judgement,
    Ranking,
    Rater,
    Rating,
    Source,
)

# ---- Argilla


def read_argilla(
    path: Path,
    *,
    prompt: str = "prompt",
    answers: Sequence[str] = ("answer",),
    edits: Collection[str] = EDITS,
    scale: tuple[float, float] = (1, 5),
    about: Mapping[str, str] | None = None,
) -> ReadResult:
    """Reads Argilla's exported records.

    They are nested (`responses: {question: [{value, user_id}]}`) or flat (`question.responses`, `question.responses.users`,
    `question.suggestion`, `.score`, `.agent`), or Argilla 1's (`responses: [{user_id, values: {question: {value}}}]`). The
    value decides the form: a number is a rating, a list of `{value, rank}` or of all names a ranking, a list of
    `{start, end, label}` marked spans. A text is a choice if it names one of `answers` (or "tie"), a correction if its
    question is one of `edits`, else a comment. The name of a question about one of several answers ends with that field's
    name (`quality_answer_2`), or `about` names the answer. The question's name is the principle, unless it is the form's
    name. Suggestions are judgements of an AI; discarded responses are abstentions; drafts are left out and counted.

    Args:
        path: the export.
        prompt: the name of the prompt's field.
        answers: the names of the answers' fields.
        edits: the names of the questions whose text is a correction.
        scale: the lowest and the highest rating.
        about: the name of a question -> the name of the answer that it is about.

    Returns:
        (judgements, a message for each bad row).

    Raises:
        UserError: the file cannot be read.
    """
    found = Collector()
    for where, row in found.rows(json_rows(path, found.bad)):
        with found.at(where):
            fields = row["fields"] if isinstance(row, Mapping) and "fields" in row else row
            texts = {name: field(fields, name) for name in answers}
            item = Item(field(fields, prompt), texts, edits, scale, about or {})
            for question, value, rater, more in _responses(found, row):
                with found.at(f"{where}, question {question}"):
                    subject = item.subject(question)
                    if value is None and more:
                        principle = "" if subject.principle in FORMS else subject.principle
                        found.good.append(item.abstained(rater, {"principle": principle}))
                    else:
                        found.good.append(judgement_of(item, question, subject, value, rater, more))
    return found.result


def _responses(found: Collector, row: Mapping[str, Any]) -> Iterator[tuple[str, Any, Rater, dict[str, Any]]]:
    """Yields (question, value, rater, further fields) of every response and suggestion; counts the drafts."""
    responses: list[tuple[str, Any, Any, Any]] = []
    suggestions: list[tuple[str, Any, Any, Any]] = []
    nested = row.get("responses") or {}
    for response in nested if isinstance(nested, list) else ():  # Argilla 1: one entry a user
        values = response.get("values") or {"": {"value": None}}
        user, status = response.get("user_id"), response.get("status")
        responses += [(question, entry.get("value"), user, status) for question, entry in values.items()]
    for question, entries in nested.items() if isinstance(nested, Mapping) else ():
        responses += [(question, e.get("value"), e.get("user_id"), e.get("status")) for e in entries]
    given = row.get("suggestions") or {}
    named = given.items() if isinstance(given, Mapping) else [(e.get("question_name", "suggestion"), e) for e in given]
    for question, entry in named:
        suggestions.append((question, entry.get("value"), entry.get("agent"), entry.get("score")))
    for key in row:
        question = key.rpartition(".")[0]
        if key.endswith(".responses") and row[key]:
            values = row[key]
            users = row.get(f"{key}.users") or [None] * len(values)
            statuses = row.get(f"{key}.status") or [None] * len(values)
            responses += [(question, *entry) for entry in zip(values, users, statuses, strict=True)]
        elif key.endswith(".suggestion") and row[key] is not None:
            suggestions.append((question, row[key], row.get(f"{key}.agent"), row.get(f"{key}.score")))
    if not responses and not suggestions:
        found.unused["record without a response"] += 1
    for question, value, user, status in responses:
        if status == "draft":
            found.unused["draft of a response"] += 1
            continue
        more: dict[str, Any] = {"status": "abstained"} if status == "discarded" else {}
        yield question, value, Rater(str(user or "unknown"), "person"), more
    for question, value, agent, score in suggestions:
        if value is None:
            found.unused["suggestion without a value"] += 1
        else:
            yield question, value, Rater(str(agent or "suggestion"), "ai"), confidence(score)


def write_argilla(judgements: Iterable[Judgement], path: Path) -> int:
    """Writes each judgement that has a value as a nested Argilla record; returns the number of rows.

    People's judgements become responses, the others suggestions. The fields are `prompt` and `answer`, for rankings
    `answer_1`, `answer_2` ...

    Args:
        judgements: judgements of any form.
        path: the file, JSON lines; it is replaced.

    Raises:
        UserError: the file cannot be written.
    """
    return write_jsonl(filter(None, map(_argilla_record, judgements)), path)


def _argilla_record(judgement: Judgement) -> dict[str, Any] | None:
    several = isinstance(judgement, Ranking)
    names = [f"answer_{i + 1}" for i in range(len(judgement.answers))] if several else ["answer"]
    value: Any = None
    if not judgement.answered:
        return None
    if isinstance(judgement, Rating):
        value = judgement.value
    elif isinstance(judgement, Comment):
        value = judgement.text
    elif isinstance(judgement, Ranking) and judgement.ranks:
        value = [{"value": name, "rank": rank} for name, rank in zip(names, judgement.ranks) if rank is not None]
    elif isinstance(judgement, Correction):
        spans = [{"start": s.start, "end": s.end, "label": s.category} for s in judgement.spans]
        value = judgement.edited if judgement.edited is not None else spans
    if value is None:
        return None
    question = judgement.form if not judgement.principle else judgement.principle
    if isinstance(judgement, Correction) and judgement.principle and judgement.edited is not None:
        question = f"{judgement.principle} {judgement.form}"
    record: dict[str, Any] = {
        "id": judgement.id,
        "fields": {"prompt": judgement.prompt, **dict(zip(names, judgement.answers))},
        "responses": {},
        "suggestions": {},
    }
    if judgement.rater.source == "person":
        record["responses"][question] = [{"value": value, "user_id": judgement.rater.name}]
    else:
        record["suggestions"][question] = {"value": value, "score": judgement.confidence, "agent": judgement.rater.name}
    return record


# ---- crowd-kit


def read_crowd_labels(
    path: Path, options: Sequence[str] = (), *, source: Source = "person", delimiter: str = ",", header: bool = True
) -> ReadResult:
    """Reads crowd-kit's labels, with the columns `task, worker, label`.

    A label becomes a ranking of the options that puts it first; `rows.chosen` returns its index. The prompt is the task. Rows
    without a label are counted and left out.

    Args:
        path: the table.
        options: the labels that a worker could choose from; by default all labels that occur, sorted.
        source: the kind of judge.
        delimiter: the character between columns.
        header: whether the first line names the columns; else they are `worker, task, label`.

    Returns:
        (judgements, a message for each bad row).

    Raises:
        UserError: a file cannot be read or lacks a column, or there are fewer than two labels to choose from.
    """
    found = Collector()
    columns = ("task", "worker", "label") if header else ("worker", "task", "label")
    rows = list(table_rows(path, found.bad, columns, delimiter=delimiter, header=header))
    labels = tuple(options) or tuple(sorted({row["label"] for _, row in rows if row["label"].strip()}))
    if rows:
        require(len(labels) >= 2, f"{path}: only the label {', '.join(labels)} occurs; give the options")
    for where, row in found.rows(rows):
        with found.at(where):
            entry = (row["task"], row["worker"], row["label"])
            if not entry[2].strip() and entry[2] not in labels:
                found.unused["row without a label"] += 1
            else:
                found.good.append(choice(entry[0], labels, entry[2], Rater(entry[1], source)))
    return found.result


def read_crowd_pairs(path: Path, prompt: str = "", *, source: Source = "person") -> ReadResult:
    """Reads crowd-kit's comparisons, with the columns `worker, left, right, label`.

    The label repeats the better answer; "tie" or an empty label is a tie.

    Args:
        path: the CSV file.
        prompt: the prompt of all comparisons.
        source: the kind of all workers.

    Returns:
        (rankings of two answers, a message for each bad row).

    Raises:
        UserError: the file cannot be read, or lacks a column.
    """
    found = Collector()
    for where, row in found.rows(table_rows(path, found.bad, ("worker", "left", "right", "label"))):
        with found.at(where):
            found.good.append(_crowd_pair(row, prompt, source))
    return found.result


def _crowd_pair(row: Mapping[str, str], prompt: str, source: Source) -> Ranking:
    sides, label = (row["left"], row["right"]), row["label"]
    require(sides[0] != sides[1], f"left and right are both {label!r}")
    require(label in (*sides, "tie", ""), f"the label {label!r} is neither left, {sides[0]!r}, nor right, {sides[1]!r}")
    return pair(prompt, sides, sides.index(label) if label in sides else None, Rater(row["worker"], source))


def write_crowd_labels(judgements: Iterable[Judgement], path: Path) -> int:
    """Writes rankings with a single best answer as `task, worker, label`; returns the number of rows.

    The task is the prompt, the worker the rater's name, the label the best answer.

    Args:
        judgements: judgements of any form; only rankings are written.
        path: the CSV file; it is replaced.

    Raises:
        UserError: the file cannot be written.
    """
    rows = ((j.prompt, j.rater.name, j.answers[best]) for j in judgements if (best := chosen(j)) is not None)
    return write_table(rows, ("task", "worker", "label"), path)


def write_crowd_pairs(judgements: Iterable[Judgement], path: Path) -> int:
    """Writes every comparison of the rankings as `worker, left, right, label`; returns the number of rows.

    The label repeats the better answer; the label of a tie is "tie". Prompts are not written.

    Args:
        judgements: judgements of any form; only rankings are written.
        path: the CSV file; it is replaced.

    Raises:
        UserError: the file cannot be written.
    """
    rows = (
        (j.rater.name, j.answers[i], j.answers[k], "tie" if p == 0.5 else j.answers[i if p > 0.5 else k])
        for j in judgements
        if isinstance(j, Ranking) and j.answered
        for i, k, p in j.pairs()
    )
    return write_table(rows, ("worker", "left", "right", "label"), path)


# ---- get-another-label (Sheng, Provost & Ipeirotis 2008)


def read_get_another_label(path: Path, options: Sequence[str] = (), gold: Path | None = None) -> ReadResult:
    """Reads get-another-label's lines `worker TAB object TAB category` as choices.

    Args:
        path: the lines.
        options: the categories to choose from; by default all that occur, sorted.
        gold: a file of `object TAB category`, whose choices are appended with the rater "gold".

    Returns:
        (judgements, a message for each bad row).

    Raises:
        UserError: a file cannot be read, or there are fewer than two categories to choose from.
    """
    found = read_crowd_labels(path, options, delimiter="\t", header=False)
    good, bad = found
    if gold is not None and good:
        for where, row in table_rows(gold, bad, ("task", "label"), delimiter="\t", header=False):
            try:
                good.append(choice(row["task"], good[0].answers, row["label"], Rater("gold", "person")))
            except UserError as error:
                bad.append(f"{where}: {error}")
    return found
