"""The annotation page without HTTP: methods that take a rater's name and JSON, and return JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cached_property
from time import time as now
from typing import Any, Literal

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.people.kinds import CHAT
from rlaif_jax.feedback.people.queue import ADJUDICATED, Conflict, Post, QueuedTask, TaskQueue
from rlaif_jax.feedback.people.tasks import PersonTask
from rlaif_jax.feedback.records.forms import Judgement, Rater, canonical, sha256, to_json
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.ui.chat import ChatModel
from rlaif_jax.ui.records import AnswerContext, in_words, retraction, shown_order

Json = dict[str, Any]
MAX_MESSAGE = 4_000
"""The largest number of characters of one message to the model."""


@dataclasses.dataclass(frozen=True)
class CheckQuestion:
    """A question of the check that raters pass before they work.

    Attributes:
        question: the question.
        options: the answers to choose from.
        answer: the index of the right option.
        why: why that option is right; shown after a wrong choice.
    """

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
    """A request that this rater may not make."""


@dataclasses.dataclass(frozen=True, eq=False)
class AnnotationService:
    """The annotation of one store by several raters.

    Attributes:
        store: where the judgements go.
        queue: the tasks.
        raters: the names of the raters.
        coordinator: the rater who adjudicates, exports and may stop a run.
        simulated: the raters that are programs; their records say so.
        questions: the check; () where raters need not pass one.
        seed: seed of the order of answers on the screen.
        chat: the model to talk to.
        in_thread: runs a slow function without blocking the other raters.
    """

    store: Store
    queue: TaskQueue
    raters: tuple[str, ...]
    coordinator: str
    simulated: frozenset[str] = frozenset()
    questions: tuple[CheckQuestion, ...] = ()
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
        """Returns the rater's role, whether the rater has passed the check, its questions, and the progress."""
        return {
            "rater": rater,
            "simulated": rater in self.simulated,
            "coordinator": rater == self.coordinator,
            "passed": self.has_passed(rater),
            "check": [{"question": q.question, "options": list(q.options)} for q in self.questions],
            "progress": self.progress(rater),
        }

    def has_passed(self, rater: str) -> bool:
        """Returns whether the rater may work."""
        return not self.questions or self.queue.team.has_passed(rater, self._questions_hash)

    def _require_passed(self, rater: str) -> None:
        if not self.has_passed(rater):
            raise Forbidden("pass the check of the instructions first")

    def progress(self, rater: str) -> Json:
        """Returns {"answered", "skipped", "left"}: the rater's numbers of tasks."""
        row = self.queue.progress([rater])[0]
        return {"answered": row.answered, "skipped": row.skipped, "left": row.left}

    def view(self, rater: str, task: PersonTask) -> Json:
        """Returns the task as this rater sees it: blind, shuffled, without the AI's suggestion."""
        order = shown_order(task, rater, self.seed)
        before = self.queue.undone(rater, task.id)
        return {
            "id": task.id,
            "kind": task.kind.name,
            "prompt": task.prompt,
            "principle": task.principle,
            "answers": [task.answers[i] for i in order],
            "low": task.low,
            "high": task.high,
            "labels": list(task.labels),
            "before": before.payload if before else None,
            "turns": [turn._asdict() for turn in self.queue.chats.turns(task.id, rater)],
        }

    # ---- The check

    def check(self, rater: str, given: Any) -> Json:
        """Marks the rater's choices in the check; records a pass if all are right.

        Args:
            rater: who was checked.
            given: the number of the chosen answer to each question.

        Returns:
            {"passed": bool, "wrong": [{"index", "why"} of each wrong choice]}.

        Raises:
            UserError: `given` is no list with a choice for each question.
        """
        is_right = isinstance(given, list) and len(given) == len(self.questions)
        require(is_right, f"answers must be a list of {len(self.questions)} numbers")
        wrong = [
            {"index": i, "why": question.why}
            for i, (question, answer) in enumerate(zip(self.questions, given))
            if answer != question.answer
        ]
        if not wrong:
            self.queue.team.record_pass(rater, self._questions_hash)
        return {"passed": not wrong, "wrong": wrong}

    # ---- Working

    def next(self, rater: str) -> Json:
        """Leases the rater's next task and returns it, with the rater's progress.

        Returns:
            {"task": the task as the rater sees it, or None where no task is left; "progress": counts of tasks}.

        Raises:
            Forbidden: the rater has not passed the check.
        """
        self._require_passed(rater)
        task = self.queue.lease(rater)
        progress = self.progress(rater)
        return {"task": None if task is None else self.view(rater, task), "progress": progress}

    def answer(self, rater: str, request: str, body: Json) -> Json:
        """Records an answer or a skip and, once it is on disk, returns the AI's suggestion.

        Args:
            rater: who answers.
            request: the id that the sender made for this post.
            body: `task`, `seconds` and either `payload` (the answer) or `skip` (the reason).

        Raises:
            UserError: an answer that the task does not allow.
            Conflict: the rater has answered the task already, or used the request id for another post.
            Forbidden: the rater has not passed the check.
        """
        self._require_passed(rater)
        task = self.queue.task(_string(body, "task"))
        posted = self._repeated(rater, request, body)
        if posted is None:
            payload, reason = body.get("payload"), body.get("skip")
            seconds = self._seconds(rater, task, body.get("seconds"))
            context = AnswerContext(
                task,
                Rater(rater, self._source(rater)),
                shown_order(task, rater, self.seed),
                seconds,
                now(),
                tuple(self.queue.chats.turns(task.id, rater)),
                informed=task.suggestion is not None and self.queue.has_answered(rater, task.id),
            )
            records = tuple(_records(context, payload, reason))
            act: Literal["answer", "skip"] = "answer" if reason is None else "skip"
            kept = {"skip": reason} if reason is not None else dict(payload or {})
            posted = Post(rater, act, task.id, kept, records, seconds, context.informed)
            self.queue.post(posted, request, canonical(body), self.store)
        suggestion = None
        if task.suggestion is not None and posted.act == "answer":
            judge = task.suggestion.rater.model or task.suggestion.rater.name
            words = in_words(task.suggestion, shown_order(task, rater, self.seed))
            suggestion = {"judge": judge, "says": words}
        return {
            "recorded": [record.id for record in posted.records],
            "suggestion": suggestion,
            "progress": self.progress(rater),
        }

    def _repeated(self, rater: str, request: str, body: Json) -> Post | None:
        """Returns the earlier post of a repeated request, whose records are in the store then, or None."""
        posted = self.queue.posted(rater, request, canonical(body))
        if posted is not None:
            self.queue.deliver(self.store)  # a crash may have come between the queue and the store
        return posted

    def _seconds(self, rater: str, task: PersonTask, measured: Any) -> float:
        """Returns the measured time, limited to the time since the rater took the task."""
        held = self.queue.held_since(task.id, rater)
        most = now() - held if held is not None else float("inf")
        number = measured if isinstance(measured, (int, float)) and not isinstance(measured, bool) else 0.0
        return float(min(max(number, 0.0), most, 86_400.0)) if number == number else 0.0

    def undo(self, rater: str, request: str, body: Json) -> Json:
        """Withdraws the rater's last answer or skip and returns its task.

        Args:
            rater: who withdraws.
            request: the id that the sender made for this post.
            body: the post; no field of it is read.

        Returns:
            {"task": the task as the rater sees it, "progress": counts of tasks}.

        Raises:
            Conflict: the rater has no such post, or used the request id for another post.
        """
        posted = self._repeated(rater, request, body)
        if posted is None:
            found = self.queue.last(rater)
            if found is None:
                raise Conflict("there is nothing to undo")
            sequence, last = found
            records = tuple(retraction(record, now()) for record in last.records)
            posted = Post(rater, "undo", last.task, {}, records, 0.0, False)
            self.queue.post(posted, request, canonical(body), self.store, undoes=sequence)
        return {"task": self.view(rater, self.queue.task(posted.task)), "progress": self.progress(rater)}

    async def say(self, rater: str, request: str, body: Json) -> Json:
        """Sends a message to the chat model and returns the conversation.

        The message is stored before the model is asked, so a repeated request continues from there.

        Args:
            rater: who writes.
            request: the id that the sender made for this post.
            body: `task`, the id of a chat, and `message`.

        Returns:
            {"turns": the rater's messages with the model's replies, oldest first}.

        Raises:
            UserError: the task is no chat, the message is empty or too long, or the page has no model.
        """
        task, message = self.queue.task(_string(body, "task")), _string(body, "message").strip()
        require(task.kind is CHAT, "this task is no chat")
        require(0 < len(message) <= MAX_MESSAGE, f"a message has 1 to {MAX_MESSAGE} characters, not {len(message)}")
        if self.chat is None or self.in_thread is None:
            raise UserError("there is no model to talk to: start the page with --model")
        self.queue.chats.say(task.id, rater, request, message)
        turns = self.queue.chats.turns(task.id, rater)
        if turns[-1].reply is None:
            reply = await self.in_thread(self.chat, task.prompt, turns)
            self.queue.chats.reply(rater, request, reply)
        return {"turns": [turn._asdict() for turn in self.queue.chats.turns(task.id, rater)]}

    # ---- Coordinating

    def _only_coordinator(self, rater: str) -> None:
        if rater != self.coordinator:
            raise Forbidden(f"only the coordinator ({self.coordinator}) may do this")

    def team(self) -> Json:
        """Returns {"raters", "groups", "stuck", "stopped"}: who has done how much of which kind of task.

        "raters" has a row for each rater, "groups" one for each kind and origin of tasks; "stuck" is the number of
        tasks that nobody is left to answer; "stopped" says whether runs were asked to stop.
        """
        rows = [row._asdict() | {"simulated": row.rater in self.simulated} for row in self.queue.progress(self.raters)]
        tasks = self.queue.tasks()
        groups: dict[tuple[str, str], list[QueuedTask]] = {}
        for queued in tasks:
            groups.setdefault((queued.task.kind.name, queued.origin), []).append(queued)
        counts = [
            {
                "kind": kind,
                "origin": origin,
                "tasks": len(group),
                "answers": sum(min(len(queued.answered), queued.overlap) for queued in group),
                "wanted": sum(queued.overlap for queued in group),
            }
            for (kind, origin), group in groups.items()
        ]
        stuck = sum(
            len(q.answered) < q.overlap and not set(self.raters) - set(q.answered) - set(q.skipped) for q in tasks
        )
        return {"raters": rows, "groups": counts, "stuck": stuck, "stopped": self.queue.team.stop_requested()}

    def disputes(self, rater: str) -> Json:
        """Returns the tasks whose raters disagree and that nobody has adjudicated yet.

        Args:
            rater: who asks; must be the coordinator.

        Returns:
            {"disputes": [{"task": the task, "opinions": the raters' answers in words}]}.

        Raises:
            Forbidden: the rater is not the coordinator.
        """
        self._only_coordinator(rater)
        found = []
        for identifier, posts in group_by_task(self.queue.posts()).items():
            answers = [post for post in posts if post.act == "answer"]
            if any(post.act == "adjudicate" for post in posts) or len({_verdict(post) for post in answers}) < 2:
                continue
            task = self.queue.task(identifier)
            if task.kind is CHAT:
                continue  # no two conversations are alike
            shown = shown_order(task, rater, self.seed)
            opinions = [
                {"rater": post.rater, "says": "; ".join(in_words(r, shown) for r in post.records), "payload": None}
                for post in answers
            ]
            found.append({"task": self.view(rater, task) | {"before": None}, "opinions": opinions})
        return {"disputes": found}

    def adjudicate(self, rater: str, request: str, body: Json) -> Json:
        """Records the final verdict on a disputed task, under the name `adjudicated by RATER`.

        Args:
            rater: who decides; must be the coordinator.
            request: the id that the sender made for this post.
            body: `task`, the id of the task, and `payload`, the verdict in the form of an answer.

        Returns:
            {"recorded": the ids of the new records}.

        Raises:
            UserError: a verdict that the task does not allow.
            Conflict: the request id was used for another post.
            Forbidden: the rater is not the coordinator.
        """
        self._only_coordinator(rater)
        task = self.queue.task(_string(body, "task"))
        posted = self._repeated(rater, request, body)
        if posted is None:
            who = Rater(f"{ADJUDICATED}{rater}", self._source(rater))
            context = AnswerContext(task, who, shown_order(task, rater, self.seed), 0.0, now())
            payload = body.get("payload")
            records = tuple(_records(context, payload, None))
            posted = Post(rater, "adjudicate", task.id, dict(payload or {}), records, 0.0, False)
            self.queue.post(posted, request, canonical(body), self.store)
        return {"recorded": [record.id for record in posted.records]}

    def stop(self, rater: str, stop: Any) -> Json:
        """Asks waiting runs to stop asking people ("good enough, stop"), or withdraws the request.

        Args:
            rater: who asks; must be the coordinator.
            stop: true to ask, false to withdraw.

        Returns:
            {"stopped": stop}.

        Raises:
            UserError: `stop` is not a Boolean.
            Forbidden: the rater is not the coordinator.
        """
        self._only_coordinator(rater)
        require(isinstance(stop, bool), "stop must be true or false")
        if self.queue.team.stop_requested() != stop:
            self.queue.team.request_stop(rater, stop)
        return {"stopped": stop}

    def export(self, rater: str, final: bool) -> list[Json]:
        """Returns the records of the store as JSON.

        Args:
            rater: who asks; must be the coordinator.
            final: only the records that hold in the end: none that was retracted or replaced, and of an adjudicated task
                only the adjudication.

        Raises:
            Forbidden: the rater is not the coordinator.
        """
        self._only_coordinator(rater)
        overruled: set[str] = set()
        if final:
            for posts in group_by_task(self.queue.posts()).values():
                verdicts = [post for post in posts if post.act == "adjudicate"]
                if verdicts:
                    overruled |= {r.id for post in posts for r in post.records} - {r.id for r in verdicts[-1].records}
        judgements = self.store.judgements(superseded=not final)
        return [to_json(judgement) for judgement in judgements if judgement.id not in overruled]


def group_by_task(posts: Sequence[Post]) -> dict[str, list[Post]]:
    """Returns the posts of each task, in their order."""
    found: dict[str, list[Post]] = {}
    for post in posts:
        found.setdefault(post.task, []).append(post)
    return found


def _records(context: AnswerContext, payload: Any, reason: Any) -> list[Judgement]:
    if reason is not None:
        require(isinstance(reason, str) and bool(reason.strip()), "a skip needs its reason in words")
        return context.skipped(reason.strip()[:MAX_MESSAGE])
    require(isinstance(payload, Mapping), "payload must be an object")
    return context.records(payload)


def _verdict(post: Post) -> str:
    """Returns the parts of a post that are equal where two raters agree.

    Margins, notes and the order on the screen are no part of it.
    """
    names = ("answers", "ranks", "beats", "both_bad", "value", "edited", "spans", "text")
    return canonical([to_json(record).get(name) for record in post.records for name in names])


def _string(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    require(isinstance(value, str), f"{name} must be text, not {str(value)[:40]!r}")
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} holds half a character (a lone surrogate)") from error
    return str(value)
