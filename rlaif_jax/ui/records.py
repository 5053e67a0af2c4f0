"""Turns a rater's answers into records, and records into words.

Only this file undoes the order of the answers on the screen.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.people.chats import Turn
from rlaif_jax.feedback.people.kinds import CHAT, COMMENT, COMPARE, EDIT, RANK, RATE, Kind
from rlaif_jax.feedback.people.tasks import PersonTask
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
"""The largest number of characters that a rater may write in one field."""

FIRST, SECOND = "first", "second"


def shown_order(task: PersonTask, rater: str, seed: int) -> tuple[int, ...]:
    """Returns the index of the answer at each place of this rater's screen.

    It is a function of (seed, rater, task) alone.
    """
    # Sorted first: the order on the screen must not depend on the order in which the answers came.
    by_text = sorted(range(len(task.answers)), key=lambda i: task.answers[i])
    random.Random(sha256([seed, rater, task.id])).shuffle(by_text)
    return tuple(by_text)


def chat_prompt(prompt: str, turns: Sequence[Turn]) -> str:
    """Returns a conversation up to the rater's last message as one text, the prompt of the reply."""
    parts = [f"[{prompt}]"] if prompt else []
    for turn in turns[:-1]:
        parts += [f"Human: {turn.message}", f"Assistant: {turn.reply or ''}"]
    return "\n\n".join([*parts, f"Human: {turns[-1].message}", "Assistant:"])


@dataclasses.dataclass(frozen=True)
class AnswerContext:
    """The circumstances of an answer, from which `records` makes judgements.

    Attributes:
        task: the task.
        rater: who answers.
        shown: the order of the answers on the screen, as indices into `task.answers`.
        seconds: the time that the rater spent.
        time: when the answer came, Unix seconds.
        turns: the conversation of a chat.
        informed: whether the rater had seen the AI's suggestion before.
    """

    task: PersonTask
    rater: Rater
    shown: tuple[int, ...]
    seconds: float
    time: float
    turns: tuple[Turn, ...] = ()
    informed: bool = False

    def _shared(self, note: str) -> dict[str, Any]:
        """Returns the fields that do not depend on the form; `note` is the rater's free text."""
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
        """Returns the judgements that an answer makes.

        Raises UserError for an answer that the task does not allow.
        """
        return _MAKERS[self.task.kind](self, payload)

    def skipped(self, reason: str) -> list[Judgement]:
        """Returns the record of a skip: abstained, with the reason.

        A skipped chat judged no answer and leaves no record.
        """
        record = self.task.kind.record
        if record is None:
            return []
        fields = self._shared(reason) | {"status": "abstained"}
        if record is Rating:
            fields |= {"low": float(self.task.low), "high": float(self.task.high)}
        return [record(**fields)]

    def _compare(self, payload: Mapping[str, Any]) -> list[Judgement]:
        choice = _one_of(payload, "choice", (FIRST, SECOND, "tie", "both_bad"))
        margin = payload.get("margin")
        require(
            margin is None or (_is_whole(margin) and 1 <= margin <= 5), f"margin is {str(margin)[:40]}; it is 1 to 5"
        )
        shared = self._shared(_text(payload, "note"))
        if choice in ("tie", "both_bad"):
            return [Ranking(status="tie", ranks=(1, 1), both_bad=choice == "both_bad", **shared)]
        ranks = [2, 2]
        ranks[self.shown[0 if choice == FIRST else 1]] = 1
        return [Ranking(ranks=tuple(ranks), strength=None if margin is None else float(margin), **shared)]

    def _rank(self, payload: Mapping[str, Any]) -> list[Judgement]:
        count, shared = len(self.task.answers), self._shared(_text(payload, "note"))
        if payload.get("all_bad"):
            return [Ranking(status="tie", ranks=(1,) * count, both_bad=True, **shared)]
        groups = payload.get("order")
        is_right = isinstance(groups, list) and all(
            isinstance(g, list) and g and all(map(_is_whole, g)) for g in groups
        )
        require(is_right, "order must be a list of lists of places, the best first")
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
        return [Ranking(status="tie" if tie else "ok", ranks=tuple(ranks), **shared)]

    def _rate(self, payload: Mapping[str, Any]) -> list[Judgement]:
        value, low, high = payload.get("value"), self.task.low, self.task.high
        require(_is_whole(value), f"value must be a whole number, not {str(value)[:40]!r}")
        assert isinstance(value, int)
        require(low <= value <= high, f"value is {value}, off the scale {low} .. {high}")
        return [Rating(value=float(value), low=float(low), high=float(high), **self._shared(_text(payload, "note")))]

    def _edit(self, payload: Mapping[str, Any]) -> list[Judgement]:
        answer, edited, spans = self.task.answers[0], payload.get("edited"), payload.get("spans", [])
        require(edited is None or isinstance(edited, str), "edited must be text or null")
        require(edited is None or len(edited) <= MAX_TEXT, f"edited has more than {MAX_TEXT} characters")
        require(
            isinstance(spans, list) and all(isinstance(s, Mapping) for s in spans), "spans must be a list of objects"
        )
        if edited is not None and edited == answer.replace("\r\n", "\n").replace("\r", "\n"):
            edited = answer  # a text field has one kind of line end only
        marks = [self._span(span) for span in spans]
        marks.sort(key=lambda span: (span.start, span.end))
        return [Correction(edited=edited, spans=tuple(marks), **self._shared(_text(payload, "note")))]

    def _span(self, span: Any) -> Span:
        start, end, value = span.get("start"), span.get("end"), span.get("value", -1)
        require(_is_whole(start) and _is_whole(end), "a span has start and end, whole numbers")
        require(
            _is_whole(value) and -3 <= value <= 3 and value != 0, f"a span's value is {str(value)[:40]}; -3 .. 3, not 0"
        )
        category = _text(span, "category")
        require(
            not category or category in self.task.labels,
            f"unknown kind {category[:40]!r}; this task knows {', '.join(self.task.labels)}",
        )
        return Span(start, end, float(value), category)

    def _comment(self, payload: Mapping[str, Any]) -> list[Judgement]:
        aspects = payload.get("aspects", [])
        known = isinstance(aspects, list) and all(aspect in self.task.labels for aspect in aspects)
        require(known, f"aspects must be among {', '.join(self.task.labels) or 'none'}, not {str(aspects)[:60]}")
        text = _text(payload, "text")
        require(bool(text.strip()), "the comment is empty: write something, or skip with a reason")
        return [Comment(text=text.strip(), aspects=tuple(dict.fromkeys(aspects)), **self._shared(""))]

    def _chat(self, payload: Mapping[str, Any]) -> list[Judgement]:
        given = payload.get("turns")
        require(
            isinstance(given, list) and all(isinstance(g, Mapping) for g in given), "turns must be a list of objects"
        )
        note = _text(payload, "note")
        judged = Counter(self._number(entry.get("turn")) for entry in given or [])
        repeated = next((turn for turn, times in judged.items() if times > 1), None)
        require(repeated is None, f"turn {repeated} is judged twice")
        records = [record for entry in given or [] for record in self._turn(entry, note)]
        require(bool(records), "rate at least one reply, or skip with a reason")
        return records

    def _number(self, turn: Any) -> int:
        if not (_is_whole(turn) and 0 <= turn < len(self.turns)):
            raise UserError(f"there is no turn {str(turn)[:40]} in this conversation")
        return turn

    def _turn(self, entry: Mapping[str, Any], note: str) -> list[Judgement]:
        """Returns the judgements of one turn of a chat."""
        turn, value, comment = self._number(entry.get("turn")), entry.get("value"), _text(entry, "comment").strip()
        reply = self.turns[turn].reply
        require(reply is not None, f"turn {turn} has no reply yet")
        shared = self._shared(note) | {
            "prompt": chat_prompt(self.task.prompt, self.turns[: turn + 1]),
            "answers": (reply,),
            "shown": (),
            "generators": (),
        }
        low, high = self.task.low, self.task.high
        records: list[Judgement] = []
        if value is not None:
            require(
                _is_whole(value) and low <= value <= high,
                f"value of turn {turn} is {str(value)[:40]}, off {low} .. {high}",
            )
            records.append(Rating(value=float(value), low=float(low), high=float(high), **shared))
        return [*records, Comment(text=comment, **shared)] if comment else records


_MAKERS: dict[Kind, Callable[[AnswerContext, Mapping[str, Any]], list[Judgement]]] = {
    COMPARE: AnswerContext._compare,
    RANK: AnswerContext._rank,
    RATE: AnswerContext._rate,
    EDIT: AnswerContext._edit,
    COMMENT: AnswerContext._comment,
    CHAT: AnswerContext._chat,
}


def retraction(record: Judgement, time: float) -> Judgement:
    """Returns the record that withdraws `record` at `time` (Unix seconds)."""
    return dataclasses.replace(record, status="retracted", supersedes=record.id, time=time, call=Call())


def in_words(record: Judgement, shown: Sequence[int] = ()) -> str:
    """Returns a record in words, with the answers numbered as on the screen.

    Args:
        record: a judgement; one without a value becomes its status and its raw text.
        shown: the order of the answers on the screen; () means the record's order.

    Raises:
        UserError: the record is of a form that has no words.
    """
    shown = tuple(shown) or tuple(range(len(record.answers)))
    if not record.answered:
        return f"{record.status}{f': {record.raw}' if record.raw else ''}"
    match record:
        case Ranking():
            words = _ranking_in_words(record, shown)
        case Rating():
            words = f"{record.value:g} on the scale {record.low:g} to {record.high:g}"
        case Correction():
            is_changed = record.edited is not None and record.edited != record.answers[0]
            parts = ["an edited answer"] if is_changed else ["nothing to change"] if record.edited is not None else []
            parts += [f"{len(record.spans)} marked passage{'s' * (len(record.spans) != 1)}"] if record.spans else []
            words = " and ".join(parts)
        case Comment():
            words = f"“{record.text}”" + (f" ({', '.join(record.aspects)})" if record.aspects else "")
        case _:
            raise UserError(f"no words for a {record.form}")
    return words + (f" — “{record.raw}”" if record.raw and record.form != "comment" else "")


def _ranking_in_words(record: Ranking, shown: Sequence[int]) -> str:
    if record.both_bad:
        return "both are bad" if len(shown) == 2 else "all are bad"
    if len(shown) == 2:
        chance = next(iter(record.pairs()))[2]
        if chance == 0.5:
            return "a tie"
        place = (FIRST, SECOND)[shown.index(0 if chance > 0.5 else 1)]
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


def _is_whole(value: Any) -> TypeGuard[int]:
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
