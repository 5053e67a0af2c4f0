"""What the page does, without HTTP: a rater's name and JSON in, JSON out."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cached_property
from time import time as now
from typing import Any, Literal

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.people.queue import ADJUDICATED, Conflict, Post, TaskQueue
from rlaif_jax.feedback.people.tasks import Task
from rlaif_jax.feedback.records.forms import Judgement, Rater, canonical, sha256, to_json
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.ui.chat import ChatModel
from rlaif_jax.ui.records import Sheet, in_words, retraction, shown_order

Json = dict[str, Any]
MAX_MESSAGE = 4_000
"""Characters of one message to the model."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of the check: `options` to choose from, the index of the right one, and why it is right."""

    question: str
    options: tuple[str, ...]
    answer: int
    why: str = ""

    def __post_init__(self) -> None:
        require(
            0 <= self.answer < len(self.options),
            f"the check's question {self.question[:60]!r}: answer is {self.answer}; options has {len(self.options)} entries",
        )


class Forbidden(UserError):
    """Not for this rater."""


@dataclasses.dataclass(frozen=True, eq=False)
class Desk:
    """The annotation of one store by several raters.

    raters: their names. coordinator: who adjudicates, exports and may stop the run. simulated: raters that are programs;
    their records say so. questions: the check; () = none. seed: of the order on the screen. chat: the model to talk to.
    in_thread: runs a slow function without holding up the other raters.
    """

    store: Store
    queue: TaskQueue
    raters: tuple[str, ...]
    coordinator: str
    simulated: frozenset[str] = frozenset()
    questions: tuple[Question, ...] = ()
    seed: int = 0
    chat: ChatModel | None = None
    in_thread: Callable[..., Awaitable[Any]] | None = None

    @cached_property
    def _questions_hash(self) -> str:
        return sha256([dataclasses.asdict(question) for question in self.questions])

    def _source(self, rater: str) -> Literal["person", "simulated"]:
        return "simulated" if rater in self.simulated else "person"

    # ---- Reading

    def me(self, rater: str) -> Json:
        """Who this is and what there is to do."""
        return {
            "rater": rater,
            "simulated": rater in self.simulated,
            "coordinator": rater == self.coordinator,
            "passed": self.passed(rater),
            "check": [{"question": q.question, "options": list(q.options)} for q in self.questions],
            "progress": self.progress(rater),
        }

    def passed(self, rater: str) -> bool:
        """Whether the rater may work."""
        return not self.questions or self.queue.passed(rater, self._questions_hash)

    def progress(self, rater: str) -> Json:
        """The rater's own numbers."""
        row = self.queue.progress([rater])[0]
        return {"answered": row.answered, "skipped": row.skipped, "left": row.left}

    def view(self, rater: str, task: Task) -> Json:
        """The task as this rater sees it: blind, in the rater's own order, without the AI's suggestion."""
        order = shown_order(task, rater, self.seed)
        before = self.queue.undone(rater, task.id)
        return {
            "id": task.id,
            "kind": task.kind,
            "prompt": task.prompt,
            "principle": task.principle,
            "answers": [task.answers[i] for i in order],
            "low": task.low,
            "high": task.high,
            "labels": list(task.labels),
            "before": before.payload if before else None,
            "turns": [turn._asdict() for turn in self.queue.turns(task.id, rater)] if task.kind == "chat" else [],
        }

    # ---- The check

    def check(self, rater: str, given: Any) -> Json:
        """Mark the check; which answers were wrong, and why."""
        right = isinstance(given, list) and len(given) == len(self.questions)
        require(right, f"answers must be a list of {len(self.questions)} numbers")
        wrong = [
            {"index": i, "why": question.why}
            for i, (question, answer) in enumerate(zip(self.questions, given))
            if answer != question.answer
        ]
        if not wrong:
            self.queue.passes(rater, self._questions_hash)
        return {"passed": not wrong, "wrong": wrong}

    # ---- Working

    def next(self, rater: str) -> Json:
        """Lease the next task."""
        if not self.passed(rater):
            raise Forbidden("pass the check of the instructions first")
        task = self.queue.lease(rater)
        progress = self.progress(rater)
        return {"task": None if task is None else self.view(rater, task), "progress": progress}

    def answer(self, rater: str, request: str, body: Json) -> Json:
        """Record an answer or a skip; once on disk, the suggestion may be seen."""
        if not self.passed(rater):
            raise Forbidden("pass the check of the instructions first")
        task = self.queue.task(_string(body, "task"))
        posted = self.queue.posted(rater, request, canonical(body))
        if posted is None:
            payload, reason = body.get("payload"), body.get("skip")
            seconds = self._seconds(rater, task, body.get("seconds"))
            sheet = Sheet(
                task,
                Rater(rater, self._source(rater)),
                shown_order(task, rater, self.seed),
                seconds,
                now(),
                tuple(self.queue.turns(task.id, rater)) if task.kind == "chat" else (),
                informed=task.suggestion is not None and self.queue.has_answered(rater, task.id),
            )
            records = tuple(_recorded(sheet, payload, reason))
            act: Literal["answer", "skip"] = "answer" if reason is None else "skip"
            kept = {"skip": reason} if reason is not None else dict(payload or {})
            posted = Post(rater, act, task.id, kept, records, seconds, sheet.informed)
            self.queue.post(posted, request, canonical(body), self.store)
        else:
            self.queue.deliver(self.store)  # a crash may have come between the two files
        shown = shown_order(task, rater, self.seed)
        suggestion = None
        if task.suggestion is not None and posted.act == "answer":
            judge = task.suggestion.rater.model or task.suggestion.rater.name
            suggestion = {"judge": judge, "says": in_words(task.suggestion, shown)}
        return {
            "recorded": [record.id for record in posted.records],
            "suggestion": suggestion,
            "progress": self.progress(rater),
        }

    def _seconds(self, rater: str, task: Task, said: Any) -> float:
        """The time spent as the page measured it, within what the lease allows."""
        held = self.queue.held_since(task.id, rater)
        most = now() - held if held is not None else float("inf")
        number = said if isinstance(said, (int, float)) and not isinstance(said, bool) else 0.0
        return float(min(max(number, 0.0), most, 86_400.0)) if number == number else 0.0

    def undo(self, rater: str, request: str, body: Json) -> Json:
        """Take the rater's last answer back and return its task."""
        if (posted := self.queue.posted(rater, request, canonical(body))) is None:
            found = self.queue.last(rater)
            if found is None:
                raise Conflict("there is nothing to undo")
            sequence, last = found
            records = tuple(retraction(record, now()) for record in last.records)
            posted = Post(rater, "undo", last.task, {}, records, 0.0, False)
            self.queue.post(posted, request, canonical(body), self.store, undoes=sequence)
        else:
            self.queue.deliver(self.store)
        return {"task": self.view(rater, self.queue.task(posted.task)), "progress": self.progress(rater)}

    async def say(self, rater: str, request: str, body: Json) -> Json:
        """Talk to the model; the message is kept before the model is asked, so a repeated request goes on from there."""
        task, message = self.queue.task(_string(body, "task")), _string(body, "message").strip()
        require(task.kind == "chat", "this task is no chat")
        require(0 < len(message) <= MAX_MESSAGE, f"a message has 1 to {MAX_MESSAGE} characters, not {len(message)}")
        if self.chat is None or self.in_thread is None:
            raise UserError("there is no model to talk to: start the page with --model")
        self.queue.say(task.id, rater, request, message)
        turns = self.queue.turns(task.id, rater)
        if turns[-1].reply is None:
            reply = await self.in_thread(self.chat, task.prompt, turns)
            self.queue.reply(rater, request, reply)
        return {"turns": [turn._asdict() for turn in self.queue.turns(task.id, rater)]}

    # ---- Coordinating

    def _only_coordinator(self, rater: str) -> None:
        if rater != self.coordinator:
            raise Forbidden(f"only the coordinator ({self.coordinator}) may do this")

    def team(self) -> Json:
        """Who still has to do what."""
        rows = [row._asdict() for row in self.queue.progress(self.raters)]
        for row in rows:
            row["simulated"] = row["rater"] in self.simulated
        tasks = self.queue.tasks()
        kinds: dict[tuple[str, str], list[int]] = {}
        for waiting in tasks:
            counts = kinds.setdefault((waiting.task.kind, waiting.origin), [0, 0, 0])
            counts[0] += 1
            counts[1] += min(len(waiting.answered), waiting.overlap)
            counts[2] += waiting.overlap
        groups = [
            {"kind": kind, "origin": origin, "tasks": n, "answers": done, "wanted": wanted}
            for (kind, origin), (n, done, wanted) in kinds.items()
        ]
        stuck = sum(
            1 for w in tasks if len(w.answered) < w.overlap and not set(self.raters) - set(w.answered) - set(w.skipped)
        )
        return {"raters": rows, "groups": groups, "stuck": stuck, "stopped": self.queue.stop_requested()}

    def disputes(self, rater: str) -> Json:
        """The tasks whose raters disagree and that nobody has adjudicated yet."""
        self._only_coordinator(rater)
        found = []
        posts = by_task(self.queue.posts())
        for identifier, given in posts.items():
            answers = [post for post in given if post.act == "answer"]
            if len(answers) < 2 or any(post.act == "adjudicate" for post in given):
                continue
            said = {_essence(post) for post in answers}
            if len(said) < 2:
                continue
            task = self.queue.task(identifier)
            if task.kind == "chat":
                continue  # every conversation is another one
            shown = shown_order(task, rater, self.seed)
            opinions = [
                {"rater": post.rater, "says": "; ".join(in_words(r, shown) for r in post.records), "payload": None}
                for post in answers
            ]
            found.append({"task": self.view(rater, task) | {"before": None}, "opinions": opinions})
        return {"disputes": found}

    def adjudicate(self, rater: str, request: str, body: Json) -> Json:
        """Record what holds in the end, under the name `adjudicated by NAME`."""
        self._only_coordinator(rater)
        task = self.queue.task(_string(body, "task"))
        if (posted := self.queue.posted(rater, request, canonical(body))) is None:
            who = Rater(f"{ADJUDICATED}{rater}", self._source(rater))
            sheet = Sheet(task, who, shown_order(task, rater, self.seed), 0.0, now())
            payload = body.get("payload")
            records = tuple(_recorded(sheet, payload, None))
            posted = Post(rater, "adjudicate", task.id, dict(payload or {}), records, 0.0, False)
            self.queue.post(posted, request, canonical(body), self.store)
        else:
            self.queue.deliver(self.store)
        return {"recorded": [record.id for record in posted.records]}

    def stop(self, rater: str, stop: Any) -> Json:
        """ "Good enough, stop", or go on."""
        self._only_coordinator(rater)
        require(isinstance(stop, bool), "stop must be true or false")
        if self.queue.stop_requested() != stop:
            self.queue.stop(rater, stop)
        return {"stopped": stop}

    def export(self, rater: str, final: bool) -> list[Json]:
        """All records of the store as they came; if `final`, only what holds: no retracted or replaced ones, and of an
        adjudicated task the adjudication alone."""
        self._only_coordinator(rater)
        if not final:
            return [to_json(entry.judgement) for entry in self.store.read(superseded=True)]
        settled: set[str] = set()
        overruled: set[str] = set()
        for given in by_task(self.queue.posts()).values():
            decided = [post for post in given if post.act == "adjudicate"]
            if decided:
                settled |= {record.id for record in decided[-1].records}
                overruled |= {r.id for post in given for r in post.records} - settled
        return [to_json(entry.judgement) for entry in self.store.read() if entry.judgement.id not in overruled]


def by_task(posts: Sequence[Post]) -> dict[str, list[Post]]:
    """The posts of each task, in their order."""
    found: dict[str, list[Post]] = {}
    for post in posts:
        found.setdefault(post.task, []).append(post)
    return found


def _recorded(sheet: Sheet, payload: Any, reason: Any) -> list[Judgement]:
    if reason is not None:
        require(isinstance(reason, str) and bool(reason.strip()), "a skip needs its reason in words")
        return sheet.skipped(reason.strip()[:MAX_MESSAGE])
    require(isinstance(payload, Mapping), "payload must be an object")
    return sheet.records(payload)


def _essence(post: Post) -> str:
    """What two raters must share to agree: the verdict, without margins, notes and the order on the screen."""
    essence = []
    for record in post.records:
        values = to_json(record)
        for name in ("answers", "ranks", "beats", "both_bad", "value", "edited", "spans", "text"):
            essence.append(values.get(name))
    return canonical(essence)


def _string(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    require(isinstance(value, str), f"{name} must be text, not {str(value)[:40]!r}")
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} holds half a character (a lone surrogate)") from error
    return str(value)
