"""The annotation page without HTTP: methods that take a rater's name and JSON, and return JSON."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Awaitable, Callable, Collection
from functools import cached_property
from time import time as now
from typing import Any, Literal, TypeVar

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.people.chats import Conflict, Turn
from rlaif_jax.feedback.people.kinds import CHAT
from rlaif_jax.feedback.people.queue import ADJUDICATED, TaskQueue
from rlaif_jax.feedback.people.queue_rows import Post
from rlaif_jax.feedback.people.tasks import PersonTask
from rlaif_jax.feedback.records.forms import Rater, sha256, to_json
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.ui.chat import ChatModel
from rlaif_jax.ui.check import CheckQuestion
from rlaif_jax.ui.posts import MAX_MESSAGE, records_of, text_field, text_of
from rlaif_jax.ui.records import AnswerContext, in_words, retraction, shown_order
from rlaif_jax.ui.review import Review
from rlaif_jax.ui.worker import Worker

Json = dict[str, Any]
T = TypeVar("T")
EXPORT_STEP = 500
"""The number of records that an export reads at once; other requests take their turn in between."""
LOOK_S = 0.02
"""Seconds that a look at the progress spends on posts that were not counted yet."""
MOST_DISPUTES = 20
"""The largest number of disputes in one response."""


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
        worker: the thread in which `store` and `queue` were opened; None where the caller's thread did.
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
    worker: Worker | None = None

    @cached_property
    def _questions_hash(self) -> str:
        return sha256([dataclasses.asdict(question) for question in self.questions])

    @cached_property
    def _review(self) -> Review:
        return Review(self.queue)

    async def run(self, method: Callable[..., T], *arguments: Any) -> T:
        """Runs a method of the service where its files are open, and returns what it returns."""
        return method(*arguments) if self.worker is None else await self.worker.run(method, *arguments)

    def close(self) -> None:
        """Closes the files."""
        self.queue.close()
        self.store.close()

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
        task = self.queue.task(text_field(body, "task"))
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
            records = tuple(records_of(context, payload, reason))
            act: Literal["answer", "skip"] = "answer" if reason is None else "skip"
            kept = {"skip": reason} if reason is not None else dict(payload or {})
            posted = Post(rater, act, task.id, kept, records, seconds, context.informed)
            self.queue.post(posted, request, text_of(body), self.store)
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
        posted = self.queue.posted(rater, request, text_of(body))
        if posted is not None:
            self.queue.deliver(self.store)  # a crash may have come between the queue and the store
        return posted

    def _seconds(self, rater: str, task: PersonTask, measured: Any) -> float:
        """Returns the measured time, at most the time since the rater took the task where that is known."""
        held, time = self.queue.held_since(task.id, rater), now()
        most = time - held if held is not None and held <= time else float("inf")  # the clock may have been set back
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
            self.queue.post(posted, request, text_of(body), self.store, undoes=sequence)
        return {"task": self.view(rater, self.queue.task(posted.task)), "progress": self.progress(rater)}

    async def say(self, rater: str, request: str, body: Json) -> Json:
        """Sends a message to the chat model and returns the conversation.

        The message is stored before the model is asked, so a repeated request continues from there. A reply belongs to
        its message, whatever was written since.

        Args:
            rater: who writes.
            request: the id that the sender made for this post.
            body: `task`, the id of a chat, and `message`.

        Returns:
            {"turns": the rater's messages with the model's replies, oldest first}.

        Raises:
            UserError: the task is no chat, the message is empty or too long, or the page has no model.
            Conflict: the request id was used for another message.
            Forbidden: the rater has not passed the check.
        """
        if self.chat is None or self.in_thread is None:
            raise UserError("there is no model to talk to: start the page with --model")
        task, turns = await self.run(self._hear, rater, request, body)
        if turns[-1].reply is None:
            reply = await self.in_thread(self.chat, task.prompt, turns)
            await self.run(self.queue.chats.reply, rater, request, reply)
        return {"turns": [turn._asdict() for turn in await self.run(self.queue.chats.turns, task.id, rater)]}

    def _hear(self, rater: str, request: str, body: Json) -> tuple[PersonTask, list[Turn]]:
        """Stores a message; returns its task and the conversation up to the message."""
        self._require_passed(rater)
        task, message = self.queue.task(text_field(body, "task")), text_field(body, "message").strip()
        require(task.kind is CHAT, "this task is no chat")
        require(0 < len(message) <= MAX_MESSAGE, f"a message has 1 to {MAX_MESSAGE} characters, not {len(message)}")
        place = self.queue.chats.say(task.id, rater, request, message)
        return task, self.queue.chats.turns(task.id, rater)[: place + 1]

    # ---- Coordinating

    def _only_coordinator(self, rater: str) -> None:
        if rater != self.coordinator:
            raise Forbidden(f"only the coordinator ({self.coordinator}) may do this")

    def team(self) -> Json:
        """Returns the progress of the team: who has done how much of what, and how far the raters agree.

        The keys are "raters", "groups", "stuck", "stopped", "agreement" and "uncounted".

        "raters" has a row for each rater, "groups" one for each kind and origin of tasks; "stuck" is the number of
        tasks that nobody is left to answer; "stopped" says whether runs were asked to stop. "agreement" has the rows of
        `AgreementTally`; "uncounted" is the number of posts that are not in it yet: a page that starts with very many
        counts them little by little (`count_posts`).
        """
        uncounted = self._review.advance(LOOK_S)
        return {
            "raters": [
                r._asdict() | {"simulated": r.rater in self.simulated} for r in self.queue.progress(self.raters)
            ],
            "groups": [group._asdict() for group in self.queue.groups()],
            "stuck": self.queue.stuck(self.raters),
            "stopped": self.queue.team.stop_requested(),
            "agreement": self._review.agreement.rows(),
            "uncounted": uncounted,
        }

    async def count_posts(self) -> None:
        """Takes up all posts that the agreement does not know yet; other requests take their turns."""
        while await self.run(self._review.advance, LOOK_S / 4):
            await asyncio.sleep(LOOK_S / 4)

    def disputes(self, rater: str, skip: int = 0) -> Json:
        """Returns tasks whose raters disagree and that nobody has adjudicated yet.

        A task that the coordinator may still answer as a rater is not among them: the answer is to be the coordinator's
        own, not one that knows the others'.

        Args:
            rater: who asks; must be the coordinator.
            skip: the number of disputes to pass over; past the last one they begin again.

        Returns:
            {"count": the number of disputes, "disputes": [{"task": the task, "opinions": the raters' answers in words}],
            at most `MOST_DISPUTES` of them, "uncounted": the number of posts that were not looked at yet}.

        Raises:
            Forbidden: the rater is not the coordinator.
        """
        self._only_coordinator(rater)
        uncounted = self._review.advance(LOOK_S)
        disputed = list(self._review.disputed)
        own = self.queue.offered(disputed, rater) if rater in self.raters else frozenset()
        disputed = [task for task in disputed if task not in own]
        first = skip % len(disputed) if disputed else 0
        found = [self._dispute(rater, task) for task in disputed[first : first + MOST_DISPUTES]]
        return {"count": len(disputed), "disputes": found, "uncounted": uncounted}

    def _dispute(self, rater: str, identifier: str) -> Json:
        task = self.queue.task(identifier)
        shown = shown_order(task, rater, self.seed)
        opinions = [
            {"rater": post.rater, "says": "; ".join(in_words(r, shown) for r in post.records), "payload": None}
            for post in self.queue.posts(("answer",), task=identifier)
        ]
        return {"task": self.view(rater, task) | {"before": None}, "opinions": opinions}

    def adjudicate(self, rater: str, request: str, body: Json) -> Json:
        """Records the final verdict on a disputed task, under the name `adjudicated by RATER`.

        It takes back earlier adjudications of the task.

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
        task = self.queue.task(text_field(body, "task"))
        posted = self._repeated(rater, request, body)
        if posted is None:
            who = Rater(f"{ADJUDICATED}{rater}", self._source(rater))
            context = AnswerContext(task, who, shown_order(task, rater, self.seed), 0.0, now())
            payload = body.get("payload")
            records = records_of(context, payload, None)
            overruled = [
                r for post in self.queue.posts(("adjudicate",), task=task.id) for r in post.records if r.answered
            ]
            records += [retraction(record, now()) for record in overruled]
            posted = Post(rater, "adjudicate", task.id, dict(payload or {}), tuple(records), 0.0, False)
            self.queue.post(posted, request, text_of(body), self.store)
        return {"recorded": [record.id for record in posted.records if record.answered]}

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

    def overruled(self, rater: str) -> frozenset[str]:
        """Returns the ids of the records that an adjudication overrules.

        Args:
            rater: who asks; must be the coordinator.

        Raises:
            Forbidden: the rater is not the coordinator.
        """
        self._only_coordinator(rater)
        found: set[str] = set()
        for task in self.queue.decided():
            posts = self.queue.posts(task=task)
            last = [post for post in posts if post.act == "adjudicate"][-1]
            found |= {r.id for post in posts for r in post.records} - {r.id for r in last.records}
        return frozenset(found)

    def export(self, final: bool, overruled: Collection[str], after: int) -> tuple[list[Json], int]:
        """Returns the next records of the store, at most `EXPORT_STEP` of them, and where to go on.

        Args:
            final: only the records that hold in the end: none that was retracted or replaced, and of an adjudicated task
                only the adjudication.
            overruled: the ids of the records to leave out.
            after: the place after which to begin; 0 = the beginning.

        Returns:
            (the records, the place of the last one; 0 at the end of the store).
        """
        found = list(itertools.islice(self.store.read(superseded=not final, after=after), EXPORT_STEP))
        records = [to_json(stored.judgement) for stored in found if stored.judgement.id not in overruled]
        return records, found[-1].sequence if len(found) == EXPORT_STEP else 0
