"""A judge behind an API, for a training loop: questions go out in the background, judgements come in as they arrive.

    with JudgeClient(ApiConfig(server="http://127.0.0.1:8000/v1", model="qwen"), store=folder / "feedback.sqlite") as judge:
        futures = judge.submit(questions, PAIRWISE)      # returns at once; the calls are made beside whatever comes next
        ...                                              # the next rollout
        outcomes = [future.result() for future in futures]

Every pair is asked in both orders. Each judgement is in the store before its future is done, once, however often it is
asked for. A call that fails for good, or that a budget forbids, is a judgement without a value (`error`), with the reason
in `raw`: it is missing, and a later run asks again and supersedes it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, Literal

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.api.cache import CallCache
from rlaif_jax.feedback.api.config import ApiConfig
from rlaif_jax.feedback.api.limits import BudgetSpent
from rlaif_jax.feedback.api.templates import Question, Template
from rlaif_jax.feedback.api.transport import Answered, CallFailed, Server, Spent
from rlaif_jax.feedback.api.verdicts import Debias, Preference, Reading, judgement, preference, read_verdict
from rlaif_jax.feedback.records.forms import ANSWERED, Call, Judgement, Rater, Rating, sha256, to_json
from rlaif_jax.feedback.records.store import Store


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A question with its judgements: of a pair one for each order and repeat, else one for each repeat."""

    question: Question
    judgements: tuple[Judgement, ...]
    debias: Debias = "logit"

    @property
    def missing(self) -> tuple[Judgement, ...]:
        """Those without a value."""
        return tuple(entry for entry in self.judgements if not entry.answered)

    @property
    def preference(self) -> Preference | None:
        """Of a pair: both orders together; None if one of them has no answer."""
        return preference(self.judgements, debias=self.debias)

    @property
    def rating(self) -> float | None:
        """Of an answer: the mean over the repeats that were answered; None if none was."""
        values = [entry.value for entry in self.judgements if isinstance(entry, Rating) and entry.answered]
        return sum(values) / len(values) if values else None


class JudgeClient:
    """Asks a server's model. The calls run in a thread of their own; all methods may be called from any thread.

    store: where each judgement is recorded as it arrives; None = nowhere. listener: called with each judgement, in the
    client's thread. Raises UserError if the package openai is missing, or the variable that should hold the key.
    """

    def __init__(
        self, config: ApiConfig, *, store: Path | None = None, listener: Callable[[Judgement], None] | None = None
    ) -> None:
        self.config = config
        self._listener = listener
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._disk = ThreadPoolExecutor(1, "judge-disk")  # SQLite objects stay in the thread that made them
        self._thread: Thread | None = None
        self._tasks: dict[str, asyncio.Task[Judgement]] = {}
        try:
            kept = config.cache or (store and Path(store).with_suffix(".calls.sqlite"))
            self._cache = self._disk.submit(CallCache, kept).result()
            self._recorder = self._disk.submit(Recorder, store).result()
            self._server = Server(config, self._keep)
        except BaseException:
            self._disk.shutdown()
            self._loop.close()
            raise
        self._thread = Thread(target=self._loop.run_forever, name="judge", daemon=True)
        self._thread.start()

    def __enter__(self) -> JudgeClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop: what has not been answered stays unasked. Everything that was answered is on disk."""
        if self._closed:
            return
        self._closed = True
        self._on_loop(self._stop()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        assert self._thread is not None
        self._thread.join()
        self._loop.close()
        self._disk.submit(self._cache.close).result()
        self._disk.submit(self._recorder.close).result()
        self._disk.shutdown()

    async def _stop(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._server.close()

    def _on_loop(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _keep(self, method: str, *arguments: Any) -> Any:
        """A method of the cache, in the thread of the disk."""
        return await self._loop.run_in_executor(self._disk, getattr(self._cache, method), *arguments)

    @property
    def spent(self) -> Spent:
        """Requests, tokens and money so far."""
        return self._server.spent

    @property
    def concurrency(self) -> int:
        """Calls at a time, now: less than the config's after "too many requests"."""
        return self._server.concurrency

    # ---- questions

    def submit(self, questions: Sequence[Question], template: Template) -> list[Future[Outcome]]:
        """Start asking; a future for each question, in their order. The same question twice is asked once.

        Raises UserError at once for a question that the template cannot ask, naming it. (Of [direct] and [reasons] the
        server's log-probabilities may decide; a question that only the ending in use cannot ask is an `error`.)
        """
        require(not self._closed, "this judge is closed")
        orders = ((0, 1), (1, 0)) if template.form == "ranking" else ((0,),)
        for question in questions:
            self._require_askable(question, template, orders[0])
        return [self._on_loop(self._judge(question, template, orders)) for question in questions]

    def _direct(self, template: Template, logprobs: bool) -> bool:
        """Whether the reply is to begin with a label, of a server with or without log-probabilities."""
        reading = self.config.reading
        wanted = reading == "direct" or (reading == "auto" and logprobs and template.scorable)
        return template.choices and (not template.reasoned or (wanted and bool(template.direct)))

    def _ending(self, template: Template, logprobs: bool) -> Literal["direct", "reasons", ""]:
        if not template.choices:
            return ""
        return "direct" if self._direct(template, logprobs) else "reasons"

    def _require_askable(self, question: Question, template: Template, order: tuple[int, ...]) -> None:
        """UserError if neither of the endings that may be used can ask this."""
        try:
            template.ask(question, order, ending=self._ending(template, True))
        except UserError:
            template.ask(question, order, ending=self._ending(template, False))

    def judge(self, questions: Sequence[Question], template: Template) -> list[Outcome]:
        """`submit`, and wait for all."""
        return [future.result() for future in self.submit(questions, template)]

    async def _judge(self, question: Question, template: Template, orders: tuple[tuple[int, ...], ...]) -> Outcome:
        seeds = range(self.config.seed, self.config.seed + self.config.repeats)
        tasks = [self._task(question, template, order, seed) for seed in seeds for order in orders]
        return Outcome(question, tuple(await asyncio.gather(*tasks)), self.config.debias)

    def _task(
        self, question: Question, template: Template, order: tuple[int, ...], seed: int
    ) -> asyncio.Future[Judgement]:
        """The one task that asks this, started or under way already."""
        key = sha256([dataclasses.asdict(question) | {"where": ""}, template.hash, order, seed])
        task = self._tasks.get(key)
        if task is None:
            task = self._loop.create_task(self._one(question, template, order, seed))
            self._tasks[key] = task
            task.add_done_callback(lambda _: self._tasks.pop(key, None))
        return asyncio.shield(task)

    def rater(self, question: Question, template: Template) -> Rater:
        """Who the records say has judged. The prompt hash covers what a question adds to the template's wording."""
        config = self.config
        added = [question.rubric, question.reference, question.critique]
        return Rater(
            name=config.rater or config.model,
            source="ai",
            model=f"{config.model}@{config.revision}" if config.revision else config.model,
            prompt_hash=sha256([template.hash, *added]) if any(added) else template.hash,
        )

    async def _one(self, question: Question, template: Template, order: tuple[int, ...], seed: int) -> Judgement:
        rater = self.rater(question, template)
        make = lambda reading, **rest: judgement(
            question, template, reading, order=order, rater=rater, seed=seed, **rest
        )
        try:
            reading, answers = await self._ask(question, template, order, seed)
            made = make(
                reading,
                raw=answers[-1].reply.refusal or answers[-1].reply.text,
                time=answers[-1].time,
                call=_call(answers),
            )
        except (
            CallFailed,
            BudgetSpent,
            UserError,
            ValueError,
            sqlite3.Error,
        ) as failed:  # of this question, not of all
            made = make(Reading("error"), raw=self._server.scrub(str(failed)), time=time.time())
        recorded: Judgement = await self._loop.run_in_executor(self._disk, self._recorder.record, made)
        if self._listener is not None:
            self._listener(recorded)
        return recorded

    async def _ask(
        self, question: Question, template: Template, order: tuple[int, ...], seed: int
    ) -> tuple[Reading, list[Answered]]:
        """The verdict, and the one or two replies that it took."""
        config, server = self.config, self._server
        facts = await server.facts()
        logprobs = facts.top_logprobs > 0
        direct = self._direct(template, logprobs)
        asked = template.ask(question, order, ending=self._ending(template, logprobs))
        scored = logprobs and template.choices and template.scorable
        length = (1 if scored else 8) if direct else config.max_tokens or template.max_tokens
        read = lambda reply: read_verdict(reply, template, asked, direct=direct, min_mass=config.min_mass)
        first = await server.ask(asked.messages, max_tokens=length, logprobs=scored, order=order, seed=seed)
        reading = read(first.reply)
        if reading.status != "abstained" or config.constrain == "none" or not facts.constrains:
            return reading, [first]
        try:  # it wants to say something else: make it choose
            labels = [label for label, _ in template.labels]
            again = await server.ask(
                asked.messages, max_tokens=length, logprobs=scored, order=order, seed=seed, labels=labels
            )
        except (CallFailed, BudgetSpent):
            return reading, [first]
        chosen = read(again.reply)
        return (chosen, [first, again]) if chosen.status in ANSWERED else (reading, [first, again])


def _call(answers: Sequence[Answered]) -> Call:
    return Call(
        latency_s=sum(answer.latency_s for answer in answers),
        prompt_tokens=sum(answer.reply.prompt_tokens or 0 for answer in answers),
        completion_tokens=sum(answer.reply.completion_tokens or 0 for answer in answers),
        cost=sum(answer.cost for answer in answers),
    )


class Recorder:
    """Puts judgements into a store, each once: a new one about the same supersedes what was there."""

    def __init__(self, store: Path | None) -> None:
        self._store = Store(store) if store is not None else None

    def close(self) -> None:
        """Release the file."""
        if self._store is not None:
            self._store.close()

    def record(self, made: Judgement) -> Judgement:
        """Record `made`; what is on record now. A missing one never replaces an answer, nor the same failure itself."""
        if self._store is None:
            return made
        subject = _subject(made)
        try:  # looked up now: another process may have recorded the same meanwhile
            about = [entry.judgement for entry in self._store.read(source="ai", item=made.item)]
            known = next((entry for entry in reversed(about) if _subject(entry) == subject), None)
            if known is not None:
                if (known.answered and not made.answered) or _content(known) == _content(made):
                    return known
                made = dataclasses.replace(made, supersedes=known.id)
            self._store.add([made])
        except sqlite3.Error as error:
            raise UserError(f"{self._store.path}: a judgement cannot be recorded ({error})") from error
        return made


def _subject(entry: Judgement) -> str:
    """What a judgement is about: who, what, in which order, by what, with which seed."""
    shown = [entry.answers[i] for i in entry.shown] if entry.shown else list(entry.answers)
    if len(set(shown)) < len(shown):  # two answers of the same words still are two orders
        shown.append(str(entry.shown))
    rater = [entry.rater.name, entry.rater.model, entry.rater.prompt_hash]
    return sha256([entry.form, rater, entry.prompt, shown, entry.principle, entry.seed])


def _content(entry: Judgement) -> dict[str, Any]:
    """What it says, whenever it was said."""
    values = to_json(entry)
    for name in ("call", "supersedes", "time"):
        del values[name]
    return values
