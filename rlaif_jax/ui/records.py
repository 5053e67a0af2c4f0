"""From what a rater sends to records, and from records to words. The order on the screen is undone here, and only here."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.people.queue import Turn
from rlaif_jax.feedback.people.tasks import Task
from rlaif_jax.feedback.records.forms import (
    Call,
    Comment,
    Correction,
    Judgement,
    Ranking,
    Rater,
    Rating,
    Span,
    sha256,
)

MAX_TEXT = 100_000
"""Characters that a rater may write in one field."""

FIRST, SECOND = "first", "second"


def shown_order(task: Task, rater: str, seed: int) -> tuple[int, ...]:
    """Which answer this rater sees at each place, drawn from (seed, rater, task); the same again after a reload."""
    # Sorted first: the order must not depend on the one in which the answers came.
    by_text = sorted(range(len(task.answers)), key=lambda i: task.answers[i])
    random.Random(sha256([seed, rater, task.id])).shuffle(by_text)
    return tuple(by_text)


def dialogue(prompt: str, turns: Sequence[Turn]) -> str:
    """A conversation as one text, up to the rater's last message; of a rated turn, the prompt."""
    said = [f"[{prompt}]"] if prompt else []
    for turn in turns[:-1]:
        said += [f"Human: {turn.message}", f"Assistant: {turn.reply or ''}"]
    return "\n\n".join([*said, f"Human: {turns[-1].message}", "Assistant:"])


@dataclasses.dataclass(frozen=True)
class Sheet:
    """What a rater had before them when answering: the task, the order of its answers, the conversation of a chat."""

    task: Task
    rater: Rater
    shown: tuple[int, ...]
    seconds: float
    time: float
    turns: tuple[Turn, ...] = ()
    informed: bool = False

    def _common(self, note: str) -> dict[str, Any]:
        seen = "[after seeing the suggestion] " if self.informed else ""
        return {
            "prompt": self.task.prompt,
            "answers": self.task.answers,
            "rater": self.rater,
            "principle": self.task.principle,
            "time": self.time,
            "shown": self.shown,
            "raw": (seen + note).strip(),
            "generators": self.task.generators,
            "call": Call(latency_s=round(self.seconds, 1)),
        }

    def records(self, payload: Mapping[str, Any]) -> list[Judgement]:
        """The judgements that an answer makes; UserError for one that the task does not allow."""
        return _MAKERS[self.task.kind](self, payload)

    def skipped(self, reason: str) -> list[Judgement]:
        """The record of a skip: abstained, with the reason. A chat that was skipped judged no answer and leaves none."""
        if not self.task.answers:
            return []
        cls = {"compare": Ranking, "rank": Ranking, "rate": Rating, "edit": Correction, "comment": Comment}[
            self.task.kind
        ]
        scale = {"low": float(self.task.low), "high": float(self.task.high)} if cls is Rating else {}
        return [cls(status="abstained", **scale, **self._common(reason))]

    def _compare(self, payload: Mapping[str, Any]) -> list[Judgement]:
        choice = _one_of(payload, "choice", (FIRST, SECOND, "tie", "both_bad"))
        margin = payload.get("margin")
        require(margin is None or (_is_whole(margin) and 1 <= margin <= 5), f"margin is {margin!r}; it is 1 to 5")
        common = self._common(_text(payload, "note"))
        if choice in ("tie", "both_bad"):
            return [Ranking(status="tie", ranks=(1, 1), both_bad=choice == "both_bad", **common)]
        ranks = [2, 2]
        ranks[self.shown[0 if choice == FIRST else 1]] = 1
        return [Ranking(ranks=tuple(ranks), strength=None if margin is None else float(margin), **common)]

    def _rank(self, payload: Mapping[str, Any]) -> list[Judgement]:
        count, common = len(self.task.answers), self._common(_text(payload, "note"))
        if payload.get("all_bad"):
            return [Ranking(status="tie", ranks=(1,) * count, both_bad=True, **common)]
        groups = payload.get("order")
        right = isinstance(groups, list) and all(isinstance(g, list) and g and all(map(_is_whole, g)) for g in groups)
        require(right, "order must be a list of lists of places, the best first")
        placed = [place for group in groups or [] for place in group]
        unknown = [place for place in placed if not 0 <= place < count]
        require(not unknown, f"order names the place {unknown[0] if unknown else ''}; there are 0 .. {count - 1}")
        require(len(set(placed)) == len(placed), "order names an answer twice")
        require(len(placed) >= 2, "order places fewer than two answers")
        ranks: list[int | None] = [None] * count
        rank = 1
        for group in groups or []:
            for place in group:
                ranks[self.shown[place]] = rank
            rank += len(group)
        tie = len({r for r in ranks if r is not None}) == 1
        return [Ranking(status="tie" if tie else "ok", ranks=tuple(ranks), **common)]

    def _rate(self, payload: Mapping[str, Any]) -> list[Judgement]:
        value, low, high = payload.get("value"), self.task.low, self.task.high
        require(_is_whole(value), f"value must be a whole number, not {str(value)[:40]!r}")
        assert isinstance(value, int)
        require(low <= value <= high, f"value is {value}, off the scale {low} .. {high}")
        return [Rating(value=float(value), low=float(low), high=float(high), **self._common(_text(payload, "note")))]

    def _edit(self, payload: Mapping[str, Any]) -> list[Judgement]:
        answer, edited, spans = self.task.answers[0], payload.get("edited"), payload.get("spans", [])
        require(edited is None or isinstance(edited, str), "edited must be text or null")
        require(edited is None or len(edited) <= MAX_TEXT, f"edited has more than {MAX_TEXT} characters")
        require(
            isinstance(spans, list) and all(isinstance(s, Mapping) for s in spans), "spans must be a list of objects"
        )
        if edited is not None and edited == answer.replace("\r\n", "\n").replace("\r", "\n"):
            edited = answer  # a text field has one kind of line end only
        marks = []
        for span in spans:
            start, end, value = span.get("start"), span.get("end"), span.get("value", -1)
            require(_is_whole(start) and _is_whole(end), "a span has start and end, whole numbers")
            require(
                _is_whole(value) and -3 <= value <= 3 and value != 0, f"a span's value is {value!r}; -3 .. 3, not 0"
            )
            category = _text(span, "category")
            require(
                not category or category in self.task.labels,
                f"unknown kind {category[:40]!r}; this task knows {', '.join(self.task.labels)}",
            )
            marks.append(Span(start, end, float(value), category))
        marks.sort(key=lambda span: (span.start, span.end))
        return [Correction(edited=edited, spans=tuple(marks), **self._common(_text(payload, "note")))]

    def _comment(self, payload: Mapping[str, Any]) -> list[Judgement]:
        aspects = payload.get("aspects", [])
        known = isinstance(aspects, list) and all(aspect in self.task.labels for aspect in aspects)
        require(known, f"aspects must be among {', '.join(self.task.labels) or 'none'}, not {str(aspects)[:60]}")
        text = _text(payload, "text")
        require(bool(text.strip()), "the comment is empty: write something, or skip with a reason")
        return [Comment(text=text.strip(), aspects=tuple(dict.fromkeys(aspects)), **self._common(""))]

    def _chat(self, payload: Mapping[str, Any]) -> list[Judgement]:
        given = payload.get("turns")
        require(
            isinstance(given, list) and all(isinstance(g, Mapping) for g in given), "turns must be a list of objects"
        )
        made: list[Judgement] = []
        seen: set[int] = set()
        for entry in given or []:
            turn, value, comment = entry.get("turn"), entry.get("value"), _text(entry, "comment").strip()
            require(_is_whole(turn) and 0 <= turn < len(self.turns), f"there is no turn {turn!r} in this conversation")
            require(turn not in seen, f"turn {turn} is judged twice")
            seen.add(turn)
            reply = self.turns[turn].reply
            require(reply is not None, f"turn {turn} has no reply yet")
            common = self._common(_text(payload, "note")) | {
                "prompt": dialogue(self.task.prompt, self.turns[: turn + 1]),
                "answers": (reply,),
                "shown": (),
                "generators": (),
            }
            low, high = self.task.low, self.task.high
            if value is not None:
                require(
                    _is_whole(value) and low <= value <= high, f"value of turn {turn} is {value!r}, off {low} .. {high}"
                )
                made.append(Rating(value=float(value), low=float(low), high=float(high), **common))
            if comment:
                made.append(Comment(text=comment, **common))
        require(bool(made), "rate at least one reply, or skip with a reason")
        return made


_MAKERS: dict[str, Callable[[Sheet, Mapping[str, Any]], list[Judgement]]] = {
    "compare": Sheet._compare,
    "rank": Sheet._rank,
    "rate": Sheet._rate,
    "edit": Sheet._edit,
    "comment": Sheet._comment,
    "chat": Sheet._chat,
}


def retraction(record: Judgement, time: float) -> Judgement:
    """The record that takes `record` back."""
    return dataclasses.replace(record, status="retracted", supersedes=record.id, time=time, call=Call())


def in_words(record: Judgement, shown: Sequence[int] = ()) -> str:
    """What a record says, in terms of the order on the screen (default: the answers' own)."""
    shown = tuple(shown) or tuple(range(len(record.answers)))
    if not record.answered:
        return f"{record.status}{f': {record.raw}' if record.raw else ''}"
    match record:
        case Ranking():
            said = _ranking_in_words(record, shown)
        case Rating():
            said = f"{record.value:g} on the scale {record.low:g} to {record.high:g}"
        case Correction():
            changed = record.edited is not None and record.edited != record.answers[0]
            parts = ["an edited answer"] if changed else ["nothing to change"] if record.edited is not None else []
            parts += [f"{len(record.spans)} marked passage{'s' * (len(record.spans) != 1)}"] if record.spans else []
            said = " and ".join(parts)
        case Comment():
            said = f"“{record.text}”" + (f" ({', '.join(record.aspects)})" if record.aspects else "")
        case _:
            raise UserError(f"no words for a {record.form}")
    return said + (f" — “{record.raw}”" if record.raw and record.form != "comment" else "")


def _ranking_in_words(record: Ranking, shown: Sequence[int]) -> str:
    if record.both_bad:
        return "both are bad" if len(shown) == 2 else "all are bad"
    if len(shown) == 2:
        chance = next(iter(record.pairs()))[2]
        if chance == 0.5:
            return "a tie"
        place = ("first", "second")[shown.index(0 if chance > 0.5 else 1)]
        sure = f" (probability {max(chance, 1 - chance):.2f})" if record.probability is not None else ""
        return f"the {place} is better" + sure + (f", by {record.strength:g} of 5" if record.strength else "")
    if record.beats:
        return ", ".join(f"{_start(record.answers[a])} over {_start(record.answers[b])}" for a, b in record.beats)
    groups: dict[int, list[str]] = {}
    for index in shown:
        if (rank := record.ranks[index]) is not None:
            groups.setdefault(rank, []).append(_start(record.answers[index]))
    return " > ".join(" = ".join(groups[rank]) for rank in sorted(groups))


def _start(answer: str, length: int = 32) -> str:
    return f"“{answer if len(answer) <= length else answer[: length - 1].rstrip() + '…'}”"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(payload: Mapping[str, Any], name: str) -> str:
    value = payload.get(name, "")
    require(isinstance(value, str), f"{name} must be text, not {str(value)[:40]!r}")
    require(len(value) <= MAX_TEXT, f"{name} has more than {MAX_TEXT} characters")
    return value


def _one_of(payload: Mapping[str, Any], name: str, allowed: Sequence[str]) -> str:
    value = payload.get(name)
    require(
        isinstance(value, str) and value in allowed, f"{name} is {str(value)[:40]!r}; it is one of {', '.join(allowed)}"
    )
    return str(value)
