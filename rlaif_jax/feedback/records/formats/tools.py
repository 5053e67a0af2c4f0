"""Formats of annotation tools: Argilla, label-studio, crowd-kit, get-another-label."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlaif_jax.config import UserError, require
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
    Call,
    Comment,
    Correction,
    Judgement,
    Ranking,
    Rater,
    Rating,
    Source,
    Span,
)

EDITS = ("correction",)
"""Names of questions whose text is a correction, not a comment."""


@dataclasses.dataclass(frozen=True)
class _Item:
    """What raters of an annotation tool judged.

    It holds the prompt, the answers by the names of their fields, and the settings.
    """

    prompt: str
    answers: dict[str, str]
    edits: Collection[str]
    scale: tuple[float, float]


# ---- Argilla


def read_argilla(
    path: Path,
    *,
    prompt: str = "prompt",
    answers: Sequence[str] = ("answer",),
    edits: Collection[str] = EDITS,
    scale: tuple[float, float] = (1, 5),
) -> ReadResult:
    """Reads Argilla's exported records.

    They are nested (`responses: {question: [{value, user_id}]}`) or flat (`question.responses`, `question.responses.users`,
    `question.suggestion`, `.score`, `.agent`). The value decides the form: a number is a rating, a list of `{value, rank}` a
    ranking, a list of `{start, end, label}` marked spans. A text is a choice if it names one of `answers` (or "tie"), a
    correction if its question is one of `edits`, else a comment. The name of a question about one of several answers ends
    with that field's name (`quality_answer_2`). The question's name is the principle, unless it is the form's name.
    Suggestions are judgements of an AI; discarded responses are abstentions; drafts are left out.

    Args:
        path: the export.
        prompt: the name of the prompt's field.
        answers: the names of the answers' fields.
        edits: the names of the questions whose text is a correction.
        scale: the lowest and the highest rating.

    Returns:
        (judgements, a message for each bad row).

    Raises:
        UserError: the file cannot be read.
    """
    found = Collector()
    for where, row in json_rows(path, found.bad):
        with found.at(where):
            fields = row["fields"] if isinstance(row, Mapping) and "fields" in row else row
            item = _Item(field(fields, prompt), {name: field(fields, name) for name in answers}, edits, scale)
            for question, value, rater, more in _argilla(row):
                with found.at(f"{where}, question {question}"):
                    found.good.append(_judgement(item, question, value, rater, more))
    return found.result


def _argilla(row: Mapping[str, Any]) -> Iterator[tuple[str, Any, Rater, dict[str, Any]]]:
    """Yields (question, value, rater, further fields) of every response and suggestion."""
    responses: list[tuple[str, Any, Any, Any]] = []
    suggestions: list[tuple[str, Any, Any, Any]] = []
    for question, entries in (row.get("responses") or {}).items():
        responses += [(question, e.get("value"), e.get("user_id"), e.get("status")) for e in entries]
    for question, entry in (row.get("suggestions") or {}).items():
        suggestions.append((question, entry.get("value"), entry.get("agent"), entry.get("score")))
    for key, values in row.items():
        question = key.rpartition(".")[0]
        if key.endswith(".responses") and values:
            users = row.get(f"{key}.users") or [None] * len(values)
            statuses = row.get(f"{key}.status") or [None] * len(values)
            responses += [(question, *entry) for entry in zip(values, users, statuses, strict=True)]
        elif key.endswith(".suggestion") and values is not None:
            suggestions.append((question, values, row.get(f"{key}.agent"), row.get(f"{key}.score")))
    for question, value, user, status in responses:
        if status != "draft":
            more: dict[str, Any] = {"status": "abstained"} if status == "discarded" else {}
            yield question, value, Rater(str(user or "unknown"), "person"), more
    for question, value, agent, score in suggestions:
        if value is not None:
            yield question, value, Rater(str(agent or "suggestion"), "ai"), _confidence(score)


def _judgement(item: _Item, question: str, value: Any, rater: Rater, more: Mapping[str, Any]) -> Judgement:
    """Returns the judgement that a question's value expresses."""
    names = list(item.answers)
    about = next((name for name in names if question.endswith(name)), names[0])
    one = {"prompt": item.prompt, "answers": (item.answers[about],), "rater": rater, **more}
    every = {"prompt": item.prompt, "answers": tuple(item.answers.values()), "rater": rater, **more}
    principle = question.removesuffix(about).rstrip("_-. ") if question.endswith(about) else question
    shared: dict[str, Any] = {"principle": "" if principle in FORMS else principle}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Rating(**one, **shared, value=float(value), low=item.scale[0], high=item.scale[1])
    if isinstance(value, list) and value and all(isinstance(e, Mapping) and "rank" in e for e in value):
        ranks = {field(e, "value"): e["rank"] for e in value}
        unknown = sorted(set(ranks) - set(names))
        require(not unknown, f"ranks the unknown answer {', '.join(unknown)}; the answers are {', '.join(names)}")
        return Ranking(**every, **shared, ranks=tuple(ranks.get(name) for name in names))
    if isinstance(value, list) and value and all(isinstance(e, Mapping) and "start" in e for e in value):
        spans = tuple(
            Span(field(e, "start", int), field(e, "end", int), category=str(e.get("label") or "")) for e in value
        )
        return Correction(**one, **shared, spans=spans)
    require(isinstance(value, str), f"a value of no form: {str(value)[:60]!r}")
    if value in names or (value == "tie" and len(names) == 2):
        if "status" in more:
            return Ranking(**every, **shared)
        if len(names) == 2:
            winner = names.index(value) if value in names else None
            return pair(item.prompt, every["answers"], winner, rater, **shared, **more)
        return Ranking(**every, **shared, ranks=tuple(1 if name == value else 2 for name in names))
    if any(edit in question for edit in item.edits):
        return Correction(**one, **shared, edited=value)
    return Comment(**one, **shared, text=value)


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


# ---- label-studio


def read_label_studio(
    path: Path,
    *,
    prompt: str = "prompt",
    answers: Sequence[str] = ("answer",),
    edits: Collection[str] = EDITS,
    scale: tuple[float, float] = (1, 5),
) -> ReadResult:
    """Reads label-studio's JSON export: `annotations[].result[]` of people, `predictions[]` of models.

    `pairwise` (value.selected "left" or "right") and `choices` that name an answer are comparisons, `rating` is a rating,
    `textarea` a comment, or a correction if its from_name is one of `edits`. `labels` are marked spans; all spans of one
    annotation make one correction. from_name is the principle, unless it is the form's or the type's name. A cancelled
    annotation is an abstention.

    Args:
        path: the export.
        prompt: the name of the prompt in `data`.
        answers: the names of the answers in `data`.
        edits: the from_names whose text is a correction.
        scale: the lowest and the highest rating.

    Returns:
        (judgements, a message for each bad row).

    Raises:
        UserError: the file cannot be read.
    """
    found = Collector()
    for where, row in json_rows(path, found.bad):
        with found.at(where):
            data = field(row, "data", dict)
            item = _Item(field(data, prompt), {name: field(data, name) for name in answers}, edits, scale)
            for annotation in row.get("annotations") or []:
                with found.at(where):
                    _annotation(found, where, annotation, item)
            for prediction in row.get("predictions") or []:
                with found.at(where):
                    more = _confidence(prediction.get("score"))
                    rater = Rater(str(prediction.get("model_version") or "prediction"), "ai")
                    _results(found, where, prediction, item, rater, more)
    return found.result


def _annotation(found: Collector, where: str, annotation: Any, item: _Item) -> None:
    """Adds the judgements of one annotation to `found`."""
    who = annotation.get("completed_by", "unknown")
    who = (who.get("email") or who.get("id")) if isinstance(who, Mapping) else who
    rater = Rater(str(who), "person")
    more: dict[str, Any] = {
        "time": _unix(annotation.get("created_at")),
        "call": Call(latency_s=annotation.get("lead_time")),
    }
    if not annotation.get("was_cancelled"):
        return _results(found, where, annotation, item, rater, more)
    form, answers = Ranking if len(item.answers) > 1 else Rating, tuple(item.answers.values())
    found.good.append(form(prompt=item.prompt, answers=answers, rater=rater, status="abstained", **more))
    return None


def _confidence(score: Any) -> dict[str, Any]:
    """Returns a score from 0 to 1 as the field `confidence`; no field for another score."""
    return {"confidence": float(score)} if isinstance(score, (int, float)) and 0 <= score <= 1 else {}


def _unix(stamp: str | None) -> float | None:
    return None if stamp is None else datetime.datetime.fromisoformat(stamp).timestamp()


def _results(found: Collector, where: str, annotation: Any, item: _Item, rater: Rater, more: Mapping[str, Any]) -> None:
    """Adds the judgements of the results of one annotation or prediction to `found`."""
    names = list(item.answers)
    spans: dict[str, list[Span]] = {}
    for result in field(annotation, "result", list):
        with found.at(where):
            kind, value, question = field(result, "type"), field(result, "value", dict), field(result, "from_name")
            about = next((name for name in names if name == result.get("to_name")), names[0])
            if kind == "labels":
                label = "/".join(value.get("labels") or [])
                span = Span(field(value, "start", int), field(value, "end", int), category=label)
                require(
                    span.end <= len(item.answers[about]), f"span {span.start} .. {span.end} does not lie in {about}"
                )
                spans.setdefault(about, []).append(span)
                continue
            parsed = _values(kind, value, names)
            principle = "" if question == kind else question
            title = f"{principle}_{about}" if kind in ("rating", "textarea") else principle
            found.good.append(_judgement(item, title or kind, parsed, rater, more))
    for about, marks in spans.items():
        with found.at(where):
            answers = (item.answers[about],)
            found.good.append(Correction(prompt=item.prompt, answers=answers, rater=rater, spans=tuple(marks), **more))


def _values(kind: str, value: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Returns a result's value in Argilla's shape."""
    if kind == "pairwise":
        return {"left": names[0], "right": names[-1]}.get(field(value, "selected"), "tie")
    if kind == "choices":
        return field(value, "choices", list)[0]
    if kind == "rating":
        return field(value, "rating", float)
    if kind == "textarea":
        return "\n".join(field(value, "text", list))
    raise UserError(f"a result of type {kind!r}; read are labels, pairwise, choices, rating, textarea")


# ---- crowd-kit


def read_crowd_labels(
    path: Path, options: Sequence[str] = (), *, source: Source = "person", delimiter: str = ",", header: bool = True
) -> ReadResult:
    """Reads crowd-kit's labels, with the columns `task, worker, label`.

    A label becomes a ranking of the options that puts it first; `rows.chosen` returns its index. The prompt is the task.

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
    labels = tuple(options) or tuple(sorted({row["label"] for _, row in rows}))
    if rows:
        require(len(labels) >= 2, f"{path}: only the label {', '.join(labels)} occurs; give the options")
    for where, row in rows:
        with found.at(where):
            found.good.append(choice(row["task"], labels, row["label"], Rater(row["worker"], source)))
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
    for where, row in table_rows(path, found.bad, ("worker", "left", "right", "label")):
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
    rows = [(j.prompt, j.rater.name, j.answers[best]) for j in judgements if (best := chosen(j)) is not None]
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
    rows = []
    for j in judgements:
        if isinstance(j, Ranking) and j.answered:
            for first, second, p in j.pairs():
                label = "tie" if p == 0.5 else j.answers[first if p > 0.5 else second]
                rows.append((j.rater.name, j.answers[first], j.answers[second], label))
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
    good, bad = read_crowd_labels(path, options, delimiter="\t", header=False)
    if gold is not None and good:
        for where, row in table_rows(gold, bad, ("task", "label"), delimiter="\t", header=False):
            try:
                good.append(choice(row["task"], good[0].answers, row["label"], Rater("gold", "person")))
            except UserError as error:
                bad.append(f"{where}: {error}")
    return good, bad
