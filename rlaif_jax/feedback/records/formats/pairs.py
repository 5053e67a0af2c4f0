"""Preference data sets: Anthropic HH, distilabel, oasst trees, critique and revision requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rlaif_jax.config import require
from rlaif_jax.feedback.records.formats.rows import (
    ASSISTANT,
    Collector,
    ReadResult,
    conversation_prompt,
    field,
    json_rows,
    pair,
    parse_rows,
    write_jsonl,
)
from rlaif_jax.feedback.records.forms import Comment, Judgement, Ranking, Rater, Rating

CROWD = Rater("crowd", "person")
DISTILABEL = Rater("distilabel", "ai")


# ---- HH (Bai et al. 2022): {"chosen": dialogue, "rejected": dialogue}


def read_hh(path: Path, rater: Rater = CROWD) -> ReadResult:
    """Reads Anthropic's HH pairs.

    The prompt is the shared beginning, up to the last place where the assistant speaks. An answer is the remaining text:
    several turns where the two dialogues part early, "" where one of them ends there.

    Args:
        path: the JSON file, or a .gz of it; a row has the dialogues `chosen` and `rejected`.
        rater: who made all comparisons; the file does not say it.

    Returns:
        (rankings of two answers, a message for each bad row).

    Raises:
        UserError: the file cannot be read.
    """
    return parse_rows(path, lambda row: [_hh(row, rater)])


def _hh(row: Any, rater: Rater) -> Ranking:
    better, worse = field(row, "chosen"), field(row, "rejected")
    require(better != worse, "chosen and rejected are the same text")
    shared = next((i for i, (a, b) in enumerate(zip(better, worse)) if a != b), min(len(better), len(worse)))
    start = better.rfind(ASSISTANT, 0, shared)
    require(start >= 0, f"chosen and rejected share no beginning that ends in {ASSISTANT!r}")
    end = start + len(ASSISTANT)
    return pair(better[:end], (better[end:], worse[end:]), 0, rater)


def write_hh(judgements: Iterable[Judgement], path: Path) -> int:
    """Writes every comparison of the rankings except ties as an HH pair; returns the number of rows.

    Args:
        judgements: judgements of any form; only rankings are written.
        path: the file, JSON lines; it is replaced.

    Raises:
        UserError: the file cannot be written.
    """
    return write_jsonl(
        ({"chosen": j.prompt + j.answers[better], "rejected": j.prompt + j.answers[worse]}
         for j, better, worse in _strict_pairs(judgements)),
        path,
    )  # fmt: skip


def _strict_pairs(judgements: Iterable[Judgement]) -> Iterator[tuple[Ranking, int, int]]:
    """Yields (ranking, index of the better answer, index of the worse) of comparisons without ties."""
    for judgement in judgements:
        if isinstance(judgement, Ranking) and judgement.answered:
            for first, second, p in judgement.pairs():
                if p != 0.5:
                    yield judgement, *((first, second) if p > 0.5 else (second, first))


# ---- distilabel


def read_distilabel(path: Path, rater: Rater = DISTILABEL, *, low: float = 1, high: float = 5) -> ReadResult:
    """Reads distilabel's rows, of either kind.

    `prompt, chosen, rejected` (texts, or lists of messages), optionally with `chosen_rating, rejected_rating` and the names
    of the models, become a comparison (a tie where the ratings are equal) and two ratings. `instruction, generations,
    ratings`, optionally with `rationales` and `generation_models`, become a rating and a comment for each generation.

    Args:
        path: the file.
        rater: the judge.
        low: the lowest rating.
        high: the highest rating.

    Returns:
        (judgements, a message for each bad row).

    Raises:
        UserError: the file cannot be read.
    """
    found = Collector()
    for where, row in json_rows(path, found.bad):
        with found.at(where):
            if isinstance(row, dict) and "generations" in row:
                _generations(found, where, row, rater, low, high)
            else:
                found.good.extend(_chosen(row, rater, low, high))
    return found.result


def _chosen(row: Any, rater: Rater, low: float, high: float) -> list[Judgement]:
    sides = [_messages(field(row, name, (list, str))) for name in ("chosen", "rejected")]
    prompt = row.get("prompt") or row.get("instruction") or sides[0][0]
    require(
        isinstance(prompt, str) and bool(prompt), "no prompt: there is no field prompt, and chosen is no conversation"
    )
    answers = (sides[0][1], sides[1][1])
    require(answers[0] != answers[1], "chosen and rejected are the same text")
    models = [row.get("chosen_model"), row.get("rejected_model")]
    written = tuple(models) if all(isinstance(model, str) for model in models) else ()
    ratings = [row.get("chosen_rating"), row.get("rejected_rating")]
    tie = ratings[0] is not None and ratings[0] == ratings[1]
    made: list[Judgement] = [pair(prompt, answers, None if tie else 0, rater, generators=written)]
    for i, name in enumerate(("chosen_rating", "rejected_rating")):
        if ratings[i] is not None:
            value = field(row, name, float)
            made.append(
                Rating(prompt=prompt, answers=(answers[i],), rater=rater, value=value, low=low, high=high,
                       generators=written[i : i + 1])
            )  # fmt: skip
    return made


def _messages(side: Any) -> tuple[str, str]:
    """Returns (the text before the last message, the last message)."""
    if isinstance(side, str):
        return "", side
    require(bool(side), "a conversation without messages")
    texts = [field(message, "content") for message in side]
    if len(side) == 2:
        return texts[0], texts[1]
    return conversation_prompt(
        (message.get("role") == "assistant", text) for message, text in zip(side[:-1], texts)
    ), texts[-1]


def _generations(found: Collector, where: str, row: Any, rater: Rater, low: float, high: float) -> None:
    prompt, answers = field(row, "instruction"), field(row, "generations", list)
    ratings, reasons = field(row, "ratings", list), row.get("rationales") or [None] * len(answers)
    models = row.get("generation_models") or [None] * len(answers)
    require(len(answers) == len(ratings) == len(reasons) == len(models), "generations and ratings differ in number")
    for answer, value, reason, model in zip(answers, ratings, reasons, models):
        if answer is None:
            continue
        shared: dict[str, Any] = {"prompt": prompt, "answers": (answer,), "rater": rater, "raw": reason or ""}
        shared["generators"] = (model,) if model else ()
        with found.at(where):
            if value is None:
                found.good.append(Rating(**shared, status="unparsed", low=low, high=high))
            else:
                found.good.append(Rating(**shared, value=float(value), low=low, high=high))
        if reason and reason.strip():
            with found.at(where):
                found.good.append(Comment(**shared, text=reason))


def write_distilabel(judgements: Iterable[Judgement], path: Path) -> int:
    """Writes every comparison of the rankings except ties with messages, as distilabel's formatters do.

    Args:
        judgements: judgements of any form; only rankings are written.
        path: the file, JSON lines; it is replaced.

    Returns:
        The number of rows.

    Raises:
        UserError: the file cannot be written.
    """

    def messages(prompt: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]

    return write_jsonl(
        (
            {
                "prompt": j.prompt,
                "chosen": messages(j.prompt, j.answers[better]),
                "rejected": messages(j.prompt, j.answers[worse]),
                "chosen_model": j.generators[better] if j.generators else None,
                "rejected_model": j.generators[worse] if j.generators else None,
                "chosen_rating": None,
                "rejected_rating": None,
            }
            for j, better, worse in _strict_pairs(judgements)
        ),
        path,
    )


# ---- oasst (Köpf et al. 2023)


def read_oasst(path: Path, rater: Rater = CROWD) -> ReadResult:
    """Reads OpenAssistant's conversation trees: a ranking wherever two or more replies have ranks.

    The prompt is the conversation so far; where the replies are a person's next turn, it ends where the person speaks.

    Args:
        path: the JSON file, or a .gz of it; a row is a tree.
        rater: who made all rankings; the file does not say it.

    Returns:
        (rankings, a message for each bad row).

    Raises:
        UserError: the file cannot be read.
    """
    found = Collector()
    for where, row in json_rows(path, found.bad):
        with found.at(where):
            stack: list[tuple[Any, tuple[tuple[bool, str], ...]]] = [(field(row, "prompt", dict), ())]
            while stack:
                node, before = stack.pop()
                turns = (*before, (field(node, "role") == "assistant", field(node, "text")))
                replies = node.get("replies") or []
                stack.extend((reply, turns) for reply in reversed(replies))
                ranked = [reply for reply in replies if reply.get("rank") is not None]
                if len(ranked) >= 2:
                    with found.at(where):
                        found.good.append(_replies(turns, replies, rater))
    return found.result


def _replies(turns: tuple[tuple[bool, str], ...], replies: list[Any], rater: Rater) -> Ranking:
    prompt = conversation_prompt(turns)
    if replies[0].get("role") != "assistant":
        prompt = prompt.removesuffix(ASSISTANT) + "\n\nHuman:"
    ranks = tuple(None if reply.get("rank") is None else field(reply, "rank", int) + 1 for reply in replies)
    answers = tuple(field(reply, "text") for reply in replies)
    return Ranking(prompt=prompt, answers=answers, rater=rater, ranks=ranks)


# ---- The Anthropic critique and revision requests


class CritiqueRequest(NamedTuple):
    """The wording by which a principle asks for a critique (`prompt`) and a revision (`edit_request`)."""

    name: str
    prompt: str
    edit_request: str


def read_critique_requests(path: Path) -> tuple[list[CritiqueRequest], list[str]]:
    """Reads the critique and revision requests published with Constitutional AI (Bai 2022).

    They are principles, not judgements.

    The file holds {"name": {"prompt": ..., "edit_request": ...}, ...}, or rows with these two fields.

    Returns:
        (requests, a message for each bad row).

    Args:
        path: the JSON file, or a .gz of it.

    Raises:
        UserError: the file cannot be read.
    """
    found = Collector()
    requests: list[CritiqueRequest] = []
    for where, row in json_rows(path, found.bad):
        with found.at(where):
            require(isinstance(row, dict), "expected an object with prompt and edit_request, or one of such objects")
            named = {row.get("name", f"{len(requests)}"): row} if "edit_request" in row else row
            for name, entry in named.items():
                with found.at(f"{where}, {name}"):
                    requests.append(CritiqueRequest(str(name), field(entry, "prompt"), field(entry, "edit_request")))
    return requests, found.bad
