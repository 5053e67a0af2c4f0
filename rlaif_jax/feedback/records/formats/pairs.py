"""Preference data sets: Anthropic HH, distilabel, oasst trees, critique and revision requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rlaif_jax.config import require
from rlaif_jax.data.conversations import (
    ASSISTANT,
    HUMAN,
    Turn,
    conversation_prompt,
    prompt_text,
    prompt_turns,
    read_pair,
    read_prompt,
    read_ratings,
    role_of,
)
from rlaif_jax.feedback.records.formats.rows import (
    Collector,
    ReadResult,
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

    A prompt that is no dialogue becomes the person's turn of one.

    Args:
        judgements: judgements of any form; only rankings are written.
        path: the file, JSON lines; it is replaced.

    Raises:
        UserError: the file cannot be written.
    """
    return write_jsonl(
        ({"chosen": _dialogue(j.prompt, j.answers[better]), "rejected": _dialogue(j.prompt, j.answers[worse])}
         for j, better, worse in _strict_pairs(judgements)),
        path,
    )  # fmt: skip


def _dialogue(prompt: str, answer: str) -> str:
    """Returns a prompt and its answer as HH's text."""
    if ASSISTANT in prompt and (prompt.endswith(ASSISTANT) or prompt.startswith((ASSISTANT, HUMAN))):
        return prompt + answer
    return f"{HUMAN} {prompt}{ASSISTANT} {answer}"


def _strict_pairs(judgements: Iterable[Judgement]) -> Iterator[tuple[Ranking, int, int]]:
    """Yields (ranking, index of the better answer, index of the worse) of comparisons without ties.

    Left out are comparisons of what a person says next (`read_oasst`): the formats hold answers of the assistant.
    """
    for judgement in judgements:
        if isinstance(judgement, Ranking) and judgement.answered and not judgement.prompt.endswith(HUMAN):
            for first, second, p in judgement.pairs():
                if p != 0.5:
                    yield judgement, *((first, second) if p > 0.5 else (second, first))


# ---- distilabel


def read_distilabel(path: Path, rater: Rater = DISTILABEL, *, low: float = 1, high: float = 5) -> ReadResult:
    """Reads distilabel's rows, and those of TRL and other sets of pairs.

    `chosen, rejected` (texts, or lists of messages) become a comparison. The prompt is all that was said before the answers
    (`conversations.read_pair`): messages in `chosen` and `prompt`, or the fields `prompt`, `instruction`, `input`,
    `question` and `system`. Two ratings (`chosen_rating, rejected_rating`; see `conversations.rating_columns`) become
    ratings; equal ones make the comparison a tie, and where the chosen answer has the lower one the comparison is left out.
    `generations, ratings` (or `rating`), optionally with `rationales` and `generation_models`, become a rating and a comment
    for each generation.

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
    for where, row in found.rows(json_rows(path, found.bad)):
        several = isinstance(row, dict) and "generations" in row
        if not several or ("chosen" in row and "rejected" in row):
            with found.at(where):
                require(isinstance(row, dict), f"a row must be an object, not {str(row)[:40]!r}")
                _chosen(found, where, row, rater, low, high)
        if several:
            with found.at(where):
                _generations(found, where, row, rater, low, high)
    return found.result


def _chosen(found: Collector, where: str, row: Any, rater: Rater, low: float, high: float) -> None:
    """Adds the comparison of a row and the ratings of its two answers."""
    prompt, answers, unused = read_pair(row)
    found.unused.update(unused)
    models = [row.get("chosen_model"), row.get("rejected_model")]
    written = tuple(models) if all(isinstance(model, str) for model in models) else ()
    ratings: tuple[float | None, float | None] = (None, None)
    with found.at(where):
        ratings = read_ratings(row)
    better, worse = ratings if ratings != (None, None) or "generations" not in row else _ratings_of(row, answers)
    with found.at(where):
        tie = row.get("status") == "tie" or (better is not None and better == worse)
        require(
            better is None or worse is None or better >= worse,
            f"the chosen answer is rated {better}, below the rejected one, {worse}: the comparison is left out",
        )
        found.good.append(pair(prompt, answers, None if tie else 0, rater, generators=written))
    for i, value in enumerate(ratings):
        if value is not None:
            with found.at(where):
                found.good.append(
                    Rating(prompt=prompt, answers=(answers[i],), rater=rater, value=value, low=low, high=high,
                           generators=written[i : i + 1])
                )  # fmt: skip


def _ratings_of(row: Any, answers: tuple[str, str]) -> tuple[float | None, float | None]:
    """Returns the ratings that `generations` of these texts have; None for other texts."""
    rated = dict(zip(field(row, "generations", list), _rating_list(row)))
    values = [rated.get(answer) for answer in answers]
    return tuple(float(value) if isinstance(value, (int, float)) else None for value in values)  # type: ignore[return-value]


def _rating_list(row: Any) -> list[Any]:
    return field(row, "rating" if "rating" in row and "ratings" not in row else "ratings", list)


def _generations(found: Collector, where: str, row: Any, rater: Rater, low: float, high: float) -> None:
    asked, answers = read_prompt(row), field(row, "generations", list)
    require(bool(asked), f"no prompt: the fields are {', '.join(map(str, row))}"[:300])
    prompt = prompt_text(asked)
    ratings, reasons = _rating_list(row), row.get("rationales") or [None] * len(answers)
    models = row.get("generation_models") or [None] * len(answers)
    require(len(answers) == len(ratings) == len(reasons) == len(models), "generations and ratings differ in number")
    for answer, value, reason, model in zip(answers, ratings, reasons, models):
        if answer is None:
            found.unused["generation that is null"] += 1
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

    A prompt that is a dialogue in HH's text becomes one message for each turn.

    Args:
        judgements: judgements of any form; only rankings are written.
        path: the file, JSON lines; it is replaced.

    Returns:
        The number of rows.

    Raises:
        UserError: the file cannot be written.
    """

    def messages(prompt: str, answer: str) -> list[dict[str, str]]:
        turns = [*prompt_turns(prompt), Turn("assistant", answer)]
        return [{"role": turn.role, "content": turn.text} for turn in turns]

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
    for where, row in found.rows(json_rows(path, found.bad)):
        with found.at(where):
            stack: list[tuple[Any, tuple[Turn, ...]]] = [(field(row, "prompt", dict), ())]
            while stack:
                node, before = stack.pop()
                turns = (*before, Turn(role_of(field(node, "role")), field(node, "text")))
                replies = node.get("replies") or []
                stack.extend((reply, turns) for reply in reversed(replies))
                ranked = [reply for reply in replies if reply.get("rank") is not None]
                if len(ranked) >= 2:
                    with found.at(where):
                        found.good.append(_replies(turns, replies, rater))
                elif replies:
                    found.unused["turn with fewer than two ranked replies"] += 1
    return found.result


def _replies(turns: tuple[Turn, ...], replies: list[Any], rater: Rater) -> Ranking:
    prompt = conversation_prompt(turns)
    roles = {role_of(field(reply, "role")) for reply in replies}
    require(len(roles) == 1, f"replies to one turn are by {' and '.join(sorted(roles))}")
    if roles == {"user"}:
        prompt = prompt.removesuffix(ASSISTANT) + HUMAN
    ranks = tuple(None if reply.get("rank") is None else field(reply, "rank", int) + 1 for reply in replies)
    answers = tuple(field(reply, "text") for reply in replies)
    return Ranking(prompt=prompt, answers=answers, rater=rater, ranks=ranks)


# ---- HelpSteer (Wang et al. 2023, 2024)

HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def read_helpsteer(path: Path, rater: Rater = CROWD) -> ReadResult:
    """Reads HelpSteer's rows: a rating from 0 to 4 of an answer by each of five criteria.

    The criterion is the principle of the record. Rows of HelpSteer2-Preference, `response_1, response_2,
    preference_strength` from -3 (the first is much better) to 3, become comparisons: a strength of 1, 2 or 3 is one of 1, 3
    or 5 in the record, 0 is a tie.

    Args:
        path: the JSON file, or a .gz of it.
        rater: who made all judgements; the file does not name them.

    Returns:
        (judgements, a message for each bad row).

    Raises:
        UserError: the file cannot be read.
    """
    return parse_rows(path, lambda row: _helpsteer(row, rater))


def _helpsteer(row: Any, rater: Rater) -> list[Judgement]:
    prompt = field(row, "prompt")
    if "preference_strength" in row:
        strength = field(row, "preference_strength", int)
        require(-3 <= strength <= 3, f"preference_strength is {strength}; it lies between -3 and 3")
        answers = field(row, "response_1"), field(row, "response_2")
        winner = None if strength == 0 else int(strength > 0)
        return [pair(prompt, answers, winner, rater, strength=2.0 * abs(strength) - 1 if strength else None)]
    answer = field(row, "response")
    return [
        Rating(prompt=prompt, answers=(answer,), rater=rater, principle=name, value=field(row, name, (int, float)),
               low=0, high=4)
        for name in HELPSTEER
        if row.get(name) is not None
    ]  # fmt: skip


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
    for where, row in found.rows(json_rows(path, found.bad)):
        with found.at(where):
            require(isinstance(row, dict), "expected an object with prompt and edit_request, or one of such objects")
            named = {row.get("name", f"{len(requests)}"): row} if "edit_request" in row else row
            for name, entry in named.items():
                with found.at(f"{where}, {name}"):
                    requests.append(CritiqueRequest(str(name), field(entry, "prompt"), field(entry, "edit_request")))
    return requests, found.bad
