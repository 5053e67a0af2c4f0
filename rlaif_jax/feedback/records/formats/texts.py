"""Texts with marks, edits and remarks: FineGrained RLHF, SQuALITY, MLQE-PE, XSum, ILF."""

from __future__ import annotations

import itertools
import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.records.formats.rows import (
    Collector,
    ReadResult,
    damaged,
    field,
    json_rows,
    locate,
    pair,
    table_rows,
)
from rlaif_jax.feedback.records.forms import Comment, Correction, Judgement, Ranking, Rater, Rating, Span

WORKER = Rater("worker", "person")
RULE = Rater("hter", "rule")


# ---- FineGrained RLHF (Wu et al. 2023)

_PAIRS = tuple(itertools.combinations(range(4), 2))


def read_fine_grained(path: Path, rater: Rater = WORKER) -> ReadResult:
    """Reads FineGrained RLHF's QA feedback.

    Each row becomes a correction of the first prediction with its typed errors as spans, comments on missing or
    wrong content, and the six comparisons of the four predictions (0 = tie). The prompt is the question with the
    passages that the writer saw.

    Args:
        path: the published JSON file.
        rater: who the records are by.

    Returns:
        (judgements, a message for each bad row).

    Raises:
        UserError: the file cannot be read.
    """
    found = Collector()
    for where, row in found.rows(json_rows(path, found.bad)):
        with found.at(where):
            passages = ["\n".join(passage) for passage in field(row, "passages", list)]
            prompt = "\n\n".join([field(row, "question"), *passages])
            answers = [field(row, f"prediction {i + 1}") for i in range(4)]
            feedback = field(row, "feedback", dict)
            with found.at(where):
                found.good.extend(_fine_spans(prompt, answers[0], feedback, rater))
            votes = field(row, "preference", list)
            require(
                len(votes) == len(_PAIRS), f"preference has {len(votes)} entries, one for each of {len(_PAIRS)} pairs"
            )
            for (i, j), vote in zip(_PAIRS, votes):
                with found.at(where):
                    require(vote in (0, 1, 2), f"preference holds {vote!r}; 0 is a tie, 1 and 2 are the predictions")
                    found.good.append(pair(prompt, (answers[i], answers[j]), (None, 0, 1)[vote], rater))
    return found.result


def _fine_spans(prompt: str, answer: str, feedback: Any, rater: Rater) -> list[Judgement]:
    errors = field(feedback, "errors", list)
    shared: dict[str, Any] = {"prompt": prompt, "answers": (answer,), "rater": rater}
    spans = tuple(Span(field(e, "start", int), field(e, "end", int), category=field(e, "error type")) for e in errors)
    records: list[Judgement] = [Correction(**shared, edited=field(feedback, "corrected-prediction"), spans=spans)]
    for error, span in zip(errors, spans):
        if error.get("explanation", "").strip():
            quote = answer[span.start : span.end]
            records.append(Comment(**shared, text=error["explanation"], aspects=(span.category,), quote=quote))
    missing = [field(entry, "error type") for entry in feedback.get("missing-info") or []]
    if missing:
        records.append(Comment(**shared, text=", ".join(missing), aspects=tuple(dict.fromkeys(missing))))
    return records


# ---- SQuALITY (Wang et al. 2022)

_PROPERTIES = ("correctness", "selection", "overall")


def read_squality(path: Path, stories: Path | None = None) -> ReadResult:
    """Reads SQuALITY's human evaluation.

    Each worker rates (0 .. 100) and ranks the three answers to a question by correctness, selection (coverage) and overall,
    which become the principles of ratings and rankings. A worker's highlights of one answer become one correction with
    spans; a highlight with a remark also becomes a comment with a quote.

    Args:
        path: the evaluation, which has no questions.
        stories: the v1-3 JSONL file with the questions; a question that it lacks is replaced by its number.

    Returns:
        (judgements, a message for each bad row).

    Raises:
        UserError: a file cannot be read.
    """
    found = Collector()
    question_texts: dict[tuple[str, str], str] = {}
    for where, row in json_rows(stories, found.bad) if stories is not None else ():
        with found.at(where):
            for number, question in enumerate(field(row, "questions", list)):
                question_texts[row["metadata"]["passage_id"], str(number)] = field(question, "question_text")
    for where, row in found.rows(json_rows(path, found.bad)):
        with found.at(where):
            story = field(row, "passage-id")
            for number, systems in field(row, "questions", dict).items():
                with found.at(f"{where}, question {number}"):
                    prompt = f"Story {story}: {question_texts.get((story, number), f'question {number}')}"
                    _squality(found, f"{where}, question {number}", prompt, systems)
    return found.result


def _squality(found: Collector, where: str, prompt: str, systems: Mapping[str, Any]) -> None:
    answers = {system: field(entry, "response") for system, entry in systems.items()}
    reviews: dict[str, dict[str, Any]] = {}
    for system, entry in systems.items():
        for review in field(entry, "reviews", list):
            with found.at(where):
                worker = Rater(field(review, "worker_id"), "person")
                reviews.setdefault(worker.name, {})[system] = review
                shared: dict[str, Any] = {
                    "answers": (answers[system],),
                    "generators": (system,),
                    "rater": worker,
                    "prompt": prompt,
                }
                found.good.extend(
                    Rating(**shared, principle=name, value=field(review, f"{name}-rating", float), low=0, high=100)
                    for name in _PROPERTIES
                )
                _highlights(found, where, shared, field(review, "annotations", list))
    for worker_id, by_system in reviews.items():
        for name in _PROPERTIES:
            with found.at(where):
                ranks = [field(by_system[s], f"{name}-rank", int) if s in by_system else None for s in answers]
                found.good.append(
                    Ranking(prompt=prompt, answers=tuple(answers.values()), rater=Rater(worker_id, "person"), principle=name,
                            ranks=tuple(ranks), generators=tuple(answers))
                )  # fmt: skip


def _highlights(found: Collector, where: str, shared: Mapping[str, Any], marks: Sequence[Any]) -> None:
    answer = shared["answers"][0]
    spans = []
    for mark in marks:
        with found.at(where):
            start, end = locate(answer, field(mark, "selection"))
            spans.append(Span(start, end))
            if answer[start:end] in answer[end:]:
                found.unused["later place of the words of a highlight, which is put at the first"] += 1
            remark = " ".join(field(mark, "annotation", list)).strip()
            if remark:
                found.good.append(Comment(**shared, text=remark, quote=answer[start:end]))
    if spans:
        with found.at(where):
            found.good.append(Correction(**shared, spans=tuple(spans)))
    elif not marks:
        found.unused["review without a highlight"] += 1


# ---- MLQE-PE (Fomicheva et al. 2020)


def _archive(path: Path, suffixes: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Returns suffix -> (place, text) of the files with these suffixes in a folder or a .tar.gz."""
    texts: dict[str, tuple[str, str]] = {}
    try:
        if Path(path).is_dir():
            files = [(str(file), file.read_bytes()) for file in sorted(Path(path).rglob("*")) if file.is_file()]
        else:
            with tarfile.open(path) as archive:
                members = [member for member in archive.getmembers() if member.isfile()]
                files = [(f"{path}:{m.name}", archive.extractfile(m).read()) for m in members]  # type: ignore[union-attr]
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(f"cannot read {path}: {reason}") from error
    for suffix in suffixes:
        place, data = next(((name, data) for name, data in files if name.endswith(suffix)), ("", None))
        if data is None:
            raise UserError(f"{path}: no file *{suffix}")
        texts[suffix] = (place, data.removeprefix(b"\xef\xbb\xbf").decode(errors="surrogateescape"))
    return texts


def read_mlqe_post_edits(path: Path, rater: Rater = Rater("post-editor", "person")) -> ReadResult:
    """Reads MLQE-PE's post-edits from a folder or a .tar.gz.

    Each translation becomes a correction and a rule's rating 1 - HTER (HTER = edits over the words of the post-edit, 0 ..
    1). The prompt is the source sentence; texts are tokenised as in the files, with blanks between words.

    Args:
        path: the folder or the archive with the files .src, .mt, .pe and .hter.
        rater: who made all corrections.

    Returns:
        (corrections and ratings, a message for each bad line).

    Raises:
        UserError: a file is missing or cannot be read.
    """
    found = Collector()
    texts = _archive(path, (".src", ".mt", ".pe", ".hter"))
    columns = {suffix: text.replace("\r\n", "\n").split("\n") for suffix, (_, text) in texts.items()}
    lengths = {suffix: len(lines) - (lines[-1] == "") for suffix, lines in columns.items()}
    if len(set(lengths.values())) > 1:
        found.bad.append(f"{path}: the files differ in length ({lengths}); the lines that all have are read")
    for i in range(min(lengths.values())):
        source, translation, edited, hter = (columns[suffix][i] for suffix in columns)
        place = f"{texts['.hter'][0]}:{i + 1}"
        if damaged(source + translation + edited):
            found.bad.append(f"{place}: no text (the line holds bytes that are no UTF-8)")
            continue
        shared: dict[str, Any] = {"prompt": source, "answers": (translation,)}
        with found.at(place):
            found.good.append(Correction(**shared, rater=rater, edited=edited))
        with found.at(place):
            found.good.append(Rating(**shared, rater=RULE, principle="1 - HTER", value=1 - float(hter), low=0, high=1))
    return found.result


def read_mlqe_ratings(path: Path) -> ReadResult:
    """Reads MLQE-PE's direct assessments (folder or .tar.gz): scores 0 .. 100 by three or more raters.

    The file has each score with its z-score, (score - the rater's mean) / the rater's deviation, and no names. Scores that
    lie on one such line are of one rater: `SPLIT/1`, `SPLIT/2` ... by falling number of ratings.

    Args:
        path: the folder or the .tar.gz.

    Returns:
        (judgements, a message for each bad row).

    Raises:
        UserError: the file is missing, cannot be read, or lacks a column.
    """
    found = Collector()
    place, text = _archive(path, (".df.short.tsv",))[".df.short.tsv"]
    columns = ("index", "original", "translation", "scores", "mean", "z_scores", "z_mean", "model_scores")
    rows = []
    for where, row in found.rows(table_rows(Path(place), found.bad, columns, delimiter="\t", text=text)):
        with found.at(where):
            scores, zs = (json.loads(row[name]) for name in ("scores", "z_scores"))
            require(len(scores) == len(zs) and len(scores) > 0, "scores and z_scores differ in number")
            item = (row["original"], row["translation"])
            rows.append((where, item, [float(s) for s in scores], [float(z) for z in zs]))
    points = [(s, z) for *_, scores, zs in rows for s, z in zip(scores, zs)]
    names = iter(_raters_of_lines(np.array(points).reshape(-1, 2)))
    split = Path(place).name.split(".")[0]
    for where, (original, translation), scores, _ in rows:
        for score in scores:
            rater = Rater(f"{split}/{next(names)}", "person")
            with found.at(where):
                found.good.append(
                    Rating(prompt=original, answers=(translation,), rater=rater, value=score, low=0, high=100)
                )
    return found.result


def _raters_of_lines(points: np.ndarray) -> list[int]:
    """Returns the number of the rater of each (score, z-score), 1 = the rater with most scores.

    The number is 0 for a point that lies on no line with two others. Each point that is on no known line looks for the
    line through it with most points, in memory that is linear in the number of points, and in time that is linear where
    most points are on lines.
    """
    if not len(points):
        return []
    distinct, index, counts = np.unique(points, axis=0, return_inverse=True, return_counts=True)
    score, z = distinct.T
    line_of, size = np.zeros(len(distinct), int), np.zeros(len(distinct), int)
    for pivot in range(len(distinct)):
        if line_of[pivot]:
            continue
        step, rise = score - score[pivot], z - z[pivot]
        usable = np.flatnonzero(step * rise > 0)
        deviation = step[usable] / rise[usable]
        mean = score[pivot] - z[pivot] * deviation
        line = np.rint(deviation * 1e5) + 1j * np.rint(mean * 1e5)  # a pair in one number: unique is fast on those
        _, on_line, others = np.unique(line, return_inverse=True, return_counts=True)
        if not len(others) or others.max() < 2:  # at five decimals, three points on a line are no coincidence
            continue
        members = np.append(usable[on_line == others.argmax()], pivot)
        members = members[size[members] < len(members)]  # a point of two lines is on the longer one
        line_of[members], size[members] = line_of.max() + 1, others.max() + 1
    weight = np.bincount(line_of, weights=counts)
    weight[0] = 0
    order = np.argsort(-weight, kind="stable")
    rank = np.empty(len(order), int)
    rank[order] = np.arange(1, len(order) + 1)
    rank[0] = 0
    return rank[line_of][index.reshape(-1)].tolist()


# ---- XSum hallucinations (Maynez et al. 2020)


def read_xsum_spans(path: Path) -> ReadResult:
    """Reads XSum's hallucination annotations: one correction for each worker and summary.

    The correction has the marked spans, extrinsic or intrinsic; without marks, it leaves the summary unchanged. The prompt is
    the article's BBC number, because the file has no articles. The file's offsets count from 1 and, in some rows, in a text
    with other escapes: a span is placed where its words occur nearest to the offset.

    Args:
        path: the CSV file, or a .gz of it.

    Returns:
        (judgements, a message for each bad row).

    Raises:
        UserError: the file cannot be read, or lacks a column.
    """
    found = Collector()
    grouped: dict[tuple[str, str, str], dict[str, Any]] = {}
    columns = (
        "bbcid",
        "system",
        "summary",
        "hallucination_type",
        "hallucinated_span",
        "hallucinated_span_start",
        "worker_id",
    )
    for where, row in found.rows(table_rows(path, found.bad, columns)):
        with found.at(where):
            key = (row["bbcid"], row["system"], row["worker_id"])
            entry = grouped.setdefault(key, {"where": where, "summary": row["summary"], "spans": {}, "marked": False})
            kind, words, near = (row[f"hallucinat{name}"] for name in ("ion_type", "ed_span", "ed_span_start"))
            if kind != "NULL":
                entry["marked"] = True
                words = words.replace("\\n", " ")  # an escaped line end that the summary has lost
                start, end = locate(row["summary"], words, int(near) - 1)
                entry["spans"][Span(start, end, category=kind)] = None
    for (article, system, worker), entry in grouped.items():
        with found.at(entry["where"]):
            spans = tuple(entry["spans"])
            if spans or not entry["marked"]:  # else none of its marks could be read, and each is a message
                found.good.append(
                    Correction(
                        prompt=f"XSum {article}", answers=(entry["summary"],), rater=Rater(worker, "person"),
                        spans=spans, edited=None if spans else entry["summary"], generators=(system,),
                    )
                )  # fmt: skip
    return found.result


def read_xsum_factuality(path: Path) -> ReadResult:
    """Reads XSum's factuality annotations: a rating 0 or 1 of each worker; NULL is an abstention.

    Args:
        path: the CSV file, or a .gz of it.

    Returns:
        (judgements, a message for each bad row).

    Raises:
        UserError: the file cannot be read, or lacks a column.
    """
    found = Collector()
    columns = ("bbcid", "system", "summary", "is_factual", "worker_id")
    for where, row in found.rows(table_rows(path, found.bad, columns)):
        with found.at(where):
            found.good.append(_factual(row))
    return found.result


def _factual(row: Mapping[str, str]) -> Rating:
    vote = row["is_factual"]
    require(vote in ("yes", "no", "NULL"), f"is_factual is {vote!r}; it is yes, no or NULL")
    given: dict[str, Any] = {"status": "abstained"} if vote == "NULL" else {"value": float(vote == "yes")}
    return Rating(
        prompt=f"XSum {row['bbcid']}", answers=(row["summary"],), rater=Rater(row["worker_id"], "person"),
        principle="factual", low=0, high=1, generators=(row["system"],), **given,
    )  # fmt: skip


# ---- ILF (Chen et al. 2023): code


def read_ilf(path: Path) -> ReadResult:
    """Reads ILF's code refinements: a comment on a failing program, and a person's corrected program.

    The program is the text after the prompt.

    Args:
        path: the JSON file, or a .gz of it.

    Returns:
        (judgements, a message for each bad row).

    Raises:
        UserError: the file cannot be read.
    """
    found = Collector()
    for where, row in found.rows(json_rows(path, found.bad)):
        with found.at(where):
            found.good.extend(_refined(row))
            if not row["Feedback"].strip():
                found.unused["row without feedback in words"] += 1
    return found.result


def _refined(row: Any) -> Iterator[Judgement]:
    prompt, program = field(row, "prompt"), field(row, "original_model_completion")
    edited = field(row, "unedited_annotator_completion")
    require(program.startswith(prompt), "original_model_completion does not begin with the prompt")
    refined = edited.removeprefix(prompt) if edited.startswith(prompt) else field(row, "completion")
    worker = row.get("worker_id")
    rater = Rater(str(worker) if worker is not None else "unknown", "person")
    shared: dict[str, Any] = {"prompt": prompt, "answers": (program.removeprefix(prompt),), "rater": rater}
    if field(row, "Feedback").strip():
        yield Comment(**shared, text=row["Feedback"])
    yield Correction(**shared, edited=refined.replace("\r\n", "\n"))
