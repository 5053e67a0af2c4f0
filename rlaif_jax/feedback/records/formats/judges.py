"""Verdicts of judges on the same answers: alpaca_eval, FastChat, PandaLM, LLMBar, prometheus."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlaif_jax.config import require
from rlaif_jax.feedback.records.formats.rows import (
    Collector,
    ReadResult,
    amount,
    field,
    json_rows,
    pair,
    parse_rows,
    unscored_pair,
    write_jsonl,
)
from rlaif_jax.feedback.records.forms import Call, Comment, Judgement, Ranking, Rater, Rating

PEOPLE = Rater("people", "person")


# ---- alpaca_eval


def read_alpaca_eval(path: Path, annotator: str = "alpaca_eval") -> ReadResult:
    """Reads alpaca_eval's annotations.

    `preference` runs from 1 (output_1 is better) to 2; 1.5 and the older 0 are ties; null and NaN mean that the verdict
    could not be read.

    Args:
        path: the JSON file, or a .gz of it.
        annotator: the judge's name where the file has none.

    Returns:
        (rankings, a message for each bad row).

    Raises:
        UserError: the file cannot be read.
    """
    return parse_rows(path, lambda row: [_alpaca(row, annotator)])


def _alpaca(row: Any, annotator: str) -> Ranking:
    extra = row.get("input") if isinstance(row, dict) else None
    prompt = field(row, "instruction") + (f"\n\n{extra}" if extra else "")
    rater = Rater(str(row.get("annotator") or annotator), "ai")
    more: dict[str, Any] = {
        "generators": _both(row.get("generator_1"), row.get("generator_2")),
        "raw": row.get("raw_completion") if isinstance(row.get("raw_completion"), str) else "",
        "call": Call(latency_s=amount(row.get("time_per_example")), cost=amount(row.get("price_per_example")) or 0.0),
    }
    answers = (field(row, "output_1"), field(row, "output_2"))
    if field(row, "preference", (float, type(None))) is None or math.isnan(row["preference"]):
        return unscored_pair(prompt, answers, rater, **more)
    preference = field(row, "preference", float) or 1.5
    require(1 <= preference <= 2, f"preference is {preference}; it runs from 1 to 2")
    winner = None if preference == 1.5 else int(preference > 1.5)
    return pair(prompt, answers, winner, rater, probability=2 - preference, **more)


def _both(first: Any, second: Any) -> tuple[str, ...]:
    return (first, second) if isinstance(first, str) and isinstance(second, str) else ()


def write_alpaca_eval(judgements: Iterable[Judgement], path: Path) -> int:
    """Writes comparisons of two answers as alpaca_eval's annotations; missing verdicts are null.

    Args:
        judgements: judgements of any form; only comparisons of two answers are written.
        path: the file, JSON lines; it is replaced.

    Returns:
        The number of rows.

    Raises:
        UserError: the file cannot be written.
    """
    return write_jsonl(
        (
            {
                "instruction": j.prompt,
                "output_1": j.answers[0],
                "output_2": j.answers[1],
                "generator_1": j.generators[0] if j.generators else None,
                "generator_2": j.generators[1] if j.generators else None,
                "annotator": j.rater.name,
                "preference": 2 - next(j.pairs())[2] if j.answered else None,
                "raw_completion": j.raw,
                "price_per_example": j.call.cost,
                "time_per_example": j.call.latency_s,
            }
            for j in judgements
            if isinstance(j, Ranking) and len(j.answers) == 2 and j.status != "retracted"
        ),
        path,
    )


# ---- FastChat (Zheng et al. 2023): MT-bench


def read_fastchat(path: Path, questions: Path | None = None, answers: Sequence[Path] = ()) -> ReadResult:
    """Reads FastChat's `model_judgment` files.

    They hold pairs in two games (`g1_winner, g2_winner`, the second with the answers swapped), single scores 1 .. 10
    (`score`, -1 = not read) and people's votes (`model_a, model_b, winner`). In the second turn, an answer is the whole
    conversation.

    Args:
        path: the judgements, which name questions and models.
        questions: question.jsonl with the texts of the questions; without it a prompt is the question's number.
        answers: model_answer/*.jsonl with the texts of the answers; without them an answer is the model's name.

    Returns:
        (judgements, a message for each bad row).

    Raises:
        UserError: a file cannot be read.
    """
    found = Collector()
    question_turns: dict[Any, list[str]] = {}
    answer_turns: dict[tuple[str, Any], list[str]] = {}
    if questions is not None:
        for where, row in json_rows(questions, found.bad):
            with found.at(where):
                question_turns[field(row, "question_id", (int, str))] = field(row, "turns", list)
    for file in answers:
        for where, row in json_rows(file, found.bad):
            with found.at(where):
                turns = field(field(row, "choices", list)[0], "turns", list)
                answer_turns[field(row, "model_id"), field(row, "question_id", (int, str))] = turns

    def text(row: Any, model: str) -> str:
        key, turn = (model, row["question_id"]), row.get("turn", 1)
        if not answers:
            return model
        require(key in answer_turns, f"the files of answers have none of {model} to question {key[1]}")
        turns, asked = answer_turns[key], question_turns.get(row["question_id"], [])
        require(turn in (1, 2) and turn <= len(turns), f"turn {turn} of {len(turns)}, by {model}")
        if turn == 1:
            return turns[0]
        return f"{turns[0]}\n\nHuman: {asked[1]}\n\nAssistant: {turns[1]}" if len(asked) > 1 else turns[1]

    def prompt(row: Any) -> str:
        number = field(row, "question_id", (int, str))
        require(questions is None or number in question_turns, f"the file of questions has no question {number}")
        return question_turns[number][0] if questions is not None else f"question {number}, turn {row.get('turn', 1)}"

    for where, row in found.rows(json_rows(path, found.bad)):
        with found.at(where):
            found.good.extend(_fastchat(row, prompt(row), partial(text, row)))
    return found.result


def _fastchat(row: Any, prompt: str, text: Callable[[str], str]) -> Iterator[Judgement]:
    judge = row.get("judge")
    name = "/".join(judge) if isinstance(judge, list) else str(judge or "judge")
    more: dict[str, Any] = {"time": amount(row.get("tstamp")), "principle": f"turn {row.get('turn', 1)}"}
    if "score" in row:
        model, score = field(row, "model"), field(row, "score", float)
        shared: dict[str, Any] = {
            "prompt": prompt,
            "answers": (text(model),),
            "rater": Rater(name, "ai"),
            "generators": (model,),
            **more,
        }
        shared["raw"] = row.get("judgment") or ""
        yield Rating(**shared, status="unparsed") if score == -1 else Rating(**shared, value=score)
    elif "g1_winner" in row:
        models = (field(row, "model_1"), field(row, "model_2"))
        for game, shown in (("g1", (0, 1)), ("g2", (1, 0))):
            winner = field(row, f"{game}_winner")
            require(winner in ("model_1", "model_2", "tie", "error"), f"{game}_winner is {winner!r}")
            raw = row.get(f"{game}_judgment") or ""
            yield _vote(
                winner, ("model_1", "model_2"), prompt, models, text, Rater(name, "ai"), raw=raw, shown=shown, **more
            )
    else:
        winner, models = field(row, "winner"), (field(row, "model_a"), field(row, "model_b"))
        require(winner in ("model_a", "model_b") or winner.startswith("tie"), f"winner is {winner!r}")
        both = "both" in winner
        yield _vote(winner, ("model_a", "model_b"), prompt, models, text, Rater(name, "person"), both_bad=both, **more)


def _vote(
    winner: str, names: tuple[str, str], prompt: str, models: tuple[str, str], text: Callable[[str], str], rater: Rater,
    **more: Any,
) -> Ranking:  # fmt: skip
    answers = [text(model) for model in models]
    if winner == "error":
        return unscored_pair(prompt, answers, rater, generators=models, **more)
    return pair(prompt, answers, names.index(winner) if winner in names else None, rater, generators=models, **more)


# ---- PandaLM (Wang et al. 2023)


def read_pandalm(path: Path, judges: Sequence[Path] = ()) -> ReadResult:
    """Reads PandaLM's test set: three annotators' verdicts 0 (tie), 1 or 2 on each pair.

    Args:
        path: the test set.
        judges: files of AI judges on the same pairs, with `NAME_result` and `NAME_reason` by `idx`; a result that is no
            verdict ("garbage") becomes an unparsed record.

    Returns:
        (judgements, a message for each bad row).

    Raises:
        UserError: a file cannot be read.
    """
    found = Collector()
    pairs: dict[Any, tuple[str, tuple[str, str], tuple[str, ...]]] = {}
    for where, row in found.rows(json_rows(path, found.bad)):
        with found.at(where):
            given = field(row, "input")
            prompt = field(row, "instruction") + (f"\n\n{given}" if given else "")
            writers = row.get("cmp_key", "").split("_")
            answers = (_response(row, "response1"), _response(row, "response2"))
            item = (prompt, answers, tuple(writers) if len(writers) == 2 else ())
            pairs[field(row, "idx", int)] = item
            for number in (1, 2, 3):
                with found.at(where):
                    found.good.append(_annotator(row, item, number))
    for file in judges:
        for where, row in json_rows(file, found.bad):
            with found.at(where):
                index = field(row, "idx", int)
                require(index in pairs, f"idx {index} is no pair of {path}")
                found.good.append(_pandalm_judge(row, *pairs[index]))
    return found.result


def _response(row: Any, name: str) -> str:
    return str(field(row, name, (str, bool, int, float)))  # the answer "True" is true in the published file


def _annotator(row: Any, item: tuple[str, tuple[str, str], tuple[str, ...]], number: int) -> Ranking:
    prompt, answers, writers = item
    vote = field(row, f"annotator{number}", int)
    require(vote in (0, 1, 2), f"annotator{number} is {vote}; 0 is a tie, 1 and 2 are the responses")
    rater = Rater(f"annotator{number}", "person")
    return pair(prompt, answers, (None, 0, 1)[vote], rater, generators=writers)


def _pandalm_judge(row: Any, prompt: str, answers: tuple[str, str], writers: tuple[str, ...]) -> Ranking:
    keys = [key for key in row if key.endswith("_result")] or ["result"]
    require(len(keys) == 1, f"verdicts of several judges: {', '.join(keys)}")
    key = keys[0]
    name = key.removesuffix("_result")
    verdict = str(field(row, key, (str, int))).strip().lower()
    more: dict[str, Any] = {"raw": str(row.get(f"{name}_reason") or verdict), "generators": writers}
    if verdict not in ("0", "1", "2", "tie"):
        return unscored_pair(prompt, answers, Rater(name, "ai"), **more)
    return pair(prompt, answers, {"1": 0, "2": 1}.get(verdict), Rater(name, "ai"), **more)


# ---- LLMBar (Zeng et al. 2023)


def read_llmbar(path: Path) -> ReadResult:
    """Reads LLMBar's pairs with the authors' label of the output that follows the instruction.

    Args:
        path: the JSON file, or a .gz of it.

    Returns:
        (judgements, a message for each bad row).

    Raises:
        UserError: the file cannot be read.
    """
    return parse_rows(path, lambda row: [_llmbar(row)])


def _llmbar(row: Any) -> Ranking:
    label = field(row, "label", int)
    require(label in (1, 2), f"label is {label}; it is 1 or 2")
    answers = (field(row, "output_1"), field(row, "output_2"))
    return pair(field(row, "input"), answers, label - 1, Rater("gold", "person"))


def read_llmbar_judge(path: Path, judge: str, verdict: Callable[[str], int | None] | None = None) -> ReadResult:
    """Reads a judge's outputs on LLMBar's pairs.

    Each pair becomes two comparisons, `shown` (0, 1) and (1, 0), with the judge's text in `raw`; in files with scores, two
    ratings 0 .. 10.

    Args:
        path: the judge's file.
        judge: the judge's name.
        verdict: parses the judge's text: 0 or 1 for the output shown first or second, None for neither; by default the
            file's parsed `winner` is used.

    Returns:
        (judgements, a message for each bad row).

    Raises:
        UserError: the file cannot be read.
    """
    found = Collector()
    rater = Rater(judge, "ai", model=judge)
    for where, row in found.rows(json_rows(path, found.bad)):
        with found.at(where):
            prompt, answers = field(row, "input"), (field(row, "output_1"), field(row, "output_2"))
            if not field(row, "results", list):
                found.unused["row without a result"] += 1
            for result in row["results"]:
                for number, answer in enumerate(answers, 1):
                    if f"score_{number}" in result:
                        with found.at(where):
                            found.good.append(_score(prompt, answer, field(result, f"score_{number}", list)[0], rater))
                for swapped, shown in ((False, (0, 1)), (True, (1, 0))):
                    order = result.get(f"swap = {swapped}", {})
                    if "completion" in order:
                        with found.at(where):
                            found.good.append(_order(prompt, answers, order, shown, rater, verdict))
                    elif "score_1" not in result:
                        found.unused["order without a completion"] += 1
    return found.result


def _score(prompt: str, answer: str, raw: str, rater: Rater) -> Rating:
    numbers = re.findall(r"\d+(?:\.\d+)?", re.sub(r"\s*(/|out of)\s*10\b", "", raw))
    shared: dict[str, Any] = {"prompt": prompt, "answers": (answer,), "rater": rater, "raw": raw, "low": 0, "high": 10}
    return Rating(**shared, value=float(numbers[0])) if len(numbers) == 1 else Rating(**shared, status="unparsed")


def _order(
    prompt: str, answers: tuple[str, str], order: Any, shown: tuple[int, int], rater: Rater,
    verdict: Callable[[str], int | None] | None,
) -> Ranking:  # fmt: skip
    raw = field(order, "completion", list)[0]
    if verdict is not None:
        place = verdict(raw)
        winner = None if place is None else shown[place]
    else:
        winner = {"1": 0, "2": 1}.get(str(order.get("winner")))
    if winner is None:
        return unscored_pair(prompt, answers, rater, raw=raw, shown=shown)
    return pair(prompt, answers, winner, rater, raw=raw, shown=shown)


# ---- prometheus (Kim et al. 2024)

_SECTION = re.compile(r"^###([^\n:]*):[ \t]*\n?", re.MULTILINE)


def read_prometheus(path: Path, rater: Rater = Rater("gpt-4", "ai", model="gpt-4")) -> ReadResult:
    """Reads prometheus-eval's rubric gradings.

    Each try of the judge (`gpt4_score`, `gpt4_feedback`) becomes a rating 1 .. 5 and a comment, with the rubric's question
    as principle and the number of the try as `seed`. The prompt and the answer are cut from the text that the judge read.

    Args:
        path: the JSON file, or a .gz of it.
        rater: the judge of all gradings.

    Returns:
        (ratings and comments, a message for each bad row).

    Raises:
        UserError: the file cannot be read.
    """
    found = Collector()
    for where, row in found.rows(json_rows(path, found.bad)):
        with found.at(where):
            pieces = _SECTION.split(field(row, "instruction"))
            sections = {name.strip().split(" (")[0]: text.strip("\n") for name, text in zip(pieces[1::2], pieces[2::2])}
            rubric = field(sections, "Score Rubrics").split("\n")[0].strip("[]")
            shared: dict[str, Any] = {
                "prompt": field(sections, "The instruction to evaluate"),
                "answers": (field(sections, "Response to evaluate"),),
                "rater": rater,
                "principle": rubric,
            }
            scores, remarks = field(row, "gpt4_score", list), field(row, "gpt4_feedback", list)
            require(len(scores) == len(remarks), f"{len(scores)} scores but {len(remarks)} pieces of feedback")
            if not scores:
                found.unused["row without a score"] += 1
            for seed, (score, remark) in enumerate(zip(scores, remarks)):
                with found.at(where):
                    found.good.extend(_graded(shared, seed, score, remark))
    return found.result


def _graded(shared: dict[str, Any], seed: int, score: Any, remark: str) -> list[Judgement]:
    if score is None:
        return [Rating(**shared, seed=seed, raw=remark, status="unparsed", high=5)]
    made: list[Judgement] = [Rating(**shared, seed=seed, raw=remark, value=float(score), high=5)]
    return [*made, Comment(**shared, seed=seed, text=remark)] if remark.strip() else made


def read_autoj_pairs(path: Path) -> ReadResult:
    """Reads Auto-J's pairs from prometheus-eval, with people's labels.

    The label is 0 where response 1 is better, 1 where response 2 is better, 2 for a tie.

    Args:
        path: the JSON file, or a .gz of it.

    Returns:
        (judgements, a message for each bad row).

    Raises:
        UserError: the file cannot be read.
    """
    return parse_rows(path, lambda row: [_autoj(row)])


def _autoj(row: Any) -> Ranking:
    label = field(row, "label", int)
    require(label in (0, 1, 2), f"label is {label}; 0 and 1 are the responses, 2 is a tie")
    answers = (field(row, "response 1"), field(row, "response 2"))
    return pair(field(row, "prompt"), answers, None if label == 2 else label, PEOPLE)
