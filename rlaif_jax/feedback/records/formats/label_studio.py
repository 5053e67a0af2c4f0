"""label-studio's JSON: tasks with the annotations of people and the predictions of models."""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.records.formats.annotations import EDITS, Item, Subject, confidence, judgement_of, unix
from rlaif_jax.feedback.records.formats.rows import Collector, ReadResult, amount, field, json_rows
from rlaif_jax.feedback.records.forms import Call, Comment, Correction, Judgement, Ranking, Rater, Rating, Span
from rlaif_jax.files import atomic_write


def read_label_studio(
    path: Path,
    *,
    prompt: str = "prompt",
    answers: Sequence[str] = ("answer",),
    edits: Collection[str] = EDITS,
    scale: tuple[float, float] = (1, 5),
    about: Mapping[str, str] | None = None,
) -> ReadResult:
    """Reads label-studio's JSON export: `annotations[].result[]` of people, `predictions[]` of models.

    `pairwise` (value.selected "left" or "right") and `choices` that name an answer are comparisons, `rating` is a rating,
    `textarea` a comment, or a correction if its from_name is one of `edits`. `labels` are marked spans; all spans of one
    annotation make one correction. from_name is the principle, unless it is the form's or the type's name. A cancelled
    annotation is an abstention.

    A result names the tag that it is about (`to_name`), and the export does not say which answer a tag shows. A tag with the
    name of an answer is of that answer; other tags need `about`, unless there is only one answer.

    Args:
        path: the export.
        prompt: the name of the prompt in `data`.
        answers: the names of the answers in `data`.
        edits: the from_names whose text is a correction.
        scale: the lowest and the highest rating.
        about: the name of a tag -> the name of the answer that the tag shows.

    Returns:
        (judgements, a message for each bad row).

    Raises:
        UserError: the file cannot be read.
    """
    found = Collector()
    for where, row in found.rows(json_rows(path, found.bad)):
        with found.at(where):
            data = field(row, "data", dict)
            texts = {name: field(data, name) for name in answers}
            item = Item(field(data, prompt), texts, edits, scale, about or {})
            annotations, predictions = row.get("annotations") or [], row.get("predictions") or []
            if not annotations and not predictions:
                found.unused["task without an annotation"] += 1
            for annotation in annotations:
                with found.at(where):
                    _annotation(found, where, annotation, item, prompt)
            for prediction in predictions:
                with found.at(where):
                    rater = Rater(str(prediction.get("model_version") or "prediction"), "ai")
                    more = confidence(prediction.get("score"))
                    _results(found, where, prediction, item, prompt, rater, more)
    return found.result


def _annotation(found: Collector, where: str, annotation: Any, item: Item, prompt: str) -> None:
    """Adds the judgements of one annotation to `found`."""
    who = annotation.get("completed_by", "unknown")
    who = (who.get("email") or who.get("id")) if isinstance(who, Mapping) else who
    more = {"time": unix(annotation.get("created_at")), "call": Call(latency_s=amount(annotation.get("lead_time")))}
    if annotation.get("was_cancelled"):
        found.good.append(item.abstained(Rater(str(who), "person"), more))
    else:
        _results(found, where, annotation, item, prompt, Rater(str(who), "person"), more)


def _results(
    found: Collector, where: str, annotation: Any, item: Item, prompt: str, rater: Rater, more: Mapping[str, Any]
) -> None:
    """Adds the judgements of the results of one annotation or prediction to `found`."""
    results = field(annotation, "result", list)
    if not results:
        found.unused[f"{'annotation' if rater.source == 'person' else 'prediction'} without a result"] += 1
    spans: dict[str, list[Span]] = {}
    for result in results:
        with found.at(where):
            kind, value, question = field(result, "type"), field(result, "value", dict), field(result, "from_name")
            tags = [tag.strip() for tag in str(result.get("to_name", "")).split(",")]
            shown = [_shown(item, prompt, tag) for tag in tags]
            principle = "" if question == kind else question
            if kind == "labels":
                answer = _known(item, tags[0], shown[0])
                spans.setdefault(answer, []).append(_span(value, item.answers[answer], answer))
            elif kind == "pairwise":
                require(
                    len(tags) == 2,
                    f"to_name is {result.get('to_name')!r}; a pairwise result is of two tags, LEFT,RIGHT",
                )
                sides = tuple(_known(item, tag, answer) for tag, answer in zip(tags, shown))
                found.good.append(_pairwise(item, value, sides, rater, {**more, "principle": principle}))
            else:
                subject = Subject(tags[0], shown[0], principle)
                parsed = _value(kind, value, list(item.answers))
                found.good.append(judgement_of(item, question, subject, parsed, rater, more))
    for answer, marks in spans.items():
        with found.at(where):
            found.good.append(
                Correction(prompt=item.prompt, answers=(item.answers[answer],), rater=rater, spans=tuple(marks), **more)
            )


def _shown(item: Item, prompt: str, tag: str) -> str | None:
    """Returns the name of the answer that a tag shows; None where that is not known."""
    if tag in item.about or tag in item.answers:
        return item.about.get(tag, tag)
    return next(iter(item.answers)) if len(item.answers) == 1 and tag != prompt else None


def _known(item: Item, tag: str, answer: str | None) -> str:
    require(
        answer is not None,
        f"which of {', '.join(item.answers)} is it about? The tag {tag!r} names none: give about={{{tag!r}: ANSWER}}",
    )
    return answer or ""


def _pairwise(item: Item, value: Any, sides: tuple[str, ...], rater: Rater, more: Mapping[str, Any]) -> Ranking:
    """Returns the comparison of the answers at the left and at the right."""
    selected = field(value, "selected")
    require(selected in ("left", "right", "tie"), f"selected is {selected!r}; it is left, right or tie")
    require(sides[0] != sides[1], f"left and right are both {sides[0]}")
    places = {"left": (1, 2), "right": (2, 1), "tie": (1, 1)}[selected]
    ranks = tuple(dict(zip(sides, places)).get(name) for name in item.answers)
    status: Any = "tie" if selected == "tie" else "ok"
    return Ranking(prompt=item.prompt, answers=item.all, rater=rater, ranks=ranks, status=status, **more)


def _span(value: Any, answer: str, name: str) -> Span:
    """Returns a marked span.

    label-studio counts UTF-16 units; the `text` of the span shows whether another tool counted characters.
    """
    start, end = field(value, "start", int), field(value, "end", int)
    units = answer.encode("utf-16-le", "surrogatepass")
    require(0 <= start < end and 2 * end <= len(units), f"span {start} .. {end} does not lie in {name}")
    ends = [len(units[: 2 * place].decode("utf-16-le", "surrogatepass")) for place in (start, end)]
    quoted = value.get("text")
    places = [(ends[0], ends[1]), (start, end)]
    if isinstance(quoted, str) and quoted.strip():
        places = [place for place in places if answer[slice(*place)].split() == quoted.split()]
        require(bool(places), f"span {start} .. {end} of {name} is not its text {quoted[:40]!r}")
    return Span(*places[0], category="/".join(value.get("labels") or []))


def _value(kind: str, value: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Returns a result's value in the shape that `judgement_of` takes."""
    if kind == "choices":
        choices = field(value, "choices", list)
        require(bool(choices), "choices is empty")
        if len(choices) == 1:
            return choices[0]
        if set(choices) <= set(names):
            return [{"value": name, "rank": 1 if name in choices else 2} for name in names]
        return ", ".join(choices)
    if kind == "rating":
        return field(value, "rating", float)
    if kind == "textarea":
        return "\n".join(field(value, "text", list))
    raise UserError(f"a result of type {kind!r}; read are labels, pairwise, choices, rating, textarea")


def write_label_studio(judgements: Iterable[Judgement], path: Path) -> int:
    """Writes each judgement that has a value as a task of label-studio; returns the number of tasks.

    People's judgements become annotations, the others predictions. The fields and tags are `prompt` and `answer`, for
    rankings `answer_1`, `answer_2`; the tool has no ranking of more than two.

    Args:
        judgements: judgements of any form.
        path: the file, a JSON array; it is replaced.

    Raises:
        UserError: the file cannot be written.
    """
    count = 0
    with atomic_write(path) as file:
        for number, judgement in enumerate(judgements, 1):
            if (task := _task(number, judgement)) is not None:
                file.write(f"{',' if count else '['}\n{json.dumps(task)}")
                count += 1
        file.write("\n]\n" if count else "[]\n")
    return count


def _task(number: int, judgement: Judgement) -> dict[str, Any] | None:
    """Returns a judgement as a task; None for one that label-studio cannot hold."""
    several = isinstance(judgement, Ranking)
    names = [f"answer_{i + 1}" for i in range(len(judgement.answers))] if several else ["answer"]
    values: list[tuple[str, dict[str, Any]]] = []
    question = judgement.principle
    if isinstance(judgement, Rating):
        values = [("rating", {"rating": judgement.value})]
    elif isinstance(judgement, Comment):
        values = [("textarea", {"text": [judgement.text]})]
    elif isinstance(judgement, Ranking) and len(names) == 2:
        probability = next(judgement.pairs())[2] if judgement.answered else 0.5
        values = [("pairwise", {"selected": "tie" if probability == 0.5 else "left" if probability > 0.5 else "right"})]
    elif isinstance(judgement, Correction) and judgement.edited is not None:
        values, question = [("textarea", {"text": [judgement.edited]})], f"{question} correction".strip()
    elif isinstance(judgement, Correction):
        values = [("labels", _marked(judgement.answers[0], span)) for span in judgement.spans]
    if not values or not judgement.answered:
        return None
    results = [
        {"id": f"r{i}", "type": kind, "from_name": question or kind, "to_name": ",".join(names), "value": value}
        for i, (kind, value) in enumerate(values)
    ]
    task: dict[str, Any] = {"id": number, "data": {"prompt": judgement.prompt, **dict(zip(names, judgement.answers))}}
    if judgement.rater.source != "person":
        scored = {"model_version": judgement.rater.name, "score": judgement.confidence, "result": results}
        return task | {"annotations": [], "predictions": [scored]}
    time = judgement.time and datetime.datetime.fromtimestamp(judgement.time, datetime.UTC).isoformat()
    by = {"completed_by": {"email": judgement.rater.name}, "created_at": time, "lead_time": judgement.call.latency_s}
    return task | {"annotations": [by | {"result": results}], "predictions": []}


def _marked(answer: str, span: Span) -> dict[str, Any]:
    """Returns a span in label-studio's UTF-16 units."""
    places = [len(answer[:place].encode("utf-16-le", "surrogatepass")) // 2 for place in (span.start, span.end)]
    return {"start": places[0], "end": places[1], "text": answer[span.start : span.end], "labels": [span.category]}
